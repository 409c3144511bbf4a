"""What a new Post-LN or Pre-LN model starts from; what the other systems start from is in test_residual.py."""

import pytest
import torch
from torch import nn

from admin_hf import AdminConfig, AdminForConditionalGeneration


# The standard deviations of fairseq's initialisation: Xavier uniform has sqrt(2 / (fan_in + fan_out)) · gain
D, F, V = 128, 512, 3000
EXPECTED_STD = {
    "shared.weight": D**-0.5,
    "q_proj.weight": (2 / (D + D)) ** 0.5 / 2**0.5,
    "k_proj.weight": (2 / (D + D)) ** 0.5 / 2**0.5,
    "v_proj.weight": (2 / (D + D)) ** 0.5 / 2**0.5,
    "out_proj.weight": (2 / (D + D)) ** 0.5,
    "fc1.weight": (2 / (D + F)) ** 0.5,
    "fc2.weight": (2 / (D + F)) ** 0.5,
    "lm_head.weight": D**-0.5,
}


def check_initialisation(model: nn.Module) -> None:
    seen = set()
    for name, parameter in model.named_parameters():
        if "embed_positions" in name:
            assert not parameter.requires_grad and parameter[1:].any(dim=1).all()
        elif "layer_norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            suffix = ".".join(name.split(".")[-2:])
            std = EXPECTED_STD["shared.weight" if "embed_tokens" in suffix else suffix]
            values = parameter[:-1] if parameter.shape[0] == V else parameter
            assert abs(values.std() / std - 1) < 0.03, name
            assert abs(values.mean()) < 0.03 * std, name
            if parameter.shape[0] == V:
                assert not parameter[-1].any(), f"{name}: padding"
            else:  # uniform: nothing lies beyond √3 standard deviations
                assert values.abs().max() <= std * 3**0.5 * 1.0001, name
            seen.add(suffix)
    assert {"q_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"} <= seen


def fairseq_sized(**changes) -> AdminConfig:
    sizes = {"d_model": D, "encoder_ffn_dim": F, "decoder_ffn_dim": F, "vocab_size": V}
    return AdminConfig(**sizes, encoder_layers=2, decoder_layers=2, max_position_embeddings=32, **changes)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"share_encoder_decoder_embeddings": False}])
@pytest.mark.parametrize(
    ("encoder", "decoder"), [("admin", "admin"), ("post_ln", "post_ln"), ("pre_ln", "pre_ln"), ("post_ln", "pre_ln")]
)
def test_every_weight_has_fairseqs_standard_deviation(encoder, decoder, changes):
    torch.manual_seed(0)
    config = fairseq_sized(encoder_residual=encoder, decoder_residual=decoder, **changes)
    check_initialisation(AdminForConditionalGeneration(config))


def test_a_model_built_on_the_meta_device_is_initialised_alike():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AdminForConditionalGeneration(fairseq_sized())
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights()
    check_initialisation(model)
    assert model.lm_head.weight is model.model.shared.weight
    assert model.final_logits_bias[0, -1] == -1e4 and not model.final_logits_bias[0, :-1].any()
    positions = AdminForConditionalGeneration(fairseq_sized()).model.encoder.embed_positions.weight
    assert torch.equal(model.model.encoder.embed_positions.weight, positions)
