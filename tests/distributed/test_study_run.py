"""A study in this process, without Ray: trials one after another, what they leave, how it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import yaml

from aceray.config import Config
from aceray.data.particles import ParticleSet
from aceray.distributed import study_run, trial
from aceray.distributed.run import exhaust, run
from aceray.distributed.share import Share, train_share
from aceray.distributed.study_run import list_trials, open_study, random_points, run_study
from aceray.distributed.trial import TrialEvent, make_trial, run_trial
from aceray.errors import ConfigError, DataError, NonFiniteLoss
from aceray.study import Study, load_study
from aceray.train.loop import Progress
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

ROOT = Path(__file__).parents[2]
STEPS = ("train.steps=20", "train.evaluate_every=10", "train.checkpoint_every=5")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> ParticleSet:
    return write_particles(tmp_path_factory.mktemp("truth") / "blobs", truth=True)


class Make:
    """Studies below a folder."""

    def __init__(self, folder: Path, particles: ParticleSet) -> None:
        self.folder, self.particles = folder, particles
        self.defaults: dict[str, object] = {}
        self.more: tuple[str, ...] = ()

    @property
    def base(self) -> list[str]:
        return [*QUICK, *STEPS, f"data.path={self.particles.path}", *self.more]

    def __call__(self, *overrides: str, **keys: object) -> Study:
        found = {
            "name": "tiny",
            "studies": str(self.folder / "studies"),
            "base": self.base,
            "space": {"pip.weight": [0.0, 2.0]},
            "objective": "pose/rotation_sqfrob_mean",
            **self.defaults,
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


# ---- without truth an evaluation takes no time


@pytest.fixture
def quick(tmp_path: Path, particle_set: ParticleSet) -> Make:
    make = Make(tmp_path, particle_set)
    make.defaults = {"objective": "pose/coverage"}
    return make


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The settings of every run that began to train."""
    seen: list[Config] = []

    def watched(config: Config, *rest: Any) -> Generator[Progress, None, Share]:
        seen.append(config)
        return (yield from train_share(config, *rest))

    monkeypatch.setattr("aceray.distributed.run.train_share", watched)
    return seen


def test_a_trial_that_fails_leaves_its_reason_and_the_study_goes_on(quick: Make, monkeypatch) -> None:
    def diverging(config: Config, *rest: Any) -> Generator[Progress, None, Share]:
        for progress in (share := train_share(config, *rest)):
            if config.pip.weight == 0 and progress.step == 7:
                raise NonFiniteLoss("training step 7: loss_ipi is nan")
            yield progress
        return share  # pragma: no cover

    def of(config: Config, *rest: Any) -> Generator[Progress, None, Share]:
        return diverging(config, *rest) if config.pip.weight == 0 else train_share(config, *rest)

    monkeypatch.setattr("aceray.distributed.run.train_share", of)
    events: list[TrialEvent] = []
    result = run_study(quick(), "none", on_event=events.append)
    assert [notes["status"] for notes in result.trials.values()] == ["failed", "finished"]
    assert result.trials["weight_0.0"]["reason"] == "training step 7: loss_ipi is nan"
    assert [(event.status, event.reason) for event in events][1] == ("failed", "training step 7: loss_ipi is nan")
    assert not (result.folder / "trials" / "weight_0.0" / "metrics.json").exists()
    events.clear()
    again = run_study(quick(), "none", resume=True, on_event=events.append)
    assert (events, again.trials) == ([], result.trials)


