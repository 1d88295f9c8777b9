"""Poses for new particles by a finished run, in this process or by Ray Data's actors."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aceray.data.convert import Conversion, Treatment, plan_conversion, treated_images
from aceray.data.location import Location
from aceray.data.manifest import Manifest
from aceray.data.original import Original, original_of, write_original_poses
from aceray.data.particle_table import Findings
from aceray.data.particles import ParticleStack, open_particles
from aceray.data.source import SourceFiles, open_source
from aceray.data.star import StarFile
from aceray.distributed.export import POSES, own_folder
from aceray.distributed.predictor import Found, FromDataset, Method, Predictor, box_of_images, can_refine
from aceray.distributed.run import device_of
from aceray.em.ctf import CtfParameters
from aceray.em.fourier import crop_images
from aceray.errors import DataError
from aceray.folder import open_run_folder
from aceray.preparation import Prediction
from aceray.presets import load_config
from aceray.train.predict import Poses

_BYTES_AT_ONCE = 128 * 2**20  # images of one prediction
_FIELD_TOLERANCE = 0.005


@dataclass(frozen=True)
class PredictionProgress:
    """How far the prediction is."""

    done: int
    particles: int


@dataclass(frozen=True)
class Predicted:
    """Poses of new particles in files, how many, those that could not be read, the rate, reading included, and how."""

    paths: dict[str, Path]
    particles: int
    refused: int
    particles_per_second: float
    method: str


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
        """Images at the source's box; those that are refused are left out."""
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


def predict_poses(
    run: str | Path,
    source: SourceFiles,
    out: str | Path,
    settings: Prediction,
    on_progress: Callable[[PredictionProgress], None] | None = None,
) -> Predicted:
    """Assign poses to the particles of a dataset, or of a .star, .cs, .txt or stack, and write them to `out`.

    Stacks are treated as those that the run was trained on. STAR and .cs files refer to the original images.

    Raises:
        DataError: there is no checkpoint or, to refine, no map; or the particles' field of view is not the run's.
        ClusterError: Ray cannot give the workers.
    """
    folder = open_run_folder(run)
    if not folder.checkpoint_steps():
        raise DataError(f"{folder.path}: the run has no checkpoint yet; train it first")
    config = load_config(str(folder.config))
    manifest = open_particles(config.data.path, config.data.half_set).manifest
    refinable = can_refine(folder, config)
    if settings.refine and not refinable:
        raise DataError(f"{folder.path}: has no refined map; train with refine to its end, or give --no-refine")
    refine = refinable if settings.refine is None else settings.refine
    method = Method(refine, not refine if settings.eightfold is None else settings.eightfold)
    opened = _opened(source, manifest, box_of_images(config, manifest.box, method.refine))
    portions = opened.portions()
    count = opened.particles.manifest.particles if isinstance(opened, FromDataset) else len(opened.plan.table)
    found: list[dict[str, torch.Tensor]] = []
    with own_folder(out, POSES) as target:
        started, done = time.perf_counter(), 0
        for each in _predicted(folder.path, opened, portions, method, device_of(config), settings):
            found.append(each.columns())
            done += len(each.poses.particle_id)
            if on_progress is not None:
                on_progress(PredictionProgress(done, count))
        rate = done / (time.perf_counter() - started)
        columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        paths = _write(target, opened, columns, manifest)
    return Predicted({path.name: path for path in paths}, done, count - done, rate, _in_words(method))


def _in_words(method: Method) -> str:
    best = ", the best of eight turns and mirrors" if method.eightfold else ""
    return f"encoder{best}" + (", refined against the run's map" if method.refine else "")


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


def _check_field(path: Location, found: float, expected: float) -> None:
    if abs(found - expected) > _FIELD_TOLERANCE * expected:
        raise DataError(
            f"{path}: the images are {found:.1f} A wide, those the run was trained on {expected:.1f} A; extract the "
            "particles in a box of that width."
        )


def _predicted(
    run: Path, source: FromDataset | FromStacks, portions: list[Any], method: Method, device: str, settings: Prediction
) -> Iterator[Found]:
    if settings.workers == 0:
        predictor = Predictor(run, source, method, device)
        yield from (predictor(portion) for portion in portions)
        return
    import ray

    from aceray.distributed.cluster import connect, prepare_ray_data
    from aceray.distributed.failures import known_error

    with connect(settings.address):
        prepare_ray_data()
        if isinstance(source, FromStacks):
            source = dataclasses.replace(source, file=None)
        planned = ray.data.from_items([{"portion": index} for index in range(len(portions))])
        mapped = planned.map_batches(
            _Actor,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(run, ray.put((source, portions)), method, device),
            batch_size=1,
            num_cpus=1,
            num_gpus=1 if device == "cuda" else 0,
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
        )
        try:
            for columns in mapped.iter_batches(batch_size=None, batch_format="numpy"):
                found = {name: torch.from_numpy(np.array(values)) for name, values in columns.items()}
                spread_deg = found.pop("spread_deg", None)
                yield Found(Poses(**found), spread_deg)
        except Exception as error:
            known = known_error(error)
            if known is None:
                raise
            raise known from error


class _Actor:
    """A Predictor of Ray Data: portions by number in, columns of poses out."""

    def __init__(self, run: Path, stored: Any, method: Method, device: str) -> None:
        import ray

        source, self.portions = ray.get(stored)
        torch.set_num_threads(1)
        self.predictor = Predictor(run, source, method, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.predictor(self.portions[int(batch["portion"][0])])
        return {name: values.numpy() for name, values in found.columns().items()}


def _write(
    target: Path, source: FromDataset | FromStacks, columns: dict[str, torch.Tensor], manifest: Manifest
) -> list[Path]:
    """The files of the poses, in the order of the input's rows or of the dataset."""
    number = columns["particle_id"]
    if isinstance(source, FromStacks):
        table = source.plan.table
        order = torch.from_numpy(np.argsort(table.source_row[number.numpy()], kind="stable"))
        chosen = table.take(number[order].numpy())
        boxes = {stack.box for stack in source.plan.stacks if stack is not None}
        original = Original(chosen, source.file, boxes.pop() if len(boxes) == 1 else None)
    else:
        order = number.argsort()
        original = original_of(source.particles)
    origin = -columns["shift_px"][order].double() * manifest.pixel_size_angstrom
    spread_deg = columns["spread_deg"][order] if "spread_deg" in columns else None
    rotation, residual = columns["rotation"][order].double(), columns["residual"][order]
    return write_original_poses(target, original, rotation, origin, residual, spread_deg)
