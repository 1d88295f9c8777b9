"""Hosts of their own on one machine: name, network, processes and Ray's folder of each are seen by nobody else.

Linux namespaces, with a bridge between them: what ends "every Ray of the host" ends none of the machine's.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BRIDGE = "acerayhosts"
NETWORK = "10.213.77"
# A folder for Ray; the name of the host, which leads to where Debian and Ubuntu have it lead.
START = """\
mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray
hostname "$0" && printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$0" > /tmp/ray/hosts
mount --bind /tmp/ray/hosts /etc/hosts
exec "$@"
"""


@dataclass(frozen=True)
class Host:
    """A name, which its network namespace and the link to it have as well, and its address."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on it; when that ends, so does everything it started."""
        own = (
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-ec",
            START,
            self.name,
        )
        return ["nsenter", f"--net=/run/netns/{self.name}", *own, *words]  # `ip netns exec` would hide cgroups


def missing() -> str:
    """Why there can be no such hosts here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)}: not installed (Debian: iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "veth9", "type", "veth"], capture_output=True, text=True
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def some_hosts(count: int) -> Iterator[tuple[str, list[Host]]]:
    """The address of this machine as its hosts see it, and `count` hosts."""
    hosts = [Host(f"acerayhost{number}", f"{NETWORK}.{number}") for number in range(1, count + 1)]
    here = f"{NETWORK}.254"
    _remove(hosts)  # of a test that was killed
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{here}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.name, "master", BRIDGE, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "route", "add", "default", "via", here)  # by it Ray finds the host's address
        yield here, hosts
    finally:
        _remove(hosts)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _remove(hosts: list[Host]) -> None:
    links = [BRIDGE, *(host.name for host in hosts)]
    for words in [*(("link", "del", link) for link in links), *(("netns", "del", host.name) for host in hosts)]:
        subprocess.run(["ip", *words], capture_output=True)
