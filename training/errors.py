"""The error of every input that a user can mend."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, and what to do. `run_translation.py` exits with 2."""
