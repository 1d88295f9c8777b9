"""Reconstruction from a random start really happens, and PIP is what makes it happen."""

from pathlib import Path

import pytest

import aceray
from aceray.config import Config
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


def loaded(folder: Path, preset: str, *overrides: str) -> Config:
    paths = f"data.path={folder / 'data'}", f"runs={folder / 'runs'}"
    return aceray.load_config(preset, *overrides, *paths, "tracking.enabled=false", "train.evaluate_every=100000")


def trained(folder: Path, preset: str, *overrides: str) -> dict[str, float]:
    config = loaded(folder, preset, *overrides)
    aceray.simulate(config, existing="keep")
    return aceray.train(config).metrics


def test_pip_beats_no_pip_at_equal_steps_on_a_small_box(tmp_path: Path) -> None:
    with_pip = run(tmp_path, "clean", *SMALL, "seed=1").metrics
    without = run(tmp_path, "clean", *SMALL, "seed=1", "pip.weight=0").metrics
    assert without["pose/rotation_sqfrob_mean"] > 2
    assert with_pip["pose/rotation_sqfrob_mean"] < 0.5 * without["pose/rotation_sqfrob_mean"]
    assert without["pose/coverage"] < 0.9
    assert with_pip["pose/coverage"] > 0.95
    assert with_pip["fsc/resolution_px_0.5"] < 2.2


def test_refinement_makes_rough_poses_exact_on_a_small_box(tmp_path: Path) -> None:
    metrics = trained(tmp_path, "clean", *SMALL, "train.steps=250", "seed=1")
    assert metrics["pose/fraction_below_half"] > 0.99
    assert metrics["pose/rotation_sqfrob_median"] < 0.002
    assert metrics["fsc/resolution_px_0.5"] < 2.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_noise_free_images_are_solved_exactly(tmp_path: Path, seed: int) -> None:
    metrics = trained(tmp_path, "clean", f"seed={seed}")
    assert metrics["pose/rotation_sqfrob_mean"] <= 0.001
    assert metrics["fsc/resolution_px_0.5"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_demo_is_solved_to_the_noise(tmp_path: Path, seed: int) -> None:
    metrics = trained(tmp_path, "demo", "resources.workers=0", f"seed={seed}")
    assert metrics["pose/fraction_below_half"] >= 0.99
    assert metrics["pose/rotation_sqfrob_median"] <= 0.002
    assert metrics["fsc/resolution_px_0.5"] <= 2.1


@pytest.mark.slow
def test_a_larger_box_at_less_signal_comes_near_the_true_poses_map(tmp_path: Path) -> None:
    config = loaded(tmp_path, "data/spliceosome_64_m10db", "simulation.particles=8000", "seed=11")
    aceray.simulate(config, existing="keep")
    result = aceray.train(config)
    metrics = aceray.evaluate_with_oracle(result.folder).metrics
    assert metrics["pose/fraction_below_half"] >= 0.99
    assert metrics["pose/rotation_sqfrob_median"] <= 3 * metrics["oracle/pose/rotation_sqfrob_median"]
    assert metrics["pose/shift_sq_px_median"] <= 2 * metrics["oracle/pose/shift_sq_px_median"]
    assert metrics["fsc/resolution_px_0.5"] <= metrics["oracle/fsc/resolution_px_0.5"] + 0.1
