"""The experiments as data, what is claimed of them, the page, and real runs that diverge, fail, stop and go on."""

import doctest
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from conftest import padded_batch, tiny_model

import run_translation
from admin_hf import AdminConfig, initialize_omega, profile_residuals
from admin_hf.residual import SYSTEMS, residual_connections
from training.arguments import parse_arguments
from training.data import load_pairs
from training.embedded_data import write_embedded_data
from training.errors import InputError
from training.experiments import __main__, blind, dropout_losses, page, preparation, records, translations
from training.experiments.__main__ import main
from training.experiments.ablations import VARIANTS
from training.experiments.blind import BlindGuess
from training.experiments.claims import (
    ONE_SEED,
    WITHIN_NOISE,
    fail,
    fail_somewhere,
    lower,
    lower_in_most,
    score_higher,
    train,
)
from training.experiments.dropout_losses import STACKS, measure_dropout_losses
from training.experiments.page import how_runs_ended
from training.experiments.plan import (
    ABLATIONS,
    DROPOUTS,
    EXPERIMENTS,
    TITLES,
    TRANSLATE,
    choose_dropout,
    dropout_outcome,
    dropout_runs,
    planned,
)
from training.experiments.preparation import prepare, with_blind_training_loss
from training.experiments.records import BLIND_NAME, SESSIONS_NAME, Record, collect, from_json, known, state, to_json
from training.experiments.runner import Runner, flags, log_path
from training.experiments.scales import REPO, SCALES, PlannedRun
from training.experiments.tables import describe, dropout_list, make_table, markdown
from training.metrics import TranslationMetric
from training.model import config_changes
from training.runs import recorded
from training.tokenization import load_tokenizer
from training.trainer import TranslationTrainer


PLANS = [(name, scale) for name, experiment in EXPERIMENTS.items() for scale in experiment.scales]
ALL_RUNS = [run for name, scale in PLANS for run in planned(name, SCALES[scale])]
TINY = SCALES["tiny"]


def record(loss: float | None = 4.0, **changes) -> Record:
    """A run that ended with this loss, where a blind one has 5."""
    values = Record({"seed": 1, "warmup_steps": 10}, None, None, loss, 5.0, None, 10, [[10, 4.5], [20, 4.0]], [])
    return replace(values, diverged_at=7 if loss is None else None, **changes)


# --- the plan -------------------------------------------------------------------------------------


def test_equal_runs_and_only_they_share_a_folder():
    by_name: dict[str, dict] = {}
    for run in ALL_RUNS:
        assert by_name.setdefault(run.name, run.arguments) == run.arguments
        assert run.folder == REPO / "runs" / "experiments" / run.name
    results = [json.dumps(values | {"output_dir": ""}, sort_keys=True) for values in by_name.values()]
    assert len(set(results)) == len(results) == len(by_name) < len(ALL_RUNS)


@pytest.mark.parametrize(("name", "scale"), [plan for plan in PLANS if plan[0] != "architectures"])
@pytest.mark.usefixtures("with_variants")
def test_run_translation_takes_the_arguments(name, scale):
    for run in {run.row: run for run in planned(name, SCALES[scale])}.values():
        given = parse_arguments(flags(run.arguments))
        changes = config_changes(given.model, AdminConfig)
        config = AdminConfig(**changes, vocab_size=given.model.vocab_size)
        assert config.encoder_layers == config.decoder_layers > {"small": 1, "tiny": 3}.get(scale, 5)
        assert {config.encoder_residual, config.decoder_residual} <= set(SYSTEMS)
        # By these a run is recognised
        there = recorded(given)
        assert {name: there[name] for name in run.arguments} == run.arguments


def test_the_recipes_of_one_depth_differ_in_the_residual_system_alone():
    """So that the paper's scale can take Admin's for all of them."""

    def content(folder: Path) -> tuple[dict, dict]:
        config, recipe = (json.loads((folder / name).read_text()) for name in ("config.json", "recipe.json"))
        config |= dict.fromkeys(("encoder_residual", "decoder_residual"))
        return config, recipe | dict.fromkeys(("config_name", "output_dir"))

    paper = [run for run in ALL_RUNS if run.name.startswith("paper/")]
    folders = {REPO / run.arguments["config_name"] for run in paper}
    assert {folder.name for folder in folders} == {
        "iwslt14-de-en-6-6-admin", *(f"wmt14-en-de-{n}-{n}-admin" for n in (6, 12, 18, 100))
    }  # fmt: skip
    for folder in folders:
        for other in ("post_ln", "pre_ln"):
            if (path := folder.with_name(folder.name.replace("admin", other))).exists():
                assert content(path) == content(folder)


def test_every_system_is_compared():
    found = {
        name.split("=")[1]
        for run in planned("systems", SCALES["cpu"])
        for name in overrides(run)
        if "residual" in name
    }
    assert found == set(SYSTEMS) == set(TITLES)


@pytest.fixture
def with_variants(monkeypatch):
    for name, system in VARIANTS.items():
        monkeypatch.setitem(SYSTEMS, name, system)


def variant(name, **changes):
    """A fresh tiny model of a variant, and one of Admin with the same weights, both profiled on a batch."""
    models = []
    for system in (name, "admin"):
        model = tiny_model(encoder_residual=system, decoder_residual=system, **changes)
        initialize_omega(model, profile_residuals(model, padded_batch()))
        models.append(model)
    return models


