"""Composition root: from settings and particles to a trainer."""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from aceray.config import BackgroundNoise, Config, ManifestNoise, SnrNoise
from aceray.data.particles import ParticleSet, ParticleStack, RowGroup
from aceray.em.formation import noise_std_for_snr
from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from aceray.errors import ConfigError, DataError
from aceray.metrics.masks import molecule_mask
from aceray.models import siren, voxel
from aceray.models.autoencoder import AutoEncoder, Decoder
from aceray.models.encoder import (
    CnnFeatures,
    MlpFeatures,
    PoseEncoder,
    ResNet18Features,
    StandardisedInput,
    VggFeatures,
    WienerInput,
    normalised_regressor,
    regressor,
    start_as_cryoai,
)
from aceray.networks import CnnEncoder, MlpEncoder, Resnet18Encoder, SirenDecoder, VggEncoder, VoxelDecoder
from aceray.train.background import Noise, WhiteNoise, measure_background
from aceray.train.evaluate import evaluate
from aceray.train.lanes import Lane, Sampler
from aceray.train.loop import Plan, Score, Trainer
from aceray.train.objective import Objective, ShiftMoments
from aceray.train.predict import Particles, particles_from_stack
from aceray.train.refine import Limits, Refiner, Round
from aceray.train.schedule import (
    LabelFilters,
    LearningRate,
    Ramp,
    ShiftWeight,
    TaskWeights,
    WarmupCosine,
    WarmupMultiStep,
)
from aceray.train.select import held_out
from aceray.train.statistics import ImageStatistics, image_statistics, sum_over_workers

# filtered particles of each lane from which the input's scale is taken
_SCALE_PARTICLES = 512
_RESCUE_RADIUS = 1.5  # over that of the search: few are searched, so it may be fine


def lane_count(config: Config) -> int:
    """Lanes of a run: as set, otherwise one for each worker.

    Raises:
        ConfigError: the lanes or the batch cannot be shared out evenly.
    """
    workers = max(1, config.resources.workers)
    lanes = config.train.lanes or workers
    if lanes % workers:
        raise ConfigError(f"train.lanes: {lanes} lanes cannot be shared equally by {workers} workers; use a multiple.")
    if config.train.batch % lanes or config.train.batch < 2 * lanes:
        raise ConfigError(
            f"train.batch: {config.train.batch} particles cannot be shared equally by {lanes} lanes; use a multiple of "
            f"{lanes}, at least {2 * lanes}."
        )
    return lanes


def training_box(config: Config, stored_box: int) -> int:
    """Box that a run trains at, pixels."""
    return min(config.data.box or stored_box, stored_box)


def last_step(config: Config) -> int:
    """Number of the last step of a run: those of the training, then one for each round of refinement."""
    refine = config.refine
    if refine is None:
        return config.train.steps
    return config.train.steps + refine.search_rounds + int(refine.registers) + refine.polish_rounds


def refinement_rounds(config: Config, stored_box: int) -> list[Round]:
    """The rounds of a run's refinement, none without one."""
    if config.refine is None:
        return []
    plan, box = config.refine, training_box(config, stored_box)
    largest = max(box, min(plan.box or stored_box, stored_box))
    # where doubling would not get there, larger factors
    growth = max(2.0, (largest / box) ** (1 / max(1, plan.polish_rounds)))
    ladder = [min(largest, 2 * round(box * growth ** (number + 1) / 2)) for number in range(plan.polish_rounds)]
    radius, steps = min(plan.search_radius, box / 2), plan.steps
    rounds = [Round(box, steps, radius, 1.0)] * plan.search_rounds
    if plan.registers:
        # after the first: search upon search hardens wrong registers until the map no longer shows its near-symmetry
        rounds.insert(1, Round(box, steps, radius, registers=True))
    return rounds + [Round(each, steps, radius * _RESCUE_RADIUS, plan.rescued_fraction) for each in ladder]


def final_box(config: Config, stored_box: int) -> int:
    """Box of a run's volume, pixels."""
    return max([training_box(config, stored_box), *(each.box for each in refinement_rounds(config, stored_box))])


def row_groups_of_lanes(particles: ParticleSet, mine: Collection[int], lanes: int) -> list[RowGroup]:
    """The row groups of some lanes: group g of the dataset belongs to lane g modulo the number of lanes.

    Raises:
        ConfigError: there are more lanes than row groups.
    """
    groups = particles.row_groups()
    if lanes > len(groups):
        raise ConfigError(
            f"train.lanes: {lanes} lanes, but {particles.path} has only {len(groups)} row groups; use fewer lanes or "
            "workers, or more particles."
        )
    return [group for index, group in enumerate(groups) if index % lanes in mine]


