"""Every published layout loads in one line, from local folders and files; the Hub is in test_hub."""

import json
import os
import pickle
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from golden import load_golden, load_golden_weights
from helpers import PROMPT, assert_same, run, upscale
from layouts import (
    all_bf16,
    dequantised,
    expected_model,
    fp8,
    outputs,
    write_external_repositories,
    write_file,
    write_repositories,
    write_shards,
    write_turbo_vae,
)
from safetensors.torch import save_file
from transformers import T5GemmaEncoderModel

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
    loading,
)
from diffusers_magihuman.loading import (
    convert_turbo_vae_state_dict,
    fetch,
    load_original_components,
    load_original_transformer,
    load_original_turbo_vae,
    load_text_encoder,
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    write_repositories(root)
    write_external_repositories(root)
    return root


@pytest.fixture(scope="module")
def base_weights():
    return load_golden_weights("dit_base")


def is_exact(model, weights):
    """Whether a model holds what canonical weights are converted to without any file."""
    expected, actual = expected_model(weights).state_dict(), model.state_dict()
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def assert_kept_in_float32(model):
    for name, parameter in model.named_parameters():
        is_kept = any(part in name for part in ("embedder", "norm", "proj_out"))
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name


LAYOUTS = {
    ("GAIR/daVinci-MagiHuman", "base"): None,
    ("GAIR/daVinci-MagiHuman", "distill"): None,
    ("FastVideo/MagiHuman-Diffusers", "distill"): None,
    ("smthem/MagiHuman/distill-merger_bf16.safetensors", None): all_bf16,
    ("DeepBeepMeep/MagiHuman", "magi_human_distill_bf16.safetensors"): all_bf16,
    ("SanDiegoDude/daVinci-MagiHuman-FP8", "distill_fp8"): lambda weights: dequantised(fp8(weights)),
}


@pytest.mark.parametrize("path, subfolder", LAYOUTS)
def test_every_layout_gives_what_it_holds(path, subfolder, repositories, base_weights):
    """Equal to the same weights under canonical names, and near to the golden output if they are rounded."""
    info, golden = load_golden("dit_base")
    rounding = LAYOUTS[path, subfolder]
    model = load_original_transformer(repositories / path, subfolder, dtype=torch.float32)
    assert is_exact(model, rounding(base_weights) if rounding else base_weights)
    for output, name in zip(outputs(model, golden, info["text_len"]), ("video", "audio"), strict=True):
        expected = golden[f"fp32.out.{name}"]
        if rounding is None:
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
        else:
            error = (output - expected).square().mean() / expected.square().mean()
            assert error.sqrt() < (0.12 if "FP8" in path else 0.02)


@pytest.mark.parametrize(
    "path, subfolder",
    [
        ("GAIR/daVinci-MagiHuman", "distill"),
        ("SanDiegoDude/daVinci-MagiHuman-FP8", "distill_fp8"),
        ("DeepBeepMeep/MagiHuman", "magi_human_distill_bf16.safetensors"),
    ],
)
def test_fp32_stays_fp32(path, subfolder, repositories):
    model = load_original_transformer(repositories / path, subfolder)
    assert_kept_in_float32(model)
    assert model.dtype == torch.bfloat16 and not model.training


@pytest.mark.parametrize(
    "path, subfolder, variant",
    [
        ("GAIR/daVinci-MagiHuman", "1080p_sr", "sr_1080p"),
        ("FastVideo/MagiHuman-Diffusers", "sr_1080p", "sr_1080p"),
        ("smthem/MagiHuman", "540p_sr_merge_bf16.safetensors", "sr_540p"),
    ],
)
def test_super_resolution_variants(path, subfolder, variant, repositories):
    model = load_original_transformer(repositories / path, subfolder, variant, dtype=torch.float32)
    assert model.config.num_layers == 4  # of FastVideo's two transformers the second
    assert model.config.coordinate_style == "v1" and model.config.local_attention_frames == 11
    assert model.config.local_attention_layers == ((0, 1, 2) if variant == "sr_1080p" else ())
    weights = load_golden_weights("dit_sr")
    assert is_exact(model, all_bf16(weights) if "smthem" in path else weights)


@pytest.mark.parametrize(
    "file",
    ["smthem/MagiHuman/distill-merger_bf16.safetensors", "DeepBeepMeep/MagiHuman/magi_human_distill_bf16.safetensors"],
)
def test_from_single_file(file, repositories):
    expected = load_original_transformer(repositories / file).state_dict()
    model = MagiHumanTransformer3DModel.from_single_file(str(repositories / file))
    assert not model.training and model.config.coordinate_style == "v2"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == expected[name].dtype and torch.equal(parameter, expected[name]), name
    in_fp32 = MagiHumanTransformer3DModel.from_single_file(
        str(repositories / file), variant="sr_540p", dtype=torch.float32
    )
    assert in_fp32.dtype == torch.float32 and in_fp32.config.coordinate_style == "v1"


def test_from_single_file_with_scaled_float8(base_weights, tmp_path):
    write_file(fp8(base_weights), tmp_path / "distill_fp8.safetensors")
    model = MagiHumanTransformer3DModel.from_single_file(
        str(tmp_path / "distill_fp8.safetensors"), dtype=torch.float32
    )
    assert is_exact(model, dequantised(fp8(base_weights)))


def test_from_single_file_with_our_names(base_weights, tmp_path):
    model = expected_model(base_weights)
    model.save_pretrained(tmp_path / "transformer")
    file = str(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded = MagiHumanTransformer3DModel.from_single_file(file, config=str(tmp_path), subfolder="transformer")
    assert_kept_in_float32(loaded)
    with pytest.raises(ValueError, match="variant"):
        MagiHumanTransformer3DModel.from_single_file(file)


def make_wrong(kind, weights, folder):
    """A base checkpoint in three shards with one thing wrong."""
    weights = dict(weights)
    if kind == "shape":
        weights["final_norm_audio.weight"] = torch.zeros(63)
    write_shards(weights, folder, "model")
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00002-of-00003.safetensors"
    content = json.loads(index.read_text())
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
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
        ("truncated", OSError, "model-00002-of-00003.safetensors' is missing, damaged"),
        ("missing shard", OSError, "model-00002-of-00003.safetensors' is missing.*No such file"),
        ("absent tensor", OSError, r"lacks what its index says it holds: .*block.layers.99.mlp.pre_norm.weight"),
        ("climbs out", ValueError, "names the files .*secret.safetensors"),
        ("absolute", ValueError, "names the files .*secret.safetensors"),
        ("no index", OSError, "model.safetensors.index.json' is no index of safetensors files"),
        ("shape", ValueError, r"final_norm_audio.weight \(63,\) instead of \(64,\)"),
    ],
)
def test_wrong_files_raise(kind, error, message, base_weights, tmp_path):
    make_wrong(kind, base_weights, tmp_path / "base")
    with pytest.raises(error, match=message):
        load_original_transformer(tmp_path / "base")


