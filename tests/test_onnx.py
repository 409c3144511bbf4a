"""The vanilla model goes through Transformers' ONNX exporter, and ONNX Runtime translates as Transformers does."""

import pytest
import torch
from conftest import PAD, learn, padded_batch, tiny_model
from transformers import AutoModelForSeq2SeqLM, MarianMTModel
from transformers.exporters import OnnxConfig, OnnxExporter

from admin_hf import initialize_omega, profile_residuals


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; '.[dev]' has it")
pytest.importorskip("onnxscript", reason="onnxscript is not installed; '.[dev]' has it")

pytestmark = [
    pytest.mark.slow,
    # Of torch.export's own copying
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]

EOS, MAX_NEW_TOKENS = 0, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The vanilla model of a model that has learnt when to end a sentence."""
    folder = tmp_path_factory.mktemp("onnx")
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model, batch = tiny_model(d_model=32, encoder_layers=1, decoder_layers=1, **rates), padded_batch()
    ends = batch["labels"].ne(-100).sum(1) - 1
    batch["labels"][torch.arange(len(ends)), ends] = EOS
    initialize_omega(model, profile_residuals(model, batch))
    learn(model, batch)
    model.save_pretrained(folder / "vanilla", reparameterize=True)
    return folder


@pytest.fixture(scope="module")
def session(folder):
    """As a user would export it: one example, of which only the names and the number of dimensions count."""
    model = MarianMTModel.from_pretrained(folder / "vanilla").eval()
    # Sizes that are 1 or equal would be taken for constants, or for one and the same size
    ids, target = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    example = {"input_ids": ids, "attention_mask": ids.clone(), "decoder_input_ids": target, "use_cache": False}
    batch, source, length = map(torch.export.Dim, ("batch", "source", "target"))
    dimensions = {
        "input_ids": {0: batch, 1: source},
        "attention_mask": {0: batch, 1: source},
        "decoder_input_ids": {0: batch, 1: length},
    }
    exported = OnnxExporter().export(model, example, OnnxConfig(dynamic_shapes=dimensions))
    for node in exported.program.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    exported.save_pretrained(folder / "exported")
    return onnxruntime.InferenceSession(folder / "exported" / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture
def stock(folder):
    """Not the object that was exported, which the exporter may have changed."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder / "vanilla")


def ragged(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sentences of random lengths, padded on the right, with their mask."""
    ids = torch.randint(1, PAD, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return ids.where(mask, PAD), mask.long()


def onnx_logits(session, input_ids, attention_mask, decoder_input_ids) -> torch.Tensor:
    feed = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})
    return torch.from_numpy(logits)


def onnx_greedy(session, input_ids, attention_mask) -> torch.Tensor:
    """Greedy decoding without a cache, in the fewest lines."""
    tokens = torch.full((len(input_ids), 1), PAD)
    done = torch.zeros(len(input_ids), dtype=torch.bool)
    while tokens.shape[1] <= MAX_NEW_TOKENS and not done.all():
        best = onnx_logits(session, input_ids, attention_mask, tokens)[:, -1].argmax(-1).masked_fill(done, PAD)
        tokens = torch.cat([tokens, best[:, None]], 1)
        done |= best == EOS
    return tokens


@pytest.mark.parametrize(("rows", "source", "target"), [(2, 7, 5), (1, 1, 1), (1, 12, 9), (5, 30, 21), (3, 5, 1)])
def test_onnx_runtime_computes_the_same_logits_whatever_the_sizes(session, stock, rows, source, target):
    generator = torch.Generator().manual_seed(rows * source)
    input_ids, mask = ragged(rows, source, generator)
    prefixes = torch.randint(1, PAD, (rows, target), generator=generator)
    with torch.no_grad():
        expected = stock(input_ids=input_ids, attention_mask=mask, decoder_input_ids=prefixes).logits
    found = onnx_logits(session, input_ids, mask, prefixes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if not mask.all():
        unmasked = onnx_logits(session, input_ids, torch.ones_like(mask), prefixes)
        assert (unmasked - expected).abs().max() > 1e-2, "the mask is read"


def test_greedy_decoding_in_onnx_runtime_gives_the_same_tokens(session, stock):
    learnt = padded_batch()
    batches = [(learnt["input_ids"], learnt["attention_mask"]), ragged(6, 11, torch.Generator().manual_seed(0))]
    settings = {"num_beams": 1, "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    steps = set()
    for input_ids, mask in batches:
        expected = stock.generate(input_ids, attention_mask=mask, **settings)
        assert torch.equal(onnx_greedy(session, input_ids, mask), expected)
        steps |= set(expected.eq(EOS).int().argmax(1).tolist())
    assert len(steps) > 2, "sentences end, and not all at one step"


def test_the_exported_folder_holds_no_path_of_this_machine(session, folder):
    files = [path for path in (folder / "exported").iterdir() if path.is_file()]
    assert {"model.onnx", "config.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert b"site-packages" not in content and str(folder).encode() not in content, path.name
