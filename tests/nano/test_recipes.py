# SPDX-License-Identifier: Apache-2.0
"""The recipes of the embedded models: each takes a step, and if asked learns in ten, as if it had never stopped."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
from accelerate.state import AcceleratorState
from clips import make_clip, make_scene
from diffusers import DiffusionPipeline
from means import Fit, Looks, Means, look_loss
from people import HAIR_COLOUR, SHIRT
from prompts import Scene, make_prompt
from recipe import Muon, Run, make_parser, to_tensor
from recognise import LOOKS
from safetensors.torch import load_file
from torch.nn.functional import one_hot
from words import VOCABULARY

TEXT_AND_VAE = "--text runs/text_encoder --turbo-vae runs/turbo_vae"
# In order: name of the output, recipe, options, file of weights, and the number that falls.
RECIPES = {
    "text_encoder": (train_text_encoder, "--batch-size 4", "text_encoder/model.safetensors", "text_loss"),
    "audio_vae": (
        train_audio_vae,
        "--lines 20 --length 8 --batch-size 1",
        "audio_vae/diffusion_pytorch_model.safetensors",
        "audio_vae_loss",
    ),
    "turbo_vae": (
        train_turbo_vae,
        "--data data/96 --held-out data/held_out",
        "vae/diffusion_pytorch_model.safetensors",
        "vae_loss",
    ),
    "video_vae": (
        train_video_vae,
        "--data data/96 --held-out data/held_out --turbo-vae runs/turbo_vae",
        "vae/diffusion_pytorch_model.safetensors",
        "vae_loss",
    ),
    "base": (
        train_transformer,
        f"--data cache/64x64 cache/96x64 {TEXT_AND_VAE} --batch-size 1",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer_loss",
    ),
    "distilled": (
        train_distilled,
        f"--data cache/64x64 cache/96x64 --base runs/base {TEXT_AND_VAE} --batch-size 1 --critic-steps 1",
        "transformer/diffusion_pytorch_model.safetensors",
        "judged_by_critic",
    ),
    "upscale": (
        train_upscale,
        f"--low cache/64x64 --high cache/128x128 {TEXT_AND_VAE} --batch-size 1",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer_loss",
    ),
}


# What a recipe reads of others, in the order in which they run.
NEEDS = {
    "video_vae": ["turbo_vae"],
    "cache": ["turbo_vae"],
    "base": ["text_encoder", "cache"],
    "distilled": ["base"],
    "upscale": ["text_encoder", "cache"],
}
CACHES = ("64 64", "96 64", "128 128")
NUM_CLIPS, FRAMES = 3, 25


def run(module, command, monkeypatch):
    AcceleratorState._reset_state()  # as in a new process, which may choose another precision
    monkeypatch.setattr(sys, "argv", [module.__name__, *command.split()])
    module.main()


def train(name, output, options, monkeypatch):
    module, command, _, _ = RECIPES[name]
    run(module, f"--output {output} --log-every 1 --save-every 5 --decay 0 {command} {options}", monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "data"
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, option in (("96", ""), ("held_out", "--held-out")):
            options = f"--clips 1 --size 96 96 --frames 17 --workers 1 {option}"
            run(make_dataset, f"{folder}/{name} {options}", monkeypatch)
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
            for size in CACHES:
                output = f"cache/{size.replace(' ', 'x')}"
                if not (self.folder / output).exists():
                    options = "--turbo-vae runs/turbo_vae --batch-size 2 --first 5"
                    options += f" --size {size} --frames {FRAMES} --clips {NUM_CLIPS} --output {output}"
                    run(cache_latents, options, monkeypatch)
        elif not (self.folder / "runs" / name).exists():
            train(name, f"runs/{name}", self.options, monkeypatch)
        return self.folder


@pytest.fixture(scope="module")
def one_step(data, tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("one-step"), data, "--steps 1")


@pytest.fixture(scope="module")
def ten_steps(data, tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("ten-steps"), data, "--steps 10")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_takes_a_step(name, one_step, monkeypatch):
    output = one_step.run(name, monkeypatch) / "runs" / name
    _, _, weights, falling = RECIPES[name]
    (line,) = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    assert line["step"] == 1 and np.isfinite(line[falling])
    assert (output / weights).is_file()


def test_learning_rate_rises_stays_and_falls(tmp_path):
    AcceleratorState._reset_state()
    arguments = make_parser("", 1000, 1, 2e-3).parse_args(["--output", str(tmp_path / "run")])
    training = Run(arguments, {"model": torch.nn.Linear(2, 2)})
    found = []
    for training.step in (0, 49, 99, 500, 750, 875, 999):
        found.append(training.learning_rate() / 2e-3)
    assert found == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0.004])


def test_no_state_is_saved_of_weights_that_are_not_finite(tmp_path):
    AcceleratorState._reset_state()
    arguments = make_parser("", 4, 1, 1e-3).parse_args(["--output", str(tmp_path), "--save-every", "1"])
    training = Run(arguments, {"model": torch.nn.Linear(2, 2)})
    with pytest.raises(FloatingPointError, match="step 2 the gradient of model is not finite"):
        for _ in training.steps():
            value = float("inf") if training.step == 2 else 1.0
            training.update("model", (training.models["model"](torch.ones(1, 2)) * value).mean())
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["step"] == 2
    assert load_file(tmp_path / "state" / "model.safetensors")["weight"].isfinite().all()


def test_a_dataset_holds_the_clips_of_its_numbers(data):
    for name, held_out in (("96", False), ("held_out", True)):
        drawing, dataset = make_clip(0, 96, 96, 17, held_out).drawing, make_dataset.load_dataset(data / name)
        assert np.array_equal(dataset.frames[0], drawing.frames)
        assert np.allclose(dataset.boxes[0], drawing.boxes, atol=1e-4)


def test_weights_of_a_crop_lie_on_eyes_and_mouth():
    frames, boxes = np.zeros((1, 3, 80, 60, 3), np.uint8), np.zeros((1, 3, 3, 4), np.float32)
    boxes[:] = [[10, 20, 22, 26], [40, 20, 52, 26], [20, 50, 44, 58]]
    for left, top, right, bottom in boxes[0, 0].astype(int):
        frames[:, :, top:bottom, left:right] = 255
    dataset = make_dataset.Dataset(frames, boxes)
    video, weights = train_turbo_vae.draw_crops([dataset], np.random.default_rng(0), 20, 2, 40)
    assert video.shape == (20, 3, 2, 40, 40) and torch.equal(weights[:, 0] == 2, video[:, 0] > 0)
    assert len({tuple(each.flatten().tolist()) for each in weights}) > 10
    with pytest.raises(ValueError, match=r"shape \(3, 80, 60\), but crops need at least 2 frames of 64x64 pixels"):
        train_turbo_vae.draw_crops([dataset], np.random.default_rng(0), 1, 2, 64)


@pytest.mark.slow
def test_mixed_precision_trains_the_same(one_step, monkeypatch):
    folder = one_step.run("base", monkeypatch)
    train("base", "bf16", "--steps 1 --mixed-precision bf16", monkeypatch)
    losses = [
        json.loads((folder / name / "log.jsonl").read_text())["transformer_loss"] for name in ("runs/base", "bf16")
    ]
    assert 0 < abs(losses[1] / losses[0] - 1) < 0.01


def test_caches_hold_latents_and_scenes_of_clips(one_step, monkeypatch):
    folder = one_step.run("cache", monkeypatch)
    cache = cache_latents.load_cache(folder / "cache" / "96x64")
    clips = [make_clip(5 + number, 96, 64, FRAMES) for number in range(NUM_CLIPS)]
    assert cache.scenes == [clip.scene for clip in clips]
    assert cache.latents.shape == (NUM_CLIPS, 48, 7, 4, 6)
    assert cache.audio_latents.shape == (NUM_CLIPS, FRAMES, train_audio_vae.LATENT_CHANNELS)
    vae = train_turbo_vae.AutoencoderKLMagiHumanTurbo.from_pretrained("runs/turbo_vae/vae")
    with torch.no_grad():
        latents = vae.encode(to_tensor(clips[2].drawing.frames[None])).latent_dist.mode()[0]
    assert np.abs(cache.latents[2] - latents.numpy()).max() < 0.01
    assert np.abs(cache.audio_latents[1] - clips[1].speech.latents).max() < 0.01
    left, right, mouth = (cache_latents.find_shares(box, 96, 64) for box in clips[1].drawing.boxes.swapaxes(0, 1))
    assert mouth.max() > 0 and np.array_equal(cache.mouths[1], mouth.astype(np.float16))
    assert min(left.max(), right.max()) > 0 and np.array_equal(cache.eyes[1], (left + right).astype(np.float16))
    with pytest.raises(OSError, match=r"latents\.npy"):
        cache_latents.load_cache(folder)


def test_sizes_and_lengths_that_do_not_fit(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(cache_latents, f"--turbo-vae none --output {tmp_path}/cache --frames 6", monkeypatch)
    assert "--frames is 6, it must be 1, 5, 9 and so on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(cache_latents, f"--turbo-vae none --output {tmp_path}/cache --size 72 64", monkeypatch)
    assert "--size is 72 64, both must be multiples of 16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(train_audio_vae, f"--output {tmp_path}/run --length 60", monkeypatch)
    assert "--length is 60, it must be 1 to 49" in capsys.readouterr().err


def test_boxes_cover_positions_where_they_are_drawn():
    boxes = np.array([[20.0, 40, 36, 48]] + 4 * [[16.0, 40, 32, 56]])  # left, top, right, bottom
    shares = cache_latents.find_shares(boxes, 64, 80)
    assert shares.shape == (2, 5, 4)
    expected = np.zeros((2, 5, 4))
    expected[0, 2, 1:3] = 12 / 16 * 8 / 16, 4 / 16 * 8 / 16
    expected[1, 2:4, 1] = 8 / 16
    assert np.array_equal(shares, expected)


def test_batches_of_any_shape_have_about_as_many_tokens():
    def make_cache(clips, *shape):
        scenes = [make_scene(np.random.default_rng(seed), 6) for seed in range(clips)]
        audio_latents = np.zeros((clips, 4 * shape[0] - 3, 8), np.float16)
        latents, shares = np.zeros((clips, 4, *shape), np.float16), np.zeros((clips, *shape), np.float16)
        return cache_latents.Cache(latents, audio_latents, shares, shares, scenes)

    caches, sizes = [make_cache(30, 13, 8, 8), make_cache(10, 13, 8, 16)], []
    for seed in range(200):
        batch = train_transformer.draw_batch(caches, np.random.default_rng(seed), 4, torch.device("cpu"))
        assert len(batch.latents) == len(batch.audio_latents) == len(batch.prompts) == len(batch.has_audio)
        sizes.append((len(batch.latents), batch.latents.shape[4]))
    assert {*sizes} == {(4, 8), (2, 16)} and 0.45 < np.mean([width == 8 for _, width in sizes]) < 0.65


def test_the_base_learns_most_of_eyes_and_mouths_and_of_given_sounds(one_step, monkeypatch):
    folder, seen = one_step.run("base", monkeypatch), []
    learn = train_transformer.flow_matching_loss

    def watch(*given, latent_weights, **options):
        seen.append(latent_weights)
        return learn(*given, latent_weights=latent_weights, **options)

    monkeypatch.setattr(train_transformer, "flow_matching_loss", watch)
    train("base", "weighed", "--steps 1 --motion-weight 0 --eye-weight 2 --mouth-weight 8", monkeypatch)
    caches = [cache_latents.load_cache(folder / "cache" / name) for name in ("64x64", "96x64")]
    shown = next(each for each in caches if each.mouths.shape[1:] == seen[0].shape[2:])
    expected = 1 + 2 * shown.eyes.astype(np.float32) + 8 * shown.mouths.astype(np.float32)
    assert shown.eyes.max() > 0 and min(np.abs(seen[0][0, 0].numpy() - each).max() for each in expected) < 1e-5

    given = train_transformer.draw_batch(caches[:1], np.random.default_rng(0), 60, torch.device("cpu")).has_audio
    assert abs(given.float().mean() - 0.5) < 0.1


def test_means_are_of_all_clips_that_fit_what_is_said():
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, 2) for _ in range(1000)]

    def picture(scene):
        """A shirt in one place, and hair in another whose colour nobody sees without."""
        hair = 0 if scene.hair_style == "bald" else list(HAIR_COLOUR).index(scene.hair_colour) + 3 * scene.glasses
        return np.array([list(SHIRT).index(scene.shirt), hair], float).reshape(1, 1, 2)

    pictures = np.stack([picture(scene) for scene in scenes])
    latents = np.stack([pictures, 2 * pictures, 4 * pictures - 1, 4 * pictures + 1], axis=2)  # of four moments
    latents += rng.normal(size=latents.shape, scale=0.3)
    cache = cache_latents.Cache(latents.astype(np.float16), None, None, None, scenes)
    told, nothing = make_scene(rng, 2), Scene(*[None] * 8, words=())
    few = cache._replace(latents=cache.latents[:200, ..., :1], scenes=scenes[:200])
    found = Means([cache, few])
    mean = found.find([told, nothing], (6, 1, 2)).numpy()
    expected = np.stack([picture(told), pictures.mean(axis=0)])
    for frame, factor in enumerate((1, 2, 4, 4, 4, 4)):
        assert np.abs(mean[:, :, frame] - factor * expected).max() < 0.5
    assert found.knows((6, 1, 2)) and not found.knows((6, 2, 2))
    assert not found.knows((6, 1, 1))  # so few clips that they would be learned by heart

    added = found.find_added([replace(told, glasses=True, hair_style="bob"), nothing], (6, 1, 2), rng)
    assert added.shape == (2, len(LOOKS), 1, 6, 1, 2) and (added[1] == 0).all()
    shirt, glasses, beard = (added[0, list(LOOKS).index(name), 0, 5, 0] for name in ("shirt", "glasses", "beard"))
    difference = shirt[0].item() / 4  # from another shirt, whose place in the table is a whole number
    assert abs(difference) > 0.5 and abs(difference - round(difference)) < 0.2 and abs(shirt[1]) < 0.8
    assert glasses[1].item() == pytest.approx(12, abs=1) and beard.abs().max() < 0.8
    styles = found.find_added(20 * [replace(told, hair_style="bob")], (6, 1, 2), rng)[
        :, list(LOOKS).index("hair_style")
    ]
    assert styles.abs().max() < 2.5  # all have the same colour, and none is compared with no hair
    # The colour of no hair says nothing of that of hair, even where pairs are not fitted.
    colours = [0 if scene.hair_style == "bald" else 9 * list(HAIR_COLOUR).index(scene.hair_colour) for scene in scenes]
    white = replace(told, hair_style="bob", hair_colour="white")
    assert Fit(scenes, np.reshape(colours, (-1, 1, 1, 1)), ()).mean([white]).item() == pytest.approx(36, abs=1)


class KnownMeans(Means):
    """Means of any shape: 2, to which each look that is said adds 1 in a channel of its own."""

    def knows(self, _):
        return True

    def find(self, scenes, shape):
        return torch.full((len(scenes), 48, *shape), 2.0)

    def find_added(self, scenes, shape, _):
        added = torch.zeros(len(scenes), len(LOOKS), 48, *shape)
        for number, name in enumerate(LOOKS):
            added[:, number, number] = torch.tensor([getattr(scene, name) is not None for scene in scenes]).view(
                -1, 1, 1, 1
            )
        return added


@pytest.mark.slow
def test_the_base_learns_means_from_pure_noise(one_step, monkeypatch):
    folder = one_step.run("base", monkeypatch)
    learn, seen = train_transformer.flow_matching_loss, []

    def watch(*given, **options):
        seen.append((given, options))
        return learn(*given, **options)

    monkeypatch.setattr(train_transformer, "flow_matching_loss", watch)
    clips = f"--turbo-vae runs/turbo_vae --size 64 64 --frames {FRAMES} --clips 2"
    run(cache_latents, f"{clips} --output cache/two", monkeypatch)
    options = f"{TEXT_AND_VAE} --data cache/two --batch-size 1 --text-dropout 0 --steps 1 --log-every 1"
    run(train_transformer, f"{options} --pure-noise 1 --output runs/few", monkeypatch)
    monkeypatch.setattr(train_transformer, "Means", KnownMeans)
    run(train_transformer, f"{options} --pure-noise 1 --output runs/pure", monkeypatch)
    run(train_transformer, f"{options} --pure-noise 0 --output runs/clips", monkeypatch)
    (few, few_options), (pure, pure_options), (clips, clip_options) = seen
    assert few[5].min() < 1 and few_options["latent_weights"].max() > 2  # so few clips that no mean is known
    model, latents, *_, levels, video_weight, _ = pure
    assert (latents == 2).all() and (levels == 1).all() and video_weight == 8
    assert pure_options["latent_weights"] is None and (model.hidden == 0).all()
    assert not pure_options["image_probability"].any() and not pure_options["audio_probability"].any()
    model, latents, *_, levels, video_weight, _ = clips
    assert not (latents == 2).any() and levels.min() < 1 and video_weight == 1
    assert clip_options["latent_weights"].max() > 2
    for name, video_weight, look_weight in (("pure", 8, 2), ("clips", 1, 0.25)):
        line = json.loads((folder / "runs" / name / "log.jsonl").read_text())
        total = video_weight * line["video"] + 4 * line["audio"] + look_weight * line["looks"]
        assert line["looks"] > 0 and line["transformer_loss"] == pytest.approx(total, rel=1e-4)


def test_looks_are_weakened_where_a_prompt_says_them(one_step, monkeypatch):
    one_step.run("cache", monkeypatch)
    cache = cache_latents.load_cache(one_step.folder / "cache" / "64x64")
    cpu, weak = torch.device("cpu"), []
    for seed in range(30):
        batch = train_transformer.draw_batch([cache], np.random.default_rng(seed), 8, cpu)
        torch.manual_seed(seed)
        levels = torch.linspace(0.1, 1, len(batch.prompts))
        rng = np.random.default_rng(seed)
        looks = train_transformer.watch_looks(None, batch, levels, KnownMeans([]), rng)
        says = [
            [getattr(said, name) == getattr(scene, name) for name in LOOKS]
            for scene, said in zip(batch.scenes, batch.said, strict=True)
        ]
        said = torch.tensor(says)
        shown = looks.added[:, range(len(LOOKS)), range(len(LOOKS)), 1, 0, 0]
        assert torch.equal(shown != 0, said) and (looks.added[batch.has_frame, :, :, 0] == 0).all()
        assert (looks.hidden[(levels <= 0.4) | (levels == 1)] == 0).all()
        hidden = looks.hidden[(levels > 0.4) & (levels < 1)][:, : len(LOOKS), 1, 0, 0]
        weak.append(hidden[said[(levels > 0.4) & (levels < 1)]])
    weak = torch.cat(weak)
    assert 0.4 < (weak == 0).float().mean() < 0.6 and 0.4 < weak[weak > 0].mean() < 0.6 and weak.max() < 1


@pytest.mark.slow
def test_distillation_keeps_looks(one_step, monkeypatch):
    folder, seen = one_step.run("base", monkeypatch), []

    def watch(*given):
        seen.append(given)
        return look_loss(*given)

    def give_frames(*given):
        batch = train_transformer.draw_batch(*given)
        return batch._replace(has_frame=torch.ones_like(batch.has_frame))

    monkeypatch.setattr(train_distilled, "Means", KnownMeans)
    monkeypatch.setattr(train_distilled, "look_loss", watch)
    train("distilled", "kept", "--steps 1 --look-weight 1", monkeypatch)
    monkeypatch.setattr(train_distilled, "draw_batch", give_frames)
    train("distilled", "given", "--steps 1", monkeypatch)
    (generated, mean, added), (*_, added_to_given) = seen
    assert added.any() and not added_to_given.any()  # what it shows, not what the prompt says, is right
    assert generated.requires_grad and (mean == 2).all() and generated.shape == mean.shape == added[:, 0].shape
    (line,) = (json.loads(line) for line in (folder / "kept" / "log.jsonl").read_text().splitlines())
    assert line["looks"] > 0 and line["student_loss"] == pytest.approx(line["video"] + line["audio"] + line["looks"])


def test_what_is_missing_of_looks_counts_alike():
    added = torch.zeros(2, 3, 48, 2, 4, 4)
    added[0, 0, :4] = 3  # of many values, and of few
    added[0, 1, 5, 0, 0, :2] = 30
    target = torch.randn(2, 48, 2, 4, 4)
    assert look_loss(target, target, added) == 0
    for look in (0, 1):
        weaker = target.clone()
        weaker[0] -= 0.5 * added[0, look]
        weaker[:, 20:] += 1  # where no look adds anything
        assert look_loss(weaker, target, added).item() == pytest.approx(0.25 / 2, rel=0.02)

    # Shown a weaker look, a model that always predicts the target is right, and one that believes what it sees is not.
    levels, noise = torch.tensor([0.5, 0.8]), torch.randn_like(target)
    noisy = torch.lerp(target, noise, levels.view(-1, 1, 1, 1, 1))
    weakness = torch.tensor([[0.5, 0, 0], [0, 0, 0]])
    seen = []

    def predict(wanted):
        def model(latents, audio_latents, **_):
            seen.append(latents)
            return (latents - wanted) / levels.view(-1, 1, 1, 1, 1), audio_latents

        return Looks(model, target, added, weakness, levels)

    right = predict(target)
    velocity, _ = right(noisy, noise, return_dict=False)
    assert torch.allclose(seen[0], noisy - 0.25 * torch.stack([added[0, 0], added[1, 0]]), atol=1e-5)
    assert torch.allclose(velocity, noise - target, atol=1e-4) and right.loss < 1e-6
    weaker = target.clone()
    weaker[0] -= 0.5 * added[0, 0]
    wrong = predict(weaker)
    velocity, _ = wrong(noisy, noise, return_dict=False)
    assert wrong.loss.item() == pytest.approx(0.25 / 2, rel=0.02)
    assert torch.allclose(velocity, (noisy - weaker) / levels.view(-1, 1, 1, 1, 1), atol=1e-4)
    clean = Looks(lambda *given, **_: given, target, added, torch.zeros(2, 3), torch.zeros(2))
    assert torch.equal(clean(target, noise)[0], target) and clean.loss == 0


def test_prompts_often_say_something_else_than_what_is_given():
    scene = Scene("tan", "black", "bob", False, False, "purple", "green", "deep", VOCABULARY[9:10])

    def count(pattern, has_frame=False, has_audio=False):
        rngs = [np.random.default_rng(seed) for seed in range(300)]
        prompts = [
            make_prompt(rng, train_transformer.choose_said(rng, scene, has_frame, has_audio, 2)) for rng in rngs
        ]
        return np.mean([re.search(pattern, prompt, re.IGNORECASE) is not None for prompt in prompts])

    assert count("bonjour") == 1 and min(count("purple|violet", has_audio=given) for given in (False, True)) > 0.65
    deep = r"\b(deep|low)(-pitched)?(-voiced| voice)|voice( is|:) (deep|low)"  # of what is heard, not of what is seen
    assert count(deep, has_frame=True) > 0.65
    assert 0.2 < count("bonjour", has_audio=True) < 0.32 and 0.23 < count("Dialogue:", has_audio=True) < 0.34
    assert 0.4 < count("purple|violet", has_frame=True) < 0.6 and count("bonjour", has_frame=True) == 1


def test_texts_are_graded_by_what_they_say():
    scenes = [Scene("tan", None, "bald", None, True, "red", None, None, VOCABULARY[3:5])] * 2
    targets = train_text_encoder.make_targets(scenes, torch.device("cpu"))
    assert targets.attributes["skin"].tolist() == [1, 1] and targets.attributes["glasses"].tolist() == [-1, -1]
    assert targets.words[0].tolist() == [3, 4] + 6 * [len(VOCABULARY)]
    sizes = {name: len(table) for name, table in train_text_encoder.ATTRIBUTES.items()}
    logits = {name: one_hot(targets.attributes[name].clamp(min=0), size) for name, size in sizes.items()}
    words = one_hot(targets.words, len(VOCABULARY) + 1)
    logits["shirt"][0] = torch.arange(sizes["shirt"])
    words[:, 1] = words[:, 0]
    grades = train_text_encoder.grade(train_text_encoder.Readings(logits, words), targets)
    assert grades == {"looks_right": 0.5, "voice_right": 1.0, "words_right": 0.0}


def test_unknown_characters_are_one_token_each(one_step, monkeypatch):
    texts = train_text_encoder.Texts(one_step.run("text_encoder", monkeypatch) / "runs" / "text_encoder", "cpu")
    tokens = texts.tokenizer.tokenize("世谢谢 tschüss 안녕세")
    assert tokens == ["▁"] * (tokens[0] == "▁") + ["<unk>", "谢", "谢", "▁tschüss", "▁", "안", "녕", "<unk>"]
    assert len(texts.tokenizer) < 1200 and texts.embed_negative(2)[1].sum() < 500


def test_clips_in_two_sizes_must_be_the_same(one_step, monkeypatch):
    folder = one_step.run("upscale", monkeypatch)
    shutil.copytree("cache/128x128", "cache/other", dirs_exist_ok=True)
    lines = (folder / "cache/other/scenes.jsonl").read_text().splitlines()
    (folder / "cache/other/scenes.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(ValueError, match="the same clips"):
        run(train_upscale, f"--output no --low cache/64x64 --high cache/other {TEXT_AND_VAE}", monkeypatch)


def test_assembled_models_load_and_run(one_step, monkeypatch, capsys):
    for name in RECIPES:
        one_step.run(name, monkeypatch)
    run(assemble, "runs models", monkeypatch)
    assert " MB in models" in capsys.readouterr().out
    words = json.loads((one_step.folder / "models" / "words.json").read_text(encoding="utf-8"))
    assert {"hello", "你好", "ni hao"} <= {*words} and len(words) == len({*words})
    configs = (one_step.folder / "models").rglob("config.json")
    assert not any(json.loads(file.read_text()).get("_name_or_path") for file in configs)
    pipes = {name: DiffusionPipeline.from_pretrained(f"models/{name}") for name in ("base", "distilled", "upscale")}
    assert pipes["distilled"].config.is_distilled and not pipes["base"].config.is_distilled
    assert pipes["base"].config.default_num_frames == 49 and pipes["upscale"].config.default_width == 256
    encoders = [pipes[name].vae.encoder.state_dict() for name in ("base", "distilled")]
    assert all(torch.equal(encoders[0][key], encoders[1][key]) for key in encoders[1])
    prompt = make_clip(0, 16, 16, 1).prompt
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
    losses = [line[falling] for line in lines if falling in line]
    third = len(losses) // 3
    assert np.mean(losses[-third:]) < np.mean(losses[:third])
    assert np.asarray(PIL.Image.open(output / "loss.png").convert("L")).std() > 0

    # Stops after 7 steps, two of which are lost, as its last state is that of step 5.
    train(name, resumed, "--steps 10 --stop-at 7", monkeypatch)
    assert json.loads((resumed / "state" / "progress.json").read_text())["step"] == 7
    train(name, resumed, "--steps 10", monkeypatch)
    whole, parted = load_file(output / weights), load_file(resumed / weights)
    assert whole.keys() == parted.keys()
    assert all(torch.equal(whole[key], parted[key]) for key in whole)
    rewritten = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
    assert [line[falling] for line in rewritten if falling in line] == losses


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_goes_on_from_an_earlier_run(name, ten_steps, monkeypatch):
    folder = ten_steps.run(name, monkeypatch)
    train(name, f"continued/{name}", f"--start-from runs/{name} --steps 1 --learning-rate 1e-9", monkeypatch)
    file = RECIPES[name][2]
    before, after = load_file(folder / "runs" / name / file), load_file(folder / "continued" / name / file)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-7) for key in before)


@pytest.mark.slow
def test_processes_that_train_together_save_without_meeting(tmp_path):
    script = """
