"""Pose errors one particle at a time."""

import math

import numpy as np


def sqfrob_from_angle(predicted: np.ndarray, true: np.ndarray) -> float:
    """8 sin^2(angle / 2), the angle from the trace of the relative rotation."""
    angle = math.acos(max(-1.0, min(1.0, (np.trace(predicted.T @ true) - 1) / 2)))
    return 8 * math.sin(angle / 2) ** 2


def origin_by_least_squares(rotation: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """d that minimises sum |difference - (R d)_xy|^2, two equations a particle."""
    rows, values = [], []
    for matrix, (x, y) in zip(rotation, difference, strict=True):
        rows += [matrix[0], matrix[1]]
        values += [x, y]
    return np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]


def clipped_mean_error(predicted: np.ndarray, true: np.ndarray, clip: float) -> float:
    """Mean of min(|R - R'|^2, clip)."""
    errors = [min(float(((a - b) ** 2).sum()), clip) for a, b in zip(predicted, true, strict=True)]
    return sum(errors) / len(errors)


def best_of_references(predicted: np.ndarray, true: np.ndarray, count: int) -> tuple[float, float]:
    """Smallest mean and smallest median error over the frames of the first images and both hands."""
    means, medians = [], []
    for hand in (np.eye(3), np.diag([-1.0, -1.0, 1.0])):
        poses = [hand @ matrix for matrix in predicted]
        for reference in range(min(count, len(poses))):
            frame = poses[reference].T @ true[reference]
            errors = sorted(float(((a @ frame - b) ** 2).sum()) for a, b in zip(poses, true, strict=True))
            means.append(sum(errors) / len(errors))
            medians.append(errors[(len(errors) - 1) // 2])
    return min(means), min(medians)
