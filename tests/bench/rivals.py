"""The default method, the `cryoai` preset and cryoDRGN's `abinit` on the demo's set, by the CPU seconds they take.

    CRYODRGN=…/bin/cryodrgn python -m tests.bench rivals DIR

Every program runs as a process of its own on one thread, from random initialisation, and is scored against the truth
by `aceray.score` at each evaluation or epoch. The rivals are ended after 8 times the CPU seconds of the default.
Data and runs stay in DIR. Without CRYODRGN that program is left out.
"""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import mrcfile
import numpy as np
import psutil
import torch
import yaml

import aceray
from aceray.data.particles import ParticleSet, open_particles
from aceray.data.pose_files import unpickle_arrays
from aceray.distributed.ingest import read_here
from tests.bench.timing import print_table

SET, STUDY = "data/spliceosome_32", Path("conf/study/table1.yaml")
TIMES = (1, 4, 8)
QUALITIES = ((0.5, 4.0), (0.1, 2.5), (0.01, 2.2), (0.002, 2.1), (0.001, 2.1))
SHOWN = ("fsc/resolution_px_0.5", "pose/rotation_sqfrob_mean", "pose/rotation_sqfrob_median", "pose/shift_sq_px_mean")
FSC, _, MEDIAN, _ = SHOWN
POLL_SECONDS = 0.2
ABINIT = {
    "its defaults": "--t-extent 4 -n 30",
    "voxels, small search": (
        "--t-extent 4 --explicit-volume --lr 1e-3 --n-imgs-pretrain 5000 --base-healpy 1 --t-ngrid 5 --l-start 6 "
        "--l-end 16 --nkeptposes 3 --batch-size-hps 8 --epochs-pose-search 10 -n 30"
    ),
}
"""cryoDRGN's settings beside `EVERY`. Shifts: its default of 20 px is more than half of this box."""
EVERY = "--zdim 0 --seed 1 --max-threads 1 --num-workers 0 --no-amp --checkpoint 1 --log-interval 200 --no-analysis"

T = TypeVar("T")


@dataclass(frozen=True)
class Reached:
    """What a program had reached after so many CPU seconds."""

    cpu_seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Followed:
    """The results of one program in their order, all its CPU seconds, and how far it came."""

    name: str
    reached: list[Reached]
    cpu_seconds: float
    remark: str = ""

    def within(self, cpu_seconds: float) -> Reached | None:
        """The last result that was there by then."""
        return next((r for r in reversed(self.reached) if r.cpu_seconds <= cpu_seconds), None)

    def first(self, median: float, resolution_px: float) -> float | None:
        """CPU seconds to the first result that is no worse in the median rotation error and in resolution."""
        found = (r for r in self.reached if r.metrics[MEDIAN] <= median and r.metrics[FSC] <= resolution_px)
        return next((r.cpu_seconds for r in found), None)


def main() -> None:
    """Print what each had reached after 1, 4 and 8 times our CPU seconds, and the seconds of each to some qualities."""
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "rivals")
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    aceray.simulate(aceray.load_config(SET, f"data.path={data}"), existing="keep")
    particles = open_particles(data)
    ours = train("the default", [SET], folder, math.inf)
    limit = TIMES[-1] * ours.cpu_seconds
    programs = [partial(train, "preset `cryoai`", cryoai_words(), folder, limit)]
    cryodrgn = os.environ.get("CRYODRGN")
    if cryodrgn is None:
        print("cryoDRGN is left out: give its executable as CRYODRGN=…/bin/cryodrgn")
    else:
        write_cryodrgn_input(particles, folder)
        programs += [partial(abinit, name, cryodrgn, particles, limit) for name in ABINIT]
    with ThreadPoolExecutor(len(programs)) as pool:
        rivals = list(pool.map(lambda program: program(), programs))
    print_reached([ours, *rivals], ours.cpu_seconds)
    print_ratios([ours, *rivals])


