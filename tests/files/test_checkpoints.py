import json

import pytest
import torch
from golden import DATA, load_golden_weights

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.checkpoints import convert_transformer_state_dict, transformer_config_from_state_dict


def full_size_state_dict(part):
    """The published tensors, on the meta device."""
    arch = json.loads((DATA / "full_arch.json").read_text())[part]
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in arch["state_dict"].items()
    }


@pytest.fixture
def weights():
    return load_golden_weights("dit_base")


def convert(weights):
    return convert_transformer_state_dict(weights, transformer_config_from_state_dict(weights))


def test_full_size_transformer_maps_to_exactly_our_parameters():
    weights = full_size_state_dict("dit")
    assert len(weights) == 331
    config = transformer_config_from_state_dict(weights)
    with torch.device("meta"):
        model, default = MagiHumanTransformer3DModel(**config), MagiHumanTransformer3DModel()
    ignored = ("_use_default_values",)
    assert {k: v for k, v in model.config.items() if k not in ignored} == {
        k: v for k, v in default.config.items() if k not in ignored
    }
    converted = convert_transformer_state_dict(weights, config)
    ours = model.state_dict()
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        n: tensor.shape for n, tensor in ours.items()
    }
    keep = MagiHumanTransformer3DModel._keep_in_fp32_modules
    for name, tensor in converted.items():
        is_kept = any(part in keep for part in name.split("."))
        assert tensor.dtype == (torch.float32 if is_kept else torch.bfloat16), name


@pytest.mark.parametrize(
    "case, expected",
    [
        ("dit_base", {"modality_layers": (0, 1, 4, 5), "gelu_layers": (0, 1), "post_norm_layers": ()}),
        ("dit_postnorm", {"modality_layers": (0,), "gelu_layers": (0,), "post_norm_layers": (0, 1, 2)}),
    ],
)
def test_config_is_read_off_the_shapes(case, expected):
    config = transformer_config_from_state_dict(load_golden_weights(case))
    assert config == {
        "patch_size": (1, 2, 2),
        "in_channels": 4,
        "audio_in_channels": 8,
        "text_in_channels": 24,
        "num_layers": 3 if case == "dit_postnorm" else 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 16,
        "gated_attention": case != "dit_postnorm",
        **expected,
    }


def test_conversion_splits_and_shifts_exactly(weights):
    converted = convert(weights)
    experts = weights["block.layers.0.attention.linear_qkv.weight"].chunk(3)
    for expert, name in zip(experts, ("video", "audio", "text"), strict=True):
        parts = [converted[f"transformer_blocks.0.attn.to_{part}.{name}.weight"] for part in ("q", "k", "v", "gate")]
        assert [len(part) for part in parts] == [64, 32, 32, 4]
        assert torch.equal(torch.cat(parts), expert)
    up = converted["transformer_blocks.2.ff.linear_in.weight"]
    stored = weights["block.layers.2.mlp.up_gate_proj.weight"]
    assert torch.equal(up[:168], stored[::2]) and torch.equal(up[168:], stored[1::2])
    gelu = converted["transformer_blocks.0.ff.linear_in.video.weight"]
    assert torch.equal(gelu, weights["block.layers.0.mlp.up_gate_proj.weight"][:256])
    norm = weights["block.layers.0.attention.q_norm.weight"]
    assert torch.equal(converted["transformer_blocks.0.attn.norm_q.text.weight"], norm[32:] + 1)


def test_norms_are_shifted_in_float32(weights):
    name = "final_norm_video.weight"
    weights[name] = torch.full_like(weights[name], 2**-9).bfloat16()  # lost if added to 1 in bfloat16
    assert torch.equal(convert(weights)["video_norm_out.weight"], weights[name].float() + 1)
    assert convert(weights)["video_norm_out.weight"][0] > 1


def test_conversion_is_strict(weights):
    config = transformer_config_from_state_dict(weights)
    wrong = dict(weights)
    del wrong["final_norm_video.weight"], wrong["block.layers.3.attention.q_norm.weight"]
    wrong["block.layers.9.extra"] = torch.zeros(1)
    wrong["adapter.audio_embedder.bias"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        convert_transformer_state_dict(wrong, config)
    message = str(error.value)
    assert "missing: block.layers.3.attention.q_norm.weight, final_norm_video.weight" in message
    assert "unknown: block.layers.9.extra" in message
    assert "of another shape: adapter.audio_embedder.bias (7,) instead of (64,)" in message


def test_other_rotary_frequencies_raise(weights):
    config = transformer_config_from_state_dict(weights) | {"rope_theta": 500.0}
    with pytest.raises(ValueError, match=r"'adapter.rope.bands' holds .* but `rope_theta`=500.0 gives"):
        convert_transformer_state_dict(weights, config)


def test_foreign_state_dict_raises():
    with pytest.raises(
        ValueError,
        match=r"not a MagiHuman transformer with the original's names, it lacks \['adapter.video_embedder.weight'",
    ):
        transformer_config_from_state_dict({"model.diffusion_model.x": torch.zeros(1)})
