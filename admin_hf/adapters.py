"""Adapters of PEFT: the model inside them, and the merged model that computes the same."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.trainer_utils import unwrap_peft_model


def bare_model(model: Any) -> Any:
    """The model inside the wrappers of distributed training, compilation and PEFT; adapters stay in its layers."""
    return unwrap_peft_model(extract_model_from_parallel(model, keep_torch_compile=False))


def check_mergeable(model: Any) -> None:
    """Refuse a model whose adapter does not change its weights.

    Raises:
        ValueError: the adapter learns prompts or prefixes, which are inputs of the layers.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"{adapter.peft_type.value} does not train weights of the model, so it cannot be merged into them: "
                "save the model with its ω, `model.get_base_model().save_pretrained(…)`, and the adapter separately."
            )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that replace a model's own in PEFT, and their names."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        return
    outer = "."
    for name, module in [*model.named_modules()]:
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not name.startswith(outer):
            outer = f"{name}."
            yield name, module


def merge_adapters(model: nn.Module) -> None:
    """Merge the active adapters into the weights, in place, as `merge_and_unload()` of PEFT does.

    It also merges those of `model.add_adapter`, which have no such method. Adapters that are switched off are dropped.

    Args:
        model: the bare model.

    Raises:
        ValueError: an adapter is on a weight that another module shares, so merging would also change that module.
    """
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, layer in adapted_layers(model):
        stock = layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()
        is_shared = any(uses[id(weight)] > 1 for weight in stock.parameters())
        if is_shared and not hasattr(layer, "token_adapter"):  # which PEFT ties like the weights
            raise ValueError(
                f"The adapter of {name} cannot be merged, because its weight is shared with another module: leave "
                f"{name.rpartition('.')[2]} out of the adapter, or make the model with tie_word_embeddings=False."
            )
        if not layer.disable_adapters:
            if hasattr(layer, "unload_and_optionally_merge_module"):  # modules that are trained completely
                stock = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
                stock = layer.get_base_layer()
        model.set_submodule(name, stock)
    for attribute in ("_hf_peft_config_loaded", "peft_config"):  # or Transformers would save it as an adapter
        vars(model).pop(attribute, None)


__all__ = ["adapted_layers", "bare_model", "check_mergeable", "merge_adapters"]
