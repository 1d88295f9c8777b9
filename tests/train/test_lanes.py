"""Where batches come from: every particle once an epoch, streams that never meet, draws that can be repeated."""

import torch
from torch.testing import assert_close

from aceray.em.dihedral import element_rotations
from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob
from aceray.train.background import ColouredNoise, WhiteNoise
from aceray.train.lanes import Lane, Sampler
from tests.train.phantom import BOX, projections

COUNT, BATCH = 20, 6
NOISE = WhiteNoise(0.5)


def sampler(lanes: int = 2, seed: int = 1) -> Sampler:
    particles, _, _ = projections(COUNT)
    # a particle is known again by its first coefficient
    particles.coefficients[:, 0] = torch.arange(COUNT).to(torch.complex64)
    rows = [Lane(number, torch.arange(number, COUNT, lanes)) for number in range(lanes)]
    return Sampler(particles, rows, HalfDisc(BOX), seed, BATCH, 4)


def names(source: Sampler, step: int) -> list[int]:
    return source.images(step, augment=False).coefficients[:, 0].real.long().tolist()


def test_every_lane_sees_each_of_its_particles_once_an_epoch() -> None:
    source = sampler()
    seen = [names(source, step) for step in range(1, 6)]
    for lane in range(2):
        drawn = [name for step in seen for name in step[lane * BATCH : (lane + 1) * BATCH]]
        epochs = [drawn[start : start + 10] for start in range(0, 30, 10)]
        assert all(sorted(epoch) == list(range(lane, COUNT, 2)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_step_can_be_drawn_again_in_any_order() -> None:
    first = {step: (names(sampler(), step), sampler().poses(step, 1.0, NOISE)) for step in (3, 1)}
    source = sampler()
    for step in (1, 2, 3):
        batch, poses = names(source, step), source.poses(step, 1.0, NOISE)
        if step in first:
            assert batch == first[step][0]
            assert_close(poses.rotation, first[step][1].rotation)
            assert_close(poses.noise, first[step][1].noise)


def test_seeds_steps_and_lanes_draw_different_poses() -> None:
    one = sampler().poses(1, 1.0, NOISE)
    others = [
        sampler().poses(2, 1.0, NOISE).rotation,
        sampler(seed=2).poses(1, 1.0, NOISE).rotation,
        one.rotation.roll(4, 0),
    ]
    for other in others:
        assert float(rotation_sqfrob(one.rotation, other).min()) > 1e-3


def test_a_lane_draws_the_same_whoever_else_is_there() -> None:
    both, particles = sampler(), projections(COUNT)[0]
    particles.coefficients[:, 0] = torch.arange(COUNT).to(torch.complex64)
    alone = Sampler(particles, [Lane(1, torch.arange(1, COUNT, 2))], HalfDisc(BOX), 1, BATCH, 4)
    assert names(alone, 2) == names(both, 2)[BATCH:]
    assert_close(alone.poses(2, 1.0, NOISE).noise, both.poses(2, 1.0, NOISE).noise[4:])


def test_levels_of_the_noise_are_drawn_by_seed_lane_and_step() -> None:
    disc = HalfDisc(BOX)
    noise = ColouredNoise(torch.zeros(len(disc)), 0.0, 0.0, 1.0, disc)

    def means(source: Sampler, step: int = 1) -> torch.Tensor:
        return source.poses(step, 1.0, noise).noise[:, disc.radius == 0].real[:, 0]

    both = means(sampler())
    assert len(both.unique()) == len(both)
    assert torch.equal(both, means(sampler()))
    for other in (means(sampler(), 2), means(sampler(seed=2))):
        assert not torch.isin(other, both).any()
    alone = Sampler(projections(COUNT)[0], [Lane(1, torch.arange(1, COUNT, 2))], disc, 1, BATCH, 4)
    assert torch.equal(means(alone), both[4:])
    # the level leaves the rest of a step as it is
    assert torch.equal(sampler().poses(1, 1.0, noise).rotation, sampler().poses(1, 1.0, NOISE).rotation)


def test_noise_and_shifts_have_the_asked_spread() -> None:
    source = sampler()
    source.drawn = 4000
    poses = source.poses(1, 1.7, NOISE)
    assert_close(float(poses.noise.abs().square().mean()), 0.25, rtol=0.01, atol=0)
    assert_close(float(poses.shift_px.std()), 1.7, rtol=0.03, atol=0)


def test_augmented_images_are_projections_at_turned_poses() -> None:
    from aceray.em.formation import shift_phase
    from aceray.em.projection import central_slice, padded_transform
    from tests.train.phantom import chiral_volume

    particles, rotation, shift = projections(COUNT, noise=0.0)
    source = Sampler(particles, [Lane(0, torch.arange(COUNT))], HalfDisc(BOX), 3, COUNT, 1)
    rows, elements = source._rows(source.lanes[0], 1), source._elements(source.lanes[0], 1)
    assert len(elements.unique()) > 4
    batch = source.images(1, augment=True)
    turn = element_rotations()[elements]
    slices = central_slice(padded_transform(chiral_volume()), turn @ rotation[rows], source.disc)
    moved = (turn[:, :2, :2] @ shift[rows][..., None])[..., 0]
    expected = slices * shift_phase(source.disc, moved) * batch.ctf
    scale = expected.abs().pow(2).sum().sqrt() / batch.coefficients.abs().pow(2).sum().sqrt()
    assert_close(batch.coefficients, expected / scale, atol=1e-3, rtol=0)


def test_each_loss_has_its_views() -> None:
    source = sampler()
    assert source.images(1, False).views is None
    assert source.images(1, False, "symmetric").views.tolist() == [[0] * 2 * BATCH, [2] * 2 * BATCH]
    pairs = torch.cat([source.images(step, False, "generalised").views for step in range(1, 101)], 1)
    assert pairs.shape == (2, 200 * BATCH)
    # two independent elements: all 64 pairs, each about as often
    counts = torch.bincount(8 * pairs[0] + pairs[1], minlength=64)
    assert counts.min() > 5 and counts.max() < 40


def test_a_lane_draws_its_own_views_by_seed_and_step() -> None:
    def views(source: Sampler, step: int = 1) -> list[list[int]]:
        return source.images(step, False, "generalised").views.tolist()

    both = views(sampler())
    assert both == views(sampler())
    assert both != views(sampler(), 2) and both != views(sampler(seed=2))
    alone = Sampler(projections(COUNT)[0], [Lane(1, torch.arange(1, COUNT, 2))], HalfDisc(BOX), 1, BATCH, 4)
    assert views(alone) == [row[BATCH:] for row in both]
    assert [row[:BATCH] for row in both] != [row[BATCH:] for row in both]


def test_views_disturb_neither_the_images_nor_their_augmentation() -> None:
    plain, pairs = sampler().images(2, True), sampler().images(2, True, "generalised")
    assert torch.equal(plain.coefficients, pairs.coefficients)
    assert torch.equal(plain.ctf, pairs.ctf)
