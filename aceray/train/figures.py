"""Figures of a run, drawn without a display and without pyplot's global state; callers save and close nothing."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from aceray.em.rotation import sqfrob_to_degrees
from aceray.metrics.coverage import NSIDE, cell_count, healpix_cell, view_histogram
from aceray.metrics.fsc import FscCurve, resolution_px
from aceray.metrics.pose import GOOD_SQFROB
from aceray.train.evaluate import THRESHOLDS, Evaluation
from aceray.train.symmetry import correlation_by_angle, least_correlation, order_of_turn

History = Sequence[Mapping[str, float | int]]

# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#8a8a8a"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
SECTIONS = (("x", "y", "z"), ("x", "z", "y"), ("y", "z", "x"))  # right, up, normal
_VOLUME_AXIS = {"z": 0, "y": 1, "x": 2}
# prefix of the keys: label of the axis, its scale, name of a line
_TRAINING_PANELS = {
    "loss_": ("loss", "log", "{}"),
    "schedule/": ("scheduled value", "linear", "{}"),
    "pose/rotation_sqfrob_": ("rotation error (squared Frobenius)", "log", "{}"),
    "fsc/resolution_px_": ("resolution (pixels; Nyquist at 2)", "linear", "FSC {}"),
}
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), "-.")
_FEW_POINTS = 60
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_ACRONYMS = {"ipi": "IPI", "pip": "PIP"}
_LATITUDES = (-60, -30, 0, 30, 60)


def draw_figures(
    evaluation: Evaluation, volume: Float[Tensor, "d d d"], pixel_size_angstrom: float, history: History = ()
) -> dict[str, Figure]:
    """Every figure that what is known allows, by name; the volume's own frame and pixel size serve without truth."""
    measured, poses = evaluation.volume, evaluation.poses
    if measured is not None:
        volumes = {"reconstruction": measured.predicted, "truth": measured.true}
        figures = {
            "slices": slices_figure(volumes, measured.pixel_size_angstrom),
            "fsc": fsc_figure({"reconstruction against truth": measured.fsc}),
        }
    else:
        figures = {"slices": slices_figure({"reconstruction": volume.detach().cpu()}, pixel_size_angstrom)}
    figures["view_directions"] = view_figure(evaluation.view_rotation)
    if poses is not None:
        figures["rotation_errors"] = rotation_error_figure(poses.errors.rotation_sqfrob)
    if history:
        figures["training"] = training_figure({"": history})
    return figures


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that needs no display."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    return figure


@matplotlib.rc_context(STYLE)
def slices_figure(volumes: Mapping[str, Float[Tensor, "d d d"]], pixel_size_angstrom: float) -> Figure:
    """Three central sections of each volume, one volume a row.

    The last volume sets the grey scale; the others are brought to it by a linear fit, since scale and background of a
    reconstruction are arbitrary.
    """
    figure = new_figure(7.2, 2.4 * len(volumes) + 0.35)
    panels = figure.subplots(len(volumes), 3, squeeze=False)
    reference = list(volumes.values())[-1].double()
    limits, extent = grey_limits(reference), reference.shape[-1] * pixel_size_angstrom
    for row, (name, volume) in enumerate(volumes.items()):
        fitted = fitted_to(volume.double(), reference)
        for panel, section in zip(panels[row], SECTIONS, strict=True):
            draw_section(panel, fitted, section, extent, limits)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if row == 0:
                right, up, normal = section
                panel.set_title(f"section {normal} = 0   ({right} right, {up} up)", fontsize=8.5)
        panels[row, 0].set_ylabel(name, fontsize=10)
    scale_bar(panels[-1, 0], extent)
    return figure


def grey_limits(reference: Float[Tensor, "d d d"]) -> tuple[float, float]:
    """Densities shown black and white: a little below the solvent, so that it stays visible, and near the maximum."""
    background, high = np.quantile(reference.double().numpy(), [0.5, 0.999])
    return background - 0.15 * (high - background), max(high, background + 1e-12)


