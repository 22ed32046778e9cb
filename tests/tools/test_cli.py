"""The console command on tiny pipelines."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import soundfile
from helpers import PROMPT, peak_frequency, read_frames, read_header, read_sound

from diffusers_magihuman import export_to_mp4
from diffusers_magihuman.tools.cli import main
from diffusers_magihuman.tools.hub import make_model_card


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files of an image and of two seconds of a tone."""
    folder = tmp_path_factory.mktemp("inputs")
    PIL.Image.fromarray(np.arange(96 * 80 * 3, dtype=np.uint8).reshape(96, 80, 3)).save(folder / "portrait.png")
    soundfile.write(folder / "speech.wav", 0.3 * np.sin(2 * np.pi * 220 * np.arange(44100) / 22050), 22050)
    return folder / "portrait.png", folder / "speech.wav"


def generate(model, prompt, output, *options):
    size = ["--height", "64", "--width", "96", "--steps", "2", "--seed", "0"]
    return main(["generate", prompt, "--model", str(model), "--output", str(output), *size, *map(str, options)])


def test_generate_by_a_model_that_was_converted(tiny_pipeline_dir, tmp_path):
    """`convert` writes no default size for the base and the distilled model, whose class has them."""
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline_dir, model)
    index = json.loads((model / "model_index.json").read_text())
    index = {name: value for name, value in index.items() if not name.startswith("default_")}
    (model / "model_index.json").write_text(json.dumps(index))
    command = ["generate", PROMPT, "--model", str(model), "-o", str(tmp_path / "out.mp4")]
    assert main([*command, "--num-frames", "1", "--steps", "1"]) == 0
    assert read_frames(tmp_path / "out.mp4", 256, 448).shape[0] == 1


@pytest.mark.parametrize("mode", ["text", "image and audio"])
def test_generate_writes_a_video_that_plays(mode, inputs, tiny_pipeline_dir, tmp_path, capsys):
    portrait, speech = inputs
    options = ["--seconds", "1"] + ["--image", portrait] * ("image" in mode) + ["--audio", speech] * ("audio" in mode)
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "out.mp4", *options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out.mp4")

    header = read_header(tmp_path / "out.mp4")
    assert re.search(r"Video: h264 .*yuv420p.* 96x64.* 25 fps", header)
    assert re.search(r"Audio: aac .* 44100 Hz, stereo", header)
    video, sound = read_frames(tmp_path / "out.mp4", 64, 96), read_sound(tmp_path / "out.mp4")
    assert len(video) == 25
    assert abs(len(sound) / 44100 - len(video) / 25) <= 1 / 25
    assert np.isfinite(sound).all() and sound.std() > 1e-4 and video.std() > 1


def test_generate_takes_the_length_of_the_audio(tiny_pipeline_dir, tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(13000) / 44100)
    soundfile.write(tmp_path / "tone.wav", tone, 44100)
    assert peak_frequency(tone, 44100) == pytest.approx(220, abs=4)
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "out.mp4", "--audio", tmp_path / "tone.wav") == 0
    assert len(read_frames(tmp_path / "out.mp4", 64, 96)) == 5  # 7 latents of sound, 1 + 4 frames


def test_same_seed_gives_the_same_file(tiny_pipeline_dir, tmp_path):
    for name in ("a", "b"):
        assert generate(tiny_pipeline_dir, PROMPT, tmp_path / f"{name}.mp4", "--num-frames", 5) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_generate_goes_through_an_upscale_pipeline(tiny_pipeline_dir, tiny_upscale_dir, inputs, tmp_path):
    portrait, _ = inputs
    options = ["--num-frames", 9, "--image", portrait]
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "low.mp4", *options) == 0
    options += ["--upscale", tiny_upscale_dir, "--upscale-height", 64, "--upscale-width", 128]
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "high.mp4", *options) == 0
    assert len(read_frames(tmp_path / "high.mp4", 64, 128)) == 9
    # The sound is that of the base.
    assert np.array_equal(read_sound(tmp_path / "high.mp4"), read_sound(tmp_path / "low.mp4"))


@pytest.mark.slow
def test_upscaling_has_the_size_of_its_pipeline(tiny_pipeline_dir, tiny_upscale_dir, tmp_path):
    options = ["--num-frames", 5, "--upscale", tiny_upscale_dir]
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "high.mp4", *options) == 0
    assert len(read_frames(tmp_path / "high.mp4", 288, 480)) == 5


