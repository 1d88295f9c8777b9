"""Wiener-regularised Fourier back-projection: the volume that given poses and images imply."""

import copy

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from aceray.em.formation import shift_phase
from aceray.em.fourier import HalfDisc
from aceray.em.kernels import Grid, Views, insert_slices
from aceray.em.projection import interpolation_correction, padded_box, sample_transform


class BackProjection:
    """Accumulates images into the padded transform of a volume with the adjoint of the central slice.

    numerator = sum C F, denominator = sum C^2 over all images, each spread with trilinear weights. Sums of several
    accumulators over parts of a data set are the accumulator of the whole.
    """

    def __init__(self, disc: HalfDisc, pad: int = 2) -> None:
        self.disc = disc
        padded = padded_box(disc.box, pad)
        shape = (padded + 1, padded + 1, padded // 2 + 1)
        self.numerator = torch.zeros(shape, dtype=torch.complex64, device=disc.radius.device)
        self.denominator = torch.zeros(shape, device=disc.radius.device)

    def insert(
        self,
        coefficients: Complex[Tensor, "b p"],
        rotation: Float[Tensor, "b 3 3"],
        ctf: Float[Tensor, "b p"] | None,
        shift_px: Float[Tensor, "b 2"] | None = None,
    ) -> None:
        """Add images at their rotations, moved back by their shifts."""
        shift_px = torch.zeros_like(rotation[:, 0, :2]) if shift_px is None else shift_px
        if self.numerator.device.type == "cpu":
            self._insert_on_cpu(coefficients, rotation, ctf, shift_px)
        else:
            self._insert_anywhere(coefficients, rotation, ctf, shift_px)

    def _insert_anywhere(self, coefficients: Tensor, rotation: Tensor, ctf: Tensor | None, shift_px: Tensor) -> None:
        """By the tensor code that the compiled loop is tested against."""
        ctf = torch.ones_like(coefficients.real) if ctf is None else ctf
        points = self.disc.frequency @ rotation[..., :2, :]
        centred = coefficients * shift_phase(self.disc, -shift_px)
        self.numerator += _spread(centred * ctf, points, self.numerator, self.disc.box)
        power = torch.complex(ctf.square(), torch.zeros_like(ctf))
        self.denominator += _spread(power, points, self.numerator, self.disc.box).real

    def _insert_on_cpu(self, coefficients: Tensor, rotation: Tensor, ctf: Tensor | None, shift_px: Tensor) -> None:
        rows = torch.arange(len(rotation))
        ctf = coefficients.new_empty(0, coefficients.shape[1], dtype=torch.float32) if ctf is None else ctf
        views = Views(*(tensor.detach().contiguous().numpy() for tensor in (coefficients, ctf, rows)))
        poses = (tensor.detach().contiguous().numpy() for tensor in (rotation, shift_px))
        grid = Grid(self.disc.box, self.disc.frequency.numpy())
        insert_slices(self.numerator.numpy(), self.denominator.numpy(), grid, views, *poses)

    def plus(self, other: "BackProjection") -> "BackProjection":
        """The accumulator of both one's images."""
        both = copy.copy(self)
        both.numerator = self.numerator + other.numerator
        both.denominator = self.denominator + other.denominator
        return both

    def mean_denominator(self) -> Float[Tensor, "s"]:
        """Mean of the denominator over the nodes of each shell."""
        shell = self._shells()
        folded = _hermitian(self.denominator.to(self.numerator.dtype)).real.double()
        total = torch.bincount(shell.flatten(), folded.flatten(), minlength=self.disc.box // 2 + 1)
        return (total / torch.bincount(shell.flatten(), minlength=len(total)).clamp_min(1)).float()

    def volume(self, inverse_ssnr: Float[Tensor, "s"]) -> Float[Tensor, "d d d"]:
        """Volume numerator / (denominator + inverse_ssnr[shell]), one value of noise over signal power per shell.

        A shell's entry is noise variance per coefficient divided by the power of the volume's slices there.
        """
        box, padded = self.disc.box, self.numerator.shape[0] - 1
        numerator = _hermitian(self.numerator)
        denominator = _hermitian(self.denominator.to(numerator.dtype)).real
        # no cut at Nyquist: nodes just beyond it were reached too, nodes that were not hold zero
        shell = self._shells().clamp(max=len(inverse_ssnr) - 1)
        spectrum = numerator / (denominator + inverse_ssnr[shell]).clamp_min(1e-12) * box
        volume = torch.fft.fftshift(torch.fft.irfftn(torch.fft.ifftshift(spectrum, (0, 1)), s=(padded,) * 3))
        start = padded // 2 - box // 2
        volume = volume[(slice(start, start + box),) * 3]
        return volume * interpolation_correction(padded, volume)

    def _shells(self) -> Int[Tensor, "m m h"]:
        """Shell of every node after folding, those beyond Nyquist in the last."""
        box, padded = self.disc.box, self.numerator.shape[0] - 1
        axis = torch.arange(-(padded // 2), padded // 2, device=self.denominator.device) * (box / padded)
        half = torch.arange(padded // 2 + 1, device=axis.device) * (box / padded)
        radius = (axis[:, None, None].square() + axis[:, None].square() + half.square()).sqrt()
        return radius.round().long().clamp(max=box // 2)


def _spread(coefficients: Tensor, points: Tensor, like: Tensor, box: int) -> Tensor:
    """Adjoint of sample_transform with respect to the transform, on any device."""
    transform = torch.zeros(2, *like.shape, device=like.device, requires_grad=True)
    with torch.enable_grad():
        sampled = sample_transform(transform, points, box)
    (gradient,) = torch.autograd.grad(sampled, transform, coefficients)
    return torch.complex(*gradient)


def _hermitian(spectrum: Tensor) -> Tensor:
    """Fold both ends of kz and ky into one, and complete the planes kx = 0 and Nyquist, which hold both k and -k."""
    first, inner, last = spectrum[..., :1], spectrum[..., 1:-1], spectrum[..., -1:]
    spectrum = torch.cat([first + first.flip(0, 1).conj(), inner, last + last.flip(0, 1).conj()], dim=-1)
    for dim in (0, 1):
        size = spectrum.shape[dim] - 1
        first = spectrum.narrow(dim, 0, 1) + spectrum.narrow(dim, size, 1)
        spectrum = torch.cat([first, spectrum.narrow(dim, 1, size - 1)], dim)
    return spectrum
