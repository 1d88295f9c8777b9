"""Poses of images against a volume from nothing: exhaustive search at low frequency, then refinement.

Rotations and shifts are searched together: the best rotation at a wrong shift is seldom the best one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.metrics.coverage import rotation_grid
from aceray.train.energy import Images, Matches, Reference, refine_poses

# entries of one batch's table of energies, images times rotations: 16 MB
_ENERGIES_AT_ONCE = 2**22
# the radius to which all candidates are refined before the best one goes on at full radius, over that of the search
_FIRST_REFINEMENT = 1.6
_CANDIDATES = 4
_FIRST_STEPS, _LAST_STEPS = 4, 4
_NSIDE, _TURNS = 4, 32  # 6,144 rotations, 15 degrees of view and 11 of turn apart
_SHIFT_STEP = 0.325  # of the search's resolution: neighbouring shifts differ by at most two radians of phase
_NEAR_STEPS = 1.5  # how far from the present shift a search of all images looks
_FAR_SPREADS = 4.5  # how far from the origin the shifts of lost images are looked for: 1 in 25,000 lies beyond


@dataclass(frozen=True)
class Bank:
    """Slices of a reference at many rotations, as the factors of matrix products."""

    reference: Reference
    rotation: Float[Tensor, "g 3 3"]
    slices: Float[Tensor, "g q"]  # real and imaginary parts by turns
    power: Float[Tensor, "g p"]


def make_bank(reference: Reference, rotation: Float[Tensor, "g 3 3"]) -> Bank:
    """Slices at the rotations; memory is 12 bytes a rotation and frequency, so take a reference `within` a radius."""
    slices = torch.view_as_real(reference.slices(rotation))
    return Bank(reference, rotation, slices.flatten(1), slices.square().sum(-1))


def turned_grid(nside: int, turns: int, *key: int) -> Float[Tensor, "g 3 3"]:
    """A grid of 12 nside^2 view directions times in-plane turns, as a whole turned at random; `key` names the turn."""
    return rotation_grid(nside, turns) @ random_rotations(1, named_generator("search/turn", *key))[0]


def shift_grid(radius_px: float, step_px: float) -> Float[Tensor, "s 2"]:
    """Square grid of shifts (x, y) in a disc, the origin among them; the origin alone for radius 0."""
    count = math.floor(radius_px / step_px)
    axis = step_px * torch.arange(-count, count + 1)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    grid = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return grid[grid.square().sum(-1) <= radius_px**2 * (1 + 1e-6)]


def search_poses(
    bank: Bank, images: Images, centre_px: Float[Tensor, "b 2"], offsets_px: Float[Tensor, "s 2"], keep: int
) -> Matches:
    """The `keep` best rotations of the bank for each image, each with its best shift of centre + offsets.

    One product of matrices for every offset; memory is 14 bytes an image and rotation. The images have the frequencies
    of the bank's reference.
    """
    reference = bank.reference
    contrast = images.coefficients if images.transfer is None else images.coefficients * images.transfer
    contrast = contrast * reference.weight * reference.phases(centre_px).conj()
    if images.transfer is None:
        power = (bank.power @ reference.weight).expand(len(images), -1)
    else:
        power = (images.transfer.square() * reference.weight) @ bank.power.T
    best = torch.full_like(power, torch.inf, memory_format=torch.contiguous_format)
    chosen = torch.zeros_like(best, dtype=torch.int16)
    for number, offset in enumerate(offsets_px):
        moved = torch.view_as_real(contrast * reference.phases(offset).conj()).flatten(1)
        energy = torch.addmm(power, moved, bank.slices.T, alpha=-2)
        energy += reference.prior(centre_px + offset)[:, None]
        chosen.masked_fill_(energy < best, number)
        torch.minimum(best, energy, out=best)
    energy, row = best.topk(keep, dim=1, largest=False)
    shift = centre_px[:, None] + offsets_px[chosen.gather(1, row).long()]
    return Matches(bank.rotation[row], shift, energy + images.power(reference.weight)[:, None])


def improve_shifts(reference: Reference, images: Images, found: Matches, offsets_px: Float[Tensor, "s 2"]) -> Matches:
    """The best of shift + offsets for each of k candidates an image: their cross-correlation on a finer grid.

    The images have the reference's frequencies.
    """
    rendered = reference.slices(found.rotation)
    if images.transfer is not None:
        rendered = rendered * images.transfer[:, None]
    product = rendered.conj() * images.coefficients[:, None] * reference.phases(found.shift_px).conj()
    product *= reference.weight
    phases = torch.view_as_real(reference.phases(offsets_px)).flatten(1)
    overlap = torch.view_as_real(product).flatten(-2) @ phases.T
    shift = found.shift_px[:, :, None] + offsets_px
    power = torch.view_as_real(rendered).square().sum(-1) @ reference.weight
    energy = reference.prior(shift) - 2 * overlap + power[..., None]
    lowest, chosen = (energy + images.power(reference.weight)[:, None, None]).min(dim=-1)
    moved = shift.gather(2, chosen[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    return Matches(found.rotation, moved, lowest)


def find_poses(
    reference: Reference, bank: Bank, images: Images, centre_px: Float[Tensor, "b 2"], offsets_px: Float[Tensor, "s 2"]
) -> Iterator[Matches]:
    """Search and refine batch by batch: the four best rotations of the bank at low frequency, the best one at all.

    Memory is bounded by the batch, of which there are 4 million energies.
    """
    near = reference.within(_FIRST_REFINEMENT * float(bank.reference.frequency.norm(dim=-1).max()))
    device = images.coefficients.device
    for part in torch.arange(len(images), device=device).split(max(1, _ENERGIES_AT_ONCE // len(bank.rotation))):
        batch = images.take(part)
        low = batch.at(bank.reference.index)
        keep = min(_CANDIDATES, len(bank.rotation))
        found = search_poses(bank, low, centre_px[part], offsets_px, keep)
        if len(offsets_px) > 1:
            found = improve_shifts(bank.reference, low, found, _between(offsets_px))
        flat = Matches(found.rotation.flatten(0, 1), found.shift_px.flatten(0, 1), found.energy.flatten())
        rows = torch.arange(len(batch), device=device).repeat_interleave(keep)
        flat = refine_poses(near, batch.at(near.index), flat, _FIRST_STEPS, rows)
        first = Matches(*(column.unflatten(0, (-1, keep)) for column in vars(flat).values())).best()
        yield refine_poses(reference, batch.at(reference.index), first, _LAST_STEPS)


class Search:
    """All rotations of a freshly turned grid: with the shifts about the present one, or with all shifts that occur.

    The latter is for the few that are lost: where the rotation is wrong the shift mostly is as well. radius in cycles
    per box; `spread_px` is the shifts' standard deviation along an axis, None where there are none; `key` names the
    turn of the grid.
    """

    def __init__(
        self, reference: Reference, radius: float, spread_px: float | None, *key: int, all_shifts: bool = False
    ) -> None:
        grid = turned_grid(_NSIDE, _TURNS, *key).to(reference.frequency)
        self._reference, self._bank = reference, make_bank(reference.within(radius), grid)
        step, self._all_shifts = _SHIFT_STEP * reference.box / radius, all_shifts
        reach = 0.0 if spread_px is None else _NEAR_STEPS * step
        if spread_px is not None and all_shifts:
            reach = max(reach, _FAR_SPREADS * spread_px)
        self._offsets = shift_grid(reach, step).to(reference.frequency)

    def improved(
        self, images: Images, found: Matches, present_px: Float[Tensor, "b 2"], lost: Bool[Tensor, " b"]
    ) -> Matches:
        """The poses found, those of lost images exchanged for what the search finds where that explains them better."""
        rows = lost.nonzero()[:, 0]
        if not len(rows):
            return found
        centre_px = torch.zeros_like(present_px) if self._all_shifts else present_px
        parts = find_poses(self._reference, self._bank, images.take(rows), centre_px[rows], self._offsets)
        return found.replaced(rows, found.take(rows).or_better(Matches.concatenate(list(parts))))


def _between(offsets_px: Float[Tensor, "s 2"]) -> Float[Tensor, "f 2"]:
    """A grid of a third of the spacing that fills the gap between a grid's shifts."""
    step = float(offsets_px[:, 0].unique().diff().min())
    return shift_grid(0.75 * step, step / 3).to(offsets_px)
