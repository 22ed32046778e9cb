# SPDX-License-Identifier: Apache-2.0
"""What both pipelines share: checks, text, images and audio to latents, the one loop, latents to frames and audio.

What encodes and decodes are functions of a `pipe`, which may be anything that holds the components.
"""

import contextlib
import functools
import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .checks import check_choice, check_dtype, check_integer, check_mask, check_real, check_tensor, show
from .constants import FRAME_RATE, MAX_BATCH, MAX_FRAMES, MAX_SIZE, ORIGINAL
from .conversion import find_variant
from .denoising import (
    check_step_end,
    guide,
    keep_first_frame,
    predict_velocities,
    prepare_schedulers,
    take_step,
    update_tensors,
)
from .loading import load_original_components
from .lora import MagiHumanLoraLoaderMixin
from .media import AudioInput, crop_to_aspect, load_audio, read_audio, resample_audio
from .weights import check_is_saveable, guarded, portable_reference, take_new_folder

logger = logging.get_logger(__name__)

Audio = Tensor | np.ndarray
Frames = Tensor | np.ndarray | list[list[PIL.Image.Image]] | list[Iterator[np.ndarray]]
Generators = torch.Generator | list[torch.Generator] | None
Inputs = dict[str, Any]  # arguments of a call by name
StepCallback = Callable[[Any, int, Tensor, dict], dict | None]
Text = tuple[Tensor | None, Tensor | None]  # embeddings and the mask of tokens that are real

MAX_SEQUENCE_LENGTH = 640
AUDIO_WINDOW_LENGTH = 29 * FRAME_RATE  # latents
# Further bounds of a call: tokens of all videos; letters and tokens of a text before it is cut.
MAX_TOKENS, MAX_LETTERS, MAX_TEXT_LENGTH = 2**20, 2**17, 8 * MAX_SEQUENCE_LENGTH
OUTPUT_TYPES = ("latent", "pt", "np", "pil", "stream")
SIZES = ("default_height", "default_width")
# Kind and limits of the arguments that are numbers.
NUMBERS: dict[str, tuple[Callable[..., float], float, float]] = {
    "height width default_height default_width": (check_integer, 1, MAX_SIZE),
    "num_frames default_num_frames": (check_integer, 1, MAX_FRAMES),
    "num_inference_steps num_videos_per_prompt batch_size": (check_integer, 1, MAX_BATCH),
    "guidance_scale audio_guidance_scale low_noise_guidance_scale": (check_real, -1000, 1000),
    "leading_guidance_scale default_guidance_scale": (check_real, -1000, 1000),
    "audio_noise_scale": (check_real, 0, 1),
    "noise_level": (check_integer, 0, 999),
    "num_leading_frames": (check_integer, 0, MAX_FRAMES),
    "max_sequence_length": (check_integer, 1, MAX_SEQUENCE_LENGTH),
}
# The components, and what tells one of them from other objects.
COMPONENTS = {"tokenizer": "bos_token_id", "text_encoder": "config.vocab_size", "vae": "config.latents_mean"}
COMPONENTS |= {"transformer": "config.text_in_channels", "scheduler": "sigmas", "audio_vae": "hop_length"}
DEFAULT_NEGATIVE_PROMPT = (
    "Poor picture: blurred, out of focus, overexposed, washed-out or garish colours, grain, compression blocks,"
    " ghosting, flicker, frozen frame, jump cut, shaking camera, subtitles, caption, logo, watermark, painting,"
    " cartoon, plastic skin, warped face, lopsided eyes, broken teeth, extra or fused fingers, extra limbs, doubled"
    " person, crowd behind, lips that do not match the words. "
    "Poor sound: hiss, hum, crackle, clicks, clipping, distortion, muffled or tinny voice, echo, heavy reverberation,"
    " room noise, wind, dropouts, voice too quiet, sound out of step with the picture, music where none is asked for. "
    "Poor delivery: flat monotone, robotic or synthetic voice, no feeling, mumbling, slurred or swallowed words,"
    " stuttering, wrong stress, wrong accent, rushed or dragging pace, sudden change of voice, several people talking"
    " at once, a different language, words left out or repeated."
)


@dataclass
class MagiHumanPipelineOutput(BaseOutput):
    """Videos at 25 frames a second, and their audio.

    Args:
        frames (`torch.Tensor`, `np.ndarray` or `list`): For `"np"` `(batch_size, num_frames, height, width, 3)`, for
            `"pt"` `(batch_size, num_frames, 3, height, width)`, both in [0, 1]; lists of images for `"pil"`; iterators
            that decode the frames of `"np"` as they are consumed for `"stream"`; for `"latent"` latents
            `(batch_size, channels, latent_frames, latent_height, latent_width)`.
        audio (`torch.Tensor` or `np.ndarray`, *optional*): `(batch_size, 2, num_samples)` in about [-1, 1] at the
            pipeline's `audio_sampling_rate`; for `"latent"` latents `(batch_size, audio_length, channels)`; `None` if
            a video without audio was upscaled.
    """

    frames: Frames
    audio: Audio | None


