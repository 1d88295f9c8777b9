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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from numba import njit

_compiled = njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
PARAMETERS = 5  # of a pose: a rotation vector (x, y, z) in the image's frame and a shift (x, y)
_AT_ONCE = 256  # frequencies whose slopes, and nodes, stay in the first caches
_CACHED_NODES = 2**19  # of a transform that mostly is in a core's caches: 4 MB
_POSES_A_THREAD = 64


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
def _fetch(volume, grid, r, first, last):
    """Read one node of every pair along x that some points need, with nothing that waits for it.

    So many reads are on their way at once, where the arithmetic would wait for each. The sum is of no use, but what
    is not used is not read.
    """
    size, half = volume.shape[0] - 1, volume.shape[2] - 1
    scale, total = np.float32(size / grid.box), np.float32(0)
    for p in range(first, last):
        x, y, z, _ = _point(grid.frequency[p, 0], grid.frequency[p, 1], r, scale)
        i, _ = _node(x, half)
        j, _ = _node(y + size // 2, size)
        k, _ = _node(z + size // 2, size)
        total += volume[k, j, i].real + volume[k, j + 1, i].real
        total += volume[k + 1, j, i].real + volume[k + 1, j + 1, i].real
    return total


@_compiled
@no_type_check
def _phase_table(table, shift, box):
    """exp(2 pi i k shift / box) for k = -box/2 …: what moves an image's content back by a shift along one axis."""
    for row in range(len(table)):
        angle = 2 * math.pi / box * shift * (row - box // 2)
        table[row] = complex(math.cos(angle), math.sin(angle))


@njit(inline="always")
@no_type_check
def _turn_slopes(row, q, kx, ky, gradient, r):
    """Slopes over a turn of one part of a coefficient, from those of the transform, into column q."""
    by_x, by_y, by_z = gradient
    along_beam = by_x * r[6] + by_y * r[7] + by_z * r[8]
    row[0, q], row[1, q] = -ky * along_beam, kx * along_beam
    row[2, q] = by_x * (ky * r[0] - kx * r[3]) + by_y * (ky * r[1] - kx * r[4]) + by_z * (ky * r[2] - kx * r[5])


@_compiled
@no_type_check
def _dot(a, b, count):
    """Sum of the first products in single precision; so plain that the compiler makes vector instructions of it."""
    total = np.float32(0.0)
    for q in range(count):
        total += a[q] * b[q]
    return total


@_compiled
@no_type_check
def _add_products(model, n, row, count):
    """Add the products of the slopes with each other and with the residual, the last row, to a pose's model."""
    left = row[PARAMETERS]
    model.energy[n] += _dot(left, left, count)
    for a in range(PARAMETERS):
        model.gradient[n, a] += _dot(row[a], left, count)
        for b in range(a + 1):
            model.normal[n, a, b] += _dot(row[a], row[b], count)


@_compiled
@no_type_check
def normal_equations(volume, grid, weight, views, rotation, shift_px, model):
    """The model of sum w |C exp(-2 pi i k.t) S(R) - F|^2 about n poses, into the last argument.

    weight (p,), rotation (n, 3, 3), shift_px (n, 2). What is moved is the image, back by the shift, rather than the
    slice and all its slopes. Slopes and residuals of a few hundred frequencies are laid down first and multiplied then.
    What is returned is of no use (`_fetch`).
    """
    box, size = grid.box, volume.shape[0] - 1
    scale, radian = np.float32(size / box), np.float32(2 * math.pi / box)
    phases_x, phases_y = np.empty(box + 1, np.complex64), np.empty(box + 1, np.complex64)
    row, root = np.empty((PARAMETERS + 1, 2 * _AT_ONCE), np.float32), np.sqrt(weight)
    fetched = np.float32(0)
    for n in range(len(rotation)):
        image, r = views.image_of[n], rotation[n]
        flat = (r[0, 0], r[0, 1], r[0, 2], r[1, 0], r[1, 1], r[1, 2], r[2, 0], r[2, 1], r[2, 2])
        _phase_table(phases_x, shift_px[n, 0], box)
        _phase_table(phases_y, shift_px[n, 1], box)
        model.energy[n], model.gradient[n], model.normal[n] = 0, 0, 0
        for first in range(0, len(weight), _AT_ONCE):
            last = min(first + _AT_ONCE, len(weight))
            if volume.size > _CACHED_NODES:
                fetched += _fetch(volume, grid, r, first, last)
            for p in range(first, last):
                kx, ky, q = grid.frequency[p, 0], grid.frequency[p, 1], 2 * (p - first)
                x, y, z, side = _point(kx, ky, r, scale)
                value, by_x, by_y, by_z = _interpolated(volume, x, y, z)
                contrast = root[p] * (np.float32(1.0) if len(views.transfer) == 0 else views.transfer[image, p])
                # S(-k) is the conjugate of S(k), its gradient minus the conjugate
                real, imag = contrast * value.real, contrast * side * value.imag
                along = contrast * scale
                gradient = (along * side * by_x.real, along * side * by_y.real, along * side * by_z.real)
                _turn_slopes(row, q, kx, ky, gradient, flat)
                _turn_slopes(row, q + 1, kx, ky, (along * by_x.imag, along * by_y.imag, along * by_z.imag), flat)
                row[3, q], row[3, q + 1] = radian * kx * imag, -radian * kx * real
                row[4, q], row[4, q + 1] = radian * ky * imag, -radian * ky * real
                phase = phases_x[int(kx) + box // 2] * phases_y[int(ky) + box // 2]
                moved = root[p] * views.images[image, p] * phase
                row[PARAMETERS, q], row[PARAMETERS, q + 1] = moved.real - real, moved.imag - imag
            _add_products(model, n, row, 2 * (last - first))
        for a in range(PARAMETERS):
            for b in range(a):
                model.normal[n, b, a] = model.normal[n, a, b]
    return fetched


@_compiled
@no_type_check
def sample_slices(volume, grid, rotation, slices):
    """Slices (n, p) of a volume at n rotations, into the last argument; what is returned is of no use (`_fetch`)."""
    scale, fetched = np.float32((volume.shape[0] - 1) / grid.box), np.float32(0)
    for n in range(len(rotation)):
        for p in range(len(grid.frequency)):
            if volume.size > _CACHED_NODES and p % _AT_ONCE == 0:
                fetched += _fetch(volume, grid, rotation[n], p, min(p + _AT_ONCE, len(grid.frequency)))
            x, y, z, side = _point(grid.frequency[p, 0], grid.frequency[p, 1], rotation[n], scale)
            value, _, _, _ = _interpolated(volume, x, y, z)
            slices[n, p] = complex(value.real, side * value.imag)
    return fetched


@_compiled
@no_type_check
def insert_slices(numerator, denominator, grid, views, rotation, shift_px):
    """Adjoint of `sample_slices`: add C F, moved back by its shift, and C^2 to the nodes about every point.

    numerator is complex and denominator real, both of a volume's shape. What is returned is of no use (`_fetch`).
    """
    box, size, half = grid.box, numerator.shape[0] - 1, numerator.shape[2] - 1
    scale = np.float32(size / box)
    phases_x, phases_y = np.empty(box + 1, np.complex64), np.empty(box + 1, np.complex64)
    large, fetched = numerator.size > _CACHED_NODES, np.float32(0)
    for n in range(len(rotation)):
        image = views.image_of[n]
        _phase_table(phases_x, shift_px[n, 0], box)
        _phase_table(phases_y, shift_px[n, 1], box)
        for p in range(len(grid.frequency)):
            if large and p % _AT_ONCE == 0:
                last = min(p + _AT_ONCE, len(grid.frequency))
                fetched += _fetch(numerator, grid, rotation[n], p, last)
                fetched += _fetch(denominator, grid, rotation[n], p, last)
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
    return fetched


def shared_out(count: int, work: Callable[[slice], object]) -> None:
    """Do the work on slices of `count` poses, in as many threads as torch has."""
    threads = min(torch.get_num_threads(), -(-count // _POSES_A_THREAD))
    if threads <= 1:
        work(slice(0, count))
        return
    each = -(-count // threads)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, slice(start, start + each)) for start in range(0, count, each)]:
            done.result()
