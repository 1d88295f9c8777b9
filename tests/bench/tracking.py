"""What tracking costs a step, with a store that answers and with stores that do not."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from aceray.distributed.run import run
from aceray.presets import load_config
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles
from tests.faults.proxy import Fault, FaultyProxy, proxy_to
from tests.faults.servers import mlflow_server

STEPS, REPEATS = 300, 3
FAULTS: tuple[Fault, ...] = ("none", "down", "slow", "error", "too_many", "silent", "answer_lost")


def cpu_and_wall(overrides: list[str], name: str) -> tuple[float, float]:
    """Milliseconds of a step after the first fifty: mean CPU of the training's own thread, and median wall."""
    times: list[tuple[float, float]] = []
    run(load_config(*overrides, f"name={name}"), on_progress=lambda _: times.append((time.thread_time(), time.time())))
    later = times[50:]
    cpu = (later[-1][0] - later[0][0]) / (len(later) - 1)
    wall = statistics.median(after[1] - before[1] for before, after in itertools.pairwise(later))
    return 1e3 * cpu, 1e3 * wall


@contextmanager
def stores(folder: Path) -> Iterator[FaultyProxy]:
    with ExitStack() as stack:
        port = stack.enter_context(mlflow_server(folder))
        yield stack.enter_context(proxy_to("127.0.0.1", port))


def table() -> str:
    """A row a fault: medians over interleaved repeats, and the change against tracking that is off."""
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name, stores(Path(name)) as proxy:
        folder = Path(name)
        data = write_particles(folder / "blobs").path
        base = [*QUICK, f"data.path={data}", f"runs={folder / 'runs'}", f"train.steps={STEPS}", "decoder/voxel"]
        base += ["train.evaluate_every=1000", "train.checkpoint_every=1000"]
        tracked = ["tracking.enabled=true", f"tracking.uri={proxy.url}"]
        for repeat in range(REPEATS):
            found.setdefault("off", []).append(cpu_and_wall(base, f"off-{repeat}"))
            for fault in FAULTS:
                proxy.set(fault)
                found.setdefault(fault, []).append(cpu_and_wall([*base, *tracked], f"{fault}-{repeat}"))
        proxy.set("none")
    off = [statistics.median(each) for each in zip(*found["off"], strict=True)]
    lines = ["| store | CPU ms a step | | wall ms a step | |", "|---|---|---|---|---|"]
    for fault, times in found.items():
        cpu, wall = (statistics.median(each) for each in zip(*times, strict=True))
        lines.append(f"| {fault} | {cpu:.2f} | {cpu / off[0] - 1:+.1%} | {wall:.2f} | {wall / off[1] - 1:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    print("Tracking: what a step costs while the store does this\n")
    print(table(), flush=True)


if __name__ == "__main__":
    main()