def test_nothing_to_open_raises(tmp_path, base_weights):
    (tmp_path / "base").mkdir()
    with pytest.raises(OSError, match=r"has no safetensors in \['base'\]"):
        load_original_transformer(tmp_path / "base")
    for name in ("one", "two"):
        save_file({"x": torch.zeros(1)}, tmp_path / "base" / f"{name}.safetensors")
    with pytest.raises(OSError, match="must hold an index or one"):
        load_original_transformer(tmp_path / "base")
    with pytest.raises(OSError, match=r"'./missing' is neither a path that exists nor a repository"):
        load_original_transformer("./missing", variant="base")
    with pytest.raises(OSError, match=r"has no safetensors in \['nowhere'\]"):
        load_original_transformer(tmp_path, subfolder="nowhere", variant="base")
    write_shards(base_weights, tmp_path / "x", "model")
    with pytest.raises(ValueError, match="`variant`='large' must be one of"):
        load_original_transformer(tmp_path / "x", variant="large")


def local_sources(root):
    return {
        "path_or_repo": root / "GAIR" / "daVinci-MagiHuman",
        "text_encoder": root / "google" / "t5gemma-9b-9b-ul2",
        "audio_vae": root / "stabilityai" / "stable-audio-open-1.0",
        "video_vae": root / "Wan-AI" / "Wan2.2-TI2V-5B-Diffusers",
    }


