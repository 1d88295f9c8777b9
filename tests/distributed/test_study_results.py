"""From the folder of a study to its files: whatever became of the trials, and nothing that was not measured."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from aceray.config import Config
from aceray.data.mrc import read_volume
from aceray.data.particles import ParticleSet, open_particles
from aceray.distributed import study_results
from aceray.distributed.run import run
from aceray.distributed.study_results import find_oracles, importances, read_entries, write_study_results
from aceray.errors import DataError
from aceray.folder import RunResult
from aceray.leaderboard import Entry
from aceray.metrics.fsc import fourier_shell_correlation
from aceray.presets import load_config
from aceray.study import Study, load_study
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

AREA, MEAN = "fsc/auc", "pose/rotation_sqfrob_mean"
SPACE = {"pip.weight": [0.0, 2.0], "seed": [1, 2]}
TABLE = {"rows": "pip.weight", "metrics": [AREA], "curves": ["pose/coverage"], "oracle": True}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, ParticleSet]:
    """A short run on particles whose truth is known."""
    folder = tmp_path_factory.mktemp("study")
    particles = write_particles(folder / "blobs", truth=True)
    return run(load_config(f"data.path={particles.path}", f"runs={folder / 'runs'}", *QUICK)), particles


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A stand-in for the oracle's search, and the data sets it was asked for."""
    asked: list[Path] = []

    def found(particles: ParticleSet, *others: object) -> dict[str, float]:
        asked.append(particles.path)
        return {f"oracle/{AREA}": 0.875}

    monkeypatch.setattr(study_results, "oracle_metrics", found)
    return asked


def study_with(folder: Path, **keys: object) -> Study:
    (folder / "s.yaml").write_text(
        yaml.safe_dump({"base": ["train.steps=40"], "space": SPACE, **keys}, sort_keys=False)
    )
    return load_study(str(folder / "s.yaml"))


def add_trial(folder: Path, number: int, point: dict, run_folder: Path | None, **keys: object) -> Path:
    """A trial's folder with a copy of a run; `member` is where in it."""
    trial = folder / "trials" / f"t{number}"
    member = str(keys.pop("member", "."))
    trial.mkdir(parents=True)
    if run_folder is not None:
        shutil.copytree(run_folder, trial / member, dirs_exist_ok=True)
    found = {"number": number, "point": point, "status": "finished", "reason": "", "seconds": 1.5, "metrics": {}}
    (trial / "trial.json").write_text(json.dumps(found | keys))
    return trial


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "leaderboard.csv").read_text().splitlines()))


def pictures(folder: Path) -> set[str]:
    return {file.stem for file in (folder / "figures").iterdir()}


def test_a_study_with_every_kind_of_end_gives_every_file(
    known: tuple[RunResult, ParticleSet], oracle: list[Path], tmp_path: Path
) -> None:
    result, _ = known
    study = study_with(tmp_path, table=TABLE)
    add_trial(tmp_path, 0, {"pip.weight": 0.0, "seed": 1}, result.folder, metrics={AREA: 0.25})
    add_trial(tmp_path, 1, {"pip.weight": 2.0, "seed": 1}, result.folder, metrics={AREA: 0.75})
    add_trial(tmp_path, 2, {"pip.weight": 2.0, "seed": 2}, None, status="failed", reason="loss_pip: nan at step 3")
    stopped = add_trial(tmp_path, 3, {"pip.weight": 0.0, "seed": 2}, result.folder, status="stopped", reason="asha")
    for name in ("metrics.json", "volume.mrc", "fsc.csv"):
        (stopped / name).unlink()
    paths = write_study_results(study, tmp_path)
    assert set(paths) == {"leaderboard.csv", "leaderboard", "table", "figures", "oracle.json"}
    assert all(path.exists() for path in paths.values())
    assert pictures(tmp_path) == {"fsc", "slices", "objective", "curves", "table"}
    rows = {row["trial"]: row for row in rows_of(tmp_path)}
    assert rows["t1"]["rank"] == "1"
    assert (rows["t2"]["rank"], rows["t2"]["reason"], rows["t2"][AREA]) == ("", "loss_pip: nan at step 3", "")
    # what the stopped trial's journal held last
    assert float(rows["t3"][AREA]) == pytest.approx(result.metrics[AREA])
    assert float(rows["t3"]["train/steps"]) == 40
    text = (tmp_path / "table.md").read_text()
    assert "| 2 | 0.750 (n=1 of 2) |" in text
    assert "| oracle | 0.875 |" in text
    assert "40 steps, batch 32, " in text


