"""Scores of a reconstruction that need no truth: what remains to choose by in every experiment.

README.md says of each how far to trust it. All but the two that compare runs are measured by the trainer at each
evaluation; none draws a random number.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from aceray.em.dihedral import ELEMENTS, coefficient_tables, element_rotations, transform_coefficients
from aceray.em.fourier import HalfDisc
from aceray.em.rotation import rotation_sqfrob
from aceray.errors import DataError
from aceray.metrics.alignment import align_poses
from aceray.metrics.fsc import fsc_area
from aceray.metrics.pose import GOOD_SQFROB
from aceray.models.autoencoder import AutoEncoder
from aceray.train.evaluate import HALF_MAP_THRESHOLD, compare_half_maps
from aceray.train.predict import Particles, Poses, best_poses

BANDS = ("low", "middle", "high")
"""Thirds of the disc's radius, in whole shells."""

# images whose eight quarter turns and mirrors are encoded
_DIHEDRAL_PARTICLES = 256
_CHUNK = 1024
# share of the strongest shell's power below which a shell is taken to hold nothing
_NO_POWER = 1e-9


def held_out(particle_id: Int[Tensor, " n"], fraction: float) -> Bool[Tensor, " n"]:
    """Which particles training must not sample: about the given fraction of them, by a hash of their number alone.

    So they are the same for every seed, lane and worker, and a larger fraction adds to those of a smaller one. The
    hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    mixed = particle_id.cpu().numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    # 53 bits are what a float64 holds, as even numbers in [0, 1)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction)


def dihedral_metrics(model: AutoEncoder, particles: Particles, rotation: Float[Tensor, "n 3 3"]) -> dict[str, float]:
    """select/d4_consistency and …_median of up to 256 particles, whose predicted rotations are given.

    Of several candidate poses of a turned image the one counts whose rendering is nearest to it, as in `predict`.
    """
    few = particles.take(torch.arange(min(_DIHEDRAL_PARTICLES, len(particles)), device=particles.device))
    ctf = few.transfer(torch.arange(len(few), device=few.device), model.disc)
    training = model.training
    model.eval()
    with torch.no_grad():
        transform = model.decoder.transform()

        def rotations_of(images: Tensor, ctf: Tensor | None) -> Tensor:
            return best_poses(model, transform, images, ctf).rotation

        every = torch.arange(len(few), device=few.device)
        errors = dihedral_errors(rotations_of, rotation[: len(few)], few.coefficients[every], ctf, model.disc)
    model.train(training)
    return {
        "select/d4_consistency": float(errors.mean()),
        "select/d4_consistency_median": float(errors.median()),
    }


def dihedral_errors(
    rotations_of: Callable[[Tensor, Tensor | None], Tensor],
    rotation: Float[Tensor, "b 3 3"],
    coefficients: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"] | None,
    disc: HalfDisc,
) -> Float[Tensor, "7 b"]:
    """|R(g x) - G R(x)|^2 for the seven elements g of D4 beside the identity, G their rotations (em/dihedral.py).

    `rotations_of` gives the rotations (b, 3, 3) of images and their contrast transfer, `rotation` is what it gives for
    the images as they are. 0 for a method that commutes with D4, mean 6 for random rotations. The transform is exact,
    and the frame and hand of a reconstruction cancel out.
    """
    source, sign = coefficient_tables(disc)
    turns, rotation = element_rotations(coefficients.device), rotation.to(coefficients.device)
    errors = []
    for number in range(1, ELEMENTS):
        element = torch.full((len(coefficients),), number, device=coefficients.device)
        turned = transform_coefficients(coefficients, element, (source, sign))
        # astigmatism turns along with the image
        turned_ctf = None if ctf is None else ctf[:, source[number]]
        errors.append(rotation_sqfrob(rotations_of(turned, turned_ctf), turns[number] @ rotation))
    return torch.stack(errors)


@torch.no_grad()
def residual_metrics(
    sample: str, model: AutoEncoder, particles: Particles, poses: Poses, stored_box: int
) -> dict[str, float]:
    """How well the particles are rendered at their predicted poses: select/<sample>_loss…, select/<sample>_whitened….

    `…_loss` is the mean squared difference per pixel in units of the signal's variance; its three bands add up to it.
    `…_whitened` is the same with every shell divided by the images' mean power in it and averaged over the
    coefficients (of a band), without the origin: 1 when nothing is rendered, and for the true volume at true poses the
    share of noise in the images' power.
    """
    disc = model.disc
    residual, image = _power(model, particles, poses, stored_box)
    weighted = residual * disc.weight
    shell_weight = disc.weight.new_zeros(int(disc.shell.max()) + 1).index_add_(0, disc.shell, disc.weight)
    shell_power = torch.zeros_like(shell_weight).index_add_(0, disc.shell, image * disc.weight) / shell_weight
    whitened = weighted / shell_power.clamp_min(_NO_POWER * float(shell_power.max()))[disc.shell]
    band = (6 * disc.shell // disc.box).clamp(max=len(BANDS) - 1)
    everywhere = torch.ones_like(band, dtype=torch.bool)
    metrics = {}
    for name, inside in (("", everywhere), *((f"_{name}", band == index) for index, name in enumerate(BANDS))):
        metrics[f"select/{sample}_loss{name}"] = float(weighted[inside].sum()) / disc.box**2
        # the mean grey value of an image is often zero, and says nothing about its pose
        inside = inside & (disc.radius > 0)
        metrics[f"select/{sample}_whitened{name}"] = float(whitened[inside].sum() / disc.weight[inside].sum())
    return metrics


def _power(
    model: AutoEncoder, particles: Particles, poses: Poses, stored_box: int
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Mean squared modulus per coefficient of the difference of image and rendering, and of the image."""
    transform, device = model.decoder.transform(), particles.device
    rotation = poses.rotation.to(device)
    shift_px = poses.shift_px.to(device) * (model.disc.box / stored_box)
    residual, image = torch.zeros(2, len(model.disc), device=device)
    for index, images in particles.chunks(_CHUNK):
        ctf = particles.transfer(index, model.disc)
        rendered = model.render(transform, rotation[index], shift_px[index], ctf)
        residual += torch.view_as_real(rendered - images).square().sum((0, -1))
        image += torch.view_as_real(images).square().sum((0, -1))
    return residual / len(particles), image / len(particles)


