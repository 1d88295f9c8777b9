"""How much of the sphere of view directions a set of poses uses.

Directions are binned into HEALPix cells of equal area in the ring scheme (Gorski et al. 2005, ApJ 622, 759).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.em.rotation import rotation_from_relion

NSIDE = 4  # 192 cells, 14.7 degrees across


def cell_count(nside: int) -> int:
    """Number of HEALPix cells."""
    return 12 * nside * nside


def healpix_cell(direction: Float[Tensor, "*batch 3"], nside: int) -> Int[Tensor, "*batch"]:
    """Ring-scheme HEALPix cell of unit vectors (x, y, z)."""
    x, y, z = direction.double().unbind(-1)
    quarter = torch.remainder(torch.atan2(y, x) * (2 / math.pi), 4.0).clamp(max=math.nextafter(4.0, 0.0))
    return torch.where(z.abs() <= 2 / 3, _equatorial_cell(z, quarter, nside), _polar_cell(z, quarter, nside))


def _equatorial_cell(z: Tensor, quarter: Tensor, nside: int) -> Tensor:
    ascending = torch.floor(nside * (0.5 + quarter - 0.75 * z)).long()
    descending = torch.floor(nside * (0.5 + quarter + 0.75 * z)).long()
    ring = nside + 1 + ascending - descending  # 1 … 2 nside + 1, from z = 2/3 down
    odd = (ring + 1) % 2
    column = torch.remainder((ascending + descending - nside + odd + 1) // 2, 4 * nside)
    return 2 * nside * (nside - 1) + (ring - 1) * 4 * nside + column


def _polar_cell(z: Tensor, quarter: Tensor, nside: int) -> Tensor:
    fraction = quarter - quarter.floor()
    distance = nside * (3 * (1 - z.abs()).clamp(min=0)).sqrt()
    rising = torch.floor(fraction * distance).long()
    falling = torch.floor((1 - fraction) * distance).long()
    ring = (rising + falling + 1).clamp(max=nside)  # counted from the closer pole
    column = torch.minimum(torch.floor(quarter * ring).long(), 4 * ring - 1)
    north = 2 * ring * (ring - 1) + column
    south = cell_count(nside) - 2 * ring * (ring + 1) + column
    return torch.where(z > 0, north, south)


def healpix_centres(nside: int) -> Float[Tensor, "cells 3"]:
    """Unit vectors at the centres of all cells, in ring order, float64."""
    rings = torch.arange(1, 4 * nside)
    from_pole = torch.minimum(rings, 4 * nside - rings)
    polar = from_pole < nside
    size = torch.where(polar, 4 * from_pole, 4 * nside)
    cap = 1 - from_pole.double().square() / (3 * nside * nside)
    z = torch.where(polar, torch.where(rings < 2 * nside, cap, -cap), (2 * nside - rings).double() * 2 / (3 * nside))
    # equatorial rings start at half a cell or at zero by turns
    offset = torch.where(polar | ((rings - nside) % 2 == 0), 0.5, 0.0).double()
    first = (size.cumsum(0) - size).repeat_interleave(size)
    column = torch.arange(cell_count(nside)) - first
    angle = 2 * math.pi * (column + offset.repeat_interleave(size)) / size.repeat_interleave(size)
    height = z.repeat_interleave(size)
    radius = (1 - height.square()).clamp(min=0).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=-1)


def rotation_grid(nside: int, turns: int) -> Float[Tensor, "g 3 3"]:
    """Rotations with a beam at each HEALPix centre and evenly spaced in-plane turns: an even cover of SO(3)."""
    directions = healpix_centres(nside)
    rot = torch.atan2(directions[:, 1], directions[:, 0]).rad2deg()
    tilt = directions[:, 2].acos().rad2deg()
    turn = torch.arange(turns, dtype=torch.float64) * (360 / turns)
    shape = (len(directions), turns)
    angles = [rot[:, None].expand(shape), tilt[:, None].expand(shape), turn.expand(shape)]
    return rotation_from_relion(*angles).flatten(0, 1).float()


def view_histogram(rotation: Float[Tensor, "n 3 3"], nside: int = NSIDE) -> Int[Tensor, " cells"]:
    """Number of poses whose beam (third row of the rotation) lies in each HEALPix cell."""
    return torch.bincount(healpix_cell(rotation[:, 2], nside), minlength=cell_count(nside))


def coverage(rotation: Float[Tensor, "n 3 3"], nside: int = NSIDE) -> float:
    """Fraction of HEALPix cells that at least one beam direction hits."""
    return float((view_histogram(rotation, nside) > 0).double().mean())


def view_entropy(rotation: Float[Tensor, "n 3 3"], nside: int = NSIDE) -> float:
    """Entropy of the histogram of beam directions over that of a uniform one: 1 uniform, 0 a single cell."""
    share = view_histogram(rotation, nside).double()
    share = share / share.sum().clamp(min=1)
    return float(torch.special.entr(share).sum() / math.log(cell_count(nside)))
