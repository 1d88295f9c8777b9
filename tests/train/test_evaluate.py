import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.data.particles import Truth
from aceray.em.formation import shift_image
from aceray.em.fourier import crop_volume
from aceray.em.projection import project_slice
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector, rotation_sqfrob, sqfrob_to_degrees
from aceray.errors import DataError
from aceray.metrics.alignment import flip_hand
from aceray.metrics.fsc import fourier_shell_correlation, half_ball, resolution_px
from aceray.metrics.pose import origin_displacement
from aceray.train.evaluate import Evaluation, MaskKind, compare_half_maps, evaluate
from aceray.train.predict import Poses
from tests.references.projection import blob_volume

BOX, COUNT, PIXEL_SIZE = 32, 400, 3.0
ORIGIN = torch.tensor([1.2, -0.6, 0.9])
POSE_KEYS = {
    "pose/rotation_sqfrob_mean",
    "pose/rotation_sqfrob_median",
    "pose/rotation_sqfrob_mean_best_of_30",
    "pose/rotation_sqfrob_median_best_of_30",
    "pose/rotation_deg_median",
    "pose/fraction_below_half",
    "pose/shift_sq_px_mean",
    "pose/shift_sq_px_median",
    "pose/shift_sq_px_raw_mean",
    "pose/shift_sq_angstrom_mean",
    "pose/shift_sq_angstrom_raw_mean",
}
VIEW_KEYS = {"pose/coverage", "pose/view_entropy"}
FSC_KEYS = {
    "fsc/auc",
    *(f"fsc/nyquist_minus_{shell}" for shell in range(5)),
    "fsc/resolution_px_0.5",
    "fsc/resolution_px_0.143",
    "fsc/resolution_angstrom_0.5",
    "fsc/resolution_angstrom_0.143",
}


def volume(turn: torch.Tensor, sign: int = 1, displacement: torch.Tensor | None = None) -> torch.Tensor:
    """Blobs at sign * turn (c + displacement), c those of the true volume."""
    generator = np.random.default_rng(2)
    centre, weight = generator.normal(0, 3.0, (12, 3)), generator.uniform(0.5, 1.5, 12)
    moved = centre if displacement is None else centre + displacement.numpy()
    return torch.from_numpy(blob_volume(sign * moved @ turn.double().numpy().T, weight, 1.3, BOX)).float()


def generator_of(name: str) -> torch.Generator:
    return named_generator(f"tests/evaluate/{name}")


def truth() -> Truth:
    shift = 1.5 * torch.randn(COUNT, 2, generator=generator_of("shift"))
    return Truth(random_rotations(COUNT, generator_of("true")), shift, torch.arange(COUNT))


def solved(sign: int = 1, origin: torch.Tensor = ORIGIN) -> tuple[torch.Tensor, Poses]:
    """A perfect reconstruction in another frame: rotated, of either hand, its content displaced by the origin."""
    true, turn = truth(), random_rotations(1, generator_of("frame"))[0]
    hand = true.rotation if sign > 0 else flip_hand(true.rotation)
    shift = true.shift_px - origin_displacement(true.rotation, origin)
    return volume(turn, sign, origin), Poses(true.particle_id, hand @ turn.T, shift, torch.zeros(COUNT))


def true_volume() -> torch.Tensor:
    return volume(torch.eye(3))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_reconstruction_in_another_frame_is_perfect(sign: int) -> None:
    predicted, poses = solved(sign)
    # the two frames do give the same images
    images = [
        shift_image(project_slice(each, rotation[:5]), shift[:5])
        for each, rotation, shift in (
            (predicted, poses.rotation, poses.shift_px),
            (true_volume(), truth().rotation, truth().shift_px),
        )
    ]
    assert_close(images[0], images[1], atol=0.03 * float(images[1].max()), rtol=0)
    result = evaluate(predicted, poses, truth(), true_volume(), PIXEL_SIZE)
    metrics = result.metrics
    assert set(metrics) == POSE_KEYS | VIEW_KEYS | FSC_KEYS
    assert metrics["pose/rotation_sqfrob_mean"] < 1e-9
    assert metrics["pose/fraction_below_half"] == 1
    assert metrics["pose/shift_sq_px_mean"] < 1e-9
    assert metrics["pose/shift_sq_px_raw_mean"] == pytest.approx(float(ORIGIN.square().sum()) * 2 / 3, rel=0.1)
    assert metrics["pose/coverage"] > 0.8
    assert metrics["fsc/resolution_px_0.5"] == 2
    assert metrics["fsc/resolution_angstrom_0.143"] == 2 * PIXEL_SIZE
    assert metrics["fsc/auc"] > 0.99
    assert metrics["pose/rotation_sqfrob_mean_best_of_30"] < 1e-8
    assert result.poses is not None
    assert result.volume is not None
    assert result.poses.alignment.flipped == result.volume.alignment.flipped == (sign < 0)
    assert [metrics[f"fsc/nyquist_minus_{shell}"] for shell in range(5)] == result.volume.fsc.values[-5:].tolist()[::-1]
    assert_close(result.volume.alignment.shift_px, ORIGIN, atol=0.02, rtol=0)
    assert_close(result.volume.predicted, result.volume.true, atol=0.03 * float(true_volume().max()), rtol=0)
    assert_close(result.view_rotation, truth().rotation, atol=1e-5, rtol=0)


