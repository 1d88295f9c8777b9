"""From the folder of a study to its leaderboard, tables and figures; may be made anew at any time, in mid-study too."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aceray.build import final_box
from aceray.comparison import compare, table_markdown
from aceray.config import Config
from aceray.data.location import location
from aceray.data.manifest import Manifest
from aceray.data.mrc import read_volume
from aceray.data.particles import open_particles
from aceray.data.storage import written_atomically
from aceray.distributed import share
from aceray.distributed.memory import bounded
from aceray.distributed.results import oracle_metrics
from aceray.distributed.run import device_of
from aceray.em.fourier import crop_volume
from aceray.errors import DataError
from aceray.folder import RunFolder, write_json
from aceray.leaderboard import (
    Entry,
    Place,
    Setup,
    agreements,
    criteria_markdown,
    leaderboard_csv,
    leaderboard_markdown,
    number_text,
    ranked_name,
    ranking,
    value_text,
)
from aceray.metrics.fsc import FscCurve, resolution_px
from aceray.presets import load_config
from aceray.study import Dimension, Objective, Study
from aceray.train.evaluate import HALF_MAP_THRESHOLD, in_frame_of
from aceray.train.figures import History
from aceray.train.oracle import OracleProgress
from aceray.train.study_figures import (
    Figure,
    Tile,
    contact_sheet,
    curves_figure,
    importance_figure,
    objective_figure,
    overlay_figure,
    table_figure,
)

OnOracle = Callable[[Path, OracleProgress], None]

FEWEST_FOR_IMPORTANCE = 8
MOST_VALUES_FOR_FANOVA = 20
_MOST_TILES = 48
_MEMBERS = (".", "half_1", "seed_1")


def write_study_results(study: Study, folder: Path, on_oracle: OnOracle | None = None) -> dict[str, Path]:
    """Write leaderboard, tables and figures of a study as far as it is; returns what was written, by name.

    What does not apply any more is removed. The oracle of a data set, which takes a minute or so, is searched once and
    kept in oracle.json; `on_oracle` is told the data set's folder and how far the search is.

    Raises:
        DataError: a file of a trial is damaged, or a result cannot be written.
    """
    entries = read_entries(study, folder)
    places = ranking(entries, study.objective)
    texts = {
        "leaderboard.csv": leaderboard_csv(study, places),
        "leaderboard.md": leaderboard_markdown(study, places),
    }
    _write_texts(folder, texts)
    figures = _draw_figures(study, entries, places)
    if study.table is not None:
        oracle = find_oracles(entries, folder / "oracle.json", on_oracle) if study.table.oracle else {}
        comparison = compare(study, entries, oracle)
        texts["table.md"] = table_markdown(study, comparison, entries, _command(study))
        if any(cell.values for cell in comparison.cells.values()):
            figures["table"] = table_figure(comparison)
    if found := agreements(entries):
        texts["criteria.md"] = criteria_markdown(study, found)
    _write_texts(folder, texts)
    for name in {"table.md", "criteria.md"} - texts.keys():
        (folder / name).unlink(missing_ok=True)
    _write_figures(folder / "figures", figures)
    names = [*texts, "figures", "oracle.json"]
    return {
        Path(name).stem if name.endswith(".md") else name: folder / name for name in names if (folder / name).exists()
    }


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        with written_atomically(folder / name) as file:
            file.write_text(text, encoding="utf-8")


def _write_figures(folder: Path, figures: Mapping[str, Figure]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, figure in figures.items():
        with written_atomically(folder / f"{name}.png") as file:
            figure.savefig(file, format="png")


def _command(study: Study) -> str:
    """A command that makes the study again."""
    return f"aceray tune {study.studies}/{study.name}/study.yaml name=again"


# ---- from the folders


def read_entries(study: Study, folder: Path) -> list[Entry]:
    """The trials of a study's folder in the order of their numbers, whatever became of them.

    Raises:
        DataError: a trial.json or metrics.json is not a JSON object, or lacks what it must have.
    """
    entries = [_read_entry(study, file) for file in sorted((folder / "trials").glob("*/trial.json"))]
    return sorted(entries, key=lambda entry: entry.number)


def _read_entry(study: Study, file: Path) -> Entry:
    found, trial = _read_object(file), file.parent
    run = next((trial / name for name in _MEMBERS if (trial / name / "config.yaml").exists()), None)
    try:
        number, status = int(found["number"]), str(found["status"])
        point = {key: value for key, value in found["point"].items() if key in study.space}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: lacks {error}; delete the trial's folder and resume the study") from None
    metrics: dict[str, Any] = dict(found.get("metrics") or {})
    setup = Setup()
    if run is not None:
        runs = RunFolder(run)
        metrics = _last_values(runs.read_history()) | _read_object(runs.metrics) | metrics
        setup = _setup(runs)
    return Entry(
        number, trial.name, point, status, str(found.get("reason") or ""), float(found.get("seconds") or 0.0),
        {key: float(value) for key, value in metrics.items() if _is_finite(value)}, run, setup,
    )  # fmt: skip


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: is not JSON ({error}); delete it and resume the study") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: holds no JSON object; delete it and resume the study")
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _last_values(history: History) -> dict[str, Any]:
    """The newest value of everything in a journal: what is known of a run that has not ended."""
    found: dict[str, Any] = {}
    for row in history:
        found |= {key: value for key, value in row.items() if value is not None}
    return {"train/steps" if key == "step" else key: value for key, value in found.items()}


def _setup(run: RunFolder) -> Setup:
    config, digest = load_config(str(run.config)), run.read_notes().get("dataset_sha256")
    manifest = _manifest(config)
    if manifest is None or digest not in (None, manifest.sha256):
        return Setup(config.train.steps, config.train.batch, config.data.box, None, digest)
    box = final_box(config, manifest.box)
    cropped = "" if box == manifest.box else f"@{box}"
    return Setup(config.train.steps, config.train.batch, box, manifest.particles, manifest.sha256 + cropped)


def _manifest(config: Config) -> Manifest | None:
    """What the data set says of itself; None when it is not here (any more)."""
    try:
        return Manifest.read(location(config.data.path).expanduser().absolute())
    except DataError:
        return None


# ---- the oracle


def find_oracles(
    entries: Sequence[Entry], cache: Path, on_oracle: OnOracle | None = None
) -> dict[str, dict[str, float]]:
    """The oracle's metrics of the trials' data sets, by `Setup.dataset`; from the cache where it has them.

    Data sets that are not here, or whose truth is not known, have none.
    """
    known: dict[str, Any] = _read_object(cache)
    for entry in entries:
        setup = entry.setup
        if entry.folder is None or setup.dataset is None or setup.particles is None or setup.dataset in known:
            continue
        config = load_config(str(RunFolder(entry.folder).config))
        particles = open_particles(config.data.path)
        if particles.manifest.truth_volume is None or particles.read_truth() is None:
            continue
        box, place = setup.box or particles.manifest.box, share.Place(device=device_of(config))
        stack = share.load(bounded(config, particles), particles, particles.row_groups(), box, place)

        def told(progress: OracleProgress, path: Path = particles.path) -> None:
            if on_oracle is not None:
                on_oracle(path, progress)

        known[setup.dataset] = oracle_metrics(particles, stack, place.device, told)
        write_json(cache, known)
    return {key: {name: value for name, value in found.items() if _is_finite(value)} for key, found in known.items()}


# ---- figures


def _draw_figures(study: Study, entries: Sequence[Entry], places: Sequence[Place]) -> dict[str, Figure]:
    """Every figure that what is known allows, by name."""
    figures: dict[str, Figure] = {}
    of_truth, of_halves = ("fsc", 0.5, "with the truth"), ("half_map_fsc", HALF_MAP_THRESHOLD, "of the half maps")
    for name, threshold, against in (of_truth, of_halves):
        if curves := _curves(places, name, threshold):
            figures["fsc"] = overlay_figure(curves, against)
            break
    if tiles := _tiles(study, places):
        figures["slices"] = contact_sheet(tiles)
    if any(place.rank is not None for place in places):
        figures["objective"] = objective_figure(study, entries)
    if shares := importances(study, entries):
        figures["importance"] = importance_figure(shares)
    table = study.table
    if table is not None and table.curves:
        histories = {entry.number: RunFolder(entry.folder).read_history() for entry in entries if entry.folder}
        if any(metric in row for rows in histories.values() for row in rows for metric in table.curves):
            figures["curves"] = curves_figure(study, table, entries, histories)
    return figures


def _curves(places: Sequence[Place], name: str, threshold: float) -> dict[str, FscCurve]:
    """The FSC curves that trials left in a file of this name, best trial first, with where they cross the threshold."""
    curves = {}
    for place in places:
        file = place.entry.folder / f"{name}.csv" if place.entry.folder else None
        if file is not None and file.exists():
            curve = _read_curve(file)
            size = resolution_px(curve.values, threshold, curve.box)
            curves[f"{ranked_name(place)}: {size:.2f} px"] = curve
    return curves


def _read_curve(file: Path) -> FscCurve:
    try:
        rows = [
            {key: float(value) for key, value in row.items()} for row in csv.DictReader(file.read_text().splitlines())
        ]
        last = rows[-1]
        box = round(last["shell"] / last["frequency_per_px"])
        pixel_size_angstrom = last["frequency_per_px"] / last["frequency_per_angstrom"]
        return FscCurve(torch.tensor([1.0, *(row["fsc"] for row in rows)]), box, pixel_size_angstrom)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{file}: is no table of an FSC ({error}); evaluate the run again (aceray evaluate)") from None


def _tiles(study: Study, places: Sequence[Place]) -> list[list[Tile]]:
    """The volumes of the best trials by data set, in the frame of its truth, or else of the best trial's volume."""
    sets: dict[str | None, list[Place]] = {}
    for place in [place for place in places if _volume_file(place.entry) is not None][:_MOST_TILES]:
        sets.setdefault(place.entry.setup.dataset, []).append(place)
    return [list(_tiles_of_a_set(study, members)) for members in sets.values()]


