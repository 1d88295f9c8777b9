"""Projections by three slow roads: Gaussian blobs in closed form, a direct Fourier sum, a rotated grid in loops."""

import math

import numpy as np


def blob_volume(centre_px: np.ndarray, weight: np.ndarray, sigma_px: float, box: int) -> np.ndarray:
    """Volume (z, y, x) of Gaussian blobs at centres (x, y, z) counted from voxel box//2."""
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    volume = np.zeros((box, box, box))
    for (cx, cy, cz), strength in zip(centre_px, weight, strict=True):
        volume += strength * np.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * sigma_px**2))
    return volume


def blob_projection(
    centre_px: np.ndarray, weight: np.ndarray, sigma_px: float, box: int, rotation: np.ndarray
) -> np.ndarray:
    """Their line integrals along the beam at one rotation: each centre p lands at the first two entries of R p."""
    axis = np.arange(box) - box // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    image = np.zeros((box, box))
    for centre, strength in zip(centre_px, weight, strict=True):
        px, py, _ = rotation @ centre
        column = strength * math.sqrt(2 * math.pi) * sigma_px
        image += column * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma_px**2))
    return image


def slice_by_sum(volume: np.ndarray, rotation: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Orthonormal image coefficients: sum of V(r) exp(-2 pi i (kx R[0] + ky R[1]).r / d) / d over all voxels."""
    box = volume.shape[0]
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    coefficients = []
    for kx, ky in frequency:
        point = kx * rotation[0] + ky * rotation[1]
        phase = 2 * np.pi / box * (point[0] * x + point[1] * y + point[2] * z)
        coefficients.append((volume * np.exp(-1j * phase)).sum() / box)
    return np.array(coefficients)


def rotate_and_sum(volume: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Image(x, y) = sum over z of V(R^T (x, y, z)), V trilinear and zero outside its voxels."""
    box = volume.shape[0]
    centre = box // 2
    image = np.zeros((box, box))
    for row in range(box):
        for column in range(box):
            for depth in range(box):
                point = rotation.T @ np.array([column - centre, row - centre, depth - centre])
                image[row, column] += _trilinear(volume, *(point + centre))
    return image


def _trilinear(volume: np.ndarray, x: float, y: float, z: float) -> float:
    value = 0.0
    base = [math.floor(coordinate) for coordinate in (x, y, z)]
    for dx in (0, 1):
        for dy in (0, 1):
            for dz in (0, 1):
                ix, iy, iz = base[0] + dx, base[1] + dy, base[2] + dz
                if all(0 <= index < volume.shape[0] for index in (ix, iy, iz)):
                    weight = (1 - abs(x - ix)) * (1 - abs(y - iy)) * (1 - abs(z - iz))
                    value += weight * volume[iz, iy, ix]
    return value
