import json
import subprocess
import sys

import diffusers
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from diffusers import DiffusionPipeline
from golden import DATA, load_golden, make_golden_transformer
from helpers import PROMPT, assert_same, run, seeded
from make_tiny_pipeline import make_tiny_pipeline, make_turbo_vae

from diffusers_magihuman import MagiHumanAudioVideoPipeline, MagiHumanFlowScheduler
from diffusers_magihuman.media import crop_to_aspect, load_audio
from diffusers_magihuman.pipeline_components import DEFAULT_NEGATIVE_PROMPT, encode_in_windows


SIZE = {"height": 64, "width": 64, "num_frames": 9}


@pytest.fixture(scope="module")
def portrait():
    gradient = np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3).astype(np.uint8)
    return PIL.Image.fromarray(gradient)


@pytest.fixture(scope="module")
def speech():
    time = np.arange(int(0.5 * 22050)) / 22050
    return np.sin(2 * np.pi * 220 * time).astype(np.float32) * 0.3, 22050


def encode_speech(pipe, speech, generator):
    """The latents of the first nine frames of the sound."""
    waveform = load_audio(speech, 51200)[:, : 9 * 2048]
    with torch.no_grad():
        return pipe.encode_audio(waveform, generator, torch.device("cpu"))


class RecordedNoiseScheduler(MagiHumanFlowScheduler):
    """Takes the noise of the stochastic step from the golden data: video is 5-dimensional, sound 3-dimensional."""

    def use(self, golden, num_steps):
        self.noise = {
            5: [golden[f"step.{step}.noise_video"] for step in range(num_steps)],
            3: [golden[f"step.{step}.noise_audio"] for step in range(num_steps)],
        }
        return self

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        noise = self.noise[sample.ndim].pop(0)
        return super().step(model_output, timestep, sample, generator, noise, return_dict)


def run_golden(case):
    """Runs the whole call on a case's latents and embeddings, recording the latents after each step."""
    info, golden = load_golden(case)
    is_distilled = info["evaluation_config"]["cfg_number"] == 1
    scheduler = MagiHumanFlowScheduler()
    if is_distilled:
        scheduler = RecordedNoiseScheduler(sampler="renoise").use(golden, info["steps"])
    transformer = make_golden_transformer(info["weights_file"].split(".")[0])
    pipe = MagiHumanAudioVideoPipeline(None, None, transformer, scheduler, None, None, is_distilled=is_distilled)
    pipe.set_progress_bar_config(disable=True)

    def mask(embeds, length):
        return torch.arange(embeds.shape[1])[None] < length

    steps = []

    def record(_pipe, _step, _timestep, tensors):
        steps.append(tensors)
        return {}

    sound = "conditioning_audio_latents" if info["is_a2v"] else "audio_latents"
    output = pipe(
        prompt_embeds=golden["in.context"],
        prompt_embeds_mask=mask(golden["in.context"], info["context_len"]),
        negative_prompt_embeds=golden["in.context_null"],
        negative_prompt_embeds_mask=mask(golden["in.context_null"], info["context_null_len"]),
        latents=golden["in.latent_video"],
        image_latents=golden.get("in.latent_image"),
        num_inference_steps=info["steps"],
        num_frames=golden["in.latent_audio"].shape[1],
        height=64,
        width=96,
        output_type="latent",
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["latents", "audio_latents"],
        **{sound: golden["in.latent_audio"]},
    )
    return output, steps, golden


@pytest.mark.parametrize(
    "case", ["denoise_base", "denoise_base_ti2v", "denoise_a2v", "denoise_distill", "denoise_distill_ti2v"]
)
def test_golden_denoising(case):
    output, steps, golden = run_golden(case)
    torch.testing.assert_close(output.frames, golden["fp32.final.video"], atol=1e-3, rtol=0)
    torch.testing.assert_close(output.audio, golden["fp32.final.audio"], atol=1e-3, rtol=0)
    for step, tensors in enumerate(steps):
        torch.testing.assert_close(tensors["latents"], golden[f"fp32.step.{step}.video_out"], atol=1e-3, rtol=0)
        torch.testing.assert_close(tensors["audio_latents"], golden[f"fp32.step.{step}.audio_out"], atol=1e-3, rtol=0)


