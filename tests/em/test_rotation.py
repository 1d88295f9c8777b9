import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.random import named_generator
from aceray.em.rotation import (
    random_rotations,
    relion_from_rotation,
    rotation_from_relion,
    rotation_from_sixd,
    rotation_from_vector,
    rotation_sqfrob,
    sqfrob_to_degrees,
)
from tests.references.rotation import gram_schmidt_rows, relion_matrix, rodrigues

ANGLES_DEG = [
    (0.0, 0.0, 0.0),
    (90.0, 0.0, 0.0),
    (0.0, 90.0, 0.0),
    (0.0, 0.0, 90.0),
    (37.0, 52.0, -121.0),
    (-170.0, 133.0, 64.0),
    (235.820138, 113.08603, 50.468981),
]
POLES_DEG = [(37.0, 0.0, 21.0), (37.0, 180.0, 21.0), (0.0, 180.0, 0.0), (-100.0, 0.0, -80.0), (120.0, 180.0, -170.0)]


def from_relion(rot: float, tilt: float, psi: float) -> torch.Tensor:
    return rotation_from_relion(*torch.tensor([rot, tilt, psi], dtype=torch.float64))


@pytest.mark.parametrize("angles", ANGLES_DEG + POLES_DEG)
def test_relion_angles_against_the_written_out_matrix(angles: tuple[float, float, float]) -> None:
    assert_close(from_relion(*angles), torch.from_numpy(relion_matrix(*angles)), atol=1e-14, rtol=0)


