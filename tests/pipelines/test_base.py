"""What both pipelines do alike."""

import contextlib
import copy
import json
import shutil
import threading

import diffusers
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.video_processor import VideoProcessor
from golden import load_golden
from helpers import PROMPT, assert_same, run, seeded, upscale
from make_tiny_pipeline import make_tiny_pipeline, make_transformer, make_turbo_vae, make_wan_vae

from diffusers_magihuman import MagiHumanAudioVideoPipeline, MagiHumanLatentUpscalePipeline
from diffusers_magihuman.media import crop_to_aspect
from diffusers_magihuman.pipeline_base import (
    DEFAULT_NEGATIVE_PROMPT,
    count_audio_latents,
    encode_in_windows,
    load_audios,
    trim_embeds,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["base", "upscale"])
def pipe_and_run(request):
    """A pipeline that a test must not change, and what runs it for two steps."""
    name, call = {"base": ("tiny_pipeline", run), "upscale": ("tiny_upscale_pipeline", upscale)}[request.param]
    return request.getfixturevalue(name), call


@pytest.fixture(scope="module")
def portrait():
    gradient = np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3).astype(np.uint8)
    return PIL.Image.fromarray(gradient)


# Images and audio


def test_golden_crop_and_resize():
    info, golden = load_golden("resizecrop")
    for name, case in info["images"].items():
        height, width = case["target_hw"]
        cropped = crop_to_aspect(PIL.Image.fromarray(golden[f"in.{name}"].numpy()), height, width)
        assert np.array_equal(np.asarray(cropped), golden[f"crop.{name}"].numpy())
        pixels = VideoProcessor(vae_scale_factor=16).preprocess(cropped, height, width)
        assert torch.equal(pixels, golden[f"out.{name}"])


def test_crop_truncates_its_size():
    image = PIL.Image.new("RGB", (33, 100))
    assert crop_to_aspect(image, 48, 64).size == (33, 24)  # 24.75 rows
    assert crop_to_aspect(image.rotate(90, expand=True), 64, 48).size == (24, 33)


@pytest.mark.parametrize("case", ["short", "short_none", "long", "long_cut"])
def test_golden_audio_windows(case):
    """Windows and cross-fades, around an encoder that averages 2048 samples as that of the golden data does."""
    info, golden = load_golden("resample")
    case_info = info["a2v"][case]
    num_samples = case_info["num_samples"]
    k = np.arange(num_samples, dtype=np.float64)
    wave = np.sin(0.0003 * k) * 0.5 + 0.3 * np.sin(0.00011 * k + 1.0) + k / num_samples * 0.2
    wave = torch.from_numpy(wave.astype(np.float32)).expand(1, 2, -1)
    if case_info["seconds"] is not None:
        wave = wave[..., : case_info["seconds"] * 51200]
    calls = []

    def encode(window):
        calls.append(list(window.shape[1:]))
        return torch.nn.functional.avg_pool1d(window, 2048).transpose(1, 2)

    latents = encode_in_windows(wave, encode, window_length=29 * 51200, hop_length=2048)
    assert calls == case_info["encoder_calls"]
    assert torch.equal(latents.transpose(1, 2), golden[f"out.a2v_{case}"])


