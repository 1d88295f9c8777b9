"""Refinement with what it estimates from the images, and with the same taken from the simulation's truth.

Given are the mean power of the images in each shell (that of the true slices under their contrast transfer, and the
noise that was added), the share of it that is noise, and the spread of the shifts. `python -m tests.bench given`.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

import aceray
from aceray.data.particles import ParticleSet, open_particles
from aceray.distributed.ingest import read_here
from aceray.em.fourier import HalfDisc
from aceray.train.energy import make_reference
from aceray.train.predict import particles_from_stack
from aceray.train.refine import Level, Refiner, shift_penalty
from tests.bench.timing import print_table

SET, SEEDS = "data/spliceosome_32", (1, 2, 3)
SHOWN = ("pose/rotation_sqfrob_mean", "pose/rotation_sqfrob_median", "pose/shift_sq_px_mean", "fsc/resolution_px_0.5")


def main() -> None:
    """Print a row for each seed and way, and how far the estimates are from the truth."""
    with tempfile.TemporaryDirectory() as name:
        words = [SET, f"data.path={name}/data", f"runs={name}/runs", "tracking.enabled=false", "train.threads=1"]
        aceray.simulate(aceray.load_config(*words))
        particles = open_particles(f"{name}/data")
        truth, rows = Truth(particles), []
        for seed in SEEDS:
            for way in ("estimated", "given"):
                with truth.known() if way == "given" else ExitStack():
                    began = time.process_time()
                    result = aceray.train(aceray.load_config(*words, f"seed={seed}", f"name={way}_{seed}"))
                    seconds = time.process_time() - began
                shown = [f"{result.metrics[metric]:.4f}" for metric in SHOWN]
                rows.append([way, str(seed), *shown, f"{seconds:.0f}"])
        header = ["power, noise and shifts", "seed", *SHOWN, "CPU s"]
        print_table(f"Refinement of {SET}", header, rows)
        print(f"\nthe estimated power of a shell is within {truth.deviation():.2%} of the true one")


class Truth:
    """What the simulation of a set knows."""

    def __init__(self, particles: ParticleSet) -> None:
        stored = particles.manifest.box
        self._noise_std, self._disc = particles.manifest.noise_std, HalfDisc(stored)
        stack = read_here(particles, particles.row_groups(), stored)
        self._images = particles_from_stack(stack, self._disc, particles.manifest.pixel_size_angstrom)
        volume, poses = particles.read_truth_volume(), particles.read_truth()
        assert volume is not None and poses is not None
        self._reference, self._poses = make_reference(volume, self._disc, None), poses

    @contextmanager
    def known(self) -> Iterator[None]:
        """Refinement with the truth in place of its estimates."""
        power, spread_px = self.power(), float(self._poses.shift_px.std())
        noise = float((self._noise_std**2 / power[self._disc.shell]).mean())

        def penalty(energy: float, spread: float) -> float:
            return shift_penalty(noise, spread)

        with (
            patch.object(Level, "_power", lambda level: power),
            patch.object(Refiner, "_spread_px", lambda refiner, state, scale: spread_px * scale),
            patch("aceray.train.refine.shift_penalty", penalty),
        ):
            yield

    def power(self) -> torch.Tensor:
        """Expected power of an image in each shell of the stored box."""
        level = Level(self._images, self._disc, self._disc.box, torch.ones(int(self._disc.shell.max()) + 1))
        total, count = (torch.zeros_like(level.power) for _ in range(2))
        for rows, images in level.chunks():
            clean = self._reference.slices(self._poses.rotation[rows])
            clean = clean if images.transfer is None else clean * images.transfer
            total.index_add_(0, self._disc.shell, torch.view_as_real(clean).square().sum((0, -1)))
            count.index_add_(0, self._disc.shell, torch.full_like(self._disc.radius, len(rows)))
        return total / count + self._noise_std**2

    def deviation(self) -> float:
        """The largest relative error of the estimated power, over all whole shells."""
        estimated = Level(self._images, self._disc, self._disc.box).power
        return float((estimated / self.power() - 1)[1 : self._disc.box // 2].abs().max())
