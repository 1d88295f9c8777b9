"""A study in a real sqlite store of MLflow: one parent, a child a trial, grandchildren for the runs of a pair."""

import contextlib
import csv
import json
import re
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from aceray.config import Config
from aceray.data.particles import ParticleSet
from aceray.distributed import trial
from aceray.distributed.share import Share, train_share
from aceray.distributed.study_run import StudyResult, run_study
from aceray.distributed.trial import TrialEvent
from aceray.errors import NonFiniteLoss
from aceray.presets import flat, load_config
from aceray.study import Study
from aceray.tracking.store import shortened
from aceray.train.loop import Progress
from tests.distributed.test_study_run import Make


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Making the tables takes seconds, so the tests of this file share a database."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'ml.db'}"


@pytest.fixture
def client(database: str) -> MlflowClient:
    return MlflowClient(tracking_uri=database)


@pytest.fixture
def make(tmp_path: Path, particle_set: ParticleSet, database: str, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Studies of two members whose comparison is given, which are tracked."""
    monkeypatch.setattr(trial, "_half_maps", lambda volumes, size: {"select/half_map_fsc_area": 0.25})
    made = Make(tmp_path, particle_set)
    made.defaults = {"objective": "pose/coverage"}
    made.more = ("tracking.enabled=true", f"tracking.uri={database}", f"tracking.experiment={tmp_path.name}")
    return made


def runs_of(client: MlflowClient, experiment: str) -> dict[str, Run]:
    """All runs by name, of which none may come twice."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = list(client.search_runs([found.experiment_id]))
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {str(run.info.run_name): run for run in runs}


def steps(client: MlflowClient, run: Run, metric: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def interrupted(study: Study) -> None:
    """The study, ended by Ctrl-C in its second trial."""

    def interrupt(event: TrialEvent) -> None:
        if event.name == "weight_2.0" and event.report is None and event.status == "running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, "none", on_event=interrupt)


def test_a_study_is_a_parent_with_children(make: Make, client: MlflowClient, tmp_path: Path) -> None:
    study = make()
    interrupted(study)
    result: StudyResult = run_study(study, "none", resume=True)
    runs = runs_of(client, tmp_path.name)
    assert set(runs) == {"tiny", "weight_0.0", "weight_2.0"}
    assert runs["tiny"].info.run_id == result.mlflow_run_id
    assert runs["tiny"].data.tags["aceray.study"] == "tiny"
    for name in ("weight_0.0", "weight_2.0"):
        run, folder = runs[name], result.folder / "trials" / name
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == result.mlflow_run_id
        assert run.data.tags["aceray.trial"] == name and run.data.tags["aceray.status"] == "finished"
        digest = json.loads((folder / "run.json").read_text())["dataset_sha256"]
        assert run.data.tags["aceray.dataset_sha256"] == digest
        settings = flat(load_config(str(folder / "config.yaml")))
        assert run.data.params == {key: str(value) for key, value in settings.items()}
        assert steps(client, run, "train/loss_total") == list(range(1, 21))
        assert run.data.metrics["train/steps"] == 20
        metrics = json.loads((folder / "metrics.json").read_text())
        news = {key: value for key, value in metrics.items() if not key.startswith("train/loss")}
        assert {key: run.data.metrics[key] for key in news} == news
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "volume.mrc", "figures", "history.jsonl"} <= files
        assert json.loads((folder / "run.json").read_text())["mlflow_run_id"] == run.info.run_id
    before = {name: run.info.end_time for name, run in runs.items()}
    run_study(study, "none", resume=True)
    again = runs_of(client, tmp_path.name)
    assert {name: run.info.end_time for name, run in again.items() if name != "tiny"} == {
        name: time for name, time in before.items() if name != "tiny"
    }
    assert steps(client, again["weight_0.0"], "train/steps") == [20]


def test_the_best_trial_is_a_model_version_called_best(make: Make, client: MlflowClient) -> None:
    study = make(name="ranked", objective="train/particles_per_second")
    result = run_study(study, "none")
    speeds = {name: notes["metrics"]["train/particles_per_second"] for name, notes in result.trials.items()}
    best = max(speeds, key=speeds.__getitem__)
    version = client.get_model_version_by_alias("ranked", "best")
    run = client.get_run(str(version.run_id))
    assert run.info.run_name == best
    assert version.source == run.info.artifact_uri
    run_study(study, "none", resume=True)
    assert len(client.search_model_versions("name='ranked'")) == 1


def test_the_runs_of_a_pair_are_grandchildren(make: Make, client: MlflowClient, tmp_path: Path) -> None:
    study = make(members="half_sets", space={"pip.weight": [2.0]}, objective="select/half_map_fsc_area")

    def interrupt(event: TrialEvent) -> None:
        if event.report is None and event.status == "running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, "none", on_event=interrupt)
    result = run_study(study, "none", resume=True)
    runs = runs_of(client, tmp_path.name)
    assert set(runs) == {"tiny", "weight_2.0", "weight_2.0/half_1", "weight_2.0/half_2"}
    child = runs["weight_2.0"]
    assert child.data.tags["mlflow.parentRunId"] == result.mlflow_run_id
    assert child.data.metrics["select/half_map_fsc_area"] == 0.25
    # only what both halves share is a setting of the pair
    assert child.data.params["pip.weight"] == "2.0" and "data.half_set" not in child.data.params
    for number in (1, 2):
        half = runs[f"weight_2.0/half_{number}"]
        assert half.data.tags["mlflow.parentRunId"] == child.info.run_id
        assert half.data.params["data.half_set"] == str(number)
        assert steps(client, half, "train/loss_total") == list(range(1, 21))
        assert half.info.status == "FINISHED"


def test_an_outage_in_the_middle_is_made_up_for(
    make: Make, client: MlflowClient, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """Another process has the database for itself while the first trial runs; at the end it has everything."""
    monkeypatch.setattr("aceray.tracking.sender.SECONDS_A_BATCH", 0.1)
    other = sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)
    asked: list[str] = []

    def hold(event: TrialEvent) -> None:
        if not asked:
            other.execute("BEGIN EXCLUSIVE")
        asked.append(event.status)
        deadline = time.monotonic() + 60
        while "does not answer" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
        if event.status == "finished":
            other.execute("ROLLBACK")

    with contextlib.closing(other):
        run_study(make(space={"pip.weight": [0.0]}), "none", on_event=hold)
    assert len([record for record in caplog.records if "MLflow does not answer" in record.message]) == 1
    run = runs_of(client, tmp_path.name)["weight_0.0"]
    assert steps(client, run, "train/loss_total") == list(range(1, 21))
    assert run.info.status == "FINISHED" and run.data.tags["aceray.tracking"] == "complete"


def test_a_failed_trial_is_failed_in_the_store(
    make: Make, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: object) -> object:
        raise NonFiniteLoss("training step 1: loss_ipi is nan")
        yield

    monkeypatch.setattr("aceray.distributed.run.train_share", diverging)
    run_study(make(space={"pip.weight": [2.0]}), "none")
    run = runs_of(client, tmp_path.name)["weight_2.0"]
    assert run.info.status == "FAILED"
    assert run.data.tags["aceray.stop_reason"] == "training step 1: loss_ipi is nan"
    assert run.data.params == {"pip.weight": "2.0"}


def test_a_trial_interrupted_at_a_report_goes_on_in_its_run(make: Make, client: MlflowClient, tmp_path: Path) -> None:
    """The run is open and has the points up to the report; what comes after resuming is added, nothing twice."""
    # the newest checkpoint is older than the report, so that some steps are made again
    study = make("train.checkpoint_every=8", space={"pip.weight": [2.0]})
    seen: list[str] = []

    def interrupt(event: TrialEvent) -> None:
        if event.report is not None and event.report.step == 10:
            deadline = time.monotonic() + 60  # it is sent in the background
            run = None
            while run is None or len(steps(client, run, "train/loss_total")) < 10:
                time.sleep(0.2)
                run = runs_of(client, tmp_path.name).get("weight_2.0")
                assert time.monotonic() < deadline
            assert (run.info.status, steps(client, run, "train/loss_total")) == ("RUNNING", list(range(1, 11)))
            seen.append(run.info.run_id)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, "none", on_event=interrupt)
    cut = runs_of(client, tmp_path.name)["weight_2.0"]
    assert cut.info.status == "KILLED" and cut.data.tags["aceray.status"] == "interrupted"
    run_study(study, "none", resume=True)
    runs = runs_of(client, tmp_path.name)
    assert set(runs) == {"tiny", "weight_2.0"}
    run = runs["weight_2.0"]
    assert [run.info.run_id] == seen
    assert run.info.status == "FINISHED" and run.data.tags["aceray.status"] == "finished"
    assert run.data.tags["aceray.stop_reason"] == ""
    assert steps(client, run, "train/loss_total") == list(range(1, 21))
    # once while training and once, of all particles, at the end
    assert steps(client, run, "pose/coverage") == [10, 20, 20]


