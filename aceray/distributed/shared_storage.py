"""Whether all nodes of a cluster see the folder that a run or a study writes, asked before anything trains there."""

import contextlib
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aceray.data.manifest import MANIFEST_NAME
from aceray.data.storage import sha256_of_file, storage_error
from aceray.errors import ClusterError, DataError

# A file may take a moment to appear on the other side of a network file system.
PATIENCE_SECONDS = 5.0
# A node that has to start a process for the answer, on a busy machine.
SECONDS_TO_ANSWER = 90.0


def check_shared(folder: Path, setting: str, datasets: Iterable[Path] = ()) -> None:
    """Write a token into `folder`, which `setting` names, and read it and the data sets' manifests on every node.

    Data sets that are not on a file system of the driver are left to those who read them.

    Raises:
        ClusterError: a node does not see one of them, or does not answer; the message names the node.
        DataError: the token cannot be written.
    """
    with token_in(folder) as token:
        manifests = {path / MANIFEST_NAME: "data.path" for path in datasets if (path / MANIFEST_NAME).is_file()}
        settings = {token: setting, **manifests}
        _ask_nodes({str(file): sha256_of_file(file) for file in settings}, {str(k): v for k, v in settings.items()})


@contextlib.contextmanager
def token_in(folder: Path) -> Iterator[Path]:
    """A file that only who sees this very folder can read.

    Raises:
        DataError: it cannot be written.
    """
    # the name of what a kill may leave behind, which the next run takes away
    token = folder / f".shared-{uuid.uuid4().hex}.partial"
    try:
        token.write_text(token.name)
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            token.unlink()


def _ask_nodes(digests: Mapping[str, str], settings: Mapping[str, str]) -> None:
    task: Any = ray.remote(unseen)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": here}
            asked[task.options(**options).remote(dict(digests), PATIENCE_SECONDS)] = node
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    for answer in done:
        try:
            missing = ray.get(answer)
        except RayError as error:
            if _is_alive(asked[answer]):  # one that went away in the meantime takes no part
                raise ClusterError(_no_answer(asked[answer], " ".join(str(error).split())[:200])) from error
            continue
        if missing:
            raise ClusterError(_told(asked[answer], missing[0], settings[missing[0]]))
    if late:
        raise ClusterError(_no_answer(asked[late[0]], f"nothing within {SECONDS_TO_ANSWER:.0f} s"))


def unseen(digests: Mapping[str, str], patience_seconds: float) -> list[str]:
    """Of files with their SHA-256, those that are not here, or are others here."""
    deadline = time.monotonic() + patience_seconds
    while missing := [file for file, digest in digests.items() if _digest(file) != digest]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    return missing


def _digest(file: str) -> str:
    with contextlib.suppress(DataError):
        return sha256_of_file(Path(file))
    return ""


def _is_alive(node: Mapping[str, Any]) -> bool:
    return any(one["NodeID"] == node["NodeID"] and one["Alive"] for one in ray.nodes())


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _told(node: Mapping[str, Any], file: str, setting: str) -> str:
    what = "what the driver wrote there is missing" if setting != "data.path" else "its manifest is missing or another"
    return (
        f"{_name(node)}: does not see {Path(file).parent} as the driver does ({what}); let {setting} lie on storage "
        "that all nodes mount under the same path, or start the cluster without this node"
    )


def _no_answer(node: Mapping[str, Any], reason: str) -> str:
    return (
        f"{_name(node)}: cannot say whether it sees the storage of the run ({reason}); check that aceray is installed "
        "there in the version of the driver, or start the cluster without this node"
    )
