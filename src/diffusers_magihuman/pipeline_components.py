# Copyright 2026 The diffusers-magihuman authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the pipelines do with their components: text, images and sound in, velocity, frames and sound out."""

import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor
from torch.nn.utils.rnn import pad_sequence

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .media import AudioInput, ImageInput, VideoInput, crop_to_aspect, resample_audio


logger = logging.get_logger(__name__)

FRAME_RATE = 25  # frames, and audio latents, a second
MAX_SEQUENCE_LENGTH = 640
AUDIO_WINDOW_SECONDS = 29
OUTPUT_TYPES = ("latent", "pt", "np", "pil", "stream")

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


def encode_in_windows(
    waveform: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor], window_length: int, hop_length: int
) -> torch.Tensor:
    """
    Encodes sound of any length in windows that overlap by half, cross-faded linearly.

    Args:
        waveform (`torch.Tensor` of shape `(batch_size, channels, num_samples)`): Sound.
        encode (`Callable`): From `(batch_size, channels, num_samples)` to `(batch_size, length, latent_channels)`.
        window_length (`int`): Samples in a window; shorter sound is encoded in one piece.
        hop_length (`int`): Samples in a latent.

    Returns:
        `torch.Tensor` of shape `(batch_size, length, latent_channels)`: `ceil(num_samples / hop_length)` latents of
        several windows, what `encode` gives of one.
    """
    num_samples = waveform.shape[-1]
    if num_samples <= window_length:
        return encode(waveform)

    step = window_length // 2
    num_windows = math.ceil((num_samples - window_length) / step) + 1
    waveform = F.pad(waveform, (0, (num_windows - 1) * step + window_length - num_samples))
    merged = encode(waveform[..., :window_length])
    overlap = merged.shape[1] // 2
    position = torch.arange(overlap, device=merged.device)[:, None]
    for start in range(step, num_windows * step, step):
        window = encode(waveform[..., start : start + window_length])
        faded = merged[:, -overlap:] * ((overlap - position) / overlap) + window[:, :overlap] * (position / overlap)
        merged = torch.cat([merged[:, :-overlap], faded, window[:, overlap:]], dim=1)
    return merged[:, : math.ceil(num_samples / hop_length)]


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raises a `ValueError` unless the tensor is finite and of the shape; `None` allows any size but 0."""
    allowed = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if tensor.ndim != len(shape) or any(
        size not in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but must have shape {allowed}.")
    if not tensor.numel():
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but every size must be 1 or more.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"`{name}` holds NaN or infinite values; all of them must be finite.")


def check_at_most_one(**values: Any) -> None:
    """Raises a `ValueError` if two of the values or more are given."""
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"At most one of {list(values)} may be given, but {given} are.")


class MagiHumanComponentsMixin:
    """
    Holds tokenizer, text encoder, transformer, scheduler and the autoencoders of video and sound, and runs them.

    They are saved as `["diffusers", ClassName]`, the only form that loads from the Hub.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae"
    # Sequential offloading takes away the weights that the sound autoencoder's weight norm is computed from.
    _exclude_from_cpu_offload = ["audio_vae"]
    _callback_tensor_inputs = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]

    def register_to_config(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if (
                isinstance(value, (tuple, list))
                and len(value) == 2
                and isinstance(value[0], str)
                and value[0].split(".")[0] in ("diffusers_magihuman", "diffusers_modules")
                and hasattr(diffusers, value[1])
            ):
                kwargs[name] = ("diffusers", value[1])
        super().register_to_config(**kwargs)

    def register_components(self, **components: Any) -> None:
        """Registers the components and reads sizes and rates off their configs."""
        self.register_modules(**components)
        if self.text_encoder is not None:
            # Its layers are one level below, where Diffusers' group offloading by blocks does not look by itself.
            self.text_encoder._group_offload_block_modules = ["encoder"]
        # `AutoencoderKLWan` and the published Turbo VAE name the same ratio differently.
        self.vae_scale_factor_temporal = 4
        self.vae_scale_factor_spatial = 16
        if self.vae is not None:
            is_wan = "scale_factor_temporal" in self.vae.config
            self.vae_scale_factor_temporal = (
                self.vae.config.scale_factor_temporal if is_wan else self.vae.temporal_compression_ratio
            )
            self.vae_scale_factor_spatial = self.vae.spatial_compression_ratio
        self.audio_sampling_rate = self.audio_vae.config.sampling_rate if self.audio_vae is not None else 44100
        self.audio_hop_length = self.audio_vae.hop_length if self.audio_vae is not None else 2048
        # The autoencoder runs on sound of 25 latents a second (51200 Hz), and is declared at the rate of the output.
        self.audio_vae_sampling_rate = self.audio_hop_length * FRAME_RATE
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> DiffusionPipeline:
        """
        Makes a pipeline that shares the components of another one.

        Args:
            pipeline (`DiffusionPipeline`): The other pipeline.
            dtype (`torch.dtype`, *optional*):
                Casts all components, those of the other pipeline with them. Without it every one stays as it is,
                unlike in Diffusers, which casts to float32: some are float32 on purpose and others are large.
            kwargs: Components and settings that differ: between low and high resolution `transformer` and `scheduler`,
                between base and distilled also `is_distilled`.
        """
        if dtype is not None:
            return super().from_pipe(pipeline, dtype=dtype, **kwargs)
        names, _ = cls._get_signature_keys(cls)
        shared = {name: value for name, value in pipeline.components.items() if name in names}
        return cls(**{**shared, **kwargs})

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_conditions(
        self,
        image: ImageInput | list[ImageInput] | None = None,
        video: VideoInput | list[VideoInput] | None = None,
        audio: AudioInput | list[AudioInput] | None = None,
    ) -> None:
        """Raises a `ValueError` for sound without its rate, and for what needs a component that is not loaded."""
        for item in audio if isinstance(audio, list) else [audio]:
            if isinstance(item, (np.ndarray, torch.Tensor)):
                raise ValueError(
                    "`audio` is a waveform without its rate; it must be a tuple (waveform, sampling_rate)."
                )
        for name, condition, component in (
            ("image", image, "vae"),
            ("video", video, "vae"),
            ("audio", audio, "audio_vae"),
        ):
            if condition is not None and getattr(self, component) is None:
                raise ValueError(f"`{name}` needs `{component}`, which the pipeline was loaded without.")
        is_decoder = isinstance(self.vae, AutoencoderKLMagiHumanTurbo) and self.vae.encoder is None
        if is_decoder and (image is not None or video is not None):
            raise ValueError(
                f"`{'image' if video is None else 'video'}` needs a `vae` that encodes, but this"
                " AutoencoderKLMagiHumanTurbo has no encoder. Load it with `load_original_turbo_vae(encoder=...)`, or"
                " take an AutoencoderKLWan."
            )

    def check_settings(
        self,
        height: int,
        width: int,
        counts: dict[str, int],
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        max_sequence_length: int,
    ) -> None:
        """Raises a `ValueError` for a size, a number that must be 1 or more, or a choice that is not allowed."""
        multiple = self.vae_scale_factor_spatial * self.transformer.config.patch_size[1]
        for name, size in (("height", height), ("width", width)):
            if not isinstance(size, Integral) or size < multiple or size % multiple:
                raise ValueError(f"`{name}`={size!r} must be a positive multiple of {multiple}.")
        for name, number in counts.items():
            if not isinstance(number, Integral) or number < 1:
                raise ValueError(f"`{name}`={number!r} must be an integer of 1 or more.")
        if not isinstance(max_sequence_length, Integral) or not 1 <= max_sequence_length <= MAX_SEQUENCE_LENGTH:
            raise ValueError(f"`max_sequence_length`={max_sequence_length!r} must be in 1 to {MAX_SEQUENCE_LENGTH}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type`={output_type!r} must be one of {OUTPUT_TYPES}.")
        if output_type == "stream" and self.vae is not None and not isinstance(self.vae, AutoencoderKLMagiHumanTurbo):
            raise ValueError(
                "`output_type`='stream' needs an AutoencoderKLMagiHumanTurbo as `vae`, which decodes in windows, but"
                f" that is {type(self.vae).__name__}."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, allowed are {self._callback_tensor_inputs}."
            )

    def check_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_embeds_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds_mask: torch.Tensor | None,
    ) -> int:
        """Raises a `ValueError` unless there is just one form of each prompt, of the right shape; returns how many."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(
                "Exactly one of `prompt` and `prompt_embeds` must be given, but"
                f" {'both are' if prompt is not None else 'neither is'}."
            )
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("At most one of `negative_prompt` and `negative_prompt_embeds` may be given.")
        if prompt is not None:
            prompts = prompt if isinstance(prompt, list) else [prompt]
            if not prompts or any(not isinstance(text, str) or not text.strip() for text in prompts):
                raise ValueError(f"`prompt`={prompt!r} must be a non-empty string or a list of them.")
        num_prompts = len(prompts) if prompt is not None else len(prompt_embeds)

        if negative_prompt is not None:
            texts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * num_prompts
            if len(texts) != num_prompts or any(not isinstance(text, str) for text in texts):
                raise ValueError(
                    f"`negative_prompt`={negative_prompt!r} must be a string or a list of {num_prompts} strings."
                )
        for name, tensor, mask in (
            ("prompt_embeds", prompt_embeds, prompt_embeds_mask),
            ("negative_prompt_embeds", negative_prompt_embeds, negative_prompt_embeds_mask),
        ):
            if tensor is not None:
                check_tensor(name, tensor, (num_prompts, None, self.transformer.config.text_in_channels))
            size = None if tensor is None else tuple(tensor.shape[:2])
            if mask is not None and tuple(mask.shape) != size:
                raise ValueError(
                    f"`{name}_mask` has shape {tuple(mask.shape)}, but must have the first two sizes of `{name}`,"
                    f" {size}."
                )
        return num_prompts

    def check_components(
        self, prompt: str | list[str] | None, negative_prompt_embeds: torch.Tensor | None, decoders: tuple[str, ...]
    ) -> None:
        """Raises a `ValueError` if the text encoder is needed, or one of `decoders`, but is not loaded."""
        encodes_text = prompt is not None or (self.do_classifier_free_guidance and negative_prompt_embeds is None)
        needed = (*(("tokenizer", "text_encoder") if encodes_text else ()), *decoders)
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"This call needs {missing}, which the pipeline was loaded without. Load them, or pass embeddings"
                " (with guidance also negative ones) instead of prompts and `output_type='latent'`."
            )

    @staticmethod
    def check_lengths(
        num_prompts: int, batch_size: int, generator: torch.Generator | list[torch.Generator] | None, **items: Any
    ) -> None:
        """Raises a `ValueError` for lists that fit neither one, nor the prompts, nor the videos."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but must have {batch_size}, one for each video."
            )
        for name, values in items.items():
            if values is not None and len(values) not in (1, num_prompts, batch_size):
                raise ValueError(
                    f"`{name}` has {len(values)} items, but must have 1, one for each prompt ({num_prompts}) or one"
                    f" for each video ({batch_size})."
                )

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
            prompt (`str` or `list[str]`, *optional*): Prompts; not needed with `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*): What to steer away from; a default covers faults of the
                picture, of the sound and of the delivery.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether negative embeddings are wanted.
            num_videos_per_prompt (`int`, defaults to 1): How often each embedding is repeated.
            prompt_embeds (`torch.Tensor` of shape `(num_prompts, length, channels)`, *optional*): Embeddings to use.
            prompt_embeds_mask (`torch.Tensor` of shape `(num_prompts, length)`, *optional*): True for real tokens; all
                are real if left out.
            negative_prompt_embeds, negative_prompt_embeds_mask (`torch.Tensor`, *optional*): Likewise.
            max_sequence_length (`int`, defaults to 640): Embeddings of further tokens are cut off, with a warning.
            device (`torch.device`, *optional*): Where to encode.

        Returns:
            `tuple`: `prompt_embeds` `(num_prompts * num_videos_per_prompt, length, channels)` in float32,
            `prompt_embeds_mask` `(num_prompts * num_videos_per_prompt, length)` and both for the negative prompts,
            which are `None` without guidance.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, prompt_embeds_mask = self._encode_texts(prompts, max_sequence_length, device)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            texts = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
            texts = [texts] * len(prompt_embeds) if isinstance(texts, str) else texts
            negative_prompt_embeds, negative_prompt_embeds_mask = self._encode_texts(
                texts, max_sequence_length, device
            )
        prompt_embeds, prompt_embeds_mask = self._repeat_embeds(
            prompt_embeds, prompt_embeds_mask, num_videos_per_prompt, device
        )
        if do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_embeds_mask = self._repeat_embeds(
                negative_prompt_embeds, negative_prompt_embeds_mask, num_videos_per_prompt, device
            )
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

    def _encode_texts(
        self, texts: list[str], max_sequence_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = []
        for text in texts:
            input_ids = self.tokenizer(text, return_tensors="pt").input_ids.to(device)
            if input_ids.shape[1] > max_sequence_length:
                cut = self.tokenizer.decode(input_ids[0, max_sequence_length:])
                logger.warning(
                    f"The prompt has {input_ids.shape[1]} tokens; those beyond `max_sequence_length`="
                    f"{max_sequence_length} are cut off: {cut!r}"
                )
            if input_ids.shape[1] == 0:
                if self.tokenizer.bos_token_id is None:
                    raise ValueError(f"The tokenizer finds no token in the prompt {text!r}; at least one is needed.")
                # What the tokenizer of the published models makes of an empty text.
                input_ids = torch.tensor([[self.tokenizer.bos_token_id]], device=device)
            hidden_states = self.text_encoder(input_ids=input_ids).last_hidden_state[0, :max_sequence_length]
            embeds.append(hidden_states.half().float())
        lengths = torch.tensor([len(states) for states in embeds], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        return pad_sequence(embeds, batch_first=True), mask

    @staticmethod
    def _repeat_embeds(
        embeds: torch.Tensor, mask: torch.Tensor | None, num_videos_per_prompt: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        embeds = embeds.to(device).repeat_interleave(num_videos_per_prompt, dim=0)
        return embeds, mask.to(device, torch.bool).repeat_interleave(num_videos_per_prompt, dim=0)

    @staticmethod
    def _trim_embeds(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cuts padding that all texts share; the mask goes too unless texts of different lengths are mixed."""
        kept = mask.any(dim=0)
        embeds, mask = embeds[:, kept], mask[:, kept]
        return embeds, None if mask.all() else mask

    def encode_image(
        self, images: list[PIL.Image.Image], height: int, width: int, device: torch.device
    ) -> torch.Tensor:
        """
        Encodes first frames, cropped at the centre to the aspect of the video.

        Args:
            images (`list[PIL.Image.Image]`): RGB images of any size.
            height, width (`int`): Size of the video in pixels.
            device (`torch.device`): Where to encode.

        Returns:
            `torch.Tensor` of shape `(num_images, channels, 1, latent_height, latent_width)`: Normalised, float32.
        """
        images = [crop_to_aspect(image, height, width) for image in images]
        pixels = torch.cat([self.video_processor.preprocess(image, height, width) for image in images])
        return self.encode_video(pixels[:, :, None], device)

    def encode_video(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        """
        Encodes videos to the mode of their latents.

        Args:
            pixels (`torch.Tensor` of shape `(batch_size, 3, 4 * k + 1, height, width)`): Videos in [-1, 1].
            device (`torch.device`): Where to encode.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, k + 1, latent_height, latent_width)`: Normalised, float32.
        """
        latents = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist.mode().float()
        mean, inverse_std = self._latents_mean_and_inverse_std(device)
        return (latents - mean) * inverse_std

    def encode_audio(
        self, waveform: torch.Tensor, generator: torch.Generator | None, device: torch.device
    ) -> torch.Tensor:
        """
        Encodes sound in windows of 29 seconds, sampling from the autoencoder as the original does.

        Args:
            waveform (`torch.Tensor` of shape `(2, num_samples)`): Sound at `audio_vae_sampling_rate`.
            generator (`torch.Generator`, *optional*): Draws the sample.
            device (`torch.device`): Where to encode.

        Returns:
            `torch.Tensor` of shape `(1, audio_length, channels)`: 25 latents a second, float32.
        """

        def encode(window: torch.Tensor) -> torch.Tensor:
            posterior = self.audio_vae.encode(window.to(device, self.audio_vae.dtype)).latent_dist
            return posterior.sample(generator).transpose(1, 2).float()

        window_length = AUDIO_WINDOW_SECONDS * self.audio_vae_sampling_rate
        return encode_in_windows(waveform[None], encode, window_length, self.audio_hop_length)

    def encode_sounds(
        self,
        waveforms: list[torch.Tensor],
        num_frames: int,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Encodes sounds, cut or padded with silence to `num_frames`, a sample of its own for each video."""
        waveforms = [self._fit_waveform(waveform, num_frames) for waveform in waveforms]
        waveforms = [waveform for waveform in waveforms for _ in range(batch_size // len(waveforms))]
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        return torch.cat([self.encode_audio(*item, device) for item in zip(waveforms, generators, strict=True)])

    def predict_velocity(
        self,
        latents: torch.Tensor,
        audio_latents: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor | None],
        negative_text: tuple[torch.Tensor, torch.Tensor | None] | None,
        guidance_scale: float | torch.Tensor,
        audio_guidance_scale: float,
        attention_inputs: dict[str, Any],  # noqa: ARG002
        step_index: int,
        sigma: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Predicts the velocity of video and sound; the two branches of guidance run one after the other, each unpadded.

        Args:
            latents, audio_latents (`torch.Tensor`): Noisy latents of video and sound.
            text, negative_text (`tuple`): Embeddings and their mask or `None`; no guidance without `negative_text`.
            guidance_scale, audio_guidance_scale (`float` or `torch.Tensor`): Guidance of video and sound.
            attention_inputs (`dict`): What is the same in every step, by branch; missing ones are put into it.
            step_index (`int`), sigma (`float`): Step and its noise level, for the caches of the transformer.
        """
        velocities = []
        for name, branch in (("cond", text), ("uncond", negative_text)):
            if branch is None:
                continue
            embeds, mask = branch
            context = {"step_index": step_index, "sigma": sigma, "num_inference_steps": self.num_timesteps}
            with self.transformer.cache_context(name, **context):
                velocities.append(
                    self.transformer(
                        latents,
                        audio_latents,
                        encoder_hidden_states=embeds,
                        attention_kwargs=self.attention_kwargs,
                        encoder_attention_mask=mask,
                        return_dict=False,
                    )
                )
        if negative_text is None:
            return velocities[0]
        (cond, audio_cond), (uncond, audio_uncond) = velocities
        return (
            uncond + guidance_scale * (cond - uncond),
            audio_uncond + audio_guidance_scale * (audio_cond - audio_uncond),
        )

    def decode_latents(
        self, latents: torch.Tensor, output_type: str
    ) -> torch.Tensor | np.ndarray | list[list[PIL.Image.Image]] | list[Iterator[np.ndarray]]:
        """Decodes normalised video latents to frames, see [`MagiHumanPipelineOutput`]."""
        samples = latents.split(1)
        if output_type == "stream":
            return [self.stream_frames(sample) for sample in samples]
        videos = []
        for sample in samples:
            # Each window leaves the device as soon as it is done, unless tensors are wanted.
            windows = [
                self.video_processor.postprocess_video(window, output_type=output_type)
                for window in self._decode_windows(sample)
            ]
            if output_type == "pil":
                videos.append([frame for window in windows for frame in window[0]])
            else:
                videos.append(torch.cat(windows, dim=1) if output_type == "pt" else np.concatenate(windows, axis=1))
        if output_type == "pil":
            return videos
        return torch.cat(videos) if output_type == "pt" else np.concatenate(videos)

    @torch.no_grad()
    def stream_frames(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """
        Decodes a video while it is consumed, so that only one window of it is in memory at a time.

        Args:
            latents (`torch.Tensor` of shape `(1, channels, latent_frames, latent_height, latent_width)`):
                Normalised latents.

        Returns:
            `Iterator[np.ndarray]`: Frames of shape `(height, width, 3)` in [0, 1].
        """
        for window in self._decode_windows(latents):
            yield from self.video_processor.postprocess_video(window, output_type="np")[0]
        self.maybe_free_model_hooks()

    def _decode_windows(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        mean, inverse_std = self._latents_mean_and_inverse_std(latents.device)
        latents = (latents / inverse_std + mean).to(self.vae.dtype)
        is_turbo = isinstance(self.vae, AutoencoderKLMagiHumanTurbo)
        for window in self.vae.decode_windows(latents) if is_turbo else [self.vae.decode(latents).sample]:
            yield window.float()

    def decode_audio(self, audio_latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray:
        """Decodes sound latents to sound at `audio_sampling_rate`, see [`MagiHumanPipelineOutput`]."""
        waveform = self.audio_vae.decode(audio_latents.transpose(1, 2).to(self.audio_vae.dtype)).sample.float()
        num_samples = waveform.shape[-1] * self.audio_sampling_rate // self.audio_vae_sampling_rate
        waveform = resample_audio(waveform, num_samples)
        return waveform if output_type == "pt" else waveform.cpu().numpy()

    def _latents_mean_and_inverse_std(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.tensor(self.vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        return mean, 1.0 / torch.tensor(self.vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)

    def _num_audio_latents(self, waveform: torch.Tensor) -> int:
        """An unfinished last latent counts only in sound of several windows, as in the original."""
        num_samples = waveform.shape[1]
        if num_samples <= AUDIO_WINDOW_SECONDS * self.audio_vae_sampling_rate:
            return num_samples // self.audio_hop_length
        return math.ceil(num_samples / self.audio_hop_length)

    def _fit_waveform(self, waveform: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Cuts sound, or pads it with silence, to a number of latents, unless it has just as many."""
        if self._num_audio_latents(waveform) == num_frames:
            return waveform
        length = num_frames * self.audio_hop_length
        return F.pad(waveform[:, :length], (0, max(length - waveform.shape[1], 0)))
