"""Studies on a real Ray Tune; those that start trials are slow, for each trial is a process of its own."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import yaml

from aceray.config import Config
from aceray.data.particles import ParticleSet
from aceray.distributed import sweep as sweep_module
from aceray.distributed.ingest import read_here
from aceray.distributed.shelf import open_shelf, reader
from aceray.distributed.study_run import list_trials
from aceray.distributed.sweep import Place, find_place, sweep
from aceray.distributed.trial import Trial, TrialEvent, make_trial, read_notes, run_trial, write_notes
from aceray.errors import ClusterError, ConfigError, DataError
from aceray.folder import RunFolder
from aceray.presets import load_config
from aceray.study import Study, load_study
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles
from tests.distributed.test_ingest import assert_same

Write = Callable[..., Study]
CPUS = 2.0


@pytest.fixture(scope="module")
def scored_set(tmp_path_factory: pytest.TempPathFactory) -> ParticleSet:
    """Particles whose truth is known, so that every evaluation has metrics."""
    return write_particles(tmp_path_factory.mktemp("scored") / "blobs", truth=True)


@pytest.fixture
def write(tmp_path: Path, scored_set: ParticleSet, ray_session: None) -> Write:
    """A study of short runs below tmp_path; keys win."""

    def make(*base: str, **keys: Any) -> Study:
        shared = [f"data.path={scored_set.path}", *QUICK, "train.evaluate_every=10", *base]
        space = {"seed": [1, 2, 3]}
        found = {"studies": str(tmp_path), "base": shared, "space": space, "objective": "fsc/auc", **keys}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
        return load_study(str(tmp_path / "s.yaml"))

    return make


def folder_of(study: Study) -> Path:
    return Path(study.studies) / study.name


def trials_of(study: Study) -> list[Trial]:
    return list_trials(study, folder_of(study), "local")


def run_sweep(study: Study, on_event: Callable[[TrialEvent], None] | None = None) -> list[TrialEvent]:
    """Its events, after all that the sweep took of the cluster was given back."""
    (folder_of(study) / "trials").mkdir(parents=True, exist_ok=True)
    events: list[TrialEvent] = []

    def note(event: TrialEvent) -> None:
        events.append(event)
        if on_event is not None:
            on_event(event)

    waiting = [] if study.search.kind == "optuna" else trials_of(study)
    waiting = [trial for trial in waiting if read_notes(trial.folder).get("status") in (None, "running", "interrupted")]
    try:
        sweep(study, waiting, "local", note, lambda number, point: make_trial(study, folder_of(study), number, point))
    finally:
        await_free()
    assert not (folder_of(study) / ".tune").exists()
    return events


def await_free() -> None:
    """All cores are given back and no process of a trial is left."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if ray.available_resources().get("CPU") == CPUS and not trial_processes():
            return
        time.sleep(0.2)
    raise AssertionError(f"{ray.available_resources()}, {trial_processes()}")


def trial_processes() -> list[psutil.Process]:
    """The processes of trials below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::ImplicitFu") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def ended(events: list[TrialEvent]) -> dict[str, TrialEvent]:
    return {event.name: event for event in events}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss_total"]) for row in RunFolder(folder).read_history()]


# ---- before a trial starts


def test_a_trial_that_the_cluster_can_never_hold_is_refused_at_once(write: Write) -> None:
    study = write("resources.cpus_per_worker=3")
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"3 CPUs each; the cluster has only 2 CPUs") as error:
        sweep(study, trials_of(study), "local", lambda event: None, lambda number, point: trials_of(study)[0])
    assert time.monotonic() - started < 30
    assert "\n" not in str(error.value)
    assert not list(folder_of(study).glob("trials/*"))


def test_a_cluster_that_may_grow_gets_less_than_half_a_minute(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep_module.PATIENCE_SECONDS < 30
    monkeypatch.setattr(sweep_module, "PATIENCE_SECONDS", 1.0)
    study = write("resources.cpus_per_worker=3")
    with pytest.raises(ClusterError, match="did not give that within 1 s"):
        find_place(study, trials_of(study)[0].configs[0], "auto")


def test_a_study_on_a_cluster_looks_at_the_storage_first(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder and the data sets of its trials."""
    asked = []

    def refuse(*arguments: object) -> None:
        asked.append(arguments)
        raise ClusterError("node x: does not see it")

    monkeypatch.setattr(sweep_module, "check_shared", refuse)
    study = write()
    trials = trials_of(study)
    with pytest.raises(ClusterError, match="node x"):
        sweep(study, trials, "auto", lambda event: None, lambda number, point: trials[0])
    assert asked == [(folder_of(study), "studies", {Path(trials[0].configs[0].data.path)})]


