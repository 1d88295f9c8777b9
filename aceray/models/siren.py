"""Decoder that holds the volume's Fourier transform as a network with sine activations (ACE-EM's decoder F, cryoAI)."""

import math

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.nn import functional

from aceray.em.fourier import HalfDisc, frequency_index
from aceray.em.projection import central_slice, padded_transform, soft_sphere

# points evaluated at a time: 16 MiB of activations a layer at a width of 256, which malloc keeps for the next step
_CHUNK_POINTS = 2**14


class SineLayer(nn.Linear):
    """sin(frequency * (W x + b)), frequency in radians."""

    def __init__(self, inputs: int, outputs: int, frequency: float) -> None:
        super().__init__(inputs, outputs)
        self.frequency = frequency

    def forward(self, input: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        """The frequency is multiplied into the few weights, not into the many values."""
        return torch.sin(functional.linear(input, self.frequency * self.weight, self.frequency * self.bias))


class Siren(nn.Module):
    """3 inputs, `depth` hidden layers of `width` sines after the first, 2 linear outputs (Sitzmann et al. 2020).

    W starts uniform within 1/3 in the first layer and within sqrt(6 / width) / frequency in the others, biases as torch
    has them.
    """

    def __init__(self, width: int, depth: int, frequency: float) -> None:
        super().__init__()
        self.first = SineLayer(3, width, frequency)
        hidden = [SineLayer(width, width, frequency) for _ in range(depth)]
        self.rest = nn.Sequential(*hidden, nn.Linear(width, 2))
        nn.init.uniform_(self.first.weight, -1 / 3, 1 / 3)
        bound = math.sqrt(6 / width) / frequency
        for layer in self.rest.children():
            nn.init.uniform_(layer.get_parameter("weight"), -bound, bound)

    def forward(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 2"]:
        """Two values at each point."""
        # phases of tens of radians: half precision would lose them, those of later layers stay within a few
        with torch.autocast(points.device.type, enabled=False):
            values = self.first(points)
        return self.rest(values)


def negative_half(points: Float[Tensor, "*batch 3"]) -> Bool[Tensor, "*batch"]:
    """Points whose first coordinate that is not zero (x, then y, then z) is negative: one of each pair k, -k."""
    x, y, z = points.unbind(-1)
    return (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))


class SirenDecoder(nn.Module):
    """The transform of a real volume, scale * exp(e(k)) * m(k), the envelope e and the content m each a SIREN.

    Real and imaginary parts have their own envelope. The networks see one half of space; the other is its conjugate and
    the origin real, so the volume is real whatever the weights. Frequencies come as 2 k / (d - 1), within [-1, 1].

    `scale` is in the orthonormal convention of d x d images of unit variance. These have coefficients of up to d (their
    mean times d) at the lowest frequencies and far below one at the highest. The initial networks give about 0.05
    everywhere, so that with 8 the first renderings, points at the origin, have an eighth of the images' variance at any
    d; both networks reach the rest by moving their last layer.
    """

    mask: Tensor

    def __init__(
        self,
        disc: HalfDisc,
        width: int = 256,
        *,
        content_depth: int = 3,
        envelope_depth: int = 2,
        content_frequency: float = 40.0,
        envelope_frequency: float = 30.0,
        scale: float = 8.0,
    ) -> None:
        super().__init__()
        self.disc, self.scale = disc, scale
        self.content = Siren(width, content_depth, content_frequency)
        self.envelope = Siren(width, envelope_depth, envelope_frequency)
        self.register_buffer("mask", soft_sphere(disc.box, disc.box / 2), persistent=False)

    def coefficients(self, points: Float[Tensor, "*batch 3"]) -> Complex[Tensor, "*batch"]:
        """The transform at (x, y, z) frequencies in cycles per box, |k| < d/2."""
        flat = points.reshape(-1, 3)
        return torch.cat([self._evaluate(part) for part in flat.split(_CHUNK_POINTS)]).reshape(points.shape[:-1])

    def _evaluate(self, points: Float[Tensor, "n 3"]) -> Complex[Tensor, " n"]:
        with torch.no_grad():
            sign = torch.where(negative_half(points), -1.0, 1.0).to(points.dtype)
            odd = sign * (points != 0).any(-1)
        folded = points * (sign * (2 / (self.disc.box - 1)))[:, None]
        values = (self.scale * self.envelope(folded).exp() * self.content(folded)).to(points.dtype)
        return torch.complex(values[:, 0], odd * values[:, 1])

    def volume(self) -> Float[Tensor, "d d d"]:
        """Inverse transform of the half space below Nyquist, in the soft sphere that voxels have; axes z, y, x."""
        box = self.disc.box
        axis = torch.fft.ifftshift(frequency_index(box, self.mask.device)).to(self.mask.dtype)
        kz, ky, kx = torch.meshgrid(axis, axis, axis[: box // 2 + 1].abs(), indexing="ij")
        points = torch.stack([kx, ky, kz], -1)
        inside = 4 * points.square().sum(-1) < box**2
        half = self.mask.new_zeros(inside.shape, dtype=torch.complex64)
        # the transform of a volume is d times the orthonormal transform of its projections
        half[inside] = box * self.coefficients(points[inside])
        return torch.fft.fftshift(torch.fft.irfftn(half, s=(box, box, box))) * self.mask

    def transform(self) -> Tensor:
        """Nothing: the networks themselves are what slices are taken from."""
        return self.mask.new_zeros(0)

    def slices(self, transform: Tensor, rotation: Float[Tensor, "*batch 3 3"]) -> Complex[Tensor, "*batch p"]:
        """Half-disc coefficients of the projections at these rotations (ACE-EM eq. 26)."""
        return self.coefficients(self.disc.frequency @ rotation[..., :2, :])


class LatticeSirenDecoder(SirenDecoder):
    """The same networks, asked once a step for the whole frequencies of half of space; slices are their volume's.

    A step costs d^3 pi/12 points whatever the number of images, where an image's own points are d^2 pi/8 for each. What
    trains is the volume that is exported, in the soft sphere, so the networks are not free to fill what lies outside.
    """

    def transform(self) -> Float[Tensor, "2 m m h"]:
        """The volume's padded transform."""
        return padded_transform(self.volume())

    def slices(self, transform: Tensor, rotation: Float[Tensor, "*batch 3 3"]) -> Complex[Tensor, "*batch p"]:
        """Half-disc coefficients of the projections at these rotations."""
        return central_slice(transform, rotation, self.disc)