@pytest.mark.parametrize("prefix", ["module.decoder.", "module.", "decoder.", ""])
@torch.no_grad()
def test_turbo_vae_from_the_published_pickle(prefix, tmp_path):
    info, golden = load_golden("turbo_vae")
    weights, config = load_golden_weights("turbo_vae"), info["turbo_vaed_config"]
    write_turbo_vae(weights, config, tmp_path / "turbo_vae", prefix)
    expected = AutoencoderKLMagiHumanTurbo.from_config(config)
    expected.load_state_dict(convert_turbo_vae_state_dict(weights, config))
    for path, subfolder in ((tmp_path, "turbo_vae"), (tmp_path / "turbo_vae" / "checkpoint-340000.ckpt", None)):
        vae = load_original_turbo_vae(path, subfolder)
        assert vae.encoder is None and not vae.training
        assert torch.equal(vae.decode(golden["in.latent_f4"]).sample, expected.decode(golden["in.latent_f4"]).sample)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch should-not-exist",)


def test_pickle_that_runs_code_raises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"ema_state_dict": RunsCode()}))
    torch.save({"ema_state_dict": RunsCode()}, tmp_path / "evil_zip.ckpt")
    for name in ("evil.ckpt", "evil_zip.ckpt"):
        with pytest.raises(OSError, match=f"{name}' is damaged, or holds more than plain tensors"):
            load_original_turbo_vae(tmp_path / name)
    assert not (tmp_path / "should-not-exist").exists()


@torch.no_grad()
def test_turbo_vae_takes_the_encoder_of_wan(repositories):
    sources = local_sources(repositories)
    vae = load_original_turbo_vae(sources["path_or_repo"], "turbo_vae", encoder=sources["video_vae"])

    wan = AutoencoderKLWan.from_pretrained(sources["video_vae"], subfolder="vae")
    video = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(vae.encode(video).latent_dist.mode(), wan.encode(video).latent_dist.mode())
    assert list(vae.config.latents_mean) == list(wan.config.latents_mean)


@torch.no_grad()
def test_text_encoder_is_the_encoder_of_the_whole_model(repositories):
    path = local_sources(repositories)["text_encoder"]
    tokenizer, encoder = load_text_encoder(path, torch.float32)
    input_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    (path / "model-00002-of-00002.safetensors").rename(path / "hidden")  # the decoder is never opened
    _, again = load_text_encoder(path, torch.float32)
    (path / "hidden").rename(path / "model-00002-of-00002.safetensors")

    whole = T5GemmaEncoderModel.from_pretrained(path, is_encoder_decoder=False)
    expected = whole(input_ids=input_ids).last_hidden_state
    for model in (encoder, again):
        assert not model.training and torch.equal(model(input_ids=input_ids).last_hidden_state, expected)


def test_text_encoder_with_a_missing_tensor_raises(repositories, tmp_path):
    path = tmp_path / "t5gemma"
    shutil.copytree(local_sources(repositories)["text_encoder"], path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.encoder.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"missing: model\.encoder\.norm\.weight"):
        load_text_encoder(path)


def test_damaged_turbo_vae_config_is_named(tmp_path):
    info, _ = load_golden("turbo_vae")
    write_turbo_vae(load_golden_weights("turbo_vae"), info["turbo_vaed_config"], tmp_path / "turbo_vae")
    (tmp_path / "turbo_vae" / "config.json").write_text("")
    with pytest.raises(OSError, match=r"config\.json' is damaged"):
        load_original_turbo_vae(tmp_path / "turbo_vae")


