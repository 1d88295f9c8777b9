"""What a study found, in words and numbers: its trials in order, and which criterion to trust. No files.

A trial that failed has no place: what it measured before it broke is shown, not compared.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aceray.criteria import CRITERIA
from aceray.study import Objective, Point, Study

LABELS = {
    "fsc/resolution_px_0.5": "resolution, FSC 0.5 (px)",
    "fsc/resolution_px_0.143": "resolution, FSC 0.143 (px)",
    "fsc/auc": "FSC area",
    "pose/rotation_sqfrob_mean": "rotation error, mean (of 8)",
    "pose/rotation_sqfrob_median": "rotation error, median (of 8)",
    "pose/rotation_sqfrob_mean_best_of_30": "rotation error, mean, best of 30",
    "pose/rotation_sqfrob_median_best_of_30": "rotation error, median, best of 30",
    "pose/fraction_below_half": "rotation errors below 0.5 (share)",
    "pose/shift_sq_px_mean": "shift error, mean square (px²)",
    "pose/coverage": "view coverage (share)",
    "refine/moved": "poses moved (share)",
    "refine/energy": "unexplained after refinement (share)",
    "train/steps": "steps",
    "train/wall_seconds": "wall time (s)",
}
SHOWN = (
    "fsc/resolution_px_0.5",
    "pose/rotation_sqfrob_mean",
    "pose/rotation_sqfrob_median",
    "pose/coverage",
    "train/steps",
)
TRUE_CRITERIA = ("pose/rotation_sqfrob_mean", "fsc/auc")
LABEL_FREE = (
    "select/",
    "refine/energy",
    "refine/half_map_resolution_px",
    "train/loss_",
    "pose/coverage",
    "pose/view_entropy",
)
FEWEST_FOR_CORRELATION = 8
_FEWEST_OF_A_SET = 4
_LARGER_IS_BETTER = ("_below_half", "_area", "_agreement")
MISSING = "—"


@dataclass(frozen=True)
class Setup:
    """What a trial ran on and how long; None where it is not known."""

    steps: int | None = None
    batch: int | None = None
    box: int | None = None
    particles: int | None = None
    dataset: str | None = None
    """Digest of the particles, with the box they were cropped to if they were."""


@dataclass(frozen=True)
class Entry:
    """A trial as its folder tells it; the metrics are its last or final ones, finite numbers only."""

    number: int
    name: str
    point: Point
    status: str
    reason: str = ""
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    """Folder of the trial's first run."""
    setup: Setup = Setup()

    @property
    def outcome(self) -> str:
        """Status and why."""
        return f"{self.status}: {self.reason}" if self.reason else self.status


def label(metric: str) -> str:
    """A metric in words, with its unit."""
    return LABELS.get(metric, metric)


def value_text(value: Any) -> str:
    """A value of a point as it is written in tables and figures."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def point_text(entry: Entry, key: str) -> str:
    """A trial's value of a dimension as text; a dash where the dimension does not apply."""
    return value_text(entry.point[key]) if key in entry.point else MISSING


