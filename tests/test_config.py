"""The settings: frozen, bounded, documented, and every file in conf/ is valid."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from aceray.config import Config, SirenDecoder
from aceray.presets import flat, load_config, preset_names, settings

CONF = Path(__file__).parent.parent / "conf"
PRESETS = sorted(file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.rglob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str) -> None:
    assert name in preset_names()
    load_config(name)


def test_base_states_every_default() -> None:
    assert load_config("base") == Config()
    written = yaml.safe_load((CONF / "base.yaml").read_text(encoding="utf-8"))
    stated = {f"{section}.{key}" for section, group in written.items() if isinstance(group, dict) for key in group}
    stated |= {key for key, value in written.items() if not isinstance(value, dict)}
    assert stated == set(flat(Config())), "base.yaml and config.py name different settings"


def test_the_siren_preset_states_every_setting_of_that_decoder() -> None:
    written = yaml.safe_load((CONF / "decoder" / "siren.yaml").read_text(encoding="utf-8"))
    assert set(written["decoder"]) == set(SirenDecoder.model_fields)
    assert load_config("decoder/siren").decoder == SirenDecoder() == load_config("decoder.kind=siren").decoder


def test_every_setting_says_what_it_means() -> None:
    tags = {"encoder.kind", "decoder.kind"}  # the values name themselves
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