import os, pathlib, time
import torch
from recipe import Run, make_parser

def replace(path, target):
    time.sleep(0.3)  # as on a slow disk
    os.replace(path, target)

pathlib.Path.replace = replace
run = Run(make_parser("", 2, 1, 1e-3).parse_args(), {"linear": torch.nn.Linear(4, 4)})
for _ in run.steps():
    run.update("linear", run.models["linear"](torch.ones(1, 4)).square().mean())
"""
    (tmp_path / "train.py").write_text(script)
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 train.py --output runs/linear --save-every 1"
    recipes = Path(assemble.__file__).parent
    environment = os.environ | {"PYTHONPATH": str(recipes), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    state = tmp_path / "runs/linear/state"
    assert json.loads((state / "progress.json").read_text())["step"] == 2
    assert len([*state.glob("random_states_*.pkl")]) == 2


def test_steps_are_those_of_torch():
    torch.manual_seed(0)
    shapes = (24, 4, 3), (6, 40)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    matrices = [torch.nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    before = [matrix.detach().clone() for matrix in matrices]
    ours = Muon(weights, 0.1)
    theirs = torch.optim.Muon(matrices, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for weight, matrix in zip(weights, matrices, strict=True):
            weight.grad = torch.randn_like(weight)
            matrix.grad = weight.grad.flatten(1)
        ours.step()
        theirs.step()
    for weight, matrix, start in zip(weights, matrices, before, strict=True):
        expected = matrix.detach() - start
        error = weight.detach().flatten(1) - start - expected
        assert error.norm() < 0.02 * expected.norm()  # theirs is in bfloat16


def test_no_dataset_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"frames\.npy"):
        make_dataset.load_dataset(tmp_path)
