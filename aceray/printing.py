"""What a command prints when it is done: the metrics and files of a run, the leaderboard of a study."""

import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from aceray.display import Page
from aceray.presets import load_config

if TYPE_CHECKING:
    from aceray.data.location import Location
    from aceray.distributed.study_run import StudyResult
    from aceray.folder import RunResult


def print_study(result: "StudyResult") -> None:
    """The leaderboard, the files, and how to see the study in MLflow."""
    for name in ("leaderboard", "table"):
        if name in result.paths:
            print_markdown(result.paths[name])
    count = Counter(notes["status"] for notes in result.trials.values())
    print(f"{'study':12} {from_here(result.folder)}")
    print(f"{'trials':12} " + ", ".join(f"{number} {status}" for status, number in count.items()))
    for path in result.paths.values():
        print(f"{path.stem:12} {from_here(path)}")
    if result.mlflow_run_id is not None and result.tracking_uri is not None:
        _print_how_to_open("study", result.tracking_uri, result.mlflow_run_id)


def print_markdown(path: Path) -> None:
    """A Markdown file."""
    print_report(path.read_text(encoding="utf-8"))


def print_report(text: str) -> None:
    """Markdown: typeset in a terminal, as it is anywhere else."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(Page(text))
    else:
        print(text)


def print_result(result: "RunResult") -> None:
    """The metrics of a run, its files, and how to see it in MLflow."""
    console = Console(highlight=False)
    console.print(metrics_table(result.metrics))
    print()
    for name, path in result.paths.items():
        print(f"{name:12} {from_here(path)}")
    if result.mlflow_run_id is not None:
        uri = load_config(str(result.paths["config"])).tracking.uri
        _print_how_to_open("run", uri, result.mlflow_run_id)


def _print_how_to_open(what: str, uri: str, run_id: str) -> None:
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    print(f"\nThe {what} in MLflow:")
    if server != uri.rstrip("/"):
        print(f"  {_program('mlflow')} ui --backend-store-uri {shlex.quote(uri)}")
    print(f"  {server}/#/runs/{run_id}")


def from_here(path: "Location") -> str:
    """A path as short as it can be said in the working directory."""
    if not isinstance(path, Path):
        return str(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _program(name: str) -> str:
    """How to call a program that was installed with aceray, whether or not its environment is activated."""
    return name if which(name) else shlex.quote(from_here(Path(sys.executable).parent / name))


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Metrics with their units, the oracle's beside them where they are known."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    beside = any(key.startswith("oracle/") for key in metrics)
    if beside:
        table.add_row("", "this run", "", "oracle")
    for label, key, form, also, also_form in ROWS:
        if (value := metrics.get(key)) is not None:
            other, best = metrics.get(also), metrics.get(f"oracle/{key}")
            cells = (form.format(value), "" if other is None else also_form.format(other))
            table.add_row(label, *cells, "" if best is None else form.format(best))
    for label, prefix in (("FSC, last five shells", ""), ("FSC, last five, oracle", "oracle/")):
        if shells := _last_shells(metrics, prefix):
            table.add_row(label, shells)
    seconds = metrics.get("train/wall_seconds")
    if seconds is not None:
        table.add_row("wall time", f"{int(seconds) // 60} min {int(seconds) % 60} s", "")
    return table


def _last_shells(metrics: Mapping[str, float], prefix: str) -> str:
    values = [metrics.get(f"{prefix}fsc/nyquist_minus_{below}") for below in (4, 3, 2, 1, 0)]
    return " ".join(f"{value:.2f}".replace("0.", ".", 1) for value in values if value is not None)


ROWS = [
    ("resolution, FSC 0.5", "fsc/resolution_px_0.5", "{:.2f} px", "fsc/resolution_angstrom_0.5", "{:.1f} A"),
    ("resolution, FSC 0.143", "fsc/resolution_px_0.143", "{:.2f} px", "fsc/resolution_angstrom_0.143", "{:.1f} A"),
    (
        "resolution, half maps at 0.143",
        "fsc/half_map_resolution_px_0.143",
        "{:.2f} px",
        "fsc/half_map_resolution_angstrom_0.143",
        "{:.1f} A",
    ),
    (
        "resolution, refined halves at 0.143",
        "refine/half_map_resolution_px_0.143",
        "{:.2f} px",
        "refine/half_map_resolution_angstrom_0.143",
        "{:.1f} A",
    ),
    ("rotation error, mean (of 8)", "pose/rotation_sqfrob_mean", "{:.4f}", "", ""),
    (
        "rotation error, median (of 8)",
        "pose/rotation_sqfrob_median",
        "{:.4f}",
        "pose/rotation_deg_median",
        "{:.1f} deg",
    ),
    ("  mean, best of 30", "pose/rotation_sqfrob_mean_best_of_30", "{:.4f}", "", ""),
    ("  median, best of 30", "pose/rotation_sqfrob_median_best_of_30", "{:.4f}", "", ""),
    ("shift error, mean square", "pose/shift_sq_px_mean", "{:.3f} px2", "pose/shift_sq_angstrom_mean", "{:.1f} A2"),
    ("coverage of view directions", "pose/coverage", "{:.3f}", "", ""),
    ("particles/s", "train/particles_per_second", "{:,.0f}", "", ""),
]
