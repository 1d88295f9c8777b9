"""What a step pays to be watched by Prometheus: its details, its report, and its part of the exports of a thread."""

import tempfile
import time
from pathlib import Path

import ray

from aceray.build import build_trainer
from aceray.distributed.ingest import read_here
from aceray.distributed.monitor import SECONDS_BETWEEN_EXPORTS, RunMonitor
from aceray.folder import RunFolder
from aceray.tracking.run import Tracker
from tests.bench.steps import BATCH, method_config, noise_set
from tests.bench.timing import cpu_seconds, print_table

TIMES = 1000


def main() -> None:
    """Time the parts on the images of 32 px, in a Ray session of its own."""
    with tempfile.TemporaryDirectory() as folder:
        particles = noise_set(Path(folder) / "noise", 32)
        stack = read_here(particles, particles.row_groups(), 32)
        trainer = build_trainer(method_config(["method/ace_em"], BATCH[32], True), particles, stack)
        running = trainer.run()
        started = time.process_time()
        events = list(running)
        step = (time.process_time() - started) / len(events)
        details = cpu_seconds(lambda: [trainer._details(0.1) for _ in range(TIMES)]) / TIMES
        monitor = RunMonitor(RunFolder(Path(folder) / "run"), Tracker())
        alone = cpu_seconds(lambda: [monitor.report(events[-1]) for _ in range(TIMES)]) / TIMES
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            export = cpu_seconds(lambda: [monitor._export() for _ in range(TIMES)]) / TIMES
        finally:
            ray.shutdown()
        numbers = len(list(monitor.collect()))
    rows = [
        ["a step of 64 particles, 32 px", f"{step * 1e6:,.0f}"],
        ["its details", f"{details * 1e6:.2f}"],
        ["its report", f"{alone * 1e6:.2f}"],
        [f"an export of {numbers} numbers, every {SECONDS_BETWEEN_EXPORTS:.0f} s", f"{export * 1e6:,.0f}"],
    ]
    print_table("To be watched", ["", "CPU us"], rows)


if __name__ == "__main__":
    main()
