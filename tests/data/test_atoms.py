import gzip
import io
import urllib.error

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.data.atoms import Atoms, density, read_atoms, structure_factors
from aceray.data.simulate import slice_transform
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.errors import DataError
from tests.references import density as reference

CIF_HEAD = """data_x
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
"""


def pdb_line(serial, element, x, y, z, residue="GLY", alternative=" ") -> str:
    name = f" {element}1" if len(element) == 1 else f"{element}1"
    sequence = serial if alternative == " " else 1
    head = f"ATOM  {serial:>5} {name:<4}{alternative}{residue:>3} A{sequence:>4}    "
    return f"{head}{x:8.3f}{y:8.3f}{z:8.3f}  1.00 10.00          {element:>2}\n"


def pdb_text(*atoms) -> str:
    return "".join(pdb_line(serial, *atom) for serial, atom in enumerate(atoms, start=1)) + "END\n"


def cif_text(*atoms) -> str:
    rows = [
        f"ATOM {serial} {element} {element} . GLY A {serial} {x} {y} {z} {serial} A 1\n"
        for serial, (element, x, y, z) in enumerate(atoms, start=1)
    ]
    return CIF_HEAD + "".join(rows)


def some_atoms(count=40, spread_angstrom=5.0) -> Atoms:
    generator = np.random.default_rng(4)
    position = generator.normal(0, spread_angstrom / 2, (count, 3)).clip(-spread_angstrom, spread_angstrom)
    number = generator.integers(1, 30, count)
    position -= np.average(position, axis=0, weights=number)
    return Atoms(torch.from_numpy(position), torch.from_numpy(number), "some atoms")


# ---- reading ------------------------------------------------------------------------------------------------------


def test_the_built_in_molecule_is_5nrl():
    atoms = read_atoms("5NRL")
    assert atoms.name == "PDB 5NRL"
    assert atoms.position_angstrom.shape == (118701, 3)
    extent = atoms.position_angstrom.max(dim=0).values - atoms.position_angstrom.min(dim=0).values
    assert_close(extent, torch.tensor([259.12, 352.17, 296.53]).double(), atol=0.02, rtol=0)
    found = {int(z): int((atoms.atomic_number == z).sum()) for z in atoms.atomic_number.unique()}
    assert found == {6: 73606, 7: 20389, 8: 23672, 15: 565, 16: 462, 30: 7}


@pytest.mark.parametrize("ending", [".pdb", ".ent", ".pdb.gz", ".ent.gz"])
def test_pdb_files_are_read_and_centred(tmp_path, ending):
    path = tmp_path / f"two{ending}"
    text = pdb_text(("C", 1, 2, 3), ("O", 8, 2, 3)).encode()
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    atoms = read_atoms(str(path))
    # the centre of 6 at x = 1 and 8 at x = 8 is x = 5
    assert_close(atoms.position_angstrom, torch.tensor([[-4.0, 0, 0], [3.0, 0, 0]]).double())
    assert atoms.atomic_number.tolist() == [6, 8]
    assert atoms.name == path.name
    assert atoms.radius_angstrom == pytest.approx(4.0)


@pytest.mark.parametrize("ending", [".cif", ".cif.gz"])
def test_mmcif_files_are_read(tmp_path, ending):
    text = cif_text(("C", 1.0, 2.0, 3.0), ("ZN", 1.0, 2.0, 9.0))
    path = tmp_path / f"two{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    atoms = read_atoms(str(path))
    assert atoms.atomic_number.tolist() == [6, 30]
    assert_close(atoms.position_angstrom, torch.tensor([[0, 0, -5.0], [0, 0, 1.0]]).double())


def test_water_and_alternative_conformations_are_left_out(tmp_path):
    atoms = [("C", 0, 0, 0, "SER", "A"), ("C", 1, 0, 0, "SER", "B"), ("O", 9, 9, 9, "HOH"), ("H", 0, 1, 0)]
    (tmp_path / "a.pdb").write_text(pdb_text(*atoms))
    assert sorted(read_atoms(str(tmp_path / "a.pdb")).atomic_number.tolist()) == [1, 6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pdb", None, r"gone\.pdb: there is no such file; give 5NRL"),
        ("empty.pdb", b"", r"empty\.pdb: holds no atoms"),
        ("text.pdb", b"Dear diary,\n", r"text\.pdb: holds no atoms"),
        ("text.cif", b"Dear diary,\n", r"text\.cif: cannot be read as PDB or mmCIF"),
        ("bytes.pdb.gz", b"\x1f\x8b\x08 not really", r"bytes\.pdb\.gz: "),
        ("model.xyz", b"1\n\nC 0 0 0\n", r"model\.xyz: cannot be read as PDB or mmCIF"),
        ("odd.pdb", pdb_text(("C", 0, 0, 0), ("Qq", 1, 1, 1)).encode(), r"atom 'Qq1' of residue GLY 2 in chain A"),
        ("water.pdb", pdb_text(("O", 0, 0, 0, "HOH")).encode(), r"water\.pdb: holds no atoms apart from water"),
    ],
)
def test_a_model_that_cannot_be_used_is_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_atoms(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_model(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        read_atoms(str(tmp_path))


# ---- the archive --------------------------------------------------------------------------------------------------


def test_an_entry_is_fetched_from_the_archive(monkeypatch):
    text = cif_text(("C", 1.0, 2.0, 3.0), ("O", 8.0, 2.0, 3.0))
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(gzip.compress(text.encode()))

    monkeypatch.setattr("urllib.request.urlopen", answer)
    atoms = read_atoms("pdb:6vyb")
    assert asked == ["https://files.rcsb.org/download/6VYB.cif.gz"]
    assert atoms.name == "PDB 6VYB" and len(atoms.atomic_number) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (urllib.error.URLError("Name or service not known"), "without a network use 5NRL or the path of a file"),
        (TimeoutError("timed out"), "cannot reach https://files"),
        (urllib.error.HTTPError("x", 404, "Not Found", None, None), "answers 404 Not Found; check the identifier"),
    ],
)
def test_without_the_archive_there_is_one_clear_line(monkeypatch, error, message):
    def refuse(address, timeout):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError, match=message) as caught:
        read_atoms("pdb:6VYB")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["pdb:", "pdb:../../x", "pdb:toolong", "pdb:6VYB.pdb"])
