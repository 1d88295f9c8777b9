"""Near-symmetries: found where there is one, not found where there is none, registers solved from random ones."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector, rotation_sqfrob
from aceray.train.energy import Images, Reference, make_reference
from aceray.train.reconstruct import Maps, Reconstruction
from aceray.train.symmetry import (
    REGISTER_RADIUS,
    Evidence,
    _decided,
    _shares,
    correlation_by_angle,
    cyclic_group,
    find_near_symmetry,
    least_correlation,
    rotation_angle_deg,
    self_correlation,
    solve_registers,
)
from tests.train.phantom import chiral_volume

BOX = 24
AXIS = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.8]), dim=0)


def turns(order: int) -> torch.Tensor:
    return rotation_from_vector(2 * math.pi / order * torch.arange(order)[:, None] * AXIS)


def cloud(order: int, odd: float) -> torch.Tensor:
    """Blobs with an n-fold axis through the centre, one set of which weighs more by a share `odd`."""
    generator = named_generator("tests/symmetry", order)
    centres = 0.25 * BOX * torch.nn.functional.normalize(torch.randn(6, 3, generator=generator), dim=-1)
    axis = (torch.arange(BOX) - BOX // 2).float()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], dim=-1)
    volume = torch.zeros(BOX, BOX, BOX)
    for number, turn in enumerate(turns(order)):
        for height, centre in enumerate(centres):
            weight = (1 + odd if number == 0 and height < 2 else 1.0) * (1 + 0.2 * height)
            volume += weight * torch.exp(-(points - turn @ centre).square().sum(-1) / 4)
    return volume


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_near_symmetry_is_found_with_its_axis(order: int) -> None:
    found = find_near_symmetry(cloud(order, odd=0.3), 0.7)
    assert found is not None and found.order == order
    assert found.correlation > 0.9
    step = found.rotations[1]
    nearest = min(float(rotation_sqfrob(step, turn)) for turn in (turns(order)[1], turns(order)[1].T))
    assert nearest < 0.01
    torch.testing.assert_close(found.rotations[0], torch.eye(3), atol=1e-5, rtol=0)


def test_none_is_found_where_there_is_none() -> None:
    assert find_near_symmetry(chiral_volume(BOX), 0.65) is None


@pytest.mark.parametrize(("order", "counts"), [(2, False), (3, True)])
def test_two_fold_needs_more(order: int, counts: bool) -> None:
    volume = cloud(order, odd=0.3)
    found = find_near_symmetry(volume, 0.5)
    assert found is not None and found.order == order
    assert least_correlation(order, 0.5) == pytest.approx(0.5 if counts else 0.64)
    just_below = found.correlation - 0.05
    assert (find_near_symmetry(volume, just_below) is not None) is counts


def test_correlation_with_itself_is_one_and_falls_with_the_turn() -> None:
    correlation = self_correlation(chiral_volume(BOX))
    vectors = torch.tensor([0.0, 0.2, 0.6])[:, None] * AXIS
    values = correlation(rotation_from_vector(vectors)).tolist()
    assert values[0] == pytest.approx(1, abs=1e-4)
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize(
    ("degrees", "order"), [(180, 2), (-120, 3), (124, 3), (90, 4), (72, 5), (60, 6), (100, None), (45, None)]
)
def test_groups_of_angles(degrees: float, order: int | None) -> None:
    group = cyclic_group(rotation_from_vector(math.radians(degrees) * AXIS))
    assert (None if group is None else len(group)) == order
    if group is not None:
        closed = group[-1] @ group[1]
        torch.testing.assert_close(closed, torch.eye(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(group[1] @ AXIS, AXIS, atol=1e-4, rtol=0)


def evidence(images: Images, disc: HalfDisc) -> Evidence:
    """Unshifted images, each shell weighted by its power."""
    power = torch.zeros(BOX).index_add_(0, disc.shell, images.coefficients.abs().square().mean(0))
    weight = disc.weight / (power / torch.bincount(disc.shell, minlength=BOX).clamp_min(1))[disc.shell]

    def chunks() -> Iterator[tuple[torch.Tensor, Images]]:
        for rows in torch.arange(len(images)).split(200):
            yield rows, images.take(rows)

    def reference(maps: Maps) -> Reference:
        return make_reference(maps.joint, disc, None, weight)

    return Evidence(chunks, torch.zeros(len(images), 2), [partial(Reconstruction, disc, torch.ones_like)], reference)


def solved_share() -> float:
    """Share of noisy images whose registers are found but for a turn of all."""
    count, order = 500, 3
    disc, generator = HalfDisc(BOX), named_generator("tests/symmetry/registers")
    rotation = random_rotations(count, generator)
    clean = central_slice(padded_transform(cloud(order, odd=1.5)), rotation, disc)
    noisy = clean + 0.2 * clean.abs().square().mean().sqrt() * torch.randn(
        clean.shape, dtype=clean.dtype, generator=generator
    )
    images, group = Images(noisy, None), turns(order)
    lost = torch.randint(order, (count,), generator=generator)
    coarse = HalfDisc(BOX, REGISTER_RADIUS)
    inner = images.at((disc.radius <= REGISTER_RADIUS).nonzero()[:, 0])
    register = solve_registers(evidence(inner, coarse), evidence(images, disc), rotation @ group[lost], group, 3)
    return float(torch.bincount((lost + register) % order, minlength=order).max()) / count


def test_registers_are_solved_together_up_to_a_common_turn() -> None:
    assert solved_share() > 0.95


def test_registers_that_are_found_see_all_frequencies_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def noted(energies: torch.Tensor, coefficients: int, temperature: float) -> tuple[float, torch.Tensor]:
        compared.append(coefficients)
        return _shares(energies, coefficients, temperature)

    monkeypatch.setattr("aceray.train.symmetry._shares", noted)
    solved_share()
    disc = HalfDisc(BOX)
    low = 2 * int((disc.radius <= 8).sum())
    assert compared[-11] == low and compared[-1] == 2 * len(disc) > low
    assert sorted(compared[-11:]) == compared[-11:]


def test_registers_are_decided_once_nothing_falls_and_they_have_parted() -> None:
    parted, alike = torch.eye(3).repeat(4, 1), torch.full((12, 3), 1 / 3)
    assert _decided((1.0, parted.roll(1, 1)), (1.0, parted))
    assert _decided((1.1, parted), (1.0, parted))
    assert not _decided((1.1, parted.roll(1, 1)), (1.0, parted))
    assert not _decided((1.0, alike), (1.0, alike))


def test_the_angle_of_a_near_symmetry_stands_out() -> None:
    angle, highest = correlation_by_angle(cloud(3, odd=0.3))
    assert angle[0] < 20 and angle[-1] > 176 and (angle.diff() > 0).all()
    at = {degrees: float(highest[(angle - degrees).abs().argmin()]) for degrees in (90, 120, 150)}
    assert at[120] > at[90] + 0.1 and at[120] > at[150] + 0.1
    torch.testing.assert_close(rotation_angle_deg(turns(3)), torch.tensor([0.0, 120.0, 120.0]), atol=0.05, rtol=0)
