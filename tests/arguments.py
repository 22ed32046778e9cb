"""Public functions, arguments that each takes, of what kind these are, and what no argument of a kind may be."""

import functools
from fractions import Fraction

import numpy as np
import PIL.Image
import torch
from helpers import make_inputs, make_tiny_model
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline, make_turbo_vae

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanFlowScheduler,
    embedded_model,
    export_to_mp4,
    media,
    training,
)
from diffusers_magihuman.pipeline_base import load_audios
from diffusers_magihuman.tools.hub import make_model_card
from diffusers_magihuman.tools.plan import plan_call

NAN, INF = float("nan"), float("inf")
OBJECTS = (object(), [object()], b"3", 1j, {"a": 1}, torch.ones(2, 2), np.ones(3))
NUMBERS = (True, "3", NAN, INF, -INF, 1e300, 10**30, 10**5000, [1], *OBJECTS)
BAD = {
    "count": (*NUMBERS, 0, -1, 2.5, 10**12),
    "integer": (*NUMBERS, 2.5),
    "real": (*NUMBERS, Fraction(5)),
    "positive": (*NUMBERS, 0, -1.0),
    "share": (*NUMBERS, -0.1, 1.1),
    "flag": ("false", 2, None, *OBJECTS),
    "choice": ("nonsense", 3, True, ["np"], *OBJECTS),
    "layers": (3, "01", [-1], [10**6], [True], [0.5], [NAN], ["0"], [None], *OBJECTS),
    "text": ("", "  ", 3, [], [""], ["a", 3], ["a", None], "\ud800", "a" * 10**7, True, *OBJECTS),
    "path": ("", "a\0b.mp4", "x" * 300 + ".mp4", "no/such/folder/x.mp4", 3, True, [], *OBJECTS),
    "generator": (42, True, "cpu", [], [None, 3], [torch.Generator()] * 3, *OBJECTS),
    "callback": (3, "x", True, [], *OBJECTS),
    "names": ("latents", ["nonsense"], [3], 3, [["latents"]], True, *OBJECTS),
    "scale": ("x", {"scale": "x"}, {"scale": NAN}, {"scale": True}, {"nonsense": 1}, [], 3, True, *OBJECTS[:4]),
    "image": ("", "no/such.png", 3, [], [3], True, np.ones((4, 4, 3), complex), np.ones((4, 4)), *OBJECTS),
    "audio": ("", "no/such.wav", 3, [], (np.ones(9), 0), (np.ones(99), True), (np.ones(99), "3"),
              (np.ones(99),), *OBJECTS),
    "device": ("nonsense", 3.5, "cuda:99", object()),
}  # fmt: skip


def spoil_kind(tensor):
    """What is no such tensor, whatever its values."""
    kinds = [tensor.to(torch.complex64), tensor.int(), tensor.bool(), tensor.to_sparse()]
    shapes = [tensor[None], tensor[:0], tensor[..., :0], tensor[None].flatten(0, 1)[..., None]]
    return [*kinds, *shapes, tensor.numpy(), tensor.tolist(), "x", 3, True, object()]


def spoil(tensor):
    """What is no such tensor."""
    return [*spoil_kind(tensor), tensor.to("meta"), tensor * NAN, tensor + INF]


def spoil_mask(mask):
    values = [mask.float() * NAN, mask * 2, mask * 0.5, ~mask, -mask.int(), mask[:, :-1], mask[0], mask.to("meta")]
    return [*values, mask.numpy(), mask.tolist(), 3, "x", True, object()]


def bad_values(kind, good):
    """All that the argument of a kind, or a tensor or mask that is good, must not be."""
    spoilt = {"tensor": spoil, "states": spoil_kind, "mask": spoil_mask}
    return spoilt[kind](good) if kind in spoilt else BAD[kind]


def kinds(**names):
    """`kinds(count="a b")` is `{"a": "count", "b": "count"}`."""
    return {name: kind for kind, several in names.items() for name in several.split()}


@functools.cache
def pipes():
    each = make_tiny_pipeline(), make_tiny_upscale_pipeline()
    for pipe in each:
        pipe.set_progress_bar_config(disable=True)
    return each


