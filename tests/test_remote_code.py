"""A folder that carries the code of its model: it loads without admin_hf, and only where that code is trusted."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import padded_batch, randomize, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import admin_hf
from admin_hf import AdminConfig, AdminForConditionalGeneration, AdminModel


CODE = Path(admin_hf.__file__).parent
RATES = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}  # training losses can be compared
MARKER = "open({path!r}, 'a').close()\n"

# The mix has no stock architecture: this is the only way to publish it
SYSTEMS = {"admin": ("admin", "admin"), "mixed": ("post_ln", "pre_ln")}
systems = pytest.mark.parametrize("system", SYSTEMS)
folders = pytest.mark.parametrize("name", [*SYSTEMS, "base"])


def run_alone(function, folder) -> None:
    """Call `function(folder)` in a process in which admin_hf cannot be imported and nobody answers questions.

    Only the function's own source gets there, so all its imports are inside.
    """
    script = folder / f"{function.__name__}.py"
    source = textwrap.dedent(inspect.getsource(function))
    forbid = 'import sys\nsys.modules["admin_hf"] = None\n'
    script.write_text(f"{forbid}\n{source}\n{function.__name__}(sys.argv[1])\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    caches = {"HF_HOME": str(folder / "hf_home"), "HF_MODULES_CACHE": str(folder / "hf_modules")}
    process = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=folder,
        env=environment | caches | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


# --- what runs there ----------------------------------------------------------------------------------


def load_with_its_code(folder):
    """Load what the folders hold, once it is trusted; train, translate, save and fold it; write down what happens."""
    import json
    from pathlib import Path

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    folder = Path(folder)
    batch = load_file(folder / "batch.safetensors")
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    facts, tensors = {"refused": {}}, {}

    for name in ("admin", "mixed", "base"):
        loader = AutoModel if name == "base" else AutoModelForSeq2SeqLM
        for trust in (None, False):  # before anything of it was loaded
            try:
                loader.from_pretrained(folder / name, trust_remote_code=trust)
            except ValueError as error:
                facts["refused"][f"{name} {trust}"] = str(error)
    facts["ran_untrusted"] = [module for module in sys.modules if module.startswith("transformers_modules")]

    for name in ("admin", "mixed"):
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder / name, trust_remote_code=True, output_loading_info=True
        )
        facts[name] = {
            "class": [type(model).__module__, type(model).__name__],
            "loading": {key: list(map(str, value)) for key, value in info.items()},
            "omega_initialized": model.omega_initialized,
            "omegas": {key: value.tolist() for key, value in model.named_parameters() if key.endswith("omega")},
        }
        with torch.no_grad():
            tensors[f"{name}.logits"] = model(**batch).logits
        tensors[f"{name}.greedy"] = model.generate(**source, num_beams=1, max_new_tokens=12)
        model.save_pretrained(folder / f"{name}_again")
        try:
            model.save_pretrained(folder / f"{name}_vanilla", reparameterize=True)
        except ValueError as error:
            facts[name]["fold"] = str(error)
        loss = model.train()(**batch).loss
        loss.backward()
        tensors[f"{name}.loss"] = loss.detach()
        tensors |= {f"{name}.grad.{key}": p.grad for key, p in model.named_parameters() if p.grad is not None}

    vanilla, info = AutoModelForSeq2SeqLM.from_pretrained(folder / "admin_vanilla", output_loading_info=True)
    facts["vanilla"] = [type(vanilla).__module__, type(vanilla).__name__, any(info.values())]
    with torch.no_grad():
        tensors["vanilla.logits"] = vanilla(**batch).logits

    model = AutoModel.from_pretrained(folder / "base", trust_remote_code=True)
    facts["base"] = {"class": [type(model).__module__, type(model).__name__]}
    with torch.no_grad():
        tensors["base.states"] = model(**source, decoder_input_ids=batch["input_ids"]).last_hidden_state

    modules = [name.split(".") for name in sys.modules if name.startswith("transformers_modules.admin.")]
    facts["imported"] = sorted({parts[3] for parts in modules if len(parts) == 4})  # after the folder and its hash
    try:
        AutoModelForSeq2SeqLM.from_pretrained(folder / "planted", trust_remote_code=True)
    except AttributeError:  # its code is one line, without classes
        pass
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    save_file(tensors, folder / "found.safetensors")


# --- what it is compared with -------------------------------------------------------------------------


def plant_marker(folder: Path, marker: Path) -> None:
    """Replace all code in the folder by a line that leaves a marker where it is run."""
    for path in [*folder.glob("*.py"), folder / "custom_generate" / "generate.py"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(MARKER.format(path=str(marker)), encoding="utf-8")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folders with code, and what their models compute here; the classes are left as they were."""
    folder, batch = tmp_path_factory.mktemp("remote"), padded_batch()
    save_file(batch, folder / "batch.safetensors")
    models = {
        name: randomize(tiny_model(encoder_residual=encoder, decoder_residual=decoder, **RATES), scale=0.3)
        for name, (encoder, decoder) in SYSTEMS.items()
    }
    models["base"] = randomize(AdminModel(tiny_config(**RATES))).eval()
    with pytest.MonkeyPatch.context() as patch:
        for registered in (AdminForConditionalGeneration, AdminModel, AdminConfig):
            patch.setattr(registered, "_auto_class", None)
        AdminForConditionalGeneration.register_for_auto_class()
        AdminModel.register_for_auto_class()
        for name, model in models.items():
            model.save_pretrained(folder / name)
        models["admin"].save_pretrained(folder / "planted")
    plant_marker(folder / "planted", folder / "code_was_run")
    return SimpleNamespace(folder=folder, models=models, batch=batch)


