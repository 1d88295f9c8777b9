"""The eight quarter turns and mirrors of the square (D4), which act on images without interpolation.

Every transformed image is an exact projection of the same volume: a mirrored image is the projection from the opposite
direction. Element e = 4 m + k first mirrors x -> -x (m = 1), then makes k quarter turns (x, y) -> (-y, x).
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.em.ctf import CtfParameters
from aceray.em.fourier import frequency_index

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
    target = torch.stack([x, y], dim=-1).reshape(-1, 2)
    # row vector times G is the inverse of G applied to the column
    source = target[None] @ element_rotations(device)[:, :2, :2].round().long()
    # on an even box the edge row has no mirror image and wraps onto itself
    column, row = ((source + box // 2) % box).unbind(-1)
    return row * box + column


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
