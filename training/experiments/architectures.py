"""The trainings of stock models, with and without an injected ω: which there are, and what is expected of them.

Written down before they ran, but for the first readings (OPT of 24 layers, one seed, other blocks of the same text).
"""

from collections.abc import Sequence
from math import inf
from statistics import mean
from typing import Any

from .claims import Claim, Groups, fail, train
from .records import Record
from .scales import RUNS, PlannedRun, Scale


# What takes the place of depth and Pre-LN in a configuration; a class that is Pre-LN has a model type of its own
SHAPES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_attention_heads": 4},
    "bert": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
    "bart": {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
PRE_LN = {"opt": "opt", "bert": "megatron-bert", "bart": "mbart"}
FAMILIES = {"opt": "OPT", "bert": "BERT", "bart": "BART"}
INITIALIZATIONS = {"xavier": "Xavier", "wide": "std 0.07", "stock": "std 0.02"}
SYSTEMS = {"post_ln": "Post-LN", "pre_ln": "Pre-LN", "admin": "Admin", "naive": "Admin, naive chain"}
THREE = ("post_ln", "pre_ln", "admin")


def architecture_runs(scale: Scale, seed: int) -> list[PlannedRun]:
    """The runs of a seed: what is compared with every seed, and, of the first, what else the rule is looked for in."""
    plan: list[tuple[int, str, int, str, Sequence[str]]] = []  # order, family, layers, initialisation, systems
    if seed == scale.seeds[0]:
        plan += [(order, "opt", layers, "wide", ("post_ln", "admin")) for order, layers in ((1, 24), (2, 48))]
        plan += [(5, "opt", 96, initialization, ("post_ln", "admin")) for initialization in INITIALIZATIONS]
    for initialization in ("xavier", "stock"):
        systems = THREE if seed != scale.seeds[0] else tuple(SYSTEMS)
        plan += [(0, "opt", 24, initialization, systems), (2, "opt", 48, initialization, systems)]
        plan += [(1, "bert", 24, initialization, THREE), (4, "bert", 48, initialization, THREE)]
        plan += [(3, "bart", 18, initialization, THREE)]
    later = 10 * scale.seeds.index(seed) if seed in scale.seeds else 0
    return [
        architecture_run(scale, family, layers, initialization, system, seed, order + later)
        for order, family, layers, initialization, systems in sorted(plan, key=lambda item: item[0])
        for system in systems
    ]


def architecture_run(
    scale: Scale, family: str, layers: int, initialization: str, system: str, seed: int, order: int = 0
) -> PlannedRun:
    depth = ("encoder_layers", "decoder_layers") if family == "bart" else ("num_hidden_layers",)
    model = SHAPES[family] | dict.fromkeys(depth, layers) | {"max_position_embeddings": 64}
    if family == "opt":
        model["do_layer_norm_before"] = str(system == "pre_ln").lower()
    data_set = scale.small if family == "bart" else scale.large
    name = f"{family}-{layers}-{initialization}-{system}-seed{seed}"
    recipe = scale.recipe(data_set, layers)
    if family == "bert":  # whose loss is that of the masked tokens alone
        recipe |= {key: 2 * recipe[key] for key in ("max_steps", "warmup_steps", "eval_steps", "logging_steps")}
        recipe["masked"] = 0.3
    arguments = recipe | {
        "model_type": PRE_LN[family] if system == "pre_ln" else family,
        "config_overrides": ",".join(f"{key}={value}" for key, value in model.items()),
        "initialization": initialization,
        "chain": {"admin": "norm", "naive": "embeddings"}.get(system),
        "tokenizer_name": f"{RUNS}/{scale.name}/tokenizer-{data_set}",
        "output_dir": f"{RUNS}/{scale.name}/{name}",
        "seed": seed,
    }
    return PlannedRun(
        f"{scale.name}/{name}",
        SYSTEMS[system],
        f"{FAMILIES[family]} {f'{layers}-' * (family == 'bart')}{layers}, {INITIALIZATIONS[initialization]}",
        arguments,
        scale.seconds(data_set, layers, arguments),
        order=order,
        program="training.experiments.stock_models",
    )


# --- what is expected -----------------------------------------------------------------------------


def _within(text: str, one: tuple[str, str], other: tuple[str, str], margin: float) -> Claim:
    """In no column does `one` end more than `margin` nats above `other`, by the mean over seeds, or fail alone."""

    def loss(records: Sequence[Record]) -> float:
        return mean(inf if record.failed else record.final_loss for record in records)

    def check(ones: Groups, others: Groups) -> tuple[bool, str]:
        pairs = [(loss(a), loss(b)) for a, b in zip(ones, others, strict=True) if loss(b) < inf]
        worst = max((a - b for a, b in pairs), default=-inf)
        return worst <= margin, f"at most {worst:+.3f}, in {len(pairs)} settings where both can be compared"

    return Claim(text, (one, other), check)


def _separates(text: str, post_ln: tuple[str, str], admin: tuple[str, str]) -> Claim:
    """Where Post-LN fails, the largest ω of the same setting's profile is above those of all others."""

    def check(stock: Groups, profiled: Groups) -> tuple[bool | None, str]:
        omega: dict[bool, list[float]] = {True: [], False: []}
        for records, scaled in zip(stock, profiled, strict=True):
            for record, with_omega in zip(records, scaled, strict=True):
                omega[record.failed] += with_omega.omega[1:]
        if not all(omega.values()):
            return None, f"Post-LN {'fails' if omega[True] else 'trains'} in all settings"
        highest, lowest = max(omega[False]), min(omega[True])
        return highest < lowest, f"ω is up to {highest:.2f} where Post-LN trains, from {lowest:.2f} on where it fails"

    return Claim(text, (post_ln, admin), check)


CLAIMS = (
    fail("24-layer Post-LN OPT stalls with Xavier branches", ("Post-LN", "OPT 24, Xavier")),
    train("24-layer Post-LN OPT trains with std 0.02", ("Post-LN", "OPT 24, std 0.02")),
    train("The naive chain trains 24-layer OPT with Xavier branches", ("*naive*", "OPT 24, Xavier")),
    fail("The naive chain makes 24-layer OPT fail with std 0.02", ("*naive*", "OPT 24, std 0.02")),
    fail("48-layer Post-LN OPT stalls with Xavier branches", ("Post-LN", "OPT 48, Xavier")),
    train("Pre-LN trains in all settings", ("Pre-LN", "*")),
    train("Admin trains OPT in all settings", ("Admin", "OPT*")),
    train("Admin trains BERT in all settings", ("Admin", "BERT*")),
    train("Admin trains BART in all settings", ("Admin", "BART*")),
    _within(
        "Admin does no harm: it ends within 0.1 of Post-LN where that trains", ("Admin", "*"), ("Post-LN", "*"), 0.1
    ),
    _separates(
        "The rule: Post-LN OPT trains where Admin's largest ω is below a threshold",
        ("Post-LN", "OPT*"),
        ("Admin", "OPT*"),
    ),
)
