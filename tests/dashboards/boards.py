"""The dashboards' generator, which is a script and no package, and what the tests read out of it and of the rules."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import yaml

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
PROMETHEUS = DASHBOARDS / "prometheus"
NAME_OF_METRIC = re.compile(r"\bray_(aceray_\w+)")
NAME_OF_RECORD = re.compile(r"\baceray:\w+")


def load_generator() -> ModuleType:
    """dashboards/grafana/boards.py."""
    spec = importlib.util.spec_from_file_location("grafana_boards", DASHBOARDS / "grafana" / "boards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
BOARDS = GENERATOR.BOARDS


def rules(file: str) -> dict[str, dict]:
    """The rules of a file by the name of the record or alert."""
    groups = yaml.safe_load((PROMETHEUS / file).read_text())["groups"]
    return {rule.get("record") or rule["alert"]: rule for group in groups for rule in group["rules"]}


def metrics_in(expression: str) -> set[str]:
    """Our metrics in an expression, those inside recording rules included."""
    found = set(NAME_OF_METRIC.findall(expression))
    for record in NAME_OF_RECORD.findall(expression):
        found |= metrics_in(rules("rules.yml")[record]["expr"])
    return found


def queries() -> dict[str, tuple[str, str]]:
    """Every query of every panel with its legend, by board, panel and number; the dashboards' variables mean all."""
    return {
        f"{board.name}: {panel.title} {number}": (re.sub(r"\$\w+", ".*", query), legend)
        for board in BOARDS
        for panel in board.panels
        for number, (query, legend) in enumerate(panel.queries)
    }
