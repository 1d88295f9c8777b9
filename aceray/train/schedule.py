"""What changes with the step: learning rates and the weights of the two tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear ramp, constant until `hold` (share of all steps), then half a cosine down to `floor`."""

    steps: int
    warmup_steps: int
    hold: float
    floor: float

    def factor(self, step: int) -> float:
        progress = max(0.0, step / self.steps - self.hold) / (1 - self.hold)
        cosine = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return cosine * min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True)
class WarmupMultiStep:
    """Linear ramp from a third, then a tenth at each milestone (share of all steps): WarmupMultiStepLR of the paper."""

    steps: int
    warmup_steps: int
    milestones: Sequence[float]

    def factor(self, step: int) -> float:
        ramp = min(1.0, step / max(1, self.warmup_steps))
        passed = sum(step >= milestone * self.steps for milestone in self.milestones)
        return (1 / 3 + 2 / 3 * ramp) * 0.1**passed


LearningRate = WarmupCosine | WarmupMultiStep
"""Factor on the base learning rates, by step counted from 0."""


@dataclass(frozen=True)
class TaskWeights:
    """Weights (IPI, PIP) of a step (ACE-EM eqs. 14 and 15): PIP is off before its warm-up is over.

    `convex` weighs IPI by one minus PIP's weight, otherwise IPI keeps weight one.
    """

    pip_weight: float
    pip_warmup_steps: int
    convex: bool

    def at(self, step: int) -> tuple[float, float]:
        pip = self.pip_weight if step >= self.pip_warmup_steps else 0.0
        return (1.0 - pip if self.convex else 1.0), pip
