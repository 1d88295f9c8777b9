"""Reconstructions from random starts on one core: accuracy, CPU seconds, and the same without PIP, over three seeds.

Datasets are made below data/ once. CPU seconds are those of training alone: reading, transforming and estimating the
images and all steps; not simulation and not the evaluations that draw the curves.
"""

import csv
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

import aceray
from aceray.build import build_trainer, truth_score
from aceray.config import Config
from aceray.data.particles import open_particles
from aceray.distributed.ingest import read_here
from aceray.train.evaluate import evaluate

SEEDS = (1, 2, 3)
STEPS = {"clean": 1000, "demo": 2000}  # of the encoder alone, which nothing refines
EVALUATE_EVERY = 200
FIGURES = Path(__file__).parent / "figures"
COLUMNS = {
    "FSC 0.5, px": "fsc/resolution_px_0.5",
    "FSC 0.143, px": "fsc/resolution_px_0.143",
    "rotation mean": "pose/rotation_sqfrob_mean",
    "median": "pose/rotation_sqfrob_median",
    "below 0.5": "pose/fraction_below_half",
    "coverage": "pose/coverage",
    "shift, px^2": "pose/shift_sq_px_median",
}


@dataclass(frozen=True)
class Reconstruction:
    """One training run: its metrics over the steps, those of all particles at the end, and its CPU seconds."""

    metrics: dict[str, float]
    curve: list[tuple[int, dict[str, float]]]
    cpu_seconds: float


def reconstruct(config: Config) -> Reconstruction:
    """Train in this process; the truth is used by the evaluations alone."""
    particles = open_particles(config.data.path)
    evaluating = [0.0]
    started = time.process_time()
    stack = read_here(particles, particles.row_groups(), particles.manifest.box)
    trainer = build_trainer(config, particles, stack, score=truth_score(particles))
    evaluate_now = trainer._evaluate

    def timed():
        started = time.process_time()
        found = evaluate_now()
        evaluating[0] += time.process_time() - started
        return found

    trainer._evaluate = timed
    curve = [(progress.step, progress.metrics) for progress in trainer.run() if progress.metrics]
    cpu_seconds = time.process_time() - started - evaluating[0]
    found = evaluate(
        trainer.volume(),
        trainer.predict(),
        particles.read_truth(),
        particles.read_truth_volume(),
        particles.manifest.pixel_size_angstrom,
    )
    return Reconstruction(found.metrics, curve, cpu_seconds)


def main() -> None:
    """Print the table of both datasets and draw the curves with and without PIP."""
    print(f"\n## Reconstruction, encoder and decoder alone, one thread, seeds {SEEDS}\n")
    print("| run | seed | " + " | ".join(COLUMNS) + " | CPU s |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    runs = {}
    for preset in STEPS:
        for name, overrides in (("PIP", ()), ("no PIP", ("pip.weight=0", "ipi.train_shift=true"))):
            for seed in SEEDS:
                config = aceray.load_config(
                    preset,
                    *overrides,
                    f"seed={seed}",
                    "resources.workers=0",
                    f"train.steps={STEPS[preset]}",
                    f"train.evaluate_every={EVALUATE_EVERY}",
                )
                aceray.simulate(config, existing="keep")
                run = runs[preset, name, seed] = reconstruct(config)
                _print_row(f"{preset}, {name}", str(seed), run)
    draw(runs)


def _print_row(name: str, seed: str, run: Reconstruction) -> None:
    values = " | ".join(f"{run.metrics[key]:.3f}" for key in COLUMNS.values())
    print(f"| {name} | {seed} | {values} | {run.cpu_seconds:.0f} |", flush=True)


def draw(runs: dict[tuple[str, str, int], Reconstruction]) -> None:
    """Median over the seeds of error, resolution and coverage over the steps, as pip_on_off.png and .csv."""
    panels = {
        "rotation error, mean of |R - R'|²": "pose/rotation_sqfrob_mean",
        "resolution at FSC 0.5, px": "fsc/resolution_px_0.5",
        "coverage of view directions": "pose/coverage",
    }
    FIGURES.mkdir(exist_ok=True)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, 3)
    rows = []
    for line, preset in zip(axes, STEPS, strict=True):
        for axis, (label, key) in zip(line, panels.items(), strict=True):
            for name, colour in (("PIP", "C0"), ("no PIP", "C1")):
                curves = [[metrics[key] for _, metrics in runs[preset, name, seed].curve] for seed in SEEDS]
                steps = [step for step, _ in runs[preset, name, SEEDS[0]].curve]
                middle = [statistics.median(column) for column in zip(*curves, strict=True)]
                for curve in curves:
                    axis.plot(steps, curve, color=colour, alpha=0.3, linewidth=0.8)
                axis.plot(steps, middle, color=colour, label=name)
                rows += [(preset, name, key, step, value) for step, value in zip(steps, middle, strict=True)]
            axis.set(xlabel="step", ylabel=label)
        line[0].set_title("noise-free" if preset == "clean" else "0 dB, CTF, shifts", loc="left")
        line[0].legend()
    figure.savefig(FIGURES / "pip_on_off.png", dpi=110)
    with open(FIGURES / "pip_on_off.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("set", "run", "metric", "step", "median over seeds"))
        writer.writerows(rows)
