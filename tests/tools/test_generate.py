"""How `magihuman generate` and `upscale` run: quantised, compiled, by which attention, offloaded as far as must be."""

import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import soundfile
import torch
from helpers import PROMPT, read_frames

from diffusers_magihuman import MagiHumanTransformer3DModel, embedded_model, export_to_mp4
from diffusers_magihuman.tools.cli import main
from diffusers_magihuman.tools.generate import fit
from diffusers_magihuman.tools.plan import Setting, Speed

SMALL = ["--height", "32", "--width", "64", "--num-frames", "5", "--steps", "1", "--seed", "0"]
HAS_GPU = torch.cuda.is_available()


def generate(model, folder, *options):
    output = folder / "out.mp4"
    status = main(["generate", PROMPT, "--model", str(model), "-o", str(output), *SMALL, *map(str, options)])
    return status, output


@pytest.mark.parametrize(
    "options",
    [
        ["--quantize", "int8", "--attention", "native"],
        pytest.param(["--compile", "--quantize", "int8"], marks=pytest.mark.slow),
        *(
            pytest.param(
                ["--offload", offload, "--upscale", "UPSCALE", "--compile", "--dtype", "float32"],
                marks=[pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")],
            )
            for offload in ("auto", "none", "model", "block", "leaf")
        ),
    ],
    ids=" ".join,
)
def test_options_change_how_a_video_is_made_and_hardly_the_video(
    options, tiny_pipeline_dir, tiny_upscale_dir, tmp_path, monkeypatch, capsys
):
    called = []
    # On a CPU each kind of block is compiled for a minute, and this one has fewer.
    model = embedded_model("distilled") if "--compile" in options and "UPSCALE" not in options else tiny_pipeline_dir

    def watch(name):
        method = getattr(MagiHumanTransformer3DModel, name)
        monkeypatch.setattr(MagiHumanTransformer3DModel, name, lambda *x, **y: called.append(name) or method(*x, **y))

    watch("set_attention_backend")
    watch("compile_repeated_blocks")
    options = [str(tiny_upscale_dir) if option == "UPSCALE" else option for option in options]
    plain = [option for option in ("--upscale", str(tiny_upscale_dir)) if option in options]
    _, output = generate(model, tmp_path, *plain)
    size = (256, 512) if plain else (32, 64)
    expected = read_frames(output, *size).astype(float)
    called.clear()
    status, output = generate(model, tmp_path, *options)
    assert status == 0
    assert np.abs(read_frames(output, *size) - expected).mean() < 6  # another seed: above 20
    assert ("set_attention_backend" in called) == ("--attention" in options)
    assert ("compile_repeated_blocks" in called) == ("--compile" in options)
    assert ("--offload auto takes all on the GPU" in capsys.readouterr().err) == ("auto" in options)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--quantize", "int4"], "--quantize"),
        *((["--device", name], "--device") for name in ("tpu0", "cuda:7", "mps", "xla", "hpu", "meta", "lazy", "")),
        (["--device", "cpu", "--dtype", "float16"], "--dtype float16"),
        (["--quantize", "float8"], "--quantize float8 does not run on cpu in float32: "),
        (["--quantize", "int8", "--model", "QUANTISED"], "--quantize int8, but the transformer of"),
        (["--quantize", "int8", "--upscale", "QUANTISED"], "--quantize int8, but the transformer of"),
        (["--attention", "flash_9"], "`attention`='flash_9' must be 'flash' or"),
        (["--attention", ""], "`attention`='' must be"),
        (["--attention", "_native_cudnn"], "--attention _native_cudnn does not run on cpu in float32: "),
        (["--attention", "sage"], "--attention sage does not run on cpu in float32: "),
        (["--offload", "disk"], "--offload"),
        (["--offload", "auto"], "--offload auto needs a cuda device; on cpu it must be none"),
        (["--offload", "leaf"], "--offload leaf needs a cuda device"),
        (["--compile", "yes"], "must be in quotes"),
    ],
)
def test_bad_options_are_found_before_anything_is_loaded(
    options, message, tiny_pipeline_dir, tiny_upscale_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("diffusers_magihuman.tools.generate.load_pipeline", None)
    source = tiny_upscale_dir if "--upscale" in options else tiny_pipeline_dir
    shutil.copytree(source, tmp_path / "quantised", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "quantised/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    options = [str(tmp_path / "quantised") if option == "QUANTISED" else option for option in options]
    try:
        status, _ = generate(tiny_pipeline_dir, tmp_path, "--device", "cpu", *options)
    except SystemExit as error:
        status = error.code
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and line.startswith("magihuman") and message in line and len(line) < 700


def test_plan_of_the_very_call_decides(tiny_pipeline_dir, tiny_upscale_dir, tmp_path, monkeypatch):
    """Sizes that follow from the model, from audio and from a video are those that the pipelines take."""
    sizes = []

    def record(_, model, num_frames, height, width):
        sizes.append((model, num_frames, height, width))
        return Setting("none")

    monkeypatch.setattr("diffusers_magihuman.tools.generate.choose_setting", record)
    monkeypatch.setattr("diffusers_magihuman.tools.generate.load_pipeline", None)
    base, upscale = str(tiny_pipeline_dir), str(tiny_upscale_dir)
    default = json.loads((tiny_pipeline_dir / "model_index.json").read_text())
    soundfile.write(tmp_path / "tone.wav", np.zeros(22051), 22050)
    export_to_mp4(np.zeros((9, 64, 96, 3)), tmp_path / "low.mp4")
    commands = {
        (): [(base, default["default_num_frames"], default["default_height"], default["default_width"])],
        ("--audio", tmp_path / "tone.wav", "--height", 64): [(base, 26, 64, default["default_width"])],
        ("--seconds", 1, "--height", 64, "--width", 96, "--upscale", upscale): [
            (base, 26, 64, 96),
            (upscale, 26, 288, 448),
        ],
    }
    for options, expected in commands.items():
        assert main(["generate", PROMPT, "--model", base, *map(str, options), "-o", str(tmp_path / "out.mp4")]) == 2
        assert sizes == expected
        sizes.clear()
    command = ["upscale", str(tmp_path / "low.mp4"), PROMPT, "--model", upscale, "--height", "96"]
    assert main([*command, "-o", str(tmp_path / "out.mp4")]) == 2 and sizes == [(upscale, 9, 96, 128)]


def test_what_fits_is_taken_and_said(tiny_pipeline_dir, capsys):
    def choose(offload, vram, ram=1.0):
        arguments = Namespace(dtype="float32", speed=Speed(), offload=offload)
        return fit(arguments, str(tiny_pipeline_dir), (64, 96, 5), vram, ram)

    assert choose("auto", 2) == Setting("none")
    said = f"magihuman: --offload auto takes all on the GPU for {tiny_pipeline_dir}, 1.0 of 2.0 GiB\n"
    assert capsys.readouterr().err == said
    with pytest.raises(ValueError, match=r"`offload`='leaf' does not .*'none' would fit"):
        choose("leaf", 2, 0)
