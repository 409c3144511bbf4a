"""The experiments as data: which runs the paper's tables and figures need, and what it claims of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Any

from .architectures import CLAIMS, architecture_runs
from .claims import Claim, fail, fail_somewhere, lower, lower_in_most, score_higher, train
from .records import Record, kept, known
from .scales import PlannedRun, Scale, make_run


TITLES = {
    "post_ln": "Post-LN",
    "pre_ln": "Pre-LN",
    "admin": "Admin",
    "rezero": "ReZero",
    "rezero_post_ln": "ReZero + Post-LN",
    "deepnorm": "DeepNorm",
    "admin_uniform": "Admin, uniform ω",
    "admin_uniform_o1": "Admin, uniform ω = √n",
    "admin_uniform_on": "Admin, uniform ω = 1",
    "admin_constant": "Admin, constant ω",
    "admin_constant_o1": "Admin, constant ω = √n",
    "ds_init": "DS-Init",
    "looklinear": "LookLinear",
    "fixup": "FixUp",
    "b2t": "B2T",
    "keel": "Keel",
    "mix_ln": "Mix-LN",
    "layer_norm_scaling": "LayerNorm Scaling",
    "layer_scale": "LayerScale",
    "gpas": "GPAS",
}
# Variants of `admin` by what is changed, of training.experiments.ablations
ABLATIONS = {
    "admin_frozen": "ω not trained",
    "admin_scalar": "ω one number",
    "admin_measured_at_one": "profiled with ω = 1",
    "admin_with_first": "with a trained ω_1",
}
COMPARED = ("post_ln", "pre_ln", "admin")
# Values of dropout by the layers of each stack: the recipe's 0.3 first, and what 0.3 of it gave says where to look.
# 4-4 layers learnt to the end of 70 epochs, 12-12 were best after 44: see docs/results.md
DROPOUTS = {4: (0.3, 0.2, 0.1), 12: (0.3, 0.4, 0.2)}
# What people add to a recipe, as flags, by the rows of the table
RECIPES = {"baseline": {}, "BPE-dropout 0.1": {"bpe_dropout": 0.1}, "average, decay 0.999": {"ema_decay": 0.999}}
TRANSLATE_VALIDATION = {
    "do_train": False,
    "predict_with_generate": True,
    "prediction_loss_only": False,
    "num_beams": 5,
}
TRANSLATE = {"do_train": False, "do_predict": True, "predict_with_generate": True, "prediction_loss_only": False}


@dataclass(frozen=True)
class Experiment:
    """Runs, and what the paper claims of them.

    Attributes:
        paper: what the paper found.
        runs: those of one seed.
        claims: what is compared.
        seeds: how many at most.
        is_grid: whether the figure is a map of the table, instead of curves.
        scales: names of those that it is planned at; the first is the default.
        outcome: what the records say where nothing is claimed: sentences, none while they cannot say.
        lists_losses: whether table and figure have losses instead of perplexities, the table with a line for each
            cell, with the training loss and ω.
        reference: the row that the translations of the others are compared with.
        shares_with: other experiments whose records stand for runs of this one.
    """

    title: str
    paper: str
    runs: Callable[[Scale, int], list[PlannedRun]]
    claims: Sequence[Claim]
    seeds: int = 3
    is_grid: bool = False
    scales: Sequence[str] = ("cpu", "paper")
    outcome: Callable[[Scale, Mapping[str, Record]], list[str]] | None = None
    reference: str | None = None
    lists_losses: bool = False
    shares_with: Sequence[str] = ()


def depth_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    return [
        make_run(scale, scale.large, layers, system, seed, TITLES[system])
        for layers in (6, 12, 18)
        for system in COMPARED
    ]


def system_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    return [
        make_run(scale, scale.large, layers, system, seed, title, order=-layers)
        for layers in (6, 18)
        for system, title in TITLES.items()
    ]


def ablation_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    program = "training.experiments.ablations"
    variants = [
        make_run(scale, scale.large, 18, system, seed, title, program=program) for system, title in ABLATIONS.items()
    ]
    return [make_run(scale, scale.large, 18, "admin", seed, TITLES["admin"]), *variants]


def hybrid_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    pairs = [("post_ln", "post_ln"), ("post_ln", "pre_ln"), ("pre_ln", "post_ln"), ("pre_ln", "pre_ln")]
    pairs.append(("admin", "admin"))
    return [
        make_run(scale, scale.large, 18, pair, seed, " / ".join(TITLES[system] for system in pair)) for pair in pairs
    ]


def warmup_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    runs = []
    for factor in (1, 2, 3, 4):
        steps = factor * scale.recipe(scale.large, 18)["warmup_steps"]
        changes = {"tag": f"warmup{steps}" if factor > 1 else "", "warmup_steps": steps}
        runs.append(make_run(scale, scale.large, 18, "post_ln", seed, f"Post-LN, warm-up × {factor}", **changes))
    return [*runs, make_run(scale, scale.large, 18, "admin", seed, "Admin, warm-up × 1")]


def grid_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    runs = []
    for system, beta2, rate in product(COMPARED, (0.99, 0.995, 0.999), scale.learning_rates):
        changes = {**scale.no_warmup, "learning_rate": rate, "adam_beta2": beta2}
        place = f"{TITLES[system]}, β₂ {beta2}", f"{rate:g}", f"no_warmup-lr{rate:g}-beta{beta2}"
        runs.append(make_run(scale, scale.small, scale.grid_layers, system, seed, *place, **changes))
    return runs


def rezero_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    return [
        make_run(scale, scale.small, 6, system, seed, TITLES[system])
        for system in ("admin", "post_ln", "pre_ln", "rezero", "rezero_post_ln")
    ]


def batch_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    return [
        make_run(
            scale, scale.large, 18, system, seed, TITLES[system], f"{size} batch: {label}", f"{size}_batch", **changes
        )
        for size, (label, changes) in zip(("small", "large"), scale.batches.items(), strict=True)
        for system in ("admin", "admin_uniform", "deepnorm")
    ]


def deep_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    runs = []
    for tag, layers, system in product(("", "quarter_rate"), scale.deep, ("admin", "post_ln")):
        if layers == min(scale.deep) or (system == "admin" and not tag):
            rate = scale.recipe(scale.large, layers)["learning_rate"] * (0.25 if tag else 1.0)
            place = TITLES[system], f"{layers}-{layers}" + (", quarter rate" if tag else ""), tag
            changes = {**scale.deep[layers], "learning_rate": rate}
            runs.append(make_run(scale, scale.large, layers, system, seed, *place, **changes))
    return runs


def dropout_run(
    scale: Scale, layers: int, dropout: float, system: str, seed: int, row: str, **others: Any
) -> PlannedRun:
    """A run with a dropout of its own; `others` as for [`make_run`]."""
    options = {"tag": f"dropout{dropout}", "overrides": {"dropout": dropout}}
    return make_run(scale, scale.large, layers, system, seed, row, **options, **others)


def dropout_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    return [
        dropout_run(scale, layers, dropout, system, seed, f"{TITLES[system]}, dropout {dropout}", order=order)
        for order, (layers, dropouts) in enumerate(DROPOUTS.items())
        for dropout in dropouts
        for system in reversed(COMPARED)
    ]


def mean_losses(scale: Scale, layers: int, records: Mapping[str, Record]) -> dict[float, float]:
    """What dropout is chosen by: the mean validation loss of each value, over the systems that train with all values.

    Returns:
        Losses by dropout; none while runs are missing, or where no system trains with all values.
    """
    ends = {
        (dropout, system): records.get(dropout_run(scale, layers, dropout, system, scale.seeds[0], "").name)
        for dropout in sorted(DROPOUTS[layers])
        for system in COMPARED
    }
    if any(record is None or record.begun for record in ends.values()):
        return {}
    failing = {system for (_, system), record in ends.items() if record.failed}
    losses: dict[float, list[float]] = {}
    for (dropout, system), record in ends.items():
        if system not in failing:
            losses.setdefault(dropout, []).append(record.final_loss)
    return {dropout: mean(values) for dropout, values in losses.items()}


def choose_dropout(scale: Scale, records: Mapping[str, Record]) -> dict[int, float]:
    """The dropout with the lowest mean loss for each number of layers where that is known; of equals, the smaller."""
    losses = {layers: mean_losses(scale, layers, records) for layers in DROPOUTS}
    return {layers: min(there, key=lambda dropout: there[dropout]) for layers, there in losses.items() if there}


def dropout_outcome(scale: Scale, records: Mapping[str, Record]) -> list[str]:
    lines = []
    for layers, dropout in choose_dropout(scale, records).items():
        losses = "; ".join(f"{value}: {loss:.3f}" for value, loss in mean_losses(scale, layers, records).items())
        lines.append(f"{layers}-{layers} layers: **dropout {dropout}** is chosen (mean validation loss {losses}).")
    return lines


def converged_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    """Those of the depths whose dropout is chosen."""
    first = scale.seeds[0]
    runs = []
    for layers, dropout in choose_dropout(scale, known(dropout_runs(scale, first), kept("dropout"))).items():
        orders = dict.fromkeys(reversed(COMPARED), list(DROPOUTS).index(layers))
        if seed == first:
            orders |= dict.fromkeys(("deepnorm", "admin_uniform"), len(DROPOUTS))
        runs += [
            dropout_run(scale, layers, dropout, system, seed, TITLES[system], scoring=TRANSLATE, order=order)
            for system, order in orders.items()
        ]
    return runs


def recipe_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    return [
        make_run(scale, scale.large, 2, "admin", seed, row, tag="-".join(flags), scoring=TRANSLATE_VALIDATION, **flags)
        for row, flags in RECIPES.items()
    ]


EXPERIMENTS = {
    "depth": Experiment(
        "Depth: Table 2, Figures 1 and 9",
        "On WMT'14 En-De, 6-layer Post-LN trains and 12- and 18-layer Post-LN fail, while Pre-LN and Admin train at "
        "every depth. Admin scores best: 27.90, 28.58 and 29.03 BLEU against 27.27, 28.26 and 28.38 of Pre-LN and "
        "27.80 of 6-layer Post-LN. With 6 layers Pre-LN learns faster than Post-LN at first.",
        depth_runs,
        (
            fail("12-layer Post-LN fails", ("Post-LN", "12-12")),
            fail("18-layer Post-LN fails", ("Post-LN", "18-18")),
            train("6-layer Post-LN trains", ("Post-LN", "6-6")),
            train("Pre-LN trains at every depth", ("Pre-LN", "*")),
            train("Admin trains at every depth", ("Admin", "*")),
            *(
                lower(f"{depth}-layer Admin ends below Pre-LN", ("Admin", f"{depth}-*"), ("Pre-LN", f"{depth}-*"))
                for depth in (6, 12, 18)
            ),
            lower("6-layer Pre-LN is ahead of Post-LN at first", ("Pre-LN", "6-6"), ("Post-LN", "6-6"), early=True),
        ),
    ),
    "systems": Experiment(
        "Depth, with every system",
        "With 18 layers ReZero, FixUp and LookLinear diverge on WMT'14 En-De (section 5.3). The papers of other "
        "systems say of their own deep models that these train where Post-LN does not (DS-Init, B2T, DeepNorm, Keel, "
        "Mix-LN), or end below Pre-LN (LayerNorm Scaling, GPAS). One seed each. Columns: layers of both stacks.",
        system_runs,
        (
            *(fail(f"18-layer {title} fails", (title, "18-18")) for title in ("ReZero", "FixUp", "LookLinear")),
            *(
                train(f"18-layer {title} trains", (title, "18-18"))
                for title in ("DS-Init", "B2T", "DeepNorm", "Keel", "Mix-LN")
            ),
            *(
                lower(f"18-layer {title} ends below Pre-LN", (title, "18-18"), ("Pre-LN", "18-18"))
                for title in ("LayerNorm Scaling", "GPAS")
            ),
        ),
        seeds=1,
        is_grid=True,
        scales=("cpu",),
        shares_with=("depth", "rezero"),
    ),
    "ablations": Experiment(
        "Choices of Admin",
        "Not of the paper, which trains a vector ω and compares no variants. Each row changes one choice of this "
        "project: ω stays at the profile's value; one number for each sub-layer; the profile measures with ω = 1, as "
        "section 4.3 says, and not with ω applied, as the authors' code does; an ω_1 on the first sub-layer, as in "
        "that code. Rows and criteria were written down before the runs.",
        ablation_runs,
        tuple(
            lower(f"Admin ends below its variant: {title}", ("Admin", "*"), (title, "*"))
            for title in ABLATIONS.values()
        ),
        scales=("cpu",),
        shares_with=("depth",),
    ),
    "hybrid": Experiment(
        "Hybrids: Table 1",
        "With 18 layers on WMT'14 En-De, a Post-LN encoder diverges with a Post-LN and with a Pre-LN decoder, and "
        "Pre-LN with Pre-LN converges: the vanishing gradient of Post-LN decoders is not what makes training fail. "
        "Rows: encoder / decoder; a Pre-LN encoder with a Post-LN decoder and Admin are not in the paper's table.",
        hybrid_runs,
        (
            fail("Post-LN / Post-LN fails", ("Post-LN / Post-LN", "*")),
            fail("Post-LN / Pre-LN fails", ("Post-LN / Pre-LN", "*")),
            train("Pre-LN / Pre-LN trains", ("Pre-LN / Pre-LN", "*")),
            train("Admin trains", ("Admin / Admin", "*")),
        ),
    ),
    "warmup": Experiment(
        "Longer warm-up: section 5.2",
        "18-layer Post-LN still fails on WMT'14 En-De when its 8,000 updates of warm-up become 16,000, 24,000 or "
        "32,000; Admin trains with the usual ones.",
        warmup_runs,
        (
            *(fail(f"Post-LN fails with warm-up × {n}", (f"Post-LN, warm-up × {n}", "*")) for n in (1, 2, 3, 4)),
            train("Admin trains with warm-up × 1", ("Admin*", "*")),
        ),
        seeds=2,
    ),
    "grid": Experiment(
        "Without warm-up: Figure 10",
        "On IWSLT'14 De-En with 6 layers and no warm-up, with 5 learning rates (1e-4 to 5e-4) and 3 values of β₂, "
        "Post-LN diverges in 7 of 15 settings, Pre-LN and Admin in none, and Admin's BLEU is above Pre-LN's in all "
        "15. Columns: learning rates.",
        grid_runs,
        (
            fail_somewhere("Post-LN fails in some settings (paper: 7 of 15)", ("Post-LN*", "*")),
            train("Pre-LN trains in all 15 settings", ("Pre-LN*", "*")),
            train("Admin trains in all 15 settings", ("Admin*", "*")),
            lower_in_most(
                "Admin ends below Pre-LN in most settings (paper: all 15)", ("Admin*", "*"), ("Pre-LN*", "*")
            ),
        ),
        seeds=1,
        is_grid=True,
    ),
    "rezero": Experiment(
        "ReZero: Table 3",
        "With 6 layers on IWSLT'14 De-En: Admin 35.67±0.15 BLEU, Post-LN 35.64±0.23, Pre-LN 35.50±0.04, ReZero "
        "33.67±0.14, ReZero + Post-LN 34.67±0.08. Starting with no weight on the branches limits what a model learns.",
        rezero_runs,
        (
            lower("Admin ends below ReZero", ("Admin", "*"), ("ReZero", "*")),
            lower("Admin ends below ReZero + Post-LN", ("Admin", "*"), ("ReZero + Post-LN", "*")),
            lower("ReZero + Post-LN ends below ReZero", ("ReZero + Post-LN", "*"), ("ReZero", "*")),
        ),
    ),
    "batch": Experiment(
        "Small and large batches: known limits",
        "Not of the paper: the README of its authors' admin-torch says of WMT'17 En-De that at 8 × 4,096 tokens an "
        "update Admin trains and DeepNet (DeepNorm) diverges, at 128 × 4,096 the other way round, and that uniform ω "
        "trains in both.",
        batch_runs,
        (
            train("Admin trains with the small batch", ("Admin", "small*")),
            fail("DeepNorm fails with the small batch", ("DeepNorm", "small*")),
            fail("Admin fails with the large batch", ("Admin", "large*")),
            train("DeepNorm trains with the large batch", ("DeepNorm", "large*")),
            train("Admin with uniform ω trains with both", ("Admin, uniform ω", "*")),
        ),
        seeds=1,
    ),
    "deep": Experiment(
        "Deeper: 100 layers and more",
        "Not in the paper's tables, which end at 18 layers (and 60 in an encoder): the example of its authors' "
        "admin-torch is for 100-100. 500-500 layers are 2,500 sub-layers. A quarter of the learning rate was added to "
        "the plan after the first run at scale cpu, Admin 100-100, had failed.",
        deep_runs,
        (
            train("Admin trains at every depth", ("Admin", "???-???")),
            fail("100-layer Post-LN fails", ("Post-LN", "100-100")),
            train("100-layer Admin trains with a quarter of the learning rate", ("Admin", "*quarter rate")),
            fail("100-layer Post-LN fails with a quarter of the learning rate", ("Post-LN", "*quarter rate")),
        ),
        seeds=1,
    ),
    "dropout": Experiment(
        "Dropout for converged models",
        "Not of the paper: it chooses the dropout of the next section, for each depth one of three values. Seed 1111 "
        "of Admin, Pre-LN and Post-LN is trained with each value. The validation loss of a run is that of the mean of "
        "its last ten checkpoints. The value with the lowest mean loss is chosen, over the systems that train with "
        "all three values; if two are equal, the smaller. Nothing is translated.",
        dropout_runs,
        (),
        seeds=1,
        scales=("tiny",),
        outcome=dropout_outcome,
    ),
    "converged": Experiment(
        "Converged models: BLEU on Multi30k",
        "The paper's converged models have 27.90, 28.58 BLEU (Admin, 6-6 and 12-12 layers, WMT'14 En-De), 27.27 and "
        "28.26 (Pre-LN), 27.80 and failed (Post-LN). Here 4-4 and 12-12 layers of width 128 are trained with the "
        "dropout of the section above, until the validation loss has not fallen for ten epochs, or for 50 epochs.",
        converged_runs,
        (
            train("4-layer Post-LN trains", ("Post-LN", "4-4")),
            fail("12-layer Post-LN fails", ("Post-LN", "12-12")),
            train("Pre-LN trains at both depths", ("Pre-LN", "*")),
            train("Admin trains at both depths", ("Admin", "*")),
            *(
                score_higher(
                    f"{depth}-layer Admin scores above Pre-LN", ("Admin", f"{depth}-*"), ("Pre-LN", f"{depth}-*")
                )
                for depth in DROPOUTS
            ),
            *(
                lower(f"{depth}-layer Admin ends below Pre-LN", ("Admin", f"{depth}-*"), ("Pre-LN", f"{depth}-*"))
                for depth in DROPOUTS
            ),
            score_higher("4-layer Post-LN scores above Pre-LN", ("Post-LN", "4-4"), ("Pre-LN", "4-4")),
            score_higher("Admin scores higher with 12 layers than with 4", ("Admin", "12-12"), ("Admin", "4-4")),
        ),
        scales=("tiny",),
        reference="Admin",
    ),
    "recipes": Experiment(
        "BPE-dropout and the moving average of the weights",
        "Not of the paper: do two popular recipes help on Multi30k? Provilkov et al. (2020) report up to 2.3 BLEU "
        "more with BPE-dropout than with BPE. Admin has 2-2 layers, three seeds and the same number of updates for "
        "all. The weights of the last update, or their average, are compared by the loss of the validation set and by "
        "BLEU of its translations with 5 beams. The test set is not used. A recipe helps if the means over the seeds "
        "differ by more than two standard errors. Rows, settings and criteria were written down before the runs.",
        recipe_runs,
        tuple(
            claim(f"{row} {how} the baseline", (row, "*"), ("baseline", "*"))
            for row in list(RECIPES)[1:]
            for claim, how in ((lower, "ends with a lower loss than"), (score_higher, "scores above"))
        ),
        scales=("small",),
    ),
    "architectures": Experiment(
        "Stock architectures with an injected ω",
        "Not of the paper: when does `inject` help stock models that are trained from scratch, and how much? OPT is a "
        "language model and BERT fills in masked tokens, in blocks of 32 tokens of the English side of Tatoeba. BART "
        "translates Multi30k. The Pre-LN counterparts are OPT with `do_layer_norm_before=True`, Megatron-BERT and "
        "mBART, of the same shape. Embeddings have the initialisation of the class. Projections have a standard "
        "deviation of 0.02 (the default of the class) or 0.07, or are Xavier-uniform. With 0.07 at width 64, branches "
        "have the same variances as with 0.02 at width 768. Admin's chain of variances starts at 1 after the first "
        "LayerNorm, as in `inject`; the naive chain starts at the variance of the embeddings. A run failed if its "
        "validation loss does not end 0.1 nats below a blind guess: how often tokens occur (for BART: how often they "
        "occur at a position).",
        architecture_runs,
        CLAIMS,
        scales=("architectures", "architectures-long"),
        lists_losses=True,
    ),
}


def planned(name: str, scale: Scale, seeds: Sequence[int] | None = None) -> list[PlannedRun]:
    """The runs of an experiment, all of one seed before those of the next: with the seeds given, or its own."""
    experiment = EXPERIMENTS[name]
    return [run for seed in seeds or scale.seeds[: experiment.seeds] for run in experiment.runs(scale, seed)]
