"""A Gaussian filter as the plain 11 x 11 convolution it stands for."""

import math

import numpy as np


def gaussian_filter(image: np.ndarray, variance_px2: float, edges: str = "reflect") -> np.ndarray:
    """One image through a normalised 11 x 11 Gaussian kernel, edges reflected about the outermost pixel or wrapped."""
    kernel = np.zeros((11, 11))
    for row in range(11):
        for column in range(11):
            kernel[row, column] = math.exp(-((row - 5) ** 2 + (column - 5) ** 2) / (2 * variance_px2))
    kernel /= kernel.sum()
    padded = np.pad(image, 5, mode=edges)
    filtered = np.zeros_like(image)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            filtered[row, column] = (padded[row : row + 11, column : column + 11] * kernel).sum()
    return filtered
