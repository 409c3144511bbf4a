"""Errors about the user's input, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """An input of the user cannot be used; the message says what to do. `run_translation.py` exits with 2."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any error of a library about the user's arguments into one sentence that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of whichever library
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
