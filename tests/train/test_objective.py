"""Losses against slow twins that work on images, and what each loss may teach."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.train.objective import LOSER_WEIGHT, Batch, DrawnPoses, Objective
from tests.train.phantom import autoencoder, projections

COUNT = 6


def objective(heads: int = 1, symmetric: bool = False, lanes: int = 1, train_shift: bool = True) -> Objective:
    return Objective(
        autoencoder(heads),
        symmetric=symmetric,
        shift_spread_px=1.0,
        shift_weight=0.2,
        train_shift=train_shift,
        lanes=lanes,
    )


def batch_of(task: Objective, count: int = COUNT, seed: int = 1) -> Batch:
    particles, _, _ = projections(count, seed=seed)
    return Batch(particles.coefficients, particles.transfer(torch.arange(count), task.model.disc))


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
    task = objective(symmetric=True)
    task.eval()
    batch = batch_of(task)
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
    task = objective(symmetric=True, heads=2)
    task.eval()
    batch = batch_of(task)
    turned = task.model.disc.gather(half_turn(task.model.disc.scatter(batch.coefficients)))
    assert_close(task(Batch(turned, batch.ctf), None)["ipi"], task(batch, None)["ipi"], atol=1e-5, rtol=1e-5)