def test_a_run_that_was_made_before_is_taken_as_it_is(quick: Make, trained: list[Config]) -> None:
    study = quick()
    first, second = list_trials(study, Path(study.studies) / study.name, "none")
    run(first.configs[0])
    run(Config.model_validate({**second.configs[0].model_dump(), "seed": 77}))
    trained.clear()
    result = run_study(study, "none")
    assert trained == []
    assert result.trials["weight_0.0"]["status"] == "finished"
    assert result.trials["weight_0.0"]["metrics"]["train/steps"] == 20
    # another seed is another run, which is not touched
    assert result.trials["weight_2.0"]["status"] == "failed"
    assert result.trials["weight_2.0"]["reason"].startswith("seed: 3 would change the result")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the volumes that were compared; the comparison itself is tested where it is made."""
    seen: list[tuple[int, ...]] = []

    def half_maps(volumes: list, pixel_size_angstrom: float) -> dict[str, float]:
        assert pixel_size_angstrom == pytest.approx(4.0)
        seen.append((len(volumes), *volumes[0].shape))
        return {"select/half_map_fsc_area": 0.25}

    monkeypatch.setattr(trial, "_half_maps", half_maps)
    return seen


def test_half_sets_share_no_particle_and_no_start(quick: Make, scored: list, trained: list[Config]) -> None:
    study = quick(members="half_sets", space={"pip.weight": [2.0]}, objective="select/half_map_fsc_area")
    result = run_study(study, "none")
    folder = result.folder / "trials" / "weight_2.0"
    halves = [pandas.read_parquet(folder / name / "poses.parquet")["particle_id"] for name in ("half_1", "half_2")]
    assert set(halves[0]) | set(halves[1]) == set(range(1024))
    assert not set(halves[0]) & set(halves[1])
    assert [(config.data.half_set, config.seed) for config in trained] == [(1, 3), (2, 1003)]
    assert scored[-1] == (2, 16, 16, 16)
    assert result.trials["weight_2.0"]["metrics"]["select/half_map_fsc_area"] == 0.25
    rows = history(folder)
    assert rows[-1]["step"] == 20 and rows[-1]["select/half_map_fsc_area"] == 0.25
    for name in ("half_1", "half_2"):
        assert [row["step"] for row in history(folder / name)] == list(range(1, 21))


def test_two_seeds_are_compared_by_the_poses_of_all_particles(quick: Make, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(trial, "_agreement", lambda *poses: seen.append(poses) or {"select/pose_agreement_sqfrob": 3.0})
    study = quick(members="two_seeds", space={"pip.weight": [2.0]}, objective="select/pose_agreement_sqfrob")
    result = run_study(study, "none")
    assert result.trials["weight_2.0"]["metrics"]["select/pose_agreement_sqfrob"] == 3.0
    first, second = seen[-1]
    assert first.particle_id.tolist() == second.particle_id.tolist() == list(range(1024))
    assert not np.allclose(first.rotation, second.rotation)
    for number, poses in enumerate((first, second), start=1):
        table = pandas.read_parquet(result.folder / "trials" / "weight_2.0" / f"seed_{number}" / "poses.parquet")
        # the cosine of the tilt is the last element of a rotation
        np.testing.assert_allclose(poses.rotation[:, 2, 2], np.cos(np.radians(table["tilt_deg"])), atol=1e-5)


def test_without_truth_every_evaluation_is_reported(quick: Make) -> None:
    """What ASHA needs to stop a trial on experimental images."""
    study = quick("train.steps=30", objective="select/residual_loss")
    [first, _] = list_trials(study, Path(study.studies) / study.name, "none")
    reports = list(run_trial(first))
    assert [report.step for report in reports] == [10, 20, 30]
    names = ("select/residual_loss", "select/residual_whitened", "select/d4_consistency", "pose/coverage")
    assert all(np.isfinite(report.metrics[name]) for report in reports for name in names)
    assert not [name for name in reports[0].metrics if name.startswith(("fsc/", "pose/rotation"))]


def test_the_runs_of_a_pair_advance_in_turns(quick: Make, scored: list, monkeypatch) -> None:
    order: list[tuple[int | None, int]] = []

    def watched(config: Config, *rest: Any) -> Generator[Progress, None, Share]:
        generator = train_share(config, *rest)
        while True:
            try:
                progress = next(generator)
            except StopIteration as end:
                return end.value
            order.append((config.data.half_set, progress.step))
            # an evaluation without truth, as far as the trial looks at it
            yield Progress(**{**vars(progress), "metrics": {"pose/coverage": 0.5} if progress.step % 10 == 0 else {}})

    monkeypatch.setattr("aceray.distributed.run.train_share", watched)
    study = quick(members="half_sets", space={"pip.weight": [2.0]})
    made = make_trial(study, Path(study.studies) / study.name, 0, {"pip.weight": 2.0})
    reports = [(report.step, report.metrics["pose/coverage"]) for report in run_trial(made)]
    assert [step for step, _ in reports] == [10, 20]
    turns = [half for half, step in order if step % 10 == 0]
    assert turns == [1, 2, 1, 2]


def test_a_checkpoint_of_another_trial_takes_the_place_of_its_own(quick: Make) -> None:
    """What population-based training does: here both trials are of one setting, so the end must be the same."""
    study = quick(space={"pip.weight": [0.0, 2.0]})
    folder = Path(study.studies) / study.name
    good = make_trial(study, folder, 1, {"pip.weight": 2.0})
    reference = exhaust(run_trial(good), None)
    bad = make_trial(study, folder, 0, {"pip.weight": 0.0})
    poor = exhaust(run_trial(bad), None)
    file = good.members[0].checkpoint_file(15)
    changed = make_trial(study, folder, 0, {"pip.weight": 2.0}, bad.name)
    result = exhaust(run_trial(changed, start_from=file), None)
    assert result["train/loss_total"] == reference["train/loss_total"] != poor["train/loss_total"]
    assert [row["step"] for row in history(bad.folder)] == list(range(1, 21))
    assert history(bad.folder)[-1] == history(good.folder)[-1]


def test_a_budget_that_is_used_up_ends_the_study(quick: Make, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(study_run, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def spend(event: TrialEvent) -> None:
        now[0] += 60.0 if event.status == "finished" else 0.0

    result = run_study(quick(budget={"wall_seconds": 30}), "none", on_event=spend)
    assert {name: notes["status"] for name, notes in result.trials.items()} == {"weight_0.0": "finished"}
    result = run_study(quick(), "none", resume=True)
    assert result.count("finished") == 2


def mistake(study: Study, kind: type[Exception], address: str = "none", resume: bool = False) -> str:
    with pytest.raises(kind) as raised:
        run_study(study, address, resume)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_mistakes_are_found_before_anything_runs(quick: Make, tmp_path: Path, trained: list[Config]) -> None:
    line = mistake(quick(objective="fsc/auc"), ConfigError)
    assert (
        line.startswith("objective: fsc/auc compares with the true volume, which ") and "select/residual_loss" in line
    )
    line = mistake(quick(objective="select/heldout_loss"), ConfigError)
    assert "set data.heldout_fraction" in line
    other = quick.particles.path.parent / "nothing_there"
    assert str(other) in mistake(quick("base=[]", space={"data.path": [str(other)]}), DataError)
    assert "Ray Tune" in mistake(quick(scheduler={"kind": "asha"}), ConfigError)
    assert "Ray Tune" in mistake(quick(search={"kind": "optuna", "trials": 3}), ConfigError)
    varied = {"simulation.snr_db": [0.0, 10.0]}
    line = mistake(quick("base=[data/spliceosome_32]", space=varied), ConfigError)
    assert line.startswith("data.path: ") and "vary data.path along with it" in line
    assert not (tmp_path / "studies" / "tiny").exists()
    (tmp_path / "file").write_text("in the way")
    assert "in the way" in mistake(quick(f"studies={tmp_path / 'file'}"), DataError)
    assert trained == []


def test_another_study_is_not_resumed(quick: Make, trained: list[Config]) -> None:
    run_study(quick(space={"pip.weight": [2.0]}, budget={"wall_seconds": 1e-9}), "none")
    assert trained == []
    line = mistake(quick(), ConfigError, resume=True)
    assert line.startswith("space: is another than in the study in ")
    line = mistake(quick("seed=9", space={"pip.weight": [2.0]}), ConfigError, resume=True)
    assert line.startswith("base: is another (with seed=9) than in the study in ")
    assert "--resume" in mistake(quick(space={"pip.weight": [2.0]}), DataError)
    result = run_study(quick("search.trials=1", space={"pip.weight": [2.0]}), "none", resume=True)
    assert result.count("finished") == len(trained) == 1


def test_data_that_changed_are_not_trained_on(quick: Make, tmp_path: Path) -> None:
    particles = write_particles(tmp_path / "blobs")
    space = {"pip.weight": [2.0], "data.path": [str(particles.path)]}
    run_study(quick(space=space, budget={"wall_seconds": 1e-9}), "none")
    for path in (tmp_path / "blobs").iterdir():
        path.unlink()
    particles.path.rmdir()
    write_particles(tmp_path / "blobs", seed=2)
    assert "not the particles that the study" in mistake(quick(space=space), DataError, resume=True)


def test_random_points_are_in_bounds_and_more_add_to_fewer(quick: Make) -> None:
    space = {
        "pip.weight": {"uniform": [1.0, 3.0]},
        "optim.encoder_lr": {"log_uniform": [1e-5, 1e-1]},
        "pip.warmup_steps": {"integers": [0, 2]},
        "decoder.kind": ["voxel", "siren"],
        "decoder.width": {"choices": [16, 32], "when": {"decoder.kind": "siren"}},
    }
    study = quick(space=space, search={"kind": "random", "trials": 200, "seed": 4})
    points = random_points(study)
    assert points[:10] == random_points(quick("search.trials=10", space=space, search=study.search.model_dump()))
    assert points != random_points(quick("search.seed=5", space=space, search=study.search.model_dump()))
    assert {point["pip.warmup_steps"] for point in points} == {0, 1, 2}
    weights, rates = (np.array([point[key] for point in points]) for key in ("pip.weight", "optim.encoder_lr"))
    assert 1 <= weights.min() < 1.2 and 2.8 < weights.max() <= 3
    # as many rates below the geometric middle as above
    assert 70 < (rates < 1e-3).sum() < 130 and rates.min() >= 1e-5 and rates.max() <= 1e-1
    assert {point.get("decoder.width") for point in points if point["decoder.kind"] == "voxel"} == {None}
    assert {point.get("decoder.width") for point in points if point["decoder.kind"] == "siren"} == {16, 32}
    assert [each.name for each in list_trials(study, Path("x"), "none")][:2] == ["t0000", "t0001"]


def test_points_of_one_name_get_a_folder_each(quick: Make) -> None:
    space = {"ipi.label_filters": [[], [{"until_step": 5, "filter": 2}]], "pip.weight": [1, 1.0]}
    trials = list_trials(quick(space=space), Path("x"), "none")
    assert len({each.name for each in trials}) == len(trials)


CHILD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
from aceray.cli import main
main()
"""


def start(*arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(blocked=blocked), "tune", *arguments, "--address", "none"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_study_without_ray_and_mlflow_installed(quick: Make) -> None:
    quick(space={"pip.weight": [2.0]})
    process = start(str(quick.folder / "tiny.yaml"), "tracking.enabled=true", blocked=("ray", "mlflow"))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "trials       1 finished" in out
    assert err.splitlines()[0].startswith("MLflow is not installed: tracking is off, the results are in ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_study_and_says_how_to_go_on(quick: Make, number: int) -> None:
    study = quick("train.steps=100000", "train.evaluate_every=100000")
    file = str(quick.folder / "tiny.yaml")
    process = start(file, "train.steps=100000", "train.evaluate_every=100000")
    journal = Path(study.studies) / "tiny" / "trials" / "weight_0.0" / "history.jsonl"
    while not (journal.exists() and len(journal.read_text().splitlines()) > 8):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    sent = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == 130
    settings = "train.steps=100000 train.evaluate_every=100000"
    assert err.splitlines()[-1] == f"interrupted; to go on: aceray tune {file} {settings} --address none --resume"
    assert [notes["status"] for notes in notes_of(study).values()] == ["interrupted"]
