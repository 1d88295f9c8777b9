"""Noise for rendered images: white, or coloured as in the backgrounds of the particle images (ACE-EM eq. 11)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from aceray.data.stream import StreamedImages
from aceray.em.fourier import HalfDisc, frequency_index
from aceray.train.statistics import sum_over_workers

# of 3,000 images of 32 px the spectrum is known to 1% near Nyquist, to 6% in the first shell
_IMAGES_OF_A_LANE = 4096
_CHUNK = 256
# cycles per box between two values of a spectrum
_KNOT_SPACING = 2
# spread of the level at which a Gaussian would often be negative: var(std^2) / mean(std^2)^2
_LARGEST_LEVEL_VARIANCE = 1.0


@dataclass(frozen=True)
class WhiteNoise:
    """White noise of one standard deviation."""

    std: float

    def shaped(self, normal: Complex[Tensor, "m p"], generator: torch.Generator) -> Complex[Tensor, "m p"]:
        """Noise from complex normal numbers; `generator` gives what is drawn once an image."""
        return normal * self.std


@dataclass(frozen=True)
class ColouredNoise:
    """Gaussian noise of radial spectrum `std`^2, whose level and mean are drawn for every image.

    The level has mean square one and spread `level_spread`, the mean of the pixels `mean` and `mean_spread`; both are
    Gaussian.
    """

    std: Float[Tensor, " p"]
    level_spread: float
    mean: float
    mean_spread: float
    disc: HalfDisc

    def shaped(self, normal: Complex[Tensor, "m p"], generator: torch.Generator) -> Complex[Tensor, "m p"]:
        """Noise from complex normal numbers; `generator` gives what is drawn once an image."""
        level, mean = torch.randn(2, len(normal), 1, generator=generator).to(self.std.device)
        noise = normal * self.std * (math.sqrt(1 - self.level_spread**2) + self.level_spread * level)
        # the coefficient at the origin is the sum over the pixels divided by the side
        return torch.where(self.disc.radius == 0, self.disc.box * (self.mean + self.mean_spread * mean), noise)


Noise = WhiteNoise | ColouredNoise


@dataclass(frozen=True)
class Background:
    """What the images are like outside a circle, in their units.

    `spectrum` is the noise's variance per orthonormal coefficient at radius 0, 2, 4, … cycles per box and linear
    between: the corners of an image resolve no more. Spreads are those between images: what the finite background of
    an image would show by chance alone is taken off. `level_spread` is that of the standard deviation over its rms.
    """

    spectrum: Float[Tensor, " k"]
    level_spread: float
    mean: float
    mean_spread: float

    def noise(self, disc: HalfDisc, signal_std: float) -> ColouredNoise:
        """Noise like it for images of the disc's box, in units of the signal's standard deviation."""
        variance = _basis(disc.radius.double().cpu(), len(self.spectrum)) @ self.spectrum
        std = (variance.sqrt() / signal_std).float().to(disc.radius.device)
        return ColouredNoise(std, self.level_spread, self.mean / signal_std, self.mean_spread / signal_std, disc)


def measure_background(
    images: Float[Tensor, "n d d"] | StreamedImages,
    lanes: Sequence[Tensor],
    radius_fraction: float,
    device: torch.device | str = "cpu",
) -> Background:
    """Mean, level and radial spectrum of the pixels farther than `radius_fraction` of the box from the centre.

    `lanes` are the rows of each of this worker's lanes; up to 4,096 images of each, evenly spaced, count, those of all
    workers together, on `device`.
    """
    box = images.shape[-1]
    mask = background_mask(box, radius_fraction)
    inside, power = mask.to(device), torch.zeros(2 * box, 2 * box, dtype=torch.float64, device=device)
    moments = power.new_zeros(5)
    for part in torch.cat([lane[:: -(-len(lane) // _IMAGES_OF_A_LANE)] for lane in lanes]).split(_CHUNK):
        chosen = images[part].to(device)
        mean, variance = chosen[:, inside].double().mean(1), chosen[:, inside].double().var(1, correction=0)
        power += _padded_power(torch.where(inside, chosen - mean[:, None, None].float(), 0.0)).double().sum(0)
        moments += torch.stack([torch.ones_like(mean), mean, mean**2, variance, variance**2]).sum(1)
    power, moments = sum_over_workers(power).cpu(), sum_over_workers(moments).cpu()
    mean, square, variance, fourth = (moments[1:] / moments[0]).tolist()
    spectrum = _unmixed(power / moments[0], mask)
    of_mean, of_variance = _sampling_error(spectrum, mask)
    # with v = level^2 times the variance found by chance: mean(v^2) / mean(v)^2 = mean(level^4) (1 + its error)
    level = 0.0 if variance == 0 else fourth / variance**2 / (1 + of_variance) - 1
    # a Gaussian of mean square one and spread b has var(level^2) = 4 b^2 - 2 b^4
    level_spread = math.sqrt(1 - math.sqrt(1 - min(max(level, 0.0), _LARGEST_LEVEL_VARIANCE) / 2))
    # the noise's own share of an image's mean is that of the whole box, not of the background
    mean_variance = max(square - mean**2 - of_mean, 0.0) + float(spectrum[0]) / box**2
    return Background(spectrum, level_spread, mean, math.sqrt(mean_variance))


def background_mask(box: int, radius_fraction: float) -> Bool[Tensor, "d d"]:
    """Pixels farther from the centre than that share of the box."""
    axis = frequency_index(box)
    return axis.square()[:, None] + axis.square() > (radius_fraction * box) ** 2


def coupling(mask: Bool[Tensor, "d d"]) -> Float[Tensor, "s k"]:
    """Matrix from a radial spectrum (radius 0, 2, 4, …) to the mean power of masked images in shells 1, 2, ….

    Images are masked, relieved of their mean there, padded to twice the box (so that opposite edges are no neighbours)
    and transformed. With the mask's transform M, E |Y(q)|^2 is proportional to the sum over q' of
    S(q') |M(q - q') - M(q) conj(M(q')) / M(0)|^2: the coupling of modes on a cut sky (MASTER, Hivon et al. 2002) and
    the loss to the mean.
    """
    box, shell, radius = len(mask), _padded_shell(len(mask)), _padded_radius(len(mask))
    transform = _padded_transform(mask.double())
    power, area = transform.abs().square(), float(mask.sum())
    columns = []
    for weight in _basis(radius, int(radius.max() / _KNOT_SPACING) + 2).movedim(-1, 0):
        blurred = _convolved(weight, power).real
        crossed = (transform.conj() * _convolved(weight * transform, transform)).real
        mixed = blurred - 2 * crossed / area + power * ((weight * power).sum() / area**2)
        columns.append(_shell_means(mixed / (4 * box**4), shell))
    return torch.stack(columns, 1)


def _unmixed(power: Tensor, mask: Tensor) -> Tensor:
    """Spectrum whose masked images have that power: least squares of relative errors."""
    shell = _padded_shell(len(mask))
    found = _shell_means(power, shell)
    if not found.any():
        return torch.zeros(int(_padded_radius(len(mask)).max() / _KNOT_SPACING) + 2, dtype=torch.float64)
    weight = torch.bincount(shell.flatten())[1:].sqrt() / found
    return torch.linalg.lstsq(coupling(mask) * weight[:, None], found * weight).solution.clamp_min(0)


def _sampling_error(spectrum: Tensor, mask: Tensor) -> tuple[float, float]:
    """Variance of the mean over the mask of such noise, and that of its variance there over the variance squared."""
    area = float(mask.sum())
    pairs = torch.fft.ifft2(_padded_transform(mask.double()).abs().square()).real
    covariance = torch.fft.ifft2(_basis(_padded_radius(len(mask)), len(spectrum)) @ spectrum).real
    of_mean = float((pairs * covariance).sum()) / area**2
    left = covariance - of_mean
    variance = float(left[0, 0])
    return of_mean, 0.0 if variance <= 0 else 2 * float((pairs * left.square()).sum()) / (area * variance) ** 2


def _basis(radius: Tensor, count: int) -> Tensor:
    """Weights (…, count) of linear interpolation between radius 0, 2, 4, … cycles per box."""
    return (1 - (radius[..., None] / _KNOT_SPACING - torch.arange(count)).abs()).clamp_min(0)


def _padded_transform(images: Tensor) -> Tensor:
    return torch.fft.fft2(images, s=(2 * images.shape[-2], 2 * images.shape[-1]))


def _padded_power(images: Tensor) -> Tensor:
    """Power per coefficient, orthonormal on the box, at twice as many frequencies."""
    return _padded_transform(images).abs().square() / images.shape[-1] ** 2


def _padded_radius(box: int) -> Tensor:
    """Radius of every frequency of the padded box, uncentred, in cycles per box."""
    axis = torch.fft.fftfreq(2 * box, 1 / box, dtype=torch.float64)
    return torch.hypot(axis[:, None], axis)


def _padded_shell(box: int) -> Tensor:
    """Rounded radius; without an image's mean there is nothing at the origin, so it counts to the first shell."""
    return _padded_radius(box).round().long().clamp_min(1)


def _convolved(left: Tensor, right: Tensor) -> Tensor:
    """Periodic convolution."""
    return torch.fft.fft2(torch.fft.ifft2(left) * torch.fft.ifft2(right)) * left.numel()


def _shell_means(power: Tensor, shell: Tensor) -> Tensor:
    flat = shell.flatten()
    return (torch.bincount(flat, power.flatten()) / torch.bincount(flat))[1:]