def print_reached(programs: list[Followed], unit_seconds: float) -> None:
    """The table of what stood at each multiple of our CPU seconds."""
    rows = []
    for program in programs:
        # one that ended sooner has no later rows
        for allowed in sorted({min(times * unit_seconds, program.cpu_seconds) for times in TIMES}):
            found = program.within(allowed)
            cells = [f"{found.metrics[name]:.4f}" for name in SHOWN] if found else ["nothing yet", "", "", ""]
            when = f"{found.cpu_seconds:.0f}" if found else ""
            rows.append([program.name, f"{allowed:.0f}", when, *cells])
    header = ["", "CPU s allowed", "result after", "FSC 0.5, px", "rotation, mean", "median", "shift, px2"]
    print_table(f"{SET}, by CPU seconds", header, rows)
    for program in programs:
        if program.remark:
            print(f"{program.name}: {program.remark}")


def print_ratios(programs: list[Followed]) -> None:
    """The CPU seconds of each to several qualities, with the ratio to those of the first."""
    rows = []
    for program in programs:
        cells = []
        for median, resolution_px in QUALITIES:
            ours, theirs = (each.first(median, resolution_px) for each in (programs[0], program))
            until, sign = (theirs, "") if theirs else (program.cpu_seconds, "> ")
            ratio = f" ({sign}{until / ours:.1f})" if ours and program is not programs[0] else ""
            cells.append(f"{sign}{until:.0f}{ratio}")
        rows.append([program.name, *cells])
    header = ["median, FSC 0.5", *(f"{median:g}, {resolution_px:g} px" for median, resolution_px in QUALITIES)]
    print_table("CPU seconds to the same quality (ratio to ours)", header, rows)


def train(name: str, words: list[str], folder: Path, limit: float) -> Followed:
    """`aceray train` with these presets and settings; the evaluations of its journal are its results."""
    run = re.sub(r"\W+", "_", name)
    command = [str(Path(sys.executable).with_name("aceray")), "train", *words, f"data.path={folder / 'data'}"]
    command += [f"name={run}", f"runs={folder / 'runs'}", "tracking.enabled=false", "train.threads=1"]
    command += ["--existing", "overwrite"]
    journal = folder / "runs" / run / "history.jsonl"
    journal.unlink(missing_ok=True)
    found, seconds = followed(command, folder / f"{run}.log", lambda: evaluations(journal), limit)
    return Followed(name, [Reached(when, metrics) for when, metrics in found], seconds)


def cryoai_words() -> list[str]:
    """The preset with the small network and the rates of the study of the paper's table, and no end."""
    study = yaml.safe_load(STUDY.read_text())
    words = [*study["base"], *study["space"]["method"]["presets"]["cryoai"]]
    first, rest = words.index("method/cryoai"), [word for word in words if word != "method/cryoai"]
    return [words[first], SET, *rest, "train.steps=1000000", "train.evaluate_every=100", "train.checkpoint_every=10000"]


def evaluations(journal: Path) -> list[dict[str, float]]:
    """The rows of a run's journal that hold an evaluation, but for a last line that is not whole yet."""
    if not journal.exists():
        return []
    lines = journal.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n") and MEDIAN in line]
    return [{name: row[name] for name in SHOWN} for row in rows]


def write_cryodrgn_input(particles: ParticleSet, folder: Path) -> None:
    """`particles.mrcs` and `ctf.pkl`: box, pixel size, defoci, astigmatism's angle, kV, Cs, contrast, phase shift."""
    manifest = particles.manifest
    stack = read_here(particles, particles.row_groups(), manifest.box)
    assert isinstance(stack.images, torch.Tensor)
    images = stack.images.numpy().astype(np.float32)
    with mrcfile.new(folder / "particles.mrcs", images, overwrite=True) as file:
        file.set_image_stack()
        file.voxel_size = manifest.pixel_size_angstrom
    ctf = stack.ctf
    assert ctf is not None
    columns = [
        manifest.box,
        manifest.pixel_size_angstrom,
        ctf.defocus_u_angstrom,
        ctf.defocus_v_angstrom,
        ctf.astigmatism_deg,
        ctf.voltage_kv,
        ctf.spherical_aberration_mm,
        ctf.amplitude_contrast,
        ctf.phase_shift_deg,
    ]
    table = [np.broadcast_to(np.asarray(column, dtype=np.float32), len(images)) for column in columns]
    (folder / "ctf.pkl").write_bytes(pickle.dumps(np.stack(table, axis=1)))


