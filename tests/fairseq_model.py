"""A small fairseq Transformer in plain PyTorch, and checkpoints of it as fairseq and Transformer-Clinic write them."""

import argparse
import math
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu


WIDTH, FFN, HEADS, LAYERS = 16, 24, 2, {"encoder": 2, "decoder": 3}
WORDS = ["ein", "Bo@@", "ot", "zwei", "und", ".", "ru@@", "hig", "See", "am"]
OTHER_WORDS = ["a", "Bo@@", "at", "two", "and", ".", "lake", "by", "calm", "the", "cat", "sat"]
BOS, PAD, EOS, UNK, SPECIAL = 0, 1, 2, 3, 4

# fairseq's --init-type, and whether both stacks normalise before
SYSTEMS = {
    "post_ln": ("default", False),
    "pre_ln": ("default", True),
    "admin": ("adaptive", False),
    "rezero": ("rezero", False),
    "rezero_post_ln": ("rezero_postln", False),
    "deepnorm": ("deepnet", False),
}


def options(system: str = "admin", **changes) -> argparse.Namespace:
    init_type, before = SYSTEMS[system]
    values = {
        "arch": "transformer",
        "task": "translation",
        "init_type": init_type,
        "activation_fn": "relu",
        "share_all_embeddings": True,
        "share_decoder_input_output_embed": True,
        "max_source_positions": 40,
        "max_target_positions": 40,
        "dropout": 0.1,
        "label_smoothing": 0.1,
        "source_lang": "en",
        "target_lang": "de",
    }
    for stack, layers in LAYERS.items():
        values |= {f"{stack}_layers": layers, f"{stack}_attention_heads": HEADS, f"{stack}_normalize_before": before}
    return argparse.Namespace(**values | changes)


def weights(args: argparse.Namespace, source: list[str] = WORDS, target: list[str] = WORDS) -> dict[str, Tensor]:
    """Random weights in float64 under fairseq's names, far from where they start; ω_1 is far from 1."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, mean: float = 0.0, std: float = 0.3) -> None:
        found[name] = mean + std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    for stack, words in (("encoder", source), ("decoder", target)):
        found[f"{stack}.version"] = torch.tensor([3.0])
        draw(f"{stack}.embed_tokens.weight", len(words) + SPECIAL, WIDTH)
        found[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
        for number in range(LAYERS[stack]):
            layer, attentions = f"{stack}.layers.{number}", ["self_attn", "encoder_attn"][: 1 + (stack == "decoder")]
            for attention in attentions:
                if args.init_type == "deepnet":
                    for projection in "qkv":
                        draw(f"{layer}.{attention}.{projection}_proj_weight", WIDTH, WIDTH)
                else:
                    draw(f"{layer}.{attention}.in_proj_weight", 3 * WIDTH, WIDTH)
                draw(f"{layer}.{attention}.in_proj_bias", 3 * WIDTH)
                draw(f"{layer}.{attention}.out_proj.weight", WIDTH, WIDTH)
                draw(f"{layer}.{attention}.out_proj.bias", WIDTH)
            for name, rows, columns in (("fc1", FFN, WIDTH), ("fc2", WIDTH, FFN)):
                draw(f"{layer}.{name}.weight", rows, columns)
                draw(f"{layer}.{name}.bias", rows)
            scales = [
                "attention" if stack == "encoder" else "self",
                *(["encoder"] if stack == "decoder" else []),
                "fc",
            ]
            for scale in scales if args.init_type == "adaptive" else ():
                draw(f"{layer}.{scale}_ratio_change", WIDTH, mean=2.0, std=0.8)
            if "rezero" in args.init_type:
                draw(f"{layer}.rezero_weight", 1, mean=0.5)
            for norm in [*attentions, "final"] if args.init_type != "rezero" else ():
                draw(f"{layer}.{norm}_layer_norm.weight", WIDTH, mean=1.0)
                draw(f"{layer}.{norm}_layer_norm.bias", WIDTH)
        if getattr(args, f"{stack}_normalize_before"):
            draw(f"{stack}.layer_norm.weight", WIDTH, mean=1.0)
            draw(f"{stack}.layer_norm.bias", WIDTH)
    if args.share_all_embeddings:
        found["decoder.embed_tokens.weight"] = found["encoder.embed_tokens.weight"]
    if not args.share_decoder_input_output_embed:
        draw("decoder.embed_out", len(target) + SPECIAL, WIDTH)
    return found


def save(path: Path, args: argparse.Namespace, model: dict[str, Tensor], **how) -> Path:
    """As fairseq's trainer does, with its own classes in the pickle."""
    fairseq, meters = ModuleType("fairseq"), ModuleType("fairseq.meters")
    before = dict(sys.modules)
    names = "AverageMeter", "TimeMeter", "StopwatchMeter"
    for name in names:
        setattr(meters, name, type(name, (), {"__module__": "fairseq.meters"}))
    logged = OrderedDict((name, getattr(meters, name)()) for name in names)
    logged["AverageMeter"].val = 8.5
    state = {
        "args": args,
        "model": OrderedDict(model),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "num_updates": 60}],
        "extra_state": {"train_iterator": {"epoch": 1}, "train_meters": logged},
        "last_optimizer_state": {"state": {0: {"step": 60, "exp_avg": torch.zeros(3)}}},
    }
    sys.modules |= {"fairseq": fairseq, "fairseq.meters": meters}
    try:
        torch.save(state, path, **how)
    finally:
        for name in ("fairseq", "fairseq.meters"):
            sys.modules.pop(name) if name not in before else sys.modules.update({name: before[name]})
    return path


