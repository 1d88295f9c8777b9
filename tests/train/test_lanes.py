"""Where batches come from: every particle once an epoch, streams that never meet, draws that can be repeated."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch.testing import assert_close

from aceray.data.stream import Buffer, StreamedImages
from aceray.em.dihedral import element_rotations
from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob
from aceray.train.background import ColouredNoise, WhiteNoise
from aceray.train.lanes import Lane, Sampler
from aceray.train.predict import Particles, StreamedCoefficients
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


# ---- windows of streamed images

ROWS, PART = 50, 4
DISC = HalfDisc(BOX)


def images() -> torch.Tensor:
    """Images whose mean is their number."""
    return torch.arange(ROWS, dtype=torch.float32)[:, None, None].expand(-1, BOX, BOX)


def windowed(parts_held: int, lanes: int = 1, seed: int = 1, batch: int = BATCH) -> Sampler:
    """A sampler of 50 streamed images in 13 parts, of which so many may be held; every lanes-th part is a lane's."""
    counts = [PART] * (ROWS // PART) + [ROWS % PART]

    def read(parts: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in parts:
            rows = torch.arange(PART * part, PART * part + counts[part])
            yield rows, images()[rows]

    streamed = StreamedImages(torch.arange(ROWS), counts, BOX, read, parts_held * PART * BOX**2 * 4)
    particles = Particles(StreamedCoefficients(streamed, DISC), None, torch.arange(ROWS), 4.0)
    every = torch.arange(ROWS)
    rows = [Lane(number, every[(every // PART) % lanes == number]) for number in range(lanes)]
    return Sampler(particles, rows, DISC, seed, batch, 4)


def numbers(source: Sampler, step: int) -> list[int]:
    """Which images a batch has, by what they show."""
    origin = source.images(step, augment=False).coefficients[:, DISC.radius == 0].real[:, 0]
    return (origin / BOX).round().long().tolist()


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("batch", [6, 30])
@pytest.mark.parametrize("held", [4, 8])
def test_windows_give_every_particle_once_an_epoch(held: int, batch: int, lanes: int) -> None:
    source = windowed(held, lanes, batch=batch)
    for lane in source.lanes:
        drawn, first = [], lane.number * batch
        for step in range(1, 1 + -(-3 * ROWS // batch)):
            drawn += numbers(source, step)[first : first + batch]
        count = len(lane.rows)
        epochs = [drawn[start : start + count] for start in range(0, 3 * count, count)]
        assert all(sorted(epoch) == lane.rows.tolist() for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        # a window of held / 2 / lanes parts is emptied before the next one is begun
        window = held // 2 // lanes * PART
        assert len({row // PART for row in epochs[0][: window - PART]}) <= held // 2 // lanes
        assert epochs[0][:window] != sorted(epochs[0][:window])


@pytest.mark.parametrize("lanes", [1, 2])
def test_no_more_parts_than_allowed_are_held(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, most, keep = windowed(8, lanes), 0, Buffer.keep

    def counted(buffer: Buffer, *args: Sequence[int]) -> None:
        nonlocal most
        keep(buffer, *args)
        most = max(most, sum(len(each.held) for each in source._buffers.values()))

    monkeypatch.setattr(Buffer, "keep", counted)
    for step in range(1, 30):
        source.images(step, augment=True)
    # 13 parts make windows of 4 and 3
    assert 7 <= most <= 8


def test_a_window_that_holds_everything_draws_as_from_memory() -> None:
    source = windowed(13)
    memory = Sampler(Particles(DISC.gather(images()), None, torch.arange(ROWS), 4.0), source.lanes, DISC, 1, BATCH, 4)
    for step in (1, 2, 9, 10):
        one, other = source.images(step, True), memory.images(step, True)
        assert torch.equal(one.coefficients, other.coefficients)


def test_a_step_of_windows_can_be_drawn_again_in_any_order() -> None:
    source = windowed(4)
    drawn = {step: numbers(source, step) for step in range(1, 20)}
    again = windowed(4)
    for step in (17, 3, 9, 10):
        assert numbers(again, step) == drawn[step]
    assert numbers(windowed(4, seed=2), 3) != drawn[3]
    assert numbers(windowed(8), 3) != drawn[3]


def test_windows_of_a_lane_do_not_depend_on_who_else_is_there() -> None:
    """Two workers with a lane each draw what one with both and twice the memory draws."""
    both, every = windowed(8, lanes=2), torch.arange(ROWS)
    for number in range(2):
        rows = every[(every // PART) % 2 == number]
        counts = [int((rows // PART == part).sum()) for part in range(number, 13, 2)]

        def read(parts: Sequence[int], rows: torch.Tensor = rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for part in parts:
                mine = rows[PART * part : PART * part + PART]
                yield mine, images()[mine]

        streamed = StreamedImages(rows, counts, BOX, read, 4 * PART * BOX**2 * 4)
        particles = Particles(StreamedCoefficients(streamed, DISC), None, rows, 4.0)
        alone = Sampler(particles, [Lane(number, torch.arange(len(rows)))], DISC, 1, BATCH, 4)
        for step in (1, 4, 8):
            assert numbers(alone, step) == numbers(both, step)[number * BATCH : (number + 1) * BATCH]
