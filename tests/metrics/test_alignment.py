import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.projection import padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import (
    random_rotations,
    rotation_from_vector,
    rotation_sqfrob,
    sqfrob_to_degrees,
)
from aceray.metrics.alignment import (
    CLIP_SQFROB,
    PAD,
    PoseAlignment,
    VolumeAlignment,
    align_poses,
    align_volumes,
    aligned_coefficients,
    aligned_fsc,
    flip_hand,
    project_to_rotation,
    search_alignments,
)
from aceray.metrics.fsc import fsc_area, half_ball
from tests.references.alignment import coefficients_in_frame
from tests.references.pose import clipped_mean_error
from tests.references.projection import blob_projection, blob_volume

BOX = 32
SHIFT = torch.tensor([1.3, -0.7, 2.1])


def frame(seed: int) -> torch.Tensor:
    return random_rotations(1, named_generator("tests/alignment/frame", seed))[0]


def noisy(rotation: torch.Tensor, radians: float, seed: int) -> torch.Tensor:
    vector = torch.randn(len(rotation), 3, generator=named_generator("tests/alignment/noise", seed))
    return rotation_from_vector(radians * vector) @ rotation


def predicted_poses(true: torch.Tensor, alignment: PoseAlignment) -> torch.Tensor:
    """Poses R' with R = [D] R' Q."""
    hand = flip_hand(true) if alignment.flipped else true
    return hand @ alignment.rotation.T


def blobs() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(11)
    centre = generator.normal(0, 3.5, (14, 3))
    return centre - centre.mean(0), generator.uniform(0.5, 1.5, 14)


