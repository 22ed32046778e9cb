# SPDX-License-Identifier: Apache-2.0
"""The blocks give the bytes of the pipelines, and work as blocks of Diffusers do."""

import copy
import json
import shutil
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    ComponentsManager,
    DiffusionPipeline,
    ModularPipeline,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from helpers import seeded
from make_tiny_pipeline import make_tiny_pipeline

import diffusers_magihuman
from diffusers_magihuman import (
    MagiHumanAutoBlocks,
    MagiHumanDistilledAutoBlocks,
    MagiHumanDistilledModularPipeline,
    MagiHumanGuidance,
    MagiHumanModularPipeline,
    MagiHumanUpscaleAutoBlocks,
    MagiHumanUpscaleModularPipeline,
    embedded_model,
)
from diffusers_magihuman.constants import MODULAR_PIPELINES

BLOCKS = {
    "base": MagiHumanAutoBlocks,
    "distilled": MagiHumanDistilledAutoBlocks,
    "upscale": MagiHumanUpscaleAutoBlocks,
}
SMALL = {"prompt": "hello", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
IMAGE = np.linspace(0, 1, 96 * 80 * 3).reshape(96, 80, 3).astype("f4")
AUDIO = (np.sin(np.arange(20000) / 9).astype("f4") * 0.4, 22050)
VIDEO = np.random.default_rng(0).random((9, 64, 64, 3), "f4")
LOW = {"latents": torch.randn(2, 8, 3, 4, 4, generator=seeded()), "audio_latents": torch.randn(2, 9, 8)}
LARGE = {"prompt": "hello", "height": 96, "width": 128, "num_inference_steps": 2}
TEXT = {
    "prompt",
    "max_sequence_length",
    "num_videos_per_prompt",
    "height",
    "width",
    "num_frames",
    "generator",
    "latents",
}
TEXT |= {"num_inference_steps", "attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
TEXT |= {"output_type"}


@pytest.fixture
def plain(request):
    names = {"base": "tiny_pipeline", "distilled": "tiny_distilled_pipeline", "upscale": "tiny_upscale_pipeline"}
    pipe = request.getfixturevalue(names[request.param])
    pipe.kind = request.param
    return pipe


def make_pipe(plain, preset=None, **components):
    blocks = BLOCKS[plain.kind]()
    pipe = (blocks if preset is None else blocks.get_workflow(preset)).init_pipeline()
    pipe.update_components(**plain.components, **components)
    return pipe


@pytest.fixture
def base(tiny_pipeline):
    tiny_pipeline.kind = "base"
    return make_pipe(tiny_pipeline)


def same(first, second):
    return np.array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("plain", ["base", "distilled"], indirect=True)
@pytest.mark.parametrize(
    ("preset", "inputs"),
    [
        ("text2video", {"prompt": ["hello", "a longer text"], "output_type": "pt"}),
        ("image2video", {"image": IMAGE}),
        ("audio2video", {"audio": AUDIO, "num_frames": None}),
        ("image_audio2video", {"image": IMAGE, "audio": AUDIO, "num_videos_per_prompt": 2}),
    ],
)
def test_presets_give_the_bytes_of_the_pipeline(plain, preset, inputs):
    expected = plain(**SMALL | inputs, generator=seeded())
    for pipe in (make_pipe(plain), make_pipe(plain, preset)):
        output = pipe(**SMALL | inputs, generator=seeded(), output=["videos", "audio", "sampling_rate"])
        assert same(output["videos"], expected.frames)
        assert same(output["audio"], expected.audio)
        assert output["sampling_rate"] == plain.audio_sampling_rate


@pytest.mark.parametrize("plain", ["upscale"], indirect=True)
@pytest.mark.parametrize(
    ("preset", "inputs"),
    [
        ("latents", LOW),
        ("image_latents", LOW | {"image": IMAGE, "prompt": ["hello", "a longer text"]}),
        ("latents", LOW | {"guidance_scale": 3.5, "num_leading_frames": 1}),
        ("video", {"video": VIDEO}),
        ("image_audio_video", {"video": VIDEO, "image": IMAGE, "audio": AUDIO}),
    ],
)
def test_upscaling_presets_give_the_bytes_of_the_pipeline(plain, preset, inputs):
    names = {"guidance_scale", "num_leading_frames"} & inputs.keys()
    expected = plain(**LARGE | inputs, generator=seeded())
    pipe = make_pipe(plain, preset)
    pipe.update_components(guider=pipe.guider.new(**{name: inputs[name] for name in names}))
    rest = {name: value for name, value in inputs.items() if name not in names}
    output = pipe(**LARGE | rest, generator=seeded(), output=["videos", "audio"])
    assert same(output["videos"], expected.frames)
    assert (output["audio"] is expected.audio is None) or same(output["audio"], expected.audio)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "distill", "upscale"])
