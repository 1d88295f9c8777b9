"""From settings and a dataset to a trainer: nothing left out of the optimiser, nothing of the truth let in."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from aceray.build import build_trainer, lane_count, row_groups_of_lanes, training_box, truth_score
from aceray.config import Config
from aceray.data.particles import TRUTH_COLUMNS, ParticleSet, RowGroup, open_particles
from aceray.distributed.ingest import read_here
from aceray.errors import ConfigError, DataError
from aceray.models.siren import LatticeSirenDecoder, SirenDecoder
from aceray.models.voxel import RotatedVoxelDecoder, VoxelDecoder
from aceray.presets import load_config
from aceray.train.background import ColouredNoise, WhiteNoise
from aceray.train.lanes import Sampler
from aceray.train.loop import Trainer
from aceray.train.objective import Objective
from aceray.train.schedule import LabelFilters, Ramp, ShiftWeight, TaskWeights
from tests.distributed.particles import BOX, write_particles

SMALL = (
    "encoder.width=32",
    "encoder.depth=2",
    "train.batch=8",
    "train.steps=3",
    "data.shift_sigma_fraction=0.03",
    "refine=null",
)


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> ParticleSet:
    return write_particles(tmp_path_factory.mktemp("build") / "set")


def trainer(config: Config, particles: ParticleSet, **place) -> Trainer:
    stack = read_here(particles, particles.row_groups(), training_box(config, particles.manifest.box))
    return build_trainer(config, particles, stack, **place)


def losses(source: Trainer) -> list[dict[str, float]]:
    return [progress.losses for progress in source.run()]


METHODS = [
    "method/ace_em_voxel",
    "method/ace_em_siren",
    "method/cryoai",
    "method/cryoposenet",
    "method/ipi_only_siren",
    "method/ipi_only_voxel",
    "method/no_pip",
]


@pytest.mark.parametrize("preset", ["base", "demo", "clean", *METHODS])
def test_every_parameter_is_in_one_group_of_the_optimiser(preset: str, particles: ParticleSet) -> None:
    source = trainer(load_config(preset, "train.lanes=1", "resources.workers=0"), particles)
    grouped = [parameter for group in source.optimiser.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in source.objective.parameters()}
    assert len(grouped) == len({id(parameter) for parameter in grouped})


def test_encoder_and_decoder_have_their_own_learning_rates_and_voxels_no_decay(particles: ParticleSet) -> None:
    config = load_config(*SMALL, "optim.encoder_lr=0.003", "optim.decoder_lr=0.5", "optim.weight_decay=0.1")
    encoder, decoder = trainer(config, particles).optimiser.param_groups
    assert (encoder["lr"], encoder["weight_decay"]) == (0.003, 0.1)
    assert (decoder["lr"], decoder["weight_decay"]) == (0.5, 0.0)
    assert [tuple(parameter.shape) for parameter in decoder["params"]] == [(BOX, BOX, BOX)]


@pytest.mark.parametrize("preset", ["base", *METHODS])
def test_presets_train_a_few_steps(preset: str, particles: ParticleSet) -> None:
    source = trainer(load_config(preset, "train.batch=8", "train.steps=2", "pip.warmup_steps=1"), particles)
    history = losses(source)
    assert len(history) == 2
    assert source.volume().abs().max() > 0


SIREN = ("decoder/siren", "decoder.width=16")
LATTICE = (*SIREN, "decoder.projector=lattice")
ROTATE = ("decoder.projector=rotate",)


@pytest.mark.parametrize("decoder", [SIREN, LATTICE, ROTATE])
def test_every_decoder_learns_repeats_and_resumes(decoder: tuple[str, ...], particles: ParticleSet) -> None:
    config = load_config(*SMALL, *decoder)
    source = trainer(config, particles)
    before = source.volume()
    history = losses(source)
    assert {"loss_ipi", "loss_pip"} <= set(history[0])
    assert not torch.equal(source.volume(), before)
    poses = source.predict()
    assert len(poses.rotation) == len(source.sampler.particles) and poses.residual.isfinite().all()
    assert losses(trainer(config, particles)) == history
    resumed = trainer(config, particles)
    resumed.restore(*source.checkpoint())
    assert torch.equal(resumed.volume(), source.volume())


@pytest.mark.parametrize("decoder", [SIREN, LATTICE, ROTATE, ("decoder/voxel",)])
def test_pose_loss_leaves_every_decoder_alone(decoder: tuple[str, ...], particles: ParticleSet) -> None:
    source = trainer(load_config(*SMALL, *decoder), particles)
    images, drawn = source.sampler.images(1, False), source.sampler.poses(1, 0.0, WhiteNoise(0.0))
    source.objective(images, drawn)["pip"].backward()
    assert all(parameter.grad is None for parameter in source.model.decoder.parameters())
    assert all(parameter.grad is not None for parameter in source.model.encoder.rotation.parameters())


def test_the_weights_of_a_network_decoder_depend_on_the_seed(particles: ParticleSet) -> None:
    first, again, other = (
        trainer(load_config(*SMALL, *SIREN, f"seed={seed}"), particles).volume() for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_settings_reach_the_voxels(particles: ParticleSet) -> None:
    settings = ("decoder.nonnegative=true", "decoder.scale=0.5", "decoder.mask_radius_fraction=0.25", "decoder.pad=3")
    free, kept = trainer(load_config(*SMALL), particles), trainer(load_config(*SMALL, *settings), particles)
    losses(free), losses(kept)
    assert free.volume().min() < 0 <= kept.volume().min() and kept.volume().max() > 0
    decoder = kept.model.decoder
    assert isinstance(decoder, VoxelDecoder) and (decoder.pad, decoder.scale) == (3, 0.5)
    assert not kept.volume()[BOX // 2, BOX // 2, 3 * BOX // 4 :].any()
    assert isinstance(trainer(load_config(*SMALL, *ROTATE), particles).model.decoder, RotatedVoxelDecoder)


def test_settings_reach_the_networks(particles: ParticleSet) -> None:
    settings = ("content_depth=2", "envelope_depth=1", "content_frequency=20", "envelope_frequency=10", "scale=3")
    source = trainer(load_config(*SMALL, *SIREN, *(f"decoder.{setting}" for setting in settings)), particles)
    decoder = source.model.decoder
    assert isinstance(decoder, SirenDecoder) and decoder.scale == 3
    assert (len(decoder.content.rest), len(decoder.envelope.rest)) == (3, 2)
    assert not isinstance(decoder, LatticeSirenDecoder)
    assert isinstance(trainer(load_config(*SMALL, *LATTICE), particles).model.decoder, LatticeSirenDecoder)
    assert (decoder.content.first.frequency, decoder.envelope.first.frequency) == (20, 10)
    assert decoder.content.first.out_features == 16


def test_settings_of_losses_and_schedules_reach_the_plan(particles: ParticleSet) -> None:
    source = trainer(
        load_config(
            *SMALL,
            "ipi={loss: generalised, label_filters: [{until_step: 2, filter: 5}], train_shift: true}",
            "ipi={shift_l1_weight: 0.3, shift_l1_schedule: linear}",
            "pip={weight: 0.5, warmup_steps: 1, schedule: cosine, ramp_steps: 7, initial_factor: 2.0}",
            "pip={turns: alternating, shifts: matched, train_decoder: true}",
        ),
        particles,
    )
    plan = source.plan
    assert (plan.loss, plan.labels) == ("generalised", LabelFilters([(2, 5)]))
    assert plan.shift_weight == ShiftWeight(0.3, 3, "linear")
    assert plan.weights == TaskWeights(0.5, 1, False, Ramp("cosine", 7, 2.0), True)
    assert isinstance(source.objective, Objective) and source.objective.train_decoder
    assert source.objective.shifts is not None
    assert source.objective.shifts.spread_px == pytest.approx(0.03 * BOX)
    assert [set(step) - {"loss_total"} for step in losses(source)] == [{"loss_ipi", "loss_shift"}] * 2 + [{"loss_pip"}]


def test_settings_of_the_optimiser_reach_it(particles: ParticleSet) -> None:
    plain, cryoai = trainer(load_config(*SMALL), particles), trainer(load_config("method/cryoai"), particles)
    assert plain.plan.clip_norm is None and cryoai.plan.clip_norm == 1.0
    assert [group["amsgrad"] for group in plain.optimiser.param_groups] == [False, False]
    assert [group["amsgrad"] for group in cryoai.optimiser.param_groups] == [True, True]


def test_defaults_are_plain_losses_and_constant_weights(particles: ParticleSet) -> None:
    source = trainer(load_config(*SMALL), particles)
    assert (source.plan.loss, source.plan.labels.at(0), source.plan.weights.at(0)) == ("mse", 1, (1.0, 2.0))
    assert isinstance(source.objective, Objective)
    assert source.objective.shifts is None and not source.objective.train_decoder
    assert "shifts.mean" not in source.checkpoint()[0]


@pytest.mark.parametrize("turns", ["simultaneous", "alternating"])
def test_one_worker_with_two_lanes_draws_what_each_lane_draws_alone(particles: ParticleSet, turns: str) -> None:
    config = load_config(*SMALL, "train.lanes=2", "ipi.loss=generalised", f"pip.turns={turns}")
    source = trainer(config, particles)
    views = source.sampler.images(1, True, source.plan.loss).views
    for lane in range(2):
        alone = Sampler(source.sampler.particles, [source.sampler.lanes[lane]], source.sampler.disc, 1, 4, 4)
        assert torch.equal(alone.images(1, True, "generalised").views, views[:, 4 * lane : 4 * lane + 4])
    assert len(losses(source)) == 3


def test_noise_of_rendered_images_is_that_of_the_settings(particles: ParticleSet) -> None:
    source = trainer(load_config(*SMALL), particles)
    signal_std = float(source.model.signal_std)
    white, snr, background = (
        trainer(load_config(*SMALL, f"pip.noise={noise}"), particles).plan.noise
        for noise in ("{kind: white}", "{kind: snr, snr_db: 6}", "{kind: background, radius_fraction: 0.55}")
    )
    assert white == source.plan.noise == WhiteNoise(particles.manifest.noise_std / signal_std)
    assert isinstance(snr, WhiteNoise) and snr.std == pytest.approx(10**-0.3)
    assert isinstance(background, ColouredNoise) and background.level_spread < 0.1
    # the set has white noise; the blobs' contrast transfer spreads some signal into its corners
    assert float(background.std[background.disc.radius > 2].square().mean().sqrt()) == pytest.approx(white.std, rel=0.1)


def test_background_noise_repeats_resumes_and_needs_no_second_worker(particles: ParticleSet) -> None:
    config = load_config(*SMALL, "train.lanes=2", "pip.noise.kind=background")
    source, again, resumed = (trainer(config, particles) for _ in range(3))
    history = losses(source)
    steps = again.run()
    before = [next(steps).losses]
    resumed.restore(*again.checkpoint())
    assert before + losses(resumed) == history
    assert history != losses(trainer(load_config(*SMALL, "train.lanes=2"), particles))
    drawn = source.sampler.poses(1, 1.0, source.plan.noise).noise
    for lane in range(2):
        alone = Sampler(source.sampler.particles, [source.sampler.lanes[lane]], source.sampler.disc, 1, 4, 4)
        assert torch.equal(alone.poses(1, 1.0, source.plan.noise).noise, drawn[4 * lane : 4 * lane + 4])


def test_training_does_not_read_the_truth(particles: ParticleSet, tmp_path: Path) -> None:
    config = load_config(*SMALL, "train.evaluate_every=1")
    copy = tmp_path / "without"
    copy.mkdir()
    for file in particles.path.iterdir():
        if file.suffix == ".parquet":
            table = pq.read_table(file).drop_columns(list(TRUTH_COLUMNS))
            pq.write_table(table, copy / file.name, row_group_size=256, write_page_checksum=True)
    blind = ParticleSet(copy, particles.manifest)
    assert blind.read_truth() is None
    seeing = trainer(config, particles, score=truth_score(particles))
    assert losses(trainer(config, blind)) == losses(seeing)


def test_training_on_fourier_crops_gives_a_smaller_volume_and_shifts_of_the_stored_box(particles: ParticleSet) -> None:
    source = trainer(load_config(*SMALL, "data.box=12"), particles)
    losses(source)
    assert source.volume().shape == (12, 12, 12)
    assert source.sampler.particles.pixel_size_angstrom == pytest.approx(
        particles.manifest.pixel_size_angstrom * 16 / 12
    )
    limit = 4.0 * 0.03 * BOX
    assert source.predict().shift_px.abs().max() <= limit + 1e-5


def test_lanes_share_out_the_row_groups(particles: ParticleSet) -> None:
    assert row_groups_of_lanes(particles, {0}, 2) == [RowGroup(0, 0), RowGroup(1, 0)]
    assert row_groups_of_lanes(particles, {1}, 2) == [RowGroup(0, 1), RowGroup(1, 1)]
    source = trainer(load_config(*SMALL, "train.lanes=2"), particles)
    ids = [set(source.sampler.particles.particle_id[lane.rows].tolist()) for lane in source.sampler.lanes]
    assert ids[0] == {*range(256), *range(512, 768)}
    assert ids[1] == {*range(256, 512), *range(768, 1024)}


def test_lanes_that_cannot_be_shared_out_are_refused(particles: ParticleSet) -> None:
    with pytest.raises(ConfigError, match=r"train\.lanes: 3 lanes cannot be shared equally by 2 workers"):
        lane_count(load_config("train.lanes=3", "resources.workers=2"))
    with pytest.raises(ConfigError, match=r"train\.batch: 64 particles cannot be shared equally by 3 lanes"):
        lane_count(load_config("train.lanes=3"))
    with pytest.raises(ConfigError, match=r"train\.lanes: 5 lanes, but .* has only 4 row groups"):
        row_groups_of_lanes(particles, {0}, 5)


def test_lanes_divide_a_half_set_and_none_may_be_empty(particles: ParticleSet) -> None:
    config, half = load_config(*SMALL, "train.lanes=2"), open_particles(particles.path, 2)
    source = trainer(config, half)
    ids = [set(source.sampler.particles.particle_id[lane.rows].tolist()) for lane in source.sampler.lanes]
    assert ids[0] == {*range(1, 256, 2), *range(513, 768, 2)}
    assert ids[1] == {*range(257, 512, 2), *range(769, 1024, 2)}
    some = read_here(half, half.row_groups()[:1], BOX)
    with pytest.raises(DataError, match="lane 1 has no particle of half set 2"):
        build_trainer(config, half, some)


def held_out_ids(source: Trainer) -> set[int]:
    particle_id = source.sampler.particles.particle_id
    return {int(particle_id[row]) for lane in source.sampler.lanes for row in lane.held_out}


def test_the_same_particles_are_held_out_for_any_seed_lanes_and_workers(particles: ParticleSet) -> None:
    expected = held_out_ids(trainer(load_config(*SMALL, "data.heldout_fraction=0.1"), particles))
    assert 60 < len(expected) < 150
    for lanes, workers in ((1, 1), (2, 1), (4, 1), (4, 2)):
        settings = (
            *SMALL,
            "data.heldout_fraction=0.1",
            f"train.lanes={lanes}",
            f"resources.workers={workers}",
            "seed=7",
        )
        config, found = load_config(*settings), set()
        for rank in range(workers):
            stack = read_here(particles, row_groups_of_lanes(particles, range(rank, lanes, workers), lanes), BOX)
            share = build_trainer(config, particles, stack, rank=rank, world_size=workers)
            for lane in share.sampler.lanes:
                assert not set(lane.rows.tolist()) & set(lane.held_out.tolist())
            sampled = [
                row for step in range(1, 200) for lane in share.sampler.lanes for row in share.sampler._rows(lane, step)
            ]
            sampled = {int(share.sampler.particles.particle_id[row]) for row in sampled}
            assert sampled | held_out_ids(share) == set(stack.particle_id.tolist())
            assert not sampled & held_out_ids(share)
            found |= held_out_ids(share)
        assert found == expected


def test_nothing_is_held_out_unless_asked(particles: ParticleSet) -> None:
    source = trainer(load_config(*SMALL), particles)
    assert held_out_ids(source) == set() and len(source.sampler.lanes[0].rows) == 1024


def test_a_share_too_small_to_hold_out_anything_is_refused(particles: ParticleSet) -> None:
    with pytest.raises(ConfigError, match=r"^data\.heldout_fraction: 1e-06 holds out 0 of the 512 particles of lane 0"):
        trainer(load_config(*SMALL, "train.lanes=2", "data.heldout_fraction=1e-6"), particles)


def test_weights_depend_on_the_seed_of_the_run_and_leave_the_global_stream_alone(particles: ParticleSet) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        trainer(load_config(*SMALL, f"seed={seed}"), particles).model.encoder.rotation.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_the_dataset_opens_again(particles: ParticleSet) -> None:
    assert open_particles(particles.path).manifest == particles.manifest


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp", 3)])
def test_the_small_network_reads_poses_by_one_layer_or_the_papers_three(
    kind: str, layers: int, particles: ParticleSet
) -> None:
    config = load_config("base", *SMALL, f"encoder.regressor={kind}", "encoder.heads=2")
    encoder = trainer(config, particles).model.encoder
    for head, outputs in ((encoder.rotation, 12), (encoder.shift, 2)):
        linear = [module for module in head.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linear) == layers and linear[-1].out_features == outputs
