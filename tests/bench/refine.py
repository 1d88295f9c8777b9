"""Cost per image of refinement: search, Gauss-Newton step, back-projection; compiled loops beside tensor operations."""

from collections.abc import Callable

import torch

from aceray.em.backprojection import BackProjection
from aceray.em.fourier import HalfDisc
from aceray.em.kernels import PARAMETERS
from aceray.em.projection import padded_transform, sample_transform, soft_sphere
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.train import energy
from aceray.train.energy import Images, Reference, make_reference
from aceray.train.search import make_bank, search_poses, shift_grid, turned_grid
from tests.bench.timing import Machine, cpu_seconds, measure_machine, print_table

BOXES, IMAGES, SEARCH_RADIUS = (32, 64, 128), {32: 1024, 64: 256, 128: 64}, 8.0
COMPLEX, REAL = 8, 4
# Floating-point operations for each point. Sampling: coordinates 15, fractions 9, value and three slopes 8 nodes x 2
# channels x 7; slopes over turn and shift 60; residual 20; the triangle of J^T W J and J^T W r 4 each.
STEP = 15 + 9 + 112 + 60 + 20 + 4 * (PARAMETERS * (PARAMETERS + 1) // 2 + PARAMETERS)
INSERT = 15 + 9 + 16 + 8 * (3 + 2 + 2)
SLICE = 15 + 9 + 7 * 2 * 3  # seven interpolations along an axis, two channels


def main() -> None:
    """Print the table."""
    machine = measure_machine()
    rows = [row for box in BOXES for row in measured(box, machine)]
    header = ["stage, per image", "compiled ms", "tensors ms", "MFLOP", "MB", "floor ms", "times the floor"]
    print_table("Refinement: half disc, CTF and shifts", header, rows)


def measured(box: int, machine: Machine) -> list[list[str]]:
    """Rows of one box."""
    disc, count = HalfDisc(box), IMAGES[box]
    generator = named_generator("bench/refine", box)
    volume = torch.randn(box, box, box, generator=generator) * soft_sphere(box, 0.3 * box)
    reference = make_reference(volume, disc, 1.0)
    images = Images(
        torch.randn(count, len(disc), dtype=torch.complex64, generator=generator),
        torch.randn(count, len(disc), generator=generator),
    )
    rotation, shift = random_rotations(count, generator), torch.randn(count, 2, generator=generator)
    of, points = torch.arange(count), len(disc)

    def row(name: str, calls: tuple[Callable[[], object], ...], flops: float, moved: float) -> list[str]:
        times = [cpu_seconds(call) / count * 1e3 for call in calls]
        floor = machine.floor_seconds(flops, moved) * 1e3
        shown = [f"{time:.4f}" for time in times] + [""] * (2 - len(times))
        return [
            f"{box} px, {name}",
            *shown,
            f"{flops / 1e6:.3f}",
            f"{moved / 1e6:.3f}",
            f"{floor:.4f}",
            f"{times[0] / floor:.1f}",
        ]

    steps = tuple(
        (lambda way=way: way(reference, images, rotation, shift, of))
        for way in (energy._model_on_cpu, energy._model_by_differences)
    )
    read, channels = points * (COMPLEX + REAL), padded_transform(volume)
    slices = (
        lambda: reference.slices(rotation),
        lambda: sample_transform(channels, disc.frequency @ rotation[:, :2], box),
    )
    return [
        search_row(reference, images, row),
        row("a slice", slices, points * SLICE, points * 9 * COMPLEX),
        row("a Gauss-Newton step", steps, points * STEP, points * 8 * COMPLEX + read),
        row("back-projection", insertions(disc, images, rotation, shift), points * INSERT, points * 8 * 24 + read),
    ]


def search_row(reference: Reference, images: Images, row: Callable[..., list[str]]) -> list[str]:
    """6,144 rotations by nine shifts: a product of matrices for each shift."""
    bank = make_bank(reference.within(SEARCH_RADIUS), turned_grid(4, 32, 1, 1))
    step = 0.325 * reference.box / SEARCH_RADIUS
    offsets, few = shift_grid(1.5 * step, step), images.take(slice(0, 128)).at(bank.reference.index)
    centre = torch.zeros(len(few), 2)
    scale = len(images) / len(few)

    def search() -> None:
        for _ in range(max(1, round(scale))):
            search_poses(bank, few, centre, offsets, 4)

    points, rotations = len(bank.reference.index), len(bank.rotation)
    flops = rotations * points * (2 + 2 * 2 * len(offsets)) * max(1, round(scale)) / scale
    return row(f"search of {rotations:,} x {len(offsets)}", (search,), flops, rotations * REAL * len(offsets))


def insertions(
    disc: HalfDisc, images: Images, rotation: torch.Tensor, shift: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Both ways to insert the images."""
    projection, points = BackProjection(disc), disc.frequency @ rotation[:, :2]
    like, transfer = projection.numerator, images.transfer
    assert transfer is not None

    def tensors() -> None:
        from aceray.em.backprojection import _spread
        from aceray.em.formation import shift_phase

        _spread(images.coefficients * transfer * shift_phase(disc, -shift), points, like, disc.box)
        _spread(torch.complex(transfer.square(), torch.zeros_like(transfer)), points, like, disc.box)

    return lambda: projection.insert(images.coefficients, rotation, transfer, shift), tensors
