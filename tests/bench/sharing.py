"""The data set of a study: read once and shared by its trials, against read by every trial on its own.

Trials that do nothing but look at each particle once; all of them and the shelf are counted together. Memory is what a
process has alone, at its peak above what it had before; the one copy that all share is added to it.
"""

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

import aceray
from aceray.data.manifest import ImageLayout
from aceray.data.writer import ParticleWriter
from aceray.distributed.cluster import connect
from aceray.distributed.run import read_particles
from aceray.distributed.shelf import open_shelf, reader

PARTICLES, SHARDS, BOX = 20_480, 4, 64
MEBIBYTE = 2**20
COPY_MIB = PARTICLES * BOX**2 * 4 / MEBIBYTE


class Watch:
    """CPU time and own memory of the process it lives in."""

    def __init__(self) -> None:
        self._process, self._started = psutil.Process(), time.process_time()
        self._before = self._most = self._own()
        threading.Thread(target=self._look, daemon=True).start()

    def _own(self) -> int:
        memory = self._process.memory_info()
        return memory.rss - memory.shared

    def _look(self) -> None:
        while True:
            self._most = max(self._most, self._own())
            time.sleep(0.005)

    def taken(self) -> tuple[float, float]:
        """CPU seconds, MiB."""
        return time.process_time() - self._started, (self._most - self._before) / MEBIBYTE


class Reading:
    """A trial that has its particles and looks at each once."""

    def read(self, shelf: Any, path: str) -> None:
        """From the shelf, or without one from the shards."""
        if shelf is None:
            _, stack = read_particles(path, None, None)
        else:
            _, stack = reader(shelf)(aceray.load_config(f"data.path={path}"))
        assert torch.isfinite(stack.images.sum())


def watch(actor: Any) -> None:
    """Begin to watch the process of an actor."""
    actor.watch = Watch()


def write_set(path: Path) -> None:
    """Noise is as good as particles for this."""
    rng = np.random.default_rng(1)
    layout = ImageLayout(box=BOX, pixel_size_angstrom=4.0, ctf=False, image_dtype="float16")
    with ParticleWriter(path, layout) as writer:
        for shard in range(SHARDS):
            rows = np.arange(PARTICLES // SHARDS) + shard * PARTICLES // SHARDS
            images = torch.from_numpy(rng.standard_normal((len(rows), BOX, BOX), dtype=np.float32))
            writer.write(images, {"particle_id": rows, "half_set": (1 + rows % 2).astype(np.int8)})
        writer.finish({"made_by": "tests.bench.sharing"})


def measure(trials: int, shared: bool, path: Path) -> tuple[float, float]:
    """CPU seconds and MiB of all processes together."""
    reading = [ray.remote(Reading).options(num_cpus=0).remote() for _ in range(trials)]
    shelf = open_shelf() if shared else None
    actors: list[Any] = [*reading, *([shelf] if shelf else [])]
    ray.get([actor.__ray_call__.remote(watch) for actor in actors])
    ray.get([actor.read.remote(shelf, str(path)) for actor in reading])
    taken = ray.get([actor.__ray_call__.remote(lambda actor: actor.watch.taken()) for actor in actors])
    for actor in actors:
        ray.kill(actor)
    return sum(cpu for cpu, _ in taken), sum(memory for _, memory in taken) + (COPY_MIB if shared else 0.0)


def main() -> None:
    """Print the table for one and four trials."""
    print(f"\n## Reading {PARTICLES} images of {BOX} px ({COPY_MIB:.0f} MiB) for the trials of a study\n")
    print("| trials | read | CPU s | MiB at the peaks |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, connect(None):
        path = Path(folder) / "noise"
        write_set(path)
        measure(1, True, path)  # what is imported and cached by the first is counted for none
        for trials in (1, 4):
            for shared in (False, True):
                cpu, memory = measure(trials, shared, path)
                name = "once, shared" if shared else "by each trial"
                print(f"| {trials} | {name} | {cpu:.1f} | {memory:.0f} |", flush=True)
