"""What a steered study asks of its cluster before anything runs; the study itself is in test_study_cluster.py."""

from pathlib import Path

import pytest

from aceray.data.storage import sha256_of_file
from aceray.distributed import steer
from aceray.distributed.prepare import aceray_version
from aceray.errors import ClusterError


def answer(monkeypatch: pytest.MonkeyPatch, version: str, missing: list[str]) -> None:
    """A cluster that looks and says this."""
    task = type("Task", (), {"remote": staticmethod(lambda digests: None)})
    monkeypatch.setattr(steer, "_task", lambda function: task)
    monkeypatch.setattr(steer.ray, "get", lambda ref: (version, missing))


@pytest.mark.parametrize(
    ("version", "missing", "message"),
    [
        ("0.0.1", [], "aceray 0.0.1 runs there, "),
        (aceray_version(), ["token"], "the cluster does not see .*ray job submit"),
    ],
)
def test_a_cluster_that_is_not_the_same_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, missing: list[str], message: str
) -> None:
    answer(monkeypatch, version, missing)
    with pytest.raises(ClusterError, match=f"ray://head:10001: {message}"):
        steer._check_same_place("ray://head:10001", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_same_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, aceray_version(), [])
    steer._check_same_place("ray://head:10001", tmp_path)
    monkeypatch.setattr(steer, "PATIENCE_SECONDS", 0.0)
    with steer.token_in(tmp_path) as token:
        digest = {str(token): sha256_of_file(token)}
        assert steer._look(digest) == (aceray_version(), [])
    assert steer._look(digest) == (aceray_version(), [str(token)])
