"""Projections of a volume along the beam: slices of its padded Fourier transform, and rotate-and-sum.

Source: projection-slice theorem, ACE-EM eqs. 21, 22, 25 and 26.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional

from aceray.em.fourier import HalfDisc, frequency_index
from aceray.em.kernels import Grid, sample_slices, shared_out


def padded_box(box: int, pad: int) -> int:
    """Even box size of the zero-padded transform."""
    return 2 * ((box * pad + 1) // 2)


def interpolation_correction(padded: int, volume: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
    """Real-space factor that undoes trilinear interpolation in the padded transform: 1 / prod sinc^2(x / padded).

    In the volume's box, precision and device.
    """
    axis = 1 / torch.sinc(frequency_index(volume.shape[-1], volume.device).to(volume.dtype) / padded).square()
    return axis[:, None, None] * axis[:, None] * axis


def soft_sphere(box: int, radius_px: float, device: torch.device | str | None = None) -> Float[Tensor, "d d d"]:
    """Mask of the ball that every view can show: 1 inside, a linear ramp to 0 over the last 2 px before the radius."""
    axis = frequency_index(box, device).float().square()
    radius = (axis[:, None, None] + axis[:, None] + axis).sqrt()
    return ((radius_px - radius) / 2).clamp(0, 1)


def padded_transform(volume: Float[Tensor, "d d d"], pad: int = 2) -> Float[Tensor, "2 m m h"]:
    """Zero-padded, interpolation-corrected transform of a volume, laid out for sampling; differentiable.

    Computed once per step, whatever the number of images. Channels are real and imaginary part, axes kz, ky from
    -M/2 to M/2 (both ends present, so no sample needs to wrap) and kx from 0 to M/2, M the padded box. Values are in
    the orthonormal convention of a d x d projection.
    """
    box = volume.shape[-1]
    padded = padded_box(box, pad)
    corrected = volume * interpolation_correction(padded, volume) / box
    # (-1)^(z + y) moves the origin of kz and ky to the middle; axis by axis, no row of zeros is ever transformed
    sign = (1 - 2 * (frequency_index(box, volume.device) % 2)).to(volume.dtype)
    spectrum = torch.fft.rfft(_pad_from_origin(corrected * sign[:, None, None] * sign[:, None], padded, 2), dim=2)
    spectrum = torch.fft.fft(_pad_from_origin(spectrum, padded, 1), dim=1)
    spectrum = torch.cat([spectrum, spectrum[:, :1]], 1)
    spectrum = torch.fft.fft(_pad_from_origin(spectrum, padded, 0), dim=0)
    spectrum = torch.cat([spectrum, spectrum[:1]], 0)
    return torch.stack([spectrum.real, spectrum.imag])


def _pad_from_origin(values: Tensor, size: int, dim: int) -> Tensor:
    """Zero-pad one axis, its middle moved to index 0 and what lies before it to the far end."""
    box = values.shape[dim]
    zeros = list(values.shape)
    zeros[dim] = size - box
    before, after = values.split([box // 2, box - box // 2], dim)
    return torch.cat([after, values.new_zeros(zeros), before], dim)


def sample_transform(
    transform: Float[Tensor, "2 m m h"], points: Float[Tensor, "*batch 3"], box: int
) -> Complex[Tensor, "*batch"]:
    """Trilinear samples of a padded transform at (x, y, z) frequencies in cycles per box, |k| <= box/2."""
    conjugate = points[..., :1] < 0
    # indices of a half transform, as the fractions of its axes that grid_sample wants
    scaled = torch.where(conjugate, -points, points) * (2 / box)
    x, y, z = scaled.unbind(-1)
    grid = torch.stack([2 * x - 1, y, z], dim=-1).reshape(1, 1, 1, -1, 3)
    sampled = functional.grid_sample(transform[None], grid, mode="bilinear", padding_mode="border", align_corners=True)
    real, imaginary = sampled.reshape(2, *points.shape[:-1])
    return torch.complex(real, torch.where(conjugate[..., 0], -imaginary, imaginary))


def central_slice(
    transform: Float[Tensor, "2 m m h"], rotation: Float[Tensor, "*batch 3 3"], disc: HalfDisc
) -> Complex[Tensor, "*batch p"]:
    """Half-disc coefficients of the projection at each rotation: the transform at kx R[0] + ky R[1].

    On a CPU, where no gradient is asked for, by the compiled loop, in a third of the time.
    """
    if transform.device.type == "cpu" and transform.dtype == torch.float32 and not torch.is_grad_enabled():
        return sample_compiled(torch.complex(*transform), disc.frequency, rotation, disc.box)
    return sample_transform(transform, disc.frequency @ rotation[..., :2, :], disc.box)


def sample_compiled(
    transform: Complex[Tensor, "m m h"],
    frequency: Float[Tensor, "p 2"],
    rotation: Float[Tensor, "*batch 3 3"],
    box: int,
) -> Complex[Tensor, "*batch p"]:
    """Slices of a complex padded transform at some frequencies, on a CPU and without gradient."""
    flat = rotation.detach().reshape(-1, 3, 3).contiguous()
    slices = torch.empty(len(flat), len(frequency), dtype=torch.complex64)
    volume, grid = transform.numpy(), Grid(box, frequency.contiguous().numpy())
    shared_out(len(flat), lambda part: sample_slices(volume, grid, flat[part].numpy(), slices[part].numpy()))
    return slices.reshape(*rotation.shape[:-2], -1)


def project_slice(
    volume: Float[Tensor, "d d d"], rotation: Float[Tensor, "b 3 3"], pad: int = 2
) -> Float[Tensor, "b d d"]:
    """Projections by Fourier slices, band-limited to the disc below Nyquist."""
    disc = HalfDisc(volume.shape[-1]).to(volume.device, volume.dtype)
    return disc.scatter(central_slice(padded_transform(volume, pad), rotation, disc))


def project_real(volume: Float[Tensor, "d d d"], rotation: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b d d"]:
    """Projections by rotating the sampling grid (trilinear) and summing along the beam; ACE-EM eq. 22."""
    box = volume.shape[-1]
    axis = frequency_index(box, volume.device).to(volume.dtype)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], dim=-1).reshape(-1, 3)
    # row vector times R is R^T times the column: image frame back to object frame
    index = (points @ rotation).unflatten(1, (box, box, box)) + box // 2
    grid = 2 * index / (box - 1) - 1
    source = volume.expand(len(rotation), 1, -1, -1, -1)
    return functional.grid_sample(source, grid, padding_mode="zeros", align_corners=True)[:, 0].sum(dim=1)
