"""A study: what its trials differ in, how the next one is chosen, what counts as better. No Ray, no data, no clock.

A study is a YAML file. `base` are presets and overrides as for `aceray train`, `space` has one entry for everything
that is varied, by dotted key. `load_study` checks every key and value against the typed settings before anything runs.
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from aceray.config import Config
from aceray.criteria import CRITERIA
from aceray.errors import ConfigError
from aceray.presets import load_config, read_preset, settings, suggestion, with_overrides
from aceray.schema import Model

Point = dict[str, Any]
"""What a trial was given: the value of every dimension of the space that applies to it; for presets their label."""

# What a schedule may change in the middle of a run: nothing that has a shape or decides what is sampled.
MUTABLE = ("pip.weight", "pip.shift_weight", "ipi.shift_l1_weight", "optim.encoder_lr", "optim.decoder_lr")
# The study gives trials their names and folders.
_RESERVED = ("name", "runs", "seeds", "tracking", "resources")
_MOST_POINTS_CHECKED = 512


class Dimension(Model):
    """What is varied under one key: some values, a range, or named groups of presets and overrides.

    In YAML a bare list stands for `choices`. `when` names dimensions further up and the values of them (one or a list)
    under which this one applies; elsewhere the base's value stays.
    """

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="values")
    uniform: tuple[float, float] | None = Field(None, description="a number between these two")
    log_uniform: tuple[float, float] | None = Field(None, description="a number, its logarithm uniform")
    integers: tuple[int, int] | None = Field(None, description="an integer from the first to the second, both included")
    presets: dict[str, tuple[str, ...]] | None = Field(
        None, min_length=1, description="label: presets and overrides, as for `aceray train`"
    )
    when: dict[str, Any] = Field(default_factory=dict, description="values of earlier dimensions that ask for this one")

    @model_validator(mode="before")
    @classmethod
    def _list_of_values(cls, found: Any) -> Any:
        return {"choices": found} if isinstance(found, list | tuple) else found

    @model_validator(mode="after")
    def _one_kind(self) -> "Dimension":
        kinds = [name for name in ("choices", "uniform", "log_uniform", "integers", "presets") if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError("give one of choices (or a bare list), uniform, log_uniform, integers, presets")
        if self.range is not None:
            low, high = self.range
            if low >= high or (self.log_uniform and low <= 0):
                raise ValueError(f"{kinds[0]}: {low:g} to {high:g} is no range")
        return self

    @property
    def range(self) -> tuple[float, float] | tuple[int, int] | None:
        """The ends of a range; None for a list of values."""
        return self.uniform or self.log_uniform or self.integers

    @property
    def values(self) -> tuple[Any, ...]:
        """All values, those of presets being their labels; of a range its two ends."""
        return self.choices or tuple(self.presets or ()) or self.range or ()


class Search(Model):
    """How the next trial is chosen."""

    kind: Literal["grid", "random", "optuna"] = Field(
        "grid", description="every combination; random points; or Optuna's TPE, which learns from the trials before"
    )
    trials: int | None = Field(None, ge=1, le=100_000, description="how many; null: all of a grid")
    seed: int = Field(1, ge=0, description="seed of random and optuna")
    concurrent: int | None = Field(None, ge=1, description="trials at once at most; null: what the cluster can")
    gpus_per_trial: float | None = Field(
        None, gt=0, le=1, description="share of a GPU for each trial in one process; null: a whole one if there is one"
    )

    @model_validator(mode="after")
    def _counted(self) -> "Search":
        if self.kind != "grid" and self.trials is None:
            raise ValueError(f"kind {self.kind} needs a number of trials")
        return self


class Scheduler(Model):
    """Which trials are stopped early, or changed in the middle."""

    kind: Literal["none", "asha", "median", "pbt"] = Field(
        "none", description="none; ASHA; stop below the median; population-based training"
    )
    grace_steps: int = Field(200, ge=1, description="asha, median: steps that every trial may make")
    reduction_factor: int = Field(3, ge=2, le=10, description="asha: one of so many goes on at each rung")
    perturb_steps: int = Field(200, ge=1, description="pbt: steps between two exchanges")
    mutations: tuple[str, ...] = Field((), description="pbt: keys of the space that it may change in mid-run")


class Objective(Model):
    """What counts as better."""

    metric: str = Field(description="key of metrics.json")
    mode: Literal["min", "max"] | None = Field(None, description="null: as is usual for the metric")

    @model_validator(mode="before")
    @classmethod
    def _bare_metric(cls, found: Any) -> Any:
        return {"metric": found} if isinstance(found, str) else found

    @property
    def direction(self) -> Literal["min", "max"]:
        """Which way is better."""
        return self.mode or CRITERIA[self.metric].mode


class Budget(Model):
    """When the study ends, whatever is left of it."""

    wall_seconds: float | None = Field(None, gt=0, description="no trial is started or goes on after so many seconds")


class Table(Model):
    """The comparison a study prints: two dimensions as rows and columns, the rest averaged over."""

    rows: str = Field(description="dimension whose values are the rows")
    columns: str | None = Field(None, description="dimension whose values are the columns; null: metrics alone")
    metrics: tuple[str, ...] = Field(
        ("fsc/resolution_px_0.5", "pose/rotation_sqfrob_mean", "pose/rotation_sqfrob_median"),
        min_length=1,
        description="metrics in each cell",
    )
    oracle: bool = Field(False, description="add the row of the oracle, for simulated sets")
    curves: tuple[str, ...] = Field((), description="metrics drawn over the steps, one colour a row")
    paper_caption: str = Field("", description="where the paper's numbers are from, and what differs from these trials")
    paper: dict[str, dict[str, dict[str, float]]] = Field(
        default_factory=dict, description="row, column, metric: what the paper prints"
    )


class Study(Model):
    """A study, whole."""

    name: str = Field(
        "study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name of the study and of its folder"
    )
    studies: str = Field("studies", min_length=1, description="folder that holds the folders of studies")
    description: str = Field("", description="what the study asks")
    base: tuple[str, ...] = Field((), description="presets and overrides that all trials share")
    space: dict[str, Dimension] = Field(description="what the trials differ in")
    search: Search = Field(default_factory=Search, description="how the next trial is chosen")
    scheduler: Scheduler = Field(default_factory=Scheduler, description="which trials are stopped early")
    objective: tuple[Objective, ...] = Field(
        (Objective(metric="fsc/auc", mode=None),),
        min_length=1,
        description="what counts as better; several with optuna",
    )
    members: Literal["one", "half_sets", "two_seeds"] = Field(
        "one", description="runs of a trial: one; one on each half set; or two that differ in their seed"
    )
    budget: Budget = Field(default_factory=Budget, description="when the study ends")
    table: Table | None = Field(None, description="the comparison it prints")

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, found: Any) -> Any:
        if isinstance(found, dict) and isinstance(found.get("objective"), str | dict):
            return {**found, "objective": (found["objective"],)}
        return found


# ---- from YAML


def load_study(name: str, *overrides: str) -> Study:
    """Read a study (`study/smoke`, or a path) and check it whole.

    An override of one of the study's own keys (`search.trials=4`, `space.pip.weight=[0,1]`) changes the study, any
    other (`train.steps=500`) is added to its base.

    Raises:
        ConfigError: one line with the key, what was found and what is known.
    """
    found = read_preset(name if "/" in name or name.endswith((".yaml", ".yml")) else f"study/{name}")
    if not isinstance(space := found.get("space"), dict) or not space:
        raise ConfigError(f"{name}: space: is empty, so there is nothing to compare; give it a key with some values")
    own = [override for override in overrides if override.split("=")[0].split(".")[0] in Study.model_fields]
    shared = [override for override in overrides if override not in own]
    for override in shared:
        if (key := override.split("=")[0]) in space:
            raise ConfigError(f"{key}: is varied in this study; override space.{key}, for example space.{override}")
    found = _with_own(found, own)
    found["base"] = [*_listed(found.get("base", [])), *shared]
    try:
        study = Study.model_validate(found)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_one_line(error)}") from error
    _check(study, name)
    return study


def _with_own(found: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The study with overrides of its own keys; a key of the space has dots of its own."""
    for override in overrides:
        key, _, text = override.partition("=")
        if key.startswith("space."):
            value = with_overrides({}, f"value={text}")["value"]
            found = {**found, "space": {**found["space"], key.removeprefix("space."): value}}
        else:
            found = with_overrides(found, override)
    return found


