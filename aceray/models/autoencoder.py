"""Encoder and decoder joined by the physics of image formation (ACE-EM eqs. 1-4)."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from aceray.em.formation import shift_phase
from aceray.em.fourier import HalfDisc
from aceray.models.encoder import PoseEncoder


@runtime_checkable
class Decoder(Protocol):
    """What holds a volume and projects it: a torch module with these methods."""

    def volume(self) -> Float[Tensor, "d d d"]:
        """The density, axes z, y, x."""
        ...

    def transform(self) -> Tensor:
        """What slices are taken from: computed once per step, whatever the number of images."""
        ...

    def slices(self, transform: Tensor, rotation: Float[Tensor, "*batch 3 3"]) -> Complex[Tensor, "*batch p"]:
        """Half-disc coefficients of the projections at these rotations, in the images' orthonormal convention."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What the optimiser learns."""
        ...


class AutoEncoder(nn.Module):
    """Image to pose to image; images are half-disc coefficients, divided by `signal_std` of the stored images."""

    signal_std: Tensor

    def __init__(self, encoder: PoseEncoder, decoder: Decoder, disc: HalfDisc, signal_std: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.decoder, self.disc = encoder, decoder, disc
        self.register_buffer("signal_std", torch.tensor(signal_std))

    def render(
        self,
        transform: Tensor,
        rotation: Float[Tensor, "*#batch 3 3"],
        shift_px: Float[Tensor, "*#batch 2"],
        ctf: Float[Tensor, "*#batch p"] | None,
    ) -> Complex[Tensor, "*batch p"]:
        """Noise-free images of the decoder's volume: slice, contrast transfer, shift (ACE-EM eq. 27)."""
        slices = self.decoder.slices(transform, rotation)
        slices = slices if ctf is None else slices * ctf
        return slices if self.encoder.shift_limit_px == 0 else slices * shift_phase(self.disc, shift_px)

    def residual(
        self, rendered: Complex[Tensor, "*#batch p"], coefficients: Complex[Tensor, "*#batch p"]
    ) -> Float[Tensor, "*batch"]:
        """Mean squared difference per pixel (ACE-EM eq. 5), by Parseval on the half disc."""
        return self.disc.energy(rendered - coefficients)

    @torch.no_grad()
    def choose(
        self,
        transform: Tensor,
        rotation: Float[Tensor, "b h 3 3"],
        shift_px: Float[Tensor, "b h 2"],
        coefficients: Complex[Tensor, "b p"],
        ctf: Float[Tensor, "b p"] | None,
    ) -> Tensor:
        """Index (b,) of the candidate pose whose rendering is nearest to the image."""
        if rotation.shape[1] == 1:
            return torch.zeros(len(rotation), dtype=torch.long, device=rotation.device)
        rendered = self.render(transform, rotation, shift_px, None if ctf is None else ctf[:, None])
        return self.residual(rendered, coefficients[:, None]).argmin(1)
