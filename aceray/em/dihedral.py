"""The eight quarter turns and mirrors of the square (D4), which act on images without interpolation.

Every transformed image is an exact projection of the same volume: a mirrored image is the projection from the opposite
direction. Element e = 4 m + k first mirrors x -> -x (m = 1), then makes k quarter turns (x, y) -> (-y, x).
"""

import dataclasses

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from aceray.em.ctf import CtfParameters
from aceray.em.fourier import HalfDisc, frequency_index

ELEMENTS = 8
HALF_TURN = 2

_QUARTER = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
_MIRROR = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))


def element_rotations(device: torch.device | str | None = None) -> Float[Tensor, "8 3 3"]:
    """Rotation G of each element: an image with pose (R, t) becomes one with pose (G R, G t)."""
    turns = [torch.linalg.matrix_power(_QUARTER, k) for k in range(4)]
    return torch.stack(turns + [turn @ _MIRROR for turn in turns]).to(device)


def pixel_tables(box: int, device: torch.device | str | None = None) -> Int[Tensor, "8 q"]:
    """For each element the flat index of the pixel that every pixel of the transformed image comes from."""
    axis = frequency_index(box, device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    target = torch.stack([x, y], dim=-1).reshape(-1, 2).float()
    # row vector times G is the inverse of G applied to the column; in float, as GPUs multiply no integer matrices
    source = (target @ element_rotations(device)[:, :2, :2]).round().long()
    # on an even box the edge row has no mirror image and wraps onto itself
    column, row = ((source + box // 2) % box).unbind(-1)
    return row * box + column


def coefficient_tables(disc: HalfDisc) -> tuple[Int[Tensor, "8 p"], Float[Tensor, "8 p"]]:
    """For each element: the half-disc coefficient that each one comes from, and -1 where it is its conjugate."""
    frequency = disc.frequency.round().long()
    source = (frequency.float() @ element_rotations(frequency.device)[:, :2, :2]).round().long()
    x, y = source.unbind(-1)
    conjugate = (x < 0) | ((x == 0) & (y < 0))
    source = torch.where(conjugate[..., None], -source, source)
    position = torch.full((disc.box, disc.box), -1, device=frequency.device)
    position[frequency[:, 1], frequency[:, 0]] = torch.arange(len(frequency), device=frequency.device)
    return position[source[..., 1], source[..., 0]], torch.where(conjugate, -1.0, 1.0)


def transform_coefficients(
    coefficients: Complex[Tensor, "b p"],
    element: Int[Tensor, "b"],
    tables: tuple[Int[Tensor, "8 p"], Float[Tensor, "8 p"]],
) -> Complex[Tensor, "b p"]:
    """Apply one element to each image given by its half-disc coefficients; `tables` are the coefficient_tables."""
    source, sign = tables
    moved = coefficients.gather(1, source[element])
    return torch.complex(moved.real, moved.imag * sign[element])


def transform_images(
    images: Float[Tensor, "b d d"], element: Int[Tensor, "b"], tables: Int[Tensor, "8 q"]
) -> Float[Tensor, "b d d"]:
    """Apply one element to each image; `tables` are the pixel_tables of the images' box."""
    return images.flatten(1).gather(1, tables[element]).reshape(images.shape)


def transform_ctf(parameters: CtfParameters, element: Int[Tensor, "b"]) -> CtfParameters:
    """Turn the astigmatism along with the image."""
    mirrored, quarter = element >= 4, element % 4
    angle = torch.where(mirrored, -parameters.astigmatism_deg, parameters.astigmatism_deg)
    return dataclasses.replace(parameters, astigmatism_deg=(angle + 90.0 * quarter) % 180.0)