def test_embedded_models_give_the_bytes_of_the_pipeline(kind):
    plain = DiffusionPipeline.from_pretrained(embedded_model(kind))
    pipe = ModularPipeline.from_pretrained(embedded_model(kind))
    pipe.load_components()
    inputs = {"prompt": "A woman with black hair.", "num_inference_steps": 3}
    if kind == "upscale":
        inputs["latents"] = torch.randn(1, plain.transformer.config.in_channels, 4, 8, 8)
    expected = plain(**inputs, generator=seeded())
    output = pipe(**inputs, generator=seeded(), output=["videos", "audio"])
    assert same(output["videos"], expected.frames)
    assert (output["audio"] is expected.audio is None) or same(output["audio"], expected.audio)


@pytest.mark.parametrize("plain", ["base", "distilled"], indirect=True)
def test_a_preset_takes_what_its_name_says(plain):
    negative = {"negative_prompt"} if plain.kind == "base" else set()
    more = BLOCKS[plain.kind]().get_workflow
    assert {*more("text2video").input_names} == TEXT | negative | {"audio_latents"}  # the noise of the audio
    assert {*more("image2video").input_names} == TEXT | negative | {"audio_latents", "image"}
    assert {*more("audio2video").input_names} == TEXT | negative | {"input_audio"}
    assert {*more("image_audio2video").input_names} == TEXT | negative | {"image", "input_audio"}
    for preset in more("text2video"), more("image2video"), more("audio2video"), more("image_audio2video"):
        assert {param.name for param in preset.inputs if param.required} <= {"prompt", "image", "input_audio"}


def test_a_preset_of_the_upscaler_takes_what_its_name_says():
    common = TEXT - {"num_frames", "num_videos_per_prompt", "latents"}
    common |= {"negative_prompt", "noise_level", "audio_noise_scale"}
    given = {"latents": {"latents", "audio_latents", "passed_audio"}, "audio_video": {"video", "input_audio"}}
    given |= {"video": {"video", "audio_latents", "passed_audio"}}
    for name in ("latents", "video", "audio_video"):
        blocks = BLOCKS["upscale"]()
        assert {*blocks.get_workflow(name).input_names} == common | given[name]
        assert {*blocks.get_workflow(f"image_{name}").input_names} == common | given[name] | {"image"}


