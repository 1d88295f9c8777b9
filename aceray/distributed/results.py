"""From the workers' shares to what a run leaves: poses, volume, evaluation and figures, in its folder and in MLflow."""

import csv
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from aceray.config import Config
from aceray.data import original
from aceray.data.mrc import read_volume, write_volume
from aceray.data.particles import ParticleSet, ParticleStack, open_particles
from aceray.data.pose_files import read_poses
from aceray.data.storage import written_atomically
from aceray.distributed.share import Share
from aceray.em.fourier import HalfDisc
from aceray.em.rotation import relion_from_rotation
from aceray.errors import DataError
from aceray.folder import RunFolder, RunResult, write_json
from aceray.metrics.fsc import FscCurve, fourier_shell_correlation, resolution_px
from aceray.tracking.run import Tracker
from aceray.train.evaluate import HALF_MAP_THRESHOLD, HalfMaps, MaskKind, compare_half_maps, evaluate
from aceray.train.figures import draw_figures, fsc_figure, near_symmetry_figure
from aceray.train.oracle import OracleProgress, run_oracle
from aceray.train.predict import Poses, particles_from_stack

DIGITS_OF_A_NOTE = 4
FIELD_TOLERANCE = 0.005


def write_results(
    config: Config,
    folder: RunFolder,
    particles: ParticleSet,
    shares: list[Share],
    tracker: Tracker,
    beside: Mapping[str, float] | None = None,
) -> RunResult:
    """Evaluate, as far as there is a truth; write every file, metrics.json last; store them with the MLflow run.

    `beside` are metrics that are reported along with the run's own: the oracle's.

    Volume and poses are written in the reconstruction's own frame, in which they belong together; the figures show the
    aligned volume.

    Raises:
        DataError: a file cannot be written.
    """
    manifest, poses, volume = particles.manifest, join_poses(shares), shares[0].volume
    pixel_size_angstrom = manifest.pixel_size_angstrom * manifest.box / volume.shape[-1]
    evaluation = evaluate(
        volume, poses, particles.read_truth(), particles.read_truth_volume(), manifest.pixel_size_angstrom
    )
    write_volume(folder.volume, volume, pixel_size_angstrom)
    folder.figures.mkdir(exist_ok=True)
    of_halves = _write_halves(folder, shares[0], pixel_size_angstrom)
    write_poses(folder, poses, manifest.pixel_size_angstrom)
    original.write_poses(folder.poses_star, particles, poses.rotation, poses.shift_px)
    if evaluation.volume is not None:
        _write_table(folder.fsc, evaluation.volume.fsc.columns())
    history = folder.read_history()
    rows = [{key: float(value) for key, value in row.items() if value is not None} for row in history]
    figures = draw_figures(evaluation, volume, pixel_size_angstrom, rows)
    if config.refine is not None and config.refine.registers:
        order, correlation = (shares[0].metrics[f"refine/near_symmetry_{name}"] for name in ("order", "correlation"))
        figures["near_symmetry"] = near_symmetry_figure(volume, config.refine.near_symmetry, int(order), correlation)
    for name, figure in figures.items():
        _write_figure(folder.figures / f"{name}.png", figure)
    metrics = {
        **_of_training(folder, rows),
        **evaluation.metrics,
        **_mean_metrics(shares),
        **of_halves,
        **(beside or {}),
    }
    write_json(folder.metrics, metrics)
    news = {name: value for name, value in metrics.items() if not name.startswith("train/loss")}
    tracker.summarise(int(metrics["train/steps"]), news)
    paths = folder.paths
    tracker.keep(
        [path for name, path in paths.items() if name != "checkpoints"],
        _note(config, particles, len(poses.particle_id), metrics),
    )
    return RunResult(metrics, folder.path, paths, tracker.run_id)


def _write_halves(folder: RunFolder, share: Share, pixel_size_angstrom: float) -> dict[str, float]:
    """Where poses were refined, the maps of the two halves and the mask, the FSC as table and figure, the resolution.

    With `refine.halves=joint` all poses were refined against the map of both: the curve is optimistic, unlike that of
    two half sets' own runs.
    """
    for file in (*folder.half_maps, folder.mask, folder.half_map_fsc, _half_map_figure(folder)):  # of an earlier volume
        file.unlink(missing_ok=True)
    if share.halves is None or share.mask is None:
        return {}
    write_volume(folder.mask, share.mask, pixel_size_angstrom)
    for file, half in zip(folder.half_maps, share.halves, strict=True):
        write_volume(file, half, pixel_size_angstrom)
    values, box = fourier_shell_correlation(*share.halves), share.volume.shape[-1]
    curve = FscCurve(values, box, pixel_size_angstrom)
    _write_table(folder.half_map_fsc, curve.columns())
    _write_figure(_half_map_figure(folder), fsc_figure({"refined halves": curve}))
    pixels = resolution_px(values, HALF_MAP_THRESHOLD, box)
    return {
        f"refine/half_map_resolution_px_{HALF_MAP_THRESHOLD}": pixels,
        f"refine/half_map_resolution_angstrom_{HALF_MAP_THRESHOLD}": pixels * pixel_size_angstrom,
    }