def number_text(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where that reads well."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value) or abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


# ---- places


@dataclass(frozen=True)
class Place:
    """A trial with its rank; None without one. Of several objectives, those of rank 1 are the Pareto front."""

    entry: Entry
    rank: int | None


def ranked_name(place: Place) -> str:
    """A trial's name behind its rank."""
    return place.entry.name if place.rank is None else f"{place.rank}. {place.entry.name}"


def ranking(entries: Iterable[Entry], objectives: Sequence[Objective]) -> list[Place]:
    """The trials, best first, then those without an objective; the rank is 1 + the number of trials that are better.

    Better is: nowhere worse, somewhere better (Fonseca and Fleming 1993). Equals stand in the order of their numbers.
    """
    entries = list(entries)
    costs = {entry.number: _costs(entry, objectives) for entry in entries}
    compared = [cost for cost in costs.values() if cost is not None]

    def place(entry: Entry) -> Place:
        cost = costs[entry.number]
        return Place(entry, None if cost is None else 1 + sum(_dominates(other, cost) for other in compared))

    def order(place: Place) -> tuple[float, tuple[float, ...], int]:
        return float(place.rank or math.inf), costs[place.entry.number] or (), place.entry.number

    return sorted((place(entry) for entry in entries), key=order)


def _costs(entry: Entry, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """The objectives, the smaller the better; None when one is missing or the trial failed."""
    values = [entry.metrics.get(objective.metric) for objective in objectives]
    if entry.status == "failed" or any(value is None or not math.isfinite(value) for value in values):
        return None
    signs = [1 if objective.direction == "min" else -1 for objective in objectives]
    return tuple(sign * value for sign, value in zip(signs, values, strict=True) if value is not None)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def leaderboard_csv(study: Study, places: Sequence[Place]) -> str:
    """The leaderboard for machines: all digits, the keys of settings and metrics as heads of the columns."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    metrics = _metrics_shown(study)
    writer.writerow(["rank", "trial", "status", "reason", *study.space, *metrics, "seconds"])
    for place in places:
        entry = place.entry
        point = [_exact(entry.point.get(key, "")) for key in study.space]
        values = [entry.metrics.get(metric, "") for metric in metrics]
        rank = "" if place.rank is None else place.rank
        writer.writerow([rank, entry.name, entry.status, entry.reason, *point, *values, entry.seconds])
    return stream.getvalue()


def leaderboard_markdown(study: Study, places: Sequence[Place]) -> str:
    """The leaderboard for readers; of several objectives, a star marks the Pareto front."""
    metrics, several = _metrics_shown(study), len(study.objective) > 1
    head = ["rank", "trial", "status", *study.space, *(label(metric) for metric in metrics), "time (s)"]
    rows = []
    for place in places:
        entry = place.entry
        rank = MISSING if place.rank is None else f"{place.rank} ★" if several and place.rank == 1 else str(place.rank)
        point = [point_text(entry, key) for key in study.space]
        values = [number_text(entry.metrics.get(metric), 4) for metric in metrics]
        rows.append([rank, entry.name, entry.outcome, *point, *values, f"{entry.seconds:.0f}"])
    better = ", ".join(f"{label(each.metric)} ({each.direction})" for each in study.objective)
    text = f"# {study.name}: leaderboard\n\n" + paragraph(study.description)
    text += f"Ordered by {better}. {_counted(places)}\n"
    if several:
        text += "★: no trial is better in one of these without being worse in another (the Pareto front).\n"
    return f"{text}\n{markdown_table(head, rows)}"


def _metrics_shown(study: Study) -> list[str]:
    return list(dict.fromkeys([*(objective.metric for objective in study.objective), *SHOWN]))


def _counted(places: Sequence[Place]) -> str:
    found = [place.entry.status for place in places]
    parts = ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))
    return f"{len(places)} trials: {parts}." if places else "No trials yet."


def _exact(value: Any) -> Any:
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


def paragraph(text: str) -> str:
    """The text as a paragraph of Markdown; nothing for none."""
    return f"{text}\n\n" if text else ""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what would break a cell is escaped."""
    lines = [[_escaped(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    for symbol in ("\\", "|", "*", "`", "<"):
        text = text.replace(symbol, f"\\{symbol}")
    return " ".join(text.split())


# ---- which criterion to trust


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of a label-free criterion with true ones, 1 where both order the trials alike.

    `overall` over all trials, `within` as the mean over data sets, weighted by their trials; None where there are too
    few trials or all are equal.
    """

    criterion: str
    mode: Literal["min", "max"]
    trials: int
    overall: dict[str, float | None]
    within: dict[str, float | None]


def agreements(entries: Iterable[Entry]) -> list[Agreement]:
    """How well each label-free criterion of the trials orders them, where at least eight have it and the truth."""
    known = [entry for entry in entries if entry.status in ("finished", "stopped")]
    known = [entry for entry in known if all(truth in entry.metrics for truth in TRUE_CRITERIA)]
    criteria = sorted({key for entry in known for key in entry.metrics if key.startswith(LABEL_FREE)})
    found = []
    for criterion in criteria:
        having = [entry for entry in known if criterion in entry.metrics]
        if len(having) < FEWEST_FOR_CORRELATION:
            continue
        overall = {truth: _agreement(having, criterion, truth) for truth in TRUE_CRITERIA}
        within = {truth: _within_sets(having, criterion, truth) for truth in TRUE_CRITERIA}
        found.append(Agreement(criterion, usual_mode(criterion), len(having), overall, within))
    return found


def usual_mode(metric: str) -> Literal["min", "max"]:
    """Which way a metric is better: as studies have it, else by its name; losses and errors are small."""
    if metric in CRITERIA:
        return CRITERIA[metric].mode
    return "max" if metric.endswith(_LARGER_IS_BETTER) else "min"


def _agreement(entries: Sequence[Entry], criterion: str, truth: str) -> float | None:
    correlation = spearman([e.metrics[criterion] for e in entries], [e.metrics[truth] for e in entries])
    same = usual_mode(criterion) == usual_mode(truth)
    return correlation if same or correlation is None else -correlation


def _within_sets(entries: Sequence[Entry], criterion: str, truth: str) -> float | None:
    total, trials = 0.0, 0
    for dataset in {entry.setup.dataset for entry in entries}:
        members = [entry for entry in entries if entry.setup.dataset == dataset]
        value = _agreement(members, criterion, truth) if len(members) >= _FEWEST_OF_A_SET else None
        if value is not None:
            total, trials = total + len(members) * value, trials + len(members)
    return total / trials if trials else None


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equals sharing their mean rank; None when all of one side are equal."""
    ranks = [_ranks(left), _ranks(right)]
    centred = [[rank - (len(side) + 1) / 2 for rank in side] for side in ranks]
    power = math.prod(math.fsum(value * value for value in side) for side in centred)
    product = math.fsum(one * other for one, other in zip(*centred, strict=True))
    return product / math.sqrt(power) if power > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: index for index, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) + 1) / 2 for value in values]


def criteria_markdown(study: Study, found: Sequence[Agreement]) -> str:
    """The agreements as a table for readers, the most trustworthy first."""
    head = ["criterion", "better", "trials"]
    head += [f"{label(truth)}, {where}" for where in ("all trials", "within data sets") for truth in TRUE_CRITERIA]
    rows = []
    for each in sorted(found, key=lambda each: (-(each.within[TRUE_CRITERIA[0]] or -2), each.criterion)):
        values = [*each.overall.values(), *each.within.values()]
        texts = [MISSING if value is None else f"{value:+.2f}" for value in values]
        rows.append([f"{each.criterion}", each.mode, str(each.trials), *texts])
    return (
        f"# {study.name}: which criterion to trust without the truth\n\n"
        "Spearman's rank correlation with the true criteria over finished and stopped trials. +1: orders the trials as "
        "the truth does; 0: says nothing; below: misleads.\n\n" + markdown_table(head, rows)
    )
