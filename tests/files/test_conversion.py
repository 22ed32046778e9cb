"""The table from the original's names to ours: complete, exact, strict."""

import json

import pytest
import torch
from golden import DATA, load_golden_weights
from helpers import make_tiny_model
from layouts import fp8, split

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.conversion import (
    FP8_SCALE,
    checked_rules,
    convert_tensors,
    convert_transformer_state_dict,
    find_feed_forward_multiple,
    guess_variant,
    transformer_config_from_state_dict,
    transformer_rules,
    variant_config,
)


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


def is_kept(name):
    return any(part in MagiHumanTransformer3DModel._keep_in_fp32_modules for part in name.split("."))


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
    for name, tensor in converted.items():
        assert tensor.dtype == (torch.float32 if is_kept(name) else torch.bfloat16), name


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"gated_attention": False, "post_norm_layers": (0, 1), "modality_layers": (1,), "gelu_layers": ()}]
)
def test_table_has_exactly_the_models_names_shapes_and_float32_parts(config, is_split):
    model = make_tiny_model(**config)
    rules = transformer_rules(model.config, is_split)
    targets = {name: shape for rule in rules.values() for name, shape in rule.targets.items()}
    assert targets == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert all(rule.is_float32 == is_kept(name) for rule in rules.values() for name in rule.targets)


def test_split_names_are_those_of_the_split_layout():
    weights = load_golden_weights("dit_base")
    config = transformer_config_from_state_dict(weights)
    assert transformer_config_from_state_dict(split(weights)) == config
    names = transformer_rules(config, is_split=True).keys()
    assert names == split(weights).keys() - {"adapter.rope.bands"}
    assert "block.layers.0.mlp.up_gate_proj_audio.weight" in names
    assert "block.layers.2.attention.linear_g.weight" in names


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
        "feed_forward_multiple": 1,
        "gated_attention": case != "dit_postnorm",
        **expected,
    }


def test_feed_forward_multiple_is_read_off_the_shapes():
    """The published size is padded to 128; sizes that were padded are kept, whatever 128 would cost."""
    assert transformer_config_from_state_dict(full_size_state_dict("dit"))["feed_forward_multiple"] == 128
    sizes = {(64, 168): 1, (48, 128): 128, (64, 256): 128, (64, 192): 32, (64, 170): 5, (64, 160): 1}
    sizes |= {(5120, 13652): 128, (5120, 13696): 128, (5120, 13824): 256}
    for (hidden_size, inner_size), multiple in sizes.items():
        assert find_feed_forward_multiple(hidden_size, [(False, inner_size)]) == multiple, inner_size
    assert find_feed_forward_multiple(48, [(False, 128), (True, 192)]) == 1  # 256 for the second is too much
    assert find_feed_forward_multiple(48, [(False, 128), (True, 256)]) == 128


PADDED_LAYOUTS = {"canonical": lambda weights: weights, "split": split, "float8": fp8, "ours": convert}