# --- the forward pass of one sentence -------------------------------------------------------------


def logits(args: argparse.Namespace, w: dict[str, Tensor], source: list[int], target: list[int]) -> Tensor:
    """Scores of every entry at each place of a target, `(length, entries)`; ids are fairseq's, both end in </s>."""
    memory = stack(args, w, "encoder", source, None)
    hidden = stack(args, w, "decoder", [EOS, *target[:-1]], memory)
    return hidden @ w.get("decoder.embed_out", w["decoder.embed_tokens.weight"]).T


def sinusoids(length: int) -> Tensor:
    table = torch.zeros(length, WIDTH, dtype=torch.float32)
    step = math.log(10000) / (WIDTH // 2 - 1)
    for k in range(WIDTH // 2):
        frequency = torch.exp(torch.tensor(float(k)) * -step)
        angle = torch.arange(2.0, length + 2) * frequency
        table[:, k], table[:, WIDTH // 2 + k] = angle.sin(), angle.cos()
    return table.double()


def stack(args, w, name: str, ids: list[int], memory: Tensor | None) -> Tensor:
    scale = 1.0 if getattr(args, "no_scale_embedding", False) else WIDTH**0.5
    learnt = w.get(f"{name}.embed_positions.weight")
    x = scale * w[f"{name}.embed_tokens.weight"][ids]
    x = x + (sinusoids(len(ids)) if learnt is None else learnt[2 : 2 + len(ids)])
    before = getattr(args, f"{name}_normalize_before")
    n, m = LAYERS.values()
    alpha = 0.81 * (n**4 * m) ** (1 / 16) if name == "encoder" else (3 * m) ** 0.25
    activation = {"relu": relu, "gelu": gelu}[args.activation_fn]

    def norm(path: str, value: Tensor) -> Tensor:
        return layer_norm(value, (WIDTH,), w[f"{path}.weight"], w[f"{path}.bias"])

    def residual(layer: str, kind: str, scale_name: str, x: Tensor, branch) -> Tensor:
        path = f"{layer}.{kind}_layer_norm"
        if args.init_type == "rezero":
            return x + w[f"{layer}.rezero_weight"] * branch(x)
        if before:
            return x + branch(norm(path, x))
        shortcut = x * w[f"{layer}.{scale_name}_ratio_change"] if args.init_type == "adaptive" else x
        shortcut = alpha * x if args.init_type == "deepnet" else shortcut
        f = branch(x) * w[f"{layer}.rezero_weight"] if args.init_type == "rezero_postln" else branch(x)
        return norm(path, shortcut + f)

    for number in range(LAYERS[name]):
        layer = f"{name}.layers.{number}"
        own = "attention" if name == "encoder" else "self"
        x = residual(
            layer, "self_attn", own, x, lambda y, p=f"{layer}.self_attn": attention(w, p, y, y, name == "decoder")
        )
        if memory is not None:
            x = residual(
                layer,
                "encoder_attn",
                "encoder",
                x,
                lambda y, p=f"{layer}.encoder_attn": attention(w, p, y, memory, False),
            )
        x = residual(
            layer,
            "final",
            "fc",
            x,
            lambda y, p=layer: linear(
                activation(linear(y, w[f"{p}.fc1.weight"], w[f"{p}.fc1.bias"])),
                w[f"{p}.fc2.weight"],
                w[f"{p}.fc2.bias"],
            ),
        )
    return norm(f"{name}.layer_norm", x) if before else x


def attention(w, path: str, x: Tensor, memory: Tensor, is_causal: bool) -> Tensor:
    if f"{path}.in_proj_weight" in w:
        matrices = w[f"{path}.in_proj_weight"].split(WIDTH)
    else:
        matrices = [w.get(f"{path}.{p}_proj_weight", w.get(f"{path}.{p}_proj.weight")) for p in "qkv"]
    if f"{path}.in_proj_bias" in w:
        biases = w[f"{path}.in_proj_bias"].split(WIDTH)
    else:
        biases = [w[f"{path}.{p}_proj.bias"] for p in "qkv"]
    q, k, v = (linear(y, m, b) for y, m, b in zip((x, memory, memory), matrices, biases, strict=True))
    heads = []
    for of_head in torch.arange(WIDTH).split(WIDTH // HEADS):
        scores = q[:, of_head] @ k[:, of_head].T / math.sqrt(WIDTH // HEADS)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, of_head])
    return linear(torch.cat(heads, 1), w[f"{path}.out_proj.weight"], w[f"{path}.out_proj.bias"])