@pytest.mark.parametrize(
    ("base", "search", "place"),
    [
        ([], {}, Place({"cpu": 1.0}, 2)),
        (["resources.cpus_per_worker=0.5"], {}, Place({"cpu": 0.5}, 4)),
        (["resources.cpus_per_worker=2"], {}, Place({"cpu": 2.0}, 1)),
        ([], {"concurrent": 1}, Place({"cpu": 1.0}, 1)),
        ([], {"concurrent": 5}, Place({"cpu": 1.0}, 5)),  # three wait, for nodes that may come
        (["resources.workers=1"], {"concurrent": 5}, Place({"cpu": 0.01}, 2)),
        (["resources.workers=2"], {}, Place({"cpu": 0.01}, 1)),
        (["resources.workers=1"], {}, Place({"cpu": 0.01}, 2)),
    ],
)
def test_trials_at_once_follow_from_what_is_free(
    write: Write, base: list[str], search: dict[str, Any], place: Place
) -> None:
    await_free()
    study = write(*base, search=search)
    assert find_place(study, trials_of(study)[0].configs[0], "local") == place


def test_a_share_of_a_gpu_is_asked_for(write: Write) -> None:
    study = write(search={"gpus_per_trial": 0.25})
    with pytest.raises(ClusterError, match=r"1 CPUs and 0\.25 GPU each"):
        find_place(study, trials_of(study)[0].configs[0], "local")


def test_a_population_trains_in_its_own_processes(write: Write) -> None:
    mutations = {"kind": "pbt", "mutations": ["pip.weight"]}
    study = write("resources.workers=1", space={"pip.weight": [0.0, 1.0]}, scheduler=mutations)
    with pytest.raises(ConfigError, match=r"resources\.workers=0, found 1"):
        sweep(study, trials_of(study), "local", lambda event: None, lambda number, point: None)


# ---- the shelf


@pytest.mark.usefixtures("ray_session")
def test_all_trials_of_a_node_read_one_copy(
    configure: Callable[..., Config], particle_set: ParticleSet, tmp_path: Path
) -> None:
    shelf = open_shelf()
    try:
        read = reader(shelf)
        opened, first = read(configure())
        assert opened == particle_set
        assert_same(first, read_here(particle_set, particle_set.row_groups(), 16))
        # the same memory, not an equal copy
        assert read(configure("seed=4"))[1].images.data_ptr() == first.images.data_ptr()
        _, half = read(configure("data.half_set=2", "data.box=12"))
        assert half.images.shape == (512, 12, 12)
        assert half.particle_id.remainder(2).tolist() == [1] * 512
        with pytest.raises(DataError, match=str(tmp_path)):
            read(load_config(f"data.path={tmp_path}/none", *QUICK))
    finally:
        ray.kill(shelf)


@pytest.mark.usefixtures("ray_session")
def test_training_leaves_the_shared_copy_as_it_is(configure: Callable[..., Config], tmp_path: Path) -> None:
    shelf = open_shelf()
    try:
        read = reader(shelf)
        before = read(configure())[1].images.clone()
        config = configure("train.steps=5", "name=t", "ipi.augment=true")
        trial = Trial(0, "t", {}, (config,), Path(config.runs) / "t")
        list(run_trial(trial, read))
        np.testing.assert_array_equal(read(configure())[1].images.numpy(), before.numpy())
    finally:
        ray.kill(shelf)


