"""Parallel text is read as it was written, line for line, or refused in a sentence with the line."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admin_hf.parallel_text import Pair, read_pairs
from training.errors import InputError
from training.files import check_text


LANGUAGES = ("en", "de")
BOM = "\ufeff"


def read(folder, name, content) -> list[Pair]:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_pairs([folder / name], LANGUAGES))


# --- tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "pairs"),
    [
        ('en,de\n12" wide,"12"" breit"\n', [(2, '12" wide', '12" breit')]),
        ('en,de\r\n"a, b","c ""d"""\r\n\r\n"",\r\n', [(2, "a, b", 'c "d"'), (3, "", ""), (4, "", "")]),
        (BOM + 'en , de\na "b" c, "d"\n', [(2, 'a "b" c', ' "d"')]),
        ("de,en,en2\nb,a,x\nb,,x\n", [(2, "a", "b"), (3, None, "b")]),
    ],
)
def test_csv_is_read_as_rfc_4180_says(tmp_path, content, pairs):
    assert read(tmp_path, "a.csv", content) == pairs


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (['one dog,"12 Zoll.', "c,d", "e,f", "g,h"], 2),  # never closed
        (["a,b", 'c,"12 Zoll.', "e,f", 'g,"h"'], 3),  # closed by another row's
        (["a,b", 'c,"12 Zoll.', "e,f", 'g,15" i'], 3),
        (["a,b", "c,d", '"12 Zoll.,f', 'g"'], 4),  # a legal cell, if cells had line breaks
        (["a,b", '"12 Zoll" breit,d'], 3),  # text behind the closing quote
        (["a,b", 'c,"12" Zoll"'], 3),
        (["a,b", 'c,"""'], 3),
        (["a,b", 'c,"' + "d" * 200_000, "e,f"], 3),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quote_in_csv_takes_no_row_away(tmp_path, rows, line, end):
    with pytest.raises(ValueError, match=rf"a\.csv, line {line}, cannot be read as CSV: "):
        read(tmp_path, "a.csv", end.join(["en,de", *rows]) + end)


def test_quotes_are_text_in_tsv(tmp_path):
    rows = [("one dog", '"12 Zoll.'), ('"a', 'b"'), ('"', '""')]
    content = "".join(f"{source}\t{target}\n" for source, target in [LANGUAGES, *rows])
    assert [pair[1:] for pair in read(tmp_path, "a.tsv", content)] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "en,de,de\na,b,c\n", "line 1, has 'de' twice"),
        ("a.csv", BOM + "en,de, en \na,b,c\n", "line 1, has 'en' twice"),
        ("a.TSV", "en\tde\tde\na\tb\tc\n", "line 1, has 'de' twice"),
        ("a.csv", "en,\na,b\n", "no language key 'de'; it has 'en', ''"),
        ("a.jsonl", '{"en":"a","de":"b"}\n\n{"en":"a","de":"b","de":"c"}\n', "line 3, has 'de' twice"),
        ("a.jsonl", '{"translation":{"en":"a","en":"a","de":"c"}}\n', "line 1, has 'en' twice"),
        ("a.jsonl", '{"translation":{},"translation":{"en":"a","de":"c"}}\n', "line 1, has 'translation' twice"),
        ("a.json", '[{"en":"a","de":"b"},\n\n{"de":"a","en":"b","de":"c"}]\n', "line 3, has 'de' twice"),
    ],
)
def test_a_language_that_comes_twice_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_a_name_that_nobody_asks_for_may_come_twice(tmp_path):
    assert read(tmp_path, "a.csv", "en,id,,id,,de\na,1,,2,,b\n") == [(2, "a", "b")]
    assert read(tmp_path, "a.jsonl", '{"en":"a","id":1,"id":2,"de":"b"}\n') == [(1, "a", "b")]


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00 x", "a\\udfff"])
@pytest.mark.parametrize("form", ["line", "nested", "array", "pretty array"])
def test_half_a_surrogate_pair_is_told_with_its_line(tmp_path, half, form):
    rows = ['{"en":"a \\ud83d\\ude00","de":"b"}', f'{{"en":"a","de":"so good {half}"}}']
    if form != "line":
        rows = [f'{{"translation":{row}}}' for row in rows]
    content = "\n".join(rows) if "array" not in form else f"[\n{rows[0]},\n{rows[1]}\n]"
    line = {"array": 3, "pretty array": 6}.get(form, 2)
    if form == "pretty array":
        content = "[\n{\n" + rows[0][1:] + "\n,\n\n" + rows[1] + "]"
    with pytest.raises(ValueError, match=rf"a\.json, line {line}: 'de' contains \\ud.*half of a surrogate pair"):
        read(tmp_path, "a.json", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"en":"a","de":"b"}\n{"en":"c","de":"d"}]', "line 3, expected ',' or ']'"),
        ('[{"en":"a","de":"b"}', "line 1, expected ',' or ']'"),
        ('[{"en":"a","de":"b"},\n]', "line 2, Expecting value"),
        ('[{"en":"a","de":"b"},\n{"en":\n\nx}]', "line 4, Expecting value"),
        ('[{"en":"a","de":"b"}]\nx', "line 1, there is more after the array"),
        ('{"en":"a","de":"b"} {"en":"a","de":"b"}', "line 1, more than one value"),
        ("[" * 100_000, "line 1, maximum recursion depth"),
        ('{"en":' + "1" * 5000 + "}", "line 1, Exceeds the limit"),
    ],
)
def test_what_is_no_json_is_told_with_its_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read(tmp_path, "a.json", content)