def oracle_metrics(
    particles: ParticleSet, stack: ParticleStack, device: str, on_progress: Callable[[OracleProgress], None] | None
) -> dict[str, float]:
    """The oracle's metrics on the particles of a stack, at its box; DataError when the truth is not known."""
    truth, volume = particles.read_truth(), particles.read_truth_volume()
    if truth is None or volume is None:
        raise DataError(
            f"{particles.path}: holds no true poses and volume, so there is no oracle; leave out --oracle, or use a "
            "simulated set"
        )
    manifest, disc = particles.manifest, HalfDisc(stack.images.shape[-1]).to(device)
    images = particles_from_stack(stack, disc, manifest.pixel_size_angstrom * manifest.box / disc.box)
    oracle = run_oracle(images, disc, truth, volume, manifest.noise_std, manifest.pixel_size_angstrom, on_progress)
    return oracle.metrics


def score_files(dataset: str | Path, poses: str | Path, volume: str | Path) -> dict[str, float]:
    """Metrics of poses (STAR, .cs, .pkl) and a volume (MRC) that another program made of a data set, against its truth.

    Raises:
        DataError: a file is missing or not of this data set, or the truth of the data set is not known.
    """
    particles = open_particles(dataset)
    manifest, truth, true_volume = particles.manifest, particles.read_truth(), particles.read_truth_volume()
    if truth is None and true_volume is None:
        raise DataError(f"{particles.path}: holds neither true poses nor a true volume to compare with")
    if manifest.source.get("kind") == "prepared":
        rotation, shift_px, number = original.read_original_poses(poses, particles)
    else:
        rotation, shift_px, number = read_poses(poses, manifest)
    predicted, pixel_size_angstrom = read_volume(volume)
    field, ours = pixel_size_angstrom * predicted.shape[-1], manifest.pixel_size_angstrom * manifest.box
    if abs(field - ours) > FIELD_TOLERANCE * ours:
        raise DataError(
            f"{volume}: is {field:.1f} A wide, the images of {particles.path} {ours:.1f} A; give the volume in the "
            "images' box, with its pixel size in the header"
        )
    found = Poses(number, rotation, shift_px, torch.zeros(len(number)))
    return evaluate(predicted, found, truth, true_volume, manifest.pixel_size_angstrom).metrics


def write_half_maps(folder: RunFolder, other: RunFolder, mask: MaskKind, tracker: Tracker) -> RunResult:
    """Compare a run's volume with that of the other half: half_map_fsc.csv, a figure and metrics of the first run.

    Raises:
        DataError: a volume is missing or damaged, or they differ in box or pixel size.
    """
    (first, size), (second, other_size) = (_finished_volume(each) for each in (folder, other))
    if first.shape != second.shape or abs(size - other_size) > FIELD_TOLERANCE * size:
        raise DataError(
            f"{other.volume}: {second.shape[-1]} px of {other_size:.4g} A, {folder.volume}: {first.shape[-1]} px of "
            f"{size:.4g} A; half maps need one box: train both with the same data.box"
        )
    compared = compare_half_maps(first, second, size, mask)
    _write_table(folder.half_map_fsc, _half_map_columns(compared))
    curves = {f"half maps, mask {mask}": compared.curve}
    if mask != "none":
        curves["half maps, no mask"] = FscCurve(compared.fsc.unmasked, compared.curve.box, size)
    folder.figures.mkdir(exist_ok=True)
    _write_figure(_half_map_figure(folder), fsc_figure(curves))
    before = json.loads(folder.metrics.read_text()) if folder.metrics.exists() else {}
    metrics = {name: value for name, value in before.items() if value is not None} | compared.metrics
    write_json(folder.metrics, metrics)
    tracker.summarise(int(metrics.get("train/steps", 0)), compared.metrics)
    tracker.keep([folder.half_map_fsc, folder.figures, folder.metrics])
    return RunResult(metrics, folder.path, folder.paths, tracker.run_id)


