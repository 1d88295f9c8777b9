"""Past the encoder: a table of poses, one for each particle, refined in turns with the map they imply.

A round compares every image with the map of the round before, from its own pose and, in rounds of search, from the best
of all poses; the better one is kept, and all images make the next map. Poses by amortised inference start it: from
random ones such rounds do not converge. The residual is whitened by the images' mean power of each shell, without which
the strong low frequencies alone would decide.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob
from aceray.metrics.masks import molecule_mask
from aceray.train.energy import Images, Matches, Reference, make_reference, refine_poses
from aceray.train.predict import Particles, StreamedCoefficients
from aceray.train.reconstruct import Maps, Reconstruction, Support, first_lost_shell
from aceray.train.search import Search
from aceray.train.statistics import sum_over_workers
from aceray.train.symmetry import REGISTER_RADIUS, Evidence, find_near_symmetry, solve_registers

_CHUNK = 512
# a rotation that moves by more than 41 degrees has left its minimum
_MOVED_SQFROB = 1.0
_SMALLEST_SPREAD_PX = 0.2  # of the round's box
_BEYOND = 1.2  # how far beyond the agreement of the halves a map is still compared with images
_SYMMETRIC_ROUNDS = 2
_NEGLIGIBLE_GAIN = 1e-3  # of a round, of the images' power
_WHOLE: Support = torch.ones_like


@dataclass(frozen=True)
class Round:
    """One turn of poses and map.

    box in pixels; steps from a particle's own pose; the radius of the search, cycles per box, and the share of the
    particles that are searched, those of most energy. A round of registers looks for a near-symmetry instead.
    """

    box: int
    steps: int
    search_radius: float = 8.0
    searched: float = 0.0
    registers: bool = False

    def search(self, reference: Reference, spread_px: float | None, *key: int) -> Search | None:
        """What the round looks for lost poses with; in a round that searches a few alone, at all shifts."""
        if self.searched <= 0:
            return None
        return Search(reference, self.search_radius, spread_px, *key, all_shifts=self.searched < 1)


@dataclass(frozen=True)
class PoseTable:
    """Poses of a worker's particles; shifts in pixels of the stored images.

    energy is that of the round that gave the pose, over that of an empty map: the share of the image's own power that
    is left unexplained, all shells alike. It is of its own because most of it is noise, and how noisy images are would
    otherwise order them.
    """

    rotation: Float[Tensor, "n 3 3"]
    shift_px: Float[Tensor, "n 2"]
    energy: Float[Tensor, " n"]


@dataclass(frozen=True)
class Refined:
    """Where a refinement is: rounds done, the worker's poses, the maps of all poses, and of the last round the share of
    poses that left their minimum, the mean energy, of all workers, and the share that was searched over all poses."""

    done: int
    table: PoseTable
    maps: Maps | None = None
    moved: float = 1.0
    energy: float = 1.0
    symmetry_order: int = 1
    symmetry_correlation: float = 0.0
    searched: float = 0.0

    @property
    def metrics(self) -> dict[str, float]:
        """refine/moved, refine/energy and, of the near-symmetry that was found, its order (1: none) and correlation."""
        return {
            "refine/moved": self.moved,
            "refine/energy": self.energy,
            "refine/near_symmetry_order": float(self.symmetry_order),
            "refine/near_symmetry_correlation": self.symmetry_correlation,
        }


@dataclass(frozen=True)
class Limits:
    """When a refinement changes its ways.

    Once no more than the share `settled` of the poses moved in a round, all later ones search no more than the share
    `rescued` of the particles, those that are explained worst. `near_symmetry` is the least self-correlation of a map
    that counts as one. `independent`: either half of the images sees only its own map, but for the first shells.
    """

    settled: float
    rescued: float
    near_symmetry: float
    independent: bool = False


class Level:
    """A worker's particles, Fourier-cropped to a round's box, at their frequencies within a radius.

    Of streamed particles the cropped coefficients are held where half of the memory for images is enough: rounds at a
    small box then read them once. `power` is the images' mean power in each shell, that of all workers' particles
    unless it is given.
    """

    def __init__(
        self,
        particles: Particles,
        disc: HalfDisc,
        box: int,
        power: Float[Tensor, " s"] | None = None,
        radius: float = math.inf,
    ) -> None:
        self.disc = HalfDisc(box, radius).to(disc.radius.device)
        self._index = disc.rows_of(self.disc)
        self._particles = particles
        self._pixel_size_angstrom = particles.pixel_size_angstrom * disc.box / box
        self._held = self._gathered()
        self.power = self._power() if power is None else power
        self.weight = self.disc.weight / self.power[self.disc.shell]

    def chunks(self) -> Iterator[tuple[Int[Tensor, " b"], Images]]:
        """All images, a few hundred at a time, with their rows."""
        for rows, coefficients in self._coefficients():
            yield rows, self._images(rows, coefficients)

    def _coefficients(self) -> Iterator[tuple[Int[Tensor, " b"], Complex[Tensor, "b q"]]]:
        if self._held is not None:
            for rows in torch.arange(len(self._particles), device=self._index.device).split(_CHUNK):
                yield rows, self._held[rows]
            return
        for rows, coefficients in self._particles.chunks(_CHUNK):
            yield rows, coefficients[:, self._index]

    def _gathered(self) -> Complex[Tensor, "n q"] | None:
        """The cropped coefficients of streamed particles, if they fit."""
        source, shape = self._particles.coefficients, (len(self._particles), len(self._index))
        if not isinstance(source, StreamedCoefficients) or 8 * shape[0] * shape[1] > source.images.most_bytes // 2:
            return None
        held = torch.empty(shape, dtype=torch.complex64, device=self._index.device)
        for rows, coefficients in self._particles.chunks(_CHUNK):
            held[rows] = coefficients[:, self._index]
        return held

    def _images(self, rows: Int[Tensor, " b"], coefficients: Complex[Tensor, "b q"]) -> Images:
        ctf = self._particles.ctf
        if ctf is None:
            return Images(coefficients, None)
        cropped = Particles(coefficients, ctf.take(rows), rows.cpu(), self._pixel_size_angstrom)
        return Images(coefficients, cropped.transfer(torch.arange(len(rows), device=rows.device), self.disc))

    def _power(self) -> Float[Tensor, " s"]:
        """Mean power of the images of all workers in each shell."""
        shells = int(self.disc.shell.max()) + 1
        power = torch.zeros(2, shells, device=self.disc.radius.device)
        for rows, coefficients in self._coefficients():
            squared = torch.view_as_real(coefficients).square().sum((0, -1))
            power[0].index_add_(0, self.disc.shell, squared)
            power[1].index_add_(0, self.disc.shell, torch.full_like(self.disc.radius, len(rows)))
        total, count = sum_over_workers(power)
        return (total / count.clamp_min(1)).clamp_min(1e-12)


class Refiner:
    """The rounds of one worker's particles, as a loop that yields after each.

    `particles` are at the largest box, of which `disc` is the half disc, in the images' units. `shift_spread_px`, in
    pixels of the stored images, is what is believed of the shifts before there are any; None leaves them as they are.
    Particles of even and of odd number of pairs are the two halves.
    """

    def __init__(
        self,
        particles: Particles,
        disc: HalfDisc,
        rounds: Sequence[Round],
        *,
        stored_box: int,
        shift_spread_px: float | None,
        limits: Limits,
        seed: int,
        support: Support = molecule_mask,
    ) -> None:
        self.particles, self.disc, self.rounds, self.stored_box = particles, disc, rounds, stored_box
        self._shift_spread_px, self._limits, self._seed, self._support = shift_spread_px, limits, seed, support
        # by pairs: the particles of one half set of the data are all of even, or all of odd number
        self._half = (particles.particle_id // 2 % 2).to(disc.radius.device)

    def run(self, state: Refined) -> Iterator[Refined]:
        """Go on from a state; yields after each of the remaining rounds but those passed over.

        Where a round changed nothing that counts, the following ones that are like it would not either.
        """
        level: Level | None = None
        while state.done < len(self.rounds):
            plan = self.rounds[state.done]
            if level is None or level.disc.box != plan.box:
                level = None  # what it holds goes before what the next one holds comes
                level = Level(self.particles, self.disc, plan.box)
                state = replace(state, maps=self._maps(level, state.table))
            few = state.moved <= self._limits.settled or 0 < state.searched < 1
            searched = min(plan.searched, self._limits.rescued) if few else plan.searched
            before, plan = state, replace(plan, searched=searched)
            state = self._registers(level, plan, state) if plan.registers else self._round(level, plan, state)
            state = replace(state, searched=searched)
            if self._at_rest(before, state):
                state = replace(state, done=self._after_those_alike(state.done))
            yield state

    def _at_rest(self, before: Refined, state: Refined) -> bool:
        """Whether a round left poses and energy as they were after the one before, at the same box.

        What two parameters of a pose fit by chance is one part in the number of frequencies; where there is no noise,
        what is left falls on and on, by less than counts.
        """
        if not before.done or self.rounds[before.done - 1].box != self.rounds[before.done].box:
            return False
        gain, by_chance = before.energy - state.energy, state.energy / len(HalfDisc(self.rounds[before.done].box))
        return state.moved <= self._limits.settled and gain <= max(by_chance, _NEGLIGIBLE_GAIN)

    def _after_those_alike(self, done: int) -> int:
        """The number of rounds done once all that are planned like the last one are passed over."""
        alike = itertools.takewhile(lambda plan: plan == self.rounds[done - 1], self.rounds[done:])
        return done + len(list(alike))

    def with_maps(self, state: Refined) -> Refined:
        """A finished state without maps, as checkpoints hold it, with those of its poses."""
        level = Level(self.particles, self.disc, self.rounds[state.done - 1].box)
        return replace(state, maps=self._maps(level, state.table))

    @torch.no_grad()
    def _maps(self, level: Level, table: PoseTable, group: Float[Tensor, "g 3 3"] | None = None) -> Maps:
        """Maps of the particles at their present poses; in the sphere, at all those that a group makes of them."""
        support, group = (self._support, torch.eye(3)[None].to(table.rotation)) if group is None else (_WHOLE, group)
        reconstruction, scale = Reconstruction(level.disc, support), level.disc.box / self.stored_box
        for rows, images in level.chunks():
            for element in group:
                poses = Matches(table.rotation[rows] @ element, table.shift_px[rows] * scale, table.energy[rows])
                reconstruction.insert(images, poses, self._half[rows])
        return reconstruction.maps()

    @torch.no_grad()
    def _round(self, level: Level, plan: Round, state: Refined) -> Refined:
        """Poses of all particles against the state's map, then the maps of these poses."""
        assert state.maps is not None
        table, scale = state.table, plan.box / self.stored_box
        least = _least_energy(table.energy, plan.searched)
        spread_px = self._spread_px(state, scale)
        matchers = [
            _Matcher(reference, plan, least, spread_px, (self._seed, state.done))
            for reference in self._references(level, state, state.maps)
        ]
        reconstruction, parts, compared = Reconstruction(level.disc, self._support), [], matchers[0].reference
        for rows, images in level.chunks():
            before = Matches(table.rotation[rows], table.shift_px[rows] * scale, table.energy[rows])
            found = _improved(matchers, images, before, self._half[rows])
            reconstruction.insert(images, found, self._half[rows])
            parts.append(found.relative_to(images.at(compared.index).power(compared.weight)))
        found = Matches.concatenate(parts)
        new = PoseTable(found.rotation, found.shift_px / scale, found.energy)
        moved = (rotation_sqfrob(new.rotation, table.rotation) > _MOVED_SQFROB).float()
        moved, energy = _means(moved, new.energy)
        return replace(state, done=state.done + 1, table=new, maps=reconstruction.maps(), moved=moved, energy=energy)

    @torch.no_grad()
    def _registers(self, level: Level, plan: Round, state: Refined) -> Refined:
        """Poses modulo a near-symmetry of the map, then all registers together; nothing where there is none."""
        assert state.maps is not None
        near = find_near_symmetry(state.maps.joint, self._limits.near_symmetry)
        if near is None:
            return replace(state, done=state.done + 1)
        done, correlation, searched = state.done + 1, near.correlation, replace(plan, searched=1.0, registers=False)
        for _ in range(_SYMMETRIC_ROUNDS):
            maps = self._maps(level, state.table, near.rotations)
            near = find_near_symmetry(maps.joint, self._limits.near_symmetry) or near
            state = self._round(level, searched, replace(state, maps=maps))
        table = state.table
        coarse = Level(self.particles, self.disc, plan.box, radius=REGISTER_RADIUS)
        register = solve_registers(
            self._evidence(coarse, state), self._evidence(level, state), table.rotation, near.rotations, self._seed
        )
        table = replace(table, rotation=table.rotation @ near.rotations[register])
        return replace(
            state,
            done=done,
            table=table,
            maps=self._maps(level, table),
            moved=1.0,
            symmetry_order=near.order,
            symmetry_correlation=correlation,
        )

    def _evidence(self, level: Level, state: Refined) -> Evidence:
        """The level's images at the state's shifts, with maps cut to the molecule and whole ones."""
        return Evidence(
            level.chunks,
            state.table.shift_px * (level.disc.box / self.stored_box),
            [partial(Reconstruction, level.disc, support) for support in (self._support, _WHOLE)],
            lambda maps: self._reference(level, state, maps),
        )

    def _references(self, level: Level, state: Refined, maps: Maps) -> list[Reference]:
        """What images are compared with: the map of all, or for either half its own beyond the first shells."""
        if not self._limits.independent:
            return [self._reference(level, state, maps)]
        return [self._reference(level, state, maps.seen_by(half)) for half in (0, 1)]

    def _reference(self, level: Level, state: Refined, maps: Maps) -> Reference:
        spread_px = self._spread_px(state, level.disc.box / self.stored_box)
        penalty = None if spread_px is None else shift_penalty(state.energy, spread_px)
        return agreed_reference(maps.joint, maps.half_fsc, level.disc, level.weight, penalty)

    def _spread_px(self, state: Refined, scale: float) -> float | None:
        """Standard deviation of the shifts along an axis, pixels of a round's box: as believed, then as they are."""
        if self._shift_spread_px is None:
            return None
        if not state.done:
            return self._shift_spread_px * scale
        return _means(state.table.shift_px.square().mean(dim=-1))[0] ** 0.5 * scale


