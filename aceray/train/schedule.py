"""What changes with the step, counted from 0: learning rates, weights of the losses, filters of the labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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
class Ramp:
    """Factor that goes from `initial` to one in `steps` steps: at once, along a line or along half a cosine."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 1
    initial: float = 0.0

    def factor(self, step: int) -> float:
        progress = min(1.0, step / self.steps)
        match self.shape:
            case "constant":
                return 1.0
            case "linear":
                return self.initial + (1 - self.initial) * progress
            case "cosine":
                return self.initial + (1 - self.initial) * (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class TaskWeights:
    """Weights (IPI, PIP) of a step (ACE-EM eqs. 14 and 15): PIP is off in its warm-up, then its ramp begins.

    `convex` weighs IPI by one minus PIP's weight, otherwise IPI keeps weight one. `alternating` gives the steps after
    the warm-up to IPI and PIP in turn, IPI first; a step of one task has weight zero for the other.
    """

    pip_weight: float
    pip_warmup_steps: int
    convex: bool
    ramp: Ramp = Ramp()
    alternating: bool = False

    def at(self, step: int) -> tuple[float, float]:
        since = step - self.pip_warmup_steps
        pip = self.pip_weight * self.ramp.factor(since) if since >= 0 else 0.0
        ipi = 1.0 - pip if self.convex else 1.0
        if self.alternating and pip > 0:
            return (0.0, pip) if since % 2 else (ipi, 0.0)
        return ipi, pip

    def image_steps(self, steps: int) -> int:
        """How many of the first `steps` steps look at images: the others are PIP's alone."""
        if not self.alternating or self.pip_weight == 0:
            return steps
        return steps - max(0, steps - self.pip_warmup_steps) // 2


@dataclass(frozen=True)
class ShiftWeight:
    """Weight of the mean |shift| (ACE-EM eq. 8): constant, or falling along a line to zero at the end of the run."""

    weight: float
    steps: int
    shape: Literal["constant", "linear"] = "constant"

    def at(self, step: int) -> float:
        return self.weight if self.shape == "constant" else self.weight * (1 - step / self.steps)


@dataclass(frozen=True)
class LabelFilters:
    """Which Gaussian filter, 1 to 5, images pass before they are compared with (ACE-EM eq. 10).

    `stages` are (until_step, filter), ascending; filter 1, which changes nothing, follows the last one.
    """

    stages: Sequence[tuple[int, int]] = ()

    def at(self, step: int) -> int:
        return next((number for until, number in self.stages if step < until), 1)
