"""The cluster of clusters/fake_multinode: its autoscaler brings nodes up for a study, and takes them away after it.

Slow: it waits for nodes to come and to go.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from aceray.data.particles import ParticleSet
from tests.clusters.ports import free_port
from tests.distributed.conftest import QUICK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(shutil.which("envsubst") is None, reason="envsubst: not installed (Debian: gettext-base)"),
]
ROOT = Path(__file__).parents[2]
STUDY = """\
name: s
base: {base}
space: {{seed: [1, 2, 3, 4]}}
objective: select/residual_loss
search: {{concurrent: 2}}
"""
NODES = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"


class Fake:
    """A head that trains nothing, and an autoscaler that starts nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        self._sessions = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a longer path is none for Ray's sockets
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        port = free_port()
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PORT": str(port),
            "DASHBOARD_PORT": str(free_port()),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": self._sessions,
        }
        self.log = folder / "head.log"
        with open(self.log, "w") as out:
            self._head = subprocess.Popen(
                [ROOT / "clusters" / "fake_multinode" / "start.sh"],
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        host = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
        self.address = f"{host}:{port}"
        self.wait_for(lambda: "Ray runtime started" in self.log.read_text(), 240)

    def wait_for(self, condition: Callable[[], bool], within_seconds: float) -> None:
        deadline = time.monotonic() + within_seconds
        while not condition():
            assert self._head.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(1.0)

    def nodes(self) -> int:
        """How many nodes are alive, the head among them."""
        command = [sys.executable, "-c", NODES, self.address]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    def raylets(self) -> int:
        """The same number, seen from outside: each node is one such process."""
        below = psutil.Process(self._head.pid).children(recursive=True)
        return sum(process.name() == "raylet" for process in below if process.is_running())

    def end(self) -> None:
        processes = [psutil.Process(self._head.pid), *psutil.Process(self._head.pid).children(recursive=True)]
        self._head.send_signal(signal.SIGTERM)
        psutil.wait_procs(processes, timeout=20)
        for process in processes:  # nodes of the autoscaler outlive it
            if process.is_running():
                process.kill()
        self._head.wait()
        shutil.rmtree(self._sessions, ignore_errors=True)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    running = Fake(tmp_path)
    yield running
    running.end()


def test_nodes_come_for_a_study_and_go_after_it(fake: Fake, tmp_path: Path, particle_set: ParticleSet) -> None:
    base = [f"data.path={particle_set.path}", *QUICK, "resources.gpu=false", "resources.patience_seconds=240"]
    (tmp_path / "s.yaml").write_text(STUDY.format(base=json.dumps(base)))
    assert fake.nodes() == 1
    command = ["aceray", "tune", "s.yaml", "--address", fake.address]
    most = 1
    with open(tmp_path / "said.txt", "w") as said:
        study = subprocess.Popen(command, env=fake.environment, cwd=tmp_path, stdout=said, stderr=said)
    while study.poll() is None:
        most = max(most, fake.raylets())
        time.sleep(0.5)
    assert study.returncode == 0, (tmp_path / "said.txt").read_text() + fake.log.read_text()
    notes = sorted((tmp_path / "studies" / "s" / "trials").glob("*/trial.json"))
    assert [json.loads(path.read_text())["status"] for path in notes] == ["finished"] * 4
    assert most >= 3  # the head, and one for each of the trials that run at once
    fake.wait_for(lambda: fake.nodes() == 1, 240)
