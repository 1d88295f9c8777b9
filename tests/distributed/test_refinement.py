"""Refinement as part of a run: its rounds, files and checkpoints, in this process and on Ray."""

import json
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import aceray
from aceray.build import final_box, last_step, refinement_rounds, training_box
from aceray.config import Config
from aceray.data.mrc import read_volume
from aceray.data.particles import TRUTH_COLUMNS, ParticleSet, ParticleStack, open_particles
from aceray.distributed.ingest import read_here
from aceray.distributed.run import evaluate_run, evaluate_run_with_oracle, exhaust, run
from aceray.distributed.share import Place, train_share
from aceray.em.rotation import rotation_from_relion, rotation_sqfrob
from aceray.folder import RunFolder, create_run_folder
from aceray.metrics.alignment import align_poses
from aceray.metrics.fsc import fourier_shell_correlation
from aceray.presets import load_config
from aceray.train.loop import Progress
from tests.distributed.conftest import QUICK
from tests.distributed.particles import BOX, PIXEL_SIZE, write_particles

Configure = Callable[..., Config]
SHORT = ("train.steps=6", "encoder.heads=1", "refine.search_rounds=2", "refine.polish_rounds=1")


def refined(configure: Configure, *overrides: str) -> Config:
    return configure("refine={}", *SHORT, *overrides)


@pytest.fixture(scope="module")
def finished(
    particle_set: ParticleSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, list[Progress], dict[str, float]]:
    events: list[Progress] = []
    paths = f"data.path={particle_set.path}", f"runs={tmp_path_factory.mktemp('refined')}"
    result = run(load_config(*paths, *QUICK, "refine={}", *SHORT), on_progress=events.append)
    return RunFolder(result.folder), events, result.metrics


def test_rounds_follow_the_steps(finished: tuple[RunFolder, list[Progress], dict[str, float]]) -> None:
    folder, events, metrics = finished
    assert [event.step for event in events] == list(range(1, 11))
    assert {event.steps for event in events} == {10}
    assert [bool(event.losses) for event in events] == [True] * 6 + [False] * 4
    assert all("refine/moved" in event.metrics and event.snapshot is not None for event in events[6:])
    assert folder.checkpoint_steps()[-1] == 10 and folder.is_finished(10)
    assert 0 < metrics["refine/energy"] < 1.5
    assert metrics["refine/near_symmetry_order"] >= 1
    assert "train/loss_total" in metrics and "select/d4_consistency" in metrics


def test_maps_of_both_halves_are_left(
    finished: tuple[RunFolder, list[Progress], dict[str, float]], tmp_path: Path
) -> None:
    folder, _, metrics = finished
    halves = []
    for path in folder.half_maps:
        with mrcfile.open(path) as file:
            assert file.voxel_size.x == pytest.approx(PIXEL_SIZE)
            halves.append(np.array(file.data))
    assert halves[0].shape == (BOX,) * 3
    assert np.abs(halves[0] - halves[1]).max() > 1e-3 * np.abs(halves[0]).max()
    # the volume is cut to the mask, its halves are not
    volume, mask = (read_volume(path)[0] for path in (folder.volume, folder.mask))
    assert 0 < float(mask.mean()) < 0.9 and float(mask.min()) >= 0 and float(mask.max()) == 1
    outside = mask.numpy() == 0
    assert np.square(halves[0][outside]).mean() > 4 * np.square(volume.numpy()[outside]).mean()
    assert metrics["refine/half_map_resolution_px_0.143"] >= 2
    assert set(folder.paths) >= {"half_1", "half_2", "volume", "poses"}
    # the table of their agreement, by the maps as they were written
    curve = fourier_shell_correlation(*(torch.from_numpy(half) for half in halves))
    table = pd.read_csv(folder.half_map_fsc)
    np.testing.assert_allclose(table["fsc"], curve[1:], atol=1e-4)
    np.testing.assert_allclose(table["resolution_angstrom"], BOX * PIXEL_SIZE / table["shell"])
    assert (folder.figures / "half_map_fsc.png").exists()
    exported = aceray.export(folder.path, tmp_path / "out")
    assert set(exported.paths) >= {"half_1", "half_2", "mask", "half_map_fsc"}


