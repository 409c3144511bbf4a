"""The state of a model's ω: whether it was measured or loaded, and whether the model was profiled."""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


class OmegaState:
    """The state of the shortcut scales of a model, kept in the weights themselves."""

    _said_unprofiled = False

    def profiled_connections(self) -> Iterable[Any]:
        """The connections whose ω a profile sets, each with `omega` and `initialized`."""
        raise NotImplementedError

    @property
    def _profiled_flag(self) -> Tensor | None:
        """The buffer `omega_profiled` of the model, if it has an ω to profile."""
        raise NotImplementedError

    @property
    def is_profiled(self) -> bool:
        """Whether a profile was written into ω: measured on a batch, or read from a file.

        It is saved with the weights, as the buffer `omega_profiled`. It is False for a model that started with ω = 1
        (a stock Marian, or an Admin model that was trained without a profile), whatever its ω is now. It is also False
        for a model without an ω to profile.
        """
        return self._profiled_flag is not None and bool(self._profiled_flag)

    def set_profiled(self, is_profiled: bool) -> None:
        """Note whether a profile was written into ω, as [`initialize_omega`] does."""
        if self._profiled_flag is not None:
            self._profiled_flag.fill_(is_profiled)

    @property
    def omega_initialized(self) -> bool:
        """Whether ω was measured or loaded. False after construction; True if the model has no ω to profile.

        An entry other than 1 counts as measured or loaded, for example by `load_state_dict`.
        """
        return all(c.initialized or bool((c.omega != 1).any()) for c in self.profiled_connections())

    def warn_unprofiled(self) -> None:
        """Warn, once, that the model trains without a profile, if it has an ω that should be profiled."""
        omegas = [connection.omega for connection in self.profiled_connections()]
        if self._said_unprofiled or not omegas or self.is_profiled:
            return
        self._said_unprofiled = True
        if not self.omega_initialized:
            logger.warning(
                "The model was not profiled: it trains with every ω at 1, as plain Post-LN instead of Admin. Add "
                "AdminProfilingCallback() to the Trainer, or call initialize_omega(model, profile_residuals(model, "
                "batch)) before the first update."
            )
        elif all(bool((omega == 1).all()) for omega in omegas):
            logger.warning("The model was never profiled: training continues with every ω at 1, as plain Post-LN.")
        else:
            logger.warning("The model was never profiled: training continues with its present ω, not as Admin.")


def omega_state(model: Any) -> OmegaState:
    """The object that knows the state of a model's ω: an Admin model itself, or the injection of a stock model.

    Raises:
        ValueError: the model has no ω.
    """
    state = getattr(model, "injection", None) or model
    if not hasattr(state, "omega_initialized"):  # which an adapter around an Admin model has, too
        raise ValueError(
            f"{type(model).__name__} is not an Admin model, so it has no ω: load it with "
            "`AdminForConditionalGeneration.from_pretrained`, give it an ω with `inject`, or leave the callback out."
        )
    return cast(OmegaState, state)


__all__ = ["OmegaState", "omega_state"]
