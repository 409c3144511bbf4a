"""Reads parallel text in all its forms: every line is one pair, and every error names file and line."""

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import regex


TABLE_FORMATS = (".json", ".jsonl", ".csv", ".tsv")

# White space, control characters, and what Unicode lets readers ignore: zero-width spaces, joiners, direction marks
_INVISIBLE = regex.compile(r"[\s\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}]*")

_QUOTES = (
    "a cell that begins with a quote must end with one in the same line, and quotes within it are written twice, as "
    'in "12"" wide"; a cell cannot hold a line break'
)


class Pair(NamedTuple):
    """A source and its translation; None if a table lacks it."""

    line: int
    source: str | None
    target: str | None


def is_blank(text: str | None) -> bool:
    """Whether there is nothing to translate: no text, or only white space and characters without width."""
    return text is None or _INVISIBLE.fullmatch(text) is not None


def as_written(text: str) -> str:
    """The text in the form in which translations are written and scored: every kind of line end becomes a space."""
    return " ".join(text.splitlines()).strip(" ")


def is_table(path: Path) -> bool:
    """Whether the name of a file is that of a table, which contains both sides."""
    return path.suffix.lower() in TABLE_FORMATS


def find_files(file: str, languages: Sequence[str], source_only: bool = False) -> list[Path]:
    """The files that a name means: one table, a source and a target file, or only source text.

    Args:
        file: a table, or the prefix of text files that end in the languages; with `source_only`, also a text file.
        languages: of source and target.
        source_only: whether the target may be missing.
    """
    path = Path(file)
    if is_table(path):
        return [path]
    source, target = (Path(f"{file}.{language}") for language in languages)
    if source_only and not target.exists():
        return [source if source.exists() else path]
    return [source, target]


def read_pairs(paths: Sequence[Path], languages: Sequence[str], source_only: bool = False) -> Iterator[Pair]:
    """Read tables one after another, or text files side by side.

    Only a line feed ends a line, with or without a carriage return before it. A blank line of text files, CSV or TSV
    is a pair of blanks; in other lines of CSV and TSV an empty cell is a missing text, as null is in JSON.

    Args:
        paths: tables, or a source and a target file, or a source file.
        languages: keys or columns of source and target in a table.
        source_only: whether rows may lack the target.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not UTF-8 or not a table, has no such languages, or lacks lines of the other side. The
            message names file and line.
    """
    if not is_table(paths[0]):
        sides = [read_lines(path) for path in paths]
        for number, texts in enumerate(zip_longest(*sides), 1):
            if None in texts:
                names = " and ".join(map(str, paths))
                raise ValueError(f"{names} differ in their number of lines: one has no line {number}.")
            yield Pair(number, texts[0], texts[1] if len(texts) > 1 else None)
        return
    required = languages[:1] if source_only else languages
    for path in paths:
        for line, row in _rows(path, languages, required):
            source, target = (_text(row.get(language), path, line, language) for language in languages)
            _check_languages(row, required, path, line)
            yield Pair(line, source, target)


def _text(value: Any, path: Path, line: int, language: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path}, line {line}: {language!r} is {repr(value)[:80]}; expected text.")
    if value is not None and (half := re.search("[\ud800-\udfff]", value)):
        raise ValueError(
            f"{path}, line {line}: {language!r} contains \\u{ord(half[0]):04x}, half of a surrogate pair, which is "
            "not a character."
        )
    return value


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without their line ends.

    Raises:
        OSError, ValueError: as in `decoded_lines`, or there is no such file.
    """
    with path.open("rb") as file:
        yield from decoded_lines(file, path)


def decoded_lines(lines: Iterable[bytes], name: object) -> Iterator[str]:
    """Lines of a file in UTF-8 as text, without line ends and without a byte order mark.

    Args:
        lines: a file that is open for reading bytes; only a line feed ends a line.
        name: readable name of the file.

    Raises:
        ValueError: a line is not UTF-8.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number:,}, is not UTF-8 text: {error.reason}.") from None
        yield text.removesuffix("\n").removesuffix("\r")


# --- tables ---------------------------------------------------------------------------------------


