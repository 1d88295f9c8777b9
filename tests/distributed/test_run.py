"""A run in this process: what it leaves, how it is resumed, what stops it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import mrcfile
import numpy as np
import pandas
import pytest
import starfile
import torch

from aceray.config import Config
from aceray.data.particles import ParticleSet
from aceray.distributed.run import evaluate_run, exhaust, follow, run, threads
from aceray.distributed.share import Place, Share, train_share
from aceray.em.rotation import rotation_from_relion
from aceray.errors import ClusterError, ConfigError, DataError, NonFiniteLoss
from aceray.folder import RunFolder, RunResult, create_run_folder
from aceray.presets import load_config
from aceray.tracking.run import Tracker
from aceray.train.loop import Progress
from tests.distributed.conftest import QUICK
from tests.distributed.particles import BOX, PIXEL_SIZE, write_particles

ROOT = Path(__file__).parents[2]
Configure = Callable[..., Config]


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss_total"]) for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[Progress]]:
    """One undisturbed run on particles whose truth is known, with the events it gave."""
    events: list[Progress] = []
    folder = tmp_path_factory.mktemp("finished")
    particles = write_particles(folder / "blobs", truth=True)
    config = load_config(f"data.path={particles.path}", f"runs={folder / 'runs'}", *QUICK)
    return run(config, on_progress=events.append), events


def test_events_come_in_order_and_the_journal_has_them(finished: tuple[RunResult, list[Progress]]) -> None:
    result, events = finished
    assert [event.step for event in events] == list(range(1, 41))
    assert losses(result.folder) == [(event.step, event.losses["loss_total"]) for event in events]
    assert events[-1].metrics["pose/coverage"] > 0


def test_files_of_a_run(finished: tuple[RunResult, list[Progress]]) -> None:
    result, _ = finished
    folder = result.folder
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == result.metrics
    for name in ("train/loss_ipi", "train/wall_seconds", "pose/rotation_sqfrob_median", "fsc/resolution_px_0.5"):
        assert name in metrics
    for name in ("select/d4_consistency", "select/residual_loss", "select/residual_whitened_high"):
        assert 0 < metrics[name] < 10
    assert metrics["train/steps"] == 40
    with mrcfile.open(folder / "volume.mrc") as file:
        assert file.voxel_size.x == pytest.approx(PIXEL_SIZE)
        np.testing.assert_array_equal(file.data, result.volume)
    assert result.volume.shape == (BOX,) * 3
    with open(folder / "fsc.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["resolution_angstrom"]) for row in rows] == pytest.approx(
        [BOX * PIXEL_SIZE / shell for shell in range(1, BOX // 2 + 1)]
    )
    names = {"slices", "fsc", "view_directions", "rotation_errors", "training"}
    assert {path.stem for path in (folder / "figures").iterdir()} == names
    assert [path.name for path in (folder / "checkpoints").iterdir()].count("step-000040.safetensors") == 1
    assert result.mlflow_run_id is None
    assert not [path for path in folder.rglob(".*")]
    assert set(result.paths) >= {"config", "metrics", "history", "volume", "poses", "poses_star", "fsc", "figures"}


def test_poses_agree_in_both_files(finished: tuple[RunResult, list[Progress]]) -> None:
    result, _ = finished
    poses = result.poses
    assert poses["particle_id"].tolist() == list(range(1024))
    star = starfile.read(result.paths["poses_star"])["particles"]
    for ours, theirs in (("rot_deg", "rlnAngleRot"), ("tilt_deg", "rlnAngleTilt"), ("psi_deg", "rlnAnglePsi")):
        np.testing.assert_allclose(poses[ours], star[theirs], atol=1e-5)
    np.testing.assert_allclose(poses["origin_x_angstrom"], star["rlnOriginXAngst"], atol=1e-5)


def test_written_poses_are_rotations_and_origins_of_the_prediction(tmp_path: Path) -> None:
    from aceray.distributed.results import join_poses, write_poses
    from aceray.em.random import named_generator
    from aceray.em.rotation import random_rotations
    from aceray.train.predict import Poses

    rotation = random_rotations(6, named_generator("tests/poses", 1))
    shift = torch.arange(12.0).reshape(6, 2)
    identifier = torch.tensor([4, 0, 2, 5, 1, 3])
    whole = Poses(identifier, rotation, shift, shift[:, 0])
    parts = [Share(Poses(*(getattr(whole, name)[rows] for name in vars(whole))), torch.zeros(2, 2, 2))
             for rows in (slice(0, 3), slice(3, 6))]  # fmt: skip
    write_poses(RunFolder(tmp_path), join_poses(parts), pixel_size_angstrom=3.0)
    table = pandas.read_parquet(tmp_path / "poses.parquet")
    assert table["particle_id"].tolist() == list(range(6))
    angles = [torch.from_numpy(table[name].to_numpy(copy=True)) for name in ("rot_deg", "tilt_deg", "psi_deg")]
    order = identifier.argsort()
    torch.testing.assert_close(rotation_from_relion(*angles).float(), rotation[order], atol=1e-5, rtol=0)
    # the origin is where the content must be moved from, in angstrom: minus the shift
    np.testing.assert_allclose(table["origin_x_angstrom"], -3.0 * shift[order, 0].numpy())
    np.testing.assert_allclose(table["origin_y_angstrom"], -3.0 * shift[order, 1].numpy())


def test_an_interrupted_run_resumes_to_the_same_losses(
    configure: Configure, finished: tuple[RunResult, list[Progress]]
) -> None:
    """The run to compare with knew the truth, this one does not: it makes no difference to training."""

    def interrupt(event: Progress) -> None:
        if event.step == 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(configure(), on_progress=interrupt)
    folder = Path(configure().runs) / "run"
    assert RunFolder(folder).checkpoint_steps() == [10, 20]
    with pytest.raises(DataError, match="is at step 20"):
        run(configure())
    seen: list[int] = []
    result = run(configure(), existing="resume", on_progress=lambda event: seen.append(event.step))
    assert seen == list(range(21, 41))
    reference = finished[0]
    assert losses(folder) == losses(reference.folder)
    np.testing.assert_array_equal(result.volume, reference.volume)
    pandas.testing.assert_frame_equal(result.poses, reference.poses)


def test_evaluating_again_gives_the_same(finished: tuple[RunResult, list[Progress]]) -> None:
    result, _ = finished
    before = (result.folder / "poses.parquet").read_bytes()
    events: list[Progress] = []
    again = evaluate_run(result.folder, events.append)
    assert again.metrics == result.metrics
    assert (result.folder / "poses.parquet").read_bytes() == before
    assert [(event.step, event.metrics) for event in events] == [(40, result.metrics)]


def test_resume_of_a_finished_run_trains_nothing(configure: Configure) -> None:
    config = configure("train.steps=6", "train.checkpoint_every=3")
    first = run(config)
    seen: list[Progress] = []
    second = run(config, existing="resume", on_progress=seen.append)
    assert seen == []
    np.testing.assert_array_equal(first.volume, second.volume)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(configure: Configure, caplog) -> None:
    config = configure("train.steps=6", "train.checkpoint_every=3")
    folder = RunFolder(run(config).folder)
    whole = {name: tensor.clone() for name, tensor in folder.read_checkpoint(6)[0].items()}  # they are mapped
    damage(folder.checkpoint_file(6))
    with pytest.raises(DataError, match=r"step-000006\.safetensors: the checkpoint is damaged"):
        evaluate_run(folder.path)
    again: list[int] = []
    run(config, existing="resume", on_progress=lambda event: again.append(event.step))
    assert again == [4, 5, 6]
    assert "renamed to step-000006.damaged; the run goes on from step 3" in caplog.text
    tensors, _ = folder.read_checkpoint(6)
    assert tensors.keys() == whole.keys() and all(tensors[name].equal(whole[name]) for name in whole)


def test_with_no_whole_checkpoint_left_nothing_is_begun_again_unasked(configure: Configure) -> None:
    config = configure("train.steps=6", "train.checkpoint_every=3")
    folder = RunFolder(run(config).folder)
    for step in (3, 6):
        damage(folder.checkpoint_file(step))
    with pytest.raises(DataError, match=r"step-000003\.safetensors: the checkpoint is damaged .* from step 0"):
        run(config, existing="resume")
    folder.checkpoint_file(3).unlink()
    assert run(config, existing="resume").metrics["train/steps"] == 6


def test_a_checkpoint_of_another_model(configure: Configure) -> None:
    result = run(configure("train.steps=4"))
    other = run(configure("train.steps=4", "name=wider", "encoder.width=40"))
    file = "checkpoints/step-000004.safetensors"
    (result.folder / file).write_bytes((other.folder / file).read_bytes())
    with pytest.raises(DataError, match="another model"):
        evaluate_run(result.folder)


def test_another_data_set(configure: Configure, tmp_path: Path) -> None:
    run(configure("train.steps=4"))
    other = write_particles(tmp_path / "other", seed=2)
    with pytest.raises(DataError, match="not the particles"):
        run(configure("train.steps=4", f"data.path={other.path}"), existing="resume")


def test_evaluate_without_a_checkpoint(configure: Configure) -> None:
    folder = create_run_folder(configure())
    with pytest.raises(DataError, match="no checkpoint"):
        evaluate_run(folder.path)


@pytest.mark.parametrize(
    "override, kind, where",
    [
        ("data.path=/nowhere", DataError, "/nowhere"),
        ("train.lanes=8", ConfigError, "train.lanes"),
    ],
)
def test_a_mistake_leaves_no_folder(configure: Configure, override: str, kind: type[Exception], where: str) -> None:
    with pytest.raises(kind, match=where):
        run(configure(override))
    assert not (Path(configure().runs) / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(configure: Configure) -> None:
    with pytest.raises(ClusterError, match=r"resources\.gpu"):
        run(configure("resources.gpu=true"))
    assert not (Path(configure().runs) / "run").exists()


def test_losses_that_are_no_number_stop_the_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*arguments: object) -> Generator[Progress, None, Share]:
        yield from ()
        raise NonFiniteLoss("training step 3: loss_ipi is nan")

    monkeypatch.setattr("aceray.distributed.run.train_share", diverging)
    with pytest.raises(NonFiniteLoss, match="step 3"):
        run(configure())


def test_steps_seen_before_are_passed_over(tmp_path: Path) -> None:
    """After a worker was restarted from step 2, steps 3 and 4 come a second time."""

    def progress() -> Generator[Progress, None, list[Share]]:
        for step in (1, 2, 3, 4, 3, 4, 5):
            yield Progress(step, 5, {"loss_total": step / 4}, 10.0)
        return []

    seen: list[int] = []
    assert exhaust(follow(progress(), RunFolder(tmp_path), Tracker()), lambda event: seen.append(event.step)) == []
    assert seen == [1, 2, 3, 4, 5]
    assert losses(tmp_path) == [(step, step / 4) for step in (1, 2, 3, 4, 5)]


def test_threads_are_set_for_the_run_and_given_back(configure: Configure) -> None:
    before = torch.get_num_threads()
    with threads(configure("train.threads=3")):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_a_share_alone(configure: Configure, particle_set: ParticleSet) -> None:
    """The generator of one worker knows no Ray, MLflow or screen."""
    from aceray.distributed.ingest import read_here

    config = configure("train.steps=3")
    folder = create_run_folder(config)
    stack = read_here(particle_set, particle_set.row_groups(), BOX)
    share = train_share(config, folder, particle_set, stack, Place())
    assert [next(share).step for _ in range(3)] == [1, 2, 3]
    with pytest.raises(StopIteration) as end:
        next(share)
    assert end.value.value.poses.particle_id.tolist() == list(range(1024))
    assert folder.checkpoint_steps() == [3]


CHILD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
from aceray.distributed.run import run
from aceray.presets import load_config
def show(event):
    print("step", event.step, flush=True)
result = run(load_config(*sys.argv[1:]), on_progress=show)
assert not [name for name in sys.modules if name.partition(".")[0] in {blocked!r}]
print("finished", result.mlflow_run_id, sorted(result.paths))
"""


