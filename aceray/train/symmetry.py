"""Molecules that nearly have a symmetry: each image's register, found for all images together.

A map of a nearly n-fold molecule has n poses for each image that differ little. Which one an image took is a register;
wrong registers are consistent with one another, so no image leaves its own alone, however well it is searched. They are
solved jointly: poses modulo the symmetry first, against the symmetrised map, then all registers at once by expectation
maximisation from random ones, at low resolution and with a falling temperature.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from aceray.em.fourier import crop_volume
from aceray.em.projection import padded_transform, sample_transform
from aceray.em.random import named_generator
from aceray.em.rotation import rotation_from_vector, rotation_sqfrob
from aceray.metrics.coverage import rotation_grid
from aceray.metrics.fsc import HalfBall, half_ball, shell_sum
from aceray.train.energy import Images, Matches, Reference, energies
from aceray.train.reconstruct import Maps, Reconstruction
from aceray.train.statistics import sum_over_workers

_RADIUS = 8  # cycles per box
_NSIDE, _TURNS = 4, 32
_PEAKS, _PEAK_DISTANCE_SQFROB = 6, 1.0  # 41 degrees
_STEPS, _STEP_RADIANS = 25, 0.03
_ANGLE_BIN_DEG = 7.5  # half of what lies between the rotations to try
_LARGEST_ORDER, _ORDER_TOLERANCE_DEG = 6, 8.0
_SUBGROUP_MARGIN = 0.05
# while many poses are wrong a map resembles itself turned by half a turn, whatever the molecule; by no other angle
_TWOFOLD_EXCESS = 0.14
_FALLING_ITERATIONS, _MOST_ITERATIONS = 10, 40
_SETTLED, _NEGLIGIBLE_GAIN = 1e-3, 1e-4
_FURTHER_ITERATIONS = 10  # each with one cycle per box more, as far as the map goes
_RESTARTS, _CONFIRMED = 8, 0.85
_FIRST_RADIUS = 6.0
REGISTER_RADIUS = _RADIUS + 2.0  # cycles per box, of the images of restarts: what the mask mixes into the last shell
_FIRST_TEMPERATURE, _LAST_TEMPERATURE = 0.5, 0.02  # of the standard deviation of the energies' differences
_BATCH = 512


@dataclass(frozen=True)
class NearSymmetry:
    """A cyclic group under which a map nearly stays itself: its rotations, identity first, and the correlation."""

    rotations: Float[Tensor, "n 3 3"]
    correlation: float

    @property
    def order(self) -> int:
        return len(self.rotations)


def self_correlation(volume: Float[Tensor, "d d d"], radius: int = _RADIUS) -> Callable[[Tensor], Tensor]:
    """Correlation of a map with itself turned, for rotations (b, 3, 3), on shells 1 to `radius`.

    Shells count by the root of their power: unweighted, the innermost ones alone would decide.
    """
    box = min(volume.shape[-1], 4 * radius)
    small = crop_volume(volume.float(), box)
    ball = half_ball(box, volume.device)
    ball = ball.take(((ball.shell >= 1) & (ball.shell <= radius)).nonzero()[:, 0])
    transform = padded_transform(small)
    still = sample_transform(transform, ball.frequency, box)
    weight = _equaliser(still, ball)
    power = (weight * _squared(still)).sum()

    def correlation(rotation: Tensor) -> Tensor:
        turned = sample_transform(transform, ball.frequency @ rotation, box)
        overlap = (weight * (turned * still.conj()).real).sum(-1)
        return overlap / ((weight * _squared(turned)).sum(-1) * power).clamp_min(1e-30).sqrt()

    return correlation


def correlation_by_angle(volume: Float[Tensor, "d d d"]) -> tuple[Float[Tensor, " a"], Float[Tensor, " a"]]:
    """The highest self-correlation of a map among all axes, for the middles of bins of rotation angle, in degrees."""
    grid = _grid(volume.device)
    correlation = self_correlation(volume)
    score = torch.cat([correlation(part) for part in grid.split(_BATCH)]).cpu()
    number = (rotation_angle_deg(grid) / _ANGLE_BIN_DEG).long().clamp_max(round(180 / _ANGLE_BIN_DEG) - 1).cpu()
    highest = torch.full((round(180 / _ANGLE_BIN_DEG),), -torch.inf).scatter_reduce(0, number, score, "amax")
    middle = (torch.arange(len(highest)) + 0.5) * _ANGLE_BIN_DEG
    reached = highest > -torch.inf
    return middle[reached], highest[reached]


def _grid(device: torch.device) -> Float[Tensor, "g 3 3"]:
    """Rotations to try: of a rotation and its inverse, under which a map is as like itself, one."""
    grid = rotation_grid(_NSIDE, _TURNS).float().to(device)
    return grid[grid[:, 1, 0] >= grid[:, 0, 1]]


def rotation_angle_deg(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b"]:
    """By how much rotations turn, 0 to 180 degrees."""
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos())


def _equaliser(coefficients: Complex[Tensor, " p"], ball: HalfBall) -> Float[Tensor, " p"]:
    power = shell_sum(_squared(coefficients), ball) / shell_sum(torch.ones_like(coefficients.real), ball).clamp_min(1)
    return ball.weight * power.clamp_min(1e-30).rsqrt()[ball.shell].float()


def _squared(values: Complex[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    return torch.view_as_real(values).square().sum(-1)


def least_correlation(order: int, least: float) -> float:
    """The self-correlation from which a group of that order counts: more where it is two-fold."""
    return least + _TWOFOLD_EXCESS if order == 2 else least


def find_near_symmetry(volume: Float[Tensor, "d d d"], least: float) -> NearSymmetry | None:
    """The cyclic group of order 2 to 6 with the highest correlation, where one reaches its `least_correlation`."""
    correlation = self_correlation(volume)
    found = []
    for rotation, value in _peaks(correlation, volume.device):
        group = cyclic_group(rotation)
        if group is not None and value >= least_correlation(len(group), least):
            found.append(NearSymmetry(group, float(correlation(group[1:]).mean())))
    # a group's subgroups correlate as well as it does
    best = max((each.correlation for each in found), default=0.0)
    close = [each for each in found if each.correlation > best - _SUBGROUP_MARGIN]
    return max(close, key=lambda each: each.order, default=None)


def _peaks(correlation: Callable[[Tensor], Tensor], device: torch.device) -> Iterator[tuple[Tensor, float]]:
    """Rotations far from the identity, and from one another, at which a map is most like itself."""
    grid = _grid(device)
    score = torch.cat([correlation(part) for part in grid.split(_BATCH)])
    score[rotation_sqfrob(grid, torch.eye(3).to(grid).expand_as(grid)) < _PEAK_DISTANCE_SQFROB] = -torch.inf
    for _ in range(_PEAKS):
        best = int(score.argmax())
        if not math.isfinite(float(score[best])):
            return
        score[rotation_sqfrob(grid, grid[best].expand_as(grid)) < _PEAK_DISTANCE_SQFROB] = -torch.inf
        rotation, height = _climbed(correlation, grid[best])
        if rotation_sqfrob(rotation, torch.eye(3).to(rotation)) > _PEAK_DISTANCE_SQFROB:
            yield rotation, height


def _climbed(correlation: Callable[[Tensor], Tensor], start: Float[Tensor, "3 3"]) -> tuple[Tensor, float]:
    """The maximum next to a rotation, and its height."""
    with torch.enable_grad():
        vector = torch.zeros(1, 3, device=start.device, requires_grad=True)
        ascent = torch.optim.Adam([vector], lr=_STEP_RADIANS)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(ascent, _STEPS)
        for _ in range(_STEPS):
            ascent.zero_grad()
            (-correlation(rotation_from_vector(vector) @ start)).sum().backward()
            ascent.step()
            falling.step()
    rotation = rotation_from_vector(vector.detach())[0] @ start
    return rotation, float(correlation(rotation[None]))


def order_of_turn(angle_deg: float) -> int:
    """The n from 2 to 6 of which the angle is one step, 1 where there is none."""
    order = round(360 / max(angle_deg, 1.0))
    near = 2 <= order <= _LARGEST_ORDER and abs(360 / order - angle_deg) <= _ORDER_TOLERANCE_DEG
    return order if near else 1


def cyclic_group(rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "n 3 3"] | None:
    """The n turns about a rotation's axis if its angle is that of one step of n, n from 2 to 6; otherwise None."""
    order = order_of_turn(float(rotation_angle_deg(rotation)))
    if order == 1:
        return None
    # the axis is what the rotation leaves: near half a turn the antisymmetric part no longer tells it
    _, vectors = torch.linalg.eigh((rotation + rotation.T) / 2)
    axis = normalize(vectors[:, -1], dim=0)
    turns = 2 * math.pi / order * torch.arange(order, device=rotation.device)
    return rotation_from_vector(turns[:, None] * axis)