def draw_section(
    panel: Axes,
    volume: Float[Tensor, "d d d"],
    section: tuple[str, str, str],
    extent_angstrom: float,
    limits: tuple[float, float],
    centre_angstrom: float = 0.0,
) -> None:
    """The central section (right, up, normal) of a volume, centred at a place on the panel's x axis."""
    picture = volume.select(_VOLUME_AXIS[section[2]], volume.shape[-1] // 2).numpy()
    low, half = centre_angstrom - extent_angstrom / 2, extent_angstrom / 2
    panel.imshow(
        picture, cmap="gray", vmin=limits[0], vmax=limits[1], origin="lower", interpolation="bicubic",
        extent=(low, low + extent_angstrom, -half, half),
    )  # fmt: skip


def fitted_to(volume: Float[Tensor, "d d d"], reference: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
    """The volume on the reference's scale and background, by least squares."""
    centred, target = volume - volume.mean(), reference - reference.mean()
    power = centred.square().sum()
    scale = (centred * target).sum() / power if power > 0 else 0.0
    # an unrelated volume keeps its own contrast instead of fading to grey
    weakest = 0.5 * (target.square().sum() / power).sqrt() if power > 0 else 0.0
    return centred * max(float(scale), float(weakest)) + reference.mean()


def scale_bar(panel: Axes, extent_angstrom: float) -> None:
    """A white bar of a round length in the lower left corner of a centred section."""
    power = 10 ** math.floor(math.log10(extent_angstrom / 3))
    length = next(step * power for step in (5, 2, 1) if step * power <= extent_angstrom / 3)
    left = bottom = -0.46 * extent_angstrom
    panel.plot([left, left + length], [bottom, bottom], color="white", linewidth=3, solid_capstyle="butt")
    panel.text(left + length / 2, bottom + 0.025 * extent_angstrom, f"{length:g} Å", color="white", ha="center",
               va="bottom", fontsize=8)  # fmt: skip


@matplotlib.rc_context(STYLE)
def fsc_figure(curves: Mapping[str, FscCurve]) -> Figure:
    """Fourier shell correlations over spatial frequency, with both thresholds and where they are crossed.

    The axis in angstrom is that of the first curve.
    """
    figure = new_figure(5.6, 3.9)
    panel = figure.subplots()
    draw_thresholds(panel)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        shells = np.arange(1, len(curve.values))
        panel.plot(
            shells / curve.box, curve.values[1:].numpy(), color=colour, marker="o" if curve.box <= 64 else None,
            markersize=3, label=f"{name}: {_resolutions(curve)}",
        )  # fmt: skip
        for threshold in THRESHOLDS:
            size = resolution_px(curve.values, threshold, curve.box)
            crossed = bool((curve.values[1:] < threshold).any())
            if crossed:
                panel.plot([1 / size], [threshold], marker="D", markersize=5.5, color=colour, markerfacecolor="white")
    frequency_axis(panel, list(curves.values()))
    resolution_axis(panel, next(iter(curves.values())).pixel_size_angstrom)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), handlelength=1.4)
    return figure


