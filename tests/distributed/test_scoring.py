"""Evaluation beside the oracle, and files of other programs in the same metrics."""

import csv
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import roma
import starfile
import torch
from torch.testing import assert_close

from aceray.config import Config
from aceray.data.mrc import read_volume, write_volume
from aceray.data.particles import ParticleSet, open_particles
from aceray.data.pose_files import read_poses, write_poses_star
from aceray.distributed.results import score_files
from aceray.distributed.run import compare_half_runs, evaluate_run, evaluate_run_with_oracle, run
from aceray.errors import DataError
from aceray.folder import RunFolder, RunResult
from aceray.metrics.fsc import fourier_shell_correlation
from aceray.presets import load_config
from aceray.train import oracle
from tests.distributed.conftest import QUICK
from tests.distributed.particles import BOX, PIXEL_SIZE, blobs, write_particles
from tests.references.density import rotation_from_angles


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, ParticleSet]:
    """A short run on particles whose truth is known."""
    folder = tmp_path_factory.mktemp("scoring")
    particles = write_particles(folder / "blobs", truth=True)
    config = load_config(f"data.path={particles.path}", f"runs={folder / 'runs'}", *QUICK)
    return run(config), particles


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert {name.split("/")[0] for name in found} == {"pose", "fsc"}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-3, abs=1e-5)


def test_our_own_files_give_our_own_numbers(finished: tuple[RunResult, ParticleSet], tmp_path: Path) -> None:
    result, particles = finished
    star, volume = result.paths["poses_star"], result.paths["volume"]
    same(score_files(particles.path, star, volume), result.metrics)
    blocks = starfile.read(star)
    # the number in the name counts, not the order of the rows
    blocks["particles"] = blocks["particles"].iloc[::-1]
    starfile.write(blocks, tmp_path / "backwards.star")
    same(score_files(particles.path, tmp_path / "backwards.star", volume), result.metrics)
    blocks["particles"] = blocks["particles"].iloc[::-1].drop(columns="rlnImageName")
    starfile.write(blocks, tmp_path / "nameless.star")
    same(score_files(particles.path, tmp_path / "nameless.star", volume), result.metrics)


