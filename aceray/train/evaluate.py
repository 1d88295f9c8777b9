"""Predicted poses and volume against the truth: aligned over rotation, hand and origin, then measured."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.data.particles import Truth
from aceray.em.fourier import crop_volume
from aceray.em.projection import padded_transform
from aceray.em.rotation import sqfrob_to_degrees
from aceray.errors import DataError
from aceray.metrics.alignment import (
    PAD,
    PoseAlignment,
    VolumeAlignment,
    align_poses,
    align_volumes,
    aligned_coefficients,
    search_alignments,
)
from aceray.metrics.coverage import coverage, view_entropy
from aceray.metrics.fsc import (
    FscCurve,
    MaskedFsc,
    fsc_area,
    half_ball,
    masked_fsc,
    resolution_px,
    shell_correlation,
)
from aceray.metrics.masks import auto_mask, sphere_mask
from aceray.metrics.pose import PoseErrors, best_of_references, pose_errors
from aceray.train.predict import Poses

THRESHOLDS = (0.5, 0.143)
LAST_SHELLS = 5
HALF_MAP_THRESHOLD = 0.143

MaskKind = Literal["none", "sphere", "auto"]
"""Where half maps are compared: everywhere, in a soft sphere, around the molecule."""


@dataclass(frozen=True)
class EvaluatedPoses:
    """Predicted poses that have a true one, in the true frame, and their errors."""

    particle_id: Int[Tensor, " n"]
    rotation: Float[Tensor, "n 3 3"]
    errors: PoseErrors
    best_of_30: tuple[float, float]  # mean and median rotation error by metrics.pose.best_of_references
    alignment: PoseAlignment


@dataclass(frozen=True)
class EvaluatedVolume:
    """Predicted volume in the true frame, below Nyquist, beside the true one at the same box."""

    predicted: Float[Tensor, "d d d"]
    true: Float[Tensor, "d d d"]
    pixel_size_angstrom: float
    alignment: VolumeAlignment
    fsc: FscCurve


@dataclass(frozen=True)
class Evaluation:
    """What is known about a reconstruction. `poses` and `volume` are None where the truth is not known.

    Keys of `metrics`: pose/rotation_* (squared Frobenius norm, or degrees), pose/shift_sq_* (squared length after
    solving for the volume's origin, `raw` before; px are those of the stored images), pose/fraction_below_half (share
    of rotation errors below 0.5), pose/coverage and pose/view_entropy (of beam directions), fsc/resolution_px_* (pixels
    of the predicted volume's box), fsc/resolution_angstrom_*, fsc/auc, fsc/nyquist_minus_0 … 4 (the curve at its last
    five shells), pose/rotation_sqfrob_*_best_of_30 (by cryoAI's rule, with which the paper's tables were made).
    """

    metrics: dict[str, float]
    view_rotation: Float[Tensor, "m 3 3"]
    poses: EvaluatedPoses | None
    volume: EvaluatedVolume | None


@torch.no_grad()
def evaluate(
    volume: Float[Tensor, "d d d"],
    poses: Poses,
    truth: Truth | None,
    truth_volume: Float[Tensor, "t t t"] | None,
    pixel_size_angstrom: float,
) -> Evaluation:
    """Measure a volume and poses; the truth may be known in part or not at all.

    The volume may have a smaller box than the true one: both stand for the same field of view, so the true one is
    Fourier-cropped to it. pixel_size_angstrom is that of the stored images and of the true volume.

    Raises:
        DataError: non-finite predictions, no predictions, or a predicted particle the truth does not know.
    """
    _check(volume, poses)
    evaluated = _evaluate_poses(poses, truth) if truth is not None else None
    view_rotation = evaluated.rotation if evaluated else poses.rotation.detach().cpu()
    metrics = {"pose/coverage": coverage(view_rotation), "pose/view_entropy": view_entropy(view_rotation)}
    if evaluated:
        metrics |= _pose_metrics(evaluated, pixel_size_angstrom)
    aligned = None
    if truth_volume is not None:
        aligned = _evaluate_volume(volume, truth_volume, pixel_size_angstrom, evaluated)
        metrics |= _volume_metrics(aligned.fsc)
    return Evaluation(metrics, view_rotation, evaluated, aligned)


def _check(volume: Tensor, poses: Poses) -> None:
    if len(poses.rotation) == 0:
        raise DataError("evaluate: there are no predicted poses; predict at least one particle")
    for name, tensor in (("volume", volume), ("rotations", poses.rotation), ("shifts", poses.shift_px)):
        if not bool(tensor.isfinite().all()):
            raise DataError(
                f"evaluate: the predicted {name} hold values that are not finite; "
                "the training diverged, go back to an earlier checkpoint or lower the learning rates"
            )


def _evaluate_poses(poses: Poses, truth: Truth) -> EvaluatedPoses:
    row = rows_of_truth(poses.particle_id.cpu(), truth.particle_id.cpu())
    true_rotation, true_shift = truth.rotation.cpu()[row], truth.shift_px.cpu()[row]
    predicted = poses.rotation.detach().cpu()
    alignment = align_poses(predicted, true_rotation)
    rotation = alignment.apply(predicted)
    errors = pose_errors(rotation, poses.shift_px.detach().cpu(), true_rotation, true_shift)
    best_of_30 = best_of_references(predicted, true_rotation)
    return EvaluatedPoses(poses.particle_id.cpu(), rotation, errors, best_of_30, alignment)


def rows_of_truth(wanted: Int[Tensor, " n"], known: Int[Tensor, " m"]) -> Int[Tensor, " n"]:
    """Where the wanted particles stand among the known ones; DataError when one does not."""
    ordered, order = known.sort()
    place = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    missing = wanted[ordered[place] != wanted] if len(ordered) else wanted
    if len(missing):
        raise DataError(
            f"evaluate: particle {int(missing[0])} ({len(missing)} in all) has a predicted pose but no true one; "
            "evaluate against the data set the poses were predicted for"
        )
    return order[place]


def _pose_metrics(poses: EvaluatedPoses, pixel_size_angstrom: float) -> dict[str, float]:
    errors, (mean_of_30, median_of_30) = poses.errors, poses.best_of_30
    rotation, area = errors.rotation_sqfrob, pixel_size_angstrom**2
    shift, raw = float(errors.shift_sq_px.mean()), float(errors.shift_sq_px_raw.mean())
    return {
        "pose/rotation_sqfrob_mean": float(rotation.mean()),
        "pose/rotation_sqfrob_median": float(rotation.median()),
        "pose/rotation_sqfrob_mean_best_of_30": mean_of_30,
        "pose/rotation_sqfrob_median_best_of_30": median_of_30,
        "pose/rotation_deg_median": float(sqfrob_to_degrees(rotation.median())),
        "pose/fraction_below_half": errors.fraction_below_half,
        "pose/shift_sq_px_mean": shift,
        "pose/shift_sq_px_median": float(errors.shift_sq_px.median()),
        "pose/shift_sq_px_raw_mean": raw,
        "pose/shift_sq_angstrom_mean": shift * area,
        "pose/shift_sq_angstrom_raw_mean": raw * area,
    }


def _evaluate_volume(
    volume: Tensor, truth_volume: Tensor, pixel_size_angstrom: float, poses: EvaluatedPoses | None
) -> EvaluatedVolume:
    stored = truth_volume.shape[-1]
    box = min(volume.shape[-1], stored)
    true = crop_volume(truth_volume.to(volume.device, torch.float32), box)
    predicted = crop_volume(volume.detach().float(), box)
    starts: list[VolumeAlignment] = []
    if poses:
        origin = poses.errors.origin_px * (box / stored)
        starts.append(
            VolumeAlignment(poses.alignment.rotation.to(true.device), poses.alignment.flipped, origin.to(true.device))
        )
    if poses is None or poses.errors.fraction_below_half < 0.5:
        # the poses have no frame in common that the volume must follow
        starts += search_alignments(predicted, true)
    alignment = align_volumes(predicted, true, starts)
    ball = half_ball(box, true.device)
    coefficients, target = aligned_coefficients(padded_transform(predicted, PAD), alignment, ball), ball.gather(true)
    pixel_size = pixel_size_angstrom * stored / box
    curve = FscCurve(shell_correlation(coefficients, target, ball).float().cpu(), box, pixel_size)
    return EvaluatedVolume(ball.scatter(coefficients).cpu(), true.cpu(), pixel_size, alignment, curve)


def _volume_metrics(curve: FscCurve) -> dict[str, float]:
    metrics = {"fsc/auc": fsc_area(curve.values)}
    for below in range(LAST_SHELLS):
        metrics[f"fsc/nyquist_minus_{below}"] = float(curve.values[-1 - below])
    for threshold in THRESHOLDS:
        pixels = resolution_px(curve.values, threshold, curve.box)
        metrics[f"fsc/resolution_px_{threshold}"] = pixels
        metrics[f"fsc/resolution_angstrom_{threshold}"] = pixels * curve.pixel_size_angstrom
    return metrics


@dataclass(frozen=True)
class HalfMaps:
    """Two half maps in the frame of the first, below Nyquist, and their FSC; `curve` is the corrected one."""

    first: Float[Tensor, "d d d"]
    second: Float[Tensor, "d d d"]
    alignment: VolumeAlignment  # of the second to the first
    fsc: MaskedFsc
    curve: FscCurve

    @property
    def metrics(self) -> dict[str, float]:
        """fsc/half_map_resolution_px_0.143 (pixels of the maps' box) and fsc/half_map_resolution_angstrom_0.143."""
        pixels = resolution_px(self.curve.values, HALF_MAP_THRESHOLD, self.curve.box)
        return {
            f"fsc/half_map_resolution_px_{HALF_MAP_THRESHOLD}": pixels,
            f"fsc/half_map_resolution_angstrom_{HALF_MAP_THRESHOLD}": pixels * self.curve.pixel_size_angstrom,
        }


@torch.no_grad()
def in_frame_of(
    reference: Float[Tensor, "d d d"], volume: Float[Tensor, "d d d"]
) -> tuple[VolumeAlignment, Float[Tensor, "d d d"]]:
    """A volume in the frame and hand of another, below Nyquist, by sampling its transform; and how it was aligned."""
    ball = half_ball(reference.shape[-1], reference.device)
    alignment = align_volumes(volume, reference)
    return alignment, ball.scatter(aligned_coefficients(padded_transform(volume.float(), PAD), alignment, ball))


@torch.no_grad()
def compare_half_maps(
    first: Float[Tensor, "d d d"], second: Float[Tensor, "d d d"], pixel_size_angstrom: float, mask: MaskKind = "none"
) -> HalfMaps:
    """FSC of two independent reconstructions of one box, each in its own frame and hand.

    The second is aligned to the first by sampling its transform; nothing is resampled in real space.
    """
    box = first.shape[-1]
    ball = half_ball(box, first.device)
    alignment, moved = in_frame_of(first, second)
    fixed = ball.scatter(ball.gather(first.float()))
    match mask:
        case "none":
            weight = None
        case "sphere":
            weight = sphere_mask(box, device=first.device)
        case "auto":
            weight = auto_mask(fixed, moved, pixel_size_angstrom)
    fsc = masked_fsc(fixed, moved, weight)
    return HalfMaps(fixed, moved, alignment, fsc, FscCurve(fsc.corrected, box, pixel_size_angstrom))
