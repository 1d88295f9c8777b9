"""Decoder that holds the volume as real-space voxels and projects it by Fourier slices."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from aceray.em.fourier import HalfDisc, frequency_index
from aceray.em.projection import central_slice, padded_transform


class VoxelDecoder(nn.Module):
    """A d x d x d density in a soft sphere, starting from zero.

    Zero is a saddle for the poses but not for the volume: the first step makes it the mean of all images.
    """

    mask: Tensor

    def __init__(self, disc: HalfDisc, pad: int) -> None:
        super().__init__()
        self.disc, self.pad = disc, pad
        self.density = nn.Parameter(torch.zeros(disc.box, disc.box, disc.box))
        axis = frequency_index(disc.box).float().square()
        radius = (axis[:, None, None] + axis[:, None] + axis).sqrt()
        self.register_buffer("mask", ((disc.box / 2 - radius) / 2).clamp(0, 1), persistent=False)

    def volume(self) -> Float[Tensor, "d d d"]:
        """The masked density, axes z, y, x."""
        return self.density * self.mask

    def transform(self) -> Float[Tensor, "2 m m h"]:
        """What slices are taken from: computed once per step."""
        return padded_transform(self.volume(), self.pad)

    def slices(
        self, transform: Float[Tensor, "2 m m h"], rotation: Float[Tensor, "*batch 3 3"]
    ) -> Complex[Tensor, "*batch p"]:
        """Half-disc coefficients of the projections at these rotations."""
        return central_slice(transform, rotation, self.disc)
