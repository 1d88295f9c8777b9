"""Fourier shell correlation one coefficient at a time, and resolutions read off a curve by hand."""

import numpy as np


def fsc_loop(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Shells 0 … d//2 by rounding |k|, inside the sphere |k| < d/2, from full complex transforms in float64."""
    box = first.shape[0]
    a, b = np.fft.fftn(first.astype(np.float64)), np.fft.fftn(second.astype(np.float64))
    cross, power_a, power_b = np.zeros(box // 2 + 1), np.zeros(box // 2 + 1), np.zeros(box // 2 + 1)
    for index in np.ndindex(box, box, box):
        k = [i if i < (box + 1) // 2 else i - box for i in index]
        radius = np.sqrt(sum(component**2 for component in k))
        if radius >= box / 2:
            continue
        shell = round(radius)
        cross[shell] += (a[index] * np.conj(b[index])).real
        power_a[shell] += abs(a[index]) ** 2
        power_b[shell] += abs(b[index]) ** 2
    return cross / np.sqrt(power_a * power_b)


def resolution_scan(fsc: np.ndarray, threshold: float, box: int, step: float = 1e-5) -> float:
    """Box over the first frequency at which the straight lines between shells are below the threshold."""
    curve = np.concatenate([[1.0], fsc[1:]])
    grid = np.arange(0, len(curve) - 1, step)
    below = grid[np.interp(grid, np.arange(len(curve)), curve) < threshold]
    return box / below[0] if len(below) else 2.0
