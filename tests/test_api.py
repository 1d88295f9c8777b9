"""The verbs in Python, as far as they go without a dataset."""

from pathlib import Path

import pytest

import aceray
from aceray.errors import ConfigError, DataError


def test_train_without_a_dataset_names_the_folder(tmp_path: Path) -> None:
    config = aceray.load_config(f"data.path={tmp_path}/none", f"runs={tmp_path}/runs", "tracking.enabled=false")
    with pytest.raises(DataError, match="none"):
        aceray.train(config)
    assert not (tmp_path / "runs").exists()


def test_evaluate_without_a_run_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing-run"):
        aceray.evaluate(tmp_path / "missing-run")


def test_simulate_needs_a_simulation() -> None:
    with pytest.raises(ConfigError, match="nothing to simulate"):
        aceray.simulate(aceray.load_config("base"))