def _tiles_of_a_set(study: Study, places: Sequence[Place]) -> Iterator[Tile]:
    """The truth, where it is known, and the volumes; each beside the reference at its own box."""
    first = places[0].entry
    common, pixel_size_angstrom = read_volume(_volume_file(first) or "")
    field = pixel_size_angstrom * common.shape[-1]
    if (truth := _true_volume(first)) is not None:
        reference = crop_volume(truth, min(truth.shape[-1], common.shape[-1]))
        common = truth
        yield Tile(f"truth, {_data_folder(first).name}", reference, reference, field / reference.shape[-1])
    for place in places:
        volume = read_volume(_volume_file(place.entry) or "")[0]
        box = min(volume.shape[-1], common.shape[-1])
        volume, reference = crop_volume(volume, box), crop_volume(common, box)
        yield Tile(_title(study, place), in_frame_of(reference, volume)[1], reference, field / box)


def _volume_file(entry: Entry) -> Path | None:
    file = RunFolder(entry.folder).volume if entry.folder else None
    return file if file is not None and file.exists() else None


def _data_folder(entry: Entry) -> Path:
    assert entry.folder is not None
    return Path(load_config(str(RunFolder(entry.folder).config)).data.path)


def _true_volume(entry: Entry) -> Tensor | None:
    if entry.folder is None or entry.setup.particles is None:
        return None
    return open_particles(_data_folder(entry)).read_truth_volume()


