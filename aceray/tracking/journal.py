"""What tracking has to say, on the disk before it is sent: JSON lines, and beside them how far they have been sent."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from aceray.data.storage import append_line, storage_error
from aceray.errors import DataError
from aceray.folder import write_json

JOURNAL, STATE = "tracking.jsonl", "tracking.json"
BYTES_AT_ONCE = 1 << 20
Record = dict[str, Any]
"""`run`: "" or, in a study, the trial; `do`: begin, points, tags, files, note, best, end; and what that needs."""


class Journal:
    """Records in the order in which they happened; only `append` writes the file, only a sender moves `offset`.

    Sending again what was sent already changes nothing in the store: every point carries its own time. So the state
    may lag behind, and a journal whose store is lost can be sent to another from its start.

    Raises:
        DataError: the files cannot be read or written, or are no journal.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._state_path = folder / JOURNAL, folder / STATE
        self.last_step: dict[str, int] = {}
        self.status: dict[str, str] = {}
        state = _read_state(self._state_path)
        self.offset: int = state["offset"]
        self.runs: dict[str, str] = state["runs"]
        self.refused: list[int] = state["refused"]
        self.store: dict[str, str] = state["store"]
        try:
            self._file = FileIO(self.path, "a")
            self._file.truncate(whole := self._whole_lines())
        except OSError as error:
            raise storage_error(self.path, error) from error
        self._last_ms = 0
        self.offset = self.offset if self.offset <= whole else 0
        self._appended = self._sent = 0
        for record, end in self.read(0):
            self._take_note(record)
            self._appended += 1
            self._sent += end <= self.offset

    @property
    def backlog(self) -> int:
        """How many records the store has not taken yet, those that it refused included."""
        return self._appended - self._sent + len(self.refused)

    def append(self, run: str, do: str, **content: Any) -> None:
        """Write a record; it has left this process when this returns.

        Each is later than the one before, whatever the clock does: of two points at one step MLflow shows the later.
        """
        record = {"run": run, "do": do, "time_ms": max(int(time.time() * 1000), self._last_ms + 1), **content}
        append_line(self.path, self._file, json.dumps(record))
        self._take_note(record)
        self._appended += 1

    def read(self, offset: int) -> Iterator[tuple[Record, int]]:
        """Records from a place on, each with the place of the next; a damaged line is an empty record."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            rest = b""
            while block := file.read(BYTES_AT_ONCE):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    offset += len(line) + 1
                    yield _parsed(line), offset

    def sent_to(self, offset: int, records: int) -> None:
        """The store has taken so many records more, up to this place."""
        self.offset = offset
        self._sent += records

    def rewind(self) -> None:
        """Everything must be sent again: a run is no longer in the store."""
        self.offset, self._sent, self.refused = 0, 0, []

    def keep_state(self) -> None:
        """Write how far the sender is."""
        state = {"store": self.store, "offset": self.offset, "runs": self.runs, "refused": self.refused}
        write_json(self._state_path, state)

    def close(self) -> None:
        self._file.close()

    def _take_note(self, record: Mapping[str, Any]) -> None:
        run = record.get("run", "")
        self._last_ms = max(self._last_ms, record.get("time_ms", 0))
        if record.get("do") == "points" and not record.get("final"):
            self.last_step[run] = max(self.last_step.get(run, 0), int(record["step"]))
        elif record.get("do") in ("begin", "end"):
            self.status[run] = str(record.get("status", "RUNNING"))

    def _whole_lines(self) -> int:
        """Length of the file without a last line that a kill cut off."""
        with open(self.path, "rb") as file:
            end = file.seek(0, 2)
            while end:
                start = max(0, end - BYTES_AT_ONCE)
                file.seek(start)
                if (found := file.read(end - start).rfind(b"\n")) >= 0:
                    return start + found + 1
                end = start
        return 0


def has_journal(folder: Path) -> bool:
    """Whether tracking has left a journal in that folder."""
    return (folder / JOURNAL).exists()


def _parsed(line: bytes) -> Record:
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and _is_whole(record):
            return record
    return {}


def _is_whole(record: Record) -> bool:
    kinds = {"run": str, "do": str, "time_ms": int}
    if record.get("do") == "points":
        kinds |= {"step": int, "metrics": dict}
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _read_state(path: Path) -> dict[str, Any]:
    fresh = {"store": {}, "offset": 0, "runs": {}, "refused": []}
    if not path.exists():
        return fresh
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(type(found[name]) is type(value) for name, value in fresh.items()):
            return found
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it, and all is sent again") from error
    raise DataError(f"{path}: is not what tracking writes; delete it, and all is sent again")