def test_units_of_known_errors() -> None:
    predicted, poses = solved()
    axis = torch.nn.functional.normalize(torch.randn(COUNT, 3, generator=generator_of("axis")), dim=-1)
    rotation = rotation_from_vector(math.radians(10) * axis) @ poses.rotation
    direction = torch.nn.functional.normalize(torch.randn(COUNT, 2, generator=generator_of("shift error")), dim=-1)
    wrong = Poses(poses.particle_id, rotation, poses.shift_px + 0.5 * direction, poses.residual)
    metrics = evaluate(predicted, wrong, truth(), true_volume(), PIXEL_SIZE).metrics
    assert metrics["pose/rotation_deg_median"] == pytest.approx(10, rel=0.1)
    assert metrics["pose/rotation_sqfrob_median"] == pytest.approx(8 * math.sin(math.radians(5)) ** 2, rel=0.2)
    assert metrics["pose/shift_sq_px_mean"] == pytest.approx(0.25, rel=0.05)
    assert metrics["pose/shift_sq_angstrom_mean"] == pytest.approx(0.25 * PIXEL_SIZE**2, rel=0.05)
    assert metrics["pose/shift_sq_angstrom_raw_mean"] == pytest.approx(9 * metrics["pose/shift_sq_px_raw_mean"])


def test_a_volume_of_a_smaller_box_has_larger_pixels() -> None:
    origin = torch.tensor([7.0, -7.0, 6.0])
    predicted, poses = solved(-1, origin)
    result = evaluate(crop_volume(predicted, 16), poses, truth(), true_volume(), PIXEL_SIZE)
    assert result.volume is not None
    assert result.volume.pixel_size_angstrom == 2 * PIXEL_SIZE
    assert result.volume.true.shape == (16, 16, 16)
    assert result.metrics["fsc/resolution_px_0.5"] == 2
    assert result.metrics["fsc/resolution_angstrom_0.5"] == 4 * PIXEL_SIZE
    # shifts stay in pixels of the stored images
    assert result.metrics["pose/shift_sq_px_raw_mean"] == pytest.approx(float(origin.square().sum()) * 2 / 3, rel=0.1)
    assert_close(result.volume.alignment.shift_px, origin / 2, atol=0.05, rtol=0)


def evaluated(known: Truth | None, known_volume: torch.Tensor | None) -> Evaluation:
    return evaluate(*solved(-1), known, known_volume, PIXEL_SIZE)


def test_the_truth_may_be_known_in_part() -> None:
    nothing = evaluated(None, None)
    assert set(nothing.metrics) == VIEW_KEYS
    assert nothing.poses is None
    assert nothing.volume is None
    assert set(evaluated(truth(), None).metrics) == VIEW_KEYS | POSE_KEYS
    only_volume = evaluated(None, true_volume())
    assert set(only_volume.metrics) == VIEW_KEYS | FSC_KEYS
    assert only_volume.metrics["fsc/auc"] > 0.99  # found without poses
    assert only_volume.volume is not None
    assert only_volume.volume.alignment.flipped


def test_a_volume_is_found_when_the_poses_have_no_common_frame() -> None:
    predicted, poses = solved()
    scattered = Poses(
        poses.particle_id, random_rotations(COUNT, generator_of("scattered")), poses.shift_px, poses.residual
    )
    metrics = evaluate(predicted, scattered, truth(), true_volume(), PIXEL_SIZE).metrics
    assert metrics["pose/fraction_below_half"] < 0.2
    assert metrics["pose/rotation_sqfrob_mean"] > 4
    assert metrics["fsc/auc"] > 0.99


def test_particles_are_matched_by_their_number() -> None:
    predicted, poses = solved()
    order = torch.randperm(COUNT, generator=generator_of("order"))[:250]
    some = Poses(poses.particle_id[order], poses.rotation[order], poses.shift_px[order], poses.residual[order])
    result = evaluate(predicted, some, truth(), None, PIXEL_SIZE)
    assert result.metrics["pose/rotation_sqfrob_mean"] < 1e-9
    assert result.poses is not None
    assert_close(result.poses.particle_id, order)
    known = truth()
    backwards = Truth(known.rotation.flip(0), known.shift_px.flip(0), known.particle_id.flip(0))
    assert evaluate(predicted, some, backwards, None, PIXEL_SIZE).metrics == result.metrics
    unmatched = Truth(known.rotation, known.shift_px, known.particle_id.flip(0))
    assert evaluate(predicted, some, unmatched, None, PIXEL_SIZE).metrics["pose/rotation_sqfrob_mean"] > 3


