"""Where the workers of a run meet: at the address under which Ray knows their node."""

import os
import socket

import psutil
import ray
from ray.train.torch import TorchConfig


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface with an IP address, or None."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)):
            return name
    return None


def listen_at_own_address() -> None:
    """Have gloo listen on the interface of Ray's address of this node, unless GLOO_SOCKET_IFNAME says otherwise.

    By itself it listens where the host's own name leads, which on Debian and Ubuntu is 127.0.1.1.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group, backend_config) -> None:
        worker_group.execute(listen_at_own_address)
        super().on_start(worker_group, backend_config)


class NodeAddressConfig(TorchConfig):
    """Ray's own process group, at the addresses that Ray uses."""

    @property
    def backend_cls(self) -> type:
        """The class that sets the group up on the workers."""
        return _Backend
