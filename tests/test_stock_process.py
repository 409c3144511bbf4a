"""The export needs nothing of this project: it is used in processes in which admin_hf cannot be imported."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import learn, tiny_model
from safetensors.torch import load_file, save_file

from admin_hf import AdminForConditionalGeneration, initialize_omega, profile_residuals
from admin_hf.residual import AdminConnection
from training.tokenization import save_tokenizer, train_tokenizer


pytestmark = pytest.mark.slow

VOCAB_SIZE = 100
PAIRS = {
    "Zwei junge Männer sind im Freien.": "Two young men are outside.",
    "Ein Mann klettert.": "A man climbs.",
    "Ein kleines Mädchen klettert in ein Spielhaus.": "A little girl climbs into a playhouse.",
    "Männer, im Haus!": "Men, inside!",
}
# Two more that it has not learnt by heart
SOURCES = [*PAIRS, "Zwei Mädchen sind in ein Freien im Spielhaus.", "Ein Haus, ein Mann, 3 Männer: klein!"]

KINDS = {
    "admin": ("MarianMTModel", "marian"),
    "pre_ln": ("PegasusForConditionalGeneration", "pegasus"),
}
kinds = pytest.mark.parametrize("kind", KINDS)

FORBID_ADMIN_HF = """\
import sys
sys.modules["admin_hf"] = sys.modules["training"] = None
try:
    import admin_hf.modeling_admin
except ImportError:
    pass
else:
    raise AssertionError("admin_hf can be imported")
"""


def run_alone(function, folder) -> str:
    """Call `function(folder)` in a process without this project; return what it wrote to stderr.

    Only the function's own source gets there, so all its imports are inside.
    """
    script = folder / f"{function.__name__}.py"
    source = textwrap.dedent(inspect.getsource(function))
    script.write_text(f"{FORBID_ADMIN_HF}\n{source}\n{function.__name__}(sys.argv[1])\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stderr


# --- what runs there ----------------------------------------------------------------------------------


def load_and_translate(folder):
    """Load the exports as anyone would, and write down what they compute; then try the folder with ω."""
    import json
    from pathlib import Path

    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel

    folder = Path(folder)
    facts, tensors = {}, {}
    sources, targets = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
    for kind in ("admin", "pre_ln"):
        tokenizer = AutoTokenizer.from_pretrained(folder / kind)
        model, info = AutoModelForSeq2SeqLM.from_pretrained(folder / kind, output_loading_info=True)
        batch = tokenizer(sources, padding=True, return_tensors="pt")
        prefixes = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(**batch, decoder_input_ids=prefixes).logits
        beams = {f"beams{n}": {"num_beams": n, "num_return_sequences": n} for n in (1, 4)}
        tokens = {name: model.generate(**batch, **beam, max_new_tokens=30) for name, beam in beams.items()}
        found = {"input_ids": batch["input_ids"], "prefixes": prefixes, "logits": logits, **tokens}
        tensors |= {f"{kind}.{name}": value.contiguous() for name, value in found.items()}
        facts[kind] = {
            "model": [type(model).__name__, model.config.model_type],
            "dtype": str(model.dtype),
            "training": model.training,
            "loading": {name: list(map(str, value)) for name, value in info.items()},
            "texts": {n: tokenizer.batch_decode(t, skip_special_tokens=True) for n, t in tokens.items()},
        }
    facts["refusals"] = {}
    for loader in (AutoConfig, AutoModelForSeq2SeqLM):
        try:
            loader.from_pretrained(folder / "unfolded")
        except ValueError as error:
            facts["refusals"][loader.__name__] = str(error)
    print("--- the folder with ω, forced into stock Marian ---", file=sys.stderr, flush=True)
    _, info = MarianMTModel.from_pretrained(folder / "unfolded", output_loading_info=True)
    facts["forced"] = sorted(info["unexpected_keys"])
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    save_file(tensors, folder / "found.safetensors")


def fine_tune(folder):
    """Train the Marian export on with Transformers' own Trainer, save it, load it again."""
    from pathlib import Path

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )

    folder = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "admin")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "admin")
    swapped = [
        ("Two young men are outside.", "Zwei junge Männer sind im Freien."),
        ("A man climbs.", "Ein Mann klettert."),
        ("Men, inside!", "Männer, im Haus!"),
    ]
    dataset = [dict(tokenizer(source, text_target=target)) for source, target in swapped]
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "tuned"))
    inputs = load_file(folder / "inputs.safetensors")
    tuned = {"in_memory": model.eval(), "loaded": AutoModelForSeq2SeqLM.from_pretrained(folder / "tuned")}
    with torch.no_grad():
        logits = {name: each(**inputs, use_cache=False).logits for name, each in tuned.items()}
    save_file(logits, folder / "tuned.safetensors")


# --- what it is compared with -------------------------------------------------------------------------


