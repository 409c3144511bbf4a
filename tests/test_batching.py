import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import MULTI30K, tiny_model
from datasets import Dataset
from torch.utils.data import DataLoader

from training.arguments import TranslationTrainingArguments
from training.batching import TokenBatchSampler, round_up
from training.metrics import TranslationMetric
from training.processes import end_process_group
from training.trainer import TranslationTrainer


def lengths(count=500, longest=40, seed=0):
    return np.random.default_rng(seed).integers(2, longest + 1, count)


@pytest.mark.parametrize("max_tokens", [40, 100, 4096, 10**6])
def test_every_pair_is_in_one_batch_and_no_batch_is_larger_than_the_budget(max_tokens):
    pairs = lengths()
    sampler = TokenBatchSampler(pairs, max_tokens, seed=1)
    batches = list(sampler)
    assert sorted(itertools.chain(*batches)) == list(range(len(pairs)))
    assert all(len(batch) * pairs[batch].max() <= max_tokens for batch in batches)
    assert len(batches) == len(sampler)


def test_no_smaller_number_of_batches_of_neighbouring_lengths_is_possible():
    """Cut by hand: from the shortest on, a pair joins the batch if the batch still fits with it."""
    pairs, max_tokens = lengths(), 100
    expected, count, longest = 1, 0, 0
    for length in sorted(pairs):
        if (count + 1) * max(longest, length) > max_tokens:
            expected, count, longest = expected + 1, 0, 0
        count, longest = count + 1, max(longest, length)
    assert len(TokenBatchSampler(pairs, max_tokens, seed=1)) == expected


def test_batches_follow_from_seed_and_epoch_alone():
    def batches(seed, epoch):
        sampler = TokenBatchSampler(lengths(), 100, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0), np.random.seed(0)
    first = batches(1, 0)
    torch.rand(3), np.random.rand(3)
    assert batches(1, 0) == first
    others = [batches(1, 1), batches(2, 0), batches(1, 2)]
    assert all(len(other) == len(first) for other in others)
    as_sets = [{frozenset(batch) for batch in epoch} for epoch in (first, *others)]
    for one, other in itertools.combinations(as_sets, 2):
        assert len(one & other) < len(one) / 2, "pairs of one length change places between batches"


@pytest.mark.parametrize("processes, accumulated", [(1, 4), (2, 2), (4, 1), (3, 1)])
def test_processes_are_dealt_whole_batches_in_turn(processes, accumulated):
    """accelerate's own sharding: update k of any division of the same work holds the same batches."""

    def sampler():
        return TokenBatchSampler(lengths(), 100, seed=1, multiple_of=processes * accumulated)

    shards = [list(BatchSamplerShard(sampler(), processes, rank)) for rank in range(processes)]
    assert [batch for turn in zip(*shards, strict=True) for batch in turn] == list(sampler())
    assert len(sampler()) % (processes * accumulated) == 0, "no update is smaller, and no batch comes twice"