@pytest.mark.usefixtures("with_variants")
def test_variants_of_admin_differ_in_what_they_say():
    assert set(ABLATIONS) == set(VARIANTS)
    for name in ("admin_frozen", "admin_scalar"):
        model, admin = variant(name)
        torch.testing.assert_close(model(**padded_batch()).logits, admin(**padded_batch()).logits)
    frozen, scalar = variant("admin_frozen")[0], variant("admin_scalar")[0]
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if name.endswith("omega")] and trained
    assert {p.shape for name, p in scalar.named_parameters() if name.endswith("omega")} == {(1,)}
    scalar.train()(**padded_batch()).loss.backward()
    assert all(p.grad.any() for name, p in scalar.named_parameters() if name.endswith("omega"))

    # ω_i from variances that were measured with ω = 1 in all sub-layers, which is Post-LN
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    at_one, admin = variant("admin_measured_at_one", **rates)
    post_ln = tiny_model(encoder_residual="post_ln", decoder_residual="post_ln", **rates)
    measured = profile_residuals(post_ln, padded_batch())
    for stack in ("encoder", "decoder"):
        there, found = getattr(measured, stack), residual_connections(getattr(at_one.model, stack))
        for i, (_, connection) in enumerate(found):
            omega = (there.shortcut_variances[0] + sum(there.branch_variances[:i])) ** 0.5
            assert not i or connection.omega.tolist() == pytest.approx([omega] * len(connection.omega), rel=1e-4)
    assert not torch.equal(*(x.model.decoder.layers[1].final_layer_norm.omega for x in (at_one, admin)))

    first = variant("admin_with_first")[0].model.encoder.layers[0].self_attn_layer_norm
    assert first.omega.tolist() == [1.0] * len(first.omega) and first.omega.requires_grad


@pytest.mark.slow  # 10 s
@pytest.mark.parametrize("name", ["admin_scalar", "admin_with_first"])
def test_variants_of_admin_train(name, data, tmp_path):
    residuals = f"{tiny_runs.SHAPE},encoder_residual={name},decoder_residual={name}"
    values = tiny_runs.arguments(data, tmp_path / "run", config_overrides=residuals, do_eval=True, test_file=None)
    command = [sys.executable, "-m", "training.experiments.ablations", *tiny_runs.flags(values)]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scores"]["eval_loss"] > 0


def overrides(run):
    return run.arguments["config_overrides"].split(",")


def test_sizes_at_cpu_scale():
    sizes = {name: len(planned(name, SCALES["cpu"])) for name, scale in PLANS if scale == "cpu"}
    assert sizes == {
        "depth": 27,
        "hybrid": 15,
        "warmup": 10,
        "grid": 45,
        "rezero": 15,
        "batch": 6,
        "deep": 5,
        "systems": 40,
        "ablations": 15,
    }


def chosen(monkeypatch, choice: dict[int, float]) -> list[PlannedRun]:
    """The runs of `converged` with this choice."""
    monkeypatch.setattr("training.experiments.plan.choose_dropout", lambda scale, records: choice)
    return planned("converged", TINY)


def test_patterns_of_the_claims_select_what_they_name(monkeypatch):
    chosen(monkeypatch, {4: 0.1, 12: 0.4})
    for name, scale in PLANS:
        runs = planned(name, SCALES[scale])
        table = make_table(runs, {run.name: record(bleu=40.0) for run in runs})
        for claim in EXPERIMENTS[name].claims:
            holds, numbers = claim.verdict(table)
            assert "not run" not in numbers, (name, claim.text)
            assert holds is False or "fail" not in claim.text


def test_the_recipe_of_converged_runs_is_that_of_hub_configs_for_every_system(monkeypatch):
    recipe = json.loads((REPO / "hub_configs" / "multi30k-12-12-tiny" / "recipe.json").read_text())
    differing = {"output_dir", "eval_strategy", "eval_steps", "num_train_epochs", "do_predict", "seed"}
    for run in [*planned("dropout", TINY), *chosen(monkeypatch, {12: 0.4})]:
        there = {name: run.arguments.get(name) for name in recipe}
        if run.column == "4-4":
            there["config_name"] = recipe["config_name"]
        assert {name for name in recipe if there[name] != recipe[name]} <= differing
        added = run.arguments.keys() - recipe.keys() - {"config_overrides", "tokenizer_name"}
        assert added == {"early_stopping_patience", "predict_with_generate", "prediction_loss_only"}
        assert (run.arguments["num_train_epochs"], run.arguments["early_stopping_patience"]) == (50, 10)
        model = dict(item.split("=") for item in run.arguments["config_overrides"].split(","))
        assert model.keys() == {"encoder_residual", "decoder_residual", "dropout"}
        assert model["encoder_residual"] == model["decoder_residual"]


def test_converged_runs_are_three_seeds_of_three_systems_with_the_chosen_dropout(monkeypatch):
    assert [(len(chosen(monkeypatch, choice))) for choice in ({}, {4: 0.2}, {4: 0.2, 12: 0.3})] == [0, 11, 22]
    runs = planned("converged", TINY)
    assert all(run.scoring == TRANSLATE for run in runs)
    cells = {(run.row, run.column): 0 for run in runs}
    for run in runs:
        cells[run.row, run.column] += 1
        assert f"dropout={0.2 if run.column == '4-4' else 0.3}" in run.arguments["config_overrides"]
    assert set(cells.values()) == {1, 3} and len(cells) == 10
    # The first seed is the one that was trained for the choice, in the same folder
    tried = {run.name: run.arguments for run in planned("dropout", TINY)}
    first = [run for run in runs if run.arguments["seed"] == 1111 and run.row in ("Admin", "Pre-LN", "Post-LN")]
    assert len(first) == 6 and all(tried[run.name] == run.arguments for run in first)
    # 4-4 layers first, then 12-12, then the systems with one seed
    orders = {(run.row, run.column): run.order for run in runs}
    assert orders["Pre-LN", "4-4"] < orders["Pre-LN", "12-12"] < orders["DeepNorm", "4-4"]
    assert {run.order for run in planned("dropout", TINY) if run.column == "4-4"} == {orders["Admin", "4-4"]}


def tried(losses: dict[tuple[float, str], float | None]) -> dict[str, Record]:
    """Records of the 4-4 runs that dropout is chosen by, with these losses by dropout and system, else 4.0."""
    records = {}
    for run in dropout_runs(TINY, 1111):
        system, _, dropout = run.row.partition(", dropout ")
        if run.column == "4-4":
            records[run.name] = record(losses.get((float(dropout), system), 4.0))
    return records


