"""Figures of a study: what is drawn, how often, and under which name."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from aceray.comparison import compare
from aceray.leaderboard import Entry, Setup
from aceray.metrics.fsc import FscCurve
from aceray.study import Study, load_study
from aceray.train.figures import COLOURS, GREY
from aceray.train.study_figures import (
    MOST_NAMED,
    Tile,
    contact_sheet,
    curves_figure,
    importance_figure,
    objective_figure,
    overlay_figure,
    table_figure,
)
from tests.train.test_figures import phantom, png_size, texts

SIZE, MEAN = "fsc/resolution_px_0.5", "pose/rotation_sqfrob_mean"
SPACE = {
    "method": {"presets": {"with": ["pip.weight=2.0"], "without": ["pip.weight=0.0"]}},
    "train.batch": [64, 8, 32],
    "optim.encoder_lr": {"log_uniform": [1e-4, 1e-2]},
    "pip.ramp_steps": {"integers": [10, 500], "when": {"method": "with"}},
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return study_with(tmp_path)


def study_with(folder: Path, **keys: object) -> Study:
    found = {
        "base": ["data/spliceosome_32"],
        "space": SPACE,
        "search": {"kind": "optuna", "trials": 6},
        "objective": [MEAN, "fsc/auc"],
        "table": {"rows": "method", "columns": "train.batch", "metrics": [MEAN, SIZE], "curves": [MEAN, SIZE]},
    }
    (folder / "s.yaml").write_text(yaml.safe_dump({**found, **keys}, sort_keys=False))
    return load_study(str(folder / "s.yaml"))


def trial(number: int, method: str = "with", status: str = "finished", **metrics: float) -> Entry:
    point = {"method": method, "train.batch": (64, 8, 32)[number % 3], "optim.encoder_lr": 10.0 ** -(2 + number / 5)}
    if method == "with":
        point["pip.ramp_steps"] = 10 + number
    found = {MEAN: 1.0 + number, "fsc/auc": 0.5, SIZE: 4.0} | metrics
    return Entry(number, f"t{number}", point, status, metrics=found, setup=Setup(dataset="sha"))


ENTRIES = [trial(0), trial(1, "without"), trial(2), trial(3, status="stopped"), trial(4, status="failed"), trial(5)]


def points(panel) -> list:
    return [line for line in panel.lines if len(line.get_xdata()) == 1]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def curve(level: float) -> FscCurve:
    return FscCurve(torch.linspace(1, level, 9), 16, 4.0)


def test_the_overlay_names_eight_curves_and_leaves_the_rest_grey() -> None:
    curves = {f"{n + 1}. t{n}": curve(1 - n / 20) for n in range(11)}
    figure = overlay_figure(curves, "with the truth")
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 8]
    assert len(drawn) == 11
    assert [line.get_color() == GREY for line in drawn] == [False] * MOST_NAMED + [True] * 3
    styles = {(line.get_color(), line.get_linestyle()) for line in drawn[:MOST_NAMED]}
    assert len(styles) == MOST_NAMED
    assert legend(figure) == [*list(curves)[:MOST_NAMED], "3 more"]
    np.testing.assert_allclose(drawn[1].get_ydata(), list(curves.values())[1].values[1:])
    assert "FSC with the truth" in texts(figure)
    assert "resolution (Å; one pixel is 4 Å)" in texts(figure)


def test_curves_of_different_pixel_sizes_have_no_common_axis_in_angstrom() -> None:
    figure = overlay_figure({"a": curve(0.5), "b": FscCurve(torch.ones(5), 8, 8.0)}, "with the truth")
    assert "Å" not in texts(figure)


def test_a_tile_has_three_sections_and_each_group_a_row_and_a_scale_bar() -> None:
    volume = torch.zeros(16, 16, 16)
    volume[8, 8, 13], volume[8, 12, 8], volume[11, 8, 8] = 1, 2, 3  # on the x, y and z axis
    tiles = [Tile(f"trial {n}", volume, volume, 2.0) for n in range(5)]
    figure = contact_sheet([tiles[:4], tiles[4:]])
    shown = [panel for panel in figure.axes if panel.images]
    assert [panel.get_title(loc="left") for panel in shown] == [tile.title for tile in tiles]
    assert all(len(panel.images) == 3 for panel in shown)
    z, y, x = (image.get_array() for image in shown[0].images)
    assert (z[8, 13], z[12, 8], y[11, 8], x[8, 12]) == pytest.approx((1, 2, 3, 2))
    places = [image.get_extent() for image in shown[0].images]
    assert all(left[1] < right[0] for left, right in itertools.pairwise(places))
    assert texts(figure).count("10 Å") == 2
    assert len(figure.axes) == 6  # two tiles a row


def test_a_tile_is_on_the_grey_scale_of_its_reference() -> None:
    figure = contact_sheet([[Tile("a", 5 * phantom() - 3, phantom(), 2.0), Tile("truth", phantom(), phantom(), 2.0)]])
    first, second = (panel.images[0] for panel in figure.axes[:2])
    np.testing.assert_allclose(first.get_array(), second.get_array(), atol=1e-5)
    assert first.get_clim() == second.get_clim()


def test_the_objective_is_drawn_against_every_dimension_on_an_axis_of_its_kind(study: Study) -> None:
    figure = objective_figure(study, ENTRIES)
    assert len(figure.axes) == 8  # two objectives, four dimensions
    method, batch, rate, ramp = figure.axes[:4]
    assert [panel.get_xlabel() for panel in figure.axes[:4]] == list(SPACE)
    assert [panel.get_xscale() for panel in (method, batch, rate, ramp)] == ["linear", "linear", "log", "linear"]
    assert [tick.get_text() for tick in batch.get_xticklabels()] == ["8", "32", "64"]
    assert [tick.get_text() for tick in method.get_xticklabels()] == ["with", "without"]
    assert [len(points(panel)) for panel in (method, batch, rate, ramp)] == [5, 5, 5, 4]  # one failed, one has no ramp
    assert {figure.axes[0].get_ylabel(), figure.axes[4].get_ylabel()} == {"rotation error, mean (of 8)", "FSC area"}
    drawn = sorted((float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points(rate))
    expected = sorted((e.point["optim.encoder_lr"], e.metrics[MEAN]) for e in ENTRIES if e.status != "failed")
    np.testing.assert_allclose(drawn, expected)


def test_the_best_trial_is_a_diamond_and_an_unfinished_one_a_ring(study: Study) -> None:
    rate = objective_figure(study, ENTRIES).axes[2]
    best = [line for line in points(rate) if line.get_marker() == "D"]
    assert [float(line.get_ydata()[0]) for line in best] == [1.0]
    rings = [line for line in points(rate) if line.get_markerfacecolor() == "white"]
    assert [float(line.get_ydata()[0]) for line in rings] == [4.0]


def test_values_side_by_side_have_a_bar_at_their_median(study: Study) -> None:
    method = objective_figure(study, ENTRIES).axes[0]
    (bar,) = (bars.get_segments()[0] for bars in method.collections)
    assert bar[0][1] == pytest.approx(3.5)  # of 1, 3, 4 and 6
    assert (bar[0][0] + bar[1][0]) / 2 == pytest.approx(0)


def test_a_single_trial_can_be_drawn(study: Study) -> None:
    for figure in (
        objective_figure(study, ENTRIES[:1]),
        overlay_figure({"1. t0": curve(0.2)}, "with the truth"),
        contact_sheet([[Tile("a", phantom(), phantom(), 2.0)]]),
        table_figure(compare(study, ENTRIES[:1], {})),
    ):
        assert png_size(figure) > 3000


def test_importances_are_bars_by_objective() -> None:
    figure = importance_figure({MEAN: {"pip.weight": 0.75, "seed": 0.25}, "fsc/auc": {"seed": 1.0}})
    widths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]
    assert widths == [[0.75, 0.25], [0.0, 1.0]]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["pip.weight", "seed"]
    assert legend(figure) == ["rotation error, mean (of 8)", "FSC area"]


def history(*values: float) -> list[dict]:
    rows: list[dict] = [{"step": 10 * (n + 1), MEAN: value, SIZE: 2 * value} for n, value in enumerate(values)]
    return [{"step": 5, "train/loss_ipi": 1.0}, {"step": 7, MEAN: None}, *rows]


def test_curves_are_thin_for_trials_and_thick_for_the_mean_of_the_finished(study: Study) -> None:
    entries = [trial(0), trial(3), trial(6, status="failed"), trial(9, "without"), trial(1)]  # four of batch 64
    histories = {0: history(4, 2), 3: history(2, 1), 6: history(7), 9: history(5, 5), 1: history(3, 3)}
    figure = curves_figure(study, study.table, entries, histories)
    assert len(figure.axes) == 6  # two metrics, three batches
    panel = figure.axes[0]
    assert panel.get_title(loc="left") == "64"
    thick = {line.get_color(): line for line in panel.lines if line.get_linewidth() > 2}
    np.testing.assert_allclose(thick[COLOURS[0]].get_xdata(), [10, 20])
    np.testing.assert_allclose(thick[COLOURS[0]].get_ydata(), [3, 1.5])
    np.testing.assert_allclose(thick[COLOURS[1]].get_ydata(), [5, 5])  # alone: no thin line under it
    thin = [line for line in panel.lines if line.get_linewidth() < 1]
    assert [list(line.get_ydata()) for line in thin] == [[4, 2], [2, 1], [7]]
    assert thin[2].get_linestyle() == ":"
    np.testing.assert_allclose(figure.axes[3].lines[0].get_ydata(), [8, 4])
    assert legend(figure) == ["with", "without"]


def test_curves_without_columns_are_one_panel_a_metric(tmp_path: Path) -> None:
    study = study_with(tmp_path, table={"rows": "train.batch", "curves": [MEAN]})
    figure = curves_figure(study, study.table, [trial(0), trial(1)], {0: history(4, 0.1), 1: history(3, 3)})
    assert len(figure.axes) == 1
    assert legend(figure) == ["64", "8", "32"]
    assert figure.axes[0].get_yscale() == "log"


def test_the_table_as_a_figure_has_means_ranges_the_paper_and_the_oracle(tmp_path: Path) -> None:
    table = {"rows": "method", "metrics": [MEAN, SIZE], "paper": {"with": {"": {MEAN: 0.5}}}}
    study = study_with(tmp_path, table=table)
    entries = [trial(0), trial(2), trial(1, "without")]
    figure = table_figure(compare(study, entries, {"sha": {f"oracle/{MEAN}": 0.2}}))
    panel = figure.axes[0]
    ours = {float(line.get_xdata()[0]) for line in points(panel) if line.get_marker() == "o"}
    assert ours == {2.0}  # of 1 and 3; the other row has 2 as well
    (paper,) = (line for line in points(panel) if line.get_marker() == "D")
    assert float(paper.get_xdata()[0]) == 0.5
    vertical = [line for line in panel.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "--"]
    assert [float(line.get_xdata()[0]) for line in vertical] == [0.2]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["with", "without"]
    assert legend(figure) == ["mean and range", "paper", "oracle"]
    assert panel.get_xlabel() == "rotation error, mean (of 8)"


def test_an_oracle_far_below_a_logarithmic_axis_is_told_in_words(tmp_path: Path) -> None:
    study = study_with(tmp_path, table={"rows": "method", "metrics": [MEAN]})
    entries = [trial(0, **{MEAN: 0.1}), trial(1, "without", **{MEAN: 5.0})]
    figure = table_figure(compare(study, entries, {"sha": {f"oracle/{MEAN}": 1e-6}}))
    assert figure.axes[0].get_xscale() == "log"
    assert figure.axes[0].get_xlim()[0] > 1e-3
    assert "◂ 1e-06" in texts(figure)
