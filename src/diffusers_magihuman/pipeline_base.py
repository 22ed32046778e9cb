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
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput, logging
from diffusers.video_processor import VideoProcessor
from torch.nn.utils.rnn import pad_sequence

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .conversion import guess_variant
from .loading import load_original_components
from .lora import MagiHumanLoraLoaderMixin
from .media import AudioInput, crop_to_aspect, load_audio, read_audio, resample_audio


logger = logging.get_logger(__name__)

Audio = torch.Tensor | np.ndarray
Frames = torch.Tensor | np.ndarray | list[list[PIL.Image.Image]] | list[Iterator[np.ndarray]]
Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[Any, int, torch.Tensor, dict], dict | None] | PipelineCallback | MultiPipelineCallbacks
Text = tuple[torch.Tensor, torch.Tensor | None]  # embeddings and the mask of tokens that are real

FRAME_RATE = 25  # frames, and audio latents, a second
MAX_SEQUENCE_LENGTH = 640
AUDIO_WINDOW_LENGTH = 29 * FRAME_RATE  # latents
OUTPUT_TYPES = ("latent", "pt", "np", "pil", "stream")

# Kind and limits of the arguments that are numbers.
NUMBERS: dict[str, tuple[type, float, float]] = {
    **dict.fromkeys(("height", "width", "num_frames"), (Integral, 1, sys.maxsize)),
    **dict.fromkeys(("num_inference_steps", "num_videos_per_prompt"), (Integral, 1, sys.maxsize)),
    **dict.fromkeys(("guidance_scale", "audio_guidance_scale"), (Real, -sys.maxsize, sys.maxsize)),
    **dict.fromkeys(("low_noise_guidance_scale", "leading_guidance_scale"), (Real, -sys.maxsize, sys.maxsize)),
    "num_leading_frames": (Integral, 0, sys.maxsize),
    "noise_level": (Integral, 0, 999),
    "audio_noise_scale": (Real, 0, 1),
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
    """
    Videos at 25 frames a second, and their audio.

    Args:
        frames (`torch.Tensor`, `np.ndarray` or `list`): `(batch_size, num_frames, height, width, 3)` for `"np"`,
            `(batch_size, num_frames, 3, height, width)` for `"pt"`, both in [0, 1]; lists of images for `"pil"`;
            iterators that decode the frames of `"np"` as they are consumed for `"stream"`; latents
            `(batch_size, channels, latent_frames, latent_height, latent_width)` for `"latent"`.
        audio (`torch.Tensor` or `np.ndarray`, *optional*): `(batch_size, 2, num_samples)` in about [-1, 1] at the
            pipeline's `audio_sampling_rate`; latents `(batch_size, audio_length, channels)` for `"latent"`; `None` if
            a video without audio was upscaled.
    """

    frames: Frames
    audio: Audio | None


# Checks, which raise a `ValueError` that names the argument, its value and what is allowed


def check_numbers(**numbers: Any) -> None:
    """Numbers, which booleans are not, must be of the kind and within the limits of `NUMBERS`, and so finite."""
    for name, value in numbers.items():
        kind, low, high = NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            kind_name = "an integer" if kind is Integral else "a number"
            raise ValueError(f"`{name}`={value!r} must be {kind_name} in {low} to {high}.")


def check_tensor(name: str, tensor: torch.Tensor, shape: Sequence[int | None]) -> None:
    """A tensor must be finite and of the shape, in which `None` allows any size but 0."""
    pairs = [*zip(tensor.shape, shape, strict=False)]
    if tensor.ndim != len(shape) or any(size < 1 or allowed not in (None, size) for size, allowed in pairs):
        sizes = ", ".join("any" if allowed is None else str(allowed) for allowed in shape)
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but must have shape ({sizes}), no size 0.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"`{name}` holds NaN or infinite values; all of them must be finite.")


def check_forms(is_needed: bool, **forms: Any) -> None:
    """One thing may be given in one form only, and must be if it is needed."""
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1 or (is_needed and not given):
        raise ValueError(f"{'Exactly' if is_needed else 'At most'} one of {[*forms]} may be given, but {given} are.")


