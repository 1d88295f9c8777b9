"""What is on the screen while something runs: a bar or a table in a terminal, lines elsewhere."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.markdown import Markdown, TableElement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from aceray.leaderboard import label, number_text

# beside the objective
METRICS_OF_A_TRIAL = ("fsc/resolution_px_0.5", "pose/rotation_sqfrob_mean")

Shown = TypeVar("Shown", bound="_Display")


class _Display:
    """What lives on a terminal's screen while the context is open."""

    console: Console
    live: Live

    def __enter__(self: Shown) -> Shown:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()


class RunDisplay(_Display):
    """In a terminal a progress bar and the latest numbers; everywhere a line for every evaluation."""

    def __init__(self, title: str, unit: str, total: int | None = None) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
        self.task = self.bar.add_task(title, total=total)
        self.numbers = Text("starting", no_wrap=True, overflow="ellipsis")
        self.live = Live(Group(self.bar, self.numbers), console=self.console, transient=True)

    def simulated(self, progress: Any) -> None:
        """Show a finished shard."""
        self.numbers.plain = f"{progress.shards_done} of {progress.shards} shards"
        self.bar.update(self.task, completed=progress.particles_done, total=progress.particles)

    def searched(self, progress: Any) -> None:
        """Show how far the oracle's search is."""
        self.numbers.plain = "searching poses with the true volume"
        if progress.done == progress.particles:
            self.numbers.plain = "back-projecting the true poses, evaluating, writing the results"
        self.bar.update(self.task, completed=progress.done, total=progress.particles)

    def predicted(self, progress: Any) -> None:
        """Show how many particles have a pose."""
        self.numbers.plain = "assigning poses"
        self.bar.update(self.task, completed=progress.done, total=progress.particles)

    def trained(self, progress: Any) -> None:
        """Show a step; an evaluation also leaves a line."""
        if progress.metrics:
            line = f"step {progress.step:6d} of {progress.steps}  {_short(progress.metrics)}"
            self.console.print(line, soft_wrap=True)
        losses = "  ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in progress.losses.items())
        self.numbers.plain = f"{losses}  {progress.particles_per_second:,.0f} particles/s"
        if progress.step == progress.steps:
            self.numbers.plain += "  evaluating, writing the results"
        self.bar.update(self.task, completed=progress.step, total=progress.steps)


class StudyDisplay(_Display):
    """In a terminal a table of the trials; elsewhere a line for every evaluation and change of status."""

    def __init__(self, metric: str = "") -> None:
        self.console = Console(stderr=True, highlight=False)
        self.metric, self.rows, self.head = metric, {}, Text("reading the data")
        self.live = Live(self._table(), console=self.console, transient=True)

    def simulated(self, progress: Any) -> None:
        """Show how far a data set is; elsewhere a line when it is there."""
        line = f"simulating: {progress.particles_done:,} of {progress.particles:,} particles"
        if progress.particles_done == progress.particles and not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)
        self.head.plain = line
        self.live.update(self._table())

    def searched(self, folder: Path, progress: Any) -> None:
        """Show how far the oracle of a data set is; elsewhere a line when it is there."""
        line = f"oracle of {folder.name}: {progress.done:,} of {progress.particles:,} particles"
        if progress.done == progress.particles and not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)
        self.head.plain = line
        self.live.update(self._table())

    def happened(self, event: Any) -> None:
        """Show an event of a trial."""
        row = self.rows.pop(event.name, None) or TrialRow(event.name)
        line = row.take(event, self.metric)
        self.rows[event.name] = row  # the newest last
        if line and not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)
        count = Counter(row.status for row in self.rows.values())
        self.head.plain = "trials: " + ", ".join(f"{number} {status}" for status, number in count.items())
        self.live.update(self._table())

    def _table(self) -> Group:
        if not self.rows:
            return Group(self.head)
        metrics = list(dict.fromkeys([self.metric, *METRICS_OF_A_TRIAL]))
        heads = ("trial", "status", "step", *map(label, metrics), "particles/s", "time left")
        table = Table(*heads, box=None, pad_edge=False)
        rows = sorted(self.rows.values(), key=lambda row: row.status == "running")
        for row in rows[-max(1, self.console.height - 6) :]:
            table.add_row(*row.cells(metrics))
        return Group(self.head, table)


class WholeCells(TableElement):
    """A table of Markdown that breaks a long name rather than cut it: trials often differ in its end alone."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """The table with every column folded."""
        for part in super().__rich_console__(console, options):
            for column in part.columns if isinstance(part, Table) else ():
                column.overflow = "fold"
            yield part


class Page(Markdown):
    """Markdown with whole cells."""

    elements = Markdown.elements | {"table_open": WholeCells}


class TrialRow:
    """What the table shows of a trial."""

    def __init__(self, name: str) -> None:
        self.name, self.status, self.reason = name, "", ""
        self.step, self.steps, self.since, self.seconds_a_step = 0, 0, time.monotonic(), 0.0
        self.metrics, self.speed = {}, 0.0

    def take(self, event: Any, metric: str) -> str:
        """Take an event over; returns the line that tells it, empty when it says nothing new."""
        report = event.report
        changed = (event.status, event.reason) not in ((self.status, self.reason), (self.status, ""))
        self.status, self.reason = event.status, event.reason
        if report is None:
            self.since = time.monotonic()
            return f"{self.name}  {self.status}{f': {self.reason}' if self.reason else ''}" if changed else ""
        now = time.monotonic()
        if report.step > self.step:
            self.seconds_a_step = (now - self.since) / (report.step - self.step)
        self.step, self.steps, self.since = report.step, report.steps, now
        self.metrics, self.speed = report.metrics, report.particles_per_second
        return f"{self.name}  {self.status}  step {self.step:6d} of {self.steps}  {_short(report.metrics, metric)}"

    def cells(self, metrics: Sequence[str]) -> list[str]:
        """Texts of a row with these metrics."""
        texts = [_text(self.metrics, metric) for metric in metrics]
        left = self.seconds_a_step * (self.steps - self.step) if self.status == "running" else 0.0
        texts += [f"{self.speed:,.0f}" if self.speed else "", f"{int(left) // 60}:{int(left) % 60:02d}" if left else ""]
        step = f"{self.step}/{self.steps}" if self.steps else ""
        return [self.name, self.status, step, *texts]


def _text(metrics: Mapping[str, float], key: str) -> str:
    return "" if (value := metrics.get(key)) is None else number_text(value)


def _short(metrics: Mapping[str, float], first: str = "") -> str:
    """The figures that tell how far a reconstruction is, those that the evaluation could measure; one before them."""
    keys = [first, "fsc/resolution_px_0.5", "pose/rotation_sqfrob_median", "pose/coverage", "refine/moved"]
    return "  ".join(f"{label(key)} {_text(metrics, key)}" for key in dict.fromkeys(keys) if _text(metrics, key))
