import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.filters import VARIANCES_PX2, GaussianFilterBank, transfer_on_disc
from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from tests.references.filters import gaussian_filter


@pytest.mark.parametrize("box", [7, 16, 21])
def test_against_the_11_by_11_convolution(box: int) -> None:
    images = torch.randn(2, box, box, generator=named_generator("test/filters"))
    expected = np.stack(
        [[gaussian_filter(image, variance) for variance in VARIANCES_PX2] for image in images.double().numpy()]
    )
    assert_close(GaussianFilterBank(box)(images).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_variances_are_those_of_the_paper_and_channel_one_is_the_image() -> None:
    assert VARIANCES_PX2 == (0.01, 0.1, 1.0, 10.0, 100.0)
    images = torch.randn(3, 24, 24, generator=named_generator("test/filters"))
    assert_close(GaussianFilterBank(24)(images)[:, 0], images, atol=1e-6, rtol=0)


def test_a_constant_passes_and_noise_power_falls_as_published() -> None:
    bank = GaussianFilterBank(64)
    assert_close(bank(torch.full((1, 64, 64), 2.5)), torch.full((1, 5, 64, 64), 2.5), atol=1e-5, rtol=0)
    noise = torch.randn(40, 64, 64, generator=named_generator("test/filters"))
    # pixels whose kernel does not reach the reflected edge
    power = bank(noise)[:, :, 6:-6, 6:-6].square().mean(dim=(0, 2, 3))
    assert_close(power[2:], torch.tensor([0.080, 0.011, 0.008]), atol=0.001, rtol=0.05)


def test_nothing_is_trained_or_saved() -> None:
    bank = GaussianFilterBank(16)
    assert list(bank.parameters()) == []
    assert bank.state_dict() == {}


def test_a_box_smaller_than_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="5 px is smaller"):
        GaussianFilterBank(5)


def test_batch_equals_loop() -> None:
    images = torch.randn(4, 16, 16, generator=named_generator("test/filters"))
    bank = GaussianFilterBank(16)
    assert_close(bank(images), torch.cat([bank(image[None]) for image in images]))


@pytest.mark.parametrize("box", [16, 21])
@pytest.mark.parametrize("number", range(1, 6))
def test_on_the_disc_a_filter_is_the_periodic_convolution(box: int, number: int) -> None:
    disc = HalfDisc(box)
    images = disc.scatter(disc.gather(torch.randn(2, box, box, generator=named_generator("test/filters"))))
    found = disc.scatter(disc.gather(images) * transfer_on_disc(disc)[number - 1])
    variance = VARIANCES_PX2[number - 1]
    expected = np.stack([gaussian_filter(image, variance, "wrap") for image in images.double().numpy()])
    assert_close(found.double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_disc_and_bank_differ_at_the_edges_alone() -> None:
    disc = HalfDisc(32)
    images = disc.scatter(disc.gather(torch.randn(4, 32, 32, generator=named_generator("test/filters"))))
    bank = GaussianFilterBank(32)(images)
    found = disc.scatter(disc.gather(images)[:, None] * transfer_on_disc(disc))
    assert_close(found[..., 5:-5, 5:-5], bank[..., 5:-5, 5:-5], atol=1e-5, rtol=0)
    assert (found - bank)[:, 4].abs().max() > 0.05


def test_transfer_is_one_at_the_origin_and_as_published_along_an_axis() -> None:
    disc = HalfDisc(40)
    transfer = transfer_on_disc(disc)
    assert_close(transfer[:, disc.radius == 0], torch.ones(5, 1), atol=0, rtol=0)
    assert_close(transfer[0], torch.ones(len(disc)), atol=0, rtol=0)
    for axis in (0, 1):
        on_axis = [(disc.frequency[:, axis] == k) & (disc.frequency[:, 1 - axis] == 0) for k in (2, 4, 8, 12)]
        found = torch.cat([transfer[2:4, index].abs() for index in on_axis], 1)
        assert_close(found, torch.tensor([[0.95, 0.82, 0.45, 0.17], [0.71, 0.19, 0.01, 0.02]]), atol=0.006, rtol=0)