def _listed(found: Any) -> list[Any]:
    return [found] if isinstance(found, str) else list(found)


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(Study.model_fields)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        return f"{key}: unknown key of a study; " + (f"did you mean {close[0]}?" if close else f"known: {known}")
    return f"{key}: {first['msg'].removeprefix('Value error, ')}, found {first['input']!r}"


# ---- points


def grid(study: Study) -> list[Point]:
    """Every combination of the space's values, in the order of the file, conditions applied, none twice."""
    product = itertools.product(*(dimension.values for dimension in study.space.values()))
    points: list[Point] = []
    for values in product:
        point = applicable(study, dict(zip(study.space, values, strict=True)))
        if point not in points:
            points.append(point)
    return points


def applicable(study: Study, point: Mapping[str, Any]) -> Point:
    """The point without the dimensions whose `when` it does not meet."""
    kept: Point = {}
    for key, dimension in study.space.items():
        if key in point and all(kept.get(name) in _listed_value(want) for name, want in dimension.when.items()):
            kept[key] = point[key]
    return kept


def _listed_value(want: Any) -> list[Any]:
    return want if isinstance(want, list) else [want]


def suggested_point(study: Study, trial: Any) -> Point:
    """The point of a trial of Optuna, asked for every dimension that applies; asked again it answers the same."""
    point: Point = {}
    for key, dimension in study.space.items():
        if key in applicable(study, {**point, key: None}):
            point[key] = _suggested(trial, key, dimension)
    return point


