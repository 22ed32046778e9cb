"""The models in the package: they load, do what prompts, pictures and voices say, and repeat themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import make_scene
from diffusers import DiffusionPipeline
from evaluate import READERS, Shown, Wish, to_bytes, to_voice
from recognise import Readers, correlate, edit_distance, heard
from words import SAMPLING_RATE, VOCABULARY

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
def readers():
    return Readers.load(READERS)


@pytest.fixture(scope="module")
def wishes():
    seeds = (5, 6, 7, 1)  # whose people speak
    return [Wish(seed, make_scene(np.random.default_rng([seed, True]), 49 / 25, held_out=True)) for seed in seeds]


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, prompt, seed=0, **kwargs):
    output = pipe(prompt, generator=torch.Generator().manual_seed(seed), **kwargs)
    frames = to_bytes(output.frames[0])
    return Shown(frames, to_voice(output.audio[0], len(frames)))


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
        ('She says: "Ma mi, HELLO thank you".', ""),
        ("A speaker with red hair.", ""),
        ('“Ciao ma, don\'t!” and "mo ciao"', "knows ma, mo, and passes over Ciao, don't, ciao"),
        ('"Mama mo"', "knows mo, and passes over Mama"),
        ('<Anna, English>: "Thanks"', "knows no word, and passes over Thanks"),
        ('"你好谢谢, xie xie, ありがとう"', ""),
    ],
)
def test_says_which_words_of_a_line_it_knows(prompt, told):
    line = describe_line(embedded_model(), prompt)
    assert told in line if told else line == ""
    assert describe_line("owner/model", prompt) == ""


def test_every_word_of_the_vocabulary_is_known():
    line = ", ".join(text for word in VOCABULARY for text in (word.spelling, word.romanised))
    assert describe_line(embedded_model(), f'"{line}"') == ""


def test_words_without_spaces_between_them_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "embedded_model", lambda name: str(tmp_path / name))
    (tmp_path / "words.json").write_text(json.dumps(["に", "你", "こんにちは", "你好", "谢谢"]), encoding="utf-8")
    assert describe_line(str(tmp_path / "base"), '"こんにちは" and "你 好谢谢！"') == ""
    told = describe_line(str(tmp_path / "base"), format_prompt("A man.", [("He", "Mandarin", "你好世界")]))
    assert told == "Of the line, the tiny model knows 你 好, and passes over 世, 界."


def test_command_says_which_words_it_passes_over(tmp_path, capsys):
    options = ["--model", "tiny", "--steps", "1", "--height", "32", "--width", "32", "--num-frames", "5", "-o"]
    assert main(["generate", 'She says: "hello world".', *options, str(tmp_path / "clip.mp4")]) == 0
    note = "magihuman: Of the line, the tiny model knows hello, and passes over world."
    assert note in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3))])
def test_does_what_the_prompt_says(number, wishes, readers, pipe):
    wish = wishes[number]
    frames, voice = run(pipe, wish.prompt())
    assert frames.shape == (49, 128, 128, 3)
    look = readers.looks.read(frames).look
    assert (look["shirt"], look["wall"]) == (wish.scene.shirt, wish.scene.wall)
    words, said = readers.words.read(voice)
    assert said == wish.scene.voice
    assert edit_distance(words, heard(wish.scene.words)) <= len(wish.scene.words) / 2


@pytest.mark.slow
def test_same_seed_same_bytes(wishes, pipe):
    first, second, other = (run(pipe, wishes[0].prompt(), seed) for seed in (5, 5, 6))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    assert first.frames.tobytes() != other.frames.tobytes()


@pytest.mark.slow
def test_follows_a_picture(wishes, readers, pipe):
    wish = wishes[3]
    image = wish.drawing(wish.speech()).frames[0].astype(np.float32) / 255
    frames, _ = run(pipe, wish.prompt(), image=image)
    seen = readers.looks.read(frames).look
    assert (seen["shirt"], seen["wall"], seen["skin"]) == (wish.scene.shirt, wish.scene.wall, wish.scene.skin)

    def error(frame):
        return np.square(frame / 255.0 - image).mean()

    without, _ = run(pipe, wish.prompt())
    assert error(frames[0]) < 0.3 * error(without[0])


def test_follows_a_voice(wishes, readers, pipe):
    wish = wishes[1]
    speech = wish.speech()
    frames, voice = run(pipe, wish.prompt(), audio=(torch.from_numpy(speech.voice), SAMPLING_RATE))
    seen = readers.looks.read(frames)
    assert readers.words.read(voice) == (heard(wish.scene.words), wish.scene.voice)
    assert seen.look["shirt"] == wish.scene.shirt
    assert correlate(seen.opening, speech.mouth[:, 1]) > 0.5


@pytest.mark.slow
def test_follows_a_picture_that_the_prompt_contradicts(wishes, readers, pipe):
    wish, other = wishes[3], wishes[0]
    assert wish.scene.shirt != other.scene.shirt and wish.scene.wall != other.scene.wall
    image = wish.drawing(wish.speech()).frames[0].astype(np.float32) / 255
    seen = readers.looks.read(run(pipe, other.prompt(), image=image).frames).look
    assert (seen["shirt"], seen["wall"]) == (wish.scene.shirt, wish.scene.wall)


@pytest.mark.slow
def test_follows_a_voice_that_the_prompt_contradicts(wishes, readers, pipe):
    wish, other = wishes[0].speech(), wishes[1].speech()
    frames, _ = run(pipe, wishes[0].prompt(), audio=(torch.from_numpy(other.voice), SAMPLING_RATE))
    opening = readers.looks.read(frames).opening
    said, heard = (correlate(opening, each.mouth[:, 1]) for each in (wish, other))
    assert heard > 0.5 and heard > said


@pytest.mark.slow
def test_command_without_a_model(wishes, readers, tmp_path, capsys):
    wish, file = wishes[0], tmp_path / "hello.mp4"
    assert main(["generate", wish.prompt(), "-o", str(file), "--seed", "0"]) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.startswith("magihuman:")] == [
        "magihuman: no --model is given, so the package's tiny one draws people who say a few words of seven languages"
    ]
    frames, rate = read_video(file)
    assert frames.shape == (49, 128, 128, 3) and rate == 25
    assert readers.looks.read(frames).look["shirt"] == wish.scene.shirt
    voice = load_audio(str(file), 44100)
    assert voice.shape[1] >= 49 * 1764
    assert readers.words.read(to_voice(voice[:, : 49 * 1764].numpy(), 49))[1] == wish.scene.voice