def test_an_item_of_a_batch_is_what_it_is_alone(base):
    prompts, call = ["hello", "a longer text"], SMALL | {"output": ["latents", "audio_latents"]}
    both = base(**call | {"prompt": prompts, "output_type": "latent"}, generator=[seeded(0), seeded(1)])
    for index, prompt in enumerate(prompts):
        one = base(**call | {"prompt": prompt, "output_type": "latent"}, generator=seeded(index))
        for name, value in one.items():
            torch.testing.assert_close(value[0], both[name][index], atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", BLOCKS)
def test_node_editors_get_a_node_for_each_step(kind):
    config = MellonPipelineConfig.from_blocks(BLOCKS[kind]())
    nodes = {name: node for name, node in config.node_specs.items() if node is not None}
    assert {*nodes} == {"denoise", "vae_encoder", "text_encoder", "decoder"}
    assert {"latents"} <= {param.name for param in nodes["decoder"]["inputs"]}


# Files


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("tiny_pipeline_dir", MagiHumanDistilledModularPipeline),
        ("tiny_upscale_dir", MagiHumanUpscaleModularPipeline),
        ("base", MagiHumanModularPipeline),
    ],
)
def test_a_saved_pipeline_opens_as_blocks_which_save_what_can_be_moved(folder, kind, request, tmp_path):
    folder = embedded_model("base") if folder == "base" else request.getfixturevalue(folder)
    pipe = ModularPipeline.from_pretrained(folder)
    assert type(pipe) is kind
    pipe.load_components(names=["scheduler", "tokenizer", "transformer", "vae"])
    pipe.save_pretrained(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    index = json.loads((tmp_path / "b" / "modular_model_index.json").read_text())
    library, name, spec = index["transformer"]
    assert (library, name, *spec["type_hint"]) == ("diffusers", "MagiHumanTransformer3DModel") * 2
    assert str(tmp_path) not in json.dumps(index)
    assert index["audio_vae"][2]["pretrained_model_name_or_path"] == str(folder)  # not loaded, so not saved
    pushed = kind(None, "owner/name", modular_config_dict=index)
    assert pushed.get_component_spec("transformer").pretrained_model_name_or_path == "owner/name"
    moved = ModularPipeline.from_pretrained(tmp_path / "b")
    moved.load_components(names=["transformer", "scheduler"])
    assert type(moved) is kind
    assert dict(moved.config) == dict(ModularPipeline.from_pretrained(tmp_path / "b").config) | {
        name: moved.config[name] for name in ("transformer", "scheduler")
    }
    assert all(map(torch.equal, pipe.transformer.state_dict().values(), moved.transformer.state_dict().values()))


def test_a_preset_loads_what_it_needs(tiny_pipeline_dir):
    pipe = ModularPipeline.from_pretrained(tiny_pipeline_dir, workflow="text2video")
    assert "negative_prompt" not in pipe.blocks.input_names
    encoder = MagiHumanDistilledAutoBlocks().sub_blocks["text_encoder"].init_pipeline(tiny_pipeline_dir)
    encoder.load_components()
    assert {*encoder.components} == {"tokenizer", "text_encoder"}
    assert encoder(prompt="hello", output="prompt_embeds").shape == (1, 5, 16)


def test_a_saved_scale_is_that_of_the_guiders(tmp_path):
    pipe = make_tiny_pipeline(default_guidance_scale=3.0)
    pipe.register_to_config(default_guidance_scale=3.0)
    pipe.save_config(tmp_path)
    modular = ModularPipeline.from_pretrained(tmp_path)
    assert modular.guider.guidance_scale == modular.audio_guider.guidance_scale == 3.0
    assert modular.guider.low_noise_guidance_scale == 2.0


def test_a_component_that_does_not_load_is_the_error_of_the_first_block_that_needs_it(tiny_pipeline_dir, tmp_path):
    shutil.copytree(tiny_pipeline_dir, tmp_path / "a")
    next((tmp_path / "a" / "transformer").glob("*.safetensors")).write_bytes(b"damaged")
    pipe = ModularPipeline.from_pretrained(tmp_path / "a")
    pipe.load_components()
    with pytest.raises(ValueError, match="`transformer` of the pipeline is None") as error:
        pipe(**SMALL)
    assert "Unable to load transformer" in str(error.value.__cause__)
    pipe.unload_components("vae")
    assert pipe.vae is None
    with pytest.raises(ValueError, match="`vae` of the pipeline is None"):
        pipe(**SMALL, image=IMAGE)
    pipe.load_components(names="vae")
    assert pipe.vae is not None


def test_registration_is_quiet_where_a_name_is_missing():
    for register in diffusers_magihuman._REGISTER.values():
        if register is not diffusers_magihuman._register:
            register(ModuleType("another"))
    mapping = diffusers.modular_pipelines.modular_pipeline.MODULAR_PIPELINE_MAPPING
    assert {name: mapping[name]() for name in MODULAR_PIPELINES} == MODULAR_PIPELINES
    assert mapping["magihuman"]({"is_distilled": True}) == "MagiHumanDistilledModularPipeline"


def test_pipelines_of_one_manager_make_a_chain(tiny_distilled_pipeline, tiny_upscale_pipeline):
    manager, pipes = ComponentsManager(), []
    plain = {"distilled": tiny_distilled_pipeline, "upscale": tiny_upscale_pipeline}
    for kind, pipe in plain.items():
        pipes.append(BLOCKS[kind]().init_pipeline(components_manager=manager, collection=kind))
        pipes[-1].update_components(**pipe.components)
    assert len(manager.components) == len({id(part) for pipe in plain.values() for part in pipe.components.values()})
    low = pipes[0](**SMALL, generator=seeded(), output_type="latent")
    high = pipes[1](**LARGE, latents=low.latents, audio_latents=low.audio_latents, generator=seeded())
    expected = tiny_distilled_pipeline(**SMALL, generator=seeded(), output_type="latent")
    latents = {"latents": expected.frames, "audio_latents": expected.audio}
    expected = tiny_upscale_pipeline(**LARGE, **latents, generator=seeded())
    assert same(high.videos, expected.frames)
    assert same(high.audio, expected.audio)


def test_a_lora_loads_and_keeps_the_pipeline_from_being_saved(tmp_path):
    plain = make_tiny_pipeline(is_distilled=True)
    pipe = MagiHumanDistilledAutoBlocks().init_pipeline()
    pipe.update_components(**plain.components)
    assert not hasattr(pipe, "guider")
    call = {**SMALL, "output_type": "latent", "output": "latents"}
    before = pipe(**call, generator=seeded())
    name, linear = next((x, y) for x, y in plain.transformer.named_modules() if isinstance(y, torch.nn.Linear))
    shapes = {"lora_A": (2, linear.in_features), "lora_B": (linear.out_features, 2)}
    pipe.load_lora_weights({f"transformer.{name}.{x}.weight": torch.randn(shape) for x, shape in shapes.items()})
    assert not torch.equal(pipe(**call, generator=seeded()), before)
    assert torch.equal(pipe(**call, attention_kwargs={"scale": 0.0}, generator=seeded()), before)
    with pytest.raises(ValueError, match="LoRA"):
        pipe.save_pretrained(tmp_path)


# Guidance


def perturbed(kind=SkipLayerGuidance, **skipped):
    name = {SkipLayerGuidance: "skip_layer", PerturbedAttentionGuidance: "perturbed"}[kind]
    config = "skip_layer_config" if kind is SkipLayerGuidance else "perturbed_guidance_config"
    options = {f"{name}_guidance_start": 0.0, f"{name}_guidance_stop": 1.0}
    return kind(3.0, **{config: LayerSkipConfig([0, 1], **skipped)}, **options)


@pytest.mark.parametrize(
    ("guider", "num_calls"),  # in two steps
    [
        (MagiHumanGuidance(3.0), 4),
        (ClassifierFreeGuidance(3.0), 4),
        (ClassifierFreeGuidance(3.0, enabled=False), 4),  # the audio's asks for both
        (AdaptiveProjectedGuidance(3.0), 4),
        (AdaptiveProjectedMixGuidance(3.0), 4),
        (ClassifierFreeZeroStarGuidance(3.0), 4),
        (TangentialClassifierFreeGuidance(3.0), 4),
        (perturbed(), 5),  # in the second step
        (perturbed(skip_ff=False), 5),  # spatio-temporal guidance
        (perturbed(PerturbedAttentionGuidance, skip_attention=False, skip_attention_scores=True, skip_ff=False), 5),
        (AutoGuidance(3.0, auto_guidance_config=LayerSkipConfig([1])), 6),  # its own negative is not the audio's
    ],
    ids=lambda value: type(value).__name__,
)
def test_guiders_of_diffusers_run_and_share_what_they_ask_for(base, guider, num_calls, monkeypatch):
    calls, forward = [], base.transformer.forward
    inputs = {**SMALL, "output_type": "latent", "output": "latents"}
    others = [base(**inputs, generator=seeded())]
    base.update_components(guider=guider.new(enabled=False))
    others.append(base(**inputs, generator=seeded()))
    monkeypatch.setattr(
        base.transformer, "forward", lambda *args, **kwargs: calls.append(0) or forward(*args, **kwargs)
    )
    base.update_components(guider=guider)
    latents = base(**inputs, generator=seeded())
    assert latents.isfinite().all()
    assert not torch.equal(latents, others[0])
    assert torch.equal(latents, others[1]) == (not guider._enabled)
    assert len(calls) == num_calls


@pytest.mark.parametrize("name", ["SmoothedEnergyGuidance", "MagnitudeAwareGuidance", "LTX2Guidance"])
def test_guiders_that_cannot_guide_are_refused_by_the_first_block(base, name):
    kind = getattr(diffusers.guiders, name, None) or pytest.skip("not in this Diffusers")
    options = {"seg_guidance_layers": [1]} if name == "SmoothedEnergyGuidance" else {}
    base.update_components(guider=kind(3.0, **options))
    base.update_components(text_encoder=None, transformer=None)  # which would be asked for first
    with pytest.raises(ValueError, match=f"`guider`={name} cannot guide videos with audio: "):
        base(**SMALL)


def test_a_guider_that_perturbs_nothing_is_refused_and_leaves_no_hook(base):
    expected = base(**SMALL, generator=seeded(), output_type="latent", output="latents")
    good = base.guider
    for guider in perturbed(skip_attention=False), perturbed():
        base.update_components(guider=guider)
        nothing = {"match": "`guider`=SkipLayerGuidance changes nothing in the transformer"}
        if guider.skip_layer_config[0].skip_attention:  # another error, within a perturbed pass
            guider.skip_layer_config.append(LayerSkipConfig([99]))
            guider._skip_layer_hook_names.append("SkipLayerGuidance_1")
            nothing = {"match": "Could not find any transformer blocks"}
        with pytest.raises(ValueError, **nothing):
            base(**SMALL)
    base.update_components(guider=good)
    assert torch.equal(base(**SMALL, generator=seeded(), output_type="latent", output="latents"), expected)


def test_guidance_off_needs_no_negative_prompt(base, tiny_pipeline):
    expected = tiny_pipeline(**SMALL, generator=seeded(), guidance_scale=1.0, audio_guidance_scale=1.0)
    base.update_components(guider=MagiHumanGuidance(1.0), audio_guider=MagiHumanGuidance(enabled=False))
    state = base(**SMALL, generator=seeded())
    assert same(state.videos, expected.frames)
    assert state.negative_prompt_embeds is None
    base.update_components(guider=MagiHumanGuidance(5.0))
    core = BLOCKS["base"]().sub_blocks["denoise"].init_pipeline()
    core.update_components(**{name: base.components[name] for name in ("transformer", "scheduler")})
    with pytest.raises(ValueError, match="`negative_prompt_embeds` is None, but a guider needs them"):
        core(prompt_embeds=state.prompt_embeds)


def test_a_guider_that_stops_early_needs_negative_prompts_in_the_next_call(base):
    base.update_components(guider=MagiHumanGuidance(3.0, stop=0.5), audio_guider=MagiHumanGuidance(1.0))
    first, second = (base(**SMALL, generator=seeded(), output="videos") for _ in range(2))
    assert same(first, second)

    def end(_pipe, step, *_):
        if step:
            raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        base(**SMALL, callback_on_step_end=end)
    assert same(base(**SMALL, generator=seeded(), output="videos"), first)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"guidance_scale": "high"}, "`guidance_scale`='high'"),
        ({"num_leading_frames": -1}, "`num_leading_frames`=-1"),
        ({"low_noise_timestep": float("nan")}, "`low_noise_timestep`=nan"),
    ],
)
def test_guidance_refuses(inputs, message):
    with pytest.raises(ValueError, match=message):
        MagiHumanGuidance(**inputs)


