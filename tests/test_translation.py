"""`translate`: line for line, by models of any kind, with scores that are log-probabilities."""

import subprocess
import sys
from types import SimpleNamespace

import ctranslate2
import pytest
import torch
from conftest import learn, tiny_model
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

from admin_hf import AdminConfig, AdminForConditionalGeneration, Ensemble, inject, translate
from admin_hf.__main__ import build_parser, main
from training.tokenization import train_tokenizer


PAIRS = {
    "A dog runs.": "Ein Hund läuft.",
    "Two men sit on a bench in the park.": "Zwei Männer sitzen auf einer Bank im Park.",
    "A girl reads a book.": "Ein Mädchen liest ein Buch.",
    "The cat sleeps.": "Die Katze schläft.",
    "A man in a red hat plays the guitar on a street.": "Ein Mann mit rotem Hut spielt Gitarre auf einer Straße.",
    "Children play football on the beach.": "Kinder spielen Fußball am Strand.",
}
SOURCES = list(PAIRS)
POSITIONS = 64


def new_model(tokenizer, seed, **changes) -> AdminForConditionalGeneration:
    """A model that knows the pairs by heart, with its ω anywhere."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": POSITIONS}
    sizes |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    torch.manual_seed(seed)
    model = AdminForConditionalGeneration(AdminConfig.for_tokenizer(tokenizer, **sizes | changes))
    for name, parameter in model.named_parameters():
        if name.endswith(".omega"):
            parameter.data.uniform_(0.5, 2)
    model.set_profiled(True)
    batch = tokenizer(SOURCES, padding=True, return_tensors="pt")
    labels = tokenizer(text_target=list(PAIRS.values()), padding=True, return_tensors="pt")
    ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    return learn(model, {**batch, "labels": ids}, updates=80).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with ω, its tokenizer, and the folders of all that it becomes."""
    folder = tmp_path_factory.mktemp("translation")
    tokenizer = train_tokenizer([[*PAIRS, *PAIRS.values()]], vocab_size=90)
    model = new_model(tokenizer, seed=0)
    run, omega = folder / "run", folder / "omega"
    model.save_pretrained(omega)
    model.save_pretrained(run / "vanilla", reparameterize=True)
    for place in (omega, run / "vanilla", folder / "converted"):
        tokenizer.save_pretrained(place)
    converter = ctranslate2.converters.TransformersConverter(str(run / "vanilla"))
    converter.convert(str(folder / "converted"), force=True)
    tokenizer.save_pretrained(folder / "converted")
    folders = {"omega": omega, "vanilla": run / "vanilla", "run": run, "converted": folder / "converted"}
    return SimpleNamespace(model=model, tokenizer=tokenizer, folder=folder, **folders)


@pytest.fixture(scope="module")
def other(made):
    return new_model(made.tokenizer, seed=1, decoder_layers=1)


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["translate", *map(str, arguments)])
    return code, *capsys.readouterr()


def generated(model, tokenizer, line: str, **options) -> str:
    """By stock generate, a line by itself."""
    ids = model.generate(**tokenizer(line, return_tensors="pt"), max_length=POSITIONS, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 4])
def test_every_line_is_translated_as_it_is_by_itself(made, beams):
    lines = ["", SOURCES[1], "\u200b", SOURCES[0], " \t", *SOURCES[:-3:-1], "A dog reads a red book"]
    found = translate(made.model, made.tokenizer, iter(lines), beams=beams, batch_size=2)
    blank = [row for row, line in enumerate(found) if not line]
    assert blank == [0, 2, 4]
    for line, translation in zip(lines, found, strict=True):
        if translation:
            assert translation == generated(made.model, made.tokenizer, line, num_beams=beams)
    assert found[3] == PAIRS[SOURCES[0]]


def test_blank_lines_alone_stay_blank(made):
    assert translate(made.model, made.tokenizer, ["", " "]) == ["", ""]
    assert translate(made.model, made.tokenizer, []) == []
    assert translate(made.model, made.tokenizer, [""], nbest=2) == [[("", 0.0)] * 2]


def test_the_search_is_the_models_own_unless_one_is_asked_for(made, monkeypatch):
    asked, generate = [], AdminForConditionalGeneration.generate

    def watched(model, **inputs):
        asked.append(model.generation_config)
        return generate(model, **inputs)

    monkeypatch.setattr(AdminForConditionalGeneration, "generate", watched)
    monkeypatch.setattr(made.model.generation_config, "num_beams", None)
    translate(made.model, made.tokenizer, SOURCES[:1])
    monkeypatch.setattr(made.model.generation_config, "num_beams", 3)
    translate(made.model, made.tokenizer, SOURCES[:1])
    translate(made.model, made.tokenizer, SOURCES[:1], nbest=7)
    translate(made.model, made.tokenizer, SOURCES[:1], beams=2, max_length=9)
    assert [settings.num_beams for settings in asked] == [5, 3, 7, 2]
    assert [settings.max_length for settings in asked] == [POSITIONS, POSITIONS, POSITIONS, 9]