@pytest.mark.parametrize("has_audio", [True, False])
def test_upscale_writes_a_video_that_plays(has_audio, tiny_upscale_dir, tmp_path):
    tone = (0.3 * np.sin(2 * np.pi * 220 * np.arange(15876) / 44100)).astype(np.float32)
    frames = np.random.default_rng(0).random((9, 32, 64, 3))
    export_to_mp4(frames, tmp_path / "low.mp4", audio=tone if has_audio else None)
    command = ["upscale", tmp_path / "low.mp4", PROMPT, "--model", tiny_upscale_dir, "--steps", 2, "--seed", 0]
    command = [str(part) for part in [*command, "--height", 64, "--width", 96, "-o", tmp_path / "high.mp4"]]
    assert main(command) == 0
    assert len(read_frames(tmp_path / "high.mp4", 64, 96)) == 9
    assert ("Audio: aac" in read_header(tmp_path / "high.mp4")) == has_audio
    if has_audio:
        assert peak_frequency(read_sound(tmp_path / "high.mp4")[:, 0], 44100) == pytest.approx(220, abs=4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--upscale", "BASE"], "--upscale .* holds a MagiHumanAudioVideoPipeline"),
        (["--model", "UPSCALE"], "--model .* holds a MagiHumanLatentUpscalePipeline"),
        (["--upscale", "./missing-model"], "missing-model"),
        (["--upscale-height", "64"], "--upscale-height must come with --upscale"),
        (["--upscale", "UPSCALE", "--upscale-width", "64"], "--upscale-width is 64"),
        (["--upscale", "UPSCALE", "--height", "320"], "--upscale-height is 288"),
        (["--upscale", "UPSCALE", "--upscale-width", "100"], "--upscale-width is 100"),
    ],
)
def test_bad_upscale_is_found_before_anything_runs(
    arguments, message, tiny_pipeline_dir, tiny_upscale_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"BASE": str(tiny_pipeline_dir), "UPSCALE": str(tiny_upscale_dir)}
    arguments = [names.get(argument, argument) for argument in arguments]
    try:
        status = generate(tiny_pipeline_dir, PROMPT, tmp_path / "out.mp4", *arguments)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and re.search(message, captured.err) and len(captured.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "video, model, message",
    [
        ("missing.mp4", "UPSCALE", "`video` is 'missing.mp4'"),
        ("low.mp4", "BASE", "--model .* holds a MagiHumanAudioVideoPipeline"),
        ("low.mp4", "UPSCALE", "`video` has shape"),
    ],
)
def test_bad_video_is_one_line(
    video, model, message, tiny_pipeline_dir, tiny_upscale_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    export_to_mp4(np.zeros((6, 32, 64, 3)), "low.mp4")
    model = {"BASE": tiny_pipeline_dir, "UPSCALE": tiny_upscale_dir}[model]
    capsys.readouterr()
    assert main(["upscale", video, PROMPT, "--model", str(model), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and error.startswith("magihuman: error:")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "--width", "x"], "--width"),
        (["a", "--num-frames", "1.5"], "--num-frames"),
        (["a", "--seconds", "-1"], "--seconds"),
        (["a", "--seconds", "nan"], "'nan' must be a positive number"),
        (["a", "--seconds", "abc"], "'abc' must be a positive number"),
        (["a", "--seconds", "1", "--num-frames", "5"], "--seconds"),
        (["a", "--device", "tpu0"], "--device"),
        (["a", "--dtype", "int8"], "--dtype"),
        (["a", "--image", "missing.png"], "`image` is 'missing.png'"),
        (["a", "--audio", "missing.wav"], "`audio` is 'missing.wav'"),
        (["a", "-o", "missing/out.mp4"], "`path` is 'missing/out.mp4'"),
        (["a", "-o", "out.gif"], "`path` is 'out.gif'"),
        (["a"], "missing-model"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    """Found before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = main(["generate", "--model", "./missing-model", *arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and not captured.out
    assert message in captured.err and len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, name",
    [
        ([" "], "prompt"),
        (["a", "--height", "50"], "height"),
        (["a", "--height", "0"], "height"),
        (["a", "--num-frames", "0"], "num_frames"),
        (["a", "--steps", "0"], "num_inference_steps"),
    ],
)
def test_what_the_pipeline_refuses_is_one_line_and_status_2(arguments, name, tiny_pipeline_dir, capsys, tmp_path):
    output = tmp_path / "out.mp4"
    assert main(["generate", "--model", str(tiny_pipeline_dir), "-o", str(output), "--device", "cpu", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"magihuman: error: `{name}`=") and not output.exists()


def test_card_is_printed_or_written(capsys, tmp_path):
    assert main(["card", "distill"]) == 0
    printed = capsys.readouterr().out
    assert printed == make_model_card("distill") and '"owner/magihuman-distill"' in printed
    assert main(["card", "distill", "-o", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text() == printed and not capsys.readouterr().out
    mine = make_model_card("distill", "someone/mine")
    assert '"someone/mine"' in mine and "owner/" not in mine
    with pytest.raises(SystemExit, match="2"):
        main(["card", "large"])
