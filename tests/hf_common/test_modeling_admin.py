"""Hugging Face's common model tests on Admin, and on stock Marian as the reference.

Not collected where it lies: `tests/test_hf_common.py` copies it to `tests/models/admin/` of the library's own tests.
"""

import unittest

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


# By these tables of names the tests know which class takes labels; AutoModel.register does not fill them
MODEL_MAPPING_NAMES[AdminConfig.model_type] = AdminModel.__name__
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[AdminConfig.model_type] = AdminForConditionalGeneration.__name__

VOCAB_SIZE, PAD, EOS, START = 99, 1, 2, 3
BATCH_SIZE, LENGTH, WIDTH, LAYERS, HEADS = 13, 7, 16, 2, 4

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 100,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 0,
    "decoder_start_token_id": START,
}


class TinyModelTester:
    """What the mixin asks of a model tester: the sizes it expects in outputs, a tiny config, and inputs."""

    is_training = True
    batch_size = BATCH_SIZE
    seq_length = LENGTH
    hidden_size = WIDTH
    num_hidden_layers = LAYERS
    num_attention_heads = HEADS

    def __init__(self, config_class, **fields):
        self.config_class = config_class
        self.fields = SIZES | fields

    def prepare_config_and_inputs_for_common(self):
        return self.config_class(**self.fields), self.inputs()

    def inputs(self):
        # No padding inside a sentence, and every sentence ends in </s>
        ids = torch.randint(START, VOCAB_SIZE, (2, BATCH_SIZE, LENGTH))
        ids[0, :, -1] = EOS
        source, target = ids
        return {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "decoder_input_ids": target,
            "decoder_attention_mask": torch.ones_like(target),
        }


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    is_encoder_decoder = True
    test_missing_keys = False

    config_class = AdminConfig
    all_model_classes = (AdminModel, AdminForConditionalGeneration)
    residuals = {}
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = TinyModelTester(self.config_class, **self.residuals)

    def test_config(self):
        ConfigTester(self, config_class=self.config_class, **SIZES, **self.residuals).run_common_tests()


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