def draw_thresholds(panel: Axes) -> None:
    """The thresholds at which resolutions are read off, as lines with their values."""
    for threshold in THRESHOLDS:
        panel.axhline(threshold, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.text(0.012, threshold + 0.015, f"{threshold:g}", color=GREY, fontsize=8, va="bottom")


def frequency_axis(panel: Axes, curves: Sequence[FscCurve]) -> None:
    """Frequencies up to Nyquist, and correlations down to the lowest of the curves."""
    panel.set(xlim=(0, 0.5), xlabel="spatial frequency (cycles per pixel; Nyquist at 0.5)", ylabel="FSC")
    panel.set_ylim(min(-0.05, min(float(curve.values[1:].min()) for curve in curves) - 0.03), 1.03)


def _resolutions(curve: FscCurve) -> str:
    parts = []
    for threshold in THRESHOLDS:
        size = resolution_px(curve.values, threshold, curve.box)
        parts.append(f"{size:.2f} px = {size * curve.pixel_size_angstrom:.1f} Å at {threshold:g}")
    return ", ".join(parts)


def resolution_axis(panel: Axes, pixel_size_angstrom: float) -> None:
    """Resolutions in angstrom along the top of a panel over frequencies."""
    top = panel.secondary_xaxis("top")
    pixels = (16, 8, 5, 4, 3, 2.5, 2)
    top.set_xticks([1 / size for size in pixels], [f"{size * pixel_size_angstrom:.3g}" for size in pixels])
    top.set_xlabel(f"resolution (Å; one pixel is {pixel_size_angstrom:.4g} Å)")
    top.spines["top"].set_visible(True)


@matplotlib.rc_context(STYLE)
def view_figure(rotation: Float[Tensor, "n 3 3"]) -> Figure:
    """Beam directions per HEALPix cell in Mollweide projection, as a multiple of a uniform distribution."""
    count = view_histogram(rotation.cpu()).double()
    relative = (count / count.mean().clamp(min=1e-12)).numpy()
    figure = new_figure(6.2, 3.9)
    panel = figure.add_subplot(projection="mollweide")
    longitude = np.linspace(-math.pi, math.pi, 721)
    latitude = np.linspace(-math.pi / 2, math.pi / 2, 361)
    centre_lon, centre_lat = (torch.from_numpy((axis[:-1] + axis[1:]) / 2) for axis in (longitude, latitude))
    lat, lon = torch.meshgrid(centre_lat, centre_lon, indexing="ij")
    direction = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=-1)
    value = np.ma.masked_equal(relative[healpix_cell(direction, NSIDE).numpy()], 0.0)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d9d9d9")
    mesh = panel.pcolormesh(longitude, latitude, value, cmap=colours, vmin=0, rasterized=True)
    panel.set_xticks([])
    panel.set_yticks([math.radians(angle) for angle in _LATITUDES], [f"{angle}°" for angle in _LATITUDES])
    panel.set_title(
        f"{int((count > 0).sum())} of {cell_count(NSIDE)} cells are hit by {len(rotation):,} particles", loc="center"
    )
    bar = figure.colorbar(mesh, ax=panel, orientation="horizontal", shrink=0.6, aspect=35, pad=0.04)
    bar.set_label("particles in a cell, relative to uniform views (grey: none)")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


@matplotlib.rc_context(STYLE)
def rotation_error_figure(rotation_sqfrob: Float[Tensor, " n"]) -> Figure:
    """Histogram of rotation errors on a logarithmic axis, beside what random poses would give."""
    squared = rotation_sqfrob.double().cpu()
    degrees = sqfrob_to_degrees(squared).clamp(min=0.01).numpy()
    low = min(0.1, 10 ** math.floor(math.log10(degrees.min())))
    edges = np.geomspace(low, 180, 61)
    figure = new_figure(5.6, 3.6)
    panel = figure.subplots()
    share = np.histogram(degrees, bins=edges)[0] / len(degrees)
    panel.stairs(share, edges, fill=True, color=COLOURS[0], alpha=0.85, label=f"{len(degrees):,} particles")
    angle = np.deg2rad(edges)
    random = np.diff((angle - np.sin(angle)) / math.pi)
    panel.stairs(random, edges, color=COLOURS[1], linewidth=1.2, label="random poses")
    median, good = np.median(degrees), float(sqfrob_to_degrees(torch.tensor(GOOD_SQFROB)))
    label = f"median {median:.2g}° (|ΔR|² = {float(squared.median()):.2g})"
    panel.axvline(float(median), color="black", linewidth=1, label=label)
    label = f"{float((squared < GOOD_SQFROB).double().mean()):.1%} below {good:.0f}° (|ΔR|² = {GOOD_SQFROB:g})"
    panel.axvline(good, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), label=label)
    panel.set(xscale="log", xlim=(low, 180), ylim=(0, None))
    panel.set(xlabel="rotation error after alignment (degrees)", ylabel="share of particles")
    panel.xaxis.set_major_formatter(_PLAIN)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


