"""Losses against slow twins that work on images, and what each loss may teach."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from aceray.em.ctf import ctf_on_disc
from aceray.em.dihedral import ELEMENTS, element_rotations, transform_ctf
from aceray.em.filters import VARIANCES_PX2
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.models.encoder import Hypotheses
from aceray.train.objective import LOSER_WEIGHT, Batch, DrawnPoses, Objective, ShiftMoments, pairwise_contrast
from tests.references.contrast import pairwise_contrast_loop
from tests.references.filters import gaussian_filter
from tests.train.phantom import PIXEL_SIZE_ANGSTROM, autoencoder, ctf_parameters, projections

COUNT = 6
SYMMETRIC = torch.tensor([[0] * COUNT, [2] * COUNT])
PAIRS = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 5, 4, 1, 3]])


def objective(heads: int = 1, lanes: int = 1, train_shift: bool = True, **more) -> Objective:
    return Objective(
        autoencoder(heads), shift_spread_px=1.0, shift_weight=0.2, train_shift=train_shift, lanes=lanes, **more
    )


def batch_of(task: Objective, count: int = COUNT, seed: int = 1, views: Tensor | None = None) -> Batch:
    particles, _, _ = projections(count, seed=seed)
    return Batch(particles.coefficients, particles.transfer(torch.arange(count), task.model.disc), views)


def drawn_of(task: Objective, count: int = COUNT) -> DrawnPoses:
    particles, _, _ = projections(count, seed=9)
    generator = named_generator("tests/drawn")
    noise = 0.1 * torch.randn(count, len(task.model.disc), dtype=torch.complex64, generator=generator)
    shift = torch.randn(count, 2, generator=generator)
    return DrawnPoses(
        random_rotations(count, generator), shift, particles.transfer(torch.arange(count), task.model.disc), noise
    )


def gamma(task: Objective, images: Tensor, ctf: Tensor) -> Tensor:
    """Decode what is encoded, as images: the map Gamma of the paper, for one head."""
    model = task.model
    poses = model.encoder(model.disc.gather(images), ctf)
    return model.disc.scatter(model.render(model.decoder.transform(), poses.rotation[:, 0], poses.shift_px, ctf))


def half_turn(images: Tensor) -> Tensor:
    """Rotation by pi about pixel (d//2, d//2): a flip and a roll by one."""
    return images.flip(-1, -2).roll((1, 1), (-2, -1))


def transformed(images: Tensor, elements: Tensor) -> Tensor:
    """Mirror x -> -x for elements from 4 on, then quarter turns (x, y) -> (-y, x) about pixel (d//2, d//2)."""
    results = []
    for image, element in zip(images, elements.tolist(), strict=True):
        if element >= 4:
            image = image.flip(-1).roll(1, -1)
        for _ in range(element % 4):
            image = image.T.flip(-1).roll(1, -1)
        results.append(image)
    return torch.stack(results)


def transformed_ctf(task: Objective, elements: Tensor) -> Tensor:
    return ctf_on_disc(transform_ctf(ctf_parameters(len(elements)), elements), task.model.disc, PIXEL_SIZE_ANGSTROM)


def squares(images: Tensor) -> list[float]:
    pixels = images.shape[-1] ** 2
    return [sum(float(value) ** 2 for value in image.flatten()) / pixels for image in images.detach()]


def test_image_loss_is_the_mean_squared_error_over_pixels() -> None:
    task = objective()
    task.eval()
    batch = batch_of(task)
    images = task.model.disc.scatter(batch.coefficients)
    expected = sum(squares(images - gamma(task, images, batch.ctf))) / COUNT
    assert_close(task(batch, None)["ipi"].item(), expected, atol=1e-5, rtol=1e-5)


def test_symmetric_loss_is_the_smaller_error_of_an_image_and_its_half_turn() -> None:
    task = objective()
    task.eval()
    batch = batch_of(task, views=SYMMETRIC)
    images = task.model.disc.scatter(batch.coefficients)
    turned = half_turn(images)
    straight = squares(images - gamma(task, images, batch.ctf))
    # the contrast transfer is even, so it is its own half turn
    around = squares(turned - gamma(task, turned, batch.ctf))
    expected = sum(min(pair) for pair in zip(straight, around, strict=True)) / COUNT
    assert any(first > second for first, second in zip(straight, around, strict=True))
    assert_close(task(batch, None)["ipi"].item(), expected, atol=1e-5, rtol=1e-5)


def test_several_heads_give_the_error_of_the_best_one() -> None:
    task = objective(heads=3)
    task.eval()
    batch = batch_of(task)
    model = task.model
    poses = model.encoder(batch.coefficients, batch.ctf)
    errors = [
        model.residual(
            model.render(model.decoder.transform(), poses.rotation[:, head], poses.shift_px, batch.ctf),
            batch.coefficients,
        )
        for head in range(3)
    ]
    assert_close(task(batch, None)["ipi"], torch.stack(errors).min(0).values.mean())


def test_only_the_winning_heads_learn_from_images() -> None:
    task = objective(heads=3)
    task.eval()
    batch = batch_of(task, 1)
    task(batch, None)["ipi"].backward()
    touched = task.model.encoder.rotation.weight.grad.unflatten(0, (3, 6)).abs().sum((1, 2)) > 0
    assert touched.sum() == 1


def test_pose_loss_matches_a_loop_over_images_and_heads() -> None:
    task = objective(heads=2)
    task.eval()
    drawn = drawn_of(task)
    model = task.model
    images = model.render(model.decoder.transform(), drawn.rotation, drawn.shift_px, drawn.ctf) + drawn.noise
    poses = model.encoder(images.detach(), drawn.ctf)
    total = 0.0
    for index in range(COUNT):
        distances = [((poses.rotation[index, head] - drawn.rotation[index]) ** 2).sum().item() for head in range(2)]
        total += (1 - LOSER_WEIGHT) * min(distances) + LOSER_WEIGHT * sum(distances) / 2
        total += 0.2 * ((poses.shift_px[index] - drawn.shift_px[index]) ** 2).sum().item()
    assert_close(task(batch_of(task), drawn)["pip"].item(), total / COUNT, atol=1e-4, rtol=1e-4)


def test_pose_loss_leaves_the_decoder_alone() -> None:
    task = objective()
    task(batch_of(task), drawn_of(task))["pip"].backward()
    assert task.model.decoder.density.grad is None
    assert all(parameter.grad is not None for parameter in task.model.encoder.parameters())


@pytest.mark.parametrize("train_shift", [True, False])
def test_whether_the_image_loss_teaches_shifts_is_a_choice(train_shift: bool) -> None:
    task = objective(train_shift=train_shift)
    task(batch_of(task), None)["ipi"].backward()
    gradient = task.model.encoder.shift.weight.grad
    assert (gradient is not None and bool(gradient.any())) == train_shift


def test_lanes_are_normalised_one_by_one() -> None:
    together, alone = objective(lanes=2), objective(lanes=1)
    first, second = batch_of(alone, seed=1), batch_of(alone, seed=2)
    both = Batch(torch.cat([first.coefficients, second.coefficients]), torch.cat([first.ctf, second.ctf]))
    expected = (alone(first, None)["ipi"] + alone(second, None)["ipi"]) / 2
    assert_close(together(both, None)["ipi"], expected)
    # the normalisation does matter: the same images as one lane give another loss
    assert not torch.allclose(alone(both, None)["ipi"], expected, rtol=1e-4)


def test_a_half_turned_image_gives_the_same_symmetric_loss() -> None:
    task = objective(heads=2)
    task.eval()
    batch = batch_of(task, views=SYMMETRIC)
    turned = task.model.disc.gather(half_turn(task.model.disc.scatter(batch.coefficients)))
    assert_close(task(Batch(turned, batch.ctf, SYMMETRIC), None)["ipi"], task(batch, None)["ipi"], atol=1e-5, rtol=1e-5)


def test_generalised_loss_is_the_smaller_error_of_two_transformed_images() -> None:
    task = objective()
    task.eval()
    batch = batch_of(task, views=PAIRS)
    images = task.model.disc.scatter(batch.coefficients)
    errors = []
    for elements in PAIRS:
        turned, ctf = transformed(images, elements), transformed_ctf(task, elements)
        errors.append(squares(turned - gamma(task, turned, ctf)))
    smaller = [first < second for first, second in zip(*errors, strict=True)]
    assert any(smaller) and not all(smaller)
    expected = sum(min(pair) for pair in zip(*errors, strict=True)) / COUNT
    assert_close(task(batch, None)["ipi"].item(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("element", range(ELEMENTS))
def test_generalised_loss_is_invariant_under_its_own_transforms(element: int) -> None:
    task = objective(heads=2)
    task.eval()
    batch, elements = batch_of(task, views=PAIRS), torch.full((COUNT,), element)
    group = element_rotations()
    undone = (group[PAIRS] @ group[element].T)[:, :, None]
    views = (undone - group).abs().sum((-2, -1)).argmin(-1)
    images = task.model.disc.gather(transformed(task.model.disc.scatter(batch.coefficients), elements))
    turned = Batch(images, transformed_ctf(task, elements), views)
    assert_close(task(turned, None), task(batch, None), atol=1e-5, rtol=1e-5)
    swapped = dataclasses.replace(batch, views=PAIRS.flip(0))
    assert_close(task(swapped, None)["ipi"], task(batch, None)["ipi"])


class KnownPoses(nn.Module):
    """An encoder that knows the pose of every view and keeps what it was shown."""

    shift_limit_px = 2.0

    def __init__(self, rotation: Tensor, shift_px: Tensor) -> None:
        super().__init__()
        self.poses = Hypotheses(rotation[:, None], shift_px, rotation.flatten(1))

    def forward(self, coefficients: Tensor, ctf: Tensor | None) -> Hypotheses:
        self.coefficients, self.ctf = coefficients, ctf
        return self.poses


@pytest.mark.parametrize("element", range(ELEMENTS))
def test_the_pose_of_every_view_is_exact(element: int) -> None:
    """With astigmatism and shifts: the view renders from the turned pose, which is turned back to the image's own."""
    task = objective()
    model, elements = task.model, torch.full((COUNT,), element)
    generator = named_generator("tests/views")
    rotation, shift = random_rotations(COUNT, generator), torch.randn(COUNT, 2, generator=generator)
    group = element_rotations()[element]
    moved_rotation, moved_shift = group @ rotation, shift @ group[:2, :2].T
    ctf, moved_ctf = transformed_ctf(task, torch.zeros_like(elements)), transformed_ctf(task, elements)
    model.encoder = KnownPoses(moved_rotation, moved_shift)
    transform = model.decoder.transform().detach()
    batch = Batch(model.render(transform, rotation, shift, ctf), ctf, elements[None])
    energy = model.disc.energy(batch.coefficients).mean()
    assert task(batch, None)["ipi"] < 1e-9 * energy
    assert_close(model.encoder.ctf, moved_ctf, atol=1e-4, rtol=0)
    expected = model.render(transform, moved_rotation, moved_shift, moved_ctf)
    assert_close(model.encoder.coefficients, expected, atol=1e-4 * float(energy.sqrt()), rtol=0)
    if element:
        model.encoder = KnownPoses(rotation, shift)
        assert task(batch, None)["ipi"] > 0.05 * energy


@pytest.mark.parametrize("number", [3, 5])
def test_labels_are_filtered_images_and_predictions_are_not(number: int) -> None:
    task = objective()
    task.eval()
    batch = batch_of(task)
    images = task.model.disc.scatter(batch.coefficients)
    batch = dataclasses.replace(batch, coefficients=task.model.disc.gather(images))
    filtered = [gaussian_filter(image, VARIANCES_PX2[number - 1], "wrap") for image in images.double().numpy()]
    predicted = gamma(task, images, batch.ctf).detach().double().numpy()
    expected = float(((np.stack(filtered) - predicted) ** 2).mean())
    assert_close(task(batch, None, number)["ipi"].item(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(task(batch, None, 1)["ipi"], task(batch, None)["ipi"])


def test_the_best_candidate_is_the_one_nearest_to_the_label() -> None:
    task = objective(heads=4)
    task.eval()
    batch = batch_of(task)
    model = task.model
    label = batch.coefficients * task._label_transfer[4]
    poses = model.encoder(batch.coefficients, batch.ctf)
    errors = torch.stack(
        [
            model.residual(model.render(model.decoder.transform(), rotation, poses.shift_px, batch.ctf), label)
            for rotation in poses.rotation.unbind(1)
        ]
    )
    assert_close(task(batch, None, 5)["ipi"], errors.min(0).values.mean())


def test_pip_may_train_the_decoder_too() -> None:
    task = objective(train_decoder=True)
    task(batch_of(task), drawn_of(task))["pip"].backward()
    assert task.model.decoder.density.grad.abs().max() > 0
    frozen = objective()
    losses = [one(batch_of(one), drawn_of(one))["pip"] for one in (task, frozen)]
    assert_close(*losses)


def test_a_step_of_pip_alone_needs_no_images() -> None:
    task = objective()
    task.eval()
    alone, both = task(None, drawn_of(task)), task(batch_of(task), drawn_of(task))
    assert set(alone) == {"pip"}
    assert_close(alone["pip"], both["pip"])


def test_matched_shifts_take_the_moments_of_those_the_encoder_finds() -> None:
    moments = ShiftMoments(2.0)
    generator = named_generator("tests/moments")
    drawn = 2.0 * torch.randn(20000, 2, generator=generator)
    assert_close(moments.match(drawn), drawn)
    mean, spread = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 0.8])
    for _ in range(600):
        moments.update(mean + spread * torch.randn(64, 2, generator=generator))
    matched = moments.match(drawn)
    assert_close(matched.mean(0), mean, atol=0.03, rtol=0)
    assert_close(matched.std(0), spread, atol=0.03, rtol=0)
    assert torch.equal(ShiftMoments(0.0).match(drawn), drawn)


def test_only_training_moves_the_moments_and_pip_renders_with_them() -> None:
    task = objective(shifts=ShiftMoments(1.0))
    drawn = drawn_of(task)
    batch = batch_of(task)
    task.eval()
    task(batch, drawn)
    assert task.shifts.mean.tolist() == [0.0, 0.0] and task.shifts.square.tolist() == [1.0, 1.0]
    halved = dataclasses.replace(drawn, shift_px=drawn.shift_px / 2)
    expected = task(batch, halved)["pip"]
    task.shifts.square.fill_(0.25)
    assert_close(task(batch, drawn)["pip"], expected)
    task.train()
    task(batch, None)
    assert task.shifts.square.max() < 0.25


def codes_of(task: Objective, batch: Batch) -> np.ndarray:
    return task.model.encoder(batch.coefficients, batch.ctf).codes.detach().double().numpy()


def test_contrast_is_the_mean_square_of_cosines_between_different_codes() -> None:
    codes = torch.randn(7, 5, generator=named_generator("tests/codes"))
    assert_close(pairwise_contrast(codes).item(), pairwise_contrast_loop(codes.numpy()), atol=1e-6, rtol=1e-5)
    assert_close(pairwise_contrast(3 * torch.eye(4)).item(), 0.0, atol=1e-6, rtol=0)
    # codes along one line, whichever way they point
    line = torch.tensor([[1.0], [-2.0], [3.0], [-4.0]]) * torch.ones(3)
    assert_close(pairwise_contrast(line).item(), 0.75)


def test_a_code_of_zeros_gives_a_finite_contrast_and_gradient() -> None:
    codes = torch.cat([torch.zeros(1, 5), torch.eye(5)[:3]]).requires_grad_()
    value = pairwise_contrast(codes)
    value.backward()
    assert_close(value.item(), 1 / 16)
    assert codes.grad is not None and codes.grad.abs().max() < 1e-6


def test_the_contrastive_term_is_that_of_the_images_alone() -> None:
    task = objective(contrastive=True)
    task.eval()
    batch = batch_of(task)
    expected = pairwise_contrast_loop(codes_of(task, batch))
    assert 0.05 < expected < 0.9
    assert_close(task(batch, None)["contrastive"].item(), expected, atol=1e-5, rtol=0)
    assert_close(task(batch, drawn_of(task))["contrastive"].item(), expected, atol=1e-5, rtol=0)
    assert "contrastive" not in task(None, drawn_of(task))
    assert "contrastive" not in objective()(batch, None)


def test_the_contrastive_term_is_taken_lane_by_lane_and_view_by_view() -> None:
    together, alone = objective(lanes=2, contrastive=True), objective(contrastive=True)
    together.eval(), alone.eval()
    first, second = batch_of(alone, seed=1), batch_of(alone, seed=2)
    parts = [pairwise_contrast_loop(codes_of(alone, batch)) for batch in (first, second)]
    both = Batch(torch.cat([first.coefficients, second.coefficients]), torch.cat([first.ctf, second.ctf]))
    assert_close(together(both, None)["contrastive"].item(), sum(parts) / 2, atol=1e-5, rtol=0)
    assert abs(alone(both, None)["contrastive"].item() - sum(parts) / 2) > 1e-3
    turned = half_turn(alone.model.disc.scatter(first.coefficients))
    around = Batch(alone.model.disc.gather(turned), first.ctf)
    expected = (parts[0] + pairwise_contrast_loop(codes_of(alone, around))) / 2
    found = alone(dataclasses.replace(first, views=SYMMETRIC), None)["contrastive"]
    assert_close(found.item(), expected, atol=1e-5, rtol=0)


def test_the_contrastive_term_teaches_the_features_and_not_the_heads() -> None:
    task = objective(contrastive=True)
    task(batch_of(task), None)["contrastive"].backward()
    encoder = task.model.encoder
    assert all(parameter.grad is not None for parameter in encoder.features.parameters())
    heads = [*encoder.rotation.parameters(), *encoder.shift.parameters(), task.model.decoder.density]
    assert all(parameter.grad is None for parameter in heads)