def check_numbers(inputs: Inputs, *optional: str) -> None:
    """Those of `NUMBERS` must be of the kind and within the limits, optional ones if they are given."""
    for names, (check, *limits) in NUMBERS.items():
        for name in names.split():
            if name in inputs and not (name in optional and inputs[name] is None):
                check(name, inputs[name], *limits)


def check_tensors(inputs: Inputs, **shapes: Sequence[int | None]) -> None:
    """Tensors that are given must have the shapes, see [`check_tensor`]."""
    for name, shape in shapes.items():
        if inputs[name] is not None:
            check_tensor(name, inputs[name], shape)


def check_components(inputs: Inputs, *needed: str) -> None:
    """Components must be what their names say, and be there if they are needed."""
    for name, attribute in COMPONENTS.items():
        if inputs.get(name) is not None or name in needed:
            try:
                attrgetter(attribute)(inputs[name])
            except AttributeError as error:
                raise ValueError(f"`{name}`={show(inputs[name])} must be one, with a `{attribute}`.") from error


def part_of(pipe: Any, name: str) -> Any:
    """A component that is there; the error of one that is not comes from the one of its loading, if that is known."""
    if (part := getattr(pipe, name, None)) is None:
        cause = getattr(pipe, "load_errors", {}).get(name)
        raise ValueError(f"`{name}` of the pipeline is None, but is needed here.") from cause
    return part


def rates_of(vae: Any, audio_vae: Any) -> dict[str, int]:
    """Ratios and rates of the autoencoders by their names in pipelines; those of the published ones for `None`."""
    temporal = 4
    if vae is not None:  # whose two classes keep this ratio in different places
        temporal = vae.config.get("scale_factor_temporal") or vae.temporal_compression_ratio
    hop_length = 2048 if audio_vae is None else audio_vae.hop_length
    return {
        "vae_scale_factor_temporal": temporal,
        "vae_scale_factor_spatial": 16 if vae is None else vae.spatial_compression_ratio,
        "audio_sampling_rate": 44100 if audio_vae is None else audio_vae.config.sampling_rate,
        "audio_hop_length": hop_length,
        "audio_vae_sampling_rate": hop_length * FRAME_RATE,
    }


def check_forms(inputs: Inputs, *names: str, is_needed: bool = False) -> None:
    """One thing may be given in one form only, and must be if it is needed."""
    given = [name for name in names if inputs[name] is not None]
    if len(given) > 1 or (is_needed and not given):
        allowed = f"{'Exactly' if is_needed else 'At most'} one of `{'`, `'.join(names)}`"
        raise ValueError(f"{allowed} may be given, but {given} are.")


def check_generators(generator: Any, batch_size: int, device: torch.device | str) -> None:
    """One generator or none, or a list of one for each video, on the CPU or the device."""
    generators, kind = (
        generator if isinstance(generator, list) else [generator] * batch_size,
        torch.device(device).type,
    )
    fit = all(isinstance(each, torch.Generator) and each.device.type in ("cpu", kind) for each in generators)
    if generator is not None and not (fit and len(generators) == batch_size):
        allowed = f"one on the CPU or {kind!r}, or a list of {batch_size}, one for each video"
        raise ValueError(f"`generator`={show(generator)} must be {allowed}.")


def check_vae(pipe: Any, encodes: bool, output_type: str | None = None) -> None:
    """The autoencoder must have an encoder if it encodes, and be one that decodes in windows for a stream."""
    is_turbo = isinstance(pipe.vae, AutoencoderKLMagiHumanTurbo)
    if encodes and is_turbo and pipe.vae.encoder is None:
        raise ValueError("`image` and `video` need a `vae` that encodes, but this one was loaded without encoder.")
    if output_type == "stream" and not is_turbo:
        raise ValueError("`output_type`='stream' needs an AutoencoderKLMagiHumanTurbo as `vae`.")


def check_lengths(pipe: Any, inputs: Inputs, *names: str, num_prompts: int, batch_size: int) -> None:
    """Items must be one for all, one for each prompt or one for each video, see [`check_generators`] for these."""
    if inputs["generator"] is not None:  # as to find the device takes as long as all other checks
        check_generators(inputs["generator"], batch_size, pipe._execution_device)
    for name in names:
        if inputs[name] is not None and len(inputs[name]) not in (1, num_prompts, batch_size):
            allowed = f"1, one for each prompt ({num_prompts}) or one for each video ({batch_size})"
            raise ValueError(f"`{name}` has {len(inputs[name])} items, but must have {allowed}.")


