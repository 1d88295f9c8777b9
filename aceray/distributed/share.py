"""One worker's share of a run: train on its particles, keep checkpoints, predict its poses. Knows no Ray."""

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from aceray.build import (
    build_refiner,
    build_trainer,
    final_box,
    lane_count,
    last_step,
    row_groups_of_lanes,
    truth_score,
)
from aceray.config import Config
from aceray.data.particles import ParticleSet, ParticleStack, ReadGroups, RowGroup, parts_here, streamed_stack
from aceray.distributed import notice
from aceray.distributed.ingest import read_here
from aceray.distributed.memory import bytes_held, fits, room
from aceray.errors import ClusterError
from aceray.folder import RunFolder
from aceray.metrics.fsc import resolution_angstrom
from aceray.train.evaluate import HALF_MAP_THRESHOLD
from aceray.train.loop import Progress, Score, Snapshot, Trainer
from aceray.train.predict import Poses
from aceray.train.refine import PoseTable, Refined, Refiner

_SCORED_PARTICLES = 1024
# what a checkpoint keeps of a refinement beside the poses
_NOTED = ("moved", "energy", "searched", "symmetry_order", "symmetry_correlation")


@dataclass(frozen=True)
class Place:
    """Which of the workers this is, the device it computes on, and how it reads what it streams."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    read: ReadGroups = parts_here

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module itself, or one that averages its gradients over the workers."""
        if self.workers == 1:
            return module
        devices = None if self.device == "cpu" else [torch.device(self.device)]
        # Parameters of a task that is off (PIP before its warm-up) take no part in a step.
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True)

    def gather(self, value: object) -> list:
        """What each worker has, in the order of the ranks."""
        if self.workers == 1:
            return [value]
        gathered: list = [None] * self.workers
        torch.distributed.all_gather_object(gathered, value)
        return gathered


