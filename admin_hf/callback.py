"""Profiling and publishing inside a Trainer. All logic lives in functions of the library, for custom loops."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from huggingface_hub import ModelCardData
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging
from transformers.utils.hub import hf_api

from .adapters import adapted_layers, bare_model, check_mergeable
from .card import keep_card_by_hand
from .omega_state import omega_state
from .profiling import ResidualProfile, initialize_omega, profile_residuals
from .publishing import Publication, publish, push
from .reparameterization import reparameterize, stock_architecture
from .run.folder import PROFILE_NAME
from .sharding import make_embedding_one_module, sharding
from .special_tokens import check_padding, check_tokenizer, never_ends
from .terminal import showable
from .trainer_card import card_of_training, given_data, use_our_card


logger = logging.get_logger(__name__)

ADMIN = "AdminConfig(encoder_residual='admin', decoder_residual='admin')"


class _AdminCallback(TrainerCallback):
    """What all callbacks here do when the Trainer is made: check model and tokenizer, and make the former fit FSDP."""

    def on_init_end(
        self, args: TrainingArguments, *others: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        model = _unwrapped(model)
        _check_processing_class(model, processing_class)
        if sharding(args) == "FSDP":
            make_embedding_one_module(model)


class AdminProfilingCallback(_AdminCallback):
    """Profiles the model on the first batch of training and initialises ω, before step 1 computes anything.

    Works in a plain [`~transformers.Seq2SeqTrainer`]: the batch is the first micro-batch of step 1 on the
    first process. So neither the order of the data nor the random stream of training changes. All processes get the
    same ω. A table of ω is printed, and the profile is saved as `residual_profile.json` in the output folder; the
    trials of a hyperparameter search save theirs in `run-0`, `run-1`, … below it.

    Nothing is profiled when training is resumed, or when ω was already initialised or loaded. If the model then has no
    profile, a warning says so. Tokenizer and first batch are checked before update 1, for every model. A model inside
    adapters of PEFT is also profiled. Its checkpoints contain only adapters, so a resumed run reads ω from the saved
    profile.

    Args:
        verbose: set to False to print no table of ω.

    Raises:
        RuntimeError: the weights are already sharded (FSDP, DeepSpeed), so [`profile_and_initialize`] must be
            called earlier; or `DataParallel` would lose the result.
        ValueError: the model was not made for the Trainer's `processing_class` (see [`check_tokenizer`]), when the
            Trainer is made or training begins; labels contain the padding id, or sources are padded on the left; or an
            adapter leaves no ω to profile, or the profile is missing when it is resumed.

    Example:

    ```python
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=dataset, callbacks=[AdminProfilingCallback()])
    trainer.train()
    ```
    """

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self._hook: Any = None
        self._trials = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *others: Any,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        wrapper, model = extract_model_from_parallel(model), _unwrapped(model)
        _check_processing_class(model, processing_class)  # with `model_init`, the model is another one now
        omegas, is_injected = omega_state(model), hasattr(model, "injection")
        if args.label_smoothing_factor and not is_injected and not model.config.label_smoothing:
            logger.warning(
                f"label_smoothing_factor={args.label_smoothing_factor} of the Trainer also smooths over the padding "
                "token, which is banned by a bias of −10,000: the loss is far too large. Give it to the model "
                f"instead, AdminConfig(label_smoothing={args.label_smoothing_factor})."
            )
        output_dir = self._output_dir(args, state)
        is_due = not omegas.omega_initialized
        if state.global_step > 0:
            if is_due and getattr(wrapper, "peft_config", None):  # its checkpoints contain no ω
                _initialize_as_before(model, output_dir)
            return
        if not any(True for _ in omegas.profiled_connections()):
            if is_injected:
                systems, made = model.injection.system, "inject(model)"
            else:
                systems, made = (
                    f"{model.config.encoder_residual} encoder, {model.config.decoder_residual} decoder",
                    ADMIN,
                )
            logger.warning(
                f"There is nothing to profile: this model ({systems}) has no ω that a profile sets. For Admin, make "
                f"it with {made}."
            )
        elif is_due:
            _check_writable(args)
            if not any(connection.omega.requires_grad for connection in omegas.profiled_connections()):
                logger.warning(
                    "ω is frozen, because PEFT freezes everything except its adapters: it keeps its profiled value."
                )
        elif omegas.is_profiled:
            logger.info("Not profiled: the model's ω is initialised already.")
        else:
            omegas.warn_unprofiled()

        # The pre-hook sees the inputs of step 1, wherever they come from, and is removed after them
        def see_first_batch(module: Any, positional: tuple, batch: dict[str, Any]) -> None:
            if not module.training:  # an evaluation before the first update
                return
            self._remove_hook()
            if is_due:
                profile_and_initialize(model, batch, output_dir, verbose=self.verbose)
            elif not is_injected:
                check_padding(batch, model.padding_id)
            if is_injected:
                return
            eos = model.config.eos_token_id
            if never_ends(batch, eos if isinstance(eos, list) else [] if eos is None else [eos]):
                logger.warning(
                    f"No target of the first batch contains the end-of-sentence token {eos}, so the model cannot "
                    "learn to stop: give the tokenizer a post-processor that puts it after each sentence, such as "
                    "TemplateProcessing of the package tokenizers."
                )

        self._remove_hook()
        self._hook = wrapper.register_forward_pre_hook(torch.compiler.disable(see_first_batch), with_kwargs=True)

    def _output_dir(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The folder of the run, or of the trial of a search, which Trainer does not tell: it counts from 0, too."""
        folder = Path(str(args.output_dir))
        if not state.is_hyper_param_search:
            return folder
        self._trials += 1
        return folder / (state.trial_name or f"run-{self._trials - 1}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def profile_and_initialize(
    model: Any, batch: Mapping[str, Any], output_dir: str | os.PathLike, verbose: bool = True
) -> ResidualProfile:
    """Profile the model on the first process, and initialise ω on all of them.

    A table of ω is printed, and the profile is saved as `residual_profile.json` in `output_dir`. This is what
    [`AdminProfilingCallback`] does with the first batch. If weights will be sharded (see [`sharding`]), call it
    before `trainer.train()`, while every process still has all of them. All processes must call it.

    Args:
        model: the model, not wrapped or sharded yet, with the same weights on every process.
        batch: the arguments of the model's forward; only those of the first process are used.
        output_dir: where the first process saves the profile.
        verbose: set to False to print no table.

    Returns:
        The profile, the same on all processes.

    Raises:
        ValueError: as [`profile_residuals`] and [`initialize_omega`].

    Example:

    ```python
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=dataset, callbacks=[AdminProfilingCallback()])
    if sharding(args) and not model.omega_initialized:
        batch = trainer.data_collator([dataset[i] for i in range(64)])
        profile_and_initialize(model, batch, args.output_dir)
    trainer.train()
    ```
    """
    first = PartialState().is_main_process
    profiles = [profile_residuals(model, batch) if first else None]
    broadcast_object_list(profiles)
    profile = cast(ResidualProfile, profiles[0])
    initialize_omega(model, profile)
    if first:
        profile.save(Path(output_dir) / PROFILE_NAME)
        if verbose:
            title = "Admin: ω of the residual connections, profiled on the first batch"
            tqdm.write(showable(f"{title}\n{profile.table()}"))
    return profile