def check_prompts(pipe: Any, inputs: Inputs, is_call: bool = True) -> int:
    """Prompts and negative ones must each be given in one form, of the right shape, with as many tokens as a call
    needs, and none too long; returns the number of prompts."""
    prompt, embeds = inputs["prompt"], inputs["prompt_embeds"]
    transformer = getattr(pipe, "transformer", None)  # part of a pipeline of blocks may not have it
    config = {} if transformer is None else transformer.config
    channels, needs_two = config.get("text_in_channels"), is_call and config.get("coordinate_style") == "v1"
    check_tensors(inputs, prompt_embeds=(None, None, channels))
    num_prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    for name, is_needed in (("prompt", True), ("negative_prompt", False)):
        check_forms(inputs, name, f"{name}_embeds", is_needed=is_needed)
        check_tensors(inputs, **{f"{name}_embeds": (num_prompts, None, channels)})
        embeds, mask = inputs[f"{name}_embeds"], inputs[f"{name}_embeds_mask"]
        if mask is not None:
            if embeds is None:
                raise ValueError(f"`{name}_embeds_mask` is given without `{name}_embeds`.")
            check_mask(f"{name}_embeds_mask", mask, embeds.shape[:2])
        lengths = [] if embeds is None else [embeds.shape[1]] if mask is None else mask.sum(dim=1).tolist()
        if inputs[name] is not None:
            texts = inputs[name] if isinstance(inputs[name], list) else [inputs[name]] * num_prompts
            needs_words = is_needed and is_call
            are_texts = all(isinstance(text, str) and (text.strip() or not needs_words) for text in texts)
            if not are_texts or not 0 < len(texts) == num_prompts <= MAX_BATCH:
                allowed = f"a {'non-empty ' * needs_words}string, or a list of them, one for each of {num_prompts}"
                raise ValueError(f"`{name}`={show(inputs[name])} must be {allowed} prompts, at most {MAX_BATCH}.")
            lengths = [] if pipe.tokenizer is None else [tokenize(pipe, text, name).shape[1] for text in texts]
            lengths = [min(length, inputs["max_sequence_length"]) for length in lengths]
        elif max(lengths, default=0) > MAX_TEXT_LENGTH:
            raise ValueError(f"`{name}_embeds` has length {max(lengths)}, at most {MAX_TEXT_LENGTH} is allowed.")
        if needs_two and max(lengths, default=2) < 2 and (is_needed or pipe.do_classifier_free_guidance):
            raise ValueError(f"`{name}` has a single token; for super-resolution it must have two or more.")
    return num_prompts


