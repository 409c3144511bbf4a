"""The benchmarks at tiny size: what they record, not how fast anything is."""

import json

import pytest
import torch
from conftest import tiny_model

from benchmarks import decoding
from training.embedded_data import write_embedded_data
from training.tokenization import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text in `test.en` and `test.de`, and a tokenizer for it in `model`."""
    folder = tmp_path_factory.mktemp("data")
    write_embedded_data(folder, train=200, validation=8, test=8)
    texts = [(folder / f"train.{side}").read_text().splitlines() for side in ("en", "de")]
    save_tokenizer(train_tokenizer(texts, vocab_size=250, lowercase=True), folder / "model")
    return folder


def run(folder, output, reference, **options) -> dict:
    options |= {"source": folder / "test.en", "reference": folder / reference, "output": output}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    decoding.main([str(folder / "model"), *flags])
    return json.loads(output.read_text())


@pytest.mark.slow
def test_decoding_is_measured_for_every_system(folder, tmp_path, capsys):
    special = {"vocab_size": 250, "pad_token_id": 249, "eos_token_id": 0}
    tiny_model(max_position_embeddings=256, **special).save_pretrained(folder / "model")
    output = tmp_path / "results" / "decoding.json"
    threads = torch.get_num_threads()
    results = run(folder, output, "test.de", sentences=6, batch_size=4, rounds=2, threads=threads)

    recorded = output.read_text()
    assert list(output.parent.iterdir()) == [output] and str(tmp_path) not in recorded and str(folder) not in recorded
    assert results["checkpoint"] == "model" and results["source"] == "test.en" and results["reference"] == "test.de"
    assert (results["sentences"], results["batch_size"], results["rounds"]) == (6, 4, 2)
    assert results["threads"] == threads
    assert {"torch", "transformers", "ctranslate2", "sacrebleu"} < results["versions"].keys()

    measurements = results["measurements"]
    assert [entry["beams"] for entry in measurements] == [1] * 4 + [5] * 4
    assert [entry["dtype"] for entry in measurements[:3]] == ["float32"] * 3
    assert measurements[3]["dtype"].startswith("int8")
    for beams in (1, 5):
        same = [entry for entry in measurements if entry["beams"] == beams and entry["dtype"] == "float32"]
        assert len({(entry["target_tokens"], entry["bleu"]) for entry in same}) == 1, "all three translate the same"
    for entry in measurements:
        assert len(entry["seconds"]) == 2 and "case:lc" in entry["bleu_signature"]
        speed = entry["tokens_per_second"]
        assert speed["min"] == pytest.approx(entry["target_tokens"] / max(entry["seconds"]))
        assert speed["min"] <= speed["median"] <= speed["max"]
        assert entry["sentences_per_second"]["max"] == pytest.approx(6 / min(entry["seconds"]))
    assert decoding.table(results) in capsys.readouterr().out


def test_translations_are_scored_in_the_order_of_the_file(folder, tmp_path, monkeypatch):
    copy = {("copy", "int64"): lambda batch, beams: batch}
    monkeypatch.setattr(decoding, "load_systems", lambda *arguments: copy)
    results = run(folder, tmp_path / "decoding.json", "test.en", batch_size=3)
    assert results["sentences"] == 8
    assert [entry["bleu"] for entry in results["measurements"]] == [pytest.approx(100)] * 2


def test_the_table_shows_median_and_spread():
    rate = {"median": 1234.5, "min": 1000.0, "max": 2000.0}
    entry = {"system": "Marian", "dtype": "int8", "beams": 5, "tokens_per_second": rate, "sentences_per_second": rate}
    results = {"checkpoint": "run", "source": "test.en", "sentences": 1000, "batch_size": 32, "threads": 1}
    results |= {"rounds": 3, "versions": {"torch": "2.13"}}
    entry |= {"bleu": 30.125, "bleu_signature": "nrefs:1|x"}
    text = decoding.table(results | {"measurements": [entry]})
    assert "| Marian | int8 | 5 | 1,234 (1,000–2,000) | 1,234.5 (1,000.0–2,000.0) | 30.12 |" in text
    assert "1,000 sentences of test.en" in text and "torch 2.13" in text and "`nrefs:1|x`" in text


def test_files_of_different_length_are_refused(tmp_path, capsys):
    for name, text in (("a", "one\ntwo\n"), ("b", "eins\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        decoding.main(["model", "--source", str(tmp_path / "a"), "--reference", str(tmp_path / "b")])
    assert "has 2 lines" in capsys.readouterr().err