def test_only_the_largest_batches_are_halved():
    pairs = lengths()
    plain, even = (TokenBatchSampler(pairs, 100, 1, multiple_of=n) for n in (1, 16))
    assert 0 < len(even) - len(plain) < 16
    sizes = [sorted(map(len, sampler)) for sampler in (plain, even)]
    assert sizes[0][: len(plain) // 2] == sizes[1][: len(plain) // 2]


def test_fewer_pairs_than_a_multiple_are_left_as_they_are():
    assert sorted(TokenBatchSampler([3, 3], 100, seed=1, multiple_of=8)) == [[0], [1]]


def test_lengths_are_counted_as_they_are_padded():
    pairs = lengths()
    for batch in TokenBatchSampler(round_up(pairs, 8), 160, seed=1):
        assert len(batch) * -(-pairs[batch].max() // 8) * 8 <= 160


def test_what_cannot_be_batched_is_refused():
    with pytest.raises(ValueError, match="A pair has 40 tokens, which max_tokens=39 cannot hold"):
        TokenBatchSampler([3, 40], 39, seed=1)
    with pytest.raises(ValueError, match="no pairs"):
        TokenBatchSampler([], 39, seed=1)


# --- in the Trainer -------------------------------------------------------------------------------

LEARNING_RATE = 1e4  # so that rounding the new weights does not hide the gradient


def pairs(count=60, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        source, target = (rng.integers(2, 30, rng.integers(3, 15)).tolist() for _ in range(2))
        rows.append({"input_ids": source, "labels": target, "length": max(len(source), len(target))})
    return Dataset.from_list(rows)


def collate(rows):
    """Padded by hand, for a tiny model."""
    longest = {name: max(len(row[name]) for row in rows) for name in ("input_ids", "labels")}
    pad = {"input_ids": tiny_model().config.pad_token_id, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [pad[name]] * (longest[name] - len(row[name])) for row in rows])
        for name in longest
    }
    return batch | {"attention_mask": batch["input_ids"].ne(pad["input_ids"]).long()}


def trainer(folder, model, data, **arguments):
    arguments = {
        "max_steps": 1,
        "learning_rate": LEARNING_RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    } | arguments
    args = TranslationTrainingArguments(
        str(folder),
        use_cpu=True,
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    return TranslationTrainer(
        metric=TranslationMetric(), model=model, args=args, train_dataset=data, data_collator=collate
    )


def update(folder, data, **arguments):
    """The model's change by one update of plain gradient descent, which is −lr times its gradient, in float64."""
    torch.manual_seed(0)
    model = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, label_smoothing=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer(folder, model, data, **arguments).train()
    return {name: (before[name] - p.detach()) / LEARNING_RATE for name, p in model.named_parameters()}


def distance(one, other):
    difference = sum((one[name].double() - other[name].double()).square().sum() for name in one) ** 0.5
    return float(difference / sum(value.double().square().sum() for value in one.values()) ** 0.5)


def test_accumulated_batches_give_the_gradient_of_one_big_batch(tmp_path):
    data = pairs()
    budget = sum(data["length"])
    sampler = TokenBatchSampler(data["length"], budget // 3, seed=42, multiple_of=4)
    assert len(sampler) == 4 and len({len(batch) for batch in sampler}) > 1
    accumulated = update(tmp_path, data, max_tokens=budget // 3, gradient_accumulation_steps=4)
    together = update(tmp_path, data, max_tokens=15 * 60)
    assert distance(together, accumulated) < 1e-6
    assert distance(together, update(tmp_path, data.select(range(30)), max_tokens=15 * 60)) > 1e-2


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], check=True, capture_output=True, env=environment, cwd=root)
    data = pairs()
    together = update(tmp_path, data, max_tokens=15 * 60)
    for rank in range(2):
        distributed = torch.load(tmp_path / f"update{rank}.pt", weights_only=True)
        assert distance(together, distributed) < 1e-6


def test_all_epochs_have_as_many_updates_and_another_order(tmp_path, monkeypatch):
    data = pairs()
    seen = []
    one = trainer(tmp_path, tiny_model(), data, max_tokens=100, num_train_epochs=3, max_steps=-1, learning_rate=0.1)
    training_step = one.training_step
    monkeypatch.setattr(
        one,
        "training_step",
        lambda model, inputs, *rest: seen.append(inputs["labels"].tolist()) or training_step(model, inputs, *rest),
    )
    one.train()
    per_epoch = len(one.batch_sampler)
    assert one.state.global_step == len(seen) == 3 * per_epoch
    epochs = [seen[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(np.size(labels) <= 100 for labels in seen)
    assert one.get_total_train_batch_size(one.args) == round(60 / per_epoch)


def test_workers_change_nothing(tmp_path):
    data = pairs()
    loaders = [
        trainer(tmp_path, tiny_model(), data, max_tokens=100, dataloader_num_workers=n).get_train_dataloader()
        for n in (0, 2)
    ]
    assert all(isinstance(loader, DataLoader) for loader in loaders)
    for alone, helped in zip(*loaders, strict=True):
        assert torch.equal(alone["input_ids"], helped["input_ids"])


@pytest.mark.skipif(not MULTI30K.exists(), reason="Multi30k is not beside the project")
def test_little_of_a_batch_is_padding_on_multi30k():
    """Lengths in words are enough: 6.5% with the words' own pieces."""
    sides = [
        [len(line.split()) + 1 for line in (MULTI30K / f"train.{language}").read_text("utf-8").splitlines()]
        for language in ("en", "de")
    ]
    source, target = map(np.array, sides)
    batches = TokenBatchSampler(np.maximum(source, target), 4096, seed=1)
    slots = sum(len(batch) * (source[batch].max() + target[batch].max()) for batch in batches)
    assert 1 - (source.sum() + target.sum()) / slots < 0.1


if __name__ == "__main__":  # one of the processes of test_two_processes_give_the_gradient_of_one
    folder = Path(sys.argv[1])
    change = update(folder, pairs(), max_tokens=sum(pairs()["length"]) // 3, gradient_accumulation_steps=2)
    torch.save(change, folder / f"update{torch.distributed.get_rank()}.pt")
    end_process_group()
