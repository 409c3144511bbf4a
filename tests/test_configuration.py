import pytest
from conftest import tiny_config
from transformers import AutoConfig, AutoModelForSeq2SeqLM, MarianConfig

from admin_hf import AdminConfig, AdminForConditionalGeneration


def test_defaults_are_transformer_base_with_admin_in_marians_vocabulary_layout():
    config = AdminConfig(vocab_size=1000)
    sizes = (config.d_model, config.encoder_ffn_dim, config.encoder_attention_heads, config.encoder_layers)
    assert sizes == (512, 2048, 8, 6)
    assert (config.activation_function, config.scale_embedding) == ("relu", True)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.1)
    assert (config.encoder_residual, config.decoder_residual) == ("admin", "admin")
    assert (config.eos_token_id, config.pad_token_id, config.decoder_start_token_id) == (0, 999, 999)
    assert config.forced_eos_token_id is None


def test_special_tokens_that_are_given_are_kept():
    config = AdminConfig(vocab_size=1000, pad_token_id=1, decoder_start_token_id=2, eos_token_id=3)
    assert (config.pad_token_id, config.decoder_start_token_id, config.eos_token_id) == (1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_residual": "nosuch"}, "encoder_residual='nosuch'.*admin, post_ln, pre_ln"),
        ({"decoder_residual": "looklinear", "decoder_ffn_dim": 33}, "decoder_ffn_dim=33 must be even"),
        ({"decoder_residual": "Admin"}, "decoder_residual='Admin'"),
        ({"d_model": 30}, "d_model=30 must be divisible by encoder_attention_heads=8"),
        ({"encoder_layers": 0}, "encoder_layers=0"),
        ({"decoder_layers": -1}, "decoder_layers=-1"),
        ({"vocab_size": 0, "pad_token_id": 0}, "vocab_size=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"vocab_size": 10, "pad_token_id": 10}, "pad_token_id=10"),
    ],
)
def test_a_mistake_is_a_value_error_that_names_field_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        AdminConfig(**changes)


def test_auto_classes_know_admin(tmp_path):
    config = tiny_config(encoder_residual="pre_ln", label_smoothing=0.1)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, AdminConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert isinstance(AutoModelForSeq2SeqLM.from_config(loaded), AdminForConditionalGeneration)


def test_a_marian_config_keeps_marians_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "marian", "d_model": 64}')
    config = AdminConfig.from_pretrained(tmp_path)
    stock = MarianConfig(d_model=64)
    assert isinstance(config, AdminConfig)
    for name in ("activation_function", "scale_embedding", "encoder_layers", "pad_token_id", "attention_dropout"):
        assert getattr(config, name) == getattr(stock, name), name


def test_the_config_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="'t5' model"):
        AdminConfig.from_pretrained(tmp_path)
