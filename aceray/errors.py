"""Errors that a user can act on: one line that says where, what was found and what to do."""

LONGEST_LINE = 2000  # characters of a message


class AcerayError(Exception):
    """A mistake in what aceray was given; the command line prints it as one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        # what was found may be of any length; where it stands and what to do are at the ends
        self.line = line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 4 :]}"
        super().__init__(self.line)

    def __str__(self) -> str:
        # Ray Data appends advice of its own to the arguments of an error that passes through it
        return self.line


class ConfigError(AcerayError):
    """A setting or a preset that is unknown, missing, out of range or contradictory."""


class DataError(AcerayError):
    """A molecule, dataset, checkpoint or run folder that is missing, damaged or not what is needed."""


class ClusterError(AcerayError):
    """Ray lacks the resources a run asks for, or a worker was lost for good."""


class TrackingError(AcerayError):
    """The tracking store does not answer, or does not take what it is sent."""


class NonFiniteLoss(AcerayError):  # noqa: N818 (the name says what happened)
    """A loss term became infinite or not a number; raised before the optimiser takes the step."""
