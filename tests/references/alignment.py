"""A volume seen in another frame, by direct sums over its voxels."""

import numpy as np


def coefficients_in_frame(
    volume: np.ndarray, frequency: np.ndarray, rotation: np.ndarray, sign: int, shift_px: np.ndarray
) -> np.ndarray:
    """Transform of V(p) = V'(sign Q (p + shift)) at frequencies (x, y, z), where V' is the given volume.

    V' is zero outside its box; with q = sign Q (p + shift) the transform at k is the sum over the voxels q of
    V'(q) exp(-2 pi i k.p / d), p = sign Q^T q - shift.
    """
    box = volume.shape[0]
    coefficients = np.zeros(len(frequency), dtype=complex)
    for iz, iy, ix in np.ndindex(volume.shape):
        q = np.array([ix, iy, iz]) - box // 2
        p = sign * rotation.T @ q - shift_px
        coefficients += volume[iz, iy, ix] * np.exp(-2j * np.pi / box * (frequency @ p))
    return coefficients / box
