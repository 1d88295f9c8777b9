"""Where workers listen for each other; tests/clusters/test_on_premises.py has hosts whose names lead to 127.0.1.1."""

import os

import pytest
import ray

from aceray.distributed.process_group import interface_of, listen_at_own_address


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # reserved for documentation


@pytest.mark.parametrize(
    ("address", "before", "after"),
    [("127.0.0.1", None, "lo"), ("127.0.0.1", "eth7", "eth7"), ("192.0.2.1", None, None)],
)
def test_what_the_user_has_set_stands(
    monkeypatch: pytest.MonkeyPatch, address: str, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    # Set even where it is to be absent: of a name that was not there delenv remembers nothing, and what the function
    # sets would stay for the tests after this one.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", before or "")
    if before is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    listen_at_own_address()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == after
