"""Publishing: saves and uploads a model, with its ω or as the vanilla model, which needs no code of this project."""

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import hf_api

from .card import CARD_NAME, Card, keep_card_by_hand
from .checkpoints import REPLACED, replaced_model
from .positions import save_own_tables
from .reparameterization import reparameterize as fold


logger = logging.get_logger(__name__)


def write_vanilla(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Write the vanilla model of [`reparameterize`], and its tokenizer, and replace the model in a folder.

    It is folded and verified before anything is written, and replaces the old one only when it is complete.

    Returns:
        The vanilla model.

    Raises:
        ValueError: as [`reparameterize`].
        OSError: it cannot be written; the folder is unchanged.
    """
    vanilla = fold(model, dtype, tokenizer)
    with replaced_model(folder) as staging:
        vanilla.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return vanilla


@dataclass(frozen=True)
class Publication:
    """The choice that a model saved to this folder is saved as its vanilla model, by any caller.

    A Trainer calls `save_pretrained(folder)` in the same way for its checkpoints and for the folder that it uploads.

    Attributes:
        folder: an absolute path.
        tokenizer: the vanilla model is fitted to its entries.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase | None = None

    def is_of(self, directory: str | os.PathLike) -> bool:
        return Path(directory).resolve() == self.folder


def _vanilla_or_none(make: Callable[[], Any], directory: str | os.PathLike) -> Any:
    try:
        return make()
    except ValueError as error:
        logger.error(f"{directory} gets the model with ω, because it cannot be folded: {error}")
        return None


def publish(model: Any, publication: Publication) -> None:
    """Make this choice for an Admin model, a stock model with an ω from [`inject`], or a PEFT model around one."""
    if isinstance(model, PublishableModel):
        model.publication = publication
    else:
        model.save_pretrained = _SavePublished(model, publication)


def push(
    model: Any,
    repo_id: str,
    card: Card,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> str:
    """Upload a model as [`~transformers.PreTrainedModel.push_to_hub`] does, with a card.

    A card that was written by hand is kept; weights and adapters of an earlier model are removed.

    Args:
        model: the model in the form in which it will be loaded.
        card: its model card.
        tokenizer: uploaded with it.
    """
    api = hf_api()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        keep_card_by_hand(folder, repo_id, revision, token)
        card.write(folder, repo_id)
        if tags:
            written = ModelCard.load(folder / CARD_NAME)
            written.data.tags = list(dict.fromkeys([*(written.data.tags or []), *tags]))
            written.save(folder / CARD_NAME)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(REPLACED),
        )


class _SavePublished:
    """`save_pretrained` of a stock model with an injected ω, or of PEFT's model, whose classes know nothing of it."""

    def __init__(self, model: Any, publication: Publication) -> None:
        self.model, self.publication = model, publication

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        vanilla = None
        if is_main_process and self.publication.is_of(save_directory):
            vanilla = _vanilla_or_none(partial(self._vanilla, state_dict), save_directory)
        if vanilla is None:
            save: Any = type(self.model).save_pretrained
            save(self.model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
            return
        with replaced_model(save_directory) as staging:
            vanilla.save_pretrained(staging, **kwargs)

    def _vanilla(self, state_dict: dict[str, Tensor] | None) -> Any:
        model = self.model
        if state_dict is not None:
            model = copy.deepcopy(model)
            model.load_state_dict(state_dict)
        return fold(model, tokenizer=self.publication.tokenizer)


class PublishableModel(PreTrainedModel):
    """A model that is saved with its ω, and published without it.

    Attributes:
        publication: the folder that gets the vanilla model, if any ([`AdminPublishingCallback`] sets it).
    """

    publication: Publication | None = None
    _default_auto_class = "AutoModel"

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        reparameterize: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model to a folder: with ω, for further training, or as the vanilla model, which needs no code of
        ours.

        As [`~transformers.PreTrainedModel.save_pretrained`], and with `push_to_hub=True` also as [`push_to_hub`].

        Args:
            reparameterize: save the vanilla model of [`reparameterize`]. It is folded and verified before anything is
                written, and replaces the model in the folder only when it is complete. By default, a folder gets the
                model with ω (unless it is that of `publication`), and the Hub gets the vanilla model.

        Raises:
            ValueError: the model cannot be folded (see [`reparameterize`]).
            NotADirectoryError: `save_directory` is a file.
        """
        published = self.publication is not None and self.publication.is_of(save_directory)
        vanilla = None
        if is_main_process and reparameterize is not False:
            if reparameterize or push_to_hub:
                vanilla = self._vanilla(state_dict)
            elif published:
                vanilla = _vanilla_or_none(partial(self._vanilla, state_dict), save_directory)
        if vanilla is not None and (reparameterize or published):
            with replaced_model(save_directory) as folder:
                vanilla.save_pretrained(folder, **kwargs)
        elif is_main_process or not reparameterize:
            if state_dict is not None:  # gathered from shards: tied weights are copies there, and would be saved twice
                state_dict = {name: x for name, x in state_dict.items() if name not in self.all_tied_weights_keys}
            save_own_tables(self, state_dict)
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process and push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            kwargs.pop("variant", None)
            if vanilla is not None:
                push(vanilla, repo_id, Card.of(self), **kwargs)
            else:
                self.push_to_hub(repo_id, reparameterize=False, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        reparameterize: bool = True,
        card_data: ModelCardData | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload the model to the Hub, as the vanilla model, which loads without this code.

        Args:
            repo_id: the repository, such as `"me/en-de"`; it is made if it does not exist.
            reparameterize: set to False to upload the model with its ω. To load it, `admin_hf` must then be installed,
                or its code must be uploaded with it: call `register_for_auto_class` first.
            card_data: information for the model card that only you have: license, languages, data sets, scores … A
                card that was written by hand is kept.
            kwargs: as [`~transformers.PreTrainedModel.push_to_hub`].

        Returns:
            The address of the commit.

        Raises:
            ValueError: the model cannot be folded (see [`reparameterize`]); nothing was uploaded.
        """
        if not reparameterize and getattr(self, "peft_config", None):  # Transformers would push only the adapter
            return cast(Any, super()).push_to_hub(repo_id, **kwargs)
        return push(self._vanilla() if reparameterize else self, repo_id, Card.of(self, card_data), **kwargs)

    def _vanilla(self, state_dict: dict[str, Tensor] | None = None) -> Any:
        model: Any = self
        if state_dict is not None:  # of a model whose weights are sharded over processes
            model = cast(Any, type(self)(copy.deepcopy(self.config))).to(self.dtype)
            model.load_state_dict(state_dict)
            model.generation_config = self.generation_config
        return fold(model, tokenizer=self.publication.tokenizer if self.publication else None)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type | None = None) -> None:
        """Let `save_pretrained` save the code of the model with its weights.

        `AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)` then loads it where `admin_hf` is not
        installed.

        Args:
            auto_class: the class that loads it; default: `AutoModelForSeq2SeqLM` (for
                [`AdminForConditionalGeneration`]) or `AutoModel` (for [`AdminModel`]).
        """
        cast(Any, cls.config_class).register_for_auto_class()
        super().register_for_auto_class(auto_class or cls._default_auto_class)


__all__ = ["Publication", "PublishableModel", "publish", "push", "write_vanilla"]
