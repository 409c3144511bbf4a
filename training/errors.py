"""What the user gave and cannot be used, told in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, and what to do. `run_translation.py` exits with 2."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a library raises about the user's arguments into one sentence that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of whichever library
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
