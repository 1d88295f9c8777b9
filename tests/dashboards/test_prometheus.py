"""A real Prometheus scrapes real runs on a token-protected cluster: every query of every panel answers with data.

Slow: a conversion, a training and a study run side by side on two nodes' worth of Ray, then the dashboards' queries are
asked of Debian's Prometheus, which knows no token.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml

from tests.browser import free_port
from tests.dashboards.boards import BOARDS, PROMETHEUS, queries, rules
from tests.data.inputs import some_images, with_nan, write_stack, write_star
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(which("prometheus") is None, reason="not installed: prometheus (apt-get install prometheus)"),
]
ROOT = Path(__file__).parents[2]
# queries that cannot answer here, by what they need
NEEDS_GPU = {
    "fleet: GPU memory by run 0",
    "fleet: GPU memory 0",
    "fleet: GPU memory there 0",
    "fleet: GPUs in use 0",
}
SECONDS_TO_FINISH = 900

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
from tests.browser import free_port
cluster = Cluster()
try:
    cluster.add_node(num_cpus=4, include_dashboard=True, dashboard_port=free_port())
    print(cluster.address, cluster.head_node.get_session_dir_path(), cluster.head_node.webui_url, flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
"""
# Ray's report interval is ten seconds: the driver takes its time, so that every number is seen.
CONVERSION = """
import sys, time
from aceray.distributed.convert import prepare_particles
from aceray.preparation import Preparation
settings = Preparation(shard_mib=1, dtype="float32", workers=1, address=sys.argv[3])
prepare_particles(sys.argv[1], sys.argv[2], settings, on_progress=lambda progress: time.sleep(8))
"""
TRAINING = """
import sys, time
from aceray.distributed.run import run
from aceray.presets import load_config
config = load_config(*sys.argv[1:])
def watch(event):
    time.sleep(8 if event.step > config.train.steps else 1 if event.metrics else 0)
run(config, on_progress=watch)
"""
STUDY = "from aceray.cli import main; main()"


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that has seen everything, and since when; the address of Ray's dashboard."""

    address: str
    since: float
    dashboard: str

    def get(self, path: str, **parameters: Any) -> Any:
        """`data` of an answer of Prometheus' API."""
        text = urllib.parse.urlencode(parameters, doseq=True)
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{text}", timeout=60) as answer:
            return json.load(answer)["data"]

    def series(self, query: str) -> list[dict[str, str]]:
        """Labels of all series that a query gives between the start and now."""
        found = self.get("query_range", query=query, start=self.since, end=time.time(), step=5)
        return [each["metric"] for each in found["result"]]


