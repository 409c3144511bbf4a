"""Tiny tokenizers in the layouts that are in use, built here as their libraries build them."""

import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import MarianTokenizer, PreTrainedTokenizerFast, T5Tokenizer


TEXTS = [
    "Zwei junge Männer (mit Hut) sind im Freien.",
    "Two young men, aged 23 and 45, are outside! A man's dog isn't here; it costs $3,750.95.",
    "Ein kleines Mädchen klettert in ein Spielhaus. Ist das <gut> oder [nicht] so gut_wie > oder < das / dort?",
] * 10
CODE = ">>de<<"
FRONT, PAD, BACK, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"


def bart() -> PreTrainedTokenizerFast:
    """Byte-level BPE: `<s>` before and `</s>` behind, padding in the middle of the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [FRONT, PAD, BACK, UNK]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([AddedToken(MASK, lstrip=True), CODE])
    tokenizer.post_processor = processors.RobertaProcessing((BACK, 2), (FRONT, 0))
    return _fast(tokenizer, bos_token=FRONT, cls_token=FRONT, sep_token=BACK, mask_token=MASK)


def t5() -> PreTrainedTokenizerFast:
    """Unigram, which has the special tokens among its pieces: padding is 0, `</s>` 1, and sentinels are last."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=[PAD, BACK, UNK], unk_token=UNK)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])
    tokenizer.add_tokens([CODE])  # in the way of words that users add
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {BACK}", special_tokens=[(BACK, 1)])
    return _fast(tokenizer)


def t5_class() -> T5Tokenizer:
    """The same by its own class, which puts its parts together again whenever it is loaded."""
    pieces = json.loads(t5().backend_tokenizer.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[*map(tuple, pieces)], extra_ids=2)


def fairseq() -> PreTrainedTokenizerFast:
    """BPE with sentencepiece's mark of words; `<s>` 0, padding 1, `</s>` 2, and left padding, as for a decoder."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, fuse_unk=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=[FRONT, PAD, BACK, UNK])
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([MASK])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {BACK}", special_tokens=[(BACK, 2)])
    return _fast(tokenizer, bos_token=FRONT, mask_token=MASK, padding_side="left", truncation_side="left")


def words() -> PreTrainedTokenizerFast:
    """Whole words, between which there are spaces, in Marian's layout; a language code is one of the words."""
    known = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = [BACK, UNK, CODE, *known, PAD]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {BACK}", special_tokens=[(BACK, 0)])
    return _fast(tokenizer)


def bert() -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece whose sentences end in `[SEP]`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return _fast(tokenizer, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", **names)


def gpt2(**names: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with nothing behind a sentence, and no padding token unless it is among `names`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", PAD])
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **names)


def save_marian(folder: Path) -> None:
    """The slow tokenizer of OPUS-MT: two sentencepiece models, one vocabulary with language codes and `<pad>` last."""
    pieces = [BACK, UNK, CODE, ">>fr<<"]
    for name, texts, size in (("source", TEXTS, 80), ("target", TEXTS[::3], 25)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(folder / name), vocab_size=size, minloglevel=2
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.model"))
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
        pieces += [processor.IdToPiece(i) for i in range(3, len(processor))]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, PAD]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = MarianTokenizer(str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"))
    tokenizer.save_pretrained(folder)


def _fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": BACK, "pad_token": PAD, "unk_token": UNK, **names}
    )


LAYOUTS = {
    "bart": bart,
    "t5": t5,
    "t5_class": t5_class,
    "fairseq": fairseq,
    "words": words,
    "bert": bert,
    "marian": None,
}


def save_layout(name: str, folder: str | Path) -> None:
    """Save a tokenizer of this layout to a folder."""
    Path(folder).mkdir(exist_ok=True)
    if name == "marian":
        save_marian(Path(folder))
    else:
        LAYOUTS[name]().save_pretrained(folder)