# Calls


def test_a_callback_sees_each_step_changes_tensors_and_previews(base, tiny_pipeline):
    steps, frames = [], []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, float(timestep), *tensors))
        frames.append(pipe.preview(tensors["clean_latents"]) if "clean_latents" in tensors else None)
        return {"latents": tensors["latents"] * 0.5}

    inputs = SMALL | {"image": IMAGE, "callback_on_step_end": callback}
    expected = tiny_pipeline(**inputs, generator=seeded())
    plain_steps = copy.copy(steps)
    steps.clear()
    tensors = {"callback_on_step_end_tensor_inputs": ["latents", "clean_latents"]}
    state = base(**inputs, **tensors, generator=seeded())
    assert same(state.videos, expected.frames)
    assert steps == [(*step, "clean_latents") for step in plain_steps]
    assert frames[-1].shape == (1, 64, 64, 3)
    assert base.preview(state.latents, 1, "pt").shape == (1, 3, 64, 64)
    assert base.preview(state.latents, 2, "pil")[0].size == (64, 64)
    # Of the last step the estimate is what comes out.
    clean = []
    base(
        **SMALL,
        callback_on_step_end=lambda *args: clean.append(args[3]["clean_latents"]),
        callback_on_step_end_tensor_inputs=["clean_latents"],
    )
    assert len(clean) == 2


