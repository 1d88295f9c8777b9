"""Poses for new particles by the encoder of a finished run, in this process or by Ray Data's actors."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aceray.build import build_trainer, lane_count, row_groups_of_lanes, training_box
from aceray.config import Config
from aceray.data.convert import Conversion, Treatment, plan_conversion, treated_images
from aceray.data.manifest import Manifest
from aceray.data.original import Original, original_of, write_original_poses
from aceray.data.particle_table import Findings
from aceray.data.particles import ParticleSet, ParticleStack, RowGroup, open_particles, stack_from_table
from aceray.data.source import SourceFiles, open_source
from aceray.data.star import StarFile
from aceray.distributed.export import own_folder
from aceray.distributed.ingest import read_here, tasks
from aceray.distributed.run import device_of
from aceray.em.ctf import CtfParameters
from aceray.em.fourier import crop_images
from aceray.errors import DataError
from aceray.folder import open_run_folder
from aceray.models.autoencoder import AutoEncoder
from aceray.presets import load_config
from aceray.train.predict import Poses, calibrate_normalisation, particles_from_stack, predict

_CALIBRATION_GROUPS = 16  # of 256 particles, as many as a run takes for its own prediction
_BYTES_AT_ONCE = 128 * 2**20  # images of one prediction
_FIELD_TOLERANCE = 0.005
_FILES = ("poses.star", "poses.cs", "poses.parquet")


@dataclass(frozen=True)
class PredictionProgress:
    """How far the prediction is."""

    done: int
    particles: int


@dataclass(frozen=True)
class Predicted:
    """Poses of new particles in files, how many, those that could not be read, and the rate, reading included."""

    paths: dict[str, Path]
    particles: int
    refused: int
    particles_per_second: float


@dataclass(frozen=True)
class FromDataset:
    """New particles in a dataset; numbered as there."""

    particles: ParticleSet
    box: int

    def portions(self) -> list[Any]:
        """Row groups to be read together."""
        return list(tasks(self.particles, self.particles.row_groups(), self.box))

    def read(self, portion: Sequence[RowGroup]) -> ParticleStack:
        """Images at the training box."""
        return stack_from_table(self.particles.read(portion), self.particles.manifest, self.box)


@dataclass(frozen=True)
class FromStacks:
    """New particles in stacks of another program; numbered by their places in the plan.

    `noise_std` is the background level of the images that the run was trained on.
    """

    plan: Conversion
    file: StarFile | np.ndarray | None
    box: int
    noise_std: float

    def portions(self) -> list[Any]:
        """Places in the plan, in the order of the input's rows."""
        order = np.argsort(self.plan.table.source_row, kind="stable")
        size = max(1, _BYTES_AT_ONCE // (4 * self.plan.field.box**2))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def read(self, portion: np.ndarray) -> ParticleStack:
        """Images at the training box; those that are refused are left out."""
        images = torch.empty(len(portion), self.box, self.box)
        good = torch.zeros(len(portion), dtype=torch.bool)
        for rows, treated, reasons in treated_images(self.plan, portion):
            images[rows] = crop_images(treated, self.box) * self.noise_std
            good[rows] = torch.tensor([not reason for reason in reasons])
        kept, ctf = portion[good.numpy()], self.plan.table.ctf
        parameters = None
        if ctf is not None:
            columns = {name: torch.from_numpy(values[kept].astype(np.float32)) for name, values in ctf.items()}
            parameters = CtfParameters(**columns)
        return ParticleStack(images[good], parameters, torch.from_numpy(kept))


class Predictor:
    """The encoder of a run's newest checkpoint, normalised as for the run's own particles; made once on each worker."""

    def __init__(self, run: Path, source: FromDataset | FromStacks, device: str) -> None:
        folder = open_run_folder(run)
        config = load_config(str(folder.config))
        training = open_particles(config.data.path, config.data.half_set)
        steps = folder.checkpoint_steps()
        self.source, self.manifest = source, training.manifest
        self.model = _restored(config, training, folder.read_checkpoint(steps[-1]), device)

    def __call__(self, portion: Any) -> Poses:
        """Poses of a portion; shift_px in pixels of the images that the run's dataset stores."""
        stack = self.source.read(portion)
        if len(stack) == 0:
            return Poses(stack.particle_id, torch.empty(0, 3, 3), torch.empty(0, 2), torch.empty(0))
        disc, manifest = self.model.disc, self.manifest
        pixel_size = manifest.pixel_size_angstrom * manifest.box / disc.box
        images = particles_from_stack(stack, disc, pixel_size).scaled(1 / float(self.model.signal_std))
        return predict(self.model, images, manifest.box)


def _restored(config: Config, training: ParticleSet, checkpoint: tuple[Any, Any], device: str) -> AutoEncoder:
    """The model of a checkpoint, with the batch normalisation of the first particles of its own training set."""
    lanes, box = lane_count(config), training_box(config, training.manifest.box)
    groups = row_groups_of_lanes(training, [0], lanes)[:_CALIBRATION_GROUPS]
    trainer = build_trainer(config, training, read_here(training, groups, box), world_size=lanes, device=device)
    model, few = trainer.model, trainer.sampler.particles
    scaled_by = float(model.signal_std)
    tensors, metadata = checkpoint
    trainer.restore(tensors, {"step": metadata["step"] - metadata.get("rounds", 0)})
    # scaled with what these few particles say; the run's scale is that of all of them
    few.scaled(scaled_by / float(model.signal_std))
    calibrate_normalisation(model, few.take(trainer.sampler.lanes[0].rows))
    return model


def predict_poses(
    run: str | Path,
    source: SourceFiles,
    out: str | Path,
    workers: int = 0,
    address: str | None = None,
    on_progress: Callable[[PredictionProgress], None] | None = None,
) -> Predicted:
    """Assign poses to the particles of a dataset, or of a .star, .cs, .txt or stack, and write them to `out`.

    Stacks are treated as those that the run was trained on. STAR and .cs files refer to the original images.

    Raises:
        DataError: there is no checkpoint, or the particles' field of view is not that of the training set.
        ClusterError: Ray cannot give the workers.
    """
    folder = open_run_folder(run)
    if not folder.checkpoint_steps():
        raise DataError(f"{folder.path}: the run has no checkpoint yet; train it first")
    config = load_config(str(folder.config))
    manifest = open_particles(config.data.path, config.data.half_set).manifest
    opened = _opened(source, manifest, training_box(config, manifest.box))
    target = own_folder(out, _FILES)
    portions = opened.portions()
    count = opened.particles.manifest.particles if isinstance(opened, FromDataset) else len(opened.plan.table)
    found: list[Poses] = []
    started, done = time.perf_counter(), 0
    for poses in _predicted(folder.path, opened, portions, device_of(config), workers, address):
        found.append(poses)
        done += len(poses.particle_id)
        if on_progress is not None:
            on_progress(PredictionProgress(done, count))
    rate = done / (time.perf_counter() - started)
    names = ("particle_id", "rotation", "shift_px", "residual")
    columns = {name: torch.cat([getattr(part, name) for part in found]) for name in names}
    paths = _write(target, opened, Poses(**columns), manifest)
    return Predicted({path.name: path for path in paths}, done, count - done, rate)


def _opened(source: SourceFiles, manifest: Manifest, box: int) -> FromDataset | FromStacks:
    field = manifest.box * manifest.pixel_size_angstrom
    if source.path.is_dir():
        particles = open_particles(source.path)
        _check_field(source.path, particles.manifest.box * particles.manifest.pixel_size_angstrom, field)
        return FromDataset(particles, box)
    findings = Findings()
    opened = open_source(source, findings)
    known = manifest.source.get("treatment", {})
    treatment = Treatment(
        box=manifest.box, invert=known.get("invert", False), normalise=known.get("normalise", "background")
    )
    plan = plan_conversion(opened, treatment, findings)
    findings.raise_errors()
    if any(stack is not None and stack.compression is not None for stack in opened.stacks):
        raise DataError(f"{source.path}: its stacks are compressed; unpack them, or make a dataset (aceray prepare).")
    _check_field(source.path, plan.field.box * plan.field.pixel_size_angstrom, field)
    if (plan.table.ctf is not None) != manifest.ctf:
        raise DataError(f"{source.path}: has {'no ' if manifest.ctf else ''}CTFs, other than the run's particles.")
    return FromStacks(plan, opened.original, box, manifest.noise_std if treatment.normalise == "background" else 1.0)


def _check_field(path: Path, found: float, expected: float) -> None:
    if abs(found - expected) > _FIELD_TOLERANCE * expected:
        raise DataError(
            f"{path}: the images are {found:.1f} A wide, those the run was trained on {expected:.1f} A; extract the "
            "particles in a box of that width."
        )


def _predicted(
    run: Path, source: FromDataset | FromStacks, portions: list[Any], device: str, workers: int, address: str | None
) -> Iterator[Poses]:
    if workers == 0:
        predictor = Predictor(run, source, device)
        yield from (predictor(portion) for portion in portions)
        return
    import ray

    from aceray.distributed.cluster import connect
    from aceray.distributed.supervisor import known_error

    with connect(address):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True  # a DataError stays one
        if isinstance(source, FromStacks):
            source = dataclasses.replace(source, file=None)
        planned = ray.data.from_items([{"portion": index} for index in range(len(portions))])
        mapped = planned.map_batches(
            _Actor,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(run, ray.put((source, portions)), device),
            batch_size=1,
            num_cpus=1,
            num_gpus=1 if device == "cuda" else 0,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        try:
            for columns in mapped.iter_batches(batch_size=None, batch_format="numpy"):
                yield Poses(**{name: torch.from_numpy(np.array(values)) for name, values in columns.items()})
        except Exception as error:
            known = known_error(error)
            if known is None:
                raise
            raise known from error


class _Actor:
    """A Predictor of Ray Data: portions by number in, columns of poses out."""

    def __init__(self, run: Path, stored: Any, device: str) -> None:
        import ray

        source, self.portions = ray.get(stored)
        torch.set_num_threads(1)
        self.predictor = Predictor(run, source, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        poses = self.predictor(self.portions[int(batch["portion"][0])])
        return {name: getattr(poses, name).numpy() for name in ("particle_id", "rotation", "shift_px", "residual")}


def _write(target: Path, source: FromDataset | FromStacks, poses: Poses, manifest: Manifest) -> list[Path]:
    """The files of the poses, in the order of the input's rows or of the dataset."""
    if isinstance(source, FromStacks):
        table = source.plan.table
        order = torch.from_numpy(np.argsort(table.source_row[poses.particle_id.numpy()], kind="stable"))
        chosen = table.take(poses.particle_id[order].numpy())
        boxes = {stack.box for stack in source.plan.stacks if stack is not None}
        original = Original(chosen, source.file, boxes.pop() if len(boxes) == 1 else None)
    else:
        order = poses.particle_id.argsort()
        original = original_of(source.particles)
    origin = -poses.shift_px[order].double() * manifest.pixel_size_angstrom
    return write_original_poses(target, original, poses.rotation[order].double(), origin, poses.residual[order])