EMBEDS = {
    "prompt_embeds": torch.ones(1, 3, 16),
    "prompt_embeds_mask": torch.ones(1, 3, dtype=torch.bool),
    "negative_prompt_embeds": torch.ones(1, 2, 16),
    "negative_prompt_embeds_mask": torch.ones(1, 2, dtype=torch.bool),
}
EMBED_KINDS = kinds(
    tensor="prompt_embeds negative_prompt_embeds", mask="prompt_embeds_mask negative_prompt_embeds_mask"
)
SHARED = {"num_inference_steps": 1, "generator": None, "output_type": "latent", "attention_kwargs": {"scale": 1.0}}
SHARED |= {"height": 64, "width": 64, "callback_on_step_end": None, "callback_on_step_end_tensor_inputs": ["latents"]}
SHARED |= {"max_sequence_length": 64, "guidance_scale": 1.0, "return_dict": True}
SHARED_KINDS = kinds(
    count="num_inference_steps height width max_sequence_length", generator="generator", choice="output_type",
    scale="attention_kwargs", callback="callback_on_step_end", names="callback_on_step_end_tensor_inputs",
    real="guidance_scale",
)  # fmt: skip
LATENTS, AUDIO_LATENTS = torch.ones(1, 8, 2, 4, 4), torch.ones(1, 5, 8)
SIZE = {"num_frames": 5, "num_videos_per_prompt": 1, "audio_guidance_scale": 1.0, "low_noise_guidance_scale": 1.0}
IMAGE, AUDIO = PIL.Image.new("RGB", (8, 8)), (np.ones(8192, np.float32), 44100)


def make_step(**arguments):
    scheduler = MagiHumanFlowScheduler(sampler=arguments.pop("sampler"))
    scheduler.set_timesteps(4)
    return scheduler.step(**{"timestep": scheduler.timesteps[0]} | arguments)


def call(pipe, **arguments):
    return pipes()[pipe](**arguments)


def encode_and_decode(x, z):
    vae = make_turbo_vae()
    return vae.encode(x), vae.decode(z)


LOSS = dict(zip(("latents", "audio_latents", "prompt_embeds"), make_inputs(), strict=True))
LOSS |= {"prompt_embeds_mask": torch.ones(1, 7, dtype=torch.bool), "noise_levels": torch.full((1,), 0.5)}
LOSS |= {"video_weight": 1.0, "audio_weight": 1.0, "image_probability": 0.5, "audio_probability": 0.5}
MATCHING = {name: torch.rand(2, 8) for name in ("generated", "real_prediction", "fake_prediction")}
MODEL_INPUTS = {"hidden_states": LOSS["latents"], "audio_hidden_states": LOSS["audio_latents"]}
MODEL_INPUTS |= {"encoder_hidden_states": LOSS["prompt_embeds"], "encoder_attention_mask": LOSS["prompt_embeds_mask"]}
DROP = {"prompt_embeds": LOSS["prompt_embeds"], "prompt_embeds_mask": LOSS["prompt_embeds_mask"], "probability": 0.5}

