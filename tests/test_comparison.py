"""The table of a study: what is averaged, what is missing, and whose numbers are whose."""

from pathlib import Path

import pytest
import yaml

from aceray.comparison import Cell, compare, table_markdown
from aceray.leaderboard import Entry, Setup
from aceray.study import Study, load_study

SIZE, MEAN = "fsc/resolution_px_0.5", "pose/rotation_sqfrob_mean"
SPACE = {
    "method": {"presets": {"with": ["pip.weight=2.0"], "without": ["pip.weight=0.0"]}},
    "data": {"presets": {"clean": ["data/spliceosome_32_clean"], "noisy": ["data/spliceosome_32_plain"]}},
    "seed": [1, 2],
}


def study_with(folder: Path, space: dict | None = None, **table: object) -> Study:
    found = {"base": ["data/spliceosome_32"], "space": space or SPACE}
    keys = {"rows": "method", "columns": "data", "metrics": [SIZE, MEAN], **table}
    (folder / "s.yaml").write_text(yaml.safe_dump({**found, "table": keys}, sort_keys=False))
    return load_study(str(folder / "s.yaml"))


def trial(number: int, method: str, data: str, size: float | None, status: str = "finished") -> Entry:
    metrics = {} if size is None else {SIZE: size, MEAN: 2 * size}
    setup = Setup(steps=100 if data == "clean" else 2000, batch=64, box=32, particles=5000, dataset=f"sha-{data}")
    point = {"method": method, "data": data, "seed": number}
    return Entry(number, f"t{number}", point, status, metrics=metrics, setup=setup)


TRIALS = [
    trial(0, "with", "clean", 2.0),
    trial(1, "with", "clean", 3.0),
    trial(2, "with", "noisy", 4.0),
    trial(3, "with", "noisy", 99.0, "failed"),
    trial(4, "without", "clean", 6.0),
    trial(5, "without", "clean", 5.0, "running"),
]


def lines_of(study: Study, entries: list[Entry], oracle: dict | None = None) -> list[str]:
    text = table_markdown(study, compare(study, entries, oracle or {}), entries, "aceray tune s")
    return text.splitlines()


def test_a_cell_is_the_mean_and_range_of_its_finished_trials(tmp_path: Path) -> None:
    cells = compare(study_with(tmp_path), TRIALS, {}).cells
    assert cells["with", "clean", SIZE] == Cell((2.0, 3.0), 2)
    assert cells["with", "clean", SIZE].text == "2.50 (2.00 to 3.00, n=2)"
    assert cells["with", "noisy", SIZE].text == "4.00 (n=1 of 2)"
    assert cells["without", "clean", MEAN].text == "12.0 (n=1 of 2)"
    assert cells["without", "noisy", SIZE].text == "—"


def test_nothing_finished_says_of_how_many() -> None:
    assert Cell((), 3).text == "— (n=0 of 3)"
    assert Cell((), 3, 2.04).text == "— (n=0 of 3); paper 2.04"


def test_the_papers_number_stands_beside_ours_where_there_is_one(tmp_path: Path) -> None:
    study = study_with(tmp_path, paper={"with": {"noisy": {SIZE: 2.5}}}, paper_caption="table 1, 128 px")
    lines = lines_of(study, TRIALS)
    assert "Paper: table 1, 128 px." in lines
    row = next(line for line in lines if line.startswith("| with ("))
    assert row == "| with (1 to 2 trials a cell) | 2.50 (2.00 to 3.00, n=2) | 4.00 (n=1 of 2); paper 2.5 |"
    assert sum("paper 2.5" in line for line in lines) == 1


def test_the_oracle_is_that_of_the_columns_data_set(tmp_path: Path) -> None:
    oracle = {f"sha-{data}": {f"oracle/{SIZE}": size} for data, size in (("clean", 2.0), ("noisy", 2.3), ("x", 9.0))}
    lines = lines_of(study_with(tmp_path), TRIALS, oracle)
    assert "| oracle | 2.00 | 2.30 |" in lines
    assert "| oracle | — | — |" in lines  # it has no rotation error here
    assert not any("oracle" in line.lower() for line in lines_of(study_with(tmp_path), TRIALS))


def test_the_head_tells_how_it_was_made(tmp_path: Path) -> None:
    lines = lines_of(study_with(tmp_path), TRIALS)
    assert "100 or 2,000 steps, batch 64, 32 px, 5,000 particles. Made by `aceray tune s`." in lines
    assert "Mean (range, number n of finished trials) over seed." in lines
    assert [line for line in lines if line.startswith("## ")] == [
        "## resolution, FSC 0.5 (px)",
        "## rotation error, mean (of 8)",
    ]


def test_without_columns_the_metrics_are_the_columns(tmp_path: Path) -> None:
    study = study_with(tmp_path, columns=None, paper={"with": {"any": {MEAN: 0.5}}})
    lines = lines_of(study, TRIALS)
    assert "| method | resolution, FSC 0.5 (px) | rotation error, mean (of 8) |" in lines
    assert "| with | 3.00 (2.00 to 4.00, n=3 of 4) | 6.00 (4.00 to 8.00, n=3 of 4); paper 0.5 |" in lines
    assert "Mean (range, number n of finished trials) over data, seed." in lines


def test_numbers_as_rows_find_the_papers_row_however_it_is_written(tmp_path: Path) -> None:
    space = {"pip.weight": [0.0, 2.0], "seed": [1]}
    study = study_with(tmp_path, space, rows="pip.weight", columns=None, paper={"2.0": {"": {SIZE: 7.0}}})
    entries = [Entry(0, "a", {"pip.weight": 2, "seed": 1}, "finished", metrics={SIZE: 3.0})]
    found = compare(study, entries, {})
    assert found.rows == ["0", "2"]
    assert found.cells["2", "", SIZE] == Cell((3.0,), 1, 7.0)


def test_trials_that_a_row_does_not_apply_to_have_a_row_of_their_own(tmp_path: Path) -> None:
    space = {"pip.weight": [0.0, 2.0], "pip.schedule": {"choices": ["linear"], "when": {"pip.weight": 2.0}}}
    study = study_with(tmp_path, space, rows="pip.schedule", columns=None)
    entries = [
        Entry(0, "a", {"pip.weight": 0.0}, "finished", metrics={SIZE: 6.0}),
        Entry(1, "b", {"pip.weight": 2.0, "pip.schedule": "linear"}, "finished", metrics={SIZE: 3.0}),
    ]
    found = compare(study, entries, {})
    assert found.rows == ["linear", "—"]
    assert found.cells["—", "", SIZE].mean == pytest.approx(6.0)
