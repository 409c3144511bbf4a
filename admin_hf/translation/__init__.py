"""Translation: of lines of text, by models of any kind, alone or as an ensemble."""

from .ensemble import Ensemble
from .lines import Translation, translate


__all__ = ["Ensemble", "Translation", "translate"]
