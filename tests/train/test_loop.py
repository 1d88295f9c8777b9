"""The loop: it repeats, resumes, stops before a bad step, and is not disturbed by being watched."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob
from aceray.errors import DataError, NonFiniteLoss
from aceray.train.lanes import Lane, Sampler
from aceray.train.loop import Plan, Trainer
from aceray.train.objective import Objective, ShiftMoments
from aceray.train.predict import Particles, Poses, calibrate_normalisation, predict
from aceray.train.schedule import LabelFilters, ShiftWeight, TaskWeights, WarmupCosine
from aceray.train.select import pose_agreement
from tests.train.phantom import BOX, autoencoder, projections

STEPS = 8


def trainer(
    score=None,
    heads: int = 2,
    evaluate_every: int = 100,
    particles: Particles | None = None,
    matched: bool = False,
    **plans,
) -> Trainer:
    particles = particles or projections(64)[0]
    model = autoencoder(heads)
    objective = Objective(
        model,
        shift_spread_px=1.0,
        shift_weight=0.2,
        train_shift=True,
        shifts=ShiftMoments(1.0) if matched else None,
    )
    optimiser = torch.optim.AdamW(
        [{"params": model.encoder.parameters(), "lr": 1e-3}, {"params": model.decoder.parameters(), "lr": 1e-2}]
    )
    sampler = Sampler(particles, [Lane(0, torch.arange(len(particles)))], HalfDisc(BOX), 1, 8, 8)
    plan = Plan(
        STEPS,
        TaskWeights(1.0, 0, False),
        WarmupCosine(STEPS, 2, 0.3, 0.1),
        evaluate_every,
        4,
        True,
        1.0,
        0.1,
        ShiftWeight(0.01, STEPS),
        BOX,
    )
    return Trainer(objective, optimiser, sampler, replace(plan, **plans), score=score)


def losses(source: Trainer) -> list[dict[str, float]]:
    return [progress.losses for progress in source.run()]


def test_progress_tells_the_step_the_losses_and_what_is_due() -> None:
    events = list(trainer().run())
    assert [event.step for event in events] == list(range(1, STEPS + 1))
    assert [event.checkpoint_due for event in events] == [step in (4, 8) for step in range(1, STEPS + 1)]
    assert set(events[0].losses) == {"loss_ipi", "loss_pip", "loss_shift", "loss_total"}


def test_equal_seeds_give_equal_losses() -> None:
    assert losses(trainer()) == losses(trainer())


def test_watching_does_not_disturb() -> None:
    seen = []
    watched = trainer(lambda poses, volume: seen.append(poses) or {"pose/coverage": 0.5}, evaluate_every=1)
    events = list(watched.run())
    assert len(seen) == STEPS
    assert events[0].metrics["pose/coverage"] == 0.5
    assert [event.losses for event in events] == losses(trainer())


SCORES = {"select/d4_consistency", "select/d4_consistency_median"}
RESIDUALS = {f"{kind}{band}" for kind in ("loss", "whitened") for band in ("", "_low", "_middle", "_high")}


def blind(poses: Poses, volume: torch.Tensor) -> dict[str, float]:
    """What there is to say without the truth, beside the scores that need none."""
    return {}


def test_evaluations_draw_no_random_numbers_and_need_no_truth() -> None:
    state = torch.get_rng_state()
    events = list(trainer(blind, evaluate_every=3).run())
    assert torch.equal(state, torch.get_rng_state())
    assert [bool(event.metrics) for event in events] == [step in (3, 6, 8) for step in range(1, STEPS + 1)]
    assert set(events[2].metrics) == SCORES | {f"select/residual_{name}" for name in RESIDUALS}
    assert [event.losses for event in events] == losses(trainer())


def test_an_evaluation_leaves_a_snapshot_to_compare_runs_by() -> None:
    first, second = trainer(blind, evaluate_every=4), trainer(blind, evaluate_every=4)
    second.sampler.seed = 2
    events = list(zip(first.run(), second.run(), strict=True))
    for one, other in events:
        assert (one.snapshot is None) == (other.snapshot is None) == (not one.metrics)
    snapshots = [(one.snapshot, other.snapshot) for one, other in events if one.snapshot and other.snapshot]
    for one, other in snapshots:
        assert pose_agreement(one.poses, other.poses)["select/pose_agreement_sqfrob"] > 1e-4
    one, other = snapshots[-1]
    assert torch.equal(one.poses.particle_id, other.poses.particle_id)
    # what was seen then stays, though training went on
    assert not torch.equal(snapshots[0][0].volume, one.volume)
    assert torch.equal(one.volume, first.volume())


def with_held_out(held_out: torch.Tensor, particles: Particles) -> Trainer:
    source = trainer(blind, particles=particles)
    rows = torch.arange(len(particles))
    source.sampler.lanes = [Lane(0, rows[~torch.isin(rows, held_out)], held_out)]
    return source


def test_held_out_particles_are_measured_and_never_touched() -> None:
    held_out = torch.arange(1, 64, 5)
    source = with_held_out(held_out, projections(64)[0])
    events = list(source.run())
    assert set(events[-1].metrics) == SCORES | {f"select/heldout_{name}" for name in RESIDUALS}
    unseen = predict(source.model, source.sampler.particles.take(held_out), BOX)
    assert events[-1].metrics["select/heldout_loss"] == pytest.approx(float(unseen.residual.mean()), rel=1e-4)
    assert len(source.predict().rotation) == 64
    assert source.scores()["select/heldout_loss"] == pytest.approx(
        float(predict(source.model, source.sampler.particles.take(held_out), BOX).residual.mean()), rel=1e-4
    )
    # images or contrast transfer of a held-out particle would spoil every loss
    spoilt = projections(64)[0]
    spoilt.coefficients[held_out] = float("nan")
    assert spoilt.ctf is not None
    spoilt.ctf.defocus_u_angstrom[held_out] = float("nan")
    steps = with_held_out(held_out, spoilt).run()
    assert [next(steps).losses for _ in range(7)] == [event.losses for event in events[:7]]


def test_a_resumed_run_ends_as_an_undisturbed_one() -> None:
    whole, first, second = trainer(), trainer(), trainer()
    expected = losses(whole)
    steps = first.run()
    before = [next(steps).losses for _ in range(4)]
    second.restore(*first.checkpoint())
    assert before + losses(second) == expected
    for name, tensor in whole.checkpoint()[0].items():
        assert_close(second.checkpoint()[0][name], tensor, atol=0, rtol=0)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(DataError, match=r"another model: model\.encoder\.rotation\.weight has shape \(18, 32\)"):
        trainer(heads=2).restore(*trainer(heads=3).checkpoint())


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    particles = projections(64)[0]
    source = trainer(particles=particles)
    steps = source.run()
    for _ in range(3):
        next(steps)
    before = {name: tensor.clone() for name, tensor in source.checkpoint()[0].items() if "running" not in name}
    particles.coefficients.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="step 4: loss_ipi is nan"):
        next(steps)
    after = source.checkpoint()[0]
    parameters = [name for name in before if name.startswith("optimiser") or "weight" in name or "density" in name]
    assert all(torch.equal(before[name], after[name]) for name in parameters)


def test_training_lowers_both_losses() -> None:
    source = trainer(particles=projections(256)[0])
    source.plan = Plan(**{**vars(source.plan), "steps": 150, "learning_rate": WarmupCosine(150, 10, 0.3, 0.1)})
    history = losses(source)
    for term in ("loss_ipi", "loss_pip"):
        early, late = (sum(step[term] for step in part) / 20 for part in (history[:20], history[-20:]))
        assert late < 0.92 * early


def test_training_and_inference_agree_on_real_images() -> None:
    particles = projections(1024)[0]
    source = trainer(particles=particles)
    losses(source)
    model = source.model
    ctf = particles.transfer(torch.arange(1024), model.disc)

    @torch.no_grad()
    def disagreement() -> float:
        model.eval()
        inference = model.encoder(particles.coefficients, ctf).rotation
        model.train()
        return float(rotation_sqfrob(inference, model.encoder(particles.coefficients, ctf).rotation).mean())

    mixed = disagreement()
    calibrate_normalisation(model, particles)
    assert disagreement() < 2e-4
    assert mixed > 2e-3


def test_predicted_shifts_are_in_pixels_of_the_stored_images() -> None:
    particles = projections(16)[0]
    model = autoencoder()
    at_box, at_double = predict(model, particles, BOX), predict(model, particles, 2 * BOX)
    assert_close(at_double.shift_px, 2 * at_box.shift_px)
    assert_close(at_double.rotation, at_box.rotation)
    assert at_box.particle_id.tolist() == list(range(16))


ALTERNATING = TaskWeights(1.0, 3, False, alternating=True)


def test_alternating_steps_do_one_task_at_a_time() -> None:
    source = trainer(weights=ALTERNATING)
    moved, tasks = [], []
    for progress in source.run():
        tasks.append(set(progress.losses) - {"loss_total"})
        moved.append(source.model.decoder.density.detach().clone())
    images, poses = {"loss_ipi", "loss_shift"}, {"loss_pip"}
    assert tasks == [images, images, images, images, poses, images, poses, images]
    # the volume learns from images alone
    assert [not torch.equal(*pair) for pair in itertools.pairwise(moved)] == [task == images for task in tasks[1:]]


def test_alternating_steps_leave_out_no_image() -> None:
    source = trainer(weights=ALTERNATING)
    seen, draw = [], source.sampler.images
    source.sampler.images = lambda step, augment, loss: seen.append(step) or draw(step, augment, loss)
    losses(source)
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("loss", ["symmetric", "generalised"])
def test_a_resumed_run_of_every_kind_ends_as_an_undisturbed_one(loss: str) -> None:
    plans = {"loss": loss, "weights": ALTERNATING, "labels": LabelFilters([(5, 3)]), "matched": True}
    whole, first, second = (trainer(**plans) for _ in range(3))
    expected = losses(whole)
    steps = first.run()
    before = [next(steps).losses for _ in range(4)]
    second.restore(*first.checkpoint())
    assert before + losses(second) == expected
    assert "shifts.square" in whole.checkpoint()[0]


def test_labels_are_filtered_until_their_step() -> None:
    plain, warm = losses(trainer()), losses(trainer(labels=LabelFilters([(1, 4)])))
    assert warm[0]["loss_ipi"] < 0.9 * plain[0]["loss_ipi"]
    assert warm[0]["loss_pip"] == plain[0]["loss_pip"]
    # frozen, the next step sees the same parameters and the image itself
    frozen = [trainer(), trainer(labels=LabelFilters([(1, 4)]))]
    for one in frozen:
        one._base_rates = [0.0, 0.0]
    first, second = (losses(one) for one in frozen)
    assert first[0]["loss_ipi"] != second[0]["loss_ipi"]
    assert first[1:] == second[1:]


def test_the_weight_of_the_shifts_falls_to_the_end() -> None:
    source = trainer(shift_weight=ShiftWeight(3.0, STEPS, "linear"), weights=TaskWeights(0.0, 0, False))
    for progress in source.run():
        weight = 3.0 * (1 - (progress.step - 1) / STEPS) / BOX
        found = progress.losses
        assert found["loss_total"] == pytest.approx(found["loss_ipi"] + weight * found["loss_shift"])