def test_dropout_is_chosen_by_the_mean_loss_of_the_systems_that_train_with_every_value():
    assert choose_dropout(TINY, {}) == {} and dropout_outcome(TINY, {}) == []
    assert choose_dropout(TINY, tried({})) == {4: 0.1}, "of equals, the smaller"
    losses = {(0.1, "Admin"): 3.9, (0.2, "Pre-LN"): 3.8, (0.3, "Post-LN"): 3.4}
    assert choose_dropout(TINY, tried(losses)) == {4: 0.3}
    # Post-LN fails with one value, by divergence or no better than blind, and no longer counts with the others
    for failure in (None, 5.0):
        assert choose_dropout(TINY, tried(losses | {(0.1, "Post-LN"): failure})) == {4: 0.2}
    assert dropout_outcome(TINY, tried(losses)) == [
        "4-4 layers: **dropout 0.3** is chosen (mean validation loss 0.1: 3.967; 0.2: 3.933; 0.3: 3.800)."
    ]
    assert choose_dropout(TINY, tried({(0.2, name): None for name in ("Admin", "Pre-LN", "Post-LN")})) == {}
    records = tried({})
    name = next(iter(records))
    assert choose_dropout(TINY, records | {name: replace(records[name], begun=True)}) == {}
    assert choose_dropout(TINY, {key: value for key, value in records.items() if key != name}) == {}
    assert [len(values) for values in DROPOUTS.values()] == [3, 3]


