"""Residuals of images against their renderings, one Fourier coefficient at a time, in float64."""

import numpy as np


def residual_loop(images: np.ndarray, rendered: np.ndarray) -> dict[str, float]:
    """Loss per pixel and whitened residual of real (n, d, d) images: over all, and over thirds of the shells."""
    box = images.shape[-1]
    index = [i if i < (box + 1) // 2 else i - box for i in range(box)]
    spectra = [np.abs(np.fft.fft2(each.astype(np.float64)) / box) ** 2 for each in (images - rendered, images)]
    difference, power = (each.mean(0) for each in spectra)
    coefficients = []
    for row in range(box):
        for column in range(box):
            radius = np.hypot(index[row], index[column])
            if radius < box / 2:
                coefficients.append((radius, round(radius), difference[row, column], power[row, column]))
    shell_power = {
        shell: np.mean([power for _, other, _, power in coefficients if other == shell]) for shell in range(box)
        if any(other == shell for _, other, _, _ in coefficients)
    }  # fmt: skip
    found = {}
    for name, low, high in (("", 0, 2), ("_low", 0, 1 / 3), ("_middle", 1 / 3, 2 / 3), ("_high", 2 / 3, 2)):
        inside = [each for each in coefficients if low * box / 2 <= each[1] < high * box / 2]
        found[f"loss{name}"] = sum(difference for _, _, difference, _ in inside) / box**2
        ratios = [difference / shell_power[shell] for radius, shell, difference, _ in inside if radius > 0]
        found[f"whitened{name}"] = float(np.mean(ratios))
    return found
