"""Where a step's images and random poses come from.

A run is divided into lanes; each has its own particles and its own random numbers, named by seed, lane and step. What a
run computes depends on its lanes, not on how many workers share them, and a resumed run draws what it would have drawn.

Where images are streamed, an epoch is a sequence of windows: some of the lane's parts (row groups), drawn at random,
whose particles are shuffled among themselves. One window is in memory while the next one is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from aceray.data.stream import Buffer, StreamedImages
from aceray.em.dihedral import ELEMENTS, HALF_TURN, coefficient_tables, transform_coefficients
from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.train.background import Noise
from aceray.train.objective import Batch, DrawnPoses
from aceray.train.predict import Particles, StreamedCoefficients

Loss = Literal["mse", "symmetric", "generalised"]
"""Views of an image of which the best counts: the image; it and its half turn; two random elements of D4."""


@dataclass(frozen=True)
class Lane:
    """One lane's number, the rows among the worker's particles that it samples, and those that are held out."""

    number: int
    rows: Tensor
    held_out: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Epoch:
    """A lane's rows in the order of one epoch; of streamed images the parts of each window, and where windows end."""

    rows: Tensor
    windows: list[list[int]] = field(default_factory=list)
    ends: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Windows:
    """In which part of a stream each row is, and how many parts a window of a lane has at most."""

    images: StreamedImages
    parts: int

    @staticmethod
    def of(images: StreamedImages, lanes: int) -> "Windows":
        """The largest windows of which all lanes' present ones and next ones fit; a lane that fits whole has one."""
        each = images.most_parts // lanes
        largest = -(-len(images.counts) // lanes)
        return Windows(images, largest if largest <= each else max(1, each // 2))

    def epoch(self, rows: Tensor, generator: torch.Generator) -> Epoch:
        """A fresh order of a lane's rows: shuffled, then put into windows among which its parts are dealt out evenly.

        With one window it is the order of images in memory.
        """
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        parts = self.images.part_of(rows).unique()
        drawn = parts[torch.randperm(len(parts), generator=generator)].tensor_split(-(-len(parts) // self.parts))
        window_of_part = torch.empty(len(self.images.counts), dtype=torch.long)
        for number, window in enumerate(drawn):
            window_of_part[window] = number
        window = window_of_part[self.images.part_of(shuffled)]
        return Epoch(
            shuffled[window.argsort(stable=True)],
            [each.tolist() for each in drawn],
            torch.bincount(window, minlength=len(drawn)).cumsum(0),
        )


class Sampler:
    """Draws the batches of one worker's lanes; `batch` and `drawn` are images per lane and step."""

    def __init__(
        self, particles: Particles, lanes: list[Lane], disc: HalfDisc, seed: int, batch: int, drawn: int
    ) -> None:
        self.particles, self.lanes, self.disc, self.seed = particles, lanes, disc, seed
        self.batch, self.drawn = batch, drawn
        self._tables = coefficient_tables(disc)
        self._epochs: dict[tuple[int, int], Epoch] = {}
        self._windows: Windows | None = None
        self._buffers: dict[int, Buffer] = {}
        if isinstance(particles.coefficients, StreamedCoefficients):
            images = particles.coefficients.images
            self._windows = Windows.of(images, len(lanes))
            self._buffers = {lane.number: images.buffer(2 * self._windows.parts) for lane in lanes}

    @property
    def particles_per_step(self) -> int:
        return self.batch * len(self.lanes)

    def images(self, step: int, augment: bool, loss: Loss = "mse") -> Batch:
        """The images of the step-th batch, each lane going through its particles in a fresh order every epoch.

        With `augment` each image is replaced by one of its eight quarter turns and mirrors. `loss` says under which
        views the encoder sees it.
        """
        index = torch.cat([self._rows(lane, step) for lane in self.lanes]).to(self.disc.radius.device)
        coefficients, ctf = self._coefficients(step, index), self.particles.transfer(index, self.disc)
        if augment:
            element = torch.cat([self._elements(lane, step) for lane in self.lanes]).to(index.device)
            coefficients = transform_coefficients(coefficients, element, self._tables)
            ctf = None if ctf is None else ctf.gather(1, self._tables[0][element])
        return Batch(coefficients, ctf, self._views(step, loss, index.device))

    def poses(self, step: int, shift_spread_px: float, noise: Noise) -> DrawnPoses:
        """Uniform rotations, Gaussian shifts, contrast transfer of random particles, noise (ACE-EM eq. 11)."""
        rotation, shift, index, drawn = zip(*(self._draw(lane, step, noise) for lane in self.lanes), strict=True)
        device = self.disc.radius.device
        return DrawnPoses(
            torch.cat(rotation).to(device),
            torch.cat(shift).to(device) * shift_spread_px,
            self.particles.transfer(torch.cat(index).to(device), self.disc),
            torch.cat(drawn),
        )

    def _coefficients(self, step: int, index: Tensor) -> Tensor:
        held = self.particles.coefficients
        if not isinstance(held, StreamedCoefficients):
            return held[index]
        return held.of(torch.cat([images for lane in self.lanes for images in self._read(lane, step)]))

    def _rows(self, lane: Lane, step: int) -> Tensor:
        return torch.cat([self._epoch(lane, epoch).rows[positions] for epoch, positions in self._positions(lane, step)])

    def _positions(self, lane: Lane, step: int) -> Iterator[tuple[int, Tensor]]:
        """The epochs that a batch is of, and its places in them."""
        count, first = len(lane.rows), (step - 1) * self.batch
        positions = torch.arange(first, first + self.batch)
        for epoch in (positions // count).unique().tolist():
            yield epoch, positions[positions // count == epoch] % count

    def _read(self, lane: Lane, step: int) -> Iterator[Tensor]:
        """The images of a batch window by window, with the next window read ahead."""
        buffer = self._buffers[lane.number]
        for number, positions in self._positions(lane, step):
            epoch = self._epoch(lane, number)
            window = torch.searchsorted(epoch.ends, positions, right=True)
            for each in window.unique().tolist():
                last = each + 1 == len(epoch.windows)
                following = self._epoch(lane, number + 1).windows[0] if last else epoch.windows[each + 1]
                buffer.keep(epoch.windows[each], following)
                yield buffer.take(epoch.rows[positions[window == each]])

    def _epoch(self, lane: Lane, epoch: int) -> Epoch:
        found = self._epochs.get((lane.number, epoch))
        if found is None:
            generator = named_generator("train/order", self.seed, lane.number, epoch)
            if self._windows is None:
                found = Epoch(lane.rows[torch.randperm(len(lane.rows), generator=generator)])
            else:
                found = self._windows.epoch(lane.rows, generator)
            # a batch at the end of an epoch is of this one and the next
            self._epochs = {key: it for key, it in self._epochs.items() if key[0] != lane.number or key[1] == epoch - 1}
            self._epochs[lane.number, epoch] = found
        return found

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

    def _draw(self, lane: Lane, step: int, noise: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = named_generator("train/pip", self.seed, lane.number, step)
        rotation = random_rotations(self.drawn, generator)
        shift = torch.randn(self.drawn, 2, generator=generator)
        index = lane.rows[torch.randint(len(lane.rows), (self.drawn,), generator=generator)]
        # noise is drawn where it is used: it is the only large draw
        device = self.disc.radius.device
        large = named_generator("train/noise", self.seed, lane.number, step, device=device)
        # complex normal numbers have unit variance, as the orthonormal transform of unit white noise has
        normal = torch.randn(self.drawn, len(self.disc), dtype=torch.complex64, generator=large, device=device)
        levels = named_generator("train/background", self.seed, lane.number, step)
        return rotation, shift, index, noise.shaped(normal, levels)
