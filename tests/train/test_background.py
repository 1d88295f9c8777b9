"""Backgrounds: the spectrum, level and mean put into images are found, whatever the mask and the particle do."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from aceray.train import background
from aceray.train.background import Background, ColouredNoise, background_mask, coupling, measure_background

BOX, COUNT = 32, 3000


def white(radius: torch.Tensor) -> torch.Tensor:
    return torch.full_like(radius, 4.0)


def red(radius: torch.Tensor) -> torch.Tensor:
    return 1 + 6 * torch.exp(-radius / 5)


def blue(radius: torch.Tensor) -> torch.Tensor:
    return 0.5 + radius / 8


def backgrounds(spectrum, count: int = COUNT, box: int = BOX) -> torch.Tensor:
    """Cut out of fields three times as wide, as particles are cut out of micrographs."""
    axis = 3 * box * torch.fft.fftfreq(3 * box) / 3
    transfer = spectrum(torch.hypot(axis[:, None], axis)).sqrt()
    generator = named_generator("tests/background", count)
    parts = []
    for _ in range(0, count, 500):
        field = torch.randn(500, 3 * box, 3 * box, generator=generator)
        parts.append(torch.fft.ifft2(torch.fft.fft2(field) * transfer).real[:, :box, :box])
    return torch.cat(parts)


def measured(images: torch.Tensor, radius_fraction: float = 0.5) -> Background:
    return measure_background(images, [torch.arange(len(images))], radius_fraction)


def variance(found: Background, box: int = BOX) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance per coefficient in shells 1, 2, …, with each shell's radius."""
    disc = HalfDisc(box)
    std = found.noise(disc, 1.0).std
    radius = torch.arange(1, box // 2).float()
    return torch.stack([std[disc.shell == shell].square().mean() for shell in radius]), radius


@pytest.mark.parametrize("radius_fraction", [0.4, 0.45, 0.5])
def test_white_noise_has_a_flat_spectrum_at_its_variance(radius_fraction: float) -> None:
    images = backgrounds(white)
    found, _ = variance(measured(images, radius_fraction))
    assert_close(found, torch.full_like(found, 4.0), rtol=0.06, atol=0)
    assert_close(float(found[3:].mean()), 4.0, rtol=0.01, atol=0)


@pytest.mark.parametrize("spectrum", [red, blue])
def test_a_coloured_spectrum_is_found_behind_the_mask(spectrum) -> None:
    found, radius = variance(measured(backgrounds(spectrum)))
    assert_close(found, spectrum(radius), rtol=0.08, atol=0)


def test_fourier_crops_have_the_spectrum_of_the_large_images() -> None:
    from aceray.em.fourier import crop_images

    found, radius = variance(measured(crop_images(backgrounds(red), 24)), 24)
    assert_close(found[:-1], red(radius)[:-1], rtol=0.1, atol=0)


def test_coupling_is_that_of_explicit_covariances() -> None:
    box = 8
    mask = background_mask(box, 0.4)
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(2 * box, 1 / box)] * 2))
    rng = np.random.default_rng(1)
    knots = rng.uniform(0.5, 2.0, coupling(mask).shape[1])
    spectrum = np.interp(radius, 2.0 * np.arange(len(knots)), knots)
    places = np.argwhere(mask.numpy())
    lag = places[:, None] - places[None]
    frequency = np.stack(np.meshgrid(*[np.arange(2 * box)] * 2, indexing="ij"), -1).reshape(-1, 2)
    covariance = np.zeros(lag.shape[:2])
    for q, power in zip(frequency, spectrum.ravel(), strict=True):
        covariance += power * np.cos(2 * np.pi * (lag @ q) / (2 * box)) / (2 * box) ** 2
    centring = np.eye(len(places)) - 1 / len(places)
    covariance = centring @ covariance @ centring
    waves = np.exp(-2j * np.pi * (frequency @ places.T) / (2 * box))
    power = np.einsum("qx,xy,qy->q", waves, covariance, waves.conj()).real / box**2
    shell = np.maximum(np.round(radius.ravel()), 1)
    expected = [power[shell == number].mean() for number in range(1, int(shell.max()) + 1)]
    assert_close(coupling(mask) @ torch.from_numpy(knots), torch.tensor(expected), atol=1e-10, rtol=0)


def test_a_centred_particle_changes_the_spectrum_by_less_than_one_per_cent() -> None:
    images = backgrounds(red)
    axis = torch.arange(BOX) - BOX // 2
    distance = axis.square()[:, None] + axis.square()
    # as bright as the noise, and with a tail: 1 per mille of its height where the background begins
    particle = 10 * torch.exp(-distance / (BOX / 2) ** 2 * math.log(1000))
    assert particle.var() > 2
    without, _ = variance(measured(images))
    found, _ = variance(measured(images + particle))
    assert_close(found, without, rtol=0.01, atol=0)


