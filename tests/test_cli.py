"""The command line: what reaches the API, what is printed, and the exit codes."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from aceray import api, cli
from aceray.config import Config
from aceray.display import Page, StudyDisplay, TrialRow
from aceray.distributed.trial import Report, TrialEvent
from aceray.errors import DataError
from aceray.preparation import Preparation, preparation
from aceray.presets import load_config, to_yaml
from aceray.study import load_study

METRICS = {
    "fsc/resolution_px_0.5": 2.345,
    "fsc/resolution_px_0.143": 2.0,
    "fsc/resolution_angstrom_0.5": 39.87,
    "fsc/resolution_angstrom_0.143": 34.0,
    "pose/rotation_sqfrob_mean": 0.4321,
    "pose/rotation_sqfrob_median": 0.1234,
    "pose/rotation_deg_median": 14.27,
    "pose/coverage": 0.987,
    "train/particles_per_second": 1234.5,
    "train/wall_seconds": 125.9,
}


class Step:
    """What the training loop yields, as far as the command line reads it."""

    def __init__(self, step: int, metrics: dict[str, float]) -> None:
        self.step, self.steps, self.metrics = step, 2, metrics
        self.losses = {"loss_ipi": 0.5, "loss_pip": 1.25}
        self.particles_per_second = 1000.0


class Result:
    """The result of a run that was tracked."""

    def __init__(self, folder: Path) -> None:
        config = folder / "config.yaml"
        config.write_text(to_yaml(load_config("tracking.uri=sqlite:///here.db")))
        self.metrics, self.folder, self.mlflow_run_id = METRICS, folder, "abc123"
        self.paths = {"config": config, "volume": folder / "volume.mrc"}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_train_passes_settings_and_prints_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def train(config: Config, existing: str, on_progress: Any) -> Result:
        seen.extend([config, existing])
        on_progress(Step(1, {}))
        on_progress(Step(2, METRICS))
        return Result(tmp_path)

    monkeypatch.setattr(api, "train", train)
    done = call("train", "demo", "pip.weight=0.07", "--existing", "overwrite")
    assert done.exit_code == 0, done.output
    assert seen == [load_config("demo", "pip.weight=0.07"), "overwrite"]
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "2.35 px" in rows["resolution, FSC 0.5"] or "2.34 px" in rows["resolution, FSC 0.5"]
    assert "39.9 A" in rows["resolution, FSC 0.5"] and "34.0 A" in rows["resolution, FSC 0.143"]
    assert "0.4321" in rows["rotation error, mean (of 8)"] and "14.3 deg" in rows["rotation error, median (of 8)"]
    assert "0.987" in rows["coverage of view directions"] and "2 min 5 s" in rows["wall time"]
    assert f"volume       {tmp_path / 'volume.mrc'}" in done.stdout
    assert "mlflow ui --backend-store-uri sqlite:///here.db\n" in done.stdout
    assert "http://127.0.0.1:5000/#/runs/abc123\n" in done.stdout
    assert "step      2 of 2  resolution, FSC 0.5 (px) 2.3" in done.stderr


def test_simulate_passes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(config: Config, existing: str, on_progress: Any) -> Path:
        assert (config.data.path, existing) == ("data/demo", "keep")
        return Path("data/demo")

    monkeypatch.setattr(api, "simulate", simulate)
    done = call("simulate", "demo", "--existing", "keep")
    assert (done.exit_code, done.stdout) == (0, "dataset      data/demo\n")


def test_simulate_without_a_simulation_is_a_mistake() -> None:
    done = call("simulate", "base")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: simulation: null, so there is nothing to simulate; ")


def test_evaluate_shows_what_could_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result(tmp_path)
    result.metrics = {"train/particles_per_second": 12.0}
    result.mlflow_run_id = None
    monkeypatch.setattr(api, "evaluate", lambda folder: result)
    done = call("evaluate", "runs/x")
    assert done.exit_code == 0 and "particles/s" in done.stdout
    assert "FSC" not in done.stdout and "mlflow" not in done.stdout


def test_evaluate_shows_the_oracle_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Searched:
        done, particles = 2, 2

    result = Result(tmp_path)
    result.mlflow_run_id = None
    best = {"fsc/resolution_px_0.5": 2.1, "pose/rotation_sqfrob_mean": 0.0049}
    best |= {f"fsc/nyquist_minus_{below}": 0.9 + below / 100 for below in range(5)}
    mine = {f"fsc/nyquist_minus_{below}": 0.5 + below / 100 for below in range(5)}
    result.metrics = {**METRICS, **mine, **{f"oracle/{key}": value for key, value in best.items()}}

    def evaluate(folder: str, on_progress: None, on_search: Any) -> Result:
        on_search(Searched())
        return result

    monkeypatch.setattr(api, "evaluate_with_oracle", evaluate)
    done = call("evaluate", "runs/x", "--oracle")
    assert done.exit_code == 0, done.output
    rows = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    assert done.stdout.splitlines()[0].split() == ["this", "run", "oracle"]
    assert rows["resolution, FSC 0.5"][-2:] == ["2.10", "px"]
    assert rows["rotation error, mean (of 8)"][-1] == "0.0049"
    assert rows["FSC, last five shells"][-5:] == [".54", ".53", ".52", ".51", ".50"]
    assert rows["FSC, last five, oracle"][-5:] == [".94", ".93", ".92", ".91", ".90"]
    assert max(len(line.rstrip()) for line in done.stdout.split("\n\n")[0].splitlines()) <= 80


def test_evaluate_scores_the_files_of_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def score(*files: str) -> dict[str, float]:
        seen.extend(files)
        return METRICS

    monkeypatch.setattr(api, "score", score)
    done = call("evaluate", "--dataset", "data/x", "--poses", "other.star", "--volume", "other.mrc")
    assert done.exit_code == 0, done.output
    assert seen == ["data/x", "other.star", "other.mrc"]
    assert "0.4321" in done.stdout and "oracle" not in done.stdout


def test_evaluate_compares_half_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, seen = Result(tmp_path), []
    result.mlflow_run_id = None
    half = {"fsc/half_map_resolution_px_0.143": 3.21, "fsc/half_map_resolution_angstrom_0.143": 54.57}
    result.metrics = {**METRICS, **half}

    def evaluate(*arguments: str) -> Result:
        seen.extend(arguments)
        return result

    monkeypatch.setattr(api, "evaluate_half_maps", evaluate)
    done = call("evaluate", "runs/x", "--half-map", "runs/y", "--mask", "auto")
    assert done.exit_code == 0, done.output
    assert seen == ["runs/x", "runs/y", "auto"]
    row = next(line for line in done.stdout.splitlines() if "half maps at 0.143" in line)
    assert row.split()[-4:] == ["3.21", "px", "54.6", "A"]


@pytest.mark.parametrize("arguments", [("--mask", "auto"), ("--half-map", "runs/y", "--oracle")])
def test_half_maps_stand_alone(arguments: tuple[str, ...]) -> None:
    done = call("evaluate", "runs/x", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: evaluate: --mask goes with --half-map")


@pytest.mark.parametrize(
    "arguments", [(), ("--dataset", "d", "--poses", "p"), ("runs/x", "--poses", "p"), ("--oracle",)]
)
def test_evaluate_wants_a_run_or_files(arguments: tuple[str, ...]) -> None:
    done = call("evaluate", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: evaluate: give either the folder of a run, or --dataset, ")


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise DataError("data/demo: there is\nno dataset")

    monkeypatch.setattr(api, "train", train)
    done = call("train", "demo")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: data/demo: there is no dataset\n"


def test_an_own_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api, "train", train)
    done = call("train", "demo")
    assert done.exit_code == 1 and isinstance(done.exception, ZeroDivisionError)


def test_unknown_key_in_a_fresh_process() -> None:
    code = "from aceray.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "demo", "optim.lerning_rate=1"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: optim.lerning_rate: unknown setting; did you mean optim.encoder_lr?\n"


def test_interrupt_says_how_to_resume() -> None:
    code = """
