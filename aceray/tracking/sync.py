"""Sending to MLflow, afterwards, what an outage kept back."""

from dataclasses import dataclass
from pathlib import Path

from aceray.data.storage import exclusive
from aceray.errors import DataError, TrackingError
from aceray.tracking.journal import Journal, has_journal
from aceray.tracking.run import JournalTracker, start
from aceray.tracking.sender import Sender
from aceray.tracking.store import COMPLETENESS, Store

SECONDS_TO_SEND = 600.0


@dataclass(frozen=True)
class Synced:
    """How many records were sent now."""

    records: int
    run_id: str | None


def sync(folder: str | Path) -> Synced:
    """Send what the journal of a run or a study holds and MLflow has not; a run that was killed is ended as KILLED.

    Raises:
        DataError: there is no journal in the folder, it is damaged, or the run is still going on and sends by itself.
        ConfigError: the store cannot be used.
        TrackingError: the store does not answer, or does not take everything.
    """
    path = Path(folder).absolute()
    if not has_journal(path):
        raise DataError(f"{path}: no journal of tracking is there (tracking.jsonl); give the folder of a tracked run")
    with exclusive(path):
        journal = Journal(path)
        if not journal.store:
            raise DataError(f"{path}: the journal does not say to which store it belongs; resume the run instead")
        waiting = journal.backlog
        for key, status in journal.status.items():
            if status == "RUNNING":
                JournalTracker(journal, key).end("KILLED")
        if journal.refused and journal.status.get("") not in (None, "RUNNING"):
            JournalTracker(journal).tag({COMPLETENESS: "complete"})
        sender = Sender(journal, lambda: Store(**journal.store, folder=path))
        start(sender)
        sender.finish(SECONDS_TO_SEND)
        journal.close()
    if journal.backlog:
        raise TrackingError(
            f"{journal.store['uri']}: {journal.backlog} records of {path} could not be sent; start the server, or "
            "repeat the command when it answers"
        )
    return Synced(waiting, journal.runs.get(""))
