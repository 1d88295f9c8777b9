"""Errors stay one line, whatever they pass through."""

import copy

from aceray.errors import AcerayError, DataError


def test_a_message_is_one_line() -> None:
    assert str(DataError("a file:\n  is  missing")) == "a file: is missing"


def test_a_message_survives_another_process_and_what_others_append_to_it() -> None:
    error = DataError("x.parquet: is missing.")
    error.args = (error.args[0] + " Failed to apply UDF transform after 1/1 attempts.",)
    arrived = copy.copy(error)  # by the protocol that pickle follows
    assert isinstance(arrived, AcerayError)
    assert str(arrived) == "x.parquet: is missing."
