"""Optuna's points and its memory, and the schedulers, without any trial."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from aceray.distributed.suggest import Suggestions, experienced_scheduler, scheduler_of
from aceray.distributed.trial import Trial, write_notes
from aceray.folder import RunFolder
from aceray.study import Point, Study, load_study

SPACE = {
    "decoder.kind": ["voxel", "siren"],
    "decoder.width": {"choices": [32, 64], "when": {"decoder.kind": "siren"}},
    "optim.encoder_lr": {"log_uniform": [1e-5, 1e-3]},
    "pip.weight": {"uniform": [0.0, 4.0]},
    "train.batch": {"integers": [16, 24]},
    "ipi.label_filters": [[], [{"until_step": 4, "filter": 5}]],
    "method": {"presets": {"ours": ["method/ace_em"], "none": ["method/ace_em", "method/no_pip"]}},
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def make(**keys: Any) -> Study:
        found = {"base": ["data/spliceosome_32_clean"], "space": SPACE, "search": {"kind": "optuna", "trials": 4}}
        Path("s.yaml").write_text(yaml.safe_dump({**found, **keys}, sort_keys=False))
        return load_study("./s.yaml")

    return make


def suggestions(study: Study) -> Suggestions:
    return Suggestions(study, Path("optuna.jsonl").absolute(), trial_of)


def trial_of(number: int, point: Point) -> Trial:
    name = f"t{number:04d}"
    return Trial(number, name, point, (), Path("trials").absolute() / name)


def ask(found: Suggestions, tune_id: str) -> Trial:
    suggested = found.suggest(tune_id)
    assert suggested is not None
    return suggested["trial"]


def test_every_kind_of_dimension_and_its_condition(write) -> None:
    found = suggestions(write(search={"kind": "optuna", "trials": 40}))
    points = [ask(found, str(index)).point for index in range(40)]
    for point in points:
        assert ("decoder.width" in point) == (point["decoder.kind"] == "siren")
        assert 1e-5 <= point["optim.encoder_lr"] <= 1e-3
        assert 0.0 <= point["pip.weight"] <= 4.0
        assert point["train.batch"] in range(16, 25)
        assert point["ipi.label_filters"] in ([], [{"until_step": 4, "filter": 5}])
        assert point["method"] in ("ours", "none")
    assert {point.get("decoder.width") for point in points} == {None, 32, 64}
    rates = sorted(point["optim.encoder_lr"] for point in points)
    assert rates[20] < 3e-4  # the median of a logarithm is at 1e-4, that of a uniform number at 5e-4


def test_the_seed_decides(write) -> None:
    study = write()
    first = [ask(Suggestions(study, Path(name).absolute(), trial_of), "a").point for name in ("a", "b")]
    other = study.model_copy(update={"search": study.search.model_copy(update={"seed": 2})})
    assert first[0] == first[1] != ask(Suggestions(other, Path("c").absolute(), trial_of), "a").point


def test_a_study_goes_on_with_its_numbers_and_unfinished_points(write) -> None:
    study = write()
    before = suggestions(study)
    trials = [ask(before, name) for name in "abc"]
    before.on_trial_complete("a", {"fsc/auc": 0.4})
    assert before.remaining == 4
    # b ended without Optuna being told, c was running when everything was killed
    write_notes(trials[1], status="finished", metrics={"fsc/auc": 0.7})
    write_notes(trials[2], status="running")
    after = suggestions(study)
    assert after.remaining == 2
    again, new = ask(after, "x"), ask(after, "y")
    assert again == trials[2]
    assert new.number == 3 and new.point not in [trial.point for trial in trials]
    after.on_trial_complete("x", {"fsc/auc": 0.1})
    after.on_trial_complete("y", {"fsc/auc": 0.2})
    assert suggestions(study).remaining == 0
    assert [(trial.state.name, trial.value) for trial in told(study)] == [
        ("COMPLETE", 0.4),
        ("COMPLETE", 0.7),
        ("COMPLETE", 0.1),
        ("COMPLETE", 0.2),
    ]


def told(study: Study) -> list[optuna.trial.FrozenTrial]:
    return suggestions(study)._ot_study.trials


@pytest.mark.parametrize(
    ("result", "state"),
    [
        ({"fsc/auc": 0.4}, "COMPLETE"),
        ({"fsc/auc": float("nan")}, "FAIL"),
        ({"fsc/auc": 0.4, "failed": "training step 3: loss is nan"}, "FAIL"),
        ({"step": 3}, "FAIL"),
        (None, "FAIL"),
    ],
)
def test_what_ended_without_the_objective_is_told_as_failed(write, result: dict[str, Any] | None, state: str) -> None:
    study = write()
    found = suggestions(study)
    ask(found, "a")
    found.on_trial_result("a", {"fsc/auc": 0.1, "training_iteration": 1})
    found.on_trial_complete("a", result)
    assert [trial.state.name for trial in told(study)] == [state]
    assert suggestions(study).remaining == 3


def test_several_objectives_keep_their_directions(write) -> None:
    study = write(objective=["fsc/auc", "train/wall_seconds"])
    found = suggestions(study)
    for name, values in (("a", (0.5, 10.0)), ("b", (0.6, 5.0)), ("c", (0.7, 20.0))):
        ask(found, name)
        found.on_trial_complete(name, dict(zip(("fsc/auc", "train/wall_seconds"), values, strict=True)))
    assert sorted(trial.number for trial in found._ot_study.best_trials) == [1, 2]


def test_a_population_stays_within_its_ranges(write) -> None:
    study = write(
        space={"pip.weight": {"uniform": [0.5, 4.0]}, "optim.encoder_lr": [1e-3, 1e-4, 1e-5]},
        search={"kind": "random", "trials": 3},
        scheduler={"kind": "pbt", "mutations": ["pip.weight", "optim.encoder_lr"]},
    )
    scheduler = scheduler_of(study)
    explore = scheduler._custom_explore_fn
    assert explore({"pip.weight": 4.8, "optim.encoder_lr": 1e-4}) == {"pip.weight": 4.0, "optim.encoder_lr": 1e-4}
    assert explore({"pip.weight": 0.4, "optim.encoder_lr": 1e-4})["pip.weight"] == 0.5
    # neighbours in the list are neighbours in size
    assert scheduler._hyperparam_mutations["optim.encoder_lr"] == [1e-5, 1e-4, 1e-3]


# ---- what a scheduler remembers


class Asked:
    """A trial, as far as a scheduler looks at one."""

    trial_id = "new"


def decision(scheduler: TrialScheduler, step: int, value: float) -> str:
    controller: Any = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
    trial: Any = Asked()
    scheduler.on_trial_add(controller, trial)
    return scheduler.on_trial_result(controller, trial, {"step": step, "fsc/auc": value})


def leave(
    folder: Path, status: str, values: dict[int, float | None], checkpoint: int, final: float | None = None
) -> None:
    """The folder of an earlier trial."""
    trial = Trial(0, folder.name, {}, (), folder)
    (folder / "checkpoints").mkdir(parents=True)
    RunFolder(folder).checkpoint_file(checkpoint).touch()
    (folder / "config.yaml").touch()
    rows = [{"step": step, "fsc/auc": values.get(step)} for step in range(50, max(values) + 1, 50)]
    RunFolder(folder).history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_notes(trial, status=status, metrics={} if final is None else {"fsc/auc": final})


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_scheduler_compares_with_the_trials_of_an_earlier_start(write, kind: str) -> None:
    study = write(scheduler={"kind": kind, "grace_steps": 100}, search={"kind": "random", "trials": 8})
    folder = Path("s").absolute()
    leave(folder / "trials" / "a", "finished", {100: 0.5, 200: 0.6}, 200, final=0.7)
    leave(folder / "trials" / "b", "stopped", {100: 0.4}, 100)
    leave(folder / "trials" / "c", "failed", {100: 0.45, 150: None}, 100)
    assert decision(scheduler_of(study), 100, 0.3) == "CONTINUE"
    assert decision(experienced_scheduler(study, folder), 100, 0.3) == "STOP"
    assert decision(experienced_scheduler(study, folder), 100, 0.55) == "CONTINUE"
    assert decision(experienced_scheduler(study, folder), 50, 0.0) == "CONTINUE"  # within its grace


def test_what_a_trial_will_report_again_is_not_remembered(write) -> None:
    study = write(scheduler={"kind": "asha", "grace_steps": 100}, search={"kind": "random", "trials": 8})
    folder = Path("s").absolute()
    leave(folder / "trials" / "a", "interrupted", {100: 0.9}, 50)
    assert decision(experienced_scheduler(study, folder), 100, 0.3) == "CONTINUE"
    leave(folder / "trials" / "b", "running", {100: 0.9}, 100)
    assert decision(experienced_scheduler(study, folder), 100, 0.3) == "STOP"


def test_the_last_report_of_a_finished_trial_is_its_result(write) -> None:
    study = write(scheduler={"kind": "asha", "grace_steps": 100}, search={"kind": "random", "trials": 8})
    folder = Path("s").absolute()
    leave(folder / "trials" / "a", "finished", {50: 0.1, 100: 0.2}, 100, final=0.8)
    assert decision(experienced_scheduler(study, folder), 100, 0.5) == "STOP"


def test_no_trial_yields_to_one_that_waits_for_the_median(write) -> None:
    study = write(scheduler={"kind": "median", "grace_steps": 100}, search={"kind": "random", "trials": 8})
    assert decision(scheduler_of(study), 100, 0.3) == "CONTINUE"
