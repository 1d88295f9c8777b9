"""Errors of predicted poses, after alignment (metrics.alignment)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from aceray.em.rotation import rotation_sqfrob
from aceray.metrics.alignment import flip_hand

REFERENCES = 30
GOOD_SQFROB = 0.5  # 29 degrees: the error below which a pose counts as found


@dataclass(frozen=True)
class PoseErrors:
    """Errors of n poses. Shifts in squared pixels of the box the shifts are given in; multiply by A/px squared."""

    rotation_sqfrob: Float[Tensor, " n"]
    shift_sq_px_raw: Float[Tensor, " n"]
    shift_sq_px: Float[Tensor, " n"]  # after solving the volume's origin
    origin_px: Float[Tensor, " 3"]

    @property
    def fraction_below_half(self) -> float:
        """Share of poses with a squared Frobenius error below 0.5."""
        return float((self.rotation_sqfrob < GOOD_SQFROB).double().mean())


def pose_errors(
    predicted_rotation: Float[Tensor, "n 3 3"],
    predicted_shift_px: Float[Tensor, "n 2"],
    true_rotation: Float[Tensor, "n 3 3"],
    true_shift_px: Float[Tensor, "n 2"],
) -> PoseErrors:
    """Rotation errors 8 sin^2(angle / 2) and shift errors; the predicted rotations are in the true frame already."""
    difference = (true_shift_px - predicted_shift_px).double()
    origin = solve_origin(true_rotation, difference)
    corrected = difference - origin_displacement(true_rotation, origin)
    return PoseErrors(
        rotation_sqfrob=rotation_sqfrob(predicted_rotation.double(), true_rotation.double()).float(),
        shift_sq_px_raw=difference.square().sum(-1).float(),
        shift_sq_px=corrected.square().sum(-1).float(),
        origin_px=origin.float(),
    )


def best_of_references(
    predicted: Float[Tensor, "n 3 3"], true: Float[Tensor, "n 3 3"], count: int = REFERENCES
) -> tuple[float, float]:
    """Mean and median rotation error by cryoAI's rule (Levy et al. 2022), which ACE-EM's tables follow.

    Each of the first 30 images gives two frames, one of either hand, in which its own error is nothing. All poses are
    compared in each; the smallest of the 60 means and, separately, of the 60 medians count. For comparison alone: it
    exceeds the error after least squares, and mean and median may come from different frames.
    """
    predicted, true = predicted.double(), true.double()
    means, medians = [], []
    for hand in (predicted, flip_hand(predicted)):
        relative = (hand.transpose(-1, -2) @ true).flatten(1)
        # |R - R' Q|^2 = 6 - 2 tr(Q^T R'^T R)
        errors = (6 - 2 * relative @ relative[:count].T).clamp(min=0)
        means.append(errors.mean(0).amin())
        medians.append(errors.median(0).values.amin())
    return float(min(means)), float(min(medians))


def solve_origin(rotation: Float[Tensor, "n 3 3"], difference_px: Float[Tensor, "n 2"]) -> Float[Tensor, " 3"]:
    """Displacement d of a volume's content that explains shift differences t - t' = (R d)_xy, by least squares.

    A volume moved by d with all its shifts moved by -(R d)_xy gives the same images, so d is not an error.
    """
    rows = rotation.double()[:, :2].reshape(-1, 3)
    normal = rows.T @ rows
    # the pseudo-inverse leaves out directions that no view shows
    return torch.linalg.pinv(normal, hermitian=True, rtol=1e-9) @ (rows.T @ difference_px.double().reshape(-1))


def origin_displacement(rotation: Float[Tensor, "n 3 3"], origin_px: Float[Tensor, " 3"]) -> Float[Tensor, "n 2"]:
    """Where a point of the volume appears in each image: (R d)_xy."""
    return rotation.to(origin_px.dtype)[:, :2] @ origin_px