@dataclass(frozen=True)
class Evidence:
    """Images at some frequencies, and how maps of them are made and compared with them.

    Shifts are in pixels of their box; `new_maps` are kinds of empty reconstructions.
    """

    chunks: Callable[[], Iterator[tuple[Int[Tensor, " b"], Images]]]
    shift_px: Float[Tensor, "n 2"]
    new_maps: Sequence[Callable[[], Reconstruction]]
    reference_of: Callable[[Maps], Reference]


def solve_registers(
    coarse: Evidence, fine: Evidence, rotation: Float[Tensor, "n 3 3"], group: Float[Tensor, "g 3 3"], seed: int
) -> Int[Tensor, " n"]:
    """Which element of the group each image's rotation is to be multiplied with.

    The best of several restarts from random registers, of which about half find the least energy; one that agrees with
    the best so far is the last. They see the coarse evidence; the best one's shares go on with ever higher frequencies
    of the fine. Restarts take one kind of map after the other, so two that agree came there by different ways; the
    first kind judges them, and goes on.
    """
    best: tuple[float, Tensor] | None = None
    for restart in range(_RESTARTS):
        kind, generator = restart % len(coarse.new_maps), named_generator("symmetry/registers", seed, restart)
        energy, share = _from_random(coarse, rotation, group, kind, generator)
        if kind > 0:
            energy, share = _next_shares(coarse, rotation, group, share, float(_RADIUS), _LAST_TEMPERATURE)
        confirmed = best is not None and _agreement(share.argmax(1), best[1].argmax(1), len(group)) > _CONFIRMED
        if best is None or energy < best[0]:
            best = energy, share
        if confirmed:
            break
    assert best is not None
    share = best[1]
    for further in range(1, _FURTHER_ITERATIONS + 1):
        _, share = _next_shares(fine, rotation, group, share, float(_RADIUS + further), _LAST_TEMPERATURE)
    return share.argmax(dim=1)


