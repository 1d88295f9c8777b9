"""The thread that sends a journal to MLflow, so that no answer, late or never, is waited for by what computes."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from aceray.errors import AcerayError, ConfigError
from aceray.tracking.journal import Journal, Record
from aceray.tracking.store import RunGoneError, Store, cannot_be_used, first_line, passes, passes_at_start

_log = logging.getLogger("aceray")
POINTS_A_CALL = 1000
SECONDS_A_BATCH = 2.0
# the pause after an outage doubles up to this
LONGEST_PAUSE_SECONDS = 30.0
SECONDS_BETWEEN_STATES = 1.0
# so often the store may fail on one record, while it answers otherwise, before the record is left out
MOST_FAILURES = 5


class Sender:
    """Sends what the journal holds and the store has not taken, again and again until `finish`."""

    def __init__(self, journal: Journal, connect: Callable[[], Store]) -> None:
        self.journal, self._connect = journal, connect
        self.uri = journal.store["uri"]
        self._store: Store | None = None
        self._mistake: AcerayError | None = None
        self._wake, self._tried, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._failures, self._state_kept = 0, 0.0
        self._stuck, self._stuck_at = 0, -1  # failures in a row at one place of the journal
        self._thread = threading.Thread(target=self._run, name="aceray-tracking", daemon=True)

    def start(self, patience_seconds: float) -> None:
        """Begin, and wait so long for the end of the first attempt.

        Raises:
            ConfigError: the store cannot be used as the settings name it. That it does not answer is a warning.
        """
        self._thread.start()
        if not self._tried.wait(patience_seconds):
            _log.warning("MLflow has not answered for %.0f seconds; the run goes on, %s", patience_seconds, self._where)
        if self._mistake is not None:
            raise self._mistake

    def finish(self, patience_seconds: float) -> None:
        """Send what is left, for so long; a store that does not answer is asked once more, then left."""
        self._ending.set()
        self._wake.set()
        self._thread.join(patience_seconds)

    @property
    def _where(self) -> str:
        return f"{self.journal.path} keeps everything"

    def _run(self) -> None:
        while self._mistake is None:
            last = self._ending.is_set()
            try:
                self._send_all()
                self._failures = 0
            except Exception as error:
                self._failed(error)
            with suppress(AcerayError):  # a full disk: what was sent already is sent again
                self.journal.keep_state()
            self._tried.set()
            if last:
                break
            pause = min(LONGEST_PAUSE_SECONDS, SECONDS_A_BATCH * 2**self._failures)
            self._wake.wait(pause if self._failures else SECONDS_A_BATCH)
            self._wake.clear()

    def _failed(self, error: Exception) -> None:
        first = self._store is None
        if isinstance(error, ConfigError):
            self._mistake = error
        elif first and not passes_at_start(error, self.uri):
            self._mistake = cannot_be_used(self.uri, error)
        if self._mistake is not None and self._tried.is_set():
            _log.warning("MLflow: nothing is sent any more (%s); %s", self._mistake, self._where)
        elif self._mistake is None and self._failures == 0:
            _log.warning("MLflow does not answer (%s); %s", first_line(error), self._where)
        self._failures = min(self._failures + 1, 10)
        self._stuck = self._stuck + 1 if self._stuck_at == self.journal.offset else 1
        self._stuck_at = self.journal.offset

    def _send_all(self) -> None:
        store = self._opened()
        # the thread sees what was appended before this moment, and later lines in the next turn
        waiting: list[Record] = []
        ends: list[int] = []
        try:
            for record, end in self.journal.read(self.journal.offset):
                if waiting and not _goes_with(record, waiting):
                    self._deliver(store, waiting, ends)
                    waiting, ends = [], []
                waiting.append(record)
                ends.append(end)
            if waiting:
                self._deliver(store, waiting, ends)
        except RunGoneError as gone:
            key = str(gone)
            if key == "":  # those below it hung on it
                self.journal.runs.clear()
            self.journal.runs.pop(key, None)
            self.journal.rewind()
            self.journal.keep_state()
            self._send_all()

    def _opened(self) -> Store:
        if self._store is None:
            store = self._connect()
            store.answers()
            self._store = store
            refused, self.journal.refused = self.journal.refused, []
            for place in refused:
                record, _ = next(self.journal.read(place), ({}, 0))
                self._alone(store, record, place)
        return self._store

    def _deliver(self, store: Store, records: list[Record], ends: list[int]) -> None:
        """Send records of one kind in one call, or one by one when the store would not take them together."""
        if len(records) > 1:
            try:
                store.points(records, self.journal.runs)
                self._sent_to(ends[-1], len(records))
                return
            except Exception as error:
                if passes(error) and self._stuck < MOST_FAILURES:
                    raise
        for record, end in zip(records, ends, strict=True):
            self._alone(store, record, self.journal.offset)
            self._sent_to(end, 1)

    def _alone(self, store: Store, record: Record, place: int) -> None:
        known = len(self.journal.runs)
        try:
            store.carry_out(record, self.journal.runs, len(self.journal.refused))
        except (RunGoneError, ConfigError):
            raise
        except Exception as error:
            if passes(error) and (self._stuck < MOST_FAILURES or not _answers(store)):
                raise
            self._stuck = 0
            reason = "its line is damaged" if not record else first_line(error)
            _log.warning("MLflow: a record was not taken (%s); `aceray sync` tries it again", reason)
            self.journal.refused.append(place)
        if len(self.journal.runs) != known:
            self.journal.keep_state()

    def _sent_to(self, offset: int, records: int) -> None:
        self.journal.sent_to(offset, records)
        if time.monotonic() - self._state_kept > SECONDS_BETWEEN_STATES:
            self.journal.keep_state()
            self._state_kept = time.monotonic()


def _answers(store: Store) -> bool:
    with suppress(Exception):
        return store.answers()
    return False


def _goes_with(record: Record, waiting: list[Record]) -> bool:
    """Whether a record can travel in the same call: points of the same run."""
    points = sum(len(each["metrics"]) for each in waiting) if waiting[0].get("do") == "points" else POINTS_A_CALL
    same = record.get("do") == "points" and record.get("run") == waiting[0].get("run")
    return same and points + len(record["metrics"]) <= POINTS_A_CALL
