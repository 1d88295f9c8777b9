"""The Fourier decoder: a real volume whatever its weights, the paper's size, an export that is what its slices show.

And its two projectors, which agree on a volume that fits into the box.
"""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from aceray.em.fourier import HalfDisc, frequency_index
from aceray.em.projection import central_slice, padded_transform
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, rotation_from_vector
from aceray.models.siren import LatticeSirenDecoder, SirenDecoder
from tests.train.phantom import BOX, chiral_volume

STEPS, BATCH = 250, 12


def decoder(width: int = 16, box: int = BOX, seed: int = 0, **settings) -> SirenDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SirenDecoder(HalfDisc(box), width, **settings)


def on_lattice(model: SirenDecoder) -> LatticeSirenDecoder:
    """The same weights behind the other projector."""
    lattice = LatticeSirenDecoder(model.disc, model.content.first.out_features)
    lattice.load_state_dict(model.state_dict())
    return lattice


def scaled_phantom() -> tuple[Tensor, Tensor, Tensor]:
    """The chiral volume with projections of unit variance, rotations and its half-disc projections at them."""
    disc, volume = HalfDisc(BOX), chiral_volume()
    rotation = random_rotations(256, named_generator("tests/siren"))
    images = central_slice(padded_transform(volume, 3), rotation, disc)
    unit = disc.energy(images).mean().sqrt()
    return volume / unit, rotation, images / unit


@pytest.fixture(scope="module")
def trained() -> SirenDecoder:
    """A narrow decoder that has learned the phantom from projections at their true poses."""
    model, (_, rotation, images) = decoder(48), scaled_phantom()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(STEPS):
        index = torch.arange(step * BATCH, (step + 1) * BATCH) % len(rotation)
        slices = model.slices(model.transform(), rotation[index])
        optimiser.zero_grad()
        model.disc.energy(slices - images[index]).mean().backward()
        optimiser.step()
    return model.requires_grad_(False)


def test_the_papers_size() -> None:
    model = SirenDecoder(HalfDisc(BOX))
    assert sum(parameter.numel() for parameter in model.content.parameters()) == 198_914
    assert sum(parameter.numel() for parameter in model.envelope.parameters()) == 133_122
    assert sum(parameter.numel() for parameter in model.parameters()) == 332_036


def test_initial_weights_and_renderings() -> None:
    model = decoder(256).requires_grad_(False)
    assert 0.99 / 3 < float(model.content.first.weight.abs().max()) <= 1 / 3
    for siren, frequency in ((model.content, 40), (model.envelope, 30)):
        bound = (6 / 256) ** 0.5 / frequency
        assert 0.99 * bound < float(siren.rest[0].weight.abs().max()) <= bound
        assert 0.9 * bound < float(siren.rest[-1].weight.abs().max()) <= bound
    rotation = random_rotations(4, named_generator("tests/siren"))
    models = [decoder(256, seed=seed).requires_grad_(False) for seed in range(8)]
    energy = torch.stack([model.disc.energy(model.slices(model.transform(), rotation)) for model in models])
    assert 0.1 < float(energy.mean()) < 1


def test_one_sine_and_one_envelope_by_hand() -> None:
    model = decoder(8, content_depth=1, envelope_depth=1, scale=3.0)
    points = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, -1.0]])
    scaled = points * 2 / (BOX - 1)

    def network(siren, frequency: float) -> Tensor:
        values = torch.sin(frequency * (scaled @ siren.first.weight.T + siren.first.bias))
        values = torch.sin(frequency * (values @ siren.rest[0].weight.T + siren.rest[0].bias))
        return values @ siren.rest[1].weight.T + siren.rest[1].bias

    expected = 3 * network(model.envelope, 30).exp() * network(model.content, 40)
    assert_close(torch.view_as_real(model.coefficients(points)), expected, atol=1e-4, rtol=1e-4)


def test_hermitian_symmetry_at_any_weights() -> None:
    model = decoder()
    generator = named_generator("tests/siren/points")
    points = torch.randn(50, 3, generator=generator)
    # on the planes and axes where the sign of x, then of y, does not decide
    points[10:20, 0] = 0
    points[20:30, :2] = 0
    assert_close(model.coefficients(-points), model.coefficients(points).conj(), atol=0, rtol=0)
    assert model.coefficients(points).imag.abs().min() > 0
    origin = model.coefficients(torch.zeros(1, 3))
    assert origin.imag == 0 and origin.real != 0


def test_turning_an_image_by_180_degrees_conjugates_its_slice() -> None:
    model = decoder()
    rotation = random_rotations(3, named_generator("tests/siren"))
    turned = torch.diag(torch.tensor([-1.0, -1.0, 1.0])) @ rotation
    assert_close(model.slices(model.transform(), turned), model.slices(model.transform(), rotation).conj())


def test_slices_keep_leading_dimensions() -> None:
    model = decoder()
    rotation = random_rotations(6, named_generator("tests/siren"))
    slices = model.slices(model.transform(), rotation)
    grouped = model.slices(model.transform(), rotation.reshape(2, 3, 3, 3))
    assert_close(grouped, slices.reshape(2, 3, len(model.disc)))


