"""Checkpoints of fairseq and Transformer-Clinic compute here what they computed there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ctranslate2
import pytest
import torch
from fairseq_model import EOS, OTHER_WORDS, SYSTEMS, UNK, WIDTH, WORDS, logits, options, save, weights
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel

from admin_hf import AdminForConditionalGeneration, reparameterize
from admin_hf.__main__ import main
from admin_hf.fairseq import convert, read_checkpoint, read_codes, read_dictionary
from admin_hf.fairseq.conversion import LACKING_BIAS


SHARED = Path(__file__).parents[2] / "shared" / "fairseq"

SOURCE = ["zwei Bo@@ ot am See .", "ru@@ hig", "ein Bo@@ ot und ein See am See und zwei See ."]
TARGET = ["am See ein Bo@@ ot .", "und zwei und zwei .", "."]
OTHER_SOURCE = ["two Bo@@ at by the lake .", "calm", "a cat and a Bo@@ at sat and sat ."]

SHARING = {
    "all": {},
    "output": {"share_all_embeddings": False},
    "nothing": {"share_all_embeddings": False, "share_decoder_input_output_embed": False},
}


def fairseq_ids(words: list[str], line: str) -> list[int]:
    return [words.index(word) + 4 if word in words else UNK for word in line.split()] + [EOS]


def entries(words: list[str]) -> list[str]:
    return ["<s>", "<pad>", "</s>", "<unk>", *words]


def write_dictionary(path: Path, words: list[str]) -> str:
    path.write_text("".join(f"{word} {100 - number}\n" for number, word in enumerate(words)), encoding="utf-8")
    return str(path)


def converted(tmp_path, args, model=None, source=WORDS, target=WORDS, **how):
    path = save(tmp_path / "checkpoint.pt", args, weights(args, source, target) if model is None else model, **how)
    return convert(read_checkpoint(path), entries(source), entries(target))


@torch.no_grad()
def found_logits(model, tokenizer, sources, targets) -> list[torch.Tensor]:
    """Of each target, as one batch with padding."""
    batch = tokenizer(sources, padding=True, return_tensors="pt")
    labels = tokenizer(text_target=targets, padding=True, return_tensors="pt")
    ids = labels["input_ids"].masked_fill(labels["attention_mask"].eq(0), -100)
    return [z[m.bool()] for z, m in zip(model(**batch, labels=ids).logits, labels["attention_mask"], strict=True)]


def assert_same_logits(model, tokenizer, args, w, source=WORDS, target=WORDS, sources=SOURCE, tolerance=1e-12):
    """Of all entries of the target's dictionary but `<pad>`."""
    kept = [i for i, name in enumerate(entries(target)) if name != "<pad>"]
    places = tokenizer.convert_tokens_to_ids([entries(target)[i] for i in kept])
    assert len(set(places)) == len(kept)
    for s, t, found in zip(sources, TARGET, found_logits(model, tokenizer, sources, TARGET), strict=True):
        expected = logits(args, w, fairseq_ids(source, s), fairseq_ids(target, t))[:, kept]
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[:, places], expected.to(found), rtol=0, atol=tolerance * scale)


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("system", SYSTEMS)
def test_logits_are_fairseqs(tmp_path, system, sharing):
    args = options(system, **SHARING[sharing])
    w = weights(args)
    model, tokenizer = converted(tmp_path, args, w)
    assert model.config.encoder_residual == model.config.decoder_residual == system
    assert model.is_profiled == (system == "admin")
    assert_same_logits(model, tokenizer, args, w)
    if system == "rezero":
        with pytest.raises(ValueError, match="can be folded"):
            reparameterize(model)
    else:  # DeepNorm's α of a first sub-layer is exact but for LayerNorm's ε
        assert_same_logits(
            reparameterize(model), tokenizer, args, w, tolerance=1e-4 if system == "deepnorm" else 1e-11
        )


def test_only_padding_is_never_predicted(tmp_path):
    model, tokenizer = converted(tmp_path, options())
    banned = (model.final_logits_bias[0] < -1).nonzero().flatten().tolist()
    assert banned == [tokenizer.pad_token_id] == [len(tokenizer) - 1]
    assert not model.get_input_embeddings().weight[tokenizer.pad_token_id].any()


