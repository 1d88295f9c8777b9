"""`python -m tests.faults.driver MODULE:NAME VERB ...`: the command line, in which one function announces itself.

For tests that send signals: `begin NAME` is flushed when the function is called, and it takes half a minute longer, so
that a signal meets it. With `-` nothing is changed; `begin -` is the start of the program.
"""

import functools
import importlib
import sys
import time
from typing import Any


def announced(place: str) -> None:
    """Replace the function of that name by one that says when it begins."""
    module, _, dotted = place.partition(":")
    *owners, name = dotted.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        print(f"begin {name}", flush=True)
        result = function(*arguments, **named)
        if "Display" not in dotted:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                sum(range(10_000))  # busy, as the real work is
        return result

    setattr(owner, name, call)


if __name__ == "__main__":
    place = sys.argv.pop(1)
    if place == "-":
        print("begin -", flush=True)
    else:
        announced(place)
    from aceray import cli

    cli.main()
