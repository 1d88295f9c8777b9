"""The order of trials, the leaderboard in both forms, and the rank correlation of criteria."""

import csv
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from aceray.leaderboard import (
    FEWEST_FOR_CORRELATION,
    Entry,
    Setup,
    agreements,
    criteria_markdown,
    leaderboard_csv,
    leaderboard_markdown,
    markdown_table,
    number_text,
    ranking,
    spearman,
    usual_mode,
    value_text,
)
from aceray.study import Objective, Study, load_study

AREA, MEAN, SECONDS = "fsc/auc", "pose/rotation_sqfrob_mean", "train/wall_seconds"
TINY = {
    "base": ["data/spliceosome_32_clean", "train.steps=10"],
    "space": {"pip.weight": [0.0, 2.0], "seed": [1, 2, 3]},
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return written(tmp_path)


def written(folder: Path, **keys: object) -> Study:
    """A study like TINY with other keys."""
    (folder / "s.yaml").write_text(yaml.safe_dump({**TINY, **keys}, sort_keys=False))
    return load_study(str(folder / "s.yaml"))


def entry(number: int, status: str = "finished", **metrics: float) -> Entry:
    """A trial; area=… and mean=… are its metrics."""
    names = {"area": AREA, "mean": MEAN, "seconds": SECONDS}
    point = {"pip.weight": 2.0, "seed": number}
    return Entry(number, f"t{number}", point, status, metrics={names.get(k, k): v for k, v in metrics.items()})


def order(entries: list[Entry], *objectives: Objective) -> list[tuple[int, int | None]]:
    return [(place.entry.number, place.rank) for place in ranking(entries, objectives)]


def test_the_direction_is_the_metrics_own_unless_the_study_says_otherwise() -> None:
    entries = [entry(0, area=0.2, mean=3.0), entry(1, area=0.9, mean=1.0), entry(2, area=0.5, mean=2.0)]
    assert order(entries, Objective(metric=AREA, mode=None)) == [(1, 1), (2, 2), (0, 3)]
    assert order(entries, Objective(metric=MEAN, mode=None)) == [(1, 1), (2, 2), (0, 3)]
    assert order(entries, Objective(metric=MEAN, mode="max")) == [(0, 1), (2, 2), (1, 3)]


def test_equals_share_a_rank_and_stand_in_the_order_of_their_numbers() -> None:
    entries = [entry(2, area=0.5), entry(1, area=0.5), entry(0, area=0.1)]
    assert order(entries, Objective(metric=AREA, mode=None)) == [(1, 1), (2, 1), (0, 3)]


def test_without_the_objective_or_failed_is_last_and_has_no_rank() -> None:
    entries = [entry(0, "running"), entry(1, "failed", area=0.99), entry(2, "stopped", area=0.3), entry(3, area=0.2)]
    entries.append(entry(4, area=math.nan))
    assert order(entries, Objective(metric=AREA, mode=None)) == [(2, 1), (3, 2), (0, None), (1, None), (4, None)]


def test_several_objectives_put_the_pareto_front_first() -> None:
    # 0, 1 and 2 trade area for time; 3 is worse than 1 and 0 in both, 4 worse than 1 in area alone
    entries = [
        entry(3, area=0.4, seconds=60.0),
        entry(0, area=0.9, seconds=50.0),
        entry(1, area=0.7, seconds=20.0),
        entry(4, area=0.6, seconds=20.0),
        entry(2, area=0.1, seconds=5.0),
    ]
    objectives = Objective(metric=AREA, mode=None), Objective(metric=SECONDS, mode=None)
    assert order(entries, *objectives) == [(0, 1), (1, 1), (2, 1), (4, 2), (3, 4)]


def test_the_table_for_machines_has_all_digits_and_survives_commas(study: Study) -> None:
    third = Entry(
        0, "a", {"pip.weight": 0.0, "seed": 1}, "failed", 'loss_ipi: nan, at "step" 3', 1.5, {AREA: 1 / 3, MEAN: 2.0}
    )
    rows = list(
        csv.DictReader(io.StringIO(leaderboard_csv(study, ranking([third, entry(1, area=0.1)], study.objective))))
    )
    assert [row["trial"] for row in rows] == ["t1", "a"]
    assert rows[1]["reason"] == 'loss_ipi: nan, at "step" 3'
    assert (rows[0]["rank"], rows[1]["rank"]) == ("1", "")
    assert float(rows[1][AREA]) == 1 / 3
    assert (rows[1]["pip.weight"], rows[1]["seed"], rows[0][MEAN], rows[1]["seconds"]) == ("0.0", "1", "", "1.5")


def test_the_table_for_readers_says_why_and_what_is_missing(study: Study) -> None:
    stopped = Entry(0, "a|b", {"seed": 1}, "stopped", "asha at step 40", 12.4, {AREA: 0.51234})
    text = leaderboard_markdown(study, ranking([stopped, entry(1, "running")], study.objective))
    line = next(line for line in text.splitlines() if "asha" in line)
    assert line.startswith("| 1 | a\\|b | stopped: asha at step 40 | — | 1 | 0.5123 | — |")
    assert line.endswith("| 12 |")
    assert "2 trials: 1 stopped, 1 running." in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "★" not in text


def test_a_star_marks_the_front(tmp_path: Path) -> None:
    study = written(tmp_path, objective=[AREA, SECONDS], search={"kind": "optuna", "trials": 3})
    entries = [entry(0, area=0.9, seconds=9.0), entry(1, area=0.8, seconds=1.0), entry(2, area=0.7, seconds=2.0)]
    text = leaderboard_markdown(study, ranking(entries, study.objective))
    assert [line.split("|")[1].strip() for line in text.splitlines() if re.search(r"\| t\d", line)] == [
        "1 ★",
        "1 ★",
        "2",
    ]


def test_a_study_without_trials_has_a_leaderboard(study: Study) -> None:
    assert "No trials yet." in leaderboard_markdown(study, [])
    assert leaderboard_csv(study, []).startswith("rank,trial,status,reason,pip.weight,seed,fsc/auc,")


def test_what_would_break_a_cell_is_escaped() -> None:
    table = markdown_table(["a"], [["x|y"], ["two\nlines"], ["*b* `c` <i> \\"]])
    assert table == "| a |\n| --- |\n| x\\|y |\n| two lines |\n| \\*b\\* \\`c\\` \\<i> \\\\ |\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2.00"), (0.0312, "0.0312"), (13.391, "13.4"), (1234.5, "1234"), (0.0, "0"), (3e-6, "3e-06"), (None, "—")],
)
def test_numbers_are_written_with_three_digits(value: float | None, text: str) -> None:
    assert number_text(value) == text


