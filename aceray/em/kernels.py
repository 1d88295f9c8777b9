"""Compiled loops over half-disc points on a CPU: slices with their slopes, and their adjoint.

Sampling a transform is bound by memory, not by arithmetic: one visit of the eight nodes about a point gives the value,
its gradient and all that a Gauss-Newton step needs of it, where a chain of tensor operations visits them once for each
slope and writes every intermediate result. The tensor code in `em/projection.py`, `em/backprojection.py` and
`train/energy.py` computes the same, serves other devices and is what these loops are tested against.

Arrays are NumPy's, single precision. A volume is the padded transform as complex numbers, axes kz, ky from -m/2 to m/2
and kx from 0 to m/2. The loops release the interpreter's lock: threads may share the images among them. Types are not
checked at run time, because the compiler must see the bare functions.
"""

import math
from typing import NamedTuple, no_type_check

import numpy as np
from numba import njit

_compiled = njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
PARAMETERS = 5  # of a pose: a rotation vector (x, y, z) in the image's frame and a shift (x, y)


class Grid(NamedTuple):
    """Where a padded transform is sampled: its images' box and n whole frequencies (p, 2) as (x, y)."""

    box: int
    frequency: np.ndarray


class Views(NamedTuple):
    """Images (b, p), their transfer (b, p), (0, p) for none, and the row of the image of each of n poses (n,)."""

    images: np.ndarray
    transfer: np.ndarray
    image_of: np.ndarray


class Model(NamedTuple):
    """Energy (n,), its descent direction J^T W r (n, 5) and J^T W J (n, 5, 5) at n poses."""

    energy: np.ndarray
    gradient: np.ndarray
    normal: np.ndarray


@_compiled
@no_type_check
def _node(position, largest):
    """The node before a position on an axis, and the fraction of the way to the next."""
    node = min(max(int(position), 0), largest - 1)
    return node, np.float32(position - node)


@_compiled
@no_type_check
def _point(kx, ky, r, scale):
    """A frequency of an image in the nodes' units, on the side x >= 0, and which side it was on."""
    x = (kx * r[0, 0] + ky * r[1, 0]) * scale
    y = (kx * r[0, 1] + ky * r[1, 1]) * scale
    z = (kx * r[0, 2] + ky * r[1, 2]) * scale
    side = np.float32(-1 if x < 0 else 1)
    return side * x, side * y, side * z, side


