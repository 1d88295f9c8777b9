"""The oracle of a simulated set: the best that any method could do on these very images.

Poses are found against the TRUE volume, a map is back-projected from the TRUE poses. SNR per pixel alone says little: a
larger box at the same SNR holds more signal, so every result is read beside the oracle's. It reads the truth, so it
belongs to evaluation and nothing in training may import it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from aceray.data.particles import Truth
from aceray.em.backprojection import BackProjection
from aceray.em.fourier import HalfDisc, crop_volume
from aceray.em.projection import soft_sphere
from aceray.metrics.masks import molecule_mask
from aceray.train.energy import Images, Matches, Reference, make_reference, refine_poses
from aceray.train.evaluate import evaluate, rows_of_truth
from aceray.train.predict import Particles, Poses
from aceray.train.search import find_poses, make_bank, shift_grid, turned_grid

# poses of so many particles, evenly spread over the set, are searched; the map is made of all
SEARCHED_PARTICLES = 2048
_SEARCH_RADIUS = 10.0  # cycles per box
_SEARCH_NSIDE, _SEARCH_TURNS = 4, 32
_ORACLES_TURN = 2**31 - 1  # no run's seed and round
# at the search's radius the phase is off by at most a radian between shifts
_SHIFT_STEP = 0.325
_SHIFT_RANGE_SIGMA = 3.0
_REFINEMENT_STEPS = 8
_CHUNK = 256
# noise-free images still have interpolation error
_SMALLEST_INVERSE_SSNR = 1e-3


@dataclass(frozen=True)
class TrueState:
    """Particles with everything that is known of how they were made, at the box of their coefficients."""

    particles: Particles
    disc: HalfDisc
    rotation: Float[Tensor, "n 3 3"]
    shift_px: Float[Tensor, "n 2"]
    reference: Reference
    noise_variance: float
    signal_variance: float  # of the noise-free images


@dataclass(frozen=True)
class OracleProgress:
    """How many of the particles have been searched."""

    done: int
    particles: int


@dataclass(frozen=True)
class Oracle:
    """Poses found with the true volume, the map of the true poses, and their metrics.

    Keys of `metrics`: those of `evaluate` behind oracle/, pose/* for the former and fsc/* for the latter;
    oracle/particles (whose poses were searched); oracle/search_missed (share of them for which refining the true pose
    ended lower than the search, whose pose was then taken from there).
    """

    poses: Poses
    volume: Float[Tensor, "d d d"]
    metrics: dict[str, float]


@torch.no_grad()
def run_oracle(
    particles: Particles,
    disc: HalfDisc,
    truth: Truth,
    truth_volume: Float[Tensor, "t t t"],
    noise_std: float,
    pixel_size_angstrom: float,
    on_progress: Callable[[OracleProgress], None] | None = None,
) -> Oracle:
    """What the best method would make of these particles; pixel_size_angstrom is that of the stored images.

    The pose of least energy is kept, whether the search or the true pose led to it. The shifts' spread is known to it.

    Raises:
        DataError: a particle without a true pose.
    """
    state = _true_state(particles, disc, truth, truth_volume, noise_std)
    index = torch.linspace(0, len(particles) - 1, min(SEARCHED_PARTICLES, len(particles))).long().to(disc.radius.device)
    parts = []
    for part in _search(state, index):
        parts.append(part)
        if on_progress is not None:
            on_progress(OracleProgress(sum(len(each.energy) for each in parts), len(index)))
    found = Matches.concatenate(parts)
    found, missed = _lower_of(found, _from_true_poses(state, index))
    scale = truth_volume.shape[-1] / disc.box
    poses = Poses(
        particles.particle_id[index.cpu()],
        found.rotation.cpu(),
        found.shift_px.cpu() * scale,
        found.energy.cpu() / disc.box**2,
    )
    volume = _map_of_true_poses(state, crop_volume(truth_volume.float(), disc.box).to(disc.radius.device))
    perfect = Poses(
        particles.particle_id, state.rotation.cpu(), state.shift_px.cpu() * scale, torch.zeros(len(particles))
    )
    of_poses = evaluate(volume, poses, truth, None, pixel_size_angstrom).metrics
    of_volume = evaluate(volume, perfect, truth, truth_volume, pixel_size_angstrom).metrics
    metrics = {key: value for key, value in of_poses.items() if key not in ("pose/coverage", "pose/view_entropy")}
    metrics |= {key: value for key, value in of_volume.items() if key.startswith("fsc/")}
    metrics |= {"particles": float(len(index)), "search_missed": missed}
    return Oracle(poses, volume.cpu(), {f"oracle/{key}": value for key, value in metrics.items()})


def _true_state(
    particles: Particles, disc: HalfDisc, truth: Truth, truth_volume: Tensor, noise_std: float
) -> TrueState:
    row, device = rows_of_truth(particles.particle_id.cpu(), truth.particle_id), disc.radius.device
    rotation = truth.rotation[row].float().to(device)
    shift_px = truth.shift_px[row].float().to(device) * (disc.box / truth_volume.shape[-1])
    spread = float(shift_px.square().mean().sqrt())
    penalty = noise_std**2 / spread**2 if spread > 0 else None
    reference = make_reference(crop_volume(truth_volume.float(), disc.box).to(device), disc, penalty)
    return _scaled(TrueState(particles, disc, rotation, shift_px, reference, noise_std**2, 1.0))


def _scaled(state: TrueState) -> TrueState:
    """The true volume brought to the images' scale by least squares (a Fourier crop changes it)."""
    product = power = 0.0
    for index, images in _chunks(state):
        rendered = state.reference.slices(state.rotation[index]) * state.reference.phases(state.shift_px[index])
        rendered = rendered if images.transfer is None else rendered * images.transfer
        product += float((rendered.conj() * images.coefficients).real.sum(0) @ state.disc.weight)
        power += float(state.disc.energy(rendered).sum()) * state.disc.box**2
    gain = product / max(power, 1e-30)
    reference = replace(state.reference, transform=gain * state.reference.transform)
    signal = gain**2 * power / (len(state.particles) * state.disc.box**2)
    return replace(state, reference=reference, signal_variance=signal)


def _chunks(state: TrueState) -> Iterator[tuple[Tensor, Images]]:
    for index, coefficients in state.particles.chunks(_CHUNK):
        yield index, Images(coefficients, state.particles.transfer(index, state.disc))


def _images(state: TrueState, index: Tensor) -> Images:
    return Images(state.particles.coefficients[index], state.particles.transfer(index, state.disc))


def _search(state: TrueState, index: Tensor) -> Iterator[Matches]:
    """Poses by search on a freshly turned grid of rotations and a grid of shifts, then refinement."""
    rotation = turned_grid(_SEARCH_NSIDE, _SEARCH_TURNS, _ORACLES_TURN).to(state.rotation)
    bank = make_bank(state.reference.within(_SEARCH_RADIUS), rotation)
    reach = _SHIFT_RANGE_SIGMA * float(state.shift_px.square().mean().sqrt())
    offsets = shift_grid(reach, _SHIFT_STEP * state.disc.box / _SEARCH_RADIUS).to(rotation)
    for part in index.split(_CHUNK):
        yield from find_poses(state.reference, bank, _images(state, part), rotation.new_zeros(len(part), 2), offsets)


def _from_true_poses(state: TrueState, index: Tensor) -> Matches:
    """The minimum of the energy next to each true pose."""
    parts = []
    for part in index.split(_CHUNK):
        start = Matches(state.rotation[part], state.shift_px[part], torch.zeros(len(part)).to(state.rotation))
        parts.append(refine_poses(state.reference, _images(state, part), start, _REFINEMENT_STEPS))
    return Matches.concatenate(parts)


def _lower_of(found: Matches, true: Matches) -> tuple[Matches, float]:
    """The pose of lower energy for each image, and the share for which the search's is clearly higher."""
    worse = true.energy < found.energy
    rotation = torch.where(worse[:, None, None], true.rotation, found.rotation)
    shift = torch.where(worse[:, None], true.shift_px, found.shift_px)
    missed = float((found.energy > 1.0001 * true.energy).double().mean())
    return Matches(rotation, shift, torch.minimum(found.energy, true.energy)), missed


def _map_of_true_poses(state: TrueState, truth: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
    """Wiener back-projection of all particles from their true poses, where the molecule truly is.

    One value of noise over signal serves all shells: the mask mixes neighbouring shells, and outer shells that were
    damped by their own value would drown in the inner ones (5NRL, 32 px, 0 dB, in the soft sphere: FSC 0.5 at 2.21 in
    place of 2.04 px).
    """
    projection = BackProjection(state.disc)
    for index, images in _chunks(state):
        projection.insert(images.coefficients, state.rotation[index], images.transfer, state.shift_px[index])
    ratio = max(state.noise_variance / max(state.signal_variance, 1e-30), _SMALLEST_INVERSE_SSNR)
    sphere = soft_sphere(state.disc.box, state.disc.box / 2, truth.device)
    return projection.volume(torch.tensor([ratio], device=truth.device)) * sphere * molecule_mask(truth)
