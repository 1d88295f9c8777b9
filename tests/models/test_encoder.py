"""Encoders: filters, candidate rotations, bounded shifts."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from aceray.em.ctf import ctf_on_disc
from aceray.em.fourier import HalfDisc
from aceray.models.encoder import (
    CnnFeatures,
    MlpFeatures,
    PoseEncoder,
    ResNet18Features,
    StandardisedInput,
    VggFeatures,
    WienerInput,
    normalised_regressor,
    regressor,
    start_as_cryoai,
)
from tests.train.phantom import BOX, PIXEL_SIZE_ANGSTROM, ctf_parameters, projections


def test_wiener_input_inverts_the_ctf_where_there_is_no_noise() -> None:
    disc = HalfDisc(BOX)
    clean, _, _ = projections(4, noise=0.0, ctf=False)
    ctf = ctf_on_disc(ctf_parameters(4), disc, PIXEL_SIZE_ANGSTROM)
    wiener = WienerInput(disc, torch.full((len(disc),), 1e-6))
    wiener.mask.fill_(1.0)
    restored = disc.gather(wiener(clean.coefficients * ctf, ctf))
    visible = ctf.abs() > 0.05
    assert visible.float().mean() > 0.9
    assert_close(restored[visible], clean.coefficients[visible], atol=1e-3, rtol=1e-3)


def test_wiener_input_without_ctf_damps_each_shell_by_its_noise() -> None:
    disc = HalfDisc(BOX)
    ratio = torch.linspace(0, 3, len(disc))
    wiener = WienerInput(disc, ratio)
    wiener.mask.fill_(1.0)
    wiener.scale.fill_(2.0)
    images = torch.randn(3, len(disc), dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    images[:, disc.radius == 0] = images[:, disc.radius == 0].real.to(images.dtype)
    assert_close(disc.gather(wiener(images, None)), images / (1 + ratio) / 2, atol=1e-5, rtol=0)


def test_standardised_input_has_zero_mean_and_unit_deviation() -> None:
    particles, _, _ = projections(5)
    images = StandardisedInput(HalfDisc(BOX))(7 * particles.coefficients, None)
    assert_close(images.mean((1, 2)), torch.zeros(5), atol=1e-5, rtol=0)
    assert_close(images.std((1, 2)), torch.ones(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["mlp", "resnet18", "vgg", "cnn"])
def test_encoder_gives_proper_rotations_and_bounded_shifts(kind: str) -> None:
    disc = HalfDisc(32)
    networks = {"mlp": lambda box: MlpFeatures(box, 64, 2), "resnet18": ResNet18Features, "vgg": VggFeatures}
    features = networks.get(kind, CnnFeatures)(32)
    width = features.features
    encoder = PoseEncoder(StandardisedInput(disc), features, regressor(width, 18), nn.Linear(width, 2), 1.5)
    with torch.no_grad():
        encoder.shift.bias.copy_(torch.tensor([100.0, -100.0]))
    images = torch.randn(6, len(disc), dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
    poses = encoder(images, None)
    assert poses.rotation.shape == (6, 3, 3, 3)
    assert_close(poses.rotation @ poses.rotation.mT, torch.eye(3).expand(6, 3, 3, 3), atol=1e-5, rtol=0)
    assert_close(torch.linalg.det(poses.rotation), torch.ones(6, 3), atol=1e-5, rtol=0)
    assert_close(poses.shift_px, torch.tensor([1.5, -1.5]).expand(6, 2), atol=1e-4, rtol=0)
    assert poses.codes.shape == (6, width)


def test_resnet18_has_the_size_of_the_published_network() -> None:
    # torchvision's ResNet-18 has 11,176,512 parameters without its last layer; two more input channels of 7x7 to 64
    assert sum(parameter.numel() for parameter in ResNet18Features(32).parameters()) == 11_176_512 + 2 * 49 * 64


def test_vgg_has_the_size_of_the_published_network() -> None:
    widths = [64, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256]
    expected = sum(9 * before * width + 2 * width for before, width in zip([5, *widths], widths, strict=False))
    features = VggFeatures(128)
    assert sum(parameter.numel() for parameter in features.parameters()) == expected == 4_099_136
    assert features.features == 1024
    assert features.eval()(torch.zeros(1, 128, 128)).shape == (1, 1024)


@pytest.mark.parametrize(("box", "expected"), [(8, 1024), (24, 9 * 256), (32, 1024), (64, 1024)])
def test_vgg_leaves_out_the_halvings_a_small_box_has_no_room_for(box: int, expected: int) -> None:
    features = VggFeatures(box)
    assert features.features == expected
    assert features.eval()(torch.zeros(2, box, box)).shape == (2, expected)


def test_vgg_halves_by_maxima_then_means_then_maxima() -> None:
    pools = [type(layer).__name__[:3] for layer in VggFeatures(128) if "Pool" in type(layer).__name__]
    assert pools == ["Max", "Max", "Max", "Avg", "Avg", "Max"]


@pytest.mark.parametrize(("box", "halvings"), [(8, 3), (24, 4), (32, 5), (128, 5)])
def test_cnn_has_the_size_of_the_published_network_whatever_the_box(box: int, halvings: int) -> None:
    widths = [1, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024]
    expected = sum(9 * before * width + 2 * width for before, width in itertools.pairwise(widths))
    features = CnnFeatures(box)
    assert sum(parameter.numel() for parameter in features.parameters()) == expected == 18_846_016
    assert sum(isinstance(layer, nn.AvgPool2d) for layer in features) == halvings
    assert features.eval()(torch.zeros(1, box, box)).shape == (1, 1024)


def test_the_head_of_cryoai_normalises_what_its_first_rectifier_gives() -> None:
    head = normalised_regressor(1024, 6)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "ReLU", "BatchNorm1d", "Linear", "ReLU", "Linear"]
    assert sum(parameter.numel() for parameter in head.parameters()) == 1025 * 512 + 2 * 512 + 513 * 256 + 257 * 6


def test_hidden_layers_start_as_in_cryoai_and_the_last_one_does_not() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = start_as_cryoai(regressor(1024, 6))
    first, second, last = (layer for layer in head if isinstance(layer, nn.Linear))
    for layer in (first, second):
        # fan_out: an entry has the variance 2 / outputs
        assert_close(layer.weight.std().item(), (2 / layer.out_features) ** 0.5, rtol=0.02, atol=0)
        assert 0.95 < layer.bias.abs().max() < 1 and abs(layer.bias.mean()) < 0.1
    assert last.weight.abs().max() < 256**-0.5 and last.bias.abs().max() < 256**-0.5
