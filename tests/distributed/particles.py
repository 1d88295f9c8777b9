"""A small set of projections of blobs that the tests of a run train on."""

from pathlib import Path

import numpy as np
import torch

from aceray.data.manifest import ImageLayout
from aceray.data.particles import TRUTH_COLUMNS, ParticleSet
from aceray.data.writer import ParticleWriter
from aceray.em.ctf import CtfParameters, ctf_on_disc
from aceray.em.fourier import HalfDisc
from aceray.em.projection import project_slice
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, relion_from_rotation

BOX, PIXEL_SIZE, SHARDS, ROWS = 16, 4.0, 2, 512


def blobs() -> torch.Tensor:
    """Four blobs of different heights, a volume (d, d, d) without symmetry."""
    axis = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    centres = ((2.0, 1.0, -3.0, 1.0), (-3.0, 2.0, 1.0, 0.7), (1.0, -3.0, 2.0, 0.5), (0.0, 3.0, 3.0, 0.9))
    return sum(h * torch.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / 3) for a, b, c, h in centres)


def write_particles(path: Path, seed: int = 1, truth: bool = False) -> ParticleSet:
    """1,024 projections with CTF and a little noise, in two shards of two row groups.

    The images are the same with and without truth; without, evaluation is quick.
    """
    volume, disc = blobs(), HalfDisc(BOX)
    layout = ImageLayout(box=BOX, pixel_size_angstrom=PIXEL_SIZE, ctf=True, image_dtype="float16")
    with ParticleWriter(path, layout) as writer:
        for shard in range(SHARDS):
            generator = named_generator("tests/particles", seed, shard)
            rotation = random_rotations(ROWS, generator)
            values = (12000.0, 11800.0, 30.0, 0.0, 300.0, 2.7, 0.1)
            ctf = CtfParameters(*(torch.full((ROWS,), value) for value in values))
            clean = disc.gather(project_slice(volume, rotation)) * ctf_on_disc(ctf, disc, PIXEL_SIZE)
            images = disc.scatter(clean)
            images = images / images.std() + 0.3 * torch.randn(images.shape, generator=generator)
            rot, tilt, psi = relion_from_rotation(rotation.double())
            identifier = np.arange(shard * ROWS, (shard + 1) * ROWS)
            columns = {
                "particle_id": identifier,
                "half_set": (1 + identifier % 2).astype(np.int8),
                **{name: getattr(ctf, name).numpy() for name in vars(ctf)},
            }
            if truth:
                true = (rot.numpy(), tilt.numpy(), psi.numpy(), np.zeros(ROWS), np.zeros(ROWS))
                columns |= dict(zip(TRUTH_COLUMNS, true, strict=True))
            writer.write(images, columns)
        if truth:
            writer.write_truth_volume(volume)
        return writer.finish({"made_by": "tests"})
