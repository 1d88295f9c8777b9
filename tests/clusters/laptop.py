"""The cluster of clusters/laptop/start.sh, with ports and folders of its own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.clusters.ports import free_port

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "clusters" / "laptop"


class Laptop:
    """A head and two more nodes of one core each, behind a token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cluster"
        self._sessions = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a longer path is none for Ray's sockets
        port, dashboard = free_port(), free_port()
        self.address, self._url = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self._start = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ACERAY_CLUSTER": str(self.folder),
            "PORT": str(port),
            "DASHBOARD_PORT": str(dashboard),
            "RAY_TMPDIR": self._sessions,
            "PATIENCE_SECONDS": "240",
        }
        for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            self._start.pop(key, None)
        self.printed = subprocess.run(
            [SCRIPTS / "start.sh"], env=self._start, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        self.environment = {
            **self._start,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_API_SERVER_ADDRESS": self._url,
        }

    @property
    def nodes(self) -> list[psutil.Process]:
        """The processes of the nodes, the head first."""
        return [psutil.Process(int(line)) for line in (self.folder / "pids").read_text().split()]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command with the token, or with what `environment` says instead."""
        return subprocess.run(
            command, env=self.environment | environment, cwd=self.folder, capture_output=True, text=True
        )

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """`ray job submit` of a command; its output goes to submitted.txt, and it ends with the job."""
        with open(self.folder / "submitted.txt", "w") as out:
            return subprocess.Popen(
                ["ray", "job", "submit", "--", *command],
                env=self.environment,
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def submit_and_wait(self, *command: str) -> tuple[int, str]:
        """Exit code and output of a job."""
        code = self.submit(*command).wait()
        return code, (self.folder / "submitted.txt").read_text()

    def add_node_without(self, *paths: Path) -> subprocess.Popen[str]:
        """One more node, for which these are other, empty folders, as where a disk is not mounted."""
        command = "".join(f"mount -t tmpfs none {path} && " for path in paths)
        command += f"exec ray start --block --address={self.address} --num-cpus=1 "
        command += "--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0"
        log = self.folder / "blind.log"
        with open(log, "w") as out:
            process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", command],
                env=self.environment | {"RAY_raylet_start_wait_time_s": "120"},
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        return process

    def trains_on(self, node: psutil.Process) -> bool:
        """Whether one of Ray Train's workers runs there."""
        for child in node.children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(child.cmdline()):
                    return True
            except psutil.Error:
                continue
        return False

    def end(self) -> None:
        subprocess.run([SCRIPTS / "stop.sh"], env=self._start, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(self._sessions, ignore_errors=True)


def lose(node: psutil.Process) -> None:
    """The node is gone at once, with all its processes, as if its cable were pulled."""
    processes = [*node.children(recursive=True), node]
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=30)
