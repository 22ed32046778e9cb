"""Every published layout loads in one line, from local folders and files; the Hub is in test_original_repositories."""

import json

import pytest
import torch
from golden import load_golden, load_golden_weights
from layouts import (
    all_bf16,
    dequantised,
    expected_model,
    fp8,
    is_linear,
    mixed,
    outputs,
    split,
    write_file,
    write_repositories,
    write_shards,
)
from safetensors.torch import save_file

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.checkpoints import (
    guess_variant,
    load_original_transformer,
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    write_repositories(root)
    return root


@pytest.fixture(scope="module")
def base_weights():
    return load_golden_weights("dit_base")


LOSSLESS = [
    ("GAIR/daVinci-MagiHuman", "base"),
    ("GAIR/daVinci-MagiHuman", "distill"),
    ("FastVideo/MagiHuman-Diffusers", "distill"),
]


@pytest.mark.parametrize("repo, subfolder", LOSSLESS)
def test_lossless_layouts_give_the_golden_output(repo, subfolder, repositories):
    info, golden = load_golden("dit_base")
    model = load_original_transformer(repositories / repo, subfolder=subfolder, dtype=torch.float32)
    for output, name in zip(outputs(model, golden, info["text_len"]), ("video", "audio"), strict=True):
        torch.testing.assert_close(output, golden[f"fp32.out.{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "path, layout",
    [
        ("smthem/MagiHuman/distill-merger_bf16.safetensors", all_bf16),
        ("DeepBeepMeep/MagiHuman/magi_human_distill_bf16.safetensors", all_bf16),
        ("SanDiegoDude/daVinci-MagiHuman-FP8/distill_fp8", lambda weights: dequantised(fp8(weights))),
    ],
)
def test_rounded_layouts_give_the_output_of_what_they_hold(path, layout, repositories, base_weights):
    """Equal to the same rounded weights under canonical names, and near to the golden output."""
    info, golden = load_golden("dit_base")
    model = load_original_transformer(repositories / path, dtype=torch.float32)
    actual = outputs(model, golden, info["text_len"])
    expected = outputs(expected_model(layout(base_weights)), golden, info["text_len"])
    for output, same, name in zip(actual, expected, ("video", "audio"), strict=True):
        assert torch.equal(output, same)
        error = (output - golden[f"fp32.out.{name}"]).square().mean().sqrt()
        assert error < (0.12 if "fp8" in path else 0.02) * golden[f"fp32.out.{name}"].square().mean().sqrt()


@pytest.mark.parametrize(
    "path, subfolder",
    [
        ("GAIR/daVinci-MagiHuman", "distill"),
        ("FastVideo/MagiHuman-Diffusers", "base"),
        ("SanDiegoDude/daVinci-MagiHuman-FP8", "distill_fp8"),
        ("DeepBeepMeep/MagiHuman", "magi_human_distill_bf16.safetensors"),
        ("smthem/MagiHuman", "540p_sr_merge_bf16.safetensors"),
    ],
)
def test_fp32_stays_fp32_in_every_layout(path, subfolder, repositories):
    model = load_original_transformer(repositories / path, subfolder)
    for name, parameter in model.named_parameters():
        is_kept = any(part in name for part in ("embedder", "norm", "proj_out"))
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name
    assert model.dtype == torch.bfloat16 and not model.training


@pytest.mark.parametrize(
    "path, subfolder, variant",
    [
        ("GAIR/daVinci-MagiHuman", "1080p_sr", "sr_1080p"),
        ("GAIR/daVinci-MagiHuman", "540p_sr", "sr_540p"),
        ("FastVideo/MagiHuman-Diffusers", "sr_1080p", "sr_1080p"),
        ("DeepBeepMeep/MagiHuman", "magi_human_sr1080_bf16.safetensors", "sr_1080p"),
        ("smthem/MagiHuman", "540p_sr_merge_bf16.safetensors", "sr_540p"),
    ],
)
def test_super_resolution_variants(path, subfolder, variant, repositories):
    model = load_original_transformer(repositories / path, subfolder, variant, dtype=torch.float32)
    assert model.config.num_layers == 4  # of FastVideo's two transformers the second
    assert model.config.coordinate_style == "v1" and model.config.local_attention_frames == 11
    assert model.config.local_attention_layers == ((0, 1, 2) if variant == "sr_1080p" else ())
    expected = expected_model(
        load_golden_weights("dit_sr")
        if "MagiHuman-Diffusers" in path or "GAIR" in path
        else all_bf16(load_golden_weights("dit_sr"))
    )
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_full_size_local_layers():
    from diffusers_magihuman.checkpoints import variant_config

    layers = variant_config("sr_1080p", 40)["local_attention_layers"]
    assert layers == (
        0,
        1,
        2,
        4,
        5,
        6,
        8,
        9,
        10,
        12,
        13,
        14,
        16,
        17,
        18,
        20,
        21,
        22,
        24,
        25,
        26,
        28,
        29,
        30,
        *range(32, 40),
    )
    assert variant_config("distill", 40) == {"coordinate_style": "v2", "local_attention_layers": ()}


@pytest.mark.parametrize(
    "file",
    ["smthem/MagiHuman/distill-merger_bf16.safetensors", "DeepBeepMeep/MagiHuman/magi_human_distill_bf16.safetensors"],
)
def test_from_single_file(file, repositories):
    expected = load_original_transformer(repositories / file)
    model = MagiHumanTransformer3DModel.from_single_file(str(repositories / file))
    assert not model.training and model.config.coordinate_style == "v2"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == expected.state_dict()[name].dtype, name
        assert torch.equal(parameter, expected.state_dict()[name]), name
    in_fp32 = MagiHumanTransformer3DModel.from_single_file(
        str(repositories / file), variant="sr_540p", dtype=torch.float32
    )
    assert in_fp32.dtype == torch.float32 and in_fp32.config.coordinate_style == "v1"


def test_from_single_file_with_scaled_float8(base_weights, tmp_path):
    write_file(fp8(base_weights), tmp_path / "distill_fp8.safetensors")
    model = MagiHumanTransformer3DModel.from_single_file(
        str(tmp_path / "distill_fp8.safetensors"), dtype=torch.float32
    )
    expected = expected_model(dequantised(fp8(base_weights)))
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "path, subfolder, variant",
    [
        ("GAIR/daVinci-MagiHuman", "distill", "distill"),
        ("GAIR/daVinci-MagiHuman", "base", "base"),
        ("GAIR/daVinci-MagiHuman", "540p_sr", "sr_540p"),
        ("FastVideo/MagiHuman-Diffusers", "sr_1080p", "sr_1080p"),
        ("models/magi_human_sr1080_bf16.safetensors", None, "sr_1080p"),
        ("models/distill-merger_bf16.safetensors", None, "distill"),
        ("models/distill/transformer/model.safetensors", None, "distill"),
        ("x/540p_sr_fp8", None, "sr_540p"),
    ],
)
def test_variant_is_guessed(path, subfolder, variant):
    assert guess_variant(path, subfolder) == variant


@pytest.mark.parametrize(
    "path", ["models/magi_human_bf16.safetensors", "SII-GAIR/daVinci-MagiHuman-Base-1080p", "database/x"]
)
def test_variant_is_not_guessed_when_ambiguous(path):
    with pytest.raises(ValueError, match=r"does not tell the variant; pass `variant=`, one of \('base', 'distill'"):
        guess_variant(path, None)


def make_wrong(kind, weights, folder):
    """A base checkpoint in three shards with one thing wrong."""
    weights = dict(weights)
    if kind == "shape":
        weights["final_norm_audio.weight"] = torch.zeros(63)
    if kind == "fp8 scale":
        weights = fp8(weights)
        weights["block.layers.0.mlp.down_proj.weight.__fp8_scale"] = torch.tensor(torch.nan)
    if kind == "no fp8 scale":
        weights = fp8(weights)
        del weights["block.layers.0.mlp.down_proj.weight.__fp8_scale"]
    write_shards(weights, folder, "model")
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00002-of-00003.safetensors"
    content = json.loads(index.read_text())
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    if kind == "garbage":
        shard.write_bytes(b"not a safetensors file at all")
    if kind == "missing shard":
        shard.unlink()
    if kind == "absent tensor":
        content["weight_map"]["block.layers.99.mlp.pre_norm.weight"] = shard.name
    if kind == "climbs out":
        save_file({"x": torch.zeros(1)}, folder.parent / "secret.safetensors")
        content["weight_map"]["final_norm_audio.weight"] = "../secret.safetensors"
    if kind == "absolute":
        content["weight_map"]["final_norm_audio.weight"] = str(folder.parent / "secret.safetensors")
    index.write_text("[]" if kind == "no index" else json.dumps(content))


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("truncated", OSError, "model-00002-of-00003.safetensors' is damaged or no safetensors file"),
        ("garbage", OSError, "model-00002-of-00003.safetensors' is damaged or no safetensors file"),
        ("missing shard", OSError, "model-00002-of-00003.safetensors' is missing"),
        ("absent tensor", OSError, r"lacks the tensors \['block.layers.99.mlp.pre_norm.weight'\]"),
        ("climbs out", ValueError, r"names the file '../secret.safetensors', allowed are files of its own directory"),
        ("absolute", ValueError, "allowed are files of its own directory"),
        ("no index", OSError, "model.safetensors.index.json' is no index of safetensors files"),
        ("shape", ValueError, r"final_norm_audio.weight \(63,\) instead of \(64,\)"),
        (
            "fp8 scale",
            ValueError,
            r"'block.layers.0.mlp.down_proj.weight.__fp8_scale' is nan, it must be one positive",
        ),
        (
            "no fp8 scale",
            ValueError,
            r"without scale: \['block.layers.0.mlp.down_proj.weight'\]; scales without: \[\]",
        ),
    ],
)
def test_wrong_files_raise(kind, error, message, base_weights, tmp_path):
    make_wrong(kind, base_weights, tmp_path / "base")
    with pytest.raises(error, match=message):
        load_original_transformer(tmp_path / "base")


def test_nothing_to_open_raises(tmp_path, base_weights):
    (tmp_path / "base").mkdir()
    with pytest.raises(OSError, match=r"must hold one index or one .safetensors file, but holds \[\]"):
        load_original_transformer(tmp_path / "base")
    with pytest.raises(OSError, match=r"'./missing' is neither a path that exists nor a repository"):
        load_original_transformer("./missing", variant="base")
    with pytest.raises(OSError, match="has no 'nowhere'"):
        load_original_transformer(tmp_path, subfolder="nowhere", variant="base")
    write_shards(mixed(base_weights), tmp_path / "x", "model")
    with pytest.raises(ValueError, match="`variant`='large' must be one of"):
        load_original_transformer(tmp_path / "x", variant="large")


def test_split_names_cover_every_linear(base_weights):
    names = split(base_weights)
    assert not any(is_linear(name) and "qkv" in name for name in names)
    assert (
        "block.layers.0.mlp.up_gate_proj_audio.weight" in names and "block.layers.2.attention.linear_g.weight" in names
    )
