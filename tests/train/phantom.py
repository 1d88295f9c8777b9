"""A small autoencoder and particles in memory, for tests of training that need no dataset on disk."""

import torch
from torch import nn

from aceray.em.ctf import CtfParameters, ctf_on_disc
from aceray.em.formation import shift_phase
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.models.autoencoder import AutoEncoder
from aceray.models.encoder import MlpFeatures, PoseEncoder, StandardisedInput
from aceray.models.voxel import VoxelDecoder
from aceray.train.predict import Particles

BOX, PIXEL_SIZE_ANGSTROM = 16, 4.0


def chiral_volume(box: int = BOX) -> torch.Tensor:
    """Four blobs (d, d, d) that no rotation carries into their mirror image."""
    axis = torch.arange(box, dtype=torch.float32) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    scale = box / 16
    centres = ((2.0, 1.0, -3.0, 1.0), (-3.0, 2.0, 1.0, 0.7), (1.0, -3.0, 2.0, 0.5), (0.0, 3.0, 3.0, 0.9))
    blobs = [
        height * torch.exp(-((z - scale * a) ** 2 + (y - scale * b) ** 2 + (x - scale * c) ** 2) / (3 * scale**2))
        for a, b, c, height in centres
    ]
    return torch.stack(blobs).sum(0)


def ctf_parameters(count: int) -> CtfParameters:
    """Defoci between 1 and 2 micrometres with 400 angstrom of astigmatism at all angles."""
    defocus = torch.linspace(10000, 20000, count)
    full = torch.full((count,), 1.0)
    angle = torch.linspace(0, 170, count)
    return CtfParameters(defocus + 200, defocus - 200, angle, 0 * full, 300 * full, 2.7 * full, 0.1 * full)


def projections(count: int, shift_px: float = 1.0, noise: float = 0.1, seed: int = 1, ctf: bool = True):
    """Particles of the chiral volume, with their rotations and shifts."""
    disc, generator = HalfDisc(BOX), named_generator("tests/phantom", seed)
    rotation = random_rotations(count, generator)
    shift = shift_px * torch.randn(count, 2, generator=generator)
    parameters = ctf_parameters(count) if ctf else None
    images = central_slice(padded_transform(chiral_volume()), rotation, disc) * shift_phase(disc, shift)
    if parameters is not None:
        images = images * ctf_on_disc(parameters, disc, PIXEL_SIZE_ANGSTROM)
    images = images / disc.energy(images).mean().sqrt()
    images = images + noise * torch.randn(images.shape, dtype=torch.complex64, generator=generator)
    return Particles(images, parameters, torch.arange(count), PIXEL_SIZE_ANGSTROM), rotation, shift


def autoencoder(heads: int = 2, shift_limit_px: float = 2.0, seed: int = 0) -> AutoEncoder:
    """A narrow MLP encoder and a voxel decoder that already holds the chiral volume."""
    disc = HalfDisc(BOX)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = MlpFeatures(BOX, 32, 2)
        encoder = PoseEncoder(
            StandardisedInput(disc), features, nn.Linear(32, 6 * heads), nn.Linear(32, 2), shift_limit_px
        )
    model = AutoEncoder(encoder, VoxelDecoder(disc, 2), disc)
    with torch.no_grad():
        model.decoder.density.copy_(chiral_volume())
    return model
