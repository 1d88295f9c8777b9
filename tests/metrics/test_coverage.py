import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_relion, rotation_from_vector
from aceray.metrics.coverage import (
    cell_count,
    coverage,
    healpix_cell,
    healpix_centres,
    view_entropy,
    view_histogram,
)

AXES = torch.tensor([[0, 0, 1.0], [0, 0, -1.0], [1.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0], [0, -1.0, 0]])


@pytest.mark.parametrize("nside", [1, 2, 3, 4, 8])
def test_cells_and_centres_are_those_of_healpy(nside: int) -> None:
    healpy = pytest.importorskip("healpy")
    direction = torch.randn(20_000, 3, dtype=torch.float64, generator=named_generator("tests/coverage", nside))
    direction = torch.cat([direction / direction.norm(dim=-1, keepdim=True), AXES.double()])
    expected = healpy.vec2pix(nside, *direction.T.numpy())
    assert_close(healpix_cell(direction, nside), torch.from_numpy(expected), atol=0, rtol=0)
    centres = np.stack(healpy.pix2vec(nside, np.arange(cell_count(nside))), axis=-1)
    assert_close(healpix_centres(nside), torch.from_numpy(centres), atol=1e-12, rtol=0)


@pytest.mark.parametrize("nside", [1, 3, 4, 16])
def test_the_centre_of_a_cell_lies_in_it(nside: int) -> None:
    assert_close(healpix_cell(healpix_centres(nside), nside), torch.arange(cell_count(nside)))


def test_cells_have_equal_areas() -> None:
    directions = random_rotations(192_000, named_generator("tests/coverage/area"))[:, 2]
    count = torch.bincount(healpix_cell(directions, 4), minlength=192)
    assert abs(count - 1000).max() < 6 * math.sqrt(1000)


def test_uniform_views_cover_everything_and_one_view_a_single_cell() -> None:
    rotation = random_rotations(5000, named_generator("tests/coverage/uniform"))
    assert coverage(rotation) == 1.0
    assert view_entropy(rotation) > 0.99
    assert coverage(rotation[:1].expand(50, 3, 3)) == pytest.approx(1 / 192)
    assert view_entropy(rotation[:1].expand(50, 3, 3)) == pytest.approx(0, abs=1e-12)


def test_the_direction_is_the_beam_in_the_object_frame() -> None:
    # the third row of the rotation is (sin tilt cos rot, sin tilt sin rot, cos tilt), whatever psi is
    rot, tilt = torch.tensor([30.0, 30.0, 100.0]), torch.tensor([70.0, 70.0, 120.0])
    rotation = rotation_from_relion(rot, tilt, torch.tensor([0.0, 77.0, -50.0]))
    direction = torch.stack(
        [tilt.deg2rad().sin() * rot.deg2rad().cos(), tilt.deg2rad().sin() * rot.deg2rad().sin(), tilt.deg2rad().cos()],
        dim=-1,
    )
    expected = torch.bincount(healpix_cell(direction, 4), minlength=192)
    assert_close(view_histogram(rotation), expected)
    assert expected.max() == 2


def test_turning_images_in_their_plane_covers_nothing_new() -> None:
    turns = rotation_from_vector(torch.tensor([0.0, 0.0, 1.0]) * torch.linspace(0, 6, 100)[:, None])
    start = rotation_from_vector(torch.tensor([0.3, 0.9, -0.4]))
    assert coverage(turns @ start) == pytest.approx(1 / 192)
    assert coverage(start @ turns) > 5 / 192


def test_half_of_the_sphere_is_half_of_the_coverage() -> None:
    centres = healpix_centres(4).float()
    rotation = torch.zeros(192, 3, 3)
    rotation[:, 2] = centres
    upper = rotation[:96]
    assert coverage(rotation) == 1.0
    assert view_entropy(rotation) == pytest.approx(1.0)
    assert coverage(upper) == 0.5
    assert view_entropy(upper) == pytest.approx(math.log(96) / math.log(192))
