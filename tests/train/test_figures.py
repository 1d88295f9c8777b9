import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from aceray.data.particles import Truth
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector, rotation_sqfrob, sqfrob_to_degrees
from aceray.metrics.coverage import healpix_centres
from aceray.metrics.fsc import FscCurve
from aceray.train.evaluate import evaluate
from aceray.train.figures import (
    draw_figures,
    fsc_figure,
    rotation_error_figure,
    slices_figure,
    training_figure,
    view_figure,
)
from aceray.train.predict import Poses
from tests.references.projection import blob_volume

HISTORY = [
    {"step": step, "loss_ipi": 1 / step, "train/loss_pip": 2 / step, "schedule/pip_weight": 0.1}
    | ({"pose/rotation_sqfrob_median": 6 / step, "fsc/resolution_px_0.5": 2 + 10 / step} if step % 10 == 0 else {})
    for step in range(1, 101)
]


def texts(figure: Figure) -> str:
    """Everything written on a figure."""
    figure.canvas.draw()
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def png_size(figure: Figure) -> int:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return len(buffer.getvalue())


def phantom() -> torch.Tensor:
    return torch.from_numpy(blob_volume(np.array([[4.0, 0, 0], [0, -3, 2]]), np.array([1.0, 2.0]), 1.3, 16)).float()


def test_every_figure_that_the_truth_allows_is_drawn() -> None:
    rotation = random_rotations(60, named_generator("tests/figures"))
    poses = Poses(torch.arange(60), rotation, torch.zeros(60, 2), torch.zeros(60))
    known = Truth(rotation, torch.zeros(60, 2), torch.arange(60))
    figures = draw_figures(evaluate(phantom(), poses, known, phantom(), 3.0), phantom(), 3.0, HISTORY)
    assert set(figures) == {"slices", "fsc", "view_directions", "rotation_errors", "training"}
    assert all(png_size(figure) > 5000 for figure in figures.values())
    bare = draw_figures(evaluate(phantom(), poses, None, None, 3.0), phantom(), 3.0)
    assert set(bare) == {"slices", "view_directions"}
    assert all(png_size(figure) > 5000 for figure in bare.values())


def test_sections_show_the_named_axes() -> None:
    volume = torch.zeros(16, 16, 16)
    volume[8, 8, 13], volume[8, 12, 8], volume[11, 8, 8] = 1, 2, 3  # on the x, y and z axis
    figure = slices_figure({"truth": volume}, 2.0)
    shown = {panel.get_title(loc="left"): panel.images[0].get_array() for panel in figure.axes}
    assert list(shown) == [
        "section z = 0   (x right, y up)",
        "section y = 0   (x right, z up)",
        "section x = 0   (y right, z up)",
    ]
    z, y, x = shown.values()  # rows are up, columns are right
    assert (z[8, 13], z[12, 8]) == pytest.approx((1, 2))
    assert (y[8, 13], y[11, 8]) == pytest.approx((1, 3))
    assert (x[8, 12], x[11, 8]) == pytest.approx((2, 3))
    assert all(panel.images[0].origin == "lower" for panel in figure.axes)
    assert "10 Å" in texts(figure)  # a scale bar within a third of 32 angstrom


def test_a_reconstruction_is_shown_on_the_grey_scale_of_the_truth() -> None:
    figure = slices_figure({"reconstruction": 5 * phantom() - 3, "truth": phantom()}, 2.0)
    upper, lower = (figure.axes[index].images[0] for index in (0, 3))
    np.testing.assert_allclose(upper.get_array(), lower.get_array(), atol=1e-5)
    assert upper.get_clim() == lower.get_clim()
    assert {figure.axes[0].get_ylabel(), figure.axes[3].get_ylabel()} == {"reconstruction", "truth"}


def test_a_constant_volume_can_be_drawn() -> None:
    assert png_size(slices_figure({"reconstruction": torch.zeros(16, 16, 16)}, 2.0)) > 5000


def test_fsc_figure_has_both_thresholds_their_crossings_and_both_units() -> None:
    curve = FscCurve(torch.tensor([1.0, 1.0, 0.9, 0.7, 0.3, 0.1, 0.1, 0.0, 0.0]), 16, 4.0)
    figure = fsc_figure({"reconstruction against truth": curve})
    panel = figure.axes[0]
    levels = {float(line.get_ydata()[0]) for line in panel.lines if len(line.get_ydata()) == 2}
    assert levels == {0.5, 0.143}
    crossings = {round(float(line.get_ydata()[0]), 3): float(line.get_xdata()[0]) for line in panel.lines
                 if len(line.get_ydata()) == 1}  # fmt: skip
    assert crossings[0.5] == pytest.approx(3.5 / 16)
    assert crossings[0.143] == pytest.approx((4 + 0.157 / 0.2) / 16)
    (drawn,) = (line for line in panel.lines if len(line.get_ydata()) == 8)
    np.testing.assert_allclose(drawn.get_xdata(), np.arange(1, 9) / 16)
    written = texts(figure)
    assert "cycles per pixel" in written
    assert "resolution (Å; one pixel is 4 Å)" in written
    assert f"{16 / 3.5:.2f} px = {64 / 3.5:.1f} Å at 0.5" in written


