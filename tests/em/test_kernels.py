"""The compiled loops against sums over nodes in float64, and their slopes against differences of their own values."""

import numpy as np
import pytest
import torch

from aceray.em import kernels
from aceray.em.fourier import HalfDisc
from aceray.em.kernels import Grid, Model, Views, insert_slices, normal_equations, sample_slices
from aceray.em.projection import padded_transform, sample_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector

BOX, COUNT, IMAGES = 16, 12, 5
DISC = HalfDisc(BOX)
GRID = Grid(BOX, DISC.frequency.numpy())


def transform(smooth: bool = False) -> np.ndarray:
    generator = named_generator("test/kernels/volume")
    volume = torch.randn(BOX, BOX, BOX, generator=generator)
    if smooth:
        axis = torch.arange(BOX) - BOX // 2
        volume = volume * torch.exp(-(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) / 8)
    return torch.complex(*padded_transform(volume, 4 if smooth else 2)).numpy()


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and transfer of five images; whose each of twelve poses is, rotations and shifts."""
    generator = named_generator("test/kernels")
    images = torch.randn(IMAGES, len(DISC), dtype=torch.complex64, generator=generator)
    contrast = torch.randn(IMAGES, len(DISC), generator=generator)
    of = torch.arange(COUNT) % IMAGES
    return images, contrast, of, random_rotations(COUNT, generator), 3 * torch.randn(COUNT, 2, generator=generator)


def model(volume: np.ndarray, rotation: torch.Tensor, shift: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, contrast, of, _, _ = drawn()
    found = np.empty(COUNT, np.float32), np.empty((COUNT, 5), np.float32), np.empty((COUNT, 5, 5), np.float32)
    weight = (DISC.weight * (1 + DISC.radius)).numpy()
    views = Views(images.numpy(), contrast.numpy(), of.numpy())
    normal_equations(
        volume, GRID, weight, views, rotation.contiguous().numpy(), shift.contiguous().numpy(), Model(*found)
    )
    return found


def test_slices_are_those_of_the_tensor_code() -> None:
    volume, rotation = transform(), drawn()[3]
    slices = np.empty((COUNT, len(DISC)), np.complex64)
    sample_slices(volume, GRID, rotation.numpy(), slices)
    stacked = torch.stack([torch.from_numpy(volume.real.copy()), torch.from_numpy(volume.imag.copy())])
    expected = sample_transform(stacked, DISC.frequency @ rotation[:, :2], BOX)
    np.testing.assert_allclose(slices, expected.numpy(), atol=2e-5 * float(expected.abs().max()))


def test_slices_at_the_edges_of_the_transform() -> None:
    """Axes of the grid, both ends of every one, where the last node has no next one."""
    volume = transform()
    turns = rotation_from_vector(torch.tensor([[0.0, 0, 0], [0, np.pi / 2, 0], [np.pi / 2, 0, 0], [0, np.pi, 0]]))
    edge = torch.tensor([[BOX / 2, 0.0], [0.0, BOX / 2], [0.0, -BOX / 2], [-BOX / 2, 0.0]])
    slices = np.empty((4, 4), np.complex64)
    sample_slices(volume, Grid(BOX, edge.numpy()), turns.numpy(), slices)
    stacked = torch.stack([torch.from_numpy(volume.real.copy()), torch.from_numpy(volume.imag.copy())])
    expected = sample_transform(stacked, edge @ turns[:, :2], BOX)
    np.testing.assert_allclose(slices, expected.numpy(), atol=1e-4 * float(np.abs(volume).max()))


def test_energy_is_the_weighted_distance_of_slice_and_image() -> None:
    volume = transform()
    images, contrast, of, rotation, shift = drawn()
    slices = np.empty((COUNT, len(DISC)), np.complex64)
    sample_slices(volume, GRID, rotation.numpy(), slices)
    angle = -2 * np.pi / BOX * (shift.double() @ DISC.frequency.T.double()).numpy()
    rendered = contrast[of].numpy() * slices * np.exp(1j * angle)
    weight = (DISC.weight * (1 + DISC.radius)).double().numpy()
    expected = (weight * np.abs(rendered - images[of].numpy()) ** 2).sum(1)
    np.testing.assert_allclose(model(volume, rotation, shift)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("parameter", range(5), ids=["turn x", "turn y", "turn z", "shift x", "shift y"])
def test_gradient_is_minus_half_the_slope_of_the_energy(parameter: int) -> None:
    volume = transform(smooth=True)
    _, _, _, rotation, shift = drawn()
    step = torch.zeros(COUNT, 5)
    step[:, parameter] = 2e-3
    energies = [
        model(volume, rotation_from_vector(sign * step[:, :3]) @ rotation, shift + sign * step[:, 3:])[0].astype(float)
        for sign in (1, -1)
    ]
    slope = (energies[0] - energies[1]) / 4e-3
    gradient = model(volume, rotation, shift)[1][:, parameter]
    # trilinear interpolation has kinks at the nodes' planes, across which a difference averages
    np.testing.assert_allclose(gradient, -slope / 2, atol=0.05 * np.abs(slope).max())
    assert np.corrcoef(gradient, -slope)[0, 1] > 0.995


def test_normal_matrix_is_the_gauss_newton_curvature() -> None:
    """On its own slice the energy of a pose is zero and grows as d^T (J^T W J) d."""
    volume = transform(smooth=True)
    *_, rotation, shift = drawn()
    slices = np.empty((COUNT, len(DISC)), np.complex64)
    sample_slices(volume, GRID, rotation.numpy(), slices)
    angle = -2 * np.pi / BOX * (shift @ DISC.frequency.T).numpy()
    perfect = (slices * np.exp(1j * angle)).astype(np.complex64)
    views = Views(perfect, np.empty((0, len(DISC)), np.float32), np.arange(COUNT))
    fixed = (volume, GRID, DISC.weight.numpy(), views)

    def at(r: torch.Tensor, t: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        found = np.empty(COUNT, np.float32), np.empty((COUNT, 5), np.float32), np.empty((COUNT, 5, 5), np.float32)
        normal_equations(*fixed, r.contiguous().numpy(), t.contiguous().numpy(), Model(*found))
        return found[0], found[2]

    step = 0.01 * torch.randn(COUNT, 5, generator=named_generator("test/kernels/step"))
    moved, _ = at(rotation_from_vector(step[:, :3]) @ rotation, shift + step[:, 3:])
    still, normal = at(rotation, shift)
    np.testing.assert_allclose(still, 0, atol=1e-6 * moved.max())
    expected = np.einsum("na,nab,nb->n", step.numpy(), normal, step.numpy())
    np.testing.assert_allclose(moved, expected, rtol=0.15)
    np.testing.assert_array_equal(normal, normal.transpose(0, 2, 1))


@pytest.mark.parametrize("modulated", [True, False])
def test_insertion_is_the_adjoint_of_slicing(modulated: bool) -> None:
    images, contrast, of, rotation, shift = drawn()
    volume = transform()
    numerator, denominator = np.zeros_like(volume), np.zeros(volume.shape, np.float32)
    transfer = contrast if modulated else torch.empty(0, len(DISC))
    views = Views(images.numpy(), transfer.numpy(), of.numpy())
    insert_slices(numerator, denominator, GRID, views, rotation.numpy(), shift.numpy())
    slices = np.empty((COUNT, len(DISC)), np.complex64)
    sample_slices(volume, GRID, rotation.numpy(), slices)
    angle = 2 * np.pi / BOX * (shift @ DISC.frequency.T).numpy()
    factor = contrast[of].numpy() if modulated else np.ones((COUNT, len(DISC)))
    centred = factor * images[of].numpy() * np.exp(1j * angle)
    # <slices(V), F> = <V, insert(F)> as real numbers
    left, right = (slices.conj() * centred).sum().real, (volume.conj() * numerator).sum().real
    assert left == pytest.approx(right, rel=1e-3)
    assert denominator.sum() == pytest.approx((factor**2).sum(), rel=1e-4)
    assert denominator.min() >= 0


def test_many_frequencies_of_a_large_transform_are_the_sum_of_their_parts() -> None:
    """More than are worked on at once, in a transform that is fetched before."""
    disc, generator = HalfDisc(40), named_generator("test/kernels/large")
    volume = torch.complex(*padded_transform(torch.randn(40, 40, 40, generator=generator), 4)).numpy()
    assert volume.size > kernels._CACHED_NODES and len(disc) > 2 * kernels._AT_ONCE
    images = torch.randn(COUNT, len(disc), dtype=torch.complex64, generator=generator).numpy()
    contrast, frequency = torch.randn(COUNT, len(disc), generator=generator).numpy(), disc.frequency.numpy()
    poses = random_rotations(COUNT, generator).numpy(), torch.randn(COUNT, 2, generator=generator).numpy()

    def found(part: slice) -> list[np.ndarray]:
        views = Views(images[:, part].copy(), contrast[:, part].copy(), np.arange(COUNT))
        grid, weight = Grid(40, frequency[part]), disc.weight.numpy()[part]
        model = Model(*(np.empty((COUNT, *shape), np.float32) for shape in ((), (5,), (5, 5))))
        normal_equations(volume, grid, weight, views, *poses, model)
        numerator, denominator = np.zeros_like(volume), np.zeros(volume.shape, np.float32)
        insert_slices(numerator, denominator, grid, views, *poses)
        return [*model, numerator, denominator]

    parts = [found(slice(start, start + 100)) for start in range(0, len(disc), 100)]
    for whole, *pieces in zip(found(slice(None)), *parts, strict=True):
        np.testing.assert_allclose(whole, sum(pieces), atol=1e-5 * np.abs(whole).max())
