"""Ctrl-C in every phase of every verb: the program ends soon, leaves no process behind and says how to go on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from aceray import api
from aceray.distributed.run import run
from aceray.presets import load_config
from aceray.study import load_study
from aceray.tracking.journal import STATE
from tests.data.inputs import some_images, write_stack, write_star
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parent.parent.parent
# what a user waits at most, on a machine with nothing else to do
SECONDS = 10.0
STEP = "aceray.display:RunDisplay.trained"
REFINED = ("train.steps=6", "refine={}", "refine.search_rounds=2", "refine.polish_rounds=1", "encoder.heads=1")
STUDY = "name: s\nstudies: {studies}\nbase: {base}\nspace:\n  pip.weight: [0.0, 2.0]\nobjective: pose/coverage\n"


@dataclass(frozen=True)
class Place:
    """The folders of a test: data sets, a finished run, a study's file, that study run, a run to be sent to MLflow."""

    data: Path
    run: Path
    star: Path
    study: Path
    compared: Path
    unsent: Path

    def settings(self, folder: Path, *more: str) -> list[str]:
        return [*QUICK, f"data.path={self.data}", f"runs={folder}", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("interrupts")
    data = write_particles(folder / "blobs", truth=True).path
    done = run(load_config(*QUICK, f"data.path={data}", f"runs={folder / 'runs'}", "train.steps=4"))
    write_stack(folder / "in" / "a.mrcs", some_images(300), 4.0)
    star = write_star(folder / "in" / "p.star", [f"{number + 1}@a.mrcs" for number in range(300)])
    study = folder / "s.yaml"
    base = [*QUICK, "train.steps=20", "train.evaluate_every=10", f"data.path={data}"]
    study.write_text(STUDY.format(studies=folder / "studies", base=base))
    compared = api.tune(load_study(str(study)), address="none").folder
    tracked = ("tracking.enabled=true", f"tracking.uri=sqlite:///{folder}/ml.db", "name=tracked", "train.steps=4")
    unsent = run(load_config(*QUICK, f"data.path={data}", f"runs={folder / 'runs'}", *tracked)).folder
    state = json.loads((unsent / STATE).read_text())
    (unsent / STATE).write_text(json.dumps(state | {"offset": 0}))  # as if nothing of it had been sent
    return Place(data, done.folder, star, study, compared, unsent)


CASES = {
    "train: start": ("-", "train {settings}", "to go on from the last checkpoint: aceray train"),
    "train: data": ("aceray.distributed.run:open_particles", "train {settings}", "aceray train"),
    "train: steps": (STEP, "train {settings} train.steps=100000", "aceray train"),
    "train: tracked": (STEP, "train {settings} {tracked} train.steps=100000", "aceray"),
    "train: rounds": ("aceray.distributed.share:_progress", "train {settings} {refined}", "--existing resume"),
    "train: map": ("aceray.distributed.share:_refined_share", "train {settings} {refined}", "--existing resume"),
    "train: results": ("aceray.distributed.run:write_results", "train {settings} train.steps=4", "--existing resume"),
    "evaluate": ("aceray.distributed.run:predict_share", "evaluate {run}", "repeat the command"),
    "evaluate: oracle": ("aceray.distributed.results:run_oracle", "evaluate {run} --oracle", "repeat the command"),
    "simulate": ("aceray.distributed.prepare:_make_shard", "simulate {simulated}", "aceray simulate"),
    "prepare": ("aceray.distributed.convert:_make", "prepare {star} --out {out}", "repeat the command"),
    "predict": ("aceray.distributed.assign:_write", "predict {run} {data} --out {out}", "repeat the command"),
    "export": ("aceray.distributed.export:_write_poses", "export {run} --out {out}", "repeat the command"),
    "tune: here": ("aceray.distributed.study_run:run_trial", "tune {study} --address none", "--resume"),
    "tune: ray": ("aceray.display:StudyDisplay.happened", "tune {study}", "--resume"),
    "compare": ("aceray.distributed.study_results:_draw_figures", "compare {compared}", "repeat the command"),
    "sync": ("aceray.tracking.store:Store.points", "sync {unsent}", "repeat the command"),
    "train: ray": (STEP, "train {settings} resources.workers=1 train.steps=99999", "resume"),
}  # fmt: skip


def processes_of(session: int) -> list[str]:
    """The command lines of the processes of a session that still live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state != "Z":
                found.append((stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100])
        except OSError:
            continue
    return found


def crowded() -> float:
    """How much longer everything takes because of what else runs on this machine."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_ends_it(name: str, place: Place, tmp_path: Path) -> None:
    phase, command, advice = CASES[name]
    words = {
        "settings": place.settings(tmp_path / "runs"),
        "refined": list(REFINED),
        "tracked": ["tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/ml.db"],
        "simulated": ["data/spliceosome_32_clean", "simulation.particles=4096", f"data.path={tmp_path / 'made'}"],
        "compared": [str(place.compared)], "unsent": [str(place.unsent)], "run": [str(place.run)],
        "star": [str(place.star)], "data": [str(place.data)],
        "out": [str(tmp_path / "out")], "study": [str(place.study), f"studies={tmp_path}"],
    }  # fmt: skip
    arguments = [each for word in command.split() for each in words.get(word.strip("{}"), [word])]
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.faults.driver", phase, *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        line = next((line for line in child.stdout if line.startswith("begin ")), "")
        assert line, child.communicate()[1]
        time.sleep(0.7 * crowded() if phase == "-" else 0.2)
        os.killpg(child.pid, signal.SIGINT)
        sent = time.monotonic()
        _, err = child.communicate(timeout=SECONDS * crowded())
        took = time.monotonic() - sent
        print(f"{name}: {took:.1f} s, crowded {crowded():.1f}")
        assert child.returncode == 130, err
        told = [line for line in err.splitlines() if line.startswith("interrupted; ")]
        assert len(told) == 1 and advice in told[0], err
        assert "Traceback" not in err
        deadline = time.monotonic() + SECONDS * crowded()
        while (left := processes_of(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
