"""Files: parallel text in any of its forms, read line by line with the line in every complaint; text written whole."""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from .errors import InputError


TABLE_FORMATS = (".json", ".jsonl", ".csv", ".tsv")
READ_BLOCK = 2**24


def count_lines(path: Path) -> int:
    """Count the lines of a UTF-8 text file, a block at a time.

    Raises:
        InputError: the file is missing, empty, or not UTF-8 (naming the line).
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file.")
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, last = 0, b""
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                # error.object is what was left of the block before, then this block
                line = lines + 1 + error.object[: error.start].count(b"\n")
                raise InputError(
                    f"{path} is not UTF-8 text: line {line} cannot be decoded ({error.reason})."
                ) from None
            lines, last = lines + block.count(b"\n"), block[-1:]
    if decoder.getstate()[0]:
        raise InputError(f"{path} is not UTF-8 text: line {lines + 1} ends in the middle of a character.")
    if not last:
        raise InputError(f"{path} is empty.")
    return lines + (last != b"\n")


def load_file(paths: list[Path], languages: list[str], source_only: bool, cache_dir: str | None) -> Dataset:
    """Load a table, or text files side by side, as `source` and `target`: memory-mapped, and cached by path and time.

    Args:
        paths: one table, a source and a target file, or (`source_only`) a source file.
        languages: the keys or columns of source and target in a table.
        source_only: whether a table may lack the target.
        cache_dir: where `datasets` caches.

    Raises:
        InputError: something cannot be read, with file and line.
    """
    if paths[0].suffix in TABLE_FORMATS:
        _, first = next(_rows(paths[0]), (0, None))
        if first is None:
            raise InputError(f"{paths[0]} has no rows.")
        if source_only and languages[0] in first and languages[1] not in first:
            languages = languages[:1]
    else:
        languages = languages[: len(paths)]
    names = ("source", "target")[: len(languages)]
    try:
        return Dataset.from_generator(
            _pairs,
            features=Features(dict.fromkeys(names, Value("string"))),
            gen_kwargs={
                "paths": tuple(map(str, paths)),  # a list would be taken for shards
                "languages": tuple(languages),
                "versions": tuple(path.stat().st_mtime_ns for path in paths),  # for the cache's fingerprint
            },
            cache_dir=cache_dir,
        )
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, InputError) else error from error


def _pairs(paths: tuple[str, ...], languages: tuple[str, ...], versions: tuple[int, ...]) -> Iterator[dict[str, str]]:
    names = ("source", "target")
    if Path(paths[0]).suffix not in TABLE_FORMATS:
        for texts in zip(*(_lines(Path(path)) for path in paths), strict=True):
            yield dict(zip(names, texts, strict=False))
        return
    for line, row in _rows(Path(paths[0])):
        pair = {}
        for name, language in zip(names, languages, strict=False):
            if language not in row:
                found = ", ".join(map(repr, row)) or "none"
                raise InputError(f"{paths[0]}, line {line}, has no language key {language!r}; it has {found}.")
            if not isinstance(text := "" if row[language] is None else row[language], str):
                raise InputError(f"{paths[0]}, line {line}: {language!r} is {text!r}; expected text.")
            pair[name] = text
        yield pair


def _lines(path: Path) -> Iterator[str]:
    # Only a line feed ends a line: other separators, and carriage returns within, are part of the text
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n").removesuffix("\r")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a table; a row of Hugging Face's form is what is under its `translation`."""
    if path.suffix in (".csv", ".tsv"):
        header: list[str] | None = None
        for line, fields in _fields(path):
            if header is None:
                header = fields
            elif fields and len(fields) != len(header):
                raise InputError(f"{path}, line {line}, has {len(fields)} fields; the header has {len(header)}.")
            else:
                yield line, dict(zip(header, fields or [""] * len(header), strict=True))
        return
    for line, row in _json_values(path):
        if isinstance(row, dict) and "translation" in row:
            row = row["translation"]
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {line}, is {str(row)[:80]!r}; expected an object with language keys.")
        yield line, row


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    if path.suffix == ".tsv":  # quotes are text in every parallel corpus in TSV
        yield from ((number, text.split("\t") if text else []) for number, text in enumerate(_lines(path), 1))
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            for fields in reader:
                yield reader.line_num, fields
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}, cannot be read as CSV: {error}.") from error


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        is_array = file.read(100).lstrip().startswith("[")
    texts = [path.read_text(encoding="utf-8-sig")] if is_array else _lines(path)
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} cannot be read as {path.suffix[1:].upper()}: line {number + error.lineno - 1}, {error.msg}."
            ) from error
        yield from ((number, item) for item in value) if isinstance(value, list) else ((number, value),)


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name first: a crash leaves the old file, or none, and never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