@matplotlib.rc_context(STYLE)
def near_symmetry_figure(volume: Float[Tensor, "d d d"], least: float, order: int, correlation: float) -> Figure:
    """How much a map is like itself turned, beside what counts as a near-symmetry.

    `order` and `correlation` are those of the near-symmetry whose registers a refinement solved; order 1: none.
    """
    angle, highest = (column.numpy() for column in correlation_by_angle(volume))
    figure = new_figure(5.6, 3.6)
    panel = figure.subplots()
    panel.plot(angle, highest, color=COLOURS[0], label="this map, best axis at each angle")
    far = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (4, 3))}
    limits = [least_correlation(order_of_turn(float(degrees)), least) for degrees in angle]
    panel.plot(angle, limits, **far, label="near-symmetry from here")
    for fold in range(2, 7):
        panel.axvline(360 / fold, color=GREY, linewidth=0.4)
        panel.text(360 / fold, 1.02, f"C{fold}", ha="center", fontsize=8, color=GREY)
    if order > 1:
        label = f"C{order}, whose registers were solved: {correlation:.2f} then"
        panel.plot([360 / order], [correlation], "o", color=COLOURS[1], label=label)
    panel.set(xlim=(0, 181), ylim=(min(0.0, float(highest.min())), 1.0))
    panel.set(xlabel="angle of the turn (degrees)", ylabel="correlation of the map with itself turned")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


@matplotlib.rc_context(STYLE)
def training_figure(histories: Mapping[str, History]) -> Figure:
    """Losses, schedules, pose error and resolution over steps; several runs are told apart by line style.

    Rows are mappings with `step` and any of loss_…, schedule/…, pose/rotation_sqfrob_… and fsc/resolution_px_… keys
    (a `train/` prefix is ignored).
    """
    rows = {
        name: [{key.removeprefix("train/"): value for key, value in row.items()} for row in history]
        for name, history in histories.items()
    }
    keys = list(dict.fromkeys(key for history in rows.values() for row in history for key in row))
    shown = {prefix: panel for prefix, panel in _TRAINING_PANELS.items() if any(key.startswith(prefix) for key in keys)}
    figure = new_figure(max(3.3 * len(shown), 3.3), 3.1 + 0.2 * len(rows))
    if not shown:
        return figure
    for axes, (prefix, (label, scale, naming)) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        series = {key: naming.format(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}
        series = {key: _ACRONYMS.get(name, name.replace("_", " ")) for key, name in series.items()}
        for line, (name, history) in zip(itertools.cycle(LINES), rows.items(), strict=False):
            _draw_run(
                axes, history, {key: f"{short}, {name}" if name else short for key, short in series.items()}, line
            )
        axes.set(xlabel="step", ylabel=label, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if scale == "log":
            plain_logarithms(axes.yaxis)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=max(2, len(rows)), handlelength=2.8)
    return figure


def plain_logarithms(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, without exponents."""
    axis.set_major_formatter(_PLAIN)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def _draw_run(axes: Axes, history: History, labels: Mapping[str, str], line: Any) -> None:
    for (key, label), colour in zip(labels.items(), itertools.cycle(COLOURS), strict=False):
        points = [(row["step"], row[key]) for row in history if key in row]
        if not any(value for _, value in points):
            continue  # a task that is switched off
        steps, values = zip(*points, strict=True)
        if len(points) <= _FEW_POINTS:
            axes.plot(steps, values, linestyle=line, color=colour, marker="o", markersize=3, label=label)
        else:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
            axes.plot(steps, _smoothed(values), linestyle=line, color=colour, label=label)


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Running mean over a twentieth of the points, over fewer at the ends."""
    index = np.arange(len(values))
    width = len(values) // 40
    first, last = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    return (total[last] - total[first]) / (last - first)
