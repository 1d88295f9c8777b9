"""Registry, table, panels and alerts say the same, in both directions; the files are what their readers expect."""

import json
import re
import subprocess
from shutil import which

import promql_parser
import pytest
import yaml

from aceray.distributed.gauges import BY_NAME, METRICS
from tests.dashboards.boards import BOARDS, DASHBOARDS, GENERATOR, PROMETHEUS, metrics_in, queries, rules

README = (DASHBOARDS / "README.md").read_text(encoding="utf-8")
needs_promtool = pytest.mark.skipif(
    which("promtool") is None, reason="not installed: promtool (apt-get install prometheus)"
)


def table(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its two first lines."""
    section = README.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def by_metric(expressions: dict[str, str]) -> dict[str, set[str]]:
    """For each of our metrics the names of the expressions it is in."""
    found: dict[str, set[str]] = {}
    for name, expression in expressions.items():
        for metric in metrics_in(expression):
            found.setdefault(metric, set()).add(name)
    return found


def selectors(node: object) -> list[promql_parser.VectorSelector]:
    """All series that a parsed expression reads."""
    found = [node] if isinstance(node, promql_parser.VectorSelector) else []
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (below := getattr(node, name, None)) is not None:
            found += selectors(below)
    for below in getattr(node, "args", None) or ():
        found += selectors(below)
    return found


PANELS = {name: query for name, (query, _) in queries().items()}
ALERTS = {name: rule["expr"] for name, rule in rules("alerts.yml").items()}
RECORDS = {name: rule["expr"] for name, rule in rules("rules.yml").items()}
EXPRESSIONS = {**PANELS, **ALERTS, **RECORDS}


# ---- in both directions


def test_every_metric_is_on_a_panel_and_every_panel_shows_known_ones() -> None:
    assert set(by_metric(PANELS)) == set(BY_NAME)


def test_alerts_and_records_know_their_metrics() -> None:
    assert set(by_metric(ALERTS)) <= set(BY_NAME)
    assert set(by_metric(RECORDS)) <= set(BY_NAME)
    used = set(re.findall(r"\baceray:\w+", " ".join([*PANELS.values(), *ALERTS.values()])))
    assert used == set(RECORDS)


def test_the_table_of_the_metrics() -> None:
    """Name, unit, labels, meaning, boards and alerts of each, and nothing else."""
    boards, alerts = by_metric(PANELS), by_metric(ALERTS)
    expected = [
        [
            f"`{metric.name}`",
            metric.unit,
            ", ".join(metric.labels),
            metric.help,
            ", ".join(sorted({name.split(":")[0] for name in boards[metric.name]})),
            ", ".join(sorted(alerts.get(metric.name, ()))),
        ]
        for metric in METRICS
    ]
    assert table("## Metrics") == expected


def test_the_table_of_the_alerts() -> None:
    assert {row[0]: row[1] for row in table("## Alerts")} == {
        f"`{name}`": rule["labels"]["severity"] for name, rule in rules("alerts.yml").items()
    }


def test_labels_that_are_asked_for_are_those_of_the_metric() -> None:
    """`by (…)` and matchers: a label that is misspelt would quietly match everything or nothing."""
    added_by_ray = {"NodeAddress"}
    for expression in EXPRESSIONS.values():
        for selector in selectors(promql_parser.parse(expression)):
            name = str(selector.name)
            if name.startswith("ray_aceray_"):
                known = {*BY_NAME[name.removeprefix("ray_")].labels, *added_by_ray}
                matched = {matcher.name for matcher in selector.matchers.matchers}
                assert matched <= known, expression
        for labels, metric in re.findall(r"by \(([^)]*)\) \(ray_(aceray_\w+)", expression):
            assert set(re.split(r",\s*", labels)) <= {*BY_NAME[metric].labels, *added_by_ray}, expression


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_expression_parses(name: str) -> None:
    assert promql_parser.parse(EXPRESSIONS[name]) is not None


# ---- Grafana


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_the_files_are_what_the_generator_writes(board) -> None:
    assert (GENERATOR.FOLDER / f"{board.name}.json").read_text(encoding="utf-8") == GENERATOR.text_of(board)


def test_there_is_no_other_file() -> None:
    assert {file.name for file in GENERATOR.FOLDER.iterdir()} == {f"{board.name}.json" for board in BOARDS}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_a_dashboard_is_whole(board) -> None:
    """What Grafana needs of a provisioned dashboard; its drawing is not tested."""
    found = json.loads(GENERATOR.text_of(board))
    assert found["uid"] == f"aceray-{board.name}" and found["schemaVersion"] == 39
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places)) and max(x for x, _ in places) < 24
    variables = {variable["name"] for variable in found["templating"]["list"]}
    for panel in panels:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            assert target["datasource"]["uid"] == "${source}" and target["legendFormat"]


def test_provisioning_reads_no_secret_and_a_known_folder() -> None:
    folder = DASHBOARDS / "grafana" / "provisioning"
    source = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert source["type"] == "prometheus" and source["url"] == "${PROMETHEUS_URL}"
    provider = yaml.safe_load((folder / "dashboards" / "aceray.yml").read_text())["providers"][0]
    assert provider["type"] == "file" and provider["options"]["path"] in README


# ---- Prometheus


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = yaml.safe_load((PROMETHEUS / "tests.yml").read_text())["tests"]
    assert [test["name"] for test in tests] == list(ALERTS)
    for test in tests:
        checks = [check for check in test["alert_rule_test"] if check["alertname"] == test["name"]]
        assert any(check["exp_alerts"] for check in checks), test["name"]
        # at another time, or of another series of the same metric
        quiet = any(not check["exp_alerts"] for check in checks)
        series = [line["series"] for line in test["input_series"]]
        assert quiet or len(series) > max(len(check["exp_alerts"]) for check in checks), test["name"]


def test_every_alert_says_what_to_do() -> None:
    for name, rule in rules("alerts.yml").items():
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert set(rule["annotations"]) == {"summary", "action"}, name


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_alerts_fire_where_they_should() -> None:
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "tests.yml"]):
        done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("name", ALERTS)
def test_the_test_of_an_alert_notices_one_that_never_fires(name: str, tmp_path) -> None:
    for file in PROMETHEUS.glob("*.yml"):
        (tmp_path / file.name).write_text(file.read_text())
    whole = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    for rule in whole["groups"][0]["rules"]:
        if rule["alert"] == name:
            rule["expr"] = "vector(1) > 2"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(whole))
    done = subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True)
    assert done.returncode != 0
