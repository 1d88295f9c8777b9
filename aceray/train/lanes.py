"""Where a step's images and random poses come from.

A run is divided into lanes; each has its own particles and its own random numbers, named by seed, lane and step. What a
run computes depends on its lanes, not on how many workers share them, and a resumed run draws what it would have drawn.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from aceray.em.dihedral import ELEMENTS, HALF_TURN, coefficient_tables, transform_coefficients
from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.train.objective import Batch, DrawnPoses
from aceray.train.predict import Particles

Loss = Literal["mse", "symmetric", "generalised"]
"""Views of an image of which the best counts: the image; it and its half turn; two random elements of D4."""


@dataclass(frozen=True)
class Lane:
    """One lane's number, the rows among the worker's particles that it samples, and those that are held out."""

    number: int
    rows: Tensor
    held_out: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


class Sampler:
    """Draws the batches of one worker's lanes; `batch` and `drawn` are images per lane and step."""

    def __init__(
        self, particles: Particles, lanes: list[Lane], disc: HalfDisc, seed: int, batch: int, drawn: int
    ) -> None:
        self.particles, self.lanes, self.disc, self.seed = particles, lanes, disc, seed
        self.batch, self.drawn = batch, drawn
        self._tables = coefficient_tables(disc)
        self._epochs: dict[int, tuple[int, Tensor]] = {}

    @property
    def particles_per_step(self) -> int:
        return self.batch * len(self.lanes)

    def images(self, step: int, augment: bool, loss: Loss = "mse") -> Batch:
        """The images of the step-th batch, each lane going through its particles in a fresh order every epoch.

        With `augment` each image is replaced by one of its eight quarter turns and mirrors. `loss` says under which
        views the encoder sees it.
        """
        index = torch.cat([self._rows(lane, step) for lane in self.lanes]).to(self.disc.radius.device)
        coefficients, ctf = self.particles.coefficients[index], self.particles.transfer(index, self.disc)
        if augment:
            element = torch.cat([self._elements(lane, step) for lane in self.lanes]).to(index.device)
            coefficients = transform_coefficients(coefficients, element, self._tables)
            ctf = None if ctf is None else ctf.gather(1, self._tables[0][element])
        return Batch(coefficients, ctf, self._views(step, loss, index.device))

    def poses(self, step: int, shift_spread_px: float, noise_std: float) -> DrawnPoses:
        """Uniform rotations, Gaussian shifts, contrast transfer of random particles, white noise (ACE-EM eq. 11)."""
        rotation, shift, index, noise = zip(*(self._draw(lane, step) for lane in self.lanes), strict=True)
        device = self.disc.radius.device
        return DrawnPoses(
            torch.cat(rotation).to(device),
            torch.cat(shift).to(device) * shift_spread_px,
            self.particles.transfer(torch.cat(index).to(device), self.disc),
            torch.cat(noise) * noise_std,
        )

    def _rows(self, lane: Lane, step: int) -> Tensor:
        count = len(lane.rows)
        first = (step - 1) * self.batch
        positions = torch.arange(first, first + self.batch)
        parts = [
            self._order(lane, int(epoch))[positions[positions // count == epoch] % count]
            for epoch in (positions // count).unique()
        ]
        return torch.cat(parts)

    def _order(self, lane: Lane, epoch: int) -> Tensor:
        cached = self._epochs.get(lane.number)
        if cached is None or cached[0] != epoch:
            generator = named_generator("train/order", self.seed, lane.number, epoch)
            cached = (epoch, lane.rows[torch.randperm(len(lane.rows), generator=generator)])
            self._epochs[lane.number] = cached
        return cached[1]

    def _elements(self, lane: Lane, step: int) -> Tensor:
        generator = named_generator("train/augment", self.seed, lane.number, step)
        return torch.randint(ELEMENTS, (self.batch,), generator=generator)

    def _views(self, step: int, loss: Loss, device: torch.device) -> Tensor | None:
        """Elements (2, b) of D4, or None for the image alone (ACE-EM eqs. 6 and 7)."""
        if loss == "mse":
            return None
        if loss == "symmetric":
            return torch.tensor([0, HALF_TURN], device=device)[:, None].expand(-1, self.particles_per_step)
        pairs = []
        for lane in self.lanes:
            generator = named_generator("train/views", self.seed, lane.number, step)
            pairs.append(torch.randint(ELEMENTS, (2, self.batch), generator=generator))
        return torch.cat(pairs, 1).to(device)

    def _draw(self, lane: Lane, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = named_generator("train/pip", self.seed, lane.number, step)
        rotation = random_rotations(self.drawn, generator)
        shift = torch.randn(self.drawn, 2, generator=generator)
        index = lane.rows[torch.randint(len(lane.rows), (self.drawn,), generator=generator)]
        # noise is drawn where it is used: it is the only large draw
        device = self.disc.radius.device
        large = named_generator("train/noise", self.seed, lane.number, step, device=device)
        # complex normal numbers have unit variance, as the orthonormal transform of unit white noise has
        noise = torch.randn(self.drawn, len(self.disc), dtype=torch.complex64, generator=large, device=device)
        return rotation, shift, index, noise
