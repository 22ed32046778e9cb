# SPDX-License-Identifier: Apache-2.0
"""The recipes of the embedded models: each takes a step, and if asked learns in ten, as if it had never stopped."""

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
        "--data cache/128 --base runs/base --text runs/text_encoder --video-vae runs/video_vae --batch-size 2"
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


# What a recipe reads of others, in the order in which they run.
NEEDS = {
    "turbo_vae": ["video_vae"],
    "cache": ["audio_vae", "video_vae"],
    "base": ["text_encoder", "cache"],
    "distilled": ["base"],
    "upscale": ["text_encoder", "cache"],
}


def run(module, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *command.split()])
    module.main()


def train(name, output, options, monkeypatch):
    module, command, _, _ = RECIPES[name]
    run(module, f"--output {output} --log-every 1 --save-every 5 --decay 0 {command} {options}", monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "data"
    with pytest.MonkeyPatch.context() as monkeypatch:
        for size, clips in ((128, 1), (256, 2)):
            run(make_dataset, f"{folder}/{size} --clips {clips} --size {size} --workers 1", monkeypatch)
    return folder


class Chain:
    """A folder in which recipes run one after the other, each with the options once, when somebody needs it."""

    def __init__(self, folder, data, options):
        self.folder, self.options = folder, options
        (folder / "data").symlink_to(data)

    def run(self, name, monkeypatch):
        monkeypatch.chdir(self.folder)
        for needed in NEEDS.get(name, []):
            self.run(needed, monkeypatch)
        if name == "cache":
            for size in (128, 256):
                if not (self.folder / "cache" / str(size)).exists():
                    options = f"--data data/{size} --video-vae runs/video_vae --audio-vae runs/audio_vae"
                    run(cache_latents, f"{options} --output cache/{size}", monkeypatch)
        elif not (self.folder / "runs" / name).exists():
            train(name, f"runs/{name}", self.options, monkeypatch)
        return self.folder


@pytest.fixture(scope="module")
def one_step(data, tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("one-step"), data, "--steps 1 --batch-size 2")


@pytest.fixture(scope="module")
def ten_steps(data, tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("ten-steps"), data, "--steps 10")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_takes_a_step(name, one_step, monkeypatch):
    output = one_step.run(name, monkeypatch) / "runs" / name
    _, _, weights, falling = RECIPES[name]
    (line,) = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    assert line["step"] == 1 and np.isfinite(line[falling])
    assert all((output / file).is_file() for file in weights)


def test_assembled_models_load(one_step, monkeypatch, capsys):
    for name in RECIPES:
        one_step.run(name, monkeypatch)
    run(assemble, "runs models", monkeypatch)
    assert " MB in models" in capsys.readouterr().out
    configs = (one_step.folder / "models").rglob("config.json")
    assert not any(json.loads(file.read_text()).get("_name_or_path") for file in configs)
    pipes = {name: DiffusionPipeline.from_pretrained(f"models/{name}") for name in ("base", "distilled", "upscale")}
    assert pipes["distilled"].config.is_distilled and not pipes["base"].config.is_distilled
    assert pipes["base"].config.default_num_frames == 49 and pipes["upscale"].config.default_width == 256
    prompt = world.make_scene(np.random.default_rng(0))
    prompt = world.make_prompt(prompt, np.random.default_rng(0))
    size = {"num_inference_steps": 1, "output_type": "latent"}
    low = pipes["distilled"](prompt, height=64, width=64, num_frames=5, **size)
    high = pipes["upscale"](prompt, latents=low.frames, height=96, width=96, guidance_scale=1.0, **size)
    assert high.frames.shape == (1, 48, 2, 6, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_learns_and_resumes(name, ten_steps, monkeypatch):
    folder = ten_steps.run(name, monkeypatch)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video_vae", "turbo_vae", "base", "distilled"])
def test_goes_on_from_an_earlier_run(name, ten_steps, monkeypatch):
    folder = ten_steps.run(name, monkeypatch)
    train(name, f"continued/{name}", f"--start-from runs/{name} --steps 1 --learning-rate 1e-9", monkeypatch)
    (file,) = RECIPES[name][2]
    before, after = load_file(folder / "runs" / name / file), load_file(folder / "continued" / name / file)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-7) for key in before)


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