@pytest.mark.parametrize("suffix", ["", "_odd"])
def test_golden_cross_fade(suffix):
    _, golden = load_golden("resample")
    windows = list(golden[f"in.feats{suffix}"])
    length = windows[0].shape[1]
    window_length = 2 * length  # two samples a latent
    num_samples = window_length + 2 * (window_length // 2)  # three windows
    merged = encode_in_windows(torch.zeros(1, 2, num_samples), lambda _: windows.pop(0), window_length, 2)
    assert not windows and merged.shape[1] == num_samples // 2
    assert torch.equal(merged, golden[f"out.merged{suffix}"][:, : num_samples // 2])


def test_an_unfinished_last_latent_counts_in_several_windows_only():
    window = 29 * 25
    assert count_audio_latents(window * 10 - 1, 10) == window - 1
    assert count_audio_latents(window * 10, 10) == window
    assert count_audio_latents(window * 10 + 1, 10) == window + 1


@torch.no_grad()
def test_audio_with_as_many_latents_is_encoded_uncut(tiny_pipeline):
    audio = torch.randn(2, 9 * 2048 + 1000)
    whole = tiny_pipeline.encode_audio(audio, seeded(), CPU)
    assert whole.shape == (1, 9, 8)
    assert torch.equal(tiny_pipeline.encode_audio([audio], seeded(), CPU, num_frames=9), whole)
    assert not torch.equal(tiny_pipeline.encode_audio(audio[:, : 9 * 2048], seeded(), CPU), whole)
    padded = tiny_pipeline.encode_audio([audio, audio], [seeded(), seeded(1)], CPU, num_frames=12)
    with pytest.raises(ValueError, match=r"`generator`=.* a list of 2"):
        tiny_pipeline.encode_audio([audio, audio], [seeded()], CPU)
    assert padded.shape == (2, 12, 8) and not torch.equal(padded[0], padded[1])


def test_audio_is_read_once_for_several_rates(tmp_path):
    path = tmp_path / "tone.wav"
    tone = np.sin(np.arange(8000) / 9).astype(np.float32)
    soundfile.write(path, tone, 16000, subtype="FLOAT")
    (low,), (high,) = load_audios(path, 16000, 44100)
    assert np.array_equal(low.numpy(), np.stack([tone, tone])) and high.shape == (2, 22050)
    with pytest.raises(ValueError, match="`audio`"):
        load_audios([tone], 16000)  # without its rate
    with pytest.raises(ValueError, match="`audio`"):
        load_audios([], 16000)


@pytest.mark.parametrize("use_wan_vae", [False, True])
@torch.no_grad()
def test_latents_are_normalised_by_the_statistics_of_the_vae(use_wan_vae, portrait):
    pipe = make_tiny_pipeline(use_wan_vae=use_wan_vae)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    pixels = pipe.video_processor.preprocess(crop_to_aspect(portrait, 32, 64), 32, 64)
    expected = (pipe.vae.encode(pixels[:, :, None]).latent_dist.mode() - mean) / std
    latents = pipe.encode_image([portrait], 32, 64, CPU)
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)

    frames = (pipe.vae.decode(latents * std + mean).sample * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(pipe.decode_latents(latents, "pt"), frames, atol=1e-5, rtol=0)


# Text


def test_text_encoding_rounds_and_cuts(tiny_pipeline, caplog):
    input_ids = tiny_pipeline.tokenizer("Hello there.", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden_states = tiny_pipeline.text_encoder(input_ids=input_ids).last_hidden_state
        embeds, mask, _, _ = tiny_pipeline.encode_prompt("Hello there.", do_classifier_free_guidance=False)
    assert torch.equal(embeds, hidden_states.half().float()) and mask.all()

    diffusers.utils.logging.enable_propagation()
    with torch.no_grad():
        cut, _, _, _ = tiny_pipeline.encode_prompt(
            "Hello there.", do_classifier_free_guidance=False, max_sequence_length=5
        )
    diffusers.utils.logging.disable_propagation()
    assert torch.equal(cut, embeds[:, :5])  # the whole text is encoded, then cut
    assert "12 tokens; those beyond `max_sequence_length`=5 are cut off: ' there.'" in caplog.text


def test_empty_text_is_the_begin_of_a_sequence(tiny_pipeline, monkeypatch):
    begin = torch.tensor([[tiny_pipeline.tokenizer.bos_token_id]])
    with torch.no_grad():
        expected = tiny_pipeline.text_encoder(input_ids=begin).last_hidden_state.half().float()
        embeds, _, _, _ = tiny_pipeline.encode_prompt("", do_classifier_free_guidance=False)
    assert torch.equal(embeds, expected)
    assert not torch.equal(run(tiny_pipeline, negative_prompt="").frames, run(tiny_pipeline).frames)

    monkeypatch.setattr(type(tiny_pipeline.tokenizer), "bos_token_id", None, raising=False)
    with pytest.raises(ValueError, match="finds no token in the prompt"):
        run(tiny_pipeline, negative_prompt="")


def test_default_negative_prompt_is_that_of_the_package(tiny_pipeline):
    assert_same(run(tiny_pipeline, negative_prompt=DEFAULT_NEGATIVE_PROMPT), run(tiny_pipeline))
    other = run(tiny_pipeline, negative_prompt="blurred")
    assert (other.frames - run(tiny_pipeline).frames).abs().max() > 1e-4


def test_trimming_moves_padding_to_the_end_and_cuts_it():
    embeds = torch.arange(10.0).reshape(2, 5, 1)
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    trimmed, trimmed_mask = trim_embeds(embeds, mask)
    assert trimmed[0, :2].flatten().tolist() == [1, 3] and trimmed[1].flatten().tolist() == [6, 7, 9]
    assert trimmed_mask.tolist() == [[True, True, False], [True, True, True]]
    trimmed, no_mask = trim_embeds(embeds[:1], mask[:1])
    assert trimmed.flatten().tolist() == [1, 3] and no_mask is None


@pytest.mark.parametrize("prompts", [["Hello there."], ["Hello there.", "One."]])
def test_padding_may_stand_on_either_side(prompts, tiny_distilled_pipeline):
    with torch.no_grad():
        embeds, mask, _, _ = tiny_distilled_pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    left = torch.zeros(len(prompts), 20, 16)
    left_mask = torch.zeros(len(prompts), 20, dtype=torch.bool)
    for i, length in enumerate(mask.sum(dim=1)):
        left[i, 20 - length :], left_mask[i, 20 - length :] = embeds[i, :length], True
    output = run(tiny_distilled_pipeline, None, prompt_embeds=left, prompt_embeds_mask=left_mask)
    assert_same(output, run(tiny_distilled_pipeline, prompts), tolerance=1e-5)


def test_negative_embeds_serve_a_callback_that_turns_guidance_on(tiny_pipeline):
    def guide(pipe, *_):
        pipe._guidance_scale = 2.0
        return {}

    embeds, mask = torch.ones(1, 5, 16, dtype=torch.bfloat16), torch.tensor([[0, 0, 1, 1, 1]])
    given = {"negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": mask, "num_videos_per_prompt": 2}
    states = tiny_pipeline.encode_prompt("One.", do_classifier_free_guidance=False, **given)
    assert states[2].shape == (2, 5, 16) and states[2].dtype == torch.float32 and states[3].dtype == torch.bool
    options = given | {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "num_inference_steps": 3}
    guided = run(tiny_pipeline, "One.", callback_on_step_end=guide, **options)
    assert not torch.equal(guided.frames, run(tiny_pipeline, "One.", **options).frames)


# Frames and audio out


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "stream"])
def test_output_types(output_type, pipe_and_run):
    pipe, run = pipe_and_run
    output = run(pipe, ["One.", "Two words."], output_type=output_type, generator=[seeded(), seeded(1)])
    latents = run(pipe, ["One.", "Two words."], generator=[seeded(), seeded(1)])
    height, width = (16 * size for size in latents.frames.shape[3:])
    assert isinstance(output.audio, torch.Tensor if output_type == "pt" else np.ndarray)
    assert tuple(output.audio.shape) == (2, 2, 9 * 2048 * 441 // 512) and pipe.audio_sampling_rate == 44100
    with torch.no_grad():
        expected = pipe.decode_latents(latents.frames, "np")
    assert expected.shape == (2, 9, height, width, 3) and 0 <= expected.min() < expected.max() <= 1
    if output_type == "np":
        assert np.array_equal(output.frames, expected)
    elif output_type == "pt":
        assert np.array_equal(output.frames.permute(0, 1, 3, 4, 2), expected)
    elif output_type == "pil":
        assert np.array_equal(
            [[np.asarray(frame) for frame in video] for video in output.frames], (expected * 255).round()
        )
    else:
        assert np.array_equal([[*video] for video in output.frames], expected)


# The loop


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_flow_schedulers(scheduler, pipe_and_run):
    pipe, run = pipe_and_run
    arguments = {"shift": 5.0} if "Euler" in scheduler else {}
    scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **arguments)
    other = type(pipe)(**pipe.components | {"scheduler": scheduler})
    output, expected = run(other, num_inference_steps=8), run(pipe, num_inference_steps=8)
    # The same flow on another grid: near, but not the same. Another prompt gives 0.28 or more, another seed 0.9.
    difference = (output.frames - expected.frames).square().mean().sqrt() / expected.frames.square().mean().sqrt()
    assert 0 < difference < 0.1


def test_caches_learn_of_branch_and_step(pipe_and_run, monkeypatch):
    pipe, run = pipe_and_run
    seen = []
    enter = pipe.transformer.cache_context

    def record(name, **context):
        seen.append((name, context["step_index"], round(context["sigma"], 3), context["num_inference_steps"]))
        return enter(name, **context)

    monkeypatch.setattr(pipe.transformer, "cache_context", record)
    run(pipe, guidance_scale=2.0)
    branches = [("cond", 0, 1.0), ("uncond", 0, 1.0), ("cond", 1, 0.833), ("uncond", 1, 0.833)]
    assert seen == [(*branch, 2) for branch in branches]


def test_callback_changes_and_interrupts(pipe_and_run):
    pipe, run = pipe_and_run
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), list(tensors)))
        assert pipe.current_timestep is timestep
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]
    guided = {"guidance_scale": 2.0, "negative_prompt": "bad", "num_inference_steps": 4}
    output = run(pipe, **guided, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == [(0, 999, names), (1, 937, names)]
    assert not output.frames.any() and output.audio.any()
    assert pipe.num_timesteps == 4 and pipe.current_timestep is None
    assert run(pipe).frames.any()  # the next call is not interrupted


def test_callback_that_returns_nothing_changes_nothing(pipe_and_run):
    pipe, run = pipe_and_run
    steps = []
    output = run(pipe, callback_on_step_end=lambda _pipe, step, _timestep, _tensors: steps.append(step))
    assert steps == [0, 1]
    assert_same(output, run(pipe))


@pytest.mark.parametrize(
    "returned, message",
    [
        (3, "returned 3, but must return nothing, or a dict"),
        ({"noise": None}, "returned {'noise': None}"),
        ({"latents": None}, "`latents of callback_on_step_end`=None"),
        ({"latents": torch.zeros(1)}, "`latents of callback_on_step_end` has shape"),
        ({"audio_latents": torch.full((1, 9, 8), torch.nan)}, "`audio_latents of callback_on_step_end` holds NaN"),
        ({"prompt_embeds": torch.zeros(1, 3, 15)}, "`prompt_embeds of callback_on_step_end` has shape"),
        ({"prompt_embeds": torch.zeros(1, 3, 16).long()}, "`prompt_embeds of callback_on_step_end`"),
    ],
)
def test_callback_that_returns_nonsense(returned, message, pipe_and_run):
    pipe, run = pipe_and_run
    with pytest.raises(ValueError, match=message):
        run(pipe, callback_on_step_end=lambda *_: returned)


def test_callback_may_return_another_dtype(pipe_and_run):
    pipe, run = pipe_and_run
    output = run(pipe, callback_on_step_end=lambda *arguments: {"latents": arguments[3]["latents"].double()})
    assert_same(output, run(pipe))


@pytest.mark.parametrize("shares_transformer", [True, False])
def test_second_call_waits_for_the_first(shares_transformer, pipe_and_run):
    """The settings of a call are on the pipeline and its models, which two pipelines may share."""
    pipe, run = pipe_and_run
    settings = [{"guidance_scale": 1.0}, {"guidance_scale": 4.0, "num_inference_steps": 3}]
    alone = [run(pipe, **each) for each in settings]
    other = pipe if shares_transformer else copy.copy(pipe)
    if not shares_transformer:
        other.transformer = copy.deepcopy(pipe.transformer)
    results = {}
    second = threading.Thread(target=lambda: results.update(second=run(other, **settings[1])))

    def start_second(pipe, step, _timestep, _tensors):
        if step == 0:
            second.start()
            second.join(timeout=0.5)
            assert second.is_alive() and not results
            results["nested"] = run(type(pipe)(**pipe.components), **settings[1])  # of the same thread

    assert_same(run(pipe, **settings[0], callback_on_step_end=start_second), alone[0])
    second.join(timeout=60)
    assert_same(results["second"], alone[1])
    assert_same(results["nested"], alone[1])


def test_call_that_fails_or_is_interrupted_lets_the_next_in(pipe_and_run):
    pipe, run = pipe_and_run
    expected, results = run(pipe), []

    def interrupt(pipe, _step, _timestep, _tensors):
        thread = threading.Thread(target=lambda: setattr(pipe, "_interrupt", True))
        thread.start()
        thread.join()

    with pytest.raises(ZeroDivisionError):
        run(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert not torch.equal(run(pipe, callback_on_step_end=interrupt).frames, expected.frames)
    thread = threading.Thread(target=lambda: results.append(run(pipe)))
    thread.start()
    thread.join(timeout=60)
    assert_same(results[0], expected)


def test_stream_waits_for_the_call(tiny_upscale_pipeline):
    frames = upscale(tiny_upscale_pipeline, output_type="stream").frames[0]
    taken = []
    consumer = threading.Thread(target=lambda: taken.extend(frames))

    def start(_pipe, step, _timestep, _tensors):
        if step == 0:
            consumer.start()
            consumer.join(timeout=0.5)
            assert not taken

    expected = upscale(tiny_upscale_pipeline, output_type="np", callback_on_step_end=start).frames[0]
    consumer.join(timeout=60)
    assert np.array_equal(taken, expected)


def test_callback_of_diffusers_names_its_tensors(pipe_and_run):
    pipe, run = pipe_and_run
    seen = []

    class Callback(PipelineCallback):
        tensor_inputs = ["audio_latents"]

        def callback_fn(self, _pipe, _step, _timestep, tensors):
            seen.append(list(tensors))
            return tensors

    assert_same(run(pipe, callback_on_step_end=Callback()), run(pipe))
    assert seen == [["audio_latents"]] * 2


def test_callback_may_change_the_length_of_the_embeddings(pipe_and_run):
    pipe, run = pipe_and_run
    seen, names = [], ["prompt_embeds"]

    def record(_module, _args, kwargs):
        seen.append(kwargs["encoder_hidden_states"].shape[1])

    hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)

    def callback(_pipe, _step, _timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"][:, :-1]}

    scales = {"guidance_scale": 1.0} | ({"audio_guidance_scale": 1.0} if "Audio" in type(pipe).__name__ else {})
    run(pipe, **scales, num_inference_steps=3, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    hook.remove()
    assert seen == [seen[0], seen[0] - 1, seen[0] - 2]


def test_guidance_that_a_callback_turns_on_needs_negative_embeddings(tiny_distilled_pipeline):
    def callback(pipe, _step, _timestep, tensors):
        pipe._guidance_scale += 3.0
        return tensors

    # Without any there is nothing to guide away from, so the run goes on without guidance.
    assert_same(run(tiny_distilled_pipeline, callback_on_step_end=callback), run(tiny_distilled_pipeline))


def test_components_and_arguments_are_not_changed_by_a_call(pipe_and_run):
    pipe, run = pipe_and_run
    before = dict(pipe.scheduler.__dict__)
    latents = run(pipe).frames
    kept = latents.clone()
    run(pipe, latents=latents, image_latents=torch.zeros_like(latents[:, :, :1]))
    assert torch.equal(latents, kept)
    assert pipe.scheduler.__dict__.keys() == before.keys()
    assert pipe.scheduler.timesteps is before["timesteps"]


def test_from_pipe_shares_components_and_keeps_their_dtypes(tiny_pipeline, tiny_upscale_pipeline):
    transformer = tiny_upscale_pipeline.transformer
    base = MagiHumanAudioVideoPipeline(**{**tiny_pipeline.components, "vae": make_wan_vae().bfloat16()})
    pipe = MagiHumanLatentUpscalePipeline.from_pipe(base, transformer=transformer, default_height=64)
    assert pipe.config.default_height == 64 and pipe.transformer is transformer
    for name in ("text_encoder", "tokenizer", "scheduler", "vae", "audio_vae"):
        assert getattr(pipe, name) is getattr(base, name)
    assert base.vae.dtype == torch.bfloat16 and base.audio_vae.dtype == torch.float32
    cast = MagiHumanLatentUpscalePipeline.from_pipe(
        base, transformer=make_transformer(coordinate_style="v1"), dtype=torch.float32
    )
    assert cast.vae is base.vae and base.vae.dtype == torch.float32
    assert MagiHumanAudioVideoPipeline.from_pipe(pipe, transformer=tiny_pipeline.transformer).vae is base.vae


@pytest.mark.parametrize("dtype", [{}, {"dtype": torch.float32}, {"torch_dtype": torch.float32}])
def test_from_pipe_keeps_the_settings(dtype, tiny_upscale_pipeline):
    base = make_tiny_pipeline(is_distilled=True, default_height=64, default_num_frames=9)
    base.register_to_config(_name_or_path="somewhere")
    again = MagiHumanAudioVideoPipeline.from_pipe(base, **dtype)
    assert dict(again.config) == dict(base.config) and again.config.is_distilled
    changed = MagiHumanAudioVideoPipeline.from_pipe(base, default_height=96, **dtype)
    assert dict(changed.config) == {**base.config, "default_height": 96}
    # The default size of the upscaler is another one; what it does not know it keeps for the way back.
    transformer = tiny_upscale_pipeline.transformer
    high = MagiHumanLatentUpscalePipeline.from_pipe(base, transformer=transformer, **dtype)
    assert (high.config.default_height, high.config.default_width) == (1088, 1920)
    assert high.config["_is_distilled"] and high.config["_name_or_path"] == "somewhere"
    back = MagiHumanAudioVideoPipeline.from_pipe(high, transformer=base.transformer, **dtype)
    assert {name: back.config[name] for name in base.config} == dict(base.config)
    high_again = MagiHumanLatentUpscalePipeline.from_pipe(back, transformer=transformer, **dtype)
    assert dict(high_again.config) == dict(high.config)


def test_from_pipe_with_other_arguments_of_diffusers(tiny_pipeline):
    for dtype in (torch.float32, "float32", "torch.float32"):
        pipe = MagiHumanAudioVideoPipeline.from_pipe(tiny_pipeline, custom_pipeline=None, torch_dtype=dtype)
        assert pipe.transformer is tiny_pipeline.transformer and pipe.vae.dtype == torch.float32
    with pytest.raises(ValueError, match="`dtype`='float'"):
        MagiHumanAudioVideoPipeline.from_pipe(tiny_pipeline, dtype="float")
    with pytest.raises(TypeError, match="defualt_height"):
        MagiHumanAudioVideoPipeline.from_pipe(tiny_pipeline, defualt_height=64)


@pytest.mark.parametrize("name", ["tokenizer", "text_encoder", "transformer", "scheduler", "vae", "audio_vae"])
def test_component_that_the_index_does_not_name_is_none(name, tiny_pipeline_dir, tmp_path):
    shutil.copytree(tiny_pipeline_dir, tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    del index[name]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    assert getattr(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe"), name) is None


# Checks


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "`prompt`"),
        ({"prompt": ["A", " "]}, "`prompt`"),
        ({"prompt": 3}, "`prompt`"),
        ({"prompt": []}, "`prompt`"),
        ({"prompt": None}, "Exactly one of .*`prompt`"),
        ({"prompt_embeds": torch.zeros(1, 3, 16)}, "Exactly one of .*`prompt_embeds`"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt`"),
        ({"negative_prompt": False}, "`negative_prompt`"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 3, 16)},
            "At most one of .*`negative_prompt`",
        ),
        ({"negative_prompt_embeds": torch.zeros(2, 3, 16)}, r"`negative_prompt_embeds` .* \(1, any, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 15)}, r"`prompt_embeds` .* \(any, any, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 0, 16)}, "`prompt_embeds` .* no size 0"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 3, 16), torch.inf)}, "`prompt_embeds` holds NaN"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16), "prompt_embeds_mask": torch.ones(1, 4)},
            "`prompt_embeds_mask`",
        ),
        ({"height": 80}, "`height`=80 must be a multiple of 32"),
        ({"width": 64.0}, "`width`"),
        ({"width": 0}, "`width`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`=0 must be an integer in 1 to 1000"),
        ({"num_inference_steps": True}, "`num_inference_steps`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale`"),
        ({"guidance_scale": float("inf")}, "`guidance_scale`"),
        ({"guidance_scale": "5"}, "`guidance_scale`='5' must be a number in -1000 to 1000"),
        ({"max_sequence_length": 641}, "`max_sequence_length`=641 must be an integer in 1 to 640"),
        ({"output_type": "gif"}, "`output_type`"),
        ({"output_type": ["np"]}, "`output_type`"),
        ({"return_dict": 1}, "`return_dict`=1 must be True or False"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end`=3 must be callable"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`"),
        ({"callback_on_step_end_tensor_inputs": None}, "`callback_on_step_end_tensor_inputs`=None"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "`callback_on_step_end_tensor_inputs`='latents'"),
        ({"callback_on_step_end_tensor_inputs": [[]]}, "`callback_on_step_end_tensor_inputs`"),
        ({"attention_kwargs": "x"}, "`attention_kwargs`='x'"),
        ({"attention_kwargs": {"mask": 1}}, "`attention_kwargs`={'mask': 1}"),
        ({"attention_kwargs": {"scale": "x"}}, r"`attention_kwargs\[\"scale\"\]`='x'"),
        ({"attention_kwargs": {"scale": float("nan")}}, r"`attention_kwargs\[\"scale\"\]`=nan"),
        ({"generator": [seeded(), seeded()]}, "`generator`"),
        ({"generator": [None]}, "`generator`"),
        ({"generator": 42}, "`generator`"),
        ({"num_inference_steps": 10**9}, "`num_inference_steps`=1000000000 must be an integer in 1 to 1000"),
        ({"height": 32 * 10**9}, "`height`=32000000000 must be an integer in 1 to 8192"),
        ({"guidance_scale": 1e300}, "`guidance_scale`=1e.300 must be a number in -1000 to 1000"),
        ({"prompt": "a" * 100000}, "`prompt`='aaa.* tokens, of at most 5120"),
        ({"prompt": "a" * 10**6}, "`prompt`='aaa.* has 1000000 letters, but at most 131072"),
        ({"prompt": ["a", "a" * 6000]}, "`prompt`='aaa.* tokens, of at most 5120"),
        ({"negative_prompt": "a" * 100000}, "`negative_prompt`='aaa.* tokens, of at most 5120"),
        ({"prompt": "\udc80"}, r"`prompt`='\\udc80' is no Unicode"),
        ({"negative_prompt": "\udc80"}, r"`negative_prompt`='\\udc80' is no Unicode"),
        ({"prompt": ["a"] * 1001}, "`prompt`=.* at most 1000"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 5121, 16)}, "`prompt_embeds` has length 5121"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16).long()}, "`prompt_embeds`=.*floating"),
        ({"negative_prompt_embeds": torch.zeros(1, 3, 16, device="meta")}, "`negative_prompt_embeds` holds no data"),
        ({"image_latents": torch.zeros(1, 8, 1, 4, 4, dtype=torch.complex64)}, "`image_latents`=.*floating"),
        ({"latents": np.zeros((1, 8, 3, 4, 4))}, "`latents`=ndarray"),
        ({"audio_latents": torch.ones(1, 9, 8, dtype=torch.bool)}, "`audio_latents`=.*floating"),
        ({"image": [PIL.Image.new("RGB", (8, 8))] * 3}, "`image` has 3 items"),
        ({"image": []}, "`image`"),
        ({"image": PIL.Image.new("RGB", (8, 8)), "image_latents": torch.zeros(1, 8, 1, 4, 4)}, "At most one of"),
        ({"image_latents": torch.zeros(1, 8, 2, 4, 4)}, "`image_latents` has shape"),
        ({"audio": np.zeros(100)}, "`audio`"),
        ({"audio": (np.zeros(0, np.float32), 16000)}, "`audio`"),
    ],
)
def test_bad_input_raises_before_any_model_runs(arguments, message, pipe_and_run):
    pipe, run = pipe_and_run
    calls = []
    models = [pipe.text_encoder, pipe.transformer, pipe.vae.encoder]
    handles = [model.register_forward_pre_hook(lambda *_: calls.append(1)) for model in models]
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"prompt": PROMPT, **arguments})
    for handle in handles:
        handle.remove()
    assert not calls


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 0.5, 1], [1, 1, 2], [1, 1, torch.nan], [1, -1, 1]])
@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_mask_must_be_true_somewhere_and_else_false(name, mask, pipe_and_run):
    pipe, run = pipe_and_run
    embeds = {"prompt_embeds": torch.zeros(1, 3, 16), name: torch.zeros(1, 3, 16)}
    with pytest.raises(ValueError, match=f"`{name}_mask`"):
        run(pipe, None, **embeds, **{f"{name}_mask": torch.tensor([mask])})


