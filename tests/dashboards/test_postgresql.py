"""A real PostgreSQL behind an MLflow server with authentication, written to by eight runs at once. Slow."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aceray.errors import ConfigError
from aceray.folder import RunFolder
from aceray.presets import load_config
from aceray.tracking.run import start_tracking
from tests import browser
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

ROOT = Path(__file__).parents[2]
TRIALS, STEPS = 8, 300
# one process for each, which all wait for one another before their second step
WRITERS = """
import multiprocessing, sys
from mlflow import MlflowClient
from aceray.distributed.run import run
from aceray.presets import load_config

def trial(number):
    def wait(event):
        if event.step == 1:
            together.wait(300)
    run(load_config(*sys.argv[2:], f"name=trial_{number}", f"seed={number}"), on_progress=wait)

fork = multiprocessing.get_context("fork")
together = fork.Barrier(int(sys.argv[1]))
processes = [fork.Process(target=trial, args=(number,)) for number in range(int(sys.argv[1]))]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(abs(process.exitcode) for process in processes))
"""


def programs() -> Path | None:
    """Folder of PostgreSQL's server programs, where Debian keeps the newest."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def missing() -> str:
    """What is not installed, as a reason to skip."""
    absent = [] if programs() else ["postgresql (apt-get install postgresql)"]
    if find_spec("psycopg2") is None or find_spec("flask_wtf") is None:
        absent.append("psycopg2, flask_wtf (pip install '.[server]')")
    return f"not installed: {', '.join(absent)}" if absent else ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing"),
]


def as_owner(*command: str | Path) -> None:
    """Run a program of PostgreSQL, which refuses to be root."""
    whole = [str(part) for part in command]
    if os.geteuid() == 0:
        whole = ["runuser", "-u", "postgres", "--", *whole]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, cwd="/")


@contextmanager
def postgresql(password: str) -> Iterator[str]:
    """URI of an empty database of a server of its own; the server and all its files are gone afterwards."""
    bin_folder = programs()
    assert bin_folder is not None
    folder = Path(tempfile.mkdtemp(prefix="aceray-pg-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    data, port = folder / "data", browser.free_port()
    # the socket lies in a folder of the server's own; over the network it takes a password
    access = ("--username=mlflow", "--auth-local=trust", "--auth-host=scram-sha-256")
    as_owner(bin_folder / "initdb", "-D", data, "--no-sync", "-E", "UTF8", "--locale=C.UTF-8", *access)
    control = (bin_folder / "pg_ctl", "-D", data, "-w")
    as_owner(*control, "-l", folder / "log", "-o", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1", "start")
    try:
        with psycopg(f"postgresql://mlflow@/postgres?host={folder}&port={port}") as connection:
            connection.autocommit = True
            connection.cursor().execute("alter user mlflow password %s", (password,))
            connection.cursor().execute("create database mlflow")
        # without the driver's name SQLAlchemy 2.1 looks for another one
        yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow"
    finally:
        as_owner(*control, "-m", "fast", "stop")
        shutil.rmtree(folder)


@contextmanager
def psycopg(uri: str) -> Iterator[Any]:
    """A connection to the database."""
    import psycopg2

    connection = psycopg2.connect(uri.replace("+psycopg2", ""))
    try:
        yield connection
    finally:
        connection.close()


@dataclass(frozen=True)
class Written:
    """Where eight runs were written to, and their folders."""

    server: str
    database: str
    folders: list[RunFolder]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    folder = tmp_path_factory.mktemp("postgresql")
    admin = {"MLFLOW_AUTH_ADMIN_USERNAME": "admin", "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.token_hex(16)}
    server = {**admin, "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)}
    app = ("--app-name", "basic-auth", "--artifacts-destination", str(folder / "artifacts"))
    client = dict(zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), admin.values(), strict=True))
    particles = write_particles(folder / "blobs")
    with (
        postgresql(secrets.token_hex(16)) as database,
        browser.mlflow_server(database, *app, folder=folder, **server) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in client.items():
            patch.setenv(name, value)
        settings = [f"data.path={particles.path}", f"runs={folder / 'runs'}", *QUICK, f"train.steps={STEPS}"]
        settings += ["train.checkpoint_every=300", "tracking.enabled=true", f"tracking.uri={address}"]
        done = subprocess.run(
            [sys.executable, "-c", WRITERS, str(TRIALS), *settings],
            # a busy machine's server may take longer than a run would wait by itself
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "120"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "MLflow" not in done.stderr  # no outage was told of
        yield Written(address, database, [RunFolder(folder / "runs" / f"trial_{number}") for number in range(TRIALS)])


def points_of(folder: RunFolder) -> dict[tuple[str, int], float]:
    """What the journal of a run says, by metric and step."""
    rows = folder.read_history()
    return {(key, row["step"]): row[key] for row in rows for key in row if key != "step" and row[key] is not None}


def test_eight_runs_at_once_lose_nothing(written: Written) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=written.server)
    experiment = client.get_experiment_by_name("aceray")
    assert experiment is not None
    runs = {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {folder.path.name for folder in written.folders}
    times = [(run.info.start_time, run.info.end_time) for run in runs.values()]
    assert max(start for start, _ in times) < min(end for _, end in times)
    for folder in written.folders:
        run, points = runs[folder.path.name], points_of(folder)
        assert run.info.status == "FINISHED" and run.info.run_id == folder.read_notes()["mlflow_run_id"]
        assert len({step for _, step in points}) == STEPS
        for name in {name for name, _ in points}:
            kept = client.get_metric_history(run.info.run_id, name)
            # at the last step there may be a final value beside the point
            assert {(name, point.step): point.value for point in kept if point.step < STEPS} == {
                key: value for key, value in points.items() if key[0] == name and key[1] < STEPS
            }
            assert (name, STEPS) not in points or points[name, STEPS] in [point.value for point in kept]
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert files >= {"volume.mrc", "metrics.json", "figures"}


def test_the_database_has_as_many_points_as_the_journals(written: Written) -> None:
    with psycopg(written.database) as connection:
        cursor = connection.cursor()
        cursor.execute("select count(*) from metrics where step < %s", (STEPS,))
        (found,) = cursor.fetchone()
    expected = sum(step < STEPS for folder in written.folders for _, step in points_of(folder))
    print(f"{TRIALS} runs at once left {found} points of {expected} in PostgreSQL")
    assert found == expected >= TRIALS * (STEPS - 1) * 4


@pytest.mark.parametrize("user, password", [("admin", "wrong"), ("", "")])
def test_who_has_no_password_is_told_so_in_a_line(
    written: Written, user: str, password: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    config = load_config("tracking.enabled=true", f"tracking.uri={written.server}")
    with pytest.raises(ConfigError, match=r"tracking\.uri: http.* cannot be used") as told:
        start_tracking(config, RunFolder(tmp_path), {})
    said = str(told.value)
    assert "401" in said or "not authenticated" in said.lower()
    assert len(said.splitlines()) == 1


def test_the_server_is_not_open(written: Written) -> None:
    host, port = written.server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /api/2.0/mlflow/experiments/search?max_results=1 HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        assert b" 401 " in connection.recv(100)
