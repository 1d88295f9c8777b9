"""Several starts of a run, one after another in this process; the best is kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import aceray
from aceray.config import Config
from aceray.distributed import starts
from aceray.distributed.starts import folder_of_starts, study_of_starts, train_starts
from aceray.distributed.trial import TrialEvent
from aceray.errors import ConfigError, DataError, NonFiniteLoss
from aceray.presets import load_config
from aceray.study import load_study

Configure = Callable[..., Config]
SCORE = "select/d4_consistency_median"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "_address", lambda config: "none")


def scores(config: Config) -> dict[int, float]:
    trials = folder_of_starts(config) / "trials"
    return {
        json.loads((each / "trial.json").read_text())["point"]["seed"]: json.loads((each / "metrics.json").read_text())[
            SCORE
        ]
        for each in trials.iterdir()
    }


def test_the_best_start_is_the_run(configure: Configure) -> None:
    config, events = configure("seeds=3"), []
    result = aceray.train(config, on_progress=events.append)
    found = scores(config)
    assert sorted(found) == [3, 4, 5] and len(set(found.values())) == 3
    best = min(found, key=lambda seed: found[seed])
    assert result.metrics[SCORE] == found[best]
    kept = load_config(str(result.paths["config"]))
    assert (kept.seed, kept.seeds, kept.name, kept.runs) == (best, 1, config.name, config.runs)
    assert result.folder == Path(config.runs) / config.name
    assert not (result.folder / "trial.json").exists()
    assert {event.name for event in events} == {"seed_3", "seed_4", "seed_5"}
    assert all(isinstance(event, TrialEvent) for event in events)
    assert aceray.evaluate(result.folder).metrics[SCORE] == pytest.approx(found[best])  # it is a run like any other
    assert f"seed_{best}" in aceray.api.leaderboard_of_starts(config).read_text().split("| 1 |")[1].split("\n")[0]


def test_what_is_there_is_not_overwritten_unless_asked_to(configure: Configure) -> None:
    config = configure("seeds=2", "train.steps=10", "train.evaluate_every=10")
    first = train_starts(config)
    before = first.paths["volume"].stat().st_mtime_ns
    with pytest.raises(DataError, match="a run of this name is finished; nothing was touched"):
        train_starts(config)
    assert first.paths["volume"].stat().st_mtime_ns == before
    done: list[TrialEvent] = []
    assert train_starts(config, "resume", done.append).metrics == first.metrics
    assert done == []  # nothing was trained again
    again = train_starts(config, "overwrite", done.append)
    assert done and again.metrics[SCORE] == first.metrics[SCORE]
    assert [path.name for path in Path(config.runs).iterdir() if ".partial" in path.name] == []


def test_a_folder_that_is_no_run_is_not_touched(configure: Configure) -> None:
    config = configure("seeds=2")
    target = Path(config.runs) / config.name
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("mine")
    for existing in ("error", "overwrite", "resume"):
        with pytest.raises(DataError):
            train_starts(config, existing)
    assert (target / "thesis.txt").read_text() == "mine"
    assert not folder_of_starts(config).exists()


def test_starts_that_all_fail(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NonFiniteLoss("training step 1: ipi is nan")

    monkeypatch.setattr("aceray.distributed.trial.train_share", fail, raising=False)
    monkeypatch.setattr("aceray.distributed.run.train_share", fail)
    with pytest.raises(DataError, match="none of 2 starts came to an end; the first: training step 1: ipi is nan"):
        train_starts(configure("seeds=2"))


def test_the_score_of_a_refined_run_and_a_lone_worker(configure: Configure) -> None:
    config = load_config("demo", "seeds=4", "seed=7")
    study = study_of_starts(config)
    assert config.resources.workers == 1 and 'resources={"workers": 0' in " ".join(study.base)
    assert study.objective[0].metric == "refine/energy"
    assert study.space["seed"].values == (7, 8, 9, 10)
    assert study_of_starts(configure("seeds=2")).objective[0].metric == SCORE


def test_a_trial_is_one_start() -> None:
    with pytest.raises(ConfigError, match=r"seeds: a trial is one start, found 2; vary seed instead"):
        load_study("study/smoke", "seeds=2")
