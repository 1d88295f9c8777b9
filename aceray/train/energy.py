"""How well a pose explains an image, and the pose nearby that explains it best.

E = sum over the half disc of w |C exp(-2 pi i k.t) S(R) - F|^2 + penalty |t|^2, with F the image, C its contrast
transfer, S the volume's slice and w a weight for each frequency. With white noise of variance v, the disc's own weights
and shifts of standard deviation s, E / v is minus twice the logarithm of the posterior for penalty = v / s^2.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from aceray.em.fourier import HalfDisc
from aceray.em.kernels import PARAMETERS, Grid, Model, Views, normal_equations, shared_out
from aceray.em.projection import padded_transform, sample_compiled, sample_transform
from aceray.em.rotation import rotation_from_vector

_DIFFERENCE_RADIANS = 2e-3
_LONGEST_TURN_RADIANS = 0.3
_DAMPING, _SMALLEST_DAMPING = 1e-2, 1e-6
_NEGLIGIBLE_GAIN = 0.01


@dataclass(frozen=True)
class Images:
    """Half-disc coefficients of images and their contrast transfer, None for images without."""

    coefficients: Complex[Tensor, "b p"]
    transfer: Float[Tensor, "b p"] | None

    def __len__(self) -> int:
        return len(self.coefficients)

    def take(self, index: Tensor | slice) -> "Images":
        """A selection of the images."""
        return Images(self.coefficients[index], None if self.transfer is None else self.transfer[index])

    def at(self, frequencies: Tensor) -> "Images":
        """The same images at some of their frequencies."""
        transfer = None if self.transfer is None else self.transfer[:, frequencies]
        return Images(self.coefficients[:, frequencies], transfer)

    def power(self, weight: Float[Tensor, " p"]) -> Float[Tensor, " b"]:
        """Weighted sum of the squares of each image: its energy against an empty volume."""
        return torch.view_as_real(self.coefficients).square().sum(-1) @ weight


@dataclass(frozen=True)
class Reference:
    """A volume's padded transform and the frequencies (x, y), in cycles per box, at which images are compared with it.

    The transform is complex for the compiled loops of a CPU, two channels for the tensor code of other devices. `index`
    says which of the half disc's frequencies they are. Shifts are not refined where shift_penalty is None.
    """

    transform: Complex[Tensor, "m m h"] | Float[Tensor, "2 m m h"]
    box: int
    frequency: Float[Tensor, "p 2"]
    weight: Float[Tensor, " p"]
    index: Tensor
    shift_penalty: float | None

    @property
    def grid(self) -> Grid:
        """Box and frequencies, for the compiled loops."""
        return Grid(self.box, self.frequency.contiguous().numpy())

    def within(self, radius: float) -> "Reference":
        """The same volume, compared at low frequencies only."""
        inside = (self.frequency.square().sum(-1) <= radius * radius).nonzero()[:, 0]
        return dataclasses.replace(
            self, frequency=self.frequency[inside], weight=self.weight[inside], index=self.index[inside]
        )

    def slices(self, rotation: Float[Tensor, "*b 3 3"]) -> Complex[Tensor, "*b p"]:
        """Projections at the rotations, in the orthonormal convention of the images."""
        if not self.transform.is_complex():
            return sample_transform(self.transform, self.frequency @ rotation[..., :2, :], self.box)
        return sample_compiled(self.transform, self.frequency, rotation, self.box)

    def phases(self, shift_px: Float[Tensor, "*b 2"]) -> Complex[Tensor, "*b p"]:
        """Factors that move an image's content by a shift in pixels of the images' box."""
        angle = (-2 * math.pi / self.box) * (shift_px @ self.frequency.T)
        return torch.complex(angle.cos(), angle.sin())

    def prior(self, shift_px: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b"]:
        """What a shift adds to the energy."""
        return (self.shift_penalty or 0.0) * shift_px.square().sum(-1)


def make_reference(
    volume: Float[Tensor, "d d d"],
    disc: HalfDisc,
    shift_penalty: float | None,
    weight: Float[Tensor, " p"] | None = None,
    pad: int = 2,
) -> Reference:
    """Reference of a volume at all frequencies of the half disc, weighted by the disc unless otherwise."""
    index = torch.arange(len(disc), device=disc.radius.device)
    transform = padded_transform(volume, pad)
    transform = torch.complex(*transform) if transform.device.type == "cpu" else transform
    weight = disc.weight if weight is None else weight
    return Reference(transform, disc.box, disc.frequency, weight, index, shift_penalty)


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

    def take(self, index: Tensor | slice) -> "Matches":
        """A selection of the images."""
        return Matches(self.rotation[index], self.shift_px[index], self.energy[index])

    def replaced(self, index: Tensor, others: "Matches") -> "Matches":
        """The matches with some of them exchanged."""
        return Matches(
            self.rotation.index_copy(0, index, others.rotation),
            self.shift_px.index_copy(0, index, others.shift_px),
            self.energy.index_copy(0, index, others.energy),
        )

    def relative_to(self, power: Float[Tensor, " b"]) -> "Matches":
        """The same with energies as shares of the images' own power."""
        return dataclasses.replace(self, energy=self.energy / power.clamp_min(1e-12))

    def best(self) -> "Matches":
        """The candidate of least energy for each image, of several."""
        row = torch.arange(len(self.energy), device=self.energy.device), self.energy.argmin(dim=1)
        return Matches(self.rotation[row], self.shift_px[row], self.energy[row])

    def or_better(self, other: "Matches") -> "Matches":
        """For each image the pose of less energy, these or the others."""
        better = other.energy < self.energy
        return Matches(
            torch.where(better[:, None, None], other.rotation, self.rotation),
            torch.where(better[:, None], other.shift_px, self.shift_px),
            torch.minimum(other.energy, self.energy),
        )