def test_the_oracle_of_a_data_set_is_searched_once(
    known: tuple[RunResult, ParticleSet], oracle: list[Path], tmp_path: Path
) -> None:
    result, particles = known
    study = study_with(tmp_path, table=TABLE)
    for number in (0, 1):
        add_trial(tmp_path, number, {"pip.weight": 0.0, "seed": 1 + number}, result.folder)
    write_study_results(study, tmp_path)
    assert oracle == [particles.path]
    write_study_results(study, tmp_path)
    assert oracle == [particles.path]
    kept = json.loads((tmp_path / "oracle.json").read_text())
    assert kept == {particles.manifest.sha256: {f"oracle/{AREA}": 0.875}}


def test_no_oracle_is_asked_for_without_the_truth_or_the_table(
    known: tuple[RunResult, ParticleSet], oracle: list[Path], configure: Callable[..., Config], tmp_path: Path
) -> None:
    add_trial(tmp_path, 0, {"pip.weight": 0.0, "seed": 1}, known[0].folder)
    write_study_results(study_with(tmp_path, table=TABLE | {"oracle": False}), tmp_path)
    other = run(configure("train.steps=10", "train.evaluate_every=10"))
    blind = tmp_path / "blind"
    add_trial(blind, 0, {"pip.weight": 0.0, "seed": 1}, other.folder)
    study = study_with(tmp_path, table=TABLE | {"metrics": ["pose/coverage"]}, objective="pose/coverage")
    paths = write_study_results(study, blind)
    assert oracle == [] and "oracle.json" not in paths
    assert pictures(blind) == {"slices", "objective", "curves", "table"}
    assert "oracle" not in paths["table"].read_text().lower()


def test_a_real_oracle_reports_how_far_it_is(known: tuple[RunResult, ParticleSet], tmp_path: Path) -> None:
    result, particles = known
    study = study_with(tmp_path)
    add_trial(tmp_path, 0, {"pip.weight": 0.0, "seed": 1}, result.folder)
    told = []
    found = find_oracles(read_entries(study, tmp_path), tmp_path / "oracle.json", lambda *news: told.append(news))
    assert told[-1][0] == particles.path
    assert told[-1][1].done == told[-1][1].particles
    assert 0 < found[particles.manifest.sha256][f"oracle/{AREA}"] <= 1


def test_a_study_without_trials_has_an_empty_leaderboard_and_no_old_figures(tmp_path: Path) -> None:
    study = study_with(tmp_path, table=TABLE)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "fsc.png").write_text("old")
    (tmp_path / "criteria.md").write_text("old")
    paths = write_study_results(study, tmp_path)
    assert pictures(tmp_path) == set()
    assert "criteria" not in paths
    assert "No trials yet." in paths["leaderboard"].read_text()


def test_of_a_pair_the_first_member_is_read(known: tuple[RunResult, ParticleSet], tmp_path: Path) -> None:
    study = study_with(tmp_path)
    trial = add_trial(tmp_path, 0, {"pip.weight": 0.0, "seed": 1}, known[0].folder, member="half_1")
    (entry,) = read_entries(study, tmp_path)
    assert entry.folder == trial / "half_1"
    assert entry.metrics[AREA] == pytest.approx(known[0].metrics[AREA])
    assert entry.setup.particles == known[1].manifest.particles


