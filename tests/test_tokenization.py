import subprocess
import sys

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from admin_hf.parallel_text import is_blank
from training.errors import InputError
from training.tokenization import lowercases, save_tokenizer, text_batches, train_tokenizer


TEXTS = [
    "Zwei junge Männer (mit Hut) sind im Freien.",
    "Two young men, aged 23 and 45, are outside!",
    "A man's dog isn't 'here'; it costs $3,750.95 - or 3.750,95 €?",
    "Ein kleines Mädchen klettert in ein Spielhaus.",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXTS], 120)


def test_the_layout_is_marians(tokenizer):
    assert len(tokenizer) == 120
    assert tokenizer.convert_ids_to_tokens([0, 1, 119]) == ["</s>", "<unk>", "<pad>"]
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 1, 119)
    ids = tokenizer("Two men")["input_ids"]
    assert ids[-1] == 0 and ids.count(0) == 1 and 119 not in ids


def test_decoding_gives_the_text_back(tokenizer):
    ids = tokenizer(TEXTS)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == TEXTS
    padded = tokenizer(TEXTS[:2], padding=True)["input_ids"]
    assert tokenizer.batch_decode(padded, skip_special_tokens=True) == TEXTS[:2]


def test_text_is_normalised_before_anything_else(tokenizer):
    decomposed = "Ma\u0308dchen  klettert\t in "
    assert tokenizer.decode(tokenizer(decomposed)["input_ids"], skip_special_tokens=True) == "Mädchen klettert in"


def test_digits_and_punctuation_are_tokens_of_their_own(tokenizer):
    tokens = tokenizer.tokenize("costs 3,75!")
    assert tokens[-5:] == ["3", ",", "7", "5", "!"]


def test_characters_never_seen_become_unknown(tokenizer):
    assert 1 in tokenizer("漢")["input_ids"]


def test_lowercase_is_part_of_the_tokenizer():
    lower = train_tokenizer([TEXTS], 110, lowercase=True)
    assert lower("ZWEI Männer")["input_ids"] == lower("zwei männer")["input_ids"]
    assert lower.decode(lower(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0].lower()


@pytest.mark.parametrize(("size", "message"), [(5000, "at most 150"), (20, "at least")])
def test_a_vocabulary_that_the_data_does_not_give_is_refused(size, message):
    with pytest.raises(InputError, match=f"--vocab_size {size} .*{message}"):
        train_tokenizer([TEXTS], size)


def with_normalizer(normalizer, texts=TEXTS, **changes) -> PreTrainedTokenizerFast:
    """A BPE of another kind than ours."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        [texts], trainers.BpeTrainer(vocab_size=150, special_tokens=["</s>", "<unk>", "<pad>"])
    )
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **changes)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's of lower-cased text: lower case and no accents, by a normaliser of its own, and whole words."""
    words = ["[UNK]", "[PAD]", "[SEP]", "zwei", "hunde", "ein", "madchen", "##s", ".", "ω"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", sep_token="[SEP]"
    )


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, as Marian's own: a normaliser that nobody can look into."""

    def __init__(self, alphabet: str, fold: bool, **kwargs) -> None:
        self.alphabet, self.fold = ["</s>", "<unk>", "<pad>", *alphabet], fold
        super().__init__(eos_token="</s>", unk_token="<unk>", pad_token="<pad>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.alphabet)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text.lower() if self.fold else text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 1)

    def _convert_id_to_token(self, index: int) -> str:
        return self.alphabet[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


LOWER = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: train_tokenizer([TEXTS], 120), False),
        (lambda: train_tokenizer([TEXTS], 110, lowercase=True), True),
        (bert_tokenizer, True),
        (lambda: with_normalizer(normalizers.Sequence([normalizers.NFKC(), normalizers.Sequence([LOWER])])), True),
        (lambda: with_normalizer(normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])), False),
        (lambda: with_normalizer(normalizers.Replace("Z", "z")), True),
        (lambda: with_normalizer(LOWER, ["Два молодых человека", "дом"] * 3), True),
        (lambda: with_normalizer(normalizers.NFC(), ["Два молодых человека", "дом"] * 3), False),
        (lambda: with_normalizer(LOWER, ["两只红色的狗"] * 3), False),  # there is nothing to lose
        (lambda: Letters("abcdeαβγ", fold=True), True),
        (lambda: Letters("ABCDEabcde", fold=False), False),
        (lambda: Letters("ABCDE", fold=False), False),
    ],
)
def test_whether_case_is_lost_is_asked_by_trying(build, expected):
    assert lowercases(build()) is expected


LOAD_ALONE = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert "admin_hf" not in sys.modules
print(tokenizer(sys.argv[2])["input_ids"], tokenizer.pad_token_id, tokenizer.eos_token)
"""


@pytest.mark.parametrize("model_type", ["admin", "marian"])
def test_auto_tokenizer_loads_it_alone(tmp_path, tokenizer, model_type):
    save_tokenizer(tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    command = [sys.executable, "-c", LOAD_ALONE, str(tmp_path), TEXTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{tokenizer(TEXTS[0])['input_ids']} 119 </s>"


def test_text_batches_leaves_out_what_is_missing():
    dataset = Dataset.from_dict({"source": ["a", None, "c"], "target": ["x", "", "z"]})
    assert sorted(text for batch in text_batches(dataset, 2) for text in batch) == ["a", "c", "x", "z"]


@pytest.mark.parametrize(
    "text", [None, "", " \t", "\u200b", "\ufeff\u200c \u200d\u2060\u00ad", "\u2028", "\x00", "\ufe0f\u3164"]
)
def test_text_without_a_visible_character_is_blank(text):
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", "\u200bا", ".", "\u0301", "👍🏽", "\ud83d", "\u2581"])
def test_text_with_a_visible_character_is_not_blank(text):
    assert not is_blank(text)
