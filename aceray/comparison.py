"""The table a study asks for: rows x columns, averaged over the rest, beside the paper's numbers and the oracle's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aceray.leaderboard import MISSING, Entry, label, markdown_table, number_text, paragraph, point_text, value_text
from aceray.study import Study, Table


@dataclass(frozen=True)
class Cell:
    """One metric of the finished trials of a row and column, and what the paper prints there."""

    values: tuple[float, ...] = ()
    trials: int = 0
    """How many the study has here, whatever became of them."""
    paper: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the trials; None without any."""
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def text(self) -> str:
        """Mean, range, number of trials; the paper's number."""
        count = f"n={len(self.values)}" + (f" of {self.trials}" if self.trials > len(self.values) else "")
        ours = MISSING
        if len(self.values) == 1:
            ours = f"{number_text(self.mean)} ({count})"
        elif self.values:
            low, high = number_text(min(self.values)), number_text(max(self.values))
            ours = f"{number_text(self.mean)} ({low} to {high}, {count})"
        elif self.trials:
            ours = f"{MISSING} ({count})"
        return ours if self.paper is None else f"{ours}; paper {self.paper:g}"


@dataclass(frozen=True)
class Comparison:
    """Rows x columns of a study's table, one cell a metric; columns are [""] when the table has none."""

    table: Table
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str, str], Cell]
    """By row, column, metric."""
    oracle: dict[tuple[str, str], Cell]
    """By column, metric; empty when it was not asked for or there is no truth."""
    averaged: list[str]
    """Dimensions that a cell's trials may differ in."""


def compare(study: Study, entries: Sequence[Entry], oracle: Mapping[str, Mapping[str, float]]) -> Comparison:
    """The study's table from its finished trials; `oracle` has the oracle's metrics by `Setup.dataset`."""
    table = study.table
    assert table is not None
    rows = values_of(study, table.rows, entries)
    columns = columns_of(study, table, entries)
    cells, of_oracle = {}, {}
    for column in columns:
        here = in_column(table, column, entries)
        known = [oracle[name] for name in sorted({entry.setup.dataset or "" for entry in here}) if name in oracle]
        for metric in table.metrics:
            best = tuple(found[f"oracle/{metric}"] for found in known if f"oracle/{metric}" in found)
            if best:
                of_oracle[column, metric] = Cell(best, len(best))
            for row in rows:
                trials = [entry for entry in here if point_text(entry, table.rows) == row]
                done = [entry.metrics for entry in trials if entry.status == "finished"]
                values = tuple(metrics[metric] for metrics in done if metric in metrics)
                cells[row, column, metric] = Cell(values, len(trials), _printed(table, row, column, metric))
    averaged = [key for key in study.space if key not in (table.rows, table.columns)]
    return Comparison(table, rows, columns, cells, of_oracle, averaged)


def columns_of(study: Study, table: Table, entries: Iterable[Entry]) -> list[str]:
    """The table's columns; [""], which holds all trials, when it has none."""
    return values_of(study, table.columns, entries) if table.columns else [""]


def in_column(table: Table, column: str, entries: Iterable[Entry]) -> list[Entry]:
    """The trials of a column."""
    return [entry for entry in entries if not table.columns or point_text(entry, table.columns) == column]


def values_of(study: Study, key: str, entries: Iterable[Entry]) -> list[str]:
    """The values of a dimension as text, in the study's order; those of a range in their own."""
    dimension = study.space[key]
    if dimension.range is not None:
        found = sorted({entry.point[key] for entry in entries if key in entry.point})
        return [value_text(value) for value in found]
    known = [value_text(value) for value in dimension.values]
    return [*known, *([MISSING] if any(key not in entry.point for entry in entries) else [])]


def _printed(table: Table, row: str, column: str, metric: str) -> float | None:
    """The paper's number; without columns, its only column counts."""
    columns = _named(table.paper, row) or {}
    found = _named(columns, column) if column else next(iter(columns.values()), None)
    return (found or {}).get(metric)


def _named(mapping: Mapping[str, Any], name: str) -> Any:
    """The entry of this name, or of the same number written otherwise (2.0 for 2)."""
    for key, value in mapping.items():
        if key == name or (_number(key) is not None and _number(key) == _number(name)):
            return value
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def table_markdown(study: Study, comparison: Comparison, entries: Sequence[Entry], command: str) -> str:
    """The table for readers: one part a metric with rows x columns, or a single one with the metrics as columns."""
    table = comparison.table
    by = f" by {table.columns}" if table.columns else ""
    text = f"# {study.name}: {table.rows}{by}\n\n" + paragraph(study.description)
    text += f"{_setting(entries)} Made by `{command}`.\n"
    averaged = f" over {', '.join(comparison.averaged)}" if comparison.averaged else ""
    text += f"Mean (range, number n of finished trials){averaged}.\n"
    if table.paper:
        text += f"Paper: {(table.paper_caption or 'as printed').rstrip('.')}.\n"
    if comparison.oracle:
        text += "Oracle: poses searched with the true volume, map of the true poses; no method can do better.\n"
    if not table.columns:
        head = [table.rows, *(label(metric) for metric in table.metrics)]
        return text + "\n" + markdown_table(head, _lines(comparison, [("", metric) for metric in table.metrics]))
    for metric in table.metrics:
        lines = _lines(comparison, [(column, metric) for column in comparison.columns])
        text += f"\n## {label(metric)}\n\n" + markdown_table([table.rows, *comparison.columns], lines)
    return text


def _lines(comparison: Comparison, places: Sequence[tuple[str, str]]) -> list[list[str]]:
    lines = []
    for row in comparison.rows:
        cells = [comparison.cells[row, column, metric] for column, metric in places]
        counts = sorted({len(cell.values) for cell in cells})
        uneven = f" ({counts[0]} to {counts[-1]} trials a cell)" if len(counts) > 1 else ""
        lines.append([row + uneven, *(cell.text for cell in cells)])
    if comparison.oracle:
        best = [comparison.oracle.get(place) for place in places]
        lines.append(["oracle", *(number_text(cell.mean if cell else None) for cell in best)])
    return lines


def _setting(entries: Sequence[Entry]) -> str:
    """Steps, batch, box and particles of the trials; all their values where they differ."""
    parts = []
    for form, name in (("{} steps", "steps"), ("batch {}", "batch"), ("{} px", "box"), ("{} particles", "particles")):
        found = sorted({value for entry in entries if (value := getattr(entry.setup, name)) is not None})
        if found:
            parts.append(form.format(" or ".join(f"{value:,}" for value in found)))
    return f"{', '.join(parts)}." if parts else ""
