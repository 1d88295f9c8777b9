"""The settings: frozen, bounded, documented, and every file in conf/ is valid."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from aceray.config import Config
from aceray.data.atoms import density, read_atoms
from aceray.networks import SirenDecoder
from aceray.presets import STUDIES, flat, load_config, preset_names, settings

CONF = Path(__file__).parent.parent / "conf"
PRESETS = sorted(
    name
    for file in CONF.rglob("*.yaml")
    if not (name := file.relative_to(CONF).with_suffix("").as_posix()).startswith(STUDIES)
)


def dotted(written: dict, prefix: str = "") -> set[str]:
    """Every setting of a preset by its dotted key."""
    keys: set[str] = set()
    for key, value in written.items():
        keys |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return keys


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str) -> None:
    assert name in preset_names()
    load_config(name)


def test_base_states_every_default() -> None:
    assert load_config("base") == Config()
    written = yaml.safe_load((CONF / "base.yaml").read_text(encoding="utf-8"))
    assert dotted(written) == set(flat(Config())), "base.yaml and config.py name different settings"


def test_the_siren_preset_states_every_setting_of_that_decoder() -> None:
    written = yaml.safe_load((CONF / "decoder" / "siren.yaml").read_text(encoding="utf-8"))
    assert set(written["decoder"]) == set(SirenDecoder.model_fields)
    assert load_config("decoder/siren").decoder == SirenDecoder() == load_config("decoder.kind=siren").decoder


def test_our_best_method_leaves_nothing_to_the_defaults() -> None:
    written = yaml.safe_load((CONF / "method" / "ace_em.yaml").read_text(encoding="utf-8"))
    defaults = yaml.safe_load((CONF / "base.yaml").read_text(encoding="utf-8"))
    for section in ("encoder", "decoder", "ipi", "pip", "optim"):
        assert set(written[section]) == set(defaults[section]), f"method/ace_em must state every setting of {section}"
    assert set(written["train"]) == {"steps", "batch"}


def test_every_setting_says_what_it_means() -> None:
    tags = {"encoder.kind", "decoder.kind", "pip.noise.kind"}  # the values name themselves
    assert [key for key, description in settings().items() if not description and key not in tags] == []


def test_config_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3


def test_the_demo_is_the_issue_set() -> None:
    config = load_config("demo")
    simulation = config.simulation
    assert simulation is not None and simulation.ctf is not None
    assert (simulation.model, simulation.box, simulation.particles, simulation.snr_db) == ("5NRL", 32, 5000, 0.0)
    assert simulation.box * simulation.pixel_size_angstrom == pytest.approx(544)
    assert simulation.shift_sigma_fraction == config.data.shift_sigma_fraction == 0.03
    assert simulation.ctf.defocus_min_angstrom == 8112 and simulation.ctf.defocus_max_angstrom == 38474
    assert (config.name, config.data.path, config.resources.workers) == ("demo", "data/demo", 1)


MOLECULES = {"spliceosome": ("5NRL", 544), "spike": ("pdb:6VYB", 384)}
DECIBELS = {"200db": 200, "clean": 200, "m10db": -10, "m20db": -20, "plain": 0, "": 0}


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("data/sp")])
def test_a_simulated_set_is_what_its_name_says(name: str) -> None:
    config = load_config(name)
    simulation = config.simulation
    assert simulation is not None
    molecule, box, *suffixes = name.removeprefix("data/").split("_")
    model, field_angstrom = MOLECULES[molecule]
    assert (simulation.model, simulation.box, config.data.path) == (model, int(box), name)
    assert simulation.box * simulation.pixel_size_angstrom == field_angstrom
    assert simulation.snr_db == DECIBELS["".join(suffixes[:1])]
    assert (simulation.ctf is None) == bool({"clean", "plain"} & set(suffixes))
    assert simulation.shift_sigma_fraction == config.data.shift_sigma_fraction
    papers = simulation.box == 128
    without = molecule == "spike" or "m20db" in suffixes if papers else simulation.ctf is None
    assert (simulation.shift_sigma_fraction == 0) == without
    assert simulation.particles == (50_000 if papers else 5_000)
    if papers:
        # molmap at 6 A
        assert simulation.density_width_px * simulation.pixel_size_angstrom == pytest.approx(0.225 * 6, rel=1e-3)


@pytest.mark.parametrize("box", [32, 64, 128])
def test_the_ribosome_sets_are_crops_of_one_field_with_the_entrys_microscope(box: int) -> None:
    config = load_config(f"data/like_10028_{box}")
    simulation = config.simulation
    assert simulation is not None and config.data.path == f"data/like_10028_{box}"
    assert simulation.box * simulation.pixel_size_angstrom == pytest.approx(360 * 1.34)
    # a molecule that nobody gave must not be another one
    assert simulation.model == "80s.cif"
    assert simulation.shift_sigma_fraction == config.data.shift_sigma_fraction > 0
    # a Fourier crop keeps the noise and raises what it leaves of the signal by the ratio of the pixels
    most = -10 + 20 * math.log10(128 / box)
    assert most - 1.1 <= simulation.snr_db <= most + 0.1
    if box == 128:
        assert (simulation.ctf, simulation.particles) == (None, 105_247) and simulation.ctf_table
        assert simulation.density_width_px * simulation.pixel_size_angstrom == pytest.approx(1.35, rel=1e-3)
    else:
        assert simulation.ctf_table is None and simulation.ctf is not None
        assert simulation.ctf.spherical_aberration_mm == 2.0


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("data/spliceosome")])
def test_the_field_of_view_holds_the_spliceosome(name: str) -> None:
    simulation = load_config(name).simulation
    assert simulation is not None
    atoms, field_angstrom = read_atoms(simulation.model), simulation.box * simulation.pixel_size_angstrom
    volume = density(atoms, 32, field_angstrom / 32, simulation.density_width_px * simulation.pixel_size_angstrom)
    assert float(volume.sum()) == pytest.approx(float(atoms.atomic_number.sum(dtype=torch.float64)), rel=1e-6)
