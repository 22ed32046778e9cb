# SPDX-License-Identifier: Apache-2.0
"""Every example runs on tiny models and writes an mp4 that plays."""

import os
import re
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from helpers import read_frames, read_header, read_sound
from make_tiny_pipeline import make_text_encoder, make_tiny_pipeline, make_tiny_upscale_pipeline, make_wan_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, UMT5Config, UMT5EncoderModel

import diffusers_magihuman
from diffusers_magihuman import MagiHumanAudioVideoPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTS = Path(__file__).parent
FRAME_SAMPLES = 1764  # of audio at 44100 Hz, in one frame


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline whose own size and length are small: the examples name none."""
    path = tmp_path_factory.mktemp("examples") / "tiny"
    size = {"default_height": 64, "default_width": 96, "default_num_frames": 9}
    make_tiny_pipeline(is_distilled=True, **size).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def upscale_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "tiny-upscale"
    make_tiny_upscale_pipeline(default_height=96, default_width=160).save_pretrained(path)
    return path


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return tmp_path / f"{name}.mp4"

    return run


def test_scripts_to_copy_from_are_short():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name for name, length in lengths.items() if length > 30} == {"make_tiny_pipeline", "train_lora"}


def test_every_script_has_a_test():
    """A test here, or a file of its own, is named after each."""
    tests = {name for name in globals() if name.startswith("test_")} | {path.stem for path in TESTS.glob("test_*.py")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= {name.removeprefix("test_") for name in tests}


def test_make_tiny_pipeline(run_example):
    run_example("make_tiny_pipeline", "tiny", "--distilled")
    run_example("make_tiny_pipeline", "tiny-upscale", "--upscale")
    assert DiffusionPipeline.from_pretrained("tiny").config.is_distilled
    assert DiffusionPipeline.from_pretrained("tiny-upscale").config.default_width == 192


def test_text_to_video(run_example, model):
    video = run_example("text_to_video", model)
    check_video(video, 9, 64, 96)
    check_audio(video, 9)


def test_portrait_and_voice(run_example, model, tmp_path):
    """The portrait is the first frame, and the audio sets the length: 0.25 s are 6 frames, of which 5 are made."""
    PIL.Image.new("RGB", (60, 80), (220, 40, 40)).save(tmp_path / "portrait.png")
    soundfile.write(tmp_path / "speech.wav", 0.2 * np.sin(np.arange(4000) / 9), 16000)
    check_audio(run_example("portrait_and_voice", model, "portrait.png", "speech.wav"), 5)


def save_text_to_image(path):
    characters = string.ascii_letters + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    text_config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    channels = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **channels
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77),
        unet=UNet2DConditionModel(
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            **channels,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


def save_wan(path):
    """Wan 2.2 with the autoencoder of 16 pixels a latent, whose latents are those of our tiny pipelines."""
    tokenizer, _ = make_text_encoder(hidden_size=16)
    text_config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config),
        vae=make_wan_vae(),
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=8,
            out_channels=8,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
        ),
        expand_timesteps=True,
    ).save_pretrained(path)


def check_video(path, num_frames, height, width, fps=25):
    assert f"{fps} fps" in read_header(path)
    video = read_frames(path, height, width)
    assert len(video) == num_frames and video.std() > 1
    return video


def check_audio(path, num_frames):
    """The container's length is exact; the stream is padded to whole AAC frames."""
    audio = read_sound(path)
    assert 0 <= len(audio) - num_frames * FRAME_SAMPLES < 1024 and audio.std() > 1e-4


def test_image_then_video(run_example, model, tmp_path):
    save_text_to_image(tmp_path / "image")
    video = run_example("image_then_video", tmp_path / "image", model)
    check_video(video, 9, 64, 96)
    check_audio(video, 9)


def test_base_then_upscale(run_example, model, upscale_model):
    video = run_example("base_then_upscale", model, upscale_model)
    check_video(video, 9, 96, 160)
    check_audio(video, 9)


def test_low_memory(run_example, model):
    video = run_example("low_memory", model)
    check_video(video, 9, 64, 96)
    check_audio(video, 9)


def test_shared_embeddings(run_example, model, upscale_model):
    """Upscaled to twice the size."""
    video = run_example("shared_embeddings", model, upscale_model)
    check_video(video, 9, 128, 192)
    check_audio(video, 9)


def test_wan_then_upscale(run_example, upscale_model, tmp_path, monkeypatch):
    call = WanPipeline.__call__

    def short_call(self, *args, **kwargs):
        return call(self, *args, **{**kwargs, "height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 2})

    monkeypatch.setattr(WanPipeline, "__call__", short_call)
    save_wan(tmp_path / "wan")
    video = run_example("wan_then_upscale", tmp_path / "wan", upscale_model)
    check_video(video, 5, 96, 160, fps=24)
    assert "Audio" not in read_header(video)


def test_long_video(run_example, model, monkeypatch):
    """Three clips of nine frames: two are shared, and so is the audio of their time."""
    images, clips, exported = [], [], []
    call, export = MagiHumanAudioVideoPipeline.__call__, diffusers_magihuman.export_to_mp4

    def recording_call(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        images.append(kwargs["image"])
        clips.append((output.frames[0], output.audio[0].copy()))
        return output

    def recording_export(frames, path, audio, **kwargs):
        exported.extend([np.stack(frames), audio])
        return export(frames, path, audio, **kwargs)

    monkeypatch.setattr(MagiHumanAudioVideoPipeline, "__call__", recording_call)
    monkeypatch.setattr(diffusers_magihuman, "export_to_mp4", recording_export)
    path = run_example("long_video", model)
    num_frames = 3 * 9 - 2
    check_video(path, num_frames, 64, 96)
    check_audio(path, num_frames)

    frames, audio = exported
    assert images[0] is None
    assert all(np.array_equal(image, clip[-1]) for image, (clip, _) in zip(images[1:], clips[:-1], strict=True))
    assert np.array_equal(frames, np.concatenate([clips[0][0], clips[1][0][1:], clips[2][0][1:]]))

    assert audio.shape == (2, num_frames * FRAME_SAMPLES)
    for index, (_, own) in enumerate(clips):
        placed = audio[:, index * 8 * FRAME_SAMPLES :][:, : 9 * FRAME_SAMPLES]
        assert np.array_equal(placed[:, FRAME_SAMPLES:-FRAME_SAMPLES], own[:, FRAME_SAMPLES:-FRAME_SAMPLES])
        if index:
            before = clips[index - 1][1][:, -FRAME_SAMPLES:]
            fade = np.linspace(0, 1, FRAME_SAMPLES)
            mixed = before * (1 - fade) + own[:, :FRAME_SAMPLES] * fade
            np.testing.assert_allclose(placed[:, :FRAME_SAMPLES], mixed, atol=1e-6)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["", pytest.param("0,1", marks=[pytest.mark.gpu, two_gpus])])
def test_multi_gpu(gpus, tmp_path):
    """The README's command, with two processes on the CPU or a process on each of two GPUs."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    _, *arguments, _script = shlex.split(re.search(r"^torchrun .* examples/multi_gpu.py$", readme, re.MULTILINE)[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, EXAMPLES / "multi_gpu.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines().count("multi_gpu.mp4") == 1
    check_video(tmp_path / "multi_gpu.mp4", 49, 128, 128)
    check_audio(tmp_path / "multi_gpu.mp4", 49)