def test_embeddings_stay_shared_without_omega(tmp_path):
    for system, is_shared in (("post_ln", True), ("admin", False)):
        model, _ = converted(tmp_path, options(system))
        assert model.config.share_encoder_decoder_embeddings == is_shared and model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_separate_dictionaries_become_one_vocabulary(tmp_path):
    args = options(**SHARING["output"])
    w = weights(args, OTHER_WORDS, WORDS)
    model, tokenizer = converted(tmp_path, args, w, OTHER_WORDS, WORDS)
    assert len(tokenizer) == len({*entries(OTHER_WORDS), *entries(WORDS)})
    sources = [f"{line} ein kalm" for line in OTHER_SOURCE]  # a word of the target alone, and of none: <unk>
    assert tokenizer.unk_token_id not in tokenizer(sources[0])["input_ids"][:-2]
    assert_same_logits(model, tokenizer, args, w, OTHER_WORDS, WORDS, sources)
    # Words of the source alone have no share of the probability, but can be learnt
    alone = tokenizer.convert_tokens_to_ids([word for word in OTHER_WORDS if word not in WORDS])
    found = torch.cat(found_logits(model, tokenizer, sources, TARGET))
    unknown = found[:, tokenizer.unk_token_id, None] + LACKING_BIAS
    torch.testing.assert_close(found[:, alone], unknown.expand(-1, len(alone)))
    assert float(found.softmax(-1)[:, alone].sum(-1).max()) < 1e-10


def test_a_later_fairseq_is_read(tmp_path):
    """Separate projections, an output projection, `cfg` in place of `args`, learnt positions, unscaled embeddings."""
    changes = {"no_scale_embedding": True, "activation_fn": "gelu", "encoder_learned_pos": True}
    args = options("pre_ln", decoder_learned_pos=True, label_smoothing=None, **changes)
    w = {}
    for name, value in weights(args).items():
        prefix, _, last = name.rpartition(".")
        if last.startswith("in_proj"):
            w |= {f"{prefix}.{p}_proj.{last[8:]}": x for p, x in zip("qkv", value.chunk(3), strict=True)}
        else:
            w[name] = value
    for stack in ("encoder", "decoder"):
        w[f"{stack}.embed_positions.weight"] = torch.randn(42, WIDTH, dtype=torch.float64)
    w["decoder.output_projection.weight"] = w["decoder.embed_tokens.weight"].clone()
    state = {"args": None, "cfg": {"model": args, "criterion": {"label_smoothing": 0.2}}, "model": w}
    torch.save(state, tmp_path / "later.pt")
    model, tokenizer = convert(read_checkpoint(tmp_path / "later.pt"), entries(WORDS), entries(WORDS))
    assert_same_logits(model, tokenizer, args, w)


def test_it_is_trained_on_with_its_own_settings(tmp_path):
    model, tokenizer = converted(tmp_path, options(relu_dropout=0.3, activation_fn="gelu_accurate"))
    config = model.config
    assert (config.dropout, config.activation_dropout, config.label_smoothing) == (0.1, 0.3, 0.1)
    assert config.activation_function == "gelu_new"
    assert config.max_position_embeddings == tokenizer.model_max_length == model.generation_config.max_length == 40
    batch = tokenizer(SOURCE, text_target=TARGET, padding=True, return_tensors="pt")
    batch["labels"] = batch["labels"].masked_fill(batch["labels"].eq(tokenizer.pad_token_id), -100)
    model.float().train()(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- the command ----------------------------------------------------------------------------------


def imported(tmp_path, args, *flags, source=WORDS, target=WORDS):
    save(tmp_path / "checkpoint.pt", args, {name: x.float() for name, x in weights(args, source, target).items()})
    command = ["import", str(tmp_path / "checkpoint.pt"), str(tmp_path / "out"), "--dict"]
    command.append(write_dictionary(tmp_path / "dict.en.txt", source))
    if source != target:
        command.append(write_dictionary(tmp_path / "dict.de.txt", target))
    return main([*command, *flags])


@pytest.mark.parametrize("sharing", ["all", "nothing"])
@pytest.mark.parametrize("system", ["admin", "pre_ln"])
def test_stock_transformers_and_ctranslate2_score_as_fairseq(tmp_path, system, sharing, capsys):
    args = options(system, **SHARING[sharing])
    assert imported(tmp_path, args, "--vanilla") == 0
    assert "optimiser" in capsys.readouterr().out
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    w = {name: x.float().double() for name, x in weights(args).items()}
    assert_same_logits(model, tokenizer, args, w, tolerance=1e-5)
    ctranslate2.converters.TransformersConverter(str(tmp_path / "out")).convert(str(tmp_path / "ct2"))
    sources = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(SOURCE)["input_ids"]]
    scores = ctranslate2.Translator(str(tmp_path / "ct2")).score_batch(sources, [line.split() for line in TARGET])
    for s, t, found in zip(SOURCE, TARGET, scores, strict=True):
        ids = fairseq_ids(WORDS, t)
        z = logits(args, w, fairseq_ids(WORDS, s), ids)
        z[:, 1] = -torch.inf  # <pad>
        expected = z.log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(found.log_probs).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sharing", ["output", "nothing"])
