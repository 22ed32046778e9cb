"""The console command, with the real inputs where they lie beside the checkout and stand-ins elsewhere."""

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
from conftest import PROMPT
from test_media import peak_frequency, read_header, read_sound, read_video

from diffusers_magihuman.cli import main


SHARED = Path(__file__).parents[2] / "shared" / "inputs"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Prompt, portrait and speech."""
    if SHARED.is_dir():
        return (SHARED / "prompt_en.txt").read_text(), SHARED / "portrait.png", SHARED / "speech.wav"
    folder = tmp_path_factory.mktemp("inputs")
    PIL.Image.fromarray(np.arange(96 * 80 * 3, dtype=np.uint8).reshape(96, 80, 3)).save(folder / "portrait.png")
    soundfile.write(folder / "speech.wav", 0.3 * np.sin(2 * np.pi * 220 * np.arange(44100) / 22050), 22050)
    return PROMPT * 10, folder / "portrait.png", folder / "speech.wav"


def generate(model, prompt, output, *options):
    size = ["--height", "64", "--width", "96", "--steps", "2", "--seed", "0"]
    return main(["generate", prompt, "--model", str(model), "--output", str(output), *size, *map(str, options)])


@pytest.mark.parametrize("mode", ["text", "image", "audio", "image and audio"])
def test_generate_writes_a_video_that_plays(mode, inputs, tiny_pipeline_dir, tmp_path, capsys):
    prompt, portrait, speech = inputs
    options = ["--seconds", "1"] + ["--image", portrait] * ("image" in mode) + ["--audio", speech] * ("audio" in mode)
    assert generate(tiny_pipeline_dir, prompt, tmp_path / "out.mp4", *options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out.mp4")

    header = read_header(tmp_path / "out.mp4")
    assert re.search(r"Video: h264 .*yuv420p.* 96x64.* 25 fps", header)
    assert re.search(r"Audio: aac .* 44100 Hz, stereo", header)
    video, sound = read_video(tmp_path / "out.mp4", 64, 96), read_sound(tmp_path / "out.mp4")
    assert len(video) == 25
    assert abs(len(sound) / 44100 - len(video) / 25) <= 1 / 25
    assert np.isfinite(sound).all() and sound.std() > 1e-4 and video.std() > 1


def test_generate_takes_the_length_of_the_audio(tiny_pipeline_dir, tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(13000) / 44100)
    soundfile.write(tmp_path / "tone.wav", tone, 44100)
    assert peak_frequency(tone, 44100) == pytest.approx(220, abs=4)
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "out.mp4", "--audio", tmp_path / "tone.wav") == 0
    assert len(read_video(tmp_path / "out.mp4", 64, 96)) == 5  # 7 latents of sound, 1 + 4 frames


def test_same_seed_gives_the_same_file(tiny_pipeline_dir, tmp_path):
    for name in ("a", "b"):
        assert generate(tiny_pipeline_dir, PROMPT, tmp_path / f"{name}.mp4", "--num-frames", 5) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([" "], "argument PROMPT: must not be empty"),
        (["a", "--height", "50"], "argument --height: 50 must be a multiple of 32"),
        (["a", "--width", "x"], "argument --width: 'x' must be an integer of 1 or more"),
        (["a", "--num-frames", "0"], "argument --num-frames: '0' must be an integer of 1 or more"),
        (["a", "--seconds", "-1"], "argument --seconds: '-1' must be a positive number"),
        (["a", "--seconds", "1", "--num-frames", "5"], "argument --num-frames: not allowed with argument --seconds"),
        (["a", "--steps", "0"], "argument --steps: '0' must be an integer of 1 or more"),
        (["a", "--device", "tpu0"], "argument --device: 'tpu0' is not a device of torch"),
        (["a", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["a", "--image", "missing.png"], "`image` is 'missing.png', which cannot be read as an image"),
        (["a", "--audio", "missing.wav"], "`audio` is 'missing.wav', but there is no such file"),
        (["a", "-o", "missing/out.mp4"], "`path` is 'missing/out.mp4', but the directory"),
        (["a", "-o", "out.gif"], "`path` is 'out.gif', it must end in '.mp4'"),
        (["a"], "missing-model"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = main(["generate", "--model", "./missing-model", *arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and not captured.out
    assert message in captured.err and len(captured.err.splitlines()) == 1


def test_no_model_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a"])
    assert capsys.readouterr().err == "magihuman generate: error: the following arguments are required: --model\n"
