"""What Diffusers expects of every pipeline, and its own testers check, as far as no other file tests it."""

import inspect
import json

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from helpers import PROMPT, assert_same, run, upscale
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline


@pytest.fixture(params=["base", "upscale"])
def pipe_and_run(request):
    """A pipeline that a test may change, and what runs it with guidance for two steps."""
    make_pipe, call = {
        "base": (make_tiny_pipeline, run),
        "upscale": (make_tiny_upscale_pipeline, upscale),
    }[request.param]

    def run_guided(pipe, prompt=PROMPT, **kwargs):
        return call(pipe, prompt, **{"guidance_scale": 3.0, "negative_prompt": "Blurred.", **kwargs})

    return make_pipe(), run_guided


def test_saved_pipeline_names_classes_of_diffusers(pipe_and_run, tmp_path):
    pipe, run = pipe_and_run
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    assert all(index[name][0] == "diffusers" for name in ("transformer", "scheduler", "vae", "audio_vae"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipe) and loaded.config.default_height == pipe.config.default_height
    assert_same(run(loaded), run(pipe))


def test_pipeline_with_a_variant(pipe_and_run, tmp_path):
    pipe, run = pipe_and_run
    pipe.save_pretrained(tmp_path, variant="fp16")
    for name in ("transformer", "vae", "audio_vae", "text_encoder"):
        assert any(".fp16." in path.name for path in (tmp_path / name).iterdir()), name
    loaded = type(pipe).from_pretrained(tmp_path, variant="fp16", device_map="cpu")
    assert_same(run(loaded), run(pipe))
    with pytest.raises(ValueError, match="model files of the `variant=bf16`"):
        type(pipe).from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_pipeline_in_half_precision(dtype, tolerance, pipe_and_run, tmp_path):
    pipe, run = pipe_and_run
    pipe.save_pretrained(tmp_path)
    models = [name for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)]
    expected = run(pipe, output_type="pt").frames
    assert pipe.to(dtype=dtype) is pipe
    mixed = {"default": dtype, "text_encoder": torch.float32}
    loaded = [type(pipe).from_pretrained(tmp_path, dtype=each) for each in (dtype, mixed)]
    for each in (pipe, *loaded):
        text_dtype = torch.float32 if each is loaded[1] else dtype
        for name in models:
            assert getattr(each, name).dtype == (text_dtype if name == "text_encoder" else dtype), name
        frames = run(each, output_type="pt").frames
        assert (frames - expected).square().mean().sqrt() < tolerance  # 0.14 for another seed


def test_components_make_the_same_pipeline(pipe_and_run):
    pipe, run = pipe_and_run
    assert set(pipe.components) == {"tokenizer", "text_encoder", "transformer", "scheduler", "vae", "audio_vae"}
    assert_same(run(type(pipe)(**pipe.components)), run(pipe))
    assert type(pipe).from_pipe(pipe).components == pipe.components