def test_without_its_data_set_a_trial_is_still_read(known: tuple[RunResult, ParticleSet], tmp_path: Path) -> None:
    study = study_with(tmp_path, table=TABLE)
    trial = add_trial(tmp_path, 0, {"pip.weight": 0.0, "seed": 1}, known[0].folder)
    text = (trial / "config.yaml").read_text()
    (trial / "config.yaml").write_text(text.replace(str(known[1].path), str(tmp_path / "gone")))
    write_study_results(study, tmp_path)
    (entry,) = read_entries(study, tmp_path)
    assert entry.setup.particles is None and entry.setup.dataset == known[1].manifest.sha256
    assert "slices" in pictures(tmp_path)  # in the frame of the best trial


def test_the_tiles_are_in_the_frame_of_the_truth(known: tuple[RunResult, ParticleSet], tmp_path: Path) -> None:
    study = study_with(tmp_path)
    add_trial(tmp_path, 0, {"pip.weight": 0.0, "seed": 1}, known[0].folder)
    places = study_results.ranking(read_entries(study, tmp_path), study.objective)
    ((truth, tile),) = study_results._tiles(study, places)
    true = open_particles(known[1].path).read_truth_volume()
    assert true is not None and torch.equal(truth.volume, true)
    own = read_volume(known[0].paths["volume"])[0]
    aligned = float(fourier_shell_correlation(tile.volume, true)[1:].mean())
    assert aligned > float(fourier_shell_correlation(own, true)[1:].mean()) + 0.05
    assert aligned == pytest.approx(known[0].metrics[AREA], abs=0.05)


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not JSON"), ("[]", "holds no JSON object"), ('{"number": 1}', "lacks 'status'")]
)
def test_a_damaged_trial_is_one_line_with_its_file(tmp_path: Path, text: str, told: str) -> None:
    trial = add_trial(tmp_path, 0, {}, None)
    (trial / "trial.json").write_text(text)
    with pytest.raises(DataError, match=told) as raised:
        read_entries(study_with(tmp_path), tmp_path)
    assert str(trial / "trial.json") in str(raised.value) and "\n" not in str(raised.value)


def trials_of(points: list[dict], score: Callable[[dict], float]) -> list[Entry]:
    return [Entry(n, f"t{n}", point, "finished", metrics={AREA: score(point)}) for n, point in enumerate(points)]


def test_the_dimension_that_decides_has_the_largest_share(tmp_path: Path) -> None:
    points = [{"pip.weight": float(n % 2 * 2), "seed": 1 + n // 2 % 2} for n in range(12)]
    study = study_with(tmp_path)
    shares = importances(study, trials_of(points, lambda point: point["pip.weight"] + 0.01 * point["seed"]))[AREA]
    assert shares["pip.weight"] > 0.9 > shares["seed"]
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(study, trials_of(points[:7], lambda point: point["pip.weight"])) == {}
    assert importances(study, trials_of(points, lambda point: 1.0)) == {}


def test_importances_know_ranges_and_conditions(tmp_path: Path) -> None:
    space = {
        "optim.encoder_lr": {"log_uniform": [1e-4, 1e-2]},
        "pip.schedule": ["constant", "linear"],
        "pip.ramp_steps": {"integers": [10, 500], "when": {"pip.schedule": "linear"}},
    }
    study = study_with(tmp_path, space=space, search={"kind": "random", "trials": 20})
    points = [
        {"optim.encoder_lr": 10 ** (-4 + n / 10), "pip.schedule": "linear" if n % 2 else "constant"}
        | ({"pip.ramp_steps": 10 + 20 * (n * 7 % 20)} if n % 2 else {})
        for n in range(20)
    ]
    shares = importances(study, trials_of(points, lambda point: -point["optim.encoder_lr"]))[AREA]
    assert max(shares, key=lambda key: shares[key]) == "optim.encoder_lr"


def test_importances_of_hundreds_of_values_are_there_as_well(tmp_path: Path) -> None:
    """In seconds, where trees over all of them would take minutes."""
    study = study_with(tmp_path, space={"pip.weight": [0.0, 2.0], "seed": list(range(100))})
    points = [{"pip.weight": weight, "seed": seed} for weight in (0.0, 2.0) for seed in range(100)]
    shares = importances(study, trials_of(points, lambda point: point["pip.weight"] + 0.001 * point["seed"]))[AREA]
    assert shares["pip.weight"] > 0.9 > shares["seed"]
