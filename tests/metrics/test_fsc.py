import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.metrics.fsc import (
    FscCurve,
    fourier_shell_correlation,
    fsc_area,
    half_ball,
    masked_fsc,
    resolution_angstrom,
    resolution_px,
    shell_sum,
)
from aceray.metrics.masks import sphere_mask
from tests.references.fsc import fsc_loop, resolution_scan


def noise(box: int, seed: int, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, box, box, box, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("box", [8, 9, 12])
def test_equals_the_loop(box: int) -> None:
    first = noise(box, 0)
    second = 0.7 * first + 0.5 * noise(box, 1) + 0.3
    expected = fsc_loop(first.numpy(), second.numpy())
    # float32 transforms of 1e3 voxels
    assert_close(fourier_shell_correlation(first, second).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("box", [15, 16, 32])
def test_a_volume_correlates_with_itself_up_to_nyquist_and_with_its_negative_not_at_all(box: int) -> None:
    volume = noise(box, 2)
    one = torch.ones(box // 2 + 1)
    assert_close(fourier_shell_correlation(volume, volume), one, atol=1e-5, rtol=0)
    assert_close(fourier_shell_correlation(volume, -3 * volume), -one, atol=1e-5, rtol=0)


def test_the_hand_and_the_place_of_a_volume_matter() -> None:
    volume = noise(16, 3)
    # inversion through voxel 8 of an even box: flip and roll
    inverted = volume.flip(0, 1, 2).roll((1, 1, 1), (0, 1, 2))
    for other in (inverted, volume.roll(2, dims=-1), volume.transpose(0, 2)):
        assert fourier_shell_correlation(volume, other)[4:].abs().max() < 0.25


def test_a_filter_that_is_the_same_in_all_directions_changes_nothing() -> None:
    volume, ball = noise(16, 4), half_ball(16)
    filtered = ball.scatter(ball.gather(volume) * torch.linspace(1, 0.1, 9)[ball.shell])
    assert_close(fourier_shell_correlation(volume, filtered), torch.ones(9), atol=1e-5, rtol=0)


def test_an_empty_volume_correlates_with_nothing() -> None:
    assert_close(fourier_shell_correlation(torch.zeros(8, 8, 8), noise(8, 5)), torch.zeros(5), atol=0, rtol=0)


def test_a_batch_equals_a_loop() -> None:
    first, second = noise(9, 6, 2, 3), noise(9, 7, 2, 3)
    batch = fourier_shell_correlation(first, second)
    for i, j in np.ndindex(2, 3):
        assert_close(batch[i, j], fourier_shell_correlation(first[i, j], second[i, j]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("box", [7, 8])
def test_the_half_ball_stands_for_the_whole_sphere(box: int) -> None:
    ball = half_ball(box)
    axis = torch.arange(box) - box // 2
    squared = axis[:, None, None].square() + axis[:, None].square() + axis.square()
    inside = squared[4 * squared < box * box].double().sqrt().round().long()
    counted = torch.bincount(inside, minlength=box // 2 + 1).double()
    assert_close(shell_sum(torch.ones(len(ball.shell)), ball), counted, atol=0, rtol=0)


@pytest.mark.parametrize("box", [7, 8])
def test_scatter_undoes_gather_for_volumes_within_the_sphere(box: int) -> None:
    ball, volume = half_ball(box), noise(box, 8, 2)
    limited = ball.scatter(ball.gather(volume))
    assert_close(ball.scatter(ball.gather(limited)), limited, atol=1e-5, rtol=0)
    assert_close(ball.gather(limited), ball.gather(volume), atol=1e-5, rtol=0)
    power = shell_sum(ball.gather(limited).abs().square(), ball).sum(-1)
    assert_close(power / box, limited.double().square().sum((-1, -2, -3)), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("fsc", "threshold", "box", "expected"),
    [
        # between shells 2 and 3: 2 + 0.3/0.4
        ([1.0, 1.0, 0.8, 0.4, 0.1], 0.5, 8, 8 / 2.75),
        # the first crossing counts, not the last
        ([1.0, 0.9, 0.3, 0.9, 0.2], 0.5, 8, 8 / (1 + 0.4 / 0.6)),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 0.5, 8, 2.0),
        ([1.0, 1.0, 1.0, 1.0, 0.5], 0.5, 8, 2.0),
        # the curve starts at 1, so nothing is infinite, and the mean's sign is no resolution
        ([-1.0, 0.0, 0.0, 0.0, 0.0], 0.5, 8, 16.0),
        ([0.0, 1.0, 1.0, 1.0, 1.0], 0.5, 8, 2.0),
    ],
)
def test_resolution_by_hand(fsc: list[float], threshold: float, box: int, expected: float) -> None:
    assert resolution_px(torch.tensor(fsc), threshold, box) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("shell", "printed"), [(63, 2.032), (62, 2.065), (61, 2.098), (60, 2.133)])
def test_whole_shells_at_128_px_print_as_in_the_literature(shell: int, printed: float) -> None:
    fsc = torch.ones(65)
    fsc[shell] = 0.5 - 1e-7
    fsc[shell + 1 :] = 0
    assert resolution_px(fsc, 0.5, 128) == pytest.approx(printed, abs=6e-4)
    assert resolution_angstrom(fsc, 0.5, 128, 4.25) == pytest.approx(4.25 * printed, abs=3e-3)


@pytest.mark.parametrize("threshold", [0.5, 0.143])
def test_resolution_equals_a_scan_of_the_curve(threshold: float) -> None:
    generator = torch.Generator().manual_seed(9)
    for _ in range(20):
        fsc = 1 - torch.rand(17, generator=generator).cumsum(0) / 8
        expected = resolution_scan(fsc.double().numpy(), threshold, 32)
        assert resolution_px(fsc, threshold, 32) == pytest.approx(expected, rel=1e-4)


def test_a_curve_that_is_not_a_number_has_no_resolution() -> None:
    assert not resolution_px(torch.full((9,), torch.nan), 0.5, 16) <= 100


def test_area_is_the_mean_over_the_shells_after_the_first() -> None:
    assert fsc_area(torch.tensor([-1.0, 1.0, 0.5, 0.0])) == pytest.approx(0.5)


def test_the_table_of_a_curve() -> None:
    table = FscCurve(torch.tensor([1.0, 0.9, 0.8, 0.7, 0.25]), 8, 3.0).columns()
    assert table["shell"] == [1, 2, 3, 4]
    assert table["resolution_px"] == pytest.approx([8, 4, 8 / 3, 2])
    assert table["resolution_angstrom"] == pytest.approx([24, 12, 8, 6])
    assert table["frequency_per_px"] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert table["frequency_per_angstrom"] == pytest.approx([1 / 24, 2 / 24, 3 / 24, 4 / 24])
    assert table["fsc"] == pytest.approx([0.9, 0.8, 0.7, 0.25])


def test_a_mask_of_ones_changes_nothing() -> None:
    first = noise(24, 23)
    ball = half_ball(24)
    # signal falls off towards Nyquist, noise does not
    signal = ball.scatter(ball.gather(first) * (6 * torch.exp(-ball.shell / 3.0)))
    maps = signal + noise(24, 24), signal + noise(24, 25)
    plain, ones = masked_fsc(*maps, None), masked_fsc(*maps, torch.ones(24, 24, 24))
    assert_close(plain.corrected, fourier_shell_correlation(*maps), atol=1e-5, rtol=0)
    assert_close(ones.masked, plain.unmasked, atol=1e-5, rtol=0)
    # what random phases correlate by chance: means of four draws over a shell's independent coefficients
    independent = shell_sum(torch.ones(len(ball.shell)), ball) / 2
    assert bool(((ones.corrected - plain.unmasked).abs()[1:] < 4 * (4 * independent[1:]).rsqrt()).all())


def test_independent_noise_under_a_mask_correlates_only_before_the_correction() -> None:
    box, mask = 32, sphere_mask(32, 0.06, 0.06)
    # each map's own noise, with the same mean: through the mask it leaks into every shell
    curves = [masked_fsc(noise(box, 2 * n) + 2, noise(box, 2 * n + 1) + 2, mask) for n in range(50, 66)]
    masked, corrected = (
        torch.stack([getattr(curve, name) for curve in curves]).mean(0) for name in ("masked", "corrected")
    )
    assert masked[3:8].min() > 0.15
    assert corrected[3:].abs().mean() < 0.1
    assert corrected[3:8].abs().max() < 0.25 and corrected[3:8].mean() < 0.3 * masked[3:8].mean()


@pytest.mark.parametrize("mask", [None, sphere_mask(16, 0.2, 0.1)])
def test_identical_maps_correlate_whatever_the_mask(mask: torch.Tensor | None) -> None:
    volume = noise(16, 26)
    assert_close(masked_fsc(volume, volume, mask).corrected[1:], torch.ones(8), atol=1e-4, rtol=0)


def test_random_phases_are_the_same_every_time_and_leave_the_global_stream_alone() -> None:
    maps, state = (noise(16, 27), noise(16, 28)), torch.get_rng_state()
    first, again = (masked_fsc(*maps, sphere_mask(16)) for _ in range(2))
    assert torch.equal(first.corrected, again.corrected) and torch.equal(torch.get_rng_state(), state)
