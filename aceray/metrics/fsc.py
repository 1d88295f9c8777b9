"""Fourier shell correlation of two volumes and the resolution it implies.

Convention: shells by rounding |k|; the last shell, d/2, holds what lies inside the sphere |k| < d/2. Resolution is the
first crossing of a threshold, by linear interpolation between shells; two pixels (Nyquist) when there is none.

A mask (metrics.masks) mixes neighbouring coefficients and so raises the curve; what it adds is measured on the same
volumes with random phases (Chen et al. 2013, Ultramicroscopy 135, 24) and taken off.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from aceray.em.random import named_generator

_VOLUME = (-3, -2, -1)
NYQUIST_PX = 2.0
_NO_POWER = 1e-60
RANDOM_BELOW = 0.8
_SHELLS_KEPT = 2  # the mask carries true phases so far into the shells with random ones
_RANDOM_DRAWS = 4


@dataclass(frozen=True)
class HalfBall:
    """Fourier coefficients of real d x d x d volumes below Nyquist, in the half space kx >= 0.

    `frequency` is (x, y, z) in cycles per box, `shell` the rounded radius, `weight` the number of times a coefficient
    stands in the full transform: 2, but 1 in the plane kx = 0, which is held whole. Built by `half_ball`.
    """

    box: int
    frequency: Float[Tensor, "p 3"]
    shell: Int[Tensor, " p"]
    weight: Float[Tensor, " p"]
    flat: Int[Tensor, " p"]  # where the coefficients stand in a flattened real-input transform

    def take(self, index: Int[Tensor, " q"]) -> "HalfBall":
        """Some of the coefficients."""
        return HalfBall(self.box, self.frequency[index], self.shell[index], self.weight[index], self.flat[index])

    def gather(self, volumes: Float[Tensor, "*batch d d d"]) -> Complex[Tensor, "*batch p"]:
        """Coefficients of the volumes, in the convention of em.projection: orthonormal for a d x d projection."""
        spectrum = torch.fft.rfftn(torch.fft.ifftshift(volumes, _VOLUME), dim=_VOLUME)
        return spectrum.flatten(-3)[..., self.flat] / self.box

    def scatter(self, coefficients: Complex[Tensor, "*batch p"]) -> Float[Tensor, "*batch d d d"]:
        """Real volumes with these coefficients and zero elsewhere."""
        box, half = self.box, self.box // 2 + 1
        spectrum = coefficients.new_zeros(*coefficients.shape[:-1], box * box * half)
        spectrum[..., self.flat] = coefficients * box
        volumes = torch.fft.irfftn(spectrum.unflatten(-1, (box, box, half)), s=(box, box, box), dim=_VOLUME)
        return torch.fft.fftshift(volumes, _VOLUME)


def half_ball(box: int, device: torch.device | str | None = None) -> HalfBall:
    """All coefficients with |k| < box/2 and kx >= 0."""
    axis = torch.fft.fftfreq(box, 1 / box, device=device).round().long()
    kz, ky, kx = torch.meshgrid(axis, axis, torch.arange(box // 2 + 1, device=device), indexing="ij")
    inside = 4 * (kx.square() + ky.square() + kz.square()) < box * box
    frequency = torch.stack([kx[inside], ky[inside], kz[inside]], dim=-1)
    shell = frequency.square().sum(-1).double().sqrt().round().long()
    weight = torch.where(frequency[:, 0] == 0, 1.0, 2.0)
    return HalfBall(box, frequency.float(), shell, weight, inside.flatten().nonzero()[:, 0])


def shell_sum(values: Float[Tensor, "*batch p"], ball: HalfBall) -> Float[Tensor, "*batch s"]:
    """Sums over shells 0 … d//2 of the full transform, accumulated in float64."""
    sums = values.new_zeros(*values.shape[:-1], ball.box // 2 + 1, dtype=torch.float64)
    return sums.index_add_(-1, ball.shell, values.double() * ball.weight.double())


def shell_correlation(
    first: Complex[Tensor, "*batch p"], second: Complex[Tensor, "*batch p"], ball: HalfBall
) -> Float[Tensor, "*batch s"]:
    """Fourier shell correlation of coefficients on a half ball; a shell without power correlates with nothing: 0."""
    covariance = shell_sum((first * second.conj()).real, ball)
    power = shell_sum(_squared(first), ball) * shell_sum(_squared(second), ball)
    return covariance / power.clamp_min(_NO_POWER).sqrt()


def _squared(values: Complex[Tensor, "*batch p"]) -> Float[Tensor, "*batch p"]:
    # unlike abs().square() it has a gradient at zero
    return values.real.square() + values.imag.square()


def fourier_shell_correlation(
    first: Float[Tensor, "*batch d d d"], second: Float[Tensor, "*batch d d d"]
) -> Float[Tensor, "*batch s"]:
    """FSC(s) = Re sum V1 V2* / sqrt(sum |V1|^2 sum |V2|^2) for the shells s = 0 … d//2 (Harauz and van Heel 1986).

    The volumes must share a frame (metrics.alignment).
    """
    ball = half_ball(first.shape[-1], first.device)
    return shell_correlation(ball.gather(first), ball.gather(second), ball).float()


def resolution_px(fsc: Float[Tensor, " s"], threshold: float, box: int) -> float:
    """Resolution in pixels of the box: box / s*, s* the first crossing of the threshold; 2.0 if there is none.

    The curve starts at 1 in shell 0, whatever the volumes' means are, so the result is finite for any curve.
    """
    values = [1.0, *fsc.tolist()[1:]]
    for shell, (inner, outer) in enumerate(pairwise(values)):
        if not outer >= threshold:
            crossing = shell + (inner - threshold) / (inner - outer)
            return max(box / crossing, NYQUIST_PX)
    return NYQUIST_PX


def resolution_angstrom(fsc: Float[Tensor, " s"], threshold: float, box: int, pixel_size_angstrom: float) -> float:
    """Resolution in angstrom; the pixel size is that of the box the curve was computed in."""
    return resolution_px(fsc, threshold, box) * pixel_size_angstrom


def fsc_area(fsc: Float[Tensor, " s"]) -> float:
    """Mean of the curve over shells 1 to Nyquist: 1 for identical volumes, about 0 for unrelated ones."""
    return float(fsc[1:].double().mean())


@dataclass(frozen=True)
class FscCurve:
    """A curve with the box and pixel size it was computed in."""

    values: Float[Tensor, " s"]
    box: int
    pixel_size_angstrom: float

    def columns(self) -> dict[str, list[float]]:
        """The curve as a table of shells 1 to Nyquist."""
        shells = list(range(1, len(self.values)))
        pixels = [self.box / shell for shell in shells]
        return {
            "shell": [float(shell) for shell in shells],
            "frequency_per_px": [1 / size for size in pixels],
            "frequency_per_angstrom": [1 / (size * self.pixel_size_angstrom) for size in pixels],
            "resolution_px": pixels,
            "resolution_angstrom": [size * self.pixel_size_angstrom for size in pixels],
            "fsc": self.values[1:].tolist(),
        }


@dataclass(frozen=True)
class MaskedFsc:
    """FSC before and after masking, that of masked maps with random phases, and the one corrected for it."""

    unmasked: Float[Tensor, " s"]
    masked: Float[Tensor, " s"]
    randomised: Float[Tensor, " s"]  # 0 in the shells whose phases were kept
    corrected: Float[Tensor, " s"]


def masked_fsc(
    first: Float[Tensor, "d d d"], second: Float[Tensor, "d d d"], mask: Float[Tensor, "d d d"] | None
) -> MaskedFsc:
    """FSC of two masked maps of one frame, corrected by (FSC_masked - FSC_random) / (1 - FSC_random).

    Phases are random from the first shell whose unmasked FSC is below 0.8, the correction begins two shells later.
    FSC_random is the mean of four draws of a fixed seed. Without a mask all curves are the unmasked one.
    """
    ball = half_ball(first.shape[-1], first.device)
    spectra = ball.gather(torch.stack([first, second]).float())
    unmasked = shell_correlation(spectra[0], spectra[1], ball).float()
    if mask is None:
        return MaskedFsc(unmasked, unmasked, torch.zeros_like(unmasked), unmasked)
    masked = _fsc_under(mask, spectra, ball)
    below = (unmasked[1:] < RANDOM_BELOW).nonzero()
    start = int(below[0]) + 1 if len(below) else len(unmasked)
    randomised = torch.zeros_like(unmasked)
    if start < len(unmasked):
        draws = [
            _fsc_under(mask, _with_random_phases(spectra, ball, start, draw), ball) for draw in range(_RANDOM_DRAWS)
        ]
        randomised[start:] = torch.stack(draws).mean(0)[start:]
    added = torch.where(torch.arange(len(masked), device=masked.device) < start + _SHELLS_KEPT, 0.0, randomised)
    # the remainder is nothing only for a mask of a single voxel
    corrected = (masked - added) / (1 - added).clamp_min(1e-6)
    return MaskedFsc(unmasked, masked, randomised, corrected)


def _fsc_under(mask: Tensor, spectra: Complex[Tensor, "2 p"], ball: HalfBall) -> Float[Tensor, " s"]:
    first, second = ball.gather(ball.scatter(spectra) * mask)
    return shell_correlation(first, second, ball).float()


def _with_random_phases(
    spectra: Complex[Tensor, "2 p"], ball: HalfBall, start: int, draw: int
) -> Complex[Tensor, "2 p"]:
    """The spectra with phases of white noise, independent in both, from shell `start` outwards."""
    generator = named_generator("metrics/random_phases", ball.box, draw)
    # transforms of real noise: their phases have the symmetry of a real volume
    noise = ball.gather(torch.randn(2, *(ball.box,) * 3, generator=generator).to(spectra.device))
    phases = noise / noise.abs().clamp_min(1e-30)
    return torch.where(ball.shell >= start, spectra * phases, spectra)