@contextmanager
def started(command: list[str], environment: dict[str, str], folder: Path, name: str) -> Iterator[subprocess.Popen]:
    """A process of its own group, which is ended afterwards; what it says is in a file."""
    with open(folder / f"{name}.txt", "w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if name == "cluster" else out,
            stderr=out,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        if name != "cluster":
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def prometheus_files(folder: Path, discovery: Path) -> Path:
    """The shipped files; only where Ray's list of nodes is, and how often it all happens, differs."""
    for file in ("rules.yml", "alerts.yml"):
        (folder / file).write_text((PROMETHEUS / file).read_text())
    shipped = (PROMETHEUS / "prometheus.yml").read_text()
    assert shipped.count("/tmp/ray/prom_metrics_service_discovery.json") == 1
    text = shipped.replace("/tmp/ray/prom_metrics_service_discovery.json", str(discovery)).replace("10s", "2s")
    (folder / "prometheus.yml").write_text(text)
    return folder / "prometheus.yml"


def is_up(address: str) -> bool:
    with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(address, timeout=5):
        return True
    return False


def damaged_stack(folder: Path) -> Path:
    """3,000 images of which two hold values that are not finite."""
    count = 3000
    write_stack(folder / "a.mrcs", with_nan(with_nan(some_images(count), 7), 1900))
    return write_star(folder / "p.star", [f"{index + 1:06d}@a.mrcs" for index in range(count)])


def study_file(folder: Path, base: list[str]) -> Path:
    """Two trials, one after the other, so that one has finished while the other runs."""
    found = {"name": "watched", "base": base, "space": {"pip.weight": [0.0, 2.0]}, "search": {"concurrent": 1}}
    (folder / "watched.yaml").write_text(yaml.safe_dump({**found, "objective": "pose/rotation_sqfrob_mean"}))
    return folder / "watched.yaml"


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder, since = tmp_path_factory.mktemp("scraped"), time.time()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    python = [sys.executable, "-c"]
    with ExitStack() as stack:
        cluster = stack.enter_context(started([*python, CLUSTER], environment, folder, "cluster"))
        assert cluster.stdout is not None
        line = cluster.stdout.readline()
        assert line, (folder / "cluster.txt").read_text()
        address, session, dashboard = line.split()
        config = prometheus_files(folder, Path(session) / "prom_metrics_service_discovery.json")
        port = free_port()
        server = [str(which("prometheus")), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        server.append(f"--web.listen-address=127.0.0.1:{port}")
        stack.enter_context(started(server, {"PATH": os.environ["PATH"]}, folder, "prometheus"))
        particles = write_particles(folder / "blobs", truth=True)
        common = [f"data.path={particles.path}", *QUICK, "resources.gpu=false", "train.checkpoint_every=500"]
        # a store each: two that make the tables of one sqlite file at the same time get in each other's way
        tracked = [("tracking.enabled=true", f"tracking.uri=sqlite:///{folder / name}.db") for name in ("a", "b")]
        refined = ["refine={}", "refine.search_rounds=2", "refine.polish_rounds=0", "refine.search_radius=4"]
        trained = ["train.steps=300", "train.evaluate_every=150", "resources.workers=1", *tracked[0]]
        training = [*common, *refined, *trained, f"resources.address={address}"]
        study = study_file(folder, [*common, "train.steps=2000", "train.evaluate_every=500", *tracked[1]])
        star = damaged_stack(folder / "in")
        processes = [
            stack.enter_context(started([*python, code, *arguments], environment, folder, name))
            for name, code, arguments in (
                ("conversion", CONVERSION, [str(star), str(folder / "set"), address]),
                ("training", TRAINING, training),
                ("study", STUDY, ["tune", str(study), "--address", address]),
            )
        ]
        wait_for(lambda: all(process.poll() is not None for process in processes), SECONDS_TO_FINISH)
        texts = {name: (folder / f"{name}.txt").read_text() for name in ("conversion", "training", "study")}
        assert [process.returncode for process in processes] == [0, 0, 0], texts
        found = Scraped(f"http://127.0.0.1:{port}", since, f"http://{dashboard}")
        wait_for(lambda: is_up(f"{found.address}/-/ready"), 60)
        yield found


def test_every_query_of_every_panel_answers_with_data(scraped: Scraped) -> None:
    asked = queries()
    assert set(asked) > NEEDS_GPU
    found = {name: scraped.series(query) for name, (query, _) in asked.items()}
    empty = {name for name, series in found.items() if not series}
    assert empty <= NEEDS_GPU, {name: asked[name][0] for name in empty - NEEDS_GPU}
    for name in set(asked) - empty:
        for label in re.findall(r"{{(\w+)}}", asked[name][1]):
            if label != "study":  # a run of its own has none
                assert any(label in series for series in found[name]), (name, label)


def test_the_variables_of_every_dashboard_offer_something(scraped: Scraped) -> None:
    for board in BOARDS:
        for name, series in board.variables.items():
            options = {"match[]": series, "start": scraped.since}
            assert scraped.get(f"label/{name}/values", **options), (board.name, name)


def test_what_was_told_is_what_happened(scraped: Scraped) -> None:
    def last(query: str) -> float:
        found = scraped.get("query", query=f"max(max_over_time({query}[30m]))", time=time.time())
        return float(found["result"][0]["value"][1])

    assert last('ray_aceray_data_refused_particles{dataset="set"}') == 2
    assert last('ray_aceray_data_particles_planned{dataset="set"}') == 3000
    assert last('ray_aceray_train_steps_planned{run="run"}') == 303  # two rounds of search, one of registers
    assert last('ray_aceray_train_restarts{run="run"}') == 0
    assert last('ray_aceray_study_trials{study="watched", status="finished"}') >= 1
    assert {each["run"] for each in scraped.series('ray_aceray_train_step{study="watched"}')} == {
        "weight_0.0",
        "weight_2.0",
    }


def test_every_rule_is_evaluated(scraped: Scraped) -> None:
    groups = scraped.get("rules")["groups"]
    health = {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}
    assert health == dict.fromkeys([*rules("rules.yml"), *rules("alerts.yml")], ("ok", ""))


def test_the_cluster_asks_for_a_token_and_its_metrics_do_not(scraped: Scraped) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{scraped.dashboard}/api/jobs/", timeout=30)
    targets = scraped.get("targets")["activeTargets"]
    assert targets and {target["health"] for target in targets} == {"up"}
    assert {target["labels"]["job"] for target in targets} == {"ray"}
