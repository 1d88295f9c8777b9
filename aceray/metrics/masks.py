"""Where in the field the molecule is: real-space weights from 0 to 1 with a cosine edge."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from aceray.metrics.fsc import half_ball

SPHERE_RADIUS_FRACTION = 0.4
SPHERE_EDGE_FRACTION = 0.1
DILATION_ANGSTROM = 25.0
EDGE_ANGSTROM = 15.0
# below so many pixels a mask cuts so sharply that the map's own low frequencies fill every shell
_SMALLEST_MARGIN_PX = 4.0
_LOW_PASS_ANGSTROM = 20.0
_LOW_PASS_PX = 4.0
_BRIGHTEST_QUANTILE = 0.9999
_AUTO_THRESHOLD = 0.5
_MOLECULE_LOW_PASS = 6.0  # cycles per box
_MOLECULE_THRESHOLD = 0.1
_MOLECULE_DILATION_FRACTION, _MOLECULE_EDGE_FRACTION = 1 / 32, 1 / 16
_SMALLEST_DILATION_PX, _SMALLEST_EDGE_PX = 1.0, 2.0


def sphere_mask(
    box: int,
    radius_fraction: float = SPHERE_RADIUS_FRACTION,
    edge_fraction: float = SPHERE_EDGE_FRACTION,
    device: torch.device | str | None = None,
) -> Float[Tensor, "d d d"]:
    """1 within the radius, then half a cosine down to 0 over the edge; both are fractions of the box."""
    axis = torch.arange(box, device=device).float().sub(box // 2).square()
    radius = (axis[:, None, None] + axis[:, None] + axis).sqrt()
    return _cosine_edge(radius - radius_fraction * box, edge_fraction * box)


def auto_mask(
    first: Float[Tensor, "d d d"],
    second: Float[Tensor, "d d d"],
    pixel_size_angstrom: float,
    dilation_angstrom: float = DILATION_ANGSTROM,
    edge_angstrom: float = EDGE_ANGSTROM,
) -> Float[Tensor, "d d d"]:
    """Where the molecule is: the mean of both maps, low-passed, above half its 99.99 percentile; dilated, soft edge.

    The Gaussian low-pass has half its amplitude at 20 A or 4 px, whichever is coarser; dilation and edge are at least
    4 px each. The maps share a frame; protein is bright.
    """
    cut_off = first.shape[-1] / max(_LOW_PASS_PX, _LOW_PASS_ANGSTROM / pixel_size_angstrom)
    inside = _bright((first + second).float() / 2, cut_off, _AUTO_THRESHOLD)
    dilation = max(dilation_angstrom / pixel_size_angstrom, _SMALLEST_MARGIN_PX)
    edge = max(edge_angstrom / pixel_size_angstrom, _SMALLEST_MARGIN_PX)
    return _around(inside, dilation, edge)


def molecule_mask(volume: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
    """Close around the molecule of one map, at any box alike: above a tenth of its 99.99 percentile, at low resolution.

    The Gaussian low-pass has half its amplitude at 6 cycles per box; what is above is dilated by 1/32 of the box, at
    least 1 px, with an edge of 1/16, at least 2 px. Protein is bright. A map that is nowhere positive is held whole.
    """
    box = volume.shape[-1]
    inside = _bright(volume.float(), _MOLECULE_LOW_PASS, _MOLECULE_THRESHOLD)
    if not inside.any():
        return torch.ones_like(volume)
    dilation = max(_MOLECULE_DILATION_FRACTION * box, _SMALLEST_DILATION_PX)
    return _around(inside, dilation, max(_MOLECULE_EDGE_FRACTION * box, _SMALLEST_EDGE_PX))


def _bright(volume: Float[Tensor, "d d d"], cut_off: float, threshold: float) -> Bool[Tensor, "d d d"]:
    """Above a share of the brightest, behind a Gaussian of half amplitude at `cut_off` cycles per box."""
    ball = half_ball(volume.shape[-1], volume.device)
    low_pass = (-math.log(2) * (ball.frequency.square().sum(-1) / cut_off**2)).exp()
    low = ball.scatter(ball.gather(volume) * low_pass)
    rank = max(1, math.ceil(_BRIGHTEST_QUANTILE * low.numel()))
    return low > threshold * low.flatten().kthvalue(rank).values.clamp_min(0)


def _around(inside: Bool[Tensor, "d d d"], dilation_px: float, edge_px: float) -> Float[Tensor, "d d d"]:
    return _cosine_edge(_distance(inside, math.ceil(dilation_px + edge_px)) - dilation_px, edge_px)


def _cosine_edge(beyond: Float[Tensor, "d d d"], width: float) -> Float[Tensor, "d d d"]:
    return 0.5 + 0.5 * (torch.pi * (beyond / width).clamp(0, 1)).cos()


def _distance(inside: Bool[Tensor, "d d d"], reach: int) -> Float[Tensor, "d d d"]:
    """Distance in voxels to the nearest voxel inside, exact up to `reach`; infinite where there is none along an axis.

    The squared distance is separable: its minimum over offsets along one axis after another.
    """
    squared = torch.where(inside, 0.0, torch.inf)
    box = inside.shape[-1]
    for axis in range(3):
        nearest = squared.clone()
        for offset in range(1, min(reach, box - 1) + 1):
            near, far = squared.narrow(axis, 0, box - offset), squared.narrow(axis, offset, box - offset)
            for target, source in ((0, far), (offset, near)):
                view = nearest.narrow(axis, target, box - offset)
                torch.minimum(view, source + float(offset * offset), out=view)
        squared = nearest
    return squared.sqrt()
