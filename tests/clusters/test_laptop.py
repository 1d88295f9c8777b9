"""The cluster of clusters/laptop: three separate nodes behind a token, and jobs that are submitted to it.

Slow: a Ray of three nodes and several runs. One cluster for all tests, in this order: the last one loses a node.
"""

import json
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from aceray.data.particles import ParticleSet
from aceray.folder import RunFolder
from tests.clusters.laptop import Laptop, lose
from tests.distributed.conftest import QUICK

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 400
# Sums over two workers come in another order after a restart.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    running = Laptop(tmp_path_factory.mktemp("laptop"))
    noted = [child for node in running.nodes for child in [node, *node.children(recursive=True)]]
    yield running
    running.end()
    _, left = psutil.wait_procs(noted, timeout=20)
    assert left == []


@pytest.fixture
def train(laptop: Laptop, particle_set: ParticleSet) -> Callable[..., list[str]]:
    """The command of a short run of two workers below the cluster's folder; overrides win."""

    def make(name: str, *overrides: str) -> list[str]:
        where = [f"data.path={particle_set.path}", f"runs={laptop.folder / 'runs'}", f"name={name}"]
        on_two = ["resources.workers=2", "resources.address=auto", "resources.gpu=false"]
        return ["aceray", "train", *where, *QUICK, *on_two, *overrides]

    return make


LONG = (f"train.steps={STEPS}", f"train.evaluate_every={STEPS}", "train.checkpoint_every=50")


def test_a_run_that_is_submitted(laptop: Laptop, train: Callable[..., list[str]]) -> None:
    assert stat.S_IMODE(os.stat(laptop.folder / "token").st_mode) == 0o600
    code, said = laptop.submit_and_wait(*train("undisturbed", *LONG))
    assert code == 0, said
    folder = RunFolder(laptop.folder / "runs" / "undisturbed")
    assert [row["step"] for row in folder.read_history()] == list(range(1, STEPS + 1))
    token = (laptop.folder / "token").read_text().strip()
    logs = "".join(path.read_text(errors="replace") for path in laptop.folder.glob("*.log"))
    assert token not in said + logs + laptop.printed


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RAY_AUTH_TOKEN": "wrong", "RAY_AUTH_TOKEN_PATH": ""}, "Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}, "Missing authentication token"),
    ],
    ids=["wrong", "missing"],
)
def test_other_tokens_are_refused(
    laptop: Laptop, train: Callable[..., list[str]], tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    """By the jobs' server, and by the cluster itself, where aceray says so in one line."""
    environment = environment | {"HOME": str(tmp_path)}  # a token of one's own in ~/.ray is another one
    done = laptop.run("ray", "job", "submit", "--", "true", **environment)
    assert done.returncode != 0 and said in done.stderr, done.stderr
    done = laptop.run(*train("refused", f"resources.address={laptop.address}"), **environment)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: Ray at {laptop.address}: cannot connect") and "RAY_AUTH_TOKEN" in line
    assert not (laptop.folder / "runs" / "refused").exists()


def test_the_smoke_study_that_is_submitted(laptop: Laptop) -> None:
    where = [f"studies={laptop.folder / 'studies'}", f"data.path={laptop.folder / 'smoke'}"]
    tracked = f"tracking.uri=sqlite:///{laptop.folder}/ml.db"
    code, said = laptop.submit_and_wait("aceray", "tune", "smoke", *where, tracked, "--address", "auto")
    assert code == 0, said
    notes = sorted((laptop.folder / "studies" / "smoke" / "trials").glob("*/trial.json"))
    assert [json.loads(path.read_text())["status"] for path in notes] == ["finished"] * 4


def _cannot_unshare() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0


@pytest.mark.skipif(_cannot_unshare(), reason="a mount namespace needs root")
def test_a_node_that_does_not_see_the_storage(
    laptop: Laptop, train: Callable[..., list[str]], particle_set: ParticleSet
) -> None:
    """Training and studies refuse to start, each in one line that names the node, and leave nothing behind."""
    studies, smoke = laptop.folder / "studies", laptop.folder / "smoke"
    studies.mkdir(exist_ok=True)
    study = ["aceray", "tune", "smoke", "name=blind", f"studies={studies}", f"data.path={smoke}", "--address", "auto"]
    node = laptop.add_node_without(studies, particle_set.path)
    try:
        said = [laptop.submit_and_wait(*command) for command in (train("blind"), [*study, "tracking.enabled=false"])]
    finally:
        lose(psutil.Process(node.pid))
        node.wait()
    for (code, output), path, setting in zip(said, (particle_set.path, studies), ("data.path", "studies"), strict=True):
        assert code != 0
        [line] = {line for line in output.splitlines() if line.startswith("error:")}  # Ray repeats a job's last lines
        assert line.startswith("error: node ") and f"does not see {path}" in line
        assert f"let {setting} lie on storage that all nodes mount" in line
    assert not (laptop.folder / "runs" / "blind").exists()
    assert not (studies / "blind" / "study.yaml").exists()


def test_a_node_that_is_lost_hard_costs_nothing(
    laptop: Laptop, train: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A node of a run of two workers is gone in the middle; the third takes its place."""
    folder = RunFolder(laptop.folder / "runs" / "lost")
    job = laptop.submit(*train("lost", *LONG))
    deadline = time.monotonic() + 400
    while not folder.history.exists() or len(folder.read_history()) < 120:
        assert job.poll() is None and time.monotonic() < deadline, (laptop.folder / "submitted.txt").read_text()
        time.sleep(0.1)
    node = next(node for node in laptop.nodes[1:] if laptop.trains_on(node))
    at = len(folder.read_history())
    lose(node)
    code = job.wait()
    said = (laptop.folder / "submitted.txt").read_text()
    assert code == 0, said
    rows, metrics = _results(folder)
    undisturbed_rows, undisturbed = _results(RunFolder(laptop.folder / "runs" / "undisturbed"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert at < STEPS - 100
    off = max(abs(metrics[key] / undisturbed[key] - 1) for key in undisturbed if undisturbed[key])
    with capsys.disabled():
        print(f"\nlost at step {at} of {STEPS}; metrics differ by at most {off:.1e} of their values: {metrics}")
    assert metrics == pytest.approx(undisturbed, rel=TOLERANCE)
    assert [row["train/loss_total"] for row in rows] == pytest.approx(
        [row["train/loss_total"] for row in undisturbed_rows], rel=TOLERANCE
    )


def _results(folder: RunFolder) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The journal, and the metrics but those of time."""
    metrics = json.loads(folder.metrics.read_text())
    untimed = {key: value for key, value in metrics.items() if "second" not in key}
    return folder.read_history(), untimed
