"""Compiled loops over half-disc points on a CPU: slices with their slopes, and their adjoint.

Sampling a transform is bound by memory, not by arithmetic: one visit of the eight nodes about a point gives the value,
its gradient and all that a Gauss-Newton step needs of it, where a chain of tensor operations visits them once for each
slope and writes every intermediate result. The tensor code in `em/projection.py`, `em/backprojection.py` and
`train/search.py` computes the same, serves other devices and is what these loops are tested against.

Arrays are NumPy's, single precision (and not checked at run time: the compiler must see the bare functions). A volume is the padded transform as complex numbers, axes kz, ky from -m/2 to m/2
and kx from 0 to m/2. The loops release the interpreter's lock: threads may share the images among them.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit

_compiled = njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
PARAMETERS = 5  # of a pose: a rotation vector (x, y, z) in the image's frame and a shift (x, y)


@_compiled
@no_type_check
def _corner(position: float, largest: int) -> tuple[int, float]:
    """The node before a position on an axis, and the fraction of the way to the next."""
    node = min(max(int(position), 0), largest - 1)
    return node, np.float32(position - node)


@_compiled
@no_type_check
def _turn_table(table: np.ndarray, radians_per_index: float, first: int) -> None:
    """exp(i radians n) for n = first, first + 1 …"""
    for row in range(len(table)):
        angle = radians_per_index * (first + row)
        table[row] = complex(math.cos(angle), math.sin(angle))


@_compiled
@no_type_check
def normal_equations(
    volume: np.ndarray,
    box: int,
    frequency: np.ndarray,
    weight: np.ndarray,
    images: np.ndarray,
    transfer: np.ndarray,
    image_of: np.ndarray,
    rotation: np.ndarray,
    shift_px: np.ndarray,
    energy: np.ndarray,
    gradient: np.ndarray,
    normal: np.ndarray,
) -> None:
    """Energy, its descent direction J^T W r and J^T W J for each of n poses, into the last three arguments.

    frequency (p, 2) whole numbers, weight (p,), images (b, p), transfer (b, p) or (0, p) for none, image_of (n,) the
    row of each pose's image, rotation (n, 3, 3), shift_px (n, 2); energy (n,), gradient (n, 5), normal (n, 5, 5).
    """
    size, half = volume.shape[0] - 1, volume.shape[2] - 1
    scale, middle = np.float32(size / box), np.float32(size // 2)
    radian = np.float32(2 * math.pi / box)
    turns_x, turns_y = np.empty(box + 1, np.complex64), np.empty(box + 1, np.complex64)
    slope_re, slope_im = np.empty(PARAMETERS, np.float32), np.empty(PARAMETERS, np.float32)
    for n in range(len(rotation)):
        image = image_of[n]
        r = rotation[n]
        _turn_table(turns_x, radian * shift_px[n, 0], -(box // 2))
        _turn_table(turns_y, radian * shift_px[n, 1], -(box // 2))
        total = 0.0
        gradient[n] = 0
        normal[n] = 0
        for p in range(len(frequency)):
            kx, ky, w = frequency[p, 0], frequency[p, 1], weight[p]
            x = (kx * r[0, 0] + ky * r[1, 0]) * scale
            y = (kx * r[0, 1] + ky * r[1, 1]) * scale
            z = (kx * r[0, 2] + ky * r[1, 2]) * scale
            side = np.float32(-1 if x < 0 else 1)
            i, fx = _corner(side * x, half)
            j, fy = _corner(side * y + middle, size)
            k, fz = _corner(side * z + middle, size)
            # along x, then y, then z; the difference of the ends is the slope
            v00, v01 = volume[k, j, i], volume[k, j, i + 1]
            v10, v11 = volume[k, j + 1, i], volume[k, j + 1, i + 1]
            u00, u01 = volume[k + 1, j, i], volume[k + 1, j, i + 1]
            u10, u11 = volume[k + 1, j + 1, i], volume[k + 1, j + 1, i + 1]
            a0, a1, b0, b1 = v00 + fx * (v01 - v00), v10 + fx * (v11 - v10), u00 + fx * (u01 - u00), u10 + fx * (u11 - u10)
            c0, c1 = a0 + fy * (a1 - a0), b0 + fy * (b1 - b0)
            value = c0 + fz * (c1 - c0)
            by_z = c1 - c0
            by_y = (a1 - a0) + fz * ((b1 - b0) - (a1 - a0))
            d0, d1 = (v01 - v00) + fy * ((v11 - v10) - (v01 - v00)), (u01 - u00) + fy * ((u11 - u10) - (u01 - u00))
            by_x = d0 + fz * (d1 - d0)
            # S(-q) is the conjugate of S(q), and its gradient minus the conjugate
            contrast = np.float32(1.0) if len(transfer) == 0 else transfer[image, p]
            factor = contrast * scale
            along_0 = factor * (by_x * r[0, 0] + by_y * r[0, 1] + by_z * r[0, 2])
            along_1 = factor * (by_x * r[1, 0] + by_y * r[1, 1] + by_z * r[1, 2])
            along_2 = factor * (by_x * r[2, 0] + by_y * r[2, 1] + by_z * r[2, 2])
            s_re, s_im = contrast * value.real, side * contrast * value.imag
            slope_re[0], slope_im[0] = -ky * side * along_2.real, -ky * along_2.imag
            slope_re[1], slope_im[1] = kx * side * along_2.real, kx * along_2.imag
            slope_re[2] = side * (ky * along_0.real - kx * along_1.real)
            slope_im[2] = ky * along_0.imag - kx * along_1.imag
            slope_re[3], slope_im[3] = radian * kx * s_im, -radian * kx * s_re
            slope_re[4], slope_im[4] = radian * ky * s_im, -radian * ky * s_re
            # the image moved back, rather than the slice and all its slopes moved
            column, row = int(kx) + box // 2, int(ky) + box // 2
            centred = images[image, p] * (turns_x[column] * turns_y[row])
            left_re, left_im = centred.real - s_re, centred.imag - s_im
            total += w * (left_re * left_re + left_im * left_im)
            for a in range(PARAMETERS):
                gradient[n, a] += w * (slope_re[a] * left_re + slope_im[a] * left_im)
                for b in range(a + 1):
                    normal[n, a, b] += w * (slope_re[a] * slope_re[b] + slope_im[a] * slope_im[b])
        energy[n] = total
        for a in range(PARAMETERS):
            for b in range(a):
                normal[n, b, a] = normal[n, a, b]


@_compiled
@no_type_check
def sample_slices(
    volume: np.ndarray, box: int, frequency: np.ndarray, rotation: np.ndarray, slices: np.ndarray
) -> None:
    """Slices (n, p) of a volume at n rotations, into the last argument."""
    size, half = volume.shape[0] - 1, volume.shape[2] - 1
    scale, middle = np.float32(size / box), np.float32(size // 2)
    for n in range(len(rotation)):
        r = rotation[n]
        for p in range(len(frequency)):
            kx, ky = frequency[p, 0], frequency[p, 1]
            x = (kx * r[0, 0] + ky * r[1, 0]) * scale
            y = (kx * r[0, 1] + ky * r[1, 1]) * scale
            z = (kx * r[0, 2] + ky * r[1, 2]) * scale
            side = np.float32(-1 if x < 0 else 1)
            i, fx = _corner(side * x, half)
            j, fy = _corner(side * y + middle, size)
            k, fz = _corner(side * z + middle, size)
            a0 = volume[k, j, i] + fx * (volume[k, j, i + 1] - volume[k, j, i])
            a1 = volume[k, j + 1, i] + fx * (volume[k, j + 1, i + 1] - volume[k, j + 1, i])
            b0 = volume[k + 1, j, i] + fx * (volume[k + 1, j, i + 1] - volume[k + 1, j, i])
            b1 = volume[k + 1, j + 1, i] + fx * (volume[k + 1, j + 1, i + 1] - volume[k + 1, j + 1, i])
            c0, c1 = a0 + fy * (a1 - a0), b0 + fy * (b1 - b0)
            value = c0 + fz * (c1 - c0)
            slices[n, p] = complex(value.real, side * value.imag)


@_compiled
@no_type_check
def insert_slices(
    numerator: np.ndarray,
    denominator: np.ndarray,
    box: int,
    frequency: np.ndarray,
    images: np.ndarray,
    transfer: np.ndarray,
    image_of: np.ndarray,
    rotation: np.ndarray,
    shift_px: np.ndarray,
) -> None:
    """Adjoint of `sample_slices`: add C F, moved back by its shift, and C^2 to the nodes about every point.

    numerator is complex and denominator real, both of a volume's shape; the rest is as in `normal_equations`.
    """
    size, half = numerator.shape[0] - 1, numerator.shape[2] - 1
    scale, middle = np.float32(size / box), np.float32(size // 2)
    radian = np.float32(2 * math.pi / box)
    turns_x, turns_y = np.empty(box + 1, np.complex64), np.empty(box + 1, np.complex64)
    for n in range(len(rotation)):
        image = image_of[n]
        r = rotation[n]
        _turn_table(turns_x, radian * shift_px[n, 0], -(box // 2))
        _turn_table(turns_y, radian * shift_px[n, 1], -(box // 2))
        for p in range(len(frequency)):
            kx, ky = frequency[p, 0], frequency[p, 1]
            x = (kx * r[0, 0] + ky * r[1, 0]) * scale
            y = (kx * r[0, 1] + ky * r[1, 1]) * scale
            z = (kx * r[0, 2] + ky * r[1, 2]) * scale
            side = np.float32(-1 if x < 0 else 1)
            i, fx = _corner(side * x, half)
            j, fy = _corner(side * y + middle, size)
            k, fz = _corner(side * z + middle, size)
            contrast = np.float32(1.0) if len(transfer) == 0 else transfer[image, p]
            centred = contrast * images[image, p] * (turns_x[int(kx) + box // 2] * turns_y[int(ky) + box // 2])
            value = complex(centred.real, side * centred.imag)
            power = contrast * contrast
            for dz in range(2):
                wz = fz if dz else 1 - fz
                for dy in range(2):
                    wy = wz * (fy if dy else 1 - fy)
                    for dx in range(2):
                        w = wy * (fx if dx else 1 - fx)
                        numerator[k + dz, j + dy, i + dx] += w * value
                        denominator[k + dz, j + dy, i + dx] += w * power
