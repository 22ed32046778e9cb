import json

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from diffusers import DiffusionPipeline
from golden import DATA, load_golden, make_golden_transformer
from helpers import PROMPT, assert_same, run, seeded
from make_tiny_pipeline import make_tiny_pipeline

from diffusers_magihuman import MagiHumanAudioVideoPipeline, MagiHumanFlowScheduler
from diffusers_magihuman.media import load_audio


@pytest.fixture(scope="module")
def portrait():
    gradient = np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3).astype(np.uint8)
    return PIL.Image.fromarray(gradient)


@pytest.fixture(scope="module")
def speech():
    time = np.arange(int(0.5 * 22050)) / 22050
    return np.sin(2 * np.pi * 220 * time).astype(np.float32) * 0.3, 22050


def encode_speech(pipe, speech, generator):
    """The latents of the first nine frames of the audio."""
    waveform = load_audio(speech, 51200)[:, : 9 * 2048]
    with torch.no_grad():
        return pipe.encode_audio(waveform, generator, torch.device("cpu"))


class RecordedNoiseScheduler(MagiHumanFlowScheduler):
    """Takes the noise of the stochastic step from the golden data: video is 5-dimensional, audio 3-dimensional."""

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

    audio = "conditioning_audio_latents" if info["is_a2v"] else "audio_latents"
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
        **{audio: golden["in.latent_audio"]},
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


def test_given_audio_stays_in_the_distilled_model():
    output, steps, golden = run_golden("denoise_distill_a2v")
    assert torch.equal(output.audio, golden["in.latent_audio"])
    # The original overwrites the sound, so only the first step, which still sees it as given, can agree.
    torch.testing.assert_close(steps[0]["latents"], golden["fp32.step.0.video_out"], atol=1e-3, rtol=0)
    assert (output.audio - golden["fp32.final.audio"]).abs().max() > 0.1


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


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "stream"])
@pytest.mark.parametrize("num_frames", [9, 17, None])
def test_given_audio_comes_out_as_it_went_in(num_frames, output_type, tiny_distilled_pipeline, speech):
    second = speech[0][::-1].copy(), speech[1]
    calls = {"audio": [speech, second], "num_frames": num_frames, "num_videos_per_prompt": 2, "num_inference_steps": 1}
    output = run(tiny_distilled_pipeline, ["One.", "Two."], **calls, output_type=output_type)
    num_samples = (num_frames or 12) * 44100 // 25
    assert isinstance(output.audio, torch.Tensor if output_type == "pt" else np.ndarray)
    assert tuple(output.audio.shape) == (4, 2, num_samples)
    for audio, given in zip(output.audio, [speech, speech, second, second], strict=True):
        expected = torch.nn.functional.pad(load_audio(given, 44100), (0, num_samples))[:, :num_samples]
        assert np.array_equal(audio, expected)


def test_given_latents_of_audio_are_decoded(tiny_distilled_pipeline, speech):
    pipe = tiny_distilled_pipeline
    latents = encode_speech(pipe, speech, seeded())
    output = run(pipe, conditioning_audio_latents=latents, output_type="np")
    with torch.no_grad():
        assert np.array_equal(output.audio, pipe.decode_audio(latents, "np"))


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


def test_guidance_scales(tiny_pipeline):
    # Six steps, since two never come to the lower half of the timesteps.
    expected = run(tiny_pipeline, num_inference_steps=6)
    explicit = {"guidance_scale": 5.0, "audio_guidance_scale": 5.0, "low_noise_guidance_scale": 2.0}
    assert_same(run(tiny_pipeline, **explicit, num_inference_steps=6), expected)
    for name in explicit:
        changed = run(tiny_pipeline, **{**explicit, name: 3.0}, num_inference_steps=6)
        assert not torch.equal(changed.frames, expected.frames), name
    below_two = run(tiny_pipeline, guidance_scale=1.5, num_inference_steps=6)
    assert_same(run(tiny_pipeline, guidance_scale=1.5, low_noise_guidance_scale=1.5, num_inference_steps=6), below_two)


def test_guidance_is_off_at_one_for_both(tiny_pipeline):
    unguided = run(tiny_pipeline, guidance_scale=1.0, audio_guidance_scale=1.0)
    assert not tiny_pipeline.do_classifier_free_guidance
    audio_alone = run(tiny_pipeline, guidance_scale=1.0, audio_guidance_scale=5.0)
    assert tiny_pipeline.do_classifier_free_guidance
    assert (audio_alone.audio - unguided.audio).abs().max() > 1e-4
    assert (run(tiny_pipeline).frames - unguided.frames).abs().max() > 1e-4


def test_embeddings_are_float32_with_a_mask(tiny_pipeline):
    embeds, mask, _, negative_mask = tiny_pipeline.encode_prompt([PROMPT, "Short."])
    assert embeds.dtype == torch.float32 and mask.sum(dim=1).tolist() == [137, 6]
    assert mask.dtype == negative_mask.dtype == torch.bool and negative_mask.all()


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_videos_per_prompt(num_prompts, tiny_pipeline):
    prompts = ["One.", "Two words."][:num_prompts]
    seeds = range(2 * num_prompts)
    output = run(
        tiny_pipeline, prompts, num_videos_per_prompt=2, generator=[seeded(seed) for seed in seeds], output_type="pt"
    )
    expected = run(
        tiny_pipeline,
        [prompt for prompt in prompts for _ in range(2)],
        generator=[seeded(seed) for seed in seeds],
        output_type="pt",
    )
    assert len(output.frames) == len(output.audio) == 2 * num_prompts
    assert_same(output, expected)


