import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import MULTI30K, VOCAB_SIZE, tiny_model
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from admin_hf import profile_residuals
from benchmarks.systems import word_tokenizer
from training.arguments import TranslationTrainingArguments
from training.batching import BucketCollator, Buckets, TokenBatchSampler, TranslationCollator, round_up
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


# --- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("longest", [1, 7, 52, 128, 1024])
def test_buckets_are_multiples_that_grow_by_about_an_eighth(multiple, longest):
    lengths = Buckets(longest, multiple, rows=1).lengths.tolist()
    assert lengths[0] == multiple and 0 <= lengths[-1] - longest < multiple
    for one, next_one in itertools.pairwise(lengths):
        assert next_one % multiple == 0
        assert 0 < next_one - one <= max(multiple, one / 8 + multiple / 2)


def test_there_are_few_buckets():
    assert len(Buckets(128, rows=1).lengths) == 20
    assert len(Buckets(1024, rows=1).lengths) == 38


def test_lengths_are_rounded_up_to_the_shortest_bucket_that_holds_them():
    buckets, pairs = Buckets(200, rows=1), lengths(longest=200)
    expected = [min(bucket for bucket in buckets.lengths if bucket >= length) for length in pairs]
    assert buckets.round_up(pairs).tolist() == expected
    assert [buckets.round_up(int(length)) for length in pairs] == expected


