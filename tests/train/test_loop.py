"""The loop: it repeats, resumes, stops before a bad step, and is not disturbed by being watched."""

import pytest
import torch
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob
from aceray.errors import DataError, NonFiniteLoss
from aceray.train.lanes import Lane, Sampler
from aceray.train.loop import Plan, Trainer
from aceray.train.objective import Objective
from aceray.train.predict import Particles, calibrate_normalisation, predict
from aceray.train.schedule import TaskWeights, WarmupCosine
from tests.train.phantom import BOX, autoencoder, projections

STEPS = 8


def trainer(score=None, heads: int = 2, evaluate_every: int = 100, particles: Particles | None = None) -> Trainer:
    particles = particles or projections(64)[0]
    model = autoencoder(heads)
    objective = Objective(model, symmetric=False, shift_spread_px=1.0, shift_weight=0.2, train_shift=True)
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
        0.01,
        BOX,
    )
    return Trainer(objective, optimiser, sampler, plan, score=score)


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
    assert events[0].metrics == {"pose/coverage": 0.5}
    assert [event.losses for event in events] == losses(trainer())


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
