"""One worker's share of a run: train on its particles, keep checkpoints, predict its poses. Knows no Ray."""

from collections.abc import Generator
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor, nn

from aceray.build import build_trainer, truth_score
from aceray.config import Config
from aceray.data.particles import ParticleSet, ParticleStack
from aceray.folder import RunFolder
from aceray.train.loop import Progress, Trainer
from aceray.train.predict import Poses


@dataclass(frozen=True)
class Place:
    """Which of the workers this is, and the device it computes on."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"

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

    The volume is the same on all workers.
    """

    poses: Poses
    volume: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


def train_share(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Generator[Progress, None, Share]:
    """Train from the newest checkpoint of the folder, or from the start; yields every step.

    Raises:
        DataError: the checkpoint is damaged or of another model.
        NonFiniteLoss: a loss is not a number; nothing was updated in that step.
    """
    trainer = _restored(config, folder, particles, stack, place)
    for progress in trainer.run():
        if progress.checkpoint_due:
            tensors, metadata = trainer.checkpoint()
            if place.rank == 0:
                folder.write_checkpoint(tensors, metadata, config.train.keep_checkpoints)
        yield progress
    return Share(trainer.predict(), trainer.volume(), trainer.scores())


def predict_share(
    config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place
) -> Share:
    """Poses and volume of the newest checkpoint of the folder; DataError when it is damaged or of another model."""
    trainer = _restored(config, folder, particles, stack, place)
    return Share(trainer.predict(), trainer.volume(), trainer.scores())


def _restored(config: Config, folder: RunFolder, particles: ParticleSet, stack: ParticleStack, place: Place) -> Trainer:
    trainer = build_trainer(
        config,
        particles,
        stack,
        rank=place.rank,
        world_size=place.workers,
        device=place.device,
        score=truth_score(particles),
        wrap=place.wrap,
    )
    # Rank 0 decides: another node's view of the folder may be older.
    steps = place.gather(folder.checkpoint_steps())[0]
    if steps:
        trainer.restore(*folder.read_checkpoint(steps[-1]))
    return trainer
