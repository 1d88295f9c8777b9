"""Passwords and tokens: where they may not stand, and how text is written without them."""

import re

_PASSWORD = re.compile(r"(://[^/\s:@]*:)(?!\$\{)[^@\s/]+(?=@)")
_QUERY = re.compile(r"([?&]\w*(?:password|token|secret)\w*=)(?!\$\{)[^&\s]+", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with asterisks for the password of every URI in it."""
    return _QUERY.sub(r"\1***", _PASSWORD.sub(r"\1***", text))


def without_password(uri: str) -> str:
    """The URI as it is; ValueError when it holds a password, but for `${NAME}`, which stands for the environment's.

    Settings are written to files, parameters and logs.
    """
    if masked(uri) != uri:
        raise ValueError("holds a password; put it into the environment and write ${ITS_NAME} in its place")
    return uri
