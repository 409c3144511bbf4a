"""Trainings of stock models with an injected ω: real tiny runs, what they record, and the page's table of them."""

from dataclasses import replace

import pytest

from training.embedded_data import write_embedded_data
from training.experiments import preparation, records, stock_models
from training.experiments.architectures import CLAIMS, PRE_LN, SHAPES, architecture_run, architecture_runs
from training.experiments.page import draw_losses
from training.experiments.preparation import prepare
from training.experiments.records import Record, collect, state
from training.experiments.runner import FLAGS, flags
from training.experiments.scales import SCALES, PlannedRun
from training.experiments.tables import loss_list, make_table


SCALE = SCALES["architectures"]
TINY = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "intermediate_size": 32, "d_model": 16}
TINY |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs' relative paths begin."""
    folder = tmp_path_factory.mktemp("architectures")
    write_embedded_data(folder / "text", train=200, validation=40, test=1)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for module in (preparation, records):
        monkeypatch.setattr(module, "REPO", folder)
    monkeypatch.setattr("training.experiments.scales.REPO", folder)


def tiny(family: str, system: str, initialization: str = "xavier", **changes) -> PlannedRun:
    """A run of the plan with one layer of width 16 and three updates."""
    run = architecture_run(SCALE, family, 1, initialization, system, seed=1)
    model = dict(item.split("=") for item in run.arguments["config_overrides"].split(","))
    model |= {name: value for name, value in TINY.items() if name in model}
    steps = {"max_steps": 3, "warmup_steps": 1, "eval_steps": 1, "logging_steps": 1, "save_steps": 1}
    files = {"train_file": "text/train", "validation_file": "text/validation", "vocab_size": 300}
    arguments = run.arguments | steps | files | {"per_device_train_batch_size": 4, "max_eval_blocks": 8} | changes
    arguments["config_overrides"] = ",".join(f"{name}={value}" for name, value in model.items())
    return replace(run, arguments=arguments)


def trained(run: PlannedRun) -> Record:
    prepare(run.arguments)
    assert stock_models.main(flags(run.arguments | FLAGS)) == 0
    record = collect(run)
    assert record is not None
    return record


@pytest.mark.parametrize("family", SHAPES)
def test_a_run_of_each_system(family):
    for system in ("post_ln", "pre_ln", "admin"):
        record = trained(tiny(family, system))
        assert not record.begun and record.blind_loss > 1 and record.seconds is not None
        assert record.arguments["model_type"] == (PRE_LN[family] if system == "pre_ln" else family)
        for curve in (record.eval_loss, record.train_loss):
            assert [update for update, _ in curve] == [1, 2, 3]
        assert record.eval_loss[-1][1] == pytest.approx(record.loss, abs=1e-4)
        assert len(record.omega) == (2 if system == "admin" else 0)
        assert all(omega >= 1 for omega in record.omega)


def test_a_naive_chain_starts_at_the_variance_of_the_embeddings():
    naive, admin = (trained(tiny("opt", system, "stock")) for system in ("naive", "admin"))
    assert 0 < naive.omega[0] <= naive.omega[1] < 0.1, "OPT has embeddings of standard deviation 0.02"
    assert admin.omega == [1, 1]