def trained(tokenizer, system: str) -> AdminForConditionalGeneration:
    """A model that has learnt the sentences, and with them an ω of its own."""
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    residuals = {"encoder_residual": system, "decoder_residual": system}
    model = tiny_model(vocab_size=VOCAB_SIZE, d_model=32, **residuals, **rates)
    batch = dict(tokenizer(list(PAIRS), text_target=list(PAIRS.values()), padding=True, return_tensors="pt"))
    batch["labels"].masked_fill_(batch["labels"] == tokenizer.pad_token_id, -100)
    if system == "admin":
        initialize_omega(model, profile_residuals(model, batch))
    return learn(model, batch).eval()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folders, and what the Admin models themselves compute from the same sentences."""
    folder = tmp_path_factory.mktemp("stock")
    tokenizer = train_tokenizer([[*PAIRS, *PAIRS.values()]], VOCAB_SIZE)
    targets = [*PAIRS.values(), "Two men", "A little"]
    (folder / "sentences.json").write_text(json.dumps([SOURCES, targets]), encoding="utf-8")
    batch = dict(tokenizer(SOURCES, padding=True, return_tensors="pt"))
    prefixes = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
    save_file({**batch, "decoder_input_ids": prefixes}, folder / "inputs.safetensors")
    expected, texts = {}, {}
    for kind in KINDS:
        model = trained(tokenizer, kind)
        model.save_pretrained(folder / kind, reparameterize=True)
        save_tokenizer(tokenizer, folder / kind)
        if kind == "admin":
            omega = torch.cat([m.omega for m in model.modules() if isinstance(m, AdminConnection)])
            assert omega.std() > 0.1, "there is a fold to lose"
            model.save_pretrained(folder / "unfolded")
            save_tokenizer(tokenizer, folder / "unfolded")
        with torch.no_grad():
            logits = model(**batch, decoder_input_ids=prefixes).logits
        beams = {f"beams{n}": {"num_beams": n, "num_return_sequences": n} for n in (1, 4)}
        tokens = {name: model.generate(**batch, **beam, max_new_tokens=30) for name, beam in beams.items()}
        found = {"input_ids": batch["input_ids"], "prefixes": prefixes, "logits": logits, **tokens}
        expected |= {f"{kind}.{name}": value for name, value in found.items()}
        texts[kind] = {n: tokenizer.batch_decode(t, skip_special_tokens=True) for n, t in tokens.items()}
    return SimpleNamespace(folder=folder, tensors=expected, texts=texts)


@pytest.fixture(scope="module")
def stock(reference):
    """What a process without this project found."""
    stderr = run_alone(load_and_translate, reference.folder)
    quiet, _, forced = stderr.partition("--- the folder with ω")
    facts = json.loads((reference.folder / "facts.json").read_text(encoding="utf-8"))
    tensors = load_file(reference.folder / "found.safetensors")
    return SimpleNamespace(facts=facts, tensors=tensors, stderr=quiet, forced_stderr=forced)


@pytest.fixture(scope="module")
def tuned(reference):
    run_alone(fine_tune, reference.folder)
    return load_file(reference.folder / "tuned.safetensors")


# --- tests --------------------------------------------------------------------------------------------


@kinds
def test_auto_classes_load_the_export_as_a_stock_model_with_every_key_in_its_place(stock, kind):
    facts = stock.facts[kind]
    assert tuple(facts["model"]) == KINDS[kind]
    assert (facts["dtype"], facts["training"]) == ("torch.float32", False)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= facts["loading"].keys()
    assert not any(facts["loading"].values()), facts["loading"]


def test_the_stock_process_has_nothing_to_warn_of(stock):
    assert not any(word in stock.stderr for word in ("Warning", "UNEXPECTED", "MISSING", "`admin`")), stock.stderr


@kinds
def test_the_tokenizer_beside_it_gives_the_same_ids(reference, stock, kind):
    for name in ("input_ids", "prefixes"):
        assert torch.equal(stock.tensors[f"{kind}.{name}"], reference.tensors[f"{kind}.{name}"])
    lengths = reference.tensors[f"{kind}.input_ids"].ne(VOCAB_SIZE - 1).sum(1)
    assert len(set(lengths.tolist())) > 3, "the sentences are padded"


@kinds
def test_stock_logits_are_the_admin_models(reference, stock, kind):
    found, expected = stock.tensors[f"{kind}.logits"], reference.tensors[f"{kind}.logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@kinds
def test_stock_generation_gives_the_same_tokens_and_text(reference, stock, kind):
    for name, texts in reference.texts[kind].items():
        assert torch.equal(stock.tensors[f"{kind}.{name}"], reference.tensors[f"{kind}.{name}"]), name
        assert stock.facts[kind]["texts"][name] == texts, name
    learnt = reference.texts[kind]["beams1"][: len(PAIRS)]
    assert learnt == list(PAIRS.values()), "the model can translate, so equal texts say something"


@pytest.mark.parametrize("loader", ["AutoConfig", "AutoModelForSeq2SeqLM"])
def test_the_folder_with_omega_is_refused(stock, loader):
    assert "model type `admin`" in stock.facts["refusals"].get(loader, "was loaded")


def test_forcing_the_folder_with_omega_into_marian_is_not_silent(reference, stock):
    names = load_file(reference.folder / "unfolded" / "model.safetensors")
    omegas = sorted(name for name in names if name.rpartition(".")[2] in ("omega", "omega_profiled"))
    assert len(omegas) == 9 and stock.facts["forced"] == omegas
    assert "model of type `admin` to instantiate a model of type `marian`" in stock.forced_stderr
    reported = [line for line in stock.forced_stderr.splitlines() if "UNEXPECTED" in line]
    assert any(".omega" in line for line in reported), stock.forced_stderr


def test_the_stock_trainer_fine_tunes_the_export(reference, tuned):
    before = reference.tensors["admin.logits"]
    assert tuned["in_memory"].isfinite().all()
    assert (tuned["in_memory"] - before)[..., : VOCAB_SIZE - 1].abs().max() > 0.1, "it has learnt something"
    assert torch.equal(tuned["loaded"], tuned["in_memory"])


def test_what_stock_code_fine_tuned_comes_back_as_an_admin_model(reference, tuned):
    model, info = AdminForConditionalGeneration.from_pretrained(reference.folder / "tuned", output_loading_info=True)
    assert not any(info.values()), info
    assert model.omega_initialized
    with torch.no_grad():
        logits = model(**load_file(reference.folder / "inputs.safetensors"), use_cache=False).logits
    torch.testing.assert_close(logits, tuned["loaded"], rtol=0, atol=1e-6)