def test_given_sound_stays_in_the_distilled_model():
    output, steps, golden = run_golden("denoise_distill_a2v")
    assert torch.equal(output.audio, golden["in.latent_audio"])
    # The original overwrites the sound, so only the first step, which still sees it as given, can agree.
    torch.testing.assert_close(steps[0]["latents"], golden["fp32.step.0.video_out"], atol=1e-3, rtol=0)
    assert (output.audio - golden["fp32.final.audio"]).abs().max() > 0.1


def test_golden_crop_and_resize():
    info, golden = load_golden("resizecrop")
    pipe = MagiHumanAudioVideoPipeline(None, None, None, None, make_turbo_vae(), None)
    for name, case in info["images"].items():
        height, width = case["target_hw"]
        cropped = crop_to_aspect(PIL.Image.fromarray(golden[f"in.{name}"].numpy()), height, width)
        assert np.array_equal(np.asarray(cropped), golden[f"crop.{name}"].numpy())
        pixels = pipe.video_processor.preprocess(cropped, height, width)
        assert torch.equal(pixels, golden[f"out.{name}"])


def test_crop_truncates_its_size():
    image = PIL.Image.new("RGB", (33, 100))
    assert crop_to_aspect(image, 48, 64).size == (33, 24)  # 24.75 rows
    assert crop_to_aspect(image.rotate(90, expand=True), 64, 48).size == (24, 33)


@pytest.mark.parametrize("case", ["short", "short_none", "long", "long_cut"])
def test_golden_sound_windows(case):
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


def test_noise_is_drawn_in_the_original_order(tiny_distilled_pipeline):
    order = [tuple(shape) for _, shape in json.loads((DATA / "rng_order.json").read_text())["order"]["ti2v_distill"]]
    assert [len(shape) for shape in order if len(shape) > 2] == [3, 5, 5, 3, 5, 3]  # sound, video; video, sound a step

    generator = seeded(5)
    audio = torch.randn(1, 9, 8, generator=generator)
    video = torch.randn(1, 8, 3, 4, 4, generator=generator)
    expected = run(tiny_distilled_pipeline, generator=generator, latents=video, audio_latents=audio)
    assert_same(run(tiny_distilled_pipeline, generator=seeded(5)), expected)


def test_same_noise_as_the_global_generator(tiny_distilled_pipeline):
    torch.manual_seed(11)
    from_global = run(tiny_distilled_pipeline, generator=None)
    assert_same(run(tiny_distilled_pipeline, generator=seeded(11)), from_global)


@pytest.mark.parametrize("is_distilled", [False, True])
def test_defaults_of_base_and_distilled(is_distilled, tiny_pipeline, tiny_distilled_pipeline):
    pipe = tiny_distilled_pipeline if is_distilled else tiny_pipeline
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    run(pipe, num_inference_steps=None)
    handle.remove()
    assert pipe.num_timesteps == (8 if is_distilled else 32)
    assert len(calls) == (8 if is_distilled else 64)  # with guidance two branches a step
    assert pipe.do_classifier_free_guidance != is_distilled


