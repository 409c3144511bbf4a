"""The names that the architecture writes down are those of the models, and its stock classes are what it says."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType

import pytest
from conftest import PAD, SYSTEM_PAIRS, tiny_model
from test_optimization import tiny_trainer
from torch import nn

from admin_hf.architecture import ARCHITECTURES, STACKS
from admin_hf.residual import residual_connections
from benchmarks.systems import word_tokenizer
from training.batching import TranslationCollator


REPO = Path(__file__).parents[1]


@pytest.mark.parametrize(("encoder", "decoder"), SYSTEM_PAIRS)
def test_every_part_of_a_layer_is_named_once(encoder, decoder):
    model = tiny_model(encoder_residual=encoder, decoder_residual=decoder)
    for name, stack in STACKS.items():
        layers = getattr(model.model, name).layers
        assert stack.depth(model.config) == len(stack.sublayers) * len(layers)
        names = [path for path, _ in residual_connections(getattr(model.model, name))]
        assert [stack.index(path) for path in names] == list(range(stack.depth(model.config)))
        for layer in layers:
            linears = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
            named = [path for sublayer in stack.sublayers for path in (*sublayer.reads, sublayer.ends)]
            assert len(named) == len(set(named))
            # What is not named reads the encoder's output
            assert linears - set(named) == linears & {"encoder_attn.k_proj", "encoder_attn.v_proj"}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_stock_classes_have_the_parts(architecture):
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20, "pad_token_id": 19}
    model = architecture.translation(architecture.config(**sizes, **heads))
    assert isinstance(model.base_model, architecture.base)
    for stack in architecture.stacks:
        for layer in getattr(model.base_model, stack.name).layers:
            for sublayer in stack.sublayers:
                assert isinstance(layer.get_submodule(sublayer.norm), nn.LayerNorm)
                for path in (*sublayer.reads, sublayer.ends):
                    assert isinstance(layer.get_submodule(path), nn.Linear)


@pytest.mark.parametrize("package", ["admin_hf", "training", "benchmarks"])
def test_no_module_imports_itself_through_others(package):
    """Imports within functions and for types count as well."""
    graph = TopologicalSorter({name: imports(package, name) for name in modules(package)})
    graph.prepare()  # or it raises a CycleError that names them


def test_a_batch_passes_at_most_eight_files_to_the_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(), max_tokens=64)
    trainer.data_collator = TranslationCollator(word_tokenizer(PAD + 1), trainer.model)
    trainer.model.train()
    batches = iter(trainer.get_train_dataloader())
    trainer.compute_loss(trainer.model, next(batches))  # in the first pass the model is checked as a whole
    passed: set[str] = set()

    def watch(frame: FrameType, event: str, arg: object) -> None:
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        if {REPO / "admin_hf", REPO / "training"} & set(file.parents):
            passed.add(str(file.relative_to(REPO)))
        if event == "return" and function == "linear_cross_entropy":
            sys.setprofile(before)

    before = sys.getprofile()
    sys.setprofile(watch)
    trainer.compute_loss(trainer.model, next(batches))
    assert {"training/batching.py", "admin_hf/modeling_admin.py", "admin_hf/loss.py"} <= passed and len(passed) <= 8


def modules(package: str) -> dict[str, Path]:
    paths = (REPO / package).rglob("*.py")
    return {".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(package: str, name: str) -> set[str]:
    """The modules of the package that a module names in its imports."""
    there, found = modules(package), set()
    inner = len(name.split(".")) + (there[name].name == "__init__.py")
    for node in ast.walk(ast.parse(there[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = name.split(".")[: inner - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            named = {f"{source}.{alias.name}" for alias in node.names}
            found |= {each if each in there else source for each in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & there.keys()) - {name}