def child(config: Config, *overrides: str, blocked: tuple[str, ...] = ()) -> subprocess.Popen:
    folder = create_run_folder(config)
    preset = folder.path.parent / "settings.yaml"
    folder.config.rename(preset)
    (folder.path / "checkpoints").rmdir()
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(blocked=blocked), str(preset), *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_without_ray_and_mlflow_installed(configure: Configure) -> None:
    process = child(configure("train.steps=4"), "tracking.enabled=true", blocked=("ray", "mlflow"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[:4] == [f"step {step}" for step in (1, 2, 3, 4)]
    names = ["checkpoints", "config", "figures", "history", "metrics", "poses", "poses_star", "volume"]
    assert out.splitlines()[-1] == f"finished None {names}"
    assert err.splitlines() == [f"MLflow is not installed: tracking is off, the results are in {configure().runs}/run"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_it_can_be_resumed(configure: Configure, tmp_path: Path, number: int) -> None:
    database = f"sqlite:///{tmp_path}/ml.db" if number == signal.SIGTERM else ""
    tracking = (f"tracking.uri={database}", "tracking.enabled=true") if database else ()
    config = configure("decoder/voxel", "train.steps=100000", "train.evaluate_every=100000")
    process = child(config, *tracking)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 15"):
            process.send_signal(number)
            sent = time.monotonic()
            break
    process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == -signal.SIGINT  # what Python does with a KeyboardInterrupt
    folder = RunFolder(Path(config.runs) / "run")
    assert folder.checkpoint_steps()[-1] >= 10
    assert not [path for path in folder.path.rglob(".*.partial")]
    if database:
        from mlflow import MlflowClient

        run_id = folder.read_notes()["mlflow_run_id"]
        tracked = MlflowClient(tracking_uri=database).get_run(run_id)
        assert tracked.info.status == "KILLED"
        # through the saved settings that the child was given
        assert tracked.data.tags["aceray.presets"] == "decoder/voxel"


def test_a_run_on_one_half_knows_no_other_particle(configure: Configure, tmp_path: Path) -> None:
    particles = write_particles(tmp_path / "blobs", truth=True)
    short = (f"data.path={particles.path}", "train.steps=2", "train.lanes=2", "data.half_set=2")
    result = run(configure("name=half", *short))
    odd = list(range(1, 1024, 2))
    assert result.poses["particle_id"].tolist() == odd
    star = starfile.read(result.paths["poses_star"])["particles"]
    assert star["rlnImageName"].tolist() == [f"{number + 1:06d}@blobs.mrcs" for number in odd]
    assert set(star["rlnRandomSubset"]) == {2}
    assert "pose/rotation_sqfrob_mean" in result.metrics
    assert evaluate_run(result.folder).metrics == result.metrics
