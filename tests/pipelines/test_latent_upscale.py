import json

import diffusers
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from diffusers import DiffusionPipeline
from golden import load_golden, make_golden_transformer
from helpers import PROMPT, assert_same, make_low, seeded, upscale
from make_tiny_pipeline import make_transformer, make_turbo_vae, make_wan_vae

from diffusers_magihuman import (
    MagiHumanAudioVideoPipeline,
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    export_to_mp4,
    load_audio,
    pipeline_magihuman_latent_upscale,
)
from diffusers_magihuman.media import read_video
from diffusers_magihuman.pipeline_magihuman_latent_upscale import zero_snr_signal_scales


SIZE = {"height": 64, "width": 96}
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

    # What the transformer sees first is exact, but for a first frame that is overwritten; the sound never changes.
    first = 1 if "in.sr_latent_image" in golden else 0
    assert torch.equal(inputs[0][0][:, :, first:], golden["sr.latent_video_init"][:, :, first:])
    assert all(torch.equal(audio, golden["sr.latent_audio_init"]) for _, audio in inputs)


def test_golden_noise_levels():
    _, golden = load_golden("denoise_sr")
    assert torch.equal(zero_snr_signal_scales(), golden["ddpm_sigmas"])
    assert zero_snr_signal_scales()[220] == golden["ddpm_sigma_used"]


def test_noise_is_drawn_for_the_video_first(tiny_upscale_pipeline):
    latents, audio_latents = make_low()
    generator = seeded(7)
    noise = torch.randn(1, 8, 3, 4, 6, generator=generator), torch.randn(1, 9, 8, generator=generator)
    low = latents, audio_latents
    drawn = tiny_upscale_pipeline.prepare_latents(*low, 64, 96, 999, 1.0, seeded(7), CPU)
    for states, expected in zip(drawn, noise, strict=True):  # nothing but noise is left
        torch.testing.assert_close(states, expected, atol=1e-6, rtol=0)
    _, sound = tiny_upscale_pipeline.prepare_latents(*low, 64, 96, 0, 0.0, seeded(7), CPU)
    assert torch.equal(sound, audio_latents)


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


def test_guidance_of_leading_frames(tiny_upscale_pipeline):
    scales = []
    predict = tiny_upscale_pipeline.predict_velocity

    class Recording(MagiHumanLatentUpscalePipeline):
        def predict_velocity(self, *args):
            scales.append(args[4].flatten().tolist())
            return predict(*args)

    pipe = Recording(**tiny_upscale_pipeline.components)
    upscale(pipe, negative_prompt="bad", guidance_scale=3.5, num_leading_frames=2)
    upscale(pipe, negative_prompt="bad", guidance_scale=1.5, num_leading_frames=1)
    upscale(pipe, negative_prompt="bad", guidance_scale=3.5, leading_guidance_scale=4.0)
    assert scales == [[2.0, 2.0, 3.5]] * 2 + [[1.5, 1.5, 1.5]] * 2 + [[3.5, 3.5, 3.5]] * 2


def test_rotary_table_is_computed_once_for_each_branch(tiny_upscale_pipeline):
    calls = []
    hook = tiny_upscale_pipeline.transformer.rope.register_forward_hook(lambda *_: calls.append(1))
    upscale(tiny_upscale_pipeline, negative_prompt="bad", guidance_scale=3.5, num_inference_steps=3)
    hook.remove()
    assert len(calls) == 2


def test_sound_changes_the_video_and_passes_through(tiny_upscale_pipeline):
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
    sound = np.asarray(output.audio[0])
    assert np.array_equal(sound[:, :10000], waveform) and not sound[:, 10000:].any()

    encoded = upscale(tiny_upscale_pipeline, audio=(waveform, 44100))
    assert encoded.audio.shape == (1, 9, 8)
    longer = upscale(tiny_upscale_pipeline, audio=(np.tile(waveform, 3), 44100), output_type=output_type)
    assert np.array_equal(np.asarray(longer.audio[0]), np.tile(waveform, 3)[:, :num_samples])


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


def test_stream_needs_windows(tiny_upscale_pipeline):
    pipe = MagiHumanLatentUpscalePipeline(**{**tiny_upscale_pipeline.components, "vae": make_wan_vae()})
    assert upscale(pipe, output_type="np").frames.shape == (1, 9, 64, 96, 3)
    with pytest.raises(ValueError, match=r"`output_type`='stream' needs .* but that is AutoencoderKLWan"):
        upscale(pipe, output_type="stream")


def test_tiling_gives_the_same_frames(tiny_upscale_pipeline):
    expected = upscale(tiny_upscale_pipeline, output_type="np")
    tiny_upscale_pipeline.vae.enable_tiling(32, 32)
    tiled = upscale(tiny_upscale_pipeline, output_type="np")
    tiny_upscale_pipeline.vae.disable_tiling()
    assert np.abs(tiled.frames - expected.frames).max() < 1e-4


