"""Every way to hold weights or to decode in parts gives the output of the model that is in memory as a whole."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from helpers import assert_equal, generate, round_to_float8
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline, make_transformer, make_turbo_vae

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanTransformer3DModel,
)


CPU = torch.device("cpu")
PIPELINES = {"base": make_tiny_pipeline, "upscale": make_tiny_upscale_pipeline}
GROUPS = {
    "block_level": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf_level": {"offload_type": "leaf_level"},
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def assert_close(output, expected):
    for value, other in zip(output, expected, strict=True):
        assert np.abs(value - other).max() <= 1e-5


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def expected(kind):
    return generate(PIPELINES[kind]())


def test_model_offload(kind, expected):
    pipe = PIPELINES[kind]()
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are renewed after each call
        assert_equal(generate(pipe), expected)
    frames = np.stack(list(generate(pipe, output_type="stream")[0][0]))
    assert np.array_equal(frames, expected[0][0])


def test_sequential_offload(kind, expected):
    """The hooks of `enable_sequential_cpu_offload`, which itself refuses to offload from a CPU."""
    pipe = PIPELINES[kind]()
    assert pipe._exclude_from_cpu_offload == ["audio_vae"]  # whose weight norm does not survive these hooks
    for component in (pipe.text_encoder, pipe.transformer, pipe.vae):
        cpu_offload(component, CPU, offload_buffers=len(component._parameters) > 0)
        assert {parameter.device.type for parameter in component.parameters()} == {"meta"}
    for _ in range(2):
        assert_equal(generate(pipe), expected)


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_group_offload(group, to_disk, kind, expected, tmp_path):
    pipe = PIPELINES[kind]()
    path = str(tmp_path) if to_disk else None
    pipe.enable_group_offload(CPU, **GROUPS[group], exclude_modules=["audio_vae"], offload_to_disk_path=path)
    for _ in range(2):
        assert_equal(generate(pipe), expected)
    # A file for each block of the text encoder and of the transformer at least.
    assert len(list(tmp_path.iterdir())) >= (2 + 3) * to_disk


def test_group_offload_by_blocks_parts_the_text_encoder():
    """Diffusers alone would take it as one block, as its layers are not its own children."""
    pipe = make_tiny_pipeline()
    pipe.enable_group_offload(CPU, **GROUPS["block_level"], exclude_modules=["vae", "audio_vae"])
    groups = {
        id(module._diffusers_hook.get_hook("group_offloading").group)
        for module in pipe.text_encoder.encoder.layers
        if hasattr(module, "_diffusers_hook")
    }
    assert len(groups) == len(pipe.text_encoder.encoder.layers) == 2


def test_the_sound_autoencoder_refuses_group_offload():
    pipe = make_tiny_pipeline()
    with pytest.raises(ValueError, match="AutoencoderOobleck does not support group offloading"):
        pipe.enable_group_offload(CPU, offload_type="leaf_level")


@pytest.mark.parametrize(
    "name, model_class", [("transformer", MagiHumanTransformer3DModel), ("vae", AutoencoderKLMagiHumanTurbo)]
)
def test_device_map_with_disk(name, model_class, kind, expected, tmp_path):
    pipe = PIPELINES[kind]()
    pipe.save_pretrained(tmp_path / "pipeline")
    size = sum(parameter.nbytes for parameter in getattr(pipe, name).parameters())
    model = model_class.from_pretrained(
        tmp_path / "pipeline",
        subfolder=name,
        device_map="auto",
        max_memory={"cpu": int(0.7 * size)},
        offload_folder=tmp_path / "offloaded",
    )
    assert {str(device) for device in model.hf_device_map.values()} == {"cpu", "disk"}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", **{name: model})
    assert_equal(generate(loaded), expected)


def test_device_map_returns_an_output():
    """accelerate moves what a dispatched model returns, the output class of the transformer too."""
    model = make_transformer()
    inputs = torch.randn(1, 8, 2, 2, 4), torch.randn(1, 5, 8), torch.randn(1, 3, 16)
    with torch.no_grad():
        expected = model(*inputs)
        cpu_offload(model, CPU)
        output = model(*inputs)
    assert type(output) is type(expected)
    assert torch.equal(output.sample, expected.sample) and torch.equal(output.audio_sample, expected.audio_sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layerwise_casting(dtype, tmp_path):
    """Float8 storage rounds the linears of the blocks, those of each modality too, and nothing else."""
    make_transformer(coordinate_style="v1", post_norm_layers=(1,)).save_pretrained(tmp_path)
    model = MagiHumanTransformer3DModel.from_pretrained(tmp_path, dtype=dtype)
    inputs = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 5, 8), torch.randn(1, 3, 16)
    exact = model(*inputs)
    rounded = round_to_float8(copy.deepcopy(model))(*inputs)

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
    assert model.dtype == dtype
    for name, parameter in model.named_parameters():
        is_stored_as_float8 = ".attn.to_" in name or ".ff.linear_" in name
        assert parameter.dtype == (torch.float8_e4m3fn if is_stored_as_float8 else torch.float32), name
        if not is_stored_as_float8:
            assert torch.equal(parameter, before[name])

    cast = model(*inputs)
    for name in ("sample", "audio_sample"):
        assert torch.equal(cast[name], rounded[name])
        error = (cast[name] - exact[name]).norm() / exact[name].norm()
        assert 1e-3 < error < 0.15, error  # 5 % for video and 10 % for sound with these random weights


@torch.no_grad()
def test_layerwise_casting_of_the_autoencoder():
    vae = make_turbo_vae()
    z = torch.randn(1, 8, 2, 1, 2)
    exact = vae.decode(z).sample
    rounded = copy.deepcopy(vae)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d):
            for parameter in module.parameters():
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
    vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert {parameter.dtype for parameter in vae.decoder.parameters()} == {torch.float8_e4m3fn}
    decoded = vae.decode(z).sample
    assert torch.equal(decoded, rounded.decode(z).sample)
    assert (decoded - exact).norm() / exact.norm() > 1e-3


def test_layerwise_casting_with_group_offload(kind):
    pipe = PIPELINES[kind]()
    round_to_float8(pipe.transformer)
    expected = generate(pipe)
    pipe = PIPELINES[kind]()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe.enable_group_offload(CPU, **GROUPS["block_level"], exclude_modules=["vae", "audio_vae"])
    assert_equal(generate(pipe), expected)


@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_forward_chunking_with_group_offload(group, is_float8, kind, expected):
    if is_float8:
        pipe = PIPELINES[kind]()
        round_to_float8(pipe.transformer)
        expected = generate(pipe)
    pipe = PIPELINES[kind]()
    if is_float8:
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe.enable_group_offload(CPU, **GROUPS[group], exclude_modules=["vae", "audio_vae"])
    pipe.transformer.enable_forward_chunking(5)
    lengths = set()
    for block in pipe.transformer.transformer_blocks:
        block.ff.act.register_forward_hook(lambda _, args, __: lengths.add(args[0].shape[1]))
    assert_close(generate(pipe), expected)
    assert max(lengths) == 5


def test_tiling_and_slicing(kind, expected):
    pipe = PIPELINES[kind]()
    pipe.vae.enable_slicing()
    assert_equal(generate(pipe), expected)
    pipe.vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=32)
    frames, sound = generate(pipe)
    assert np.abs(frames - expected[0]).max() <= 1e-5
    assert np.array_equal(sound, expected[1])


# What moves weights to a GPU


def enable_group_offload(pipe, group, **arguments):
    pipe.enable_group_offload(torch.device("cuda"), **GROUPS[group], exclude_modules=["vae", "audio_vae"], **arguments)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("way", ["model", "sequential", *GROUPS])
@pytest.mark.parametrize("use_stream", [False, True])
def test_offload_on_a_gpu(use_stream, way, kind):
    if use_stream and way not in GROUPS:
        pytest.skip("only group offloading has streams")
    expected = generate(PIPELINES[kind]().to("cuda"))
    pipe = PIPELINES[kind]()
    if way in GROUPS:
        enable_group_offload(pipe, way, use_stream=use_stream)
    elif way == "model":
        pipe.enable_model_cpu_offload()
    else:
        pipe.enable_sequential_cpu_offload()
    for _ in range(2):  # streams fetch ahead in the second call
        assert_close(generate(pipe), expected)
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} <= {"cpu", "meta"}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("group", GROUPS)
def test_forward_chunking_with_streams_on_a_gpu(group, kind):
    """Leaves come once for each chunk, which is not the order in which streams fetch ahead."""
    expected = generate(PIPELINES[kind]().to("cuda"))
    pipe = PIPELINES[kind]()
    enable_group_offload(pipe, group, use_stream=True)
    pipe.transformer.enable_forward_chunking(5)
    for _ in range(2):
        assert_close(generate(pipe), expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("group", GROUPS)
def test_group_offload_from_disk_on_a_gpu(group, kind, tmp_path):
    expected = generate(PIPELINES[kind]().to("cuda"))
    pipe = PIPELINES[kind]()
    enable_group_offload(pipe, group, use_stream=True, offload_to_disk_path=str(tmp_path))
    assert_close(generate(pipe), expected)


@pytest.mark.gpu
@needs_gpu
def test_balanced_device_map_on_a_gpu(kind, tmp_path):
    expected = generate(PIPELINES[kind]().to("cuda"))
    PIPELINES[kind]().save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, device_map="balanced")
    assert_close(generate(pipe), expected)