def test_call_has_the_usual_arguments(pipe_and_run):
    pipe, run = pipe_and_run
    parameters = inspect.signature(type(pipe).__call__).parameters
    usual = "prompt negative_prompt height width num_inference_steps guidance_scale generator latents audio_latents "
    usual += "prompt_embeds negative_prompt_embeds output_type return_dict attention_kwargs callback_on_step_end"
    assert set(usual.split()) <= parameters.keys()
    assert all(value.default is not inspect.Parameter.empty for name, value in parameters.items() if name != "self")
    output, as_tuple = run(pipe, output_type="pt"), run(pipe, output_type="pt", return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(output.frames, as_tuple[0]) and torch.equal(output[1], as_tuple[1])


def test_prompts_are_encoded_apart_from_the_rest(pipe_and_run):
    """One pipeline has only what encodes text, the other everything else; names of results are those of arguments."""
    pipe, run = pipe_and_run
    text = {"tokenizer", "text_encoder"}
    halves = [
        type(pipe)(**{name: part if (name in text) == keeps_text else None for name, part in pipe.components.items()})
        for keeps_text in (True, False)
    ]
    visitor = ReturnNameVisitor()
    visitor.visit(visitor.get_ast_tree(cls=type(pipe)))
    assert set(visitor.return_names) <= inspect.signature(type(pipe).__call__).parameters.keys()
    with torch.no_grad():
        encoded = halves[0].encode_prompt([PROMPT, "Short."], "Blurred.")
    embeds = dict(zip(visitor.return_names, encoded, strict=True))
    assert_same(run(halves[1], None, negative_prompt=None, **embeds), run(pipe, [PROMPT, "Short."]))


def count_forwards(pipe):
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_callback_turns_guidance_off_and_up(pipe_and_run):
    pipe, run = pipe_and_run
    calls = count_forwards(pipe)

    def turn_off(pipe, step, _timestep, tensors):
        if step == 1:
            pipe._guidance_scale = pipe._audio_guidance_scale = 1.0
        return tensors

    guided = run(pipe, num_inference_steps=5)
    assert len(calls) == 10
    cut_off = run(pipe, num_inference_steps=5, callback_on_step_end=turn_off)
    assert len(calls) == 10 + 2 * 2 + 3
    assert (cut_off.frames - guided.frames).abs().max() > 1e-4

    def turn_up(pipe, _step, _timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    inputs = pipe._callback_tensor_inputs
    run(pipe, num_inference_steps=5, callback_on_step_end=turn_up, callback_on_step_end_tensor_inputs=inputs)
    assert len(calls) == 10 + 7 + 10
    assert pipe.guidance_scale == 3.0 + pipe.num_timesteps


def test_callback_changes_what_it_is_given(pipe_and_run):
    pipe, run = pipe_and_run
    for name in pipe._callback_tensor_inputs:

        def change(_pipe, step, _timestep, tensors, name=name):
            assert list(tensors) == [name]
            return {name: torch.zeros_like(tensors[name])} if step == 0 else {}

        arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [name]}
        assert not torch.equal(run(pipe, **arguments).frames, run(pipe).frames), name


def test_sampler_is_a_component_like_any_other(pipe_and_run):
    """The stochastic solver in the place of the multistep one, by the config of the first."""
    pipe, run = pipe_and_run
    expected = run(pipe)
    pipe.scheduler = diffusers.MagiHumanFlowScheduler.from_config(pipe.scheduler.config, sampler="renoise")
    assert not torch.equal(run(pipe).frames, expected.frames)
    pipe.scheduler = diffusers.MagiHumanFlowScheduler.from_config(pipe.scheduler.config, sampler="unipc")
    assert_same(run(pipe), expected)


def test_classes_are_found_where_diffusers_looks():
    for name in ("MagiHumanAudioVideoPipeline", "MagiHumanLatentUpscalePipeline"):
        assert getattr(diffusers.pipelines, name) is getattr(diffusers, name)
    assert isinstance(diffusers.AutoencoderKLMagiHumanTurbo, type)


def test_pipeline_with_a_lora_is_not_saved_in_half(pipe_and_run, tmp_path):
    pipe, _ = pipe_and_run
    name = next(name for name, _ in pipe.transformer.named_modules() if name.endswith("to_q"))
    linear = pipe.transformer.get_submodule(name)
    lora = {"lora_A": torch.ones(1, linear.in_features), "lora_B": torch.ones(linear.out_features, 1)}
    pipe.load_lora_weights({f"transformer.{name}.{kind}.weight": value for kind, value in lora.items()})
    for save in (lambda: pipe.save_pretrained(tmp_path / "pipe"), lambda: pipe.push_to_hub("owner/name")):
        with pytest.raises(ValueError, match=r"LoRA cannot be saved.*fuse_lora"):
            save()
    assert not (tmp_path / "pipe").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    assert set(pipe.transformer.state_dict()) == set(
        type(pipe).from_pretrained(tmp_path / "pipe").transformer.state_dict()
    )