@njit(inline="always")  # what a caller does not use of it is then not computed
@no_type_check
def _interpolated(volume, x, y, z):
    """Trilinear value at a point with x >= 0, in nodes from the origin, and its slopes along x, y and z."""
    size, half = volume.shape[0] - 1, volume.shape[2] - 1
    i, fx = _node(x, half)
    j, fy = _node(y + size // 2, size)
    k, fz = _node(z + size // 2, size)
    v00, v01, v10, v11 = volume[k, j, i], volume[k, j, i + 1], volume[k, j + 1, i], volume[k, j + 1, i + 1]
    k += 1
    u00, u01, u10, u11 = volume[k, j, i], volume[k, j, i + 1], volume[k, j + 1, i], volume[k, j + 1, i + 1]
    # along x, then y, then z; the difference of the ends is the slope
    a0, a1, b0, b1 = v00 + fx * (v01 - v00), v10 + fx * (v11 - v10), u00 + fx * (u01 - u00), u10 + fx * (u11 - u10)
    c0, c1 = a0 + fy * (a1 - a0), b0 + fy * (b1 - b0)
    by_y = (a1 - a0) + fz * ((b1 - b0) - (a1 - a0))
    d0, d1 = (v01 - v00) + fy * ((v11 - v10) - (v01 - v00)), (u01 - u00) + fy * ((u11 - u10) - (u01 - u00))
    return c0 + fz * (c1 - c0), d0 + fz * (d1 - d0), by_y, c1 - c0


@_compiled
@no_type_check
def _phase_table(table, shift, box):
    """exp(2 pi i k shift / box) for k = -box/2 …: what moves an image's content back by a shift along one axis."""
    for row in range(len(table)):
        angle = 2 * math.pi / box * shift * (row - box // 2)
        table[row] = complex(math.cos(angle), math.sin(angle))


@_compiled
@no_type_check
def _slopes(slope, value, gradient, r, frequency, radian):
    """Real and imaginary slopes of a coefficient over turn and shift, from those of the transform (side x >= 0)."""
    (by_x, by_y, by_z), (kx, ky) = gradient, frequency
    along_0 = by_x * r[0, 0] + by_y * r[0, 1] + by_z * r[0, 2]
    along_1 = by_x * r[1, 0] + by_y * r[1, 1] + by_z * r[1, 2]
    along_2 = by_x * r[2, 0] + by_y * r[2, 1] + by_z * r[2, 2]
    turn = ky * along_0 - kx * along_1
    slope[0, 0], slope[0, 1] = -ky * along_2.real, -ky * along_2.imag
    slope[1, 0], slope[1, 1] = kx * along_2.real, kx * along_2.imag
    slope[2, 0], slope[2, 1] = turn.real, turn.imag
    slope[3, 0], slope[3, 1] = radian * kx * value.imag, -radian * kx * value.real
    slope[4, 0], slope[4, 1] = radian * ky * value.imag, -radian * ky * value.real


@_compiled
@no_type_check
def normal_equations(volume, grid, weight, views, rotation, shift_px, model):
    """The model of sum w |C exp(-2 pi i k.t) S(R) - F|^2 about n poses, into the last argument.

    weight (p,), rotation (n, 3, 3), shift_px (n, 2). What is moved is the image, back by the shift, rather than the
    slice and all its slopes.
    """
    box, size = grid.box, volume.shape[0] - 1
    scale, radian = np.float32(size / box), np.float32(2 * math.pi / box)
    phases_x, phases_y = np.empty(box + 1, np.complex64), np.empty(box + 1, np.complex64)
    slope = np.empty((PARAMETERS, 2), np.float32)
    for n in range(len(rotation)):
        image, r, total = views.image_of[n], rotation[n], 0.0
        _phase_table(phases_x, shift_px[n, 0], box)
        _phase_table(phases_y, shift_px[n, 1], box)
        model.gradient[n], model.normal[n] = 0, 0
        for p in range(len(weight)):
            kx, ky, w = grid.frequency[p, 0], grid.frequency[p, 1], weight[p]
            x, y, z, side = _point(kx, ky, r, scale)
            value, by_x, by_y, by_z = _interpolated(volume, x, y, z)
            contrast = np.float32(1.0) if len(views.transfer) == 0 else views.transfer[image, p]
            # S(-k) is the conjugate of S(k); its gradient is minus the conjugate, which the sign of k makes up for
            value, along = contrast * value, contrast * scale * side
            if side < 0:
                value = value.conjugate()
                by_x, by_y, by_z = by_x.conjugate(), by_y.conjugate(), by_z.conjugate()
            _slopes(slope, value, (along * by_x, along * by_y, along * by_z), r, (kx, ky), radian)
            phase = phases_x[int(kx) + box // 2] * phases_y[int(ky) + box // 2]
            left = views.images[image, p] * phase - value
            total += w * (left.real * left.real + left.imag * left.imag)
            for a in range(PARAMETERS):
                model.gradient[n, a] += w * (slope[a, 0] * left.real + slope[a, 1] * left.imag)
                for b in range(a + 1):
                    model.normal[n, a, b] += w * (slope[a, 0] * slope[b, 0] + slope[a, 1] * slope[b, 1])
        model.energy[n] = total
        for a in range(PARAMETERS):
            for b in range(a):
                model.normal[n, b, a] = model.normal[n, a, b]


@_compiled
@no_type_check
def sample_slices(volume, grid, rotation, slices):
    """Slices (n, p) of a volume at n rotations, into the last argument."""
    scale = np.float32((volume.shape[0] - 1) / grid.box)
    for n in range(len(rotation)):
        for p in range(len(grid.frequency)):
            x, y, z, side = _point(grid.frequency[p, 0], grid.frequency[p, 1], rotation[n], scale)
            value, _, _, _ = _interpolated(volume, x, y, z)
            slices[n, p] = complex(value.real, side * value.imag)


@_compiled
@no_type_check
def insert_slices(numerator, denominator, grid, views, rotation, shift_px):
    """Adjoint of `sample_slices`: add C F, moved back by its shift, and C^2 to the nodes about every point.

    numerator is complex and denominator real, both of a volume's shape.
    """
    box, size, half = grid.box, numerator.shape[0] - 1, numerator.shape[2] - 1
    scale = np.float32(size / box)
    phases_x, phases_y = np.empty(box + 1, np.complex64), np.empty(box + 1, np.complex64)
    for n in range(len(rotation)):
        image = views.image_of[n]
        _phase_table(phases_x, shift_px[n, 0], box)
        _phase_table(phases_y, shift_px[n, 1], box)
        for p in range(len(grid.frequency)):
            kx, ky = grid.frequency[p, 0], grid.frequency[p, 1]
            x, y, z, side = _point(kx, ky, rotation[n], scale)
            i, fx = _node(x, half)
            j, fy = _node(y + size // 2, size)
            k, fz = _node(z + size // 2, size)
            contrast = np.float32(1.0) if len(views.transfer) == 0 else views.transfer[image, p]
            value = contrast * views.images[image, p] * (phases_x[int(kx) + box // 2] * phases_y[int(ky) + box // 2])
            value = complex(value.real, side * value.imag)
            for corner in range(8):
                dz, dy, dx = corner // 4, corner // 2 % 2, corner % 2
                w = (fz if dz else 1 - fz) * (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
                numerator[k + dz, j + dy, i + dx] += w * value
                denominator[k + dz, j + dy, i + dx] += w * contrast * contrast
