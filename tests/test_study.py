"""Studies: which points a space has, what a trial's settings are, and one readable line for every mistake."""

from pathlib import Path

import pytest
import yaml

from aceray.criteria import CRITERIA
from aceray.errors import ConfigError
from aceray.presets import study_names
from aceray.study import (
    MUTABLE,
    Budget,
    Dimension,
    Scheduler,
    Search,
    Study,
    Table,
    applicable,
    config_of,
    grid,
    load_study,
    trial_name,
)

TINY = {"base": ["data/spliceosome_32_clean", "train.steps=10"], "space": {"pip.weight": [0.0, 2.0]}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, **keys: object) -> str:
    """Path of a study like TINY with other keys."""
    (folder / "s.yaml").write_text(yaml.safe_dump({**TINY, **keys}, sort_keys=False))
    return "./s.yaml"


def line_of(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_study(name, *overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_are_valid_and_their_trials_have_names_of_their_own(name: str) -> None:
    study = load_study(name)
    if study.search.kind == "grid":
        names = [trial_name(study, point, number) for number, point in enumerate(grid(study))]
        assert len(set(names)) == len(names) > 0


def test_a_grid_is_every_combination_in_the_order_of_the_file(folder: Path) -> None:
    study = load_study(written(folder, space={"pip.weight": [0.0, 2.0], "seed": [3, 1]}))
    assert grid(study) == [
        {"pip.weight": 0.0, "seed": 3},
        {"pip.weight": 0.0, "seed": 1},
        {"pip.weight": 2.0, "seed": 3},
        {"pip.weight": 2.0, "seed": 1},
    ]


def test_a_condition_keeps_a_dimension_out_of_the_other_points(folder: Path) -> None:
    space = {
        "decoder.kind": ["voxel", "siren"],
        "decoder.width": {"choices": [32, 64], "when": {"decoder.kind": "siren"}},
    }
    study = load_study(written(folder, space=space))
    assert grid(study) == [
        {"decoder.kind": "voxel"},
        {"decoder.kind": "siren", "decoder.width": 32},
        {"decoder.kind": "siren", "decoder.width": 64},
    ]
    config = config_of(study, grid(study)[2])
    assert (config.decoder.kind, config.decoder.width) == ("siren", 64)


def test_a_condition_on_a_condition_that_is_not_met_does_not_apply(folder: Path) -> None:
    space = {
        "pip.weight": [0.0, 2.0],
        "pip.schedule": {"choices": ["constant", "linear"], "when": {"pip.weight": [2.0]}},
        "pip.ramp_steps": {"choices": [10, 20], "when": {"pip.schedule": "linear"}},
    }
    study = load_study(written(folder, space=space))
    assert applicable(study, {"pip.weight": 0.0, "pip.schedule": "linear", "pip.ramp_steps": 10}) == {"pip.weight": 0.0}
    assert len(grid(study)) == 4


def test_presets_come_before_values_and_overrides_of_the_base_win_over_presets(folder: Path) -> None:
    space = {
        "method": {"presets": {"ours": ["method/ace_em"], "none": ["method/ace_em", "method/no_pip"]}},
        "optim.encoder_lr": [1e-5],
    }
    study = load_study(written(folder, space=space))
    config = config_of(study, {"method": "none", "optim.encoder_lr": 1e-5}, "a-trial", "there")
    assert (config.pip.weight, config.optim.encoder_lr, config.train.steps) == (0.0, 1e-5, 10)
    assert (config.name, config.runs) == ("a-trial", "there")


def test_a_whole_filter_schedule_is_one_value(folder: Path) -> None:
    stages = [{"until_step": 4, "filter": 5}, {"until_step": 8, "filter": 3}]
    study = load_study(written(folder, space={"ipi.label_filters": [[], stages]}))
    chosen = config_of(study, grid(study)[1]).ipi.label_filters
    assert [(stage.until_step, stage.filter) for stage in chosen] == [(4, 5), (8, 3)]
    assert len({trial_name(study, point, 0) for point in grid(study)}) == 2


def test_overrides_reach_the_study_its_space_or_the_base(folder: Path) -> None:
    study = load_study(written(folder), "name=other", "space.pip.weight=[1]", "train.steps=7", "space.seed=[1,2]")
    assert study.name == "other"
    assert grid(study) == [{"pip.weight": 1, "seed": 1}, {"pip.weight": 1, "seed": 2}]
    assert config_of(study, grid(study)[0]).train.steps == 7


def test_a_name_does_not_depend_on_what_else_is_in_the_grid(folder: Path) -> None:
    small, large = load_study(written(folder)), load_study(written(folder), "space.pip.weight=[0,1.0,2.0]")
    assert trial_name(small, {"pip.weight": 2.0}, 1) == trial_name(large, {"pip.weight": 2.0}, 2)


def test_a_name_tells_only_what_is_varied(folder: Path) -> None:
    study = load_study(written(folder), "space.seed=[3]")
    assert [trial_name(study, point, 0) for point in grid(study)] == ["weight_0.0", "weight_2.0"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"space": {}}, "space: is empty"),
        ({"space": {"pip.weight": []}}, "space.pip.weight"),
        ({"space": {"pip.wieght": [1.0]}}, "did you mean pip.weight?"),
        ({"space": {"pip.weight": [0.0, -1.0]}}, "pip.weight: should be greater than or equal to 0, found -1.0"),
        ({"space": {"pip.weight": ["much"]}}, "pip.weight"),
        ({"space": {"pip.weight": {"uniform": [2.0, 1.0]}}}, "no range"),
        ({"space": {"pip.weight": {"uniform": [0.0, 1.0]}}}, "a grid needs values"),
        ({"space": {"pip.weight": {"uniform": [-1.0, 1.0]}}, "search": {"kind": "random", "trials": 2}}, "-1"),
        ({"space": {"name": ["a"]}}, "cannot be varied"),
        ({"space": {"pip.weight": {"choices": [1.0], "when": {"seed": 1}}}}, "no dimension further up"),
        ({"space": {"method": {"presets": {"x": ["method/ace"]}}}}, "did you mean method/ace_em?"),
        ({"search": {"kind": "random"}}, "needs a number of trials"),
        ({"search": {"kind": "grid", "trials": 0}}, "search.trials"),
        ({"budget": {"wall_seconds": 0}}, "budget.wall_seconds"),
        ({"objective": "fsc/acu"}, "did you mean fsc/auc?"),
        ({"objective": "select/half_map_fsc_area"}, "set members=half_sets"),
        ({"objective": ["fsc/auc", "train/wall_seconds"]}, "several need search.kind=optuna"),
        ({"scheduler": {"kind": "pbt"}}, "scheduler.mutations: is empty"),
        ({"scheduler": {"kind": "pbt", "mutations": ["train.batch"]}}, ", ".join(MUTABLE)),
        ({"table": {"rows": "method"}}, "table: method is no dimension"),
        ({"serach": {"kind": "grid"}}, "did you mean search?"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(folder: Path, keys: dict, told: str) -> None:
    assert told in line_of(written(folder, **keys))


def test_a_varied_key_cannot_be_overridden_in_the_base(folder: Path) -> None:
    assert "override space.pip.weight" in line_of(written(folder), "pip.weight=1")


def test_an_unknown_study_is_told_with_its_nearest_name() -> None:
    assert "did you mean study/smoke?" in line_of("smok")


def test_the_example_of_the_readme_is_a_study(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "conf" / "study" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "heads.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    study = load_study(str(tmp_path / "heads.yaml"))
    assert (study.name, study.search.trials) == ("heads", 24)
    point = applicable(study, {"method": "no PIP", "pip.weight": 0.5, "seed": 2})
    assert point == {"method": "no PIP", "seed": 2}
    assert config_of(study, point).pip.weight == 0


def test_the_readme_names_every_key_and_every_shipped_study() -> None:
    folder = Path(__file__).parent.parent / "conf" / "study"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    parts = {"search": Search, "scheduler": Scheduler, "budget": Budget, "table": Table, "space": Dimension}
    keys = [*Study.model_fields, *(name for part in parts.values() for name in part.model_fields)]
    assert [key for key in keys if key not in readme] == []
    assert [name for name in CRITERIA if name not in readme and not name.endswith("_median")] == []
    assert [file.stem for file in folder.glob("*.yaml") if f"`{file.stem}`" not in readme] == []