@pytest.mark.parametrize("use_wan_vae", [False, True])
@pytest.mark.parametrize("mode", ["text", "image", "audio", "image and audio"])
def test_modes(mode, use_wan_vae, portrait, speech):
    pipe = make_tiny_pipeline(is_distilled=True, use_wan_vae=use_wan_vae)
    kwargs = {}
    if "image" in mode:
        kwargs["image"] = portrait
    if "audio" in mode:
        kwargs["audio"] = speech
    output = run(pipe, **kwargs)
    assert output.frames.shape == (1, 8, 3, 4, 4) and output.audio.shape == (1, 9, 8)
    assert torch.isfinite(output.frames).all() and torch.isfinite(output.audio).all()

    plain = run(pipe)
    assert torch.equal(output.frames, plain.frames) == (mode == "text")
    assert torch.equal(output.audio, plain.audio) == (mode == "text")
    if "image" in mode:
        image_latents = pipe.encode_image([portrait.convert("RGB")], 64, 64, torch.device("cpu"))
        assert torch.equal(output.frames[:, :, :1], image_latents)
    if "audio" in mode:
        assert torch.equal(output.audio, encode_speech(pipe, speech, seeded()))


def test_conditions_as_latents_equal_files(tiny_distilled_pipeline, portrait, speech, tmp_path):
    pipe = tiny_distilled_pipeline
    portrait.save(tmp_path / "portrait.png")
    soundfile.write(tmp_path / "speech.wav", speech[0], speech[1], subtype="FLOAT")
    generator = seeded()
    sound = encode_speech(pipe, speech, generator)
    image = pipe.encode_image([portrait], 64, 64, torch.device("cpu"))
    from_latents = run(pipe, image_latents=image, conditioning_audio_latents=sound, generator=generator)
    from_files = run(pipe, image=str(tmp_path / "portrait.png"), audio=tmp_path / "speech.wav")
    assert_same(from_files, from_latents)


def test_audio_gives_the_default_length(tiny_distilled_pipeline, speech):
    output = run(tiny_distilled_pipeline, audio=speech, num_frames=None)
    assert output.audio.shape[1] == 12  # half a second, 12.5 latents
    assert output.frames.shape[2] == 3
    longer = run(tiny_distilled_pipeline, audio=speech, num_frames=17)
    assert longer.audio.shape[1] == 17 and longer.frames.shape[2] == 5


