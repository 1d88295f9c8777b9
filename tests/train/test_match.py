"""New particles against a finished map: the poses that made it are found again, whatever the portions."""

import pytest
import torch
from torch.testing import assert_close

from aceray.data.particles import ParticleStack
from aceray.em.ctf import CtfParameters, ctf_on_disc
from aceray.em.fourier import HalfDisc, shell_index
from aceray.em.projection import project_slice
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_sqfrob
from aceray.train.match import FinishedMap, Matcher, rounds_of_match
from aceray.train.predict import Particles, Poses, particles_from_stack
from aceray.train.refine import Level, Round
from tests.distributed.particles import PIXEL_SIZE, blobs

BOX, COUNT = 16, 60
ROUNDS = [Round(12, 3, 5.0, 1.0), Round(BOX, 3, 5.0, 0.05)]


def shifted(coefficients: torch.Tensor, shift_px: torch.Tensor, disc: HalfDisc) -> torch.Tensor:
    angle = -2 * torch.pi / disc.box * (shift_px @ disc.frequency.T)
    return coefficients * torch.complex(angle.cos(), angle.sin())


@pytest.fixture(scope="module")
def views() -> tuple[Particles, Poses, HalfDisc]:
    """Projections of blobs with CTF, shifts and a little noise, and their poses."""
    generator, disc = named_generator("tests/match", 1), HalfDisc(BOX)
    rotation, shift_px = random_rotations(COUNT, generator), torch.randn(COUNT, 2, generator=generator)
    values = (12000.0, 11000.0, 30.0, 0.0, 300.0, 2.7, 0.1)
    ctf = CtfParameters(*(torch.full((COUNT,), value) for value in values))
    clean = disc.gather(project_slice(blobs(), rotation)) * ctf_on_disc(ctf, disc, PIXEL_SIZE)
    images = disc.scatter(shifted(clean, shift_px, disc))
    images = images + 0.1 * images.std() * torch.randn(images.shape, generator=generator)
    stack = ParticleStack(images, ctf, torch.arange(COUNT))
    poses = Poses(torch.arange(COUNT), rotation, shift_px, torch.zeros(COUNT))
    return particles_from_stack(stack, disc, PIXEL_SIZE), poses, disc


def finished(views: tuple[Particles, Poses, HalfDisc], lost_energy: float = 1.0) -> FinishedMap:
    particles, _, disc = views
    inside = (shell_index(BOX, 3) < BOX // 2).float()
    spectrum = torch.fft.fftshift(torch.fft.fftn(blobs())) * inside
    volume = torch.fft.ifftn(torch.fft.ifftshift(spectrum)).real
    half_fsc = torch.cat([torch.ones(BOX // 2), torch.zeros(1)])
    return FinishedMap(volume, half_fsc, Level(particles, disc, BOX).power, 0.02, lost_energy, 1.0)


def start(poses: Poses, turned: bool) -> Poses:
    """Poses that know nothing of the rotations, or are a little off; the shifts are a pixel off."""
    generator = named_generator("tests/match", 2)
    far = random_rotations(COUNT, generator)
    near = poses.rotation @ torch.matrix_exp(torch.tensor([[0, 0.1, 0], [-0.1, 0, 0.05], [0, -0.05, 0]]))
    moved = poses.shift_px + torch.tensor([0.6, -0.4])
    return Poses(poses.particle_id, near if turned else far, moved, torch.ones(COUNT))


def test_a_search_finds_lost_poses_at_a_smaller_box_and_at_the_maps(views) -> None:
    """A wrong scale of the cropped map, or of the shifts between boxes, would leave them wrong."""
    particles, poses, disc = views
    found = Matcher(finished(views), disc, ROUNDS, BOX, seed=1)(particles, start(poses, turned=False))
    # the rest are views from behind, which differ little at so few frequencies
    assert float((rotation_sqfrob(found.rotation, poses.rotation) < 0.02).float().mean()) > 0.7
    close = rotation_sqfrob(found.rotation, poses.rotation) < 0.02
    assert float((found.shift_px - poses.shift_px)[close].abs().max()) < 0.25
    assert 0.1 < float(found.residual.median()) < 0.6  # most coefficients hold noise alone


def test_shifts_are_in_pixels_of_the_stored_images(views) -> None:
    """Images stored at twice the map's box: their shifts are twice as many pixels."""
    particles, poses, disc = views
    known = start(poses, turned=True)
    doubled = Poses(known.particle_id, known.rotation, 2 * known.shift_px, known.residual)
    found = Matcher(finished(views), disc, ROUNDS[1:], 2 * BOX, seed=1)(particles, doubled)
    assert float((found.shift_px - 2 * poses.shift_px).abs().median()) < 0.1


def test_every_image_is_treated_by_itself(views) -> None:
    particles, poses, disc = views
    matcher, begin = Matcher(finished(views), disc, ROUNDS, BOX, seed=1), start(poses, turned=False)
    whole = matcher(particles, begin)
    rows = torch.arange(7, 12)
    part = matcher(particles.take(rows), Poses(*(column[rows] for column in vars(begin).values())))
    assert_close(part.rotation, whole.rotation[rows], atol=1e-4, rtol=0)
    assert_close(part.shift_px, whole.shift_px[rows], atol=1e-3, rtol=0)
    assert part.particle_id.tolist() == rows.tolist()


@pytest.mark.parametrize(("lost_energy", "found_again"), [(0.2, True), (9.0, False)])
def test_late_rounds_search_what_is_explained_as_badly_as_the_worst(views, lost_energy, found_again) -> None:
    particles, poses, disc = views
    matcher = Matcher(finished(views, lost_energy), disc, ROUNDS[1:], BOX, seed=1)
    error = rotation_sqfrob(matcher(particles, start(poses, turned=False)).rotation, poses.rotation)
    assert (float((error < 0.02).float().mean()) > 0.7) == found_again


def test_rounds_of_a_finished_map() -> None:
    searched, registers = Round(32, 3, 8.0, 1.0), Round(32, 3, 8.0, registers=True)
    last = [Round(64, 3, 12.0, 0.05), Round(128, 3, 12.0, 0.05)]
    assert rounds_of_match([searched, registers, searched, searched, *last]) == [searched, *last]
