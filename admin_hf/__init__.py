"""Admin (Adaptive Model Initialization) for Transformers: deep Post-LN translation models that train.

Liu, Liu, Gao, Chen, Han, "Understanding the Difficulty of Training Transformers", EMNLP 2020.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .allocator import KeepFreedMemory, keep_freed_memory, map_large_buffers
from .architecture import Stack, Sublayer
from .attention import CPU_ATTENTION
from .callback import AdminProfilingCallback, AdminPublishingCallback, profile_and_initialize
from .configuration_admin import AdminConfig
from .deepening import deepen
from .injection import inject, load_injected
from .modeling_admin import AdminForConditionalGeneration, AdminModel
from .pretrained import AdminPreTrainedModel
from .profiling import ResidualProfile, initialize_omega, profile_residuals
from .reparameterization import reparameterize
from .run import average_checkpoints, last_checkpoints
from .special_tokens import check_tokenizer
from .translation import Ensemble, Translation, translate


AutoConfig.register(AdminConfig.model_type, AdminConfig)
AutoModel.register(AdminConfig, AdminModel)
AutoModelForSeq2SeqLM.register(AdminConfig, AdminForConditionalGeneration)

__version__ = "0.2.0"

__all__ = [
    "CPU_ATTENTION",
    "AdminConfig",
    "AdminForConditionalGeneration",
    "AdminModel",
    "AdminPreTrainedModel",
    "AdminProfilingCallback",
    "AdminPublishingCallback",
    "Ensemble",
    "KeepFreedMemory",
    "ResidualProfile",
    "Stack",
    "Sublayer",
    "Translation",
    "average_checkpoints",
    "check_tokenizer",
    "deepen",
    "initialize_omega",
    "inject",
    "keep_freed_memory",
    "last_checkpoints",
    "load_injected",
    "map_large_buffers",
    "profile_and_initialize",
    "profile_residuals",
    "reparameterize",
    "translate",
]