def test_spreads_between_images_are_those_put_in_without_the_sampling_error() -> None:
    images = backgrounds(red)
    plain = measured(images)
    assert plain.level_spread < 0.05 and abs(plain.mean) < 0.02
    # the mean of a whole image of this noise
    assert plain.mean_spread == pytest.approx(math.sqrt(7) / BOX, rel=0.15)
    level, mean = torch.randn(2, COUNT, 1, 1, generator=named_generator("tests/levels"))
    varied = measured(images * (1 + 0.2 * level) + 3 + 0.7 * mean)
    # the spread over the root of the mean square
    assert varied.level_spread == pytest.approx(0.2 / math.sqrt(1.04), rel=0.1)
    assert varied.mean == pytest.approx(3, abs=0.05)
    assert varied.mean_spread == pytest.approx(0.7, rel=0.05)


def test_workers_measure_all_their_lanes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images = backgrounds(red, 1000)
    lanes = [torch.arange(0, 1000, 2), torch.arange(1, 1000, 2)]
    whole = measure_background(images, lanes, 0.5)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(background, "sum_over_workers", lambda values: given.append(values.clone()) or values)
    for lane in lanes:
        measure_background(images[lane], [torch.arange(500)], 0.5)
    assert len(given) == 4
    totals = iter([given[0] + given[2], given[1] + given[3]])
    monkeypatch.setattr(background, "sum_over_workers", lambda _: next(totals))
    together = measure_background(images[:500], [torch.arange(500)], 0.5)
    assert_close(together.spectrum, whole.spectrum, rtol=1e-6, atol=0)
    assert together.mean_spread == pytest.approx(whole.mean_spread)
    assert together.level_spread == pytest.approx(whole.level_spread, abs=1e-6)


def test_a_long_lane_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    images = backgrounds(white, 1000)
    images[::5] += 100
    monkeypatch.setattr(background, "_IMAGES_OF_A_LANE", 200)
    assert measured(images).mean == pytest.approx(100, abs=0.1)
    assert measured(images.roll(1, 0)).mean == pytest.approx(0, abs=0.1)


def test_units_are_those_of_the_signal() -> None:
    disc, found = HalfDisc(BOX), Background(torch.full((14,), 9.0, dtype=torch.float64), 0.1, 6.0, 1.5)
    noise = found.noise(disc, 3.0)
    assert_close(noise.std, torch.ones(len(disc)))
    assert (noise.level_spread, noise.mean, noise.mean_spread) == (0.1, 2.0, 0.5)


def test_images_without_noise_give_none() -> None:
    found = measured(torch.zeros(4, BOX, BOX))
    assert not found.spectrum.any()
    assert (found.level_spread, found.mean, found.mean_spread) == (0, 0, 0)


def test_drawn_noise_has_its_moments_in_pixels() -> None:
    disc, count = HalfDisc(BOX), 20000
    std = 1 + disc.radius / 8
    noise = ColouredNoise(std, 0.3, -2.0, 0.5, disc)
    normal = torch.randn(count, len(disc), dtype=torch.complex64, generator=named_generator("tests/normal"))
    drawn = noise.shaped(normal, named_generator("tests/level"))
    images = disc.scatter(drawn)
    mean = images.mean((1, 2))
    assert float(mean.mean()) == pytest.approx(-2.0, abs=0.02)
    assert float(mean.std()) == pytest.approx(0.5, rel=0.03)
    away = disc.radius > 0
    assert_close(drawn[:, away].abs().square().mean(0), std[away].square(), rtol=0.06, atol=0)
    level = drawn[:, away].div(std[away]).abs().square().mean(1).sqrt()
    assert float(level.std()) == pytest.approx(0.3, rel=0.05)
    assert not drawn[:, ~away].imag.any()


def test_noise_drawn_from_a_measurement_is_measured_again() -> None:
    disc, images = HalfDisc(BOX), backgrounds(red)
    first = measured(images + 1)
    normal = torch.randn(COUNT, len(disc), dtype=torch.complex64, generator=named_generator("tests/again"))
    drawn = disc.scatter(first.noise(disc, 1.0).shaped(normal, named_generator("tests/level")))
    second = measured(drawn)
    # radius 3 to 12: below, the mean is drawn apart; above, a half disc has not the corners of the transform
    assert_close(variance(second)[0][2:12], variance(first)[0][2:12], rtol=0.1, atol=0)
    assert second.mean == pytest.approx(1, abs=0.03)
    assert second.level_spread < 0.05
