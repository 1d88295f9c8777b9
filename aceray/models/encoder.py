"""Pose encoders: an image in, one or several candidate rotations and a bounded shift out (ACE-EM eqs. 16-18)."""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from aceray.em.filters import VARIANCES_PX2, GaussianFilterBank
from aceray.em.fourier import HalfDisc, frequency_index
from aceray.em.rotation import rotation_from_sixd


class Hypotheses(NamedTuple):
    """Candidate poses of b images: rotation (b, h, 3, 3) and the one shift (b, 2) in pixels they share.

    `codes` (b, f) are the features that the heads read them from.
    """

    rotation: Tensor
    shift_px: Tensor
    codes: Tensor


class WienerInput(nn.Module):
    """Deconvolved images: coefficients times C / (C^2 + N/S), a soft mask and one scale for the whole data set.

    `noise_to_signal` (p,) is the ratio of noise to signal power per coefficient, estimated from the images; `scale`
    is set so that filtered images have about unit standard deviation.
    """

    noise_to_signal: Tensor
    scale: Tensor
    mask: Tensor

    def __init__(self, disc: HalfDisc, noise_to_signal: Float[Tensor, " p"]) -> None:
        super().__init__()
        self.disc = disc
        axis = frequency_index(disc.box)
        radius = (axis.square()[:, None] + axis.square()).float().sqrt()
        self.register_buffer("mask", ((0.45 * disc.box - radius) / 2).clamp(0, 1), persistent=False)
        self.register_buffer("noise_to_signal", noise_to_signal.clone())
        self.register_buffer("scale", torch.ones(()))

    def forward(self, coefficients: Complex[Tensor, "n p"], ctf: Float[Tensor, "n p"] | None) -> Float[Tensor, "n d d"]:
        """Filter, return to real space, mask and scale."""
        weight = 1 / (1 + self.noise_to_signal) if ctf is None else ctf / (ctf.square() + self.noise_to_signal)
        return self.disc.scatter(coefficients * weight) * (self.mask / self.scale)


class StandardisedInput(nn.Module):
    """Images as they are, each with zero mean and unit standard deviation, as in the paper."""

    def __init__(self, disc: HalfDisc) -> None:
        super().__init__()
        self.disc = disc

    def forward(self, coefficients: Complex[Tensor, "n p"], ctf: Float[Tensor, "n p"] | None) -> Float[Tensor, "n d d"]:
        """Return to real space and standardise."""
        images = self.disc.scatter(coefficients)
        deviation, mean = torch.std_mean(images, dim=(-2, -1), keepdim=True)
        return (images - mean) / deviation.clamp_min(1e-6)


class MlpFeatures(nn.Sequential):
    """Fully connected layers on the pixels: the quickest learner on boxes of about 32 px."""

    def __init__(self, box: int, width: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        features = box * box
        for _ in range(depth):
            layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            features = width
        super().__init__(*layers)
        self.features = features


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels_in == channels_out
            else nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        )

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k y x"]:
        """Sum of both paths, rectified."""
        return torch.relu(self.convolutions(images) + self.shortcut(images))


class ResNet18Features(nn.Sequential):
    """Filter bank and ResNet-18 with five input channels, average-pooled to 512 features (ACE-EM eq. 17)."""

    features = 512

    def __init__(self, box: int) -> None:
        layers: list[nn.Module] = [
            GaussianFilterBank(box),
            nn.Conv2d(len(VARIANCES_PX2), 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = 64
        for index, width in enumerate((64, 128, 256, 512)):
            layers += [ResidualBlock(channels, width, 1 if index == 0 else 2), ResidualBlock(width, width, 1)]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class VggFeatures(nn.Sequential):
    """Filter bank and the VGG of cryoAI: 11 convolutions, six halvings, 1,024 features of a 128-px image.

    Halvings that would leave fewer than 2 x 2 pixels are left out, so that 64 and 32 px give 1,024 features as well.
    """

    def __init__(self, box: int) -> None:
        layers: list[nn.Module] = [GaussianFilterBank(box)]
        channels, side = len(VARIANCES_PX2), box
        blocks: tuple[tuple[tuple[int, ...], type[nn.Module]], ...] = (
            ((64, 64), nn.MaxPool2d),
            ((128, 128), nn.MaxPool2d),
            ((256, 256, 256), nn.MaxPool2d),
            ((256, 256), nn.AvgPool2d),
            ((256, 256), nn.AvgPool2d),
            ((), nn.MaxPool2d),
        )
        for widths, pool in blocks:
            for width in widths:
                layers += [
                    nn.Conv2d(channels, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            if side >= 4:
                layers.append(pool(2))
                side //= 2
        super().__init__(*layers, nn.Flatten())
        self.features = channels * side**2


class CnnFeatures(nn.Sequential):
    """CryoPoseNet's network as in XFELPoseGAN: pairs of convolutions of 64 to 1,024 channels, 1,024 mean features.

    It sees the image alone, without a filter bank. A halving that would leave no pixel is left out.
    """

    features = 1024

    def __init__(self, box: int) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, box))]
        channels, side = 1, box
        for width in (64, 128, 256, 512, 1024):
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            if side > 1:
                layers.append(nn.AvgPool2d(2))
                side //= 2
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def regressor(features: int, outputs: int) -> nn.Sequential:
    """The paper's head on pooled features: 512, 256, then linear (widths as in cryoAI)."""
    return nn.Sequential(
        nn.Linear(features, 512),
        nn.ReLU(inplace=True),
        nn.Linear(512, 256),
        nn.ReLU(inplace=True),
        nn.Linear(256, outputs),
    )


def normalised_regressor(features: int, outputs: int) -> nn.Sequential:
    """cryoAI's rotation head: as `regressor`, with batch normalisation behind the first rectifier."""
    plain = list(regressor(features, outputs))
    return nn.Sequential(*plain[:2], nn.BatchNorm1d(512), *plain[2:])


@torch.no_grad()
def start_as_cryoai(head: nn.Sequential) -> nn.Sequential:
    """The head with cryoAI's initial weights: hidden layers normal with variance 2 / outputs, biases uniform in +-1."""
    for layer in list(head)[:-1]:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.uniform_(layer.bias, -1, 1)
    return head


class PoseEncoder(nn.Module):
    """Input filter, features, a rotation head of `heads` candidates and a shift head bounded by shift_limit_px."""

    def __init__(
        self, preprocess: nn.Module, features: nn.Module, rotation: nn.Module, shift: nn.Module, shift_limit_px: float
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.features = features
        self.rotation = rotation
        self.shift = shift
        self.shift_limit_px = shift_limit_px

    def forward(self, coefficients: Complex[Tensor, "n p"], ctf: Float[Tensor, "n p"] | None) -> Hypotheses:
        """Candidate poses of images given by their half-disc coefficients and contrast transfer."""
        features = self.features(self.preprocess(coefficients, ctf))
        rotation = rotation_from_sixd(self.rotation(features).unflatten(1, (-1, 6)))
        # tanh(u / 2) = 2 sigmoid(u) - 1: the paper's sigmoid, centred on no shift
        return Hypotheses(rotation, self.shift_limit_px * torch.tanh(self.shift(features) / 2), features)