@dataclass(frozen=True)
class _Model:
    """The energy about n poses: its value, its descent direction and its curvature over turn and shift."""

    energy: Float[Tensor, " n"]
    gradient: Float[Tensor, "n 5"]
    normal: Float[Tensor, "n 5 5"]

    def take(self, index: Tensor) -> "_Model":
        """Those of some of the poses."""
        return _Model(self.energy[index], self.gradient[index], self.normal[index])

    def put(self, index: Tensor, others: "_Model") -> None:
        """Set those of some of the poses."""
        self.energy[index], self.gradient[index], self.normal[index] = others.energy, others.gradient, others.normal


def refine_poses(
    reference: Reference, images: Images, start: Matches, steps: int, image_of: Int[Tensor, " n"] | None = None
) -> Matches:
    """Improve n poses by at most `steps` damped Gauss-Newton steps; what does not lower the energy is not taken.

    A step turns by a rotation vector in the image's frame and moves by a shift. A pose is left alone once a step
    changes its energy by a hundredth of what noise makes of one parameter: its share of the frequencies' energy.
    image_of says whose image each pose is of, where there is not one pose an image. The images have the reference's
    frequencies; start.energy is not read.
    """
    rotation, shift = start.rotation.clone(), start.shift_px.clone()
    going = torch.arange(len(rotation), device=rotation.device)
    image_of = going if image_of is None else image_of
    at = _model(reference, images, rotation, shift, image_of)
    damping = torch.full_like(at.energy, _DAMPING)
    for _ in range(steps):
        step = _gauss_newton_step(at.take(going), damping[going])
        tried_rotation, tried_shift = rotation_from_vector(step[:, :3]) @ rotation[going], shift[going] + step[:, 3:]
        tried = _model(reference, images, tried_rotation, tried_shift, image_of[going])
        gain = at.energy[going] - tried.energy
        better = gain > 0
        taken = going[better]
        rotation[taken], shift[taken] = tried_rotation[better], tried_shift[better]
        at.put(taken, tried.take(better))
        damping[going] *= torch.where(better, 0.25, 8.0)
        damping.clamp_min_(_SMALLEST_DAMPING)
        going = going[gain.abs() > _NEGLIGIBLE_GAIN / len(reference.index) * at.energy[going]]
        if not len(going):
            break
    return Matches(rotation, shift, at.energy)


