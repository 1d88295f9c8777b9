"""Shifts by explicit Fourier sums: every coefficient, then every pixel, one at a time."""

import numpy as np


def fourier_coefficient(image: np.ndarray, kx: int, ky: int) -> complex:
    """Orthonormal coefficient of an image whose origin is pixel d//2."""
    box = image.shape[0]
    axis = np.arange(box) - box // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return complex((image * np.exp(-2j * np.pi / box * (kx * x + ky * y))).sum() / box)


def _ramp(k: int, shift: float, box: int) -> complex:
    # the Nyquist frequency of an even box stands for +k and -k alike: the mean of both ramps
    phase = 2 * np.pi * k * shift / box
    return complex(np.cos(phase)) if 2 * abs(k) == box else complex(np.exp(-1j * phase))


def shift_by_sum(image: np.ndarray, shift_x: float, shift_y: float) -> np.ndarray:
    """Image whose content moved by (shift_x, shift_y) pixels: f(x - shift) as a periodic trigonometric sum."""
    box = image.shape[0]
    axis = np.arange(box) - box // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    shifted = np.zeros((box, box), dtype=complex)
    for ky in axis:
        for kx in axis:
            coefficient = fourier_coefficient(image, kx, ky) * _ramp(kx, shift_x, box) * _ramp(ky, shift_y, box)
            shifted += coefficient * np.exp(2j * np.pi / box * (kx * x + ky * y)) / box
    return shifted.real
