"""Connecting to Ray, and what is said when it cannot give what is asked."""

import logging
import os
import re
import socket
import stat
from pathlib import Path

import pytest
import ray

from aceray.config import Resources
from aceray.distributed import cluster
from aceray.distributed.cluster import WorkerResources, check_answers, connect, prepare_ray_data, reserve
from aceray.errors import ClusterError


@pytest.mark.usefixtures("ray_session")
def test_the_session_that_is_there_is_used_and_left() -> None:
    with connect(None):
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_session")
def test_workers_leave_a_share_of_their_cores_to_reading() -> None:
    asked = reserve(Resources(workers=2))
    assert asked == WorkerResources(2, 0.9, 0.0)
    assert asked.bundle == {"CPU": 0.9}
    assert ray.available_resources()["CPU"] == 2


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "resources, found",
    [
        (Resources(workers=3), "has only 2 CPUs"),
        (Resources(workers=1, cpus_per_worker=2.5), "asked for 1 workers with 2.5 CPUs each"),
        (Resources(workers=1, gpu=True), "1 CPUs and 1 GPU each; the cluster has only 2 CPUs (2 free), 0 GPUs"),
    ],
)
def test_what_a_local_ray_can_never_give_is_refused_at_once(resources: Resources, found: str) -> None:
    with pytest.raises(ClusterError) as error:
        reserve(resources, patience_seconds=60.0)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_gets_time_but_not_for_ever() -> None:
    with pytest.raises(ClusterError, match="did not give that within 1 s"):
        reserve(Resources(workers=4, address="auto"), patience_seconds=1.0)
    with pytest.raises(ClusterError, match="did not give that within 2 s"):
        reserve(Resources(workers=4, address="auto", patience_seconds=2.0))
    assert ray.available_resources()["CPU"] == 2


def test_the_token_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    cluster._protect_token()
    assert stat.S_IMODE(os.stat(token).st_mode) == 0o600


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had no Ray session; the one that all tests share is left alone."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_end", lambda: None)


@pytest.mark.usefixtures("unconnected")
def test_a_cluster_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError(f"could not find a running Ray\nat {options['address']}")

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"Ray at {address}: cannot connect") as error, connect(address):
            pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:70000", "no-such-host.invalid:6379"]
)
@pytest.mark.usefixtures("unconnected")
def test_an_address_where_nothing_answers(address: str) -> None:
    """Ray would try for two minutes."""
    with pytest.raises(ClusterError, match=f"Ray at {re.escape(address)}: cannot connect") as error, connect(address):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["auto", "local"])
def test_addresses_of_other_kinds_are_left_to_ray(address: str) -> None:
    check_answers(address)


def test_ray_data_is_quiet_on_the_screen_and_loud_to_the_user(caplog: pytest.LogCaptureFixture) -> None:
    """Handlers of others, the user's stream or pytest's own, take what they took before."""
    logger, mine = logging.getLogger("ray.data"), logging.StreamHandler()
    logger.addHandler(mine)
    try:
        prepare_ray_data()
        levels = {type(handler).__name__: handler.level for handler in logger.handlers}
    finally:
        logger.removeHandler(mine)
    assert levels["PlainRayHandler"] == logging.ERROR
    assert mine.level == caplog.handler.level == logging.NOTSET
