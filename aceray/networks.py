"""Settings of encoder and decoder."""

from typing import Annotated, Literal

from pydantic import Field

from aceray.schema import Model


class EncoderBase(Model):
    """What every encoder has: heads, an input filter and a bounded shift."""

    heads: int = Field(4, ge=1, le=64, description="rotation heads; the decoder's error picks one for each image")
    input: Literal["wiener", "standardised"] = Field(
        "wiener", description="filter before the network: Wiener deconvolution, or zero mean and unit variance"
    )
    shift_range_sigma: float = Field(
        4.0, gt=0, le=10, description="bound of the predicted shift, in units of data.shift_sigma_fraction"
    )


class MlpEncoder(EncoderBase):
    """Fully connected layers with batch normalisation: the quickest on small boxes."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(512, ge=8, le=8192, description="features of a hidden layer")
    depth: int = Field(4, ge=1, le=32, description="number of hidden layers")
    regressor: Literal["linear", "mlp"] = Field(
        "linear", description="what reads poses from the features: one layer, or the paper's three (512, 256)"
    )


class Resnet18Encoder(EncoderBase):
    """ResNet-18 on the five filtered images, as in the paper."""

    kind: Literal["resnet18"] = "resnet18"


class VggEncoder(EncoderBase):
    """VGG on the five filtered images, as in cryoAI."""

    kind: Literal["vgg"] = "vgg"


class CnnEncoder(EncoderBase):
    """Pairs of convolutions and a global mean, as in CryoPoseNet."""

    kind: Literal["cnn"] = "cnn"


Encoder = Annotated[MlpEncoder | Resnet18Encoder | VggEncoder | CnnEncoder, Field(discriminator="kind")]


class VoxelDecoder(Model):
    """Real-space voxels."""

    kind: Literal["voxel"] = "voxel"
    projector: Literal["slice", "rotate"] = Field(
        "slice", description="slices of the zero-padded transform, or the rotated grid summed along the beam"
    )
    pad: int = Field(2, ge=1, le=4, description="slice: zero-padding factor of the volume before its transform")
    scale: float = Field(
        1.0, gt=0, le=1e3, description="density of a parameter of one, so the unit of optim.decoder_lr; image scale"
    )
    nonnegative: bool = Field(False, description="set negative voxels to zero after each step")
    mask_radius_fraction: float = Field(
        0.5, gt=0.1, le=0.5, description="radius of the soft sphere that holds the density, fraction of the box"
    )


class SirenDecoder(Model):
    """The Fourier transform as envelope times content, two networks with sine activations."""

    kind: Literal["siren"] = "siren"
    projector: Literal["points", "lattice"] = Field(
        "points", description="networks at each image's own points, or once a step on a lattice, sliced as voxels are"
    )
    width: int = Field(256, ge=8, le=4096, description="features of a hidden layer")
    content_depth: int = Field(3, ge=1, le=16, description="hidden layers of the content after its first")
    envelope_depth: int = Field(2, ge=1, le=16, description="hidden layers of the envelope after its first")
    content_frequency: float = Field(
        40.0, gt=0, le=1e3, description="factor omega_0 in the content's sines, radians per unit (Nyquist is one)"
    )
    envelope_frequency: float = Field(
        30.0, gt=0, le=1e3, description="factor omega_0 in the envelope's sines, radians per unit (Nyquist is one)"
    )
    scale: float = Field(
        8.0, gt=0, le=1e4, description="coefficient of an output of one; orthonormal, for images of unit variance"
    )


Decoder = Annotated[VoxelDecoder | SirenDecoder, Field(discriminator="kind")]