def test_the_list_says_what_would_run(capsys):
    assert main(["depth", "hybrid", "--list", "--seeds", "7", "8"]) == 0
    text = capsys.readouterr().out
    assert "18 runs" in text and "10 runs" in text and "of 22, 1 at a time" in text and "expected wall time" in text
    assert "max_steps 500" in text and "seed 7, 8" in text and "d_model 64" in text
    assert len([line for line in text.splitlines() if line.endswith("seed8")]) == 11
    assert main(["rezero", "--list", "--scale", "paper", "--seeds", "7"]) == 0
    assert "num_train_epochs 90" in (text := capsys.readouterr().out) and "d_model 512" in text
    assert main(["converged", "--list"]) == 0 and "scale tiny" in capsys.readouterr().out
    for wrong in (["tables"], ["depth", "converged", "--scale", "cpu"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_runs_whose_end_is_on_record_can_be_left_out(here, capsys):
    path = here / "docs" / "experiments" / "rezero.json"
    first, second, *_ = planned("rezero", SCALES["cpu"])
    path.parent.mkdir()
    path.write_text(to_json({first.name: record(), second.name: replace(record(), begun=True)}))
    assert main(["rezero", "--list"]) == 0 and "To run: 15 of 15" in capsys.readouterr().out
    assert main(["rezero", "--list", "--missing"]) == 0
    text = capsys.readouterr().out
    assert "To run: 14 of 14" in text and first.name not in text and second.name in text
    assert first.name in {run.name for run in planned("systems", SCALES["cpu"])}  # of 40 runs, on another's record
    assert main(["systems", "--list", "--missing"]) == 0 and "To run: 39 of 39" in capsys.readouterr().out


# --- claims ---------------------------------------------------------------------------------------


def test_a_run_fails_when_it_diverges_or_ends_no_better_than_blind():
    assert not record(4.999).failed and record(5.0).failed and record(None).failed and record(math.nan).failed


def test_claims_on_failing_and_training():
    good, bad = ([record()], 1), ([record(None), record(5.5)], 2)
    table = {("A", "6"): good, ("A", "12"): bad, ("B", "6"): good}
    assert fail("", ("A", "12")).verdict(table)[0] is True
    assert fail("", ("A", "*")).verdict(table)[0] is False
    assert train("", ("A", "*")).verdict(table)[0] is False
    assert train("", ("*", "6")).verdict(table)[0] == ONE_SEED
    assert fail_somewhere("", ("A", "*")).verdict(table)[0] is True
    assert fail_somewhere("", ("B", "*")).verdict(table)[0] is False
    assert fail("", ("A", "*")).verdict(table)[1] == (
        "3 runs: 1 trained, 1 failed, 1 diverged; losses 4.00 to 5.50, threshold 5.00"
    )
    assert (
        fail("", ("B", "*"))
        .verdict({("B", "6"): good})[1]
        .endswith("1 run: 1 trained; losses 4.00 to 4.00, threshold 5.00; one seed")
    )


def test_failing_and_training_count_beyond_two_standard_errors_of_the_threshold():
    def verdict(claim, *losses: float | None):
        return claim("", ("A", "*")).verdict({("A", ""): ([record(loss) for loss in losses], len(losses))})[0]

    # Of 4.1, 4.3, 4.8 the mean is 0.6 below the threshold of 5 and the standard error 0.208
    assert verdict(train, 4.1, 4.3, 4.8) is True
    # Of 5.01 and 8 the mean is 1.505 above it, the standard error 1.495; of 5.8, 6 and 7 they are 1.267 and 0.371
    assert verdict(fail, 5.01, 8.0) == WITHIN_NOISE and verdict(fail, 5.8, 6.0, 7.0) is True
    assert verdict(train, 4.99, 4.0) == WITHIN_NOISE and verdict(train, 5.8, 6.0, 7.0) is False
    assert verdict(fail, 5.01, None) is True, "divergence is as far from it as can be"


def test_a_claim_is_open_while_runs_are_missing():
    holds, numbers = fail("", ("A", "*")).verdict({("A", "6"): ([record(None)], 2)})
    assert holds is None and numbers == "not run yet: 1 of 2 runs are done"
    assert fail("", ("B", "*")).verdict({("A", "6"): ([], 1)})[0] is None
    # The other side has no runs yet: those of `converged` with 12 layers, while their dropout is not chosen
    assert lower("", ("A", "12"), ("A", "6")).verdict({("A", "6"): ([record()], 1)})[0] is None


def test_a_difference_counts_beyond_two_standard_errors():
    def verdict(a: list[float], b: list[float], **kwargs) -> tuple[bool | None, str]:
        table = {("A", ""): ([record(x) for x in a], len(a)), ("B", ""): ([record(x) for x in b], len(b))}
        return lower("", ("A", "*"), ("B", "*"), **kwargs).verdict(table)

    # Standard deviations 0.1 and 0.2, so the standard error is sqrt(0.01 / 3 + 0.04 / 3) = 0.129
    assert verdict([3.9, 4.0, 4.1], [4.1, 4.3, 4.5])[0] is True
    holds, numbers = verdict([3.9, 4.0, 4.1], [4.05, 4.25, 4.45])
    assert holds == WITHIN_NOISE and "difference -0.250 ± 0.129" in numbers
    assert verdict([4.05, 4.25, 4.45], [3.9, 4.0, 4.1])[0] == WITHIN_NOISE
    assert verdict([4.1, 4.3, 4.5], [3.9, 4.0, 4.1])[0] is False
    assert verdict([4.0], [4.5])[0] == WITHIN_NOISE and "one seed cannot tell" in verdict([4.0], [4.5])[1]
    assert verdict([3.9, 4.0], [5.5, 6.0])[0] is True and verdict([3.9, 5.5], [5.5, 6.0])[0] is False
    assert "difference +0.000" in verdict([3.0, 3.0], [4.0, 4.0], early=True)[1]  # of the curves, at update 20


def test_scores_are_compared_as_losses_are_the_other_way_round():
    def verdict(a: list[float], b: list[float]) -> tuple[bool | None, str]:
        table = {(name, ""): ([record(4.0, bleu=x) for x in there], 3) for name, there in (("A", a), ("B", b))}
        return score_higher("", ("A", "*"), ("B", "*")).verdict(table)

    assert verdict([41.3, 41.5, 41.7], [40.9, 41.0, 41.1])[0] is True
    holds, numbers = verdict([41.1, 41.3, 41.5], [40.9, 41.1, 41.3])
    assert holds == WITHIN_NOISE and "BLEU 41.300 against 41.100, difference +0.200 ± 0.163" in numbers
    assert verdict([40.9, 41.0, 41.1], [41.3, 41.5, 41.7])[0] is False
    failing = {("A", ""): ([record(bleu=41.0)] * 2, 2), ("B", ""): ([record(None)] * 2, 2)}
    assert score_higher("", ("A", ""), ("B", "")).verdict(failing)[0] is True


@pytest.mark.parametrize("curve", [[], [[20, math.nan]]], ids=["diverged before", "nan"])
def test_a_run_without_an_early_loss_has_failed_by_then(curve):
    lacking = [record(None, eval_loss=curve)] * 2
    table = {("A", ""): ([record()] * 2, 2), ("B", ""): (lacking, 2), ("C", ""): ([record(), lacking[0]], 2)}
    for one, other, expected in (("A", "B", True), ("B", "A", False), ("B", "B", False), ("A", "C", False)):
        assert lower("", (one, ""), (other, ""), early=True).verdict(table)[0] is expected
    assert lower("", ("A", ""), ("C", ""), early=True).verdict(table)[1] == "0 of 2 runs failed against 1 of 2"


def test_most_settings_are_compared_cell_by_cell():
    table = {(row, column): ([record(loss)], 1) for row, losses in {"A": (1, 2, 3), "B": (2, 3, 1)}.items()
             for column, loss in zip("xyz", losses, strict=True)}  # fmt: skip
    assert lower_in_most("", ("A", "*"), ("B", "*")).verdict(table) == (ONE_SEED, "in 2 of 3; one seed")
    assert lower_in_most("", ("B", "*"), ("A", "*")).verdict(table) == (False, "in 1 of 3; one seed")
    stuck = {("A", "x"): ([record(5.1)], 1), ("B", "x"): ([record(5.2)], 1)}
    assert lower_in_most("", ("A", "*"), ("B", "*")).verdict(stuck)[0] is False, "both failed"


@pytest.mark.parametrize("module", [blind, __main__])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_the_blind_loss_is_that_of_the_frequencies_at_each_position():
    """A hundred pseudo-counts of how often a token occurs at all, and that with one occurrence of each of 5 tokens."""
    train_ids, development = [[2, 3, 0], [2, 4, 0], [3, 0]], [[2, 0], [4]]
    counts = {0: 3, 2: 2, 3: 2, 4: 1}
    overall = {token: (count + 1) / (8 + 5) for token, count in counts.items()}
    expected = [(2 + 100 * overall[2]) / 103, (1 + 100 * overall[0]) / 103, (0 + 100 * overall[4]) / 103]
    assert BlindGuess(train_ids, 5).loss(development) == pytest.approx(-sum(map(math.log, expected)) / 3)
    # Where the position says all, nothing is left to lose; a token never seen has a finite loss
    assert BlindGuess([[2, 0]] * 10**6, 5).loss([[2, 0]]) < 1e-3 < BlindGuess([[2, 0]], 5).loss([[3, 4, 1]]) < 10


def test_the_blind_loss_of_training_data_guesses_each_token_from_the_others():
    sentences = [[2, 3, 0], [2, 4, 0], [3, 0]]
    anywhere = {0: 3, 2: 2, 3: 2, 4: 1}
    losses = []
    for i, sentence in enumerate(sentences):
        for place, token in enumerate(sentence):
            others = [other[place] for j, other in enumerate(sentences) if j != i and place < len(other)]
            prior = 100 * (anywhere[token] + 1) / (8 + 5)
            losses.append(-math.log((others.count(token) + prior) / (len(others) + 100)))
    guess = BlindGuess(sentences, 5)
    assert guess.loss(sentences, were_counted=True) == pytest.approx(sum(losses) / 8)
    assert guess.loss(sentences) < guess.loss(sentences, were_counted=True)


def test_a_smoothed_blind_loss_is_the_least_that_a_guess_at_the_position_has():
    """It is compared with other mixtures of the counts and the uniform distribution, by the loss written out."""
    sentences, smoothing = [[2, 0]] * 30_000 + [[3, 0]] * 50_000 + [[1, 0]] * 20_000, 0.1

    def loss(mixture: float) -> float:
        total = 0.0
        for token, share in ((2, 0.3), (3, 0.5), (1, 0.2)):
            guess = {i: (1 - mixture) * {2: 0.3, 3: 0.5, 1: 0.2}.get(i, 0) + mixture / 5 for i in range(5)}
            nll = -math.log(guess[token])
            total += share * ((1 - smoothing) * nll + smoothing * sum(-math.log(p) for p in guess.values()) / 5)
        return total

    found = BlindGuess(sentences, 5).loss([[2]] * 3 + [[3]] * 5 + [[1]] * 2, smoothing)
    assert min(loss(0.05), loss(0.2)) > found == pytest.approx(loss(0.1), abs=1e-3)


def test_how_a_run_ended_is_told_by_both_losses():
    def ended(loss, training, **changes):
        return record(loss, train_loss=[[10, 6.0], [20, training]], blind_train_loss=5.4, **changes)

    assert [ended(4.99, 9.0).outcome, record(5.2).outcome] == ["trained", "failed"]
    assert ended(5.2, 5.4).outcome == "stalled" and ended(7.0, 5.39).outcome == "collapsed with dropout off"
    assert record(None).outcome == "diverged"
    assert ended(4.95, 5.35, margin=0.1).outcome == "stalled", "a margin is one of both losses"
    assert ended(7.0, 5.25).training_distance == pytest.approx(-0.15) and ended(7.0, 5.25).distance == 2.0
    run = planned("depth", SCALES["cpu"])[0]
    stock = replace(run, program="training.experiments.stock_models")
    ends = [(run, ended(7.0, 5.25)), (run, record()), (run, record(None)), (stock, ended(5.5, 5.5))]
    assert how_runs_ended(ends) == (
        "**1 of 3** runs of run_translation.py tripped its detector of divergence. Of all 4 runs that have ended, "
        "each counted once: 1 trained, 1 stalled, 1 collapsed with dropout off, 1 diverged. With dropout off, 1 of "
        "them (1 collapsed with dropout off) end more than 1 nat further above the blind guess than in training."
    )


def test_the_losses_by_dropout_are_those_of_the_development_set(data, tmp_path, monkeypatch):
    """With dropout off that of Trainer, with dropout on another, of each stack its own; they say how a run failed."""
    for module in (dropout_losses, preparation, records):
        monkeypatch.setattr(module, "REPO", tmp_path)
    changes = {"max_steps": 5, "max_eval_samples": 20, "do_eval": True, "test_file": None}
    values = tiny_runs.arguments(data, tmp_path / "run", tokenizer_name=str(tmp_path / "tokenizer"), **changes)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    prepare(given)
    assert run_translation.main(tiny_runs.flags(values)) == 0
    run = PlannedRun("tiny/run", "Admin", "", given, 1.0)
    monkeypatch.setattr(PlannedRun, "folder", tmp_path / "run")
    measure_dropout_losses(run)
    found = collect(run)
    assert found.dropout_losses["neither"] == pytest.approx(found.loss, rel=1e-4)
    assert len(set(found.dropout_losses.values())) == 4 and list(found.dropout_losses) == [*STACKS]
    path = tmp_path / "run" / records.DROPOUT_NAME
    path.write_text(json.dumps(found.dropout_losses | {"both": 1.0}))
    measure_dropout_losses(run)  # once is enough
    found = replace(collect(run), loss=99.0)
    assert found.outcome == "collapsed with dropout off" and found.training_distance == 1.0 - found.blind_loss
    assert replace(found, dropout_losses=found.dropout_losses | {"both": 99.0}).outcome == "stalled"
    table = {("Admin", "2-2"): ([found], 1), ("Post-LN", "2-2"): ([record()], 1)}
    assert [line.count("|") for line in dropout_list(table)] == [7, 7, 7] and " 1.00 |" in dropout_list(table)[2]
    assert dropout_list({("Post-LN", "2-2"): ([record()], 1)}) == []


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_blind_guess_is_made_on_the_targets_of_the_last_logged_updates(data, tmp_path, monkeypatch, pieces):
    """Those that a real run trains on, across epochs, are seen as they come into the model."""
    seen: list[list[list[int]]] = []
    step = TranslationTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append([[token for token in row if token != -100] for row in inputs["labels"].tolist()])
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TranslationTrainer, "training_step", training_step)
    for module in (preparation, records):
        monkeypatch.setattr(module, "REPO", tmp_path)
    changes = {"max_tokens": 400, "per_device_train_batch_size": None, "max_steps": 14, "logging_steps": 4}
    changes |= {"gradient_accumulation_steps": pieces, "label_smoothing_factor": 0.1, "test_file": None}
    values = tiny_runs.arguments(data, tmp_path / "run", tokenizer_name=str(tmp_path / "tokenizer"), **changes)
    prepare({name: str(value) if isinstance(value, Path) else value for name, value in values.items()})
    assert run_translation.main(tiny_runs.flags(values)) == 0
    given = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    blind_loss = json.loads((tmp_path / "tokenizer" / BLIND_NAME).read_text())["loss"]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    curve = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    assert [update for update, _ in curve] == [4, 8, 12, 14] and len(seen) == 14 * pieces
    failed = record(9.0, arguments=given, blind_loss=blind_loss, train_loss=curve)
    found = with_blind_training_loss(failed).blind_train_loss

    model, texts = preparation.data_arguments(given)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), model)
    targets = tokenizer(list(load_pairs("train", texts, model)["target"]))["input_ids"]
    guess = BlindGuess(targets, len(tokenizer))
    updates = [seen[i : i + pieces] for i in range(12 * pieces, 14 * pieces, pieces)]
    losses = [guess.loss([row for batch in update for row in batch], 0.1, were_counted=True) for update in updates]
    assert found == pytest.approx(sum(losses) / 2)
    # Not of a run that trained, one that goes on, one of another tokenizer, or where the data are gone
    for other in (replace(failed, loss=1.0), replace(failed, begun=True), replace(failed, blind_loss=blind_loss + 1)):
        assert with_blind_training_loss(other) == other
    gone = replace(failed, arguments=given | {"train_file": str(tmp_path / "nothing")})
    assert with_blind_training_loss(gone) == gone


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository of its own for runs and pages."""
    for module in ("scales", "records", "page", "preparation"):
        monkeypatch.setattr(f"training.experiments.{module}.REPO", tmp_path)
    monkeypatch.setattr(page, "DOCS", tmp_path / "docs")
    (tmp_path / "hub_configs").symlink_to(REPO / "hub_configs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "experiments_intro.md").write_text("# Experiments\n")
    return tmp_path


def write_run(run: PlannedRun, loss: float | None) -> None:
    """The files that a run leaves: finished with this loss, or diverged at update 123."""
    files: dict[str, object] = {"arguments.json": run.arguments | {"data_seed": None}}
    if loss is None:
        files["divergence.json"] = {"step": 123, "reason": "Training diverged.", "last_checkpoint": "x/checkpoint-100"}
        files["trainer_state.json"] = {"log_history": [{"step": 50, "eval_loss": 6.5}]}
    else:
        files["results.json"] = {"parameters": 10, "scores": {"eval_loss": loss}}
        history = [{"step": 50, "loss": 7.0}, {"step": 50, "eval_loss": 6.0}, {"step": 150, "eval_loss": loss}]
        files["trainer_state.json"] = {"log_history": history}
    for name, content in files.items():
        path = run.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    tokenizer = run.folder.parents[3] / run.arguments["tokenizer_name"]
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / BLIND_NAME).write_text(json.dumps({"loss": 5.5}))


def test_the_page_is_made_of_what_the_runs_recorded(here):
    runs = planned("depth", SCALES["cpu"])
    for run in runs:
        bonus = -0.2 if run.row == "Admin" else 0.01 * run.arguments["seed"] / 1111
        write_run(run, None if run.row == "Post-LN" and run.column != "6-6" else 4.0 + bonus)
    page.update()
    text = (here / "docs" / "experiments.md").read_text()
    assert "- 18-layer Post-LN fails: **reproduced** (3 runs: 3 diverged)." in text
    assert "- 6-layer Admin ends below Pre-LN: **reproduced**" in text and "3 and 3 seeds" in text
    assert "- 6-layer Pre-LN is ahead of Post-LN at first: **within noise**" in text
    diverged = "**diverged** 3 of 3: at update 123, 123, 123"
    assert f"| Post-LN | 55.7 ± 0.6 (-1.48) | {diverged} | {diverged} |" in text
    assert "**6 of 27** runs of run_translation.py tripped" in text
    assert f"| {math.exp(3.8):.1f} ± 0.0 (-1.70) |" in text and "27 of 27 runs are done" in text
    assert "Post-LN / Post-LN fails: **reproduced**" in text  # of Table 1: the same runs
    assert "ReZero ends below" not in text and "- Admin ends below ReZero: open (not run yet: 3 of 6" in text
    assert "| cpu | 27 of 27 | 8 of 9 reproduced, 1 within noise |" in text and "--scale paper" not in text
    figures = here / "docs" / "figures"
    assert (figures / "experiments-depth.png").stat().st_size > 10_000
    assert str(here) not in text + (here / "docs" / "experiments" / "depth.json").read_text()

    for run in runs:  # the page can be made again without the runs, and the figures stay
        for path in sorted(run.folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    times = {path: path.stat().st_mtime_ns for path in figures.iterdir()}
    page.update()
    assert (here / "docs" / "experiments.md").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in figures.iterdir()} == times


def write_scored(run: PlannedRun, loss: float, bleu: float, translations: list[str]) -> None:
    write_run(run, loss)
    scores = {"eval_loss": loss, "eval_bleu": bleu + 1, "test_bleu": bleu, "test_bleu_signature": "nrefs:1|x"}
    (run.folder / "results.json").write_text(json.dumps({"parameters": 10, "scores": scores}))
    (run.folder / "generated_predictions.txt").write_text("".join(f"{text}\n" for text in translations))
    session = {"commit": "abc", "processor": "x", "threads": 1, "torch": "2"}
    (run.folder / SESSIONS_NAME).write_text(2 * (json.dumps(session) + "\n"))


def test_a_run_that_translates_the_validation_set_alone_is_finished_with_its_score(here):
    run = planned("recipes", SCALES["small"])[0]
    write_run(run, 2.0)
    assert state(run) == "trained"
    scores = {"eval_loss": 2.0, "eval_bleu": 30.0}
    (run.folder / "results.json").write_text(json.dumps({"parameters": 10, "scores": scores}))
    assert state(run) == "finished" and collect(run).bleu == 30.0


def test_the_page_shows_scores_the_bootstrap_and_what_is_under_way(here):
    references = [f"ein Satz mit der Zahl {n} und einem Ende" for n in range(40)]
    data = here / "runs" / "data" / "multi30k"
    data.mkdir(parents=True)
    for language in ("en", "de"):
        (data / f"test_2016_flickr.{language}").write_text("".join(f"{text}\n" for text in references))
    for run in planned("dropout", TINY):
        if run.column == "4-4":
            write_run(run, 1.6 if "dropout 0.2" in run.row else 1.7)
    runs = {(run.row, run.arguments["seed"]): run for run in planned("converged", TINY)}
    assert len(runs) == 11 and state(runs["Admin", 1111]) == "trained", "to be translated with"
    worse = [text.replace("Zahl", "Nummer") for text in references]
    for seed, bleu in ((1111, 41.0), (2222, 42.0)):
        write_scored(runs["Admin", seed], 1.5, bleu, references)
    write_scored(runs["Pre-LN", 1111], 1.55, 40.0, worse)
    write_run(runs["DeepNorm", 1111], 1.9)  # not translated yet
    page.update()
    text = (here / "docs" / "experiments.md").read_text()
    assert "- 4-4 layers: **dropout 0.2** is chosen (mean validation loss 0.1: 1.700; 0.2: 1.550; 0.3: 1.700)." in text
    assert "| Admin, dropout 0.2 | 4.48 (-4.00) | … |" in text, "what is translated later is no part of the choice"
    assert "| tiny | 9 of 18 | 1 chosen |" in text and "| tiny | 3 of 11 |" in text
    assert f"| {math.exp(1.5):.2f} ± 0.00 (-4.00); 41.5 ± 0.7 BLEU (development: 42.5 ± 0.7); (2 of 3 runs) |" in text
    assert "BLEU: `nrefs:1|x`, of the test set." in text and "\n- 4-4, Pre-LN: -" in text and "(p 0.001)" in text
    assert "- DeepNorm, 4-4, seed 1111: loss 1.900 after update 150" in text
    folder = here / "docs" / "experiments"
    records = from_json((folder / "converged.json").read_text())
    assert records[runs["DeepNorm", 1111].name].begun and not records[runs["Admin", 1111].name].begun
    assert records[runs["Admin", 1111].name].sessions == [
        {"commit": "abc", "processor": "x", "threads": 1, "torch": "2"}
    ]
    comparison = json.loads((folder / "converged-comparisons.json").read_text())[runs["Pre-LN", 1111].name]
    assert "bs:1000" in comparison["signature"] and "case:lc" in comparison["signature"]

    # The page can be made again without runs and data: records, translations and comparisons are kept
    for path in sorted((here / "runs").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    page.update()
    assert (here / "docs" / "experiments.md").read_text() == text
    assert len(list((folder / "translations").iterdir())) == 3
    assert str(here) not in text + (folder / "converged.json").read_text()


def test_a_comparison_is_sacrebleus_paired_bootstrap():
    references = [f"dies ist der Satz {n} von vielen" for n in range(30)]
    worse = [text.replace("vielen", "allen") if n % 3 == 0 else text for n, text in enumerate(references)]
    metric = TranslationMetric(True, "de").scorers["bleu"]
    found = translations.compare(worse, references, references, metric)
    assert found.difference == pytest.approx(metric.corpus_score(worse, [references]).score - 100, abs=1e-3)
    assert 0 < found.p_value < 0.01 and "case:lc" in found.signature and "seed:12345" in found.signature
    assert translations.compare(worse, worse, references, metric).difference == 0
    with pytest.raises(ValueError, match="30, 29 and 30 sentences"):
        translations.compare(worse, worse[1:], references, metric)


def test_what_is_recorded_of_an_end_is_not_replaced_by_a_run_that_begins_again(here):
    run = planned("rezero", SCALES["cpu"])[0]
    ended = record(arguments=run.arguments)
    write_run(run, 4.0)
    (run.folder / "results.json").unlink()
    assert known([run], {}) == {} and known([run], {run.name: ended}) == {run.name: ended}
    checkpoint = run.folder / "checkpoint-50"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"log_history": [{"step": 50, "eval_loss": 6.0}]}')
    assert known([run], {})[run.name].begun and known([run], {})[run.name].eval_loss == [[50, 6.0]]
    assert known([run], {run.name: ended}) == {run.name: ended}
    assert known([run], {run.name: replace(ended, begun=True)})[run.name].loss is None, "the newer one"


def test_runs_of_other_arguments_are_left_out(here):
    run = planned("grid", SCALES["cpu"])[0]
    write_run(replace(run, arguments=run.arguments | {"max_steps": 149}), 4.0)
    page.update()
    assert "`python -m training.experiments grid --scale cpu`: 0 of 45" in (here / "docs/experiments.md").read_text()
    runner = Runner()
    runner.run([run])
    assert "max_steps: 149 there, 150 now" in runner.failures[run.name]


@pytest.mark.parametrize("content", ['{"a', "[1]", "\xff", "{}", None])
@pytest.mark.parametrize("name", ["arguments", "results", "trainer_state", "divergence"])
def test_runs_with_damaged_files_are_left_out_and_named(here, capsys, name, content):
    run, path = planned("grid", SCALES["cpu"])[0], f"{name}.json"
    write_run(run, None if name == "divergence" else 4.0)
    (run.folder / path).unlink()
    if content is not None:
        (run.folder / path).write_text(content, encoding="latin-1")
    if (name, content) in {("arguments", None), ("results", None), ("divergence", None)}:
        assert state(run) in ("new", "begun") and collect(run) is None
    elif (name, content) == ("divergence", "{}"):
        assert collect(run) is not None
    else:
        with pytest.raises(InputError, match="damaged|other arguments"):
            collect(run)
        assert __main__.state_of(run) == ("other" if name == "arguments" else state(run))
        page.update()
        assert str(run.folder) in capsys.readouterr().err
        assert "grid --scale cpu`: 0 of 45" in (here / "docs" / "experiments.md").read_text()


def test_a_run_that_another_process_finished_meanwhile_is_not_started(here, monkeypatch):
    states = iter(["new", "finished"])
    monkeypatch.setattr("training.experiments.runner.state", lambda run: next(states))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("started"))
    runner = Runner()
    runner.run([planned("grid", SCALES["cpu"])[0]])
    assert not runner.failures and next(states, None) is None


def test_the_page_in_the_repository_is_made_of_the_records_there(here):
    """Of docs/experiments/ alone, with no run's folder; and making it neither loses nor changes a record."""
    records = {path.name: path.read_text() for path in (REPO / "docs" / "experiments").glob("*.json")}
    shutil.copytree(REPO / "docs" / "experiments", here / "docs" / "experiments")
    shutil.copy(REPO / "docs" / "experiments_intro.md", here / "docs")
    (here / "docs" / "figures").mkdir()
    for figure in (REPO / "docs" / "figures").glob("experiments-*.png"):  # they are drawn where they are missing
        (here / "docs" / "figures" / figure.name).touch()
    page.update()
    assert (here / "docs" / "experiments.md").read_text() == (REPO / "docs" / "experiments.md").read_text()
    assert {path.name: path.read_text() for path in (here / "docs" / "experiments").glob("*.json")} == records
    assert not any(path.stat().st_size for path in (here / "docs" / "figures").iterdir()), "a figure is missing"