def test_the_same_poses_of_other_programs_give_the_same_numbers(
    finished: tuple[RunResult, ParticleSet], tmp_path: Path
) -> None:
    """The STAR file's poses, turned into cryoSPARC's and cryoDRGN's by their own definitions."""
    result, particles = finished
    truth = particles.read_truth()
    assert truth is not None
    # a sign or an order of axes that is wrong changes the distance from the true shifts
    shift_px = truth.shift_px + torch.tensor([0.5, -1.0]) + 0.2 * torch.arange(len(truth.shift_px))[:, None].sin()
    write_poses_star(tmp_path / "other.star", truth.rotation, shift_px, particles)
    rows = starfile.read(tmp_path / "other.star")["particles"]
    angles = rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    matrix = np.stack([rotation_from_angles(*row) for row in angles])
    # both move the image by their shift to centre it, as RELION does by its origin
    origin_px = rows[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy() / PIXEL_SIZE
    table = np.zeros(
        len(rows),
        dtype=[("blob/idx", "<u4"), ("alignments3D/pose", "<f8", (3,)), ("alignments3D/shift", "<f8", (2,))],
    )
    table["blob/idx"] = np.arange(len(rows))
    table["alignments3D/pose"] = roma.rotmat_to_rotvec(torch.from_numpy(matrix.transpose(0, 2, 1).copy())).numpy()
    table["alignments3D/shift"] = origin_px
    with open(tmp_path / "other.cs", "wb") as stream:
        np.save(stream, table[::-1])
    (tmp_path / "other.pkl").write_bytes(pickle.dumps((matrix, origin_px / BOX)))
    expected = score_files(particles.path, tmp_path / "other.star", result.paths["volume"])
    for name in ("other.cs", "other.pkl"):
        same(score_files(particles.path, tmp_path / name, result.paths["volume"]), expected)
        rotation, found_px, _ = read_poses(tmp_path / name, particles.manifest)
        assert_close(rotation, truth.rotation, atol=1e-5, rtol=0)
        assert_close(found_px, shift_px, atol=1e-5, rtol=0)


def test_files_of_another_set_are_refused(finished: tuple[RunResult, ParticleSet], tmp_path: Path) -> None:
    result, particles = finished
    star, volume = result.paths["poses_star"], result.paths["volume"]
    blocks = starfile.read(star)
    whole = blocks["particles"]
    broken = {
        "lacks the column rlnAngleTilt": whole.drop(columns="rlnAngleTilt"),
        "has 7 rows and no rlnImageName": whole.drop(columns="rlnImageName")[:7],
        "does not count particles 1 to 1024": whole.assign(rlnImageName="000001@stack.mrcs"),
    }
    for message, table in broken.items():
        starfile.write({"optics": blocks["optics"], "particles": table}, tmp_path / "broken.star", overwrite=True)
        with pytest.raises(DataError, match=message):
            score_files(particles.path, tmp_path / "broken.star", volume)
    write_volume(tmp_path / "wide.mrc", read_volume(volume)[0], 2 * PIXEL_SIZE)
    with pytest.raises(DataError, match=r"is 128\.0 A wide, the images of .* 64\.0 A"):
        score_files(particles.path, star, tmp_path / "wide.mrc")
    with pytest.raises(DataError, match="holds neither true poses nor a true volume"):
        score_files(write_particles(tmp_path / "untrue").path, star, volume)


def test_the_oracle_stands_beside_the_run(
    finished: tuple[RunResult, ParticleSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = finished
    monkeypatch.setattr(oracle, "SEARCHED_PARTICLES", 200)
    monkeypatch.setattr(oracle, "_SEARCH_NSIDE", 2)
    events: list[oracle.OracleProgress] = []
    again = evaluate_run_with_oracle(result.folder, None, events.append)
    assert events[-1].done == events[-1].particles == 200
    assert again.metrics["oracle/pose/rotation_sqfrob_mean"] < 0.1 < again.metrics["pose/rotation_sqfrob_mean"]
    assert again.metrics["oracle/fsc/auc"] > again.metrics["fsc/auc"]
    assert json.loads(again.paths["metrics"].read_text()) == again.metrics
    # an evaluation without it keeps what does not depend on the run
    assert evaluate_run(result.folder).metrics == again.metrics


def test_without_a_truth_there_is_no_oracle(configure: Callable[..., Config]) -> None:
    result = run(configure("name=untrue", "train.steps=2", "train.checkpoint_every=2"))
    with pytest.raises(DataError, match="holds no true poses and volume, so there is no oracle"):
        evaluate_run_with_oracle(result.folder)


def test_the_truth_scores_perfectly(finished: tuple[RunResult, ParticleSet], tmp_path: Path) -> None:
    particles = open_particles(finished[1].path)
    truth, volume = particles.read_truth(), particles.read_truth_volume()
    assert truth is not None and volume is not None
    write_poses_star(tmp_path / "true.star", truth.rotation, truth.shift_px + torch.tensor([0.5, 0.0]), particles)
    write_volume(tmp_path / "true.mrc", volume, PIXEL_SIZE)
    metrics = score_files(particles.path, tmp_path / "true.star", tmp_path / "true.mrc")
    assert metrics["pose/rotation_sqfrob_mean"] < 1e-6 and metrics["fsc/resolution_px_0.5"] == 2
    assert metrics["pose/shift_sq_px_raw_mean"] == pytest.approx(0.25, abs=1e-4)
    assert BOX * PIXEL_SIZE == 64


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two short runs, on the half sets of one data set."""
    folder = tmp_path_factory.mktemp("halves")
    particles = write_particles(folder / "blobs")
    short = (f"data.path={particles.path}", f"runs={folder / 'runs'}", *QUICK, "train.steps=2")
    first, second = (run(load_config(*short, f"name=half{half}", f"data.half_set={half}")).folder for half in (1, 2))
    return first, second


def test_half_maps_are_compared_in_the_folder_of_the_first_run(halves: tuple[Path, Path]) -> None:
    first, second = halves
    noise = torch.randn(2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(5)) * 0.02
    write_volume(first / "volume.mrc", blobs() + noise[0], PIXEL_SIZE)
    # two axes exchanged: a turn of the other hand
    write_volume(second / "volume.mrc", (blobs() + noise[1]).transpose(0, 2), PIXEL_SIZE)
    untouched = sorted(second.rglob("*")), (second / "metrics.json").read_text()
    before = json.loads((first / "metrics.json").read_text())
    result = compare_half_runs(first, second, "sphere")
    found = json.loads((first / "metrics.json").read_text())
    assert found == result.metrics == before | result.metrics
    new = set(result.metrics) - set(before)
    assert new == {"fsc/half_map_resolution_px_0.143", "fsc/half_map_resolution_angstrom_0.143"}
    assert 2 <= found["fsc/half_map_resolution_px_0.143"] < 4
    with open(result.paths["half_map_fsc"], newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["shell"]) for row in rows] == list(range(1, BOX // 2 + 1))
    assert {"fsc", "fsc_unmasked", "fsc_masked", "fsc_random_phases"} <= set(rows[0])
    expected = fourier_shell_correlation(blobs() + noise[0], blobs() + noise[1])[1:5]
    assert [float(row["fsc_unmasked"]) for row in rows[:4]] == pytest.approx(expected.tolist(), abs=0.03)
    assert (first / "figures" / "half_map_fsc.png").stat().st_size > 1000
    assert (sorted(second.rglob("*")), (second / "metrics.json").read_text()) == untouched
    # another volume makes the comparison stale
    again = evaluate_run(first)
    assert "half_map_fsc" not in again.paths and not (first / "figures" / "half_map_fsc.png").exists()
    assert new.isdisjoint(again.metrics)


def test_half_maps_that_cannot_be_compared_are_refused(halves: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = halves
    with pytest.raises(DataError, match=r"trained on half set 1, .* on half set 1; half maps share no particle"):
        compare_half_runs(first, first)
    wrong = tmp_path / "wrong"
    shutil.copytree(second, wrong)
    settings = (wrong / "config.yaml").read_text()
    (wrong / "config.yaml").write_text(settings.replace("half_set: 2", "half_set: null"))
    with pytest.raises(DataError, match=r"wrong: trained on all particles, .* on half set 1"):
        compare_half_runs(first, wrong)
    (wrong / "config.yaml").write_text(settings)
    write_volume(wrong / "volume.mrc", torch.randn(8, 8, 8), 2 * PIXEL_SIZE)
    with pytest.raises(DataError, match=r"8 px of 8 A, .*: 16 px of 4 A; half maps need one box"):
        compare_half_runs(first, wrong)
    (wrong / "volume.mrc").unlink()
    with pytest.raises(DataError, match="wrong: the run has no volume yet"):
        compare_half_runs(first, wrong)
    RunFolder(wrong).write_notes(dataset_sha256="0123")
    with pytest.raises(DataError, match="trained on other particles than"):
        compare_half_runs(first, wrong)
