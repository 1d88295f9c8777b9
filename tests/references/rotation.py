"""Rotations by explicit formulas, one matrix at a time, in float64."""

import math

import numpy as np


def relion_matrix(rot_deg: float, tilt_deg: float, psi_deg: float) -> np.ndarray:
    """RELION's Euler matrix, its nine entries written out."""
    ca, sa = math.cos(math.radians(rot_deg)), math.sin(math.radians(rot_deg))
    cb, sb = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
    cg, sg = math.cos(math.radians(psi_deg)), math.sin(math.radians(psi_deg))
    return np.array(
        [
            [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
            [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
            [sb * ca, sb * sa, cb],
        ]
    )


def gram_schmidt_rows(sixd: np.ndarray) -> np.ndarray:
    """Rows b1, b2, b3 of the 6D map (Zhou et al. 2019) for one vector of six numbers."""
    first, second = np.asarray(sixd[:3], dtype=np.float64), np.asarray(sixd[3:], dtype=np.float64)
    b1 = first / math.sqrt(sum(value**2 for value in first))
    rest = second - sum(a * b for a, b in zip(b1, second, strict=True)) * b1
    b2 = rest / math.sqrt(sum(value**2 for value in rest))
    b3 = [b1[1] * b2[2] - b1[2] * b2[1], b1[2] * b2[0] - b1[0] * b2[2], b1[0] * b2[1] - b1[1] * b2[0]]
    return np.array([b1, b2, b3])


def rodrigues(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation by an angle (radians) about an axis: I + sin K + (1 - cos) K^2."""
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
