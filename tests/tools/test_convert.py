"""`magihuman convert`: what it writes loads and gives the same output; what fails leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig, TorchAoConfig
from golden import load_golden, load_golden_weights
from helpers import assert_same, make_inputs, make_original, multiplies_float8_by_row, run, upscale
from layouts import all_fp32, fp8, split, write_external_repositories, write_file, write_shards
from safetensors import safe_open
from torchao.quantization import Float8WeightOnlyConfig
from transformers import T5GemmaEncoderModel

from diffusers_magihuman import (
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.checkpoints import convert_checkpoint, load_original_transformer, load_text_encoder
from diffusers_magihuman.tools import convert
from diffusers_magihuman.tools.cli import main
from diffusers_magihuman.tools.quantize import torchao_config


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
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "plain").mkdir()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not a temporary folder's


# Quantised


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256, which `Q4_K` takes; the inner size, 680, is a multiple of neither 16 nor 32."""
    path = tmp_path_factory.mktemp("wide") / "distill.safetensors"
    write_file(make_original(attention_head_dim=64), path)
    return path


def open_shards(folder):
    tensors, metadata = {}, {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata |= file.metadata()
    names = metadata.pop("tensor_names", "[]")
    return tensors, metadata | {"tensor_names": sorted(json.loads(names))}


@torch.no_grad()
def predict(model):
    torch.manual_seed(1)
    return torch.cat([x.flatten() for x in model(*make_inputs(), return_dict=False)])


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind, max_shard_size", [("int8", "300KB"), ("float8", "5GB")])
def test_torchao_files_are_those_that_diffusers_saves(kind, max_shard_size, wide, tmp_path):
    """TorchAO quantises to dynamic float8 on a GPU alone; float8 of the weights alone has the same numbers."""
    options = {"feed_forward_multiple": 32, "max_shard_size": max_shard_size}
    plain = convert_checkpoint(wide, tmp_path / "plain", **options) / "transformer"
    config, is_same = torchao_config(kind), kind == "int8" or torch.cuda.is_available()
    if not is_same:
        config = TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=["to_gate"])
    expected = MagiHumanTransformer3DModel.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    expected.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    ours = convert_checkpoint(wide, tmp_path / "out", quantize=kind, **options) / "transformer"

    (tensors, metadata), (saved, saved_metadata) = open_shards(ours), open_shards(tmp_path / "saved")
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name].view(torch.uint8), saved[name].view(torch.uint8)) for name in saved)
    num_files = len(list(ours.glob("*.safetensors")))
    assert num_files == len(list((tmp_path / "saved").glob("*.safetensors"))) and (num_files > 9) == (
        max_shard_size != "5GB"
    )
    settings = [json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path / "saved")]
    quantization = [each.pop("quantization_config") for each in settings]
    del settings[1]["_name_or_path"]
    assert settings[0] == settings[1]
    if is_same:
        assert metadata == saved_metadata and quantization[0]["quant_type"] == quantization[1]["quant_type"]

    loaded = MagiHumanTransformer3DModel.from_pretrained(ours)
    linear = loaded.transformer_blocks[1].ff.linear_in
    dynamic = kind == "float8"
    assert loaded.dtype == torch.bfloat16 and (linear.weight.act_quant_kwargs is not None) == dynamic
    assert (type(loaded.transformer_blocks[1].attn.to_gate.weight) is torch.nn.Parameter) == dynamic
    if dynamic and not multiplies_float8_by_row():
        return
    original = MagiHumanTransformer3DModel.from_single_file(wide, dtype=torch.float32, variant="base")
    assert 0.002 < error(predict(loaded), predict(original)) < (0.1 if dynamic else 0.03)
    if kind == "int8":
        assert torch.equal(predict(loaded), predict(expected))


GGUF_ERRORS = {"Q8_0": 0.015, "Q4_K": 0.25}


