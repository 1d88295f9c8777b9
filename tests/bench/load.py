"""Load: a study of 200 tiny trials against one store, a million rows of metadata. Rates and peak memory."""

import contextlib
import itertools
import json
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

from aceray import api
from aceray.data.cryosparc import particles_from_cs, read_record_array
from aceray.data.particle_table import Findings
from aceray.data.star import particles_from_star, read_star_file
from aceray.folder import RunFolder, create_run_folder
from aceray.presets import load_config
from aceray.study import load_study
from aceray.tracking.study import start_study_tracking
from tests.bench.timing import print_table
from tests.data.inputs import cs_columns, write_cs, write_star
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

TRIALS, STEPS, ROWS = 200, 50, 1_000_000
STEPS_OF_A_TRIAL = 10
SECONDS_BETWEEN_LOOKS = 0.2


def measured(name: str, amount: str, count: int, work: Callable[[], object]) -> list[str]:
    """A row: CPU seconds, wall seconds, how many a CPU second, and the peak of the process so far."""
    cpu, wall = time.process_time(), time.monotonic()
    work()
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return [name, amount, f"{cpu:.1f}", f"{wall:.1f}", f"{count / cpu:,.0f}", f"{peak_mib():,.0f}"]


def peak_mib() -> float:
    """Most memory that this process had; ru_maxrss would be inherited from the one that started it."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024


@contextlib.contextmanager
def cpu_of_all() -> Iterator[dict[int, float]]:
    """CPU seconds of this process and those below it, by process, as last seen: five times a second."""
    seen: dict[int, float] = {}
    over = threading.Event()

    def look() -> None:
        this = psutil.Process()
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            for process in [this, *this.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    seen[process.pid] = times.user + times.system

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def write_trial(folder: Path, number: int) -> Path:
    """What a finished trial leaves: settings, notes, a history of STEPS steps, metrics."""
    config = load_config(f"runs={folder}", f"name=trial-{number:03d}", f"seed={number}")
    run = create_run_folder(config)
    rows = [{"step": step, "train/loss_total": 1.0 / step, "train/loss_ipi": 0.5} for step in range(1, STEPS + 1)]
    run.history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.write_notes(dataset_sha256="0" * 64)
    run.metrics.write_text(json.dumps({"pose/coverage": 0.5, "train/steps": STEPS}))
    notes = {"number": number, "point": {"seed": number}, "status": "finished", "reason": "", "metrics": {}}
    RunFolder(run.path).trial.write_text(json.dumps(notes))
    return run.path


def study(folder: Path, uri: str) -> None:
    config = load_config(f"tracking.uri={uri}")
    (folder / "study").mkdir()
    with start_study_tracking(config, "load", folder / "study", {}) as tracker:
        for number in range(TRIALS):
            tracker.follow(write_trial(folder / "study" / "trials", number))
    if tracker.backlog:
        from aceray.tracking.sync import sync

        sync(folder / "study")


def trials(folder: Path, address: str, count: int) -> list[str]:
    """A row: a whole study of tiny trainings with MLflow; its quarters tell whether every trial costs alike."""
    data, uri = write_particles(folder / "blobs").path, f"sqlite:///{folder}/{address}.db"
    base = [*QUICK, f"data.path={data}", "data.half_set=1", "tracking.enabled=true", f"tracking.uri={uri}"]
    base += [f"train.steps={STEPS_OF_A_TRIAL}", f"train.evaluate_every={STEPS_OF_A_TRIAL}"]
    objective = "objective: {metric: select/d4_consistency, mode: min}"
    study = folder / f"{address}.yaml"
    study.write_text(f"studies: {folder}\nbase: {base}\nspace:\n  seed: {list(range(count))}\n{objective}\n")
    ends = [time.monotonic()]
    with cpu_of_all() as cpu:
        result = api.tune(
            load_study(str(study)), address=address,
            on_event=lambda event: ends.append(time.monotonic()) if event.status == "finished" else None,
        )  # fmt: skip
        wall = time.monotonic() - ends[0]
    assert result.count("finished") == count
    quarters = [f"{after - before:.0f}" for before, after in itertools.pairwise(ends[:: count // 4])]
    points = count_points(folder / f"{address}.db", count)
    total, peak = sum(cpu.values()), peak_mib()
    return [
        address, f"{wall:.0f}", " ".join(quarters), f"{60 * count / wall:.1f}", f"{total:.0f}", f"{peak:,.0f}",
        f"{points:,}",
    ]  # fmt: skip


def count_points(database: Path, trials: int) -> int:
    """All points of a store in which every trial must have each of its steps once, and have ended."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        steps = "select run_uuid, count(*), count(distinct step) from metrics where key = 'train/loss_total' group by 1"
        found = opened.execute(steps).fetchall()
        assert len(found) == trials and {row[1:] for row in found} == {(STEPS_OF_A_TRIAL, STEPS_OF_A_TRIAL)}, found
        assert opened.execute("select status, count(*) from runs group by 1").fetchall() == [("FINISHED", trials + 1)]
        return opened.execute("select count(*) from metrics").fetchone()[0]


def main() -> None:
    """Print the table; `python -m tests.bench.load` gives peaks of each part alone when a part is named.

    `trials [ADDRESS] [COUNT]` is a whole study and has a table of its own.
    """
    rows = []
    parts = sys.argv[1:] if sys.argv[0].endswith("load.py") else []
    if parts[:1] == ["trials"]:
        address = parts[1] if len(parts) > 1 else "local"
        count = int(parts[2]) if len(parts) > 2 else TRIALS
        with tempfile.TemporaryDirectory() as name:
            head = ["address", "wall s", "of its quarters", "trials a minute", "CPU s", "peak MiB", "points in MLflow"]
            print_table(f"{count} trials", head, [trials(Path(name), address, count)])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not parts or "study" in parts:
            uri = f"sqlite:///{folder}/ml.db"
            rows.append(measured("study in sqlite", f"{TRIALS} trials", TRIALS, lambda: study(folder, uri)))
        if not parts or "star" in parts:
            names = [f"{row % 1000 + 1:06d}@stack_{row // 1000}.mrcs" for row in range(ROWS)]
            path = write_star(folder / "p.star", names, rlnAngleRot=[1.0] * ROWS)
            rows.append(
                measured("STAR", f"{ROWS:,} rows", ROWS, lambda: particles_from_star(read_star_file(path), Findings()))
            )
        if not parts or "cs" in parts:
            columns = {key: np.resize(np.asarray(values), ROWS) for key, values in cs_columns(1000).items()}
            made = write_cs(folder / "p.cs", columns)
            rows.append(
                measured(
                    ".cs", f"{ROWS:,} rows", ROWS, lambda: particles_from_cs(made, read_record_array(made), Findings())
                )
            )
    print_table("Load", ["what", "of", "CPU s", "wall s", "a CPU s", "peak MiB"], rows)


if __name__ == "__main__":
    main()