def test_a_callback_of_the_upscaler_changes_the_audio_that_the_transformer_sees(tiny_upscale_pipeline):
    tiny_upscale_pipeline.kind = "upscale"
    inputs = LARGE | LOW | {"callback_on_step_end_tensor_inputs": ["audio_latents"], "output_type": "latent"}
    inputs |= {"callback_on_step_end": lambda *args: {"audio_latents": args[3]["audio_latents"] * 0.5}}
    expected = tiny_upscale_pipeline(**inputs, generator=seeded())
    state = make_pipe(tiny_upscale_pipeline)(**inputs, generator=seeded())
    assert same(state.videos, expected.frames) and same(state.audio, LOW["audio_latents"])


def test_an_interrupt_leaves_a_state_that_decodes_and_ends_with_the_call(base):
    steps = []

    def callback(pipe, step, *_):
        steps.append(step)
        pipe._interrupt = True

    state = base(**SMALL, callback_on_step_end=callback, output_type="latent")
    assert steps == [0]
    assert state.callback_on_step_end is None  # a method would be copied with the state
    decode = BLOCKS["base"]().sub_blocks["decode"].init_pipeline()
    decode.update_components(vae=base.vae, audio_vae=base.audio_vae)
    assert decode(state=state, output_type="np", output="videos").shape == (1, 9, 64, 64, 3)
    base(**SMALL, callback_on_step_end=lambda _pipe, step, *_: steps.append(step), output_type="latent")
    assert steps == [0, 0, 1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": ""}, "`prompt`=''"),
        ({"height": 63}, "`height`=63"),
        ({"num_inference_steps": 0}, "`num_inference_steps`=0"),
        ({"output_type": "mp4"}, "`output_type`='mp4'"),
        ({"callback_on_step_end": 1}, "`callback_on_step_end`=1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`"),
        ({"audio": [AUDIO] * 3}, "`audio` has 3 items"),
        ({"image": [IMAGE] * 3}, "`image_latents` has 3 items"),
        ({"generator": [seeded()] * 3}, "`generator`"),
    ],
)
def test_blocks_refuse_what_the_pipeline_refuses(base, inputs, message):
    with pytest.raises(ValueError, match=message):
        base(**SMALL | {"num_inference_steps": 1} | inputs)