def test_a_pair_interrupted_at_a_report_goes_on_in_its_runs(make: Make, client: MlflowClient, tmp_path: Path) -> None:
    study = make(members="half_sets", space={"pip.weight": [2.0]}, objective="select/half_map_fsc_area")

    def interrupt(event: TrialEvent) -> None:
        if event.report is not None and event.report.step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, "none", on_event=interrupt)
    before = {name: run.info.run_id for name, run in runs_of(client, tmp_path.name).items()}
    assert set(before) == {"tiny", "weight_2.0", "weight_2.0/half_1", "weight_2.0/half_2"}
    run_study(study, "none", resume=True)
    runs = runs_of(client, tmp_path.name)
    assert {name: run.info.run_id for name, run in runs.items()} == before
    for name in ("weight_2.0/half_1", "weight_2.0/half_2"):
        assert steps(client, runs[name], "train/loss_total") == list(range(1, 21))
    # of the pair: one point a report, and the final scores
    assert steps(client, runs["weight_2.0"], "select/half_map_fsc_area") == [10, 20, 20]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_the_leaderboard_is_what_mlflow_holds(
    make: Make, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three trials the second fails after its first report; every number of the table is that of its run."""

    def diverging(config: Config, *rest: Any) -> Generator[Progress, None, Share]:
        for progress in train_share(config, *rest):
            if progress.step == 15:
                raise NonFiniteLoss("training step 15: loss_ipi is nan")
            yield progress
        raise AssertionError

    def of(config: Config, *rest: Any) -> Generator[Progress, None, Share]:
        return (diverging if config.pip.weight == 2 else train_share)(config, *rest)

    monkeypatch.setattr("aceray.distributed.run.train_share", of)
    result = run_study(make(space={"pip.weight": [0.5, 2.0, 8.0]}), "none")
    rows = list(csv.DictReader(result.paths["leaderboard.csv"].read_text().splitlines()))
    assert sorted(row["trial"] for row in rows) == ["weight_0.5", "weight_2.0", "weight_8.0"]
    assert (rows[-1]["trial"], rows[-1]["rank"], rows[-1]["status"]) == ("weight_2.0", "", "failed")
    runs = runs_of(client, tmp_path.name)
    for row in rows:
        run = runs[row["trial"]]
        assert (row["status"], row["reason"]) == (
            run.data.tags["aceray.status"],
            run.data.tags["aceray.stop_reason"],
        )
        assert row["pip.weight"] == run.data.params["pip.weight"]
        shown = {key: float(value) for key, value in row.items() if "/" in key and value}
        assert "pose/coverage" in shown
        assert shown == {key: run.data.metrics[key] for key in shown}
    failed = runs["weight_2.0"]
    assert failed.info.status == "FAILED"
    assert steps(client, failed, "pose/coverage") == [10]
    # the parent has the very file, and a note that leads to the finished trials side by side
    parent = client.get_run(str(result.mlflow_run_id))
    stored = client.download_artifacts(parent.info.run_id, "leaderboard.csv", str(tmp_path))
    assert Path(stored).read_text() == result.paths["leaderboard.csv"].read_text()
    link, training = parent.data.tags["mlflow.note.content"].splitlines()[0].split(" · ")
    compared = [runs[row["trial"]].info.run_id for row in rows if row["status"] == "finished"]
    ids, experiments = (json.loads(text) for text in re.findall(r"=([^&)]*)", unquote(link)))
    assert link.startswith("[Compare the trials](#/compare-runs?runs=")
    assert (ids, experiments) == (compared, [parent.info.experiment_id])
    assert training == f"[All runs](#/experiments/{parent.info.experiment_id}?workflowType=machine_learning)"


def test_runs_name_their_presets_and_parents_hold_the_figures(make: Make, client: MlflowClient, tmp_path: Path) -> None:
    groups = {"presets": {"with": ["method/ace_em", *make.base], "without": ["method/no_pip", *make.base]}}
    result = run_study(make(space={"method": groups}), "none")
    runs = runs_of(client, tmp_path.name)
    assert runs["with"].data.tags["aceray.presets"] == "method/ace_em"
    assert runs["without"].data.tags["aceray.presets"] == "method/no_pip"
    files = {file.path for file in client.list_artifacts(str(result.mlflow_run_id))}
    assert files == {"study.yaml", "leaderboard.csv", "leaderboard.md", "figures"}
    figures = {file.path for file in client.list_artifacts(str(result.mlflow_run_id), "figures")}
    assert figures == {f"figures/{file.name}" for file in result.paths["figures"].iterdir()} != set()


def test_a_note_is_cut_at_the_end_of_a_line() -> None:
    lines = [f"| {number:04d} | {'x' * 100} |\n" for number in range(100)]
    short = "".join(lines[:60])
    assert shortened(short) == short
    cut = shortened("".join(lines))
    assert len(cut) <= 8000 and cut.startswith("".join(lines[:70]))
    *kept, empty, rest = cut.splitlines(keepends=True)
    assert kept == lines[: len(kept)] and (empty, rest[:8]) == ("\n", "The rest")