def test_default_size_is_saved(tiny_upscale_pipeline, tmp_path):
    tiny_upscale_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MagiHumanLatentUpscalePipeline" and index["transformer"][0] == "diffusers"
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, MagiHumanLatentUpscalePipeline)
    output = upscale(loaded, height=None, width=None)
    assert output.frames.shape[3:] == (18, 30)  # 288x480
    assert_same(output, upscale(tiny_upscale_pipeline, height=None, width=None))


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


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_flow_schedulers(scheduler, tiny_upscale_pipeline):
    pipe = MagiHumanLatentUpscalePipeline(**tiny_upscale_pipeline.components)
    arguments = {"shift": 5.0} if "Euler" in scheduler else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **arguments)
    output, expected = (upscale(p, num_inference_steps=16) for p in (pipe, tiny_upscale_pipeline))
    difference = (output.frames - expected.frames).square().mean().sqrt() / expected.frames.square().mean().sqrt()
    assert 0 < difference < 0.3


def test_callback_changes_and_interrupts(tiny_upscale_pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]
    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    output = upscale(
        tiny_upscale_pipeline, num_inference_steps=5, guidance_scale=2.0, negative_prompt="bad", **arguments
    )
    assert seen == [(0, 999, sorted(names)), (1, 952, sorted(names))]
    assert not output.frames.any() and torch.equal(output.audio, make_low()[1])


LATENTS, AUDIO_LATENTS = make_low()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"latents": LATENTS[0]},
            r"`latents` has shape \(8, 3, 2, 4\), but must have shape \(any, 8, any, any, any\)",
        ),
        ({"latents": LATENTS[:, :5]}, r"`latents` has shape \(1, 5, 3, 2, 4\), but must have shape \(any, 8,"),
        ({"latents": LATENTS[:, :, :0]}, r"`latents` has shape \(1, 8, 0, 2, 4\), but every size must be 1 or more"),
        ({"latents": LATENTS * torch.nan}, "`latents` holds NaN or infinite values"),
        (
            {"latents": LATENTS[:, :, :2], "audio_latents": AUDIO_LATENTS},
            "`audio_latents` has length 9, but 2 latent frames of video last 5 to 8",
        ),
        ({"audio_latents": AUDIO_LATENTS[:, :8]}, "`audio_latents` has length 8, .* 3 latent frames .* last 9 to 12"),
        (
            {"audio_latents": torch.zeros(1, 13, 8)},
            "`audio_latents` has length 13, .* 3 latent frames .* last 9 to 12",
        ),
        ({"audio_latents": torch.zeros(2, 9, 8)}, "`audio_latents` has 2 items, but must have 1, one for each prompt"),
        ({"audio_latents": torch.zeros(1, 9, 7)}, r"`audio_latents` has shape .* must have shape \(any, any, 8\)"),
        ({"height": 50}, "`height`=50 must be a positive multiple of 32"),
        ({"width": 1080.0}, "`width`=1080.0 must be a positive multiple of 32"),
        ({"width": 32}, "`height`=64 and `width`=32 must not be less than those .* upscaled, 32 and 64"),
        ({"video": torch.rand(5, 3, 96, 64)}, "`height`=64 and `width`=96 must not be less than .* 96 and 64"),
        ({"num_inference_steps": 0}, "`num_inference_steps`=0 must be an integer of 1 or more"),
        ({"noise_level": 1000}, "`noise_level`=1000 must be an integer in 0 to 999"),
        ({"noise_level": 0.5}, "`noise_level`=0.5 must be an integer in 0 to 999"),
        ({"num_leading_frames": -1}, "`num_leading_frames`=-1 must be an integer in 0 to"),
        ({"audio_noise_scale": 1.5}, "`audio_noise_scale`=1.5 must be in 0 to 1"),
        ({"prompt": ["a", "b"], "latents": LATENTS.expand(3, -1, -1, -1, -1)}, "There are 2 prompts for 3 videos"),
        (
            {"prompt": ["a", "b", "c"], "latents": LATENTS.expand(2, -1, -1, -1, -1)},
            "There are 3 prompts for 2 videos",
        ),
        ({"prompt": ""}, "`prompt`='' must be a non-empty string"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(0, 3, 16)},
            r"`prompt_embeds` has shape \(0, 3, 16\), but every size must be 1 or more",
        ),
        ({"latents": None}, "Exactly one of `latents` and `video` must be given"),
        ({"latents": LATENTS, "video": torch.rand(5, 3, 32, 64)}, "Exactly one of `latents` and `video`"),
        ({"audio": (np.zeros(999, np.float32), 44100), "audio_latents": AUDIO_LATENTS}, r"At most one of .*'audio'"),
        ({"audio": np.zeros(999, np.float32)}, "`audio` is a waveform without its rate"),
        ({"image_latents": torch.zeros(1, 8, 1, 2, 4)}, r"`image_latents` has shape .* \(any, 8, 1, 4, 6\)"),
        ({"image": PIL.Image.new("RGB", (8, 8)), "image_latents": LATENTS}, r"At most one of .*'image_latents'"),
        ({"image": [PIL.Image.new("RGB", (8, 8))] * 3}, "`image` has 3 items, but must have 1"),
        ({"video": torch.rand(4, 3, 32, 64)}, r"`video` has shape \[\(4, 3, 32, 64\)\] .* 4 \* k \+ 1"),
        ({"video": torch.rand(5, 3, 40, 64)}, r"`video` has shape \[\(5, 3, 40, 64\)\] .* multiples of 16"),
        ({"video": [torch.rand(n, 3, 32, 64) for n in (1, 5)]}, "all videos of one shape"),
        ({"video": torch.rand(3, 32, 64)}, r"`video` is a Tensor of shape \(3, 32, 64\), allowed are"),
        ({"video": []}, "`video` is a list, allowed are"),
        ({"video": [np.zeros((8, 8))]}, r"`video\[0\]` is a ndarray of shape \(8, 8\), allowed are"),
        ({"video": torch.full((1, 3, 32, 64), torch.nan)}, r"`video\[0\]` holds NaN"),
        ({"video": [PIL.Image.new("RGB", (n, 16)) for n in (16, 32)]}, "`video` has frames of .* the same size"),
        ({"output_type": "gif"}, "`output_type`='gif' must be one of"),
        ({"generator": [seeded(), seeded()]}, "`generator` is a list of 2, but must have 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\], allowed are \['latents'"),
    ],
)
def test_bad_input_raises_before_any_model_runs(arguments, message, tiny_upscale_pipeline):
    calls = []
    models = [tiny_upscale_pipeline.text_encoder, tiny_upscale_pipeline.transformer, tiny_upscale_pipeline.vae.encoder]
    handles = [model.register_forward_pre_hook(lambda *_: calls.append(1)) for model in models]
    with pytest.raises(ValueError, match=message):
        upscale(tiny_upscale_pipeline, **{"prompt": PROMPT, **arguments})
    for handle in handles:
        handle.remove()
    assert not calls


