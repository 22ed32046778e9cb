"""Pipelines put together from the original's repositories: the parts beside the transformer, and all at once."""

import json
import os
import pickle
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from golden import load_golden, load_golden_weights
from helpers import PROMPT, assert_same, run, upscale
from layouts import write_external_repositories, write_repositories, write_turbo_vae
from transformers import T5GemmaEncoderModel

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
)
from diffusers_magihuman.checkpoints import (
    convert_turbo_vae_state_dict,
    load_original_turbo_vae,
    load_text_encoder,
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    write_repositories(root)
    write_external_repositories(root)
    return root


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
    with pytest.raises(ValueError, match=r"missing: encoder\.norm\.weight"):
        load_text_encoder(path)


def test_damaged_turbo_vae_config_is_named(tmp_path):
    info, _ = load_golden("turbo_vae")
    write_turbo_vae(load_golden_weights("turbo_vae"), info["turbo_vaed_config"], tmp_path / "turbo_vae")
    (tmp_path / "turbo_vae" / "config.json").write_text("")
    with pytest.raises(OSError, match=r"config\.json' is no config"):
        load_original_turbo_vae(tmp_path / "turbo_vae")


@pytest.mark.parametrize("turbo", [True, False])
@pytest.mark.parametrize("variant", ["base", "distill"])
def test_from_original_with_local_directories(variant, turbo, repositories):
    sources = local_sources(repositories)
    pipe = MagiHumanAudioVideoPipeline.from_original(
        variant=variant,
        dtype=torch.float32,
        turbo_vae=sources["path_or_repo"] if turbo else None,
        **sources,
    )
    assert pipe.config.is_distilled == (variant == "distill")
    assert pipe.scheduler.config.sampler == ("renoise" if variant == "distill" else "unipc")
    assert type(pipe.vae).__name__ == ("AutoencoderKLMagiHumanTurbo" if turbo else "AutoencoderKLWan")
    output = run(pipe, output_type="np")
    assert output.frames.shape == (1, 9, 64, 64, 3)


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
    with pytest.raises(ValueError, match="`variant`='sr_540p' must be 'base' or 'distill'"):
        MagiHumanAudioVideoPipeline.from_original(source, subfolder="540p_sr")
    with pytest.raises(ValueError, match=r"`variant`='distill' must be one of \('sr_540p', 'sr_1080p'\)"):
        MagiHumanLatentUpscalePipeline.from_original(source, subfolder="distill")
