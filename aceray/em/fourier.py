"""Centred Fourier transforms, Fourier cropping and the half disc of independent coefficients of a real image.

Images are transformed orthonormally, so white noise of standard deviation s has variance s^2 per coefficient in every
box, and cropping keeps the coefficients as they are.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

_IMAGE = (-2, -1)


def centred_fft2(images: Float[Tensor, "*batch d d"]) -> Complex[Tensor, "*batch d d"]:
    """Orthonormal 2D transform, the origin at pixel d//2 in both spaces."""
    return torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, _IMAGE), norm="ortho"), _IMAGE)


def centred_ifft2(coefficients: Complex[Tensor, "*batch d d"]) -> Complex[Tensor, "*batch d d"]:
    """Inverse of centred_fft2."""
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(coefficients, _IMAGE), norm="ortho"), _IMAGE)


def frequency_index(box: int, device: torch.device | str | None = None) -> Int[Tensor, "d"]:
    """Integer frequencies -(d//2) … of a centred axis, in cycles per box."""
    return torch.arange(box, device=device) - box // 2


def shell_index(box: int, dimensions: int, device: torch.device | str | None = None) -> Int[Tensor, "..."]:
    """Radius of every centred frequency rounded to the nearest whole shell, in cycles per box."""
    axis = frequency_index(box, device).double()
    squared = torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(dimensions):
        squared = squared.unsqueeze(-1) + axis.square()
    return squared.sqrt().round().long()


def _crop_centre(coefficients: Tensor, box: int, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        coefficients = coefficients.narrow(dim, coefficients.shape[dim] // 2 - box // 2, box)
    return coefficients


def crop_images(images: Float[Tensor, "*batch d d"], box: int) -> Float[Tensor, "*batch b b"]:
    """Fourier crop to a smaller box: the orthonormal coefficients are kept, so the noise level is too.

    The even box's Nyquist row and column, whose negative partners are cut off, are set to zero.
    """
    if box == images.shape[-1]:
        return images
    # half a transform suffices for real images; frequencies up to `last` have both partners in the smaller box
    last = (box - 1) // 2
    spectrum = torch.fft.rfft2(torch.fft.ifftshift(images, _IMAGE), norm="ortho")
    cropped = spectrum.new_zeros(*spectrum.shape[:-2], box, box // 2 + 1)
    cropped[..., : last + 1, : last + 1] = spectrum[..., : last + 1, : last + 1]
    cropped[..., box - last :, : last + 1] = spectrum[..., spectrum.shape[-2] - last :, : last + 1]
    return torch.fft.fftshift(torch.fft.irfft2(cropped, s=(box, box), norm="ortho"), _IMAGE)


def crop_volume(volume: Float[Tensor, "d d d"], box: int) -> Float[Tensor, "b b b"]:
    """Fourier crop to a smaller box; the density per voxel (its mean) is kept, Nyquist planes are set to zero."""
    size = volume.shape[-1]
    if box == size:
        return volume
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(volume)))
    cropped = _crop_centre(spectrum, box, (0, 1, 2)).clone()
    if box % 2 == 0:
        cropped[0], cropped[:, 0], cropped[:, :, 0] = 0, 0, 0
    density = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(cropped))).real
    return (density * (box / size) ** 3).contiguous()


class HalfDisc(nn.Module):
    """The independent Fourier coefficients below Nyquist, or within a smaller radius, of real d x d images.

    A real image has conjugate coefficients at k and -k; one of each pair is kept: kx > 0, or kx = 0 and ky >= 0, with
    |k| < d/2 and at most the radius, in cycles per box. Buffers: `frequency` (p, 2) as (x, y) in cycles per box,
    `radius` (p,) in cycles per box, `shell` (p,) the rounded radius, `weight` (p,) 1 at the origin and 2 elsewhere, so
    that the weighted sum of |F|^2 is the image's energy within the disc (Parseval).
    """

    frequency: Tensor
    radius: Tensor
    shell: Tensor
    weight: Tensor
    _flat: Tensor
    _column: Tensor
    _column_flat: Tensor

    def __init__(self, box: int, radius: float = math.inf) -> None:
        super().__init__()
        self.box = box
        axis = frequency_index(box)
        ky, kx = torch.meshgrid(axis, axis, indexing="ij")
        squared = kx.square() + ky.square()
        inside = (4 * squared < box * box) & (squared <= radius**2) & ((kx > 0) | ((kx == 0) & (ky >= 0)))
        kx, ky = kx[inside], ky[inside]
        half = box // 2 + 1
        length = squared[inside].float().sqrt()
        self.register_buffer("frequency", torch.stack([kx, ky], dim=-1).float(), persistent=False)
        self.register_buffer("radius", length, persistent=False)
        self.register_buffer("shell", length.round().long(), persistent=False)
        self.register_buffer("weight", torch.where(length == 0, 1.0, 2.0), persistent=False)
        self.register_buffer("_flat", (ky % box) * half + kx, persistent=False)
        # the kx = 0 column of a real-input transform holds both k and -k
        self.register_buffer("_column", ((kx == 0) & (ky > 0)).nonzero()[:, 0], persistent=False)
        self.register_buffer("_column_flat", (-ky[self._column] % box) * half, persistent=False)

    def __len__(self) -> int:
        return len(self.radius)

    def rows_of(self, inner: "HalfDisc") -> Int[Tensor, " q"]:
        """Where the frequencies of a disc inside this one stand among these."""
        size = self.box + 1
        key, inner_key = (
            (disc.frequency[:, 0] * size + disc.frequency[:, 1] + size // 2).long() for disc in (self, inner)
        )
        ordered, order = key.sort()
        return order[torch.searchsorted(ordered, inner_key)]

    def gather(self, images: Float[Tensor, "*batch d d"]) -> Complex[Tensor, "*batch p"]:
        """Coefficients of the images on the half disc."""
        spectrum = torch.fft.rfft2(torch.fft.ifftshift(images, _IMAGE), norm="ortho")
        return spectrum.flatten(-2)[..., self._flat]

    def scatter(self, coefficients: Complex[Tensor, "*batch p"]) -> Float[Tensor, "*batch d d"]:
        """Real images with these coefficients on the disc and zero outside it."""
        half = self.box // 2 + 1
        spectrum = coefficients.new_zeros(*coefficients.shape[:-1], self.box * half)
        spectrum[..., self._flat] = coefficients
        spectrum[..., self._column_flat] = coefficients[..., self._column].conj()
        images = torch.fft.irfft2(spectrum.unflatten(-1, (self.box, half)), s=(self.box, self.box), norm="ortho")
        return torch.fft.fftshift(images, _IMAGE)

    def energy(self, coefficients: Complex[Tensor, "*batch p"]) -> Float[Tensor, "*batch"]:
        """Squared norm per pixel of the images with these coefficients: the mean square over d x d pixels."""
        return (torch.view_as_real(coefficients).square().sum(-1) @ self.weight) / self.box**2
