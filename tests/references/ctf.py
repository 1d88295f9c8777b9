"""Contrast transfer of one particle at one frequency, from the printed formula, with an explicit angle."""

import math


def wavelength_angstrom(voltage_kv: float) -> float:
    """De Broglie wavelength h / sqrt(2 m e U (1 + e U / (2 m c^2))) from the SI constants."""
    planck, mass, charge, light = 6.62607015e-34, 9.1093837015e-31, 1.602176634e-19, 299792458.0
    energy = charge * voltage_kv * 1e3
    return 1e10 * planck / math.sqrt(2 * mass * energy * (1 + energy / (2 * mass * light**2)))


def ctf(
    frequency_x: float,
    frequency_y: float,
    *,
    defocus_u_angstrom: float,
    defocus_v_angstrom: float,
    astigmatism_deg: float,
    phase_shift_deg: float,
    voltage_kv: float,
    spherical_aberration_mm: float,
    amplitude_contrast: float,
) -> float:
    """-sqrt(1 - w^2) sin(chi) + w cos(chi), frequencies in cycles per angstrom."""
    wavelength = wavelength_angstrom(voltage_kv)
    k = math.hypot(frequency_x, frequency_y)
    angle = math.atan2(frequency_y, frequency_x) - math.radians(astigmatism_deg)
    defocus = (defocus_u_angstrom + defocus_v_angstrom) / 2
    defocus += (defocus_u_angstrom - defocus_v_angstrom) / 2 * math.cos(2 * angle)
    chi = math.pi / 2 * spherical_aberration_mm * 1e7 * wavelength**3 * k**4 - math.pi * wavelength * defocus * k**2
    chi -= math.radians(phase_shift_deg)
    return -math.sqrt(1 - amplitude_contrast**2) * math.sin(chi) + amplitude_contrast * math.cos(chi)
