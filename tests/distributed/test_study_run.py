"""A study in this process, without Ray: trials one after another, what they leave, how it goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from aceray.data.particles import ParticleSet
from aceray.distributed import study_run
from aceray.distributed.study_run import open_study, run_study
from aceray.distributed.trial import TrialEvent
from aceray.errors import DataError
from aceray.study import Study, load_study
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

STEPS = ("train.steps=20", "train.evaluate_every=10", "train.checkpoint_every=5")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> ParticleSet:
    return write_particles(tmp_path_factory.mktemp("truth") / "blobs", truth=True)


class Make:
    """Studies below a folder."""

    def __init__(self, folder: Path, particles: ParticleSet) -> None:
        self.folder, self.particles = folder, particles

    def __call__(self, *overrides: str, **keys: object) -> Study:
        base = [*QUICK, *STEPS, f"data.path={self.particles.path}"]
        found = {
            "name": "tiny",
            "studies": str(self.folder / "studies"),
            "base": base,
            "space": {"pip.weight": [0.0, 2.0]},
            "objective": "pose/rotation_sqfrob_mean",
            **keys,
        }
        file = self.folder / "tiny.yaml"
        file.write_text(yaml.safe_dump(found, sort_keys=False))
        return load_study(str(file), *overrides)


@pytest.fixture
def make(tmp_path: Path, truth: ParticleSet) -> Make:
    return Make(tmp_path, truth)


def notes_of(study: Study) -> dict[str, dict]:
    files = sorted((Path(study.studies) / study.name / "trials").glob("*/trial.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def history(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "train/particles_per_second"} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, truth: ParticleSet
) -> tuple[Study, list[TrialEvent], study_run.StudyResult]:
    events: list[TrialEvent] = []
    study = Make(tmp_path_factory.mktemp("undisturbed"), truth)()
    return study, events, run_study(study, "none", on_event=events.append)


def test_a_study_leaves_a_run_folder_for_each_trial(undisturbed) -> None:
    study, _, result = undisturbed
    assert list(result.trials) == ["weight_0.0", "weight_2.0"]
    assert result.count("finished") == 2
    for name, notes in result.trials.items():
        folder = result.folder / "trials" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        assert notes["metrics"] == metrics
        assert (notes["status"], notes["reason"]) == ("finished", "")
        assert notes["seconds"] > 0
        assert [row["step"] for row in history(folder)] == list(range(1, 21))
        assert "trials" in yaml.safe_load((folder / "config.yaml").read_text())["runs"]
    assert result.trials["weight_2.0"]["point"] == {"pip.weight": 2.0}
    assert load_study(str(result.folder / "study.yaml")) == study
    assert open_study(result.folder).trials == result.trials


def test_events_of_a_study_come_in_order(undisturbed) -> None:
    _, events, _ = undisturbed
    seen = [(event.name, event.status, event.report.step if event.report else None) for event in events]
    each = [("running", None), ("running", 10), ("finished", 20)]
    assert seen == [(name, *rest) for name in ("weight_0.0", "weight_2.0") for rest in each]
    report = events[1].report
    assert report is not None and report.checkpoint is not None and report.checkpoint.name == "step-000010.safetensors"
    assert {"pose/rotation_sqfrob_mean", "train/loss_total", "train/wall_seconds"} <= set(report.metrics)


def test_a_study_interrupted_goes_on_to_the_same_result(make: Make, undisturbed) -> None:
    def interrupt(event: TrialEvent) -> None:
        if event.name == "weight_2.0" and event.report is not None and event.report.step == 10:
            raise KeyboardInterrupt

    study = make()
    with pytest.raises(KeyboardInterrupt):
        run_study(study, "none", on_event=interrupt)
    assert [notes["status"] for notes in notes_of(study).values()] == ["finished", "interrupted"]
    with pytest.raises(DataError, match="--resume"):
        run_study(study, "none")
    events: list[TrialEvent] = []
    result = run_study(study, "none", resume=True, on_event=events.append)
    steps = [event.report.step for event in events if event.report]
    assert {event.name for event in events} == {"weight_2.0"}
    assert steps == [20]
    reference = undisturbed[2]
    for name, notes in result.trials.items():
        assert history(result.folder / "trials" / name) == history(reference.folder / "trials" / name)
        volumes = [(each.folder / "trials" / name / "volume.mrc").read_bytes() for each in (result, reference)]
        assert np.array_equal(*[np.frombuffer(volume, np.uint8)[1024:] for volume in volumes])
        times = ("train/wall_seconds", "train/particles_per_second")
        assert {k: v for k, v in notes["metrics"].items() if k not in times} == {
            k: v for k, v in reference.trials[name]["metrics"].items() if k not in times
        }
