"""Load: a study of 200 tiny trials against one store, a million rows of metadata. Rates and peak memory."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aceray.data.cryosparc import particles_from_cs, read_record_array
from aceray.data.particle_table import Findings
from aceray.data.star import particles_from_star, read_star_file
from aceray.folder import RunFolder, create_run_folder
from aceray.presets import load_config
from aceray.tracking.study import start_study_tracking
from tests.bench.timing import print_table
from tests.data.inputs import cs_columns, write_cs, write_star

TRIALS, STEPS, ROWS = 200, 50, 1_000_000


def measured(name: str, amount: str, count: int, work: Callable[[], object]) -> list[str]:
    """A row: CPU seconds, wall seconds, how many a CPU second, and the peak of the process so far."""
    cpu, wall = time.process_time(), time.monotonic()
    work()
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [name, amount, f"{cpu:.1f}", f"{wall:.1f}", f"{count / cpu:,.0f}", f"{peak:,.0f}"]


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


def main() -> None:
    """Print the table; `python -m tests.bench.load` gives peaks of each part alone when a part is named."""
    rows = []
    parts = sys.argv[1:] if sys.argv[0].endswith("load.py") else []
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