def energies(
    reference: Reference, images: Images, rotation: Float[Tensor, "b k 3 3"], shift_px: Float[Tensor, "b 2"]
) -> Float[Tensor, "b k"]:
    """Energy of each image at k rotations and one shift. The images have the reference's frequencies."""
    rendered = reference.slices(rotation)
    if images.transfer is not None:
        rendered = rendered * images.transfer[:, None]
    left = rendered - (images.coefficients * reference.phases(shift_px).conj())[:, None]
    return torch.view_as_real(left).square().sum(-1) @ reference.weight + reference.prior(shift_px)[:, None]


def _gauss_newton_step(at: _Model, damping: Float[Tensor, " n"]) -> Float[Tensor, "n 5"]:
    """Rotation vector and shift that minimise the energy of the model that is linear about a pose."""
    normal = at.normal.clone()
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    # the second term keeps a system solvable whose volume is empty
    diagonal += damping[:, None] * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True) + 1e-20
    step = torch.linalg.solve(normal, at.gradient)
    turn = step[:, :3] * (_LONGEST_TURN_RADIANS / step[:, :3].norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return torch.cat([turn, step[:, 3:]], dim=1)


def _model(reference: Reference, images: Images, rotation: Tensor, shift_px: Tensor, image_of: Tensor) -> _Model:
    """The model at n poses, with the shifts' prior; shifts stay where they are if they are not refined."""
    expand = _model_on_cpu if reference.transform.is_complex() else _model_by_differences
    at = expand(reference, images, rotation, shift_px, image_of)
    penalty = reference.shift_penalty
    if penalty is None:
        at.gradient[:, 3:] = 0
        at.normal[:, 3:, :3], at.normal[:, :3, 3:] = 0, 0
        at.normal[:, 3:, 3:] = torch.eye(2).to(at.normal)
        return at
    at.gradient[:, 3:] -= penalty * shift_px
    at.normal.diagonal(dim1=-2, dim2=-1)[:, 3:] += penalty
    return _Model(at.energy + reference.prior(shift_px), at.gradient, at.normal)


def _model_on_cpu(reference: Reference, images: Images, rotation: Tensor, shift_px: Tensor, image_of: Tensor) -> _Model:
    count = len(rotation)
    found = _Model(torch.empty(count), torch.empty(count, PARAMETERS), torch.empty(count, PARAMETERS, PARAMETERS))
    transfer = images.coefficients.real.new_empty(0, 0) if images.transfer is None else images.transfer
    volume, weight = reference.transform.numpy(), reference.weight.contiguous().numpy()
    coefficients, contrast = images.coefficients.contiguous().numpy(), transfer.contiguous().numpy()
    grid, rotation, shift_px = reference.grid, rotation.contiguous(), shift_px.contiguous()

    def work(part: slice) -> None:
        views = Views(coefficients, contrast, image_of[part].numpy())
        model = Model(*(column[part].numpy() for column in vars(found).values()))
        normal_equations(volume, grid, weight, views, rotation[part].numpy(), shift_px[part].numpy(), model)

    shared_out(count, work)
    return found


def _model_by_differences(
    reference: Reference, images: Images, rotation: Tensor, shift_px: Tensor, image_of: Tensor
) -> _Model:
    """The same on any device; slopes over the rotation are finite differences of slices."""
    turns = rotation_from_vector(_DIFFERENCE_RADIANS * torch.eye(3).to(rotation))
    moved = reference.phases(shift_px)
    if images.transfer is not None:
        moved = moved * images.transfer[image_of]
    rendered = reference.slices(rotation) * moved
    turned = reference.slices(turns @ rotation[:, None]) * moved[:, None]
    ramp = (-2j * math.pi / reference.box) * reference.frequency.T
    slopes = torch.cat([(turned - rendered[:, None]) / _DIFFERENCE_RADIANS, ramp * rendered[:, None]], dim=1)
    root = reference.weight.sqrt()
    jacobian = torch.view_as_real(slopes * root).flatten(2)
    residual = torch.view_as_real((images.coefficients[image_of] - rendered) * root).flatten(1)
    return _Model(
        residual.square().sum(-1), (jacobian @ residual[..., None])[..., 0], jacobian @ jacobian.transpose(-1, -2)
    )