def test_rot_turns_the_object_under_the_image_axes() -> None:
    # rot 90 makes the object's y axis the image's x axis: the sense of rotation, spelled out
    image = from_relion(90.0, 0.0, 0.0) @ torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert_close(image, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    beam = from_relion(30.0, 90.0, 0.0)[2]
    assert_close(beam, torch.tensor([math.cos(math.pi / 6), 0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("angles", [angles for angles in ANGLES_DEG if 0 < angles[1] < 180])
def test_relion_angles_come_back(angles: tuple[float, float, float]) -> None:
    found = torch.stack(relion_from_rotation(torch.from_numpy(relion_matrix(*angles))))
    difference = found - torch.tensor(angles, dtype=torch.float64)
    assert_close((difference + 180) % 360 - 180, torch.zeros(3, dtype=torch.float64), atol=1e-11, rtol=0)


@pytest.mark.parametrize("angles", POLES_DEG)
def test_at_the_poles_the_angles_give_the_same_rotation(angles: tuple[float, float, float]) -> None:
    matrix = torch.from_numpy(relion_matrix(*angles))
    rot, tilt, psi = relion_from_rotation(matrix)
    assert_close(tilt.item(), angles[1], atol=1e-12, rtol=0)
    assert_close(from_relion(rot.item(), tilt.item(), psi.item()), matrix, atol=1e-14, rtol=0)


def test_a_beam_exactly_along_z_has_rot_zero_as_in_relion() -> None:
    upright, turned = torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    assert [angle.item() for angle in relion_from_rotation(upright)] == [0.0, 0.0, 0.0]
    assert [abs(angle.item()) for angle in relion_from_rotation(turned)] == [0.0, 180.0, 180.0]
    upright[2, :2] = -0.0
    assert [angle.item() for angle in relion_from_rotation(upright)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("tilt_rad", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("pole", [0.0, 180.0])
def test_rounded_rotations_near_a_pole_lose_nothing(tilt_rad: float, pole: float) -> None:
    # in float32 rot and psi are noise there, but their sum (difference) must not be
    generator = named_generator("test/poles")
    spin = torch.rand(500, generator=generator) * 360
    lean = torch.rand(500, generator=generator) * 2 * math.pi
    vector = torch.stack([lean.cos(), lean.sin(), torch.zeros(500)], dim=-1) * tilt_rad
    rotation = rotation_from_relion(torch.zeros(500), torch.full((500,), pole), spin) @ rotation_from_vector(vector)
    rotation = rotation + 6e-8 * torch.randn(rotation.shape, generator=generator)
    assert_close(rotation_from_relion(*relion_from_rotation(rotation)), rotation, atol=2e-6, rtol=0)


def test_sixd_against_gram_schmidt_with_frame_vectors_as_rows() -> None:
    sixd = torch.randn(20, 6, generator=named_generator("test/sixd"), dtype=torch.float64)
    expected = np.stack([gram_schmidt_rows(row) for row in sixd.numpy()])
    assert_close(rotation_from_sixd(sixd), torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_pytorch3d_and_roma_give_the_same_sixd_numbers() -> None:
    transforms = pytest.importorskip("pytorch3d.transforms")
    roma = pytest.importorskip("roma")
    sixd = torch.randn(200, 6, generator=named_generator("test/sixd"))
    columns = roma.special_gramschmidt(sixd.unflatten(-1, (2, 3)).transpose(-1, -2))
    assert_close(transforms.rotation_6d_to_matrix(sixd), columns.transpose(-1, -2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sixd", [[0.0] * 6, [1.0, 0, 0, 2.0, 0, 0]])
def test_degenerate_sixd_stays_finite(sixd: list[float]) -> None:
    vector = torch.tensor(sixd, requires_grad=True)
    rotation = rotation_from_sixd(vector)
    rotation.sum().backward()
    assert rotation.isfinite().all()
    assert vector.grad is not None and vector.grad.isfinite().all()


def test_sixd_gradient() -> None:
    sixd = torch.randn(3, 6, generator=named_generator("test/sixd"), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotation_from_sixd, (sixd,))


def test_sixd_of_its_own_rows() -> None:
    rotation = random_rotations(10, named_generator("test/rotations"))
    assert_close(rotation_from_sixd(rotation[:, :2].flatten(1)), rotation, atol=1e-6, rtol=0)


def test_batch_of_any_shape_equals_loop() -> None:
    generator = named_generator("test/batch")
    sixd = torch.randn(2, 3, 6, generator=generator)
    angles = torch.rand(3, 2, 3, generator=generator) * 180
    matrices = rotation_from_relion(*angles)
    back = relion_from_rotation(matrices)
    for i in range(2):
        for j in range(3):
            assert_close(rotation_from_sixd(sixd)[i, j], rotation_from_sixd(sixd[i, j]))
            assert_close(matrices[i, j], rotation_from_relion(*angles[:, i, j]))
            assert_close([angle[i, j] for angle in back], list(relion_from_rotation(matrices[i, j])))


def test_exponential_map_is_right_handed_and_in_radians() -> None:
    quarter = rotation_from_vector(torch.tensor([0.0, 0.0, math.pi / 2]))
    assert_close(quarter @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    vector = np.array([0.3, -1.1, 0.7])
    expected = torch.from_numpy(rodrigues(vector, float(np.linalg.norm(vector))))
    assert_close(rotation_from_vector(torch.from_numpy(vector)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("angle_deg", [0.0, 0.01, 1.0, 37.0, 90.0, 179.0, 180.0])
def test_squared_frobenius_distance_is_eight_sin_squared_of_half_the_angle(angle_deg: float) -> None:
    first = torch.from_numpy(relion_matrix(20.0, 70.0, -15.0))
    second = torch.from_numpy(rodrigues(np.array([1.0, 2.0, -0.5]), math.radians(angle_deg))) @ first
    distance = rotation_sqfrob(second, first)
    assert_close(distance.item(), 8 * math.sin(math.radians(angle_deg) / 2) ** 2, atol=1e-12, rtol=0)
    assert_close(sqfrob_to_degrees(distance).item(), angle_deg, atol=1e-5, rtol=0)


def test_degrees_of_a_distance_rounded_beyond_eight_are_finite() -> None:
    assert sqfrob_to_degrees(torch.tensor(8.000001)).item() == pytest.approx(180.0)


def test_random_rotations_are_rotations() -> None:
    rotation = random_rotations(500, named_generator("test/haar"))
    assert rotation.dtype == torch.float32
    identity = torch.eye(3).expand(500, 3, 3)
    assert_close(rotation @ rotation.transpose(1, 2), identity, atol=1e-5, rtol=0)
    assert_close(torch.linalg.det(rotation), torch.ones(500), atol=1e-5, rtol=0)


def test_random_rotations_are_uniform() -> None:
    count = 40_000
    rotation = random_rotations(count, named_generator("test/haar")).double()
    # entries of a Haar rotation: mean 0, variance 1/3, uncorrelated, fourth moment 1/5
    five_sigma = 5 / math.sqrt(count)
    flat = rotation.flatten(1)
    assert flat.mean(0).abs().max() < five_sigma * math.sqrt(1 / 3)
    covariance = flat.T @ flat / count
    assert (covariance - torch.eye(9, dtype=torch.float64) / 3).abs().max() < five_sigma * math.sqrt(1 / 5)
    # the angle has density (1 - cos a) / pi: mean pi/2 + 2/pi, and the mean squared distance of two rotations is 6
    angle = torch.acos(((flat[:, 0] + flat[:, 4] + flat[:, 8]) / 2 - 0.5).clamp(-1, 1))
    assert abs(angle.mean() - (math.pi / 2 + 2 / math.pi)) < five_sigma
    distance = rotation_sqfrob(rotation, torch.eye(3, dtype=torch.float64).expand_as(rotation))
    assert abs(distance.mean() - 6) < five_sigma * 2
    # Archimedes: the height of a uniform direction is uniform
    quantiles = rotation[:, 2, 2].quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64))
    assert_close(quantiles, torch.tensor([-0.8, -0.5, 0.0, 0.5, 0.8], dtype=torch.float64), atol=0.03, rtol=0)


def test_random_rotations_repeat_with_their_generator() -> None:
    first, second = (random_rotations(5, named_generator("test/haar", 1)) for _ in range(2))
    assert torch.equal(first, second)