def _finished_volume(folder: RunFolder) -> tuple[torch.Tensor, float]:
    if not folder.volume.exists():
        raise DataError(f"{folder.path}: the run has no volume yet; train it to its end first")
    return read_volume(folder.volume)


def _half_map_figure(folder: RunFolder) -> Path:
    return folder.figures / "half_map_fsc.png"


def _write_figure(path: Path, figure: Any) -> None:
    with written_atomically(path) as file:
        figure.savefig(file, format="png")


def _half_map_columns(compared: HalfMaps) -> dict[str, list[float]]:
    """The curve that counts as `fsc`, and those it was made of."""
    fsc = compared.fsc
    parts = {"fsc_unmasked": fsc.unmasked, "fsc_masked": fsc.masked, "fsc_random_phases": fsc.randomised}
    return compared.curve.columns() | {name: curve[1:].tolist() for name, curve in parts.items()}


def join_poses(shares: list[Share]) -> Poses:
    """The poses of all workers, in the order of the particles."""
    names = ("particle_id", "rotation", "shift_px", "residual")
    columns = {name: torch.cat([getattr(share.poses, name).detach().cpu() for share in shares]) for name in names}
    order = columns["particle_id"].argsort()
    return Poses(**{name: column[order] for name, column in columns.items()})


def write_poses(folder: RunFolder, poses: Poses, pixel_size_angstrom: float) -> None:
    """poses.parquet: particle, RELION angles and origins (minus the shift), the residual of the image."""
    rot, tilt, psi = relion_from_rotation(poses.rotation.double())
    origin = -poses.shift_px.double() * pixel_size_angstrom
    columns = {
        "particle_id": (poses.particle_id, "position in the dataset, from 0"),
        "rot_deg": (rot, "degree, RELION ZYZ"),
        "tilt_deg": (tilt, "degree, RELION ZYZ"),
        "psi_deg": (psi, "degree, RELION ZYZ"),
        "origin_x_angstrom": (origin[:, 0], "angstrom, minus the content's shift along x"),
        "origin_y_angstrom": (origin[:, 1], "angstrom, minus the content's shift along y"),
        "residual": (poses.residual, "mean squared difference per pixel over the signal's variance"),
    }
    arrays = {name: pa.array(values.numpy()) for name, (values, _) in columns.items()}
    fields = [pa.field(name, arrays[name].type, metadata={"unit": unit}) for name, (_, unit) in columns.items()]
    with written_atomically(folder.poses) as file:
        pq.write_table(pa.table(list(arrays.values()), schema=pa.schema(fields)), file)


def _of_training(folder: RunFolder, rows: list[dict[str, float]]) -> dict[str, float]:
    """The last losses, the usual speed, the number of steps and the time they took, restarts included."""
    trained = [row for row in rows if "train/loss_total" in row]
    last = {key: value for key, value in (trained[-1] if trained else {}).items() if key.startswith("train/")}
    if rows:
        last["train/particles_per_second"] = statistics.median(row["train/particles_per_second"] for row in rows)
    steps = rows[-1]["step"] if rows else 0.0
    return {**last, "train/steps": steps, "train/wall_seconds": folder.read_notes().get("wall_seconds", 0.0)}


def _mean_metrics(shares: list[Share]) -> dict[str, float]:
    """The workers' label-free metrics, each of about as many particles, as one."""
    return {name: statistics.fmean(share.metrics[name] for share in shares) for name in shares[0].metrics}


def _write_table(path: Path, columns: dict[str, list[float]]) -> None:
    with written_atomically(path) as file, open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _note(config: Config, particles: ParticleSet, count: int, metrics: dict[str, float]) -> str:
    """What MLflow shows on the run's page, in Markdown."""
    manifest = particles.manifest
    shown = [(name, value) for name, value in metrics.items() if not name.startswith("train/loss")]
    rows = "".join(f"| {name} | {value:.{DIGITS_OF_A_NOTE}g} |\n" for name, value in shown)
    return (
        f"ACE-EM, {config.encoder.kind} encoder, {config.decoder.kind} decoder: {count} particles of "
        f"{manifest.box} px ({manifest.pixel_size_angstrom:g} A/px), {config.train.steps} steps of "
        f"{config.train.batch} particles.\n\n| metric | value |\n| --- | --- |\n{rows}\n"
        "Artifacts: figures/slices.png, figures/fsc.png, figures/view_directions.png, figures/rotation_errors.png, "
        "figures/training.png (those that the data allow), volume.mrc, poses.star, config.yaml."
    )
