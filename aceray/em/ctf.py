"""Contrast transfer function of the microscope, in RELION's sign: positive at low frequency for underfocus."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from aceray.em.fourier import HalfDisc


@dataclass(frozen=True)
class CtfParameters:
    """Contrast transfer parameters of n particles: (n,) tensors, angstrom, degrees, kilovolt and millimetre.

    Positive defocus is underfocus; defocus U lies along the astigmatism angle, counted from x towards y.
    """

    defocus_u_angstrom: Tensor
    defocus_v_angstrom: Tensor
    astigmatism_deg: Tensor
    phase_shift_deg: Tensor
    voltage_kv: Tensor
    spherical_aberration_mm: Tensor
    amplitude_contrast: Tensor

    def __len__(self) -> int:
        return len(self.defocus_u_angstrom)

    def _map(self, function) -> "CtfParameters":
        return CtfParameters(*(function(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def take(self, index: Tensor) -> "CtfParameters":
        """Parameters of a selection of the particles."""
        return self._map(lambda values: values[index])

    def to(self, device: torch.device | str) -> "CtfParameters":
        """The same parameters on another device."""
        return self._map(lambda values: values.to(device))

    @staticmethod
    def concatenate(parts: "list[CtfParameters]") -> "CtfParameters":
        """Parameters of several groups of particles in one."""
        names = [field.name for field in dataclasses.fields(CtfParameters)]
        return CtfParameters(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def electron_wavelength_angstrom(voltage_kv: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Relativistic wavelength of an electron."""
    volt = voltage_kv * 1000
    return 12.2639 / (volt + 0.97845e-6 * volt.square()).sqrt()


def contrast_transfer_function(frequency: Float[Tensor, "p 2"], parameters: CtfParameters) -> Float[Tensor, "n p"]:
    """Contrast transfer at frequencies (x, y) in cycles per angstrom; n parameters, p frequencies.

    C = -sqrt(1 - w^2) sin(chi) + w cos(chi), chi = pi/2 Cs l^3 k^4 - pi l dz k^2 - phase, l the wavelength: w at the
    origin (Rohou and Grigorieff 2015, with RELION's overall sign).
    """
    columns = {field.name: getattr(parameters, field.name)[:, None] for field in dataclasses.fields(parameters)}
    wavelength = electron_wavelength_angstrom(columns["voltage_kv"])
    x, y = frequency.unbind(-1)
    squared = x.square() + y.square()
    mean = (columns["defocus_u_angstrom"] + columns["defocus_v_angstrom"]) / 2
    half_difference = (columns["defocus_u_angstrom"] - columns["defocus_v_angstrom"]) / 2
    twice_angle = torch.deg2rad(2 * columns["astigmatism_deg"])
    # k^2 cos(2 (phi - phi_A)) without an angle, so nothing is undefined at the origin
    astigmatic = (x.square() - y.square()) * twice_angle.cos() + 2 * x * y * twice_angle.sin()
    defocus_phase = math.pi * wavelength * (mean * squared + half_difference * astigmatic)
    aberration = columns["spherical_aberration_mm"] * 1e7
    chi = math.pi / 2 * aberration * wavelength**3 * squared.square() - defocus_phase
    chi = chi - torch.deg2rad(columns["phase_shift_deg"])
    contrast = columns["amplitude_contrast"]
    return contrast * chi.cos() - (1 - contrast.square()).sqrt() * chi.sin()


def b_factor_envelope(frequency: Float[Tensor, "p 2"], b_factor_angstrom2: float) -> Float[Tensor, "p"]:
    """Gaussian envelope exp(-B k^2 / 4) at frequencies in cycles per angstrom."""
    return torch.exp(-b_factor_angstrom2 / 4 * frequency.square().sum(-1))


def ctf_on_disc(parameters: CtfParameters, disc: HalfDisc, pixel_size_angstrom: float) -> Float[Tensor, "n p"]:
    """Contrast transfer at the half disc's frequencies of images with this pixel size."""
    return contrast_transfer_function(disc.frequency / (disc.box * pixel_size_angstrom), parameters)
