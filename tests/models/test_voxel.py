"""The voxel decoders: what their projections are projections of, and what a step of the optimiser means."""

import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc
from aceray.em.projection import project_real
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.models import voxel
from aceray.models.voxel import RotatedVoxelDecoder, VoxelDecoder, soft_sphere
from tests.references.projection import blob_volume
from tests.train.phantom import BOX, chiral_volume


def rotations(count: int) -> torch.Tensor:
    return random_rotations(count, named_generator("tests/voxel"))


def test_slices_are_projections_of_the_masked_density() -> None:
    disc = HalfDisc(2 * BOX)
    decoder = VoxelDecoder(disc, 2)
    with torch.no_grad():
        decoder.density.copy_(chiral_volume(2 * BOX))
    rotation = rotations(4)
    images = disc.scatter(decoder.slices(decoder.transform(), rotation)).detach()
    expected = project_real(decoder.volume().detach(), rotation)
    # both interpolate: they agree to a few per cent of the largest pixel on this smooth volume
    assert (images - expected).abs().max() < 0.06 * expected.abs().max()


def test_the_two_projectors_agree_on_a_band_limited_volume() -> None:
    disc, generator = HalfDisc(32), named_generator("tests/voxel/blobs")
    centres = 2.5 * torch.randn(20, 3, generator=generator)
    # blobs of sigma 2.5 px have less than a thousandth of their amplitude left at half of Nyquist
    density = torch.from_numpy(
        blob_volume(centres.double().numpy(), torch.rand(20, generator=generator).double().numpy(), 2.5, 32)
    )
    upstream = torch.view_as_complex(torch.randn(6, len(disc), 2, generator=generator))
    upstream = upstream * torch.exp(-((disc.radius / 2.5) ** 2))
    results = []
    for kind in (VoxelDecoder, RotatedVoxelDecoder):
        decoder = kind(disc, 2, scale=0.5)
        with torch.no_grad():
            decoder.density.copy_(2 * density)
        slices = decoder.slices(decoder.transform(), rotations(6))
        (slices * upstream.conj()).real.sum().backward()
        assert decoder.density.grad is not None
        # towards the edge of the box interpolation in the transform loses accuracy
        results.append((slices.detach(), decoder.density.grad * soft_sphere(32, 10.0)))
    (slices, gradient), (rotated, rotated_gradient) = results
    assert float((slices - rotated).norm() / slices.norm()) < 0.02
    # scattering to the eight nearest voxels is grainy where scattering into a padded transform is smooth
    assert float((gradient - rotated_gradient).norm() / gradient.norm()) < 0.08


def test_rotated_grids_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = RotatedVoxelDecoder(HalfDisc(BOX))
    with torch.no_grad():
        decoder.density.copy_(chiral_volume())
    rotation = rotations(6).reshape(3, 2, 3, 3)
    together = decoder.slices(decoder.transform(), rotation)
    monkeypatch.setattr(voxel, "_GRID_VOXELS", 2 * BOX**3)
    assert together.shape == (3, 2, len(decoder.disc))
    assert_close(decoder.slices(decoder.transform(), rotation), together)


def test_it_starts_from_nothing_and_the_corners_of_the_box_stay_empty() -> None:
    decoder = VoxelDecoder(HalfDisc(BOX), 2)
    assert not decoder.volume().any()
    with torch.no_grad():
        decoder.density.fill_(1.0)
    volume = decoder.volume()
    assert volume[0, 0, 0] == 0
    assert volume[BOX // 2, BOX // 2, BOX // 2] == 1


def test_scale_and_radius_of_the_sphere() -> None:
    decoder = VoxelDecoder(HalfDisc(BOX), scale=0.25, mask_radius=0.25)
    with torch.no_grad():
        decoder.density.fill_(1.0)
    along_x = decoder.volume()[BOX // 2, BOX // 2, BOX // 2 :]
    assert_close(along_x, 0.25 * torch.tensor([1, 1, 1, 0.5, 0, 0, 0, 0]))


def test_a_learning_rate_moves_the_volume_by_that_times_the_scale() -> None:
    # what makes the paper's learning rate of 1.0 an ordinary one
    disc, rotation = HalfDisc(BOX), rotations(4)
    images = torch.view_as_complex(torch.randn(4, len(disc), 2, generator=named_generator("tests/voxel/noise")))
    volumes = []
    for scale, rate in ((0.02, 1.0), (1.0, 0.02)):
        decoder = VoxelDecoder(disc, scale=scale)
        optimiser = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=0.0)
        for _ in range(3):
            optimiser.zero_grad()
            disc.energy(decoder.slices(decoder.transform(), rotation) - images).mean().backward()
            optimiser.step()
        volumes.append(decoder.volume().detach())
    assert float(volumes[0].abs().max()) == pytest.approx(0.06, rel=0.05)
    assert float((volumes[0] - volumes[1]).norm() / volumes[1].norm()) < 0.01


def test_negative_voxels_are_cut_and_can_rise_again() -> None:
    decoder = VoxelDecoder(HalfDisc(BOX))
    with torch.no_grad():
        decoder.density.copy_(torch.randn(BOX, BOX, BOX, generator=named_generator("tests/voxel/clamp")))
    decoder.clamp_negative()
    assert decoder.density.min() == 0 and 0.4 < (decoder.density > 0).float().mean() < 0.6
    decoder.volume().sum().backward()
    assert decoder.density.grad is not None and decoder.density.grad[decoder.density == 0].max() == 1
