"""The loss of one set of sentences with dropout off, in one stack, and in both: how a run that failed has failed."""

import json
from typing import Any

import torch
from torch.utils.data import DataLoader

from admin_hf import AdminForConditionalGeneration
from admin_hf.checkpoints import write_whole

from ..batching import TranslationCollator
from ..data import load_pairs
from ..tokenization import load_tokenizer
from ..tokenized_data import tokenize_for_evaluation
from .preparation import data_arguments
from .records import DROPOUT_NAME, state
from .scales import REPO, PlannedRun


STACKS = {"neither": (), "encoder": ("encoder",), "decoder": ("decoder",), "both": ("encoder", "decoder")}
ROWS = 50  # sentences at a time


def measure_dropout_losses(run: PlannedRun) -> None:
    """Write the losses of a run of run_translation.py that has ended with weights to its folder.

    They are negative log-likelihoods for each target token of the development set, by where dropout is on.
    """
    path = run.folder / DROPOUT_NAME
    if run.program != "run_translation" or path.exists() or state(run) not in ("trained", "finished"):
        return
    model_arguments, data = data_arguments(run.arguments)
    pairs = load_pairs("validation", data, model_arguments)
    pairs = pairs.select(range(min(run.arguments.get("max_eval_samples") or len(pairs), len(pairs))))
    tokenizer = load_tokenizer(str(REPO / run.arguments["tokenizer_name"]), model_arguments)
    model = AdminForConditionalGeneration.from_pretrained(run.folder)
    collate = TranslationCollator(tokenizer, model)
    sentences = tokenize_for_evaluation(pairs, tokenizer, data, "validation").select_columns(["input_ids", "labels"])
    batches = [*DataLoader(sentences, ROWS, collate_fn=collate)]
    losses = {name: dropout_loss(model, batches, stacks) for name, stacks in STACKS.items()}
    write_whole(path, json.dumps(losses) + "\n")


@torch.no_grad()
def dropout_loss(model: Any, batches: list[dict[str, torch.Tensor]], stacks: tuple[str, ...], seed: int = 0) -> float:
    """The loss of batches with dropout in these stacks alone."""
    torch.manual_seed(seed)
    model.eval()  # so that the model itself gives the loss without smoothing
    for name in stacks:
        getattr(model.model, name).train()
    return mean_loss(model, batches)


@torch.no_grad()
def mean_loss(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss of a target token over all batches."""
    counts = [int(batch["labels"].ne(-100).sum()) for batch in batches]
    losses = [float(model(**batch).loss) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
