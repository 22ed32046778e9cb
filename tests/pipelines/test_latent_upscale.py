import numpy as np
import PIL.Image
import pytest
import torch
from golden import load_golden, make_golden_transformer
from helpers import assert_same, make_low, seeded, upscale

from diffusers_magihuman import (
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    export_to_mp4,
    load_audio,
    pipeline_magihuman_latent_upscale,
)
from diffusers_magihuman.media import read_video
from diffusers_magihuman.pipeline_magihuman_latent_upscale import default_size, zero_snr_signal_scales

CPU = torch.device("cpu")


def run_golden(case, monkeypatch):
    """The whole call on a case's latents, embeddings and noise, recording the latents after each step."""
    info, golden = load_golden(case)
    config = info["evaluation_config"]
    transformer = make_golden_transformer(
        info["weights_file"].split(".")[0],
        coordinate_style="v1",
        local_attention_layers=tuple(info["sr_model_config"]["local_attn_layers"]),
        local_attention_frames=info["frame_receptive_field"],
    )
    pipe = MagiHumanLatentUpscalePipeline(None, None, transformer, MagiHumanFlowScheduler(), None, None)
    pipe.set_progress_bar_config(disable=True)
    noise = [golden["noise.video"], golden["noise.audio"]]

    def draw(shape, **_kwargs):
        assert tuple(shape) == noise[0].shape
        return noise.pop(0)

    monkeypatch.setattr(pipeline_magihuman_latent_upscale, "randn_tensor", draw)
    steps, inputs = [], []
    transformer.register_forward_pre_hook(lambda _module, args: inputs.append(args))

    def record(_pipe, _step, _timestep, tensors):
        steps.append(tensors["latents"])
        return {}

    height, width = (16 * size for size in info["sr_latent_hw"])
    output = pipe(
        prompt_embeds=golden["in.context"],
        prompt_embeds_mask=torch.arange(golden["in.context"].shape[1])[None] < info["context_len"],
        negative_prompt_embeds=golden["in.context_null"],
        negative_prompt_embeds_mask=torch.arange(golden["in.context_null"].shape[1])[None] < info["context_null_len"],
        latents=golden["in.base_latent_video"],
        audio_latents=golden["in.base_latent_audio"],
        image_latents=golden.get("in.sr_latent_image"),
        height=height,
        width=width,
        guidance_scale=config["sr_video_txt_guidance_scale"] if config["sr_cfg_number"] == 2 else 1.0,
        num_leading_frames=config["cfg_trick_start_frame"],
        output_type="latent",
        callback_on_step_end=record,
    )
    assert not noise and len(steps) == info["steps"] == pipe.num_timesteps
    return output, steps, inputs, golden


@pytest.mark.parametrize("case", ["denoise_sr", "denoise_sr_cfg2", "denoise_sr_local_ti2v"])
def test_golden_denoising(case, monkeypatch):
    output, steps, inputs, golden = run_golden(case, monkeypatch)
    torch.testing.assert_close(output.frames, golden["fp32.final.video"], atol=1e-4, rtol=0)
    assert torch.equal(output.audio, golden["final.audio"])
    for step, latents in enumerate(steps):
        torch.testing.assert_close(latents, golden[f"fp32.step.{step}.video_out"], atol=1e-4, rtol=0)

    # What the transformer sees first, but for a first frame that is overwritten; the audio never changes.
    first = 1 if "in.sr_latent_image" in golden else 0
    initial = golden["sr.latent_video_init"][:, :, first:]
    torch.testing.assert_close(inputs[0][0][:, :, first:], initial, atol=1e-6, rtol=0)
    assert all(torch.equal(audio, golden["sr.latent_audio_init"]) for _, audio in inputs)


def test_golden_noise_levels():
    _, golden = load_golden("denoise_sr")
    scales = zero_snr_signal_scales()
    # Not bit by bit: MKL rounds a square root as suits the processor, here and in the original.
    torch.testing.assert_close(scales, golden["ddpm_sigmas"], atol=2.5e-7, rtol=0)
    torch.testing.assert_close(scales[220:221], golden["ddpm_sigma_used"], atol=2.5e-7, rtol=0)
    assert scales[-1] == 0


