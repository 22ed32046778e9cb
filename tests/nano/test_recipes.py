# SPDX-License-Identifier: Apache-2.0
"""The recipes of the embedded models: each lowers its loss in ten steps, and resumes as if it never stopped."""

import json
import sys

import assemble
import cache_latents
import make_dataset
import numpy as np
import PIL.Image
import pytest
import torch
import train_audio_vae
import train_distilled
import train_text_encoder
import train_transformer
import train_turbo_vae
import train_upscale
import train_video_vae
import world
from diffusers import DiffusionPipeline
from recognise import edit_distance, measure_mouth, measure_pitch, recognise_look, recognise_voice
from safetensors.torch import load_file


# In order: name of the output, recipe, options, files of weights, and the number that falls.
RECIPES = {
    "text_encoder": (train_text_encoder, "--batch-size 4", ["text_encoder/model.safetensors"], "text_loss"),
    "audio_vae": (
        train_audio_vae,
        "--data data/128 --length 8 --batch-size 1",
        ["audio_vae/diffusion_pytorch_model.safetensors"],
        "audio_vae_loss",
    ),
    "video_vae": (
        train_video_vae,
        "--data data/128 data/256 --crop 64 --frames 9 --batch-size 2",
        ["vae/diffusion_pytorch_model.safetensors"],
        "vae_loss",
    ),
    "turbo_vae": (
        train_turbo_vae,
        "--data data/128 --teacher runs/video_vae --crop 64 --frames 9 --batch-size 2",
        ["vae/diffusion_pytorch_model.safetensors"],
        "decoder_loss",
    ),
    "base": (
        train_transformer,
        "--data cache/128 --text runs/text_encoder --video-vae runs/video_vae --batch-size 2",
        ["transformer/diffusion_pytorch_model.safetensors"],
        "transformer_loss",
    ),
    "distilled": (
        train_distilled,
        "--data cache/128 --base runs/base --text runs/text_encoder --video-vae runs/video_vae --batch-size 8"
        " --critic-steps 1 --learning-rate 4e-3",
        ["transformer/diffusion_pytorch_model.safetensors"],
        "critic_loss",
    ),
    "upscale": (
        train_upscale,
        "--low cache/128 --high cache/256 --text runs/text_encoder --video-vae runs/video_vae --batch-size 1",
        ["transformer/diffusion_pytorch_model.safetensors"],
        "transformer_loss",
    ),
}


def run(module, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *command.split()])
    module.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the recipes run, one after the other; a recipe's test leaves its output to those that need it."""
    folder = tmp_path_factory.mktemp("nano")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for size in (128, 256):
            run(make_dataset, f"data/{size} --clips 2 --size {size} --workers 1", monkeypatch)
    return folder


def needs(folder, monkeypatch, *names):
    """Runs recipes that have not run yet, so that each test can be run alone."""
    for name in names:
        if name == "cache":
            for size in (128, 256):
                if not (folder / "cache" / str(size)).exists():
                    options = f"--data data/{size} --video-vae runs/video_vae --audio-vae runs/audio_vae"
                    run(cache_latents, f"{options} --output cache/{size}", monkeypatch)
        elif not (folder / "runs" / name).exists():
            train(name, f"runs/{name}", "--steps 10", monkeypatch)


def train(name, output, options, monkeypatch):
    module, command, _, _ = RECIPES[name]
    run(module, f"--output {output} --log-every 1 --save-every 5 --decay 0 {command} {options}", monkeypatch)


