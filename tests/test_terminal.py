"""What is printed can be shown by a terminal of any encoding, and files are UTF-8 whatever the locale."""

import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from conftest import padded_batch, tiny_model
from tiny_runs import arguments, flags

from admin_hf import ResidualProfile, profile_and_initialize
from admin_hf.terminal import showable, spell_out


ENCODINGS = ("cp1252", "latin-1", "ascii", "cp437", "iso8859-7")
# Programs and pages of help one after another, in one process for the time that imports take
PROGRAMS = """
import contextlib, runpy, sys
def start(name, *argv):
    sys.argv = [name, *argv]
    with contextlib.suppress(SystemExit):
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    print("=== end of", name, *argv[:2], flush=True)
start("training.experiments", "--list", "depth", "--help")
start("admin_hf", "analyze", "--help")
start("benchmarks", "--help")
start("run_translation.py", "--help")
start("run_translation.py", *FLAGS)
start("admin_hf", "report", OUTPUT)
"""


def stream(encoding: str) -> TextIOWrapper:
    return TextIOWrapper(BytesIO(), encoding=encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_text_can_be_shown(encoding):
    text = "".join(map(chr, range(0xD800))) + "".join(map(chr, range(0xE000, 0x11000))) + "𝄞\ud83d"
    shown = showable(text, stream(encoding))
    assert shown.encode(encoding).decode(encoding) == shown
    known = text.encode(encoding, "ignore").decode(encoding)
    assert showable(known, stream(encoding)) == known and len(shown) >= len(text), "nothing is lost"


def test_what_cannot_be_shown_is_spelt_out():
    text = "ω, β₂, Ω: ‖x‖² ≤ 2 → …, für, 語"
    assert showable(text, stream("utf-8")) == text
    assert showable(text, stream("ascii")) == "omega, beta2, Omega: ||x||^2 <= 2 -> ..., f\\xfcr, \\u8a9e"
    assert showable(text, stream("cp1252")) == "omega, beta2, Omega: ||x||² <= 2 -> …, für, \\u8a9e"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_table_of_omega_is_printed_in_any_process(encoding, tmp_path, monkeypatch):
    """Of a script of the user's own, whose streams are left as they are."""
    out = stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    profile_and_initialize(tiny_model(), padded_batch(), tmp_path)
    out.flush()
    printed = out.buffer.getvalue().decode(encoding)
    assert ("ω" if encoding == "iso8859-7" else "omega") in printed
    assert out.errors == "strict"


def test_programs_let_their_streams_spell_out(monkeypatch):
    out = stream("cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    spell_out()
    print("ω für", flush=True)
    assert out.buffer.getvalue().decode("cp1252").strip() == "omega für"


def test_an_ascii_terminal_in_the_c_locale(data, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "test.en").write_text("A naïve “façade” – 語.\nA dog runs.\n", "utf-8")
    (tmp_path / "test.de").write_text("Eine naïve Fassade.\nEin Hund läuft.\n", "utf-8")
    given = flags(
        arguments(data, output, test_file=tmp_path / "test", max_steps=1, do_predict=True, disable_tqdm=None)
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [sys.executable, "-c", f"FLAGS, OUTPUT = {given!a}, {str(output)!a}\n{PROGRAMS}"],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
    )
    printed, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert done.returncode == 0 and "Error" not in errors, errors
    assert printed.count("=== end of") == 6, errors
    assert "omega of the residual connections" in printed and "A na\\xefve" in printed
    assert ResidualProfile.load(output / "residual_profile.json").encoder.omega
    assert len((output / "generated_predictions.txt").read_text("utf-8").splitlines()) == 2
    assert "ω" in (output / "vanilla" / "README.md").read_text("utf-8")
    assert (output / "report.html").exists()