def test_a_curve_that_never_crosses_ends_at_nyquist() -> None:
    figure = fsc_figure({"half maps": FscCurve(torch.ones(9), 16, 4.0)})
    assert "2.00 px = 8.0 Å at 0.5, 2.00 px = 8.0 Å at 0.143" in texts(figure)
    assert not [line for line in figure.axes[0].lines if len(line.get_ydata()) == 1]


def test_the_view_map_leaves_empty_cells_grey_and_counts_the_others() -> None:
    centres = healpix_centres(4).float()
    rotation = torch.zeros(97, 3, 3)
    rotation[:96, 2] = centres[:96]  # the upper half of the sphere
    rotation[96, 2] = centres[0]
    figure = view_figure(rotation)
    assert "96 of 192 cells are hit by 97 particles" in texts(figure)
    mesh = figure.axes[0].collections[0]
    value = mesh.get_array().reshape(360, 720)
    assert value.mask[:160].all()  # southern latitudes come first
    assert not value.mask[200:].any()
    assert value[-1].max() == pytest.approx(2 * 192 / 97)
    assert to_hex(mesh.cmap.get_bad()) == "#d9d9d9"


def test_rotation_errors_are_shares_of_the_particles() -> None:
    angles = torch.tensor([0.0, 1.0, 1.0, 10.0, 90.0, 180.0])
    figure = rotation_error_figure(8 * (angles.deg2rad() / 2).sin().square())
    share = figure.axes[0].patches[0].get_data()
    assert share.values.sum() == pytest.approx(1)
    random = figure.axes[0].patches[1].get_data()
    drawn = random_rotations(20_000, named_generator("tests/figures/random"))
    errors = sqfrob_to_degrees(rotation_sqfrob(drawn, torch.eye(3).expand_as(drawn)))
    expected = np.histogram(errors.numpy(), bins=random.edges)[0] / len(drawn)
    np.testing.assert_allclose(random.values, expected, atol=0.015)
    assert "66.7% below 29°" in texts(figure)
    assert figure.axes[0].get_xlabel() == "rotation error after alignment (degrees)"


def test_perfect_poses_can_be_drawn() -> None:
    assert png_size(rotation_error_figure(torch.zeros(10))) > 5000


def test_training_curves_of_several_runs() -> None:
    other = [{"step": row["step"], "loss_ipi": 0.5} for row in HISTORY]
    figure = training_figure({"with PIP": HISTORY, "without PIP": other})
    labels = {axes.get_ylabel(): [text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes}
    assert labels == {
        "loss": ["IPI, with PIP", "PIP, with PIP", "IPI, without PIP"],
        "scheduled value": ["pip weight, with PIP"],
        "rotation error (squared Frobenius)": ["median, with PIP"],
        "resolution (pixels; Nyquist at 2)": ["FSC 0.5, with PIP"],
    }
    sparse = figure.axes[3].lines[0]
    np.testing.assert_allclose(sparse.get_xdata(), np.arange(10, 101, 10))
    np.testing.assert_allclose(sparse.get_ydata(), 2 + 10 / np.arange(10, 101, 10))


def test_a_task_that_is_switched_off_is_not_drawn() -> None:
    figure = training_figure({"": [{"step": step, "loss_ipi": 0.25, "loss_shift": 0.0} for step in range(5)]})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["IPI"]


def test_smoothing_keeps_a_constant_and_a_run_without_known_keys_is_an_empty_figure() -> None:
    figure = training_figure({"": [{"step": step, "loss_ipi": 0.25} for step in range(200)]})
    assert all(np.allclose(line.get_ydata(), 0.25) for line in figure.axes[0].lines)
    assert training_figure({"": [{"step": 1, "unknown": 2.0}]}).axes == []


def test_turning_the_beam_moves_the_view_and_a_turn_in_the_plane_does_not() -> None:
    start = rotation_from_vector(torch.tensor([[0.4, -0.2, 0.9]]))
    in_plane = rotation_from_vector(torch.tensor([[0.0, 0.0, 1.0]])) @ start
    tilted = rotation_from_vector(torch.tensor([[math.pi / 2, 0.0, 0.0]])) @ start

    def picture(rotation: torch.Tensor) -> np.ndarray:
        return view_figure(rotation).axes[0].collections[0].get_array().mask

    assert (picture(start) == picture(in_plane)).all()
    assert (picture(start) != picture(tilted)).any()


def test_drawing_needs_no_display_and_leaves_pyplot_alone() -> None:
    code = (
        "import sys, torch, aceray.train.figures as f; f.slices_figure({'a': torch.zeros(8, 8, 8)}, 1.0);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