def pose_agreement(first: Poses, second: Poses) -> dict[str, float]:
    """How far two runs, such as two seeds, agree on the poses of the particles that both predicted.

    select/pose_agreement_sqfrob is the mean squared Frobenius distance after alignment over rotation and hand (0 to 8,
    6 for unrelated runs), select/pose_agreement_below_half the share of distances below 0.5.

    Raises:
        DataError: the runs share no particle.
    """
    _, row, other = np.intersect1d(
        first.particle_id.cpu().numpy(), second.particle_id.cpu().numpy(), assume_unique=True, return_indices=True
    )
    if not len(row):
        raise DataError("pose agreement: the two runs share no particle; compare runs on one set and one half of it")
    theirs, ours = first.rotation.cpu()[row], second.rotation.cpu()[other]
    distance = rotation_sqfrob(align_poses(theirs, ours).apply(theirs).double(), ours.double())
    return {
        "select/pose_agreement_sqfrob": float(distance.mean()),
        "select/pose_agreement_below_half": float((distance < GOOD_SQFROB).double().mean()),
    }


def half_map_scores(
    first: Float[Tensor, "d d d"], second: Float[Tensor, "d d d"], pixel_size_angstrom: float
) -> dict[str, float]:
    """Agreement of two volumes of one box that were made of different particles, after alignment, without a mask.

    select/half_map_fsc_area is the mean of their FSC over shells 1 to Nyquist, select/half_map_resolution_px where it
    falls below 0.143, in pixels, two boxes at most. Volumes that are empty or not finite, as a failed run leaves them,
    agree in nothing: an area of 0 and two boxes.
    """
    box = first.shape[-1]
    worst = {"select/half_map_fsc_area": 0.0, "select/half_map_resolution_px": 2.0 * box}
    if not all(bool(volume.isfinite().all()) and bool(volume.any()) for volume in (first, second)):
        return worst
    compared = compare_half_maps(first, second, pixel_size_angstrom)
    pixels = compared.metrics[f"fsc/half_map_resolution_px_{HALF_MAP_THRESHOLD}"]
    return {
        "select/half_map_fsc_area": fsc_area(compared.curve.values),
        "select/half_map_resolution_px": min(pixels, 2.0 * box),
    }
