"""What is estimated from images is what was put into them."""

import torch
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc
from aceray.train.predict import Particles
from aceray.train.statistics import image_statistics
from tests.train.phantom import BOX, PIXEL_SIZE_ANGSTROM, ctf_parameters


def test_planted_signal_and_noise_powers_are_found() -> None:
    disc, count, noise_std = HalfDisc(BOX), 6000, 0.7
    parameters = ctf_parameters(count)
    generator = torch.Generator().manual_seed(4)
    power = 3.0 * torch.exp(-disc.shell / 3.0)
    normal = torch.randn(2, count, len(disc), dtype=torch.complex64, generator=generator)
    blank = Particles(normal[0], parameters, torch.arange(count), PIXEL_SIZE_ANGSTROM)
    ctf = blank.transfer(torch.arange(count), disc)
    images = normal[0] * power.sqrt() * ctf + noise_std * normal[1]
    particles = Particles(images, parameters, torch.arange(count), PIXEL_SIZE_ANGSTROM)
    statistics = image_statistics(particles, disc, noise_std)
    inner = (disc.shell > 0) & (disc.shell < 5)
    assert_close(statistics.noise_to_signal[inner], (noise_std**2 / power)[inner], rtol=0.1, atol=0)
    expected = disc.energy(normal[0] * power.sqrt() * ctf).mean().sqrt()
    assert_close(statistics.signal_std, float(expected), rtol=0.02, atol=0)


def test_the_mean_of_an_image_is_not_used() -> None:
    disc = HalfDisc(BOX)
    images = torch.randn(50, len(disc), dtype=torch.complex64, generator=torch.Generator().manual_seed(5))
    statistics = image_statistics(Particles(images, None, torch.arange(50), PIXEL_SIZE_ANGSTROM), disc, 0.1)
    assert float(statistics.noise_to_signal[disc.radius == 0]) > 1e5
