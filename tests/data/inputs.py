"""Small inputs of other programs that the tests of real stacks share: stacks, STAR and .cs files."""

import warnings
from pathlib import Path

import mrcfile
import numpy as np

SIDE = 16


def some_images(count: int, side: int = SIDE, seed: int = 0, bright: float = 3.0) -> np.ndarray:
    """White noise on a level of 10 around a bright blob a little off the centre, float32."""
    generator = np.random.default_rng(seed)
    axis = np.arange(side) - side // 2
    blob = bright * np.exp(-((axis[:, None] - 1) ** 2 + axis**2) / (side / 8) ** 2)
    return (10 + blob + generator.normal(0, 1, (count, side, side))).astype(np.float32)


def write_stack(path: Path, images: np.ndarray, pixel_size: float = 0.0) -> Path:
    """A stack whose mode and byte order are those of the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), mrcfile.new(path, overwrite=True) as file:
        warnings.simplefilter("ignore", RuntimeWarning)  # bad images are the point of some tests
        file.set_data(images)
        file.set_image_stack()
        if pixel_size:
            file.voxel_size = pixel_size
    return path


def write_star(path: Path, names: list[str], optics: bool = True, **columns: list) -> Path:
    """A STAR file of RELION 3.1 (or, without optics, 3.0) with CTFs; further columns win."""
    count = len(names)
    table = {"rlnImageName": names, "rlnDefocusU": [15000.0 + i for i in range(count)]}
    table |= {"rlnDefocusV": [14000.0 + i for i in range(count)], "rlnDefocusAngle": [30.0] * count}
    if optics:
        table["rlnOpticsGroup"] = [1] * count
    else:
        table |= {"rlnVoltage": [300.0] * count, "rlnSphericalAberration": [2.7] * count}
        table |= {"rlnAmplitudeContrast": [0.1] * count, "rlnMagnification": [25000.0] * count}
        table |= {"rlnDetectorPixelSize": [5.0] * count}
    table |= columns
    lines = []
    if optics:
        lines += ["data_optics", "", "loop_", "_rlnOpticsGroup #1", "_rlnOpticsGroupName #2", "_rlnVoltage #3"]
        lines += ["_rlnSphericalAberration #4", "_rlnAmplitudeContrast #5", "_rlnImagePixelSize #6"]
        lines += ["1 opticsGroup1 300.0 2.7 0.1 2.0", "", ""]
    lines += ["data_particles" if optics else "data_", "", "loop_"]
    lines += [f"_{name} #{number + 1}" for number, name in enumerate(table)]
    lines += [" ".join(str(value) for value in row) for row in zip(*table.values(), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n\n")
    return path


def write_cs(path: Path, columns: dict[str, object]) -> Path:
    """A record array with these columns."""
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    kinds = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    table = np.zeros(len(next(iter(arrays.values()))), dtype=kinds)
    for name, values in arrays.items():
        table[name] = values
    with open(path, "wb") as stream:
        np.save(stream, table, allow_pickle=False)
    return path


def cs_columns(count: int, stack: str = "a.mrcs") -> dict[str, object]:
    """Images and CTFs of as many particles."""
    return {
        "uid": np.arange(count, dtype=np.uint64) + 100,
        "blob/path": np.array([stack.encode()] * count),
        "blob/idx": np.arange(count, dtype=np.uint32),
        "blob/psize_A": np.full(count, 2.0, np.float32),
        "ctf/df1_A": np.linspace(15000, 16000, count, dtype=np.float32),
        "ctf/df2_A": np.linspace(14000, 15000, count, dtype=np.float32),
        "ctf/df_angle_rad": np.full(count, np.pi / 6, np.float32),
        "ctf/accel_kv": np.full(count, 300, np.float32),
        "ctf/cs_mm": np.full(count, 2.7, np.float32),
        "ctf/amp_contrast": np.full(count, 0.1, np.float32),
    }


def with_nan(images: np.ndarray, number: int) -> np.ndarray:
    """The same images, one of them with a pixel that is no number."""
    images = images.copy()
    images[number, 3, 4] = np.nan
    return images
