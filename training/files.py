"""Files of parallel text: checked in one pass, and cached by their content."""

import codecs
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets import Dataset, DownloadMode, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.io.generator import GeneratorDatasetInputStream

from admin_hf import parallel_text
from admin_hf.parallel_text import is_table, read_pairs

from .errors import InputError


READ_BLOCK = 2**24
# What other files begin with, and what they are
_MAGIC = {
    b"\xff\xfe": "UTF-16; write it as UTF-8",
    b"\xfe\xff": "UTF-16; write it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh91AY&SY": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"PK\x03\x04": "a zip archive or a workbook; unpack it, or save it as CSV in UTF-8",
}


@dataclass(frozen=True)
class TextFile:
    """A file of text in UTF-8, and what it held when it was checked.

    Attributes:
        checksum: SHA-256 of its bytes, in hexadecimal digits.
    """

    path: Path
    lines: int
    num_bytes: int
    checksum: str


def check_text(path: Path) -> TextFile:
    """Read a text file once, a block at a time: it is UTF-8, and has so many lines, bytes and this checksum.

    Raises:
        InputError: the file is missing, empty, not UTF-8, holds NUL, or ends lines by carriage returns alone.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file.")
    decoder, checksum = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256()
    size = lines = returns = 0  # carriage returns without a line feed
    last = b""
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            for magic, what in _MAGIC.items():
                if not size and block.startswith(magic):
                    raise InputError(f"{path} is {what}.")
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                # error.object is what was left of the block before, then this block
                line = lines + 1 + error.object[: error.start].count(b"\n")
                raise InputError(
                    f"{path} is not UTF-8 text: line {line} cannot be decoded ({error.reason})."
                ) from None
            if (place := block.find(b"\0")) >= 0:
                line = lines + 1 + block.count(b"\n", 0, place)
                raise InputError(
                    f"{path} is not text: line {line} contains a NUL byte. UTF-16 has them; write it as UTF-8."
                )
            checksum.update(block)
            if b"\r" in block or last == b"\r":
                returns += block.count(b"\r") - block.count(b"\r\n") - (last + block[:1] == b"\r\n")
            size, lines, last = size + len(block), lines + block.count(b"\n"), block[-1:]
    if decoder.getstate()[0]:
        raise InputError(f"{path} is not UTF-8 text: line {lines + 1} ends in the middle of a character.")
    if not last:
        raise InputError(f"{path} is empty.")
    if returns > lines:
        raise InputError(
            f"{path} has {returns:,} carriage returns but {lines:,} line feeds. Only line feeds end lines: convert it "
            "to line feeds."
        )
    return TextFile(path, lines + (last != b"\n"), size, checksum.hexdigest())


def contents(files: Sequence[TextFile]) -> dict[str, dict[str, int | str]]:
    """Size and checksum by path, in the form of `DatasetInfo.download_checksums`."""
    return {str(file.path): {"num_bytes": file.num_bytes, "checksum": file.checksum} for file in files}


def load_files(
    files: Sequence[TextFile], languages: Sequence[str], source_only: bool, cache_dir: str | None, afresh: bool
) -> Dataset:
    """Load tables, or text files side by side, as `source` and `target`: memory-mapped, and cached by their content.

    Args:
        files: tables, a source and a target file, or (`source_only`) a source file, which has no column `target`.
        languages: the keys or columns of source and target in a table.
        source_only: whether rows of a table may lack the target, which is None then.
        cache_dir: where `datasets` caches.
        afresh: read the files in spite of the cache.

    Raises:
        InputError: something cannot be read, with file and line, or not be cached.
    """
    paths = [file.path for file in files]
    if next(_rows(paths, languages, source_only), None) is None:
        raise InputError(f"{paths[0]} has no rows.")
    names = ("source", "target") if is_table(paths[0]) or len(files) > 1 else ("source",)
    forms = [path.suffix.lower() if is_table(path) else "text" for path in paths]
    reader = inspect.getsource(parallel_text)  # another version may read another text
    content = [(file.num_bytes, file.checksum) for file in files]
    identity = repr((reader, forms, list(languages), source_only, content))
    try:
        stream = GeneratorDatasetInputStream(
            _rows,
            features=Features(dict.fromkeys(names, Value("string"))),
            # lists would be taken for shards
            gen_kwargs={"paths": tuple(paths), "languages": tuple(languages), "source_only": source_only},
            cache_dir=cache_dir,
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
        )
        if afresh:
            stream.builder.download_and_prepare(download_mode=DownloadMode.REUSE_CACHE_IF_EXISTS)
        return stream.read()
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            raise InputError(f"{paths[0]} cannot be cached: {cause}. --cache_dir names another folder.") from error
        raise cause if isinstance(cause, InputError) else error from error


def _rows(paths: Sequence[Path], languages: Sequence[str], source_only: bool) -> Iterator[dict[str, str | None]]:
    try:
        for pair in read_pairs(paths, languages, source_only):
            row = {"source": pair.source, "target": pair.target}
            yield row if is_table(paths[0]) or len(paths) > 1 else {"source": pair.source}
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def place(paths: Sequence[Path], languages: Sequence[str], index: int) -> str:
    """File and line of a pair, counted from 0."""
    files = paths if is_table(paths[0]) else paths[-1:]
    pairs = ((path, pair.line) for path in files for pair in read_pairs([path], languages, source_only=True))
    path, line = next(islice(pairs, index, None))
    return f"{path}, line {line}"
