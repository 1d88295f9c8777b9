"""The metrics that trials can be compared by."""

from dataclasses import dataclass
from typing import Literal

Needs = Literal["", "truth", "half_sets", "two_seeds", "heldout", "refinement"]


@dataclass(frozen=True)
class Criterion:
    """A metric that trials can be compared by: which direction is better, and what it takes to have it."""

    mode: Literal["min", "max"]
    needs: Needs = ""


CRITERIA: dict[str, Criterion] = {
    "fsc/resolution_px_0.5": Criterion("min", "truth"),
    "fsc/resolution_px_0.143": Criterion("min", "truth"),
    "fsc/auc": Criterion("max", "truth"),
    "pose/rotation_sqfrob_mean": Criterion("min", "truth"),
    "pose/rotation_sqfrob_median": Criterion("min", "truth"),
    "pose/fraction_below_half": Criterion("max", "truth"),
    "pose/shift_sq_px_mean": Criterion("min", "truth"),
    "pose/coverage": Criterion("max"),
    "pose/view_entropy": Criterion("max"),
    "select/d4_consistency": Criterion("min"),
    "select/d4_consistency_median": Criterion("min"),
    "select/heldout_loss": Criterion("min", "heldout"),
    "select/heldout_whitened": Criterion("min", "heldout"),
    "select/residual_loss": Criterion("min"),
    "select/residual_whitened": Criterion("min"),
    "select/half_map_fsc_area": Criterion("max", "half_sets"),
    "select/half_map_resolution_px": Criterion("min", "half_sets"),
    "select/pose_agreement_sqfrob": Criterion("min", "two_seeds"),
    "refine/energy": Criterion("min", "refinement"),
    "train/wall_seconds": Criterion("min"),
    "train/particles_per_second": Criterion("max"),
}