def _suggested(trial: Any, key: str, dimension: Dimension) -> Any:
    if dimension.range is None:
        # as text, for a value may be a whole schedule and 1 is not true
        texts = [json.dumps(value) for value in dimension.values]
        return dimension.values[texts.index(trial.suggest_categorical(key, texts))]
    low, high = dimension.range
    if dimension.integers:
        return trial.suggest_int(key, int(low), int(high))
    return trial.suggest_float(key, low, high, log=dimension.log_uniform is not None)


def config_of(study: Study, point: Mapping[str, Any], name: str = "trial", runs: str = "runs") -> Config:
    """The settings of a trial: base, then the presets, then the values of its point.

    Raises:
        ConfigError: a value is out of bounds, or the values contradict one another.
    """
    presets, values = list(study.base), []
    for key, value in point.items():
        if (labelled := study.space[key].presets) is not None:
            presets += labelled[value]
        else:
            values.append(f"{key}={json.dumps(value)}")
    return load_config(*presets, *values, f"name={json.dumps(name)}", f"runs={json.dumps(runs)}")


def trial_name(study: Study, point: Mapping[str, Any], number: int) -> str:
    """Name of a trial and of its folder, the same whenever the study is continued: its values, or its number."""
    if study.search.kind != "grid":
        return f"t{number:04d}"
    # a value that all trials share, or that follows from the others, tells nothing
    varied = [key for key in point if len(study.space[key].values) > 1]
    words = [_word(study, key, point[key]) for key in varied or point]
    return "-".join(words)[:100].rstrip("-._") or "trial"


