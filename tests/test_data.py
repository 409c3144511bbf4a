import json
import logging
import os

import pytest
from datasets import Dataset, Value
from datasets.builder import DataFilesDict
from datasets.data_files import DataFilesList
from datasets.load import configure_builder_class
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from layouts import save_layout

from training.arguments import DataTrainingArguments, ModelArguments
from training.data import check_cache, load_pairs, resolve_files
from training.errors import InputError
from training.files import check_text
from training.tokenization import load_tokenizer, train_tokenizer
from training.tokenized_data import tokenize_for_evaluation, tokenize_for_training


PAIRS = [
    ("A dog.", "Ein Hund."),
    ('She said "null".', 'Sie sagte "null".'),
    ("42", "zweiundvierzig"),
    ("N/A", "k. A."),
]


def arguments(**changes):
    return DataTrainingArguments(source_lang="en", target_lang="de", **changes)


def write(folder, form):
    """Write PAIRS in one of the forms, and return what a user gives as the file."""
    if form == "prefix":
        for column, language in enumerate(("en", "de")):
            (folder / f"train.{language}").write_text("".join(f"{pair[column]}\n" for pair in PAIRS), encoding="utf-8")
        return folder / "train"
    rows = [{"en": source, "de": target} for source, target in PAIRS]
    if form.startswith("translation"):
        rows = [{"translation": row} for row in rows]
    if form.endswith("jsonl") or form.endswith("json"):
        path = folder / f"train.{form.rpartition('.')[2]}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "columns.csv":
        path = folder / "train.csv"
        quoted = [",".join('"' + text.replace('"', '""') + '"' for text in pair) for pair in PAIRS]
        path.write_text("\n".join(["en,de", *quoted]) + "\n", encoding="utf-8")
    else:
        path = folder / "train.tsv"
        path.write_text("\n".join(["en\tde", *("\t".join(pair) for pair in PAIRS)]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "form", ["prefix", "translation.json", "translation.jsonl", "columns.jsonl", "columns.csv", "columns.tsv"]
)
def test_every_form_gives_the_same_pairs(tmp_path, form):
    data = arguments(train_file=str(write(tmp_path, form)))
    dataset = load_pairs("train", data, ModelArguments(cache_dir=str(tmp_path / "cache")))
    assert dataset.column_names == ["source", "target"]
    assert list(zip(dataset["source"], dataset["target"], strict=True)) == PAIRS
    assert dataset.cache_files, "memory-mapped, not in memory"


@pytest.mark.parametrize("form", ["array.json", "windows.csv", "windows prefix", "dates.jsonl"])
def test_what_other_programs_write_is_read_as_it_is(tmp_path, form):
    if form == "array.json":
        path = tmp_path / "train.json"
        path.write_text(json.dumps([{"translation": {"en": s, "de": t, "id": 1}} for s, t in PAIRS], indent=1))
        expected = PAIRS
    elif form == "dates.jsonl":
        path, expected = tmp_path / "train.jsonl", [("2020-01-01", "true"), ("1.50", "null")]
        path.write_text("".join(json.dumps({"en": s, "de": t}) + "\n" for s, t in expected))
    elif form == "windows.csv":
        path, expected = tmp_path / "train.csv", [("a", "b"), ("", ""), ("007", "d")]
        path.write_bytes(b"\xef\xbb\xbfen,de\r\na,b\r\n\r\n007,d\r\n")
    else:
        path, expected = tmp_path / "train", [("a", "c"), ("b", "d")]
        (tmp_path / "train.en").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
        (tmp_path / "train.de").write_bytes(b"c\r\nd")
    data = arguments(train_file=str(path))
    dataset = load_pairs("train", data, ModelArguments(cache_dir=str(tmp_path / "cache")))
    assert list(zip(dataset["source"], dataset["target"], strict=True)) == expected


@pytest.mark.parametrize("form", ["prefix", "plain file", "columns.jsonl"])
def test_source_text_alone_can_be_translated(tmp_path, form):
    if form == "columns.jsonl":
        path = tmp_path / "test.jsonl"
        path.write_text("".join(json.dumps({"en": source}) + "\n" for source, _ in PAIRS))
    else:
        path = tmp_path / ("test.en" if form == "prefix" else "test.txt")
        path.write_text("".join(f"{source}\n" for source, _ in PAIRS))
    given = tmp_path / "test" if form == "prefix" else path
    dataset = load_pairs("test", arguments(test_file=str(given)), ModelArguments(cache_dir=str(tmp_path / "cache")))
    assert dataset.column_names == ["source"]
    assert list(dataset["source"]) == [source for source, _ in PAIRS]


def test_samples_are_limited_from_the_front(tmp_path):
    data = arguments(train_file=str(write(tmp_path, "prefix")), max_train_samples=2)
    dataset = load_pairs("train", data, ModelArguments(cache_dir=str(tmp_path / "cache")))
    assert list(dataset["source"]) == [source for source, _ in PAIRS[:2]]


# --- the same text, whatever holds it ----------------------------------------------------------------

WORDS = [("null", "NA"), ("nan", "007"), ("", ""), ("1.50", "2020-01-01"), ("None", "TRUE")]


def load(folder, split="train", **changes):
    dataset = load_pairs(split, arguments(**changes), ModelArguments(cache_dir=str(folder / "cache")))
    return [tuple(row.values()) for row in dataset]


def write_words(path):
    """As a table, in which the pair of blanks is a blank line but in JSON."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps({"en": source, "de": target}) + "\n" for source, target in WORDS)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        text = "".join(separator.join(pair) + "\n" for pair in [("en", "de"), *WORDS])
        text = text.replace(f"\n{separator}\n", "\n\n")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_by_name_has_the_text_of_its_files(tmp_path, form, split):
    path = tmp_path / "set" / f"{split}.{form}"
    write_words(path)
    assert load(tmp_path, split, dataset_name=str(path.parent)) == WORDS
    assert load(tmp_path, split, **{f"{split}_file": str(path)}) == WORDS


def test_a_data_set_that_says_how_its_csv_is_read_has_its_text_too(tmp_path, caplog):
    """Datasets reads it, as it reads one from the Hub."""
    write_words(tmp_path / "set" / "train.csv")
    text = (tmp_path / "set" / "train.csv").read_text().replace(",", ";")
    (tmp_path / "set" / "train.csv").write_text(text)
    card = "---\nconfigs:\n- config_name: x\n  data_files:\n  - {split: train, path: train.csv}\n  sep: ';'\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    assert load(tmp_path, dataset_name=str(tmp_path / "set")) == WORDS
    (tmp_path / "set" / "train.csv").write_text('en;de\na;b\nc;"12 Zoll\ne;f\ng;"\n')
    with caplog.at_level(logging.WARNING, logger="training"):
        assert load(tmp_path, dataset_name=str(tmp_path / "set")) == [("a", "b"), ("c", "12 Zoll\ne;f\ng;")]
    assert "1 target cells" in caplog.text and "the first in row 2" in caplog.text
    (tmp_path / "set" / "train.csv").write_text('en;de\na;"12 Zoll\ne;f\n')
    with pytest.raises(InputError, match="train split of data set .* cannot be loaded: .*EOF inside string"):
        load(tmp_path, dataset_name=str(tmp_path / "set"))


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_csv_of_the_hub_is_found_in_the_cache_without_a_network(tmp_path, monkeypatch, separator):
    """As a session with a network leaves it: the cache goes by the options with which text is left alone."""
    path = tmp_path / "there.csv"
    path.write_text(f"en{separator}de\nnull{separator}007\n")
    columns = {"en": str, "de": str}
    options = {"na_filter": False, "skip_blank_lines": False, "converters": columns}
    options |= {"quoting": 3} if separator == "\t" else {}
    files = DataFilesDict({"train": DataFilesList([str(path)], [])})
    config = CsvConfig(data_files=files, sep=separator)
    there = configure_builder_class(Csv, [config], "default", dataset_name="set")
    there(str(tmp_path / "cache"), "set", hash="0", **options).download_and_prepare()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert load(tmp_path, dataset_name="set") == [("null", "007")]


@pytest.mark.parametrize("form", ["csv", "folder", "parquet", "prefix"])
def test_a_file_that_is_replaced_is_read_again_whatever_its_time_stamp(tmp_path, form):
    """As cp -p, tar and rsync leave it."""
    for text in ("one dog", "two cat", "red cat"):
        if form == "parquet":
            path = tmp_path / "set" / "train.parquet"
            Dataset.from_dict({"en": [text], "de": ["b"]}).to_parquet(path)
        elif form == "prefix":
            path = tmp_path / "train.en"
            path.write_text(f"{text}\n")
            (tmp_path / "train.de").write_text("b\n")
        else:
            path = tmp_path / "set" / "train.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"en,de\n{text},b\n")
        os.utime(path, ns=(10**18, 10**18))
        given = {"train_file": str(path if form == "csv" else path.with_suffix(""))}
        if form in ("folder", "parquet"):
            given = {"dataset_name": str(path.parent)}
        assert load(tmp_path, **given) == [(text, "b")]


@pytest.mark.parametrize("by_name", [False, True])
def test_the_cache_is_overwritten_where_that_is_asked_for(tmp_path, by_name):
    if by_name:
        (tmp_path / "set").mkdir()
        Dataset.from_dict({"en": ["a"], "de": ["b"]}).to_parquet(tmp_path / "set" / "train.parquet")
        data = arguments(dataset_name=str(tmp_path / "set"))
    else:
        data = arguments(train_file=str(write(tmp_path, "columns.csv")))
    model = ModelArguments(cache_dir=str(tmp_path / "cache"))

    def stamp() -> int:
        return os.stat(load_pairs("train", data, model).cache_files[0]["filename"]).st_mtime_ns

    first = stamp()
    assert stamp() == first, "from the cache"
    data.overwrite_cache = True
    assert stamp() > first


@pytest.mark.parametrize("cache_dir", ["/dev/null/x", None])
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, cache_dir):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/dev/null/default")
    folder = cache_dir or "/dev/null/default"
    with pytest.raises(InputError, match=f"The cache folder {folder}.* cannot be written to .*--cache_dir"):
        check_cache(ModelArguments(cache_dir=cache_dir))


# --- what is missing ----------------------------------------------------------------------------------


def jsonl(*pairs):
    rows = [dict(zip(("en", "de"), pair, strict=False)) for pair in pairs]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("test.jsonl", jsonl(("a",), ("b", "c")), 1),
        ("test.jsonl", jsonl(("a", None), ("b", "c")), 1),
        ("test.jsonl", jsonl(("a", "x"), ("b",)), 2),
        ("test.jsonl", jsonl(("a", "x"), ("b", None)), 2),
        ("test.json", '[\n{"en":"a"},\n{"en":"b","de":"c"}]', 2),
        ("test.csv", "en,de\na,\nb,c\n", 2),
        ("test.tsv", "en\tde\na\tb\n\nb\t\n", 4),
    ],
)
def test_a_test_pair_without_its_target_is_told(tmp_path, name, content, line):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / name
    path.write_text(content)
    for given in ({"test_file": str(path)}, {"dataset_name": str(path.parent)}):
        with pytest.raises(
            InputError, match=rf"1 of \d test pairs have no 'de', the first is .*{name}, line {line}\."
        ):
            load(tmp_path, "test", **given)


@pytest.mark.parametrize(
    "content", [jsonl(("a",), ("b",)), jsonl(("a", None), ("b",)), "en,de\na,\nb,\n", "en\na\nb\n"]
)
def test_a_table_without_any_target_is_translated(tmp_path, content, caplog):
    path = tmp_path / ("test.jsonl" if content.startswith("{") else "test.csv")
    path.write_text(content)
    with caplog.at_level(logging.INFO, logger="training"):
        assert load(tmp_path, "test", test_file=str(path)) == [("a",), ("b",)]
    assert "The test set has no 'de': it is translated, and nothing is scored." in caplog.text


def test_a_data_set_with_a_missing_target_is_told(tmp_path):
    (tmp_path / "set").mkdir()
    for split in ("validation", "test"):
        rows = {"en": [None, "a", "b"], "de": [None, "x", None]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "set" / f"{split}.parquet")
        with pytest.raises(
            InputError, match=f"1 of 3 {split} pairs have no 'de', the first is .*, row 3 of its {split}"
        ):
            load(tmp_path, split, dataset_name=str(tmp_path / "set"))
    Dataset.from_dict({"en": ["a", "b"], "de": [None, None]}).cast_column("de", Value("string")).to_parquet(
        tmp_path / "set" / "test.parquet"
    )
    assert load(tmp_path, "test", dataset_name=str(tmp_path / "set")) == [("a",), ("b",)]


def test_other_missing_texts_are_blank_and_counted(tmp_path, caplog):
    (tmp_path / "train.jsonl").write_text(jsonl(("a", "b"), ("c", None), (None, "d"), (None, None)))
    with caplog.at_level(logging.WARNING, logger="training"):
        pairs = load(tmp_path, train_file=str(tmp_path / "train.jsonl"))
    assert pairs == [("a", "b"), ("c", ""), ("", "d"), ("", "")]
    assert "2 of 4 train pairs have no 'de', the first is" in caplog.text and "train.jsonl, line 2." in caplog.text
    assert "2 of 4 train pairs have no 'en', the first is" in caplog.text and "train.jsonl, line 3." in caplog.text


def test_blank_targets_of_text_are_counted(tmp_path, caplog):
    (tmp_path / "test.en").write_text("a\n\nb\nc\n")
    (tmp_path / "test.de").write_text("x\n\n\n \n")
    with caplog.at_level(logging.WARNING, logger="training"):
        load(tmp_path, "test", test_file=str(tmp_path / "test"))
    assert "2 of 4 test pairs have a blank target, the first is" in caplog.text and "test.de, line 3:" in caplog.text


# --- bad input --------------------------------------------------------------------------------------


def test_different_line_counts_are_told(tmp_path):
    (tmp_path / "train.en").write_text("one\ntwo\nthree")
    (tmp_path / "train.de").write_text("eins\nzwei\n")
    with pytest.raises(InputError, match=r"train\.en has 3 lines and .*train\.de has 2"):
        resolve_files(str(tmp_path / "train"), arguments(), "train")


@pytest.mark.parametrize("block", [4, 7, 2**24])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nnot \xff fine\n", r"text\.en.*line 2 cannot be decoded"),
        ("ä\nö\nü".encode() + b"\xc3", r"line 3 ends in the middle"),
        (b"a\nb\nc\n\xe4hm\n", r"line 4 cannot be decoded"),
        (b"\n\n\xc3\n", r"line 3 cannot be decoded"),
        (b"", "is empty"),
    ],
)
def test_text_that_is_not_utf8_is_told_with_file_and_line(tmp_path, monkeypatch, block, content, message):
    monkeypatch.setattr("training.files.READ_BLOCK", block)
    (tmp_path / "text.en").write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_text(tmp_path / "text.en")


@pytest.mark.parametrize("block", [3, 2**24])
def test_lines_are_counted_with_and_without_a_last_line_break(tmp_path, monkeypatch, block):
    monkeypatch.setattr("training.files.READ_BLOCK", block)
    (tmp_path / "a").write_text("ä\n\nö\n", encoding="utf-8")
    (tmp_path / "b").write_text("ä\n\nö", encoding="utf-8")
    assert check_text(tmp_path / "a").lines == check_text(tmp_path / "b").lines == 3


def test_unusual_line_separators_do_not_shift_the_sides(tmp_path):
    """Only a line feed ends a line: str.splitlines would also split at U+2028, form feeds and others."""
    sources = ["one\u2028still one", "two\x0cstill two", "three\x85", "four\rstill four"]
    with (tmp_path / "train.en").open("w", encoding="utf-8", newline="") as file:
        file.write("".join(f"{s}\n" for s in sources))
    (tmp_path / "train.de").write_text("eins\nzwei\ndrei\nvier\n", encoding="utf-8")
    data = arguments(train_file=str(tmp_path / "train"))
    dataset = load_pairs("train", data, ModelArguments(cache_dir=str(tmp_path / "cache")))
    assert list(dataset["source"]) == sources


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, r"there is no .*nothing\.en"),
        ("train.jsonl", None, "does not exist"),
        ("train.jsonl", '{"translation": {"en": "a", "fr": "b"}}\n', r"no language key 'de'; it has 'en', 'fr'"),
        ("train.csv", "english,german\na,b\n", r"no language key 'en'; it has 'english', 'german'"),
        ("train.jsonl", "this is no JSON\n", r"train\.jsonl cannot be read as JSONL: line 1"),
        ("train.jsonl", '{"en": "a", "de": "b"}\n{"en": 5, "de": "b"}\n', r"line 2: 'en' is 5; expected text"),
        ("train.jsonl", '{"en": "a", "de": "b"}\nnull\n', r"line 2, is 'None'; expected an object"),
        ("train.jsonl", '{"en": ["a"], "de": "b"}\n', r"'en' is \['a'\]; expected text"),
        ("train.json", "[]", "has no rows"),
        ("train.csv", "en,de\n", "has no rows"),
        ("train.csv", "en,de\na,b,c\nd,e\n", r"line 2, has 3 fields; the header has 2"),
        ("train.tsv", "en\tde\na\tb\nc\n", r"line 3, has 1 fields; the header has 2"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    data = arguments(train_file=str(tmp_path / name))
    with pytest.raises(InputError, match=message):
        load_pairs("train", data, ModelArguments(cache_dir=str(tmp_path / "cache")))


# --- tokenisation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([["a b c d e f g h", "ab cd ef gh"]], 20)


def test_empty_and_long_training_pairs_are_skipped_and_counted(tokenizer, caplog):
    sources = ["a b", "", "c", "a " * 30, "d", None, "e f"]
    targets = ["a b", "b", "   ", "c", "d " * 30, "e", "g h"]
    dataset = Dataset.from_dict({"source": sources, "target": targets})
    with caplog.at_level(logging.WARNING, logger="training.data"):
        data = arguments(max_source_length=20, max_target_length=10)
        tokenized = tokenize_for_training(dataset, tokenizer, data)
    assert len(tokenized) == 2
    assert tokenized["labels"][1] == tokenizer("g h")["input_ids"]
    assert tokenized["length"][:] == [len(ids) for ids in tokenized["input_ids"]]
    assert "2 of 7" in caplog.text and "3 empty" in caplog.text and "2 longer" in caplog.text
    assert tokenize_for_training(dataset, tokenizer, arguments(), longest=5)["labels"] == tokenized["labels"]
    with pytest.raises(InputError, match=r"No training pair is left.*0 of 1"):
        tokenize_for_training(dataset.select([1]), tokenizer, data)


def test_a_source_prefix_comes_before_every_source(tokenizer):
    dataset = Dataset.from_dict({"source": ["b"], "target": ["c"]})
    tokenized = tokenize_for_training(dataset, tokenizer, arguments(source_prefix="a "))
    assert tokenized["input_ids"][0] == tokenizer("a b")["input_ids"]
    assert tokenized["labels"][0] == tokenizer("c")["input_ids"]


def test_evaluation_keeps_every_line_and_cuts_and_counts_long_ones(tokenizer, caplog):
    sources = ["a", "a b c d", "", "a b " * 20]
    dataset = Dataset.from_dict({"source": sources, "target": ["a", "b", "c", "d"]})
    with caplog.at_level(logging.WARNING, logger="training.data"):
        tokenized = tokenize_for_evaluation(dataset, tokenizer, arguments(max_source_length=10), "test")
    assert sorted(tokenized["index"]) == [0, 1, 2, 3]
    lengths = [len(ids) for ids in tokenized["input_ids"]]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 10
    assert all(ids[-1] == tokenizer.eos_token_id for ids in tokenized["input_ids"])
    for row in tokenized:
        assert (row["source"], row["target"]) == (sources[row["index"]], "abcd"[row["index"]])
    assert "1 of 4" in caplog.text


def test_labels_are_tokenised_as_targets(tmp_path):
    """Stock Marian has a tokenizer for each side."""
    save_layout("marian", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), ModelArguments())
    tokenized = tokenize_for_evaluation(
        Dataset.from_dict({"source": ["Mädchen"], "target": ["Mädchen"]}), tokenizer, arguments(), "test"
    )
    assert tokenized["input_ids"][0] == tokenizer("Mädchen")["input_ids"]
    assert tokenized["labels"][0] == tokenizer(text_target="Mädchen")["input_ids"] != tokenized["input_ids"][0]