def _rows(path: Path, languages: Sequence[str], required: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows; a row of Hugging Face's form is what is under its `translation`."""
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _cells(path, languages, required)
        return
    for line, value in _json_array(path) if _is_array(path) else _json_lines(path):
        row = _object(value, path, line, languages)
        yield line, _object(row["translation"], path, line, languages) if "translation" in row else row


def _cells(path: Path, languages: Sequence[str], required: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    split = _tsv_cells if path.suffix.lower() == ".tsv" else _csv_cells
    header: list[str] = []
    for line, text in enumerate(read_lines(path), 1):
        cells = split(text, path, line)
        if line == 1:
            header = [name.strip() for name in cells]
            _check_names(header, languages, path, line)
            _check_languages(header, required, path, line)
        elif cells and len(cells) != len(header):
            raise ValueError(f"{path}, line {line}, has {len(cells)} fields; the header has {len(header)}.")
        elif any(cells):
            yield line, dict(zip(header, (cell or None for cell in cells), strict=True))
        else:
            yield line, dict.fromkeys(header, "")


def _check_names(names: list[str], used: Sequence[str], path: Path, line: int) -> None:
    if twice := [name for name in used if names.count(name) > 1]:
        raise ValueError(f"{path}, line {line}, has {twice[0]!r} twice; expected each language once.")


def _check_languages(names: Collection[str], required: Sequence[str], path: Path, line: int) -> None:
    for language in required:
        if language not in names:
            found = ", ".join(map(repr, names)) or "none"
            raise ValueError(f"{path}, line {line}, has no language key {language!r}; it has {found}.")


def _tsv_cells(text: str, path: Path, line: int) -> list[str]:
    return text.split("\t") if text else []  # quotes are text in every parallel corpus in TSV


def _csv_cells(text: str, path: Path, line: int) -> list[str]:
    # One line at a time: otherwise a stray quote would make one cell of all rows up to the next quote
    if "\r" in text:
        raise ValueError(f"{path}, line {line}, cannot be read as CSV: it contains a carriage return.")
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        why = str(error) if "limit" in str(error) else _QUOTES
        raise ValueError(f"{path}, line {line}, cannot be read as CSV: {why}.") from error


# --- JSON -----------------------------------------------------------------------------------------


class _Object(list[tuple[str, Any]]):
    """The names and values of a JSON object, in which a name may come twice."""

    def __repr__(self) -> str:
        return repr(dict(self))


_DECODER = json.JSONDecoder(object_pairs_hook=_Object)
_SPACE = re.compile(r"[ \t\r\n]*")


def _object(value: Any, path: Path, line: int, languages: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, _Object):
        raise ValueError(f"{path}, line {line}, is {str(value)[:80]!r}; expected an object with language keys.")
    row = dict(value)
    if len(row) < len(value):
        _check_names([name for name, _ in value], [*languages, "translation"], path, line)
    return row


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(100).lstrip().startswith("[")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(read_lines(path), 1):
        begin = _end_of_space(text, 0)
        if begin < len(text):
            value, end = _json_value(text, begin, path, line)
            if _end_of_space(text, end) < len(text):
                raise _json_error(path, line, "more than one value")
            yield line, value


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        text = file.read()
    place = _end_of_space(text, 0)  # of the bracket or comma before an item
    line, counted = 1, 0
    while text.startswith(("[", ","), place):
        begin = _end_of_space(text, place + 1)
        line, counted = line + text.count("\n", counted, begin), begin
        if text[place] == "[" and text.startswith("]", begin):
            place = begin
            break
        value, end = _json_value(text, begin, path, line)
        yield line, value
        place = _end_of_space(text, end)
    line += text.count("\n", counted, place)
    if not text.startswith("]", place):
        raise _json_error(path, line, "expected ',' or ']'")
    if _end_of_space(text, place + 1) < len(text):
        raise _json_error(path, line, "there is more after the array")


def _json_value(text: str, begin: int, path: Path, line: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        raise _json_error(path, line + text.count("\n", begin, error.pos), error.msg) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or brackets thousands deep
        raise _json_error(path, line, str(error)) from error


def _end_of_space(text: str, begin: int) -> int:
    match = _SPACE.match(text, begin)
    return match.end() if match else begin


def _json_error(path: Path, line: int, why: str) -> ValueError:
    return ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: line {line}, {why}.")