def check_lengths(num_prompts: int, batch_size: int, generator: Generators, **items: Any) -> None:
    """A list of generators must have one for each video, other items one for all, for each prompt or each video."""
    generators = generator if isinstance(generator, list) else [generator] * batch_size
    if len(generators) != batch_size or not all(isinstance(each, torch.Generator | None) for each in generators):
        raise ValueError(f"`generator`={generator!r} must be one, or a list of {batch_size}, one for each video.")
    for name, values in items.items():
        if values is not None and len(values) not in (1, num_prompts, batch_size):
            allowed = f"1, one for each prompt ({num_prompts}) or one for each video ({batch_size})"
            raise ValueError(f"`{name}` has {len(values)} items, but must have {allowed}.")


def check_prompts(text_channels: int, prompts: dict[str, Any]) -> int:
    """The arguments about prompts, by name, must give each in one form, of the right shape; returns their number."""
    prompt, embeds = prompts["prompt"], prompts["prompt_embeds"]
    check_forms(True, prompt=prompt, prompt_embeds=embeds)
    texts = prompt if isinstance(prompt, list) else [prompt]
    if prompt is not None and not (texts and all(isinstance(text, str) and text.strip() for text in texts)):
        raise ValueError(f"`prompt`={prompt!r} must be a non-empty string or a list of them.")
    num_prompts = len(texts if embeds is None else embeds)

    negative_prompt = prompts["negative_prompt"]
    check_forms(False, negative_prompt=negative_prompt, negative_prompt_embeds=prompts["negative_prompt_embeds"])
    texts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * num_prompts
    are_texts = negative_prompt is None or all(isinstance(text, str) for text in texts)
    if len(texts) != num_prompts or not are_texts:
        raise ValueError(f"`negative_prompt`={negative_prompt!r} must be a string or a list of {num_prompts} strings.")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds, mask = prompts[name], prompts[f"{name}_mask"]
        if embeds is not None:
            check_tensor(name, embeds, (num_prompts, None, text_channels))
        if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
            raise ValueError(f"`{name}_mask` has shape {tuple(mask.shape)}, but must have the first two of `{name}`.")
    return num_prompts


# Text, images and audio to latents