@pytest.mark.parametrize("turbo", [True, False])
@pytest.mark.parametrize("variant", ["base", "distill"])
def test_from_original_with_local_directories(variant, turbo, repositories):
    sources = local_sources(repositories)
    pipe = MagiHumanAudioVideoPipeline.from_original(
        variant=variant, dtype=torch.float32, turbo_vae=sources["path_or_repo"] if turbo else None, **sources
    )
    assert pipe.config.is_distilled == (variant == "distill")
    assert pipe.scheduler.config.sampler == ("renoise" if variant == "distill" else "unipc")
    assert type(pipe.vae).__name__ == ("AutoencoderKLMagiHumanTurbo" if turbo else "AutoencoderKLWan")
    output = run(pipe, output_type="np")
    assert output.frames.shape == (1, 9, 64, 64, 3)


def test_revision_is_that_of_the_transformer_alone(repositories, monkeypatch):
    revisions = {}

    def record(source, patterns, **hub_kwargs):
        revisions.setdefault(source, set()).add(hub_kwargs.get("revision"))
        return fetch(source, patterns, **hub_kwargs)

    monkeypatch.setattr(loading, "fetch", record)
    sources = local_sources(repositories)
    sources["turbo_vae"] = sources.pop("path_or_repo")
    transformer = sources["turbo_vae"] / "distill"
    load_original_components(transformer, "distill", revision="v1", **sources)
    assert revisions == {transformer: {"v1"}} | {source: {None} for source in sources.values()}


def test_from_original_in_bf16_keeps_fp32_parts(repositories, tmp_path):
    sources = local_sources(repositories)
    pipe = MagiHumanAudioVideoPipeline.from_original(variant="distill", turbo_vae=sources["path_or_repo"], **sources)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.text_embedder.weight.dtype == pipe.audio_vae.dtype == torch.float32
    pipe.save_pretrained(tmp_path)
    dtype = {"default": torch.bfloat16, "audio_vae": torch.float32}
    assert_same(run(MagiHumanAudioVideoPipeline.from_pretrained(tmp_path, dtype=dtype)), run(pipe))


@pytest.mark.parametrize("turbo", [True, False])
@pytest.mark.parametrize("variant, size", [("sr_540p", (512, 896)), ("sr_1080p", (1088, 1920))])
def test_upscale_from_original_with_local_directories(variant, size, turbo, repositories):
    sources = local_sources(repositories)
    pipe = MagiHumanLatentUpscalePipeline.from_original(
        variant=variant, dtype=torch.float32, turbo_vae=sources["path_or_repo"] if turbo else None, **sources
    )
    assert (pipe.config.default_height, pipe.config.default_width) == size
    assert pipe.transformer.config.coordinate_style == "v1"
    assert bool(pipe.transformer.config.local_attention_layers) == (variant == "sr_1080p")
    assert pipe.scheduler.config.sampler == "unipc"
    assert type(pipe.vae).__name__ == ("AutoencoderKLMagiHumanTurbo" if turbo else "AutoencoderKLWan")
    low = {"latents": torch.randn(1, 4, 3, 2, 4), "audio_latents": torch.randn(1, 9, 8)}
    output = upscale(pipe, **low, output_type="np")
    assert output.frames.shape == (1, 9, 64, 96, 3) and output.audio.shape[:2] == (1, 2)


def test_from_original_refuses_the_other_pipelines_variants(repositories):
    source = repositories / "GAIR" / "daVinci-MagiHuman"
    with pytest.raises(ValueError, match="`variant`='sr_540p' must be"):
        MagiHumanAudioVideoPipeline.from_original(source, subfolder="540p_sr")
    with pytest.raises(ValueError, match="`variant`='distill' must be"):
        MagiHumanLatentUpscalePipeline.from_original(source, subfolder="distill")
