"""`torch.compile` of the whole model and of its blocks: one graph, and none anew between steps or for other lengths.

Breaks and recompilations are decided before a backend comes into play, so most tests take the quick one, "eager".
"""

import pytest
import torch
from helpers import assert_same, make_inputs, make_tiny_model, run

LOCAL = {"coordinate_style": "v1", "local_attention_layers": (0, 1)}
# Text, audio, frames: nothing that a call may change stays the same.
LENGTHS = [
    {},
    {"text_length": 9},
    {"num_frames": 4, "audio_length": 13},
    {"num_frames": 6, "audio_length": 21, "text_length": 12},
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    # Sizes that happen to be equal need not stay so.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield
    torch.compiler.reset()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def make_model(**config):
    return make_tiny_model(num_layers=2, modality_layers=(0,), **config)


def make_mask(batch_size, text_length):
    return torch.arange(text_length) < torch.tensor([text_length, 3])[:batch_size, None]


def assert_equal_outputs(model, compiled, batch_size=1, **lengths):
    inputs = make_inputs(batch_size, **lengths)
    mask = make_mask(batch_size, inputs[2].shape[1]) if batch_size > 1 else None
    outputs = compiled(*inputs, encoder_attention_mask=mask, return_dict=False)
    expected = model(*inputs, encoder_attention_mask=mask, return_dict=False)
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.slow
def test_one_graph_serves_all_lengths_with_masks_local_layers_and_fused_projections():
    model = make_model(**LOCAL)
    model.fuse_qkv_projections()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            assert_equal_outputs(model, compiled, batch_size=2, **lengths)


@torch.no_grad()
def test_lengths_become_dynamic_when_they_first_change():
    model = make_tiny_model(num_layers=1, modality_layers=(0,))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for lengths in (LENGTHS[0], LENGTHS[3]):
        assert_equal_outputs(model, compiled, **lengths)
    assert num_graphs() == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            assert_equal_outputs(model, compiled, **lengths)


@torch.no_grad()
def test_narrow_local_layers_compile_once_for_a_number_of_frames():
    local = LOCAL | {"local_attention_layers": (0,)}
    model = make_tiny_model(**local, num_layers=1, modality_layers=(0,), local_attention_frames=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    assert_equal_outputs(model, compiled, num_frames=4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equal_outputs(model, compiled, num_frames=4, audio_length=13, text_length=9)


@torch.no_grad()
def test_repeated_blocks_compile_once_for_each_kind():
    config = {"num_layers": 4, "modality_layers": (0, 3), "gelu_layers": (0,)}
    model, regional = make_tiny_model(**config), make_tiny_model(**config)
    regional.load_state_dict(model.state_dict())
    regional.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for lengths in LENGTHS:
        assert_equal_outputs(model, regional, **lengths)
    assert num_graphs() == 3


def test_steps_of_a_pipeline_share_one_graph(tiny_pipeline):
    transformer, prompts = tiny_pipeline.transformer, [("One.", {}), ("Another one.", {"num_frames": 13})]
    image = torch.randn(1, 8, 1, 4, 4)
    expected = [run(tiny_pipeline, prompt, image_latents=image, **kwargs) for prompt, kwargs in prompts]
    expected.append(run(tiny_pipeline, "One."))
    transformer.compile(fullgraph=True, dynamic=True, backend="eager")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs = [run(tiny_pipeline, prompt, image_latents=image, **kwargs) for prompt, kwargs in prompts]
            outputs.append(run(tiny_pipeline, "One."))
    finally:
        transformer._compiled_call_impl = None
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same(output, wanted, tolerance=1e-5)
    assert num_graphs() == 1


@pytest.mark.parametrize("config, batch_size", [({}, 1), (LOCAL, 2)])
@torch.no_grad()
def test_exported_program_gives_the_same(config, batch_size):
    model = make_model(**config)
    video, audio, text = make_inputs(batch_size)
    inputs = {"hidden_states": video, "audio_hidden_states": audio, "encoder_hidden_states": text}
    if batch_size > 1:
        inputs["encoder_attention_mask"] = make_mask(batch_size, 7)
    program = torch.export.export(model, args=(), kwargs=inputs)
    outputs, expected = program.module()(**inputs), model(**inputs)
    for name in ("sample", "audio_sample"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [{}, LOCAL])
@torch.no_grad()
def test_inductor_on_a_gpu(config, tmp_path):
    model = make_model(**config).to("cuda")
    inputs = [tensor.to("cuda") for tensor in make_inputs()]
    expected = model(*inputs).sample
    names = ("hidden_states", "audio_hidden_states", "encoder_hidden_states")
    program = torch.export.export(model, args=(), kwargs=dict(zip(names, inputs, strict=True)))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    exported = torch._inductor.aoti_load_package(package)
    compiled = torch.compile(model, fullgraph=True)
    outputs = [compiled(*inputs).sample, exported(**dict(zip(names, inputs, strict=True)))["sample"]]
    model.compile_repeated_blocks(fullgraph=True)
    outputs.append(model(*inputs).sample)
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