def encode_texts(
    pipe: Any, texts: list[str], max_sequence_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes each text alone, rounded to float16: float32 `(num_texts, length, channels)`, and the mask."""
    embeds = []
    for text in texts:
        input_ids = pipe.tokenizer(text, return_tensors="pt").input_ids.to(device)
        if input_ids.shape[1] > max_sequence_length:
            cut = pipe.tokenizer.decode(input_ids[0, max_sequence_length:])
            logger.warning(
                f"The prompt has {input_ids.shape[1]} tokens; those beyond `max_sequence_length`="
                f"{max_sequence_length} are cut off: {cut!r}"
            )
        if input_ids.shape[1] == 0:
            if pipe.tokenizer.bos_token_id is None:
                raise ValueError(f"The tokenizer finds no token in the prompt {text!r}; at least one is needed.")
            # What the tokenizer of the published models makes of an empty text.
            input_ids = torch.tensor([[pipe.tokenizer.bos_token_id]], device=device)
        hidden_states = pipe.text_encoder(input_ids=input_ids).last_hidden_state[0, :max_sequence_length]
        embeds.append(hidden_states.half().float())
    lengths = torch.tensor([len(states) for states in embeds], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    return pad_sequence(embeds, batch_first=True), mask


def trim_embeds(embeds: torch.Tensor, mask: torch.Tensor) -> Text:
    """Moves padding to the end and cuts it at the longest text; no mask is left where no text is shorter."""
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    embeds, mask = embeds.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1)
    return embeds, None if mask.all() else mask


def repeat(items: torch.Tensor | list, batch_size: int) -> torch.Tensor | list:
    """Repeats each item, so that there is one for each video."""
    times = batch_size // len(items)
    if isinstance(items, torch.Tensor):
        return items.repeat_interleave(times, dim=0)
    return [item for item in items for _ in range(times)]


def repeat_embeds(
    embeds: torch.Tensor, mask: torch.Tensor | None, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask
    return repeat(embeds.to(device), batch_size), repeat(mask.to(device, torch.bool), batch_size)


def latent_statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse standard deviation of the channels, `(1, channels, 1, 1, 1)`."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    return mean, 1.0 / torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)


def encode_video(pipe: Any, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    Encodes videos `(batch_size, 3, 4 * k + 1, height, width)` in [-1, 1] to the mode of their latents: float32
    `(batch_size, channels, k + 1, latent_height, latent_width)`, normalised.
    """
    latents = pipe.vae.encode(pixels.to(device, pipe.vae.dtype)).latent_dist.mode().float()
    mean, inverse_std = latent_statistics(pipe.vae, device)
    return (latents - mean) * inverse_std


def encode_image(
    pipe: Any, images: list[PIL.Image.Image], height: int, width: int, device: torch.device
) -> torch.Tensor:
    """Encodes images, cropped at the centre to the aspect of a video and resized, as videos of one frame."""
    images = [crop_to_aspect(image, height, width) for image in images]
    pixels = torch.cat([pipe.video_processor.preprocess(image, height, width) for image in images])
    return encode_video(pipe, pixels[:, :, None], device)


def load_audios(audio: AudioInput | list[AudioInput], *sampling_rates: int) -> list[list[torch.Tensor]]:
    """Reads audio, one or several, each file once: for each sampling rate a list of float32 `(2, num_samples)`."""
    items = audio if isinstance(audio, list) else [audio]
    if not items or any(isinstance(item, Audio) for item in items):
        raise ValueError("`audio` must be a path, a tuple (waveform, sampling_rate) or a list of these, not empty.")
    items = [read_audio(item) if isinstance(item, str | os.PathLike) else item for item in items]
    return [[load_audio(item, rate) for item in items] for rate in sampling_rates]


def fit_audio(audio: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Cuts audio `(channels, length)`, or pads it with silence, to `(channels, num_samples)`."""
    return F.pad(audio[:, :num_samples], (0, max(num_samples - audio.shape[1], 0)))


def count_audio_latents(num_samples: int, hop_length: int) -> int:
    """An unfinished last latent counts only in audio of several windows, as in the original."""
    is_short = num_samples <= AUDIO_WINDOW_LENGTH * hop_length
    return num_samples // hop_length if is_short else math.ceil(num_samples / hop_length)


def encode_audio(
    pipe: Any,
    audio: torch.Tensor | list[torch.Tensor],
    generator: Generators,
    device: torch.device,
    num_frames: int | None = None,
) -> torch.Tensor:
    """
    Encodes audio `(2, num_samples)` of `audio_vae.hop_length` samples a latent, or a list of it, in windows of 29
    seconds: float32 `(num_items, num_frames, channels)`, 25 a second. Samples from the autoencoder as the original
    does, by one generator or one for each item; with `num_frames` each is cut to it first, or padded with silence.
    """
    vae, hop_length = pipe.audio_vae, pipe.audio_vae.hop_length

    def encode_item(item: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        def encode(window: torch.Tensor) -> torch.Tensor:
            posterior = vae.encode(window.to(device, vae.dtype)).latent_dist
            return posterior.sample(generator).transpose(1, 2).float()

        if num_frames not in (None, count_audio_latents(item.shape[1], hop_length)):
            item = fit_audio(item, num_frames * hop_length)
        return encode_in_windows(item[None], encode, AUDIO_WINDOW_LENGTH * hop_length, hop_length)

    items = audio if isinstance(audio, list) else [audio]
    generators = generator if isinstance(generator, list) else [generator] * len(items)
    return torch.cat([encode_item(*pair) for pair in zip(items, generators, strict=True)])


def encode_in_windows(
    audio: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor], window_length: int, hop_length: int
) -> torch.Tensor:
    """
    Encodes audio `(batch_size, channels, num_samples)` of any length in windows that overlap by half, cross-faded
    linearly. Returns what `encode` does, `(batch_size, length, latent_channels)`; of several windows
    `ceil(num_samples / hop_length)` latents.
    """
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


# Latents to latents with less noise, to frames and to audio


def predict_velocity(
    pipe: Any,
    latents: torch.Tensor,
    audio_latents: torch.Tensor,
    branches: dict[str, Text],
    guidance_scale: float | torch.Tensor,
    **context: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Predicts the velocity of video and audio; the branches, `"cond"` and with guidance `"uncond"`, run one after the
    other, each unpadded. `context` goes to the caches of the transformer.
    """
    velocities = []
    for name, (embeds, mask) in branches.items():
        text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        with pipe.transformer.cache_context(name, **context):
            velocity = pipe.transformer(
                latents, audio_latents, **text, attention_kwargs=pipe.attention_kwargs, return_dict=False
            )
        velocities.append(velocity)
    if len(velocities) == 1:
        return velocities[0]
    scales = (guidance_scale, pipe.audio_guidance_scale)
    return tuple(uncond + scale * (cond - uncond) for cond, uncond, scale in zip(*velocities, scales, strict=True))


def keep_first_frame(latents: torch.Tensor, image_latents: torch.Tensor | None) -> torch.Tensor:
    return latents if image_latents is None else torch.cat([image_latents, latents[:, :, 1:]], dim=2)


def decode_windows(pipe: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decodes normalised latents to float32 windows `(batch_size, 3, num_frames, height, width)` in [-1, 1]."""
    mean, inverse_std = latent_statistics(pipe.vae, latents.device)
    latents = (latents / inverse_std + mean).to(pipe.vae.dtype)
    is_turbo = isinstance(pipe.vae, AutoencoderKLMagiHumanTurbo)
    for window in pipe.vae.decode_windows(latents) if is_turbo else [pipe.vae.decode(latents).sample]:
        yield window.float()


def decode_latents(pipe: Any, latents: torch.Tensor, output_type: str) -> Frames:
    """Decodes normalised latents to frames, see [`MagiHumanPipelineOutput`]."""
    if output_type == "stream":
        return [pipe.stream_frames(sample) for sample in latents.split(1)]

    def decode_sample(sample: torch.Tensor) -> torch.Tensor | np.ndarray | list[PIL.Image.Image]:
        # Each window leaves the device as soon as it is done, unless tensors are wanted.
        process = pipe.video_processor.postprocess_video
        windows = [process(window, output_type)[0] for window in decode_windows(pipe, sample)]
        if output_type == "pil":
            return [frame for window in windows for frame in window]
        return torch.cat(windows) if output_type == "pt" else np.concatenate(windows)

    videos = [decode_sample(sample) for sample in latents.split(1)]
    return videos if output_type == "pil" else torch.stack(videos) if output_type == "pt" else np.stack(videos)


def decode_audio(pipe: Any, audio_latents: torch.Tensor, output_type: str) -> Audio:
    """Decodes latents to audio at the sampling rate in the autoencoder's config, see [`MagiHumanPipelineOutput`]."""
    vae = pipe.audio_vae
    audio = vae.decode(audio_latents.transpose(1, 2).to(vae.dtype)).sample.float()
    # It runs on audio of 25 latents a second (51200 Hz), and is declared at the rate of the output.
    audio = resample_audio(audio, audio.shape[-1] * vae.config.sampling_rate // (vae.hop_length * FRAME_RATE))
    return audio if output_type == "pt" else audio.cpu().numpy()


class MagiHumanPipeline(DiffusionPipeline, MagiHumanLoraLoaderMixin):
    """
    Base of the pipelines, with the one loop. Any component may be `None` in calls that do not need it, for example
    `text_encoder` when embeddings are given or the autoencoders with `output_type="latent"`.

    Args:
        tokenizer (`GemmaTokenizer`): Tokenizer of the text encoder.
        text_encoder (`T5GemmaEncoderModel`): The encoder of T5Gemma 9B.
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
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            audio_vae=audio_vae,
        )
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
        for name, value in kwargs.items():
            if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str):
                is_ours = value[0].split(".")[0] in ("diffusers_magihuman", "diffusers_modules")
                if is_ours and hasattr(diffusers, value[1]):
                    kwargs[name] = ("diffusers", value[1])
        super().register_to_config(**kwargs)

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "MagiHumanPipeline":
        """
        Makes a pipeline that shares the components of another one.

        Args:
            pipeline (`DiffusionPipeline`): The other pipeline.
            dtype (`torch.dtype`, *optional*): Casts all components, those of the other pipeline with them. By default
                every one stays as it is, unlike in Diffusers: some are float32 on purpose and others are large.
            kwargs: Components and settings that differ, such as `transformer` and `is_distilled`.
        """
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
        """
        Puts the pipeline together from the original's repositories, or local copies, as they are published.

        Args:
            path_or_repo (`str`): Directory, file or repository of the transformer in any published layout.
            variant (`str`, *optional*): One of `original_variants`, guessed from the path when it names just one.
            dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all but the float32 parts.
            kwargs: `subfolder`, `text_encoder`, `audio_vae`, `video_vae`, `turbo_vae` and arguments of the downloads,
                see [`~checkpoints.load_original_components`].

        Raises:
            `ValueError`: The variant is not one of this pipeline, cannot be guessed, or tensors do not fit.
            `OSError`: A repository is missing, or gated: it is named with the page where access is granted.
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

    def check_inputs(
        self,
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        max_sequence_length: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        encodes: Sequence[str],
        decodes: Sequence[str],
        **prompts: Any,
    ) -> int:
        """
        Checks what both pipelines take, the arguments about prompts in `prompts`; returns the number of prompts.
        `encodes` and `decodes` name the autoencoders that the call needs, the latter unless it returns latents.
        """
        check_numbers(height=height, width=width)
        check_numbers(num_inference_steps=num_inference_steps, max_sequence_length=max_sequence_length)
        multiple = self.vae_scale_factor_spatial * self.transformer.config.patch_size[1]
        for name, size in (("height", height), ("width", width)):
            if size % multiple:
                raise ValueError(f"`{name}`={size} must be a multiple of {multiple}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type`={output_type!r} must be one of {OUTPUT_TYPES}.")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                allowed = self._callback_tensor_inputs
                raise ValueError(f"`callback_on_step_end_tensor_inputs` has {name!r}, which is not in {allowed}.")
        num_prompts = check_prompts(self.transformer.config.text_in_channels, prompts)

        lacks_negative = self.do_classifier_free_guidance and prompts["negative_prompt_embeds"] is None
        texts = ("tokenizer", "text_encoder") if prompts["prompt"] is not None or lacks_negative else ()
        needed = (*texts, *encodes, *(() if output_type == "latent" else decodes))
        missing = sorted({name for name in needed if getattr(self, name) is None})
        if missing:
            raise ValueError(
                f"This call needs {missing}, which the pipeline was loaded without. Without them it takes embeddings"
                " (and with guidance negative ones) and latents, and `output_type='latent'`."
            )
        is_turbo = isinstance(self.vae, AutoencoderKLMagiHumanTurbo)
        if "vae" in encodes and is_turbo and self.vae.encoder is None:
            raise ValueError("`image` and `video` need a `vae` that encodes, but this one was loaded without encoder.")
        if output_type == "stream" and not is_turbo:
            vae = type(self.vae).__name__
            raise ValueError(f"`output_type`='stream' needs an AutoencoderKLMagiHumanTurbo as `vae`, not {vae}.")
        return num_prompts

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        r"""
        Encodes prompts, each alone as the original does, rounded to float16.

        Args:
            prompt, negative_prompt (`str` or `list[str]`, *optional*): What to show, and to steer away from;
                by default faults of the picture, of the audio and of the delivery.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether negative embeddings are wanted.
            num_videos_per_prompt (`int`, defaults to 1): How often each embedding is repeated.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(num_prompts, length, channels)`,
                *optional*): In place of the prompts.
            prompt_embeds_mask, negative_prompt_embeds_mask (`torch.Tensor` of shape `(num_prompts, length)`,
                *optional*): True for real tokens; all are real if left out.
            max_sequence_length (`int`, defaults to 640): Embeddings of further tokens are cut off, with a warning.
            device (`torch.device`, *optional*): Where to encode.

        Returns:
            `tuple`: Float32 embeddings `(num_prompts * num_videos_per_prompt, length, channels)` and their mask, then
            both for the negative prompts, `None` without guidance.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            texts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, prompt_embeds_mask = encode_texts(self, texts, max_sequence_length, device)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            texts = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
            texts = [texts] * len(prompt_embeds) if isinstance(texts, str) else texts
            negative_prompt_embeds, negative_prompt_embeds_mask = encode_texts(
                self, texts, max_sequence_length, device
            )
        batch_size = len(prompt_embeds) * num_videos_per_prompt
        prompt_embeds, prompt_embeds_mask = repeat_embeds(prompt_embeds, prompt_embeds_mask, batch_size, device)
        if do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_embeds_mask = repeat_embeds(
                negative_prompt_embeds, negative_prompt_embeds_mask, batch_size, device
            )
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

    encode_image, encode_video, encode_audio = encode_image, encode_video, encode_audio
    decode_latents, decode_windows, decode_audio = decode_latents, decode_windows, decode_audio

    @torch.no_grad()
    def stream_frames(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """
        Decodes normalised latents `(1, channels, latent_frames, latent_height, latent_width)` while they are consumed,
        with one window in memory at a time, to frames `(height, width, 3)` in [0, 1].
        """
        for window in self.decode_windows(latents):
            yield from self.video_processor.postprocess_video(window, output_type="np")[0]
        self.maybe_free_model_hooks()

    def pass_audio_through(self, audio: list[torch.Tensor], num_frames: int, output_type: str) -> Audio:
        """Audio at `audio_sampling_rate` itself, of the length that decoding `num_frames` latents would give it."""
        num_samples = num_frames * self.audio_hop_length * self.audio_sampling_rate // self.audio_vae_sampling_rate
        passed = torch.stack([fit_audio(item, num_samples) for item in audio])
        return passed if output_type == "pt" else passed.numpy()

    def denoise(
        self,
        latents: torch.Tensor,
        audio_latents: torch.Tensor,
        text: tuple[torch.Tensor | None, ...],
        num_inference_steps: int,
        guidance_at: Callable[[torch.Tensor], float | torch.Tensor],
        generator: Generators,
        image_latents: torch.Tensor | None = None,
        moves_audio: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Denoises video and audio together, with the `text` that [`~MagiHumanPipeline.encode_prompt`] returns.

        `guidance_at` gives the guidance of the video at a timestep; `image_latents`, the first frame, stay as is,
        so does the audio unless it moves, and the scheduler of the pipeline, which is copied.
        """
        # Both solvers keep a state of their own.
        scheduler, audio_scheduler = copy.deepcopy(self.scheduler), copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        audio_scheduler.set_timesteps(num_inference_steps, device=latents.device)
        self._num_timesteps = len(scheduler.timesteps)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"return_dict": False} | ({"generator": generator} if takes_generator else {})

        prompt_embeds, mask, negative_prompt_embeds, negative_mask = text
        prompt_embeds, mask = trim_embeds(prompt_embeds, mask)
        if self.do_classifier_free_guidance:
            negative_prompt_embeds, negative_mask = trim_embeds(negative_prompt_embeds, negative_mask)
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                latents = keep_first_frame(latents, image_latents)
                branches = {"cond": (prompt_embeds, mask)}
                if self.do_classifier_free_guidance and negative_prompt_embeds is not None:
                    branches["uncond"] = (negative_prompt_embeds, negative_mask)
                context = {
                    "step_index": i,
                    "sigma": float(scheduler.sigmas[i]),
                    "num_inference_steps": self.num_timesteps,
                }
                velocity, audio_velocity = predict_velocity(
                    self, latents, audio_latents, branches, guidance_at(t), **context
                )
                latents = scheduler.step(velocity, t, latents, **step_kwargs)[0]
                if moves_audio:
                    audio_latents = audio_scheduler.step(audio_velocity, t, audio_latents, **step_kwargs)[0]
                if callback_on_step_end is not None:
                    tensors = (latents, audio_latents, prompt_embeds, negative_prompt_embeds)
                    tensors = dict(zip(self._callback_tensor_inputs, tensors, strict=True))
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, given) or {}
                    latents, audio_latents = tensors["latents"], tensors["audio_latents"]
                    prompt_embeds, negative_prompt_embeds = tensors["prompt_embeds"], tensors["negative_prompt_embeds"]
                progress_bar.update()
        self._current_timestep = None
        return keep_first_frame(latents, image_latents), audio_latents
