"""The energy of an image under a pose: one Fourier coefficient of one rotated point sum at a time, float64."""

import numpy as np


def volume_coefficient(volume: np.ndarray, point: np.ndarray) -> complex:
    """Transform of a volume at a frequency (x, y, z) in cycles per box, over the box: that of a projection."""
    box = volume.shape[0]
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    angle = -2 * np.pi / box * (point[0] * x + point[1] * y + point[2] * z)
    return complex((volume * np.exp(1j * angle)).sum() / box)


def energy(
    volume: np.ndarray,
    image: np.ndarray,
    frequency: np.ndarray,
    transfer: np.ndarray,
    rotation: np.ndarray,
    shift: np.ndarray,
    penalty: float,
) -> float:
    """Squared distance between coefficients and model over k and -k, plus the penalty of the shift."""
    total = penalty * float(shift @ shift)
    for coefficient, k, contrast in zip(image, frequency, transfer, strict=True):
        projected = volume_coefficient(volume, k[0] * rotation[0] + k[1] * rotation[1])
        model = contrast * projected * np.exp(-2j * np.pi / volume.shape[0] * (k @ shift))
        total += (1 if not k.any() else 2) * abs(model - coefficient) ** 2
    return total
