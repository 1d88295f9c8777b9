"""The frame of a reconstruction: global rotation, hand and origin, found before anything is measured.

A predicted frame relates to the true one by a rotation Q that maps true object coordinates to predicted ones. In the
same hand R = R' Q and V(p) = V'(Q p); in the other hand R = diag(-1, -1, 1) R' Q and V(p) = V'(-Q p), since the pair
(diag(-1, -1, 1) R, V(-r)) gives the images of (R, V(r)).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from aceray.em.fourier import crop_volume
from aceray.em.projection import padded_transform, sample_transform
from aceray.em.random import named_generator
from aceray.em.rotation import rotation_from_vector, rotation_sqfrob
from aceray.metrics.coverage import rotation_grid
from aceray.metrics.fsc import HalfBall, fsc_area, half_ball, shell_correlation, shell_sum

CLIP_SQFROB = 1.0  # 41 degrees: beyond it a pose says nothing about the frame
_CANDIDATES = 128
PAD = 2
_COEFFICIENTS_PER_SHELL = 512
_FIRST_RADIUS = 6
_AGREEMENT = 0.3
_SEARCH_BOX = 16
_SEARCH_NSIDE = 4
_SEARCH_TURNS = 24
_SEARCH_BATCH = 256
_SEARCH_PEAKS = 6
_SEARCH_STARTS = 3
_PEAK_DISTANCE_SQFROB = 0.54  # 30 degrees


@dataclass(frozen=True)
class PoseAlignment:
    """The frame of predicted poses: R = [diag(-1, -1, 1) if flipped] R' rotation."""

    rotation: Float[Tensor, "3 3"]
    flipped: bool

    def apply(self, predicted: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 3 3"]:
        """Predicted rotations in the true frame. Shifts are the same in both hands and all frames."""
        hand = flip_hand(predicted) if self.flipped else predicted
        return hand @ self.rotation.to(predicted)


@dataclass(frozen=True)
class VolumeAlignment:
    """The frame of a predicted volume: V(p) = V'(±rotation (p + shift)), minus when flipped.

    `shift_px` (x, y, z) is where the predicted content lies from the true one, in the true frame, in pixels of the
    box the alignment was made in.
    """

    rotation: Float[Tensor, "3 3"]
    flipped: bool
    shift_px: Float[Tensor, " 3"]


def flip_hand(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Poses that, with the inverted volume V(-r), give the same images: diag(-1, -1, 1) R."""
    return rotation * rotation.new_tensor([-1.0, -1.0, 1.0])[:, None]


def project_to_rotation(matrix: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Closest proper rotation in the Frobenius norm."""
    left, _, right = torch.linalg.svd(matrix)
    sign = torch.linalg.det(left @ right)
    last = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], dim=-1)
    return (left * last[..., None, :]) @ right


def align_poses(predicted: Float[Tensor, "n 3 3"], true: Float[Tensor, "n 3 3"]) -> PoseAlignment:
    """Rotation and hand with the least mean of min(|R - R'Q|^2, 1), robust against a majority of wrong poses.

    Both hands are tried. Candidates R'_i^T R_i come from up to 128 images; the best are improved by least squares
    over the images they explain (an SVD), repeated until those images stay the same.
    """
    finite = predicted.isfinite().all(-1).all(-1) & true.isfinite().all(-1).all(-1)
    if not finite.any():
        return PoseAlignment(torch.eye(3, dtype=true.dtype, device=true.device), False)
    predicted, true = predicted[finite].double(), true[finite].double()
    options = []
    for flipped, hand in ((False, predicted), (True, flip_hand(predicted))):
        loss, rotation = _align_one_hand(hand.transpose(-1, -2) @ true)
        options.append((loss, PoseAlignment(rotation.float(), flipped)))
    return min(options, key=lambda option: option[0])[1]