def tokenize(pipe: Any, text: str, name: str = "prompt") -> Tensor:
    """The tokens of a text, `(1, length)`, at least one; `ValueError` for what is too long, or no Unicode."""
    if len(text) > MAX_LETTERS:
        raise ValueError(f"`{name}`={show(text)} has {len(text)} letters, but at most {MAX_LETTERS} are allowed.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"`{name}`={show(text)} is no Unicode: it holds one half of a surrogate pair.")
    input_ids = part_of(pipe, "tokenizer")(text, return_tensors="pt").input_ids
    if input_ids.shape[1] > MAX_TEXT_LENGTH:
        raise ValueError(f"`{name}`={show(text)} has {input_ids.shape[1]} tokens, of at most {MAX_TEXT_LENGTH}.")
    if input_ids.shape[1] == 0:
        if pipe.tokenizer.bos_token_id is None:
            raise ValueError(f"The tokenizer finds no token in the prompt {show(text)}; at least one is needed.")
        # What the tokenizer of the published models makes of an empty text.
        input_ids = torch.tensor([[pipe.tokenizer.bos_token_id]])
    return input_ids


def encode_texts(
    pipe: Any, texts: list[str] | None, given: Text, max_sequence_length: int, device: torch.device, num_videos: int
) -> Text:
    """Encodes each text alone, rounded to float16, unless embeddings are given; repeats them and their mask."""
    embeds, mask = given
    if embeds is None:
        text_encoder, states = part_of(pipe, "text_encoder"), []
        for text in texts:
            input_ids = tokenize(pipe, text).to(device)
            if input_ids.shape[1] > max_sequence_length:
                cut = pipe.tokenizer.decode(input_ids[0, max_sequence_length:])
                limit = f"those beyond `max_sequence_length`={max_sequence_length} are cut off: {cut!r}"
                logger.warning(f"The prompt has {input_ids.shape[1]} tokens; {limit}")
            hidden_states = text_encoder(input_ids=input_ids).last_hidden_state[0, :max_sequence_length]
            states.append(hidden_states.half().float())
        embeds = pad_sequence(states, batch_first=True)
        mask = pad_sequence([torch.ones(len(each)) for each in states], batch_first=True)
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask
    embeds, mask = embeds.to(device, torch.float32), mask.to(device, torch.bool)
    return embeds.repeat_interleave(num_videos, dim=0), mask.repeat_interleave(num_videos, dim=0)


def encode_prompt(
    pipe: Any,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None = None,
    do_classifier_free_guidance: bool = True,
    num_videos_per_prompt: int = 1,
    prompt_embeds: Tensor | None = None,
    prompt_embeds_mask: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_prompt_embeds_mask: Tensor | None = None,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    r"""Encodes prompts, each alone as the original does, rounded to float16, on `device`. All arguments are those
    of the call, but `do_classifier_free_guidance`: whether negative embeddings are wanted.

    Returns float32 embeddings `(num_prompts * num_videos_per_prompt, length, channels)` and their mask, then both
    for the negative prompts, `None` without guidance unless embeddings are given.
    """
    inputs = dict(locals())
    check_numbers(inputs)
    check_prompts(pipe, inputs, is_call=False)
    options = max_sequence_length, device or pipe._execution_device, num_videos_per_prompt
    texts, given = [prompt] if isinstance(prompt, str) else prompt, (prompt_embeds, prompt_embeds_mask)
    prompt_embeds, prompt_embeds_mask = encode_texts(pipe, texts, given, *options)
    if do_classifier_free_guidance or negative_prompt_embeds is not None:
        texts = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
        texts = [texts] * (len(prompt_embeds) // num_videos_per_prompt) if isinstance(texts, str) else texts
        given = negative_prompt_embeds, negative_prompt_embeds_mask
        negative_prompt_embeds, negative_prompt_embeds_mask = encode_texts(pipe, texts, given, *options)
    return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask


def trim_embeds(embeds: Tensor, mask: Tensor) -> Text:
    """Moves padding to the end and cuts it at the longest text; no mask is left where no text is shorter."""
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    embeds, mask = embeds.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1)
    return embeds, None if mask.all() else mask


def repeat(items: Tensor | list, batch_size: int) -> Tensor | list:
    """Repeats each item, so that there is one for each video."""
    times, is_list = batch_size // len(items), isinstance(items, list)
    return [item for item in items for _ in range(times)] if is_list else items.repeat_interleave(times, dim=0)


def latent_shapes(pipe: Any, batch_size: int, num_frames: int, height: int, width: int) -> tuple[tuple, tuple]:
    """Shapes of the latents of a video in pixels, and of its audio; `ValueError` for more than `MAX_TOKENS`."""
    check_numbers(locals())
    multiple = pipe.vae_scale_factor_spatial * part_of(pipe, "transformer").config.patch_size[1]
    for name, size in (("height", height), ("width", width)):
        if size % multiple:
            raise ValueError(f"`{name}`={size} must be a multiple of {multiple}.")
    frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    size = height // pipe.vae_scale_factor_spatial, width // pipe.vae_scale_factor_spatial
    config = pipe.transformer.config
    tokens = frames * size[0] * size[1] // math.prod(config.patch_size) + num_frames + MAX_SEQUENCE_LENGTH
    if batch_size * tokens > MAX_TOKENS:
        sizes = f"`num_frames`={num_frames}, `height`={height}, `width`={width} for {batch_size} videos"
        raise ValueError(f"{sizes} are {batch_size * tokens} tokens, but at most {MAX_TOKENS} are allowed.")
    return (batch_size, config.in_channels, frames, *size), (batch_size, num_frames, config.audio_in_channels)


def latent_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of the channels, `(1, channels, 1, 1, 1)`."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    return mean, 1.0 / torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)


def encode_video(pipe: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """Encodes videos `(batch_size, 3, 4 * k + 1, height, width)` in [-1, 1] to the mode of their latents: float32
    `(batch_size, channels, k + 1, latent_height, latent_width)`, normalised."""
    vae, multiple = part_of(pipe, "vae"), pipe.vae_scale_factor_spatial
    check_tensor("pixels", pixels, (None, 3, None, None, None), has_data=False)
    if (pixels.shape[2] - 1) % pipe.vae_scale_factor_temporal or any(size % multiple for size in pixels.shape[3:]):
        allowed = f"{pipe.vae_scale_factor_temporal} * k + 1 frames, height and width multiples of {multiple}"
        raise ValueError(f"`pixels` has shape {tuple(pixels.shape)}, but must have {allowed}.")
    latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode().float()
    mean, inverse_std = latent_statistics(vae, device)
    return (latents - mean) * inverse_std


def encode_image(pipe: Any, images: list[PIL.Image.Image], height: int, width: int, device: torch.device) -> Tensor:
    """Encodes images, cropped at the centre to the aspect of a video and resized, as videos of one frame."""
    check_numbers(locals())
    if not isinstance(images, list) or not images or not all(isinstance(x, PIL.Image.Image) for x in images):
        raise ValueError(f"`images`={show(images)} must be a list of PIL images, not empty.")
    images = [crop_to_aspect(image, height, width) for image in images]
    pixels = torch.cat([pipe.video_processor.preprocess(image, height, width) for image in images])
    return encode_video(pipe, pixels[:, :, None], device)


def load_audios(audio: AudioInput | list[AudioInput], *sampling_rates: int) -> list[list[Tensor]]:
    """Reads audio, one or several, each file once: for each sampling rate a list of float32 `(2, num_samples)`."""
    items = audio if isinstance(audio, list) else [audio]
    if not items or any(isinstance(item, Audio) for item in items):
        raise ValueError("`audio` must be a path, a tuple (waveform, sampling_rate) or a list of these, not empty.")
    items = [read_audio(item) if isinstance(item, str | os.PathLike) else item for item in items]
    return [[load_audio(item, rate) for item in items] for rate in sampling_rates]


def fit_audio(audio: Tensor, num_samples: int) -> Tensor:
    """Cuts audio `(channels, length)`, or pads it with silence, to `(channels, num_samples)`."""
    return F.pad(audio[:, :num_samples], (0, max(num_samples - audio.shape[1], 0)))


def pass_audio(pipe: Any, audio: list[Tensor], batch_size: int, num_frames: int, output_type: str) -> Audio:
    """Given audio as it comes out: as it is, at the output's rate, but of the length that decoding would give it."""
    num_samples = num_frames * pipe.audio_sampling_rate // FRAME_RATE
    passed = torch.stack([fit_audio(item, num_samples) for item in repeat(audio, batch_size)])
    return passed.to(pipe._execution_device) if output_type == "pt" else passed.numpy()


def count_audio_latents(num_samples: int, hop_length: int) -> int:
    """An unfinished last latent counts only in audio of several windows, as in the original."""
    is_short = num_samples <= AUDIO_WINDOW_LENGTH * hop_length
    return num_samples // hop_length if is_short else math.ceil(num_samples / hop_length)


def encode_audio(
    pipe: Any, audio: Tensor | list[Tensor], generator: Generators, device: torch.device, num_frames: int | None = None
) -> Tensor:
    """Encodes audio `(2, num_samples)` of `audio_vae.hop_length` samples a latent, or a list of it, in windows of 29
    seconds: float32 `(num_items, num_frames, channels)`, 25 a second. Samples from the autoencoder as the original
    does, by one generator or one for each item; with `num_frames` each is cut to it first, or padded with silence."""
    vae, hop_length = part_of(pipe, "audio_vae"), pipe.audio_hop_length

    def encode_item(item: Tensor, generator: torch.Generator | None) -> Tensor:
        def encode(window: Tensor) -> Tensor:
            posterior = vae.encode(window.to(device, vae.dtype)).latent_dist
            return posterior.sample(generator).transpose(1, 2).float()

        if num_frames not in (None, count_audio_latents(item.shape[1], hop_length)):
            item = fit_audio(item, num_frames * hop_length)
        return encode_in_windows(item[None], encode, AUDIO_WINDOW_LENGTH * hop_length, hop_length)

    check_numbers(locals(), "num_frames")
    items = audio if isinstance(audio, list) else [audio]
    for item in items or [None]:
        check_tensor("audio", item, (2, None), has_data=False)
        if num_frames is None and item.shape[1] < hop_length:
            raise ValueError(f"`audio` has {item.shape[1]} samples, fewer than the {hop_length} of a latent.")
    check_generators(generator, len(items), device)
    generators = generator if isinstance(generator, list) else [generator] * len(items)
    return torch.cat([encode_item(*pair) for pair in zip(items, generators, strict=True)])


def encode_in_windows(
    audio: Tensor, encode: Callable[[Tensor], Tensor], window_length: int, hop_length: int
) -> Tensor:
    """Encodes audio `(batch_size, channels, num_samples)` in windows that overlap by half, cross-faded linearly: to
    what `encode` returns, `(batch_size, length, latent_channels)`, or of several `ceil(num_samples / hop_length)`
    latents."""
    num_samples = audio.shape[-1]
    if num_samples <= window_length:
        return encode(audio)

    step = window_length // 2
    num_windows = math.ceil((num_samples - window_length) / step) + 1
    audio = F.pad(audio, (0, (num_windows - 1) * step + window_length - num_samples))
    merged = encode(audio[..., :window_length])
    overlap = merged.shape[1] // 2
    position = torch.arange(overlap, device=merged.device)[:, None]
    for start in range(step, num_windows * step, step):
        window = encode(audio[..., start : start + window_length])
        faded = merged[:, -overlap:] * ((overlap - position) / overlap) + window[:, :overlap] * (position / overlap)
        merged = torch.cat([merged[:, :-overlap], faded, window[:, overlap:]], dim=1)
    return merged[:, : math.ceil(num_samples / hop_length)]


def decode_windows(pipe: Any, latents: Tensor) -> Iterator[Tensor]:
    """Decodes normalised latents to float32 windows `(batch_size, 3, num_frames, height, width)` in [-1, 1]."""
    vae = part_of(pipe, "vae")
    check_tensor("latents", latents, (None, len(vae.config.latents_mean), None, None, None), has_data=False)
    mean, inverse_std = latent_statistics(vae, latents.device)
    latents = (latents / inverse_std + mean).to(vae.dtype)
    is_turbo = isinstance(vae, AutoencoderKLMagiHumanTurbo)
    for window in vae.decode_windows(latents) if is_turbo else [vae.decode(latents).sample]:
        yield window.float()


def decode_latents(pipe: Any, latents: Tensor, output_type: str) -> Frames:
    """Decodes normalised latents to frames, see [`MagiHumanPipelineOutput`]."""
    check_choice("output_type", output_type, *OUTPUT_TYPES[1:])
    check_tensor("latents", latents, (None,) * 5, has_data=False)
    if output_type == "stream":
        return [pipe.stream_frames(sample) for sample in latents.split(1)]
    stack = {"np": np.stack, "pt": torch.stack, "pil": list}[output_type]

    def decode(sample: Tensor) -> Iterator[Any]:
        for window in decode_windows(pipe, sample):  # it leaves the device once it is done, unless tensors are wanted
            window = window if output_type == "pt" else window.detach()
            yield from pipe.video_processor.postprocess_video(window, output_type)[0]

    return stack([stack([*decode(sample)]) for sample in latents.split(1)])


def decode_audio(pipe: Any, audio_latents: Tensor, output_type: str) -> Audio:
    """Decodes latents to audio at the sampling rate in the autoencoder's config, see [`MagiHumanPipelineOutput`]."""
    vae = part_of(pipe, "audio_vae")
    check_choice("output_type", output_type, *OUTPUT_TYPES[1:])
    check_tensor("audio_latents", audio_latents, (None, None, vae.config.decoder_input_channels), has_data=False)
    audio = vae.decode(audio_latents.transpose(1, 2).to(vae.dtype)).sample.float()
    # It runs on audio of 25 latents a second (51200 Hz), and is declared at the rate of the output.
    audio = resample_audio(audio, audio.shape[-1] * vae.config.sampling_rate // (vae.hop_length * FRAME_RATE))
    return audio if output_type == "pt" else audio.cpu().numpy()


# Of each model, as pipelines share them; not on the models or pipelines, which could then not be copied.
LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextlib.contextmanager
def models_in_use(pipe: DiffusionPipeline) -> Iterator[None]:
    """Waits until no other thread uses one of the pipeline's models, and keeps them for this one."""
    with contextlib.ExitStack() as stack:
        # In one order in all threads, so that none of them waits for another that waits for it.
        for model in sorted((part for part in pipe.components.values() if isinstance(part, nn.Module)), key=id):
            stack.enter_context(LOCKS.setdefault(model, threading.RLock()))
        yield


@torch.no_grad()
def stream_frames(pipe: Any, latents: Tensor) -> Iterator[np.ndarray]:
    """Decodes normalised latents of one video, as they are consumed, to frames `(height, width, 3)` in [0, 1]."""
    windows = decode_windows(pipe, latents)
    while True:
        with models_in_use(pipe):  # for each window, so that other calls come in between
            if (window := next(windows, None)) is None:
                return pipe.maybe_free_model_hooks()
        yield from pipe.video_processor.postprocess_video(window, "np")[0]


def one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that waits for the others of pipelines with the same models, whose settings and caches are on these."""

    @functools.wraps(call)
    def call_alone(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        with models_in_use(self):
            return call(self, *args, **kwargs)

    return call_alone


class MagiHumanPipeline(DiffusionPipeline, MagiHumanLoraLoaderMixin):
    """Base of the pipelines, with the one loop. Any component may be `None` in calls that do not need it, for example
    `text_encoder` when embeddings are given or the autoencoders with `output_type="latent"`. A call from a second
    thread waits until the first ends, and so does one of another pipeline that shares a model.

    Args:
        tokenizer (`GemmaTokenizer`), text_encoder (`T5GemmaEncoderModel`): Those of T5Gemma 9B.
        transformer ([`MagiHumanTransformer3DModel`]): Predicts the velocity of video and audio latents together.
        scheduler ([`MagiHumanFlowScheduler`]): Noise levels and solver; any flow scheduler will do.
        vae ([`AutoencoderKLMagiHumanTurbo`] or `AutoencoderKLWan`): Autoencoder of Wan 2.2 video latents.
        audio_vae (`AutoencoderOobleck`): Autoencoder of 25 audio latents a second. The original runs it in float32.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae"
    _optional_components = [*COMPONENTS]
    # Sequential offloading takes away the weights that the audio autoencoder's weight norm is computed from.
    _exclude_from_cpu_offload = ["audio_vae"]
    _callback_tensor_inputs = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]
    # The variants of the original that the pipeline runs, and its settings for each.
    original_variants: dict[str, dict[str, Any]] = {}
    _audio_guidance_scale = 1.0

    def __init__(
        self, tokenizer: Any, text_encoder: Any, transformer: Any, scheduler: Any, vae: Any, audio_vae: Any
    ) -> None:
        check_components(locals())
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer)
        self.register_modules(scheduler=scheduler, vae=vae, audio_vae=audio_vae)
        if text_encoder is not None:
            # Its layers are one level below; goes when Diffusers' group offloading by blocks looks there by itself.
            text_encoder._group_offload_block_modules = ["encoder"]
        vars(self).update(rates_of(vae, audio_vae))
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**{name: portable_reference(value) for name, value in kwargs.items()})

    check_is_saveable = check_is_saveable

    # Before a file is written, or a repository made.
    save_pretrained = guarded(DiffusionPipeline.save_pretrained, check_is_saveable)
    push_to_hub = guarded(DiffusionPipeline.push_to_hub, check_is_saveable)

    @functools.wraps(DiffusionPipeline.enable_group_offload)
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        # Within `offload_to_disk_path` the components have a new folder, which goes when the last of them does.
        parts = [part for part in self.components.values() if isinstance(part, nn.Module)]
        arguments = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        take_new_folder(arguments, "offload_to_disk_path", *parts)
        super().enable_group_offload(**arguments)

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        custom_pipeline: str | None = None,
        **kwargs: Any,
    ) -> DiffusionPipeline:
        """Makes a pipeline that shares the components of another and keeps its settings, but for those in `kwargs`,
        and a default size, which between pipelines of two kinds is not the same; settings that only the other knows
        come back with it. A `dtype` (or `torch_dtype`) casts all components, the other pipeline's with them; by
        default, unlike in Diffusers, every one stays as it is, unless there is a `custom_pipeline`.
        """
        if (dtype := torch_dtype if dtype is None else dtype) is not None:
            dtype = check_dtype("dtype", dtype)
        if custom_pipeline is not None:
            return super().from_pipe(pipeline, dtype=dtype, custom_pipeline=custom_pipeline, **kwargs)
        names, config = inspect.signature(cls).parameters, dict(pipeline.config)
        if not isinstance(pipeline, cls) and not issubclass(cls, type(pipeline)):
            swapped = {name: f"_{name}" for name in SIZES} | {f"_{name}": name for name in SIZES}
            config = {swapped.get(name, name): value for name, value in config.items()}
        hidden = {name: config[f"_{name}"] for name in names if f"_{name}" in config and name not in SIZES}
        known = {name: value for name, value in (hidden | config | pipeline.components).items() if name in names}
        pipe = cls(**known | kwargs)
        others = {name.removeprefix("_"): value for name, value in config.items() if name not in names}
        pipe.register_to_config(**{f"_{name}": value for name, value in others.items() if name not in hidden})
        return pipe if dtype is None else pipe.to(dtype=dtype)

    @classmethod
    def from_original(
        cls,
        path_or_repo: str = ORIGINAL,
        variant: str | None = None,
        dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
        **kwargs: Any,
    ) -> "MagiHumanPipeline":
        """Puts the pipeline together from the original's repositories, or local copies, as they are published.

        Args:
            path_or_repo (`str`): Directory, file or repository of the transformer in any published format.
            variant (`str`, *optional*): One of `original_variants`, guessed from the path when it names just one.
            dtype (`torch.dtype`, `str` or `dict`, *optional*): Of all but the float32 parts, bfloat16 by default.
            kwargs: Settings of the pipeline, such as `default_height`; for others see
                [`~checkpoints.load_original_components`]: `torch_dtype`, `subfolder`, other repositories, downloads.

        `ValueError`: the variant is not one of this pipeline, cannot be guessed, or tensors do not fit. `OSError`: a
        repository is missing, or gated: it is named with the page where access is granted.
        """
        variant = find_variant(variant, path_or_repo, kwargs.get("subfolder"), tuple(cls.original_variants))
        names = inspect.signature(cls).parameters.keys() - COMPONENTS.keys()
        settings = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        kwargs |= {} if dtype is None else {"dtype": dtype}
        components = load_original_components(path_or_repo, variant, **kwargs)
        return cls(**components, **cls.original_variants[variant] | settings)

    # Those of the running call; callbacks set the first, and `_interrupt`.
    guidance_scale = property(attrgetter("_guidance_scale"))
    audio_guidance_scale = property(attrgetter("_audio_guidance_scale"))
    num_timesteps = property(attrgetter("_num_timesteps"))
    current_timestep = property(attrgetter("_current_timestep"))
    attention_kwargs = property(attrgetter("_attention_kwargs"))
    interrupt = property(attrgetter("_interrupt"))

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 or self._audio_guidance_scale > 1

    def check_inputs(self, inputs: Inputs, has_audio: bool = True) -> int:
        """Checks, before any model runs, what both pipelines take, among the arguments of the call by name, defaults
        filled in and files read; `has_audio` is whether audio comes out. Returns the number of prompts, or raises a
        `ValueError` that names the argument, its value and what is allowed."""
        check_components(self.components, "transformer", "scheduler")
        check_numbers(inputs, "low_noise_guidance_scale")
        check_choice("output_type", output_type := inputs["output_type"], *OUTPUT_TYPES)
        check_choice("return_dict", inputs["return_dict"], True, False)
        check_step_end(inputs, self._callback_tensor_inputs)
        num_prompts = check_prompts(self, inputs)
        check_forms(inputs, "image", "image_latents")

        decodes = output_type != "latent"
        encodes_video = any(inputs.get(name) is not None for name in ("image", "video"))
        lacks_negative = self.do_classifier_free_guidance and inputs["negative_prompt_embeds"] is None
        needed = dict.fromkeys(("tokenizer", "text_encoder"), inputs["prompt"] is not None or lacks_negative)
        needed["vae"] = decodes or encodes_video
        needed["audio_vae"] = (decodes and has_audio) or inputs["audio"] is not None
        missing = [name for name, is_needed in needed.items() if is_needed and getattr(self, name) is None]
        if missing:
            allowed = "embeddings (with guidance negative ones) and latents, and `output_type='latent'`"
            raise ValueError(f"This call needs {missing}, which the pipeline lacks; without them it takes {allowed}.")
        check_vae(self, encodes_video, output_type)
        return num_prompts

    encode_prompt, encode_image, encode_video, encode_audio = encode_prompt, encode_image, encode_video, encode_audio
    decode_latents, decode_windows, decode_audio = decode_latents, decode_windows, decode_audio
    latent_shapes, stream_frames = latent_shapes, stream_frames

    def denoise(
        self,
        latents: Tensor,
        audio_latents: Tensor,
        text: tuple[Tensor | None, ...],
        num_inference_steps: int,
        guidance_at: Callable[[Tensor], float | Tensor],
        generator: Generators,
        on_step_end: tuple[StepCallback | None, Sequence[str]] = (None, ()),
        image_latents: Tensor | None = None,
        moves_audio: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Denoises video and audio together, with the `text` that [`~MagiHumanPipeline.encode_prompt`] returns.

        `guidance_at` gives the guidance of the video at a timestep; `image_latents`, the first frame, stay as they
        are, and so does the audio unless it moves. A callback comes with the names of its tensors.
        """
        scheduler, audio_scheduler = prepare_schedulers(self.scheduler, num_inference_steps, latents.device)
        self._num_timesteps = len(scheduler.timesteps)
        prompt_embeds, mask, negative_prompt_embeds, negative_mask = text
        prompt_embeds, mask = trim_embeds(prompt_embeds, mask)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds, negative_mask = trim_embeds(negative_prompt_embeds, negative_mask)
        (callback, step_inputs), names = on_step_end, self._callback_tensor_inputs
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                latents = keep_first_frame(latents, image_latents)
                branches = [("cond", prompt_embeds, mask)]
                if self.do_classifier_free_guidance and negative_prompt_embeds is not None:
                    branches.append(("uncond", negative_prompt_embeds, negative_mask))
                inputs = scheduler, i, latents, audio_latents, self.attention_kwargs
                # One after the other, each unpadded.
                velocities = [predict_velocities(self.transformer, *branch, *inputs) for branch in branches]
                if len(velocities) == 2:
                    triples = zip(*velocities, (guidance_at(t), self.audio_guidance_scale), strict=True)
                    velocities = [[guide(*triple) for triple in triples]]
                ((velocity, audio_velocity),) = velocities
                latents = take_step(scheduler, velocity, t, latents, generator)
                if moves_audio:
                    audio_latents = take_step(audio_scheduler, audio_velocity, t, audio_latents, generator)
                if callback is not None:
                    tensors = latents, audio_latents, prompt_embeds, negative_prompt_embeds
                    tensors = dict(zip(names, tensors, strict=True))
                    returned = callback(self, i, t, {name: tensors[name] for name in step_inputs})
                    update_tensors(tensors, returned, mask is not None or negative_mask is not None)
                    latents, audio_latents, prompt_embeds, negative_prompt_embeds = map(tensors.get, names)
                progress_bar.update()
        self._current_timestep = None
        return keep_first_frame(latents, image_latents), audio_latents
