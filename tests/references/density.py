"""Slow twins of aceray.data.atoms and of the simulated slice: direct sums over atoms, float64 NumPy."""

import numpy as np


def structure_factor(position_px: np.ndarray, weight: np.ndarray, frequency: np.ndarray, box: int) -> complex:
    """Sum of weight exp(-2 pi i k.r) at one frequency (x, y, z) in cycles per box; positions in pixels."""
    total = 0j
    for r, w in zip(position_px, weight, strict=True):
        total += w * np.exp(-2j * np.pi * np.dot(frequency, r) / box)
    return total


def density(position_px: np.ndarray, weight: np.ndarray, box: int, width_px: float) -> np.ndarray:
    """Gaussians at the atoms, cut off at |k| = box/2, by a direct sum over all frequencies; axes z, y, x."""
    z, y, x = np.mgrid[:box, :box, :box] - box // 2
    volume = np.zeros((box, box, box))
    frequencies = range(-(box // 2), box // 2 + 1)
    for kz in frequencies:
        for ky in frequencies:
            for kx in frequencies:
                squared = kx**2 + ky**2 + kz**2
                if 4 * squared >= box**2:
                    continue
                phases = np.exp(-2j * np.pi * (position_px @ np.array([kx, ky, kz])) / box)
                factor = np.sum(weight * phases) * np.exp(-2 * np.pi**2 * width_px**2 * squared / box**2)
                volume += (factor * np.exp(2j * np.pi * (kx * x + ky * y + kz * z) / box)).real
    return volume / box**3


def projection(
    position_px: np.ndarray, weight: np.ndarray, rotation: np.ndarray, box: int, width_px: float
) -> np.ndarray:
    """Projection along the beam of the turned atoms' Gaussians, cut off at |k| = box/2; axes y, x.

    An atom at r of the object frame is seen at the first two entries of R r.
    """
    seen = np.stack([rotation @ r for r in position_px])
    y, x = np.mgrid[:box, :box] - box // 2
    image = np.zeros((box, box))
    frequencies = range(-(box // 2), box // 2 + 1)
    for ky in frequencies:
        for kx in frequencies:
            squared = kx**2 + ky**2
            if 4 * squared >= box**2:
                continue
            phases = np.exp(-2j * np.pi * (kx * seen[:, 0] + ky * seen[:, 1]) / box)
            factor = np.sum(weight * phases) * np.exp(-2 * np.pi**2 * width_px**2 * squared / box**2)
            image += (factor * np.exp(2j * np.pi * (kx * x + ky * y) / box)).real
    return image / box**2


def ctf(frequency: float, angle: float, row: dict[str, float]) -> float:
    """Contrast transfer at one frequency (cycles per angstrom, radian from x towards y), positive underfocus."""
    volt = row["voltage_kv"] * 1e3
    wavelength = 12.2639 / np.sqrt(volt + 0.97845e-6 * volt**2)
    half = (row["defocus_u_angstrom"] - row["defocus_v_angstrom"]) / 2
    mean = (row["defocus_u_angstrom"] + row["defocus_v_angstrom"]) / 2
    defocus = mean + half * np.cos(2 * (angle - np.deg2rad(row["astigmatism_deg"])))
    aberration = row["spherical_aberration_mm"] * 1e7
    chi = np.pi / 2 * aberration * wavelength**3 * frequency**4 - np.pi * wavelength * defocus * frequency**2
    chi -= np.deg2rad(row["phase_shift_deg"])
    contrast = row["amplitude_contrast"]
    return -np.sqrt(1 - contrast**2) * np.sin(chi) + contrast * np.cos(chi)


def modulated(
    image: np.ndarray, row: dict[str, float] | None, shift_px: np.ndarray, pixel_size: float, b: float
) -> np.ndarray:
    """CTF and envelope of a row, then the content moved by (x, y) pixels, coefficient by coefficient below Nyquist."""
    box = len(image)
    y, x = np.mgrid[:box, :box] - box // 2
    result = np.zeros((box, box))
    frequencies = range(-(box // 2), box // 2 + 1)
    for ky in frequencies:
        for kx in frequencies:
            if 4 * (kx**2 + ky**2) >= box**2:
                continue
            coefficient = np.sum(image * np.exp(-2j * np.pi * (kx * x + ky * y) / box))
            per_angstrom = np.hypot(kx, ky) / (box * pixel_size)
            transfer = 1.0 if row is None else ctf(per_angstrom, np.arctan2(ky, kx), row)
            coefficient *= transfer * np.exp(-b / 4 * per_angstrom**2)
            moved_x, moved_y = x - shift_px[0], y - shift_px[1]
            result += (coefficient * np.exp(2j * np.pi * (kx * moved_x + ky * moved_y) / box)).real
    return result / box**2


def rotation_from_angles(rot_deg: float, tilt_deg: float, psi_deg: float) -> np.ndarray:
    """RELION's matrix Rz(psi) Ry(tilt) Rz(rot) of passive rotations."""

    def about_z(degrees: float) -> np.ndarray:
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])

    c, s = np.cos(np.deg2rad(tilt_deg)), np.sin(np.deg2rad(tilt_deg))
    about_y = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return about_z(psi_deg) @ about_y @ about_z(rot_deg)
