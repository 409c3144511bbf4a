"""The generated demo data: reproducible, well-formed, correct and not to be solved by copying."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu

from training.embedded_data import FILLERS, FRAMES, generate_pairs, names, write_embedded_data, write_number


ROOT = Path(__file__).parents[1]
COUNTS = {"train": 300, "validation": 50, "test": 40}
FILES = [f"{split}.{language}" for split in COUNTS for language in ("en", "de")]
MONTHS = {"January": "Januar", "March": "März", "May": "Mai", "August": "August", "December": "Dezember"}
NUMBERS = {"7": "sieben", "16": "sechzehn", "17": "siebzehn", "30": "dreißig", "42": "zweiundvierzig"}

Pairs = list[tuple[str, str]]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return generate_pairs(3000, seed=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "not" / "there"
    write_embedded_data(directory, **COUNTS, seed=3)
    return directory


def read_all(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_the_first_pairs_are_those_of_any_other_machine() -> None:
    assert generate_pairs(2, seed=1) == [
        ("In Sweden, 86.8% of the population speak German.", "In Schweden sprechen 86,8 % der Bevölkerung Deutsch."),
        (
            "The sixteenth chapter explains the history of Peru since two thousand and seven.",
            "Das sechzehnte Kapitel erklärt die Geschichte von Peru seit 2007.",
        ),
    ]


def test_seed_and_count_are_respected() -> None:
    pairs = generate_pairs(50, seed=5)
    assert len(pairs) == 50
    assert generate_pairs(20, seed=5) == pairs[:20]
    assert generate_pairs(50, seed=6) != pairs
    assert generate_pairs(0, seed=5) == []


def test_frames_have_the_same_slots_in_both_languages_and_use_every_filler() -> None:
    slots = [[set(re.findall(r"{(\w+)}", sentence)) for sentence in frame] for frame in FRAMES]
    assert all(english == german for english, german in slots)
    assert set().union(*(english for english, _ in slots)) == FILLERS.keys()


def test_sentences_are_plain_text_of_5_to_25_words(pairs: Pairs) -> None:
    for sentence in (sentence for pair in pairs for sentence in pair):
        assert sentence == " ".join(sentence.split())  # str.split knows every Unicode space
        assert 5 <= len(sentence.split()) <= 25
        assert not sentence[0].islower() and sentence[-1] in ".?"
        assert "{" not in sentence and "None" not in sentence


def test_no_sentence_comes_twice_on_a_side_or_on_both(pairs: Pairs) -> None:
    assert len({sentence for pair in pairs for sentence in pair}) == 2 * len(pairs)


def test_copying_the_source_scores_near_zero(pairs: Pairs) -> None:
    english, german = zip(*pairs, strict=True)
    assert sacrebleu.corpus_bleu(english, [german]).score < 2


@pytest.mark.parametrize(
    ("form", "english", "german"),
    [
        ("digits", "42", "42"),
        ("cardinal", "forty-two", "zweiundvierzig"),
        ("ordinal", "forty-second", "zweiundvierzigste"),
    ],
)
def test_number_forms(form: str, english: str, german: str) -> None:
    assert (write_number(42, form, "en"), write_number(42, form, "de")) == (english, german)


def test_years_are_spelled_as_years() -> None:
    assert write_number(1987, "year", "en") == "nineteen eighty-seven"
    assert write_number(1987, "year", "de") == "neunzehnhundertsiebenundachtzig"


def test_names_are_translated() -> None:
    assert names("territories", "FR AT") == [("France", "Frankreich"), ("Austria", "Österreich")]
    assert names("languages", "el") == [("Greek", "Griechisch")]
    assert names("currencies", "CHF") == [("Swiss Franc", "Schweizer Franken")]


def test_numbers_in_digits_become_german_words(pairs: Pairs) -> None:
    count = re.compile(r"(?:There are|We expect|already owns|is) (\d+) (?!meters)")
    found = [(m[1], german) for english, german in pairs if (m := count.search(english)) and m[1] in NUMBERS]
    assert found and all(f" {NUMBERS[number]} " in german for number, german in found)


def test_dates_times_and_prices_follow_german_customs(pairs: Pairs) -> None:
    meeting = re.compile(r"is on (\w+) (\d+), (\d+) at (\d+):(\d+) (AM|PM)\.$")
    price = re.compile(r"for \$(\d),(\d{3})\.(\d\d)\.$")
    meetings = [(m, german) for english, german in pairs if (m := meeting.search(english)) and m[1] in MONTHS]
    prices = [(m, german) for english, german in pairs if (m := price.search(english))]
    assert meetings and prices
    for (month, day, year, hour, minute, half), german in ((m.groups(), german) for m, german in meetings):
        clock = f"{int(hour) % 12 + 12 * (half == 'PM'):02}:{minute}"
        assert f" findet am {day}. {MONTHS[month]} {year} um {clock} Uhr statt." in german
    assert all(f" für {m[1]}.{m[2]},{m[3]} $ " in german for m, german in prices)


def test_files_have_the_requested_lines_and_nothing_else_is_left(directory: Path) -> None:
    files = read_all(directory)
    assert sorted(files) == sorted(FILES)
    for name, content in files.items():
        lines = content.decode("utf-8").split("\n")
        assert lines.pop() == "" and all(lines)
        assert len(lines) == COUNTS[name.split(".")[0]]


def test_splits_share_no_sentence(directory: Path) -> None:
    lines = [line for content in read_all(directory).values() for line in content.splitlines()]
    assert len(set(lines)) == len(lines) == 2 * sum(COUNTS.values())


def test_held_out_sets_do_not_depend_on_the_size_of_the_training_set(directory: Path, tmp_path: Path) -> None:
    write_embedded_data(tmp_path, **{**COUNTS, "train": 7}, seed=3)
    before, after = read_all(directory), read_all(tmp_path)
    assert {name for name in FILES if before[name] != after[name]} == {"train.en", "train.de"}


def test_files_are_replaced(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "test.en").write_text("an old sentence\n" * 999)
    write_embedded_data(tmp_path, **COUNTS, seed=3)
    assert read_all(tmp_path) == read_all(directory)


@pytest.mark.parametrize(
    "surroundings",
    [
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "2", "TZ": "America/Lima", "LC_ALL": "de_DE.UTF-8"},
    ],
)
def test_command_line_writes_the_same_bytes_everywhere(
    surroundings: dict[str, str], directory: Path, tmp_path: Path
) -> None:
    counts = [argument for split, count in COUNTS.items() for argument in (f"--{split}", str(count))]
    command = [sys.executable, "-m", "training.embedded_data", str(tmp_path), *counts, "--seed", "3"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | surroundings, capture_output=True, text=True, check=True
    )
    assert result.stdout.count("\n") == 1 and str(tmp_path) in result.stdout
    assert read_all(tmp_path) == read_all(directory)
