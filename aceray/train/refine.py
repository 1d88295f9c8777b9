"""Past the encoder: a table of poses, one for each particle, refined in turns with the map they imply.

A round compares every image with the map of the round before, from its own pose and, in rounds of search, from the best
of all poses; the better one is kept, and all images make the next map. Poses by amortised inference start it: from
random ones such rounds do not converge. The residual is whitened by the images' mean power of each shell, without which
the strong low frequencies alone would decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob
from aceray.train.energy import Images, Matches, Reference, make_reference, refine_poses
from aceray.train.predict import Particles
from aceray.train.reconstruct import Maps, Reconstruction
from aceray.train.search import find_poses, make_bank, shift_grid, turned_grid
from aceray.train.statistics import sum_over_workers

_NSIDE, _TURNS = 4, 32  # 6,144 rotations, 15 degrees of view and 11 of turn apart
_SEARCH_STEP = 0.325  # of the search's resolution: neighbouring shifts differ by at most two radians of phase
_CHUNK = 512
# a rotation that moves by more than 41 degrees has left its minimum
_MOVED_SQFROB = 1.0
_SMALLEST_SPREAD_PX = 0.2


@dataclass(frozen=True)
class Round:
    """One turn of poses and map: box in pixels, radius of the search in cycles per box (None: no search), steps."""

    box: int
    search_radius: float | None
    steps: int


@dataclass(frozen=True)
class PoseTable:
    """Poses of a worker's particles; shifts in pixels of the stored images, energy per weight of the last round."""

    rotation: Float[Tensor, "n 3 3"]
    shift_px: Float[Tensor, "n 2"]
    energy: Float[Tensor, " n"]


@dataclass(frozen=True)
class Refined:
    """What a round left: poses, maps, the share of images that took another pose, energy per weight (1: no better than
    an empty map), spread of the shifts in pixels of the stored images."""

    table: PoseTable
    maps: Maps
    moved: float
    energy: float
    shift_spread_px: float | None


class Level:
    """A worker's particles, Fourier-cropped to a round's box."""

    def __init__(self, particles: Particles, disc: HalfDisc, box: int) -> None:
        self.disc = HalfDisc(box).to(disc.radius.device)
        self._index = _inside(disc, self.disc)
        self._particles = particles
        self._pixel_size_angstrom = particles.pixel_size_angstrom * disc.box / box
        self.weight = self.disc.weight / self._power()

    def images(self, rows: Int[Tensor, " b"]) -> Images:
        """Some of the images with their contrast transfer."""
        ctf = self._particles.ctf
        cropped = Particles(
            self._particles.coefficients[rows][:, self._index],
            None if ctf is None else ctf.take(rows),
            rows,
            self._pixel_size_angstrom,
        )
        return Images(cropped.coefficients, cropped.transfer(torch.arange(len(rows)), self.disc))

    def _power(self) -> Float[Tensor, " p"]:
        """Mean power of the images of all workers in each shell, at every frequency."""
        shells = int(self.disc.shell.max()) + 1
        sums = torch.zeros(2, shells, device=self.disc.radius.device)
        for rows in torch.arange(len(self._particles)).split(_CHUNK):
            coefficients = self._particles.coefficients[rows][:, self._index]
            sums[0].index_add_(0, self.disc.shell, torch.view_as_real(coefficients).square().sum((0, -1)))
            sums[1].index_add_(0, self.disc.shell, torch.full_like(self.disc.radius, len(rows)))
        power, count = sum_over_workers(sums)
        return (power / count.clamp_min(1)).clamp_min(1e-12)[self.disc.shell]


def _inside(outer: HalfDisc, inner: HalfDisc) -> Int[Tensor, " q"]:
    """Where the frequencies of a smaller box stand among those of a larger one."""
    size = outer.box + 1
    key = [(disc.frequency[:, 0] * size + disc.frequency[:, 1] + size // 2).long() for disc in (outer, inner)]
    ordered, order = key[0].sort()
    return order[torch.searchsorted(ordered, key[1])]


@torch.no_grad()
def reconstruct(level: Level, table: PoseTable, half: Int[Tensor, " n"], stored_box: int) -> Maps:
    """The maps of the particles at their present poses."""
    reconstruction = Reconstruction(level.disc)
    scale = level.disc.box / stored_box
    for rows in torch.arange(len(half)).split(_CHUNK):
        poses = Matches(table.rotation[rows], table.shift_px[rows] * scale, table.energy[rows])
        reconstruction.insert(level.images(rows), poses, half[rows])
    return reconstruction.maps()


@torch.no_grad()
def refine_round(
    level: Level,
    plan: Round,
    table: PoseTable,
    volume: Float[Tensor, "d d d"],
    half: Int[Tensor, " n"],
    stored_box: int,
    shift_spread_px: float | None,
    key: tuple[int, int],
) -> Refined:
    """Poses of all particles against a map, then the maps of these poses.

    shift_spread_px, in pixels of the stored images, is the prior of the shifts; None leaves them as they are. `key`
    names the random turn of the grid that is searched.
    """
    scale = plan.box / stored_box
    total = float(level.weight.sum())
    noise = float(table.energy.mean())
    penalty = None if shift_spread_px is None else noise / (scale * shift_spread_px) ** 2
    reference = make_reference(volume, level.disc, penalty, level.weight)
    search = None if plan.search_radius is None else _Search(reference, plan.search_radius, key)
    reconstruction, parts, moved = Reconstruction(level.disc), [], 0.0
    for rows in torch.arange(len(half)).split(_CHUNK):
        images = level.images(rows)
        before = Matches(table.rotation[rows], table.shift_px[rows] * scale, table.energy[rows])
        found = refine_poses(reference, images, before, plan.steps)
        if search is not None:
            found = found.or_better(search.find(images, before.shift_px))
        moved += float((rotation_sqfrob(found.rotation, before.rotation) > _MOVED_SQFROB).sum())
        reconstruction.insert(images, found, half[rows])
        parts.append(found)
    found = Matches.concatenate(parts)
    new = PoseTable(found.rotation, found.shift_px / scale, found.energy / total)
    sums = sum_over_workers(
        torch.tensor([float(len(half)), moved, float(new.energy.sum()), float(new.shift_px.square().sum()) / 2])
    )
    count, moved, energy, squared = sums.tolist()
    spread = None if shift_spread_px is None else max((squared / count) ** 0.5, _SMALLEST_SPREAD_PX / scale)
    return Refined(new, reconstruction.maps(), moved / count, energy / count, spread)


class _Search:
    """All rotations, with the shifts about the present one."""

    def __init__(self, reference: Reference, radius: float, key: tuple[int, int]) -> None:
        grid = turned_grid(_NSIDE, _TURNS, *key).to(reference.frequency)
        self._reference, self._bank = reference, make_bank(reference.within(radius), grid)
        step = _SEARCH_STEP * reference.box / radius
        reach = 0.0 if reference.shift_penalty is None else 1.5 * step
        self._offsets = shift_grid(reach, step).to(reference.frequency)

    def find(self, images: Images, centre_px: Tensor) -> Matches:
        return Matches.concatenate(list(find_poses(self._reference, self._bank, images, centre_px, self._offsets)))