def _from_random(
    evidence: Evidence, rotation: Tensor, group: Tensor, kind: int, generator: torch.Generator
) -> tuple[float, Float[Tensor, "n g"]]:
    """Energy and shares that random registers come to, with temperature falling and radius rising."""
    start = torch.randint(len(group), (len(rotation),), generator=generator).to(rotation.device)
    share, energy = torch.nn.functional.one_hot(start, len(group)).float(), math.inf
    for iteration in range(_MOST_ITERATIONS):
        done, before = min(1.0, iteration / _FALLING_ITERATIONS), (energy, share)
        temperature = _FIRST_TEMPERATURE * (_LAST_TEMPERATURE / _FIRST_TEMPERATURE) ** done
        radius = _FIRST_RADIUS + done * (_RADIUS - _FIRST_RADIUS)
        energy, share = _next_shares(evidence, rotation, group, share, radius, temperature, kind)
        if iteration > _FALLING_ITERATIONS and _decided(before, (energy, share)):
            break
    return energy, share


def _next_shares(
    evidence: Evidence, rotation: Tensor, group: Tensor, share: Tensor, radius: float, temperature: float, kind: int = 0
) -> tuple[float, Float[Tensor, "n g"]]:
    """Energy and new shares against the map of the shares."""
    reconstruction = evidence.new_maps[kind]()
    for rows, images in evidence.chunks():
        _insert(reconstruction, images, rotation[rows], evidence.shift_px[rows], group, share[rows])
    reference, found = evidence.reference_of(reconstruction.maps()).within(radius), []
    for rows, images in evidence.chunks():
        tried = rotation[rows, None] @ group
        found.append(energies(reference, images.at(reference.index), tried, evidence.shift_px[rows]))
    return _shares(torch.cat(found), 2 * len(reference.index), temperature)


