"""The Grafana dashboards in words; `python dashboards/grafana/boards.py` writes them to boards/*.json.

A panel is a title, queries with their legends, a unit of Grafana and a sentence for its corner. Everything is taken by
run: the process that told a number (WorkerId) changes when a run is started again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "boards"
SOURCE = {"type": "prometheus", "uid": "${source}"}
RUN = '{study=~"$study", run=~"$run"}'
NAME = "{{study}} {{run}}"
WIDTH, HEIGHT, PANELS_A_ROW = 8, 8, 3


@dataclass(frozen=True)
class Panel:
    """One picture; `queries` are pairs of an expression and the legend of its series."""

    title: str
    unit: str
    help: str
    queries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Board:
    """One dashboard; `variables` maps a name to the series whose label of that name it offers."""

    name: str
    title: str
    variables: dict[str, str]
    panels: tuple[Panel, ...]


def by_run(metric: str, *labels: str) -> str:
    """A metric by run and further labels."""
    return f"max by ({', '.join(('study', 'run', *labels))}) (ray_aceray_{metric}{RUN})"


def one(title: str, unit: str, help: str, query: str, legend: str = NAME) -> Panel:
    """A panel with one query."""
    return Panel(title, unit, help, ((query, legend),))


TRAINING = Board(
    "training",
    "aceray: training",
    {"study": "ray_aceray_train_step", "run": "ray_aceray_train_step"},
    (
        one("Progress", "percentunit", "share of all steps and rounds", f"aceray:train_progress_fraction{RUN}"),
        one("Particles a second", "short", "all workers together", f"aceray:train_particles_per_second{RUN}"),
        Panel(
            "A step and its wait for data",
            "s",
            "on the slowest worker",
            (
                (by_run("train_step_seconds"), f"{NAME} step"),
                (by_run("train_data_wait_seconds"), f"{NAME} wait"),
            ),
        ),
        one("Loss", "short", "terms unweighted; total weighted", by_run("train_loss", "term"), f"{NAME} {{{{term}}}}"),
        one("PIP weight", "short", "of the pose loss in this step", by_run("train_pip_weight")),
        one("Label filter", "short", "1 (none) to 5", by_run("train_label_filter")),
        one(
            "Resolution",
            "short",
            "angstrom; against the truth, or between the halves of a round of refinement",
            by_run("fsc_resolution_angstrom", "against", "threshold"),
            f"{NAME} {{{{against}}}} {{{{threshold}}}}",
        ),
        Panel(
            "Rotation error",
            "short",
            "squared Frobenius norm, 0 to 8, 6 for random poses; where the truth is known",
            ((by_run("pose_rotation_sqfrob", "statistic"), f"{NAME} {{{{statistic}}}}"),),
        ),
        one("Median rotation error", "degree", "where the truth is known", by_run("pose_rotation_error_degrees")),
        one("View coverage", "percentunit", "directions the poses reach", by_run("pose_coverage")),
        one(
            "Scores without truth",
            "short",
            "select/ in MLflow",
            by_run("select_score", "score"),
            f"{NAME} {{{{score}}}}",
        ),
        Panel(
            "Refinement: poses",
            "percentunit",
            "settled: did not leave their minimum in the round; rescued: searched over all poses again",
            (
                (f"1 - {by_run('refine_moved_fraction')}", f"{NAME} settled"),
                (by_run("refine_rescued_fraction"), f"{NAME} rescued"),
                (by_run("refine_unexplained_fraction"), f"{NAME} power unexplained"),
            ),
        ),
        one("Refinement: round", "short", "rounds done", by_run("refine_round")),
        Panel(
            "Age of report and checkpoint",
            "s",
            "what a loss of the workers would cost, and whether the run still moves",
            (
                (f"aceray:report_age_seconds{RUN}", f"{NAME} report"),
                (f"aceray:checkpoint_age_seconds{RUN}", f"{NAME} checkpoint"),
            ),
        ),
        one("Restarts", "short", "of lost workers", by_run("train_restarts")),
    ),
)
SEARCH = Board(
    "search",
    "aceray: search",
    {"study": "ray_aceray_study_trials"},
    (
        one("Trials", "short", "by status", 'aceray:study_trials{study=~"$study"}', "{{study}} {{status}}"),
        one(
            "Objective",
            "short",
            "newest value of each trial",
            'max by (study, trial, metric) (ray_aceray_study_objective{study=~"$study"})',
            "{{trial}} {{metric}}",
        ),
        one(
            "Best of the finished",
            "short",
            "by the objective's own direction",
            'max by (study, metric) (ray_aceray_study_best{study=~"$study"})',
            "{{study}} {{metric}}",
        ),
        one(
            "Progress of the trials",
            "percentunit",
            "of those that run now",
            'aceray:train_progress_fraction{study=~"$study", study!=""}',
            "{{run}}",
        ),
        one(
            "Loss of the trials",
            "short",
            "weighted sum of the terms",
            'max by (study, run) (ray_aceray_train_loss{study=~"$study", study!="", term="total"})',
            "{{run}}",
        ),
        one(
            "Particles a second, all trials",
            "short",
            "how much the study gets out of the cluster",
            'sum by (study) (aceray:train_particles_per_second{study=~"$study", study!=""})',
            "{{study}}",
        ),
        one(
            "Trials whose process was lost",
            "short",
            "each is started again twice",
            'max by (study) (ray_aceray_study_restarts{study=~"$study"})',
            "{{study}}",
        ),
    ),
)
DATA = Board(
    "data",
    "aceray: data",
    {"dataset": "ray_aceray_data_particles"},
    (
        one("Progress", "percentunit", "", 'aceray:data_progress_fraction{dataset=~"$dataset"}', "{{dataset}}"),
        one(
            "Particles a second",
            "short",
            "since the conversion began",
            'max by (dataset) (ray_aceray_data_particles_per_second{dataset=~"$dataset"})',
            "{{dataset}}",
        ),
        Panel(
            "Particles",
            "short",
            "written, planned, refused",
            tuple(
                (f'max by (dataset) (ray_aceray_data_{name}{{dataset=~"$dataset"}})', f"{{{{dataset}}}} {legend}")
                for name, legend in (
                    ("particles", "written"),
                    ("particles_planned", "planned"),
                    ("refused_particles", "refused"),
                )
            ),
        ),
        one("Refused", "percentunit", "", 'aceray:data_refused_fraction{dataset=~"$dataset"}', "{{dataset}}"),
    ),
)
NODE = "{{ip}}"
FLEET = Board(
    "fleet",
    "aceray: fleet",
    {},
    (
        one("Nodes", "short", "that answer", 'count(up{job="ray"} == 1)', "targets"),
        one("Cores in use", "percent", "", "max by (ip) (ray_node_cpu_utilization)", NODE),
        one(
            "Memory",
            "percentunit",
            "at 95 % Ray kills workers",
            "max by (ip) (ray_node_mem_used) / max by (ip) (ray_node_mem_total)",
            NODE,
        ),
        one(
            "GPU memory by run",
            "percentunit",
            "the most that torch held",
            "aceray:device_memory_fraction",
            "{{run}} {{NodeAddress}} {{device}}",
        ),
        one(
            "GPU memory",
            "bytes",
            "held by torch, and what there is",
            "max by (run, NodeAddress, device) (ray_aceray_device_memory_bytes)",
            "{{run}} {{NodeAddress}} {{device}}",
        ),
        one(
            "GPU memory there",
            "bytes",
            "",
            "max by (NodeAddress, device) (ray_aceray_device_memory_total_bytes)",
            "{{NodeAddress}} {{device}}",
        ),
        one("GPUs in use", "percent", "", "max by (ip, GpuIndex) (ray_node_gpus_utilization)", "{{ip}} {{GpuIndex}}"),
        one("Disk free", "bytes", "", "min by (ip) (ray_node_disk_free)", NODE),
        one(
            "Object store", "bytes", "in use", "max by (NodeAddress) (ray_object_store_used_memory)", "{{NodeAddress}}"
        ),
        one("Network received", "Bps", "", "max by (ip) (ray_node_network_receive_speed)", NODE),
        one(
            "Records that wait for MLflow",
            "short",
            "by run and study",
            "max by (study, run) (ray_aceray_tracking_backlog_records)",
        ),
        one("Particles a second, all runs", "short", "", "sum(aceray:train_particles_per_second)", "particles"),
    ),
)
BOARDS = (TRAINING, SEARCH, DATA, FLEET)


def rendered(board: Board) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": f"aceray-{board.name}",
        "title": board.title,
        "tags": ["aceray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), *(_variable(*each) for each in board.variables.items())]},
        "links": [
            {"title": "aceray", "type": "dashboards", "tags": ["aceray"], "asDropdown": True, "keepTime": True},
            {"title": "Ray's own", "type": "link", "url": "/d/rayDefaultDashboard", "keepTime": True},
        ],
        "panels": [_panel(number, panel) for number, panel in enumerate(board.panels)],
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}}


def _variable(name: str, series: str) -> dict[str, Any]:
    query = f"label_values({series}, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, PANELS_A_ROW)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"spanNulls": True}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def text_of(board: Board) -> str:
    """The file of a dashboard."""
    return json.dumps(rendered(board), indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in BOARDS:
        (FOLDER / f"{each.name}.json").write_text(text_of(each), encoding="utf-8")
