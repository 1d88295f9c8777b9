"""Whole training steps of each method, IPI alone and with PIP, at every box: time, particles/s and the floor.

The steps are those of `Trainer.run` on images of noise, which cost what images of molecules cost. Nothing is learnt.
On a GPU where there is one, with the paper's batch; else on one thread of the CPU, by its time.
"""

import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import aceray
from aceray.build import build_trainer, training_box
from aceray.config import Config
from aceray.data.manifest import ImageLayout
from aceray.data.particles import ParticleSet
from aceray.data.writer import ParticleWriter
from aceray.distributed.ingest import read_here
from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from tests.bench.physics import (
    BOXES,
    PHASE_BACKWARD,
    PHASE_FORWARD,
    SLICE_BACKWARD,
    SLICE_FORWARD,
    TRANSFER_FORWARD,
    ctf_parameters,
    real_cost,
    transform_cost,
)
from tests.bench.timing import Machine, best_device, clock_of, measure_machine, print_table

PARTICLES = 512
# on a CPU a step of SIRENs must fit into the patience of whoever waits
BATCH = {32: 64, 64: 16, 128: 4}
BATCH_OF_PAPER = 384
STEPS = 9
METHODS = {
    "MLP, slices, 4 heads (ace_em)": ["method/ace_em"],
    "ResNet-18, slices, generalised (ace_em_voxel)": ["method/ace_em_voxel"],
    "the same, rotate and sum": ["method/ace_em_voxel", "decoder.projector=rotate"],
    "ResNet-18, SIREN 256, symmetric (ace_em_siren)": ["method/ace_em_siren"],
    "the same, lattice": ["method/ace_em_siren", "decoder.projector=lattice"],
}
SINE = 2 * 20


@dataclass(frozen=True)
class Step:
    """Seconds of a step (median), and its operations: those counted by torch and those of sampling and sines."""

    seconds: float
    flops: float


def noise_set(folder: Path, box: int) -> ParticleSet:
    """Images of noise with CTFs."""
    layout = ImageLayout(box=box, pixel_size_angstrom=544.0 / box, ctf=True, image_dtype="float16")
    with ParticleWriter(folder, layout) as writer:
        images = torch.randn(PARTICLES, box, box, generator=named_generator("bench/steps", box))
        identifier = np.arange(PARTICLES)
        ctf = {name: value.numpy() for name, value in vars(ctf_parameters(PARTICLES)).items()}
        writer.write(images, {"particle_id": identifier, "half_set": (1 + identifier % 2).astype(np.int8), **ctf})
        return writer.finish({"made_by": "bench"})


def method_config(presets: list[str], batch: int, pip: bool) -> Config:
    """A method with PIP from the first step, or without PIP."""
    weight = [] if pip else ["pip.weight=0"]
    timing = [f"train.batch={batch}", f"train.steps={STEPS}", "pip.warmup_steps=0", "data.shift_sigma_fraction=0.03"]
    return aceray.load_config(*presets, *timing, *weight)


def sampled_flops(config: Config, box: int, pip: bool) -> float:
    """Operations that torch does not count: sampling or sines, CTF and phase, of every image rendered in a step."""
    points, batch = len(HalfDisc(box)), config.train.batch
    views = 1 if config.ipi.loss == "mse" else 2
    candidates = config.encoder.heads * views
    scored = candidates if candidates > 1 else 0
    forward_only, both = batch * (scored + pip), batch
    sliced = transform_cost(box).flops + points * (SLICE_FORWARD * (both + forward_only) + SLICE_BACKWARD * both)
    decoder = config.decoder
    units = decoder.width * (decoder.content_depth + decoder.envelope_depth + 2) if decoder.kind == "siren" else 0
    match decoder.projector:
        case "points":
            sampled = points * units * (20 * forward_only + SINE * both)
        case "lattice":
            sampled = math.pi / 12 * box**3 * units * SINE + sliced
        case "rotate":
            # a third of the operations of a sampled point are forward
            sampled = real_cost(box).flops * (both + forward_only / 3)
        case "slice":
            sampled = sliced
    physics = points * ((TRANSFER_FORWARD + PHASE_FORWARD) * (both + forward_only) + PHASE_BACKWARD * both)
    return sampled + physics


def measure_step(config: Config, particles: ParticleSet, pip: bool, device: torch.device) -> Step:
    """Median of the steps after the first two; operations of the second."""
    stack = read_here(particles, particles.row_groups(), training_box(config, particles.manifest.box))
    trainer, clock = build_trainer(config, particles, stack, device=device), clock_of(device)
    running, seconds = trainer.run(), []
    next(running)
    with FlopCounterMode(display=False) as counter:
        next(running)
    while True:
        started = clock()
        if next(running, None) is None:
            break
        seconds.append(clock() - started)
    flops = counter.get_total_flops() + sampled_flops(config, training_box(config, particles.manifest.box), pip)
    return Step(statistics.median(seconds), flops)


def row(name: str, alone: Step, both: Step, batch: int, machine: Machine) -> list[str]:
    floor, rate = both.flops / machine.flops, batch / both.seconds
    return [
        name,
        f"{batch}",
        f"{alone.seconds * 1e3:,.1f}",
        f"{both.seconds * 1e3:,.1f}",
        f"{both.seconds / alone.seconds:.2f}",
        f"{1 / both.seconds:,.2f}",
        f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
        f"{both.flops / 1e9:,.2f}",
        f"{floor * 1e3:,.1f}",
        f"{both.seconds / floor:.1f}",
    ]


def main() -> None:
    """Time every method at every box and print one table a box."""
    device = best_device()
    machine = measure_machine(device)
    hardware = "One thread" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"\n{hardware}, torch {torch.__version__}: {machine.flops / 1e9:,.0f} GFLOP/s (matrix product)")
    header = ["method", "batch", "IPI ms", "IPI + PIP ms", "ratio", "steps/s", "particles/s"]
    header += ["GFLOP", "floor ms", "times the floor"]
    for box in BOXES:
        rows, batch = [], BATCH[box] if device.type == "cpu" else BATCH_OF_PAPER
        with tempfile.TemporaryDirectory() as folder:
            particles = noise_set(Path(folder) / "noise", box)
            for name, presets in METHODS.items():
                alone, both = (
                    measure_step(method_config(presets, batch, pip), particles, pip, device) for pip in (False, True)
                )
                rows.append(row(name, alone, both, batch, machine))
        print_table(f"{box} px, one training step", header, rows)