def test_errors_of_single_particles() -> None:
    predicted, poses = solved(-1)
    rotation = poses.rotation.clone()
    rotation[7] = rotation_from_vector(torch.tensor([0.0, 0.0, math.pi / 2])) @ rotation[7]
    result = evaluate(predicted, Poses(poses.particle_id, rotation, poses.shift_px, poses.residual), truth(), None, 1.0)
    assert result.poses is not None
    errors = result.poses.errors.rotation_sqfrob
    assert int(errors.argmax()) == 7
    assert float(sqfrob_to_degrees(errors[7])) == pytest.approx(90, abs=0.1)
    assert_close(rotation_sqfrob(result.poses.rotation, truth().rotation), errors, atol=1e-5, rtol=0)


def test_predictions_nobody_can_measure_are_refused() -> None:
    predicted, poses = solved()
    nothing = Poses(poses.particle_id[:0], poses.rotation[:0], poses.shift_px[:0], poses.residual[:0])
    with pytest.raises(DataError, match="no predicted poses"):
        evaluate(predicted, nothing, truth(), None, PIXEL_SIZE)
    with pytest.raises(DataError, match="predicted volume hold values that are not finite"):
        evaluate(predicted * torch.nan, poses, truth(), None, PIXEL_SIZE)
    broken = Poses(poses.particle_id, poses.rotation, poses.shift_px / 0, poses.residual)
    with pytest.raises(DataError, match="predicted shifts hold"):
        evaluate(predicted, broken, truth(), None, PIXEL_SIZE)
    foreign = Poses(poses.particle_id + 3, poses.rotation, poses.shift_px, poses.residual)
    with pytest.raises(DataError, match=r"particle 400 \(3 in all\) has a predicted pose but no true one"):
        evaluate(predicted, foreign, truth(), None, PIXEL_SIZE)


def test_an_empty_volume_has_no_resolution() -> None:
    _, poses = solved()
    metrics = evaluate(torch.zeros(BOX, BOX, BOX), poses, truth(), true_volume(), PIXEL_SIZE).metrics
    assert metrics["fsc/auc"] == 0
    assert metrics["fsc/resolution_px_0.5"] == 2 * BOX


def band_limited(volume: torch.Tensor) -> torch.Tensor:
    ball = half_ball(volume.shape[-1])
    return ball.scatter(ball.gather(volume))


def in_another_frame(volume: torch.Tensor) -> torch.Tensor:
    """The other hand, two quarter turns and a displacement by a voxel: exact on the grid, without interpolation."""
    axes = (0, 1, 2)
    inverted = volume.flip(axes).roll((1, 1, 1), axes)
    turned = inverted.transpose(0, 1).flip(0).roll(1, 0)  # about x
    turned = turned.transpose(1, 2).flip(1).roll(1, 1)  # about z
    return turned.roll(1, 2)


def noisy_halves() -> tuple[torch.Tensor, torch.Tensor]:
    """Two half maps of blobs in one frame whose FSC falls below 0.143 before Nyquist."""
    signal = volume(torch.eye(3))
    # signal alone falls by orders of magnitude towards Nyquist, so a little noise takes over there
    noise = torch.randn(2, *signal.shape, generator=generator_of("halves")) * (0.12 * signal.std())
    return band_limited(signal + noise[0]), band_limited(signal + noise[1])


def test_half_maps_of_other_frames_and_hands_correlate_as_aligned_ones() -> None:
    first, second = noisy_halves()
    expected = fourier_shell_correlation(first, second)
    assert expected[1:].max() > 0.95 and expected[-1] < 0.5
    compared = compare_half_maps(first, in_another_frame(second), 3.0)
    assert compared.alignment.flipped
    assert_close(compared.curve.values[1:], expected[1:], atol=0.06, rtol=0)
    box = first.shape[-1]
    pixels = compared.metrics["fsc/half_map_resolution_px_0.143"]
    assert pixels == pytest.approx(resolution_px(expected, 0.143, box), abs=0.15)
    assert compared.metrics["fsc/half_map_resolution_angstrom_0.143"] == pytest.approx(3 * pixels)


@pytest.mark.parametrize("mask", ["sphere", "auto"])
def test_masked_half_maps_are_compared_in_the_frame_of_the_first(mask: MaskKind) -> None:
    first, second = noisy_halves()
    aligned, turned = (compare_half_maps(first, other, 3.0, mask) for other in (second, in_another_frame(second)))
    assert_close(turned.curve.values[1:], aligned.curve.values[1:], atol=0.1, rtol=0)
    # what is cut away is noise
    assert float(aligned.fsc.masked[1:].mean()) >= float(aligned.fsc.unmasked[1:].mean())


def test_half_maps_in_any_frame_are_found() -> None:
    turn = rotation_from_vector(torch.tensor([0.7, -1.1, 0.4]))
    compared = compare_half_maps(volume(torch.eye(3)), volume(turn, -1, torch.tensor([0.6, -0.4, 0.3])), 3.0)
    assert compared.alignment.flipped
    assert float(rotation_sqfrob(compared.alignment.rotation, turn)) < 1e-3
    assert float(compared.curve.values[1:].min()) > 0.97
