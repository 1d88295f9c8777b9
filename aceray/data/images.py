"""Raw particle images to images of a dataset: the same field of view, Fourier cropping, background, what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from aceray.em.fourier import crop_images, frequency_index
from aceray.errors import DataError

Normalise = Literal["background", "none"]

LARGEST_MISFIT = 1e-3  # of the pixel size, between groups of particles that are joined
_SMALLEST_FIELD = 0.85  # of the largest common field of view
_GOOD_MISFIT = 1e-4
# a background this much weaker than the image is that of a masked or noise-free one
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Field:
    """How images of several boxes and pixel sizes become one: the centre of `crop_px[group]` pixels is Fourier-cropped.

    `pixel_size_angstrom` is that of the resulting `box`, right for every group to `misfit` (a fraction).
    """

    box: int
    pixel_size_angstrom: float
    crop_px: tuple[int, ...]
    misfit: float


def common_field(groups: Sequence[tuple[int, float]], box: int | None) -> Field:
    """The largest field of view that all groups (box, pixel size in angstrom) share, in whole pixels of each.

    One group keeps its whole images. Raises DataError when `box` is larger than a group's images there, or no field
    makes the pixel sizes agree to 0.1%.
    """
    first_size = groups[0][1]
    widest = min(side * size for side, size in groups)
    best = None
    for pixels in range(int(widest / first_size + 1e-6), int(_SMALLEST_FIELD * widest / first_size) - 1, -1):
        width = pixels * first_size
        crops = tuple(min(side, max(1, round(width / size))) for side, size in groups)
        misfit = max(abs(crop * size / width - 1) for crop, (_, size) in zip(crops, groups, strict=True))
        if best is None or misfit < best[0]:
            best = (misfit, width, crops)
        if misfit < _GOOD_MISFIT:
            break
    assert best is not None
    misfit, width, crops = best
    sizes = ", ".join(f"{side} px of {size:g} A" for side, size in sorted(set(groups)))
    if misfit > LARGEST_MISFIT:
        raise DataError(
            f"pixel sizes: no common field of view fits images of {sizes} to 0.1%; prepare the groups apart, or give "
            "--pixel-size if they are really equal."
        )
    target = min(crops) if box is None else box
    if target > min(crops):
        raise DataError(f"--box {box}: is larger than the images, {sizes}; choose at most {min(crops)}.")
    return Field(target, width / target, crops, misfit)


def outside_circle(box: int) -> Bool[Tensor, "d d"]:
    """Pixels farther than half the box from the centre: what counts as background."""
    axis = frequency_index(box)
    return axis.square()[:, None] + axis.square() > (box / 2) ** 2


def cropped_to(images: Float[Tensor, "n d d"], crop_px: int, box: int) -> Float[Tensor, "n b b"]:
    """The central `crop_px` pixels of images, Fourier-cropped to `box`; centres are at side // 2 before and after."""
    start = images.shape[-1] // 2 - crop_px // 2
    return crop_images(images[..., start : start + crop_px, start : start + crop_px].contiguous(), box)


def refusals(images: Float[Tensor, "n d d"]) -> list[str]:
    """Why each raw image cannot be used; an empty text where it can."""
    flat = images.flatten(1)
    finite = torch.isfinite(flat).all(dim=1)
    low, high = flat.aminmax(dim=1)
    return [
        "holds values that are not finite numbers" if not good else "is constant" if equal else ""
        for good, equal in zip(finite.tolist(), (low == high).tolist(), strict=True)
    ]


def normalised(images: Float[Tensor, "n d d"]) -> tuple[Float[Tensor, "n d d"], list[str]]:
    """Images with mean 0 and standard deviation 1 outside the circle; and why each cannot be, or an empty text."""
    background = images[:, outside_circle(images.shape[-1])]
    spread, mean = torch.std_mean(background, dim=1)
    # beside the contrast of a row through the particle: that of the whole image would take longer than all the rest
    low, high = images[:, images.shape[-1] // 2].aminmax(dim=1)
    flat = spread <= _CONSTANT * (high - low)
    scale = torch.where(flat, torch.ones_like(spread), spread)
    reason = "has a constant background (a mask?): prepare with --normalise none"
    result = (images - mean[:, None, None]) / scale[:, None, None]
    return result, [reason if each else "" for each in flat.tolist()]


def prepared(
    images: Float[Tensor, "n d d"], crop_px: int, box: int, *, invert: bool, normalise: Normalise
) -> tuple[Float[Tensor, "n b b"], list[str]]:
    """Raw images as a dataset has them, and why each is refused; the content of a refused one means nothing."""
    reasons = refusals(images)
    good = torch.tensor([not reason for reason in reasons])
    # a NaN would be slow to transform
    images = torch.where(good[:, None, None], images, torch.zeros(()))
    result = cropped_to(-images if invert else images, crop_px, box)
    if normalise == "background":
        result, more = normalised(result)
        reasons = [first or second for first, second in zip(reasons, more, strict=True)]
    return result, reasons


def brightness(images: Float[Tensor, "n d d"]) -> tuple[float, float]:
    """How much brighter the centre is than the edge, mean over the images, and the standard error of that.

    The centre is within an eighth of the box, the edge beyond half of it. Protein must be bright: the sign of the CTF
    says so at low frequencies.
    """
    box = images.shape[-1]
    axis = frequency_index(box)
    centre = axis.square()[:, None] + axis.square() <= max(1.0, (box / 8) ** 2)
    difference = images[:, centre].double().mean(1) - images[:, outside_circle(box)].double().mean(1)
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else float("inf")
    return float(difference.mean()), error
