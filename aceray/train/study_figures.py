"""Figures of a study: all its trials beside one another. Drawn like those of a run, without a display."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from aceray.comparison import Comparison, columns_of, in_column, values_of
from aceray.leaderboard import Entry, label, number_text, point_text, ranking, value_text
from aceray.metrics.fsc import FscCurve
from aceray.study import Study, Table
from aceray.train.figures import (
    COLOURS,
    GREY,
    LINES,
    SECTIONS,
    STYLE,
    History,
    draw_section,
    draw_thresholds,
    fitted_to,
    frequency_axis,
    grey_limits,
    new_figure,
    plain_logarithms,
    resolution_axis,
    scale_bar,
)

MOST_NAMED = 8
_LOGARITHMIC_FROM = 8.0  # ratio of the largest to the smallest value
_DECADES_ONLY_FROM = 50.0
_GAP = 0.03  # between the sections of a volume, of their width
_LONGEST_TITLE = 46


@dataclass(frozen=True)
class Tile:
    """A volume of the contact sheet, in the frame of the reference that sets its grey scale."""

    title: str
    volume: Float[Tensor, "d d d"]
    reference: Float[Tensor, "d d d"]
    pixel_size_angstrom: float

    @property
    def extent_angstrom(self) -> float:
        """Width of a section."""
        return self.reference.shape[-1] * self.pixel_size_angstrom


@matplotlib.rc_context(STYLE)
def overlay_figure(curves: Mapping[str, FscCurve], against: str) -> Figure:
    """FSC curves of all trials, best first: eight with a name, the others grey behind them."""
    figure = new_figure(6.4, 4.6)
    panel = figure.subplots()
    draw_thresholds(panel)
    styles = list(itertools.islice(((colour, line) for line in LINES for colour in COLOURS), MOST_NAMED))
    for number, (name, curve) in enumerate(curves.items()):
        frequency = [shell / curve.box for shell in range(1, len(curve.values))]
        values = curve.values[1:].tolist()
        if number < MOST_NAMED:
            colour, line = styles[number]
            panel.plot(frequency, values, color=colour, linestyle=line, label=name, zorder=3 - 0.01 * number)
        else:
            rest = f"{len(curves) - MOST_NAMED} more" if number == MOST_NAMED else None
            panel.plot(frequency, values, color=GREY, linewidth=0.7, alpha=0.6, label=rest, zorder=2)
    frequency_axis(panel, list(curves.values()))
    sizes = {curve.pixel_size_angstrom for curve in curves.values()}
    if len(sizes) == 1:
        resolution_axis(panel, sizes.pop())
    panel.set_ylabel(f"FSC {against}")
    columns = 2 if max(len(name) for name in curves) <= 40 else 1
    figure.legend(loc="outside lower center", ncols=columns)
    return figure


@matplotlib.rc_context(STYLE)
def contact_sheet(groups: Sequence[Sequence[Tile]]) -> Figure:
    """Three central sections of each volume (normal to z, y and x), a tile for each; every group begins a row."""
    most = max(len(group) for group in groups)
    across = 1 if most == 1 else 2 if most <= 6 else 3
    rows = [group[start : start + across] for group in groups for start in range(0, len(group), across)]
    figure = new_figure(3.9 * across, 1.52 * len(rows) + 0.1)
    for line, row in zip(figure.subplots(len(rows), across, squeeze=False), rows, strict=True):
        for panel, tile in itertools.zip_longest(line, row):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if tile is not None:
                _draw_tile(panel, tile)
        if any(row[0] is group[0] for group in groups):
            scale_bar(line[0], row[0].extent_angstrom)
    return figure


def _draw_tile(panel: Axes, tile: Tile) -> None:
    limits, extent = grey_limits(tile.reference), tile.extent_angstrom
    fitted = fitted_to(tile.volume.double(), tile.reference.double())
    for place, section in enumerate(SECTIONS):
        draw_section(panel, fitted, section, extent, limits, place * extent * (1 + _GAP))
    panel.set_xlim(-extent / 2, extent * (2.5 + 2 * _GAP))
    panel.set_title(_short(tile.title), fontsize=8)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TITLE else f"{text[: _LONGEST_TITLE - 1]}…"


# ---- the objective over the space


@matplotlib.rc_context(STYLE)
def objective_figure(study: Study, entries: Sequence[Entry]) -> Figure:
    """Each objective against each dimension: a ring for a trial that did not finish, a diamond for the best.

    Ranges have an axis of their kind; values and presets stand side by side in their order, a bar at their median.
    """
    across, down = len(study.space), len(study.objective)
    figure = new_figure(max(4.0, 2.7 * across), 2.9 * down + 0.2)
    panels = figure.subplots(down, across, squeeze=False, sharey="row")
    for row, objective in zip(panels, study.objective, strict=True):
        places = ranking(entries, [objective])
        known = [place.entry for place in places if place.rank is not None]
        for panel, key in zip(row, study.space, strict=True):
            having = [entry for entry in known if key in entry.point]
            positions = _positions(panel, study, key, entries)
            for entry in having:
                _draw_trial(panel, positions[entry.number], entry.metrics[objective.metric], entry is known[0], entry)
            if study.space[key].range is None:
                _draw_medians(panel, positions, having, objective.metric)
            panel.set_xlabel(key)
        row[0].set_ylabel(label(objective.metric))
        scale_axis(row[0], "y", [entry.metrics[objective.metric] for entry in known])
    _explain_marks(figure, entries)
    return figure


def _explain_marks(figure: Figure, entries: Sequence[Entry]) -> None:
    finished = all(entry.status == "finished" for entry in entries)
    marks = [("finished trial", "o", COLOURS[0], COLOURS[0])]
    marks += [] if finished else [("stopped or not yet finished", "o", COLOURS[0], "white")]
    marks += [("best", "D", COLOURS[1], COLOURS[1])]
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=face, label=name)
        for name, marker, colour, face in marks
    ]
    median = Line2D([], [], color="black", linewidth=1.2, label="median")
    figure.legend(handles=[*handles, median], loc="outside lower center", ncols=4)


def _positions(panel: Axes, study: Study, key: str, entries: Sequence[Entry]) -> dict[int, float]:
    """Where each trial stands on the panel's x axis, by number; prepares the axis."""
    having, dimension = [entry for entry in entries if key in entry.point], study.space[key]
    if dimension.range is not None:
        if dimension.log_uniform is not None:
            _logarithmic(panel, "x", dimension.log_uniform)
        else:
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=dimension.integers is not None))
        panel.set_xlim(*_widened(dimension.range, dimension.log_uniform is not None))
        return {entry.number: float(entry.point[key]) for entry in having}
    numbers = [value for value in dimension.values if isinstance(value, int | float)]
    ordered = sorted(numbers) if len(numbers) == len(dimension.values) else dimension.values
    names = [value_text(value) for value in ordered]
    wide = max(len(name) for name in names) > 14 or sum(len(name) for name in names) > 36
    panel.set_xticks(range(len(names)), [_short(name) for name in names], **(_SLANTED if wide else {}))
    panel.set_xlim(-0.6, len(names) - 0.4)
    groups = {name: [entry.number for entry in having if point_text(entry, key) == name] for name in names}
    return {
        number: place + _spread(index, len(group))
        for place, group in enumerate(groups.values())
        for index, number in enumerate(group)
    }