def _initialize_as_before(model: Any, output_dir: Path) -> None:
    if not (path := output_dir / PROFILE_NAME).exists():
        raise ValueError(
            f"The checkpoint contains only adapters, and {path} does not exist, so ω is lost: start with the base "
            "model that the adapters were trained on, saved with its ω."
        )
    initialize_omega(model, ResidualProfile.load(path))
    logger.info(f"ω is that of {path}: checkpoints of adapters contain none.")


def _check_writable(args: TrainingArguments) -> None:
    by_hand = (
        "profile before the Trainer is built: `profile_and_initialize(model, batch, args.output_dir)`, which calls "
        "`initialize_omega`, with `batch = data_collator([train_dataset[i] for i in range(64)])`."
    )
    if kind := sharding(args):
        raise RuntimeError(f"Under {kind} the weights cannot be changed after the Trainer has got them: {by_hand}")
    if args.n_gpu > 1:
        raise RuntimeError(
            f"One process with {args.n_gpu} GPUs trains copies of the model, which would lose ω: start one process "
            f"for each GPU with torchrun or `accelerate launch`, set CUDA_VISIBLE_DEVICES to one GPU, or {by_hand}"
        )


class AdminPublishingCallback(_AdminCallback):
    """With `push_to_hub=True` in any [`~transformers.Seq2SeqTrainer`], publishes the vanilla model on the Hub.

    A Trainer uploads its output folder and never calls `model.push_to_hub`. With this callback, the model saved to
    that folder is the vanilla model, folded and verified, and it is pushed when training ends. Checkpoints
    (`checkpoint-500`) keep ω, so that they can be resumed. *During* training (`hub_strategy="every_save"`), Trainer
    pushes copies of checkpoints, with ω. The model card, also that of `trainer.push_to_hub()`, describes the model and
    its training; a card that was written by hand is kept. Adapters of PEFT are merged into the vanilla model. A
    `hub_token` is moved from the arguments to the environment (`HF_TOKEN`), because Trainer would upload it in
    training_args.bin. If the trained model cannot be folded (an ω near zero), a message is logged and the folder gets
    the model with ω, so nothing is lost.

    Args:
        card_data: information for the model card that only you have: license, languages, data sets, scores …

    Raises:
        ValueError: no stock architecture computes the model, it was not made for the Trainer's `processing_class`, or
            its weights will be sharded (FSDP, DeepSpeed); when the Trainer is made.

    Example:

    ```python
    args = Seq2SeqTrainingArguments(output_dir="en-de", push_to_hub=True)
    card_data = ModelCardData(license="cc-by-4.0", language=["en", "de"], datasets=["me/corpus"])
    callbacks = [AdminProfilingCallback(), AdminPublishingCallback(card_data)]
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    trainer.push_to_hub()  # adds later evaluations; the model is there already
    ```
    """

    def __init__(self, card_data: ModelCardData | None = None) -> None:
        self.card_data = card_data or ModelCardData()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        use_our_card(_write_card)

    def on_init_end(
        self, args: TrainingArguments, *others: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if kind := sharding(args):
            raise ValueError(
                f"Under {kind} a model cannot be folded in place: leave AdminPublishingCallback out, and export a "
                "checkpoint when training is done, with `python -m admin_hf export`."
            )
        if args.hub_token is not None:
            os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
        check_mergeable(model)
        if not hasattr(model, "injection"):
            stock_architecture(_unwrapped(model))
        super().on_init_end(args, model=model, processing_class=processing_class)
        self._tokenizer = processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None
        publish(model, Publication(Path(str(args.output_dir)).resolve(), self._tokenizer))

    on_train_begin = on_init_end  # of a callback that is added later

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *others: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not (args.push_to_hub and state.is_world_process_zero):
            return
        repo_id = args.hub_model_id or Path(str(args.output_dir)).absolute().name

        def push_vanilla() -> None:
            card = card_of_training(model, args, state, self.card_data)
            options: dict[str, Any] = {"private": args.hub_private_repo, "revision": args.hub_revision}
            vanilla = reparameterize(model, tokenizer=self._tokenizer)
            push(vanilla, repo_id, card, tokenizer=self._tokenizer, commit_message="Vanilla model", **options)

        try:
            # After the uploads of checkpoints, which continue in the background of the same client
            hf_api().run_as_future(push_vanilla).result()
        except Exception as error:  # whatever the network does, the trained model must not be lost
            advice = "" if isinstance(error, ValueError) else " trainer.push_to_hub() tries again."
            logger.error(f"The vanilla model was not pushed to {repo_id}: {error}{advice}")

    def write_card(self, trainer: Any, given: Mapping[str, Any]) -> None:
        """Write the card into the folder that the Trainer uploads, unless one there or on the Hub was written by hand.

        Args:
            given: arguments of `trainer.create_model_card`.
        """
        folder, repo_id = Path(str(trainer.args.output_dir)), trainer.hub_model_id
        if repo_id:
            keep_card_by_hand(folder, repo_id, trainer.args.hub_revision)
        data = given_data(self.card_data, given)
        card = card_of_training(trainer.model, trainer.args, trainer.state, data)
        card.write(folder, repo_id or folder.absolute().name)


def _write_card(trainer: Any, given: Mapping[str, Any]) -> bool:
    """Write the card of a Trainer that has the callback."""
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, AdminPublishingCallback)]
    if callbacks and trainer.is_world_process_zero():
        callbacks[0].write_card(trainer, given)
    return bool(callbacks)


def _check_processing_class(model: Any, processing_class: Any) -> None:
    if not hasattr(model, "injection") and isinstance(processing_class, PreTrainedTokenizerBase):
        check_tokenizer(model, processing_class)


def _unwrapped(model: nn.Module | None) -> Any:
    """The bare model.

    Raises:
        ValueError: it has no ω, or PEFT has put layers in the place of its residual connections.
    """
    model = bare_model(model)
    omega_state(model)  # which refuses a model without ω
    for name, layer in adapted_layers(model):
        if isinstance(getattr(layer, "base_layer", None), nn.LayerNorm):
            raise ValueError(
                f"{name} contains ω, and no adapter can replace it: name it in `modules_to_save` of a LoraConfig, "
                "which trains it as a whole."
            )
    return model