def _align_one_hand(relative: Float[Tensor, "n 3 3"]) -> tuple[float, Float[Tensor, "3 3"]]:
    """Rotation closest to most of the relative rotations R'^T R, and its clipped mean error."""
    step = max(1, len(relative) // _CANDIDATES)
    candidates = relative[::step]
    best = _clipped_error(relative, candidates).mean(0).topk(min(8, len(candidates)), largest=False).indices
    options = [_trimmed_mean(relative, rotation) for rotation in candidates[best]]
    return min(options, key=lambda option: option[0])


def _clipped_error(relative: Float[Tensor, "n 3 3"], rotation: Float[Tensor, "c 3 3"]) -> Float[Tensor, "n c"]:
    """min(|R'^T R - Q|^2, clip) by its trace: 6 - 2 tr(Q^T R'^T R)."""
    return (6 - 2 * relative.flatten(1) @ rotation.flatten(1).T).clamp(max=CLIP_SQFROB)


def _trimmed_mean(relative: Float[Tensor, "n 3 3"], rotation: Float[Tensor, "3 3"]) -> tuple[float, Tensor]:
    inside = torch.zeros(len(relative), dtype=torch.bool, device=relative.device)
    for _ in range(50):
        explained = _clipped_error(relative, rotation[None])[:, 0] < CLIP_SQFROB
        if bool((explained == inside).all()):
            break
        inside = explained
        rotation = project_to_rotation(relative[inside].sum(0))
    return float(_clipped_error(relative, rotation[None]).mean()), rotation


def aligned_coefficients(
    transform: Float[Tensor, "2 m m h"], alignment: VolumeAlignment, ball: HalfBall
) -> Complex[Tensor, " p"]:
    """Coefficients of the predicted volume in the true frame, sampled from its padded transform.

    Nothing is resampled in real space: rotation turns the frequencies, the other hand is the conjugate, and the
    shift is a phase.
    """
    values = sample_transform(transform, ball.frequency @ alignment.rotation.T, ball.box)
    values = values.conj() if alignment.flipped else values
    angle = ball.frequency @ alignment.shift_px * (2 * torch.pi / ball.box)
    return values * torch.complex(angle.cos(), angle.sin())


def align_volumes(
    predicted: Float[Tensor, "d d d"], true: Float[Tensor, "d d d"], starts: Sequence[VolumeAlignment] = ()
) -> VolumeAlignment:
    """Rotation, hand and shift of the predicted volume against the true one, with the largest FSC area.

    Rotation and shift are refined from each start, whose hand is kept; without starts all of SO(3), both hands and
    all shifts are searched at low resolution first (`search_alignments`).
    """
    ball = half_ball(true.shape[-1], true.device)
    target = ball.gather(true.float())
    transform = padded_transform(predicted.detach().float(), PAD)
    refined = [_refine(transform, target, ball, start) for start in starts or search_alignments(predicted, true)]
    areas = [fsc_area(aligned_fsc(transform, target, ball, each)) for each in refined]
    return refined[areas.index(max(areas))]


def aligned_fsc(
    transform: Float[Tensor, "2 m m h"],
    target: Complex[Tensor, " p"],
    ball: HalfBall,
    alignment: VolumeAlignment,
) -> Float[Tensor, " s"]:
    """Fourier shell correlation of a padded transform in the true frame and the true volume's coefficients."""
    return shell_correlation(aligned_coefficients(transform, alignment, ball), target, ball).float()


def _refine(
    transform: Float[Tensor, "2 m m h"], target: Complex[Tensor, " p"], ball: HalfBall, alignment: VolumeAlignment
) -> VolumeAlignment:
    """Maximise the mean FSC of the shells that agree, from the innermost six outwards by doubling the radius."""
    radius, limit = _FIRST_RADIUS, ball.box // 2
    while True:
        alignment = _maximise(transform, target, ball, alignment, min(radius, limit))
        below = (aligned_fsc(transform, target, ball, alignment)[1:] < _AGREEMENT).nonzero()
        agreeing = int(below[0]) if len(below) else limit
        if radius >= agreeing:
            return alignment
        radius = min(2 * radius, agreeing)


def _maximise(
    transform: Tensor, target: Tensor, ball: HalfBall, alignment: VolumeAlignment, radius: int
) -> VolumeAlignment:
    """Quasi-Newton ascent of the mean FSC of shells 1 … radius over the rotation and the shift."""
    index = _sample_shells(ball, radius)
    ball, target = ball.take(index), target[index]
    turn = torch.zeros(3, device=target.device, requires_grad=True)
    shift = alignment.shift_px.clone().requires_grad_()
    # a unit of turn moves points a quarter of the box from the origin by a pixel, as a unit of shift does
    lever = 4 / ball.box
    optimiser = torch.optim.LBFGS([turn, shift], max_iter=25, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def moved() -> VolumeAlignment:
        return replace(alignment, rotation=alignment.rotation @ rotation_from_vector(turn * lever), shift_px=shift)

    def loss() -> Tensor:
        optimiser.zero_grad()
        curve = shell_correlation(aligned_coefficients(transform, moved(), ball), target, ball)
        value = -curve[1 : radius + 1].mean()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    rotation = project_to_rotation(moved().rotation.detach())
    return VolumeAlignment(rotation, alignment.flipped, shift.detach())


def _sample_shells(ball: HalfBall, radius: int) -> Int[Tensor, " q"]:
    """At most 512 coefficients, drawn at random, of each shell up to the radius: enough for six parameters."""
    generator = named_generator("metrics/alignment", ball.box)
    order = torch.rand(len(ball.shell), generator=generator).to(ball.shell.device)
    order = torch.argsort(ball.shell + order)
    count = torch.bincount(ball.shell)
    rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[ball.shell[order]]
    return order[(rank < _COEFFICIENTS_PER_SHELL) & (ball.shell[order] <= radius)]


def search_alignments(predicted: Float[Tensor, "d d d"], true: Float[Tensor, "d d d"]) -> list[VolumeAlignment]:
    """The most promising alignments, best first: all rotations, hands and shifts at low resolution.

    4,608 rotations (HEALPix nside 4, 24 turns), each against every shift by one Fourier correlation of shells 1 to 6,
    every shell weighted alike; the highest peaks of each hand are refined on those shells.
    """
    box = true.shape[-1]
    small = min(_SEARCH_BOX, box)
    ball = half_ball(small, true.device)
    ball = ball.take(((ball.shell >= 1) & (ball.shell <= _FIRST_RADIUS)).nonzero()[:, 0])
    target = _whiten(ball.gather(crop_volume(true.float(), small)), ball)
    reduced = crop_volume(predicted.detach().float(), small)
    transform = padded_transform(reduced, PAD)
    weight = _shell_scale(ball.gather(reduced), ball)
    rotations = rotation_grid(_SEARCH_NSIDE, _SEARCH_TURNS).to(true.device)
    options: list[tuple[float, VolumeAlignment]] = []
    for flipped in (False, True):
        score, shift = _correlate_all(transform, target, ball, weight, rotations, flipped)
        for peak in _separate_peaks(score, rotations):
            start = VolumeAlignment(rotations[peak], flipped, shift[peak])
            refined = _maximise(transform, target, ball, start, _FIRST_RADIUS)
            area = fsc_area(aligned_fsc(transform, target, ball, refined))
            options.append((area, replace(refined, shift_px=refined.shift_px * (box / small))))
    options.sort(key=lambda option: -option[0])
    return [alignment for _, alignment in options[:_SEARCH_STARTS]]


def _shell_scale(coefficients: Complex[Tensor, " p"], ball: HalfBall) -> Float[Tensor, " p"]:
    """Factor that gives every shell of the coefficients the same power."""
    power = shell_sum(coefficients.abs().square(), ball)
    return power.clamp_min(1e-30).rsqrt()[ball.shell].float()


def _whiten(coefficients: Complex[Tensor, " p"], ball: HalfBall) -> Complex[Tensor, " p"]:
    return coefficients * _shell_scale(coefficients, ball)


def _correlate_all(
    transform: Tensor, target: Tensor, ball: HalfBall, weight: Tensor, rotations: Tensor, flipped: bool
) -> tuple[Float[Tensor, " g"], Float[Tensor, "g 3"]]:
    """Largest correlation over all shifts, and that shift (x, y, z) in pixels of the ball's box, per rotation."""
    scores, shifts = [], []
    for batch in rotations.split(_SEARCH_BATCH):
        values = sample_transform(transform, ball.frequency @ batch.transpose(-1, -2), ball.box) * weight
        values = values.conj() if flipped else values
        score, index = ball.scatter(target.conj() * values).flatten(1).max(dim=1)
        place = torch.stack(torch.unravel_index(index, (ball.box,) * 3), dim=-1) - ball.box // 2
        scores.append(score)
        shifts.append(place.flip(-1).float())
    return torch.cat(scores), torch.cat(shifts)


def _separate_peaks(score: Float[Tensor, " g"], rotations: Float[Tensor, "g 3 3"]) -> list[int]:
    """The highest scores whose rotations are at least 30 degrees apart."""
    score, peaks = score.clone(), []
    for _ in range(_SEARCH_PEAKS):
        peaks.append(int(score.argmax()))
        near = rotation_sqfrob(rotations, rotations[peaks[-1]].expand_as(rotations))
        score[near < _PEAK_DISTANCE_SQFROB] = -torch.inf
    return peaks
