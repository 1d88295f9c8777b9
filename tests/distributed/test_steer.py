"""What a steered study asks of its cluster before anything runs; the study itself is in test_study_cluster.py."""

from pathlib import Path

import pytest

from aceray.distributed import steer
from aceray.distributed.prepare import aceray_version
from aceray.errors import ClusterError


def answer(monkeypatch: pytest.MonkeyPatch, version: str, seen: bool) -> None:
    """A cluster that looks and says this."""
    task = type("Task", (), {"remote": staticmethod(lambda token: None)})
    monkeypatch.setattr(steer, "_task", lambda function: task)
    monkeypatch.setattr(steer.ray, "get", lambda ref: (version, seen))


@pytest.mark.parametrize(
    ("version", "seen", "message"),
    [
        ("0.0.1", True, "aceray 0.0.1 runs there, "),
        (aceray_version(), False, "the cluster does not see .*ray job submit"),
    ],
)
def test_a_cluster_that_is_not_the_same_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, seen: bool, message: str
) -> None:
    answer(monkeypatch, version, seen)
    with pytest.raises(ClusterError, match=f"ray://head:10001: {message}"):
        steer._check_same_place("ray://head:10001", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_same_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, aceray_version(), True)
    steer._check_same_place("ray://head:10001", tmp_path)
    with steer._token(tmp_path) as token:
        assert steer._look(str(token)) == (aceray_version(), True)
    assert steer._look(str(token)) == (aceray_version(), False)