def test_the_admin_folder_is_loaded_and_exported(tmp_path, sharing, capsys):
    args = options(**SHARING[sharing])
    assert imported(tmp_path, args, source=OTHER_WORDS) == 0
    printed = capsys.readouterr().out
    assert "2 encoder layers (admin) and 3 decoder layers (admin)" in printed and "loses them" in printed
    model = AdminForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    w = {name: x.float().double() for name, x in weights(args, OTHER_WORDS, WORDS).items()}
    assert_same_logits(model, tokenizer, args, w, OTHER_WORDS, WORDS, OTHER_SOURCE, tolerance=1e-5)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "vanilla")]) == 0
    stock = MarianMTModel.from_pretrained(tmp_path / "vanilla").eval()
    assert_same_logits(stock, tokenizer, args, w, OTHER_WORDS, WORDS, OTHER_SOURCE, tolerance=1e-5)
    assert imported(tmp_path, args, source=OTHER_WORDS) == 2
    assert "already contains a model" in capsys.readouterr().err


# --- the tokenizer --------------------------------------------------------------------------------

MERGES = [
    ("B", "o"),
    ("o", "t</w>"),
    ("S", "e"),
    ("Se", "e</w>"),
    ("u", "n"),
    ("un", "d</w>"),
    ("r", "u"),
    ("a", "m</w>"),
]


def test_text_is_split_by_the_codes_as_by_subword_nmt(tmp_path):
    codes = tmp_path / "code"
    codes.write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in MERGES))
    words = ["Bo@@", "ot", "See", "und", "ru@@", "h@@", "i@@", "g", ".", "n@@", "n"]
    args = options()
    w = weights(args, words, words)
    save(tmp_path / "checkpoint.pt", args, w)
    merges, dictionary = read_codes(codes), entries(words)
    model, tokenizer = convert(read_checkpoint(tmp_path / "checkpoint.pt"), dictionary, dictionary, merges)
    line, split = "Boot  und See ruhig . nn am", "Bo@@ ot und See ru@@ h@@ i@@ g . n@@ n am"
    ids = tokenizer(line)["input_ids"]
    expected = fairseq_ids(words, split)
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["Bo", "ot</w>"] and len(ids) == len(expected)
    assert tokenizer.decode(ids[:-2]) == "Boot und See ruhig . nn"
    # "am" is made by the codes, and in no dictionary: its embedding is that of <unk>
    assert ids[-2] != tokenizer.unk_token_id
    with torch.no_grad():
        z = model(**tokenizer(line, return_tensors="pt"), labels=torch.tensor([ids[:1]])).logits[0, 0]
    known = tokenizer.convert_tokens_to_ids(["</s>", "<unk>", "Bo", "g</w>"])
    reference = logits(args, w, expected, expected[:1])[0, [2, 3, 4, 4 + words.index("g")]]
    torch.testing.assert_close(z[known], reference, rtol=0, atol=1e-11)


def test_no_text_acts_as_a_control_token(tmp_path):
    _, tokenizer = converted(tmp_path, options())
    codes = [("B", "o")]
    _, with_codes = convert(read_checkpoint(tmp_path / "checkpoint.pt"), entries(WORDS), entries(WORDS), codes)
    assert tokenizer("</s>x")["input_ids"] == [tokenizer.unk_token_id, tokenizer.eos_token_id]
    assert set(with_codes("</s> <pad>")["input_ids"][:-1]) == {with_codes.unk_token_id}


# --- what is refused ------------------------------------------------------------------------------


