"""The experiments as data: which runs the paper's tables and figures need, and what it claims of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .claims import Claim, fail, fail_somewhere, lower, lower_in_most, train
from .scales import Run, Scale, make_run


TITLES = {
    "post_ln": "Post-LN",
    "pre_ln": "Pre-LN",
    "admin": "Admin",
    "rezero": "ReZero",
    "rezero_post_ln": "ReZero + Post-LN",
    "deepnorm": "DeepNorm",
    "admin_uniform": "Admin, uniform ω",
}
COMPARED = ("post_ln", "pre_ln", "admin")


@dataclass(frozen=True)
class Experiment:
    """Runs, and what the paper claims of them.

    Attributes:
        paper: what the paper found.
        runs: those of one seed.
        claims: what is compared.
        seeds: how many at most.
        is_grid: whether the figure is a map of the table, in place of curves.
    """

    title: str
    paper: str
    runs: Callable[[Scale, int], list[Run]]
    claims: Sequence[Claim]
    seeds: int = 3
    is_grid: bool = False


def depth_runs(scale: Scale, seed: int) -> list[Run]:
    return [
        make_run(scale, scale.large, layers, system, seed, TITLES[system], f"{layers}-{layers}")
        for layers in (6, 12, 18)
        for system in COMPARED
    ]


def hybrid_runs(scale: Scale, seed: int) -> list[Run]:
    pairs = [("post_ln", "post_ln"), ("post_ln", "pre_ln"), ("pre_ln", "post_ln"), ("pre_ln", "pre_ln")]
    pairs.append(("admin", "admin"))
    return [
        make_run(scale, scale.large, 18, pair, seed, " / ".join(TITLES[system] for system in pair), "18-18")
        for pair in pairs
    ]


def warmup_runs(scale: Scale, seed: int) -> list[Run]:
    warmup = scale.recipe(scale.large, 18)["warmup_steps"]
    longer = [
        make_run(
            scale,
            scale.large,
            18,
            "post_ln",
            seed,
            f"Post-LN, warm-up × {factor}",
            "18-18",
            tag=f"warmup{factor * warmup}" if factor > 1 else "",
            warmup_steps=factor * warmup,
        )
        for factor in (1, 2, 3, 4)
    ]
    return [*longer, make_run(scale, scale.large, 18, "admin", seed, "Admin, warm-up × 1", "18-18")]


def grid_runs(scale: Scale, seed: int) -> list[Run]:
    return [
        make_run(
            scale,
            scale.small,
            scale.grid_layers,
            system,
            seed,
            f"{TITLES[system]}, β₂ {beta2}",
            f"{rate:g}",
            tag=f"no_warmup-lr{rate:g}-beta{beta2}",
            **scale.no_warmup,
            learning_rate=rate,
            adam_beta2=beta2,
        )
        for system in COMPARED
        for beta2 in (0.99, 0.995, 0.999)
        for rate in scale.learning_rates
    ]


def rezero_runs(scale: Scale, seed: int) -> list[Run]:
    return [
        make_run(scale, scale.small, 6, system, seed, TITLES[system], "6-6")
        for system in ("admin", "post_ln", "pre_ln", "rezero", "rezero_post_ln")
    ]


def batch_runs(scale: Scale, seed: int) -> list[Run]:
    return [
        make_run(
            scale,
            scale.large,
            18,
            system,
            seed,
            TITLES[system],
            f"{size} batch: {label}",
            tag=f"{size}_batch",
            **changes,
        )
        for size, (label, changes) in zip(("small", "large"), scale.batches.items(), strict=True)
        for system in ("admin", "admin_uniform", "deepnorm")
    ]


def deep_runs(scale: Scale, seed: int) -> list[Run]:
    first = min(scale.deep)
    rates = {"": 1.0, "quarter_rate": 0.25}
    return [
        make_run(
            scale,
            scale.large,
            layers,
            system,
            seed,
            TITLES[system],
            f"{layers}-{layers}" + (", quarter rate" if tag else ""),
            tag=tag,
            **changes | {"learning_rate": share * scale.recipe(scale.large, layers)["learning_rate"]},
        )
        for tag, share in rates.items()
        for layers, changes in scale.deep.items()
        for system in ("admin", "post_ln")
        if layers == first or (system == "admin" and not tag)
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
}


def planned(name: str, scale: Scale, seeds: Sequence[int] | None = None) -> list[Run]:
    """The runs of an experiment, all of one seed before those of the next: with the seeds given, or its own."""
    experiment = EXPERIMENTS[name]
    return [run for seed in seeds or scale.seeds[: experiment.seeds] for run in experiment.runs(scale, seed)]
