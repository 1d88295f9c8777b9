"""Wiener-regularised Fourier back-projection: the volume that given poses and images imply."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from aceray.em.fourier import HalfDisc
from aceray.em.projection import interpolation_correction, padded_box, sample_transform


class BackProjection:
    """Accumulates images into the padded transform of a volume with the adjoint of the central slice.

    numerator = sum C F, denominator = sum C^2 over all images, each spread with trilinear weights. Sums of several
    accumulators over parts of a data set are the accumulator of the whole.
    """

    def __init__(self, disc: HalfDisc, pad: int = 2) -> None:
        self.disc = disc
        padded = padded_box(disc.box, pad)
        shape = (2, padded + 1, padded + 1, padded // 2 + 1)
        self.numerator = disc.radius.new_zeros(shape)
        self.denominator = disc.radius.new_zeros(shape)

    def insert(
        self, coefficients: Complex[Tensor, "b p"], rotation: Float[Tensor, "b 3 3"], ctf: Float[Tensor, "b p"] | None
    ) -> None:
        """Add images, already shifted to their centres, at their rotations."""
        ctf = torch.ones_like(coefficients.real) if ctf is None else ctf
        points = self.disc.frequency @ rotation[..., :2, :]
        self.numerator += _spread(coefficients * ctf, points, self.numerator, self.disc.box)
        self.denominator += _spread(
            torch.complex(ctf.square(), torch.zeros_like(ctf)), points, self.numerator, self.disc.box
        )

    def volume(self, inverse_ssnr: Float[Tensor, "s"]) -> Float[Tensor, "d d d"]:
        """Volume numerator / (denominator + inverse_ssnr[shell]), one value of noise over signal power per shell.

        A shell's entry is noise variance per coefficient divided by the power of the volume's slices there.
        """
        box, padded = self.disc.box, self.numerator.shape[1] - 1
        numerator = _hermitian(torch.complex(*self.numerator))
        denominator = _hermitian(torch.complex(*self.denominator)).real
        axis = torch.arange(-(padded // 2), padded // 2, device=numerator.device) * (box / padded)
        half = torch.arange(padded // 2 + 1, device=numerator.device) * (box / padded)
        radius = (axis[:, None, None].square() + axis[:, None].square() + half.square()).sqrt()
        shell = radius.round().long().clamp(max=len(inverse_ssnr) - 1)
        # no cut at Nyquist: nodes just beyond it were reached too, nodes that were not hold zero
        spectrum = numerator / (denominator + inverse_ssnr[shell]).clamp_min(1e-12) * box
        volume = torch.fft.fftshift(torch.fft.irfftn(torch.fft.ifftshift(spectrum, (0, 1)), s=(padded,) * 3))
        start = padded // 2 - box // 2
        volume = volume[(slice(start, start + box),) * 3]
        return volume * interpolation_correction(padded, volume)


def _spread(coefficients: Tensor, points: Tensor, like: Tensor, box: int) -> Tensor:
    """Adjoint of sample_transform with respect to the transform."""
    transform = torch.zeros_like(like, requires_grad=True)
    with torch.enable_grad():
        sampled = sample_transform(transform, points, box)
    (gradient,) = torch.autograd.grad(sampled, transform, coefficients)
    return gradient


def _hermitian(spectrum: Tensor) -> Tensor:
    """Fold both ends of kz and ky into one, and complete the planes kx = 0 and Nyquist, which hold both k and -k."""
    first, inner, last = spectrum[..., :1], spectrum[..., 1:-1], spectrum[..., -1:]
    spectrum = torch.cat([first + first.flip(0, 1).conj(), inner, last + last.flip(0, 1).conj()], dim=-1)
    for dim in (0, 1):
        size = spectrum.shape[dim] - 1
        first = spectrum.narrow(dim, 0, 1) + spectrum.narrow(dim, size, 1)
        spectrum = torch.cat([first, spectrum.narrow(dim, 1, size - 1)], dim)
    return spectrum
