"""Pictures of a prepared dataset: a contact sheet of its particles, their power spectra, the defoci."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from aceray.em.fourier import centred_fft2, shell_index
from aceray.train.figures import COLOURS, GREY, STYLE, new_figure, scale_bar

_COLUMNS, _ROWS = 8, 4


@matplotlib.rc_context(STYLE)
def contact_sheet(images: Float[Tensor, "n d d"], pixel_size_angstrom: float) -> Figure:
    """The first 32 images as they are above, and averaged over 3 x 3 pixels below; bright is dense."""
    chosen = images[: _COLUMNS * _ROWS // 2].float()
    smooth = torch.nn.functional.avg_pool2d(chosen[:, None], 3, 1, 1)[:, 0]
    figure = new_figure(8.0, 4.4)
    panels = figure.subplots(_ROWS, _COLUMNS, squeeze=False)
    extent = images.shape[-1] * pixel_size_angstrom
    for panel in panels.flat:
        panel.set_axis_off()
    for rows, pictures in ((panels[: _ROWS // 2], chosen), (panels[_ROWS // 2 :], smooth)):
        low, high = np.quantile(pictures.numpy(), [0.005, 0.995]) if len(pictures) else (0.0, 1.0)
        for panel, picture in zip(rows.flat, pictures.numpy(), strict=False):
            half = extent / 2
            panel.imshow(picture, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(-half, half, -half, half))
    scale_bar(panels[0, 0], extent)
    figure.suptitle("particles: as stored, and averaged over 3 x 3 pixels", fontsize=9, x=0.01, ha="left")
    return figure


@matplotlib.rc_context(STYLE)
def power_figure(images: Float[Tensor, "n d d"], pixel_size_angstrom: float) -> Figure:
    """Mean power spectrum of the images (left, logarithm) and its rotational average with the spread over images."""
    box = images.shape[-1]
    power = centred_fft2(images.float()).abs().square()
    shells = shell_index(box, 2).flatten()
    inside = shells <= box // 2
    counts = torch.bincount(shells[inside], minlength=box // 2 + 1)
    radial = torch.stack(
        [torch.bincount(shells[inside], each.flatten()[inside], minlength=box // 2 + 1) / counts for each in power]
    )
    figure = new_figure(8.0, 3.6)
    left, right = figure.subplots(1, 2)
    nyquist = 0.5 / pixel_size_angstrom
    # a cropped even box has nothing at Nyquist, its first row and column
    picture = power.mean(0).clamp_min(1e-12).log10().numpy()
    low, high = np.quantile(picture[1:, 1:], [0.005, 0.998])
    extent = (-nyquist, nyquist, -nyquist, nyquist)
    left.imshow(picture, cmap="gray", origin="lower", vmin=low, vmax=high, extent=extent)
    left.set(xlabel="frequency x (1/Å)", ylabel="frequency y (1/Å)", title="mean power spectrum (log)")
    frequency = torch.arange(box // 2 + 1) / (box * pixel_size_angstrom)
    low, middle, high = np.quantile(radial.numpy(), [0.1, 0.5, 0.9], axis=0)
    right.fill_between(frequency[1:], low[1:], high[1:], color=COLOURS[0], alpha=0.25, label="10 to 90 % of the images")
    right.plot(frequency[1:], middle[1:], color=COLOURS[0], label="median")
    right.axhline(1.0, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    right.set(xlabel="frequency (1/Å)", ylabel="power per coefficient", yscale="log", title="rotational average")
    right.legend()
    return figure


@matplotlib.rc_context(STYLE)
def defocus_figure(ctf: Mapping[str, Float[np.ndarray, "n"]]) -> Figure:
    """Histograms of the mean defocus and of the difference of both defoci."""
    first, second = ctf["defocus_u_angstrom"], ctf["defocus_v_angstrom"]
    figure = new_figure(8.0, 3.0)
    for panel, values, label in (
        (figure.add_subplot(1, 2, 1), (first + second) / 2e4, "mean defocus (µm, underfocus positive)"),
        (figure.add_subplot(1, 2, 2), np.abs(first - second), "difference of both defoci (Å)"),
    ):
        panel.hist(values, bins=60, color=COLOURS[0])
        panel.set(xlabel=label, ylabel="particles")
    return figure
