"""What `deepen` rests on: losses of a deepened model, by what is done to ω, to the order of layers and to branches.

A 3-3 Post-LN model is trained, made 6-6 in several ways, and trained on: `python -m training.experiments.deepening
DIR/train DIR/validation en de` writes docs/deepening.json, from which docs/continuing.md has its table.
"""

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, MarianMTModel, set_seed
from transformers.utils import logging

from admin_hf import (
    AdminConfig,
    AdminForConditionalGeneration,
    deepen,
    initialize_omega,
    profile_residuals,
    reparameterize,
)
from admin_hf.checkpoints import write_whole
from admin_hf.parallel_text import find_files, read_pairs

from ..tokenization import train_tokenizer
from .dropout_losses import mean_loss


DEPTH, DEEPER, SEEDS, MEASURED = 3, 6, (1, 2, 3), (25, 50, 100)
SETTINGS = {"source_updates": 1000, "source_learning_rate": 2e-3, "learning_rate": 1e-3, "warm_up": 20}
SETTINGS |= {"pairs": 32, "vocab_size": 2000, "longest": 48, "validation_pairs": 512}
SHAPE = {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "encoder_attention_heads": 4}
SHAPE |= {"decoder_attention_heads": 4, "attention_dropout": 0.0, "activation_dropout": 0.0}
SHAPE |= {"max_position_embeddings": SETTINGS["longest"]}

Model = AdminForConditionalGeneration
Batch = dict[str, torch.Tensor]


class Data:
    """Batches of pairs of similar length, in an order that the seed says."""

    def __init__(self, train: str, validation: str, languages: tuple[str, str]) -> None:
        pairs = [
            [(pair.source, pair.target) for pair in read_pairs(find_files(name, languages), languages)]
            for name in (train, validation)
        ]
        texts = [list(side) for side in zip(*pairs[0], strict=True)]
        self.tokenizer = train_tokenizer(texts, SETTINGS["vocab_size"])
        self.train, validated = ([*map(self._encoded, split)] for split in pairs)
        self.train = [row for row in self.train if max(map(len, row.values())) < SETTINGS["longest"]]
        validated = sorted(validated[: SETTINGS["validation_pairs"]], key=lambda row: len(row["labels"]))
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)
        self.validation = [self._batch(validated[start : start + 64]) for start in range(0, len(validated), 64)]

    def _encoded(self, pair: tuple[str, str]) -> dict[str, list[int]]:
        ids = [self.tokenizer(text)["input_ids"][: SETTINGS["longest"]] for text in pair]
        return {"input_ids": ids[0], "labels": ids[1]}

    def _batch(self, rows: list[dict[str, list[int]]]) -> Batch:
        return dict(self.collate(copy.deepcopy(rows)))

    def batches(self, seed: int) -> Iterator[Batch]:
        draw, size = random.Random(seed), SETTINGS["pairs"]
        while True:
            rows = draw.sample(self.train, 20 * size)
            rows.sort(key=lambda row: len(row["labels"]))
            for start in draw.sample(range(0, len(rows), size), 20):
                yield self._batch(rows[start : start + size])


@torch.no_grad()
def loss_of(model: Model, batches: list[Batch]) -> float:
    """The negative log-likelihood of a target token."""
    return mean_loss(model.eval(), batches)


def fit(model: Model, data: Data, seed: int, updates: int, learning_rate: float, warm_up: int) -> dict[int, float]:
    """Train with Adam, and measure after the updates that are to be measured."""
    set_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1, (update + 1) / warm_up))
    batches, losses = data.batches(seed), {}
    for update in range(1, updates + 1):
        model.train()
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if update in MEASURED:
            losses[update] = loss_of(model, data.validation)
    return losses


# --- what is compared -----------------------------------------------------------------------------


def new_model(data: Data, depth: int, system: str, seed: int) -> Model:
    set_seed(seed)
    systems = {"encoder_residual": system, "decoder_residual": system}
    layers = {"encoder_layers": depth, "decoder_layers": depth}
    return AdminForConditionalGeneration(AdminConfig.for_tokenizer(data.tokenizer, **SHAPE, **systems, **layers))


def stacked(model: Model) -> Model:
    """With the layers 0 1 2 0 1 2 instead of 0 0 1 1 2 2."""
    state = model.state_dict()
    for name in [name for name in state if ".layers." in name and not name.endswith("omega")]:
        above, _, below = name.partition(".layers.")
        place, _, rest = below.partition(".")
        kept = int(place) % DEPTH * (DEEPER // DEPTH)
        state[name] = model.state_dict()[f"{above}.layers.{kept}.{rest}"].clone()
    model.load_state_dict(state)
    return model


def without_branches(model: Model) -> Model:
    """With copies whose branches are zero at the start."""
    for stack in (model.model.encoder, model.model.decoder):
        for layer in list(stack.layers)[1 :: DEEPER // DEPTH]:
            for name, parameter in layer.named_parameters():
                if "out_proj" in name or "fc2" in name:
                    parameter.data.zero_()
    return model


def profiled(model: Model, batch: Batch) -> Model:
    initialize_omega(model, profile_residuals(model, batch))
    return model


def variants(source: MarianMTModel, data: Data, seed: int) -> dict[str, Callable[[], Model]]:
    """How each model that is compared is made."""
    batch = next(data.batches(seed))

    def deeper() -> Model:
        return deepen(source, DEEPER, DEEPER)

    return {
        "the 3-3 model, trained on": lambda: deepen(source),
        "new 6-6 Admin": lambda: profiled(new_model(data, DEEPER, "admin", seed), batch),
        "deepened, ω = 1": deeper,
        "deepened, profiled": lambda: profiled(deeper(), batch),
        "deepened, 0 1 2 0 1 2, profiled": lambda: profiled(stacked(deeper()), batch),
        "deepened, branches of copies 0, profiled": lambda: profiled(without_branches(deeper()), batch),
    }


def markdown(measured: dict[str, Any]) -> str:
    """The table of docs/continuing.md: the mean loss of the seeds, and half the distance from lowest to highest."""
    updates = [str(update) for update in (0, *MEASURED)]
    rows = [["validation loss after updates", *updates], ["---", *["---:" for _ in updates]]]
    for name, seeds in measured["losses"].items():
        columns = ([losses[update] for losses in seeds] for update in updates)
        rows.append([name, *(f"{mean(column):.2f} (± {(max(column) - min(column)) / 2:.2f})" for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    train, validation, *languages = sys.argv[1:] if argv is None else argv
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = Data(train, validation, (languages[0], languages[1]))
    trained = new_model(data, DEPTH, "post_ln", seed=0)
    fit(trained, data, 0, SETTINGS["source_updates"], SETTINGS["source_learning_rate"], warm_up=100)
    source: Any = reparameterize(trained)
    losses: dict[str, list[dict[int, float]]] = {}
    for seed in SEEDS:
        for name, make in variants(source, data, seed).items():
            model = make()
            start = {0: loss_of(model, data.validation)}
            options = {"learning_rate": SETTINGS["learning_rate"], "warm_up": SETTINGS["warm_up"]}
            losses.setdefault(name, []).append(start | fit(model, data, seed, max(MEASURED), **options))
            print(seed, name, losses[name][-1], flush=True)
    path = Path(__file__).parents[2] / "docs" / "deepening.json"
    measured = {
        "settings": SETTINGS | SHAPE,
        "source_loss": loss_of(deepen(source), data.validation),
        "losses": losses,
    }
    write_whole(path, json.dumps(measured, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