def test_noise_is_drawn_for_the_video_first(tiny_upscale_pipeline):
    latents, audio_latents = make_low()
    generator = seeded(7)
    noise = torch.randn(1, 8, 3, 4, 6, generator=generator), torch.randn(1, 9, 8, generator=generator)
    low = latents, audio_latents
    drawn = tiny_upscale_pipeline.prepare_latents(*low, 64, 96, 999, 1.0, seeded(7), CPU)
    for states, expected in zip(drawn, noise, strict=True):  # nothing but noise is left
        torch.testing.assert_close(states, expected, atol=1e-6, rtol=0)
    _, audio = tiny_upscale_pipeline.prepare_latents(*low, 64, 96, 0, 0.0, seeded(7), CPU)
    assert torch.equal(audio, audio_latents)


def test_batch_equals_single_runs(tiny_upscale_pipeline):
    latents, audio_latents = make_low(batch_size=4)
    generators = [seeded(i) for i in range(4)]
    prompts = ["One.", "Another prompt."]
    batch = upscale(
        tiny_upscale_pipeline,
        prompts,
        latents=latents,
        audio_latents=audio_latents,
        generator=generators,
        guidance_scale=3.5,
        negative_prompt="bad",
    )
    assert batch.frames.shape == (4, 8, 3, 4, 6) and torch.equal(batch.audio, audio_latents)
    for i in range(4):
        single = upscale(
            tiny_upscale_pipeline,
            prompts[i // 2],
            latents=latents[i : i + 1],
            audio_latents=audio_latents[i : i + 1],
            generator=seeded(i),
            guidance_scale=3.5,
            negative_prompt="bad",
        )
        torch.testing.assert_close(batch.frames[i : i + 1], single.frames, atol=1e-4, rtol=0)


def test_one_video_for_several_prompts(tiny_upscale_pipeline):
    prompts = ["One.", "Another prompt."]
    batch = upscale(tiny_upscale_pipeline, prompts, generator=[seeded(), seeded()], output_type="np")
    assert len(batch.frames) == len(batch.audio) == 2
    for i, prompt in enumerate(prompts):
        single = upscale(tiny_upscale_pipeline, prompt, output_type="np")
        assert np.abs(batch.frames[i] - single.frames[0]).max() < 1e-4
        assert np.abs(batch.audio[i] - single.audio[0]).max() < 1e-5


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"guidance_scale": 3.5, "num_leading_frames": 2}, [2.0, 2.0, 3.5]),
        ({"guidance_scale": 1.5, "num_leading_frames": 1}, [1.5, 1.5, 1.5]),
        ({"guidance_scale": 3.5, "leading_guidance_scale": 4.0}, [3.5, 3.5, 3.5]),
        ({"guidance_scale": 3.5}, [2.0, 2.0, 2.0]),
    ],
)
def test_guidance_of_leading_frames(arguments, expected, tiny_upscale_pipeline):
    scales = []

    class Recording(MagiHumanLatentUpscalePipeline):
        def denoise(self, latents, audio_latents, text, num_inference_steps, guidance_at, *args, **kwargs):
            scales.append(guidance_at(None).flatten().tolist())
            return super().denoise(latents, audio_latents, text, num_inference_steps, guidance_at, *args, **kwargs)

    upscale(Recording(**tiny_upscale_pipeline.components), negative_prompt="bad", num_inference_steps=1, **arguments)
    assert scales == [expected]