@pytest.fixture(scope="module")
def remote(published):
    """What a process without admin_hf found."""
    run_alone(load_with_its_code, published.folder)
    facts = json.loads((published.folder / "facts.json").read_text(encoding="utf-8"))
    return SimpleNamespace(facts=facts, tensors=load_file(published.folder / "found.safetensors"))


def code_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}


# --- the folder ---------------------------------------------------------------------------------------


@folders
def test_registered_models_are_saved_with_their_code(published, name):
    found = code_files(published.folder / name)
    assert {"modeling_admin.py", "configuration_admin.py", "residual.py"} <= found.keys()
    assert found == {file: (CODE / file).read_bytes() for file in found}
    config = json.loads((published.folder / name / "config.json").read_text())
    model = {"AutoModel": "modeling_admin.AdminModel"}
    if name != "base":
        model = {"AutoModelForSeq2SeqLM": "modeling_admin.AdminForConditionalGeneration"}
    assert config["auto_map"] == {"AutoConfig": "configuration_admin.AdminConfig", **model}


@folders
def test_no_path_of_this_machine_is_published(published, name):
    texts = {path.name: path.read_text() for path in (published.folder / name).glob("*.[jp][sy]*")}
    assert {"config.json", "modeling_admin.py"} <= texts.keys()
    for file, text in texts.items():
        for path in (CODE.parent, published.folder, sys.prefix, Path.cwd()):
            assert f"{path}/" not in text and f'{path}"' not in text, file
    assert '"/' not in texts["config.json"]