def test_values_are_written_as_in_a_study() -> None:
    values = [2.0, 3e-4, 5, True, None, "linear", [{"until_step": 4}]]
    assert [value_text(value) for value in values] == [
        "2", "0.0003", "5", "true", "null", "linear", '[{"until_step": 4}]',
    ]  # fmt: skip


# ---- rank correlation


def spearman_loop(left: list[float], right: list[float]) -> float:
    """Twin: ranks by counting, Pearson's correlation by its definition."""

    def ranks(values: list[float]) -> np.ndarray:
        return np.array([sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values])

    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


@pytest.mark.parametrize("seed", range(5))
def test_spearman_equals_its_twin_also_with_equals(seed: int) -> None:
    generator = np.random.default_rng(seed)
    left = generator.integers(0, 6, 15).astype(float).tolist()
    right = (np.array(left) * (-1) ** seed + generator.normal(0, 2, 15)).round().tolist()
    assert spearman(left, right) == pytest.approx(spearman_loop(left, right), abs=1e-12)


def test_spearman_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(7)
    left, right = generator.normal(size=20).round(1).tolist(), generator.normal(size=20).round(1).tolist()
    assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_spearman_of_equals_is_unknown() -> None:
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert spearman([], []) is None


def scored(number: int, dataset: str, error: float, **scores: float) -> Entry:
    metrics = {MEAN: error, AREA: 1 - error / 8, **{f"select/{name}": float(value) for name, value in scores.items()}}
    return Entry(number, f"t{number}", {}, "finished", metrics=metrics, setup=Setup(dataset=dataset))


def test_a_criterion_that_orders_as_the_truth_does_has_plus_one_whatever_its_direction() -> None:
    found = {
        each.criterion: each
        for each in agreements(
            [scored(n, "a", n / 2, d4_consistency=n**2, half_map_fsc_area=-n, residual_loss=-n) for n in range(8)]
        )
    }
    assert found["select/d4_consistency"].overall == pytest.approx({MEAN: 1.0, AREA: 1.0})
    assert found["select/half_map_fsc_area"].overall == pytest.approx({MEAN: 1.0, AREA: 1.0})
    assert found["select/residual_loss"].overall == pytest.approx({MEAN: -1.0, AREA: -1.0})
    assert found["select/half_map_fsc_area"].mode == usual_mode("select/half_map_fsc_area") == "max"


def test_within_data_sets_a_shift_between_them_does_not_count() -> None:
    # the score is perfect in each set, and set b has larger scores and smaller errors
    entries = [scored(n, "a", 4 + n / 8, d4_consistency=n) for n in range(6)]
    entries += [scored(6 + n, "b", n / 8, d4_consistency=100 + n) for n in range(4)]
    (found,) = agreements(entries)
    assert found.trials == 10
    assert found.within[MEAN] == pytest.approx(1.0)
    every = [(e.metrics["select/d4_consistency"], e.metrics[MEAN]) for e in entries]
    assert found.overall[MEAN] == pytest.approx(spearman_loop([a for a, _ in every], [b for _, b in every]))
    assert (found.overall[MEAN] or 0) < 0


def test_too_few_trials_or_none_with_the_truth_give_no_table() -> None:
    entries = [scored(n, "a", n / 2, d4_consistency=n) for n in range(FEWEST_FOR_CORRELATION - 1)]
    assert agreements(entries) == []
    failed = Entry(9, "t9", {}, "failed", metrics=entries[0].metrics)
    blind = Entry(10, "t10", {}, "finished", metrics={"select/d4_consistency": 1.0})
    assert agreements([*entries, failed, blind]) == []


def test_the_criteria_are_told_best_first(study: Study) -> None:
    entries = [scored(n, "a", n / 2, residual_loss=-n, d4_consistency=n, heldout_loss=1.0) for n in range(8)]
    lines = [line for line in criteria_markdown(study, agreements(entries)).splitlines() if "select/" in line]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "select/d4_consistency", "select/residual_loss", "select/heldout_loss",
    ]  # fmt: skip
    assert "+1.00" in lines[0] and "-1.00" in lines[1] and "| — |" in lines[2]
