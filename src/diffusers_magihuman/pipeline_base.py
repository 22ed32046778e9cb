# SPDX-License-Identifier: Apache-2.0
"""What both pipelines share: checks, text, images and audio to latents, the one loop, latents to frames and audio.

What encodes and decodes are functions of a `pipe`, which may be anything that holds the components.
"""

import copy
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import attrgetter
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .conversion import guess_variant
from .loading import load_original_components
from .lora import MagiHumanLoraLoaderMixin
from .media import AudioInput, crop_to_aspect, load_audio, read_audio, resample_audio

logger = logging.get_logger(__name__)

Audio = Tensor | np.ndarray
Frames = Tensor | np.ndarray | list[list[PIL.Image.Image]] | list[Iterator[np.ndarray]]
Generators = torch.Generator | list[torch.Generator] | None
Inputs = dict[str, Any]  # arguments of a call by name
StepCallback = Callable[[Any, int, Tensor, dict], dict | None]
Text = tuple[Tensor | None, Tensor | None]  # embeddings and the mask of tokens that are real

FRAME_RATE = 25  # frames, and audio latents, a second
MAX_SEQUENCE_LENGTH = 640
AUDIO_WINDOW_LENGTH = 29 * FRAME_RATE  # latents
OUTPUT_TYPES = ("latent", "pt", "np", "pil", "stream")
COUNT, SCALE = (Integral, 1, sys.maxsize), (Real, -sys.maxsize, sys.maxsize)
# Kind and limits of the arguments that are numbers.
NUMBERS: dict[str, tuple[type, float, float]] = {
    **dict.fromkeys(("height", "width", "num_frames", "num_inference_steps", "num_videos_per_prompt"), COUNT),
    **dict.fromkeys(("guidance_scale", "audio_guidance_scale", "low_noise_guidance_scale"), SCALE),
    "leading_guidance_scale": SCALE,
    "audio_noise_scale": (Real, 0, 1),
    "noise_level": (Integral, 0, 999),
    "num_leading_frames": (Integral, 0, sys.maxsize),
    "max_sequence_length": (Integral, 1, MAX_SEQUENCE_LENGTH),
}
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


def check_numbers(inputs: Inputs) -> None:
    """Numbers, which booleans are not, must be of the kind and within the limits of `NUMBERS`, and so finite."""
    for name, (kind, low, high) in NUMBERS.items():
        value = inputs.get(name, low)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            number = "an integer" if kind is Integral else "a finite number"
            limits = "" if low < 0 else f" of {low} or more" if high == sys.maxsize else f" in {low} to {high}"
            raise ValueError(f"`{name}`={value!r} must be {number}{limits}.")


def check_tensor(inputs: Inputs, name: str, shape: Sequence[int | None]) -> None:
    """A tensor, if given, must be finite and of the shape, in which `None` allows any size but 0."""
    if (tensor := inputs[name]) is None:
        return
    pairs = zip(tensor.shape, shape, strict=False)
    if tensor.ndim != len(shape) or any(size < 1 or allowed not in (None, size) for size, allowed in pairs):
        sizes = ", ".join("any" if allowed is None else str(allowed) for allowed in shape)
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but must have shape ({sizes}), no size 0.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"`{name}` holds NaN or infinite values; all of them must be finite.")


def check_forms(inputs: Inputs, *names: str, is_needed: bool = False) -> None:
    """One thing may be given in one form only, and must be if it is needed."""
    given = [name for name in names if inputs[name] is not None]
    if len(given) > 1 or (is_needed and not given):
        raise ValueError(f"{'Exactly' if is_needed else 'At most'} one of {[*names]} may be given, but {given} are.")


def check_lengths(inputs: Inputs, *names: str, num_prompts: int, batch_size: int) -> None:
    """A list of generators must have one for each video, other items one for all, for each prompt or each video."""
    generator = inputs["generator"]
    generators = generator if isinstance(generator, list) else [generator] * batch_size
    if len(generators) != batch_size or not all(isinstance(each, torch.Generator | None) for each in generators):
        raise ValueError(f"`generator`={generator!r} must be one, or a list of {batch_size}, one for each video.")
    for name in names:
        if inputs[name] is not None and len(inputs[name]) not in (1, num_prompts, batch_size):
            allowed = f"1, one for each prompt ({num_prompts}) or one for each video ({batch_size})"
            raise ValueError(f"`{name}` has {len(inputs[name])} items, but must have {allowed}.")