def test_buckets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="A pair has 53 tokens, but the last bucket holds 52"):
        Buckets(50, max_tokens=400).round_up(np.array([3, 53]))
    with pytest.raises(ValueError, match="A pair has 52 tokens as padded, which max_tokens=51 cannot hold"):
        Buckets(50, max_tokens=51)
    for options in ({}, {"max_tokens": 400, "rows": 3}):
        with pytest.raises(ValueError, match="either max_tokens or rows"):
            Buckets(50, **options)
    for options in ({"longest": 0, "rows": 1}, {"longest": 5, "multiple": 0, "rows": 1}, {"longest": 5, "rows": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Buckets(**options)


def numbered_pairs(seed):
    """Pairs of random lengths, the tokens of each its own number."""
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(5, 129))
    return [
        {"input_ids": [i] * rng.integers(1, longest + 1), "labels": [i] * rng.integers(1, longest + 1)}
        for i in range(rng.integers(1, 600))
    ]


def longer_sides(pairs):
    return np.array([max(len(pair["input_ids"]), len(pair["labels"])) for pair in pairs])


def bucket_batches(pairs, buckets, max_tokens, multiple_of=1):
    sampler = TokenBatchSampler(buckets.round_up(longer_sides(pairs)), max_tokens, seed=1, multiple_of=multiple_of)
    collator = BucketCollator(word_tokenizer(VOCAB_SIZE), tiny_model(), buckets)
    return [collator([pairs[i] for i in batch]) for batch in sampler]


@pytest.mark.parametrize("seed", range(10))
def test_every_batch_has_the_shape_of_a_bucket_and_every_pair_comes_once(seed):
    pairs, rng = numbered_pairs(seed), np.random.default_rng(seed)
    multiple, max_tokens, multiple_of = (int(rng.choice(x)) for x in ([1, 4, 8], [136, 1000, 4096], [1, 6]))
    buckets = Buckets(int(longer_sides(pairs).max()), multiple, max_tokens=max_tokens)
    seen, shapes = [], set()
    for batch in bucket_batches(pairs, buckets, max_tokens, multiple_of):
        shapes |= {tensor.shape for tensor in batch.values()}
        for source, mask, target in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            source, target = source[mask.bool()].tolist(), target[target != -100].tolist()
            if target:
                seen.append({"input_ids": source, "labels": target})
            else:
                assert source == [0], "a missing row is one end-of-sentence token"
    assert sorted(seen, key=lambda pair: pair["labels"][0]) == pairs
    assert shapes <= {(max_tokens // length, length) for length in buckets.lengths.tolist()}


def test_buckets_may_all_have_as_many_rows():
    buckets = Buckets(14, rows=7)
    collator = BucketCollator(word_tokenizer(VOCAB_SIZE), tiny_model(), buckets)
    data = pairs(20)
    for rows in (data.select(range(7)), data.select(range(7, 10))):
        shape = 7, buckets.round_up(max(rows["length"]))
        assert {tensor.shape for tensor in collator(list(rows)).values()} == {shape}
    with pytest.raises(ValueError, match="8 pairs of up to 16 tokens are too many for a bucket of 7 rows"):
        collator(list(data.select(range(8))))


@pytest.mark.parametrize("max_tokens", [4096, 8192])
def test_little_of_a_bucket_is_padding(max_tokens):
    """On lengths that are spread as in Multi30k, and as if every bucket had all of `max_tokens`."""
    rng = np.random.default_rng(0)
    source = rng.lognormal(np.log(14.5), 0.35, 29_000).round().clip(4, 60).astype(int)
    target = (source * rng.normal(1.05, 0.2, len(source)).clip(0.5, 1.6)).round().clip(4, 60).astype(int)
    buckets = Buckets(60, max_tokens=max_tokens)
    sampler = TokenBatchSampler(buckets.round_up(np.maximum(source, target)), max_tokens, seed=1)
    assert 1 - (source.sum() + target.sum()) / (2 * max_tokens * len(sampler)) < 0.2


def test_a_bucket_holds_what_transformers_own_collator_makes():
    model, tokenizer, data = tiny_model(), word_tokenizer(VOCAB_SIZE), list(pairs(5))
    collator = BucketCollator(tokenizer, model, Buckets(64, rows=8))
    plain = DataCollatorForSeq2Seq(tokenizer, model)([{k: row[k] for k in ("input_ids", "labels")} for row in data])
    padded = pickle.loads(pickle.dumps(collator))(data)  # as a worker of a DataLoader has it
    padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    assert plain.keys() == padded.keys() == {*padding, "decoder_input_ids"}
    for name, filler in padding.items():
        expected = torch.full_like(padded[name], filler)
        expected[: plain[name].shape[0], : plain[name].shape[1]] = plain[name]
        expected[5:, 0] = {"input_ids": tokenizer.eos_token_id, "attention_mask": 1, "labels": -100}[name]
        assert torch.equal(padded[name], expected) and padded[name].dtype == plain[name].dtype
    shifted = model.prepare_decoder_input_ids_from_labels(padded["labels"])
    assert torch.equal(padded["decoder_input_ids"], shifted)
    assert 0 <= shifted.min() and shifted.max() < VOCAB_SIZE


def test_a_collator_can_be_sent_to_workers_and_drops_other_columns():
    model, tokenizer, data = tiny_model(), word_tokenizer(VOCAB_SIZE), list(pairs(5))
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in data]
    expected = DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=8)(rows)
    collator = TranslationCollator(tokenizer, model, pad_to_multiple_of=8)
    model.register_forward_pre_hook(lambda *_: None)  # such as the callback's, which cannot be pickled
    batch = pickle.loads(pickle.dumps(collator))([row | {"source": "A dog", "index": 3} for row in data])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert collator([{"input_ids": [3, 4]}]).keys() == {"input_ids", "attention_mask"}, "source text alone"


def exact_model():
    without = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    return tiny_model(**without, label_smoothing=0.1).double().train()


def loss_and_gradients(batches, targets):
    """The sums over accumulated batches, in float64."""
    model = exact_model()
    loss = sum(model(**batch, num_items_in_batch=targets).loss for batch in batches)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("accumulated", [1, 8])
def test_loss_and_gradients_of_buckets_are_those_of_the_pairs_alone(accumulated):
    data, max_tokens = list(pairs()), 16 * 60 // accumulated
    # With two more rows than the sampler fills
    padded = bucket_batches(data, Buckets(16, max_tokens=max_tokens + 32), max_tokens, multiple_of=accumulated)
    assert len(padded) == accumulated
    assert all((batch["labels"] == -100).all(1).any() for batch in padded), "rows are missing in all batches"
    targets = sum(len(pair["labels"]) for pair in data)
    results = (loss_and_gradients(batches, targets) for batches in (padded, [collate(data)]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_profile_of_a_bucket_has_one_more_token_for_each_missing_row():
    model, tokenizer, data = exact_model(), word_tokenizer(VOCAB_SIZE), list(pairs(6))
    more = {"input_ids": [tokenizer.eos_token_id], "labels": []}
    for missing in (0, 2):
        bucket = BucketCollator(tokenizer, model, Buckets(64, rows=6 + missing))(data)
        measured, expected = (profile_residuals(model, b) for b in (bucket, collate([*data, *[more] * missing])))
        for one, other in ((measured.encoder, expected.encoder), (measured.decoder, expected.decoder)):
            assert one.omega == pytest.approx(other.omega, rel=1e-6)
            assert one.branch_variances == pytest.approx(other.branch_variances, rel=1e-6)


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