@pytest.mark.parametrize("kind", GGUF_ERRORS)
def test_gguf_needs_no_config(kind, wide, tmp_path):
    multiple = None if kind == "Q4_K" else 32
    path = convert_checkpoint(
        wide, tmp_path / "new" / "x.gguf", "base", feed_forward_multiple=multiple, quantize=f"gguf:{kind}"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["new"] and os.listdir(path.parent) == ["x.gguf"]
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    loaded = MagiHumanTransformer3DModel.from_single_file(str(path), quantization_config=config)
    original = MagiHumanTransformer3DModel.from_single_file(wide, dtype=torch.float32, variant="base")
    assert loaded.config.feed_forward_multiple == (multiple or 256)
    kept = {name: tensor for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert len(loaded.state_dict()) - len(kept) == 7 * (1 + 2 * 3)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in kept.items())
    assert GGUF_ERRORS[kind] / 10 < error(predict(loaded), predict(original)) < GGUF_ERRORS[kind]
    with pytest.raises(ValueError, match=r"which exists"):
        convert_checkpoint(wide, path, quantize=f"gguf:{kind}")


def test_linears_that_cannot_be_quantized_leave_nothing(wide, tmp_path):
    for kind, name in (("float8", "out"), ("gguf:Q8_0", "out.gguf")):
        with pytest.raises(ValueError, match=f"`quantize`='{kind}' takes sizes of multiples of .*linear_out"):
            convert_checkpoint(wide, tmp_path / name, quantize=kind, feed_forward_multiple=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", [split, fp8])
def test_every_layout_converts(layout, tmp_path):
    write_file(layout(load_golden_weights("dit_base")), tmp_path / "distill.safetensors")
    output = convert_checkpoint(tmp_path / "distill.safetensors", tmp_path / "out", dtype=torch.float32)
    loaded = MagiHumanTransformer3DModel.from_pretrained(output, subfolder="transformer")
    assert states_equal(loaded, load_original_transformer(tmp_path / "distill.safetensors", dtype=torch.float32))


@pytest.mark.parametrize("layout", [all_fp32, fp8])
def test_feed_forwards_are_padded(layout, tmp_path):
    file, output = tmp_path / "distill.safetensors", tmp_path / "out"
    write_file(layout(load_golden_weights("dit_base")), file)
    arguments = ["convert", file, output, "--feed-forward-multiple", "128", "--dtype", "float32"]
    assert main([str(argument) for argument in [*arguments, "--max-shard-size", "200KB"]]) == 0
    loaded = MagiHumanTransformer3DModel.from_pretrained(output, subfolder="transformer")
    assert loaded.config.feed_forward_multiple == 128
    assert loaded.transformer_blocks[2].ff.linear_out.in_features == 256
    assert states_equal(loaded, load_original_transformer(file, dtype=torch.float32, feed_forward_multiple=128))


@pytest.mark.parametrize("multiple", [0, -1, 1.5, True, "128", 10**9])
def test_wrong_multiple_converts_nothing(multiple, source, tmp_path):
    with pytest.raises(ValueError, match=r"`feed_forward_multiple`=.* 1 to 4096"):
        convert_checkpoint(source, tmp_path / "out", feed_forward_multiple=multiple)
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(tmp_path / "out"), "--feed-forward-multiple", f"{multiple!r}"])
    assert not list(tmp_path.iterdir())


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
    while process.poll() is None and not list(tmp_path.glob(".out.*.incomplete/files/out/transformer/*.safetensors")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()

    convert_checkpoint(source, tmp_path / "out", max_shard_size="100KB")
    loaded = MagiHumanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer", dtype=torch.bfloat16)
    assert states_equal(loaded, load_original_transformer(source))
    assert os.listdir(tmp_path) == ["out"]


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


def test_what_cannot_be_written_is_found_before_anything_is_converted(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "write_shards", None)  # nothing is converted
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "file").touch()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    for name, error, message in (
        ("link", ValueError, "which exists"),
        ("file/out", OSError, "file"),
        (f"new/{'x' * 300}", OSError, "name too long"),
        ("new/deep/out", OSError, "GB on the disk"),
    ):
        if "disk" in message:
            monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: full)
        with pytest.raises(error, match=f"(?i){message}"):
            convert_checkpoint(source, tmp_path / name)
    for size in ("5 apples", "infGB", "-1GB", "", 0, True, 0.5, None):
        with pytest.raises(ValueError, match="`max_shard_size`"):
            convert_checkpoint(source, tmp_path / "out", max_shard_size=size)
    for name in ("source", "output", "dtype"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            convert_checkpoint(**{"source": source, "output": tmp_path / "out", name: 3})
    assert {path.name for path in tmp_path.iterdir()} == {"link", "file"}


def test_diffusers_directory_is_one_already(tiny_pipeline_dir, tmp_path):
    with pytest.raises(ValueError, match="a Diffusers directory already"):
        convert_checkpoint(tiny_pipeline_dir, tmp_path / "out")


def test_two_conversions_to_one_output(source, tmp_path, monkeypatch):
    """The one that ends first is kept whole; a folder that only looks like ours too."""
    (tmp_path / ".out.incomplete").mkdir()
    write_code = convert.write_repository_code

    def overtake(folder):
        monkeypatch.setattr(convert, "write_repository_code", write_code)
        convert_checkpoint(source, tmp_path / "out", dtype=torch.float32)
        write_code(folder)

    monkeypatch.setattr(convert, "write_repository_code", overtake)
    with pytest.raises(OSError, match="not empty"):
        convert_checkpoint(source, tmp_path / "out")
    loaded = MagiHumanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert states_equal(loaded, load_original_transformer(source, dtype=torch.float32))
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.incomplete"}


@pytest.mark.parametrize("repo", ['a/b"\n', "a/b\n", "a/b\n---", "`a`/b", "a" * 300, "", "a/b/c"])
def test_name_to_push_to_is_checked_first(repo, source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "out"), "--push-to-hub", repo]) == 2
    assert "Repo id" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_login_is_checked_first(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "write_shards", None)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert main(["convert", str(source), str(tmp_path / "out"), "--push-to-hub", "someone/model"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_existing_output_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="which exists; it must be new"):
        convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    with pytest.raises(ValueError, match=r"`output`=.*x\.gguf' must be a directory for `quantize`=None"):
        convert_checkpoint(source, tmp_path / "x.gguf")


def test_command(source, parts, tmp_path, capsys):
    options = ["--with-text-encoder", parts["text_encoder"], "--with-vaes", parts["video_vae"]]
    options += ["--turbo-vae", parts["turbo_vae"], "--audio-vae", parts["audio_vae"], "--dtype", "float32"]
    arguments = ["convert", source, tmp_path / "out", *options]
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(tmp_path / "out") and "B/s" in captured.err
    assert run(DiffusionPipeline.from_pretrained(tmp_path / "out")).frames.shape == (1, 4, 3, 4, 4)

    gguf = ["convert", str(source), str(tmp_path / "x.gguf"), "--quantize", "gguf:Q4_0"]
    assert main([*gguf, "--feed-forward-multiple", "32"]) == 0 and (tmp_path / "x.gguf").is_file()
    gguf[2] = str(tmp_path / "y.gguf")
    assert main([*gguf, "--dtype", "float32"]) == 2
    assert "must be None" in capsys.readouterr().err.splitlines()[-1]

    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert main(["convert", str(tmp_path), str(tmp_path / "other")]) == 2
    assert main(["convert", "nowhere", str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "it must be new" in errors[-3] and "does not tell the variant" in errors[-2]
    assert "SOURCE 'nowhere' is neither a path that exists" in errors[-1]
    for option in ("--turbo-vae", "--audio-vae"):
        assert main(["convert", str(source), str(tmp_path / "other"), option, "owner/name"]) == 2
        assert f"{option} must come with --with-vaes" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="`turbo_vae`='owner/name' needs `video_vae`"):
        convert_checkpoint(source, tmp_path / "other", turbo_vae="owner/name")