def test_unreadable_videos_raise(tiny_upscale_pipeline, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    export_to_mp4(torch.rand(5, 3, 32, 64), tmp_path / "fast.mp4", fps=30)
    whole = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    soundfile.write(tmp_path / "sound.wav", np.zeros(8000), 16000)
    with pytest.raises(OSError, match=r"`video` is '.*sound\.wav', which holds no readable video"):
        upscale(tiny_upscale_pipeline, video=tmp_path / "sound.wav")
    for name in ("broken", "cut"):
        with pytest.raises(OSError, match=rf"`video` is '.*{name}\.mp4', which holds no readable video"):
            upscale(tiny_upscale_pipeline, video=tmp_path / f"{name}.mp4")
    with pytest.raises(FileNotFoundError, match=r"`video` is '.*missing\.mp4', but there is no such file"):
        upscale(tiny_upscale_pipeline, video=str(tmp_path / "missing.mp4"))
    with pytest.raises(ValueError, match="`video` has 30 frames a second, it must have 25"):
        upscale(tiny_upscale_pipeline, video=tmp_path / "fast.mp4")


@pytest.mark.parametrize(
    "component, arguments, message",
    [
        ("text_encoder", {}, r"This call needs \['text_encoder'\]"),
        ("vae", {"output_type": "np"}, r"This call needs \['vae'\]"),
        ("audio_vae", {"output_type": "np"}, r"This call needs \['audio_vae'\]"),
        ("vae", {"video": torch.rand(5, 3, 32, 64)}, "`video` needs `vae`"),
        ("audio_vae", {"audio": (np.zeros(999, np.float32), 44100)}, "`audio` needs `audio_vae`"),
    ],
)
def test_missing_component_raises(component, arguments, message, tiny_upscale_pipeline):
    pipe = MagiHumanLatentUpscalePipeline(**{**tiny_upscale_pipeline.components, component: None})
    with pytest.raises(ValueError, match=message):
        upscale(pipe, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"video": torch.rand(5, 3, 32, 64)}, {"image": PIL.Image.new("RGB", (8, 8))}], ids=["video", "image"]
)
def test_decoder_alone_cannot_encode(arguments, tiny_upscale_pipeline):
    vae = make_turbo_vae(encoder_base_dim=None)
    pipe = MagiHumanLatentUpscalePipeline(**{**tiny_upscale_pipeline.components, "vae": vae})
    calls = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` needs a `vae` that encodes"):
        upscale(pipe, **arguments)
    handle.remove()
    assert not calls
    assert upscale(pipe, output_type="np").frames.shape == (1, 9, 64, 96, 3)


def test_base_transformer_is_refused(tiny_pipeline, tiny_pipeline_dir):
    message = "`transformer` has `coordinate_style`='v2', which the base and distilled models have"
    with pytest.raises(ValueError, match=message):
        MagiHumanLatentUpscalePipeline(**tiny_pipeline.components)
    with pytest.raises(ValueError, match=message):
        MagiHumanLatentUpscalePipeline.from_pretrained(tiny_pipeline_dir)


def test_load_audio_is_what_the_output_has(tiny_upscale_pipeline):
    tone = (np.sin(np.arange(8000) / 9).astype(np.float32), 22050)
    output = upscale(tiny_upscale_pipeline, audio=tone, output_type="np")
    expected = load_audio(tone, 44100).numpy()
    assert np.array_equal(output.audio[0], expected[:, : output.audio.shape[2]])
