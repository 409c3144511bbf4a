"""run_translation.py with one choice of Admin changed: each variant is a residual system of this program only."""

import sys

from torch import Tensor, nn

import run_translation
from admin_hf.connections import AdminConnection
from admin_hf.residual import SYSTEMS, Admin


class FrozenConnection(AdminConnection):
    """ω stays at the value of the profile."""

    def __init__(self, d_model: int, omega: float | None = None) -> None:
        super().__init__(d_model, omega)
        self.omega.requires_grad_(False)


class ScalarConnection(AdminConnection):
    """ω_i is one trained number."""

    def __init__(self, d_model: int, omega: float | None = None) -> None:
        super().__init__(d_model, omega)
        self.add_scale("omega", self.initial_scales["omega"])

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return nn.LayerNorm.forward(self, branch + shortcut * self.omega.to(shortcut))


class MeasuredAtOneConnection(AdminConnection):
    """ω is 1 while the profile measures, as section 4.3 of the paper says."""

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return super().forward(shortcut, branch) if self.initialized else nn.LayerNorm.forward(self, shortcut + branch)


class WithFirst(Admin):
    """The first sub-layer has an ω_1, which starts at 1 and is trained, as in the authors' code."""

    def connection(self, sublayer_idx: int) -> nn.Module:
        return super().connection(sublayer_idx) if sublayer_idx else AdminConnection(self.config.d_model, 1.0)


def _with(connection: type[AdminConnection]) -> type[Admin]:
    class Variant(Admin):
        def connection(self, sublayer_idx: int) -> nn.Module:
            return connection(self.config.d_model) if sublayer_idx else super().connection(sublayer_idx)

    return Variant


VARIANTS = {
    "admin_frozen": _with(FrozenConnection),
    "admin_scalar": _with(ScalarConnection),
    "admin_measured_at_one": _with(MeasuredAtOneConnection),
    "admin_with_first": WithFirst,
}


if __name__ == "__main__":
    SYSTEMS |= VARIANTS
    sys.exit(run_translation.main())