@pytest.mark.parametrize("multiple", [100, 128])
@pytest.mark.parametrize("layout", PADDED_LAYOUTS)
def test_padding_adds_zero_channels_and_nothing_else(layout, multiple, weights):
    source = PADDED_LAYOUTS[layout](weights)
    config = transformer_config_from_state_dict(weights)
    unpadded, padded = (
        convert_transformer_state_dict(source, config | {"feed_forward_multiple": each}) for each in (1, multiple)
    )
    assert padded.keys() == unpadded.keys()
    for name, tensor in unpadded.items():
        is_gelu, found = name.startswith(("transformer_blocks.0.", "transformer_blocks.1.")), padded[name]
        size = 256 if is_gelu else 168
        if "linear_in" in name:
            found = found.unflatten(0, (1 if is_gelu else 2, -1))
            assert found.shape[1] == -(-size // multiple) * multiple and not found[:, size:].any()
            found = found[:, :size].flatten(0, 1)
        elif "linear_out" in name:
            assert found.shape[1] == -(-size // multiple) * multiple and not found[:, size:].any()
            found = found[:, :size]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
    config["feed_forward_multiple"] = multiple
    again = convert_transformer_state_dict(padded, config)  # is padded already
    assert all(torch.equal(again[name], tensor) for name, tensor in padded.items())
    with pytest.raises(ValueError, match=r"another shape: .*linear_out"):
        convert_transformer_state_dict(padded, config | {"feed_forward_multiple": 112})


def test_conversion_splits_and_shifts_exactly(weights):
    converted = convert(weights)
    experts = weights["block.layers.0.attention.linear_qkv.weight"].chunk(3)
    for expert, name in zip(experts, ("video", "audio", "text"), strict=True):
        parts = [converted[f"transformer_blocks.0.attn.{name}.to_{part}.weight"] for part in ("q", "k", "v", "gate")]
        assert [len(part) for part in parts] == [64, 32, 32, 4]
        assert torch.equal(torch.cat(parts), expert)
    up = converted["transformer_blocks.2.ff.linear_in.weight"]
    stored = weights["block.layers.2.mlp.up_gate_proj.weight"]
    assert torch.equal(up[:168], stored[::2]) and torch.equal(up[168:], stored[1::2])
    gelu = converted["transformer_blocks.0.ff.video.linear_in.weight"]
    assert torch.equal(gelu, weights["block.layers.0.mlp.up_gate_proj.weight"][:256])
    norm = weights["block.layers.0.attention.q_norm.weight"]
    assert torch.equal(converted["transformer_blocks.0.attn.text.norm_q.weight"], norm[32:] + 1)


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cast_of_all_tensors_rounds_the_rotary_frequencies(dtype, weights):
    config = transformer_config_from_state_dict(weights)
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    converted = convert_transformer_state_dict(cast, config)
    assert torch.equal(converted["video_embedder.weight"], cast["adapter.video_embedder.weight"].float())
    with pytest.raises(ValueError, match="rope_theta"):
        convert_transformer_state_dict(cast, config | {"rope_theta": 500.0})


def test_foreign_state_dict_raises():
    with pytest.raises(
        ValueError,
        match=r"not a MagiHuman transformer with the original's names, it lacks adapter.video_embedder.weight, ",
    ):
        transformer_config_from_state_dict({"model.diffusion_model.x": torch.zeros(1)})


def test_scaled_float8_is_multiplied_out(weights):
    config = transformer_config_from_state_dict(weights)
    source, rules = fp8(weights), transformer_rules(config)
    converted = dict(convert_tensors(source, rules, torch.float32))
    name = "block.layers.0.mlp.down_proj.weight"
    expected = source[name].float() * source[name + FP8_SCALE]
    assert torch.equal(torch.cat([converted[target] for target in rules[name].targets]), expected)
    with pytest.raises(ValueError, match="must have a"):
        dict(
            convert_tensors(
                {key: value for key, value in source.items() if key != name + FP8_SCALE}, rules, torch.float32
            )
        )
    for tensor, scale in ((weights[name].bfloat16(), source[name + FP8_SCALE]), (source[name], torch.zeros(1))):
        converted = dict(convert_tensors(source | {name: tensor, name + FP8_SCALE: scale}, rules, torch.float32))
        assert torch.equal(torch.cat([converted[target] for target in rules[name].targets]), tensor.float() * scale)
    for scale in (torch.tensor(torch.nan), torch.tensor(-1.0), torch.ones(2)):
        with pytest.raises(ValueError, match=r"down_proj\.weight\.__fp8_scale' is"):
            dict(convert_tensors(source | {name + FP8_SCALE: scale}, rules, torch.float32))
    with pytest.raises(ValueError, match="unknown: nothing"):
        checked_rules(source | {"nothing" + FP8_SCALE: torch.ones(1)}, config)


def test_local_layers_of_super_resolution():
    layers = set(range(40)) - set(variant_config("sr-1080p", 40)["local_attention_layers"])
    assert layers == {3, 7, 11, 15, 19, 23, 27, 31}
    assert variant_config("sr-540p", 40) == {"coordinate_style": "v1", "local_attention_layers": ()}
    assert variant_config("distilled", 40) == {"coordinate_style": "v2", "local_attention_layers": ()}


@pytest.mark.parametrize(
    "path, subfolder, variant",
    [
        ("GAIR/daVinci-MagiHuman", "distill", "distilled"),
        ("GAIR/daVinci-MagiHuman", "base", "base"),
        ("FastVideo/MagiHuman-Diffusers", "sr_1080p", "sr-1080p"),
        ("models/magi_human_sr1080_bf16.safetensors", None, "sr-1080p"),
        ("models/distill/transformer/model.safetensors", None, "distilled"),
        ("x/540p_sr_fp8", None, "sr-540p"),
        ("models/distill/540p_sr.safetensors", None, "sr-540p"),  # the last part that names one
        ("models/distill", "base", "base"),
    ],
)
def test_variant_is_guessed(path, subfolder, variant):
    assert guess_variant(path, subfolder) == variant


@pytest.mark.parametrize(
    "path", ["magi_human_bf16.safetensors", "SII-GAIR/daVinci-MagiHuman-Base-1080p", "database/x"]
)
def test_variant_is_not_guessed_when_ambiguous(path):
    with pytest.raises(ValueError, match="pass `variant=`"):
        guess_variant(path, None)
