"""Output that every terminal can show: characters that its encoding lacks are spelt out, such as "omega"."""

import codecs
import sys
import unicodedata
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO


SPELL_OUT = "admin_hf.spell_out"
_SYMBOLS = {"→": "->", "−": "-", "–": "-", "×": "x", "⊙": "*", "²": "^2", "‖": "||", "≤": "<=", "≥": ">=", "±": "+-"}


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelling, error.object[error.start : error.end])), error.end


def _spelling(character: str) -> str:
    words = unicodedata.name(character, "").split()
    if words[:1] == ["GREEK"] and words[2:3] == ["LETTER"] and len(words) == 4:
        return words[3].lower() if words[1] == "SMALL" else words[3].capitalize()
    plain = _SYMBOLS.get(character, character)
    if unicodedata.decomposition(character).startswith("<"):  # another form of plain characters, such as ₂ of 2
        plain = unicodedata.normalize("NFKD", plain)
    return plain.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(SPELL_OUT, _spell_out)


def showable(text: str, stream: TextIO | None = None) -> str:
    """The text, where characters that the stream cannot encode are spelt out; default: standard output.

    Example:

    ```python
    >>> import io
    >>> showable("ω → 1", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    'omega -> 1'

    ```
    """
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "utf-8"
    return text.encode(encoding, SPELL_OUT).decode(encoding)


def spell_out() -> None:
    """Let standard output and error spell out characters that they cannot encode. For programs, not for libraries."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # it was a file when Python started, and is a pipe now
                stream.reconfigure(errors=SPELL_OUT)
