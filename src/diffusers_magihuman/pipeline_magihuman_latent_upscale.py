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
"""Latents of a video in low resolution, or the video, to the same video in high resolution."""

import copy
import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, AutoencoderOobleck, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import GemmaTokenizer, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .lora import MagiHumanLoraLoaderMixin
from .media import AudioInput, ImageInput, VideoInput, load_audio, load_images, load_videos
from .pipeline_components import (
    FRAME_RATE,
    MAX_SEQUENCE_LENGTH,
    MagiHumanComponentsMixin,
    check_at_most_one,
    check_tensor,
)
from .pipeline_output import MagiHumanPipelineOutput
from .transformer_magihuman import MagiHumanTransformer3DModel


NUM_NOISE_LEVELS = 1000

UPSCALE_EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> import diffusers_magihuman
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers_magihuman import export_to_mp4

        >>> dtype = {"default": torch.bfloat16, "audio_vae": torch.float32}
        >>> pipe = DiffusionPipeline.from_pretrained("owner/magihuman-distill", dtype=dtype)
        >>> pipe.enable_model_cpu_offload()
        >>> low = pipe(prompt, output_type="latent")

        >>> upscale = DiffusionPipeline.from_pretrained("owner/magihuman-sr-1080p", dtype=dtype)
        >>> upscale.enable_model_cpu_offload()
        >>> upscale.vae.enable_tiling()
        >>> high = upscale(prompt, latents=low.frames, audio_latents=low.audio, output_type="stream")
        >>> export_to_mp4(high.frames[0], "out.mp4", audio=high.audio[0])
        ```
"""


def zero_snr_signal_scales() -> torch.Tensor:
    """
    How much of a sample is left at each noise level, from nearly all to nothing.

    The scaled-linear schedule of latent diffusion, moved and stretched so that its end is pure noise
    ([arXiv 2305.08891](https://huggingface.co/papers/2305.08891)).

    Returns:
        `torch.Tensor` of shape `(1000,)`: Factors of the sample; the noise has `sqrt(1 - factor**2)`.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_NOISE_LEVELS, dtype=torch.float64) ** 2
    scales = (1 - betas).cumprod(dim=0).float().sqrt()
    return (scales - scales[-1]) * (scales[0] / (scales[0] - scales[-1]))


class MagiHumanLatentUpscalePipeline(MagiHumanComponentsMixin, DiffusionPipeline, MagiHumanLoraLoaderMixin):
    r"""
    Super-resolution of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986) in latent space: resizes the
    latents of a video, adds noise, and denoises them with the transformer for 540p or 1080p. The sound helps, and is
    passed through as it is.

    Any component may be `None` in calls that do not need it, for example `text_encoder` when embeddings are given or
    the autoencoders with `output_type="latent"`.

    Args:
        tokenizer (`GemmaTokenizer`): Tokenizer of the text encoder.
        text_encoder (`T5GemmaEncoderModel`): The encoder of T5Gemma 9B.
        transformer ([`MagiHumanTransformer3DModel`]):
            A transformer for super-resolution, which is one with `coordinate_style="v1"`.
        scheduler ([`MagiHumanFlowScheduler`]):
            Noise levels and solver. Any flow scheduler of Diffusers may replace it.
        vae ([`AutoencoderKLMagiHumanTurbo`] or `AutoencoderKLWan`): Autoencoder of Wan 2.2 video latents.
        audio_vae (`AutoencoderOobleck`): Autoencoder of 25 sound latents a second. The original runs it in float32.
        default_height, default_width (`int`, defaults to 1088 and 1920): Size in pixels when a call names none.

    Raises:
        `ValueError`: The transformer is not for super-resolution.
    """

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: T5GemmaEncoderModel,
        transformer: MagiHumanTransformer3DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKLMagiHumanTurbo | AutoencoderKLWan,
        audio_vae: AutoencoderOobleck,
        default_height: int = 1088,
        default_width: int = 1920,
    ) -> None:
        super().__init__()
        if transformer is not None and transformer.config.coordinate_style != "v1":
            raise ValueError(
                f"`transformer` has `coordinate_style`={transformer.config.coordinate_style!r}, which the base and"
                " distilled models have; it must be a model for super-resolution, with 'v1'."
            )
        self.register_components(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            audio_vae=audio_vae,
        )
        self.register_to_config(default_height=default_height, default_width=default_width)

    @classmethod
    def from_original(
        cls,
        path_or_repo: str = "GAIR/daVinci-MagiHuman",
        variant: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **kwargs: Any,
    ) -> "MagiHumanLatentUpscalePipeline":
        """
        Puts the pipeline together from the original's repositories, or local copies, as they are published.

        Args:
            path_or_repo (`str`): Directory, file or repository of the transformer in any published layout.
            variant (`str`, *optional*): `"sr_540p"` or `"sr_1080p"`, guessed from the path when it names just one.
            dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all but the float32 parts.
            kwargs: `subfolder`, `text_encoder`, `audio_vae`, `video_vae`, `turbo_vae` and arguments of the downloads,
                see [`~checkpoints.load_original_components`].

        Raises:
            `ValueError`: The variant is not one of this pipeline, cannot be guessed, or tensors do not fit.
            `OSError`: A repository is missing, or gated: it is named with the page where access is granted.
        """
        # Absolute and here: the file that repositories carry for users without the package cannot convert.
        from diffusers_magihuman.checkpoints import UPSCALE_SIZES, guess_variant, load_original_components

        variant = variant or guess_variant(path_or_repo, kwargs.get("subfolder"))
        if variant not in UPSCALE_SIZES:
            raise ValueError(f"`variant`={variant!r} must be one of {tuple(UPSCALE_SIZES)}.")
        height, width = UPSCALE_SIZES[variant]
        components = load_original_components(path_or_repo, variant, dtype, **kwargs)
        return cls(**components, default_height=height, default_width=width)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        videos: list[torch.Tensor] | None,
        images: list[PIL.Image.Image] | None,
        waveforms: list[torch.Tensor] | None,
        latents: torch.Tensor | None,
        audio_latents: torch.Tensor | None,
        image_latents: torch.Tensor | None,
        height: int,
        width: int,
        num_inference_steps: int,
        num_leading_frames: int,
        noise_level: int,
        audio_noise_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_embeds_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds_mask: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        max_sequence_length: int,
    ) -> int:
        """
        Checks everything that can be checked before any model runs.

        Returns:
            `int`: Number of videos for each prompt.

        Raises:
            `ValueError`: Names the argument, its value and what is allowed.
        """
        self.check_settings(
            height,
            width,
            {"num_inference_steps": num_inference_steps},
            output_type,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
        )
        for name, number, allowed in (
            ("num_leading_frames", num_leading_frames, range(2**31)),
            ("noise_level", noise_level, range(NUM_NOISE_LEVELS)),
        ):
            if number not in allowed:
                raise ValueError(f"`{name}`={number!r} must be an integer in 0 to {allowed[-1]}.")
        if not isinstance(audio_noise_scale, Real) or not 0 <= audio_noise_scale <= 1:
            raise ValueError(f"`audio_noise_scale`={audio_noise_scale!r} must be in 0 to 1.")
        has_sound = waveforms is not None or audio_latents is not None
        decoders = () if output_type == "latent" else ("vae", "audio_vae") if has_sound else ("vae",)
        self.check_components(prompt, negative_prompt_embeds, decoders)

        num_sources, latent_frames = self._check_source(latents, videos, height, width)
        num_prompts = self.check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        batch_size = max(num_sources, num_prompts)
        if num_sources not in (1, batch_size) or batch_size % num_prompts:
            raise ValueError(
                f"There are {num_prompts} prompts for {num_sources} videos; one of these numbers must be 1, or the"
                " prompts divide the videos."
            )

        config = self.transformer.config
        if audio_latents is not None:
            check_tensor("audio_latents", audio_latents, (None, None, config.audio_in_channels))
            shortest = (latent_frames - 1) * self.vae_scale_factor_temporal + 1
            longest = latent_frames * self.vae_scale_factor_temporal
            if not shortest <= audio_latents.shape[1] <= longest:
                raise ValueError(
                    f"`audio_latents` has length {audio_latents.shape[1]}, but {latent_frames} latent frames of video"
                    f" last {shortest} to {longest}."
                )
        if image_latents is not None:
            size = height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial
            check_tensor("image_latents", image_latents, (None, config.in_channels, 1, *size))
        self.check_lengths(
            num_prompts,
            batch_size,
            generator,
            image=images,
            audio=waveforms,
            image_latents=image_latents,
            audio_latents=audio_latents,
        )
        return batch_size // num_prompts

    def _check_source(
        self, latents: torch.Tensor | None, videos: list[torch.Tensor] | None, height: int, width: int
    ) -> tuple[int, int]:
        """Checks what is to be upscaled; returns how many videos there are and of how many latent frames."""
        if latents is not None:
            check_tensor("latents", latents, (None, self.transformer.config.in_channels, None, None, None))
            batch_size, latent_frames = latents.shape[0], latents.shape[2]
            source = tuple(size * self.vae_scale_factor_spatial for size in latents.shape[3:])
        else:
            shapes = {tuple(video.shape) for video in videos}
            num_frames, _, *source = next(iter(shapes))
            ratio, multiple = self.vae_scale_factor_temporal, self.vae_scale_factor_spatial
            if len(shapes) > 1 or num_frames % ratio != 1 or any(size % multiple for size in source):
                raise ValueError(
                    f"`video` has shape {sorted(shapes)} (frames, channels, height, width); frames must be"
                    f" {ratio} * k + 1, height and width multiples of {multiple}, all videos of one shape."
                )
            batch_size, latent_frames = len(videos), num_frames // ratio + 1
        if height < source[0] or width < source[1]:
            raise ValueError(
                f"`height`={height} and `width`={width} must not be less than those of what is upscaled, {source[0]}"
                f" and {source[1]}."
            )
        return batch_size, latent_frames

    def prepare_latents(
        self,
        latents: torch.Tensor,
        audio_latents: torch.Tensor | None,
        height: int,
        width: int,
        noise_level: int,
        audio_noise_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Resizes latents and mixes them with noise, the video's drawn before the sound's as the original does.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, channels, latent_frames, latent_height, latent_width)`):
                Latents of the video in low resolution.
            audio_latents (`torch.Tensor` of shape `(batch_size, audio_length, audio_channels)`, *optional*):
                Latents of the sound; nothing but noise without them.
            height, width (`int`): Size of the video in high resolution, in pixels.
            noise_level (`int`): Index into [`zero_snr_signal_scales`].
            audio_noise_scale (`float`): Share of noise in the sound.
            generator (`torch.Generator` or a list of them, *optional*): Draws the noise.
            device (`torch.device`): Where the latents go.

        Returns:
            `tuple`: Float32 latents of the video in high resolution, and of the sound that the transformer sees.
        """
        latents = latents.to(device, torch.float32)
        batch_size, _, latent_frames = latents.shape[:3]
        size = height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial
        latents = F.interpolate(latents, size=(latent_frames, *size), mode="trilinear", align_corners=True)
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=torch.float32)
        scale = zero_snr_signal_scales()[noise_level]
        latents = latents * scale + noise * (1 - scale**2).sqrt()

        audio_shape = (batch_size, (latent_frames - 1) * self.vae_scale_factor_temporal + 1)
        audio_shape = (*audio_shape, self.transformer.config.audio_in_channels)
        if audio_latents is not None:
            audio_shape = audio_latents.shape
        noise = randn_tensor(audio_shape, generator=generator, device=device, dtype=torch.float32)
        if audio_latents is None:
            return latents, noise
        audio_latents = audio_latents.to(device, torch.float32)
        return latents, noise * audio_noise_scale + audio_latents * (1 - audio_noise_scale)

    def _pass_through(
        self, waveforms: list[torch.Tensor], num_frames: int, batch_size: int, output_type: str
    ) -> torch.Tensor | np.ndarray:
        """The given sound itself, at the rate and of the length that decoding would give it."""
        num_samples = num_frames * self.audio_hop_length * self.audio_sampling_rate // self.audio_vae_sampling_rate
        fitted = [F.pad(waveform, (0, max(num_samples - waveform.shape[1], 0))) for waveform in waveforms]
        sound = torch.stack([waveform[:, :num_samples] for waveform in fitted])
        sound = sound.repeat_interleave(batch_size // len(waveforms), dim=0)
        return sound if output_type == "pt" else sound.numpy()

    @torch.no_grad()
    @replace_example_docstring(UPSCALE_EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        video: VideoInput | list[VideoInput] | None = None,
        image: ImageInput | list[ImageInput] | None = None,
        audio: AudioInput | list[AudioInput] | None = None,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        leading_guidance_scale: float = 2.0,
        num_leading_frames: int = 13,
        noise_level: int = 220,
        audio_noise_scale: float = 0.7,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    ) -> MagiHumanPipelineOutput | tuple:
        r"""
        Upscales videos.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt of the video, one for all or for each; several for one video upscale it once for each.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, with guidance only. The default covers faults of the picture, of the sound and
                of the delivery.
            video (path, array, tensor, list of frames or a list of these, *optional*):
                Video in low resolution, see [`~media.load_videos`]: 25 frames a second, `4 * k + 1` of them, height
                and width multiples of 16. In place of `latents`.
            image (path, PIL image, array, tensor or a list of these, *optional*):
                The first frame in high resolution, one for all or one for each video; cropped at the centre to the
                aspect of the video.
            audio (path, `(waveform, sampling_rate)` or a list of these, *optional*):
                Sound of the video, cut or padded with silence to its length and else returned as it is.
            latents (`torch.Tensor` of shape `(batch_size, channels, latent_frames, latent_height, latent_width)`,
                *optional*): Normalised latents of Wan 2.2's autoencoder, as [`MagiHumanAudioVideoPipeline`] and
                `WanPipeline` give with `output_type="latent"`.
            audio_latents (`torch.Tensor` of shape `(batch_size, audio_length, channels)`, *optional*):
                Latents of the sound in place of `audio`, also one for all. Without either the video is upscaled
                without sound.
            image_latents (`torch.Tensor` of shape `(num_items, channels, 1, height / 16, width / 16)`, *optional*):
                Normalised latents in place of `image`.
            height, width (`int`, *optional*):
                Size in pixels, multiples of 32 and not less than now. Default to those saved with the pipeline.
            num_inference_steps (`int`, defaults to 5): Number of steps.
            guidance_scale (`float`, defaults to 1.0): Guidance, off at 1; the original uses 3.5 where it is on.
            leading_guidance_scale (`float`, defaults to 2.0):
                Guidance of the first `num_leading_frames` latent frames, at most `guidance_scale`.
            num_leading_frames (`int`, defaults to 13): Number of these frames.
            noise_level (`int`, defaults to 220): How much noise is added, from 0 to 999 for nothing but noise.
            audio_noise_scale (`float`, defaults to 0.7): Share of noise in the sound that the transformer sees.
            generator (`torch.Generator` or a list, one for each video, *optional*): Makes the result deterministic.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(num_prompts, length, channels)`,
                *optional*): Embeddings in place of the prompts, those of [`MagiHumanAudioVideoPipeline`].
            prompt_embeds_mask, negative_prompt_embeds_mask (`torch.Tensor` of shape `(num_prompts, length)`,
                *optional*): True for real tokens; padding may stand on either side.
            output_type (`str`, defaults to `"np"`):
                `"np"`, `"pt"`, `"pil"`, `"latent"`, or `"stream"` for frames that are decoded as they are consumed,
                for example by [`export_to_mp4`].
            return_dict (`bool`, defaults to `True`): Whether to return a [`MagiHumanPipelineOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*): `scale` sets the scale of LoRA layers.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Tensors that it is given.
            max_sequence_length (`int`, defaults to 640): Text tokens used.

        Examples:

        Returns:
            [`MagiHumanPipelineOutput`] or `tuple`: Frames and sound; with `"latent"` the sound's latents as given.

        Raises:
            `ValueError`: An argument is wrong; raised before any model runs.
            `OSError`: `video`, `image` or `audio` cannot be read.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Fill in defaults, read files, check everything
        height = self.config.default_height if height is None else height
        width = self.config.default_width if width is None else width
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        if (latents is None) == (video is None):
            raise ValueError("Exactly one of `latents` and `video` must be given.")
        check_at_most_one(image=image, image_latents=image_latents)
        check_at_most_one(audio=audio, audio_latents=audio_latents)
        self.check_conditions(image, video, audio)
        videos = None if video is None else load_videos(video, FRAME_RATE)
        images = None if image is None else load_images(image)
        sounds = audio if isinstance(audio, list) else [audio]
        waveforms = None if audio is None else [load_audio(item, self.audio_vae_sampling_rate) for item in sounds]
        num_videos_per_prompt = self.check_inputs(
            prompt,
            negative_prompt,
            videos,
            images,
            waveforms,
            latents,
            audio_latents,
            image_latents,
            height,
            width,
            num_inference_steps,
            num_leading_frames,
            noise_level,
            audio_noise_scale,
            generator,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            output_type,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
        )
        device = self._execution_device

        # 2. Encode the text
        prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_videos_per_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            max_sequence_length,
            device,
        )
        prompt_embeds, prompt_embeds_mask = self._trim_embeds(prompt_embeds, prompt_embeds_mask)
        if self.do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_embeds_mask = self._trim_embeds(
                negative_prompt_embeds, negative_prompt_embeds_mask
            )

        # 3. Encode the video, its first frame and its sound
        if videos is not None:
            latents = self.encode_video(torch.stack(videos).transpose(1, 2) * 2 - 1, device)
        batch_size, num_frames = len(prompt_embeds), (latents.shape[2] - 1) * self.vae_scale_factor_temporal + 1
        latents = latents.repeat_interleave(batch_size // len(latents), dim=0)
        if images is not None:
            image_latents = self.encode_image(images, height, width, device)
        if image_latents is not None:
            image_latents = image_latents.to(device, torch.float32)
            image_latents = image_latents.repeat_interleave(batch_size // len(image_latents), dim=0)
        if waveforms is not None:
            audio_latents = self.encode_sounds(waveforms, num_frames, batch_size, generator, device)
        if audio_latents is not None:
            audio_latents = audio_latents.repeat_interleave(batch_size // len(audio_latents), dim=0)
        given_audio_latents = audio_latents

        # 4. Resize the latents and add noise
        latents, audio_latents = self.prepare_latents(
            latents, audio_latents, height, width, noise_level, audio_noise_scale, generator, device
        )

        # 5. Set the noise levels; the component keeps its own
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        # 6. Denoise the video; the noisy sound stays as it is
        attention_inputs = {}
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                if image_latents is not None:
                    latents = torch.cat([image_latents, latents[:, :, 1:]], dim=2)

                scale = latents.new_full((1, 1, latents.shape[2], 1, 1), self.guidance_scale)
                scale[:, :, :num_leading_frames].clamp_(max=leading_guidance_scale)
                guided = self.do_classifier_free_guidance and negative_prompt_embeds is not None
                velocity, _ = self.predict_velocity(
                    latents,
                    audio_latents,
                    (prompt_embeds, prompt_embeds_mask),
                    (negative_prompt_embeds, negative_prompt_embeds_mask) if guided else None,
                    scale,
                    self.guidance_scale,
                    attention_inputs,
                    i,
                    float(scheduler.sigmas[i]),
                )
                latents = scheduler.step(velocity, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    if "prompt_embeds" in outputs or "negative_prompt_embeds" in outputs:
                        attention_inputs = {}  # the embeddings may have another length now
                    latents = outputs.pop("latents", latents)
                    audio_latents = outputs.pop("audio_latents", audio_latents)
                    prompt_embeds = outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                progress_bar.update()

        if image_latents is not None:
            latents = torch.cat([image_latents, latents[:, :, 1:]], dim=2)
        self._current_timestep = None

        # 7. Decode the video; the sound is the one that was given
        frames, sound = latents, given_audio_latents
        if output_type != "latent":
            frames = self.decode_latents(latents, output_type)
            if audio is not None:
                waveforms = [load_audio(item, self.audio_sampling_rate) for item in sounds]
                sound = self._pass_through(waveforms, num_frames, batch_size, output_type)
            elif given_audio_latents is not None:
                sound = self.decode_audio(given_audio_latents.to(device), output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return frames, sound
        return MagiHumanPipelineOutput(frames=frames, audio=sound)
