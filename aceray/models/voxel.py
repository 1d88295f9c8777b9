"""Decoders that hold the volume as real-space voxels, projected by Fourier slices or by rotating and summing."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_transform, project_real, soft_sphere

# voxels whose rotated grids are held at a time, 12 bytes each
_GRID_VOXELS = 2**22


class VoxelDecoder(nn.Module):
    """A d x d x d density in a soft sphere, starting from zero, projected as slices of its padded transform.

    Zero is a saddle for the poses but not for the volume: the first step makes it the mean of all images. The volume is
    `scale` times the parameter: an optimiser of the Adam family moves every parameter by about the learning rate, so
    `scale` says what a learning rate of one means. `mask_radius` is a fraction of the box.
    """

    mask: Tensor

    def __init__(self, disc: HalfDisc, pad: int = 2, *, scale: float = 1.0, mask_radius: float = 0.5) -> None:
        super().__init__()
        self.disc, self.pad, self.scale = disc, pad, scale
        self.density = nn.Parameter(torch.zeros(disc.box, disc.box, disc.box))
        self.register_buffer("mask", soft_sphere(disc.box, mask_radius * disc.box), persistent=False)

    def volume(self) -> Float[Tensor, "d d d"]:
        """The masked density, axes z, y, x."""
        return self.scale * self.density * self.mask

    def transform(self) -> Tensor:
        """What slices are taken from: computed once per step."""
        return padded_transform(self.volume(), self.pad)

    def slices(self, transform: Tensor, rotation: Float[Tensor, "*batch 3 3"]) -> Complex[Tensor, "*batch p"]:
        """Half-disc coefficients of the projections at these rotations."""
        return central_slice(transform, rotation, self.disc)

    @torch.no_grad()
    def clamp_negative(self) -> None:
        """Set negative voxels to zero, as CryoGAN does after each step.

        Clamping the parameter keeps the gradient of voxels at zero, so they can rise again and a start from zero works;
        a rectifier or softplus in the forward pass has none there, or no zero.
        """
        self.density.clamp_(min=0)


class RotatedVoxelDecoder(VoxelDecoder):
    """The same voxels, projected as in CryoGAN: the sampling grid is rotated, trilinearly sampled and summed.

    Tens of times the cost of a slice, and frequencies above a quarter of Nyquist are damped (tests/bench/README.md).
    """

    def transform(self) -> Float[Tensor, "d d d"]:
        """The volume itself."""
        return self.volume()

    def slices(self, transform: Tensor, rotation: Float[Tensor, "*batch 3 3"]) -> Complex[Tensor, "*batch p"]:
        """Half-disc coefficients of the rotated and summed volume; a few images at a time, whose grids are large."""
        few = max(1, _GRID_VOXELS // transform.numel())
        parts = rotation.reshape(-1, 3, 3).split(few)
        coefficients = torch.cat([self.disc.gather(project_real(transform, part)) for part in parts])
        return coefficients.reshape(*rotation.shape[:-2], len(self.disc))
