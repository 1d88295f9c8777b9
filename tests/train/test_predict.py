"""Poses over all turns and mirrors of an image: the answer turns with the image, exactly."""

import pytest
import torch
from torch.testing import assert_close

from aceray.em.dihedral import coefficient_tables, element_rotations, transform_coefficients, transform_ctf
from aceray.train.predict import Particles, calibrate_normalisation, predict, predict_eightfold
from tests.train.phantom import BOX, autoencoder, projections

COUNT = 40


def turned(particles: Particles, element: int, model) -> Particles:
    which = torch.full((len(particles),), element)
    coefficients = transform_coefficients(particles.coefficients, which, coefficient_tables(model.disc))
    assert particles.ctf is not None
    ctf = transform_ctf(particles.ctf, which)
    return Particles(coefficients, ctf, particles.particle_id, particles.pixel_size_angstrom)


@pytest.mark.parametrize("element", [1, 2, 4, 7])
def test_the_best_of_eight_turns_with_the_image(element: int) -> None:
    """An untrained encoder does not; poses that were turned back the wrong way, or shifts, would not either."""
    model, (particles, _, _) = autoencoder(heads=3), projections(COUNT)
    calibrate_normalisation(model, particles)
    turn = element_rotations()[element]
    found = predict_eightfold(model, particles, 2 * BOX)
    other = predict_eightfold(model, turned(particles, element, model), 2 * BOX)
    same = (other.poses.residual - found.poses.residual).abs() < 1e-5
    assert_close(other.poses.rotation[same], turn @ found.poses.rotation[same], atol=1e-3, rtol=0)
    assert_close(other.poses.shift_px[same], found.poses.shift_px[same] @ turn[:2, :2].T, atol=1e-3, rtol=0)
    assert_close(other.spread_deg[same], found.spread_deg[same], atol=0.1, rtol=0)
    assert float(same.float().mean()) > 0.9
    plain, again = predict(model, particles, 2 * BOX), predict(model, turned(particles, element, model), 2 * BOX)
    assert float((again.rotation - turn @ plain.rotation).abs().max()) > 0.1


def test_the_best_of_eight_is_at_least_as_good_as_the_first() -> None:
    model, (particles, _, _) = autoencoder(heads=2), projections(COUNT)
    calibrate_normalisation(model, particles)
    model.train()
    plain, best = predict(model, particles, BOX), predict_eightfold(model, particles, BOX)
    assert model.training
    assert bool((best.poses.residual <= plain.residual + 1e-5).all())
    assert float(best.poses.residual.mean()) < float(plain.residual.mean())
    # the untrained encoder's eight answers have little to do with one another
    assert 60 < float(best.spread_deg.mean()) < 150