def test_audio_changes_the_video_and_passes_through(tiny_upscale_pipeline):
    latents, audio_latents = make_low()
    output = upscale(tiny_upscale_pipeline, output_type="np")
    with torch.no_grad():
        assert np.array_equal(output.audio, tiny_upscale_pipeline.decode_audio(audio_latents, "np"))
    assert output.frames.shape == (1, 9, 64, 96, 3)

    other = upscale(tiny_upscale_pipeline, latents=latents, audio_latents=audio_latents * 2)
    assert (other.frames - upscale(tiny_upscale_pipeline).frames).abs().max() > 1e-5
    silent = upscale(tiny_upscale_pipeline, latents=latents, output_type="np")
    assert silent.audio is None and silent.frames.shape == output.frames.shape


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_a_given_waveform_is_returned_as_it_is(output_type, tiny_upscale_pipeline):
    waveform = torch.randn(2, 10000, generator=seeded()).numpy() * 0.1
    output = upscale(tiny_upscale_pipeline, audio=(waveform, 44100), output_type=output_type)
    num_samples = 9 * 2048 * 44100 // 51200
    assert output.audio.shape == (1, 2, num_samples)
    audio = np.asarray(output.audio[0])
    assert np.array_equal(audio[:, :10000], waveform) and not audio[:, 10000:].any()

    encoded = upscale(tiny_upscale_pipeline, audio=(waveform, 44100))
    assert encoded.audio.shape == (1, 9, 8)
    longer = upscale(tiny_upscale_pipeline, audio=(np.tile(waveform, 3), 44100), output_type=output_type)
    assert np.array_equal(np.asarray(longer.audio[0]), np.tile(waveform, 3)[:, :num_samples])


def test_load_audio_is_what_the_output_has(tiny_upscale_pipeline):
    tone = (np.sin(np.arange(8000) / 9).astype(np.float32), 22050)
    output = upscale(tiny_upscale_pipeline, audio=tone, output_type="np")
    expected = load_audio(tone, 44100).numpy()
    assert np.array_equal(output.audio[0], expected[:, : output.audio.shape[2]])


def test_video_is_encoded_first(tiny_upscale_pipeline, tmp_path):
    pipe = tiny_upscale_pipeline
    pixels = torch.rand(9, 3, 32, 64, generator=seeded())
    with torch.no_grad():
        latents = pipe.encode_video(pixels.transpose(0, 1)[None] * 2 - 1, CPU)
    expected = upscale(pipe, latents=latents)
    array = pixels.permute(0, 2, 3, 1).numpy()
    for video in (pixels, array, list(array), pixels[None], [pixels], [list(pixels)]):
        assert_same_frames(upscale(pipe, video=video), expected)

    rounded = (array * 255).astype(np.uint8)
    images = [PIL.Image.fromarray(frame) for frame in rounded]
    assert_same_frames(upscale(pipe, video=images), upscale(pipe, video=rounded))
    export_to_mp4(pixels, tmp_path / "low.mp4")
    frames, rate = read_video(tmp_path / "low.mp4")
    assert rate == 25 and frames.shape == (9, 32, 64, 3)
    assert_same_frames(upscale(pipe, video=tmp_path / "low.mp4"), upscale(pipe, video=frames))
    two = upscale(pipe, video=np.stack([array, array[::-1]]))
    assert len(two.frames) == 2 and (two.frames[0] - two.frames[1]).abs().max() > 1e-3


def assert_same_frames(output, expected):
    torch.testing.assert_close(output.frames, expected.frames, atol=1e-5, rtol=0)


def test_image_fixes_the_first_frame(tiny_upscale_pipeline):
    pipe = tiny_upscale_pipeline
    image = PIL.Image.fromarray(np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3).astype(np.uint8))
    with torch.no_grad():
        image_latents = pipe.encode_image([image], 64, 96, CPU)
    output = upscale(pipe, image=image)
    assert torch.equal(output.frames[:, :, :1], image_latents)
    assert_same(upscale(pipe, image_latents=image_latents), output)
    assert (output.frames - upscale(pipe).frames)[:, :, 1:].abs().max() > 1e-4


def test_streamed_equals_unstreamed_exactly(tiny_upscale_pipeline):
    """Twelve latent frames, so that the decoder's window of seven slides; two videos."""
    latents, audio_latents = make_low(batch_size=2, latent_frames=12, audio_length=45)
    low = {"latents": latents, "audio_latents": audio_latents, "num_inference_steps": 1}
    windows = []
    handle = tiny_upscale_pipeline.vae.decoder.register_forward_hook(lambda *_: windows.append(1))
    expected = upscale(tiny_upscale_pipeline, **low, output_type="np")
    num_windows = len(windows) // 2
    assert num_windows > 1

    streamed = upscale(tiny_upscale_pipeline, **low, output_type="stream")
    windows.clear()
    assert np.array_equal(streamed.audio, expected.audio)
    for video, frames in zip(streamed.frames, expected.frames, strict=True):
        first = next(video)
        assert len(windows) == 1  # of which nothing was decoded before
        assert np.array_equal(np.stack([first, *video]), frames)
        assert len(windows) == num_windows
        windows.clear()
    handle.remove()
    pil = upscale(tiny_upscale_pipeline, **low, output_type="pil").frames
    assert [len(video) for video in pil] == [45, 45] and pil[0][0].size == (96, 64)


