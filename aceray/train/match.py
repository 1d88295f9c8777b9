"""Poses of new particles against the finished map of a run.

The map stays as it is, so every image is treated by itself: what it gets does not depend on the portion it comes in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from aceray.em.fourier import HalfDisc, crop_volume
from aceray.train.energy import Matches, Reference, refine_poses
from aceray.train.predict import Particles, Poses
from aceray.train.refine import Level, Round, Search, agreed_reference, shift_penalty


@dataclass(frozen=True)
class FinishedMap:
    """What the refinement of a run left for particles to come.

    The map of all poses at the largest box, the correlation of its halves for shells 0 … d//2, and the training images'
    mean power in each shell. `energy` is what was left unexplained on average, `lost_energy` what those particles
    reached that were explained worst; `shift_spread_px`, in pixels of the stored images, is that of the run's shifts,
    None where there are none.
    """

    volume: Float[Tensor, "d d d"]
    half_fsc: Float[Tensor, " s"]
    power: Float[Tensor, " s"]
    energy: float
    lost_energy: float
    shift_spread_px: float | None


@dataclass(frozen=True)
class _Pass:
    """One comparison of every image with the map: at a round's box, with all rotations where there is a search."""

    plan: Round
    disc: HalfDisc
    reference: Reference
    search: Search | None


class Matcher:
    """Refines poses of images against a finished map, by the rounds of the run that made it.

    A round that searched all particles does so again, from another turn of the grid than the others. The last ones
    search those that are explained as badly as the worst of the run. `disc` is that of the map's box.
    """

    def __init__(
        self, finished: FinishedMap, disc: HalfDisc, rounds: Sequence[Round], stored_box: int, seed: int
    ) -> None:
        self._finished, self._disc, self._stored_box = finished, disc, stored_box
        self._passes = [self._pass(plan, seed, number) for number, plan in enumerate(rounds)]

    def _pass(self, plan: Round, seed: int, number: int) -> _Pass:
        finished, disc = self._finished, HalfDisc(plan.box).to(self._disc.radius.device)
        # a cropped volume projects to the cropped images times the square of the ratio
        volume = crop_volume(finished.volume, plan.box) * (self._disc.box / plan.box) ** 2
        spread_px = finished.shift_spread_px
        if spread_px is not None:
            spread_px *= plan.box / self._stored_box
        penalty = None if spread_px is None else shift_penalty(finished.energy, spread_px)
        weight = disc.weight / finished.power[disc.shell]
        reference = agreed_reference(volume, finished.half_fsc[: plan.box // 2 + 1], disc, weight, penalty)
        return _Pass(plan, disc, reference, plan.search(reference, spread_px, seed, number))

    @torch.no_grad()
    def __call__(self, particles: Particles, start: Poses) -> Poses:
        """Refined poses of particles at the map's box, in the images' units; the residual is the share unexplained."""
        device = self._disc.radius.device
        rotation, shift_px = start.rotation.to(device), start.shift_px.to(device)
        found = Matches(rotation, shift_px, torch.ones(len(rotation), device=device))
        for each in self._passes:
            found = self._refined(each, particles, found)
        return Poses(particles.particle_id, found.rotation.cpu(), found.shift_px.cpu(), found.energy.cpu())

    def _refined(self, each: _Pass, particles: Particles, before: Matches) -> Matches:
        """Poses of a pass; shifts in pixels of the stored images, energies over the number of coefficients."""
        level = Level(particles, self._disc, each.plan.box, self._finished.power)
        scale, parts = each.plan.box / self._stored_box, []
        for rows, images in level.chunks():
            start = Matches(before.rotation[rows], before.shift_px[rows] * scale, before.energy[rows])
            compared = images.at(each.reference.index)
            power = compared.power(each.reference.weight)
            found = refine_poses(each.reference, compared, start, each.plan.steps)
            if each.search is not None:
                lost = self._lost(each, found.relative_to(power))
                found = each.search.improved(images, found, start.shift_px, lost)
            parts.append(replace(found.relative_to(power), shift_px=found.shift_px / scale))
        return Matches.concatenate(parts)

    def _lost(self, each: _Pass, found: Matches) -> Bool[Tensor, " b"]:
        """Which images to search: all of them in rounds of search, later those beyond the energy of the worst."""
        if each.plan.searched >= 1:
            return torch.ones_like(found.energy, dtype=torch.bool)
        at_the_maps_box = each.plan.box == self._disc.box
        return (found.energy >= self._finished.lost_energy) & at_the_maps_box


def rounds_of_match(rounds: Sequence[Round]) -> list[Round]:
    """Of a run's rounds those that a finished map needs: one search of all, then the last ones."""
    searches = [plan for plan in rounds if plan.searched >= 1]
    return [*searches[:1], *(plan for plan in rounds if plan.searched < 1 and not plan.registers)]
