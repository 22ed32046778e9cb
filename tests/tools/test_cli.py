"""The console command on tiny pipelines."""

import io
import itertools
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from diffusers import DiffusionPipeline
from helpers import PROMPT, peak_frequency, read_frames, read_header, read_sound

from diffusers_magihuman import export_to_mp4
from diffusers_magihuman.files import unfinished_folder
from diffusers_magihuman.tools import cli, plan
from diffusers_magihuman.tools.cli import main, quiet
from diffusers_magihuman.tools.generate import Progress
from diffusers_magihuman.tools.hub import make_model_card
from diffusers_magihuman.tools.plan import load_index


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
    printed, size = capsys.readouterr(), (tmp_path / "out.mp4").stat().st_size / 1e3
    line = f"{tmp_path}/out.mp4: 96x64, 25 frames of 1.0 s, {size:,.0f} kB, seed 0, in \\d+ s\n"
    assert re.fullmatch(line, printed.out) and not printed.err  # nothing of other libraries, no bar without a terminal

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


def test_several_videos_have_seeds_that_follow(tiny_pipeline_dir, tiny_upscale_dir, tmp_path, capsys):
    """Each is that of its seed alone, also through the other pipeline; nothing is written over."""
    options = ["--num-frames", 5, "--upscale", tiny_upscale_dir, "--upscale-height", 64, "--upscale-width", 96]
    for name, seed, count in (("both", 2**64 - 1, 2), ("one", 0, 1)):
        given = [*options, "--seed", seed, "--num-videos", count]
        assert generate(tiny_pipeline_dir, PROMPT, tmp_path / f"{name}.mp4", *given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"/([\w-]+).mp4: 96x64, 5 frames .*, seed (\d+),", line).groups() for line in lines] == [
        ("both-1", str(2**64 - 1)),
        ("both-2", "0"),
        ("one", "0"),
    ]
    first, second, one = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("both-1", "both-2", "one"))
    assert second == one != first
    (tmp_path / "both-1.mp4").unlink()
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "both.mp4", "--num-videos", 2) == 2
    assert "both-2.mp4 exists" in capsys.readouterr().err and not (tmp_path / "both-1.mp4").exists()


def test_prompts_and_guidance_from_options(tiny_pipeline_dir, tmp_path, monkeypatch):
    """Whatever way a prompt takes it is the same, and what steers guidance changes the video."""
    monkeypatch.chdir(tmp_path)
    description = PROMPT.split("\n\n")[0]
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")
    parts = ["--dialogue", "Woman, English: Hello.", "--background-sound", "Quiet room"]
    ways = {
        "plain": [PROMPT],
        "file": ["--prompt-file", "prompt.txt"],
        "stdin": ["--prompt-file", "-"],
        "parts": [*parts, description],
        "guided": [PROMPT, "--guidance-scale", "7"],  # the model is a distilled one
        "from red": [PROMPT, "--guidance-scale", "7", "--negative-prompt", "red"],
    }
    videos = {}
    for name, options in ways.items():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
        command = ["generate", "--model", str(tiny_pipeline_dir), "--height", "32", "--width", "32", "--steps", "2"]
        assert main([*command, "--num-frames", "5", "--seed", "0", *options]) == 0
        videos[name] = (tmp_path / "out.mp4").read_bytes()
    assert videos["plain"] == videos["file"] == videos["stdin"] == videos["parts"]
    assert len({videos["plain"], videos["guided"], videos["from red"]}) == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_bar_on_a_terminal(tiny_pipeline_dir, tiny_upscale_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    options = ["--num-frames", 5, "--upscale", tiny_upscale_dir, "--upscale-height", 64, "--upscale-width", 96]
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "out.mp4", *options) == 0
    text = sys.stderr.getvalue()
    stages = [stage for stage, _ in itertools.groupby(re.findall(r"([a-z ]+?) +\d+% \|.*?\| *\S+ left", text))]
    base = ["loading", "encoding text", "denoising"]
    assert stages == [*base, *base[:2], "upscaling", "decoding", "decoding and writing"]
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "out.mp4", "--width", 50) == 2
    assert sys.stderr.getvalue().rpartition("\r")[2].startswith("magihuman: error: `width`=50")
    assert "\n" not in text

    def make_slow_frames():
        for _ in range(3):
            time.sleep(0.15)  # the bar is drawn ten times a second at most
            yield np.zeros((2, 4, 3))

    progress = Progress()
    assert len([*progress.follow("writing", make_slow_frames(), 3)]) == 3 and progress.seen == (3, 2, 4)
    assert re.search(r"writing +33% \|.* 00:00 left", sys.stderr.getvalue())


