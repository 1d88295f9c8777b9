"""Cost per image of decoder, physics and encoders, forward and backward, beside what the machine allows at best."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aceray.em.ctf import CtfParameters, ctf_on_disc
from aceray.em.formation import shift_phase
from aceray.em.fourier import HalfDisc
from aceray.em.projection import central_slice, padded_box, padded_transform, project_real
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.models.encoder import MlpFeatures, PoseEncoder, ResNet18Features, WienerInput, regressor
from aceray.models.siren import LatticeSirenDecoder, SineLayer, SirenDecoder
from tests.bench.timing import Machine, cpu_seconds, measure_machine, print_table

BOXES = (32, 64, 128)
PAD = 2
BATCH = 64
# rotating the grid keeps several grids of d^3 points an image, ResNet-18 and the SIRENs their activations: fewer images
BATCH_REAL = {32: 8, 64: 4, 128: 1}
BATCH_RESNET = {32: 64, 64: 32, 128: 8}
BATCH_SIREN = {32: 16, 64: 4, 128: 1}
HEADS = 4
MLP_WIDTH, MLP_DEPTH = 512, 4

# Floating-point operations per sample, a sine or cosine counted as 20. Trilinear sampling: coordinates (9 for two
# axes, 15 for three), fractions 9, eight weights 20, two operations per corner and channel.
SLICE_FORWARD = 9 + 9 + 20 + 8 * 2 * 2
SLICE_BACKWARD = 9 + 20 + 8 * 2 * 2 + 8 * 2 * 6
REAL_FORWARD = 15 + 9 + 20 + 8 * 2 + 1
REAL_BACKWARD = 15 + 20 + 8 * 2 + 8 * 6
TRANSFER_FORWARD = 25 + 2 * 20
PHASE_FORWARD, PHASE_BACKWARD = 4 + 2 * 20, 8
LOSS_FORWARD, LOSS_BACKWARD = 14, 22
COMPLEX, REAL = 8, 4


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes that cannot be avoided, forward and backward."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, images: float) -> "Cost":
        return Cost(self.flops * images, self.bytes * images)

    def __truediv__(self, images: float) -> "Cost":
        return Cost(self.flops / images, self.bytes / images)


@dataclass(frozen=True)
class Stage:
    """One measured stage: seconds per image forward, and forward and backward, beside its unavoidable cost."""

    name: str
    forward: float
    both: float
    cost: Cost


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Call that runs forward and backward for all inputs, with a random gradient of the output."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def measure(name: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], images: int, cost: Cost) -> Stage:
    """Time a differentiable stage; `cost` is for all images together."""
    with torch.no_grad():
        forward = cpu_seconds(lambda: function(*inputs))
    return Stage(name, forward / images, cpu_seconds(gradients(function, *inputs)) / images, cost / images)


def transform_cost(box: int) -> Cost:
    """Pruned real FFT along x, y, z there and back; the volume and its transform read or written once each way."""
    padded = padded_box(box, PAD)
    half, log = padded // 2 + 1, math.log2(padded)
    flops = padded * log * (2.5 * box**2 + 5 * box * half + 5 * (padded + 1) * half)
    return Cost(2 * flops, 2 * (box**3 * REAL + (padded + 1) ** 2 * half * COMPLEX))


def slice_cost(points: int) -> Cost:
    """Eight corners read, read again and added to: at pad 2 neighbouring samples are two nodes apart and share none."""
    moved = 8 * COMPLEX + COMPLEX + COMPLEX + 3 * 8 * COMPLEX
    return Cost(points * (SLICE_FORWARD + SLICE_BACKWARD), points * moved)


def real_cost(box: int) -> Cost:
    """Neighbouring samples share their corners: each voxel is read, read again and added to once."""
    return Cost(box**3 * (REAL_FORWARD + REAL_BACKWARD), (box**3 * 4 + box**2 * 2) * REAL)


def ctf_parameters(count: int) -> CtfParameters:
    defocus = 10_000 + 15_000 * torch.rand(count, generator=named_generator("bench/defocus"))
    constants = [torch.full((count,), value) for value in (30.0, 0.0, 300.0, 2.7, 0.1)]
    return CtfParameters(defocus + 300, defocus - 300, *constants)


def physics_stages(box: int) -> list[Stage]:
    """Every stage from the voxels to the loss, and all of them together as one step on a batch."""
    disc = HalfDisc(box)
    points = BATCH * len(disc)
    generator = named_generator("bench/physics", box)
    volume = torch.randn(box, box, box, generator=generator)
    rotation = random_rotations(BATCH, generator)
    shift_px = torch.randn(BATCH, 2, generator=generator)
    images = disc.gather(torch.randn(BATCH, box, box, generator=generator))
    parameters, pixel_size_angstrom = ctf_parameters(BATCH), 544.0 / box
    transform = padded_transform(volume, PAD)
    slices, phase = central_slice(transform, rotation, disc), shift_phase(disc, shift_px)
    ctf = ctf_on_disc(parameters, disc, pixel_size_angstrom)

    def loss(model: Tensor, ramp: Tensor) -> Tensor:
        return disc.energy(model * ctf * ramp - images).mean()

    def step(density: Tensor, pose: Tensor, shift: Tensor) -> Tensor:
        transfer = ctf_on_disc(parameters, disc, pixel_size_angstrom)
        rendered = central_slice(padded_transform(density, PAD), pose, disc) * transfer * shift_phase(disc, shift)
        return disc.energy(rendered - images).mean()

    transfer_cost = Cost(points * TRANSFER_FORWARD, points * REAL)
    transfer_seconds = cpu_seconds(lambda: ctf_on_disc(parameters, disc, pixel_size_angstrom)) / BATCH
    phase_cost = Cost(points * (PHASE_FORWARD + PHASE_BACKWARD), 2 * points * COMPLEX)
    # slices, ramp, transfer and images read, read again, two gradients written
    loss_cost = Cost(points * (LOSS_FORWARD + LOSS_BACKWARD), points * (2 * (3 * COMPLEX + REAL) + 2 * COMPLEX))
    stages = [
        measure("padded transform / 64", lambda v: padded_transform(v, PAD), (volume,), BATCH, transform_cost(box)),
        measure("slices", lambda t, r: central_slice(t, r, disc), (transform, rotation), BATCH, slice_cost(points)),
        Stage("CTF", transfer_seconds, transfer_seconds, transfer_cost / BATCH),
        measure("shift phase", lambda t: shift_phase(disc, t), (shift_px,), BATCH, phase_cost),
        measure("modulation and loss", loss, (slices, phase), BATCH, loss_cost),
    ]
    total = Cost(0, 0)
    for stage in stages:
        total = total + stage.cost
    count = BATCH_REAL[box]
    return [
        *stages,
        measure("decoder and physics", step, (volume, rotation, shift_px), BATCH, total * BATCH),
        measure("rotate and sum", project_real, (volume, rotation[:count]), count, real_cost(box) * count),
    ]


def encoder_stage(name: str, box: int, features: nn.Module, heads: tuple[nn.Module, nn.Module], images: int) -> Stage:
    """Wiener input, features and heads of a batch; operations as counted by torch, weights moved once each way."""
    disc = HalfDisc(box)
    encoder = PoseEncoder(WienerInput(disc, torch.ones(len(disc))), features, *heads, shift_limit_px=4.0)
    generator = named_generator("bench/encoder", box)
    coefficients = disc.gather(torch.randn(images, box, box, generator=generator))
    ctf = ctf_on_disc(ctf_parameters(images), disc, 544.0 / box)
    parameters = list(encoder.parameters())

    def forward() -> Tensor:
        poses = encoder(coefficients, ctf)
        return poses.rotation.sum() + poses.shift_px.sum()

    def both() -> object:
        return torch.autograd.grad(forward(), parameters)

    with FlopCounterMode(display=False) as counter:
        both()
    moved = 3 * REAL * sum(parameter.numel() for parameter in parameters)
    cost = Cost(counter.get_total_flops(), moved + images * len(disc) * COMPLEX)
    with torch.no_grad():
        seconds = cpu_seconds(forward)
    return Stage(name, seconds / images, cpu_seconds(both) / images, cost / images)


def encoder_stages(box: int) -> list[Stage]:
    """The two encoders, with the heads that build.py gives them."""
    mlp = (nn.Linear(MLP_WIDTH, 6 * HEADS), nn.Linear(MLP_WIDTH, 2))
    resnet = (regressor(ResNet18Features.features, 6 * HEADS), regressor(ResNet18Features.features, 2))
    return [
        encoder_stage("encoder: MLP 4 x 512", box, MlpFeatures(box, MLP_WIDTH, MLP_DEPTH), mlp, 2 * BATCH),
        encoder_stage("encoder: ResNet-18", box, ResNet18Features(box), resnet, BATCH_RESNET[box]),
    ]


def siren_stage(name: str, decoder: SirenDecoder, images: int, points: int, sliced: Cost) -> Stage:
    """Slices of a Fourier decoder whose networks see so many points, and the gradient of their weights.

    Products are counted by torch, the sines here; `sliced` is what comes after the networks.
    """
    rotation = random_rotations(images, named_generator("bench/siren", decoder.disc.box))
    parameters = list(decoder.parameters())

    def forward() -> Tensor:
        return decoder.disc.energy(decoder.slices(decoder.transform(), rotation)).mean()

    def both() -> object:
        return torch.autograd.grad(forward(), parameters)

    with FlopCounterMode(display=False) as counter:
        both()
    # a sine forward and a cosine backward at every hidden unit
    units = sum(layer.out_features for layer in decoder.modules() if isinstance(layer, SineLayer))
    flops = counter.get_total_flops() + points * units * 2 * 20
    moved = 3 * REAL * sum(parameter.numel() for parameter in parameters) + points * COMPLEX
    with torch.no_grad():
        seconds = cpu_seconds(forward)
    return Stage(name, seconds / images, cpu_seconds(both) / images, (Cost(flops, moved) + sliced) / images)


def siren_stages(box: int) -> list[Stage]:
    """Both projectors of the Fourier decoder, at the paper's size."""
    disc, few = HalfDisc(box), BATCH_SIREN[box]
    sliced, lattice = transform_cost(box) + slice_cost(BATCH * len(disc)), round(math.pi / 12 * box**3)
    return [
        siren_stage("decoder: SIREN 256", SirenDecoder(disc), few, few * len(disc), Cost(0, 0)),
        siren_stage("the same, lattice / 64", LatticeSirenDecoder(disc), BATCH, lattice, sliced),
    ]


