"""`ray up` over SSH on hosts of their own, a run on two of them, `ray down`.

Slow, and skipped where root, sshd, rsync or envsubst is missing.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from aceray.data.particles import ParticleSet
from aceray.folder import RunFolder
from tests.clusters.hosts import Host, missing, some_hosts
from tests.clusters.rendering import CLUSTERS
from tests.distributed.conftest import QUICK

ABSENT = [name for name in ("sshd", "ssh", "rsync", "envsubst") if shutil.which(name) is None]
REASON = missing() or f"not installed: {', '.join(ABSENT)} (Debian: openssh-server, rsync, gettext-base)"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(bool(missing() or ABSENT), reason=REASON)]

NAME = "acerayhosts"
# A home and an /opt/aceray of the host's own, then its SSH daemon: {environment}, {folder}.
START = """\
mount -t tmpfs none /mnt && mkdir -p /mnt/home /mnt/scratch /mnt/opt/aceray /run/sshd
mount -t overlay -o lowerdir=/root,upperdir=/mnt/home,workdir=/mnt/scratch overlay /root
rm -rf /root/.ray /root/.ssh && echo 'export PATH=/opt/aceray/bin:$PATH' >> /root/.bashrc
mount --bind /mnt/opt /opt && mount --bind {environment} /opt/aceray
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""
SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PidFile none
SetEnv PYTHONPATH={root}
Subsystem sftp internal-sftp
"""


@contextmanager
def reachable(hosts: list[Host], folder: Path) -> Iterator[None]:
    """SSH daemons on the hosts; {folder}/key opens them."""
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, root=CLUSTERS.parent))
    start = START.format(environment=sys.prefix, folder=folder)
    with ExitStack() as stack:
        for host in hosts:
            log = stack.enter_context(open(folder / f"{host.name}.log", "wb"))
            daemon = subprocess.Popen(host.command("sh", "-ec", start), stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.kill)
        yield


def raylets(hosts: list[Host]) -> int:
    """How many there are on these hosts, each of which has a network of its own."""
    networks = {os.stat(f"/run/netns/{host.name}").st_ino for host in hosts}
    found = [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"]
    return sum(os.stat(f"/proc/{pid}/ns/net").st_ino in networks for pid in found)


def await_raylets(hosts: list[Host], count: int) -> None:
    deadline = time.monotonic() + 240
    while raylets(hosts) != count:
        assert time.monotonic() < deadline, raylets(hosts)
        time.sleep(2)


def test_machines_over_ssh(tmp_path: Path, particle_set: ParticleSet) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "ACERAY_SSH_USER": "root", "ACERAY_SSH_KEY": str(tmp_path / "key")}

    def ray(*words: str) -> str:
        program = Path(sys.executable).parent / "ray"
        done = subprocess.run([program, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with some_hosts(2) as (_, hosts), reachable(hosts, tmp_path):
        environment |= {"ACERAY_HEAD": hosts[0].address, "ACERAY_WORKERS": hosts[1].address}
        given = (CLUSTERS / "on_premises" / "cluster.yaml").read_text().replace("name: aceray", f"name: {NAME}")
        wanted = "$ACERAY_HEAD $ACERAY_WORKERS $ACERAY_SSH_USER $ACERAY_SSH_KEY"
        made = subprocess.run(["envsubst", wanted], input=given, env=environment, capture_output=True, text=True)
        (tmp_path / "cluster.yaml").write_text(made.stdout)
        ray("get-auth-token", "--generate")
        (home / ".ray" / "auth_token").chmod(0o600)

        ray("up", "--yes", "cluster.yaml")
        await_raylets(hosts, 2)
        settings = [*QUICK, "name=x", f"data.path={particle_set.path}", f"runs={tmp_path / 'runs'}"]
        on_two = ["resources.workers=2", "resources.cpus_per_worker=2", "resources.address=auto", "resources.gpu=false"]
        command = ["RAY_AUTH_MODE=token", "/opt/aceray/bin/aceray", "train", *settings, *on_two]
        ray("exec", "cluster.yaml", " ".join(command))
        folder = RunFolder(tmp_path / "runs" / "x")
        assert [row["step"] for row in folder.read_history()] == list(range(1, 41))
        assert folder.metrics.exists()
        ray("down", "--yes", "cluster.yaml")
        await_raylets(hosts, 0)