def test_gradients_reach_every_parameter_and_the_pose() -> None:
    model = decoder()
    rotation = random_rotations(2, named_generator("tests/siren")).requires_grad_()
    model.disc.energy(model.slices(model.transform(), rotation)).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().min() > 0 for parameter in model.parameters())
    assert rotation.grad is not None and rotation.grad[:, :2].abs().min() > 0


def test_half_precision_spares_the_phases_of_the_first_layer() -> None:
    model = decoder(64).requires_grad_(False)
    model.content.rest[-1].bias.zero_()
    points = 6 * torch.randn(500, 3, generator=named_generator("tests/siren/points"))
    full = model.coefficients(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.coefficients(points)
    assert half.dtype == torch.complex64
    # with the first layer in half precision as well it is three times as much
    assert 0.003 < float((half - full).norm() / full.norm()) < 0.03


def test_it_learns_a_phantom_given_true_poses(trained: SirenDecoder) -> None:
    volume, _, _ = scaled_phantom()
    rotation = random_rotations(16, named_generator("tests/siren/unseen"))
    images = central_slice(padded_transform(volume, 3), rotation, trained.disc)
    error = trained.disc.energy(trained.slices(trained.transform(), rotation) - images).mean()
    assert float(error) < 0.01
    found = trained.volume()
    assert torch.corrcoef(torch.stack([found.flatten(), volume.flatten()]))[0, 1] > 0.99
    # neither mirrored nor scaled
    assert float((found - volume).norm() / volume.norm()) < 0.15


def test_the_export_is_exact_where_slices_meet_the_grid() -> None:
    # no interpolation between nodes, so any weights will do: an error of axis, sign or unit cannot hide
    model = decoder(box=12).requires_grad_(False)
    model.mask.fill_(1)
    volume = model.volume()
    # rows of a rotation are image x, image y and beam in the object's x, y, z
    along_y = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    quarter_turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    mirrored_y = volume.flip(1).roll(1, 1)
    images = torch.stack([volume.sum(0), volume.sum(1).T, mirrored_y.sum(0).T])
    rotation = torch.stack([torch.eye(3), along_y, quarter_turn])
    assert_close(model.disc.gather(images), model.slices(model.transform(), rotation), atol=1e-5, rtol=0)


def test_the_exported_volume_has_the_projections_that_slices_show(trained: SirenDecoder) -> None:
    rotation = random_rotations(8, named_generator("tests/siren/export"))
    slices = trained.slices(trained.transform(), rotation)
    exported = central_slice(padded_transform(trained.volume(), 3), rotation, trained.disc)
    # what the network puts outside the box and the sphere is cut off
    assert float((exported - slices).norm() / slices.norm()) < 0.08


def test_the_corners_of_the_exported_volume_are_empty() -> None:
    volume = decoder().volume()
    assert volume[0, 0, 0] == 0 and volume[BOX // 2, BOX // 2, BOX // 2] != 0


def test_lattice_slices_are_fourier_sums_over_the_exported_volume(trained: SirenDecoder) -> None:
    lattice = on_lattice(trained).requires_grad_(False)
    rotation = random_rotations(4, named_generator("tests/siren/lattice"))
    axis = frequency_index(BOX).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = (trained.disc.frequency @ rotation[:, :2]).double()
    phase = -2j * torch.pi / BOX * (points @ torch.stack([x, y, z]).reshape(3, -1))
    expected = phase.exp() @ trained.volume().double().flatten().to(torch.complex128) / BOX
    slices = lattice.slices(lattice.transform(), rotation)
    # trilinear sampling of a transform padded to twice the box
    assert float((slices - expected).norm() / expected.norm()) < 0.06


def test_the_projectors_agree_on_a_volume_that_fits_into_the_box(trained: SirenDecoder) -> None:
    lattice = on_lattice(trained).requires_grad_(False)
    rotation = random_rotations(8, named_generator("tests/siren/projectors"))
    images = central_slice(padded_transform(scaled_phantom()[0], 3), rotation, trained.disc)
    found = []
    for model in (trained, lattice):
        turned = rotation_from_vector(torch.tensor([0.1, -0.2, 0.15])) @ rotation
        turned.requires_grad_()
        slices = model.slices(model.transform(), turned)
        (gradient,) = torch.autograd.grad(model.disc.energy(slices - images).mean(), turned)
        found.append((slices.detach(), gradient))
    (slices, gradient), (sliced, other) = found
    assert float((sliced - slices).norm() / slices.norm()) < 0.08
    assert float((other - gradient).norm() / gradient.norm()) < 0.2


def test_the_lattice_gradient_reaches_every_parameter_and_the_pose() -> None:
    model = on_lattice(decoder())
    rotation = random_rotations(2, named_generator("tests/siren")).requires_grad_()
    model.disc.energy(model.slices(model.transform(), rotation)).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().min() > 0 for parameter in model.parameters())
    assert rotation.grad is not None and rotation.grad[:, :2].abs().min() > 0
