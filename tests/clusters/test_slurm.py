"""The Slurm scripts on a real Slurm of this machine: a run on two nodes, and one that meets its time limit.

Slow: each job starts a Ray on two nodes. Whole nodes are hosts of their own, as the script ends every Ray of its host.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aceray.data.particles import ParticleSet
from aceray.folder import RunFolder
from tests.clusters import hosts, slurm
from tests.clusters.slurm import Slurm
from tests.distributed.conftest import QUICK

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "Slurm is there")]
ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "clusters" / "slurm"
# A Slurm, and `sbatch` on it with options and settings, which returns the job's number.
Submitted = tuple[Slurm, Callable[..., str]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    running = Slurm(tmp_path_factory.mktemp("slurm") / "s")
    yield running
    running.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if hosts.missing():
        pytest.skip(hosts.missing())
    with hosts.some_hosts(len(slurm.NODES)) as (here, machines):
        running = Slurm(tmp_path_factory.mktemp("slurm") / "w", here, machines)
        yield running
        running.end()


@pytest.fixture(params=["shared", "exclusive"])
def submitted(request: pytest.FixtureRequest, tmp_path: Path, particle_set: ParticleSet) -> Submitted:
    """`sbatch` of a script with a short run of two workers."""
    script = request.param
    cluster = request.getfixturevalue({"shared": "shared", "exclusive": "whole"}[script])
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text(
        f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT} PYTHONUNBUFFERED=1\n"
    )
    variables = f"ACERAY_SLURM={SCRIPTS},ACERAY_VENV={venv.parent},ACERAY_SECONDS_TO_CHECKPOINT=100"

    def run(options: tuple[str, ...], *settings: str) -> str:
        of_job = ("--parsable", "--nodes=2", "--mem=0", f"--export=ALL,{variables}", *options)
        if script == "shared":
            of_job += ("--cpus-per-task=1",)
        else:  # Ray sees two cores of each host: a worker for each
            settings += ("resources.cpus_per_worker=2",)
        given = ("train", f"data.path={particle_set.path}", *QUICK, "name=x", "resources.gpu=false", *settings)
        name = str(SCRIPTS / f"{script}.sbatch")
        return cluster.run("sbatch", *of_job, name, *given, "resources.workers=2", cwd=tmp_path).strip()

    return cluster, run


def await_state(cluster: Slurm, number: str, *states: str, within_seconds: float = 900.0) -> dict[str, str]:
    deadline = time.monotonic() + within_seconds
    while (job := cluster.job(number))["JobState"] not in states:
        assert time.monotonic() < deadline, job
        time.sleep(1.0)
    return job


def log_of(folder: Path, number: str) -> str:
    return (folder / f"aceray-{number}.log").read_text(errors="replace")


@pytest.mark.timeout(1200)
def test_a_run_on_two_nodes(submitted: Submitted, tmp_path: Path) -> None:
    cluster, submit = submitted
    number = submit(())
    job = await_state(cluster, number, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    assert job["JobState"] == "COMPLETED", log_of(tmp_path, number)
    folder = RunFolder(tmp_path / "runs" / "x")
    assert [row["step"] for row in folder.read_history()] == list(range(1, 41))
    assert folder.metrics.exists()
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".aceray-job")]
    assert left == []
    environment = cluster.environment
    assert "RAY_AUTH_TOKEN" not in log_of(tmp_path, number) and "RAY_AUTH_TOKEN" not in environment


@pytest.mark.timeout(1800)
def test_a_job_that_meets_its_time_limit_goes_on(submitted: Submitted, tmp_path: Path) -> None:
    cluster, submit = submitted
    steps = 3000
    number = submit(
        ("--time=30", "--signal=B:USR1@120"),
        f"train.steps={steps}",
        "train.checkpoint_every=100000",
    )
    folder = RunFolder(tmp_path / "runs" / "x")
    await_state(cluster, number, "RUNNING")
    deadline = time.monotonic() + 600
    while not folder.history.exists() or len(folder.read_history()) < 100:
        assert time.monotonic() < deadline, log_of(tmp_path, number)
        time.sleep(0.5)
    # a limit that is two minutes away from now on
    hours, minutes, seconds = (int(part) for part in cluster.job(number)["RunTime"].split(":"))
    limit = hours * 60 + minutes + (seconds > 0) + 1
    cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")
    await_state(cluster, number, "PENDING", "COMPLETED", "FAILED", "TIMEOUT", within_seconds=300)
    assert "Queued again" in log_of(tmp_path, number), log_of(tmp_path, number)
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    kept = folder.checkpoint_steps()[-1]  # of the step at which it was told to end, and of no other
    before = folder.read_history()
    assert 100 <= len(before) == kept < steps
    job = await_state(cluster, number, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    assert job["JobState"] == "COMPLETED", log_of(tmp_path, number)
    assert job["Restarts"] == "1"
    rows = folder.read_history()
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert rows[:kept] == before  # its speed, too: these steps were not done again
    assert folder.metrics.exists()
    assert not Path(f"/tmp/ray-{number}").exists()