# ---- trials; one that is quick enough to be run always, for no other test without `slow` has Tune run one


@pytest.mark.slow
def test_a_grid_is_run_and_a_trial_that_diverges_does_not_end_it(write: Write) -> None:
    study = write(space={"seed": [1, 2], "pip.weight": [1.0, 1e39]}, search={"trials": 3})
    last = ended(run_sweep(study))
    assert [last[trial.name].status for trial in trials_of(study)] == ["finished", "failed", "finished"]
    good, bad, _ = trials_of(study)
    assert "nothing was updated" in last[bad.name].reason
    assert read_notes(bad.folder)["reason"] == last[bad.name].reason
    # one run path: the same numbers as without Ray
    there = losses(good.folder)
    alone = load_config(str(good.folder / "config.yaml"), "name=here")
    list(run_trial(Trial(0, "here", {}, (alone,), good.folder.parent / "here")))
    assert losses(good.folder.parent / "here") == there
    assert last[good.name].metrics == json.loads((good.folder / "metrics.json").read_text()) | {
        "train/wall_seconds": last[good.name].metrics["train/wall_seconds"]
    }


@pytest.mark.slow
def test_asha_stops_a_trial_and_says_so(write: Write) -> None:
    study = write(
        space={"seed": [1, 2, 3]},
        search={"concurrent": 1},
        scheduler={"kind": "asha", "grace_steps": 10, "reduction_factor": 2},
    )
    events = run_sweep(study)
    stopped = [event for event in ended(events).values() if event.status == "stopped"]
    assert stopped
    for event in stopped:
        assert event.reason.startswith("asha: ")
        assert event.report is not None and 10 <= event.report.step < 40
        notes = read_notes(folder_of(study) / "trials" / event.name)
        assert (notes["status"], notes["reason"]) == ("stopped", event.reason)
        # it was worse, at the step where it was stopped, than one that went on
        step = event.report.step
        others = [each.report.metrics["fsc/auc"] for each in events if each.report and each.report.step == step]
        assert event.report.metrics["fsc/auc"] < max(others)
    assert run_sweep(study) == []


