"""A study in a real sqlite store of MLflow: one parent, a child a trial, grandchildren for the runs of a pair."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from aceray.data.particles import ParticleSet
from aceray.distributed import trial
from aceray.distributed.study_run import StudyResult, run_study
from aceray.distributed.trial import TrialEvent
from aceray.presets import flat, load_config
from aceray.study import Study
from aceray.tracking.study import MlflowStudyTracker
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
    make: Make, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """The store is away while the first trial runs; at the end it has everything."""
    follow, away = MlflowStudyTracker._follow, [True]

    def unplugged(self: MlflowStudyTracker, *arguments: object) -> None:
        if away[0]:
            raise MlflowException("no route to host")
        follow(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowStudyTracker, "_follow", unplugged)

    def plug_in(event: TrialEvent) -> None:
        if event.status == "finished":
            away[0] = False

    run_study(make(space={"pip.weight": [0.0]}), "none", on_event=plug_in)
    assert len([record for record in caplog.records if "MLflow does not answer" in record.message]) == 1
    run = runs_of(client, tmp_path.name)["weight_0.0"]
    assert steps(client, run, "train/loss_total") == list(range(1, 21))
    assert run.info.status == "FINISHED"


def test_a_failed_trial_is_failed_in_the_store(
    make: Make, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aceray.errors import NonFiniteLoss

    def diverging(*_: object) -> object:
        raise NonFiniteLoss("training step 1: loss_ipi is nan")
        yield

    monkeypatch.setattr("aceray.distributed.run.train_share", diverging)
    run_study(make(space={"pip.weight": [2.0]}), "none")
    run = runs_of(client, tmp_path.name)["weight_2.0"]
    assert run.info.status == "FAILED"
    assert run.data.tags["aceray.stop_reason"] == "training step 1: loss_ipi is nan"
    assert run.data.params == {"pip.weight": "2.0"}
