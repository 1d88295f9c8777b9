"""Refinement's two ways to the same model of the energy, and poses that share images."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc
from aceray.em.projection import padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector, rotation_sqfrob
from aceray.train import energy
from aceray.train.energy import Images, Matches, energies, make_reference, refine_poses
from tests.train.phantom import BOX, chiral_volume
from tests.train.test_search import imaged

DISC = HalfDisc(BOX)


def poses(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = named_generator("tests/energy")
    return random_rotations(count, generator), torch.randn(count, 2, generator=generator)


def test_compiled_and_tensor_models_agree() -> None:
    images, _, _ = imaged(6, noise=0.3)
    rotation, shift = poses(9)
    reference = make_reference(chiral_volume(), DISC, 0.5, DISC.weight / (1 + DISC.radius), pad=4)
    of = torch.tensor([0, 1, 2, 3, 4, 5, 5, 0, 3])
    compiled = energy._model_on_cpu(reference, images, rotation, shift, of)
    plain = energy._model_by_differences(reference, images, rotation, shift, of)
    assert_close(compiled.energy, plain.energy, rtol=1e-4, atol=0)
    for ours, theirs in ((compiled.gradient, plain.gradient), (compiled.normal, plain.normal)):
        scale = theirs.flatten(1).abs().amax(1)
        error = (ours - theirs).flatten(1).abs().amax(1) / scale
        assert float(error.median()) < 0.02 and float(error.max()) < 0.2


def test_energies_of_several_rotations_are_those_of_the_model() -> None:
    images, rotation, shift = imaged(5, noise=0.3)
    reference = make_reference(chiral_volume(), DISC, 0.5, DISC.weight / (1 + DISC.radius))
    tried, _ = poses(15)
    at = Matches(tried, shift.repeat_interleave(3, 0), torch.zeros(15))
    model = refine_poses(reference, images, at, 0, torch.arange(5).repeat_interleave(3)).energy
    assert_close(energies(reference, images, tried.unflatten(0, (5, 3)), shift), model.unflatten(0, (5, 3)))
    here, wrong = energies(reference, images, torch.stack([rotation, tried[:5]], 1), shift).T
    assert (here < wrong).all()
    assert (here < energies(reference, images, rotation[:, None], -shift)[:, 0]).all()


def test_tensor_code_refines_to_the_same_poses() -> None:
    """As on a device for which nothing is compiled."""
    images, rotation, shift = imaged(40, noise=0.1)
    compiled = make_reference(chiral_volume(), DISC, 0.1)
    plain = dataclasses.replace(compiled, transform=padded_transform(chiral_volume()))
    assert_close(plain.slices(rotation), compiled.slices(rotation), rtol=1e-3, atol=1e-4)
    start = Matches(rotation_from_vector(torch.tensor([0.05, -0.08, 0.06])) @ rotation, shift + 0.3, torch.zeros(40))
    found = [refine_poses(each, images, start, 6) for each in (compiled, plain)]
    assert float(rotation_sqfrob(found[0].rotation, found[1].rotation).median()) < 1e-5
    assert float((found[0].shift_px - found[1].shift_px).abs().median()) < 0.01
    assert float(rotation_sqfrob(found[1].rotation, rotation).median()) < 1e-3


def test_without_transfer_is_with_a_transfer_of_one() -> None:
    images, _, _ = imaged(4, noise=0.3)
    rotation, shift = poses(4)
    reference = make_reference(chiral_volume(), DISC, None)
    start = Matches(rotation, shift, torch.zeros(4))
    ones = Images(images.coefficients, torch.ones_like(images.coefficients.real))
    found = [refine_poses(reference, each, start, 2) for each in (Images(images.coefficients, None), ones)]
    assert_close(found[0].rotation, found[1].rotation)
    assert_close(found[0].energy, found[1].energy)


def test_threads_change_nothing() -> None:
    images, _, _ = imaged(200, noise=0.3)
    rotation, shift = poses(200)
    reference = make_reference(chiral_volume(), DISC, 0.5)
    start, before = Matches(rotation, shift, torch.zeros(200)), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(refine_poses(reference, images, start, 3))
    finally:
        torch.set_num_threads(before)
    assert_close(found[0].rotation, found[1].rotation, rtol=1e-4, atol=1e-4)


def test_several_poses_of_one_image_are_refined_as_if_alone() -> None:
    images, rotation, shift = imaged(3, noise=0.1)
    reference = make_reference(chiral_volume(), DISC, 0.1)
    of = torch.tensor([2, 0, 2])
    start = Matches(rotation[of], shift[of] + 0.3, torch.zeros(3))
    together = refine_poses(reference, images, start, 4, of)
    alone = refine_poses(reference, images.take(of), start, 4)
    assert_close(together.rotation, alone.rotation)
    assert_close(together.shift_px, alone.shift_px)


def test_the_better_of_two_and_the_best_of_several() -> None:
    rotation, shift = poses(4)
    first = Matches(rotation[:2], shift[:2], torch.tensor([1.0, 5.0]))
    second = Matches(rotation[2:], shift[2:], torch.tensor([2.0, 4.0]))
    kept = first.or_better(second)
    assert kept.energy.tolist() == [1.0, 4.0]
    assert_close(kept.rotation, torch.stack([rotation[0], rotation[3]]))
    assert_close(kept.shift_px, torch.stack([shift[0], shift[3]]))
    several = Matches(rotation.reshape(2, 2, 3, 3), shift.reshape(2, 2, 2), torch.tensor([[3.0, 1.0], [0.5, 2.0]]))
    assert_close(several.best().shift_px, torch.stack([shift[1], shift[2]]))


def test_unrefined_shifts_stay() -> None:
    images, rotation, shift = imaged(5, noise=0.1)
    found = refine_poses(
        make_reference(chiral_volume(), DISC, None), images, Matches(rotation, shift + 1, shift[:, 0]), 3
    )
    assert_close(found.shift_px, shift + 1, rtol=0, atol=0)


@pytest.mark.parametrize("radius", [3.0, 5.5])
def test_low_frequencies_of_a_reference(radius: float) -> None:
    low = make_reference(chiral_volume(), DISC, None).within(radius)
    assert len(low.index) == int((DISC.radius <= radius).sum())
    assert_close(low.frequency, DISC.frequency[low.index])
    assert_close(low.weight, DISC.weight[low.index])