def test_what_is_no_component_is_refused(pipe_and_run):
    pipe, run = pipe_and_run
    for name, part in pipe.components.items():
        for other in (torch.nn.Linear(1, 1), "x", pipe.audio_vae if name != "audio_vae" else pipe.vae):
            with pytest.raises(ValueError, match=f"`{name}`="):
                type(pipe)(**{**pipe.components, name: other})
        setattr(pipe, name, torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match=f"`{name}`=Linear"):
            run(pipe)
        setattr(pipe, name, part)
    for name in ("transformer", "scheduler"):
        with pytest.raises(ValueError, match=f"`{name}`=None"):
            run(type(pipe)(**{**pipe.components, name: None}))


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("encode_prompt", ("\udc80",), "`prompt`"),
        ("encode_prompt", (3,), "`prompt`=3"),
        ("encode_prompt", (None,), "Exactly one of `prompt`"),
        ("encode_prompt", ("a", None, True, 0), "`num_videos_per_prompt`=0"),
        ("encode_image", (np.zeros((8, 8, 3)), 32, 32, CPU), "`images`"),
        ("encode_image", ([PIL.Image.new("RGB", (8, 8))], 32, True, CPU), "`width`=True"),
        ("encode_video", (torch.zeros(1, 3, 32, 32), CPU), "`pixels` has shape"),
        ("encode_audio", (np.zeros((2, 4096)), None, CPU), "`audio`=ndarray"),
        ("encode_audio", (torch.zeros(2, 4096), None, CPU, 0), "`num_frames`=0"),
        ("decode_latents", (torch.zeros(1, 7, 1, 2, 2), "np"), "`latents` has shape"),
        ("decode_latents", (torch.zeros(1, 8, 1, 2, 2), "latent"), "`output_type`"),
        ("decode_audio", (torch.zeros(1, 8, 9), "np"), "`audio_latents` has shape"),
        ("latent_shapes", (1, 10**9, 32, 32), "`num_frames`=1000000000"),
        ("latent_shapes", (1, 9, 8192, 8192), None),
        ("latent_shapes", (1, 125, 8192, 8192), "2097917 tokens, but at most 1048576 are allowed"),
        ("latent_shapes", (1000, 125, 256, 448), "4349000 tokens"),
    ],
)
def test_methods_check_their_arguments(method, arguments, message, tiny_pipeline):
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
        getattr(tiny_pipeline, method)(*arguments)