def check_prompts(inputs: Inputs, text_channels: int) -> int:
    """Prompts and negative ones must each be given in one form, of the right shape; returns the number of prompts."""
    prompt, embeds = inputs["prompt"], inputs["prompt_embeds"]
    num_prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    for name, is_needed in (("prompt", True), ("negative_prompt", False)):
        check_forms(inputs, name, f"{name}_embeds", is_needed=is_needed)
        texts = inputs[name] if isinstance(inputs[name], list) else [inputs[name]] * num_prompts
        are_texts = all(isinstance(text, str) and (text.strip() or not is_needed) for text in texts)
        if inputs[name] is not None and not (are_texts and len(texts) == num_prompts > 0):
            allowed = f"a {'non-empty ' * is_needed}string, or a list of them, one for each of {num_prompts} prompts"
            raise ValueError(f"`{name}`={inputs[name]!r} must be {allowed}.")
        check_tensor(inputs, f"{name}_embeds", (num_prompts, None, text_channels))
        embeds, mask = inputs[f"{name}_embeds"], inputs[f"{name}_embeds_mask"]
        if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
            raise ValueError(f"`{name}_embeds_mask` has shape {tuple(mask.shape)}, unlike `{name}_embeds`[:2].")
    return num_prompts


def encode_texts(
    pipe: Any, texts: list[str] | None, given: Text, max_sequence_length: int, device: torch.device, num_videos: int
) -> Text:
    """Encodes each text alone, rounded to float16, unless embeddings are given; repeats them and their mask."""
    embeds, mask = given
    if embeds is None:
        states = []
        for text in texts:
            input_ids = pipe.tokenizer(text, return_tensors="pt").input_ids.to(device)
            if input_ids.shape[1] > max_sequence_length:
                cut = pipe.tokenizer.decode(input_ids[0, max_sequence_length:])
                limit = f"those beyond `max_sequence_length`={max_sequence_length} are cut off: {cut!r}"
                logger.warning(f"The prompt has {input_ids.shape[1]} tokens; {limit}")
            if input_ids.shape[1] == 0:
                if pipe.tokenizer.bos_token_id is None:
                    raise ValueError(f"The tokenizer finds no token in the prompt {text!r}; at least one is needed.")
                # What the tokenizer of the published models makes of an empty text.
                input_ids = torch.tensor([[pipe.tokenizer.bos_token_id]], device=device)
            hidden_states = pipe.text_encoder(input_ids=input_ids).last_hidden_state[0, :max_sequence_length]
            states.append(hidden_states.half().float())
        embeds = pad_sequence(states, batch_first=True)
        mask = pad_sequence([torch.ones(len(each)) for each in states], batch_first=True)
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask
    embeds, mask = embeds.to(device), mask.to(device, torch.bool)
    return embeds.repeat_interleave(num_videos, dim=0), mask.repeat_interleave(num_videos, dim=0)


def trim_embeds(embeds: Tensor, mask: Tensor) -> Text:
    """Moves padding to the end and cuts it at the longest text; no mask is left where no text is shorter."""
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    embeds, mask = embeds.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1)
    return embeds, None if mask.all() else mask


def repeat(items: Tensor | list, batch_size: int) -> Tensor | list:
    """Repeats each item, so that there is one for each video."""
    times, is_list = batch_size // len(items), isinstance(items, list)
    return [item for item in items for _ in range(times)] if is_list else items.repeat_interleave(times, dim=0)


def latent_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of the channels, `(1, channels, 1, 1, 1)`."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    return mean, 1.0 / torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)


