"""Loads the model that the command line names: a folder of any kind, or an id of the Hub."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from ..analysis.inputs import find_tokenizer
from ..architecture import ARCHITECTURES
from ..checkpoints import check_finite, check_source, check_weight_files, explained_errors, has_weights
from ..configuration_admin import AdminConfig
from ..modeling_admin import AdminForConditionalGeneration
from ..pretrained import load_complete
from ..run import saved_checkpoints
from ..run.folder import VANILLA_NAME
from ..special_tokens import check_tokenizer, vocabulary_size
from .engines import CTranslate2Engine, Engine, TransformersEngine
from .ensemble import Ensemble


CTRANSLATE2_NAME = "model.bin"  # the weights in a folder of CTranslate2


def load_engine(
    sources: list[str], tokenizer: str | None = None, device: str | None = None, dtype: str | None = None
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Load an engine and its tokenizer.

    Args:
        sources: a folder or Hub id; several make an ensemble. A folder contains a model of Transformers, with ω or
            without, or one of CTranslate2, or is that of a run, whose vanilla model is used.
        tokenizer: folder or Hub id of the tokenizer; for CTranslate2, also of the generation settings and the limit
            of positions. Default: the model's.
        device: such as `"cuda:1"`. Default: a GPU if there is one.
        dtype: dtype of the weights in computations. Default: that of the stored weights.

    Raises:
        OSError, ValueError, RuntimeError, ImportError: something cannot be loaded, or does not belong together.
    """
    places = [_place(source) for source in sources]
    tokenizers = [_load_tokenizer(place, tokenizer) for place in places]
    for place, other in zip(places, tokenizers, strict=True):
        if other.get_vocab() != tokenizers[0].get_vocab():
            raise ValueError(
                f"{place} has another vocabulary than {places[0]}: an ensemble needs models that were trained with "
                "the same tokenizer."
            )
    converted = [place for place in places if _is_converted(place)]
    if converted and len(places) > 1:
        raise ValueError(f"{converted[0]} is of CTranslate2, which has no ensembles: name what it was made from.")
    if converted:
        return _load_converted(converted[0], tokenizers[0], tokenizer, device, dtype), tokenizers[0]
    models = [_load_model(place, tokenizers[0], device, dtype) for place in places]
    return TransformersEngine(models[0] if len(models) == 1 else Ensemble(models)), tokenizers[0]


def _place(source: str) -> str:
    """The folder or Hub id that a model is in: of a run, its vanilla model."""
    check_source(source)
    folder = Path(source)
    if has_weights(folder / VANILLA_NAME):
        return str(folder / VANILLA_NAME)
    if folder.is_dir() and not has_weights(folder) and (checkpoints := saved_checkpoints(folder)):
        raise ValueError(
            f"{source} has no model except those of its checkpoints: name one, such as {checkpoints[-1]}."
        )
    return source


def _is_converted(place: str) -> bool:
    return Path(place, CTRANSLATE2_NAME).is_file() and not has_weights(place)


def _load_tokenizer(place: str, named: str | None) -> PreTrainedTokenizerBase:
    if (tokenizer := find_tokenizer(named or place)) is None:
        advice = "name another folder." if named else "name a folder that has one by --tokenizer."
        raise ValueError(f"{named or place} has no tokenizer that can be loaded: {advice}")
    return tokenizer


def _load_model(
    place: str, tokenizer: PreTrainedTokenizerBase, device: str | None, dtype: str | None
) -> PreTrainedModel:
    if dtype == "int8":
        raise ValueError(f"{place} is a model of Transformers, which has no int8 here: convert it for CTranslate2.")
    on = torch.device(device) if device else torch.accelerator.current_accelerator(check_available=True)
    with explained_errors(place):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if isinstance(config, AdminConfig):
            model = load_complete(AdminForConditionalGeneration, place, config)
        else:
            model = _load_stock(place, config)
    if config.model_type in (AdminConfig.model_type, *ARCHITECTURES):
        check_tokenizer(model, tokenizer)
    elif (entries := vocabulary_size(tokenizer)) > (size := model.get_input_embeddings().num_embeddings):
        raise ValueError(f"The tokenizer has {entries:,} entries, more than the {size:,} of {place}: name its own.")
    return model.to(on or "cpu", getattr(torch, dtype) if dtype else None).eval()


def _load_stock(place: str, config: Any) -> Any:
    if config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{place} contains a {config.model_type!r} model, which does not translate.")
    check_weight_files(place)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        place, config=config, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if omegas := [name for name in info["unexpected_keys"] if name.endswith(".omega")]:
        raise ValueError(
            f"{place} has an ω ({min(omegas)}) that was injected into a stock model: fold it by "
            "`reparameterize(load_injected(…))`, save that, and name its folder."
        )
    if missing := info["missing_keys"]:
        raise ValueError(f"{place} lacks {min(missing)}: config.json and weights do not belong together.")
    check_finite(model, f"The checkpoint {place}")
    return model


def _load_converted(
    place: str, tokenizer: PreTrainedTokenizerBase, named: str | None, device: str | None, dtype: str | None
) -> CTranslate2Engine:
    try:
        import ctranslate2
    except ImportError as error:
        raise ImportError(f"{place} is a model of CTranslate2: pip install ctranslate2") from error
    _check_vocabulary(Path(place), tokenizer)
    on = torch.device(device or ("cuda" if ctranslate2.get_cuda_device_count() else "cpu"))
    translator = ctranslate2.Translator(
        place, device=on.type, device_index=on.index or 0, compute_type=dtype or "default"
    )
    settings, positions = GenerationConfig(), None
    for source in filter(None, (named, place)):
        with suppress(OSError):
            settings = GenerationConfig.from_pretrained(source)
            break
    if named:
        with suppress(OSError, ValueError):
            positions = getattr(AutoConfig.from_pretrained(named), "max_position_embeddings", None)
    return CTranslate2Engine(translator, tokenizer, settings, positions)


def _check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of another model, whose tokens CTranslate2 would take for unknown ones."""
    for name in ("shared_vocabulary.json", "source_vocabulary.json"):
        if (path := folder / name).is_file():
            known = set(json.loads(path.read_text(encoding="utf-8")))
            if lacking := sorted(tokenizer.get_vocab().keys() - known - {tokenizer.pad_token}):
                raise ValueError(
                    f"{folder} was not made for this tokenizer: it lacks {lacking[0]!r} and {len(lacking) - 1:,} "
                    "other entries of it. Name the tokenizer of the model that was converted by --tokenizer."
                )