@pytest.mark.parametrize(
    "component, arguments",
    [
        ("tokenizer", {}),
        ("text_encoder", {}),
        ("vae", {"output_type": "np"}),
        ("audio_vae", {"output_type": "np"}),
        ("vae", {"image": PIL.Image.new("RGB", (8, 8))}),
        ("audio_vae", {"audio": (np.zeros(22050, np.float32), 22050)}),
    ],
)
def test_missing_component_raises(component, arguments, pipe_and_run):
    pipe, run = pipe_and_run
    without = type(pipe)(**{**pipe.components, component: None})
    with pytest.raises(ValueError, match=rf"needs .*'{component}'"):
        run(without, **arguments)


def test_guidance_needs_the_text_encoder_for_the_negative_prompt(pipe_and_run):
    pipe, run = pipe_and_run
    without = type(pipe)(**{**pipe.components, "text_encoder": None})
    with pytest.raises(ValueError, match=r"needs .*text_encoder"):
        run(without, None, prompt_embeds=torch.zeros(1, 3, 16), guidance_scale=2.0)


@pytest.mark.parametrize("vae, message", [("decoder", "need a `vae` that encodes"), ("wan", "`output_type`='stream'")])
def test_vae_that_cannot_encode_or_stream(vae, message, pipe_and_run):
    pipe, run = pipe_and_run
    vae, arguments = {
        "decoder": (make_turbo_vae(encoder_base_dim=None), {"image": PIL.Image.new("RGB", (8, 8))}),
        "wan": (make_wan_vae(), {"output_type": "stream"}),
    }[vae]
    other = type(pipe)(**{**pipe.components, "vae": vae})
    with pytest.raises(ValueError, match=message):
        run(other, **arguments)
    assert run(other, output_type="np").frames.shape[:2] == (1, 9)
