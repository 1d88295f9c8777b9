"""The Gaussian filters of ACE-EM eq. 9: banded matrices on images, a transfer function on the half disc."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aceray.em.fourier import HalfDisc

VARIANCES_PX2 = (0.01, 0.1, 1.0, 10.0, 100.0)
RADIUS_PX = 5


def gaussian_taps(variance_px2: float) -> Float[Tensor, "11"]:
    """Normalised 11-tap Gaussian; the 11 x 11 kernel of the paper is its outer square."""
    x = torch.arange(-RADIUS_PX, RADIUS_PX + 1, dtype=torch.float64)
    taps = torch.exp(-x.square() / (2 * variance_px2))
    return taps / taps.sum()


def filter_matrix(variance_px2: float, box: int) -> Float[Tensor, "d d"]:
    """Matrix A with A x = the filtered column x, edges reflected about the outermost pixel."""
    matrix = torch.zeros(box, box, dtype=torch.float64)
    taps = gaussian_taps(variance_px2)
    rows = torch.arange(box)
    for offset, tap in zip(range(-RADIUS_PX, RADIUS_PX + 1), taps, strict=True):
        columns = rows + offset
        columns = columns.abs()
        columns = torch.where(columns >= box, 2 * (box - 1) - columns, columns)
        matrix[rows, columns] += tap
    return matrix


def transfer_on_disc(disc: HalfDisc) -> Float[Tensor, "5 p"]:
    """What each of the five filters multiplies the coefficients of an image with.

    The edges are periodic here, reflected in the bank: the filtered images are the same except within 5 px of an edge.
    """
    offset = torch.arange(-RADIUS_PX, RADIUS_PX + 1, dtype=torch.float64)
    phase = (2 * math.pi / disc.box) * disc.frequency.double().cpu()[..., None] * offset
    transfer = [(phase.cos() @ gaussian_taps(variance)).prod(-1) for variance in VARIANCES_PX2]
    return torch.stack(transfer).float().to(disc.frequency.device)


class GaussianFilterBank(nn.Module):
    """Five fixed Gaussian filters of variance 0.01 to 100 px^2, 11 x 11 taps, reflected edges; (b d d) -> (b 5 d d)."""

    matrices: Tensor

    def __init__(self, box: int) -> None:
        super().__init__()
        if box <= RADIUS_PX:
            raise ValueError(f"filter bank: a box of {box} px is smaller than the filter's radius of {RADIUS_PX} px")
        matrices = torch.stack([filter_matrix(variance, box) for variance in VARIANCES_PX2])
        self.register_buffer("matrices", matrices.float(), persistent=False)

    def forward(self, images: Float[Tensor, "b d d"]) -> Float[Tensor, "b 5 d d"]:
        """Filter each image with each Gaussian: A X A^T, 10 d operations a pixel in place of 605."""
        return self.matrices @ images[:, None] @ self.matrices.transpose(-1, -2)
