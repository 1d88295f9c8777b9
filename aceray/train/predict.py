"""From stored particles to what the model sees, and from a trained model to the poses of particles."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from aceray.data.particles import ParticleStack
from aceray.data.stream import StreamedImages
from aceray.em.ctf import CtfParameters, ctf_on_disc
from aceray.em.dihedral import ELEMENTS, coefficient_tables, element_rotations, transform_coefficients
from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob, sqfrob_to_degrees
from aceray.models.autoencoder import AutoEncoder

_CHUNK = 1024


@dataclass(frozen=True)
class StreamedCoefficients:
    """Half-disc coefficients (n, p) of images that are not all in memory, on the disc's device, times `scale`.

    They are transformed when they are asked for: by rows, as those of a tensor, or as images that were read already.
    """

    images: StreamedImages
    disc: HalfDisc
    scale: float = 1.0

    def __getitem__(self, rows: Int[Tensor, " b"]) -> Complex[Tensor, "b p"]:
        return self.of(self.images[rows])

    def of(self, images: Float[Tensor, "b d d"]) -> Complex[Tensor, "b p"]:
        """Those of some of the images."""
        return self.disc.gather(images.to(self.disc.radius.device)).mul_(self.scale)


@dataclass(frozen=True)
class Particles:
    """Particles as half-disc coefficients of the training box, scaled to unit signal; pixel size of that box."""

    coefficients: Complex[Tensor, "n p"] | StreamedCoefficients
    ctf: CtfParameters | None
    particle_id: Int[Tensor, " n"]
    pixel_size_angstrom: float

    def __len__(self) -> int:
        return len(self.particle_id)

    @property
    def device(self) -> torch.device:
        """Where the coefficients are."""
        held = self.coefficients
        return held.disc.radius.device if isinstance(held, StreamedCoefficients) else held.device

    def chunks(self, size: int) -> Iterator[tuple[Int[Tensor, " b"], Complex[Tensor, "b p"]]]:
        """All coefficients in their order, `size` particles at a time, with their rows."""
        held = self.coefficients
        if isinstance(held, StreamedCoefficients):
            for rows, images in held.images.chunks(size):
                yield rows.to(self.device), held.of(images)
            return
        for rows in torch.arange(len(self), device=self.device).split(size):
            yield rows, held[rows]

    def take(self, index: Tensor) -> "Particles":
        """A selection of the particles, in memory."""
        ctf = None if self.ctf is None else self.ctf.take(index)
        return Particles(self.coefficients[index], ctf, self.particle_id[index.cpu()], self.pixel_size_angstrom)

    def transfer(self, index: Tensor, disc: HalfDisc) -> Float[Tensor, "b p"] | None:
        """Contrast transfer of a selection on the disc, or None for images without."""
        return None if self.ctf is None else ctf_on_disc(self.ctf.take(index), disc, self.pixel_size_angstrom)

    def scaled(self, factor: float) -> "Particles":
        """The same particles with every coefficient multiplied; a tensor in place: it may fill most of the memory."""
        if isinstance(self.coefficients, StreamedCoefficients):
            return replace(self, coefficients=replace(self.coefficients, scale=self.coefficients.scale * factor))
        self.coefficients.mul_(factor)
        return self


def particles_from_stack(stack: ParticleStack, disc: HalfDisc, pixel_size_angstrom: float) -> Particles:
    """Transform a stack of images of the disc's box, once and for all unless they are streamed.

    On the disc's device, in the images' units.
    """
    device, images = disc.radius.device, stack.images
    ctf = None if stack.ctf is None else stack.ctf.to(device)
    if isinstance(images, StreamedImages):
        return Particles(StreamedCoefficients(images, disc), ctf, stack.particle_id, pixel_size_angstrom)
    coefficients = [disc.gather(images[start : start + _CHUNK].to(device)) for start in range(0, len(stack), _CHUNK)]
    return Particles(torch.cat(coefficients), ctf, stack.particle_id, pixel_size_angstrom)


@dataclass(frozen=True)
class Poses:
    """Predicted poses of n particles.

    shift_px is in pixels of the stored images; residual is the mean squared difference per pixel between a particle
    and its rendering on the training disc, in units of the signal's variance.
    """

    particle_id: Int[Tensor, " n"]
    rotation: Float[Tensor, "n 3 3"]
    shift_px: Float[Tensor, "n 2"]
    residual: Float[Tensor, " n"]


class Rendering(NamedTuple):
    """Chosen poses of b images, rotation (b, 3, 3) and shift_px (b, 2) of the training box, rendered (b, p)."""

    rotation: Tensor
    shift_px: Tensor
    coefficients: Tensor


@torch.no_grad()
def calibrate_normalisation(model: AutoEncoder, particles: Particles, rows: Int[Tensor, " b"] | None = None) -> None:
    """Replace the running statistics of batch normalisation by those of these images, or of some rows of them.

    While training they mix real with rendered images; inference sees real ones alone (MLP, 5NRL at 0 dB: the median
    error falls by a fifth against the mixture).
    """
    layers = [module for module in model.encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model.encoder.train()
    rows = torch.arange(len(particles)) if rows is None else rows
    for index in rows.to(particles.device).split(_CHUNK):
        if len(index) > 1:
            model.encoder(particles.coefficients[index], particles.transfer(index, model.disc))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def best_poses(
    model: AutoEncoder, transform: Tensor, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"] | None
) -> Rendering:
    """Encode images; of several candidate poses keep the one whose rendering is nearest to the image."""
    hypotheses = model.encoder(images, ctf)
    shifts = hypotheses.shift_px[:, None].expand(-1, hypotheses.rotation.shape[1], -1)
    best = model.choose(transform, hypotheses.rotation, shifts, images, ctf)
    rotation = hypotheses.rotation[torch.arange(len(best), device=best.device), best]
    return Rendering(rotation, hypotheses.shift_px, model.render(transform, rotation, hypotheses.shift_px, ctf))


@torch.no_grad()
def predict(model: AutoEncoder, particles: Particles, stored_box: int) -> Poses:
    """The best poses of all particles, a chunk at a time."""
    training = model.training
    model.eval()
    transform = model.decoder.transform()
    parts = []
    for index, images in particles.chunks(_CHUNK):
        ctf = particles.transfer(index, model.disc)
        found = best_poses(model, transform, images, ctf)
        parts.append((found.rotation, found.shift_px, model.residual(found.coefficients, images)))
    model.train(training)
    rotation, shift_px, residual = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Poses(particles.particle_id, rotation, shift_px * (stored_box / model.disc.box), residual)


@dataclass(frozen=True)
class EightfoldPoses:
    """The best pose over the eight quarter turns and mirrors of every image, and how far these disagree.

    spread_deg is the angle whose squared Frobenius distance is the mean of those of the eight rotations, all turned
    back, from the best: 0 where all agree, about 120 where the encoder knows nothing.
    """

    poses: Poses
    spread_deg: Float[Tensor, " n"]


@torch.no_grad()
def predict_eightfold(model: AutoEncoder, particles: Particles, stored_box: int) -> EightfoldPoses:
    """Encode every image under all of D4, which loses nothing (em/dihedral.py), and turn the poses back.

    Of the eight the pose counts whose rendering is nearest to its image; their mean is worse (train/README.md).
    """
    training = model.training
    model.eval()
    transform, parts = model.decoder.transform(), []
    tables, turns = coefficient_tables(model.disc), element_rotations(model.disc.radius.device)
    for index, images in particles.chunks(_CHUNK):
        ctf = particles.transfer(index, model.disc)
        found = []
        for number in range(ELEMENTS):
            element = torch.full((len(index),), number, device=index.device)
            turned = transform_coefficients(images, element, tables)
            # astigmatism turns along with the image
            pose = best_poses(model, transform, turned, None if ctf is None else ctf[:, tables[0][number]])
            back = turns[number].T
            shift_px = pose.shift_px @ back[:2, :2].T
            found.append((back @ pose.rotation, shift_px, model.residual(pose.coefficients, turned)))
        rotations, shifts, residuals = (torch.stack(column) for column in zip(*found, strict=True))
        best = residuals.argmin(dim=0), torch.arange(len(index), device=index.device)
        spread_deg = sqfrob_to_degrees(rotation_sqfrob(rotations, rotations[best]).mean(0))
        parts.append((rotations[best], shifts[best], residuals[best], spread_deg))
    model.train(training)
    rotation, shift_px, residual, spread_deg = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    poses = Poses(particles.particle_id, rotation, shift_px * (stored_box / model.disc.box), residual)
    return EightfoldPoses(poses, spread_deg)