@pytest.mark.parametrize("stop", [4, 8])
def test_an_interrupted_refinement_goes_on_to_the_same_result(
    configure: Configure, finished: tuple[RunFolder, list[Progress], dict[str, float]], stop: int
) -> None:
    def interrupt(event: Progress) -> None:
        if event.step == stop:
            raise KeyboardInterrupt

    config = refined(configure, "name=again", "train.checkpoint_every=2")
    with pytest.raises(KeyboardInterrupt):
        run(config, on_progress=interrupt)
    again = run(config, existing="resume")
    folder, _, metrics = finished
    with mrcfile.open(folder.volume) as file:
        np.testing.assert_allclose(again.volume, file.data, atol=1e-4 * np.abs(file.data).max())
    assert again.metrics["refine/energy"] == pytest.approx(metrics["refine/energy"], rel=1e-5)
    steps = [json.loads(line)["step"] for line in (again.folder / "history.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))


def test_evaluating_again_needs_no_new_rounds(
    finished: tuple[RunFolder, list[Progress], dict[str, float]],
) -> None:
    folder, _, metrics = finished
    again = evaluate_run(folder.path).metrics
    for name in ("pose/coverage", "refine/energy", "refine/half_map_resolution_px_0.143"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-4)


def test_boxes_grow_from_crops_to_the_stored_size(configure: Configure) -> None:
    config = refined(configure, "data.box=12", "refine.polish_rounds=2")
    result = run(config)
    assert result.volume.shape == (BOX,) * 3
    small = run(refined(configure, "name=small", "data.box=12", "refine.box=12"))
    assert small.volume.shape == (12,) * 3


@pytest.mark.usefixtures("ray_session")
def test_two_workers_refine_as_one_with_two_lanes(configure: Configure) -> None:
    one = run(refined(configure, "name=one", "train.lanes=2"))
    two = run(refined(configure, "name=two", "resources.workers=2"))
    assert two.metrics["refine/energy"] == pytest.approx(one.metrics["refine/energy"], rel=1e-3)
    assert two.metrics["refine/moved"] == pytest.approx(one.metrics["refine/moved"], abs=0.02)
    correlation = np.corrcoef(one.volume.ravel(), two.volume.ravel())[0, 1]
    assert correlation > 0.99
    assert two.poses["particle_id"].tolist() == one.poses["particle_id"].tolist()
    # the checkpoint of two workers is evaluated in one process
    assert evaluate_run(two.folder).metrics["refine/energy"] == pytest.approx(two.metrics["refine/energy"], rel=1e-4)


def test_the_oracle_has_the_box_of_the_volume(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(refined(configure, "data.box=12"))
    boxes: list[int] = []

    def noted(particles: ParticleSet, stack: ParticleStack, device: str, on_search: object) -> dict[str, float]:
        boxes.append(stack.images.shape[-1])
        return {}

    monkeypatch.setattr("aceray.distributed.run.oracle_metrics", noted)
    evaluate_run_with_oracle(result.folder)
    assert boxes == [BOX]


def test_plan_of_the_rounds() -> None:
    def boxes(stored: int, *overrides: str) -> list[int]:
        return [each.box for each in refinement_rounds(load_config(*overrides), stored)]

    assert boxes(32) == [32] * 16
    assert boxes(64) == [32] * 13 + [64] * 3
    assert boxes(128, "refine.polish_rounds=3") == [32] * 13 + [64, 128, 128]
    assert boxes(256, "refine.polish_rounds=2")[-2:] == [90, 256]
    assert boxes(128, "refine.box=64")[-3:] == [64, 64, 64]
    assert boxes(24) == [24] * 16
    plan = refinement_rounds(load_config(), 64)
    assert [each.registers for each in plan[:3]] == [False, True, False]
    assert {each.searched for each in plan[:13] if not each.registers} == {1.0}
    assert not any(each.registers for each in refinement_rounds(load_config("refine.registers=false"), 64))
    assert boxes(64, "refine=null") == []
    assert last_step(load_config("train.steps=100")) == 116
    assert last_step(load_config("train.steps=100", "refine=null")) == 100


@pytest.mark.parametrize(
    ("stored", "overrides", "training", "final"),
    [(64, (), 32, 64), (24, (), 24, 24), (64, ("data.box=null",), 64, 64), (64, ("refine=null",), 32, 32)],
)
def test_boxes_of_a_run(stored: int, overrides: tuple[str, ...], training: int, final: int) -> None:
    config = load_config(*overrides)
    assert (training_box(config, stored), final_box(config, stored)) == (training, final)


def test_refinement_does_not_read_the_truth(configure: Configure, particle_set: ParticleSet, tmp_path: Path) -> None:
    copy = tmp_path / "without"
    copy.mkdir()
    for file in particle_set.path.glob("*.parquet"):
        table = pq.read_table(file).drop_columns(list(TRUTH_COLUMNS))
        pq.write_table(table, copy / file.name, row_group_size=256, write_page_checksum=True)
    shares = []
    for name, particles in (("seeing", particle_set), ("blind", ParticleSet(copy, particle_set.manifest))):
        config = refined(configure, f"name={name}")
        folder = create_run_folder(config, "error")
        stack = read_here(particles, particles.row_groups(), BOX)
        shares.append(exhaust(train_share(config, folder, particles, stack, Place()), None))
    torch.testing.assert_close(shares[0].poses.rotation, shares[1].poses.rotation, rtol=0, atol=0)
    torch.testing.assert_close(shares[0].volume, shares[1].volume, rtol=0, atol=0)


def test_new_particles_are_refined_as_well_as_those_of_the_run(
    finished: tuple[RunFolder, list[Progress], dict[str, float]], tmp_path: Path
) -> None:
    """Other views of the same molecule: what the refined poses leave unexplained is alike."""
    folder, _, _ = finished
    write_particles(tmp_path / "new", seed=2, truth=True)
    found = aceray.predict(folder.path, tmp_path / "new", tmp_path / "out")
    assert found.method == "encoder, refined against the run's map"
    own, new = (pd.read_parquet(path)["residual"] for path in (folder.poses, found.paths["poses.parquet"]))
    # an image that made the map has a part of its noise in it
    assert float(new.median()) == pytest.approx(float(own.median()), rel=0.05)
    encoded = aceray.predict(folder.path, tmp_path / "new", tmp_path / "encoded", refine=False, eightfold=False)
    worse = pd.read_parquet(encoded.paths["poses.parquet"])["residual"]
    assert encoded.method == "encoder" and not np.allclose(worse, new)


def errors(rotation: torch.Tensor, dataset: Path) -> torch.Tensor:
    """Squared Frobenius distances to the truth, after alignment."""
    truth = open_particles(dataset).read_truth()
    assert truth is not None
    aligned = align_poses(rotation.float(), truth.rotation).apply(rotation.float())
    return rotation_sqfrob(aligned.double(), truth.rotation.double())


def rotations(path: Path, order: str) -> torch.Tensor:
    table = pd.read_parquet(path).sort_values(order)
    return rotation_from_relion(*(torch.tensor(table[name].to_numpy()) for name in ("rot_deg", "tilt_deg", "psi_deg")))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_errors_of_new_particles_are_no_larger_than_those_of_the_runs_own(tmp_path: Path) -> None:
    for name, seed in (("own", 1), ("new", 2)):
        write_particles(tmp_path / name, seed, truth=True)
    few = [word for word in QUICK if not word.startswith(("train.steps", "refine", "encoder.width"))]
    paths = f"data.path={tmp_path / 'own'}", f"runs={tmp_path / 'runs'}"
    config = load_config(*paths, *few, "train.steps=600", "refine.search_rounds=3", "refine.polish_rounds=1")
    folder = RunFolder(run(config).folder)
    found = aceray.predict(folder.path, tmp_path / "new", tmp_path / "out")
    own = errors(rotations(folder.poses, "particle_id"), tmp_path / "own")
    new = errors(rotations(found.paths["poses.parquet"], "stack_index"), tmp_path / "new")
    assert float(own.median()) < 0.02
    # a run's own particles have their noise in the map: new ones may do better
    assert float(new.median()) < 1.15 * float(own.median())
    assert float((new > 0.5).double().mean()) < float((own > 0.5).double().mean()) + 0.02