def abinit(name: str, program: str, particles: ParticleSet, limit: float) -> Followed:
    """`cryodrgn abinit` with the settings of this name on the files beside the set; its epochs are its results."""
    folder = Path(str(particles.path)).parent
    out = folder / re.sub(r"\W+", "_", name)
    for old in out.glob("*.*.*"):
        old.unlink()
    log = folder / f"{out.name}.log"
    found, seconds = followed(abinit_words(program, folder, out, ABINIT[name]), log, lambda: epochs(out), limit)
    reached = [Reached(when, score_epoch(out, epoch, particles)) for when, epoch in found]
    return Followed(f"`cryodrgn abinit`, {name}", reached, seconds, progress(log.read_text(), seconds))


def abinit_words(program: str, folder: Path, out: Path, settings: str) -> list[str]:
    """The command. Its default sign is right: its CTF is negative at low frequencies, our images of protein bright."""
    words = [program, "abinit", str(folder / "particles.mrcs"), "--ctf", str(folder / "ctf.pkl"), "-o", str(out)]
    return [*words, *EVERY.split(), *settings.split()]


def epochs(out: Path) -> list[int]:
    """The epochs whose files are there; the weights come last."""
    return sorted(int(path.name.split(".")[1]) for path in out.glob("weights.*.pkl"))


def score_epoch(out: Path, epoch: int, particles: ParticleSet) -> dict[str, float]:
    """Our metrics of its poses and map after an epoch."""
    poses = out / f"fraction.{epoch}.pkl"
    poses.write_bytes(as_fractions(out / f"pose.{epoch}.pkl", particles.manifest.box))
    return aceray.score(str(particles.path), poses, out / f"reconstruct.{epoch}.mrc")


def as_fractions(abinit_poses: Path, box: int) -> bytes:
    """Poses in cryoDRGN's own format, translations as fractions of the box: `abinit` 4.3.1 leaves them in pixels."""
    rotation, shift_px = unpickle_arrays(abinit_poses)
    return pickle.dumps((rotation.astype(np.float32), (shift_px / box).astype(np.float32)))


def progress(log: str, seconds: float) -> str:
    """How far a run of `abinit` came by its log, with images and CPU seconds."""
    counts = re.findall(r"Train Epoch: (\d+)/(\d+)\] \[(\d+)/(\d+) particles", log)
    if not counts:
        return f"{seconds:.0f} CPU s, nothing counted yet"
    epoch, last, image, images = counts[-1]
    return f"{seconds:.0f} CPU s, its last count is image {int(image):,} of {int(images):,} in epoch {epoch} of {last}"


def followed(
    command: list[str], log: Path, reached: Callable[[], Sequence[T]], limit_seconds: float
) -> tuple[list[tuple[float, T]], float]:
    """What a program reaches, each with the CPU seconds (user and system) it had used, and those in all.

    It is ended past the limit. Raises RuntimeError when it fails.
    """
    found, seconds, ended = [], 0.0, False
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            seconds = max(seconds, sum(process.cpu_times()[:4]))
            found += [(seconds, item) for item in reached()[len(found) :]]
            if seconds > limit_seconds and not ended:
                process.terminate()
                ended = True
            time.sleep(POLL_SECONDS)
    if process.returncode and not ended:
        raise RuntimeError(f"{' '.join(command)} failed: {log.read_text()[-2000:]}")
    return found + [(seconds, item) for item in reached()[len(found) :]], seconds


if __name__ == "__main__":
    main()
