"""SIGTERM, the notice of a scheduler: the present step ends, its checkpoint is kept, and nothing is done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aceray.api import tune
from aceray.config import Config
from aceray.distributed import notice
from aceray.distributed.cluster import connect
from aceray.distributed.run import run
from aceray.folder import RunFolder
from aceray.presets import load_config
from aceray.study import load_study
from tests.distributed import accidents
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles
from tests.faults.test_interrupts import SECONDS, crowded, processes_of

ROOT = Path(__file__).parent.parent.parent
STEPS = 200
# no checkpoint but the last is due
RARE = (f"train.steps={STEPS}", "train.checkpoint_every=100000", "train.evaluate_every=100000", "encoder.heads=1")
ROUNDS = ("train.steps=6", "train.checkpoint_every=100000", "encoder.heads=1", "refine={}", "refine.search_rounds=2",
          "refine.polish_rounds=2")  # fmt: skip
Configure = Callable[..., Config]


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_particles(tmp_path_factory.mktemp("data") / "blobs").path


@pytest.fixture
def configure(tmp_path: Path, particles: Path) -> Configure:
    return lambda *overrides: load_config(f"data.path={particles}", f"runs={tmp_path / 'runs'}", *QUICK, *overrides)


def told(verb: list[str], place: str, after: int) -> tuple[int, str, float]:
    """Exit code, errors and seconds of a program that is sent SIGTERM when `place` was called so often."""
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.faults.driver", place, *verb],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        seen = 0
        while seen < after and (line := child.stdout.readline()):
            seen += line.startswith("begin ")
        child.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, err = child.communicate(timeout=60 * crowded())
        took = time.monotonic() - sent
        deadline = time.monotonic() + SECONDS * crowded()
        while (left := processes_of(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
        return child.returncode, err, took
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def losses(folder: RunFolder) -> list[dict[str, float]]:
    return [{key: row[key] for key in row if key != "train/particles_per_second"} for row in folder.read_history()]


def assert_same(folder: RunFolder, steady: RunFolder) -> None:
    """The same history, every step once, and the same parameters to the last bit."""
    assert losses(folder) == losses(steady)
    last = steady.checkpoint_steps()[-1]
    expected, got = steady.read_checkpoint(last)[0], folder.read_checkpoint(last)[0]
    assert expected.keys() == got.keys() and all(got[name].equal(expected[name]) for name in expected)


def ended_and_resumed(config: Config, place: str, after: tuple[int, ...]) -> list[int]:
    """Steps at which the training was ended, again and again, before it is run to its end."""
    folder, ends = RunFolder(Path(config.runs) / config.name), []
    preset = Path(config.runs) / f"{config.name}.yaml"
    preset.parent.mkdir(parents=True, exist_ok=True)
    preset.write_text(json.dumps(config.model_dump(mode="json", exclude={"presets"})))
    for count in after:
        code, err, took = told(["train", "--existing", "resume", str(preset)], place, count)
        assert code == 130, err
        assert "interrupted; to go on from the last checkpoint: aceray train" in err and "Traceback" not in err
        assert took < SECONDS * crowded(), took
        rows = [row["step"] for row in folder.read_history()]
        assert rows == list(range(1, len(rows) + 1))
        assert folder.checkpoint_steps()[-1] == len(rows)  # what was done is kept
        assert not list(folder.path.rglob(".*.partial"))
        ends.append(len(rows))
    speeds = [row["train/particles_per_second"] for row in folder.read_history()]
    run(config, "resume")
    # these steps were not done again
    assert [row["train/particles_per_second"] for row in folder.read_history()][: ends[-1]] == speeds
    return ends


STEP = "aceray.display:RunDisplay.trained"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_notice_keeps_the_present_step(configure: Configure) -> None:
    steady = run(configure("name=steady", *RARE))
    config = configure(*RARE)
    ends = ended_and_resumed(config, STEP, (5, 30))
    assert 5 <= ends[0] < ends[1] < STEPS
    assert_same(RunFolder(Path(config.runs) / "run"), RunFolder(steady.folder))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_notice_keeps_the_present_round(configure: Configure) -> None:
    steady = run(configure("name=steady", *ROUNDS))
    config = configure(*ROUNDS)
    ends = ended_and_resumed(config, STEP, (7,))
    assert 7 <= ends[0] < 10
    assert_same(RunFolder(Path(config.runs) / "run"), RunFolder(steady.folder))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_notice_to_the_driver_keeps_the_step_of_all_workers(configure: Configure, workers: int) -> None:
    quick = (*RARE, f"resources.workers={workers}")
    steady = run(configure("name=steady", *quick))
    config = configure(*quick)
    ends = ended_and_resumed(config, STEP, (5,))
    assert 5 <= ends[0] < STEPS
    assert_same(RunFolder(Path(config.runs) / "run"), RunFolder(steady.folder))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_notice_to_one_worker_keeps_the_step_and_another_goes_on(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = (*RARE, "resources.workers=2", "train.keep_checkpoints=9")
    events: list[int] = []
    with connect(None):
        steady = run(configure("name=steady", *quick))
        monkeypatch.setattr("aceray.distributed.run.train_share", accidents.told_once)
        shaken = run(configure(*quick), on_progress=lambda event: events.append(event.step))
    assert events == list(range(1, STEPS + 1))
    kept, last = RunFolder(shaken.folder).checkpoint_steps()
    assert accidents.STEP <= kept < last == STEPS
    begun = sorted(int(mark.name.split("-")[2]) for mark in shaken.folder.glob("begun-0-*"))
    assert begun == [1, kept + 1]  # nothing was done again
    assert_same(RunFolder(shaken.folder), RunFolder(steady.folder))


TRIAL_STEPS = 600
STUDY = """
name: {name}
studies: {folder}
base: {base}
space:
  pip.weight: {weights}
