"""From rough poses to exact ones, from halves to a map; signs, boxes and restarts."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc, crop_images, crop_volume
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector, rotation_sqfrob
from aceray.metrics.fsc import fourier_shell_correlation, fsc_area, half_ball
from aceray.train.energy import Images, Matches, energies, make_reference
from aceray.train.predict import Particles
from aceray.train.reconstruct import Maps, Reconstruction, Support, damped, joined
from aceray.train.refine import Level, Limits, PoseTable, Refined, Refiner, Round, _improved, _Matcher
from tests.train.phantom import BOX, PIXEL_SIZE_ANGSTROM, chiral_volume, projections

DISC = HalfDisc(BOX)
NEVER = Limits(settled=-1.0, rescued=0.0, near_symmetry=1.0)


def rough(rotation: torch.Tensor, shift: torch.Tensor, wrong: int = 0) -> Refined:
    """Poses 6 degrees and half a pixel off; the first `wrong` ones at random."""
    generator = named_generator("tests/refine")
    turn = 0.1 * torch.nn.functional.normalize(torch.randn(len(rotation), 3, generator=generator), dim=-1)
    start = rotation_from_vector(turn) @ rotation
    start[:wrong] = random_rotations(wrong, generator)
    moved = shift + 0.35 * torch.randn(shift.shape, generator=generator)
    return Refined(0, PoseTable(start, moved, torch.ones(len(rotation))))


def refiner(particles: Particles, rounds: list[Round], **changes) -> Refiner:
    given = {"stored_box": BOX, "shift_spread_px": 1.0, "limits": NEVER, "seed": 5} | changes
    return Refiner(particles, HalfDisc(BOX), rounds, **given)


def error(state: Refined, rotation: torch.Tensor) -> torch.Tensor:
    return rotation_sqfrob(state.table.rotation, rotation)


def particles_and_poses(count: int, noise: float = 0.1) -> tuple[Particles, torch.Tensor, torch.Tensor]:
    found = projections(count, noise=noise)
    return found[0], found[1], found[2]


def test_rounds_lower_the_errors_and_tell_true_from_mirrored() -> None:
    particles, rotation, shift = particles_and_poses(600)
    start = rough(rotation, shift)
    done = list(refiner(particles, [Round(BOX, 3)] * 3).run(start))
    assert [state.done for state in done] == [1, 2, 3]
    assert float(error(done[-1], rotation).median()) < 0.2 * float(error(start, rotation).median())
    off = (done[-1].table.shift_px - shift).square().sum(-1)
    assert float(off.median()) < 0.3 * float((start.table.shift_px - shift).square().sum(-1).median())
    volume = done[-1].maps.joint  # type: ignore[union-attr]
    truth = chiral_volume()
    assert fsc_area(fourier_shell_correlation(volume, truth)[:7]) > 0.9
    mirrored = truth.flip(2).roll(1, 2)
    assert fsc_area(fourier_shell_correlation(volume, mirrored)[:7]) < 0.7


def test_search_brings_lost_poses_back_and_local_rounds_do_not() -> None:
    particles, rotation, shift = particles_and_poses(400)
    start = rough(rotation, shift, wrong=80)
    lost = {}
    for name, searched in (("local", 0.0), ("search", 1.0)):
        *_, last = refiner(particles, [Round(BOX, 3, 5.0, searched)] * 2).run(start)
        lost[name] = float((error(last, rotation)[:80] > 0.5).float().mean())
    assert lost["local"] > 0.6 and lost["search"] < 0.15


def test_the_worst_explained_are_searched_alone() -> None:
    particles, rotation, shift = particles_and_poses(400)
    start = rough(rotation, shift, wrong=30)
    first, *_ = refiner(particles, [Round(BOX, 3)]).run(start)
    *_, last = refiner(particles, [Round(BOX, 3, 5.0, 0.1)]).run(replace(first, done=0))
    before, after = error(first, rotation), error(last, rotation)
    assert float((before[:30] > 0.5).float().mean()) > 0.6 and float((after[:30] > 0.5).float().mean()) < 0.2


def test_lost_images_are_found_at_any_shift_when_few_are_searched() -> None:
    particles, rotation, shift = particles_and_poses(400)
    start = rough(rotation, shift, wrong=30)
    start.table.shift_px[:30] += 3.5
    first, *_ = refiner(particles, [Round(BOX, 1)]).run(start)
    lost = {}
    for searched in (0.1, 1.0):
        *_, last = refiner(particles, [Round(BOX, 3, 5.0, searched)]).run(replace(first, done=0, moved=1.0))
        lost[searched] = float((error(last, rotation)[:30] > 0.5).float().mean())
    assert lost[0.1] < 0.2 and lost[1.0] > 0.5


def test_a_settled_round_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    particles, rotation, shift = particles_and_poses(100)
    turns: list[tuple[int, ...]] = []

    def counted(nside: int, turns_in_plane: int, *key: int) -> torch.Tensor:
        turns.append(key)
        return random_rotations(50, named_generator("tests/refine/grid", *key))

    monkeypatch.setattr("aceray.train.search.turned_grid", counted)
    plan = [Round(BOX, 2, 4.0, 1.0)] * 3
    list(refiner(particles, plan, limits=replace(NEVER, settled=1.0)).run(rough(rotation, shift)))
    assert turns == []
    list(refiner(particles, plan, limits=replace(NEVER, settled=0.5)).run(rough(rotation, shift)))
    assert turns == [(5, 0)]
    list(refiner(particles, plan, limits=replace(NEVER, settled=-1.0)).run(rough(rotation, shift)))
    assert turns[1:] == [(5, 0), (5, 1), (5, 2)]


def test_once_few_are_searched_it_stays_so() -> None:
    """What they moved would else bring back a search of all."""
    particles, rotation, shift = particles_and_poses(100)
    few = replace(rough(rotation, shift), done=1, searched=0.05, moved=0.9)
    limits = replace(NEVER, rescued=0.05)
    states = list(refiner(particles, [Round(BOX, 2, 4.0, 1.0)] * 3, limits=limits).run(few))
    assert [state.searched for state in states] == [0.05, 0.05]


def test_rounds_at_rest_are_passed_over_and_nothing_is_lost() -> None:
    particles, rotation, shift = particles_and_poses(300, noise=1.0)
    plan = [Round(10, 3)] * 8 + [Round(BOX, 3)] * 8 + [Round(BOX, 3, 5.0, 0.05)] * 2
    every = list(refiner(particles, plan).run(rough(rotation, shift)))
    few = list(refiner(particles, plan, limits=replace(NEVER, settled=0.01)).run(rough(rotation, shift)))
    assert [state.done for state in every] == list(range(1, 19))
    done = [state.done for state in few]
    assert done[-1] == 18 and len(done) < 15
    # at least two of the rounds at a box, of which the second is seen to change nothing, and one of the last
    assert 8 in done and 16 in done and len([number for number in done if 8 < number <= 16]) >= 2
    assert float(error(few[-1], rotation).mean()) < 1.1 * float(error(every[-1], rotation).mean())
    *_, last = refiner(particles, plan, limits=replace(NEVER, settled=0.01)).run(replace(few[1], maps=None))
    # a voxel at the mask's threshold may fall to either side
    assert_close(last.table.rotation, few[-1].table.rotation, rtol=0, atol=3e-3)


def test_rounds_go_on_while_poses_move_or_the_energy_falls() -> None:
    particles, rotation, shift = particles_and_poses(100)
    source = refiner(particles, [Round(BOX, 1)] * 4, limits=replace(NEVER, settled=0.1))
    before = replace(rough(rotation, shift), done=1, energy=0.5)
    by_chance = 0.5 / len(DISC)
    cases = {(0.05, 0.5 * by_chance): True, (0.05, 2 * by_chance): False, (0.2, 0.0): False, (0.0, -0.1): True}
    for (moved, gain), at_rest in cases.items():
        after = replace(before, done=2, moved=moved, energy=0.5 - gain)
        assert source._at_rest(before, after) is at_rest, (moved, gain)
    assert not source._at_rest(replace(before, done=0), replace(before, done=1, moved=0.0))


def test_going_on_from_a_round_gives_what_was_not_interrupted() -> None:
    particles, rotation, shift = particles_and_poses(150)
    source = refiner(particles, [Round(BOX, 2, 5.0, 1.0), Round(BOX, 2), Round(BOX, 2)])
    states = list(source.run(rough(rotation, shift)))
    assert all(0 < state.energy < 1 for state in states)
    *_, again = source.run(replace(states[0], maps=None))
    assert_close(again.table.rotation, states[-1].table.rotation, rtol=0, atol=0)
    assert_close(source.with_maps(replace(states[-1], maps=None)).maps.joint, states[-1].maps.joint)  # type: ignore[union-attr]


def test_a_half_set_of_the_data_has_two_halves() -> None:
    """Its particles are all of even, or all of odd number."""
    particles, rotation, shift = particles_and_poses(300)
    for first in (0, 1):
        half_set = replace(particles, particle_id=first + 2 * torch.arange(300))
        *_, last = refiner(half_set, [Round(BOX, 3)] * 2).run(rough(rotation, shift))
        assert float(last.maps.half_fsc[1:5].min()) > 0.8  # type: ignore[union-attr]
        assert float(error(last, rotation).median()) < 0.006


def test_energy_is_the_share_left_unexplained_whatever_the_units() -> None:
    particles, rotation, shift = particles_and_poses(150)
    louder = replace(particles, coefficients=10 * particles.coefficients)
    energies = [
        list(refiner(each, [Round(BOX, 2)] * 2).run(rough(rotation, shift)))[-1].energy for each in (particles, louder)
    ]
    assert energies[0] == pytest.approx(energies[1], rel=1e-3)
    noise = replace(particles, coefficients=torch.randn(150, len(DISC), dtype=torch.complex64))
    *_, nothing = refiner(noise, [Round(BOX, 1)]).run(rough(rotation, shift))
    assert 0.6 < nothing.energy < 1.1


def test_without_a_spread_shifts_stay() -> None:
    particles, rotation, shift = particles_and_poses(60)
    start = rough(rotation, shift)
    *_, last = refiner(particles, [Round(BOX, 2, 4.0, 1.0)], shift_spread_px=None).run(start)
    assert_close(last.table.shift_px, start.table.shift_px, rtol=0, atol=1e-6)


def test_a_coarser_level_has_the_cropped_images_and_their_contrast() -> None:
    particles, _, _ = particles_and_poses(20)
    images = DISC.scatter(particles.coefficients)
    particles = replace(particles, coefficients=DISC.gather(images))  # a real mean
    level = Level(particles, DISC, 10)
    ((rows, found),) = level.chunks()
    assert rows.tolist() == list(range(20))
    assert_close(found.coefficients, HalfDisc(10).gather(crop_images(images, 10)), rtol=1e-4, atol=1e-4)
    small = Particles(found.coefficients, particles.ctf, particles.particle_id, PIXEL_SIZE_ANGSTROM * BOX / 10)
    assert_close(found.transfer, small.transfer(torch.arange(20), HalfDisc(10)))
    inner = DISC.radius[:, None] < 5
    power = (particles.coefficients.abs().square().T * inner).sum(1) / 20
    shell_three = (DISC.shell == 3) & (DISC.radius < 5)
    weight = level.weight[HalfDisc(10).shell == 3]
    assert_close(weight, torch.full_like(weight, 2.0 / float(power[shell_three].mean())), rtol=1e-4, atol=0)


def test_rounds_of_growing_boxes_scale_the_shifts() -> None:
    particles, rotation, shift = particles_and_poses(400)
    start = rough(rotation, shift)
    states = list(refiner(particles, [Round(10, 3), Round(BOX, 3)]).run(start))
    assert states[0].maps.joint.shape == (10, 10, 10)  # type: ignore[union-attr]
    coarse = fourier_shell_correlation(states[0].maps.joint, crop_volume(chiral_volume(), 10))  # type: ignore[union-attr]
    assert float(coarse[1:4].min()) > 0.9
    for state in states:
        assert float((state.table.shift_px - shift).square().sum(-1).median()) < 0.1


def test_halves_share_no_image_and_their_correlation_filters_the_map() -> None:
    particles, rotation, shift = particles_and_poses(300, noise=3.0)
    images = Images(particles.coefficients, particles.transfer(torch.arange(300), DISC))
    poses, half = Matches(rotation, shift, torch.zeros(300)), particles.particle_id % 2
    together = Reconstruction(DISC, torch.ones_like)
    together.insert(images, poses, half)
    maps = together.maps()
    alone = Reconstruction(DISC, torch.ones_like)
    odd = half == 1
    alone.insert(images.take(odd), Matches(rotation[odd], shift[odd], torch.zeros(int(odd.sum()))), half[odd])
    own = alone.maps().halves[1]
    ball = half_ball(BOX)
    similar = fourier_shell_correlation(own, maps.halves[1])
    assert float(similar[1:].min()) > 0.999
    correlation = fourier_shell_correlation(*maps.halves)
    assert_close(correlation[1:], maps.half_fsc[1:], rtol=0, atol=1e-3)
    assert float(maps.half_fsc[1:3].min()) > 0.5 and float(maps.half_fsc[-2:].max()) < 0.5
    strength = damped(maps.joint, torch.ones(BOX // 2 + 1), ball)
    assert_close(strength, maps.joint, rtol=1e-3, atol=1e-5)


def noisy_maps(support: Support) -> Maps:
    particles, rotation, shift = particles_and_poses(300, noise=3.0)
    images = Images(particles.coefficients, particles.transfer(torch.arange(300), DISC))
    reconstruction = Reconstruction(DISC, support)
    reconstruction.insert(images, Matches(rotation, shift, torch.zeros(300)), particles.particle_id % 2)
    return reconstruction.maps()


def test_a_mask_takes_noise_away_and_says_how_much() -> None:
    inside = (chiral_volume() > 0.05 * float(chiral_volume().max())).float()
    whole, cut = (noisy_maps(support) for support in (torch.ones_like, lambda _: inside))
    assert_close(whole.half_fsc, cut.half_fsc)
    assert_close(whole.halves, cut.halves)
    assert float(cut.joint[inside == 0].abs().mean()) < 0.4 * float(whole.joint[inside == 0].abs().mean())
    with_truth = [fourier_shell_correlation(maps.joint, chiral_volume()) for maps in (whole, cut)]
    assert float((with_truth[1] - with_truth[0])[4:6].min()) > 0.05
    # the halves' maps, cut alike, agree as was predicted from those that are not, which agree less
    measured = fourier_shell_correlation(*(half * inside for half in cut.halves))
    assert_close(measured[3:6], cut.agreement[3:6], atol=0.1, rtol=0)
    assert float((cut.agreement - whole.agreement)[4:6].min()) > 0.1


def test_a_half_sees_its_own_map_in_the_mask() -> None:
    inside = (chiral_volume() > 0.05 * float(chiral_volume().max())).float()
    maps, ball = noisy_maps(lambda _: inside), half_ball(BOX)
    first, second = (maps.seen_by(half).joint for half in (0, 1))
    low = ball.shell <= 4
    assert_close(ball.gather(first)[low], ball.gather(maps.joint)[low])
    apart = (ball.gather(first) - ball.gather(second)).abs()
    assert float(apart[low].max()) < 1e-5 < float(apart[~low].mean())
    own = fourier_shell_correlation(first, maps.halves[0] * inside)
    assert float(own[6:-1].min()) > 0.95


def test_a_half_is_joined_to_the_other_in_its_first_shells_alone() -> None:
    half, joint = (torch.randn(BOX, BOX, BOX, generator=named_generator("tests/joined", n)) for n in range(2))
    ball = half_ball(BOX)
    found, low = ball.gather(joined(half, joint, ball)), ball.shell <= 4
    inside = ball.shell < BOX // 2  # the Nyquist planes are not their own partners
    assert_close(found[low], ball.gather(joint)[low])
    assert_close(found[~low & inside], ball.gather(half)[~low & inside])


class _Stamp(_Matcher):
    """Gives every image one energy."""

    def __init__(self, energy: float) -> None:
        self.energy = energy

    def improved(self, images: Images, before: Matches) -> Matches:
        assert len(images) == len(before.energy)
        return replace(before, energy=torch.full_like(before.energy, self.energy))


def test_images_are_compared_with_the_map_of_their_own_half() -> None:
    particles, rotation, shift = particles_and_poses(6)
    images, before = Images(particles.coefficients, None), Matches(rotation, shift, torch.zeros(6))
    half = torch.tensor([0, 1, 1, 0, 1, 0])
    assert _improved([_Stamp(7.0), _Stamp(9.0)], images, before, half).energy.tolist() == [7, 9, 9, 7, 9, 7]
    assert _improved([_Stamp(3.0)], images, before, half).energy.tolist() == [3] * 6


def noise_particles(count: int) -> Particles:
    """White noise where there is no particle at all."""
    particles, *_ = projections(count, noise=0.0)
    generator = named_generator("tests/refine/noise")
    noise = torch.randn(particles.coefficients.shape, dtype=torch.complex64, generator=generator)
    return replace(particles, coefficients=noise)


def test_noisier_images_are_not_explained_worse() -> None:
    """Where there is nothing to be explained, all of every image's power is left, however much that is."""
    particles = noise_particles(300)
    particles.coefficients[150:] *= 3
    start = rough(random_rotations(300, named_generator("tests/refine/start")), torch.zeros(300, 2))
    *_, last = refiner(particles, [Round(BOX, 1)]).run(start)
    quiet, noisy = last.table.energy[:150], last.table.energy[150:]
    assert 0.8 < float(noisy.mean() / quiet.mean()) < 1.1


