"""The model card of a published model: README.md, with the known facts on the model, its training and its scores."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, logging

from .adapters import bare_model
from .checkpoints import weight_files, write_whole
from .omega_state import omega_state
from .paths import is_hub_id


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
PAPER = "https://aclanthology.org/2020.emnlp-main.463"
MARK = "<!-- Written by admin-hf, and written anew with every push until you remove this line. -->"
# A card with neither was written by hand; the second is Trainer's
_MARKS = (MARK, "<!-- This model card has been generated automatically")

ADMIN = f"""It was trained with [Admin]({PAPER}) (Adaptive Model Initialization), whose shortcut
scales ω are {{where}}."""
UNPROFILED = "Its shortcut scales ω were not profiled, so it is not an Admin model; they are {where}."
VANILLA = "This is a vanilla {kind} checkpoint: it needs only 🤗 Transformers."
UNFOLDED = "It needs the package `admin_hf`, or its code in the repository and `trust_remote_code=True`."
USAGE = """from transformers import AutoTokenizer, {loader}
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = {loader}.from_pretrained("{repo_id}")"""
TRANSLATE = """

source = tokenizer([{example}], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**source), skip_special_tokens=True))"""
CTRANSLATE2 = """CTranslate2 also accepts it:
`ct2-transformers-converter --model {repo_id} --output_dir ct2 --quantization int8`."""
CITATION = f"""```bibtex
@inproceedings{{liu-etal-2020-understanding,
  title = "Understanding the Difficulty of Training Transformers",
  author = "Liu, Liyuan and Liu, Xiaodong and Gao, Jianfeng and Chen, Weizhu and Han, Jiawei",
  booktitle = "Proceedings of the 2020 Conference on Empirical Methods in Natural Language Processing (EMNLP)",
  year = "2020",
  url = "{PAPER}",
}}
```"""


@dataclass
class Card:
    """The known facts on a model, from which its card is written. Unknown facts are left out.

    Attributes:
        data: metadata from the user: license, languages, data sets, scores …
        is_profiled: whether a profile set the start of ω; None for a model that had no ω.
        translates: whether it is a model for translation.
        base_model: the model that it was loaded from, a folder or a name on the Hub.
        sections: Markdown by heading.
        example: a sentence to translate.
    """

    data: ModelCardData = field(default_factory=ModelCardData)
    is_profiled: bool | None = None
    translates: bool = True
    base_model: str | None = None
    sections: dict[str, str] = field(default_factory=dict)
    example: str = "…"

    @classmethod
    def of(cls, model: Any, data: ModelCardData | None = None) -> "Card":
        """The card of a model with its ω."""
        model = bare_model(model)
        state, config = omega_state(model), model.config
        return cls(
            data=data or ModelCardData(),
            is_profiled=state.is_profiled if any(True for _ in state.profiled_connections()) else None,
            translates="encoder_residual" in config,
            base_model=getattr(config, "_name_or_path", None),
            sections={"Training": training_section(config.to_dict())},
        )

    def write(self, folder: str | os.PathLike, repo_id: str) -> None:
        """Write README.md into the folder of a saved model, unless it has one that was written by hand.

        Args:
            folder: the folder of the configuration and the weights.
            repo_id: the name that loads the model: its name on the Hub, or a name to be replaced.

        Raises:
            FileNotFoundError: the folder has no model.
        """
        path = Path(folder, CARD_NAME)
        if not Path(folder, CONFIG_NAME).exists():
            raise FileNotFoundError(
                f"{folder} has no model to describe: save it first, for example with trainer.save_model()."
            )
        if path.exists() and is_by_hand(path.read_text(encoding="utf-8", errors="replace")):
            logger.warning(f"{CARD_NAME} is kept, because it was written by hand: remove it to get this model's card.")
            return
        metadata = self.metadata(repo_id).to_yaml()
        write_whole(path, f"---\n{metadata}\n---\n\n{MARK}\n\n{self._text(Path(folder), repo_id)}")

    def metadata(self, repo_id: str) -> ModelCardData:
        """Metadata from the model and from the user, who is right where both have a value."""
        base = self.base_model
        tags = [*(["translation"] if self.translates else []), *(["admin"] if self.is_profiled else [])]
        found = ModelCardData(
            library_name="transformers",
            base_model=base if base and base != repo_id and is_hub_id(base) else None,
            pipeline_tag="translation" if self.translates else None,
        )
        for key, value in vars(self.data).items():
            found[key] = found.get(key) if value is None else value
        found.tags = list(dict.fromkeys([*tags, *(self.data.tags or [])])) or None
        found.model_name = (self.data.model_name or _name(repo_id)) if found.eval_results else None
        return found

    def _text(self, folder: Path, repo_id: str) -> str:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        architecture, shapes = config["architectures"][0], _shapes(folder)
        is_vanilla = not any(name.endswith(".omega") for name in shapes)
        parameters = sum(math.prod(shape) for name, shape in shapes.items() if name != "final_logits_bias")
        lines = [_summary(config, f"{parameters / 1e6:.1f} M parameters", self.data.language)]
        if self.is_profiled is not None:
            where = "folded into the weights" if is_vanilla else "kept in the weights, for further training"
            lines.append((ADMIN if self.is_profiled else UNPROFILED).format(where=where))
        kind = config["model_type"].capitalize()
        lines.append(VANILLA.format(kind=kind) if is_vanilla else UNFOLDED)
        loader = "AutoModelForSeq2SeqLM" if self.translates else architecture
        usage = USAGE.format(repo_id=repo_id, loader=loader)
        if self.translates:
            usage += TRANSLATE.format(example=json.dumps(self.example, ensure_ascii=False))  # as Python writes it
        parts = [f"# {_name(repo_id)}", "\n".join(lines), f"```python\n{usage}\n```"]
        parts += [CTRANSLATE2.format(repo_id=repo_id)] if self.translates and is_vanilla else []
        known = self.sections if self.is_profiled is None else {**self.sections, "Citation": CITATION}
        parts += [f"## {heading}\n\n{text.strip()}" for heading, text in known.items() if text.strip()]
        return "\n\n".join(parts) + "\n"


def _name(repo_id: str) -> str:
    return repo_id.rpartition("/")[2]


def _summary(config: Mapping[str, Any], size: str, language: Any) -> str:
    if {"encoder_layers", "decoder_layers", "d_model"} <= config.keys():
        depth = f"{config['encoder_layers']}+{config['decoder_layers']}"
        summary = f"A Transformer with {depth} layers, width {config['d_model']} and {size}."
    else:
        summary = f"A {config['architectures'][0]} with {size}."
    if isinstance(language, list) and len(language) == 2:
        return f"Translates **{language[0]} → {language[1]}**. {summary}"
    return summary


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    return shapes


# --- written by hand -------------------------------------------------------------------------------


def is_by_hand(card: str) -> bool:
    """Whether a card was written by hand, so that only its author may replace it."""
    return bool(card.strip()) and not any(mark in card for mark in _MARKS)


def card_by_hand(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """The card of a repository on the Hub, if it was written by hand.

    Raises:
        OSError: the Hub does not answer.
    """
    try:
        path = hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
    except LocalEntryNotFoundError:  # an EntryNotFoundError, too
        raise
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    card = Path(path).read_text(encoding="utf-8")
    return card if is_by_hand(card) else None


def keep_card_by_hand(
    folder: str | os.PathLike, repo_id: str, revision: str | None = None, token: str | bool | None = None
) -> None:
    """Put the card of a repository, if it was written by hand, into a folder, where [`Card.write`] leaves it.

    Raises:
        OSError: as [`card_by_hand`].
    """
    if (by_hand := card_by_hand(repo_id, revision, token)) is not None:
        write_whole(Path(folder, CARD_NAME), by_hand)


# --- its section on training ----------------------------------------------------------------------


def versions() -> str:
    """The versions of the packages that were used."""
    found = []
    for package in ("admin-hf", "transformers", "torch", "tokenizers", "datasets", "peft"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def training_section(
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    program: str = "Seq2SeqTrainingArguments",
) -> str:
    """Markdown of how a model was trained.

    Args:
        config: the configuration of the model with its ω.
        facts: facts by name, such as [`training_facts`].
        arguments: the arguments that differ from their defaults (see [`changed_arguments`]).
        program: the program that has these arguments.
    """
    parts = []
    if "encoder_residual" in config:
        encoder, decoder = config["encoder_residual"], config["decoder_residual"]
        parts.append(f"Residual connections: `{encoder}` in the encoder, `{decoder}` in the decoder.")
    parts.append("\n".join(f"- {name}: {value}" for name, value in {**(facts or {}), "versions": versions()}.items()))
    if arguments:
        shown = json.dumps(arguments, indent=1, ensure_ascii=False)
        parts.append(f"Arguments of `{program}` that differ from its defaults:\n\n```json\n{shown}\n```")
    return "\n\n".join(parts)


__all__ = ["CARD_NAME", "Card", "card_by_hand", "is_by_hand", "keep_card_by_hand"]
