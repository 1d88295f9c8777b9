"""Small datasets that the tests of aceray.data share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aceray.data.manifest import ImageLayout
from aceray.data.particles import CTF_UNITS, TRUTH_UNITS, ParticleSet
from aceray.data.writer import ParticleWriter

BOX = 12
PIXEL_SIZE = 2.5


def example_layout(image_dtype: str = "float32", ctf: bool = True) -> ImageLayout:
    return ImageLayout(box=BOX, pixel_size_angstrom=PIXEL_SIZE, ctf=ctf, image_dtype=image_dtype)


def example_rows(first: int, count: int, truth: bool = True) -> tuple[Tensor, dict[str, np.ndarray]]:
    """White noise of standard deviation 3, and columns in which every value differs from every other."""
    generator = np.random.default_rng(first)
    images = torch.from_numpy(generator.normal(0.0, 3.0, (count, BOX, BOX)).astype(np.float32))
    identifier = np.arange(first, first + count)
    columns: dict[str, np.ndarray] = {"particle_id": identifier, "half_set": (1 + identifier % 2).astype(np.int8)}
    for position, name in enumerate(CTF_UNITS):
        columns[name] = (identifier + 1000.0 * position).astype(np.float32)
    if truth:
        for position, name in enumerate(TRUTH_UNITS):
            columns[name] = np.linspace(-40, 40, count) + position
    return images, columns


@pytest.fixture
def write_example(tmp_path: Path) -> Callable[..., ParticleSet]:
    """Writes a set of two shards, 300 + 100 rows, into tmp_path / "set"."""

    def write(image_dtype: str = "float32", ctf: bool = True, truth: bool = True, existing: str = "error"):
        with ParticleWriter(tmp_path / "set", example_layout(image_dtype, ctf), existing) as writer:
            for first, count in ((0, 300), (300, 100)):
                images, columns = example_rows(first, count, truth)
                writer.write(images, columns)
            writer.write_truth_volume(torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(3)))
            return writer.finish({"made_by": "a test"})

    return write


def children(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content, to show that nothing was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