def encode_video(pipe: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """Encodes videos `(batch_size, 3, 4 * k + 1, height, width)` in [-1, 1] to the mode of their latents: float32
    `(batch_size, channels, k + 1, latent_height, latent_width)`, normalised."""
    latents = pipe.vae.encode(pixels.to(device, pipe.vae.dtype)).latent_dist.mode().float()
    mean, inverse_std = latent_statistics(pipe.vae, device)
    return (latents - mean) * inverse_std


def encode_image(pipe: Any, images: list[PIL.Image.Image], height: int, width: int, device: torch.device) -> Tensor:
    """Encodes images, cropped at the centre to the aspect of a video and resized, as videos of one frame."""
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
    vae, hop_length = pipe.audio_vae, pipe.audio_vae.hop_length

    def encode_item(item: Tensor, generator: torch.Generator | None) -> Tensor:
        def encode(window: Tensor) -> Tensor:
            posterior = vae.encode(window.to(device, vae.dtype)).latent_dist
            return posterior.sample(generator).transpose(1, 2).float()

        if num_frames not in (None, count_audio_latents(item.shape[1], hop_length)):
            item = fit_audio(item, num_frames * hop_length)
        return encode_in_windows(item[None], encode, AUDIO_WINDOW_LENGTH * hop_length, hop_length)

    items = audio if isinstance(audio, list) else [audio]
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


def keep_first_frame(latents: Tensor, image_latents: Tensor | None) -> Tensor:
    return latents if image_latents is None else torch.cat([image_latents, latents[:, :, 1:]], dim=2)


def decode_windows(pipe: Any, latents: Tensor) -> Iterator[Tensor]:
    """Decodes normalised latents to float32 windows `(batch_size, 3, num_frames, height, width)` in [-1, 1]."""
    mean, inverse_std = latent_statistics(pipe.vae, latents.device)
    latents = (latents / inverse_std + mean).to(pipe.vae.dtype)
    is_turbo = isinstance(pipe.vae, AutoencoderKLMagiHumanTurbo)
    for window in pipe.vae.decode_windows(latents) if is_turbo else [pipe.vae.decode(latents).sample]:
        yield window.float()


def decode_frames(pipe: Any, latents: Tensor, output_type: str) -> Iterator[Any]:
    """Decodes the latents of one video; each window leaves the device once it is done, unless tensors are wanted."""
    for window in decode_windows(pipe, latents):
        yield from pipe.video_processor.postprocess_video(window, output_type)[0]


def decode_latents(pipe: Any, latents: Tensor, output_type: str) -> Frames:
    """Decodes normalised latents to frames, see [`MagiHumanPipelineOutput`]."""
    if output_type == "stream":
        return [pipe.stream_frames(sample) for sample in latents.split(1)]
    stack = {"np": np.stack, "pt": torch.stack, "pil": list}[output_type]
    return stack([stack([*decode_frames(pipe, sample, output_type)]) for sample in latents.split(1)])


def decode_audio(pipe: Any, audio_latents: Tensor, output_type: str) -> Audio:
    """Decodes latents to audio at the sampling rate in the autoencoder's config, see [`MagiHumanPipelineOutput`]."""
    vae = pipe.audio_vae
    audio = vae.decode(audio_latents.transpose(1, 2).to(vae.dtype)).sample.float()
    # It runs on audio of 25 latents a second (51200 Hz), and is declared at the rate of the output.
    audio = resample_audio(audio, audio.shape[-1] * vae.config.sampling_rate // (vae.hop_length * FRAME_RATE))
    return audio if output_type == "pt" else audio.cpu().numpy()


class MagiHumanPipeline(DiffusionPipeline, MagiHumanLoraLoaderMixin):
    """Base of the pipelines, with the one loop. Any component may be `None` in calls that do not need it, for example
    `text_encoder` when embeddings are given or the autoencoders with `output_type="latent"`.

    Args:
        tokenizer (`GemmaTokenizer`), text_encoder (`T5GemmaEncoderModel`): Those of T5Gemma 9B.
        transformer ([`MagiHumanTransformer3DModel`]): Predicts the velocity of video and audio latents together.
        scheduler ([`MagiHumanFlowScheduler`]): Noise levels and solver; any flow scheduler will do.
        vae ([`AutoencoderKLMagiHumanTurbo`] or `AutoencoderKLWan`): Autoencoder of Wan 2.2 video latents.
        audio_vae (`AutoencoderOobleck`): Autoencoder of 25 audio latents a second. The original runs it in float32.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae"
    # Sequential offloading takes away the weights that the audio autoencoder's weight norm is computed from.
    _exclude_from_cpu_offload = ["audio_vae"]
    _callback_tensor_inputs = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]
    # The variants of the original that the pipeline runs, and its settings for each.
    original_variants: dict[str, dict[str, Any]] = {}
    _audio_guidance_scale = 1.0

    def __init__(
        self, tokenizer: Any, text_encoder: Any, transformer: Any, scheduler: Any, vae: Any, audio_vae: Any
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer)
        self.register_modules(scheduler=scheduler, vae=vae, audio_vae=audio_vae)
        if text_encoder is not None:
            # Its layers are one level below; goes when Diffusers' group offloading by blocks looks there by itself.
            text_encoder._group_offload_block_modules = ["encoder"]
        self.vae_scale_factor_temporal = 4
        if vae is not None:  # whose two classes keep this ratio in different places
            self.vae_scale_factor_temporal = vae.config.get("scale_factor_temporal") or vae.temporal_compression_ratio
        self.vae_scale_factor_spatial = 16 if vae is None else vae.spatial_compression_ratio
        self.audio_sampling_rate = 44100 if audio_vae is None else audio_vae.config.sampling_rate
        self.audio_hop_length = 2048 if audio_vae is None else audio_vae.hop_length
        self.audio_vae_sampling_rate = self.audio_hop_length * FRAME_RATE
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def register_to_config(self, **kwargs: Any) -> None:
        """Registers our components as `["diffusers", ClassName]`, the only form that loads from the Hub."""
        ours = ("diffusers_magihuman.", "diffusers_modules.")
        for name, value in kwargs.items():
            if isinstance(value, tuple) and str(value[0]).startswith(ours) and hasattr(diffusers, value[1]):
                kwargs[name] = ("diffusers", value[1])
        super().register_to_config(**kwargs)

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> DiffusionPipeline:
        """Makes a pipeline that shares the components of another, but for those, and settings, in `kwargs`. A `dtype`
        casts them all, the other pipeline's with them; by default, unlike in Diffusers, every one stays as it is."""
        if dtype is not None:
            return super().from_pipe(pipeline, dtype=dtype, **kwargs)
        names = inspect.signature(cls).parameters
        return cls(**{name: part for name, part in pipeline.components.items() if name in names} | kwargs)

    @classmethod
    def from_original(
        cls,
        path_or_repo: str = "GAIR/daVinci-MagiHuman",
        variant: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **kwargs: Any,
    ) -> "MagiHumanPipeline":
        """Puts the pipeline together from the original's repositories, or local copies, as they are published.

        Args:
            path_or_repo (`str`): Directory, file or repository of the transformer in any published format.
            variant (`str`, *optional*): One of `original_variants`, guessed from the path when it names just one.
            dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all but the float32 parts.
            kwargs: See [`~checkpoints.load_original_components`]: `subfolder`, the other repositories, downloads.

        `ValueError`: the variant is not one of this pipeline, cannot be guessed, or tensors do not fit. `OSError`: a
        repository is missing, or gated: it is named with the page where access is granted.
        """
        variant = variant or guess_variant(path_or_repo, kwargs.get("subfolder"))
        if variant not in cls.original_variants:
            raise ValueError(f"`variant`={variant!r} must be {' or '.join(map(repr, cls.original_variants))}.")
        components = load_original_components(path_or_repo, variant, dtype, **kwargs)
        return cls(**components, **cls.original_variants[variant])

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

    def latent_shapes(self, batch_size: int, num_frames: int, height: int, width: int) -> tuple[tuple, tuple]:
        """Shapes of the latents of a video in pixels, and of its audio."""
        frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        size = height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial
        config = self.transformer.config
        return (batch_size, config.in_channels, frames, *size), (batch_size, num_frames, config.audio_in_channels)

    def check_inputs(self, inputs: Inputs, has_audio: bool = True) -> int:
        """Checks, before any model runs, what both pipelines take, among the arguments of the call by name, defaults
        filled in and files read; `has_audio` is whether audio comes out. Returns the number of prompts, or raises a
        `ValueError` that names the argument, its value and what is allowed."""
        scales = {"guidance_scale": self.guidance_scale, "audio_guidance_scale": self.audio_guidance_scale}
        check_numbers(inputs | scales)
        multiple = self.vae_scale_factor_spatial * self.transformer.config.patch_size[1]
        for name in ("height", "width"):
            if inputs[name] % multiple:
                raise ValueError(f"`{name}`={inputs[name]} must be a multiple of {multiple}.")
        output_type, step_inputs = inputs["output_type"], inputs["callback_on_step_end_tensor_inputs"]
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type`={output_type!r} must be one of {OUTPUT_TYPES}.")
        allowed = self._callback_tensor_inputs
        if not set(step_inputs) <= {*allowed}:
            raise ValueError(f"`callback_on_step_end_tensor_inputs`={step_inputs} must be some of {allowed}.")
        num_prompts = check_prompts(inputs, self.transformer.config.text_in_channels)
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
        is_turbo = isinstance(self.vae, AutoencoderKLMagiHumanTurbo)
        if encodes_video and is_turbo and self.vae.encoder is None:
            raise ValueError("`image` and `video` need a `vae` that encodes, but this one was loaded without encoder.")
        if output_type == "stream" and not is_turbo:
            raise ValueError("`output_type`='stream' needs an AutoencoderKLMagiHumanTurbo as `vae`.")
        return num_prompts

    def encode_prompt(
        self,
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
        for the negative prompts, `None` without guidance.
        """
        options = max_sequence_length, device or self._execution_device, num_videos_per_prompt
        texts, given = [prompt] if isinstance(prompt, str) else prompt, (prompt_embeds, prompt_embeds_mask)
        prompt_embeds, prompt_embeds_mask = encode_texts(self, texts, given, *options)
        if do_classifier_free_guidance:
            texts = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
            texts = [texts] * (len(prompt_embeds) // num_videos_per_prompt) if isinstance(texts, str) else texts
            given = negative_prompt_embeds, negative_prompt_embeds_mask
            negative_prompt_embeds, negative_prompt_embeds_mask = encode_texts(self, texts, given, *options)
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

    encode_image, encode_video, encode_audio = encode_image, encode_video, encode_audio
    decode_latents, decode_windows, decode_audio = decode_latents, decode_windows, decode_audio

    @torch.no_grad()
    def stream_frames(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Decodes normalised latents of one video, as they are consumed, to frames `(height, width, 3)` in [0, 1]."""
        yield from decode_frames(self, latents, "np")
        self.maybe_free_model_hooks()

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
        scheduler = copy.deepcopy(self.scheduler)  # that of the pipeline is not changed
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        audio_scheduler = copy.deepcopy(scheduler)  # both solvers keep a state of their own
        self._num_timesteps = len(scheduler.timesteps)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"return_dict": False} | ({"generator": generator} if takes_generator else {})

        prompt_embeds, mask, negative_prompt_embeds, negative_mask = text
        prompt_embeds, mask = trim_embeds(prompt_embeds, mask)
        if self.do_classifier_free_guidance:
            negative_prompt_embeds, negative_mask = trim_embeds(negative_prompt_embeds, negative_mask)
        options = {"attention_kwargs": self.attention_kwargs, "return_dict": False}
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
                context = {"step_index": i, "sigma": float(scheduler.sigmas[i])}
                velocities = []
                for name, embeds, embeds_mask in branches:  # one after the other, each unpadded
                    branch = {"encoder_hidden_states": embeds, "encoder_attention_mask": embeds_mask}
                    with self.transformer.cache_context(name, num_inference_steps=self.num_timesteps, **context):
                        velocities.append(self.transformer(latents, audio_latents, **branch, **options))
                if len(velocities) == 2:
                    triples = zip(*velocities, (guidance_at(t), self.audio_guidance_scale), strict=True)
                    velocities = [[uncond + scale * (cond - uncond) for cond, uncond, scale in triples]]
                ((velocity, audio_velocity),) = velocities
                latents = scheduler.step(velocity, t, latents, **step_kwargs)[0]
                if moves_audio:
                    audio_latents = audio_scheduler.step(audio_velocity, t, audio_latents, **step_kwargs)[0]
                if callback is not None:
                    tensors = latents, audio_latents, prompt_embeds, negative_prompt_embeds
                    tensors = dict(zip(names, tensors, strict=True))
                    tensors |= callback(self, i, t, {name: tensors[name] for name in step_inputs}) or {}
                    latents, audio_latents, prompt_embeds, negative_prompt_embeds = map(tensors.get, names)
                progress_bar.update()
        self._current_timestep = None
        return keep_first_frame(latents, image_latents), audio_latents
