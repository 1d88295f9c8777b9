import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.ctf import CtfParameters, ctf_on_disc
from aceray.em.dihedral import (
    ELEMENTS,
    HALF_TURN,
    coefficient_tables,
    element_rotations,
    pixel_tables,
    transform_coefficients,
    transform_ctf,
    transform_images,
)
from aceray.em.formation import shift_phase
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from tests.references.projection import blob_volume

PIXEL_SIZE_ANGSTROM = 4.0
SHIFT_PX = torch.tensor([1.3, -2.1])


def phantom_transform(box: int) -> torch.Tensor:
    centre = np.array([[3.0, 0.0, -1.0], [0.0, 2.5, 2.0], [-2.0, -1.0, 3.0], [1.0, -3.0, -2.0]])
    return padded_transform(torch.from_numpy(blob_volume(centre, np.array([1.0, 0.8, 0.6, 1.3]), 1.0, box)).float())


def astigmatic(count: int) -> CtfParameters:
    values = (21_000.0, 15_000.0, 35.0, 20.0, 300.0, 2.7, 0.1)
    return CtfParameters(*(torch.full((count,), value) for value in values))


def image_coefficients(box: int, rotation: torch.Tensor, shift_px: torch.Tensor, ctf: CtfParameters) -> torch.Tensor:
    disc = HalfDisc(box)
    modulation = shift_phase(disc, shift_px) * ctf_on_disc(ctf, disc, PIXEL_SIZE_ANGSTROM)
    return central_slice(phantom_transform(box), rotation, disc) * modulation


def test_they_are_eight_rotations_closed_under_composition() -> None:
    group = element_rotations()
    assert len({tuple(g.flatten().tolist()) for g in group.round()}) == ELEMENTS
    assert_close(torch.linalg.det(group), torch.ones(8))
    products = (group[:, None] @ group[None]).reshape(-1, 3, 3)
    nearest = (products[:, None] - group[None]).abs().sum(dim=(2, 3)).amin(dim=1)
    assert nearest.max() == 0


def test_elements_are_mirror_then_quarter_turns() -> None:
    x_axis = element_rotations()[:, :2, 0]
    expected = [[1, 0], [0, 1], [-1, 0], [0, -1], [-1, 0], [0, -1], [1, 0], [0, 1]]
    assert x_axis.tolist() == [[float(v) for v in row] for row in expected]


def test_on_pixels_they_are_flips_and_transposes() -> None:
    image = torch.randn(9, 9, generator=named_generator("test/dihedral"))
    found = transform_images(image.expand(8, 9, 9), torch.arange(8), pixel_tables(9))
    assert torch.equal(found[0], image)
    # x -> y: the row of pixels along x becomes the column along y
    assert torch.equal(found[1], image.flip(0).T)
    assert torch.equal(found[HALF_TURN], image.flip(0, 1))
    assert torch.equal(found[4], image.flip(1))


@pytest.mark.parametrize("box", [20, 21])
def test_flip_and_roll_equals_the_pose_turned_by_pi(box: int) -> None:
    disc = HalfDisc(box)
    rotation = random_rotations(5, named_generator("test/dihedral"))
    shift = SHIFT_PX.expand(5, 2)
    transform = phantom_transform(box)
    image = disc.scatter(central_slice(transform, rotation, disc) * shift_phase(disc, shift))
    turned_pose = torch.diag(torch.tensor([-1.0, -1.0, 1.0])) @ rotation
    expected = disc.scatter(central_slice(transform, turned_pose, disc) * shift_phase(disc, -shift))
    turned = image.flip(-2, -1)
    if box % 2 == 0:
        turned = turned.roll((1, 1), dims=(-2, -1))
    assert_close(turned, expected, atol=1e-6 * expected.abs().max().item(), rtol=0)
    by_table = transform_images(image, torch.full((5,), HALF_TURN), pixel_tables(box))
    assert_close(by_table, turned, atol=0, rtol=0)
    assert_close(element_rotations()[HALF_TURN], torch.diag(torch.tensor([-1.0, -1.0, 1.0])))


@pytest.mark.parametrize("box", [20, 21])
@pytest.mark.parametrize("element", range(ELEMENTS))
def test_an_image_moves_with_its_pose_its_shift_and_its_astigmatic_ctf(box: int, element: int) -> None:
    disc = HalfDisc(box)
    rotation = random_rotations(4, named_generator("test/dihedral"))
    shift, ctf, elements = SHIFT_PX.expand(4, 2), astigmatic(4), torch.full((4,), element)
    group = element_rotations()[elements]
    image = image_coefficients(box, rotation, shift, ctf)
    moved_shift = (group[:, :2, :2] @ shift[..., None])[..., 0]
    expected = image_coefficients(box, group @ rotation, moved_shift, transform_ctf(ctf, elements))
    found = transform_images(disc.scatter(image), elements, pixel_tables(box))
    scale = expected.abs().max().item()
    assert_close(disc.gather(found), expected, atol=1e-5 * scale, rtol=0)
    coefficients = transform_coefficients(image, elements, coefficient_tables(disc))
    assert_close(coefficients, expected, atol=1e-5 * scale, rtol=0)
    if element in (1, 3, 4, 6):
        # the test would see an astigmatism that was left behind
        left_behind = image_coefficients(box, group @ rotation, moved_shift, ctf)
        assert (left_behind - expected).abs().max() > 0.1 * scale


def test_astigmatism_stays_within_half_a_turn() -> None:
    moved = transform_ctf(astigmatic(8), torch.arange(8))
    assert moved.astigmatism_deg.tolist() == [35.0, 125.0, 35.0, 125.0, 145.0, 55.0, 145.0, 55.0]
    assert torch.equal(moved.defocus_u_angstrom, astigmatic(8).defocus_u_angstrom)


def test_batch_of_mixed_elements_equals_loop() -> None:
    images = torch.randn(6, 10, 10, generator=named_generator("test/dihedral"))
    element = torch.tensor([3, 0, 7, 5, 2, 6])
    tables = pixel_tables(10)
    together = transform_images(images, element, tables)
    for index in range(6):
        assert torch.equal(together[index], transform_images(images[index, None], element[index, None], tables)[0])