def volume_in_frame(alignment: VolumeAlignment, box: int = BOX) -> torch.Tensor:
    """V' of the blobs' V: V(p) = V'(±Q (p + shift)), so a blob at c lies at ±Q (c + shift)."""
    centre, weight = blobs()
    sign = -1 if alignment.flipped else 1
    moved = sign * (centre + alignment.shift_px.numpy()) @ alignment.rotation.double().numpy().T
    # sampled twice as finely, then cropped: nothing from beyond Nyquist is folded back
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(blob_volume(2 * moved, weight, 1.6, 2 * box))))
    inner = slice(box - box // 2, 2 * box - box // 2)
    cropped = np.fft.ifftn(np.fft.ifftshift(spectrum[inner, inner, inner]))
    return torch.from_numpy(np.fft.fftshift(cropped).real / 8).float()


def true_volume(box: int = BOX) -> torch.Tensor:
    return volume_in_frame(VolumeAlignment(torch.eye(3), False, torch.zeros(3)), box)


def fsc_at(predicted: torch.Tensor, true: torch.Tensor, alignment: VolumeAlignment) -> torch.Tensor:
    ball = half_ball(true.shape[-1])
    return aligned_fsc(padded_transform(predicted, PAD), ball.gather(true), ball, alignment)


def degrees_apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(sqfrob_to_degrees(rotation_sqfrob(first, second)))


def test_projection_to_a_rotation_is_proper_and_keeps_rotations() -> None:
    rotation = random_rotations(20, named_generator("tests/alignment/proper"))
    assert_close(project_to_rotation(rotation), rotation, atol=1e-5, rtol=0)
    closest = project_to_rotation(-rotation)
    assert_close(torch.linalg.det(closest), torch.ones(20), atol=1e-5, rtol=0)
    # nothing near is closer
    turned = rotation_from_vector(torch.tensor([0.02, -0.01, 0.03])) @ closest
    assert (rotation_sqfrob(closest, -rotation) <= rotation_sqfrob(turned, -rotation) + 1e-5).all()


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("count", [1, 7, 500])
def test_a_planted_frame_is_found(flipped: bool, count: int) -> None:
    true = random_rotations(count, named_generator("tests/alignment/true", count))
    planted = PoseAlignment(frame(count), flipped)
    found = align_poses(predicted_poses(true, planted), true)
    assert_close(found.apply(predicted_poses(true, planted)), true, atol=1e-5, rtol=0)
    if count > 1:
        assert found.flipped == flipped
        assert_close(found.rotation, planted.rotation, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flipped", [False, True])
def test_two_fifths_of_good_poses_are_enough(flipped: bool) -> None:
    for seed in range(5):
        true = random_rotations(400, named_generator("tests/alignment/majority", seed))
        planted = PoseAlignment(frame(seed), flipped)
        predicted = noisy(predicted_poses(true, planted), 0.15, seed)
        predicted[160:] = random_rotations(240, named_generator("tests/alignment/outliers", seed))
        found = align_poses(predicted, true)
        assert found.flipped == flipped
        assert degrees_apart(found.rotation, planted.rotation) < 3


def test_poses_of_both_hands_are_aligned_to_the_hand_of_the_majority() -> None:
    true = random_rotations(300, named_generator("tests/alignment/both"))
    predicted = torch.cat([true[:120], flip_hand(true[120:])]) @ frame(3).T
    found = align_poses(predicted, true)
    assert found.flipped
    assert_close(rotation_sqfrob(found.apply(predicted), true)[120:], torch.zeros(180), atol=1e-5, rtol=0)


def test_the_wrong_hand_cannot_be_rotated_away() -> None:
    true = random_rotations(400, named_generator("tests/alignment/hand"))
    predicted = predicted_poses(true, PoseAlignment(frame(4), True))
    unflipped = [
        float(rotation_sqfrob(predicted @ candidate, true).mean())
        for candidate in predicted.transpose(-1, -2)[:50] @ true[:50]
    ]
    assert min(unflipped) > 3
    assert rotation_sqfrob(align_poses(predicted, true).apply(predicted), true).max() < 1e-8


def test_no_frame_close_to_the_found_one_is_better() -> None:
    true = random_rotations(200, named_generator("tests/alignment/optimum"))
    predicted = noisy(predicted_poses(true, PoseAlignment(frame(5), False)), 0.2, 5)
    predicted[120:] = random_rotations(80, named_generator("tests/alignment/optimum/outliers"))
    found = align_poses(predicted, true)

    def error(rotation: torch.Tensor) -> float:
        return clipped_mean_error((predicted @ rotation).double().numpy(), true.double().numpy(), CLIP_SQFROB)

    best = error(found.rotation)
    steps = torch.cat([torch.eye(3), -torch.eye(3)]) * 0.03
    assert all(error(found.rotation @ rotation_from_vector(step)) > best for step in steps)


def test_poses_that_are_not_numbers_are_left_out() -> None:
    true = random_rotations(50, named_generator("tests/alignment/nan"))
    predicted = predicted_poses(true, PoseAlignment(frame(6), False))
    predicted[::7] = torch.nan
    assert_close(align_poses(predicted, true).rotation, frame(6), atol=1e-5, rtol=0)
    assert_close(align_poses(torch.full_like(true, torch.nan), true).rotation, torch.eye(3))


@pytest.mark.parametrize("flipped", [False, True])
def test_both_ways_to_write_a_frame_give_the_same_images(flipped: bool) -> None:
    """The images of V' at the predicted poses are those of V at the aligned poses."""
    centre, weight = blobs()
    true = random_rotations(3, named_generator("tests/alignment/images"))
    alignment = PoseAlignment(frame(7), flipped)
    predicted = predicted_poses(true, alignment).double().numpy()
    sign = -1 if flipped else 1
    moved = sign * centre @ alignment.rotation.double().numpy().T
    for rotation, other in zip(true.double().numpy(), predicted, strict=True):
        image = blob_projection(centre, weight, 1.2, BOX, rotation)
        np.testing.assert_allclose(blob_projection(moved, weight, 1.2, BOX, other), image, atol=1e-4)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("box", [12, 13])
def test_aligned_coefficients_equal_direct_sums(flipped: bool, box: int) -> None:
    generator = np.random.default_rng(8)
    volume = blob_volume(generator.normal(0, 1.2, (5, 3)), generator.random(5), 1.0, box)
    ball = half_ball(box)
    alignment = VolumeAlignment(frame(8), flipped, torch.tensor([0.8, -1.1, 0.4]))
    expected = coefficients_in_frame(
        volume,
        ball.frequency.double().numpy(),
        alignment.rotation.double().numpy(),
        -1 if flipped else 1,
        alignment.shift_px.double().numpy(),
    )
    found = aligned_coefficients(padded_transform(torch.from_numpy(volume).float(), 4), alignment, ball)
    error = np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected)
    assert error < 0.01  # trilinear interpolation in a transform padded four times


def test_a_volume_in_its_own_frame_correlates_with_itself() -> None:
    same = VolumeAlignment(torch.eye(3), False, torch.zeros(3))
    assert fsc_at(true_volume(), true_volume(), same).min() > 0.999
    # noise fills the corners of the box, where interpolation is at its worst
    noise = torch.randn(BOX, BOX, BOX, generator=named_generator("tests/alignment/self"))
    assert fsc_at(noise, noise, same).min() > 0.99


@pytest.mark.parametrize("flipped", [False, True])
def test_a_volume_and_itself_in_another_frame_agree_up_to_nyquist(flipped: bool) -> None:
    planted = VolumeAlignment(frame(9), flipped, SHIFT)
    assert fsc_at(volume_in_frame(planted), true_volume(), planted)[1:].min() > 0.99
    wrong_shift = VolumeAlignment(frame(9), flipped, -SHIFT)
    assert fsc_area(fsc_at(volume_in_frame(planted), true_volume(), wrong_shift)) < 0.3


@pytest.mark.parametrize("flipped", [False, True])
def test_refinement_recovers_rotation_and_shift_from_a_near_start(flipped: bool) -> None:
    planted = VolumeAlignment(frame(10), flipped, SHIFT)
    turn = rotation_from_vector(torch.tensor([0.12, -0.1, 0.08]))
    start = VolumeAlignment(planted.rotation @ turn, flipped, SHIFT + torch.tensor([0.9, 0.8, -1.0]))
    found = align_volumes(volume_in_frame(planted), true_volume(), [start])
    assert degrees_apart(found.rotation, planted.rotation) < 0.1
    assert_close(found.shift_px, SHIFT, atol=0.01, rtol=0)
    assert fsc_at(volume_in_frame(planted), true_volume(), found)[1:].min() > 0.99


def test_refinement_from_the_wrong_hand_stays_wrong() -> None:
    planted = VolumeAlignment(frame(11), True, SHIFT)
    found = align_volumes(volume_in_frame(planted), true_volume(), [VolumeAlignment(frame(11), False, SHIFT)])
    assert not found.flipped
    assert fsc_area(fsc_at(volume_in_frame(planted), true_volume(), found)) < 0.6


@pytest.mark.parametrize(("flipped", "box"), [(False, 32), (True, 32), (True, 33), (False, 48)])
def test_the_search_needs_no_start(flipped: bool, box: int) -> None:
    planted = VolumeAlignment(frame(box), flipped, SHIFT * 2)
    found = align_volumes(volume_in_frame(planted, box), true_volume(box))
    assert found.flipped == flipped
    assert degrees_apart(found.rotation, planted.rotation) < 0.1
    assert_close(found.shift_px, planted.shift_px, atol=0.01, rtol=0)


def test_the_search_reaches_volumes_far_from_the_centre() -> None:
    planted = VolumeAlignment(frame(14), False, torch.tensor([13.0, -6.0, -11.0]))
    start = search_alignments(volume_in_frame(planted, 48), true_volume(48))[0]
    assert degrees_apart(start.rotation, planted.rotation) < 2
    # a search at low resolution ends where its curve is flat to rounding, which differs from processor to processor
    assert_close(start.shift_px, planted.shift_px, atol=0.3, rtol=0)


def test_the_search_finds_a_volume_in_noise() -> None:
    planted = VolumeAlignment(frame(12), True, SHIFT)
    volume = volume_in_frame(planted)
    volume = volume + 3 * volume.std() * torch.randn(volume.shape, generator=named_generator("tests/alignment/snr"))
    found = align_volumes(volume, true_volume())
    assert found.flipped
    assert degrees_apart(found.rotation, planted.rotation) < 5
    # no worse than the frame that was planted
    assert fsc_area(fsc_at(volume, true_volume(), found)) > fsc_area(fsc_at(volume, true_volume(), planted)) - 0.01


def test_an_empty_volume_is_aligned_to_nothing_without_failing() -> None:
    found = align_volumes(torch.zeros(16, 16, 16), true_volume(16))
    assert found.rotation.isfinite().all()
    assert_close(fsc_at(torch.zeros(16, 16, 16), true_volume(16), found), torch.zeros(9))
    assert len(search_alignments(torch.zeros(16, 16, 16), true_volume(16))) > 0


@torch.no_grad()
def test_alignment_works_where_gradients_are_off() -> None:
    planted = VolumeAlignment(frame(13), False, SHIFT)
    start = VolumeAlignment(planted.rotation @ rotation_from_vector(torch.tensor([0.05, 0.0, -0.05])), False, SHIFT)
    found = align_volumes(volume_in_frame(planted), true_volume(), [start])
    assert degrees_apart(found.rotation, planted.rotation) < 0.1
    assert not found.rotation.requires_grad
    assert not found.shift_px.requires_grad