NEEDS = {
    "turbo_vae": ["video_vae"],
    "base": ["text_encoder", "audio_vae", "video_vae", "cache"],
    "distilled": ["text_encoder", "audio_vae", "video_vae", "cache", "base"],
    "upscale": ["text_encoder", "audio_vae", "video_vae", "cache"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_learns_and_resumes(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    needs(folder, monkeypatch, *NEEDS.get(name, []), name)
    _, _, weights, falling = RECIPES[name]
    output, resumed = folder / "runs" / name, folder / "resumed" / name

    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    losses = [line[falling] for line in lines]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert np.asarray(PIL.Image.open(output / "loss.png").convert("L")).std() > 0

    # Stops after 7 steps, two of which are lost, as its last state is that of step 5.
    train(name, resumed, "--steps 10 --stop-at 7", monkeypatch)
    assert json.loads((resumed / "state" / "progress.json").read_text())["step"] == 7
    train(name, resumed, "--steps 10", monkeypatch)
    for file in weights:
        first, second = load_file(output / file), load_file(resumed / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    rewritten = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
    assert [line[falling] for line in rewritten] == losses


@pytest.mark.parametrize("name", ["video_vae", "turbo_vae", "base", "distilled"])
def test_goes_on_from_an_earlier_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    needs(folder, monkeypatch, *NEEDS.get(name, []), name)
    train(name, f"continued/{name}", f"--start-from runs/{name} --steps 1 --learning-rate 1e-9", monkeypatch)
    (file,) = RECIPES[name][2]
    before, after = load_file(folder / "runs" / name / file), load_file(folder / "continued" / name / file)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-7) for key in before)


def test_assembled_models_load(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    needs(folder, monkeypatch, "text_encoder", "audio_vae", "video_vae", "turbo_vae", "cache", "base", "distilled")
    needs(folder, monkeypatch, "upscale")
    run(assemble, "runs models", monkeypatch)
    assert " MB in models" in capsys.readouterr().out
    configs = (folder / "models").rglob("config.json")
    assert not any(json.loads(file.read_text()).get("_name_or_path") for file in configs)
    prompt = world.make_clip(0, size=16).prompt
    low = DiffusionPipeline.from_pretrained("models/distilled")(prompt, num_inference_steps=1, output_type="latent")
    upscale = DiffusionPipeline.from_pretrained("models/upscale")
    frames = upscale(prompt, latents=low.frames, num_inference_steps=1, guidance_scale=1.0).frames
    assert frames.shape == (1, 49, 256, 256, 3)
    assert DiffusionPipeline.from_pretrained("models/base").config.default_num_frames == 49


def test_details_weigh_more():
    video = torch.zeros(1, 3, 2, 16, 16)
    video[..., 8:] = 1.0
    weights = train_video_vae.detail_weights(video)
    assert weights.shape == (1, 1, 2, 16, 16)
    assert torch.allclose(weights.mean(dim=(2, 3, 4)), torch.tensor(2.0))
    assert weights[0, 0, 0, 8, 7] > 4 and weights[0, 0, 0, 8, 2] == 1


def test_no_dataset_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"scenes\.jsonl"):
        make_dataset.load_dataset(tmp_path)


# What measures the models is right about drawn clips


def test_recognises_drawn_clips():
    for seed in range(12):
        clip = world.make_clip(seed, held_out=True)
        seen = {**recognise_look(clip.frames), "voice": recognise_voice(clip.voice)}
        assert seen == {name: getattr(clip.scene, name) for name in seen}
        assert np.corrcoef(measure_mouth(clip.frames), clip.mouth[:, 1])[0, 1] > 0.9
        assert measure_pitch(clip.voice) == pytest.approx(world.VOICE[clip.scene.voice][0], rel=0.06)


@pytest.mark.parametrize(
    "first, second, distance",
    [((), (), 0), (("ma",), (), 1), (("ma", "mi"), ("mi",), 1), (("ma", "mi", "mo"), ("ma", "mu", "mo", "mo"), 2)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_analysis_finds_pitch_and_phase():
    times = torch.arange(49 * 2048) / world.SAMPLING_RATE
    pitch = 160 * 2**0.25
    voice = 0.3 * torch.cos(2 * torch.pi * pitch * times) + 0.3 * torch.cos(2 * torch.pi * 3 * pitch * times + 1)
    analysis = train_audio_vae.Analysis()
    analysis.fit(voice[None])
    latents = analysis.encode(voice[None])[0, :, 2:-2]
    assert torch.allclose(latents[2], torch.tensor(1.0), atol=0.02)  # 4 * log2(pitch / 160)
    centres = (torch.arange(2, 47) + 0.5) * 2048 / world.SAMPLING_RATE
    angle = torch.remainder(torch.atan2(latents[1], latents[0]) - 2 * torch.pi * pitch * centres, 2 * torch.pi)
    assert torch.minimum(angle, 2 * torch.pi - angle).max() < 0.1
    silence = analysis.encode(torch.zeros(1, 49 * 2048))
    assert not silence[:, :3].any()


def test_projection_is_the_inverse_of_itself():
    clip = train_video_vae.to_tensor(world.make_clip(0).frames[None, :9])
    patches = train_video_vae.Projection.to_patches(clip)
    assert patches.shape == (1, 3, 8, 8, 3072)
    projection = train_video_vae.Projection()
    projection.fit(patches.flatten(0, 3))
    latents = projection.encode(clip)
    assert latents.square().mean() == pytest.approx(1.0, rel=0.05)
    decoded = projection.decode(latents)
    assert (decoded - clip).square().mean() < 0.01
    assert torch.allclose(projection.encode(decoded)[:, :, 1:], latents[:, :, 1:], atol=1e-3)