def test_the_model_is_left_as_it_was(made):
    settings = made.model.generation_config
    made.model.train()
    made.model.model.decoder.eval()
    translate(made.model, made.tokenizer, SOURCES[:2], nbest=2)
    assert made.model.training and made.model.model.encoder.training and not made.model.model.decoder.training
    assert made.model.generation_config is settings and settings.num_return_sequences is None
    made.model.eval()


def test_special_tokens_in_lines_are_text(made, caplog):
    with caplog.at_level("WARNING", logger="transformers"):
        found = translate(made.model, made.tokenizer, [SOURCES[0], "A dog runs.</s> <pad> cat"], beams=1)
    ids = made.tokenizer("A dog runs.</s> <pad> cat", split_special_tokens=True)["input_ids"]
    assert ids.count(made.tokenizer.eos_token_id) == 1 and made.tokenizer.pad_token_id not in ids
    expected = made.model.generate(torch.tensor([ids]), num_beams=1, max_length=POSITIONS)
    assert found[1] == made.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert "Some lines (2) contain the name of a control token" in caplog.text


def test_long_lines_are_cut_and_said(made, caplog):
    long = " ".join(["dog"] * POSITIONS)
    with caplog.at_level("WARNING", logger="transformers"):
        found = translate(made.model, made.tokenizer, [SOURCES[0], long, "", long], beams=1)
    assert "Some lines (2, 4) are longer than the 64 tokens that the model takes, and are cut." in caplog.text
    ids = made.tokenizer(long)["input_ids"]
    expected = made.model.generate(torch.tensor([[*ids[: POSITIONS - 1], ids[-1]]]), num_beams=1, max_length=POSITIONS)
    assert found[1] == found[3] == made.tokenizer.decode(expected[0], skip_special_tokens=True)


def test_translations_that_are_cut_are_said(made, caplog):
    with caplog.at_level("WARNING", logger="transformers"):
        translate(made.model, made.tokenizer, [SOURCES[0], SOURCES[4], SOURCES[4]], max_length=20, batch_size=1)
    whole = len(made.tokenizer(PAIRS[SOURCES[0]])["input_ids"])
    assert whole < 20 < len(made.tokenizer(PAIRS[SOURCES[4]])["input_ids"])
    text = "Some lines (2, 3) have a translation that is cut at 20 tokens, see max_length"
    assert text in caplog.text, "once for all batches"


def test_a_translation_begins_with_the_prefix(made):
    for model in (made.model, ctranslate2.Translator(str(made.converted))):
        found = translate(model, made.tokenizer, SOURCES, prefix="Die Katze ")
        assert all(line.startswith("Die Katze") for line in found) and len(set(found)) > 1
        assert found[3] == PAIRS[SOURCES[3]]


def test_a_token_that_the_model_forces_comes_before_the_prefix(made, monkeypatch):
    (cat,) = made.tokenizer.convert_tokens_to_ids(["K"])
    monkeypatch.setattr(made.model.generation_config, "forced_bos_token_id", cat)
    assert translate(made.model, made.tokenizer, SOURCES[:1], prefix="atze")[0].startswith("K")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams is 0; it must be at least 1"),
        ({"beams": 2, "nbest": 3}, "nbest is 3, more than the 2 beams"),
        ({"prefix": "Ж"}, "'Ж' has a character that the tokenizer does not know"),
        ({"prefix": "Die Katze", "max_length": 4}, "may have 4 tokens, which start and prefix already fill"),
    ],
)
def test_options_that_cannot_be_used_are_refused(made, options, message):
    with pytest.raises(ValueError, match=message):
        translate(made.model, made.tokenizer, SOURCES, **options)


def test_a_setting_of_the_model_that_is_no_number_is_named(made, monkeypatch):
    monkeypatch.setattr(made.model.generation_config, "num_beams", "five")
    with pytest.raises(
        ValueError, match="generation_config.json of the model has num_beams 'five'; expected a number"
    ):
        translate(made.model, made.tokenizer, SOURCES)


