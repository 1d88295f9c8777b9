import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.ctf import (
    CtfParameters,
    b_factor_envelope,
    contrast_transfer_function,
    ctf_on_disc,
    electron_wavelength_angstrom,
)
from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from tests.references.ctf import ctf, wavelength_angstrom

TITAN = {
    "defocus_u_angstrom": 23_000.0,
    "defocus_v_angstrom": 17_000.0,
    "astigmatism_deg": 30.0,
    "phase_shift_deg": 0.0,
    "voltage_kv": 300.0,
    "spherical_aberration_mm": 2.7,
    "amplitude_contrast": 0.1,
}
PHASE_PLATE = {**TITAN, "phase_shift_deg": 75.0, "astigmatism_deg": 140.0, "voltage_kv": 200.0}
OVERFOCUS = {**TITAN, "defocus_u_angstrom": -8_000.0, "defocus_v_angstrom": -9_000.0, "amplitude_contrast": 0.0}
# wavelengths differ by 3e-5 between the printed constant 12.2639 and the SI ones: 6e-4 rad at the largest phase here
TOLERANCE = 2e-3


def parameters(*rows: dict[str, float]) -> CtfParameters:
    names = [field.name for field in dataclasses.fields(CtfParameters)]
    return CtfParameters(*(torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names))


def polar(radius: float, angle_deg: float) -> torch.Tensor:
    angle = math.radians(angle_deg)
    return torch.tensor([[radius * math.cos(angle), radius * math.sin(angle)]], dtype=torch.float64)


def test_wavelength() -> None:
    voltage = torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64)
    expected = [wavelength_angstrom(value) for value in voltage.tolist()]
    assert_close(electron_wavelength_angstrom(voltage), torch.tensor(expected, dtype=torch.float64), rtol=5e-5, atol=0)
    assert expected[2] == pytest.approx(0.019687, abs=1e-6)


@pytest.mark.parametrize("row", [TITAN, PHASE_PLATE, OVERFOCUS], ids=["titan", "phase-plate", "overfocus"])
def test_against_the_direct_formula(row: dict[str, float]) -> None:
    frequency = (torch.rand(200, 2, generator=named_generator("test/ctf"), dtype=torch.float64) - 0.5) * 0.3
    expected = [ctf(x, y, **row) for x, y in frequency.tolist()]
    found = contrast_transfer_function(frequency, parameters(row))[0]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("contrast", [0.0, 0.07, 0.1, 1.0])
def test_at_the_origin_it_is_plus_the_amplitude_contrast(contrast: float) -> None:
    found = contrast_transfer_function(torch.zeros(1, 2), parameters({**TITAN, "amplitude_contrast": contrast}))
    assert found.item() == pytest.approx(contrast, abs=1e-12)


def test_underfocus_makes_low_frequencies_of_bright_protein_bright() -> None:
    frequency = torch.stack([torch.linspace(0.001, 0.02, 50), torch.zeros(50)], dim=-1).double()
    assert (contrast_transfer_function(frequency, parameters(TITAN)) > 0).all()


@pytest.mark.parametrize("radius", [0.02, 0.05, 0.09, 0.13])
def test_defocus_u_lies_on_the_astigmatic_axis_at_30_degrees_from_x_towards_y(radius: float) -> None:
    u_only = {**TITAN, "defocus_v_angstrom": TITAN["defocus_u_angstrom"]}
    v_only = {**TITAN, "defocus_u_angstrom": TITAN["defocus_v_angstrom"]}
    along = contrast_transfer_function(polar(radius, 30.0), parameters(TITAN))
    across = contrast_transfer_function(polar(radius, 120.0), parameters(TITAN))
    assert_close(along, contrast_transfer_function(polar(radius, 0.0), parameters(u_only)), atol=1e-10, rtol=0)
    assert_close(across, contrast_transfer_function(polar(radius, 0.0), parameters(v_only)), atol=1e-10, rtol=0)
    assert along.item() == pytest.approx(ctf(*polar(radius, 30.0)[0].tolist(), **TITAN), abs=TOLERANCE)


