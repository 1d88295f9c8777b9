"""Converting a stack of 100,000 particles: rate beside the disk's own, memory, and that a kill changes nothing.

    python -m tests.bench stacks [FOLDER [PARTICLES]]

Makes a float32 stack of 128 px (6.5 GB for 100,000) in the folder, which is removed at the end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mrcfile
import numpy as np

SIDE = 128
IMAGES_OF_A_SHARD = 4096  # 128 MiB of float16
# prepares a stack in a process of its own and tells how long it took and how much memory
_PROGRAM = """
import json, resource, sys, time
import aceray
started = time.perf_counter()
import torch
torch.set_num_threads(1)
aceray.prepare(sys.argv[1], sys.argv[2], box=int(sys.argv[3]), workers=int(sys.argv[4]),
               on_progress=lambda p: print(p.shards_done, flush=True))
usage = resource.getrusage(resource.RUSAGE_SELF)
# not ru_maxrss, which a process inherits from the one that started it
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"wall": time.perf_counter() - started, "cpu": usage.ru_utime + usage.ru_stime,
                  "peak_mib": peak / 1024}), flush=True)
"""


def make_input(folder: Path, particles: int) -> Path:
    """A stack of noise around a blob and its STAR file, one defocus a particle."""
    stack = folder / "particles.mrcs"
    generator = np.random.default_rng(1)
    axis = np.arange(SIDE) - SIDE // 2
    blob = 0.3 * np.exp(-(axis[:, None] ** 2 + axis**2) / (SIDE / 8) ** 2).astype(np.float32)
    with mrcfile.new_mmap(stack, (particles, SIDE, SIDE), mrc_mode=2) as file:
        file.set_image_stack()
        for start in range(0, particles, 2000):
            count = min(2000, particles - start)
            file.data[start : start + count] = generator.standard_normal((count, SIDE, SIDE), dtype=np.float32) + blob
    lines = ["data_optics", "", "loop_", "_rlnOpticsGroup #1", "_rlnVoltage #2", "_rlnSphericalAberration #3"]
    lines += [
        "_rlnAmplitudeContrast #4",
        "_rlnImagePixelSize #5",
        "1 300 2.7 0.1 1.5",
        "",
        "data_particles",
        "",
        "loop_",
    ]
    lines += ["_rlnImageName #1", "_rlnDefocusU #2", "_rlnDefocusV #3", "_rlnDefocusAngle #4", "_rlnOpticsGroup #5"]
    lines += [f"{i + 1:06d}@particles.mrcs {10000 + i % 20000} {9900 + i % 20000} 30 1" for i in range(particles)]
    (folder / "particles.star").write_text("\n".join(lines) + "\n")
    return folder / "particles.star"


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def plain_read(path: Path) -> float:
    """Seconds to read a file from its beginning to its end."""
    forget(path)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as stream:
        while stream.read(2**23):
            pass
    return time.perf_counter() - started


def prepared(star: Path, out: Path, box: int, workers: int, kill_after: int | None = None) -> dict[str, float]:
    """Prepare in another process; with `kill_after` it is killed when so many shards are done."""
    forget(star.with_name("particles.mrcs"))
    command = [sys.executable, "-c", _PROGRAM, str(star), str(out), str(box), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line
            if kill_after is not None and line.strip() == str(kill_after):
                process.send_signal(signal.SIGKILL)
    return {} if kill_after is not None else json.loads(last)


def digests(folder: Path) -> str:
    """What the manifest says of the shards."""
    return json.dumps(json.loads((folder / "manifest.json").read_text())["shards"])


def main() -> None:
    """Print the table of tests/bench/README.md."""
    arguments = [argument for argument in sys.argv[1:] if argument != "stacks"]
    parent = Path(arguments[0]) if arguments else Path(tempfile.gettempdir())
    particles = int(arguments[1]) if len(arguments) > 1 else 100_000
    folder = Path(tempfile.mkdtemp(prefix="aceray-stacks-", dir=parent))
    try:
        star = make_input(folder, particles)
        size = star.with_name("particles.mrcs").stat().st_size
        seconds = plain_read(star.with_name("particles.mrcs"))
        print(f"plain read       {size / 1e6 / seconds:6.0f} MB/s  {particles / seconds:8,.0f} particles/s")
        for box, workers in ((128, 0), (64, 0)):
            found = prepared(star, folder / f"set{box}", box, workers)
            rates = f"{size / 1e6 / found['wall']:6.0f} MB/s  {particles / found['wall']:8,.0f} particles/s"
            cost = f"{found['cpu']:.0f} CPU s ({particles / found['cpu']:,.0f} a CPU second)"
            print(f"{SIDE} -> {box:3d} px     {rates}  {cost}  peak {found['peak_mib']:.0f} MiB", flush=True)
        prepared(star, folder / "killed", 128, 0, max(1, particles // IMAGES_OF_A_SHARD // 2))
        left = len(list((folder / ".killed.preparing").glob("*.parquet")))
        found = prepared(star, folder / "killed", 128, 0)
        same = "identical" if digests(folder / "killed") == digests(folder / "set128") else "NOT THE SAME"
        print(f"killed with {left} shards, resumed in {found['wall']:.0f} s: the shards are {same}")
        seconds = plain_read(star.with_name("particles.mrcs"))
        print(f"plain read again {size / 1e6 / seconds:6.0f} MB/s  {particles / seconds:8,.0f} particles/s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
