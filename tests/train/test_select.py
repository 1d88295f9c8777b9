"""Label-free scores: what they say of answers that are known, and of wrong ones."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.ctf import ctf_on_disc
from aceray.em.dihedral import element_rotations, transform_ctf
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.errors import DataError
from aceray.metrics.alignment import flip_hand
from aceray.train.predict import Poses, calibrate_normalisation, predict
from aceray.train.select import (
    dihedral_errors,
    dihedral_metrics,
    half_map_scores,
    held_out,
    pose_agreement,
    residual_metrics,
)
from tests.references.residual import residual_loop
from tests.train.phantom import BOX, PIXEL_SIZE_ANGSTROM, autoencoder, chiral_volume, projections

COUNT = 30


def generator_of(name: str) -> torch.Generator:
    return named_generator(f"tests/select/{name}")


class Bank:
    """Poses of images by their nearest neighbour among projections at all eight turned poses, CTFs included.

    The projections come from the physics, not from turning images.
    """

    def __init__(self, hand: int = 1) -> None:
        self.disc = HalfDisc(BOX)
        self.particles, self.rotation, _ = projections(COUNT, shift_px=0.0, noise=0.0)
        turned = element_rotations()[:, None] @ self.rotation
        ctf = [transform_ctf(self.particles.ctf, torch.full((COUNT,), element)) for element in range(8)]
        self.ctf = torch.cat([ctf_on_disc(each, self.disc, PIXEL_SIZE_ANGSTROM) for each in ctf])
        self.known = turned.flatten(0, 1)
        self.images = central_slice(padded_transform(chiral_volume()), self.known, self.disc) * self.ctf
        self.known = self.known if hand > 0 else flip_hand(self.known)
        self.scale = self.disc.energy(self.images[:COUNT]).sum() / self.disc.energy(self.particles.coefficients).sum()

    def rotations_of(self, images: torch.Tensor, ctf: torch.Tensor | None) -> torch.Tensor:
        assert ctf is not None
        difference = self.disc.energy(images[:, None] * self.scale.sqrt() - self.images) / self.scale
        distance = difference + (ctf[:, None] - self.ctf).square().mean(-1)
        assert float(distance.min(1).values.max()) < 1e-3
        return self.known[distance.argmin(1)]

    def errors(self, rotations_of) -> torch.Tensor:
        images, ctf = self.particles.coefficients, self.ctf[:COUNT]
        return dihedral_errors(rotations_of, rotations_of(images, ctf), images, ctf, self.disc)


@pytest.mark.parametrize("hand", [1, -1])
def test_true_poses_turn_with_their_images_in_either_hand_and_any_frame(hand: int) -> None:
    bank = Bank(hand)
    frame = random_rotations(1, generator_of("frame"))[0]
    errors = bank.errors(lambda images, ctf: bank.rotations_of(images, ctf) @ frame)
    assert errors.shape == (7, COUNT)
    assert float(errors.max()) < 1e-9


def test_random_poses_are_as_inconsistent_as_two_random_rotations() -> None:
    bank, generator = Bank(), generator_of("random")
    errors = torch.cat([bank.errors(lambda images, ctf: random_rotations(COUNT, generator)) for _ in range(20)])
    assert_close(float(errors.mean()), 6.0, atol=0.15, rtol=0)


def test_a_pose_that_ignores_the_turn_or_turns_the_other_way_is_inconsistent() -> None:
    bank = Bank()
    turns = element_rotations()
    ignored = bank.errors(lambda images, ctf: bank.rotation)
    assert_close(ignored, (turns[1:] - torch.eye(3)).square().sum((1, 2))[:, None].expand(-1, COUNT), atol=1e-4, rtol=0)

    def backwards(images: torch.Tensor, ctf: torch.Tensor | None) -> torch.Tensor:
        found = bank.rotations_of(images, ctf)
        turn = found @ bank.rotation.mT
        return turn.mT @ bank.rotation

    wrong = bank.errors(backwards)
    # a quarter turn the other way is half a turn off; half turns and mirrors are their own inverses
    quarter = [element - 1 for element in range(1, 8) if not torch.allclose(turns[element], turns[element].T)]
    assert len(quarter) == 2 and float(wrong[quarter].min()) > 7.99
    assert float(wrong[[index for index in range(7) if index not in quarter]].max()) < 1e-4


def test_the_encoder_is_asked_as_in_prediction() -> None:
    model, (particles, _, _) = autoencoder(heads=3), projections(300)
    calibrate_normalisation(model, particles)
    model.train()
    poses = predict(model, particles, BOX)
    metrics = dihedral_metrics(model, particles, poses.rotation)
    assert model.training
    assert 1 < metrics["select/d4_consistency"] < 8
    assert metrics == dihedral_metrics(model, particles.take(torch.arange(256)), poses.rotation)
    # an encoder that always says the same is as wrong as the turns are large
    with torch.no_grad():
        model.encoder.rotation.weight.zero_()
        # gives the heads one rotation each, of which the decoder may take another for a turned image
        model.encoder.rotation.bias.copy_(model.encoder.rotation.bias[:6].repeat(3))
    same = dihedral_metrics(model, particles, predict(model, particles, BOX).rotation)
    assert same["select/d4_consistency_median"] <= 8
    assert same["select/d4_consistency"] == pytest.approx(
        float((element_rotations()[1:] - torch.eye(3)).square().sum((1, 2)).mean()), abs=1e-4
    )


@pytest.mark.parametrize("stored_box", [BOX, 2 * BOX])
def test_residuals_are_those_of_the_real_images(stored_box: int) -> None:
    model, (particles, _, _) = autoencoder(), projections(40)
    poses = predict(model, particles, stored_box)
    metrics = residual_metrics("heldout", model, particles, poses, stored_box)
    with torch.no_grad():
        shift = poses.shift_px * (BOX / stored_box)
        ctf = particles.transfer(torch.arange(40), model.disc)
        rendered = model.render(model.decoder.transform(), poses.rotation, shift, ctf)
    images = [model.disc.scatter(each).double().numpy() for each in (particles.coefficients, rendered)]
    expected = {f"select/heldout_{name}": value for name, value in residual_loop(*images).items()}
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert metrics["select/heldout_loss"] == pytest.approx(float(poses.residual.mean()), rel=1e-4)
    bands = [metrics[f"select/heldout_loss_{band}"] for band in ("low", "middle", "high")]
    assert sum(bands) == pytest.approx(metrics["select/heldout_loss"], rel=1e-5)


def test_a_volume_that_renders_nothing_leaves_all_of_the_power() -> None:
    model, (particles, rotation, shift) = autoencoder(), projections(50, noise=0.5)
    poses = Poses(particles.particle_id, rotation, shift, torch.zeros(50))
    with torch.no_grad():
        scale = model.disc.energy(particles.coefficients).mean()
        model.decoder.density.zero_()
    nothing = residual_metrics("residual", model, particles, poses, BOX)
    assert nothing["select/residual_loss"] == pytest.approx(float(scale), rel=1e-4)
    assert [nothing[f"select/residual_whitened{band}"] for band in ("", "_low", "_middle", "_high")] == pytest.approx(
        [1.0] * 4, rel=1e-4
    )


def test_the_true_volume_at_true_poses_leaves_the_noise() -> None:
    noise, count = 0.5, 2000
    model, (particles, rotation, shift) = autoencoder(), projections(count, noise=noise)
    clean, _, _ = projections(count, noise=0.0)
    poses = Poses(particles.particle_id, rotation, shift, torch.zeros(count))
    with torch.no_grad():
        rendered = model.render(
            model.decoder.transform(), rotation, shift, clean.transfer(torch.arange(count), model.disc)
        )
        ratio = model.disc.energy(clean.coefficients).sum() / model.disc.energy(rendered).sum()
        model.decoder.density.mul_(ratio.sqrt())
    metrics = residual_metrics("residual", model, particles, poses, BOX)
    # complex noise of unit variance: the disc's share of the pixels, times its variance
    assert metrics["select/residual_loss"] == pytest.approx(
        noise**2 * float(model.disc.weight.sum()) / BOX**2, rel=0.03
    )
    # nearly all of the signal is at low frequency
    assert metrics["select/residual_whitened_low"] < 0.5 < 0.9 < metrics["select/residual_whitened_high"] < 1.05
    wrong = Poses(particles.particle_id, rotation.roll(1, 0), shift, torch.zeros(count))
    for band in ("_loss_low", "_whitened_low", "_whitened"):
        name = f"select/residual{band}"
        assert residual_metrics("residual", model, particles, wrong, BOX)[name] > metrics[name]


def splitmix(number: int) -> int:
    """One step of SplitMix64 in whole numbers."""
    mask = 2**64 - 1
    z = (number + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_held_out_particles_are_a_fair_share_that_grows() -> None:
    particle_id = torch.arange(100_000)
    tenth, fifth = held_out(particle_id, 0.1), held_out(particle_id, 0.2)
    assert not held_out(particle_id, 0.0).any()
    assert_close(float(tenth.double().mean()), 0.1, atol=0.004, rtol=0)
    # whatever the half set, and inside the larger share
    assert_close(float(tenth[::2].double().mean()), 0.1, atol=0.005, rtol=0)
    assert not (tenth & ~fifth).any()
    expected = [splitmix(number) < 0.1 * 2**64 for number in range(500)]
    assert tenth[:500].tolist() == expected
    # a particle is judged by its number alone
    order = torch.randperm(1000, generator=generator_of("order"))
    assert held_out(order, 0.1).tolist() == tenth[order].tolist()


def poses_of(rotation: torch.Tensor, particle_id: torch.Tensor | None = None) -> Poses:
    count = len(rotation)
    return Poses(
        torch.arange(count) if particle_id is None else particle_id, rotation, torch.zeros(count, 2), torch.zeros(count)
    )


@pytest.mark.parametrize("flipped", [False, True])
def test_runs_that_differ_in_frame_and_hand_agree(flipped: bool) -> None:
    rotation = random_rotations(500, generator_of("poses"))
    frame = random_rotations(1, generator_of("frame"))[0]
    other = (flip_hand(rotation) if flipped else rotation) @ frame
    # the particles in another order, and some that only one run has
    order = torch.randperm(500, generator=generator_of("order"))[:400]
    metrics = pose_agreement(poses_of(rotation), poses_of(other[order], order))
    assert metrics["select/pose_agreement_sqfrob"] < 1e-6
    assert metrics["select/pose_agreement_below_half"] == 1


def test_runs_that_agree_in_part_and_runs_that_do_not() -> None:
    rotation, random = (random_rotations(1000, generator_of(name)) for name in ("poses", "others"))
    unrelated = pose_agreement(poses_of(rotation), poses_of(random))
    assert 5 < unrelated["select/pose_agreement_sqfrob"] < 6.2
    assert unrelated["select/pose_agreement_below_half"] < 0.05
    part = pose_agreement(poses_of(rotation), poses_of(torch.cat([rotation[:700], random[700:]])))
    assert part["select/pose_agreement_sqfrob"] == pytest.approx(0.3 * 6, abs=0.2)
    assert part["select/pose_agreement_below_half"] == pytest.approx(0.7, abs=0.02)
    with pytest.raises(DataError, match="the two runs share no particle"):
        pose_agreement(poses_of(rotation), poses_of(rotation, torch.arange(1000, 2000)))


def test_half_maps_agree_across_hands_and_noise_does_not() -> None:
    first = chiral_volume()
    axes = (0, 1, 2)
    same = half_map_scores(first, first.flip(axes).roll((1, 1, 1), axes), 4.0)
    assert same["select/half_map_fsc_area"] > 0.95
    assert same["select/half_map_resolution_px"] == 2
    noise = torch.randn(2, BOX, BOX, BOX, generator=generator_of("noise"))
    apart = half_map_scores(noise[0], noise[1], 4.0)
    assert apart["select/half_map_fsc_area"] < 0.5
    assert apart["select/half_map_resolution_px"] > 2


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_maps_of_failed_runs_score_badly_and_stop_nothing(value: float) -> None:
    bad = torch.full((BOX,) * 3, value)
    for pair in ((bad, chiral_volume()), (chiral_volume(), bad), (bad, bad)):
        scores = half_map_scores(*pair, 4.0)
        assert np.isfinite(list(scores.values())).all()
        if value != 1.0:
            assert scores == {"select/half_map_fsc_area": 0.0, "select/half_map_resolution_px": 2.0 * BOX}
        assert scores["select/half_map_fsc_area"] < 0.2
