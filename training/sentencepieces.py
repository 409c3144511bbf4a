"""Converts a model of sentencepiece, Unigram or BPE, to a tokenizer of the package tokenizers."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from admin_hf.encoding import sentence_tokenizer

from .errors import InputError


SUFFIXES = (".model", ".spm")
SPACE = "▁"
# Of sentencepiece_model.proto
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


def is_sentencepiece(name: str) -> bool:
    """Whether the name of a tokenizer is that of a sentencepiece model."""
    return name.endswith(SUFFIXES)


def read_sentencepiece(name: str) -> PreTrainedTokenizerFast:
    """Read a sentencepiece model of both languages as a tokenizer with the same ids for the same text.

    Its sentences end in the model's `</s>`. A model without a padding token, which is sentencepiece's default, gets
    `<pad>` after all pieces. Known differences to sentencepiece: half-width Katakana with a voiced mark is not
    composed, and the name of a control token or byte, which both read as text, may be cut in another way.

    Args:
        name: the file, `*.model` or `*.spm`.

    Raises:
        ImportError: sentencepiece or protobuf is not installed.
        InputError: two models are named, or one that is neither Unigram nor BPE or has no `</s>`.
        OSError, ValueError: the file cannot be read, or contains no model of sentencepiece.
    """
    if "," in name and all(part.strip().endswith(SUFFIXES) for part in name.split(",")):
        raise InputError(
            f"--tokenizer_name {name} names several sentencepiece models, but source and target share one vocabulary: "
            "train one model on the text of both languages."
        )
    proto = _parse(Path(name))
    _check(name, proto)
    end, pad = proto.trainer_spec.eos_piece, proto.trainer_spec.pad_piece
    tokenizer = Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto))
    tokenizer.add_special_tokens([*(piece.piece for piece in proto.pieces if piece.type == _CONTROL), pad])
    _set_rules(tokenizer, proto)
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    return sentence_tokenizer(tokenizer, end, unk_token=unknown, pad_token=pad)


def _set_rules(tokenizer: Tokenizer, proto: Any) -> None:
    """How text is cleaned and split into words, and how it is put together again."""
    trainer, cleaning = proto.trainer_spec, proto.normalizer_spec
    steps = [normalizers.Precompiled(cleaning.precompiled_charsmap)] if cleaning.precompiled_charsmap else []
    if cleaning.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if cleaning.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    of_words = not any(SPACE in piece.piece[1:] for piece in proto.pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=of_words)
    if trainer.model_type == _UNIGRAM and trainer.byte_fallback:  # the name of a byte in a text is text
        names = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, names])
    spelling = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(SPACE, " ")]
    spelling += [decoders.Strip(" ", left=1)] if cleaning.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(spelling)


def _parse(path: Path) -> Any:
    """The file as sentencepiece's own message."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError("a package is missing: pip install sentencepiece protobuf") from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"it contains no model of sentencepiece ({error})") from error
    return proto


def _check(name: str, proto: Any) -> None:
    trainer, kinds = proto.trainer_spec, {piece.piece: piece.type for piece in proto.pieces}
    problem = None
    if list(kinds.values()).count(_UNKNOWN) != 1:
        problem = "contains no model of sentencepiece"
    elif trainer.model_type not in (_UNIGRAM, _BPE):
        problem = "is neither a Unigram nor a BPE model"
    elif trainer.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        problem = "marks spaces in another way than by a ▁ before each word"
    elif _USER_DEFINED in kinds.values():
        symbols = ", ".join(piece for piece, kind in kinds.items() if kind == _USER_DEFINED)
        problem = (
            f"has user-defined symbols ({symbols}), which tokenizers would cut in another way: train it without them, "
            "or with --control_symbols, which --source_prefix may hold"
        )
    elif set(kinds.values()) - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE} or proto.denormalizer_spec.precompiled_charsmap:
        problem = "has unused pieces, or rules to denormalise, which cannot be had here"
    elif kinds.get(trainer.eos_piece) != _CONTROL:
        problem = f"has no end-of-sentence token {trainer.eos_piece}: train it without --eos_id=-1"
    if problem is not None:
        raise InputError(f"--tokenizer_name {name} {problem}.")


def _unigram(proto: Any) -> models.Unigram:
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(pieces, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any) -> models.BPE:
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = generate_merges(ids, scores, skip_tokens=ids.keys() - scores.keys())
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)