def test_a_consumed_stream_frees_the_models_as_the_call_does(tiny_upscale_pipeline, monkeypatch):
    calls = []
    monkeypatch.setattr(tiny_upscale_pipeline, "maybe_free_model_hooks", lambda: calls.append(1))
    frames = upscale(tiny_upscale_pipeline, num_inference_steps=1, output_type="stream").frames[0]
    assert len(calls) == 1
    assert len(list(frames)) == 9 and len(calls) == 2


def test_tiling_gives_the_same_frames(tiny_upscale_pipeline):
    expected = upscale(tiny_upscale_pipeline, output_type="np")
    tiny_upscale_pipeline.vae.enable_tiling(32, 32)
    tiled = upscale(tiny_upscale_pipeline, output_type="np")
    tiny_upscale_pipeline.vae.disable_tiling()
    assert np.abs(tiled.frames - expected.frames).max() < 1e-4


@pytest.mark.parametrize(
    "source, default, given, expected",
    [
        ((256, 448), (1088, 1920), {}, (1088, 1920)),
        ((272, 480), (1088, 1920), {}, (1088, 1920)),
        ((256, 448), (512, 896), {}, (512, 896)),
        ((448, 256), (1088, 1920), {}, (1920, 1088)),
        ((128, 128), (256, 256), {}, (256, 256)),
        ((256, 256), (1088, 1920), {}, (1440, 1440)),
        ((128, 64), (256, 256), {}, (384, 192)),
        ((480, 832), (1088, 1920), {}, (1088, 1888)),
        ((2000, 2000), (1088, 1920), {}, (2016, 2016)),  # never less than the source
        ((256, 448), (1088, 1920), {"height": 512}, (512, 896)),
        ((256, 448), (1088, 1920), {"width": 512}, (288, 512)),
        ((448, 256), (1088, 1920), {"height": 512, "width": 512}, (512, 512)),
    ],
)
def test_default_size_keeps_the_aspect(source, default, given, expected):
    assert default_size(source, default, **given) == expected


@pytest.mark.parametrize(
    "source, size, expected",
    [
        ((3, 5), {}, (18, 30)),  # the saved size, 288x480
        ((5, 3), {}, (30, 18)),
        ((2, 4), {}, (16, 32)),
        ((2, 4), {"height": 96}, (6, 12)),
        ((2, 4), {"width": 96}, (4, 6)),
        ((2, 4), {"height": 96, "width": 64}, (6, 4)),
    ],
)
@pytest.mark.parametrize("name", ["latents", "video"])
def test_size_that_is_left_out_keeps_the_aspect(name, source, size, expected, tiny_upscale_pipeline):
    height, width = source
    low = {"latents": torch.zeros(1, 8, 1, height, width), "video": torch.zeros(1, 3, 16 * height, 16 * width)}
    size = {"height": None, "width": None} | size
    output = upscale(tiny_upscale_pipeline, num_inference_steps=1, **{name: low[name]}, **size)
    assert output.frames.shape[3:] == expected


