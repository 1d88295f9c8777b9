"""Back-projection by loops over images, coefficients and the eight nearest nodes of the full padded grid."""

import itertools
import math

import numpy as np


def back_project(
    coefficients: np.ndarray,
    frequency: np.ndarray,
    rotation: np.ndarray,
    ctf: np.ndarray,
    inverse_ssnr: np.ndarray,
    box: int,
    pad: int,
) -> np.ndarray:
    """Volume sum(C F) / (sum(C^2) + inverse_ssnr[shell]), each coefficient inserted at k and its conjugate at -k."""
    padded = box * pad
    numerator = np.zeros((padded,) * 3, dtype=complex)
    denominator = np.zeros((padded,) * 3)
    for image, matrix, transfer in zip(coefficients, rotation, ctf, strict=True):
        for value, (kx, ky), c in zip(image, frequency, transfer, strict=True):
            point = pad * (kx * matrix[0] + ky * matrix[1])
            for sign, inserted in ((1, value), (-1, np.conj(value))):
                for node, weight in _neighbours(sign * point, padded):
                    numerator[node] += weight * c * inserted
                    denominator[node] += weight * c**2
    return _invert(numerator, denominator, inverse_ssnr, box, pad)


def _neighbours(point: np.ndarray, padded: int) -> list[tuple[tuple[int, int, int], float]]:
    base = [math.floor(coordinate) for coordinate in point]
    nodes = []
    for offset in itertools.product((0, 1), repeat=3):
        index = [b + o for b, o in zip(base, offset, strict=True)]
        weight = math.prod(1 - abs(coordinate - i) for coordinate, i in zip(point, index, strict=True))
        x, y, z = ((i + padded // 2) % padded for i in index)
        nodes.append(((z, y, x), weight))
    return nodes


def _invert(numerator: np.ndarray, denominator: np.ndarray, inverse_ssnr: np.ndarray, box: int, pad: int) -> np.ndarray:
    padded = box * pad
    spectrum = np.zeros((padded,) * 3, dtype=complex)
    for node in itertools.product(range(padded), repeat=3):
        radius = math.dist(node, (padded // 2,) * 3) / pad
        if denominator[node] > 0:
            shell = min(round(radius), len(inverse_ssnr) - 1)
            spectrum[node] = numerator[node] / (denominator[node] + inverse_ssnr[shell])
    density = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum))).real * box
    start = padded // 2 - box // 2
    density = density[start : start + box, start : start + box, start : start + box]
    axis = 1 / np.sinc((np.arange(box) - box // 2) / padded) ** 2
    return density * axis[:, None, None] * axis[None, :, None] * axis[None, None, :]


def shell_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Fourier shell correlation at shells 0 to box//2, by one loop over all coefficients."""
    box = first.shape[0]
    a, b = (np.fft.fftshift(np.fft.fftn(volume)) for volume in (first, second))
    cross, power_a, power_b = np.zeros(2 * box), np.zeros(2 * box), np.zeros(2 * box)
    for node in itertools.product(range(box), repeat=3):
        shell = round(math.dist(node, (box // 2,) * 3))
        cross[shell] += (a[node] * np.conj(b[node])).real
        power_a[shell] += abs(a[node]) ** 2
        power_b[shell] += abs(b[node]) ** 2
    return (cross / np.sqrt(power_a * power_b).clip(1e-300))[: box // 2 + 1]