def shift_penalty(energy: float, spread_px: float) -> float:
    """Weight of a squared shift in pixels, for shifts of that spread.

    It is the noise over the spread's square; the noise, in units of the images' power, is what is left unexplained.
    """
    return min(1.0, energy) / max(spread_px, _SMALLEST_SPREAD_PX) ** 2


def agreed_reference(
    volume: Float[Tensor, "d d d"],
    half_fsc: Float[Tensor, " s"],
    disc: HalfDisc,
    weight: Float[Tensor, " p"],
    penalty: float | None,
) -> Reference:
    """A map as what images are compared with, little beyond where its halves agree."""
    whole = make_reference(volume, disc, penalty, weight)
    return whole.within(_BEYOND * first_lost_shell(half_fsc))


def _least_energy(energy: Float[Tensor, " n"], share: float) -> float:
    """What the given share of the energies reaches; none does for a share of 0."""
    if share <= 0:
        return float("inf")
    rank = min(len(energy) - 1, int((1 - share) * len(energy)))
    return float(energy.sort().values[rank])


class _Matcher:
    """Better poses of images against one reference; those of at least some energy are searched for, too."""

    def __init__(
        self, reference: Reference, plan: Round, least: float, spread_px: float | None, key: tuple[int, int]
    ) -> None:
        self.reference, self._steps, self._least = reference, plan.steps, least
        self._search = plan.search(reference, spread_px, *key)

    def improved(self, images: Images, before: Matches) -> Matches:
        """The better of what lies near the present pose and of what the search finds."""
        found = refine_poses(self.reference, images.at(self.reference.index), before, self._steps)
        if self._search is None:
            return found
        return self._search.improved(images, found, before.shift_px, before.energy >= self._least)


def _improved(matchers: list[_Matcher], images: Images, before: Matches, half: Int[Tensor, " b"]) -> Matches:
    """By the one matcher, or either half of the images by its own."""
    if len(matchers) == 1:
        return matchers[0].improved(images, before)
    found = before
    for number, matcher in enumerate(matchers):
        mine = (half == number).nonzero()[:, 0]
        found = found.replaced(mine, matcher.improved(images.take(mine), before.take(mine)))
    return found


def _means(*columns: Float[Tensor, " n"]) -> list[float]:
    """Means over the particles of all workers."""
    sums = torch.stack([*(column.sum() for column in columns), torch.tensor(float(len(columns[0]))).to(columns[0])])
    *totals, count = sum_over_workers(sums).tolist()
    return [total / count for total in totals]
