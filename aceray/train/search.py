"""Poses of images against a volume: exhaustive search at low frequency, then refinement of rotation and shift together.

Both minimise E = sum over the half disc of w |C exp(-2 pi i k.t) S(R) - F|^2 + penalty |t|^2, with F the image, C its
contrast transfer, S the volume's slice and w the disc's weights. With white noise of variance v and shifts of standard
deviation s, E / v is minus twice the logarithm of the posterior for penalty = v / s^2.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from aceray.em.fourier import HalfDisc
from aceray.em.projection import padded_transform, sample_transform
from aceray.em.rotation import rotation_from_vector

# entries of one batch's table of energies, images times rotations: 16 MB
_ENERGIES_AT_ONCE = 2**22
# the radius to which all candidates are refined before the best one goes on at full radius, over that of the search
_FIRST_REFINEMENT = 1.6
_CANDIDATES = 4
_FIRST_STEPS, _LAST_STEPS = 4, 4
_DIFFERENCE_RADIANS = 2e-3
_LONGEST_TURN_RADIANS = 0.3
_DAMPING, _SMALLEST_DAMPING = 1e-2, 1e-6


@dataclass(frozen=True)
class Images:
    """Half-disc coefficients of images and their contrast transfer, None for images without."""

    coefficients: Complex[Tensor, "b p"]
    transfer: Float[Tensor, "b p"] | None

    def __len__(self) -> int:
        return len(self.coefficients)

    def take(self, index: Tensor | slice) -> "Images":
        """A selection of the images, in which one may stand several times."""
        return Images(self.coefficients[index], None if self.transfer is None else self.transfer[index])

    def at(self, frequencies: Tensor) -> "Images":
        """The same images at some of their frequencies."""
        transfer = None if self.transfer is None else self.transfer[:, frequencies]
        return Images(self.coefficients[:, frequencies], transfer)


@dataclass(frozen=True)
class Reference:
    """A volume's padded transform and the frequencies (x, y), in cycles per box, at which images are compared with it.

    `index` says which of the half disc's frequencies they are. Shifts are not refined where shift_penalty is None.
    """

    transform: Float[Tensor, "2 m m h"]
    box: int
    frequency: Float[Tensor, "p 2"]
    weight: Float[Tensor, " p"]
    index: Tensor
    shift_penalty: float | None

    def within(self, radius: float) -> "Reference":
        """The same volume, compared at low frequencies only."""
        inside = (self.frequency.square().sum(-1) <= radius * radius).nonzero()[:, 0]
        return dataclasses.replace(
            self, frequency=self.frequency[inside], weight=self.weight[inside], index=self.index[inside]
        )

    def slices(self, rotation: Float[Tensor, "*b 3 3"]) -> Complex[Tensor, "*b p"]:
        """Projections at the rotations, in the orthonormal convention of the images."""
        return sample_transform(self.transform, self.frequency @ rotation[..., :2, :], self.box)

    def phases(self, shift_px: Float[Tensor, "*b 2"]) -> Complex[Tensor, "*b p"]:
        """Factors that move an image's content by a shift in pixels of the images' box."""
        angle = (-2 * math.pi / self.box) * (shift_px @ self.frequency.T)
        return torch.complex(angle.cos(), angle.sin())

    def prior(self, shift_px: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b"]:
        """What a shift adds to the energy."""
        return (self.shift_penalty or 0.0) * shift_px.square().sum(-1)


def make_reference(
    volume: Float[Tensor, "d d d"], disc: HalfDisc, shift_penalty: float | None, pad: int = 2
) -> Reference:
    """Reference of a volume at all frequencies of the half disc."""
    index = torch.arange(len(disc), device=disc.radius.device)
    return Reference(padded_transform(volume, pad), disc.box, disc.frequency, disc.weight, index, shift_penalty)


@dataclass(frozen=True)
class Matches:
    """Poses of images and their energies; k candidates an image where there is a second dimension."""

    rotation: Float[Tensor, "b *k 3 3"]
    shift_px: Float[Tensor, "b *k 2"]
    energy: Float[Tensor, "b *k"]

    @staticmethod
    def concatenate(parts: "Sequence[Matches]") -> "Matches":
        """The matches of several groups of images in one."""
        return Matches(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Bank:
    """Slices of a reference at many rotations, as the factors of matrix products."""

    reference: Reference
    rotation: Float[Tensor, "g 3 3"]
    slices: Float[Tensor, "g q"]  # real and imaginary parts by turns
    power: Float[Tensor, "g p"]


def make_bank(reference: Reference, rotation: Float[Tensor, "g 3 3"]) -> Bank:
    """Slices at the rotations; memory is 12 bytes a rotation and frequency, so take a reference `within` a radius."""
    slices = torch.view_as_real(torch.cat([reference.slices(part) for part in rotation.split(1024)]))
    return Bank(reference, rotation, slices.flatten(1), slices.square().sum(-1))


def shift_grid(radius_px: float, step_px: float) -> Float[Tensor, "s 2"]:
    """Square grid of shifts (x, y) in a disc, the origin among them; the origin alone for radius 0."""
    count = math.floor(radius_px / step_px)
    axis = step_px * torch.arange(-count, count + 1)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    grid = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return grid[grid.square().sum(-1) <= radius_px**2 * (1 + 1e-6)]


def search_poses(
    bank: Bank, images: Images, centre_px: Float[Tensor, "b 2"], offsets_px: Float[Tensor, "s 2"], keep: int
) -> Matches:
    """The `keep` best rotations of the bank for each image, each with its best shift of centre + offsets.

    One product of matrices for every offset; memory is 14 bytes an image and rotation. The images have the frequencies
    of the bank's reference.
    """
    reference = bank.reference
    contrast = images.coefficients if images.transfer is None else images.coefficients * images.transfer
    contrast = contrast * reference.weight * reference.phases(centre_px).conj()
    if images.transfer is None:
        power = (bank.power @ reference.weight).expand(len(images), -1)
    else:
        power = (images.transfer.square() * reference.weight) @ bank.power.T
    best = torch.full_like(power, torch.inf, memory_format=torch.contiguous_format)
    chosen = torch.zeros_like(best, dtype=torch.int16)
    for number, offset in enumerate(offsets_px):
        moved = torch.view_as_real(contrast * reference.phases(offset).conj()).flatten(1)
        energy = torch.addmm(power, moved, bank.slices.T, alpha=-2)
        energy += reference.prior(centre_px + offset)[:, None]
        chosen.masked_fill_(energy < best, number)
        torch.minimum(best, energy, out=best)
    energy, row = best.topk(keep, dim=1, largest=False)
    shift = centre_px[:, None] + offsets_px[chosen.gather(1, row).long()]
    return Matches(bank.rotation[row], shift, energy + _squared(images.coefficients, reference.weight)[:, None])


def refine_poses(reference: Reference, images: Images, start: Matches, steps: int) -> Matches:
    """Improve one pose an image by damped Gauss-Newton steps; what does not lower the energy is not taken.

    A step turns by a rotation vector in the image's frame and moves by a shift. Slopes over the rotation are finite
    differences of slices. The images have the reference's frequencies; start.energy is not read.
    """
    rotation, shift = start.rotation, start.shift_px
    transfer = 1.0 if images.transfer is None else images.transfer
    rendered = reference.slices(rotation) * transfer * reference.phases(shift)
    energy = _squared(rendered - images.coefficients, reference.weight) + reference.prior(shift)
    damping = torch.full_like(energy, _DAMPING)
    for _ in range(steps):
        step = _gauss_newton_step(reference, images, Matches(rotation, shift, energy), rendered, damping)
        tried_rotation, tried_shift = rotation_from_vector(step[:, :3]) @ rotation, shift + step[:, 3:]
        tried = reference.slices(tried_rotation) * transfer * reference.phases(tried_shift)
        tried_energy = _squared(tried - images.coefficients, reference.weight) + reference.prior(tried_shift)
        better = tried_energy < energy
        rotation = torch.where(better[:, None, None], tried_rotation, rotation)
        shift = torch.where(better[:, None], tried_shift, shift)
        rendered = torch.where(better[:, None], tried, rendered)
        energy = torch.where(better, tried_energy, energy)
        damping = torch.where(better, damping / 4, damping * 8).clamp_min(_SMALLEST_DAMPING)
    return Matches(rotation, shift, energy)


def _gauss_newton_step(
    reference: Reference, images: Images, at: Matches, rendered: Complex[Tensor, "b p"], damping: Float[Tensor, " b"]
) -> Float[Tensor, "b 5"]:
    """Rotation vector and shift that minimise the energy of the model that is linear about a pose."""
    turns = rotation_from_vector(_DIFFERENCE_RADIANS * torch.eye(3).to(at.rotation))
    transfer = 1.0 if images.transfer is None else images.transfer
    moved = reference.phases(at.shift_px) * transfer
    turned = reference.slices(turns @ at.rotation[:, None]) * moved[:, None]
    slopes = [(turned - rendered[:, None]) / _DIFFERENCE_RADIANS]
    if reference.shift_penalty is not None:
        ramp = (-2j * math.pi / reference.box) * reference.frequency.T
        slopes.append(ramp * rendered[:, None])
    root = reference.weight.sqrt()
    jacobian = torch.view_as_real(torch.cat(slopes, dim=1) * root).flatten(2)
    residual = torch.view_as_real((images.coefficients - rendered) * root).flatten(1)
    normal = jacobian @ jacobian.transpose(-1, -2)
    gradient = (jacobian @ residual[..., None])[..., 0]
    if reference.shift_penalty is not None:
        normal.diagonal(dim1=-2, dim2=-1)[:, 3:] += reference.shift_penalty
        gradient[:, 3:] -= reference.shift_penalty * at.shift_px
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    # the second term keeps a system solvable whose volume is empty
    diagonal += damping[:, None] * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True) + 1e-20
    step = torch.linalg.solve(normal, gradient)
    turn = step[:, :3] * (_LONGEST_TURN_RADIANS / step[:, :3].norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    shift = step[:, 3:] if step.shape[1] == 5 else torch.zeros_like(at.shift_px)
    return torch.cat([turn, shift], dim=1)


def _squared(values: Complex[Tensor, "b p"], weight: Float[Tensor, " p"]) -> Float[Tensor, " b"]:
    return torch.view_as_real(values).square().sum(-1) @ weight


def find_poses(
    reference: Reference, bank: Bank, images: Images, centre_px: Float[Tensor, "b 2"], offsets_px: Float[Tensor, "s 2"]
) -> Iterator[Matches]:
    """Search and refine batch by batch: the four best rotations of the bank at low frequency, the best one at all.

    Memory is bounded by the batch, of which there are 4 million energies.
    """
    near = reference.within(_FIRST_REFINEMENT * float(bank.reference.frequency.norm(dim=-1).max()))
    keep = min(_CANDIDATES, len(bank.rotation))
    device = images.coefficients.device
    for part in torch.arange(len(images), device=device).split(max(1, _ENERGIES_AT_ONCE // len(bank.rotation))):
        batch = images.take(part)
        found = search_poses(bank, batch.at(bank.reference.index), centre_px[part], offsets_px, keep)
        rows = torch.arange(len(batch), device=device)
        flat = Matches(found.rotation.flatten(0, 1), found.shift_px.flatten(0, 1), found.energy.flatten())
        flat = refine_poses(near, batch.at(near.index).take(rows.repeat_interleave(keep)), flat, _FIRST_STEPS)
        best = keep * rows + flat.energy.unflatten(0, (-1, keep)).argmin(dim=1)
        first = Matches(flat.rotation[best], flat.shift_px[best], flat.energy[best])
        yield refine_poses(reference, batch.at(reference.index), first, _LAST_STEPS)
