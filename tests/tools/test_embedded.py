"""The models in the package: they load, do what prompts, pictures and voices say, and repeat themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from diffusers import DiffusionPipeline
from world_recognise import measure_mouth, measure_pitch, recognise_look, recognise_voice, to_voice

import diffusers_magihuman
from diffusers_magihuman import (
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
    embedded_model,
    format_prompt,
    load_audio,
)
from diffusers_magihuman.conversion import check_variant, variant_config
from diffusers_magihuman.media import read_video
from diffusers_magihuman.tools import embedded
from diffusers_magihuman.tools.cli import main
from diffusers_magihuman.tools.embedded import (
    EMBEDDED_MODELS,
    TINY_NAMES,
    TINY_UPSCALE_NAMES,
    describe_line,
    find_model,
)
from diffusers_magihuman.tools.hub import make_model_card


@pytest.fixture(scope="module")
def clips():
    return [world.make_clip(seed, size=16, held_out=True) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, prompt, seed=0, **kwargs):
    output = pipe(prompt, generator=torch.Generator().manual_seed(seed), **kwargs)
    return np.round(output.frames[0] * 255).astype(np.uint8), to_voice(output.audio[0])


def test_size_of_the_weights():
    folder = Path(diffusers_magihuman.__file__).parent / "embedded_models"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 30_000_000
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_loads_by_name(name):
    folder = Path(embedded_model(name))
    assert folder.parent == Path(diffusers_magihuman.__file__).parent / "embedded_models"
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is (MagiHumanLatentUpscalePipeline if name == "upscale" else MagiHumanAudioVideoPipeline)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.audio_vae.dtype == torch.float32


def test_unknown_name():
    for name in ("turbo", None, 3, ["base"]):
        with pytest.raises(ValueError, match="`name`="):
            embedded_model(name)


@pytest.mark.parametrize("old, name", [("distill", "distilled"), ("sr_540p", "sr-540p"), ("turbo_vae", "turbo-vae")])
def test_one_thing_has_one_spelling_and_an_old_one(old, name):
    assert make_model_card(old) == make_model_card(name)
    if name != "turbo-vae":
        assert check_variant(old) == check_variant(name) == name
        assert variant_config(old, 40) == variant_config(name, 40)
    if name == "distilled":
        assert embedded_model(old) == embedded_model(name) == embedded_model()


def test_names_that_commands_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = (
        ("tiny", TINY_NAMES, "distilled"),
        ("tiny-base", TINY_NAMES, "base"),
        ("tiny", TINY_UPSCALE_NAMES, "upscale"),
    )
    assert all(find_model("--model", name, allowed) == embedded_model(model) for name, allowed, model in names)
    assert find_model("--model", "owner/tiny", {}) == "owner/tiny"
    (tmp_path / "tiny").mkdir()
    assert find_model("--model", "tiny", TINY_NAMES) == "tiny"
    with pytest.raises(OSError, match=r"--upscale 'tiny-base' is neither .* nor 'tiny'"):
        find_model("--upscale", "tiny-base", TINY_UPSCALE_NAMES)


@pytest.mark.parametrize(
    "prompt, told",
    [
        ('She says: "Ma mi, MU".', ""),
        ("A speaker with red hair.", ""),
        ('“Hello ma, don\'t!” and "mo hello"', "knows ma, mo, and passes over Hello, don't, hello"),
        ('"Mama mo"', "knows mo, and passes over Mama"),
        ('<Anna, English>: "Thanks"', "knows no word, and passes over Thanks"),
    ],
)
def test_says_which_words_of_a_line_it_knows(prompt, told):
    line = describe_line(embedded_model(), prompt)
    assert told in line if told else line == ""
    assert describe_line("owner/model", prompt) == ""


def test_words_without_spaces_between_them_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "embedded_model", lambda name: str(tmp_path / name))
    (tmp_path / "words.json").write_text(json.dumps(["に", "你", "こんにちは", "你好", "谢谢"]), encoding="utf-8")
    assert describe_line(str(tmp_path / "base"), '"こんにちは" and "你 好谢谢！"') == ""
    told = describe_line(str(tmp_path / "base"), format_prompt("A man.", [("He", "Mandarin", "你好世界")]))
    assert told == "Of the line, the tiny model knows 你 好, and passes over 世, 界."


def test_command_says_which_words_it_passes_over(tmp_path, capsys):
    options = ["--model", "tiny", "--steps", "1", "--height", "32", "--width", "32", "--num-frames", "5", "-o"]
    assert main(["generate", 'She says: "hello ma".', *options, str(tmp_path / "clip.mp4")]) == 0
    note = "magihuman: Of the line, the tiny model knows ma, and passes over hello."
    assert note in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2))])
def test_does_what_the_prompt_says(number, clips, pipe):
    clip = clips[number]
    frames, voice = run(pipe, clip.prompt)
    assert frames.shape == (49, 128, 128, 3)
    look = recognise_look(frames)
    assert (look["shirt"], look["background"]) == (clip.scene.shirt, clip.scene.background)
    assert recognise_voice(voice) == clip.scene.voice


@pytest.mark.slow
def test_same_seed_same_bytes(clips, pipe):
    first, second, other = (run(pipe, clips[0].prompt, seed) for seed in (5, 5, 6))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    assert first[0].tobytes() != other[0].tobytes()


@pytest.mark.slow
def test_follows_a_picture(pipe):
    clip = world.make_clip(4, held_out=True)
    image = clip.frames[0].astype(np.float32) / 255
    frames, _ = run(pipe, clip.prompt, image=image)
    seen = recognise_look(frames)
    assert seen == {name: getattr(clip.scene, name) for name in seen}

    # What the autoencoder makes of the picture is as near as a video can come.
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.video_processor.preprocess(image).unsqueeze(2)).latent_dist.mode()
        decoded = pipe.vae.decode(latents).sample[0, :, 0].permute(1, 2, 0).numpy() * 127.5 + 127.5

    def error(frame):
        return np.square(frame.astype(float) - decoded).mean()

    without, _ = run(pipe, clip.prompt)
    assert error(frames[0]) < 0.3 * error(without[0])


def test_follows_a_voice(clips, pipe):
    clip = clips[1]
    frames, voice = run(pipe, clip.prompt, audio=(torch.from_numpy(clip.voice), world.SAMPLING_RATE))
    assert measure_pitch(voice) == pytest.approx(measure_pitch(clip.voice), rel=0.02)
    assert recognise_look(frames)["shirt"] == clip.scene.shirt
    assert np.corrcoef(measure_mouth(frames), clip.mouth[:, 1])[0, 1] > 0.5


@pytest.mark.slow
def test_follows_a_picture_that_the_prompt_contradicts(pipe):
    clip, other = (world.make_clip(seed, held_out=True) for seed in (4, 5))
    assert clip.scene.shirt != other.scene.shirt and clip.scene.background != other.scene.background
    frames, _ = run(pipe, other.prompt, image=clip.frames[0].astype(np.float32) / 255)
    seen = recognise_look(frames)
    assert (seen["shirt"], seen["background"]) == (clip.scene.shirt, clip.scene.background)


@pytest.mark.slow
def test_follows_a_voice_that_the_prompt_contradicts(clips, pipe):
    clip, other = clips[:2]
    frames, _ = run(pipe, clip.prompt, audio=(torch.from_numpy(other.voice), world.SAMPLING_RATE))
    said, heard = (np.corrcoef(measure_mouth(frames), each.mouth[:, 1])[0, 1] for each in (clip, other))
    assert heard > 0.5 and heard > said


@pytest.mark.slow
def test_command_without_a_model(clips, tmp_path, capsys):
    clip, file = clips[0], tmp_path / "hello.mp4"
    assert main(["generate", clip.prompt, "-o", str(file), "--seed", "0"]) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.startswith("magihuman:")] == [
        "magihuman: no --model is given, so the package's tiny one draws heads that say ma, me, mi, mo and mu"
    ]
    frames, rate = read_video(file)
    assert frames.shape == (49, 128, 128, 3) and rate == 25
    assert recognise_look(frames)["shirt"] == clip.scene.shirt
    voice = load_audio(str(file), 44100)
    assert voice.shape[1] >= 49 * 1764
    assert recognise_voice(to_voice(voice[:, : 49 * 1764].numpy())) == clip.scene.voice