@pytest.mark.slow
def test_the_median_stops_a_trial_that_learns_nothing_and_none_starts_twice(write: Write) -> None:
    rates = [0.02, 0.03, 0.04, 1e-9]
    study = write(
        space={"optim.decoder_lr": rates},
        objective="select/residual_loss",
        search={"concurrent": 1},
        scheduler={"kind": "median", "grace_steps": 20},
    )
    events = run_sweep(study)
    last = {event.point["optim.decoder_lr"]: event for event in ended(events).values()}
    assert [last[rate].status for rate in rates] == ["finished", "finished", "finished", "stopped"]
    worst = last[1e-9]
    assert worst.report is not None and worst.report.step == 20
    assert worst.reason == read_notes(folder_of(study) / "trials" / worst.name)["reason"]
    assert worst.reason.startswith("median: at step 20")
    starts = Counter(event.name for event in events if event.report is None and event.status == "running")
    assert set(starts.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_study_that_goes_on_compares_with_the_trials_of_before(write: Write, kind: str) -> None:
    """All but the worst have finished before the last start, which would have nobody to be compared with."""
    study = write(
        space={"optim.decoder_lr": [0.02, 0.03, 0.04, 1e-9]},
        objective="select/residual_loss",
        search={"concurrent": 1},
        scheduler={"kind": kind, "grace_steps": 20},
    )

    def interrupt(event: TrialEvent) -> None:
        if event.number == 2 and event.status in ("finished", "stopped"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, interrupt)
    [event] = ended(run_sweep(study)).values()
    assert (event.number, event.status) == (3, "stopped")
    assert event.reason.startswith(f"{kind}: at step 20")


def test_a_trial_whose_process_is_killed_goes_on_to_the_same_end(write: Write) -> None:
    study = write(space={"seed": [3]})
    killed: list[int] = []

    def kill_once(event: TrialEvent) -> None:
        if event.report is not None and event.report.step == 20 and not killed:
            [process] = trial_processes()
            killed.append(process.pid)
            process.kill()

    events = run_sweep(study, kill_once)
    assert killed and "its process was lost" in " ".join(event.reason for event in events)
    [trial] = trials_of(study)
    assert ended(events)[trial.name].status == "finished"
    undisturbed = load_config(str(trial.folder / "config.yaml"), "name=here")
    list(run_trial(Trial(0, "here", {}, (undisturbed,), trial.folder.parent / "here")))
    assert losses(trial.folder) == losses(trial.folder.parent / "here")


@pytest.mark.slow
def test_an_interrupt_ends_all_trials_and_the_study_goes_on_later(write: Write) -> None:
    study = write(space={"seed": [1, 2, 3]})
    started: list[float] = []
    names: list[str] = []

    def interrupt(event: TrialEvent) -> None:
        if event.report is not None and event.report.step == 20:
            started.append(time.monotonic())
            names.append(event.name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, interrupt)
    assert time.monotonic() - started[0] < 10
    states = [read_notes(trial.folder).get("status") for trial in trials_of(study)]
    assert "interrupted" in states and set(states) <= {"interrupted", None}
    events = run_sweep(study)
    assert {event.status for event in ended(events).values()} == {"finished"}
    assert len(ended(events)) == 3
    first = [event.report.step for event in events if event.name == names[0] and event.report is not None]
    assert first[0] > 20  # from its checkpoint


@pytest.mark.slow
def test_a_budget_cuts_trials_off_and_they_may_go_on(write: Write) -> None:
    study = write("train.steps=100000", space={"seed": [1]}, budget={"wall_seconds": 20})
    last = ended(run_sweep(study))
    assert [event.status for event in last.values()] == ["interrupted"]


@pytest.mark.slow
def test_a_population_takes_over_a_checkpoint_and_changes_a_value_in_mid_run(write: Write) -> None:
    study = write(
        "train.steps=60",
        space={"pip.weight": [0.0, 1.0, 2.0]},
        scheduler={"kind": "pbt", "perturb_steps": 10, "mutations": ["pip.weight"]},
    )
    last = ended(run_sweep(study))
    assert {event.status for event in last.values()} == {"finished"}
    changed = [(trial, change) for trial in trials_of(study) for change in read_notes(trial.folder)["changes"]]
    assert changed
    trial, change = changed[-1]
    assert change["key"] == "pip.weight" and change["from"] != trial.name
    assert 0 < change["step"] < 60
    assert last[trial.name].point["pip.weight"] == change["value"]
    assert load_config(str(trial.folder / "config.yaml")).pip.weight == change["value"]
    assert trial.point["pip.weight"] != change["value"]
    steps = [row["step"] for row in RunFolder(trial.folder).read_history()]
    assert steps[-1] == 60 and change["step"] + 1 in steps


@pytest.mark.slow
def test_optuna_goes_on_with_its_file(write: Write) -> None:
    space = {"optim.encoder_lr": {"log_uniform": [1e-4, 1e-3]}}
    study = write(space=space, search={"kind": "optuna", "trials": 2}, objective=["fsc/auc", "train/wall_seconds"])
    first = ended(run_sweep(study))
    assert {name: event.status for name, event in first.items()} == {"t0000": "finished", "t0001": "finished"}
    assert run_sweep(study) == []
    # as if its process had been lost
    trial = make_trial(study, folder_of(study), 1, first["t0001"].point)
    write_notes(trial, status="running")
    more = study.model_copy(update={"search": study.search.model_copy(update={"trials": 3})})
    second = ended(run_sweep(more))
    assert {name: event.status for name, event in second.items()} == {"t0002": "finished"}
    points = [event.point["optim.encoder_lr"] for event in (*first.values(), *second.values())]
    assert len(set(points)) == 3 and all(1e-4 <= point <= 1e-3 for point in points)
    assert all(math.isfinite(point) for point in points)