def test_an_identifier_that_is_none_is_refused_without_a_request(monkeypatch, model):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a request was sent"))
    with pytest.raises(DataError, match="is no PDB identifier"):
        read_atoms(model)


# ---- density ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width_px", [0.32, 0.67])
def test_the_density_is_the_direct_sum(width_px):
    atoms, box, pixel_size = some_atoms(), 10, 2.5
    found = density(atoms, box, pixel_size, width_px * pixel_size)
    expected = reference.density(
        atoms.position_angstrom.numpy() / pixel_size, atoms.atomic_number.numpy(), box, width_px
    )
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_wide_gaussians_are_what_their_formula_says():
    atoms = Atoms(torch.tensor([[2.0, -1.0, 3.5]]).double(), torch.tensor([7]), "one atom")
    found = density(atoms, 32, 1.0, 1.6)
    z, y, x = torch.meshgrid(*[torch.arange(32.0).double() - 16] * 3, indexing="ij")
    squared = (x - 2.0) ** 2 + (y + 1.0) ** 2 + (z - 3.5) ** 2
    expected = 7 * torch.exp(-squared / (2 * 1.6**2)) / (2 * torch.pi * 1.6**2) ** 1.5
    assert_close(found, expected, atol=1e-4 * float(expected.max()), rtol=0)


def test_the_density_is_centred_band_limited_and_sums_to_the_electrons():
    atoms, box = some_atoms(), 16
    found = density(atoms, box, 1.5, 0.9)
    assert_close(found.sum(), atoms.atomic_number.sum().double(), rtol=1e-6, atol=0)
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(found))).abs()
    z, y, x = torch.meshgrid(*[torch.arange(box) - box // 2] * 3, indexing="ij")
    beyond = 4 * (x**2 + y**2 + z**2) >= box**2
    assert spectrum[beyond].max() < 1e-9 * spectrum.max()
    for axis, index in zip((2, 1, 0), (x, y, z), strict=True):
        mean = (torch.fft.ifftshift(found) * torch.exp(2j * torch.pi * torch.fft.ifftshift(index) / box)).sum().angle()
        assert abs(float(mean)) < 0.05, f"axis {axis}"


def test_structure_factors_of_5nrl_agree_with_direct_sums():
    atoms, box, pixel_size = read_atoms("5NRL"), 16, 34.0
    found = structure_factors(atoms, atoms.atomic_number.double(), box, pixel_size, pad=2)
    position = atoms.position_angstrom.numpy()
    errors, sizes = [], []
    for kx, ky, kz in ((0, 0, 0), (1, 0, 0), (3, -5, 2), (16, 16, -16), (0, -11, 7)):
        phase = np.exp(-1j * np.pi * (position @ np.array([kx, ky, kz])) / (box * pixel_size))
        expected = np.sum(atoms.atomic_number.numpy() * phase)
        errors.append(abs(complex(found[kz + 16, ky + 16, kx]) - expected))
        sizes.append(abs(expected))
    assert max(errors) < 1e-7 * max(sizes)


@pytest.mark.parametrize(("pad", "largest_error"), [(8, 0.003), (3, 0.02), (2, 0.04)])
def test_slices_are_the_transforms_of_the_turned_atoms(pad, largest_error):
    """A molecule as large as the box allows is the hardest."""
    atoms, box, pixel_size = some_atoms(spread_angstrom=7.0), 16, 1.4
    disc = HalfDisc(box)
    rotation = random_rotations(2, named_generator("test/slices", 1))
    found = central_slice(slice_transform(atoms, box, pixel_size, pad), rotation, disc)
    some = torch.randperm(len(disc), generator=named_generator("test/some", 1))[:100]
    expected = torch.tensor(
        [
            [
                reference.structure_factor(
                    atoms.position_angstrom.numpy() / pixel_size,
                    atoms.atomic_number.numpy(),
                    disc.frequency[p].double().numpy() @ turn[:2].double().numpy(),
                    box,
                )
                for p in some
            ]
            for turn in rotation
        ]
    )
    error = (found[:, some] * box - expected).abs().square().mean().sqrt() / expected.abs().square().mean().sqrt()
    assert error < largest_error


def test_a_molecule_larger_than_the_box_is_refused():
    with pytest.raises(
        DataError, match=r"PDB 5NRL: needs \d+ A in every direction, a box of 16 px of 17 A holds 272 A"
    ):
        density(read_atoms("5NRL"), 16, 17.0, 11.0)


def test_the_box_that_the_message_names_is_large_enough():
    atoms = read_atoms("5NRL")
    with pytest.raises(DataError, match="choose a box of 30 px"):
        density(atoms, 28, 17.0, 11.4)
    density(atoms, 30, 17.0, 11.4)