_SLANTED: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}


def _spread(index: int, count: int) -> float:
    """Trials of one value stand a little apart."""
    return 0.0 if count == 1 else 0.4 * (index / (count - 1) - 0.5)


def _widened(ends: Sequence[float | int], logarithmic: bool) -> tuple[float, float]:
    low, high = ends
    if logarithmic:
        factor = (high / low) ** 0.05
        return low / factor, high * factor
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _draw_trial(panel: Axes, place: float, value: float, best: bool, entry: Entry) -> None:
    finished = entry.status == "finished"
    colour = COLOURS[1] if best else COLOURS[0]
    panel.plot(
        [place], [value], marker="D" if best else "o", markersize=6 if best else 4.5, color=colour, linestyle="",
        markerfacecolor=colour if finished else "white", markeredgecolor=colour, alpha=0.85, zorder=4 if best else 3,
    )  # fmt: skip


def _draw_medians(panel: Axes, positions: Mapping[int, float], entries: Sequence[Entry], metric: str) -> None:
    groups: dict[int, list[float]] = {}
    for entry in entries:
        groups.setdefault(round(positions[entry.number]), []).append(entry.metrics[metric])
    for place, values in groups.items():
        if len(values) > 1:
            panel.hlines(statistics.median(values), place - 0.3, place + 0.3, color="black", linewidth=1.2, zorder=5)


