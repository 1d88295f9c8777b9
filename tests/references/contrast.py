"""CryoPoseNet's contrastive term, pair by pair."""

import math

import numpy as np


def pairwise_contrast_loop(codes: np.ndarray) -> float:
    """Mean over all ordered pairs of b codes (b, f) of (cosine - 1)^2 for a code with itself, else cosine^2."""
    total = 0.0
    for i, first in enumerate(codes):
        for j, second in enumerate(codes):
            product = sum(float(a) * float(b) for a, b in zip(first, second, strict=True))
            lengths = math.sqrt(sum(float(a) ** 2 for a in first)) * math.sqrt(sum(float(b) ** 2 for b in second))
            total += (product / lengths - (1.0 if i == j else 0.0)) ** 2
    return total / len(codes) ** 2
