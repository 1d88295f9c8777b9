"""Images of more particles than memory holds: parts of them are held, further ones are read ahead by a thread.

A part is what is read at once, a row group of a dataset. Images are addressed by rows, as those of a tensor are; which
parts are in memory changes no result, only how long it takes.
"""

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aceray.errors import DataError

Portion = tuple[Int[Tensor, " b"], Float[Tensor, "b d d"]]
"""Some particles' numbers and images."""
ReadParts = Callable[[Sequence[int]], Iterator[Portion]]
"""Gives the particles of these parts in this order, in portions of any size."""

_PIXEL_BYTES = 4
_SECONDS_TO_END = 30.0  # of a thread that reads, when the process ends


class StreamedImages:
    """The images (n, d, d) of particles that come in parts of `counts` each, in the order of `particle_id`.

    `most_bytes` of images are held at a time, at least one part, and two where the next is read ahead.
    """

    def __init__(
        self, particle_id: Int[Tensor, " n"], counts: Sequence[int], box: int, read: ReadParts, most_bytes: int
    ) -> None:
        self.particle_id, self.counts, self.box = particle_id, list(counts), box
        self.most_bytes = most_bytes
        self._read = read
        self._ends = torch.tensor(self.counts).cumsum(0)
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the tensor they would be."""
        return len(self.particle_id), self.box, self.box

    @property
    def part_bytes(self) -> int:
        """Memory of the largest part."""
        return max(self.counts) * self.box**2 * _PIXEL_BYTES

    @property
    def most_parts(self) -> int:
        """How many parts may be held at a time."""
        return max(2, self.most_bytes // self.part_bytes)

    def part_of(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """In which part each row is."""
        return torch.searchsorted(self._ends, rows, right=True)

    def first_row(self, part: int) -> int:
        """The row with which a part begins."""
        return int(self._ends[part]) - self.counts[part]

    def read(self, parts: Sequence[int]) -> Iterator[tuple[int, Float[Tensor, "b d d"]]]:
        """The images of some parts, one after the other, whatever portions they are read in.

        Raises:
            DataError: they cannot be read, or hold other particles than before.
        """
        portions, left = iter(self._read(parts)), self._none()
        for part in parts:
            pieces, missing = [], self.counts[part]
            while missing:
                number, images = left if len(left[0]) else next(portions, self._none())
                first = self.first_row(part) + self.counts[part] - missing
                taken = min(missing, len(number))
                if not taken or not torch.equal(number[:taken], self.particle_id[first : first + taken]):
                    raise DataError("data.path: the dataset is not the one that this run opened; put that one back.")
                pieces.append(images[:taken])
                left, missing = (number[taken:], images[taken:]), missing - taken
            yield part, pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _none(self) -> Portion:
        return self.particle_id[:0], torch.empty(0, self.box, self.box)

    def __getitem__(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b d d"]:
        """The images of a few rows, in any order; their parts are read for them alone."""
        rows = rows.cpu()
        parts = self.part_of(rows)
        images = torch.empty(len(rows), self.box, self.box)
        for part, whole in self.read(parts.unique().tolist()):
            mine = (parts == part).nonzero()[:, 0]
            images[mine] = whole[rows[mine] - self.first_row(part)]
        return images

    def buffer(self, parts: int) -> "Buffer":
        """Room for so many parts."""
        made = Buffer(self, parts)
        self._buffers.add(made)
        return made

    def release(self) -> None:
        """Give the memory of all buffers back; whoever goes on with one has it filled again."""
        for held in self._buffers:
            held.clear()

    def chunks(self, size: int) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b d d"]]]:
        """All images in the order of the rows, `size` at a time, with their rows.

        Other buffers are given back, and no more than half of what may be held is used.
        """
        self.release()
        half = max(1, self.most_parts // 4)
        held, every = self.buffer(2 * half), range(len(self.counts))
        try:
            for rows in torch.arange(self.shape[0]).split(size):
                images = torch.empty(len(rows), self.box, self.box)
                window = self.part_of(rows) // half
                for number in window.unique().tolist():
                    held.keep(every[number * half : (number + 1) * half], every[(number + 1) * half :][:half])
                    images[window == number] = held.take(rows[window == number])
                yield rows, images
        finally:
            held.clear()


class Buffer:
    """Room for some parts of a stream, allocated once: those that are needed now, and further ones, read ahead."""

    def __init__(self, stream: StreamedImages, parts: int) -> None:
        self._stream, self._parts = stream, min(parts, len(stream.counts))
        self._images: Tensor | None = None  # (slots, largest part, d, d), while something is held
        self._slots: dict[int, int] = {}
        self._filling: _Filling | None = None

    @property
    def held(self) -> set[int]:
        """The parts that have a place, whether they are read yet or not."""
        return set(self._slots)

    def keep(self, now: Sequence[int], then: Sequence[int]) -> None:
        """Hold the parts `now`, waiting for them, and have `then` read; what else there was makes room.

        Raises:
            DataError: a part cannot be read.
        """
        if self._filling is not None:
            self._filling.wait(now)
        wanted = dict.fromkeys([*now, *then])
        if all(part in self._slots for part in wanted):
            return
        self._stop()
        self._slots = {part: slot for part, slot in self._slots.items() if part in wanted}
        self._filling = self._fill([part for part in wanted if part not in self._slots])
        self._filling.wait(now)

    def take(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b d d"]:
        """Copies of images in parts that are held."""
        assert self._images is not None
        parts = self._stream.part_of(rows)
        names, which = parts.unique(return_inverse=True)
        slots = torch.tensor([self._slots[part] for part in names.tolist()], dtype=torch.long)
        firsts = torch.tensor([self._stream.first_row(part) for part in names.tolist()], dtype=torch.long)
        return self._images.flatten(0, 1)[slots[which] * self._images.shape[1] + rows - firsts[which]]

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._stop()
        self._slots, self._images = {}, None

    def _fill(self, parts: list[int]) -> "_Filling":
        """Begin to read parts into free places."""
        stream = self._stream
        if self._images is None:
            self._images = torch.empty(self._parts, max(stream.counts), stream.box, stream.box)
        free = sorted(set(range(self._parts)) - set(self._slots.values()))
        places = dict(zip(parts, free, strict=False))
        if len(places) < len(parts):
            raise ValueError(f"{len(parts)} parts do not fit {len(free)} places")
        self._slots |= places
        filling = _Filling(stream, self._images, places)
        filling.start()
        return filling

    def _stop(self) -> None:
        """End a reading that goes on; what it has not read has no place any more."""
        if self._filling is None:
            return
        self._filling.end()
        for part in self._filling.unread:
            self._slots.pop(part, None)
        self._filling = None


_at_work: "weakref.WeakSet[_Filling]" = weakref.WeakSet()


class _Filling(threading.Thread):
    """Reads parts into their places; a process that ends waits for the part that is being read, no longer."""

    def __init__(self, stream: StreamedImages, images: Tensor, places: dict[int, int]) -> None:
        super().__init__(name="aceray-read-ahead", daemon=True)
        self._stream, self._images, self._places = stream, images, places
        self._ready = {part: threading.Event() for part in places}
        self._given_up = threading.Event()
        self._error: BaseException | None = None
        _at_work.add(self)

    @property
    def unread(self) -> list[int]:
        """Parts that did not come into their places."""
        return [part for part, ready in self._ready.items() if not ready.is_set()]

    def run(self) -> None:
        try:
            for part, images in self._stream.read(list(self._places)):
                if self._given_up.is_set():
                    return
                self._images[self._places[part], : len(images)] = images
                self._ready[part].set()
        except BaseException as error:
            self._error = error
        finally:
            self._given_up.set()

    def wait(self, parts: Sequence[int]) -> None:
        """Return when the parts are in their places, those of them that this thread reads; raise what stopped it."""
        for part in parts:
            if part in self._ready:
                while not self._ready[part].wait(0.05):
                    if self._error is not None:
                        raise self._error

    def end(self) -> None:
        """Read no further part."""
        self._given_up.set()
        self.join(_SECONDS_TO_END)


@atexit.register
def _end_all() -> None:
    for filling in list(_at_work):
        filling._given_up.set()
    for filling in list(_at_work):
        if filling.ident is not None:
            filling.join(_SECONDS_TO_END)
