"""The voxel decoder: what its slices are projections of."""

import torch

from aceray.em.fourier import HalfDisc
from aceray.em.projection import project_real
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.models.voxel import VoxelDecoder
from tests.train.phantom import BOX, chiral_volume


def test_slices_are_projections_of_the_masked_density() -> None:
    disc = HalfDisc(2 * BOX)
    decoder = VoxelDecoder(disc, 2)
    with torch.no_grad():
        decoder.density.copy_(chiral_volume(2 * BOX))
    rotation = random_rotations(4, named_generator("tests/voxel"))
    images = disc.scatter(decoder.slices(decoder.transform(), rotation)).detach()
    expected = project_real(decoder.volume().detach(), rotation)
    # both interpolate: they agree to a few per cent of the largest pixel on this smooth volume
    assert (images - expected).abs().max() < 0.06 * expected.abs().max()


def test_it_starts_from_nothing_and_the_corners_of_the_box_stay_empty() -> None:
    decoder = VoxelDecoder(HalfDisc(BOX), 2)
    assert not decoder.volume().any()
    with torch.no_grad():
        decoder.density.fill_(1.0)
    volume = decoder.volume()
    assert volume[0, 0, 0] == 0
    assert volume[BOX // 2, BOX // 2, BOX // 2] == 1