import atexit, time
from aceray import api, cli
atexit.register(print, "closed", end="")
def train(*_):
    print("training", flush=True)
    print("not flushed")
    time.sleep(60)
api.train = train
cli.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "demo", "name=other"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None and process.stdout.readline() == "training\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    # it leaves at once, but not before what was to be done at the end
    assert (process.returncode, output) == (130, "not flushed\nclosed")
    assert errors.strip().endswith("aceray train demo name=other --existing resume")
    assert "Traceback" not in errors


class Trials:
    """The result of a study, and one event of a trial."""

    def __init__(self, folder: Path, *statuses: str) -> None:
        self.folder, self.mlflow_run_id, self.tracking_uri = folder, "abc123", "sqlite:////x/m.db"
        self.paths = {path.stem: path for path in folder.glob("*.md")}
        self.trials = {f"t{number}": {"status": each, "reason": "broken"} for number, each in enumerate(statuses)}
        self.study = load_study("smoke")


def test_tune_passes_the_study_and_prints_its_leaderboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaderboard.md").write_text("| trial | rank |\n")
    seen: list[Any] = []

    def tune(study: Any, *, address: str, resume: bool, on_event: Any, on_simulation: Any, on_oracle: Any) -> Trials:
        seen.extend([study, address, resume])
        for done in (1024, 2048):
            on_simulation(SimpleNamespace(particles_done=done, particles=2048))
        metrics = {"pose/rotation_sqfrob_mean": 0.4321}
        on_event(TrialEvent("t0", 0, {}, "running"))
        on_event(TrialEvent("t0", 0, {}, "running", Report(40, 120, metrics, 1000.0)))
        on_event(TrialEvent("t1", 1, {}, "failed", reason="a loss is nan"))
        return Trials(tmp_path, "finished", "failed")

    monkeypatch.setattr(api, "tune", tune)
    done = call("tune", "smoke", "search.trials=2", "train.steps=9", "--address", "none", "--resume")
    assert done.exit_code == 0, done.output
    assert seen == [load_study("smoke", "search.trials=2", "train.steps=9"), "none", True]
    assert done.stdout.startswith("| trial | rank |\n")
    assert "trials       1 finished, 1 failed\n" in done.stdout
    assert f"leaderboard  {tmp_path}/leaderboard.md\n" in done.stdout
    assert "http://127.0.0.1:5000/#/runs/abc123\n" in done.stdout
    first, *lines = done.stderr.splitlines()
    assert first == "simulating: 2,048 of 2,048 particles"
    assert lines[0] == "t0  running" and lines[2] == "t1  failed: a loss is nan"
    assert lines[1].startswith("t0  running  step     40 of 120  rotation error, mean (of 8) 0.432")