def test_code_is_saved_only_where_it_was_asked_for(published, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert not code_files(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_with_admin_hf_code_in_a_folder_is_never_run(published, tmp_path):
    published.models["admin"].save_pretrained(tmp_path / "model")
    source, target = published.folder / "planted", tmp_path / "planted"
    target.mkdir()
    for path in source.glob("*.*"):
        (target / path.name).write_bytes(path.read_bytes())
    plant_marker(target, tmp_path / "code_was_run")
    assert "auto_map" in json.loads((target / "config.json").read_text())
    for loader in (AdminForConditionalGeneration, AutoModelForSeq2SeqLM):
        model = loader.from_pretrained(target)
        model.generate(published.batch["input_ids"], max_new_tokens=3)
        assert type(model) is AdminForConditionalGeneration
    assert not (tmp_path / "code_was_run").exists()


# --- without admin_hf ---------------------------------------------------------------------------------


@pytest.mark.slow
@folders
def test_untrusted_code_is_refused(remote, name):
    for trust in (None, False):
        assert "trust_remote_code=True" in remote.facts["refused"].get(f"{name} {trust}", "was loaded"), trust
    assert remote.facts["ran_untrusted"] == []


@pytest.mark.slow
def test_trusted_code_is_run(remote, published):
    """So the marker would have shown it above."""
    assert (published.folder / "code_was_run").exists()


@pytest.mark.slow
@systems
def test_trusted_code_computes_the_same_bit_for_bit(remote, published, system):
    facts, model = remote.facts[system], published.models[system]
    module, name = facts["class"]
    assert name == "AdminForConditionalGeneration" and module.startswith("transformers_modules.")
    assert not any(facts["loading"].values()), facts["loading"]
    source = {name: published.batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(remote.tensors[f"{system}.logits"], model(**published.batch).logits)
    greedy = model.generate(**source, num_beams=1, max_new_tokens=12)
    assert torch.equal(remote.tensors[f"{system}.greedy"], greedy)
    assert len(greedy.unique(dim=0)) > 2, "translations of different sources differ"


@pytest.mark.slow
@systems
def test_omega_is_there(remote, published, system):
    omegas = {key: value.tolist() for key, value in published.models[system].named_parameters() if "omega" in key}
    assert bool(omegas) == (system == "admin")
    assert remote.facts[system]["omegas"] == omegas
    assert remote.facts[system]["omega_initialized"]


@pytest.mark.slow
@systems
def test_training_goes_on_with_the_code_of_the_folder(remote, published, system):
    model = published.models[system].train()
    loss = model(**published.batch).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    named = zip([name for name, p in model.named_parameters() if p.requires_grad], gradients, strict=True)
    model.eval()
    torch.testing.assert_close(remote.tensors[f"{system}.loss"], loss.detach())
    expected = {f"{system}.grad.{name}": gradient for name, gradient in named if gradient is not None}
    found = {name: value for name, value in remote.tensors.items() if name.startswith(f"{system}.grad.")}
    assert len(found) > 50
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_trusted_code_folds_into_a_vanilla_folder(remote, published):
    assert remote.facts["vanilla"] == ["transformers.models.marian.modeling_marian", "MarianMTModel", False]
    folder = published.folder / "admin_vanilla"
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        expected = published.models["admin"](**published.batch).logits
    real = published.batch["labels"] != -100
    torch.testing.assert_close(remote.tensors["vanilla.logits"][real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_trusted_code_refuses_to_fold_what_no_stock_model_computes(remote, published):
    assert "only Post-LN systems (Marian) and Pre-LN ones in both stacks" in remote.facts["mixed"]["fold"]
    assert not (published.folder / "mixed_vanilla").exists()


@pytest.mark.slow
@systems
def test_what_trusted_code_saves_carries_it_on(remote, published, system):
    first, again = published.folder / system, published.folder / f"{system}_again"
    assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()}
    assert code_files(first) == code_files(again)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert json.loads((first / "config.json").read_text()) == json.loads((again / "config.json").read_text())


@pytest.mark.slow
def test_the_bare_model_loads_with_its_code_too(remote, published):
    assert remote.facts["base"]["class"][1] == "AdminModel"
    source = {name: published.batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = published.models["base"](**source, decoder_input_ids=source["input_ids"]).last_hidden_state
    assert torch.equal(remote.tensors["base.states"], states)


@pytest.mark.slow
@folders
def test_all_code_that_is_saved_is_needed_and_all_that_is_needed_is_saved(remote, published, name):
    """The process loaded, trained, saved and folded with these files, and with nothing else of this project."""
    assert {f"{module}.py" for module in remote.facts["imported"]} == code_files(published.folder / name).keys()
