import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import (
    HalfDisc,
    centred_fft2,
    centred_ifft2,
    crop_images,
    crop_volume,
    frequency_index,
    shell_index,
)
from aceray.em.random import named_generator
from tests.references.formation import fourier_coefficient
from tests.references.projection import blob_volume

BOXES = [8, 9, 10, 17]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=named_generator("test/fourier", *shape))


@pytest.mark.parametrize("box", BOXES)
def test_centred_transform_against_the_direct_sum(box: int) -> None:
    image = noise(box, box).double()
    spectrum = centred_fft2(image)
    for row, column in itertools.product(range(0, box, 3), range(box)):
        expected = fourier_coefficient(image.numpy(), column - box // 2, row - box // 2)
        assert abs(spectrum[row, column].item() - expected) < 1e-11
    assert_close(centred_ifft2(spectrum).real, image)


@pytest.mark.parametrize("box", BOXES)
def test_frequency_index_has_the_origin_at_half_the_box(box: int) -> None:
    axis = frequency_index(box)
    assert axis[box // 2] == 0
    assert axis.tolist() == list(range(-(box // 2), box - box // 2))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_shells_are_rounded_radii(dimensions: int) -> None:
    found = shell_index(9, dimensions)
    for index in itertools.product(range(9), repeat=dimensions):
        assert found[index] == round(math.dist(index, (4,) * dimensions))


@pytest.mark.parametrize("box", BOXES)
def test_half_disc_holds_one_of_each_pair_below_nyquist(box: int) -> None:
    kept = {(int(x), int(y)) for x, y in HalfDisc(box).frequency.tolist()}
    axis = range(-(box // 2), box - box // 2)
    inside = {(x, y) for x in axis for y in axis if math.hypot(x, y) < box / 2}
    assert kept | {(-x, -y) for x, y in kept} == inside
    assert kept & {(-x, -y) for x, y in kept} == {(0, 0)}


@pytest.mark.parametrize("box", BOXES)
def test_half_disc_gathers_orthonormal_coefficients(box: int) -> None:
    disc = HalfDisc(box).double()
    image = noise(box, box).double()
    expected = [fourier_coefficient(image.numpy(), int(x), int(y)) for x, y in disc.frequency.tolist()]
    assert_close(disc.gather(image), torch.tensor(expected, dtype=torch.complex128), atol=1e-11, rtol=0)
    assert_close(disc.radius, torch.tensor([math.hypot(x, y) for x, y in disc.frequency.tolist()]).double())
    assert disc.shell.tolist() == [round(radius) for radius in disc.radius.tolist()]


def test_a_smaller_radius_keeps_the_inner_frequencies_of_the_same_box() -> None:
    whole, inner = HalfDisc(12), HalfDisc(12, 3.0)
    kept = whole.radius <= 3.0
    assert whole.rows_of(inner).tolist() == kept.nonzero()[:, 0].tolist()
    assert_close(HalfDisc(32).frequency[HalfDisc(32).rows_of(whole)], whole.frequency)
    assert 3.0 in inner.radius and len(inner) == int(kept.sum()) < len(whole)
    for name in ("frequency", "radius", "shell", "weight"):
        torch.testing.assert_close(getattr(inner, name), getattr(whole, name)[kept])
    coefficients = inner.gather(torch.randn(12, 12, generator=named_generator("tests/fourier/inner")))
    torch.testing.assert_close(whole.gather(inner.scatter(coefficients))[kept], coefficients)
    assert float(whole.gather(inner.scatter(coefficients))[~kept].abs().max()) < 1e-5


@pytest.mark.parametrize("box", BOXES)
def test_gather_and_scatter_are_inverses_on_the_disc(box: int) -> None:
    disc = HalfDisc(box)
    coefficients = torch.complex(noise(3, len(disc)), noise(3, len(disc) + 1)[:, 1:])
    coefficients = torch.where(disc.radius == 0, coefficients.real.to(coefficients.dtype), coefficients)
    assert_close(disc.gather(disc.scatter(coefficients)), coefficients, atol=1e-6, rtol=0)
    # scattering what was gathered is a projection on the disc: everything below Nyquist is kept, nothing else
    image = noise(2, box, box)
    kept = disc.scatter(disc.gather(image))
    spectrum = centred_fft2(image)
    axis = frequency_index(box)
    inside = axis.square()[:, None] + axis.square() < (box / 2) ** 2
    assert_close(centred_fft2(kept), spectrum * inside, atol=1e-5, rtol=0)


@pytest.mark.parametrize("box", BOXES)
def test_parseval_on_the_disc(box: int) -> None:
    disc = HalfDisc(box)
    image = disc.scatter(disc.gather(noise(4, box, box)))
    assert_close(disc.energy(disc.gather(image)), image.square().mean(dim=(1, 2)), atol=1e-6, rtol=0)
    assert_close(disc.weight, torch.where(disc.radius == 0, 1.0, 2.0))


@pytest.mark.parametrize("box", [16, 64])
def test_white_noise_has_its_variance_in_every_coefficient_of_every_box(box: int) -> None:
    disc = HalfDisc(box)
    images = 1.7 * noise(20_000 // box, 64, 64)
    power = torch.view_as_real(disc.gather(crop_images(images, box))).square().sum(-1).mean()
    assert power.item() == pytest.approx(1.7**2, rel=0.03)


@pytest.mark.parametrize(("size", "box"), [(16, 8), (16, 9), (17, 8), (17, 9), (16, 16)])
def test_cropped_images_keep_their_orthonormal_coefficients(size: int, box: int) -> None:
    images = noise(2, size, size)
    large, small = HalfDisc(size), HalfDisc(box)
    position = {tuple(k): index for index, k in enumerate(large.frequency.tolist())}
    index = torch.tensor([position[tuple(k)] for k in small.frequency.tolist()])
    cropped = crop_images(images, box)
    assert cropped.shape == (2, box, box)
    assert_close(small.gather(cropped), large.gather(images)[:, index], atol=1e-6, rtol=0)
    # hence the mean of an image grows by the ratio of the boxes
    assert_close(cropped.mean(dim=(1, 2)), images.mean(dim=(1, 2)) * size / box, atol=1e-6, rtol=0)


def test_cropping_twice_is_cropping_once_and_even_nyquist_is_empty() -> None:
    images = noise(2, 32, 32)
    assert_close(crop_images(crop_images(images, 20), 12), crop_images(images, 12), atol=1e-6, rtol=0)
    spectrum = centred_fft2(crop_images(images, 12))
    assert spectrum[:, 0].abs().max() < 1e-5
    assert spectrum[:, :, 0].abs().max() < 1e-5


@pytest.mark.parametrize(("size", "box"), [(24, 12), (24, 15), (25, 12), (25, 15)])
def test_a_cropped_volume_is_the_same_density_on_coarser_voxels(size: int, box: int) -> None:
    centre = np.array([[2.0, -1.5, 3.0], [-3.0, 2.0, 0.5]])
    weight = np.array([1.0, 0.6])
    sigma, ratio = 2.6, size / box
    volume = torch.from_numpy(blob_volume(centre, weight, sigma, size))
    expected = torch.from_numpy(blob_volume(centre / ratio, weight, sigma / ratio, box))
    cropped = crop_volume(volume, box)
    assert_close(cropped, expected, atol=0.02, rtol=0)
    assert_close(cropped.mean(), volume.mean())


def test_batch_equals_loop() -> None:
    images = noise(2, 3, 12, 12)
    disc = HalfDisc(12)
    coefficients = disc.gather(images)
    for i, j in itertools.product(range(2), range(3)):
        assert_close(coefficients[i, j], disc.gather(images[i, j]))
        assert_close(disc.scatter(coefficients)[i, j], disc.scatter(coefficients[i, j]))
        assert_close(crop_images(images, 9)[i, j], crop_images(images[i, j], 9))
        assert_close(disc.energy(coefficients)[i, j], disc.energy(coefficients[i, j]))


def test_nothing_is_saved_with_a_model() -> None:
    assert HalfDisc(8).state_dict() == {}


@pytest.mark.parametrize(("size", "box"), [(12, 8), (12, 7), (13, 8), (13, 7), (9, 1), (9, 2), (13, 12), (12, 11)])
def test_cropped_images_are_the_whole_transform_without_its_edges(size: int, box: int) -> None:
    images = torch.randn(3, size, size, generator=torch.Generator().manual_seed(size)).double().numpy()
    axes = (-2, -1)
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes), norm="ortho"), axes)
    start = size // 2 - box // 2
    spectrum = spectrum[:, start : start + box, start : start + box].copy()
    if box % 2 == 0:
        spectrum[:, 0], spectrum[:, :, 0] = 0, 0
    expected = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(spectrum, axes), norm="ortho"), axes)
    assert np.abs(expected.imag).max() < 1e-12
    assert_close(crop_images(torch.from_numpy(images), box), torch.from_numpy(expected.real), atol=1e-12, rtol=0)
