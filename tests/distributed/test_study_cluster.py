"""Studies as they are started and ended from a shell: signals, a kill, a cluster that loses a node.

Slow: each starts a Ray or two. What a process left is found by its children, which are noted while it lives.
"""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from aceray.data.particles import ParticleSet
from aceray.folder import RunFolder
from tests.distributed.conftest import QUICK

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CLI = "from aceray.cli import main; main()"
FREE = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(ray.available_resources().get('CPU', 0.0))"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, particle_set: ParticleSet) -> Write:
    """studies/s below tmp_path, of short runs on images without truth; returns its folder. Keys win."""

    def make(*base: str, **keys: Any) -> Path:
        shared = [f"data.path={particle_set.path}", *QUICK, "resources.gpu=false", *base]
        found = {"name": "s", "base": shared, "space": {"seed": [1, 2, 3]}, "objective": "select/residual_loss", **keys}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
        return tmp_path / "studies" / "s"

    return make


class Driver:
    """`aceray tune s.yaml` in a process of its own, and all processes that it started."""

    def __init__(self, folder: Path, *arguments: str, study: str = "s.yaml") -> None:
        # files, not pipes: those who inherit them would keep pipes open
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLI, "tune", study, *arguments],
                cwd=folder,
                env=ENVIRONMENT,
                stdout=out,
                stderr=err,
            )
        self._below: set[psutil.Process] = set()

    def wait_for(
        self, condition: Callable[[], bool], timeout_seconds: float = 200.0, every_seconds: float = 0.05
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline
            self.note_processes()
            time.sleep(every_seconds)

    def note_processes(self) -> None:
        self._below |= set(psutil.Process(self.process.pid).children(recursive=True))

    def end(self, timeout_seconds: float = 250.0) -> int:
        return self.process.wait(timeout_seconds)

    def left(self, within_seconds: float = 0.0) -> list[psutil.Process]:
        """Processes below it that are still there after that time."""
        _, left = psutil.wait_procs(self._below, timeout=within_seconds)
        return left


def notes_of(study: Path) -> dict[str, dict[str, Any]]:
    files = sorted((study / "trials").glob("*/trial.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def rows_of(study: Path, name: str) -> list[dict[str, Any]]:
    return RunFolder(study / "trials" / name).read_history()


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """All files but the notes, in which the study keeps what it tells MLflow."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def runs_of(database: Path) -> dict[str, Run]:
    """All runs by name, of which none may come twice."""
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {str(run.info.run_name): run for run in runs}


# ---- signals and kills


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_ended_from_outside_goes_on(write: Write, tmp_path: Path, number: int) -> None:
    tracked = ("tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/ml.db")
    study = write("train.steps=300", "train.evaluate_every=50", *tracked, search={"concurrent": 1})
    driver = Driver(tmp_path)
    driver.wait_for(lambda: len(rows_of(study, "seed_2")) > 60)
    before, ended = rows_of(study, "seed_2")[:50], files_of(study / "trials" / "seed_1")
    driver.note_processes()
    driver.process.send_signal(number)
    sent = time.monotonic()
    code = driver.end(60)
    assert time.monotonic() - sent < 10
    left = driver.left(10 - (time.monotonic() - sent))
    if number == signal.SIGKILL:  # Ray's agents, which nobody ends any more, notice after a minute
        assert {process.name() for process in left} <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
        left = driver.left(120)
    assert left == []
    states = {name: notes["status"] for name, notes in notes_of(study).items()}
    if number == signal.SIGKILL:
        assert (code, states) == (-signal.SIGKILL, {"seed_1": "finished", "seed_2": "running"})
    else:
        assert (code, states) == (130, {"seed_1": "finished", "seed_2": "interrupted"})
        assert driver.err.read_text().splitlines()[-1] == "interrupted; to go on: aceray tune s.yaml --resume"
        assert "Traceback" not in driver.err.read_text()
        assert {name: run.info.status for name, run in runs_of(tmp_path / "ml.db").items()} == {
            "s": "KILLED",
            "seed_1": "FINISHED",
            "seed_2": "KILLED",
        }
    again = Driver(tmp_path, "--resume")
    assert again.end() == 0, again.err.read_text()
    assert again.left() == []
    assert [notes["status"] for notes in notes_of(study).values()] == ["finished"] * 3
    assert files_of(study / "trials" / "seed_1") == ended
    rows = rows_of(study, "seed_2")
    assert [row["step"] for row in rows] == list(range(1, 301))
    assert rows[:50] == before  # its speed, too: these steps were not done again
    runs = runs_of(tmp_path / "ml.db")
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ["s", "seed_1", "seed_2", "seed_3"], "FINISHED"
    )
    parent = runs.pop("s").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent}
    assert (study / "leaderboard.csv").read_text().count("finished") == 3


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--address", "127.0.0.1:1"], "error: Ray at 127.0.0.1:1: cannot connect"),
        (["--address", "host:port"], "error: Ray at host:port: cannot connect"),
        (["--address", "ray://127.0.0.1:1"], "error: Ray at ray://127.0.0.1:1: cannot connect"),
        (["resources.cpus_per_worker=64"], "error: resources: asked for 1 workers with 64 CPUs each; the cluster has"),
    ],
)
def test_what_a_cluster_cannot_do_is_one_line(write: Write, tmp_path: Path, arguments: list[str], line: str) -> None:
    study = write()
    started = time.monotonic()
    driver = Driver(tmp_path, *arguments)
    assert driver.end() == 2
    assert time.monotonic() - started < 30
    [found] = driver.err.read_text().splitlines()
    assert found.startswith(line)
    assert not (study / "study.yaml").exists()  # the name is free
    assert driver.left() == []


# ---- clusters


class Nodes:
    """A cluster of nodes with a core each, in a process of its own (nodes.py)."""

    def __init__(self, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nodes.py")), str(count)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address, self.client, raylet = self._line().split()
        self._last = psutil.Process(int(raylet))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def trial_on_the_last(self) -> str:
        """Name of the trial whose journal a process of the last node has open, or nothing."""
        for process in self._last.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                for file in process.open_files():
                    if file.path.endswith("history.jsonl"):
                        return Path(file.path).parent.name
        return ""

    def lose(self) -> None:
        """The last node is gone at once."""
        assert self._process.stdin is not None
        self._process.stdin.write("lose\n")
        self._process.stdin.flush()
        assert self._line() == "lost"

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def free_cpus(self) -> float:
        """What another driver finds free."""
        command = [sys.executable, "-c", FREE, self.address]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    def await_free(self, cpus: float) -> None:
        deadline = time.monotonic() + 20
        while (found := self.free_cpus()) != cpus:
            assert time.monotonic() < deadline, found


@pytest.fixture
def start_nodes() -> Iterator[Callable[[int], Nodes]]:
    started: list[Nodes] = []

    def start(count: int) -> Nodes:
        started.append(Nodes(count))
        return started[-1]

    yield start
    for nodes in started:
        nodes.end()


def test_a_node_that_is_lost_costs_no_trial(write: Write, tmp_path: Path, start_nodes: Callable[[int], Nodes]) -> None:
    nodes = start_nodes(3)
    study = write("train.steps=1500", "train.evaluate_every=500", "train.checkpoint_every=50")
    driver = Driver(tmp_path, "--address", nodes.address)
    driver.wait_for(lambda: len(rows_of(study, nodes.trial_on_the_last() or "none")) > 60)
    lost = nodes.trial_on_the_last()
    before = rows_of(study, lost)[:50]
    nodes.lose()
    assert driver.end() == 0, driver.err.read_text()
    assert [notes["status"] for notes in notes_of(study).values()] == ["finished"] * 3
    told = [line for line in driver.err.read_text().splitlines() if "its process was lost" in line]
    assert len(told) == 1 and told[0].startswith(lost), told
    for name in notes_of(study):
        assert [row["step"] for row in rows_of(study, name)] == list(range(1, 1501))
    assert rows_of(study, lost)[:50] == before  # its speed, too: it went on from a checkpoint
    nodes.await_free(2.0)


def test_a_study_is_steered_from_outside_its_cluster(
    write: Write, tmp_path: Path, start_nodes: Callable[[int], Nodes]
) -> None:
    """Over Ray Client: its events, its results, its mistakes and its end are those of a study that runs there."""
    nodes = start_nodes(2)
    study = write("train.steps=1500", "train.evaluate_every=500", "train.checkpoint_every=50")
    driver = Driver(tmp_path, "--address", nodes.client)
    driver.wait_for(lambda: len(rows_of(study, "seed_1")) > 60)
    driver.process.send_signal(signal.SIGINT)
    assert driver.end(15) == 130
    assert "to go on: aceray tune s.yaml --address ray://" in driver.err.read_text()
    assert "finished" not in {notes["status"] for notes in notes_of(study).values()}
    nodes.await_free(2.0)
    before = rows_of(study, "seed_1")[:50]
    again = Driver(tmp_path, "--address", nodes.client, "--resume")
    assert again.end() == 0, again.err.read_text()
    assert rows_of(study, "seed_1")[:50] == before  # it went on from a checkpoint
    assert [notes["status"] for notes in notes_of(study).values()] == ["finished"] * 3
    assert "seed_3  finished  step   1500 of 1500" in again.out.read_text() + again.err.read_text()
    assert (study / "leaderboard.csv").read_text().count("finished") == 3
    mistaken = Driver(tmp_path, "--address", nodes.client)
    assert mistaken.end() == 2
    assert "a study of this name is there; nothing was touched" in mistaken.err.read_text()
    nodes.await_free(2.0)


@pytest.mark.timeout(12000)
def test_the_shipped_study_of_schedules_outlives_a_node(
    tmp_path: Path, start_nodes: Callable[[int], Nodes], capsys: pytest.CaptureFixture[str]
) -> None:
    """27 trials under ASHA on three nodes, one of which is gone at once in the middle; half an hour on two cores."""
    nodes, study = start_nodes(3), tmp_path / "studies" / "pip_schedule"
    database, started = tmp_path / "ml.db", time.monotonic()
    tracked = f"tracking.uri=sqlite:///{database}"
    driver = Driver(tmp_path, "resources.gpu=false", tracked, "--address", nodes.address, study="pip_schedule")

    def half_are_done() -> bool:
        return sum(notes["status"] in ("finished", "stopped") for notes in notes_of(study).values()) >= 13

    driver.wait_for(half_are_done, 9000, every_seconds=2.0)
    # between two checkpoints, so that there is something to lose
    driver.wait_for(lambda: 240 < len(rows_of(study, nodes.trial_on_the_last() or "none")) % 600 < 370)
    lost, before, lost_after = nodes.trial_on_the_last(), notes_of(study), time.monotonic() - started
    nodes.lose()
    done, kept = (len(rows_of(study, lost)), max(RunFolder(study / "trials" / lost).checkpoint_steps()))
    rows = rows_of(study, lost)[:kept]
    assert driver.end(9000) == 0, driver.err.read_text()
    after, took = notes_of(study), time.monotonic() - started
    states = Counter(notes["status"] for notes in after.values())
    assert states["finished"] + states["stopped"] == len(after) == 27
    # what had ended was not touched, and what was lost went on from its checkpoint
    ended = {name: notes for name, notes in before.items() if notes["status"] in ("finished", "stopped")}
    assert {name: after[name] for name in ended} == ended
    assert rows_of(study, lost)[:kept] == rows
    for name, notes in after.items():
        steps = [row["step"] for row in rows_of(study, name)]
        assert steps == list(range(1, len(steps) + 1))
        assert notes["status"] == "stopped" or len(steps) == 1200
    again = [line for line in driver.err.read_text().splitlines() if "its process was lost" in line]
    assert [line.split()[0] for line in again] == [lost], again
    points = assert_the_leaderboard_is_what_mlflow_holds(study, database)
    nodes.await_free(2.0)
    with capsys.disabled():
        print(
            f"\nAfter {lost_after:.0f} s, {len(ended)} trials ended, the node of {lost} was lost at step {done}; it "
            f"went on from step {kept}. All over after {took:.0f} s: {dict(states)}; {points} points in MLflow."
        )
        print((study / "leaderboard.md").read_text())


def assert_the_leaderboard_is_what_mlflow_holds(study: Path, database: Path) -> int:
    """Every number, status and reason, each step once; returns how many points of the loss MLflow has."""
    runs, points = runs_of(database), 0
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    parent = runs.pop(study.name).info.run_id
    rows = list(csv.DictReader((study / "leaderboard.csv").read_text().splitlines()))
    assert sorted(row["trial"] for row in rows) == sorted(runs)
    for row in rows:
        run = runs[row["trial"]]
        tags, metrics = run.data.tags, run.data.metrics
        assert tags["mlflow.parentRunId"] == parent
        assert (row["status"], row["reason"]) == (tags["aceray.status"], tags["aceray.stop_reason"])
        shown = {key: float(value) for key, value in row.items() if "/" in key and value}
        assert "fsc/auc" in shown and shown == {key: metrics[key] for key in shown}
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss_total")]
        assert sorted(steps) == [line["step"] for line in rows_of(study, row["trial"])]
        points += len(steps)
    return points


def test_trials_of_workers_give_their_cores_back(
    write: Write, tmp_path: Path, start_nodes: Callable[[int], Nodes]
) -> None:
    """Two trials side by side, each with a worker of its own."""
    nodes = start_nodes(2)
    study = write("resources.workers=1", space={"seed": [1, 2]})
    driver = Driver(tmp_path, "--address", nodes.address)
    assert driver.end() == 0, driver.err.read_text()
    assert [notes["status"] for notes in notes_of(study).values()] == ["finished", "finished"]
    assert driver.left() == []
    nodes.await_free(2.0)


def test_a_trial_of_workers_that_is_stopped_gives_its_cores_back(
    write: Write, tmp_path: Path, start_nodes: Callable[[int], Nodes]
) -> None:
    nodes = start_nodes(1)
    study = write(
        "resources.workers=1",
        "train.steps=400",
        "train.evaluate_every=100",
        space={"optim.encoder_lr": [1e-3, 1e-9]},
        search={"concurrent": 1},
        scheduler={"kind": "asha", "grace_steps": 100, "reduction_factor": 2},
    )
    driver = Driver(tmp_path, "--address", nodes.address)
    assert driver.end() == 0, driver.err.read_text()
    assert [notes["status"] for notes in notes_of(study).values()] == ["finished", "stopped"]
    nodes.await_free(1.0)