def test_a_study_whose_trials_all_failed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "compare", lambda folder, on_oracle: Trials(tmp_path, "failed", "failed"))
    done = call("compare", "studies/smoke")
    assert done.exit_code == 2
    assert done.stderr == "error: smoke: all 2 trials failed; the first: broken\n"


def test_mistakes_of_a_study_are_one_line(tmp_path: Path) -> None:
    for arguments in (("tune", "smoke", "space.pip.wieght=[1]"), ("tune", "nothing"), ("compare", str(tmp_path))):
        done = call(*arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_table_of_trials_shows_how_far_each_is() -> None:
    row = TrialRow("t0")
    row.take(TrialEvent("t0", 0, {}, "running"), "fsc/auc")
    row.since -= 20
    metrics = {"fsc/auc": 0.51234, "fsc/resolution_px_0.5": 4.567, "pose/rotation_sqfrob_mean": 1.2345}
    row.take(TrialEvent("t0", 0, {}, "running", Report(10, 40, metrics, 1234.5)), "fsc/auc")
    name, status, step, objective, resolution, missing, speed, left = row.cells(
        ["fsc/auc", "fsc/resolution_px_0.5", "select/heldout_loss"]
    )
    assert (name, status, step, objective) == ("t0", "running", "10/40", "0.512")
    assert (resolution, missing, speed) == ("4.57", "", "1,234")
    assert left in ("1:00", "0:59")


def test_the_table_of_trials_has_the_words_of_the_leaderboard_and_each_metric_once() -> None:
    display = StudyDisplay("pose/rotation_sqfrob_mean")
    display.console = Console(width=200, file=io.StringIO(), color_system=None)
    assert [type(part) for part in display._table().renderables] == [Text]  # no table without trials
    metrics = {"pose/rotation_sqfrob_mean": 1.2345, "fsc/resolution_px_0.5": 4.567}
    display.happened(TrialEvent("t0", 0, {}, "running", Report(10, 40, metrics, 1234.5)))
    line = "t0  running  step     10 of 40  rotation error, mean (of 8) 1.23  resolution, FSC 0.5 (px) 4.57\n"
    assert display.console.file.getvalue() == line
    with display.console.capture() as shown:
        display.console.print(display._table())
    heads = shown.get().splitlines()[1]
    assert [heads.count(label) for label in ("rotation error, mean (of 8)", "resolution, FSC 0.5 (px)")] == [1, 1]


def test_a_trial_that_goes_on_after_a_loss_says_so_once() -> None:
    row, start, lost = TrialRow("t0"), TrialEvent("t0", 0, {}, "running"), "its process was lost"
    again = TrialEvent("t0", 0, {}, "running", reason=lost)
    told = [row.take(event, "fsc/auc") for event in (start, start, again, again, start, again)]
    assert told == ["t0  running", "", f"t0  running: {lost}", "", "", f"t0  running: {lost}"]


def test_a_narrow_terminal_shows_whole_names() -> None:
    names = [f"weight_2.0-encoder_lr_0.000{number}" for number in (1, 2)]
    rows = "".join(f"| {name} | 2.00 | 1 |\n" for name in names)
    console = Console(width=40, file=io.StringIO(), color_system=None)
    with console.capture() as shown:
        console.print(Page(f"| trial | resolution | rank |\n|---|---|---|\n{rows}"))
    first = "".join(line.partition(" 2.00")[0].split("  ")[0].strip() for line in shown.get().splitlines())
    assert all(name in first for name in names)


class Simulated:
    """Progress of a conversion."""

    shards_done, shards, particles_done, particles = 1, 2, 10, 20


def test_prepare_has_an_option_for_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def prepare(source: str, out: str, existing: str, on_progress: Any, **options: Any) -> SimpleNamespace:
        seen.extend([source, out, existing, options])
        on_progress(Simulated())
        return SimpleNamespace(path=Path("data/80s"), report="# What was found\n\n| box | 360 px |\n")

    monkeypatch.setattr(api, "prepare", prepare)
    options = ("--box", "128", "--datadir", "d", "--half", "rlnRandomSubset", "--invert", "--passthrough", "a.cs")
    done = call("prepare", "p.star", "--out", "data/80s", *options, "--passthrough", "b.cs", "--pixel-size", "1.5")
    assert done.exit_code == 0, done.output
    assert seen[:3] == ["p.star", "data/80s", "error"]
    given = preparation(**seen[3])
    assert (given.box, given.datadir, given.half, given.invert) == (128, "d", "rlnRandomSubset", True)
    assert given.passthrough == ("a.cs", "b.cs") and given.pixel_size == 1.5
    # what was not given is what the settings say
    assert given == Preparation(
        box=128, datadir="d", half="rlnRandomSubset", invert=True, passthrough=("a.cs", "b.cs"), pixel_size=1.5
    )
    assert "| box | 360 px |" in done.stdout and done.stdout.endswith("dataset      data/80s\n")


def test_a_check_with_errors_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = SimpleNamespace(errors=["x"])
    checked = SimpleNamespace(markdown=lambda: "Errors:\n- x: is missing", findings=findings)
    monkeypatch.setattr(api, "check", lambda source, **options: checked)
    done = call("prepare", "p.star", "--check")
    assert done.exit_code == 2 and "is missing" in done.stdout
    findings.errors = []
    assert call("prepare", "p.star", "--check").exit_code == 0
    for wrong in (("--check", "--out", "x"), ()):
        done = call("prepare", "p.star", *wrong)
        assert done.exit_code == 2 and "give either --out" in done.stderr
    assert call("prepare", "nowhere.star", "--out", "x", "--box", "4").stderr.startswith("error: --box: ")


def test_export_and_predict_name_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def export(run: str, out: str, spread: bool) -> SimpleNamespace:
        seen.append(spread)
        return SimpleNamespace(paths={"volume": Path(out) / "volume.mrc"})

    monkeypatch.setattr(api, "export", export)
    assert call("export", "runs/a", "--out", "o").stdout == "volume       o/volume.mrc\n"
    call("export", "runs/a", "--out", "o", "--spread")
    assert seen == [False, True]

    def predict(*arguments: Any, **options: Any) -> SimpleNamespace:
        seen[:] = [*arguments[:3], {name: value for name, value in options.items() if value}]
        arguments[3](SimpleNamespace(done=1, particles=2))
        paths = {"poses.star": Path("o/poses.star")}
        return SimpleNamespace(paths=paths, particles=1234, refused=2, particles_per_second=5678.9, method="by guess")

    monkeypatch.setattr(api, "predict", predict)
    done = call("predict", "runs/a", "p.cs", "--out", "o", "--workers", "2", "--passthrough", "q.cs", "--refine")
    assert done.exit_code == 0, done.output
    assert seen == ["runs/a", "p.cs", "o", {"workers": 2, "passthrough": ["q.cs"], "refine": True}]
    expected = (
        "star         o/poses.star\nparticles    1,234, 5,679 a second, 2 images refused\nposes        by guess\n"
    )
    assert done.stdout == expected
