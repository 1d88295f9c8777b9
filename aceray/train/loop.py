"""The training loop: a generator that yields after every step and leaves files, screens and clusters to others."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aceray.errors import DataError, NonFiniteLoss
from aceray.train.background import Noise
from aceray.train.lanes import Loss, Sampler
from aceray.train.objective import Objective
from aceray.train.predict import Particles, Poses, calibrate_normalisation, predict
from aceray.train.schedule import LabelFilters, LearningRate, ShiftWeight, TaskWeights
from aceray.train.select import dihedral_metrics, residual_metrics
from aceray.train.statistics import broadcast_from_first


@dataclass(frozen=True)
class Snapshot:
    """What an evaluation looked at: poses of a part of the particles, the same at every step, and the volume.

    Two runs, such as two seeds, are compared by it at the same step (train/select.py).
    """

    poses: Poses
    volume: Float[Tensor, "d d d"]


@dataclass(frozen=True)
class Progress:
    """What one step did. `metrics` is empty and `snapshot` is None unless an evaluation was due.

    The snapshot stays in the process that trains: it is None in what comes from the workers of a cluster. `details` are
    for whoever watches the run, not for its journal: step_seconds, data_wait_seconds, pip_weight, label_filter.
    """

    step: int
    steps: int
    losses: dict[str, float]
    particles_per_second: float
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint_due: bool = False
    snapshot: Snapshot | None = field(default=None, compare=False, repr=False)
    details: dict[str, float] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Plan:
    """When things happen, and with what weight."""

    steps: int
    weights: TaskWeights
    learning_rate: LearningRate
    evaluate_every: int
    checkpoint_every: int
    augment: bool
    shift_spread_px: float
    noise: Noise
    shift_weight: ShiftWeight
    stored_box: int
    loss: Loss = "mse"
    labels: LabelFilters = field(default_factory=LabelFilters)
    clip_norm: float | None = None
    contrastive_weight: float = 0.0


Score = Callable[[Poses, Tensor], dict[str, float]]
"""Metrics of predicted poses and a volume: what may know the truth, and gives training nothing back."""

_CALIBRATION_PARTICLES = 4096
_EVALUATION_PARTICLES = 1024


class Trainer:
    """A model in training: `run` yields progress, everything between two yields is one step.

    `score` measures what each evaluation predicts; without it there are no evaluations.
    """

    def __init__(
        self,
        objective: Objective,
        optimiser: torch.optim.Optimizer,
        sampler: Sampler,
        plan: Plan,
        *,
        score: Score | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.model, self._bare = objective.model, objective
        self.objective = wrap(objective)
        self.optimiser, self.sampler, self.plan, self._score = optimiser, sampler, plan, score
        self._base_rates = [group["lr"] for group in optimiser.param_groups]
        self.step = 0
        self._waited_seconds = 0.0  # in this step, for its images

    def run(self) -> Iterator[Progress]:
        """Train from the present step to the last one of the plan.

        Raises:
            NonFiniteLoss: a loss is not a number; the parameters are those before this step.
        """
        self.model.train()
        while self.step < self.plan.steps:
            started, self._waited_seconds = time.perf_counter(), 0.0
            losses = self._learn(self.step + 1)
            self.step += 1
            seconds = time.perf_counter() - started
            rate = self.sampler.particles_per_step / seconds
            last = self.step == self.plan.steps
            evaluation_due = self._score is not None and (last or self.step % self.plan.evaluate_every == 0)
            metrics, snapshot = self._evaluate() if evaluation_due else ({}, None)
            checkpoint_due = last or self.step % self.plan.checkpoint_every == 0
            details = self._details(seconds)
            yield Progress(self.step, self.plan.steps, losses, rate, metrics, checkpoint_due, snapshot, details)

    def predict(self) -> Poses:
        """Poses of all particles of this worker."""
        self.calibrate()
        return predict(self.model, self.sampler.particles, self.plan.stored_box)

    def calibrate(self) -> None:
        """Set the encoder up for inference on real images, alike on all workers."""
        rows = self.sampler.lanes[0].rows[:_CALIBRATION_PARTICLES]
        calibrate_normalisation(self.model, self.sampler.particles, rows)
        broadcast_from_first(list(self.model.buffers()))

    def scores(self) -> dict[str, float]:
        """Label-free metrics (train/select.py) of a part of this worker's particles, the encoder being calibrated."""
        few = self._few()
        return self._scores(few, predict(self.model, few, self.plan.stored_box))

    def volume(self) -> Float[Tensor, "d d d"]:
        """The decoder's volume in the units of the stored images' density, at the training box."""
        return (self.model.decoder.volume() * self.model.signal_std).detach().cpu()

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All tensors of the objective and the optimiser by name, and the step; nothing else is needed to go on."""
        tensors = dict(self._bare.state_dict())
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in state.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"step": self.step}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, int]) -> None:
        """Continue from a checkpoint.

        Raises:
            DataError: the checkpoint is of another model.
        """
        own = self._bare.state_dict()
        _check_same_model(own, tensors)
        self._bare.load_state_dict({name: tensors[name] for name in own})
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": states})
        self.step = metadata["step"]

    def _details(self, seconds: float) -> dict[str, float]:
        """Of the step that was just done."""
        return {
            "step_seconds": seconds,
            "data_wait_seconds": self._waited_seconds,
            "pip_weight": self.plan.weights.at(self.step - 1)[1],
            "label_filter": float(self.plan.labels.at(self.step - 1)),
        }

    def _evaluate(self) -> tuple[dict[str, float], Snapshot]:
        """Metrics of a part of the particles; draws no random numbers, so training goes on as if it were not there."""
        few = self._few()
        calibrate_normalisation(self.model, few)
        poses, volume = predict(self.model, few, self.plan.stored_box), self.volume()
        metrics = {} if self._score is None else self._score(poses, volume)
        metrics = metrics | self._scores(few, poses)
        self.model.train()
        return metrics, Snapshot(poses, volume)

    def _few(self) -> Particles:
        particles = self.sampler.particles
        rows = torch.arange(min(_EVALUATION_PARTICLES, len(particles)), device=self.model.signal_std.device)
        return particles.take(rows)

    def _scores(self, few: Particles, poses: Poses) -> dict[str, float]:
        """Consistency of the encoder on a few particles; residuals of held-out ones or, without any, of those few."""
        model, box = self.model, self.plan.stored_box
        metrics = dihedral_metrics(model, few, poses.rotation)
        held_out = torch.cat([lane.held_out for lane in self.sampler.lanes])[:_EVALUATION_PARTICLES]
        if not len(held_out):
            return metrics | residual_metrics("residual", model, few, poses, box)
        unseen = self.sampler.particles.take(held_out.to(model.signal_std.device))
        return metrics | residual_metrics("heldout", model, unseen, predict(model, unseen, box), box)

    def _learn(self, step: int) -> dict[str, float]:
        """One optimiser step on the weighted sum of both tasks (ACE-EM eqs. 8 and 14)."""
        plan = self.plan
        ipi_weight, pip_weight = plan.weights.at(step - 1)
        drawn = self.sampler.poses(step, plan.shift_spread_px, plan.noise) if pip_weight > 0 else None
        batch = None
        if drawn is None or not plan.weights.alternating:
            started = time.perf_counter()
            batch = self.sampler.images(plan.weights.image_steps(step), plan.augment, plan.loss)
            self._waited_seconds = time.perf_counter() - started
        terms = self.objective(batch, drawn, plan.labels.at(step - 1))
        parts = []
        if batch is not None:
            shift_weight = plan.shift_weight.at(step - 1) / self.model.disc.box
            images = terms["ipi"] + shift_weight * terms["shift"]
            if "contrastive" in terms:
                images = images + plan.contrastive_weight * terms["contrastive"]
            parts.append(ipi_weight * images)
        if drawn is not None:
            parts.append(pip_weight * terms["pip"])
        total = torch.stack(parts).sum()
        losses = _finite(step, {**terms, "total": total})
        factor = plan.learning_rate.factor(step - 1)
        for group, base in zip(self.optimiser.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        if plan.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._bare.parameters(), plan.clip_norm)
        self.optimiser.step()
        return losses


def _finite(step: int, terms: dict[str, Tensor]) -> dict[str, float]:
    # one transfer from the device for all terms
    values = torch.stack([term.detach() for term in terms.values()]).tolist()
    losses = {f"loss_{name}": value for name, value in zip(terms, values, strict=True)}
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"training step {step}: {name} is {value}; nothing was updated in this step. "
                "Lower optim.encoder_lr or optim.decoder_lr, or check the images for damage."
            )
    return losses


def _check_same_model(own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in own.items():
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(tensor.shape):
            raise DataError(
                f"checkpoint: it is of another model: {name} has shape {shape}, here it has {tuple(tensor.shape)}. "
                "Use the settings it was trained with."
            )
    extra = sorted(name for name in found if name.startswith(("model.", "shifts.")) and name not in own)
    if extra:
        raise DataError(
            f"checkpoint: it is of another model, which has {extra[0]}. Use the settings it was trained with."
        )
