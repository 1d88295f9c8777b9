"""The map that posed images imply, regularised by what their two halves agree on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.em.backprojection import BackProjection
from aceray.em.fourier import HalfDisc
from aceray.em.projection import soft_sphere
from aceray.metrics.fsc import fourier_shell_correlation
from aceray.train.energy import Images, Matches
from aceray.train.statistics import sum_over_workers

# half maps that agree less than this hold no signal; the floor keeps their shells from vanishing altogether
_NO_AGREEMENT, _LEAST_AGREEMENT, _FULL_AGREEMENT = 0.1, 0.02, 0.999
_FIRST_INVERSE_SSNR = 0.05  # of the mean denominator, where the halves have not been compared yet


@dataclass(frozen=True)
class Maps:
    """The map of all images, those of the two halves, and the correlation of the latter for shells 0 … d//2."""

    joint: Float[Tensor, "d d d"]
    halves: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    half_fsc: Float[Tensor, " s"]


class Reconstruction:
    """Images of all workers, inserted at their poses; the even and the odd half of them apart."""

    def __init__(self, disc: HalfDisc) -> None:
        self.disc = disc
        self._halves = (BackProjection(disc), BackProjection(disc))

    def insert(self, images: Images, poses: Matches, half: Int[Tensor, " b"]) -> None:
        """Add images at their poses, each to its half, 0 or 1."""
        for number, accumulator in enumerate(self._halves):
            mine = (half == number).nonzero()[:, 0]
            own = images.take(mine)
            accumulator.insert(own.coefficients, poses.rotation[mine], own.transfer, poses.shift_px[mine])

    def maps(self) -> Maps:
        """Wiener-filtered maps of what all workers inserted, in the soft sphere.

        The signal-to-noise ratio of a shell is that which the correlation F of the half maps implies for both together,
        2 F / (1 - F) (Rosenthal and Henderson 2003, J. Mol. Biol. 333, 721): numerator / (denominator + mean
        denominator / SSNR).
        """
        for accumulator in self._halves:
            sum_over_workers(torch.view_as_real(accumulator.numerator))
            sum_over_workers(accumulator.denominator)
        joint = self._halves[0].plus(self._halves[1])
        box, device = self.disc.box, self.disc.radius.device
        mask = soft_sphere(box, box / 2, device)
        spread = [accumulator.mean_denominator() for accumulator in (*self._halves, joint)]
        first, second = (
            accumulator.volume(_FIRST_INVERSE_SSNR * mean) * mask
            for accumulator, mean in zip(self._halves, spread[:2], strict=True)
        )
        correlation = fourier_shell_correlation(first, second)
        inverse = _inverse_ssnr(correlation)
        first, second, both = (
            accumulator.volume(factor * inverse * mean) * mask
            for accumulator, mean, factor in zip((*self._halves, joint), spread, (2.0, 2.0, 1.0), strict=True)
        )
        return Maps(both, (first, second), correlation)


def _inverse_ssnr(correlation: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """Noise over signal power of both halves' map; beyond the first shell without agreement there is none."""
    lost = correlation < _NO_AGREEMENT
    lost[:3] = False
    agreement = correlation.clamp(_LEAST_AGREEMENT, _FULL_AGREEMENT)
    agreement[lost.cummax(0).values] = _LEAST_AGREEMENT
    return (1 - agreement) / (2 * agreement)