def _word(study: Study, key: str, value: Any) -> str:
    label = "" if study.space[key].presets is not None else key.rpartition(".")[2]
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.]+", "_", f"{label}_{text}").strip("_")


# ---- checks


def _check(study: Study, where: str) -> None:
    known = settings()
    for index, (key, dimension) in enumerate(study.space.items()):
        if dimension.presets is None and key.split(".")[0] in _RESERVED:
            raise ConfigError(f"{where}: space.{key}: cannot be varied; the study sets it for each trial")
        if dimension.presets is None and key not in known:
            raise ConfigError(f"{where}: space.{key}: unknown setting; {suggestion(key)}")
        earlier = list(study.space)[:index]
        for name in dimension.when:
            if name not in earlier:
                raise ConfigError(f"{where}: space.{key}.when: {name} is no dimension further up; known: {earlier}")
    _check_search(study, where)
    _check_objective(study, where)
    _check_table(study, where)
    for point in _points_to_check(study):
        if (seeds := config_of(study, point).seeds) > 1:
            raise ConfigError(f"{where}: seeds: a trial is one start, found {seeds}; vary seed instead (space.seed)")


def _points_to_check(study: Study) -> Iterator[Point]:
    """Every point of a small grid; of a large one, or of ranges, every value at least once."""
    count = 1
    for dimension in study.space.values():
        count *= len(dimension.values)
    if count <= _MOST_POINTS_CHECKED:
        yield from grid(study)
        return
    first = {key: dimension.values[0] for key, dimension in study.space.items()}
    for key, dimension in study.space.items():
        asked = {name: _listed_value(want)[0] for name, want in dimension.when.items()}
        for value in dimension.values:
            yield applicable(study, {**first, **asked, key: value})


def _check_search(study: Study, where: str) -> None:
    ranges = [key for key, dimension in study.space.items() if dimension.range is not None]
    if study.search.kind == "grid" and ranges:
        raise ConfigError(
            f"{where}: space.{ranges[0]}: a grid needs values, not a range; give a list, or search.kind=random"
        )
    if study.scheduler.kind != "none" and len(study.objective) > 1:
        raise ConfigError(f"{where}: scheduler.kind: {study.scheduler.kind} compares by one objective, found several")
    if len(study.objective) > 1 and study.search.kind != "optuna":
        raise ConfigError(f"{where}: objective: several need search.kind=optuna, found {study.search.kind}")
    if study.scheduler.kind != "pbt":
        return
    if study.search.kind == "optuna":
        raise ConfigError(f"{where}: scheduler.kind: pbt chooses new values itself; use search.kind=grid or random")
    if study.members != "one":
        raise ConfigError(f"{where}: scheduler.kind: pbt exchanges single runs, found members={study.members}")
    if not study.scheduler.mutations:
        raise ConfigError(f"{where}: scheduler.mutations: is empty; name what pbt may change, of {list(MUTABLE)}")
    for key in study.scheduler.mutations:
        if key not in study.space or key not in MUTABLE:
            raise ConfigError(
                f"{where}: scheduler.mutations: {key} must be in the space and be one of {', '.join(MUTABLE)}"
            )


def _check_objective(study: Study, where: str) -> None:
    for objective in study.objective:
        if objective.metric not in CRITERIA:
            close = difflib.get_close_matches(objective.metric, CRITERIA, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(CRITERIA)}"
            raise ConfigError(f"{where}: objective: unknown metric {objective.metric}; {hint}")
        needs = CRITERIA[objective.metric].needs
        if needs in ("half_sets", "two_seeds") and study.members != needs:
            raise ConfigError(f"{where}: objective: {objective.metric} compares two runs; set members={needs}")


def _check_table(study: Study, where: str) -> None:
    if study.table is None:
        return
    for name in (study.table.rows, study.table.columns):
        if name is not None and name not in study.space:
            raise ConfigError(f"{where}: table: {name} is no dimension of the space; known: {', '.join(study.space)}")