# Name: function, arguments that are right, kinds of those to be spoilt.
FUNCTIONS = {
    "base": (
        functools.partial(call, 0),
        {"prompt": "A", "image": IMAGE, "audio": AUDIO, **SIZE, **SHARED},
        SHARED_KINDS | kinds(text="prompt", image="image", audio="audio", count="num_frames num_videos_per_prompt",
                             real="audio_guidance_scale low_noise_guidance_scale"),
    ),
    "base, tensors": (
        functools.partial(call, 0),
        {**EMBEDS, "latents": LATENTS, "audio_latents": AUDIO_LATENTS, "image_latents": LATENTS[:, :, :1], **SIZE}
        | SHARED | {"guidance_scale": 2.0},
        EMBED_KINDS | kinds(tensor="latents audio_latents image_latents"),
    ),
    "base, given audio": (
        functools.partial(call, 0),
        {"prompt": "A", "conditioning_audio_latents": AUDIO_LATENTS, **SHARED},
        kinds(tensor="conditioning_audio_latents"),
    ),
    "upscale": (
        functools.partial(call, 1),
        {"prompt": "A b", "image": IMAGE, "audio": AUDIO, "video": np.zeros((5, 32, 32, 3), "f4"), **SHARED}
        | {"leading_guidance_scale": 1.0, "num_leading_frames": 1, "noise_level": 9, "audio_noise_scale": 0.5},
        SHARED_KINDS | kinds(text="prompt", image="image", audio="audio", real="leading_guidance_scale",
                             integer="num_leading_frames noise_level", share="audio_noise_scale"),
    ),
    "upscale, tensors": (
        functools.partial(call, 1),
        {**EMBEDS, **SHARED, "image_latents": LATENTS[:, :, :1], "guidance_scale": 2.0,
         "latents": torch.ones(1, 8, 2, 2, 2), "audio_latents": AUDIO_LATENTS},
        EMBED_KINDS | kinds(tensor="latents audio_latents image_latents"),
    ),
    "encode audio": (
        lambda **arguments: pipes()[0].encode_audio(device="cpu", **arguments),
        {"audio": torch.ones(2, 8192), "generator": None},
        kinds(states="audio", generator="generator"),
    ),
    "encode video": (
        lambda pixels: pipes()[0].encode_video(pixels, "cpu"),
        {"pixels": torch.zeros(1, 3, 5, 32, 32)},
        kinds(states="pixels"),
    ),
    "noise": (
        lambda **arguments: pipes()[0].prepare_latents(device="cpu", **arguments),
        {"batch_size": 1, "num_frames": 5, "height": 64, "width": 64, "generator": None},
        kinds(count="batch_size num_frames height width", generator="generator"),
    ),
    "decode": (
        lambda latents, output_type: pipes()[0].decode_latents(latents, output_type),
        {"latents": torch.zeros(1, 8, 2, 2, 2), "output_type": "np"},
        kinds(states="latents"),
    ),
    "transformer config": (
        make_tiny_model,
        {"in_channels": 4, "audio_in_channels": 8, "text_in_channels": 24, "num_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "attention_head_dim": 16, "feed_forward_multiple": 1, "modality_layers": (0,),
         "gelu_layers": [1], "patch_size": (1, 2, 2), "post_norm_layers": [],
         "local_attention_layers": (2,), "local_attention_frames": 3,
         "gated_attention": True, "rope_theta": 1e4, "norm_eps": 1e-6, "coordinate_style": "v2"},
        kinds(count="in_channels audio_in_channels text_in_channels num_layers num_attention_heads num_key_value_heads"
              " attention_head_dim feed_forward_multiple", integer="local_attention_frames", flag="gated_attention",
              positive="rope_theta norm_eps",
              layers="patch_size modality_layers gelu_layers post_norm_layers local_attention_layers",
              choice="coordinate_style"),
    ),
    "transformer": (
        make_tiny_model(),
        MODEL_INPUTS,
        kinds(states="hidden_states audio_hidden_states encoder_hidden_states"),
    ),
    "forward chunking": (make_tiny_model().enable_forward_chunking, {"chunk_size": 2}, kinds(count="chunk_size")),
    "vae config": (
        functools.partial(AutoencoderKLMagiHumanTurbo, encoder_dim_mult=(1, 1, 1, 1), encoder_num_res_blocks=1),
        {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "encoder_base_dim": 4, "resnet_norm_eps": 1e-6,
         "decoder_block_out_channels": (4, 4, 8, 8), "decoder_layers_per_block": [1, 1, 1, 1, 1],
         "first_chunk_size": 7, "step_size": 7, "use_unpatchify": True, "latents_mean": [0.0] * 8,
         "latents_std": [1.0] * 8},
        kinds(count="in_channels out_channels latent_channels encoder_base_dim first_chunk_size step_size",
              positive="resnet_norm_eps", flag="use_unpatchify",
              layers="decoder_block_out_channels decoder_layers_per_block latents_mean latents_std"),
    ),
    "vae": (
        encode_and_decode,
        {"x": torch.zeros(1, 3, 5, 32, 32), "z": torch.zeros(1, 8, 2, 2, 2)},
        kinds(states="x z"),
    ),
    "tiling": (
        make_turbo_vae().enable_tiling,
        {"tile_sample_min_height": 32, "tile_sample_min_width": 32},
        kinds(count="tile_sample_min_height tile_sample_min_width"),
    ),
    "scheduler config": (
        MagiHumanFlowScheduler,
        {"num_train_timesteps": 1000, "flow_shift": 5.0, "sampler": "unipc", "solver_order": 2},
        kinds(count="num_train_timesteps solver_order", positive="flow_shift", choice="sampler"),
    ),
    "timesteps": (
        MagiHumanFlowScheduler().set_timesteps, {"num_inference_steps": 4}, kinds(count="num_inference_steps")
    ),
    **{
        f"step, {sampler}": (
            make_step,
            {"sampler": sampler, "model_output": torch.ones(1, 2), "sample": torch.ones(1, 2)},
            kinds(states="model_output sample"),
        )
        for sampler in ("unipc", "renoise")
    },
    "noise levels": (
        training.sample_noise_levels,
        {"batch_size": 2, "weighting": "uniform", "shift": 1.0},
        kinds(count="batch_size", choice="weighting", positive="shift"),
    ),
    "flow matching": (
        functools.partial(training.flow_matching_loss, make_tiny_model()),
        LOSS,
        kinds(tensor="latents audio_latents prompt_embeds noise_levels", mask="prompt_embeds_mask",
              positive="", share="image_probability audio_probability", real="video_weight audio_weight"),
    ),
    "upscale loss": (
        functools.partial(training.upscale_loss, make_tiny_model()),
        {name: value for name, value in LOSS.items() if torch.is_tensor(value)}
        | {"low_latents": LOSS["latents"]},
        kinds(tensor="latents low_latents audio_latents prompt_embeds noise_levels", mask="prompt_embeds_mask"),
    ),
    "distribution matching": (training.distribution_matching_loss, MATCHING, dict.fromkeys(MATCHING, "tensor")),
    "drop text": (
        training.drop_text,
        DROP | {"negative_prompt_embeds": torch.ones(1, 2, 24)},
        kinds(tensor="prompt_embeds negative_prompt_embeds", mask="prompt_embeds_mask", share="probability"),
    ),
    "add noise": (
        training.add_noise,
        {"latents": LOSS["latents"], "noise": LOSS["latents"], "noise_levels": LOSS["noise_levels"]},
        kinds(states="latents noise", tensor="noise_levels"),
    ),
    "predict clean": (
        training.predict_clean,
        {"noisy": LOSS["latents"], "velocity": LOSS["latents"], "noise_levels": LOSS["noise_levels"]},
        kinds(states="noisy velocity", tensor="noise_levels"),
    ),
    "export": (
        export_to_mp4,
        {"frames": np.zeros((2, 16, 16, 3), "u1"), "path": "arguments.mp4", "audio": np.ones(99, "f4"), "fps": 25,
         "sampling_rate": 44100},
        kinds(path="path", positive="fps", count="sampling_rate"),
    ),
    "audio": (
        lambda audio, sampling_rate: load_audios(audio, sampling_rate),
        {"audio": AUDIO, "sampling_rate": 44100},
        kinds(audio="audio", count="sampling_rate"),
    ),
    "images": (media.load_images, {"image": IMAGE}, kinds(image="image")),
    "read video": (lambda video: media.read_video(video), {"video": None}, kinds(path="video")),
    "read audio": (lambda audio: media.read_audio(audio), {"audio": None}, kinds(path="audio")),
    "card": (make_model_card, {"variant": "base"}, kinds(choice="variant")),
    "embedded": (embedded_model, {"name": "base"}, kinds(choice="name")),
    "plan": (
        plan_call,
        {"model": embedded_model(), "height": 128, "width": 128, "num_frames": 5},
        kinds(count="height width num_frames"),
    ),
}  # fmt: skip