def rejected(tmp_path, capsys) -> str:
    """The one sentence for the checkpoint of a folder, of which nothing is written."""
    dictionary = write_dictionary(tmp_path / "dict.txt", WORDS)
    assert main(["import", str(tmp_path / "checkpoint.pt"), str(tmp_path / "out"), "--dict", dictionary]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    assert not (tmp_path / "out").exists()
    return printed.err


class Command:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_file_runs(tmp_path, capsys, legacy):
    args = options()
    args.user = Command(tmp_path / "ran")
    save(tmp_path / "checkpoint.pt", args, weights(args), _use_new_zipfile_serialization=not legacy)
    assert "might run code" in rejected(tmp_path, capsys)
    assert not (tmp_path / "ran").exists()
    args = options()
    save(tmp_path / "checkpoint.pt", args, weights(args), _use_new_zipfile_serialization=not legacy)
    assert read_checkpoint(tmp_path / "checkpoint.pt").options["init_type"] == "adaptive"


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_damaged_files(tmp_path, capsys, kept):
    path = save(tmp_path / "checkpoint.pt", options(), weights(options()))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "truncated, damaged" in rejected(tmp_path, capsys)


STATES = {
    "not a checkpoint of fairseq": {"model": {"a": torch.ones(1)}},
    "it has no weights": {"args": options(), "model": {}},
    "as something other than a tensor": {"args": options(), "model": {"encoder.version": 3}},
    "contains 'huge'": {"args": options(), "model": {"huge": torch.ones(1).expand(10**12)}},
    "contains 'whole'": {"args": options(), "model": {"whole": torch.ones(2, dtype=torch.long)}},
    "contains 'nowhere'": {"args": options(), "model": {"nowhere": torch.ones(2, device="meta")}},
    "weights of 0 encoder layers": {"args": options(), "model": {"encoder.conv.weight": torch.ones(2, 2)}},
}


@pytest.mark.parametrize("message", STATES)
def test_files_of_another_kind(tmp_path, capsys, message):
    torch.save(STATES[message], tmp_path / "checkpoint.pt")
    assert message in rejected(tmp_path, capsys)


OPTIONS = {
    "adaptive-softmax-cutoff": {"adaptive_softmax_cutoff": "10,20"},
    "cross-self-attention": {"cross_self_attention": True},
    "layer-wise-attention": {"layer_wise_attention": True},
    "profiling pass": {"init_type": "adaptive-profiling"},
    "'fixup'; expected one of": {"init_type": "fixup"},
    "expected fairseq's Transformer": {"arch": "levenshtein_transformer"},
    "but its arguments say 7": {"encoder_layers": 7},
    "encoder_attention_heads is 'two'": {"encoder_attention_heads": "two"},
    "do not say decoder_attention_heads": {"decoder_attention_heads": None},
    "divisible by encoder_attention_heads=3": {"encoder_attention_heads": 3},
    "is admin with --encoder-normalize-before": {"encoder_normalize_before": True},
    "positions of the encoder are learnt": {"encoder_learned_pos": True},
    "longest sentence has 1000000000 tokens": {"max_source_positions": 10**9},
    "activation_function='swoosh'": {"activation_fn": "swoosh"},
    "lacks 'lm_head.weight'": {"share_all_embeddings": False, "share_decoder_input_output_embed": False},
}


@pytest.mark.parametrize("message", OPTIONS)
def test_models_that_are_not_converted(tmp_path, capsys, message):
    save(tmp_path / "checkpoint.pt", options(**OPTIONS[message]), weights(options()))
    assert message in rejected(tmp_path, capsys)


def changed(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    w = weights(options()) | ({} if value is None else {name: value})
    if value is None:
        del w[name]
    return w


WEIGHTS = {
    "not converted: model.encoder.layernorm_embedding.weight": (
        "encoder.layernorm_embedding.weight",
        torch.ones(WIDTH),
    ),
    "lacks model.decoder.layers.1.fc1.bias": ("decoder.layers.1.fc1.bias", None),
    "has model.encoder.layers.1.fc2.weight of the shape (3, 4)": ("encoder.layers.1.fc2.weight", torch.ones(3, 4)),
    "NaN or infinite": ("encoder.layers.1.fc2.bias", torch.full((WIDTH,), torch.nan)),
    "too close to zero": ("encoder.layers.0.attention_ratio_change", torch.zeros(WIDTH)),
    "has 12 rows, but": ("encoder.embed_tokens.weight", torch.ones(12, WIDTH)),
    "unequal widths": ("decoder.embed_tokens.weight", torch.ones(14, 12)),
    "embeddings are not shared": ("decoder.embed_tokens.weight", torch.ones(14, WIDTH)),
    "output layer is not": ("decoder.output_projection.weight", torch.ones(14, WIDTH)),
}


@pytest.mark.parametrize("message", WEIGHTS)
def test_weights_that_do_not_fit(tmp_path, capsys, message):
    save(tmp_path / "checkpoint.pt", options(), changed(*WEIGHTS[message]))
    assert message in rejected(tmp_path, capsys)


def test_early_pre_ln_is_refused(tmp_path):
    for stack, version in (("encoder", 1.0), ("decoder", 2.0)):
        args = options("pre_ln")
        with pytest.raises(ValueError, match=f"The {stack} is Pre-LN of an early fairseq"):
            converted(tmp_path, args, weights(args) | {f"{stack}.version": torch.tensor([version])})


def test_dictionaries_and_codes_that_cannot_be_used(tmp_path, capsys):
    files = {
        "word": ("ein", read_dictionary, "line 1, is 'ein'; expected a word and a count"),
        "twice": ("a 1\nb 1\na 1\n", read_dictionary, "line 3, has 'a' a second time"),
        "special": ("<pad> 1\n", read_dictionary, "line 1, has '<pad>' a second time"),
        "old": ("e r\n", read_codes, "expected '#version: 0.2'"),
        "three": ("#version: 0.2\na b c\n", read_codes, "line 2, is 'a b c'; expected two pieces"),
        "empty": ("", read_codes, "contains no codes"),
        "latin": ("#version: 0.2\nä b\n".encode("latin-1"), read_codes, "not text in UTF-8"),
    }
    for name, (content, read, message) in files.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            read(path)
    args = options(**SHARING["output"])
    save(tmp_path / "checkpoint.pt", args, weights(args))
    names = [write_dictionary(tmp_path / name, WORDS) for name in ("dict.de.txt", "dict.en.txt")]
    assert main(["import", str(tmp_path / "checkpoint.pt"), str(tmp_path / "out"), "--dict", *names]) == 2
    assert "name the source's dictionary first" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.pt"), str(tmp_path / "out"), "--dict", names[0]]) == 2
    assert "There is no file" in capsys.readouterr().err


# --- the authors' own checkpoint ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the authors' checkpoint beside the repository, shared/fairseq")
@pytest.mark.parametrize(("flags", "text"), [([], "bpe"), (["--bpe-codes", str(SHARED / "code"), "--vanilla"], "tok")])
def test_the_authors_checkpoint_scores_as_theirs(tmp_path, flags, text):
    command = [sys.executable, "-m", "admin_hf", "import", SHARED / "checkpoint.pt", tmp_path / "out"]
    subprocess.run([*command, "--dict", SHARED / "dict.en.txt", SHARED / "dict.de.txt", *flags], check=True)
    model_class = MarianMTModel if flags else AdminForConditionalGeneration
    model, tokenizer = model_class.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    sides = [(SHARED / f"{text}.test.{side}").read_text(encoding="utf-8").splitlines() for side in ("en", "de")]
    expected = json.loads((SHARED / "expected.json").read_text())["log_probabilities"]
    targets = [tokenizer(text_target=line)["input_ids"] for line in sides[1]]
    for ids, z, values in zip(targets, found_logits(model.eval(), tokenizer, *sides), expected, strict=True):
        log_probabilities = z.double().log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(log_probabilities, torch.tensor(values).double(), rtol=0, atol=1e-5)
    if flags:
        ctranslate2.converters.TransformersConverter(str(tmp_path / "out")).convert(str(tmp_path / "ct2"))
        tokens = [[tokenizer.convert_ids_to_tokens(i) for i in tokenizer(side)["input_ids"]] for side in sides]
        tokens[1] = [line[:-1] for line in tokens[1]]  # CTranslate2 adds </s>
        for found, values in zip(
            ctranslate2.Translator(str(tmp_path / "ct2")).score_batch(*tokens), expected, strict=True
        ):
            torch.testing.assert_close(torch.tensor(found.log_probs), torch.tensor(values), rtol=0, atol=1e-5)
