import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.formation import shift_image
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector
from aceray.metrics.pose import best_of_references, origin_displacement, pose_errors, solve_origin
from tests.references.pose import best_of_references as best_of_loop
from tests.references.pose import origin_by_least_squares, sqfrob_from_angle
from tests.references.projection import blob_projection


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = named_generator("tests/pose", seed)
    return random_rotations(count, generator), 2 * torch.randn(count, 2, generator=generator)


@pytest.mark.parametrize("degrees", [0.0, 0.7, 10.0, 90.0, 179.9])
def test_rotation_error_is_eight_sine_squared_of_half_the_angle(degrees: float) -> None:
    true, shift = draw(5, 0)
    axis = torch.tensor([0.6, -0.64, 0.48])
    predicted = rotation_from_vector(axis * math.radians(degrees)) @ true
    expected = torch.full((5,), 8 * math.sin(math.radians(degrees) / 2) ** 2)
    assert_close(pose_errors(predicted, shift, true, shift).rotation_sqfrob, expected, atol=2e-6, rtol=1e-4)


def test_errors_equal_the_loop() -> None:
    (true, true_shift), (predicted, shift) = draw(40, 1), draw(40, 2)
    errors = pose_errors(predicted, shift, true, true_shift)
    rotation, difference = true.double().numpy(), (true_shift - shift).double().numpy()
    sqfrob = [sqfrob_from_angle(a, b) for a, b in zip(predicted.double().numpy(), rotation, strict=True)]
    origin = origin_by_least_squares(rotation, difference)
    corrected = [
        ((delta - (matrix @ origin)[:2]) ** 2).sum() for matrix, delta in zip(rotation, difference, strict=True)
    ]
    assert_close(errors.rotation_sqfrob.double(), torch.tensor(sqfrob, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(errors.origin_px.double(), torch.from_numpy(origin), atol=1e-5, rtol=0)
    assert_close(errors.shift_sq_px.double(), torch.tensor(np.array(corrected)), atol=1e-4, rtol=0)
    assert_close(errors.shift_sq_px_raw.double(), torch.tensor((difference**2).sum(1)), atol=1e-5, rtol=1e-6)
    good = sum(error < 0.5 for error in sqfrob) / len(sqfrob)
    assert errors.fraction_below_half == pytest.approx(good)


def test_a_displaced_volume_moves_its_images_by_the_displacement_seen_in_them() -> None:
    generator = np.random.default_rng(3)
    centre, weight, displacement = generator.normal(0, 2, (6, 3)), generator.random(6), np.array([2.0, -1.0, 3.0])
    rotation = random_rotations(4, named_generator("tests/pose/displaced")).double()
    for matrix, shift in zip(rotation, origin_displacement(rotation, torch.from_numpy(displacement)), strict=True):
        image = torch.from_numpy(blob_projection(centre, weight, 1.4, 32, matrix.numpy()))
        moved = torch.from_numpy(blob_projection(centre + displacement, weight, 1.4, 32, matrix.numpy()))
        assert_close(shift_image(image, shift), moved, atol=1e-3, rtol=0)


def test_the_origin_of_the_volume_is_no_shift_error() -> None:
    rotation, true_shift = draw(200, 4)
    displacement = torch.tensor([1.5, -0.4, 2.2])
    # a volume displaced by d needs shifts t - (R d)_xy
    predicted = true_shift - origin_displacement(rotation, displacement)
    errors = pose_errors(rotation, predicted, rotation, true_shift)
    assert_close(errors.origin_px, displacement, atol=1e-5, rtol=0)
    assert errors.shift_sq_px.max() < 1e-9
    assert errors.shift_sq_px_raw.mean() == pytest.approx(float(displacement.square().sum()) * 2 / 3, rel=0.1)
    wrong_sign = pose_errors(rotation, true_shift + (true_shift - predicted), rotation, true_shift)
    assert_close(wrong_sign.origin_px, -displacement, atol=1e-5, rtol=0)


def test_what_no_view_shows_stays_zero() -> None:
    rotation, shift = draw(1, 5)
    origin = solve_origin(rotation.expand(7, 3, 3), shift.expand(7, 2))
    assert_close(origin_displacement(rotation, origin)[0], shift[0].double(), atol=1e-6, rtol=0)
    assert float(rotation[0, 2].double() @ origin) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("flipped", [False, True])
def test_best_of_thirty_references_equals_the_loop(flipped: bool) -> None:
    true, _ = draw(70, 3)
    off = 0.1 * torch.randn(70, 3, generator=named_generator("tests/pose/off"))
    predicted = rotation_from_vector(off) @ true @ draw(1, 4)[0][0]
    if flipped:
        predicted = torch.diag(torch.tensor([-1.0, -1.0, 1.0])) @ predicted
    expected = best_of_loop(predicted.double().numpy(), true.double().numpy(), 30)
    assert best_of_references(predicted, true) == pytest.approx(expected, rel=1e-4)
    aligned = pose_errors(rotation_from_vector(off) @ true, true[:, 0, :2], true, true[:, 0, :2])
    assert expected[0] > 1.02 * float(aligned.rotation_sqfrob.mean())
    assert best_of_references(predicted[:5], true[:5])[0] >= 0