def _title(study: Study, place: Place) -> str:
    return f"{ranked_name(place)}: {number_text(place.entry.metrics.get(study.objective[0].metric))}"


def importances(study: Study, entries: Sequence[Entry]) -> dict[str, dict[str, float]]:
    """Share of each dimension in what makes a trial good, by objective.

    Only of objectives that at least eight finished trials have, and that differ between them.
    """
    finished = [entry for entry in entries if entry.status == "finished"]
    shares = {}
    for objective in study.objective:
        known = [place.entry for place in ranking(finished, [objective]) if place.rank is not None]
        if len(known) >= FEWEST_FOR_IMPORTANCE and len({entry.metrics[objective.metric] for entry in known}) > 1:
            shares[objective.metric] = _importance(study, known, objective)
    return shares


def _importance(study: Study, entries: Sequence[Entry], objective: Objective) -> dict[str, float]:
    # Imported here: a run needs no Optuna.
    import optuna
    from optuna import importance

    # fANOVA (Hutter et al. 2014) explains the whole spread, but knows no conditions and takes minutes over hundreds of
    # values; PED-ANOVA (Watanabe et al. 2023) compares the better half of the trials with all of them.
    everywhere = all(key in entry.point for key in study.space for entry in entries)
    few = all(len(dimension.values) <= MOST_VALUES_FOR_FANOVA for dimension in study.space.values())
    evaluator = (
        importance.FanovaImportanceEvaluator(seed=0)
        if everywhere and few
        else importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {key: _distribution(dimension) for key, dimension in study.space.items()}
    rebuilt = optuna.create_study(direction="minimize" if objective.direction == "min" else "maximize")
    for entry in entries:
        params = {key: _parameter(study.space[key], value) for key, value in entry.point.items()}
        rebuilt.add_trial(
            optuna.create_trial(
                params=params,
                distributions={key: spaces[key] for key in params},
                value=entry.metrics[objective.metric],
            )
        )
    shares = importance.get_param_importances(rebuilt, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.integers is not None:
        return IntDistribution(*dimension.integers)
    if dimension.range is not None:
        return FloatDistribution(*dimension.range, log=dimension.log_uniform is not None)
    return CategoricalDistribution(list(dict.fromkeys(value_text(value) for value in dimension.values)))


def _parameter(dimension: Dimension, value: Any) -> Any:
    return value_text(value) if dimension.range is None else value