def stage_row(stage: Stage, machine: Machine) -> list[str]:
    floor = machine.floor_seconds(stage.cost.flops, stage.cost.bytes)
    bound = "FLOPs" if stage.cost.flops / machine.flops > stage.cost.bytes / machine.bytes else "bytes"
    return [
        stage.name,
        f"{stage.forward * 1e3:.4f}",
        f"{stage.both * 1e3:.4f}",
        f"{stage.cost.flops / 1e6:.3f}",
        f"{stage.cost.bytes / 1e6:.3f}",
        f"{floor * 1e3:.4f}",
        bound,
        f"{stage.both / floor:.1f}",
    ]


def operations_row(box: int, stages: list[Stage]) -> list[str]:
    """How much less work a slice is than rotating the grid, in samples, operations and time."""
    points = len(HalfDisc(box))
    real = box**3 * (REAL_FORWARD + REAL_BACKWARD)
    sliced = points * (SLICE_FORWARD + SLICE_BACKWARD)
    seconds = {stage.name: stage.both for stage in stages}
    return [
        f"{box} px",
        f"{box**3:,}",
        f"{points:,}",
        f"{box**3 / points:.0f}",
        f"{real / sliced:.0f}",
        f"{real / (sliced + transform_cost(box).flops / BATCH):.1f}",
        f"{seconds['rotate and sum'] / seconds['slices']:.0f}",
        f"{seconds['rotate and sum'] / (seconds['slices'] + seconds['padded transform / 64']):.0f}",
    ]


def main() -> None:
    """Measure the machine, then every stage at every box, and print the tables."""
    torch.manual_seed(0)
    machine = measure_machine()
    print(f"\nOne thread: {machine.flops / 1e9:.0f} GFLOP/s (matrix product), {machine.bytes / 1e9:.0f} GB/s (copy)")
    header = ["stage", "forward ms", "and backward ms", "MFLOP", "MB", "floor ms", "bound by", "times the floor"]
    operations = []
    for box in BOXES:
        stages = physics_stages(box)
        operations.append(operations_row(box, stages))
        rows = [stage_row(stage, machine) for stage in [*stages, *siren_stages(box), *encoder_stages(box)]]
        print_table(f"{box} px, {len(HalfDisc(box)):,} points in the half disc, per image", header, rows)
    columns = ["box", "rotated samples", "slice samples", "fewer samples", "fewer operations"]
    columns += ["with transform / 64", "less time", "with transform / 64"]
    print_table("A slice against rotating the grid, forward and backward", columns, operations)