def test_other_seeds_are_shown_too(here):
    run = planned("rezero", SCALES["cpu"], [9])[0]
    write_run(run, 4.0)
    page.update()
    assert "rezero --scale cpu`: 0 of 15" in (here / "docs" / "experiments.md").read_text()
    page.update(seeds=[9])
    page.update()  # it is on record now
    text = (here / "docs" / "experiments.md").read_text()
    assert "rezero --scale cpu`: 1 of 16" in text and "| Admin | 54.6 (-1.50); (1 of 4 runs) |" in text


def test_a_map_shows_where_runs_failed(here):
    for number, run in enumerate(planned("grid", SCALES["cpu"])[:20]):
        write_run(run, None if number < 7 else 4.0 + number / 10)
    page.update()
    text = (here / "docs" / "experiments.md").read_text()
    assert "| Post-LN, β₂ 0.99 | **diverged**: at update 123 |" in text
    assert "(paper: 7 of 15): **seen with one seed** (15 runs: 8 trained, 7 diverged; losses" in text
    assert (here / "docs" / "figures" / "experiments-grid.png").stat().st_size > 10_000


def test_cells_and_records_in_text():
    assert describe([record(1000.0)], 1) == "**failed**: +995.00"
    records = [record(math.log(100)), record(math.log(104)), record(6.0), record(None)]
    assert describe(records, 5) == (
        "102.0 ± 2.8 (-0.38); **failed** 1 of 4: +1.00; **diverged** 1 of 4: at update 7; (4 of 5 runs)"
    )
    assert describe([replace(record(0.0), bleu=30.25)], 1) == "1.00 (-5.00); 30.2 BLEU" and describe([], 3) == "…"
    table = {("A", "x"): ([], 1), ("B", "y"): ([], 1)}
    assert markdown(table)[2:] == ["| A | … |  |", "| B |  | … |"]
    named = {"cpu/b": record(None), "cpu/a": record()}
    assert from_json(to_json(named)) == named and to_json(named).index("cpu/a") < to_json(named).index("cpu/b")