def build_trainer(
    config: Config,
    particles: ParticleSet,
    stack: ParticleStack,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    score: Score | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Trainer:
    """Model, optimiser, data and plan of one worker, whose particles (all of its lanes) are `stack`.

    `wrap` puts the objective into DistributedDataParallel where there are several workers.
    """
    box = training_box(config, particles.manifest.box)
    disc = HalfDisc(box).to(device)
    pixel_size_angstrom = particles.manifest.pixel_size_angstrom * particles.manifest.box / box
    images = particles_from_stack(stack, disc, pixel_size_angstrom)
    statistics = image_statistics(images, disc, particles.manifest.noise_std)
    images = images.scaled(1 / statistics.signal_std)
    lanes = _lanes(config, particles, stack, range(rank, lane_count(config), world_size))
    model = _build_model(config, disc, statistics, images, lanes).to(device)
    shift_spread_px = config.data.shift_sigma_fraction * box
    objective = Objective(
        model,
        shift_spread_px=shift_spread_px,
        shift_weight=config.pip.shift_weight,
        train_shift=config.ipi.train_shift,
        train_decoder=config.pip.train_decoder,
        shifts=ShiftMoments(shift_spread_px) if config.pip.shifts == "matched" else None,
        lanes=len(lanes),
        contrastive=config.ipi.contrastive_weight > 0,
    ).to(device)
    plan = Plan(
        config.train.steps,
        _task_weights(config),
        _learning_rate(config),
        config.train.evaluate_every,
        config.train.checkpoint_every,
        config.ipi.augment,
        shift_spread_px,
        _drawn_noise(config, particles.manifest.noise_std, statistics, stack, lanes, disc),
        ShiftWeight(config.ipi.shift_l1_weight, config.train.steps, config.ipi.shift_l1_schedule),
        particles.manifest.box,
        config.ipi.loss,
        LabelFilters([(stage.until_step, stage.filter) for stage in config.ipi.label_filters]),
        config.optim.clip_norm,
        config.ipi.contrastive_weight,
    )
    batch = config.train.batch // lane_count(config)
    sampler = Sampler(images, lanes, disc, config.seed, batch, round(batch * config.pip.batch_factor))
    return Trainer(objective, _build_optimiser(config, model), sampler, plan, score=score, wrap=wrap)


def build_refiner(config: Config, particles: ParticleSet, stack: ParticleStack, device: str | torch.device) -> Refiner:
    """The refinement of one worker, whose particles are `stack`, at the box of the run's volume."""
    assert config.refine is not None
    stored, disc = particles.manifest.box, HalfDisc(stack.images.shape[-1]).to(device)
    spread = config.data.shift_sigma_fraction * stored
    return Refiner(
        particles_from_stack(stack, disc, particles.manifest.pixel_size_angstrom * stored / disc.box),
        disc,
        refinement_rounds(config, stored),
        stored_box=stored,
        shift_spread_px=spread if spread > 0 else None,
        limits=Limits(
            config.refine.settled_fraction,
            config.refine.rescued_fraction,
            config.refine.near_symmetry,
            config.refine.halves == "independent",
        ),
        seed=config.seed,
        support=molecule_mask if config.refine.mask == "molecule" else torch.ones_like,
    )


def _lanes(config: Config, particles: ParticleSet, stack: ParticleStack, mine: Iterable[int]) -> list[Lane]:
    """Which rows of the worker's stack belong to which of its lanes."""
    lane_of_row = particles.group_of_particle()[stack.particle_id] % lane_count(config)
    aside = held_out(stack.particle_id, config.data.heldout_fraction)
    found = []
    for number in mine:
        own = lane_of_row == number
        lane = Lane(number, (own & ~aside).nonzero()[:, 0], (own & aside).nonzero()[:, 0])
        if not own.any():
            raise DataError(
                f"{particles.path}: lane {number} has no particle of half set {particles.half_set}; use fewer "
                "lanes (train.lanes) or workers"
            )
        _check_held_out(config.data.heldout_fraction, lane)
        found.append(lane)
    return found


def _check_held_out(fraction: float, lane: Lane) -> None:
    sampled, held = len(lane.rows), len(lane.held_out)
    if fraction and not (sampled and held):
        raise ConfigError(
            f"data.heldout_fraction: {fraction:g} holds out {held} of the {sampled + held} particles of lane "
            f"{lane.number}; use another share, fewer lanes (train.lanes) or workers, or 0 to hold out none."
        )


def truth_score(particles: ParticleSet) -> Score:
    """Metrics against the truth, as far as the dataset has one; what evaluation alone may use."""
    truth, volume = particles.read_truth(), particles.read_truth_volume()
    pixel_size_angstrom = particles.manifest.pixel_size_angstrom
    return lambda poses, predicted: evaluate(predicted, poses, truth, volume, pixel_size_angstrom).metrics


def _build_model(
    config: Config, disc: HalfDisc, statistics: ImageStatistics, images: Particles, lanes: list[Lane]
) -> AutoEncoder:
    box, heads = disc.box, config.encoder.heads
    # initial weights come from a stream of their own, the same on every worker
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(named_generator("train/weights", config.seed).get_state())
        match config.encoder:
            case MlpEncoder(width=width, depth=depth, regressor=kind):
                features: nn.Module = MlpFeatures(box, width, depth)
                read = nn.Linear if kind == "linear" else regressor
                rotation: nn.Module = read(width, 6 * heads)
                shift: nn.Module = read(width, 2)
            case VggEncoder():
                features = VggFeatures(box)
                rotation = start_as_cryoai(normalised_regressor(features.features, 6 * heads))
                shift = start_as_cryoai(regressor(features.features, 2))
            case CnnEncoder():
                features = CnnFeatures(box)
                rotation = nn.Sequential(normalised_regressor(features.features, 6 * heads), nn.Tanh())
                shift = regressor(features.features, 2)
            case Resnet18Encoder():
                features = ResNet18Features(box)
                rotation, shift = regressor(features.features, 6 * heads), regressor(features.features, 2)
        decoder = _build_decoder(config, disc)
    shift_limit_px = config.encoder.shift_range_sigma * config.data.shift_sigma_fraction * box
    preprocess = _input_filter(config, disc, statistics, images, lanes)
    encoder = PoseEncoder(preprocess, features, rotation, shift, shift_limit_px)
    return AutoEncoder(encoder, decoder, disc, statistics.signal_std)


def _build_decoder(config: Config, disc: HalfDisc) -> Decoder:
    match config.decoder:
        case SirenDecoder() as chosen:
            projected = siren.LatticeSirenDecoder if chosen.projector == "lattice" else siren.SirenDecoder
            return projected(
                disc,
                chosen.width,
                content_depth=chosen.content_depth,
                envelope_depth=chosen.envelope_depth,
                content_frequency=chosen.content_frequency,
                envelope_frequency=chosen.envelope_frequency,
                scale=chosen.scale,
            )
        case VoxelDecoder() as chosen:
            kind = voxel.RotatedVoxelDecoder if chosen.projector == "rotate" else voxel.VoxelDecoder
            return kind(disc, chosen.pad, scale=chosen.scale, mask_radius=chosen.mask_radius_fraction)


def _input_filter(
    config: Config, disc: HalfDisc, statistics: ImageStatistics, images: Particles, lanes: list[Lane]
) -> nn.Module:
    if config.encoder.input == "standardised":
        return StandardisedInput(disc)
    wiener = WienerInput(disc, statistics.noise_to_signal).to(disc.radius.device)
    few = images.take(torch.cat([lane.rows[:_SCALE_PARTICLES] for lane in lanes]).to(disc.radius.device))
    squares = wiener(few.coefficients, few.transfer(torch.arange(len(few)), disc)).square()
    total, count = sum_over_workers(torch.stack([squares.sum(), squares.new_tensor(squares.numel())]))
    wiener.scale.copy_((total / count).sqrt())
    return wiener


def _drawn_noise(
    config: Config,
    noise_std: float,
    statistics: ImageStatistics,
    stack: ParticleStack,
    lanes: list[Lane],
    disc: HalfDisc,
) -> Noise:
    """The noise of PIP's images, in units of the signal's standard deviation."""
    match config.pip.noise:
        case ManifestNoise():
            return WhiteNoise(noise_std / statistics.signal_std)
        case SnrNoise(snr_db=snr_db):
            return WhiteNoise(noise_std_for_snr(1.0, snr_db))
        case BackgroundNoise(radius_fraction=radius_fraction):
            rows = [lane.rows for lane in lanes]
            background = measure_background(stack.images, rows, radius_fraction, disc.radius.device)
            return background.noise(disc, statistics.signal_std)


def _build_optimiser(config: Config, model: AutoEncoder) -> torch.optim.Optimizer:
    """AdamW; every parameter is in one of its groups, encoder first."""
    groups = [
        {
            "params": list(model.encoder.parameters()),
            "lr": config.optim.encoder_lr,
            "weight_decay": config.optim.weight_decay,
        },
        {"params": list(model.decoder.parameters()), "lr": config.optim.decoder_lr, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=config.optim.betas, amsgrad=config.optim.amsgrad, fused=True)
    match config.decoder, model.decoder:
        case VoxelDecoder(nonnegative=True), voxel.VoxelDecoder() as decoder:
            optimiser.register_step_post_hook(lambda *_: decoder.clamp_negative())
    return optimiser


def _task_weights(config: Config) -> TaskWeights:
    pip = config.pip
    ramp = Ramp(pip.schedule, pip.ramp_steps, pip.initial_factor)
    alternating = pip.turns == "alternating"
    return TaskWeights(pip.weight, pip.warmup_steps, pip.combination == "convex", ramp, alternating)


def _learning_rate(config: Config) -> LearningRate:
    optim, steps = config.optim, config.train.steps
    match optim.schedule:
        case "cosine":
            return WarmupCosine(steps, optim.warmup_steps, optim.hold_fraction, optim.final_factor)
        case "multistep":
            return WarmupMultiStep(steps, optim.warmup_steps, optim.milestones)