def test_bf16_pipeline_keeps_fp32_parts_and_runs(tiny_pipeline_dir):
    dtype = {"default": torch.bfloat16, "audio_vae": torch.float32}
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_dir, dtype=dtype)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16 and pipe.audio_vae.dtype == torch.float32
    assert pipe.transformer.video_embedder.weight.dtype == torch.float32
    output = run(pipe, output_type="pt")
    expected = run(DiffusionPipeline.from_pretrained(tiny_pipeline_dir), output_type="pt")
    assert (output.frames - expected.frames).square().mean().sqrt() < 0.02  # 0.064 for another prompt


def test_saved_default_of_the_guidance(tmp_path):
    pipe = make_tiny_pipeline()
    expected = run(pipe, guidance_scale=2.0, audio_guidance_scale=2.0)
    assert not torch.equal(expected.frames, run(pipe).frames)
    pipe.register_to_config(default_guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    loaded = MagiHumanAudioVideoPipeline.from_pretrained(tmp_path)
    assert_same(run(loaded), expected)
    assert (loaded.guidance_scale, loaded.audio_guidance_scale) == (2.0, 2.0)


@pytest.mark.parametrize(
    "setting",
    [{"is_distilled": "yes"}, {"default_height": "256"}, {"default_num_frames": 0}, {"default_guidance_scale": "5"}],
)
def test_bad_settings_raise(setting, tiny_pipeline):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}`="):
        MagiHumanAudioVideoPipeline(**tiny_pipeline.components, **setting)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_frames": 0}, "`num_frames`"),
        ({"num_frames": True}, "`num_frames`=True"),
        ({"num_frames": 10**9}, "`num_frames`=1000000000 must be an integer in 1 to 16384"),
        ({"num_videos_per_prompt": 10**9}, "`num_videos_per_prompt`=1000000000 must be an integer in 1 to 1000"),
        ({"height": 8192, "width": 8192, "num_frames": 125}, "2097917 tokens, but at most 1048576 are allowed"),
        ({"num_videos_per_prompt": 1000, "num_frames": 1000}, "tokens, but at most 1048576"),
        ({"conditioning_audio_latents": torch.zeros(1, 20000, 8), "num_frames": None}, "`num_frames`=20000"),
        ({"conditioning_audio_latents": [1], "num_frames": None}, "`conditioning_audio_latents`"),
        ({"num_frames": 2.5}, "`num_frames`"),
        ({"num_videos_per_prompt": 0}, "`num_videos_per_prompt`"),
        ({"audio_guidance_scale": float("nan")}, "`audio_guidance_scale`"),
        ({"low_noise_guidance_scale": float("inf")}, "`low_noise_guidance_scale`"),
        ({"latents": torch.zeros(1, 8, 2, 4, 4)}, r"`latents` has shape .* \(1, 8, 3, 4, 4\)"),
        ({"latents": torch.full((1, 8, 3, 4, 4), torch.nan)}, "`latents` holds NaN"),
        ({"audio_latents": torch.zeros(1, 8, 8)}, r"`audio_latents` has shape .* \(1, 9, 8\)"),
        ({"image_latents": torch.zeros(3, 8, 1, 4, 4)}, "`image_latents` has 3 items"),
        ({"conditioning_audio_latents": torch.zeros(1, 5, 8)}, r"`conditioning_audio_latents` .* \(any, 9, 8\)"),
        ({"audio": (np.zeros(22050, np.float32), 22050), "audio_latents": torch.zeros(1, 9, 8)}, "At most one of"),
        (
            {"audio": [(np.zeros(n, np.float32), 51200) for n in (9000, 30000)], "num_frames": None},
            r"`audio` lasts \[4, 14\]",
        ),
        ({"audio": (np.zeros(10, np.float32), 51200), "num_frames": None}, r"`audio` lasts \[0\]"),
    ],
)
def test_bad_input_raises(arguments, message, tiny_distilled_pipeline):
    with pytest.raises(ValueError, match=message):
        run(tiny_distilled_pipeline, **arguments)


def test_unreadable_files_raise(tiny_distilled_pipeline, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(OSError, match="`image`"):
        run(tiny_distilled_pipeline, image=tmp_path / "broken.png")
    with pytest.raises(FileNotFoundError, match="`audio`"):
        run(tiny_distilled_pipeline, audio=tmp_path / "missing.wav")


def test_short_descriptions_are_told_of_at_full_size(caplog):
    pipe = make_tiny_pipeline(is_distilled=True)
    long = " ".join(["word"] * 60) + "\n\nDialogue:\n<Man, English>: "
    run(pipe, "Short.")
    pipe.transformer.register_to_config(num_layers=40)
    run(pipe, [long, "A short one.\n\nBackground Sound:\n<None>"])
    assert [record.message.split(";")[0] for record in caplog.records] == ["The description in the prompt has 3 words"]