members: {members}
objective: {{metric: select/d4_consistency, mode: min}}
"""


def runs_of(study: Path) -> list[RunFolder]:
    return [RunFolder(file.parent) for file in sorted(study.glob("trials/**/config.yaml"))]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("address", "members", "workers", "weights"),
    [("none", "two_seeds", 0, [0.0]), ("local", "one", 0, [0.0, 1.0]), ("local", "one", 1, [0.0])],
)
def test_a_notice_keeps_the_steps_of_trials(
    tmp_path: Path, particles: Path, address: str, members: str, workers: int, weights: list[float]
) -> None:
    """In this process, where both runs of a pair are under way at once, and on Ray, where the trials are."""
    base = [*QUICK, *RARE, f"train.steps={TRIAL_STEPS}", "train.evaluate_every=50", f"data.path={particles}"]
    base += [f"resources.workers={workers}", "train.lanes=1"]
    for name in ("steady", "shaken"):
        (tmp_path / f"{name}.yaml").write_text(
            STUDY.format(name=name, folder=tmp_path, base=base, members=members, weights=weights)
        )
    steady = tune(load_study(str(tmp_path / "steady.yaml")), address="none")
    shaken, file = tmp_path / "shaken", str(tmp_path / "shaken.yaml")
    # the trials have begun, and have evaluated now and then
    code, err, took = told(["tune", file, "--address", address], "aceray.display:StudyDisplay.happened", 4)
    assert code == 130 and "interrupted; to go on: aceray tune" in err and "Traceback" not in err, err
    assert took < SECONDS * crowded(), took
    assert {json.loads(path.read_text())["status"] for path in shaken.glob("trials/*/trial.json")} == {"interrupted"}
    speeds: dict[Path, list[float]] = {}
    for folder in runs_of(shaken):
        rows = folder.read_history()
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert folder.checkpoint_steps() == ([len(rows)] if rows else [])  # what was done is kept
        speeds[folder.path] = [row["train/particles_per_second"] for row in rows]
    counts = sorted(len(each) for each in speeds.values())
    assert len(counts) == (1 if workers else 2) and counts[0] > 0 and 50 < counts[-1] < TRIAL_STEPS  # at once
    tune(load_study(file), address=address, resume=True)
    for folder, expected in zip(runs_of(shaken), runs_of(steady.folder), strict=True):
        before = speeds.get(folder.path, [])
        # these steps were not done again
        assert [row["train/particles_per_second"] for row in folder.read_history()][: len(before)] == before
        assert_same(folder, expected)


def test_a_notice_is_heeded_or_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "SECONDS_TO_END", 0.5)
    before = signal.getsignal(signal.SIGTERM)
    with notice.ended_by_sigterm():
        with pytest.raises(KeyboardInterrupt):  # nobody asks for it
            signal.raise_signal(signal.SIGTERM)
        with notice.heeded():
            signal.raise_signal(signal.SIGTERM)
            assert notice.given()
            with pytest.raises(KeyboardInterrupt):  # the second one
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):  # the step takes too long
                time.sleep(0.1)
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    sum(range(10_000))
            assert time.monotonic() < deadline
    assert not notice.given()
    assert signal.getsignal(signal.SIGTERM) == before
