"""How far each projector is from the analytic projections of Gaussian blobs."""

import math

import torch

from aceray.em.fourier import HalfDisc
from aceray.em.projection import project_real, project_slice
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from tests.bench.timing import print_table

BOXES = (32, 64, 128)
EXTENTS = (0.20, 0.25, 0.30, 0.35)
SIGMA_PX = 1.0
BLOBS = 60
VIEWS = 4
FRACTIONS_OF_NYQUIST = (0.25, 0.5, 0.75, 0.875)


def blobs(box: int, extent: float, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Volume of blobs within `extent` boxes of the centre, and its exact projections."""
    generator = named_generator("bench/blobs")
    direction = torch.nn.functional.normalize(torch.randn(BLOBS, 3, generator=generator).double(), dim=-1)
    centre = direction * torch.rand(BLOBS, 1, generator=generator).double() ** (1 / 3) * extent * box
    weight = torch.rand(BLOBS, generator=generator).double()
    axis = torch.arange(box).double() - box // 2

    def line(position: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((axis - position[:, None]) ** 2) / (2 * SIGMA_PX**2))

    x, y, z = (line(centre[:, i]) for i in range(3))
    volume = torch.einsum("n,nz,ny,nx->zyx", weight, z, y, x)
    images = []
    for matrix in rotation.double():
        moved = centre @ matrix.T
        column = weight * math.sqrt(2 * math.pi) * SIGMA_PX
        images.append(torch.einsum("n,ny,nx->yx", column, line(moved[:, 1]), line(moved[:, 0])))
    return volume.float(), torch.stack(images).float()


def row(name: str, found: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """Relative error, and the amplitude at four fractions of Nyquist."""
    disc = HalfDisc(expected.shape[-1])
    ours, exact = disc.gather(found), disc.gather(expected)
    cells = [name, f"{((found - expected).norm() / expected.norm()).item():.2%}"]
    for fraction in FRACTIONS_OF_NYQUIST:
        ring = disc.shell == round(fraction * expected.shape[-1] / 2)
        gain = (ours * exact.conj()).real[:, ring].sum() / exact[:, ring].abs().square().sum()
        cells.append(f"{gain.item():.3f}")
    return cells


def main() -> None:
    """Print the table."""
    rotation = random_rotations(VIEWS, named_generator("bench/views"))
    rows = []
    for box in BOXES:
        for extent in EXTENTS:
            volume, expected = blobs(box, extent, rotation)
            label = f"{box} px, radius {extent:.2f}"
            for pad in (2, 3):
                rows.append(row(f"{label}, slice, pad {pad}", project_slice(volume, rotation, pad), expected))
            if extent in (EXTENTS[0], EXTENTS[-1]):
                rows.append(row(f"{label}, rotate and sum", project_real(volume, rotation), expected))
    amplitude = [f"amplitude at {fraction:.3g}" for fraction in FRACTIONS_OF_NYQUIST]
    title = f"Projections of {BLOBS} blobs of sigma {SIGMA_PX:g} px within a radius (in boxes), {VIEWS} views"
    print_table(title, ["projector", "error", *amplitude], rows)