@pytest.mark.parametrize("family", SHAPES)
def test_projections_are_initialised_as_is_asked_for_and_embeddings_are_left(family):
    stds = {}
    for initialization in ("stock", "wide", "xavier"):
        run = tiny(family, "post_ln", initialization)
        prepare(run.arguments)
        model_arguments, *_, stock, training = stock_models.parse(flags(run.arguments | FLAGS))
        tokenizer = stock_models.load_tokenizer(model_arguments.tokenizer_name, model_arguments)
        model = stock_models.build(model_arguments, stock, tokenizer, training.seed)
        assert float(model.get_input_embeddings().weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        name = "intermediate.dense.weight" if family == "bert" else "fc1.weight"
        weight = next(weight for path, weight in model.named_parameters() if path.endswith(name))
        stds[initialization] = float(weight.detach().std())
    expected = {"stock": 0.02, "wide": 0.02 * (768 / 16) ** 0.5, "xavier": (2 / (16 + 32)) ** 0.5}
    assert stds == pytest.approx(expected, rel=0.15)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(monkeypatch):
    whole = trained(tiny("opt", "admin"))
    run = tiny("opt", "admin", output_dir="stopped")

    class Stopped(stock_models.Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stock_models, "Trainer", Stopped)
        trained(run)
    begun = collect(run)
    assert state(run) == "begun" and begun.begun and begun.loss is None and len(begun.eval_loss) == 2
    end = trained(run)
    assert state(run) == "finished" and end.seconds is None
    assert (end.eval_loss, end.train_loss, end.omega) == (whole.eval_loss, whole.train_loss, whole.omega)


def test_masks_hide_a_share_of_the_tokens_and_only_they_are_predicted():
    run = tiny("bert", "post_ln")
    prepare(run.arguments)
    model_arguments, data, stock, _ = stock_models.parse(flags(run.arguments | FLAGS))
    tokenizer = stock_models.load_tokenizer(model_arguments.tokenizer_name, model_arguments)
    blocks = stock_models.examples(stock_models.load_pairs("train", data, model_arguments), tokenizer, data, stock)
    pairs = [pair for block in blocks for pair in zip(block["input_ids"], block["labels"], strict=True)]
    assert {len(block["input_ids"]) for block in blocks} == {32}
    hidden = [label for token, label in pairs if token == tokenizer.unk_token_id]
    assert len(hidden) / len(pairs) == pytest.approx(0.3, abs=0.03) and -100 not in hidden
    assert {label for token, label in pairs if token != tokenizer.unk_token_id} == {-100}


def ended(run: PlannedRun, loss: float, omega: float = 1.0) -> Record:
    """A record of a run that ended so, where a blind guess has 5.7."""
    shown = [1.0, omega] if run.arguments["chain"] else []
    curves = [[60, loss]], [[60, loss + 0.9]]
    return Record(run.arguments, None, None, loss, 5.7, None, 10, *curves, margin=0.1, omega=shown)


def test_the_table_says_losses_omega_and_failures_of_what_is_done():
    runs = [run for run in architecture_runs(SCALE, 1111) if run.column == "OPT 24, Xavier"]
    losses = {"Post-LN": 5.62, "Admin": 4.2}
    table = make_table(runs, {run.name: ended(run, losses[run.row], 5.25) for run in runs if run.row in losses})
    assert loss_list(table)[2:] == [
        "| OPT 24, Xavier | Post-LN | 6.52 | 5.62 |  | 1 **failed** (+0.02) |",
        "| OPT 24, Xavier | Pre-LN | … | … | … | … |",
        "| OPT 24, Xavier | Admin | 5.10 | 4.20 | 1.00 to 5.25 | 1 trained (-1.40) |",
        "| OPT 24, Xavier | Admin, naive chain | … | … | … | … |",
    ]


def test_a_figure_of_more_columns_than_stand_beside_each_other(tmp_path):
    runs = architecture_runs(SCALE, 1111)
    draw_losses(make_table(runs, {run.name: ended(run, 4.0) for run in runs}), tmp_path / "figure.png", "", "")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("post_ln", "admin", "harmless", "rule"),
    [
        ((4.0, 5.7), (4.05, 4.2), True, True),  # losses of OPT with std 0.02 and with Xavier branches
        ((4.0, 5.7), (4.15, 4.2), False, True),
        ((4.0, 5.7), (5.7, 4.2), False, True),
        ((5.7, 4.0), (4.2, 4.0), True, False),
        ((4.0, 4.0), (4.0, 4.0), True, None),
    ],
)
def test_the_claims_on_harm_and_on_the_rule(post_ln, admin, harmless, rule):
    def loss(run: PlannedRun) -> float:
        return {"Post-LN": post_ln, "Admin": admin}.get(run.row, post_ln)["Xavier" in run.column]

    runs = [run for seed in SCALE.seeds for run in architecture_runs(SCALE, seed)]
    omega = {run.name: 5.0 if "Xavier" in run.column else 1.1 for run in runs}
    table = make_table(runs, {run.name: ended(run, loss(run), omega[run.name]) for run in runs})
    verdicts = {claim.text.partition(":")[0]: claim.verdict(table)[0] for claim in CLAIMS}
    assert (verdicts["Admin does no harm"], verdicts["The rule"]) == (harmless, rule)
