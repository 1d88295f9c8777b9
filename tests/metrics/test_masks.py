import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import crop_volume
from aceray.metrics.masks import _distance, auto_mask, molecule_mask, sphere_mask


def noise(box: int, seed: int) -> torch.Tensor:
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed))


def test_the_sphere_is_one_within_its_radius_and_falls_as_a_cosine() -> None:
    mask = sphere_mask(32, 0.25, 0.125)
    line = mask[16, 16]
    assert_close(line[8:25], torch.ones(17))
    expected = [0.5 + 0.5 * np.cos(np.pi * step / 4) for step in (1, 2, 3, 4)]
    assert line[25:29].tolist() == pytest.approx(expected, abs=1e-6)
    assert line[4:8].tolist() == pytest.approx(expected[::-1], abs=1e-6)
    # in space, not along the axes alone: (5, 5, 5) is 8.66 from the centre
    assert float(mask[21, 21, 11]) == pytest.approx(0.5 + 0.5 * np.cos(np.pi * (75**0.5 - 8) / 4), abs=1e-6)
    assert mask[:, :, 28].max() == 0


def ball_of_density(box: int, radius: float, centre: tuple[int, int, int]) -> torch.Tensor:
    axis = torch.arange(box).float()
    z, y, x = (axis - place for place in centre)
    distance = (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2).sqrt()
    return torch.sigmoid(2 * (radius - distance))


def test_the_automatic_mask_is_the_molecule_dilated_by_its_angstroms() -> None:
    box, centre = 48, (20, 24, 28)
    volume = ball_of_density(box, 7.0, centre)
    noisy = [volume + 0.1 * noise(box, seed) for seed in (20, 21)]
    # 25 A are 5 px
    mask = auto_mask(*noisy, 5.0, 25.0, 25.0)
    line = mask[20, 24]
    half = int((line > 0.5).nonzero().max()) - centre[2]
    # the last voxel above the threshold is the ball's sixth; half of the edge is 2.5 px further out
    assert half == 6 + 5 + 2
    assert line[28 : 28 + 11].min() == 1 and line[46:].max() == 0
    # larger pixels, fewer of them, but never below 4
    coarse = auto_mask(*noisy, 10.0, 25.0, 25.0)
    assert coarse.sum() < 0.85 * mask.sum()
    assert torch.equal(coarse, auto_mask(*noisy, 10.0, 0.0, 0.0))


@pytest.mark.parametrize("reach", [3, 40])
def test_distances_equal_a_search(reach: int) -> None:
    inside = torch.rand(7, 7, 7, generator=torch.Generator().manual_seed(22)) > 0.97
    places = torch.stack(torch.meshgrid(*[torch.arange(7.0)] * 3, indexing="ij"), -1)
    expected = torch.cdist(places.reshape(-1, 3), places[inside]).amin(1).reshape(7, 7, 7)
    found = _distance(inside, reach)
    near = expected <= reach
    assert near.any() and bool(inside.any())
    assert_close(found[near], expected[near], atol=1e-5, rtol=0)
    assert bool((found[~near] > reach).all())


def test_the_mask_of_a_molecule_is_close_around_it_and_holds_what_is_faint() -> None:
    box, bright, faint = 64, (28, 32, 24), (28, 32, 38)
    volume = ball_of_density(box, 9.0, bright) + 0.4 * ball_of_density(box, 6.0, faint)
    mask = molecule_mask(volume + 0.05 * noise(box, 26))
    assert float(mask[volume > 0.2].min()) > 0.99
    assert float(mask.mean()) < 4 * float((volume > 0.2).float().mean())
    # nothing beyond what the low-pass, the dilation of 2 px and the edge of 4 px reach
    assert float(mask[:, :, 58:].max()) == 0 and float(mask[:8].max()) == 0


def test_the_mask_of_a_molecule_does_not_depend_on_scale_or_box() -> None:
    volume = ball_of_density(64, 12.0, (30, 32, 36))
    assert torch.equal(molecule_mask(volume), molecule_mask(50 * volume))
    coarse = molecule_mask(crop_volume(volume, 32))
    difference = coarse - molecule_mask(volume)[::2, ::2, ::2]
    assert float(difference.abs().mean()) < 0.01


def test_a_map_that_is_nowhere_bright_is_held_whole() -> None:
    assert torch.equal(molecule_mask(torch.zeros(16, 16, 16)), torch.ones(16, 16, 16))