def test_a_quarter_wave_phase_plate_gives_full_contrast_at_the_origin() -> None:
    row = {**TITAN, "phase_shift_deg": 90.0, "amplitude_contrast": 0.0}
    assert contrast_transfer_function(torch.zeros(1, 2), parameters(row)).item() == pytest.approx(1.0, abs=1e-12)


def test_opposite_frequencies_have_the_same_transfer() -> None:
    frequency = torch.randn(50, 2, generator=named_generator("test/ctf"), dtype=torch.float64) * 0.1
    both = [contrast_transfer_function(sign * frequency, parameters(TITAN)) for sign in (1, -1)]
    assert_close(*both)


def test_batch_equals_loop() -> None:
    rows = [TITAN, PHASE_PLATE, OVERFOCUS]
    frequency = torch.randn(20, 2, generator=named_generator("test/ctf"), dtype=torch.float64) * 0.1
    together = contrast_transfer_function(frequency, parameters(*rows))
    assert together.shape == (3, 20)
    for index, row in enumerate(rows):
        assert_close(together[index], contrast_transfer_function(frequency, parameters(row))[0])


@pytest.mark.parametrize("box", [32, 33])
def test_on_the_disc_the_pixel_size_sets_the_frequencies(box: int) -> None:
    disc = HalfDisc(box)
    pixel_size_angstrom = 4.25
    found = ctf_on_disc(parameters(TITAN).to("cpu"), disc, pixel_size_angstrom)[0]
    x, y = (disc.frequency.double().numpy() / (box * pixel_size_angstrom)).T
    expected = [ctf(*pair, **TITAN) for pair in zip(x.tolist(), y.tolist(), strict=True)]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=TOLERANCE, rtol=0)


def test_float32_is_enough_at_high_resolution() -> None:
    single = CtfParameters(*(getattr(parameters(TITAN), f.name).float() for f in dataclasses.fields(CtfParameters)))
    frequency = torch.rand(500, 2, generator=named_generator("test/ctf"), dtype=torch.float64) * 0.2
    exact = contrast_transfer_function(frequency, parameters(TITAN))
    assert_close(contrast_transfer_function(frequency.float(), single).double(), exact, atol=1e-4, rtol=0)


def test_b_factor_envelope() -> None:
    frequency = np.array([[0.0, 0.0], [0.1, 0.0], [0.06, -0.08], [0.2, 0.1]])
    expected = [math.exp(-60.0 * (x * x + y * y) / 4) for x, y in frequency]
    assert_close(b_factor_envelope(torch.from_numpy(frequency), 60.0), torch.tensor(expected, dtype=torch.float64))


def test_gradients() -> None:
    frequency = torch.tensor([[0.05, -0.02], [0.0, 0.0], [0.01, 0.06]], dtype=torch.float64, requires_grad=True)
    names = [field.name for field in dataclasses.fields(CtfParameters)]
    # defocus in um: gradcheck steps by 1e-6 of each input
    leaves = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (2.3, 1.7, 30.0, 10.0)]
    fixed = [torch.tensor([TITAN[name]], dtype=torch.float64) for name in names[4:]]

    def transfer(k: torch.Tensor, u: torch.Tensor, v: torch.Tensor, angle: torch.Tensor, phase: torch.Tensor):
        return contrast_transfer_function(k, CtfParameters(u * 1e4, v * 1e4, angle, phase, *fixed))

    assert torch.autograd.gradcheck(transfer, (frequency, *leaves))


def test_parameters_are_taken_and_joined_by_particle() -> None:
    first, second = parameters(TITAN, PHASE_PLATE), parameters(OVERFOCUS)
    joined = CtfParameters.concatenate([first, second])
    assert (len(first), len(second), len(joined)) == (2, 1, 3)
    taken = joined.take(torch.tensor([2, 0]))
    assert taken.defocus_u_angstrom.tolist() == [-8_000.0, 23_000.0]
    assert taken.amplitude_contrast.tolist() == [0.0, 0.1]
