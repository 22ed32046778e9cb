# SPDX-License-Identifier: Apache-2.0
"""The world that the embedded model is trained on: what a clip shows and says is what its prompt names."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import world
from world import (
    FRAME_RATE,
    SAMPLING_RATE,
    Scene,
    leave_out,
    make_clip,
    make_prompt,
    make_scene,
    make_voice,
    mouth_track,
)

SCENE = Scene("tan", "black", "short", False, "blue", "grey", "medium", ("ma", "mi", "mu"))
STILL = np.array([0.0, 0.0, 1.0])
SHUT = np.array(world.CLOSED.mouth)


def pixel(frame, x, y):
    size = len(frame)
    return tuple(frame[int(y * size), int(x * size)].tolist())


def test_same_seed_gives_the_same_clip():
    first, second, other = make_clip(3), make_clip(3), make_clip(4)
    assert first.prompt == second.prompt and first.scene == second.scene
    assert np.array_equal(first.frames, second.frames) and np.array_equal(first.voice, second.voice)
    assert not np.array_equal(first.frames, other.frames) and not np.array_equal(first.voice, other.voice)


def test_shapes_and_ranges():
    clip = make_clip(0)
    assert clip.frames.shape == (49, 128, 128, 3) and clip.frames.dtype == np.uint8
    assert clip.voice.shape == (49 * 2048,) and clip.voice.dtype == np.float32
    assert 0.3 < np.abs(clip.voice).max() <= 1
    assert clip.mouth.shape == (49, 2)
    assert 49 * SAMPLING_RATE // FRAME_RATE == 49 * 2048
    short = make_clip(0, num_frames=25)
    assert len(short.frames) == 25 and len(short.voice) == SAMPLING_RATE


def test_sizes_show_the_same_moments():
    small, large = make_clip(5, size=128), make_clip(5, size=256)
    assert small.prompt == large.prompt and np.array_equal(small.voice, large.voice)
    reduced = [
        np.asarray(PIL.Image.fromarray(frame).resize((128, 128), PIL.Image.Resampling.BOX)) for frame in large.frames
    ]
    assert np.abs(np.stack(reduced).astype(int) - small.frames).mean() < 1.5


def test_held_out_combinations_are_never_drawn_for_training():
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, held_out) for held_out in (False, True) for _ in range(500)]
    assert [scene.is_held_out for scene in scenes] == [False] * 500 + [True] * 500
    # The syllables do not matter to it, everything else does; every value of everything is in both parts.
    assert all(replace(scene, syllables=("mi",) * 3).is_held_out == scene.is_held_out for scene in scenes)
    for part in (scenes[:500], scenes[500:]):
        for field, table in (
            ("skin", world.SKIN),
            ("hair_colour", world.HAIR_COLOUR),
            ("hair_length", world.HAIR_LENGTH),
            ("glasses", world.GLASSES),
            ("shirt", world.SHIRT),
            ("background", world.BACKGROUND),
            ("voice", world.VOICE),
        ):
            assert {getattr(scene, field) for scene in part} == set(table)
        assert {len(scene.syllables) for scene in part} == {3, 4, 5}
        assert set(itertools.chain(*(scene.syllables for scene in part))) == set(world.SYLLABLES)

    tables = (
        world.SKIN,
        world.HAIR_COLOUR,
        world.HAIR_LENGTH,
        world.GLASSES,
        world.SHIRT,
        world.BACKGROUND,
        world.VOICE,
    )
    everything = [Scene(*values, ("ma",) * 3) for values in itertools.product(*tables)]
    assert len(everything) == 3600
    assert sum(scene.is_held_out for scene in everything) == pytest.approx(720, abs=72)


def test_prompts_have_three_parts_many_wordings_and_every_fact():
    rng = np.random.default_rng(0)
    prompts = {make_prompt(SCENE, rng) for _ in range(200)}
    assert len(prompts) > 150
    for prompt in prompts:
        description, dialogue, sound = prompt.split("\n\n")
        assert dialogue.startswith("Dialogue:\n<") and dialogue.endswith('>: "ma mi mu"')
        assert sound.startswith("Background Sound:\n<") and sound.endswith(">")
        facts = ("tan", "black", "short", "blue", "grey", "medium voice", '"ma mi mu"', "glasses")
        assert all(fact in description for fact in facts)
        assert "without" in description or "no glasses" in description
    with_glasses = {make_prompt(replace(SCENE, glasses=True), rng) for _ in range(50)}
    assert not any("without" in prompt or "no glasses" in prompt for prompt in with_glasses)


def test_prompts_may_leave_things_out():
    rng = np.random.default_rng(0)
    said = [leave_out(SCENE, rng) for _ in range(200)]
    assert 80 < said.count(SCENE) < 140
    for name in ("skin", "hair_colour", "hair_length", "glasses", "shirt", "background", "voice"):
        assert 25 < sum(getattr(scene, name) is None for scene in said) < 75
    for scene in said:
        prompt = make_prompt(scene, rng, parts=False)
        assert "None" not in prompt and "  " not in prompt and "\n" not in prompt
        assert '"ma mi mu"' in prompt
        for word in ("tan", "black", "short", "blue", "grey", "medium"):
            spoken = [value for value in (scene.skin, scene.hair_colour, scene.hair_length, scene.shirt) if value]
            spoken += [value for value in (scene.background, scene.voice) if value]
            assert (word in prompt.replace("Medium", "")) == (word in spoken)
        assert ("glasses" in prompt) == (scene.glasses is not None)


@pytest.mark.parametrize("size", [128, 256])
def test_pictures_show_what_the_scene_says(size):
    for background, colour in world.BACKGROUND.items():
        frame = world.draw_frame(replace(SCENE, background=background), STILL, SHUT, size)
        assert pixel(frame, 0.04, 0.04) == pixel(frame, 0.96, 0.3) == colour
    for shirt, colour in world.SHIRT.items():
        assert pixel(world.draw_frame(replace(SCENE, shirt=shirt), STILL, SHUT, size), 0.5, 0.97) == colour
    for skin, colour in world.SKIN.items():
        assert pixel(world.draw_frame(replace(SCENE, skin=skin), STILL, SHUT, size), 0.5, 0.33) == colour
    for hair, colour in world.HAIR_COLOUR.items():
        scene = replace(SCENE, hair_colour=hair)
        assert pixel(world.draw_frame(scene, STILL, SHUT, size), 0.5, 0.17) == colour
        long = world.draw_frame(replace(scene, hair_length="long"), STILL, SHUT, size)
        assert pixel(long, 0.28, 0.6) == colour
        assert pixel(world.draw_frame(scene, STILL, SHUT, size), 0.28, 0.6) == world.BACKGROUND["grey"]
    bare, worn = (world.draw_frame(replace(SCENE, glasses=glasses), STILL, SHUT, size) for glasses in world.GLASSES)
    assert max(pixel(worn, 0.5, 0.42)) < 40 < min(pixel(bare, 0.5, 0.42))


def test_mouth_is_that_of_the_syllables():
    num_frames = 490  # ten times as many as usual, to see the shapes themselves
    times = np.arange(num_frames) / num_frames * 1.96
    for syllables in itertools.permutations(world.SYLLABLES, 3):
        track = mouth_track(replace(SCENE, syllables=syllables), times, 1.96)
        slot = (1.96 - 0.35) / 3
        for index, name in enumerate(syllables):
            middle = np.argmin(np.abs(times - (0.2 + (index + 0.6) * slot)))
            np.testing.assert_allclose(track[middle], world.SYLLABLES[name].mouth)
            start = np.argmin(np.abs(times - (0.2 + (index + 0.05) * slot)))
            np.testing.assert_allclose(track[start], SHUT, atol=0.01)
        np.testing.assert_allclose(track[[0, -1]], [SHUT, SHUT], atol=1e-9)

    opened, shut = (world.draw_frame(SCENE, STILL, np.array(shape), 128) for shape in ((0.15, 0.15), SHUT))
    assert np.abs(opened.astype(int) - shut).max() > 100
    changed = np.argwhere(np.abs(opened.astype(int) - shut).max(axis=2) > 20) / 128
    assert changed.min(axis=0)[0] > 0.45 and changed.max(axis=0)[0] < 0.68  # nothing but the mouth


def spectrum(voice, start, end):
    part = voice[int(start * SAMPLING_RATE) : int(end * SAMPLING_RATE)]
    power = np.abs(np.fft.rfft(part * np.hanning(len(part)))) ** 2
    return np.fft.rfftfreq(len(part), 1 / SAMPLING_RATE), power


@pytest.mark.parametrize("voice", world.VOICE)
def test_voice_has_the_pitch_and_the_formants(voice):
    pitch, scale = world.VOICE[voice]
    slot = (1.96 - 0.35) / 3
    for syllables in (("ma", "mi", "mu"), ("me", "mo", "ma")):
        sound = make_voice(replace(SCENE, voice=voice, syllables=syllables), np.random.default_rng(0), 49)
        assert not sound[: int(0.19 * SAMPLING_RATE)].any() and not sound[-int(0.14 * SAMPLING_RATE) :].any()
        for index, name in enumerate(syllables):
            start = 0.2 + (index + 0.45) * slot
            frequencies, power = spectrum(sound, start, start + 0.35 * slot)
            shortest, longest = SAMPLING_RATE // 350, SAMPLING_RATE // 70
            period = shortest + np.fft.irfft(power)[shortest:longest].argmax()
            assert SAMPLING_RATE / period == pytest.approx(pitch, rel=0.15)
            formant = scale * world.SYLLABLES[name].formants[0]
            low = frequencies < 1.35 * formant
            centroid = (frequencies * power)[low].sum() / power[low].sum()
            assert abs(centroid - formant) < 0.15 * formant + 0.3 * pitch  # it sits on harmonics


def test_pitch_glides():
    sound = make_voice(replace(SCENE, syllables=("ma",) * 3), np.random.default_rng(1), 49)
    pitches = []
    for start in (0.45, 0.95, 1.5):
        frequencies, power = spectrum(sound, start, start + 0.2)
        near = (frequencies > 120) & (frequencies < 220)
        pitches.append((frequencies * power)[near].sum() / power[near].sum())
    assert max(pitches) - min(pitches) > 0.01 * np.mean(pitches)


def test_contact_sheet(tmp_path):
    command = [sys.executable, str(Path(world.__file__)), str(tmp_path / "sheet.png"), "--seeds", "2", "--size", "64"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(output.splitlines()) == 2
    assert PIL.Image.open(tmp_path / "sheet.png").size == (9 * 64, 2 * 64)
    sound, rate = soundfile.read(tmp_path / "sheet.wav")
    assert rate == SAMPLING_RATE and len(sound) == 2 * 49 * 2048
