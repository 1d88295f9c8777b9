import math

import pytest
import torch
from torch.testing import assert_close

from aceray.em.formation import background_std, noise_std_for_snr, shift_image, shift_phase
from aceray.em.fourier import HalfDisc, frequency_index
from aceray.em.random import named_generator
from tests.references.formation import shift_by_sum


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=named_generator("test/formation", *shape))


@pytest.mark.parametrize("box", [16, 17])
def test_an_integer_shift_is_a_roll_and_x_is_the_last_axis(box: int) -> None:
    images = noise(2, box, box)
    right = shift_image(images, torch.tensor([2.0, 0.0]).expand(2, 2))
    down = shift_image(images, torch.tensor([0.0, 3.0]).expand(2, 2))
    assert_close(right, images.roll(2, dims=-1), atol=1e-5, rtol=0)
    assert_close(down, images.roll(3, dims=-2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("box", [8, 9])
@pytest.mark.parametrize("shift", [(0.7, 0.0), (0.0, -1.3), (2.25, -0.4)])
def test_shift_against_the_explicit_fourier_sum(box: int, shift: tuple[float, float]) -> None:
    image = noise(box, box).double()
    found = shift_image(image, torch.tensor(shift, dtype=torch.float64))
    assert_close(found, torch.from_numpy(shift_by_sum(image.numpy(), *shift)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("box", [24, 25])
def test_a_blob_moves_to_where_the_shift_says(box: int) -> None:
    axis = frequency_index(box).double()

    def blob(x: float, y: float) -> torch.Tensor:
        return torch.exp(-((axis - x) ** 2 + (axis[:, None] - y) ** 2) / (2 * 1.5**2))

    moved = shift_image(blob(1.0, -2.0), torch.tensor([2.3, 1.4], dtype=torch.float64))
    assert_close(moved, blob(3.3, -0.6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("box", [16, 17])
def test_the_phase_on_the_disc_is_the_same_shift(box: int) -> None:
    disc = HalfDisc(box)
    images = disc.scatter(disc.gather(noise(3, box, box)))
    shift = torch.tensor([[1.3, -2.1], [0.0, 0.6], [-3.7, 0.0]])
    moved = disc.scatter(disc.gather(images) * shift_phase(disc, shift))
    assert_close(moved, shift_image(images, shift), atol=1e-5, rtol=0)
    assert_close(shift_phase(disc, shift).abs(), torch.ones(3, len(disc)))


def test_shifts_add_and_undo_each_other() -> None:
    disc = HalfDisc(12)
    first, second = torch.tensor([0.3, 1.1]), torch.tensor([-2.0, 0.7])
    together = shift_phase(disc, first) * shift_phase(disc, second)
    assert_close(shift_phase(disc, first + second), together, atol=1e-5, rtol=0)
    assert_close(shift_phase(disc, -first), shift_phase(disc, first).conj())


def test_gradient_of_the_phase() -> None:
    disc = HalfDisc(8).double()
    shift = noise(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: shift_phase(disc, t), (shift,))


def test_gradient_of_the_shift() -> None:
    image, shift = noise(2, 6, 6).double().requires_grad_(), noise(2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(shift_image, (image, shift))


def test_batch_equals_loop() -> None:
    images, shift = noise(2, 3, 10, 10), noise(2, 3, 2)
    disc = HalfDisc(10)
    moved, phase = shift_image(images, shift), shift_phase(disc, shift)
    for i in range(2):
        for j in range(3):
            assert_close(moved[i, j], shift_image(images[i, j], shift[i, j]))
            assert_close(phase[i, j], shift_phase(disc, shift[i, j]))


@pytest.mark.parametrize(("snr_db", "ratio"), [(0.0, 1.0), (-10.0, 10.0), (-20.0, 100.0), (20.0, 0.01)])
def test_snr_is_a_ratio_of_variances(snr_db: float, ratio: float) -> None:
    assert noise_std_for_snr(4.0, snr_db) ** 2 == pytest.approx(4.0 * ratio)


@pytest.mark.parametrize("box", [32, 33])
def test_background_std_recovers_a_planted_sigma_under_a_particle(box: int) -> None:
    axis = frequency_index(box)
    radius = (axis.square()[:, None] + axis.square()).double().sqrt()
    particle = torch.where(radius < box / 2 - 1, 5.0 * torch.cos(radius), 0.0).float()
    offset = 3.0 * noise(300, 1, 1)
    images = 1.7 * noise(300, box, box) + particle + offset
    # 300 images of some 220 pixels: a relative standard error of 0.3 %
    assert background_std(images).item() == pytest.approx(1.7, rel=0.015)


def test_background_std_counts_the_mean_it_subtracts() -> None:
    # 12 corner pixels only: dividing by n in place of n - 1 would read 4 % low
    box = 8
    axis = frequency_index(box)
    corners = int((axis.square()[:, None] + axis.square() > (box / 2) ** 2).sum())
    assert background_std(noise(20_000, box, box)).item() == pytest.approx(1.0, rel=0.01)
    assert math.sqrt(1 - 1 / corners) < 0.985
