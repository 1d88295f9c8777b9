"""What all workers must agree on: sums and broadcasts, and the images' signal level and spectrum.

Both are estimated from the images alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from aceray.em.fourier import HalfDisc
from aceray.train.predict import Particles

_CHUNK = 1024
# a noise-free set still has interpolation error; deconvolution must not divide by less than this share of the signal
_SMALLEST_NOISE_TO_SIGNAL = 0.02
_LARGEST_NOISE_TO_SIGNAL = 1e6


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def sum_over_workers(values: Tensor) -> Tensor:
    """Sum of a tensor over all workers."""
    if not _alone():
        distributed.all_reduce(values)
    return values


@torch.no_grad()
def broadcast_from_first(tensors: list[Tensor]) -> None:
    """Give all workers the first one's values, in place."""
    if not _alone():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


@dataclass(frozen=True)
class ImageStatistics:
    """Standard deviation of the signal in the images, and noise over signal power per half-disc coefficient.

    The signal's power is that before contrast transfer: (mean |F|^2 - noise) / mean C^2 of the shell.
    """

    signal_std: float
    noise_to_signal: Float[Tensor, " p"]


def image_statistics(
    particles: Particles,
    disc: HalfDisc,
    noise_std: float,
) -> ImageStatistics:
    """Estimate from the images of all workers, which have white noise of the given level."""
    shells = int(disc.shell.max()) + 1
    power = torch.zeros(shells, device=disc.radius.device)
    transfer = torch.zeros_like(power)
    for index, coefficients in particles.chunks(_CHUNK):
        power.index_add_(0, disc.shell, torch.view_as_real(coefficients).square().sum((0, -1)))
        ctf = particles.transfer(index, disc)
        squared = torch.full_like(disc.radius, len(index)) if ctf is None else ctf.square().sum(0)
        transfer.index_add_(0, disc.shell, squared)
    count = torch.zeros_like(power).index_add_(0, disc.shell, torch.full_like(disc.radius, len(particles)))
    power, transfer, count = sum_over_workers(torch.stack([power, transfer, count])).unbind()
    noise = noise_std**2
    # the floor keeps shells without visible signal finite; they are then filtered out
    signal = (power / count - noise).clamp_min(1e-3 * noise + 1e-9 * power.max() / count.max())
    before_transfer = signal / (transfer / count).clamp_min(1e-3)
    ratio = (noise / before_transfer).clamp(_SMALLEST_NOISE_TO_SIGNAL, _LARGEST_NOISE_TO_SIGNAL)
    # the mean of an image says nothing about its pose
    ratio[0] = _LARGEST_NOISE_TO_SIGNAL
    energy = (signal[disc.shell] * disc.weight).sum() / disc.box**2
    return ImageStatistics(float(energy.sqrt()), ratio[disc.shell])
