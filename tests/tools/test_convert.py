"""`magihuman convert`: what it writes loads and gives the same output; what fails leaves nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import DiffusionPipeline
from golden import load_golden, load_golden_weights
from helpers import assert_same, run, upscale
from layouts import all_fp32, fp8, split, write_external_repositories, write_file, write_shards
from transformers import T5GemmaEncoderModel

from diffusers_magihuman import (
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.checkpoints import convert_checkpoint, load_original_transformer, load_text_encoder
from diffusers_magihuman.tools.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "distill"
    write_shards(all_fp32(load_golden_weights("dit_base")), path, "model")
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_external_repositories(root)
    return {
        "text_encoder": root / "google" / "t5gemma-9b-9b-ul2",
        "video_vae": root / "Wan-AI" / "Wan2.2-TI2V-5B-Diffusers",
        "turbo_vae": root / "GAIR" / "daVinci-MagiHuman",
        "audio_vae": root / "stabilityai" / "stable-audio-open-1.0",
    }


def states_equal(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_converted_transformer_equals_the_loaded_one(max_shard_size, source, tmp_path):
    output = convert_checkpoint(source, tmp_path / "out", max_shard_size=max_shard_size)
    shards = sorted((output / "transformer").glob("*.safetensors"))
    assert len(shards) == 1 if max_shard_size == "5GB" else len(shards) > 3
    assert all(shard.stat().st_size < 210_000 for shard in shards) or max_shard_size == "5GB"
    loaded = MagiHumanTransformer3DModel.from_pretrained(output, subfolder="transformer", dtype=torch.bfloat16)
    assert states_equal(loaded, load_original_transformer(source))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and output.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("layout", [split, fp8])
def test_every_layout_converts(layout, tmp_path):
    write_file(layout(load_golden_weights("dit_base")), tmp_path / "distill.safetensors")
    output = convert_checkpoint(tmp_path / "distill.safetensors", tmp_path / "out", dtype=torch.float32)
    loaded = MagiHumanTransformer3DModel.from_pretrained(output, subfolder="transformer")
    assert states_equal(loaded, load_original_transformer(tmp_path / "distill.safetensors", dtype=torch.float32))


def test_converted_repository_is_a_pipeline(source, parts, tmp_path):
    output = convert_checkpoint(source, tmp_path / "out", dtype=torch.float32, **parts)
    names = {path.name for path in output.iterdir()}
    assert names >= {"model_index.json", "pipeline.py", "transformer_magihuman.py", "README.md", "NOTICE.md"}
    pipe = DiffusionPipeline.from_pretrained(output)
    assert isinstance(pipe, MagiHumanAudioVideoPipeline) and pipe.config.is_distilled
    expected = MagiHumanAudioVideoPipeline.from_original(source, dtype=torch.float32, **parts)
    assert_same(run(pipe, output_type="np"), run(expected, output_type="np"))

    info, golden = load_golden("dit_base")
    with torch.no_grad():
        velocity = pipe.transformer(
            golden["in.video_latent"], golden["in.audio_latent"], golden["in.text"][:, : info["text_len"]]
        )
    torch.testing.assert_close(velocity.sample, golden["fp32.out.video"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant, size", [("sr_540p", (512, 896)), ("sr_1080p", (1088, 1920))])
def test_converted_super_resolution_is_a_pipeline(variant, size, parts, tmp_path):
    write_file(load_golden_weights("dit_sr"), tmp_path / "weights.safetensors")
    source = tmp_path / "weights.safetensors"
    output = convert_checkpoint(source, tmp_path / "out", variant=variant, dtype=torch.float32, **parts)
    pipe = DiffusionPipeline.from_pretrained(output)
    assert isinstance(pipe, MagiHumanLatentUpscalePipeline)
    assert (pipe.config.default_height, pipe.config.default_width) == size
    expected = MagiHumanLatentUpscalePipeline.from_original(source, variant=variant, dtype=torch.float32, **parts)
    low = {"latents": torch.randn(1, 4, 3, 2, 4), "audio_latents": torch.randn(1, 9, 8), "output_type": "np"}
    assert_same(upscale(pipe, **low), upscale(expected, **low))


def test_parts_left_out_are_given_when_loading(source, parts, tmp_path):
    output = convert_checkpoint(source, tmp_path / "out", dtype=torch.float32)
    index = json.loads((output / "model_index.json").read_text())
    assert index["text_encoder"] == index["vae"] == [None, None]
    complete = MagiHumanAudioVideoPipeline.from_original(source, dtype=torch.float32, **parts)
    given = {name: getattr(complete, name) for name in ("tokenizer", "text_encoder", "vae", "audio_vae")}
    pipe = DiffusionPipeline.from_pretrained(output, **given)
    assert_same(run(pipe), run(complete))


@pytest.mark.slow
def test_killed_run_leaves_nothing_that_looks_finished(source, tmp_path):
    command = [sys.executable, "-c", "import sys; from diffusers_magihuman.tools.cli import main; sys.exit(main())"]
    command = [str(part) for part in [*command, "convert", source, tmp_path / "out", "--max-shard-size", "2KB"]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out.*.incomplete/transformer/*.safetensors")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()

    convert_checkpoint(source, tmp_path / "out", max_shard_size="100KB")
    loaded = MagiHumanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer", dtype=torch.bfloat16)
    assert states_equal(loaded, load_original_transformer(source))


def test_parts_are_sharded_too(source, parts, tmp_path):
    """Of parts that lie in several files, with tensors that are larger than a file may be among them."""
    output = convert_checkpoint(source, tmp_path / "out", max_shard_size="5KB", text_encoder=parts["text_encoder"])
    assert len(list((output / "text_encoder").glob("*.safetensors"))) > 2
    encoder = T5GemmaEncoderModel.from_pretrained(output / "text_encoder", dtype=torch.bfloat16)
    assert states_equal(encoder, load_text_encoder(parts["text_encoder"])[1])
    loaded = MagiHumanTransformer3DModel.from_pretrained(output / "transformer", dtype=torch.bfloat16)
    assert states_equal(loaded, load_original_transformer(source))


def test_wrong_source_leaves_nothing(source, tmp_path):
    shutil.copytree(source, tmp_path / "distill")
    shard = tmp_path / "distill" / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"model-00003-of-00003\.safetensors' is missing, damaged"):
        convert_checkpoint(tmp_path / "distill", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["distill"]


@pytest.mark.parametrize("part", ["text_encoder", "video_vae", "audio_vae"])
def test_wrong_part_leaves_nothing(part, source, parts, tmp_path):
    with pytest.raises(OSError, match="neither a path that exists nor a repository"):
        convert_checkpoint(source, tmp_path / "out", **{**parts, part: "./missing"})
    assert not list(tmp_path.iterdir())


def test_existing_output_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="which exists; it must be a new directory"):
        convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_command(source, parts, tmp_path, capsys):
    options = ["--with-text-encoder", parts["text_encoder"], "--with-vaes", parts["video_vae"]]
    options += ["--turbo-vae", parts["turbo_vae"], "--audio-vae", parts["audio_vae"], "--dtype", "float32"]
    arguments = ["convert", source, tmp_path / "out", *options]
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(tmp_path / "out") and "B/s" in captured.err
    assert run(DiffusionPipeline.from_pretrained(tmp_path / "out")).frames.shape == (1, 4, 3, 4, 4)

    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert main(["convert", str(tmp_path), str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "it must be a new directory" in errors[-2] and "does not tell the variant" in errors[-1]
