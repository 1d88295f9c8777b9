"""Presets and overrides: how they merge, what a value may be, and one readable line for every mistake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aceray.errors import ConfigError
from aceray.presets import flat, load_config, merge, to_yaml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a conf/ folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    return tmp_path


def line_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(*arguments)
    line = str(raised.value)
    assert "\n" not in line
    return line


def test_presets_merge_left_to_right_and_overrides_win(folder: Path) -> None:
    (folder / "conf" / "a.yaml").write_text("seed: 5\npip: {weight: 0.5}\n")
    (folder / "conf" / "b.yaml").write_text("pip: {weight: 0.25, warmup_steps: 7}\n")
    config = load_config("pip.warmup_steps=9", "a", "b")
    assert (config.seed, config.pip.weight, config.pip.warmup_steps) == (5, 0.25, 9)
    assert load_config("b", "a").pip.weight == 0.5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.encoder_lr=1e-3", "optim.encoder_lr", 1e-3),
        ("seed=0", "seed", 0),
        ("train.lanes=null", "train.lanes", None),
        ("train.lanes=", "train.lanes", None),
        ("pip.weight=0", "pip.weight", 0.0),
        ("ipi.augment=false", "ipi.augment", False),
        ("train.steps=1e3", "train.steps", 1000),
        ("optim.betas=[0.5, 0.9]", "optim.betas", [0.5, 0.9]),
        ("runs=a=b", "runs", "a=b"),
        ("runs=no", "runs", "no"),
        ("name='1e-3'", "name", "1e-3"),
        ("name=007", "name", "007"),
        ("name=5NRL_2026-11-22", "name", "5NRL_2026-11-22"),
    ],
)
def test_override_values(override: str, key: str, value: object) -> None:
    found = flat(load_config(override))[key]
    assert found == value and type(found) is type(value)


def test_null_removes_a_section() -> None:
    assert load_config("demo").simulation is not None
    assert load_config("demo", "simulation=null").simulation is None
    assert load_config("demo", "simulation.ctf=null").simulation.ctf is None


def test_another_kind_replaces_the_section_whatever_the_order() -> None:
    for arguments in (["encoder.kind=resnet18", "encoder.heads=2"], ["encoder.heads=2", "encoder.kind=resnet18"]):
        encoder = load_config(*arguments).encoder
        assert (encoder.kind, encoder.heads) == ("resnet18", 2)
        assert not hasattr(encoder, "width")
    assert load_config("encoder.kind=mlp", "encoder.width=64").encoder.width == 64


def test_merge_leaves_its_arguments_alone() -> None:
    below = {"a": {"b": 1, "c": 2}}
    assert merge(below, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert below == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    "arguments", [["demo"], ["seed=2"], ["method/ace_em_voxel", "name='1e-3'", "optim.encoder_lr=1e-5"]]
)
def test_saved_settings_are_a_preset_again(folder: Path, arguments: list[str]) -> None:
    config = load_config(*arguments)
    (folder / "saved.yaml").write_text(to_yaml(config))
    assert load_config("saved.yaml") == config


def test_settings_know_the_presets_that_were_given(folder: Path) -> None:
    assert load_config("seed=2").presets == load_config("base").presets == ()
    assert load_config("demo", "seed=2", "method/ace_em_voxel").presets == ("demo", "method/ace_em_voxel")
    (folder / "mine.yaml").write_text("include: [demo]\nseed: 3\n")
    assert load_config("mine.yaml").presets == ("mine.yaml",)


def test_saved_settings_stand_for_the_presets_they_came_from(folder: Path) -> None:
    (folder / "saved.yaml").write_text(to_yaml(load_config("demo", "method/ace_em_voxel")))
    assert load_config("saved.yaml", "decoder/siren").presets == ("demo", "method/ace_em_voxel", "decoder/siren")
    (folder / "plain.yaml").write_text(to_yaml(load_config("seed=2")))
    assert load_config("plain.yaml").presets == ()
    # written before presets were recorded
    (folder / "older.yaml").write_text(to_yaml(load_config("demo")).replace("presets:\n- demo\n", ""))
    assert load_config("older.yaml").presets == ("older.yaml",)


def test_own_presets_come_before_the_shipped_ones(folder: Path) -> None:
    assert load_config("demo").name == "demo"
    (folder / "conf" / "demo.yaml").write_text("name: mine\n")
    assert load_config("demo").name == "mine"


def test_include_is_merged_below(folder: Path) -> None:
    (folder / "conf" / "low.yaml").write_text("seed: 3\nname: low\n")
    (folder / "conf" / "high.yaml").write_text("include: low\nname: high\npip.weight: 0.5\n")
    config = load_config("high")
    assert (config.seed, config.name, config.pip.weight) == (3, "high", 0.5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["optim.lerning_rate=1"], "optim.lerning_rate: unknown setting; did you mean optim.encoder_lr?"),
        (["pip.wieght=1"], "pip.wieght: unknown setting; did you mean pip.weight?"),
        (["batch=3"], "batch: unknown setting; did you mean train.batch?"),
        (["optimizer.lr=1"], "optimizer: unknown setting; did you mean optim?"),
        (["deom"], "deom: no such preset or YAML file; did you mean demo?"),
        (["encoder.kind=vit"], "encoder.kind: found 'vit'; choose one of 'mlp', 'resnet18', 'vgg', 'cnn'"),
        (["name=a/b"], "name: should match pattern"),
        (["name=7"], "name: should be a valid string, found 7"),
    ],
)
def test_mistakes(arguments: list[str], line: str) -> None:
    assert line_of(*arguments).startswith(line)


@pytest.mark.parametrize("value", ["high", "nan", ".nan", ".inf", "null", "[1]"])
def test_an_snr_that_is_not_a_number(value: str) -> None:
    line = line_of("demo", f"simulation.snr_db={value}")
    assert line.startswith("simulation.snr_db: should be a") and "10 log10" in line


def test_unknown_leaf_without_a_likeness_lists_the_section() -> None:
    assert line_of("train.epochs=1").startswith("train.epochs: unknown setting; known here: train.steps, train.batch")


def test_a_setting_of_another_kind() -> None:
    assert "encoder.width: not a setting of kind resnet18" in line_of("encoder.kind=resnet18", "encoder.width=3")


def test_bounds_and_contradictions() -> None:
    assert line_of("train.steps=0").startswith("train.steps: should be greater than or equal to 1, found 0")
    assert line_of("optim.clip_norm=0").startswith("optim.clip_norm: should be greater than 0, found 0")
    assert line_of("data.box=33").startswith("data.box: should be a multiple of 2, found 33")
    assert line_of("pip.combination=convex", "pip.weight=2").startswith("pip: weight 2.0 exceeds 1")
    falling = ("pip.combination=convex", "pip.weight=0.5", "pip.schedule=linear", "pip.initial_factor=3")
    assert line_of(*falling).startswith("pip: weight 1.5 exceeds 1")
    assert line_of("pip.shifts=matched").startswith("config: pip.shifts=matched needs ipi.train_shift=true")
    late = "ipi.label_filters=[{until_step: 9, filter: 4}, {until_step: 9, filter: 3}]"
    assert line_of(late).startswith("ipi: label_filters end at steps [9, 9], which must ascend")
    assert line_of("ipi.label_filters=[{until_step: 9, filter: 6}]").startswith(
        "ipi.label_filters[0].filter: should be"
    )
    assert line_of("demo", "simulation.ctf.defocus_min_angstrom=30000").startswith("simulation.ctf: defocus_min")


def test_many_mistakes_are_still_one_line() -> None:
    line = line_of("train.steps=0", "seed=-1", "train.batch=x", "data.path=3", "foo=1")
    assert line.count("; ") == 3 and line.endswith("and 2 more")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "optim: {lerning_rate: 1}",
            "optim.lerning_rate: unknown setting (in conf/bad.yaml); did you mean optim.encoder",
        ),
        ("seed: -1", "seed: should be greater than or equal to 0, found -1 (in conf/bad.yaml)"),
        ("seed: 1\npip: [", "conf/bad.yaml, line 2: not valid YAML"),
        ("seed: 1\nseed: 2", "conf/bad.yaml: not valid YAML (seed stands twice)"),
        ("- seed", "conf/bad.yaml: a preset is lines of `setting: value`, but this is a list"),
        ("include: bad", "conf/bad.yaml: includes itself"),
        ("presets: 3", "presets[0]: should be a valid string, found 3"),
        ("include: nothing/here", "nothing/here: no such preset"),
    ],
)
def test_mistakes_name_the_file(folder: Path, text: str, line: str) -> None:
    (folder / "conf" / "bad.yaml").write_text(text)
    assert line_of("bad").startswith(line)


def test_presets_travel_with_the_package(tmp_path: Path) -> None:
    """A package laid out as the wheel lays it out finds `demo` in any folder."""
    root = Path(__file__).parent.parent
    site = tmp_path / "site"
    shutil.copytree(root / "aceray", site / "aceray", ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    shutil.copytree(root / "conf", site / "aceray" / "conf")
    code = "from aceray.presets import load_config; print(load_config('demo').name)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "demo"
    assert 'conf = "aceray/conf"' in (root / "pyproject.toml").read_text(encoding="utf-8")