@dataclass(frozen=True)
class Share:
    """What a worker has at the end: the poses of its particles, their label-free metrics, and the volume.

    The volume is the same on all workers, and so are, where poses were refined, the maps of its two halves and the mask
    that it was cut to.
    """

    poses: Poses
    volume: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    halves: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """ClusterError, one line, for memory that the system or the GPU does not give; other errors as they are."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not (on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        where = "the GPU" if on_gpu else "this machine"
        said = " ".join(str(error).split())[-160:]
        raise ClusterError(
            f"the memory of {where} is used up ({said}); lower train.batch, data.memory_gib or data.box, or take more "
            "machines (resources.workers), then resume"
        ) from error


def load(
    config: Config, particles: ParticleSet, groups: list[RowGroup], box: int, place: Place, held: int = 0
) -> ParticleStack:
    """The particles of row groups, read in this process or streamed; `held` bytes of data.memory_gib are taken.

    Raises:
        ConfigError: there is no bound, and clearly not as much memory as they need.
        DataError: a shard is missing or damaged.
    """
    if fits(config, particles, groups, box, place.device, held):
        return read_here(particles, groups, box)
    return streamed_stack(particles, groups, box, room(config, held), place.read)


def train_share(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """Train and refine from the newest checkpoint of the folder, or from the start; yields every step and round.

    Raises:
        DataError: the checkpoint is damaged or of another model.
        NonFiniteLoss: a loss is not a number; nothing was updated in that step.
        KeyboardInterrupt: notice was given; there is a checkpoint of the step or round that was yielded last.
    """
    score = truth_score(particles)
    trainer, refined = _restored(config, folder, particles, stack, place, score)
    with notice.heeded():
        for progress in trainer.run():
            if progress.checkpoint_due:
                _keep(config, folder, place, *trainer.checkpoint())
            try:
                yield replace(progress, steps=last_step(config))
            finally:  # also where the other run of a pair has its turn when notice is given
                if notice.given() and not progress.checkpoint_due:
                    _keep(config, folder, place, *trainer.checkpoint())
            if notice.given():
                raise KeyboardInterrupt(f"the run was told to end; step {progress.step} is kept")
    if config.refine is None:
        return _share(trainer)
    refiner = _refiner(config, particles, stack, place)
    if refined is None:
        refined = _start(trainer.predict(), place)
    started = time.perf_counter()
    with notice.heeded():
        for state in refiner.run(refined):
            refined = state
            seconds = time.perf_counter() - started
            _keep(config, folder, place, *_checkpoint(trainer, refined, refiner, place))
            yield _progress(config, refiner, refined, seconds, score)
            if notice.given():
                raise KeyboardInterrupt(f"the run was told to end; round {refined.done} is kept")
            started = time.perf_counter()
    return _refined_share(trainer, refiner, refined)


def predict_share(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Share:
    """Poses and volume of the newest checkpoint of the folder; DataError when it is damaged or of another model."""
    trainer, refined = _restored(config, folder, particles, stack, place, truth_score(particles))
    if refined is None:
        return _share(trainer)
    return _refined_share(trainer, _refiner(config, particles, stack, place), refined)


def _share(trainer: Trainer) -> Share:
    return Share(trainer.predict(), trainer.volume(), trainer.scores())


def _refined_share(trainer: Trainer, refiner: Refiner, refined: Refined) -> Share:
    if refined.maps is None:
        refined = refiner.with_maps(refined)
    assert refined.maps is not None
    trainer.calibrate()
    poses = _poses(refiner, refined)
    halves = (refined.maps.halves[0].cpu(), refined.maps.halves[1].cpu())
    maps, metrics = refined.maps, trainer.scores() | refined.metrics
    return Share(poses, maps.joint.cpu(), metrics, halves, maps.mask.cpu())


def _refiner(config: Config, particles: ParticleSet, stack: ParticleStack, place: Place) -> Refiner:
    """Reads the particles again where the refinement needs a larger box than the training."""
    box = final_box(config, particles.manifest.box)
    if stack.images.shape[-1] != box:
        lanes = range(place.rank, lane_count(config), place.workers)
        groups = row_groups_of_lanes(particles, lanes, lane_count(config))
        stack = load(config, particles, groups, box, place, bytes_held(stack))
    return build_refiner(config, particles, stack, place.device)


def _start(poses: Poses, place: Place) -> Refined:
    table = PoseTable(poses.rotation, poses.shift_px, torch.ones_like(poses.residual))
    return Refined(0, PoseTable(*(column.to(place.device) for column in vars(table).values())))


def _poses(refiner: Refiner, refined: Refined) -> Poses:
    table = refined.table
    return Poses(refiner.particles.particle_id, table.rotation.cpu(), table.shift_px.cpu(), table.energy.cpu())


def _progress(config: Config, refiner: Refiner, refined: Refined, seconds: float, score: Score) -> Progress:
    """A round as a step after the last one of the training."""
    assert refined.maps is not None
    poses, volume = _poses(refiner, refined), refined.maps.joint.cpu()
    few = Poses(*(column[:_SCORED_PARTICLES] for column in vars(poses).values()))
    metrics = score(few, volume) | refined.metrics
    step, rate = config.train.steps + refined.done, len(refiner.particles) / seconds
    details = _details(refiner, refined) | {"step_seconds": seconds}
    return Progress(step, last_step(config), {}, rate, metrics, True, Snapshot(few, volume), details)


def _details(refiner: Refiner, refined: Refined) -> dict[str, float]:
    assert refined.maps is not None
    box, particles = refined.maps.joint.shape[-1], refiner.particles
    pixel_size_angstrom = particles.pixel_size_angstrom * refiner.disc.box / box
    return {
        "round": float(refined.done),
        "rescued_fraction": refined.searched,
        "half_map_resolution_angstrom": resolution_angstrom(
            refined.maps.half_fsc, HALF_MAP_THRESHOLD, box, pixel_size_angstrom
        ),
    }


def _keep(
    config: Config, folder: RunFolder, place: Place, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    if place.rank == 0:
        folder.write_checkpoint(tensors, metadata, config.train.keep_checkpoints)


def _checkpoint(
    trainer: Trainer, refined: Refined, refiner: Refiner, place: Place
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained model and the poses of all workers."""
    tensors, metadata = trainer.checkpoint()
    own = {"particle_id": refiner.particles.particle_id, **vars(refined.table)}
    gathered = place.gather({name: column.cpu() for name, column in own.items()})
    for name in own:
        tensors[f"refine.{name}"] = torch.cat([each[name] for each in gathered])
    notes = {name: getattr(refined, name) for name in _NOTED}
    notes["rounds"] = refined.done
    return tensors, {**metadata, "step": metadata["step"] + refined.done, **notes}


def _restored(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place, score: Score
) -> tuple[Trainer, Refined | None]:
    trainer = build_trainer(
        config,
        particles,
        stack,
        rank=place.rank,
        world_size=place.workers,
        device=place.device,
        score=score,
        wrap=place.wrap,
    )
    # Rank 0 decides: another node's view of the folder may be older.
    steps = place.gather(folder.checkpoint_steps())[0]
    if not steps:
        return trainer, None
    tensors, metadata = folder.read_checkpoint(steps[-1])
    rounds = metadata.get("rounds", 0)
    trainer.restore(tensors, {"step": metadata["step"] - rounds})
    if not rounds:
        return trainer, None
    order = tensors["refine.particle_id"].argsort()
    rows = order[torch.searchsorted(tensors["refine.particle_id"][order], stack.particle_id)]
    columns = (tensors[f"refine.{name}"][rows].to(place.device) for name in ("rotation", "shift_px", "energy"))
    noted = {name: metadata[name] for name in _NOTED if name in metadata}
    return trainer, Refined(rounds, PoseTable(*columns), None, **noted)