def test_one_text_is_no_list_of_lines(made):
    with pytest.raises(ValueError, match="expected a list of lines"):
        translate(made.model, made.tokenizer, "A dog runs.")


# --- scores ---------------------------------------------------------------------------------------


def log_probability(model, tokenizer, source: str, target: str, prefix: str = "") -> tuple[float, int]:
    """From the loss, which the model has for training, of all tokens without those of the prefix, and their number."""
    batch = tokenizer(source, return_tensors="pt")
    labels = torch.tensor([tokenizer(text_target=target)["input_ids"]])
    forced = len(tokenizer(text_target=prefix, add_special_tokens=False)["input_ids"]) if prefix else 0
    with torch.no_grad():
        start = torch.tensor([[model.config.decoder_start_token_id]])
        logits = model(**batch, decoder_input_ids=torch.cat([start, labels[:, :-1]], 1)).logits
    loss = torch.nn.functional.cross_entropy(logits[0, forced:], labels[0, forced:], reduction="sum")
    return -loss.item(), labels.shape[1] - forced


@pytest.mark.parametrize("kind", ["omega", "converted"])
@pytest.mark.parametrize("prefix", ["", "Ein Mann"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 0.6])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_score_is_the_log_probability_by_length(made, kind, prefix, penalty, beams):
    model = made.model if kind == "omega" else ctranslate2.Translator(str(made.converted))
    options = {"prefix": prefix, "length_penalty": penalty, "beams": beams, "max_length": POSITIONS}
    found = translate(model, made.tokenizer, SOURCES, nbest=beams, **options)
    compared = 0
    for source, translations in zip(SOURCES, found, strict=True):
        assert len(translations) == beams and translations == sorted(translations, key=lambda t: -t.score)
        best = translations[0]
        if best.text == PAIRS[source]:  # of others, the tokens may be others than the tokenizer's
            total, tokens = log_probability(made.model, made.tokenizer, source, best.text, prefix)
            assert best.score == pytest.approx(total / tokens**penalty, abs=2e-5)
            compared += 1
    assert compared >= (1 if prefix else 5)
    if kind == "omega" or not prefix:  # CTranslate2 counts the prefix when it ranks
        assert [best.text for best, *_ in found] == translate(model, made.tokenizer, SOURCES, **options)


def test_scores_are_the_same_for_transformers_and_ctranslate2(made, monkeypatch):
    """Of translations that are cut as well, if both searches end alike."""
    models = [made.model, AutoModelForSeq2SeqLM.from_pretrained(made.vanilla)]
    for model in models:
        monkeypatch.setattr(model.generation_config, "early_stopping", True)
        monkeypatch.setattr(model.generation_config, "forced_eos_token_id", made.tokenizer.eos_token_id)  # not heeded
    models.append(ctranslate2.Translator(str(made.converted)))
    of_models = [translate(model, made.tokenizer, SOURCES, nbest=2, beams=4, max_length=12) for model in models]
    for found in zip(*of_models, strict=True):  # of a line
        for omega, vanilla, converted in zip(*found, strict=True):
            assert omega.text == vanilla.text == converted.text
            assert omega.score == pytest.approx(vanilla.score, abs=2e-5)
            assert omega.score == pytest.approx(converted.score, abs=2e-5)


# --- an ensemble ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 4])
def test_an_ensemble_of_a_model_with_itself_is_the_model(made, beams):
    lines = [*SOURCES, "A girl sleeps on a bench."]
    options = {"beams": beams, "nbest": beams}
    alone = translate(made.model, made.tokenizer, lines, **options)
    together = translate(Ensemble([made.model, made.model]), made.tokenizer, lines, **options)
    for one, two in zip(alone, together, strict=True):
        assert [t.text for t in one] == [t.text for t in two]
        assert [t.score for t in one] == pytest.approx([t.score for t in two], abs=1e-5)


