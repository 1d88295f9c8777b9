"""From a projection to an image: shift, noise, and what the noise level of given images is."""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from aceray.em.fourier import HalfDisc, frequency_index


def shift_phase(disc: HalfDisc, shift_px: Float[Tensor, "*batch 2"]) -> Complex[Tensor, "*batch p"]:
    """Factor exp(-2 pi i k.t) that moves an image's content by t = (x, y) pixels of the disc's box; ACE-EM eq. 27."""
    angle = (-2 * math.pi / disc.box) * (shift_px @ disc.frequency.T)
    return torch.complex(angle.cos(), angle.sin())


def shift_image(
    images: Float[Tensor, "*batch d d"], shift_px: Float[Tensor, "*batch 2"]
) -> Float[Tensor, "*batch d d"]:
    """Move the content of each image by (x, y) pixels, periodically, with a phase ramp.

    On an even box the ramp at Nyquist has no conjugate partner; its real part is used, so the result is real.
    """
    box = images.shape[-1]
    x = torch.arange(box // 2 + 1, device=images.device, dtype=images.dtype)
    y = torch.fft.ifftshift(frequency_index(box, images.device)).to(images.dtype)
    ramps = []
    for frequency, shift in ((y, shift_px[..., 1, None]), (x, shift_px[..., 0, None])):
        angle = -2 * math.pi / box * frequency * shift
        imaginary = torch.where(2 * frequency.abs() == box, torch.zeros_like(angle), angle.sin())
        ramps.append(torch.complex(angle.cos(), imaginary))
    spectrum = torch.fft.rfft2(images) * ramps[0][..., :, None] * ramps[1][..., None, :]
    return torch.fft.irfft2(spectrum, s=(box, box))


def noise_std_for_snr(signal_variance: float, snr_db: float) -> float:
    """Standard deviation of white noise for SNR = 10 log10(signal variance / noise variance), over the full box."""
    return math.sqrt(signal_variance) * 10 ** (-snr_db / 20)


def background_std(images: Float[Tensor, "n d d"]) -> Float[Tensor, ""]:
    """Noise level of particle images: rms of the pixels outside radius d/2 about their own image's mean there."""
    axis = frequency_index(images.shape[-1], images.device)
    outside = axis.square()[:, None] + axis.square() > (images.shape[-1] / 2) ** 2
    background = images[:, outside]
    return background.var(dim=1).mean().sqrt()
