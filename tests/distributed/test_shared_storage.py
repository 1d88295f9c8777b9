"""Whether the nodes of a cluster see what the driver writes; with real nodes in tests/clusters/test_storage.py."""

import threading
from pathlib import Path

import pytest
import ray

from aceray.data.particles import ParticleSet
from aceray.data.storage import sha256_of_file
from aceray.distributed import shared_storage
from aceray.distributed.shared_storage import check_shared, unseen
from aceray.errors import ClusterError, DataError


def test_files_that_are_missing_or_others_are_unseen(tmp_path: Path) -> None:
    same, other, missing = (tmp_path / name for name in ("same", "other", "missing"))
    same.write_text("a")
    other.write_text("b")
    digests = {str(path): sha256_of_file(same) for path in (same, other, missing)}
    assert unseen(digests, patience_seconds=0.0) == [str(other), str(missing)]


def test_a_file_may_appear_late(tmp_path: Path) -> None:
    there, late = tmp_path / "there", tmp_path / "late"
    there.write_text("a")
    timer = threading.Timer(0.3, lambda: late.write_text("a"))
    timer.start()
    assert unseen({str(late): sha256_of_file(there)}, patience_seconds=30.0) == []
    timer.join()


@pytest.mark.usefixtures("ray_session")
def test_nodes_that_see_everything(tmp_path: Path, particle_set: ParticleSet) -> None:
    check_shared(tmp_path, "runs", [particle_set.path])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("what", "setting"), [("token", "runs"), ("manifest", "data.path")])
def test_a_node_that_sees_something_else(
    tmp_path: Path, particle_set: ParticleSet, monkeypatch: pytest.MonkeyPatch, what: str, setting: str
) -> None:
    """The driver's digest of one file is made to differ from the one on the node."""

    def digest(file: Path) -> str:
        changed = (what == "manifest") == (file.name == "manifest.json")
        return "of another file" if changed else sha256_of_file(file)

    monkeypatch.setattr(shared_storage, "sha256_of_file", digest)
    monkeypatch.setattr(shared_storage, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(ClusterError) as error:
        check_shared(tmp_path, "runs", [particle_set.path])
    [node] = ray.nodes()
    folder = tmp_path if what == "token" else particle_set.path
    assert str(error.value).startswith(f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, ")
    assert f"does not see {folder} as the driver does" in str(error.value)
    assert f"let {setting} lie on storage" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot"):
        check_shared(tmp_path / "missing", "runs")