def test_halves_that_see_one_map_agree_on_noise_and_independent_ones_do_not() -> None:
    particles = noise_particles(400)
    start = rough(random_rotations(400, named_generator("tests/refine/start")), torch.zeros(400, 2))
    agreement = {}
    for independent in (False, True):
        limits = replace(NEVER, independent=independent)
        plan = [Round(BOX, 3, 6.0, 1.0)] * 3
        *_, last = refiner(particles, plan, limits=limits, support=torch.ones_like).run(start)
        assert last.maps is not None
        agreement[independent] = float(last.maps.half_fsc[6:10].mean())
    assert abs(agreement[True]) < 0.1 < agreement[False]


def test_independent_halves_come_to_the_same_poses_in_one_frame() -> None:
    particles, rotation, shift = particles_and_poses(600)
    start = rough(rotation, shift, wrong=60)
    limits = replace(NEVER, independent=True)
    *_, last = refiner(particles, [Round(BOX, 3, 5.0, 1.0)] * 3, limits=limits).run(start)
    assert float((error(last, rotation) > 0.5).float().mean()) < 0.03
    halves = particles.particle_id // 2 % 2
    frames = [float(error(last, rotation)[halves == half].median()) for half in (0, 1)]
    assert max(frames) < 0.2 * float(error(start, rotation).median())


def test_a_map_of_many_images_explains_them_at_every_shell() -> None:
    """No shell comes out weaker than it is: what the map leaves unexplained of noise-free images is little."""
    particles, rotation, shift = particles_and_poses(2_000, noise=0.0)
    images = Images(particles.coefficients, particles.transfer(torch.arange(2_000), DISC))
    reconstruction = Reconstruction(DISC, torch.ones_like)
    reconstruction.insert(images, Matches(rotation, shift, torch.zeros(2_000)), particles.particle_id % 2)
    maps, weight = reconstruction.maps(), Level(particles, DISC, BOX).weight
    for shell in range(1, BOX // 2 - 1):
        at = (DISC.shell == shell).nonzero()[:, 0]
        reference = make_reference(maps.joint, DISC, None, weight)
        reference = replace(reference, frequency=reference.frequency[at], weight=weight[at], index=at)
        left = energies(reference, images.at(at), rotation[:, None], shift).sum()
        assert float(left / images.at(at).power(weight[at]).sum()) < 0.03, shell