def test_other_libraries_say_nothing_but_errors(capsys, monkeypatch):
    library, ours = logging.getLogger("a_library"), logging.getLogger("diffusers_magihuman.pipeline_base")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler()])
    with quiet() as silence_libraries:
        library.warning("while it is imported")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        silence_libraries()
        library.warning("while it runs")
        library.error("an error")
        ours.warning("our warning")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
    library.warning("afterwards")
    assert capsys.readouterr().err == "an error\nmagihuman: our warning\nafterwards\n"
    with pytest.warns(FutureWarning):
        warnings.warn("deprecated", FutureWarning, stacklevel=1)


def test_help_without_arguments_and_what_a_report_needs(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("generate", "--version", "info"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for line in (f"torch: +{torch.__version__.split('+')[0]}", r"cpu: .* \d+ cores", r"disk: +[\d.]+ GiB free"):
        assert re.search(line, printed)
    assert re.search(r"memory: +[\d.]+ of [\d.]+ GiB free", printed) and "hf_secret" not in printed
    assert os.path.expanduser("~") not in printed


def test_commands_and_choices_that_are_nearly_right(capsys):
    for arguments, meant in ((["genrate"], "generate"), (["card", "distiled"], "distilled"), (["zzz"], None)):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        line = capsys.readouterr().err
        assert (f"did you mean {meant}?" in line) if meant else "did you mean" not in line


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
def test_upscaling_keeps_the_aspect_of_the_video(tiny_pipeline_dir, tiny_upscale_dir, tmp_path):
    options = ["--num-frames", 5, "--upscale", tiny_upscale_dir]
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "high.mp4", *options) == 0
    assert len(read_frames(tmp_path / "high.mp4", 288, 448)) == 5  # 288x480 is the pipeline's; the video has 64x96


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
        (["--upscale", "UPSCALE", "--height", "320", "--upscale-height", "288"], "--upscale-height is 288"),
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
        (["a", "--seconds", "nan"], "'nan' must be a number in 0.001 to"),
        (["a", "--seconds", "abc"], "'abc' must be a number in 0.001 to"),
        (["a", "--seconds", "1", "--num-frames", "5"], "--seconds"),
        (["a", "--dtype", "int8"], "--dtype"),
        (["a", "--image", "missing.png"], "`image` is 'missing.png'"),
        (["a", "--audio", "missing.wav"], "`audio` is 'missing.wav'"),
        (["a", "-o", "missing/out.mp4"], "`path` is 'missing/out.mp4'"),
        (["a", "-o", "out.gif"], "`path` is 'out.gif'"),
        (["a"], "'./missing-model' is neither a directory that exists nor a repository"),
        (["a", "--model", "nowhere"], "'nowhere' is neither"),
        (["a", "b", "c"], "must be in quotes"),
        (["--dialogue", "Anna: hello"], "--dialogue: 'Anna: hello' must be 'WHO, LANGUAGE: LINE', in quotes"),
        (["a", "--dialogue", "<Anna>, French: hello"], "`dialogue[0]`='<Anna>' must be a text without '<'"),
        (["a", "--background-sound", ""], "`background_sound`=''"),
        ([], "A prompt is needed, PROMPT or --prompt-file"),
        (["a", "--prompt-file", "-"], "One prompt is needed"),
        (["--prompt-file", "missing.txt"], "`prompt-file` is 'missing.txt'"),
        (["--prompt-file", str(Path(__file__).parents[2] / "docs/images/upscaled.webp")], "is no text in UTF-8"),
        (["a", "--guidance-scale", "nan"], "--guidance-scale: 'nan' must be a number in -1000 to 1000"),
        (["a", "--num-videos", "0"], "--num-videos"),
        (["a", "--promt-file", "b"], "--promt-file b; did you mean --prompt-file?"),
        (["a", "--prompt", "b"], "unrecognized arguments: --prompt"),
        (["a", "--size", "256"], "unrecognized arguments: --size 256\n"),
        ([" "], "The prompt is empty"),
        (["a", "--dtype", "bflot16"], "; did you mean bfloat16?"),
        (["a", "--model", "tiny-distilled"], "nor a repository 'owner/name' nor 'tiny' nor 'tiny-base'"),
        (["a", "--model", "tiny", "--upscale", "tiny-base"], "--upscale 'tiny-base' is neither"),
        *((["a", option, "9" * 20], option) for option in ("--height", "--steps", "--num-frames", "--seed")),
        *((["a", "--seconds", number], "--seconds") for number in ("1e9", "1e300", "9" * 5000, "inf")),
        (["a", "--height", "9" * 5000], "--height"),
        (["a", "--steps", "0"], "must be an integer in 1 to 1000"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    """Found before PyTorch is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        monkeypatch.setattr("diffusers_magihuman.tools.cli.import_heavy", None)
        status = main(["generate", "--model", "./missing-model", *arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and not captured.out
    assert message in captured.err and len(captured.err.splitlines()) == 1 and len(captured.err) < 400


@pytest.mark.parametrize(
    "index, message",
    [
        (b"{", "no model_index.json that can be read"),
        (b"[" * 100_000, "no model_index.json that can be read"),
        (b"[1]", "no model_index.json that can be read"),
        (b"\xff", "no model_index.json that can be read"),
        (b"{}", "holds a None, it"),
        ({"_class_name": ["a"]}, "holds a ['a'], it"),
        ({"transformer": ["diffusers", "MagiHuman"]}, "has the transformer ['diffusers', 'MagiHuman']"),
        ({"transformer": [None, None]}, "has the transformer"),
        ({"vae": {"a": 1}}, "has the vae"),
        ({"vae": [["diffusers"], "AutoencoderKLWan"]}, "has the vae"),
        ({"default_height": "288"}, "`default_height`='288'"),
        ({"default_width": True}, "`default_width`=True"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "generate --upscale", "upscale", "plan", "plan --upscale"])
def test_index_that_is_damaged(command, index, message, tiny_pipeline_dir, tiny_upscale_dir, tmp_path, capsys):
    good = tiny_upscale_dir if command.startswith("upscale") or "--upscale" in command else tiny_pipeline_dir
    if isinstance(index, dict):
        index = json.dumps(json.loads((good / "model_index.json").read_text()) | index).encode()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_bytes(index)
    command, *option = command.split()
    arguments = {"generate": [PROMPT], "upscale": [__file__, PROMPT], "plan": ["--vram", "1"]}[command]
    models = ["--model", str(tiny_pipeline_dir), *option][: 3 if option else 1]
    assert main([command, *arguments, *models, str(tmp_path / "model")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and str(tmp_path / "model") in lines[0]


def test_settings_that_are_wrong_or_unknown(tiny_pipeline_dir, tmp_path, capsys):
    """Those that no class knows are left out, as when a pipeline is loaded."""
    shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"new": 1, "part": ["diffusers", "NewModel"]}))
    size = ["--height", "64", "--width", "64", "--num-frames", "5"]
    assert main(["plan", "--vram", "8", "--model", str(tmp_path / "model"), *size]) == 0
    file.write_text(json.dumps(index | {"is_distilled": "yes"}))
    capsys.readouterr()
    assert main(["generate", PROMPT, "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out.mp4")]) == 2
    error = capsys.readouterr().err
    assert "`is_distilled`='yes'" in error and "parts" not in error


def test_default_sizes_are_those_of_the_class(tiny_upscale_dir, tmp_path):
    index = json.loads((tiny_upscale_dir / "model_index.json").read_text())
    del index["default_height"], index["default_width"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load_index(str(tmp_path))["default_width"] == 1920


@pytest.mark.parametrize("part, file", [("vae", "config.json"), ("tokenizer", "tokenizer.json"), ("transformer", "")])
def test_part_that_is_damaged_is_named(part, file, tiny_pipeline_dir, tmp_path, capsys):
    shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    (tmp_path / "model" / part / (file or "diffusion_pytorch_model.safetensors")).write_bytes(b"{")
    assert generate(tmp_path / "model", PROMPT, tmp_path / "out.mp4") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"magihuman: error: .*model' could not be loaded, its parts \\['{part}'\\]: ", line)


@pytest.mark.parametrize("error, count", [(MemoryError(), 1), (RuntimeError("no"), 7)])
def test_parts_are_probed_in_the_dtype_and_not_without_memory(
    error, count, tiny_pipeline_dir, tmp_path, capsys, monkeypatch
):
    dtypes = []

    def fail(_, dtype=None, **__):
        dtypes.append(dtype)
        raise error

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    assert generate(tiny_pipeline_dir, PROMPT, tmp_path / "out.mp4", "--dtype", "bfloat16") == 2
    assert dtypes == [{"default": torch.bfloat16, "audio_vae": torch.float32}] * count
    assert ("could not be loaded, its settings: RuntimeError: no" in capsys.readouterr().err) == (count > 1)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (MemoryError(), 2, "error: MemoryError\n"),
        (KeyError("weight"), 2, "error: KeyError: 'weight'\n"),
        (AssertionError(), 2, "error: AssertionError\n"),
        (RuntimeError("two\nlines " + "x" * 5000), 2, "error: RuntimeError: two lines xxx"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_fails_is_one_line(error, status, message, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(plan, "plan_call", fail)
    assert main(["plan", "--vram", "1"]) == status
    printed = capsys.readouterr().err
    assert printed.startswith(f"magihuman: {message}") and len(printed) < 700 and printed.count("\n") == 1
    main(["plan", "--vram", "1", "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("is_swallowed", [False, True])
def test_signals_end_the_command_as_errors_do(number, is_swallowed, monkeypatch, tmp_path, capsys):
    def stop(*_, **__):
        with unfinished_folder(tmp_path / "out"):
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt as error:
                raise OSError("a library's own") if is_swallowed else error from error

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, signal.SIG_DFL) for each in numbers}  # a shell's background ignores some
    monkeypatch.setattr(plan, "plan_call", stop)
    try:
        assert main(["plan", "--vram", "1"]) == 128 + number
        assert all(signal.getsignal(each) == signal.SIG_DFL for each in numbers)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == "magihuman: interrupted\n" and not list(tmp_path.iterdir())


def test_signals_wait_while_modules_are_imported(monkeypatch, capsys):
    # As PyTorch's C++ code does not survive what they raise in it.
    imported = []

    def kill(name):
        os.kill(os.getpid(), signal.SIGINT)
        imported.append(name)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "import_module", kill)
    try:
        assert cli.run_command("magihuman", lambda: cli.import_heavy("none")) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(imported) == 1 and capsys.readouterr().err == "magihuman: interrupted\n"


EMBEDDED = [
    "A speaker with tan skin and long black hair, in a green shirt. Static camera.",
    *("--dialogue", "Speaker, syllables: ma mi mo mu", "--background-sound", "Quiet room"),
]
COMMAND = [sys.executable, "-c", "from diffusers_magihuman.tools.cli import run_process; run_process()"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1, 2])
def test_interrupt_while_modules_are_imported(seconds, tmp_path):
    # A shell's background ignores what the command must not, then.
    begun = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); print(flush=True)"
    begun = [sys.executable, "-c", f"{begun}; {COMMAND[2]}"]
    command = [*begun, "generate", PROMPT, "-o", str(tmp_path / "out.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().splitlines()[-1] == "magihuman: interrupted"
    assert process.returncode == 130 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_cannot_be_printed_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, "card", "base"], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1 and b"No space left" in result.stderr


@pytest.mark.slow
def test_command_costs_little_more_than_diffusers(tmp_path, capsys):
    """In processor time of one thread, the least of three: several wait for each other by spinning, for longer where
    other processes run. The packages of the extras are away, as with README's first command: Diffusers imports those
    that it finds with `DiffusionPipeline`, which alone costs up to 1.75 times `import diffusers` with all of them.
    What is more than imports depends on the CPU, see RESULTS.md.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = "import sys; sys.modules.update(dict.fromkeys(['gguf', 'peft', 'torchao', 'xformers'])); "
    command = [sys.executable, "-c", script + "from diffusers_magihuman.tools.cli import run_process; run_process()"]
    commands = {
        "diffusers": [sys.executable, "-c", script + "import diffusers"],
        "generate": [*command, "generate", *EMBEDDED, "--seed", "0", "-o", str(tmp_path / "out.mp4")],
        "help": [*command, "--help"],
        "bad option": [*command, "generate", "a", "--widht", "64"],
        "bad file": [*command, "generate", "a", "--image", str(tmp_path / "missing.png")],
    }
    times = {name: [] for name in commands}
    for _, (name, command) in itertools.product(range(3), commands.items()):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        status = subprocess.run(command, capture_output=True, env=environment).returncode
        assert status == (2 if "bad" in name else 0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    seconds = {name: min(values) for name, values in times.items()}
    ratios = {name: round(value / seconds["diffusers"], 2) for name, value in seconds.items()}
    with capsys.disabled():
        sys.stdout.write(f"\nprocessor time, of that of `import diffusers`: {ratios}\n")
    assert all(ratio <= (2.0 if name == "generate" else 0.15) for name, ratio in ratios.items() if name != "diffusers")


@pytest.mark.slow
def test_generate_imports_nothing_that_it_does_not_use(tmp_path):
    script = "import sys; from diffusers_magihuman.tools.cli import main; main(); print(*sys.modules)"
    command = [sys.executable, "-c", script, "generate", *EMBEDDED, "-o", str(tmp_path / "out.mp4")]
    result = subprocess.run([*command, "--model", "tiny"], check=True, capture_output=True, text=True)
    line, modules = result.stdout.splitlines()
    assert line.startswith(f"{tmp_path}/out.mp4: 128x128, 49 frames of 2.0 s") and not result.stderr
    modules = modules.split()
    ours = {f"diffusers_magihuman.{name}" for name in ("training", "checkpoints", "tools.convert", "tools.hub")}
    assert "diffusers_magihuman.tools.generate" in modules
    others = {"diffusers.training_utils", "matplotlib", "pandas", "sklearn", "torchvision", "IPython", "pytest"}
    assert not (ours | others) & set(modules)


@pytest.mark.parametrize("kind", ["picture", "fifo"])
def test_video_that_is_none(kind, inputs, tiny_upscale_dir, tmp_path, capsys, monkeypatch):
    """Refused before a model is loaded, and before anybody waits for one who writes."""
    monkeypatch.setattr("diffusers_magihuman.tools.generate.load_pipeline", None)
    os.mkfifo(tmp_path / "fifo")
    video = str(inputs[0] if kind == "picture" else tmp_path / "fifo")
    signal.alarm(60)
    try:
        command = ["upscale", video, PROMPT, "--model", str(tiny_upscale_dir), "-o", str(tmp_path / "out.mp4")]
        assert main(command) == 2
    finally:
        signal.alarm(0)
    assert f"`video` is {video!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--height", "320000000000"], "--height"),
        (["--height", "8192", "--width", "8192", "--num-frames", "99"], "at most 1048576 are allowed"),
        (["--num-frames", "16384"], "--num-frames: '16384' must be an integer in 1 to 4096"),
        (["--vram", "1e300"], "--vram"),
    ],
)
def test_plans_are_bounded(arguments, message, tiny_pipeline_dir, capsys):
    try:
        status = main(["plan", "--vram", "1", "--model", str(tiny_pipeline_dir), *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["a", "--height", "50"], "height"),
    ],
)
def test_what_the_pipeline_refuses_is_one_line_and_status_2(arguments, name, tiny_pipeline_dir, capsys, tmp_path):
    output = tmp_path / "out.mp4"
    assert main(["generate", "--model", str(tiny_pipeline_dir), "-o", str(output), "--device", "cpu", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"magihuman: error: `{name}`=") and not output.exists()


def test_card_is_printed_or_written(capsys, tmp_path):
    assert main(["card", "distilled"]) == 0
    printed = capsys.readouterr().out
    assert printed == make_model_card("distilled") and '"owner/magihuman-distilled"' in printed
    assert main(["card", "distilled", "-o", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text() == printed and not capsys.readouterr().out
    mine = make_model_card("distilled", "someone/mine")
    assert '"someone/mine"' in mine and "owner/" not in mine
    assert main(["card", "distill"]) == 0 and capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="2"):
        main(["card", "large"])


def test_card_keeps_the_mode_and_the_link_that_it_replaces(tmp_path):
    (tmp_path / "card.md").touch(mode=0o600)
    (tmp_path / "link.md").symlink_to("card.md")
    assert main(["card", "base", "-o", str(tmp_path / "link.md")]) == 0
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "card.md").read_text() == make_model_card("base")
    assert (tmp_path / "card.md").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"card.md", "link.md"}
    assert main(["card", "base", "-o", str(tmp_path)]) == main(["card", "base", "-o", str(tmp_path / "a" / "b")]) == 2
    assert main(["card", "base", "-o", os.devnull]) == 0 and not os.path.isfile(os.devnull)
