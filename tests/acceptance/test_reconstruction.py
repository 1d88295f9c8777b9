"""Reconstruction from a random start really happens, and PIP is what makes it happen."""

from pathlib import Path

import pytest

import aceray
from tests.bench.training import Reconstruction, reconstruct

SMALL = (
    "simulation.box=20",
    "simulation.pixel_size_angstrom=27.2",
    "simulation.particles=1500",
    "encoder.width=256",
    "optim.warmup_steps=50",
    "train.steps=500",
    "resources.workers=0",
)


def run(folder: Path, preset: str, *overrides: str) -> Reconstruction:
    config = aceray.load_config(preset, *overrides, f"data.path={folder / 'data'}", "train.evaluate_every=100000")
    aceray.simulate(config, existing="keep")
    return reconstruct(config)


def test_pip_beats_no_pip_at_equal_steps_on_a_small_box(tmp_path: Path) -> None:
    with_pip = run(tmp_path, "clean", *SMALL, "seed=1").metrics
    without = run(tmp_path, "clean", *SMALL, "seed=1", "pip.weight=0").metrics
    assert without["pose/rotation_sqfrob_mean"] > 2
    assert with_pip["pose/rotation_sqfrob_mean"] < 0.5 * without["pose/rotation_sqfrob_mean"]
    assert without["pose/coverage"] < 0.9
    assert with_pip["pose/coverage"] > 0.95
    assert with_pip["fsc/resolution_px_0.5"] < 2.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize(("preset", "resolution_px", "median"), [("clean", 2.1, 0.03), ("demo", 3.0, 0.25)])
def test_fresh_seeds_meet_the_bars(tmp_path: Path, preset: str, resolution_px: float, median: float, seed: int) -> None:
    metrics = run(tmp_path, preset, "resources.workers=0", f"seed={seed}").metrics
    assert metrics["fsc/resolution_px_0.5"] <= resolution_px
    assert metrics["pose/rotation_sqfrob_median"] <= median
    assert metrics["pose/coverage"] >= 0.95
