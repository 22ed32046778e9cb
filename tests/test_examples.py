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
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    UMT5Config,
    UMT5EncoderModel,
)

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
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as error:
            assert not error.code
        return tmp_path / f"{name}.mp4"

    return run


def test_scripts_to_copy_from_are_short():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    long = {"enhance_prompt": 65, "make_tiny_pipeline": 150, "train_lora": 400}
    assert {name: length for name, length in lengths.items() if length > long.get(name, 30)} == {}


def test_every_script_has_a_test():
    """A test here, or a file of its own, is named after each."""
    tests = {name for name in globals() if name.startswith("test_")} | {path.stem for path in TESTS.glob("test_*.py")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= {name.removeprefix("test_") for name in tests}


def test_make_tiny_pipeline(run_example):
    run_example("make_tiny_pipeline", "tiny", "--distilled")
    run_example("make_tiny_pipeline", "tiny-upscale", "--upscale")
    assert DiffusionPipeline.from_pretrained("tiny").config.is_distilled
    assert DiffusionPipeline.from_pretrained("tiny-upscale").config.default_width == 192


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"multi_gpu"}))
def test_without_arguments_examples_try_the_tiny_models(name, run_example, tmp_path):
    video = run_example(name)
    if name.endswith(("video", "voice", "upscale", "memory", "embeddings")):
        size = 256 if name.endswith(("upscale", "embeddings")) else 128
        is_wan = name.startswith("wan")
        check_video(video, 145 if name == "long_video" else 49, size, size, fps=24 if is_wan else 25)
        assert is_wan or read_sound(video).std() > 1e-3
    for path in tmp_path.glob("modular_*.mp4"):
        check_video(path, 49, *((256, 256) if "chain" in name else (128, 128)))
    assert sorted(path.name for path in tmp_path.iterdir()) == {
        "enhance_prompt": [],
        "make_tiny_pipeline": ["tiny-magihuman"],
        "modular_four_seeds": [f"modular_four_seeds_{seed}.mp4" for seed in range(4)],
        "train_lora": ["lora"],
    }.get(name, [f"{name}.mp4"])


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


def save_instruct_model(path, sees):
    """A random model that chats, or one that also sees, as Transformers' pipelines load them."""
    tokenizer, _ = make_text_encoder(hidden_size=16)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, **sizes)
    part = "{% if c is string %}{{ c }}{% elif c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    parts = "{% for m in messages %}{% for c in ([m.content] if m.content is string else m.content) %}PART{% endfor %}"
    template = parts.replace("PART", part) + "{% endfor %}"
    if not sees:
        LlamaForCausalLM(text).save_pretrained(path)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
        return
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(processor, tokenizer, chat_template=template, **options).save_pretrained(path)


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


@pytest.mark.parametrize("sees", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_enhance_prompt(sees, run_example, tmp_path, capsys):
    """What a random model writes is put in the form that is wanted, with the line word for word."""
    save_instruct_model(tmp_path / "chat", sees)
    PIL.Image.new("RGB", (60, 80), "teal").save(tmp_path / "portrait.png")
    capsys.readouterr()
    options = ["--dialogue", "Old baker, French: Bon jour.", *["--image", "portrait.png"] * sees]
    run_example("enhance_prompt", "chat", "a baker at dawn", *options)
    description, dialogue, background = capsys.readouterr().out.strip().rsplit("\n\n", 2)
    assert len(description) > 100 and description.endswith('Old baker says, "Bon jour."')
    assert dialogue == 'Dialogue:\n<Old baker, French>: "Bon jour."'
    assert re.fullmatch("Background Sound:\n<[^<>]+>", background)


def test_base_then_upscale(run_example, model, upscale_model):
    video = run_example("base_then_upscale", model, upscale_model)
    check_video(video, 9, 96, 128)  # the aspect of 64x96, up to multiples of 32
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
    check_video(video, 5, 96, 192, fps=24)  # the aspect of 32x64
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


def test_modular_guider(run_example, model):
    video = run_example("modular_guider", model)
    check_video(video, 9, 64, 96)
    check_audio(video, 9)


def test_modular_four_seeds(run_example, model, tmp_path):
    run_example("modular_four_seeds", model)
    videos = [check_video(tmp_path / f"modular_four_seeds_{seed}.mp4", 9, 64, 96) for seed in range(4)]
    assert len({video.tobytes() for video in videos}) == 4


def test_modular_chain(run_example, model, upscale_model):
    video = run_example("modular_chain", model, upscale_model)
    check_video(video, 9, 96, 128)
    check_audio(video, 9)


def test_modular_watermark(run_example, model):
    """Half as bright where the mark is, on every frame."""
    pipe = DiffusionPipeline.from_pretrained(model)
    expected = pipe('A speaker says, "hello, thank you"', generator=torch.manual_seed(42)).frames[0] * 255
    video = check_video(run_example("modular_watermark", model), 9, 64, 96)
    inside = np.s_[:, -10:-6, 8:40]
    assert abs(video[inside].mean() - expected[inside].mean() / 2) < 6
    assert abs(video[:, :40].mean() - expected[:, :40].mean()) < 6


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["", pytest.param("0,1", marks=[pytest.mark.gpu, two_gpus])])
def test_multi_gpu(gpus, tmp_path):
    """The command of the documents, with two processes on the CPU or a process on each of two GPUs."""
    page = (EXAMPLES.parent / "docs" / "multi-gpu.md").read_text()
    _, *arguments, _script = shlex.split(re.search(r"^torchrun .* examples/multi_gpu.py$", page, re.MULTILINE)[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, EXAMPLES / "multi_gpu.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines().count("multi_gpu.mp4") == 1
    check_video(tmp_path / "multi_gpu.mp4", 49, 128, 128)
    check_audio(tmp_path / "multi_gpu.mp4", 49)


@pytest.mark.slow
def test_notebook(tmp_path):
    """Run from its first cell to the last, as Jupyter does; each clip is shown, and none is stored in the file."""
    nbclient = pytest.importorskip("nbclient")
    notebook = pytest.importorskip("nbformat").read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [
        output.data["text/html"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output
    ]
    assert len(shown) == 3 and all("<video" in html for html in shown)
    for name in ("text", "portrait", "voice"):
        check_video(tmp_path / f"{name}.mp4", 49, 128, 128)
