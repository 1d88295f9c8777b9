from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.em.backprojection import BackProjection
from aceray.em.formation import shift_image
from aceray.em.fourier import HalfDisc, crop_images, crop_volume
from aceray.em.projection import central_slice, padded_transform, project_real, project_slice
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations, relion_from_rotation, rotation_from_relion, rotation_from_sixd
from tests.references.projection import blob_projection, blob_volume, rotate_and_sum, slice_by_sum
from tests.references.rotation import relion_matrix

# four blobs on a right-handed screw around z: no mirror image of it can be turned onto it
SCREW_PX = np.array([[4.0, 0.0, -3.0], [0.0, 4.0, -1.0], [-4.0, 0.0, 1.0], [0.0, -4.0, 3.0]])
SCREW_WEIGHT = np.array([1.0, 0.8, 0.6, 0.4])
HAND = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
RELION_DATA = Path(__file__).parents[3] / "shared" / "data" / "relion_projections"


def cloud(box: int, extent: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres (x, y, z) and weights of 60 blobs, uniform in a ball of radius extent times the box."""
    generator = np.random.default_rng(5)
    direction = generator.normal(size=(60, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return direction * extent * box * generator.random((60, 1)) ** (1 / 3), generator.random(60)


def phantom(box: int, sigma_px: float = 1.0, extent: float = 0.2) -> torch.Tensor:
    return torch.from_numpy(blob_volume(*cloud(box, extent), sigma_px, box)).float()


def analytic(box: int, rotation: torch.Tensor, extent: float) -> torch.Tensor:
    images = [blob_projection(*cloud(box, extent), 1.0, box, matrix) for matrix in rotation.double().numpy()]
    return torch.from_numpy(np.stack(images)).float()


def rotations(count: int) -> torch.Tensor:
    return random_rotations(count, named_generator("test/projection"))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# the error of the interpolation grows with the particle's radius; pad 3 halves it
@pytest.mark.parametrize(
    ("extent", "pad", "bound"),
    [(0.20, 2, 0.010), (0.25, 2, 0.015), (0.30, 2, 0.022), (0.35, 2, 0.032), (0.30, 3, 0.011), (0.35, 3, 0.015)],
)
@pytest.mark.parametrize("box", [32, 33, 64])
def test_slices_against_analytic_projections(box: int, extent: float, pad: int, bound: float) -> None:
    rotation = rotations(6)
    expected = analytic(box, rotation, extent)
    assert relative_error(project_slice(phantom(box, extent=extent), rotation, pad), expected) < bound


@pytest.mark.parametrize("fraction_of_nyquist", [0.25, 0.5, 0.75, 0.875])
@pytest.mark.parametrize("box", [32, 33, 64])
def test_slices_keep_the_amplitude_within_one_percent(box: int, fraction_of_nyquist: float) -> None:
    disc, rotation = HalfDisc(box), rotations(12)
    found = central_slice(padded_transform(phantom(box, extent=0.25)), rotation, disc)
    expected = disc.gather(analytic(box, rotation, 0.25))
    ring = disc.shell == round(fraction_of_nyquist * box / 2)
    gain = (found * expected.conj()).real[:, ring].sum() / expected[:, ring].abs().square().sum()
    assert gain.item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("box", [16, 17, 48])
def test_slices_without_gradient_are_those_with_it(box: int) -> None:
    """The compiled loop and the tensor code, a turn or many, of poses that themselves have a gradient."""
    disc, rotation = HalfDisc(box), rotations(6).reshape(3, 2, 3, 3).requires_grad_()
    transform = padded_transform(phantom(box).requires_grad_())
    plain = central_slice(transform, rotation, disc)
    assert plain.requires_grad
    with torch.no_grad():
        compiled, one = central_slice(transform, rotation, disc), central_slice(transform, rotation[1, 0], disc)
    assert not compiled.requires_grad and compiled.shape == plain.shape == (3, 2, len(disc))
    assert relative_error(compiled, plain.detach()) < 1e-5
    torch.testing.assert_close(one, compiled[1, 0], rtol=0, atol=0)


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("pad", [1, 2, 3])
def test_slices_against_the_direct_fourier_sum(box: int, pad: int) -> None:
    disc, rotation = HalfDisc(box), rotations(3)
    volume = phantom(box)
    expected = np.stack(
        [slice_by_sum(volume.double().numpy(), r, disc.frequency.numpy()) for r in rotation.double().numpy()]
    )
    found = central_slice(padded_transform(volume, pad), rotation, disc)
    bound = {1: 0.07, 2: 0.015, 3: 0.007}[pad]
    assert relative_error(found, torch.from_numpy(expected).to(found.dtype)) < bound


@pytest.mark.parametrize("box", [12, 13])
def test_unrotated_slices_are_exact(box: int) -> None:
    # every sample lies on a node, so only the interpolation's correction is left, and it is even in x, y and z
    volume = torch.randn(box, box, box, generator=named_generator("test/exact"), dtype=torch.float64)
    disc = HalfDisc(box).double()
    corrected = padded_transform(volume)
    axis = 1 / np.sinc((np.arange(box) - box // 2) / (2 * box)) ** 2
    weighted = volume * torch.from_numpy(axis[:, None, None] * axis[:, None] * axis)
    found = central_slice(corrected, torch.eye(3, dtype=torch.float64)[None], disc)
    assert_close(found, disc.gather(weighted.sum(0)[None]), atol=1e-11, rtol=0)


@pytest.mark.parametrize("box", [6, 7])
def test_rotate_and_sum_against_loops(box: int) -> None:
    volume = torch.randn(box, box, box, generator=named_generator("test/real"), dtype=torch.float64)
    rotation = rotations(2).double()
    expected = np.stack([rotate_and_sum(volume.numpy(), r) for r in rotation.numpy()])
    assert_close(project_real(volume, rotation), torch.from_numpy(expected), atol=1e-11, rtol=0)


def test_the_two_projectors_agree_on_a_smooth_volume() -> None:
    volume, rotation = phantom(32, sigma_px=2.0), rotations(8)
    assert relative_error(project_real(volume, rotation), project_slice(volume, rotation)) < 0.02


@pytest.mark.parametrize("project", [project_slice, project_real])
def test_unrotated_projection_sums_over_z_with_x_last(project) -> None:
    # an error in the order of axes cannot hide: the blob sits at different places along x, y and z
    volume = torch.from_numpy(blob_volume(np.array([[5.0, 2.0, -3.0]]), np.ones(1), 1.5, 24)).float()
    image = project(volume, torch.eye(3)[None])[0]
    assert relative_error(image, volume.sum(0)) < 0.08
    assert divmod(int(image.argmax()), 24) == (12 + 2, 12 + 5)


@pytest.mark.parametrize("project", [project_slice, project_real])
@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (40.0, 0.0, 0.0), (25.0, 65.0, -110.0), (-150.0, 120.0, 80.0)])
def test_relion_angles_through_a_chiral_phantom(project, angles: tuple[float, float, float]) -> None:
    box, sigma = 24, 1.5
    volume = torch.from_numpy(blob_volume(SCREW_PX, SCREW_WEIGHT, sigma, box)).float()
    rotation = rotation_from_relion(*(torch.tensor([angle]) for angle in angles))
    expected = torch.from_numpy(blob_projection(SCREW_PX, SCREW_WEIGHT, sigma, box, relion_matrix(*angles))).float()
    image = project(volume, rotation)[0]
    # trilinear interpolation, on the voxels or in the padded transform, costs a few per cent in so small a box
    assert relative_error(image, expected) < 0.06
    # RELION's matrix transposed, or the other hand of the phantom, is far away
    if angles[1] > 0:
        for wrong in (relion_matrix(*angles).T, relion_matrix(*angles) @ np.diag([1.0, 1.0, -1.0])):
            wrong_image = torch.from_numpy(blob_projection(SCREW_PX, SCREW_WEIGHT, sigma, box, wrong)).float()
            assert relative_error(image, wrong_image) > 0.3


def test_angles_written_for_relion_give_the_right_hand_back() -> None:
    # images from known poses, poses through RELION angles, volume back: the screw must keep its hand
    box, count = 24, 600
    volume = torch.from_numpy(blob_volume(SCREW_PX, SCREW_WEIGHT, 1.0, box)).float()
    disc, rotation = HalfDisc(box), rotations(count)
    images = central_slice(padded_transform(volume), rotation, disc)
    angles = torch.stack(relion_from_rotation(rotation), dim=-1).double().numpy()
    read_back = torch.from_numpy(np.stack([relion_matrix(*row) for row in angles])).float()
    accumulator = BackProjection(disc)
    accumulator.insert(images, read_back, None)
    found = accumulator.volume(torch.full((box // 2 + 1,), 1e-3))
    assert relative_error(found, volume) < 0.05
    other_hand = torch.from_numpy(blob_volume(SCREW_PX * [1, 1, -1], SCREW_WEIGHT, 1.0, box)).float()
    assert relative_error(found, other_hand) > 0.5


@pytest.mark.parametrize("box", [20, 21])
def test_the_inverted_volume_with_the_turned_pose_gives_the_same_image(box: int) -> None:
    volume = torch.from_numpy(blob_volume(SCREW_PX, SCREW_WEIGHT, 1.0, box)).float()
    inverted = torch.from_numpy(blob_volume(-SCREW_PX, SCREW_WEIGHT, 1.0, box)).float()
    rotation, disc = rotations(6), HalfDisc(box)
    image = central_slice(padded_transform(volume), rotation, disc)
    same = central_slice(padded_transform(inverted), HAND @ rotation, disc)
    assert_close(same, image, atol=1e-5 * image.abs().max().item(), rtol=0)
    assert relative_error(central_slice(padded_transform(inverted), rotation, disc), image) > 0.2


# the origin is a node of the padded transform, where the correction for interpolation is too much by a few per cent
@pytest.mark.parametrize(("project", "bound"), [(project_slice, 0.04), (project_real, 0.005)])
def test_projection_is_linear_and_keeps_the_mass(project, bound: float) -> None:
    volume, rotation = phantom(24, sigma_px=1.5), rotations(4)
    assert_close(project(3 * volume, rotation), 3 * project(volume, rotation), rtol=0, atol=1e-4)
    mass = project(volume, rotation).sum(dim=(1, 2))
    assert_close(mass, volume.sum().expand(4), rtol=bound, atol=0)


def test_a_cropped_volume_projects_to_the_cropped_image_times_the_squared_ratio_of_boxes() -> None:
    volume, rotation = phantom(48, sigma_px=2.5), rotations(4)
    of_cropped = central_slice(padded_transform(crop_volume(volume, 24)), rotation, HalfDisc(24))
    cropped = HalfDisc(24).gather(crop_images(project_slice(volume, rotation), 24))
    assert relative_error(of_cropped, cropped / 4) < 0.01


def test_batch_of_any_shape_equals_loop() -> None:
    volume, rotation, disc = phantom(16), rotations(6).reshape(2, 3, 3, 3), HalfDisc(16)
    transform = padded_transform(volume)
    together = central_slice(transform, rotation, disc)
    real = project_real(volume, rotation.flatten(0, 1))
    for i in range(2):
        for j in range(3):
            assert_close(together[i, j], central_slice(transform, rotation[i, j], disc), atol=1e-6, rtol=0)
            single = project_real(volume, rotation[i, j][None])[0]
            assert_close(real[3 * i + j], single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("box", [6, 7])
def test_gradients_of_the_slice(box: int) -> None:
    generator = named_generator("test/gradient")
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64, requires_grad=True)
    sixd = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    disc = HalfDisc(box).double()

    def projected(density: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
        return central_slice(padded_transform(density), rotation_from_sixd(pose), disc)

    assert torch.autograd.gradcheck(projected, (volume, sixd))


def test_gradients_of_rotate_and_sum() -> None:
    generator = named_generator("test/gradient")
    volume = torch.randn(5, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    sixd = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, s: project_real(v, rotation_from_sixd(s)), (volume, sixd))


def relion_projections(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images made by relion_project, our rotations of their angles, and the shift minus their origins."""
    mrcfile, starfile = pytest.importorskip("mrcfile"), pytest.importorskip("starfile")
    table = starfile.read(RELION_DATA / f"{name}.star", always_dict=True)["particles"]
    with mrcfile.open(RELION_DATA / f"{name}.mrcs") as file:
        images = torch.from_numpy(file.data.astype(np.float32))
    columns = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    rotation = rotation_from_relion(*torch.from_numpy(table[columns].to_numpy(np.float32)).unbind(1))
    # the pixel size is 1 A, so origins in angstrom are in pixels
    origin = [column for column in table.columns if column.startswith("rlnOrigin")]
    return images, rotation, -torch.from_numpy(table[origin].to_numpy(np.float32))


@pytest.mark.skipif(not RELION_DATA.is_dir(), reason="the real projections are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "extra_shift_px", "least_correlation"),
    [("rln_proj_65", 1.0, 0.9999), ("rln_proj_65_shifted", 1.0, 0.9999), ("rln_proj_64_shifted", 0.0, 0.99)],
)
def test_images_made_by_relion_project(name: str, extra_shift_px: float, least_correlation: float) -> None:
    mrcfile = pytest.importorskip("mrcfile")
    images, rotation, shift_px = relion_projections(name)
    with mrcfile.open(RELION_DATA / "aspire_clean70SRibosome_vol_65p.mrc") as file:
        volume = torch.from_numpy(file.data.astype(np.float32))
    box = images.shape[-1]
    ours = shift_image(project_slice(volume[:box, :box, :box], rotation), shift_px + extra_shift_px)
    for found, expected in zip(ours, images, strict=True):
        correlation = torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]
        assert correlation >= least_correlation
    assert ((ours * images).sum() / ours.square().sum()).item() == pytest.approx(1.0, abs=0.04)
