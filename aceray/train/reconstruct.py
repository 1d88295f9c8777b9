"""The map that posed images imply, regularised by what their two halves agree on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.em.backprojection import BackProjection
from aceray.em.fourier import HalfDisc
from aceray.em.projection import soft_sphere
from aceray.metrics.fsc import HalfBall, fourier_shell_correlation, half_ball
from aceray.train.energy import Images, Matches
from aceray.train.statistics import sum_over_workers

# half maps that agree less than this hold no signal; the floor keeps their shells from vanishing altogether
_NO_AGREEMENT, _LEAST_AGREEMENT = 0.1, 0.02
_FIRST_SHELL = 3
_JOINED_SHELL = 4
_INVERSE_SSNR = 0.1  # of the mean denominator of all shells: bounds what a node that few images reached may become


@dataclass(frozen=True)
class Maps:
    """The map of all images, those of the two halves, and the correlation of the latter for shells 0 … d//2."""

    joint: Float[Tensor, "d d d"]
    halves: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    half_fsc: Float[Tensor, " s"]


class Reconstruction:
    """Images of all workers, inserted at their poses; the two halves of them apart."""

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
        """Maps of what all workers inserted: in the soft sphere, then every shell times its Wiener factor.

        That is the share of signal in a shell's power which the correlation F of the half maps implies: 2 F / (1 + F)
        for both together, F for one (Rosenthal and Henderson 2003, J. Mol. Biol. 333, 721). Damped after the mask,
        because it mixes neighbouring shells: outer ones that were damped before would drown in what leaks from inner
        ones (5NRL, 64 px, -10 dB, true poses: FSC 0.5 at 2.43 px in place of 2.40).
        """
        for accumulator in self._halves:
            sum_over_workers(torch.view_as_real(accumulator.numerator))
            sum_over_workers(accumulator.denominator)
        first, second = (self._masked(accumulator) for accumulator in self._halves)
        correlation = fourier_shell_correlation(first, second)
        agreement = _agreement(correlation)
        joint = self._masked(self._halves[0].plus(self._halves[1]))
        ball = half_ball(self.disc.box, joint.device)
        both = damped(joint, 2 * agreement / (1 + agreement), ball)
        return Maps(both, (damped(first, agreement, ball), damped(second, agreement, ball)), correlation)

    def _masked(self, accumulator: BackProjection) -> Float[Tensor, "d d d"]:
        box, mean = self.disc.box, accumulator.mean_denominator()
        volume = accumulator.volume(_INVERSE_SSNR * mean.mean(dim=0, keepdim=True))
        return volume * soft_sphere(box, box / 2, volume.device)


def damped(volume: Float[Tensor, "d d d"], factor: Float[Tensor, " s"], ball: HalfBall) -> Float[Tensor, "d d d"]:
    """The volume with every shell times its factor, below Nyquist."""
    return ball.scatter(ball.gather(volume) * factor[ball.shell])


def joined(half: Float[Tensor, "d d d"], joint: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
    """A half's map with the first shells of the joint one, which hold the halves in one frame."""
    ball = half_ball(half.shape[-1], half.device)
    coefficients = torch.where(ball.shell <= _JOINED_SHELL, ball.gather(joint), ball.gather(half))
    return ball.scatter(coefficients)


def _agreement(correlation: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """The half maps' correlation where there is any; beyond the first shell without, and at least, almost none."""
    agreement = correlation.clamp(_LEAST_AGREEMENT, 1.0)
    agreement[first_lost_shell(correlation) :] = _LEAST_AGREEMENT
    return agreement


def first_lost_shell(correlation: Float[Tensor, " s"]) -> int:
    """The first shell, from the third on, in which half maps do not agree; one beyond the last if they always do."""
    lost = (correlation[_FIRST_SHELL:] < _NO_AGREEMENT).nonzero()
    return _FIRST_SHELL + int(lost[0]) if len(lost) else len(correlation)