# --- real runs ------------------------------------------------------------------------------------

START = """
import json, sys
from training.experiments.runner import Runner
from training.experiments.scales import PlannedRun
runner = Runner(jobs=3)
runner.run([PlannedRun(**values) for values in json.load(open(sys.argv[1]))])
print(json.dumps(runner.failures))
sys.exit(128 + runner.stopped if runner.stopped else 0)
"""


@pytest.mark.slow
def test_runs_stop_go_on_diverge_and_fail(tmp_path):
    write_embedded_data(tmp_path, train=60, validation=6, test=4)
    shape = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=32,decoder_ffn_dim=32"
    base = {
        "config_overrides": f"{shape},encoder_attention_heads=2,decoder_attention_heads=2",
        "source_lang": "en",
        "target_lang": "de",
        "train_file": str(tmp_path / "train"),
        "validation_file": str(tmp_path / "validation"),
        "test_file": str(tmp_path / "test"),
        "tokenizer_name": str(tmp_path / "tokenizer"),
        "vocab_size": 200,
        "do_train": True,
        "do_eval": True,
        "predict_with_generate": False,
        "prediction_loss_only": True,
        "max_tokens": 200,
        "max_steps": 600,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_steps": 20,
        "save_total_limit": 1,
        "logging_steps": 10,
        "learning_rate": 0.003,
        "seed": 1,
    }
    changes = {
        "stopped": {},
        "diverging": {"learning_rate": 1e6},
        "impossible": {"train_file": str(tmp_path / "nothing")},
    }
    runs = []
    for name, change in changes.items():
        folder = {"output_dir": str(tmp_path / "runs" / name)}
        runs.append(PlannedRun(name, name, "", base | change | folder, 10, TRANSLATE if name == "stopped" else {}))
    stopped, diverging, impossible = runs
    plan = tmp_path / "plan.json"

    def start(*wanted: PlannedRun) -> subprocess.Popen:
        plan.write_text(json.dumps([asdict(run) for run in wanted]))
        return subprocess.Popen([sys.executable, "-c", START, str(plan)], cwd=REPO, stdout=-1, stderr=-1, text=True)

    prepare(base)
    assert state(stopped) == "new"
    process = start(*runs)
    deadline = time.monotonic() + 300
    first = stopped.folder / "checkpoint-20" / "trainer_state.json"
    while time.monotonic() < deadline and process.poll() is None and not first.exists():
        time.sleep(0.05)
    meanwhile = Runner()
    meanwhile.run([stopped])
    assert meanwhile.failures == {"stopped": "another process is at it"}
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM received" in errors
    assert "stopped stopped" in output and state(stopped) == "begun"
    (checkpoint,) = stopped.folder.glob("checkpoint-*")
    assert 20 <= int(checkpoint.name.split("-")[1]) < 600
    partial = collect(stopped)
    assert partial is not None and partial.begun and partial.loss is None and partial.eval_loss[0][0] == 20

    process = start(*runs)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "stopped goes on" in output
    assert "stopped translates" in output and "stopped finished" in output
    assert set(json.loads(output.splitlines()[-1])) == {"impossible"}
    assert "exit code 2" in errors and f"there is no {tmp_path / 'nothing'}.en" in errors
    assert f"continuing from {checkpoint}" in log_path(stopped).read_text()

    end, divergence = collect(stopped), collect(diverging)
    assert end is not None and divergence is not None
    assert end.loss == json.loads((stopped.folder / "results.json").read_text())["scores"]["eval_loss"]
    assert [step for step, _ in end.eval_loss] == [*range(20, 601, 20)]
    assert not end.begun and partial.eval_loss == end.eval_loss[: len(partial.eval_loss)]
    assert end.bleu == end.scores["test_bleu"] and "eval_bleu_signature" in end.scores
    assert len((stopped.folder / "generated_predictions.txt").read_text().splitlines()) == 4
    (session,) = end.sessions  # three times the same
    assert session.keys() == {"commit", "processor", "threads", "torch", "transformers"} and session["threads"] >= 1
    assert divergence.failed and divergence.loss is None and "diverged" in divergence.reason
    assert describe([divergence], 1) == f"**diverged**: at update {divergence.diverged_at}"
    started = start(*runs[:2]).communicate(timeout=120)[0]
    assert started.splitlines() == ["{}"]  # nothing is left to do