def test_an_ensemble_has_the_mean_of_the_probabilities(made, other):
    batch = made.tokenizer(SOURCES, padding=True, return_tensors="pt")
    decoder_input_ids = torch.randint(2, 80, (len(SOURCES), 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both, one, two = (
            model(**batch, decoder_input_ids=decoder_input_ids).logits
            for model in (Ensemble([made.model, other]), made.model, other)
        )
    torch.testing.assert_close(both.exp(), (one.softmax(-1) + two.softmax(-1)) / 2)


def test_an_ensemble_chooses_each_token_by_the_mean(made, other):
    """Greedily, without caches: every step looks at all tokens again."""
    ensemble, tokenizer = Ensemble([made.model, other]), made.tokenizer
    for line in ("A girl sleeps on a bench.", "Two dogs play the guitar."):
        ids, source = [made.model.config.decoder_start_token_id], tokenizer(line, return_tensors="pt")
        while ids[-1] != tokenizer.eos_token_id and len(ids) < POSITIONS:
            with torch.no_grad():
                steps = [m(**source, decoder_input_ids=torch.tensor([ids])).logits[0, -1] for m in (made.model, other)]
            ids.append(int(sum(step.softmax(-1) for step in steps).argmax()))
        assert translate(ensemble, tokenizer, [line], beams=1) == [tokenizer.decode(ids, skip_special_tokens=True)]


def test_beams_of_an_ensemble_find_the_same_without_caches(made, other):
    ensemble = Ensemble([made.model, other])
    lines = [*SOURCES, "A girl sleeps on a bench."]
    cached = translate(ensemble, made.tokenizer, lines, beams=4)
    ensemble.generation_config.use_cache = False
    assert translate(ensemble, made.tokenizer, lines, beams=4) == cached


def test_models_of_several_vocabularies_are_no_ensemble(made):
    with pytest.raises(ValueError, match="vocab_size of the first is 90 and of number 2 50"):
        Ensemble([made.model, tiny_model()])


def test_the_command_names_the_model_of_another_vocabulary(made, tmp_path, capsys):
    tokenizer = train_tokenizer([[*PAIRS, *PAIRS.values(), "quite different words"]], vocab_size=90)
    made.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = command(capsys, made.omega, "--ensemble", tmp_path)
    assert code == 2 and f"{tmp_path} has another vocabulary than {made.omega}" in err
    code, _, err = command(capsys, made.omega, "--ensemble", made.converted)
    assert code == 2 and "CTranslate2, which has no ensembles" in err


def test_the_command_translates_with_an_ensemble(made, other, tmp_path, capsys):
    other.save_pretrained(tmp_path / "other")
    made.tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "in").write_text("A girl sleeps on a bench.\nTwo dogs play the guitar.\n")
    code, out, _ = command(capsys, made.omega, "--ensemble", tmp_path / "other", tmp_path / "in")
    lines = ["A girl sleeps on a bench.", "Two dogs play the guitar."]
    assert code == 0 and out.splitlines() == translate(Ensemble([made.model, other]), made.tokenizer, lines)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["omega", "vanilla", "run", "converted"])
def test_every_form_of_a_model_translates_alike(made, kind, tmp_path, capsys):
    (tmp_path / "in").write_text("\n".join(SOURCES) + "\n")
    code, out, err = command(capsys, getattr(made, kind), tmp_path / "in", "--batch_size", 4)
    assert (code, out.splitlines(), err) == (0, list(PAIRS.values()), "")


def test_a_converted_model_takes_settings_and_limits_from_where_its_tokenizer_is(made, tmp_path, capsys, caplog):
    bare = tmp_path / "bare"
    ctranslate2.converters.TransformersConverter(str(made.vanilla)).convert(str(bare))
    (tmp_path / "in").write_text("dog " * POSITIONS)
    code, _, err = command(capsys, bare, tmp_path / "in")
    assert code == 2 and "bare has no tokenizer that can be loaded" in err
    with caplog.at_level("WARNING", logger="transformers"):
        code, out, _ = command(capsys, bare, "--tokenizer", made.vanilla, tmp_path / "in")
    assert code == 0 and out.count("\n") == 1 and "longer than the 64 tokens" in caplog.text
    made.tokenizer.save_pretrained(tmp_path / "alone")  # which says nothing of positions
    code, _, err = command(capsys, bare, "--tokenizer", tmp_path / "alone", tmp_path / "in")
    assert code == 2 and "name the model that it was converted from by --tokenizer" in err and err.count("\n") == 1
    tokenizer = train_tokenizer([[*PAIRS, *PAIRS.values(), "quite different words"]], vocab_size=90)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code, _, err = command(capsys, bare, "--tokenizer", tmp_path / "tokenizer", tmp_path / "in")
    assert code == 2 and "bare was not made for this tokenizer" in err


def test_bytes_are_read_as_the_lines_that_they_are(made, tmp_path, capsys):
    text = "\ufeffA dog runs.\r\n\r\nThe cat\u2028 sleeps.\n\u200b\nA girl\x85reads\x0b a book."
    (tmp_path / "a").write_bytes(text.encode())
    (tmp_path / "b").write_bytes("\ufeffThe cat sleeps.\n".encode())
    code, out, _ = command(capsys, made.omega, tmp_path / "a", tmp_path / "b")
    lines = out.split("\n")
    assert code == 0 and len(lines) == 7 and lines[-1] == ""
    assert lines[0] == PAIRS["A dog runs."] and lines[1] == lines[3] == ""
    assert lines[2] == lines[5] == PAIRS["The cat sleeps."] and lines[4] == PAIRS["A girl reads a book."]


