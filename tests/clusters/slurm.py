"""A Slurm of this machine alone, from Debian's packages: a controller and two nodes of one core, in one folder.

The nodes are processes of this host, or of two hosts of their own.

Nothing of the system's configuration is read or written. The nodes have no authentication and trust every local user,
so it lives only as long as a test.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.clusters.hosts import Host
from tests.clusters.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}({here})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
# a job that is queued again waits until its old credential is of no use
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
JobRequeue=1
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str:
    """Why no Slurm can be started here, or nothing."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"{', '.join(absent)}: not installed (Debian: slurmctld slurmd slurm-client)" if absent else ""


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/usr/bin"


class Slurm:
    """The daemons; `end` ends them and what they started."""

    def __init__(self, folder: Path, here: str = "127.0.0.1", hosts: Sequence[Host] = ()) -> None:
        name = socket.gethostname().split(".")[0]
        (folder / "state").mkdir(parents=True)
        addresses = [host.address for host in hosts] or [here] * len(NODES)
        lines = [
            f"NodeName={node} NodeHostname={name} NodeAddr={address} Port={free_port()} CPUs=1 State=UNKNOWN"
            for node, address in zip(NODES, addresses, strict=True)
        ]
        self.file = folder / "slurm.conf"
        text = CONFIGURATION.format(host=name, here=here, port=free_port(), folder=folder, nodes="\n".join(lines))
        self.file.write_text(text, encoding="utf-8")
        self.environment = {**os.environ, "SLURM_CONF": str(self.file), "PATH": _path()}
        of_nodes = [["slurmd", "-D", "-N", node] for node in NODES]
        if hosts:
            of_nodes = [host.command(*command) for host, command in zip(hosts, of_nodes, strict=True)]
        daemons = [["slurmctld", "-D"], *of_nodes]
        self._daemons = [
            subprocess.Popen(
                command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
            )
            for command in daemons
        ]
        try:
            self._await_nodes()
        except BaseException:
            self.end()
            raise

    def _await_nodes(self) -> None:
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-o", "%T", check=False).split() != ["idle"]:
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l", check=False)
            time.sleep(0.5)

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self) -> None:
        """Cancel what runs, then end the daemons."""
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
