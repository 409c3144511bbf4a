"""Figures of the analyses, and `python -m admin_hf analyze`."""

import json
import subprocess
import sys

import pytest
from conftest import tiny_config, tiny_model
from test_analysis_inputs import tokenizer

from admin_hf.__main__ import main
from admin_hf.analysis import drawing, gradient_norms, layer_dependency, load_model, random_batch, text_batch
from admin_hf.checkpoints import write_whole


# --- figures --------------------------------------------------------------------------------------


def test_lines_have_labels_caption_and_styles_that_grey_print_tells_apart(tmp_path):
    series = {name: ([1, 2], [k, k]) for k, name in enumerate("abcdefgh")} | {"empty": ([], [])}
    figure = drawing.draw_lines(tmp_path / "new" / "x.png", "Title", "x", "y", series, caption="as expected")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == list("abcdefgh")
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines[:6]}) == 6
    assert len({str(style) for _, style in drawing.STYLES}) == 6
    assert figure.get_supxlabel() == "as expected"
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


def test_the_heat_map_shows_beta(batch):
    result = layer_dependency(tiny_model(encoder_layers=3), batch)
    figure = drawing.draw_dependency(result)
    pixels = figure.axes[0].get_images()[0].get_array()
    assert pixels.shape == (6, 7)
    assert pixels[4].compressed().tolist() == pytest.approx(result.encoder.beta[4])
    assert result.verdict() in " ".join(figure.get_supxlabel().split())


def test_gradients_of_several_models_are_lines_of_one_figure(batch):
    results = {name: gradient_norms(tiny_model(decoder_residual=name), batch) for name in ("admin", "pre_ln")}
    figure = drawing.draw_gradients(results)
    lines = figure.axes[1].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [r.decoder.relative_norms for r in results.values()]
    assert figure.axes[0].get_yscale() == "log"


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def config_folder(tmp_path):
    tiny_config().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_a_newcomer_without_data_gets_figure_numbers_and_verdict(config_folder, tmp_path, capsys):
    assert main(["analyze", "dependency", config_folder, "--output", str(tmp_path / "out"), "--seed", "3"]) == 0
    data = json.loads((tmp_path / "out" / "dependency.json").read_text())
    model = load_model(config_folder, seed=3)
    assert data["encoder"]["beta"] == layer_dependency(model, random_batch(model.config, seed=3)).encoder.beta
    assert data["verdict"] in capsys.readouterr().out and "Fig. 7" in data["expectation"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dependency.json", "dependency.png"]


def test_several_sources_share_the_figure_of_gradients_and_no_other(config_folder, tmp_path):
    tiny_config(encoder_residual="pre_ln").save_pretrained(tmp_path / "other" / "tiny")
    for what in ("gradients", "dependency"):
        sources = [config_folder, str(tmp_path / "other" / "tiny" / "config.json")]
        assert main(["analyze", what, *sources, "--output", str(tmp_path / "out")]) == 0
    labels = [f"{tmp_path.name}-tiny", "other-tiny"]
    assert list(json.loads((tmp_path / "out" / "gradients.json").read_text())) == labels
    names = {"gradients.png", "gradients.json", *(f"dependency-{a}.{b}" for a in labels for b in ("png", "json"))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_text_is_measured_by_the_sources_own_tokenizer(tmp_path):
    words = tokenizer()
    model = tiny_model(vocab_size=len(words))
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    for name, lines in (("a.en", ["a man", "a man walks ."]), ("a.de", ["ein mann", "geht ."])):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    text = ["--text", str(tmp_path / "a.en"), str(tmp_path / "a.de")]
    assert main(["analyze", "gradients", str(tmp_path / "model"), *text, "--output", str(tmp_path / "out")]) == 0
    batch = text_batch(words, ["a man", "a man walks ."], ["ein mann", "geht ."])
    data = json.loads((tmp_path / "out" / "gradients.json").read_text())["model"]
    assert data["decoder"]["largest_norm"] == pytest.approx(gradient_norms(model, batch).decoder.largest_norm)


def test_omega_of_a_run_starts_with_its_profile(run_folder, tmp_path):
    assert main(["analyze", "omega", str(run_folder), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "omega.json").read_text())["updates"] == [0, 90, 100]
    assert (tmp_path / "out" / "omega.png").exists()


@pytest.mark.parametrize("what", ["updates", "output-change"])
def test_the_analyses_of_change_have_a_command(what, run_folder, config_folder, tmp_path):
    arguments = {
        "updates": [str(run_folder)],
        "output-change": [config_folder, "--repeats", "1", "--sublayers", "2", "4", "6"],
    }
    assert main(["analyze", what, *arguments[what], "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{what}.json", f"{what}.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dependency", "./nowhere"], "There is no ./nowhere"),
        (["dependency", "CONFIG", "CONFIG"], "named twice"),
        (["dependency", "CONFIG", "--text", "a", "b"], "has no tokenizer"),
        (["omega", "CONFIG"], "no complete checkpoint"),
        (["omega", "./nowhere"], "There is no folder"),
        (["updates", "CONFIG"], "no complete checkpoint"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_leaves_nothing(arguments, message, config_folder, tmp_path, capsys):
    arguments = [config_folder if argument == "CONFIG" else argument for argument in arguments]
    assert main(["analyze", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [".", "config.json"])
def test_the_folder_one_is_in_is_a_source(source, config_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(config_folder)
    assert main(["analyze", "gradients", source, "--output", str(tmp_path / "out")]) == 0
    assert list(json.loads((tmp_path / "out" / "gradients.json").read_text())) == ["tiny"]
    assert main(["analyze", "gradients", source, config_folder]) == 2  # named twice


@pytest.mark.parametrize("below", [(), ("new", "newer")])
def test_an_output_that_cannot_be_a_folder_is_refused_before_anything_is_measured(
    below, config_folder, tmp_path, capsys
):
    (tmp_path / "out").write_text("mine")
    assert main(["analyze", "dependency", config_folder, "--output", str(tmp_path.joinpath("out", *below))]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path / 'out'} is a file" in printed.err and printed.out == ""
    assert (tmp_path / "out").read_text() == "mine"


def test_a_file_that_cannot_be_replaced_leaves_no_half_behind(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "x.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path, capsys):
    words = tokenizer()
    tiny_model(vocab_size=len(words)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    (tmp_path / "a.en").write_bytes("café\n".encode("latin-1"))
    text = ["--text", str(tmp_path / "a.en"), str(tmp_path / "a.en")]
    assert main(["analyze", "gradients", str(tmp_path), *text, "--output", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'a.en'} is not UTF-8 text" in capsys.readouterr().err


def test_a_missing_matplotlib_is_one_sentence(config_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["analyze", "dependency", config_folder, "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "admin-hf[analysis]" in printed.err and printed.out == ""  # before anything is measured


@pytest.mark.slow
def test_the_other_commands_need_no_matplotlib():
    code = "import sys, admin_hf.__main__, admin_hf.analysis.drawing; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_says_what_the_paper_expects(capsys):
    for what in ("dependency", "gradients", "output-change", "updates", "omega"):
        with pytest.raises(SystemExit):
            main(["analyze", what, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "The paper expects" in text and f"{what}.png" in text