def scale_axis(panel: Axes, axis: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic axis with plain ticks for positive values that spread widely."""
    if values and min(values) > 0 and max(values) >= _LOGARITHMIC_FROM * min(values):
        _logarithmic(panel, axis, values)


def _logarithmic(panel: Axes, axis: Literal["x", "y"], values: Sequence[float]) -> None:
    panel.set(**{f"{axis}scale": "log"})
    chosen = panel.yaxis if axis == "y" else panel.xaxis
    plain_logarithms(chosen)
    if max(values) > _DECADES_ONLY_FROM * min(values):
        chosen.set_major_locator(LogLocator())


@matplotlib.rc_context(STYLE)
def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Share of each dimension in what makes a trial good, by objective."""
    keys = list(dict.fromkeys(key for shares in importances.values() for key in shares))
    figure = new_figure(5.6, 0.32 * len(keys) * len(importances) + 1.3)
    panel = figure.subplots()
    height = 0.8 / len(importances)
    for number, (metric, shares) in enumerate(importances.items()):
        places = [index + (number - (len(importances) - 1) / 2) * height for index in range(len(keys))]
        widths = [shares.get(key, 0.0) for key in keys]
        bars = panel.barh(places, widths, height * 0.92, color=COLOURS[number % len(COLOURS)], label=label(metric))
        panel.bar_label(bars, [f"{width:.2f}" for width in widths], padding=3, fontsize=8)
    panel.set_yticks(range(len(keys)), keys)
    panel.invert_yaxis()
    panel.set(xlim=(0, 1.08), xlabel="importance (shares of one)")
    if len(importances) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    else:
        panel.set_title(f"what decides the {label(next(iter(importances)))}")
    return figure


# ---- rows against each other


@matplotlib.rc_context(STYLE)
def curves_figure(study: Study, table: Table, entries: Sequence[Entry], histories: Mapping[int, History]) -> Figure:
    """Metrics over the steps, a panel for each metric and column: thin lines are trials, thick ones the finished' mean.

    One colour a row; `histories` has the journals by the trials' numbers.
    """
    rows = values_of(study, table.rows, entries)
    columns = columns_of(study, table, entries)
    figure = new_figure(max(4.2, 3.1 * len(columns)), 2.3 * len(table.curves) + 0.7)
    panels = figure.subplots(len(table.curves), len(columns), squeeze=False, sharex="col", sharey="row")
    for metric, line in zip(table.curves, panels, strict=True):
        drawn: list[float] = []
        for column, panel in zip(columns, line, strict=True):
            here = in_column(table, column, entries)
            for row, colour in zip(rows, itertools.cycle(COLOURS), strict=False):
                members = [entry for entry in here if point_text(entry, table.rows) == row]
                drawn += _draw_row(panel, metric, members, histories, colour)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        line[0].set_ylabel(label(metric).replace(", ", ",\n"))
        scale_axis(line[0], "y", drawn)
    for column, top, bottom in zip(columns, panels[0], panels[-1], strict=True):
        top.set_title(column)
        bottom.set_xlabel("step")
    handles = [
        Line2D([], [], color=colour, linewidth=2.2, label=row)
        for row, colour in zip(rows, itertools.cycle(COLOURS), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def _draw_row(
    panel: Axes, metric: str, members: Sequence[Entry], histories: Mapping[int, History], colour: str
) -> list[float]:
    """The lines of one row in one panel; returns the values drawn."""
    lines = {entry.number: _line(histories.get(entry.number, ()), metric) for entry in members}
    finished = [lines[entry.number] for entry in members if entry.status == "finished" and lines[entry.number]]
    thick = 2.2
    for entry in members:
        line, alone = lines[entry.number], len(finished) == 1 and entry.status == "finished"
        if line and not alone:
            dotted = "-" if entry.status == "finished" else ":"
            panel.plot(*zip(*line.items(), strict=True), color=colour, linewidth=0.7, alpha=0.55, linestyle=dotted)
    if finished:
        steps = [step for step in finished[0] if all(step in line for line in finished)]
        means = [statistics.fmean(line[step] for line in finished) for step in steps]
        panel.plot(steps, means, color=colour, linewidth=thick, zorder=4)
    return [value for line in lines.values() for value in line.values()]


def _line(history: History, metric: str) -> dict[int, float]:
    return {int(row["step"]): float(row[metric]) for row in history if row.get(metric) is not None}


@matplotlib.rc_context(STYLE)
def table_figure(comparison: Comparison) -> Figure:
    """The study's table as dots: mean and range of each row; a diamond is the paper's number, a line the oracle's."""
    rows, columns, metrics = comparison.rows, comparison.columns, comparison.table.metrics
    figure = new_figure(1.6 + 2.5 * len(metrics), 0.34 * len(rows) * len(columns) ** 0.6 + 1.5)
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    height = 0.7 / len(columns)
    for metric, panel in zip(metrics, panels, strict=True):
        drawn: list[float] = []
        for number, column in enumerate(columns):
            colour, offset = COLOURS[number % len(COLOURS)], (number - (len(columns) - 1) / 2) * height
            for place, row in enumerate(rows):
                cell = comparison.cells[row, column, metric]
                if cell.values:
                    panel.plot([min(cell.values), max(cell.values)], [place + offset] * 2, color=colour, linewidth=1.2)
                    panel.plot([cell.mean], [place + offset], color=colour, marker="o", markersize=5)
                    panel.annotate(number_text(cell.mean), (cell.mean or 0.0, place + offset), fontsize=7,
                                   textcoords="offset points", xytext=(0, 4), ha="center")  # fmt: skip
                if cell.paper is not None:
                    panel.plot([cell.paper], [place + offset], color=colour, marker="D", markersize=5,
                               markerfacecolor="white")  # fmt: skip
                drawn += [*cell.values, *([cell.paper] if cell.paper is not None else [])]
        scale_axis(panel, "x", drawn)
        panel.margins(x=0.12)
        panel.autoscale_view()
        _draw_oracle(panel, comparison, metric)
        panel.set_xlabel(label(metric))
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(handles=_table_legend(comparison), loc="outside lower center", ncols=3)
    return figure


def _draw_oracle(panel: Axes, comparison: Comparison, metric: str) -> None:
    """The oracle's values as lines; one that would stretch a logarithmic axis out of use stands at its end in words."""
    low, high = panel.get_xlim()
    logarithmic = panel.get_xscale() == "log"
    for number, column in enumerate(comparison.columns):
        colour, cell = COLOURS[number % len(COLOURS)], comparison.oracle.get((column, metric))
        if cell is None or cell.mean is None:
            continue
        if logarithmic and cell.mean < low / 10:
            panel.text(0.01, 0.99 - 0.08 * number, f"◂ {number_text(cell.mean)}", color=colour, fontsize=7,
                       va="top", transform=panel.transAxes)  # fmt: skip
        else:
            panel.axvline(cell.mean, color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
            margin = 0.2 * cell.mean if logarithmic else 0.05 * (high - low)
            low, high = min(low, cell.mean - margin), max(high, cell.mean + margin)
    panel.set_xlim(low, high)
    if logarithmic:
        scale_axis(panel, "x", panel.get_xlim())


def _table_legend(comparison: Comparison) -> list[Line2D]:
    named = [column for column in comparison.columns if column]
    handles = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], marker="o", markersize=5, linewidth=1.2, label=column)
        for number, column in enumerate(named)
    ] or [Line2D([], [], color=COLOURS[0], marker="o", markersize=5, linewidth=1.2, label="mean and range")]
    if any(cell.paper is not None for cell in comparison.cells.values()):
        handles.append(Line2D([], [], color="black", marker="D", markersize=5, markerfacecolor="white",
                              linestyle="", label="paper"))  # fmt: skip
    if comparison.oracle:
        handles.append(Line2D([], [], color="black", linewidth=0.9, linestyle=(0, (4, 2)), label="oracle"))
    return handles
