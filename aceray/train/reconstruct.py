"""The map that posed images imply, regularised by what their two halves agree on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
# of a shell's mean denominator: bounds what a node that few images reached may become, and lowers no shell by more
_INVERSE_SSNR = 0.01
# of the last whole shell: those at Nyquist and beyond are reached by the rim of the images alone, and mostly noise
_RIM_INVERSE_SSNR = 0.3

Support = Callable[[Float[Tensor, "d d d"]], Float[Tensor, "d d d"]]
"""Weights, from 0 to 1, of where in a map's field the molecule is."""


@dataclass(frozen=True)
class Maps:
    """The map of all images, cut to the mask and damped; the two halves' as they were measured in the soft sphere.

    half_fsc is the correlation of the latter for shells 0 … d//2, agreement what it is once the noise outside the mask
    is gone.
    """

    joint: Float[Tensor, "d d d"]
    halves: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]]
    half_fsc: Float[Tensor, " s"]
    mask: Float[Tensor, "d d d"]
    agreement: Float[Tensor, " s"]

    def seen_by(self, half: int) -> "Maps":
        """The same with one half's map as the joint one, but for the first shells, which hold both in one frame."""
        ball = half_ball(self.joint.shape[-1], self.joint.device)
        own = damped(self.halves[half] * self.mask, self.agreement, ball)
        return replace(self, joint=joined(own, self.joint, ball))


class Reconstruction:
    """Images of all workers, inserted at their poses; the two halves of them apart.

    `support` finds the molecule in the map of all: what is outside is noise, and left out.
    """

    def __init__(self, disc: HalfDisc, support: Support) -> None:
        self.disc, self._support = disc, support
        self._halves = (BackProjection(disc), BackProjection(disc))

    def insert(self, images: Images, poses: Matches, half: Int[Tensor, " b"]) -> None:
        """Add images at their poses, each to its half, 0 or 1."""
        for number, accumulator in enumerate(self._halves):
            mine = (half == number).nonzero()[:, 0]
            own = images.take(mine)
            accumulator.insert(own.coefficients, poses.rotation[mine], own.transfer, poses.shift_px[mine])

    def maps(self) -> Maps:
        """Maps of what all workers inserted: in the mask, then every shell times its Wiener factor.

        That is the share of signal in a shell's power which the correlation F of the half maps implies: 2 F / (1 + F)
        for both together, F for one (Rosenthal and Henderson 2003, J. Mol. Biol. 333, 721). Damped after the mask,
        because it mixes neighbouring shells: outer ones that were damped before would drown in what leaks from inner
        ones (5NRL, 64 px, -10 dB, true poses: FSC 0.5 at 2.43 px in place of 2.40).
        """
        for accumulator in self._halves:
            sum_over_workers(torch.view_as_real(accumulator.numerator))
            sum_over_workers(accumulator.denominator)
        halves = self._in_sphere(self._halves[0]), self._in_sphere(self._halves[1])
        correlation = fourier_shell_correlation(*halves)
        joint = self._in_sphere(self._halves[0].plus(self._halves[1]))
        ball = half_ball(self.disc.box, joint.device)
        mask = self._support(damped(joint, _of_both(_agreement(correlation, 1.0)), ball))
        agreement = _agreement(correlation, self._share(mask))
        return Maps(damped(joint * mask, _of_both(agreement), ball), halves, correlation, mask, agreement)

    def _in_sphere(self, accumulator: BackProjection) -> Float[Tensor, "d d d"]:
        mean = accumulator.mean_denominator()
        inverse_ssnr = _INVERSE_SSNR * mean
        inverse_ssnr[-1] = _RIM_INVERSE_SSNR * mean[-2]
        volume = accumulator.volume(inverse_ssnr)
        return volume * self._sphere(volume.device)

    def _sphere(self, device: torch.device) -> Float[Tensor, "d d d"]:
        return soft_sphere(self.disc.box, self.disc.box / 2, device)

    def _share(self, mask: Float[Tensor, "d d d"]) -> float:
        """How much of the noise in the sphere is in the mask."""
        sphere = self._sphere(mask.device)
        return float((mask * sphere).square().sum() / sphere.square().sum())


def damped(volume: Float[Tensor, "d d d"], factor: Float[Tensor, " s"], ball: HalfBall) -> Float[Tensor, "d d d"]:
    """The volume with every shell times its factor, below Nyquist."""
    return ball.scatter(ball.gather(volume) * factor[ball.shell])


def joined(half: Float[Tensor, "d d d"], joint: Float[Tensor, "d d d"], ball: HalfBall) -> Float[Tensor, "d d d"]:
    """A half's map with the first shells of the joint one."""
    return ball.scatter(torch.where(ball.shell <= _JOINED_SHELL, ball.gather(joint), ball.gather(half)))


def _agreement(correlation: Float[Tensor, " s"], share: float) -> Float[Tensor, " s"]:
    """How half maps would correlate with that share of their noise; at least, and where they do not, almost nothing.

    With S/N the ratio of signal and noise in a shell's power, the correlation F is S / (S + N), so less noise makes it
    F / (F + share (1 - F)), the correction for solvent content of Frealign (Grigorieff 2016, Methods Enzymol. 579,
    191). Unlike masked half maps it does not hold what masks correlate by themselves.
    """
    inside = correlation.clamp(0, 1)
    inside = inside / (inside + share * (1 - inside))
    agreement = inside.clamp(_LEAST_AGREEMENT, 1.0)
    agreement[first_lost_shell(inside) :] = _LEAST_AGREEMENT
    return agreement


def _of_both(agreement: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    return 2 * agreement / (1 + agreement)


def first_lost_shell(correlation: Float[Tensor, " s"]) -> int:
    """The first shell, from the third on, in which half maps do not agree; one beyond the last if they always do."""
    lost = (correlation[_FIRST_SHELL:] < _NO_AGREEMENT).nonzero()
    return _FIRST_SHELL + int(lost[0]) if len(lost) else len(correlation)