def test_n_best_has_a_row_for_each_translation(made, tmp_path, capsys):
    (tmp_path / "in").write_text(f"{SOURCES[0]}\n\n{SOURCES[1]}\n")
    code, out, _ = command(capsys, made.omega, tmp_path / "in", "--nbest", 2, "--beams", 3)
    rows = [row.split("\t") for row in out.splitlines()]
    assert code == 0 and [row[0] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert [row[2] for row in rows[::2]] == [PAIRS[SOURCES[0]], "", PAIRS[SOURCES[1]]]
    (expected,) = translate(made.model, made.tokenizer, SOURCES[:1], nbest=2, beams=3)
    assert [float(row[1]) for row in rows[:2]] == pytest.approx([t.score for t in expected], abs=1e-5)


def test_what_is_no_text_is_refused_before_anything_is_written(made, tmp_path, capsys):
    (tmp_path / "in").write_bytes(b"A dog runs.\nA d\xf6g runs.\n")
    (tmp_path / "out").write_text("before")
    code, out, err = command(capsys, made.omega, tmp_path / "in", "--output", tmp_path / "out")
    assert code == 2 and out == "" and f"{tmp_path / 'in'}, line 2, is not UTF-8 text" in err
    assert (tmp_path / "out").read_text() == "before"
    for file, message in ((tmp_path / "none", "There is no file"), (tmp_path, "is a folder")):
        code, _, err = command(capsys, made.omega, file)
        assert code == 2 and message in err
    code, _, err = command(capsys, made.omega, tmp_path / "in", "--output", tmp_path)
    assert code == 2 and "is not a file" in err


def test_the_output_is_written_whole(made, tmp_path, capsys):
    (tmp_path / "in").write_text(f"{SOURCES[0]}\n\n")
    code, out, _ = command(capsys, made.omega, "--output", tmp_path / "new" / "out", tmp_path / "in")
    assert code == 0 and out == "" and (tmp_path / "new" / "out").read_text() == f"{PAIRS[SOURCES[0]]}\n\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_files_may_stand_anywhere_behind_the_model():
    for line in ("M a b --beams 2", "M --beams 2 a b", "--beams 2 M a b", "M a --beams 2 b"):
        arguments = build_parser().parse_args(["translate", *line.split()])
        assert (arguments.model, arguments.files, arguments.beams) == ("M", ["a", "b"], 2)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["translate", "M", "--bemas", "2"])


def test_models_that_do_not_translate_are_refused(made, tmp_path, capsys):
    run = tmp_path / "run"
    made.model.save_pretrained(run / "checkpoint-10")
    assert "name one, such as" in command(capsys, run)[2]
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 90}
    bart = inject(BartForConditionalGeneration(BartConfig(**sizes, **heads)))
    bart.save_pretrained(tmp_path / "bart")
    made.tokenizer.save_pretrained(tmp_path / "bart")
    code, _, err = command(capsys, tmp_path / "bart")
    assert code == 2 and f"{tmp_path / 'bart'} has an ω" in err and err.count("\n") == 1
    config = made.vanilla / "config.json"
    (tmp_path / "deep").mkdir()
    for path in made.vanilla.iterdir():
        (tmp_path / "deep" / path.name).write_bytes(path.read_bytes())
    deeper = config.read_text().replace('"encoder_layers": 2', '"encoder_layers": 3')
    (tmp_path / "deep" / "config.json").write_text(deeper)
    assert "deep lacks model.encoder.layers.2" in command(capsys, tmp_path / "deep")[2]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    made.tokenizer.save_pretrained(tmp_path)
    assert "'bert' model, which does not translate" in command(capsys, tmp_path)[2]
    assert "no int8 here" in command(capsys, made.omega, "--dtype", "int8")[2]


@pytest.mark.slow
def test_standard_input_and_a_reader_that_has_enough(made):
    """As in `… | head -1`, in a process of its own."""
    command = [sys.executable, "-m", "admin_hf", "translate", made.omega, "--batch_size", "1", "--beams", "1"]
    lines = SOURCES * 20
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, encoding="utf-8") as process:
        process.stdin.write("\n".join(lines))
        process.stdin.close()
        assert process.stdout.readline() == f"{PAIRS[SOURCES[0]]}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