# --- files that are no text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n".encode("utf-16"), "is UTF-16; write it as UTF-8"),
        (b"\xfe\xff" + "a\nb\n".encode("utf-16-be"), "is UTF-16"),
        ("a\nb\n".encode("utf-16-le"), "line 1 contains a NUL byte"),
        (b"a\nb\nc\0d\n", "line 3 contains a NUL byte"),
        (gzip.compress(b"a\nb\n", mtime=0), "is compressed by gzip"),
        (b"a\rb\rc\r", "3 carriage returns but 0 line feeds"),
        (b"a\rb\rc\n", "2 carriage returns but 1 line feeds"),
    ],
)
@pytest.mark.parametrize("block", [2, 2**24])
def test_files_that_are_no_lines_of_utf8_are_refused(tmp_path, monkeypatch, content, message, block):
    monkeypatch.setattr("training.files.READ_BLOCK", block)
    (tmp_path / "a.en").write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_text(tmp_path / "a.en")


@pytest.mark.parametrize("block", [1, 2, 2**24])
def test_carriage_returns_before_line_feeds_are_no_fault(tmp_path, monkeypatch, block):
    monkeypatch.setattr("training.files.READ_BLOCK", block)
    (tmp_path / "a.en").write_bytes(b"a\r\nb\r\n\r\nc")
    assert check_text(tmp_path / "a.en").lines == 4


# --- any text -----------------------------------------------------------------------------------------

# Characters that other programs take for line ends, blanks or marks come often
SPECIAL = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\t\r\0\u200b\u200d\ufeff\u0301\u00a0\"',;\\"
TEXT = st.text(
    st.sampled_from(SPECIAL) | st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=6
)
JSON_TEXT = TEXT | st.text(st.characters(), max_size=4)  # with line feeds, and halves of surrogate pairs


def written(form, pairs, end, ascii_only) -> list[str]:
    """The text of one file, or of both sides."""
    if form == "text":
        return [end.join(side) for side in zip(*pairs, strict=True)]
    if form == "jsonl":
        return [end.join(json.dumps({"en": s, "de": t}, ensure_ascii=ascii_only) for s, t in pairs)]
    if form == "json":
        rows = [{"translation": {"en": s, "de": t}} for s, t in pairs]
        return [json.dumps(rows, ensure_ascii=ascii_only, indent=1).replace("\n", end)]
    if form == "tsv":
        return [end.join("\t".join(pair) for pair in [LANGUAGES, *pairs])]
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator=end).writerows([LANGUAGES, *pairs])
    return [table.getvalue().removesuffix(end)]


@pytest.mark.parametrize("form", ["text", "csv", "tsv", "json", "jsonl"])
def test_what_was_written_is_what_is_read(tmp_path, form):
    in_json = form.startswith("json")
    text = JSON_TEXT if in_json else TEXT
    read_whole = []

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(
        pairs=st.lists(st.tuples(text, text), min_size=1, max_size=5),
        end=st.sampled_from(["\n", "\r\n"]),
        last=st.booleans(),
        mark=st.booleans(),
        ascii_only=st.booleans(),
    )
    def check(pairs, end, last, mark, ascii_only):
        sides = [BOM * mark + side + end * last for side in written(form, pairs, end, ascii_only)]
        halves = any("\ud800" <= character <= "\udfff" for pair in pairs for character in "".join(pair))
        if halves and not ascii_only:
            return  # cannot be written
        paths = [tmp_path / f"a.{form}"] if form != "text" else [tmp_path / "a.en", tmp_path / "a.de"]
        for path, side in zip(paths, sides, strict=True):
            path.write_bytes(side.encode())
        content = "".join(side.removeprefix(BOM).replace("\r\n", "\n") for side in sides)
        try:
            for path in paths:
                check_text(path)
            found = list(read_pairs(paths, LANGUAGES))
        except ValueError as error:  # as InputError is
            assert str(tmp_path) in str(error)
            blank = not all(sides)
            cells = form == "tsv" and any("\t" in side for pair in pairs for side in pair)
            uneven = form == "text" and not last and any(pairs[-1]) and not all(pairs[-1])
            assert halves or blank or cells or uneven or any(character in content for character in "\0\r")
            return
        if form == "text" and not last and not any("".join(pair) for pair in pairs[-1:]):
            pairs = pairs[:-1]  # a blank last line that nothing ends is none
        expected = [tuple(text.removesuffix("\r") if not in_json else text for text in pair) for pair in pairs]
        if form == "text" and not mark:
            expected[:1] = [tuple(text.removeprefix(BOM) for text in pair) for pair in expected[:1]]
        if form in ("csv", "tsv"):  # an empty cell is a missing text, but in a blank row
            expected = [tuple(text or None for text in pair) if any(pair) else pair for pair in expected]
        assert [pair[1:] for pair in found] == expected
        if form != "json":
            header = form in ("csv", "tsv")
            assert [pair.line for pair in found] == list(range(1 + header, len(expected) + 1 + header))
        read_whole.append(pairs)

    check()
    assert len(read_whole) > 30
