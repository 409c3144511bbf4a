"""What the Transformers library's common model tests need to run on Admin, and on stock Marian as the reference.

Not collected where it lies: `tests/test_hf_common.py` copies it to `tests/models/admin/` of the library's tests.
"""

import unittest
from unittest.mock import patch

import torch
from transformers import MarianConfig, MarianModel, MarianMTModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from admin_hf import AdminConfig, AdminForConditionalGeneration, AdminModel

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin


# The tests look up here which class takes labels; AutoModel.register leaves these tables alone.
MODEL_MAPPING_NAMES[AdminConfig.model_type] = AdminModel.__name__
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[AdminConfig.model_type] = AdminForConditionalGeneration.__name__

BATCH_SIZE, LENGTH = 13, 7

SIZES = {
    "vocab_size": 99,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 20,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


class TinyModelTester:
    """A tiny configuration, inputs for it, and the sizes that the tests expect in the outputs."""

    is_training = True
    batch_size = BATCH_SIZE
    seq_length = LENGTH
    hidden_size = SIZES["d_model"]
    num_hidden_layers = SIZES["encoder_layers"]
    num_attention_heads = SIZES["encoder_attention_heads"]

    def __init__(self, config_class, residuals):
        self.config_class = config_class
        self.residuals = residuals

    def prepare_config_and_inputs_for_common(self):
        source = torch.randint(4, SIZES["vocab_size"], (BATCH_SIZE, LENGTH))
        target = torch.randint(4, SIZES["vocab_size"], (BATCH_SIZE, LENGTH))
        source[:, -1] = SIZES["eos_token_id"]
        target[:, 0] = SIZES["decoder_start_token_id"]
        inputs = {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "decoder_input_ids": target,
            "decoder_attention_mask": torch.ones_like(target),
        }
        return self.config_class(**SIZES, **self.residuals), inputs


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    is_encoder_decoder = True
    test_missing_keys = False
    test_can_init_all_missing_weights_before_2023 = True

    config_class = AdminConfig
    all_model_classes = (AdminModel, AdminForConditionalGeneration)
    residuals: dict[str, str] = {}

    def setUp(self):
        self.model_tester = TinyModelTester(self.config_class, self.residuals)

    def test_config(self):
        ConfigTester(self, config_class=self.config_class, **SIZES, **self.residuals).run_common_tests()

    def test_sdpa_can_dispatch_non_composite_models(self):
        # It begins with the library's default, which Admin's models alone have another in place of
        with patch("admin_hf.pretrained.ADMIN_ATTENTION", "sdpa"):
            super().test_sdpa_can_dispatch_non_composite_models()


class MarianTest(CommonTests, unittest.TestCase):
    config_class = MarianConfig
    all_model_classes = (MarianModel, MarianMTModel)


class AdminTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "admin", "decoder_residual": "admin"}


class PostLNTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "post_ln", "decoder_residual": "post_ln"}


class PreLNTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "pre_ln", "decoder_residual": "pre_ln"}


class PostLNPreLNTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "post_ln", "decoder_residual": "pre_ln"}


class ReZeroTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "rezero", "decoder_residual": "rezero"}


class ReZeroPostLNTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "rezero_post_ln", "decoder_residual": "rezero_post_ln"}


class FixUpTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "fixup", "decoder_residual": "fixup"}


class LookLinearTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "looklinear", "decoder_residual": "looklinear"}


class DeepNormTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "deepnorm", "decoder_residual": "deepnorm"}


class AdminUniformTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "admin_uniform", "decoder_residual": "admin_uniform"}


class B2TTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "b2t", "decoder_residual": "b2t"}


class KeelTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "keel", "decoder_residual": "keel"}


class LayerScaleTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "layer_scale", "decoder_residual": "layer_scale"}


class GPASTest(CommonTests, unittest.TestCase):
    residuals = {"encoder_residual": "gpas", "decoder_residual": "gpas"}
