import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.backprojection import BackProjection
from aceray.em.ctf import CtfParameters, ctf_on_disc
from aceray.em.formation import shift_phase
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from tests.references.backprojection import back_project, shell_correlation
from tests.references.projection import blob_volume


def phantom(box: int) -> torch.Tensor:
    """Chiral cloud of blobs of 1 px, all within a fifth of the box around the centre."""
    generator = np.random.default_rng(5)
    direction = generator.normal(size=(30, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    centre = direction * 0.2 * box * generator.random((30, 1)) ** (1 / 3)
    return torch.from_numpy(blob_volume(centre, generator.random(30), 1.0, box)).float()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=named_generator("test/backprojection", *shape))


@pytest.mark.parametrize("pad", [1, 2])
def test_against_loops_over_all_nodes(pad: int) -> None:
    box, count = 6, 4
    disc = HalfDisc(box)
    images, ctf = disc.gather(noise(count, box, box)), noise(count, len(disc))
    rotation = random_rotations(count, named_generator("test/backprojection"))
    inverse_ssnr = torch.tensor([0.5, 1.0, 2.0, 4.0])
    expected = back_project(
        images.numpy(), disc.frequency.numpy(), rotation.double().numpy(), ctf.numpy(), inverse_ssnr.numpy(), box, pad
    )
    accumulator = BackProjection(disc, pad)
    accumulator.insert(images, rotation, ctf)
    assert_close(accumulator.volume(inverse_ssnr).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def with_ctf(disc: HalfDisc, count: int) -> torch.Tensor:
    generator = named_generator("test/ctf", count)
    defocus = 10_000 + 15_000 * torch.rand(count, generator=generator)
    constants = [torch.full((count,), value) for value in (30.0, 0.0, 300.0, 2.7, 0.1)]
    return ctf_on_disc(CtfParameters(defocus + 500, defocus - 500, *constants), disc, 8.0)


@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "ctf"])
@pytest.mark.parametrize("box", [24, 25])
def test_true_poses_give_the_volume_back_up_to_nyquist(box: int, modulated: bool) -> None:
    count, disc, volume = 1_500, HalfDisc(box), phantom(box)
    rotation = random_rotations(count, named_generator("test/backprojection"))
    ctf = with_ctf(disc, count) if modulated else None
    images = central_slice(padded_transform(volume, 3), rotation, disc)
    accumulator = BackProjection(disc)
    accumulator.insert(images if ctf is None else images * ctf, rotation, ctf)
    found = accumulator.volume(torch.full((box // 2 + 1,), 1e-3))
    correlation = shell_correlation(found.numpy(), volume.numpy())
    # half of Nyquist's own shell lies beyond the disc; it is known from the neighbours alone
    assert correlation[:-1].min() >= 0.995
    assert correlation[-1] >= 0.95
    # scale and hand as well, to which a shell correlation is blind
    assert (found - volume).norm() / volume.norm() < 0.03
    mirrored = volume[:, :, 1:].flip(2)
    assert (found[:, :, 1:] - mirrored).norm() / volume.norm() > 0.5


def test_a_ctf_left_out_is_noticed() -> None:
    box, count = 16, 400
    disc, volume = HalfDisc(box), phantom(box)
    rotation = random_rotations(count, named_generator("test/backprojection"))
    accumulator = BackProjection(disc)
    accumulator.insert(central_slice(padded_transform(volume), rotation, disc) * with_ctf(disc, count), rotation, None)
    assert shell_correlation(accumulator.volume(torch.full((9,), 1e-3)).numpy(), volume.numpy()).min() < 0.9


def test_accumulators_of_parts_add_up_to_the_whole() -> None:
    disc = HalfDisc(12)
    images, ctf = disc.gather(noise(30, 12, 12)), noise(30, len(disc))
    rotation = random_rotations(30, named_generator("test/backprojection"))
    whole, parts = BackProjection(disc), BackProjection(disc)
    whole.insert(images, rotation, ctf)
    for part in range(30):
        parts.insert(images[part, None], rotation[part, None], ctf[part, None])
    assert_close(parts.numerator, whole.numerator, atol=1e-4, rtol=0)
    assert_close(parts.denominator, whole.denominator, atol=1e-4, rtol=0)


@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "ctf"])
def test_compiled_loop_and_tensor_code_insert_the_same(modulated: bool) -> None:
    disc = HalfDisc(12)
    images, ctf = disc.gather(noise(30, 12, 12)), noise(30, len(disc)) if modulated else None
    rotation = random_rotations(30, named_generator("test/backprojection"))
    shift = 2 * noise(30, 2)
    compiled, plain = BackProjection(disc), BackProjection(disc)
    compiled.insert(images, rotation, ctf, shift)
    plain._insert_anywhere(images, rotation, ctf, shift)
    assert_close(compiled.numerator, plain.numerator, atol=1e-4, rtol=0)
    assert_close(compiled.denominator, plain.denominator, atol=1e-4, rtol=0)


def test_a_shift_is_undone_before_insertion() -> None:
    disc, box = HalfDisc(12), 12
    images, rotation = disc.gather(noise(5, box, box)), random_rotations(5, named_generator("test/shift"))
    shift = 2 * noise(5, 2)
    still, moved = BackProjection(disc), BackProjection(disc)
    still.insert(images, rotation, None)
    moved.insert(images * shift_phase(disc, shift), rotation, None, shift)
    assert_close(moved.numerator, still.numerator, atol=1e-4, rtol=0)


def test_no_graph_is_kept() -> None:
    disc = HalfDisc(8)
    accumulator = BackProjection(disc)
    with torch.no_grad():
        accumulator.insert(disc.gather(noise(2, 8, 8)), torch.eye(3).expand(2, 3, 3), None)
    assert not accumulator.numerator.requires_grad
    assert not accumulator.volume(torch.ones(5)).requires_grad