LATENTS, AUDIO_LATENTS = make_low()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"latents": LATENTS[0]}, r"`latents` has shape .* \(any, 8, any, any, any\)"),
        ({"latents": LATENTS[:, :, :0]}, "`latents` .* no size 0"),
        ({"latents": LATENTS * torch.nan}, "`latents` holds NaN"),
        ({"audio_latents": AUDIO_LATENTS[:, :8]}, "`audio_latents` has length 8, .* last 9 to 12"),
        ({"audio_latents": torch.zeros(1, 13, 8)}, "`audio_latents` has length 13, .* last 9 to 12"),
        ({"audio_latents": torch.zeros(2, 9, 8)}, "`audio_latents` has 2 items"),
        ({"audio_latents": torch.zeros(1, 9, 7)}, r"`audio_latents` has shape .* \(any, any, 8\)"),
        ({"latents": torch.zeros(1, 8, 17, 2, 2), "height": 8192, "width": 8192}, "tokens, but at most 1048576"),
        ({"latents": LATENTS.to(torch.complex64)}, "`latents`=.*floating"),
        ({"width": 32}, "`height`=64 and `width`=32 must not be less than"),
        ({"video": torch.rand(5, 3, 96, 64)}, "`height`=64 and `width`=96 must not be less than"),
        ({"noise_level": 1000}, "`noise_level`"),
        ({"noise_level": 0.5}, "`noise_level`"),
        ({"num_leading_frames": -1}, "`num_leading_frames`"),
        ({"audio_noise_scale": 1.5}, "`audio_noise_scale`"),
        ({"leading_guidance_scale": float("nan")}, "`leading_guidance_scale`"),
        ({"prompt": ["a b", "c"], "latents": LATENTS.expand(3, -1, -1, -1, -1)}, "2 items for 3 videos"),
        ({"prompt": ["a b", "c", "d"], "latents": LATENTS.expand(2, -1, -1, -1, -1)}, "3 items for 2 videos"),
        ({"latents": None}, "Exactly one of .*`latents`"),
        ({"latents": LATENTS, "video": torch.rand(5, 3, 32, 64)}, "Exactly one of .*`video`"),
        ({"audio": (np.zeros(999, np.float32), 44100), "audio_latents": AUDIO_LATENTS}, "At most one of .*`audio`"),
        ({"image_latents": torch.zeros(1, 8, 1, 2, 4)}, r"`image_latents` has shape .* \(any, 8, 1, 4, 6\)"),
        ({"video": torch.rand(4, 3, 32, 64)}, "`video` has shape"),
        ({"video": torch.rand(5, 3, 40, 64)}, "`video` has shape"),
        ({"video": [torch.rand(n, 3, 32, 64) for n in (1, 5)]}, "all videos of one shape"),
    ],
)
def test_bad_input_raises(arguments, message, tiny_upscale_pipeline):
    with pytest.raises(ValueError, match=message):
        upscale(tiny_upscale_pipeline, **arguments)


def test_video_of_another_rate_raises(tiny_upscale_pipeline, tmp_path):
    export_to_mp4(torch.rand(5, 3, 32, 64), tmp_path / "fast.mp4", fps=30)
    with pytest.raises(ValueError, match="`video` has 30 frames a second"):
        upscale(tiny_upscale_pipeline, video=tmp_path / "fast.mp4")


def test_without_audio_no_audio_vae_is_needed(tiny_upscale_pipeline):
    pipe = MagiHumanLatentUpscalePipeline(**{**tiny_upscale_pipeline.components, "audio_vae": None})
    output = upscale(pipe, latents=LATENTS, output_type="np")
    assert output.audio is None and output.frames.shape == (1, 9, 64, 96, 3)


def test_base_transformer_is_refused(tiny_pipeline, tiny_pipeline_dir):
    message = "`transformer` has `coordinate_style`='v2'"
    with pytest.raises(ValueError, match=message):
        MagiHumanLatentUpscalePipeline(**tiny_pipeline.components)
    with pytest.raises(ValueError, match=message):
        MagiHumanLatentUpscalePipeline.from_pretrained(tiny_pipeline_dir)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"prompt": "a"}, "prompt"),
        ({"prompt": "a b", "max_sequence_length": 1}, "prompt"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 1, 16)}, "prompt"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 2, 16), "prompt_embeds_mask": torch.tensor([[0, 1]])},
            "prompt",
        ),
        ({"negative_prompt": "", "guidance_scale": 2.0}, "negative_prompt"),
        ({"negative_prompt": ""}, None),  # is not used
        ({"prompt": ["a", "a b"]}, None),
    ],
)
def test_single_token_is_refused_before_a_model_runs(arguments, name, tiny_upscale_pipeline, monkeypatch):
    if name is None:
        upscale(tiny_upscale_pipeline, num_inference_steps=1, **arguments)
        return
    monkeypatch.setattr(tiny_upscale_pipeline.text_encoder, "forward", None)
    with pytest.raises(ValueError, match=f"`{name}` has a single token"):
        upscale(tiny_upscale_pipeline, **arguments)
