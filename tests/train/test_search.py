from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.ctf import ctf_on_disc
from aceray.em.formation import shift_phase
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector, rotation_sqfrob
from aceray.metrics.coverage import rotation_grid
from aceray.train.energy import Images, Matches, make_reference, refine_poses
from aceray.train.search import find_poses, make_bank, search_poses, shift_grid
from tests.references.search import energy
from tests.train.phantom import BOX, PIXEL_SIZE_ANGSTROM, chiral_volume, ctf_parameters

DISC = HalfDisc(BOX)


def imaged(count: int, noise: float = 0.0) -> tuple[Images, torch.Tensor, torch.Tensor]:
    """Images of the phantom with CTF, and their rotations and shifts."""
    generator = named_generator("tests/search")
    rotation, shift = random_rotations(count, generator), 0.8 * torch.randn(count, 2, generator=generator)
    transfer = ctf_on_disc(ctf_parameters(count), DISC, PIXEL_SIZE_ANGSTROM)
    clean = central_slice(padded_transform(chiral_volume()), rotation, DISC) * transfer * shift_phase(DISC, shift)
    noisy = clean + noise * torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    return Images(noisy, transfer), rotation, shift


def test_energy_of_search_and_refinement_is_the_sum_over_coefficients() -> None:
    images, _, _ = imaged(3, noise=0.2)
    reference = make_reference(chiral_volume(), DISC, 0.7, pad=4)
    rotations = random_rotations(4, named_generator("tests/search/bank"))
    offsets = torch.tensor([[0.0, 0.0], [1.5, -0.5], [-1.0, 2.0]])
    centre = torch.tensor([[0.3, -0.4], [0.0, 0.0], [-1.0, 0.7]])
    low = reference.within(5.0)
    found = search_poses(make_bank(low, rotations), images.at(low.index), centre, offsets, keep=4)
    refined = refine_poses(
        low, images.at(low.index), Matches(found.rotation[:, 0], found.shift_px[:, 0], found.energy[:, 0]), steps=0
    )
    frequency = DISC.frequency[low.index].double().numpy()
    assert len(frequency) == int((DISC.radius <= 5).sum())
    for image in range(3):
        expected = np.array(
            [
                [
                    energy(
                        chiral_volume().double().numpy(),
                        images.coefficients[image, low.index].to(torch.complex128).numpy(),
                        frequency,
                        images.transfer[image, low.index].double().numpy(),  # type: ignore[index]
                        rotation.double().numpy(),
                        (centre[image] + offset).double().numpy(),
                        0.7,
                    )
                    for offset in offsets
                ]
                for rotation in rotations
            ]
        )
        order = expected.min(1).argsort()
        np.testing.assert_allclose(found.energy[image], expected.min(1)[order], rtol=0.01)
        assert_close(found.rotation[image], rotations[order])
        assert_close(found.shift_px[image], centre[image] + offsets[expected.argmin(1)[order]])
        np.testing.assert_allclose(refined.energy[image], expected.min(), rtol=0.01)


def test_without_transfer_is_with_a_transfer_of_one() -> None:
    images, _, _ = imaged(5)
    reference = make_reference(chiral_volume(), DISC, None).within(5.0)
    bank = make_bank(reference, random_rotations(20, named_generator("tests/search/bank")))
    bare = Images(images.coefficients, None).at(reference.index)
    ones = Images(bare.coefficients, torch.ones_like(bare.coefficients.real))
    found = [search_poses(bank, each, torch.zeros(5, 2), shift_grid(1.0, 0.5), keep=3) for each in (bare, ones)]
    assert_close(found[0].energy, found[1].energy, rtol=1e-4, atol=1e-3)
    assert_close(found[0].rotation, found[1].rotation)


@pytest.mark.parametrize("moves", [True, False])
def test_refinement_finds_a_pose_nearby(moves: bool) -> None:
    images, rotation, shift = imaged(50)
    reference = make_reference(chiral_volume(), DISC, 1e-9 if moves else None)
    turn = torch.nn.functional.normalize(torch.randn(50, 3, generator=named_generator("tests/search/turn")), dim=-1)
    off = torch.tensor([0.5, -0.4]) if moves else torch.zeros(2)
    start = Matches(rotation_from_vector(0.12 * turn) @ rotation, shift + off, torch.zeros(50))
    refined = refine_poses(reference, images, start, steps=8)
    assert rotation_sqfrob(refined.rotation, rotation).quantile(0.9) < 1e-5
    assert (refined.shift_px - shift).norm(dim=-1).quantile(0.9) < 0.005
    if not moves:
        assert_close(refined.shift_px, shift)


def test_refinement_never_raises_the_energy() -> None:
    images, _, _ = imaged(50, noise=1.0)
    reference = make_reference(chiral_volume(), DISC, 1.0)
    generator = named_generator("tests/search/start")
    start = Matches(random_rotations(50, generator), torch.randn(50, 2, generator=generator), torch.zeros(50))
    energies = [refine_poses(reference, images, start, steps).energy for steps in range(6)]
    for before, after in pairwise(energies):
        assert bool((after <= before).all())
    refined = refine_poses(reference, images, start, 5)
    assert_close(refine_poses(reference, images, refined, 0).energy, refined.energy, rtol=1e-4, atol=0)


def test_a_strong_penalty_holds_the_shifts_at_the_origin() -> None:
    images, rotation, shift = imaged(20)
    start = Matches(rotation, shift, torch.zeros(20))
    refined = refine_poses(make_reference(chiral_volume(), DISC, 1e9), images, start, 3)
    assert float(refined.shift_px.abs().max()) < 1e-3


def test_an_empty_volume_is_no_accident() -> None:
    images, rotation, shift = imaged(3)
    refined = refine_poses(
        make_reference(torch.zeros(BOX, BOX, BOX), DISC, None), images, Matches(rotation, shift, torch.zeros(3)), 2
    )
    assert bool(refined.energy.isfinite().all())


def test_poses_are_found_from_nothing_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images, rotation, shift = imaged(60, noise=0.02)
    reference = make_reference(chiral_volume(), DISC, 1e-4)
    grid = rotation_grid(2, 24) @ random_rotations(1, named_generator("tests/search/turn"))[0]
    bank = make_bank(reference.within(5.0), grid)
    monkeypatch.setattr("aceray.train.search._ENERGIES_AT_ONCE", 25 * len(grid))
    parts = list(find_poses(reference, bank, images, torch.zeros(60, 2), shift_grid(2.4, 0.8)))
    assert [len(part.energy) for part in parts] == [25, 25, 10]
    found = Matches.concatenate(parts)
    error = rotation_sqfrob(found.rotation, rotation)
    assert float((error < 0.01).float().mean()) > 0.9
    assert float((found.shift_px - shift).norm(dim=-1).median()) < 0.1


def test_grid_of_shifts() -> None:
    assert shift_grid(0.0, 0.5).tolist() == [[0.0, 0.0]]
    grid = shift_grid(1.0, 0.5)
    assert len(grid) == 13 and [0.5, -0.5] in grid.tolist() and [1.0, 0.5] not in grid.tolist()
