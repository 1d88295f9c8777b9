"""A finished run as a function: from images to poses, by its encoder and, where poses were refined, by its map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from aceray.build import (
    build_trainer,
    final_box,
    lane_count,
    last_step,
    refinement_rounds,
    row_groups_of_lanes,
    training_box,
)
from aceray.config import Config
from aceray.data.mrc import read_volume
from aceray.data.particles import ParticleSet, ParticleStack, RowGroup, open_particles, stack_from_table
from aceray.distributed.ingest import read_here, tasks
from aceray.em.fourier import HalfDisc, crop_images
from aceray.errors import DataError
from aceray.folder import RunFolder, open_run_folder
from aceray.metrics.fsc import fourier_shell_correlation
from aceray.models.autoencoder import AutoEncoder
from aceray.presets import load_config
from aceray.train.match import FinishedMap, Matcher, rounds_of_match
from aceray.train.predict import Poses, calibrate_normalisation, particles_from_stack, predict, predict_eightfold
from aceray.train.refine import Level

_CALIBRATION_GROUPS = 16  # of 256 particles, as many as a run takes for its own prediction
_POWER_GROUPS = 4


@runtime_checkable
class Source(Protocol):
    """New particles, in portions."""

    def portions(self) -> list[Any]:
        """What `read` takes, one after the other."""
        ...

    def read(self, portion: Any) -> ParticleStack:
        """The images of a portion."""
        ...


@dataclass(frozen=True)
class FromDataset:
    """New particles in a dataset; numbered as there."""

    particles: ParticleSet
    box: int

    def portions(self) -> list[Any]:
        """Row groups to be read together."""
        return list(tasks(self.particles, self.particles.row_groups(), self.box))

    def read(self, portion: Sequence[RowGroup]) -> ParticleStack:
        """Images at the source's box."""
        return stack_from_table(self.particles.read(portion), self.particles.manifest, self.box)


@dataclass(frozen=True)
class Method:
    """How poses are found: refined against the run's map or the encoder's own; of each image or all of D4."""

    refine: bool
    eightfold: bool


@dataclass(frozen=True)
class Found:
    """Poses of a portion and, where each is the best of eight, their spread in degrees."""

    poses: Poses
    spread_deg: Tensor | None

    def columns(self) -> dict[str, Tensor]:
        """All there is, one row a particle."""
        return vars(self.poses) | ({} if self.spread_deg is None else {"spread_deg": self.spread_deg})


def can_refine(folder: RunFolder, config: Config) -> bool:
    """Whether a run has come to the end of a refinement, so that there is a map to compare new particles with."""
    steps = folder.checkpoint_steps()
    if config.refine is None or not steps or not all(file.exists() for file in (folder.volume, *folder.half_maps)):
        return False
    return folder.read_checkpoint(steps[-1])[1].get("rounds", 0) == last_step(config) - config.train.steps


def box_of_images(config: Config, stored_box: int, refine: bool) -> int:
    """Box at which the images of new particles are needed, pixels."""
    return final_box(config, stored_box) if refine else training_box(config, stored_box)


class Predictor:
    """A run's newest checkpoint, its encoder normalised as for the run's own particles; made once on each worker."""

    def __init__(self, run: Path, source: Source, method: Method, device: str) -> None:
        folder = open_run_folder(run)
        config = load_config(str(folder.config))
        training = open_particles(config.data.path, config.data.half_set)
        checkpoint = folder.read_checkpoint(folder.checkpoint_steps()[-1])
        self.source, self.manifest, self._method = source, training.manifest, method
        self.model = _restored(config, training, checkpoint, device)
        self._matcher = None
        if method.refine:
            self._disc = HalfDisc(final_box(config, training.manifest.box)).to(device)
            finished = _finished_map(folder, config, training, checkpoint, self._disc)
            rounds = rounds_of_match(refinement_rounds(config, training.manifest.box))
            self._matcher = Matcher(finished, self._disc, rounds, training.manifest.box, config.seed)

    def __call__(self, portion: Any) -> Found:
        """Poses of a portion; shift_px in pixels of the images that the run's dataset stores."""
        stack = self.source.read(portion)
        if len(stack) == 0:
            none = torch.empty(0)
            poses = Poses(stack.particle_id, torch.empty(0, 3, 3), torch.empty(0, 2), none)
            return Found(poses, none if self._method.eightfold else None)
        found = self._encoded(stack)
        if self._matcher is None:
            return found
        images = particles_from_stack(stack, self._disc, self._pixel_size_angstrom(self._disc))
        return Found(self._matcher(images, found.poses), found.spread_deg)

    def _encoded(self, stack: ParticleStack) -> Found:
        disc = self.model.disc
        small = ParticleStack(crop_images(stack.images, disc.box), stack.ctf, stack.particle_id)
        images = particles_from_stack(small, disc, self._pixel_size_angstrom(disc))
        images = images.scaled(1 / float(self.model.signal_std))
        if not self._method.eightfold:
            return Found(predict(self.model, images, self.manifest.box), None)
        best = predict_eightfold(self.model, images, self.manifest.box)
        return Found(best.poses, best.spread_deg)

    def _pixel_size_angstrom(self, disc: HalfDisc) -> float:
        return self.manifest.pixel_size_angstrom * self.manifest.box / disc.box


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


def _finished_map(
    folder: RunFolder, config: Config, training: ParticleSet, checkpoint: tuple[Any, Any], disc: HalfDisc
) -> FinishedMap:
    """The run's map, and what its particles were found to be like."""
    assert config.refine is not None
    tensors, metadata = checkpoint
    volume, *halves = (read_volume(path)[0].to(disc.radius.device) for path in (folder.volume, *folder.half_maps))
    if volume.shape[-1] != disc.box:
        raise DataError(f"{folder.volume}: is not the map that the run made ({volume.shape[-1]} px); evaluate it again")
    stack = read_here(training, training.row_groups()[:_POWER_GROUPS], disc.box)
    size = training.manifest.pixel_size_angstrom * training.manifest.box / disc.box
    power = Level(particles_from_stack(stack, disc, size), disc, disc.box).power
    energy, shift_px = tensors["refine.energy"], tensors["refine.shift_px"]
    spread_px = float(shift_px.square().mean()) ** 0.5
    return FinishedMap(
        volume,
        fourier_shell_correlation(halves[0], halves[1]),
        power,
        float(metadata["energy"]),
        float(energy.sort().values[int((1 - config.refine.rescued_fraction) * (len(energy) - 1))]),
        spread_px if config.data.shift_sigma_fraction > 0 else None,
    )