def test_a_state_encoded_once_is_sampled_often(base, tiny_pipeline):
    blocks = BLOCKS["base"]()
    encoder = blocks.sub_blocks.pop("text_encoder").init_pipeline()
    encoder.update_components(tokenizer=base.tokenizer, text_encoder=base.text_encoder)
    state = encoder(prompt="hello")
    sampler = blocks.init_pipeline()
    sampler.update_components(**base.components)
    inputs = {name: value for name, value in SMALL.items() if name != "prompt"} | {"num_videos_per_prompt": 2}
    for seed in (0, 1):
        expected = tiny_pipeline(**SMALL | inputs, generator=seeded(seed))
        assert same(sampler(state=state, **inputs, generator=seeded(seed), output="videos"), expected.frames)


def test_audio_has_one_name_in_a_call(base):
    with pytest.raises(ValueError, match="At most one of `audio`, `input_audio`"):
        base(**SMALL, audio=AUDIO, input_audio=AUDIO)


def test_what_comes_out_is_not_taken_for_what_goes_in(base):
    state = base(**SMALL, audio=AUDIO, generator=seeded())
    first, second = (base(state=state, latents=None) for _ in range(2))
    assert same(first.audio, state.audio)
    assert same(first.videos, second.videos)  # the state is copied with its generator, which draws the same noise
    assert not same(first.videos, state.videos)


def test_a_stream_decodes_as_it_is_consumed_also_from_a_state(base, tiny_pipeline):
    expected = tiny_pipeline(**SMALL, generator=seeded())
    state = base(**SMALL, generator=seeded(), output_type="stream")
    copied = copy.deepcopy(state)
    assert same(np.stack([*copied.videos[0]]), expected.frames[0])


def test_the_progress_bar_of_the_loop_can_be_turned_off(base, capsys):
    base.set_progress_bar_config(disable=True)
    base(**SMALL, output_type="latent")
    assert "%" not in capsys.readouterr().err


class Watermark(ModularPipelineBlocks):
    """A step of a user's own, between the denoising and the decoding."""

    @property
    def inputs(self):
        return [InputParam("latents", required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam("latents")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.latents = torch.zeros_like(block_state.latents)
        self.set_block_state(state, block_state)
        return components, state


def test_a_block_of_a_users_own_can_be_put_in(base):
    blocks = MagiHumanAutoBlocks()
    blocks.sub_blocks.insert("watermark", Watermark(), 4)
    pipe = blocks.init_pipeline()
    pipe.update_components(**base.components)
    assert not pipe(**SMALL, output_type="latent", output="videos").any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_in_half_precision(dtype):
    pipe = MagiHumanDistilledAutoBlocks().init_pipeline()
    pipe.update_components(**make_tiny_pipeline(is_distilled=True).components)
    pipe.to(dtype=dtype)
    output = pipe(**SMALL | {"num_inference_steps": 1}, output=["videos", "audio"])
    assert np.isfinite(output["videos"]).all()
    assert np.isfinite(output["audio"]).all()