def test_batch_of_different_prompts_equals_single_runs(tiny_pipeline, portrait, speech):
    prompts = ["One.", PROMPT, "A somewhat longer prompt."]
    negative_prompts = ["bad", "very bad indeed", "no"]
    seeds = range(6)
    batch = run(
        tiny_pipeline,
        prompts,
        negative_prompt=negative_prompts,
        image=portrait,
        audio=[speech, (speech[0] * 0.5, speech[1]), (speech[0][::-1].copy(), speech[1])],
        num_videos_per_prompt=2,
        generator=[seeded(seed) for seed in seeds],
    )
    assert len(batch.frames) == len(batch.audio) == 6
    sounds = [speech, (speech[0] * 0.5, speech[1]), (speech[0][::-1].copy(), speech[1])]
    for seed in seeds:
        single = run(
            tiny_pipeline,
            prompts[seed // 2],
            negative_prompt=negative_prompts[seed // 2],
            image=portrait,
            audio=sounds[seed // 2],
            generator=seeded(seed),
        )
        item = {"frames": batch.frames[seed : seed + 1], "audio": batch.audio[seed : seed + 1]}
        assert_same(item, single, tolerance=1e-4)


def test_embeddings_equal_prompt(tiny_pipeline):
    names = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
    embeds = dict(zip(names, tiny_pipeline.encode_prompt([PROMPT, "Short."]), strict=True))
    assert embeds["prompt_embeds"].dtype == torch.float32 and embeds["prompt_embeds_mask"].sum(1).tolist() == [137, 6]
    without_text = MagiHumanAudioVideoPipeline(
        **{**tiny_pipeline.components, "text_encoder": None, "tokenizer": None, "vae": None, "audio_vae": None}
    )
    expected = run(tiny_pipeline, [PROMPT, "Short."])
    assert_same(run(without_text, None, **embeds), expected)


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
    with pytest.raises(ValueError, match="The tokenizer finds no token in the prompt ''"):
        run(tiny_pipeline, negative_prompt="")


def test_default_negative_prompt_covers_picture_sound_and_delivery(tiny_pipeline):
    assert all(part in DEFAULT_NEGATIVE_PROMPT for part in ("Poor picture", "Poor sound", "Poor delivery"))
    assert_same(run(tiny_pipeline, negative_prompt=DEFAULT_NEGATIVE_PROMPT), run(tiny_pipeline))
    other = run(tiny_pipeline, negative_prompt="blurred")
    assert (other.frames - run(tiny_pipeline).frames).abs().max() > 1e-4


def test_guidance_scales(tiny_pipeline):
    expected = run(tiny_pipeline)
    explicit = {"guidance_scale": 5.0, "audio_guidance_scale": 5.0, "low_noise_guidance_scale": 2.0}
    assert_same(run(tiny_pipeline, **explicit, num_inference_steps=8), run(tiny_pipeline, num_inference_steps=8))
    for name in explicit:
        # Eight steps, since two never come to the lower half of the timesteps.
        changed = run(tiny_pipeline, **{**explicit, name: 3.0}, num_inference_steps=8)
        assert not torch.equal(changed.frames, run(tiny_pipeline, num_inference_steps=8).frames), name
    unguided = run(tiny_pipeline, guidance_scale=1.0, audio_guidance_scale=1.0)
    assert not tiny_pipeline.do_classifier_free_guidance
    assert (unguided.frames - expected.frames).abs().max() > 1e-4


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_output_types(output_type, tiny_distilled_pipeline):
    output = run(tiny_distilled_pipeline, ["One.", "Two words."], output_type=output_type)
    num_samples = 9 * 2048 * 441 // 512
    if output_type == "pil":
        assert [len(video) for video in output.frames] == [9, 9] and output.frames[0][0].size == (64, 64)
    else:
        shape = (2, 9, 64, 64, 3) if output_type == "np" else (2, 9, 3, 64, 64)
        assert tuple(output.frames.shape) == shape
        assert 0 <= output.frames.min() < output.frames.max() <= 1
    assert isinstance(output.audio, torch.Tensor if output_type == "pt" else np.ndarray)
    assert tuple(output.audio.shape) == (2, 2, num_samples) and tiny_distilled_pipeline.audio_sampling_rate == 44100


def test_streamed_frames_are_those_of_np(tiny_distilled_pipeline):
    streamed = run(tiny_distilled_pipeline, output_type="stream")
    expected = run(tiny_distilled_pipeline, output_type="np")
    assert np.array_equal(np.stack(list(streamed.frames[0])), expected.frames[0])
    assert np.array_equal(streamed.audio, expected.audio)


def test_tuple_and_latents_decode_to_the_same(tiny_distilled_pipeline):
    pipe = tiny_distilled_pipeline
    latents = run(pipe)
    frames, audio = run(pipe, output_type="np", return_dict=False)
    with torch.no_grad():
        assert np.array_equal(pipe.decode_latents(latents.frames, "np"), frames)
        assert np.array_equal(pipe.decode_audio(latents.audio, "np"), audio)


@pytest.mark.parametrize("use_wan_vae", [False, True])
@torch.no_grad()
def test_latents_are_normalised_by_the_statistics_of_the_vae(use_wan_vae, portrait):
    pipe = make_tiny_pipeline(use_wan_vae=use_wan_vae)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    pixels = pipe.video_processor.preprocess(crop_to_aspect(portrait, 32, 64), 32, 64)
    expected = (pipe.vae.encode(pixels[:, :, None]).latent_dist.mode() - mean) / std
    latents = pipe.encode_image([portrait], 32, 64, torch.device("cpu"))
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)

    frames = (pipe.vae.decode(latents * std + mean).sample * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(pipe.decode_latents(latents, "pt"), frames, atol=1e-5, rtol=0)


def test_callback_changes_and_interrupts(tiny_pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]
    output = run(
        tiny_pipeline,
        num_inference_steps=4,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert seen == [(0, 999, sorted(names)), (1, 937, sorted(names))]
    assert not output.frames.any() and output.audio.any()
    assert tiny_pipeline.num_timesteps == 4 and tiny_pipeline.current_timestep is None


@pytest.fixture
def rope_calls(tiny_pipeline):
    """Shapes of the rotary tables that the transformer computes."""
    shapes = []
    hook = tiny_pipeline.transformer.rope.register_forward_hook(
        lambda _module, _args, output: shapes.append(tuple(output[0].shape[:2]))
    )
    yield shapes
    hook.remove()


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_rotary_table_is_computed_once_for_each_branch(guidance_scale, tiny_pipeline, rope_calls):
    prompts, negative_prompt = ["One.", "Another one."], "Two."
    for num_inference_steps in (1, 3):
        rope_calls.clear()
        run(
            tiny_pipeline,
            prompts,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            audio_guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
        )
        tokens = 3 * 2 * 2 + 9
        # One table for each of the prompts of different lengths, one for all of a length.
        expected = [(2, tokens + len("Another one.")), (1, tokens + len(negative_prompt))]
        assert rope_calls == expected[: 1 if guidance_scale == 1 else 2]


def test_callback_may_change_the_length_of_the_embeddings(tiny_pipeline, rope_calls):
    lengths = []

    def callback(_pipe, _step, _timestep, tensors):
        lengths.append(tensors["prompt_embeds"].shape[1])
        return {"prompt_embeds": tensors["prompt_embeds"][:, :-1]}

    names = ["prompt_embeds"]
    run(tiny_pipeline, num_inference_steps=3, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert lengths == [lengths[0], lengths[0] - 1, lengths[0] - 2]
    assert [shape[1] - 21 for shape in rope_calls[::2]] == lengths


def test_guidance_that_a_callback_turns_on_needs_negative_embeddings(tiny_distilled_pipeline):
    def callback(pipe, _step, _timestep, tensors):
        pipe._guidance_scale += 3.0
        return tensors

    # Without any there is nothing to guide away from, so the run goes on without guidance.
    assert_same(run(tiny_distilled_pipeline, callback_on_step_end=callback), run(tiny_distilled_pipeline))


def test_components_are_not_changed_by_a_call(tiny_pipeline):
    before = dict(tiny_pipeline.scheduler.__dict__)
    latents = torch.randn(1, 8, 3, 4, 4)
    kept = latents.clone()
    run(tiny_pipeline, latents=latents, image_latents=torch.zeros(1, 8, 1, 4, 4))
    assert torch.equal(latents, kept)
    assert tiny_pipeline.scheduler.__dict__.keys() == before.keys()
    assert tiny_pipeline.scheduler.timesteps is before["timesteps"]


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_flow_schedulers(scheduler, tiny_pipeline):
    pipe = MagiHumanAudioVideoPipeline(**tiny_pipeline.components)
    arguments = {"shift": 5.0} if "Euler" in scheduler else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(tiny_pipeline.scheduler.config, **arguments)
    output, expected = run(pipe, num_inference_steps=16), run(tiny_pipeline, num_inference_steps=16)
    # The same flow on another grid: near, but not the same.
    difference = (output.frames - expected.frames).square().mean().sqrt() / expected.frames.square().mean().sqrt()
    assert 0 < difference < 0.3


def test_saved_pipeline_loads_with_the_import_alone(tiny_distilled_pipeline, tiny_pipeline_dir, tmp_path):
    index = json.loads((tiny_pipeline_dir / "model_index.json").read_text())
    assert index["_class_name"] == "MagiHumanAudioVideoPipeline" and index["is_distilled"] is True
    for name in ("transformer", "scheduler", "vae"):
        assert index[name][0] == "diffusers"

    loaded = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    assert isinstance(loaded, MagiHumanAudioVideoPipeline) and loaded.config.is_distilled
    expected = run(tiny_distilled_pipeline)
    assert_same(run(loaded), expected)

    script = f"""
import torch, diffusers, diffusers_magihuman
pipe = diffusers.DiffusionPipeline.from_pretrained({str(tiny_pipeline_dir)!r})
output = pipe({PROMPT!r}, height=64, width=64, num_frames=9, num_inference_steps=2,
              generator=torch.Generator().manual_seed(0), output_type="latent")
torch.save([output.frames, output.audio], {str(tmp_path / "output.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    frames, audio = torch.load(tmp_path / "output.pt", weights_only=True)
    assert torch.equal(frames, expected.frames) and torch.equal(audio, expected.audio)


def test_bf16_pipeline_keeps_fp32_parts_and_runs(tiny_pipeline_dir):
    pipe = DiffusionPipeline.from_pretrained(
        tiny_pipeline_dir, dtype={"default": torch.bfloat16, "audio_vae": torch.float32}
    )
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16 and pipe.audio_vae.dtype == torch.float32
    assert pipe.transformer.video_embedder.weight.dtype == torch.float32
    output = run(pipe, output_type="np")
    expected = run(DiffusionPipeline.from_pretrained(tiny_pipeline_dir), output_type="np")
    assert np.abs(output.frames - expected.frames).mean() < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "`prompt`='' must be a non-empty string"),
        ({"prompt": ["A", " "]}, r"`prompt`=\['A', ' '\] must be a non-empty string"),
        ({"prompt": 3}, "`prompt`=3 must be a non-empty string"),
        ({"prompt": []}, r"`prompt`=\[\] must be a non-empty string"),
        ({"prompt": None}, "Exactly one of `prompt` and `prompt_embeds` must be given, but neither is"),
        ({"prompt_embeds": torch.zeros(1, 3, 16)}, "Exactly one of `prompt` and `prompt_embeds` .* but both are"),
        (
            {"negative_prompt": ["a", "b"]},
            r"`negative_prompt`=\['a', 'b'\] must be a string or a list of 1 strings",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 15)},
            r"`prompt_embeds` has shape \(1, 3, 15\), but must have shape \(1, any, 16\)",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16), "prompt_embeds_mask": torch.ones(1, 4)},
            r"`prompt_embeds_mask` has shape \(1, 4\), but must have the first two sizes .* \(1, 3\)",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.full((1, 3, 16), torch.inf)},
            "`prompt_embeds` holds NaN or infinite values",
        ),
        ({"height": 50}, "`height`=50 must be a positive multiple of 32"),
        ({"width": 0}, "`width`=0 must be a positive multiple of 32"),
        ({"num_frames": 0}, "`num_frames`=0 must be an integer of 1 or more"),
        ({"num_frames": 2.5}, "`num_frames`=2.5 must be an integer of 1 or more"),
        ({"num_inference_steps": 0}, "`num_inference_steps`=0 must be an integer of 1 or more"),
        ({"num_videos_per_prompt": 0}, "`num_videos_per_prompt`=0 must be an integer of 1 or more"),
        ({"max_sequence_length": 641}, "`max_sequence_length`=641 must be in 1 to 640"),
        ({"output_type": "gif"}, "`output_type`='gif' must be one of"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\], allowed are \['latents'"),
        ({"generator": [seeded(), seeded()]}, "`generator` is a list of 2, but must have 1"),
        ({"latents": torch.zeros(1, 8, 2, 4, 4)}, r"`latents` has shape .* must have shape \(1, 8, 3, 4, 4\)"),
        ({"latents": torch.full((1, 8, 3, 4, 4), torch.nan)}, "`latents` holds NaN or infinite values"),
        ({"audio_latents": torch.zeros(1, 8, 8)}, r"`audio_latents` has shape .* must have shape \(1, 9, 8\)"),
        ({"image_latents": torch.zeros(1, 8, 2, 4, 4)}, r"`image_latents` has shape .* \(any, 8, 1, 4, 4\)"),
        ({"image_latents": torch.zeros(3, 8, 1, 4, 4)}, r"`image_latents` has 3 items, but must have 1"),
        ({"conditioning_audio_latents": torch.zeros(1, 5, 8)}, r"`conditioning_audio_latents` .* \(any, 9, 8\)"),
        (
            {"image": PIL.Image.new("RGB", (8, 8)), "image_latents": torch.zeros(1, 8, 1, 4, 4)},
            r"At most one of \['image', 'image_latents'\] may be given",
        ),
        (
            {"audio": (np.zeros(22050, np.float32), 22050), "audio_latents": torch.zeros(1, 9, 8)},
            r"At most one of .* may be given, but \['audio', 'audio_latents'\] are",
        ),
        ({"image": []}, "`image` is an empty list"),
        ({"image": 3}, "`image` is a int"),
        (
            {"audio": [(np.zeros(n, np.float32), 51200) for n in (9000, 30000)], "num_frames": None},
            r"`audio` lasts \[4, 14\] frames of 1/25 s; without `num_frames` it must",
        ),
        ({"audio": np.zeros(100)}, "`audio` is a waveform without its rate; it must be a tuple"),
        ({"audio": (np.zeros(0, np.float32), 16000)}, r"`audio` has shape \(0,\)"),
        ({"audio": (np.zeros(10, np.float32), 51200), "num_frames": None}, r"`audio` lasts \[0\] frames of 1/25 s"),
    ],
)
def test_bad_input_raises_before_any_model_runs(arguments, message, tiny_distilled_pipeline):
    calls = []
    models = [tiny_distilled_pipeline.text_encoder, tiny_distilled_pipeline.transformer]
    handles = [model.register_forward_pre_hook(lambda *_: calls.append(1)) for model in models]
    with pytest.raises(ValueError, match=message):
        run(tiny_distilled_pipeline, **{"prompt": PROMPT, **arguments})
    for handle in handles:
        handle.remove()
    assert not calls


def test_unreadable_files_raise(tiny_distilled_pipeline, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    for arguments in ({"image": str(tmp_path / "broken.png")}, {"image": tmp_path / "missing.png"}):
        with pytest.raises(OSError, match=r"`image` is '.*(broken|missing).png', which cannot be read as an image"):
            run(tiny_distilled_pipeline, **arguments)
    with pytest.raises(OSError, match=r"`audio` is '.*broken.wav', which holds no readable audio"):
        run(tiny_distilled_pipeline, audio=str(tmp_path / "broken.wav"))
    with pytest.raises(FileNotFoundError, match=r"`audio` is '.*missing.wav', but there is no such file"):
        run(tiny_distilled_pipeline, audio=tmp_path / "missing.wav")


@pytest.mark.parametrize(
    "component, arguments, message",
    [
        ("text_encoder", {}, r"This call needs \['text_encoder'\]"),
        ("vae", {"output_type": "np"}, r"This call needs \['vae'\]"),
        ("vae", {"image": PIL.Image.new("RGB", (8, 8))}, "`image` needs `vae`"),
        ("audio_vae", {"audio": (np.zeros(22050, np.float32), 22050)}, "`audio` needs `audio_vae`"),
    ],
)
def test_missing_component_raises(component, arguments, message, tiny_distilled_pipeline):
    pipe = MagiHumanAudioVideoPipeline(**{**tiny_distilled_pipeline.components, component: None}, is_distilled=True)
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)


def test_saved_default_of_the_guidance(tmp_path):
    pipe = make_tiny_pipeline()
    expected = run(pipe, guidance_scale=2.0, audio_guidance_scale=2.0)
    assert not torch.equal(expected.frames, run(pipe).frames)
    pipe.register_to_config(default_guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    loaded = MagiHumanAudioVideoPipeline.from_pretrained(tmp_path)
    assert_same(run(loaded), expected)
    assert (loaded.guidance_scale, loaded.audio_guidance_scale) == (2.0, 2.0)
