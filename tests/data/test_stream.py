"""Images that are not all in memory: the same ones by rows and in order, within their bound, and what goes wrong."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from aceray.data.stream import Buffer, Portion, StreamedImages, _at_work
from aceray.errors import DataError

BOX, COUNTS = 4, [5, 3, 5, 5, 1, 4]
COUNT = sum(COUNTS)
NUMBERS = 10 + 2 * torch.arange(COUNT)
IMAGES = torch.arange(COUNT * BOX**2, dtype=torch.float32).reshape(COUNT, BOX, BOX)
PART_BYTES = 5 * BOX**2 * 4


class Disk:
    """Where the images are; remembers which parts were read, and gives them in portions of `size`."""

    def __init__(self, size: int = 4) -> None:
        self.size, self.read_parts, self.broken = size, [], -1

    def __call__(self, parts: Sequence[int]) -> Iterator[Portion]:
        rows = []
        for part in parts:
            if part == self.broken:
                raise DataError("the shard is damaged")
            self.read_parts.append(part)
            rows += range(sum(COUNTS[:part]), sum(COUNTS[: part + 1]))
            if len(rows) >= self.size or part == parts[-1]:
                for portion in torch.tensor(rows).split(self.size):
                    yield NUMBERS[portion], IMAGES[portion]
                rows = []


def streamed(parts: float = 2, disk: Disk | None = None) -> StreamedImages:
    return StreamedImages(NUMBERS, COUNTS, BOX, disk or Disk(), int(parts * PART_BYTES))


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("size", [1, 4, 100])
def test_rows_are_those_of_the_tensor(size: int) -> None:
    rows = torch.tensor([22, 0, 7, 7, 18, 3, 12])
    assert torch.equal(streamed(disk=Disk(size))[rows], IMAGES[rows])
    assert streamed().shape == IMAGES.shape


@pytest.mark.parametrize("size", [2, 6, 23])
@pytest.mark.parametrize("parts", [1, 4, 8, 100])
def test_a_pass_gives_all_images_once_and_in_order(parts: int, size: int) -> None:
    disk = Disk()
    images = streamed(parts, disk)
    found = list(images.chunks(size))
    assert [len(rows) for rows, _ in found] == [len(rows) for rows in torch.arange(COUNT).split(size)]
    assert torch.equal(torch.cat([rows for rows, _ in found]), torch.arange(COUNT))
    assert torch.equal(torch.cat([chunk for _, chunk in found]), IMAGES)
    assert disk.read_parts == list(range(len(COUNTS)))


@pytest.mark.parametrize("parts", [2, 8])
def test_no_more_parts_are_held_than_fit(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    keep = Buffer.keep

    def counted(buffer: Buffer, *args: Sequence[int]) -> None:
        nonlocal most
        keep(buffer, *args)
        most = max(most, sum(len(each.held) for each in images._buffers))
        assert buffer._images is not None
        assert buffer._images.numel() * 4 <= parts * PART_BYTES

    monkeypatch.setattr(Buffer, "keep", counted)
    images = streamed(parts)
    list(images.chunks(COUNT))
    # half of what is allowed, but two
    assert most == max(2, parts // 2)


def test_what_comes_next_is_read_ahead() -> None:
    disk = Disk()
    buffer = streamed(4, disk).buffer(4)
    buffer.keep([0, 1], [2, 3])
    assert torch.equal(buffer.take(torch.tensor([6, 1])), IMAGES[[6, 1]])
    until(lambda: disk.read_parts == [0, 1, 2, 3])
    buffer.keep([2, 3], [0, 4])
    # what is held already stays
    until(lambda: disk.read_parts == [0, 1, 2, 3, 4])
    assert buffer.held == {0, 2, 3, 4}
    buffer.keep([2, 3], [4])
    assert disk.read_parts == [0, 1, 2, 3, 4]


def test_a_reading_that_is_given_up_ends_and_leaves_no_gap() -> None:
    gate, disk = threading.Event(), Disk()

    def slow(parts: Sequence[int]) -> Iterator[Portion]:
        for portion in disk(parts):
            yield portion
            gate.wait(5)

    images = StreamedImages(NUMBERS, COUNTS, BOX, slow, 4 * PART_BYTES)
    buffer = images.buffer(4)
    buffer.keep([], [0, 1, 2])
    threading.Timer(0.2, gate.set).start()
    buffer.keep([5], [1])
    assert torch.equal(buffer.take(torch.arange(19, 23)), IMAGES[19:])
    buffer.keep([0, 1], [])
    assert torch.equal(buffer.take(torch.arange(8)), IMAGES[:8])
    buffer.clear()
    assert not [thread for thread in _at_work if thread.is_alive()]


def test_a_pass_takes_the_memory_of_the_windows_which_are_read_again() -> None:
    images = streamed(4)
    buffer = images.buffer(4)
    buffer.keep([5, 0], [])
    for _ in images.chunks(10):
        assert buffer._images is None
    buffer.keep([5, 0], [])
    assert torch.equal(buffer.take(torch.tensor([20, 2])), IMAGES[[20, 2]])


def test_errors_of_the_reading_reach_who_waits_for_it() -> None:
    disk = Disk()
    disk.broken = 3
    images = streamed(2, disk)
    with pytest.raises(DataError, match="the shard is damaged"):
        list(images.chunks(5))
    with pytest.raises(DataError, match="the shard is damaged"):
        images[torch.tensor([15])]


@pytest.mark.parametrize("numbers", [NUMBERS + 2, NUMBERS[:3]])
def test_other_particles_than_before_are_an_error(numbers: torch.Tensor) -> None:
    def other(parts: Sequence[int]) -> Iterator[Portion]:
        yield numbers, IMAGES[: len(numbers)]

    images = StreamedImages(NUMBERS, COUNTS, BOX, other, PART_BYTES)
    with pytest.raises(DataError, match=r"^data\.path: the dataset is not the one that this run opened"):
        images[torch.tensor([0])]