def _decided(before: tuple[float, Float[Tensor, "n g"]], now: tuple[float, Float[Tensor, "n g"]]) -> bool:
    """Whether the energy no longer falls or no share changes, and not all are alike: nothing does before they part."""
    share, order = now[1], now[1].shape[1]
    sums = torch.stack([share.amax(1).sum(), (share - before[1]).abs().sum(), share.sum()])
    largest, change, count = sum_over_workers(sums.double()).tolist()
    at_rest = before[0] - now[0] < _NEGLIGIBLE_GAIN * now[0] or change / count < _SETTLED
    return at_rest and largest / count > 1.5 / order


def _agreement(register: Int[Tensor, " n"], other: Int[Tensor, " n"], order: int) -> float:
    """Share of the images of all workers in the same register, but for one turn of all of them."""
    counts = torch.bincount((register - other) % order, minlength=order).double()
    counts = sum_over_workers(counts)
    return float(counts.max() / counts.sum())


def _shares(
    energies: Float[Tensor, "n g"], coefficients: int, temperature: float
) -> tuple[float, Float[Tensor, "n g"]]:
    """Mean of the least energies of all workers, and how much of each image belongs to each register.

    The temperature, in standard deviations of the energies' differences, falls no lower than twice that of the
    posterior, which is twice the noise in the energies' unit: what is left unexplained for each of the `coefficients`.
    Twice, because an image is part of the map that it is compared with and prefers the register it has. Without noise
    that is nothing; with it, a lower one takes chance for certainty (6VYB, 0 dB, three seeds: mean error 3.7 at once
    the posterior's, 1.3 at twice).
    """
    least = energies.min(dim=1).values
    above = energies - least[:, None]
    sums = torch.stack([above.sum(), above.square().sum(), least.sum(), torch.tensor(float(len(least))).to(least)])
    total, squared, lowest, count = sum_over_workers(sums.double()).tolist()
    entries = count * energies.shape[1]
    spread = math.sqrt(max(squared / entries - (total / entries) ** 2, 1e-30))
    least_temperature = 4 * lowest / count / coefficients
    return lowest / count, torch.softmax(-above / max(temperature * spread, least_temperature), dim=1)


def _insert(
    reconstruction: Reconstruction, images: Images, rotation: Tensor, shift_px: Tensor, group: Tensor, share: Tensor
) -> None:
    """Add every image at all its registers, each by its share; the halves are of no account."""
    transfer = torch.ones_like(images.coefficients.real) if images.transfer is None else images.transfer
    for number, element in enumerate(group):
        rows = (share[:, number] > 1e-3).nonzero()[:, 0]
        root = share[rows, number, None].sqrt()
        part = Images(images.coefficients[rows] * root, transfer[rows] * root)
        poses = Matches(rotation[rows] @ element, shift_px[rows], root[:, 0])
        reconstruction.insert(part, poses, rows % 2)
