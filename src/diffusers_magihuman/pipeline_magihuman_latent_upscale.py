# SPDX-License-Identifier: Apache-2.0
"""Latents of a video in low resolution, or the video, to the same video in high resolution."""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, AutoencoderOobleck, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import GemmaTokenizer, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .checks import check_tensor
from .constants import FRAME_RATE
from .conversion import UPSCALE_SIZES
from .denoising import leading_scales
from .media import AudioInput, ImageInput, VideoInput, load_images, load_videos
from .pipeline_base import (
    MAX_SEQUENCE_LENGTH,
    Generators,
    Inputs,
    MagiHumanPipeline,
    MagiHumanPipelineOutput,
    StepCallback,
    check_components,
    check_forms,
    check_generators,
    check_lengths,
    check_numbers,
    check_tensors,
    latent_shapes,
    load_audios,
    one_at_a_time,
    pass_audio,
    repeat,
)
from .transformer_magihuman import MagiHumanTransformer3DModel


def zero_snr_signal_scales() -> Tensor:
    """Factors of a sample at 1000 noise levels, from nearly 1 to 0, beside `sqrt(1 - factor**2)` of noise;
    scaled-linear and stretched so that they end in pure noise
    ([arXiv 2305.08891](https://huggingface.co/papers/2305.08891))."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scales = (1 - betas).cumprod(dim=0).float().sqrt()
    return (scales - scales[-1]) * (scales[0] / (scales[0] - scales[-1]))


def default_size(
    source: tuple[int, int], default: tuple[int, int], height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width that a video of the size `source` is upscaled to. What is not given keeps the source's aspect,
    as well as multiples of 32 can, in about the area of the size `default`, which stays as it is where it has that
    aspect up to rounding; it is never less than the source."""
    check_numbers(locals(), "height", "width")
    aspect, area = source[0] / source[1], max(math.prod(default), math.prod(source))

    def nearest(size: float, low: int) -> int:
        return max(round(size / 32), math.ceil(low / 32)) * 32

    if height is None and width is None:  # the shorter side first, so that rounding changes the aspect least
        if aspect < 1:
            height = nearest(math.sqrt(area * aspect), source[0])
        else:
            width = nearest(math.sqrt(area / aspect), source[1])
    height = nearest(width * aspect, source[0]) if height is None else height
    return height, (nearest(height / aspect, source[1]) if width is None else width)


def check_source(pipe: Any, inputs: Inputs) -> tuple[int, int, int, int]:
    """Checks what is to be upscaled; returns the number of videos, of their latent frames, and their size."""
    check_components(pipe.components)
    check_forms(inputs, "latents", "video", is_needed=True)
    ratio, multiple = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    if inputs["latents"] is not None:
        transformer = pipe.components.get("transformer")
        channels = None if transformer is None else transformer.config.in_channels
        check_tensor("latents", inputs["latents"], (None, channels, None, None, None))
        num_videos, _, latent_frames, height, width = inputs["latents"].shape
        return num_videos, latent_frames, height * multiple, width * multiple
    shapes = {tuple(video.shape) for video in inputs["video"]}
    num_frames, _, height, width = next(iter(shapes))
    if len(shapes) > 1 or num_frames % ratio != 1 or height % multiple or width % multiple:
        allowed = f"{ratio} * k + 1 frames, height and width multiples of {multiple}, all videos of one shape"
        raise ValueError(f"`video` has shape {sorted(shapes)}, frames first; it must have {allowed}.")
    return len(inputs["video"]), num_frames // ratio + 1, height, width


def count_videos(num_videos: int, num_prompts: int) -> int:
    """How many videos come out: one for each given or each prompt; `ValueError` if these do not go together."""
    batch_size = max(num_videos, num_prompts)
    if num_videos not in (1, batch_size) or batch_size % num_prompts:
        allowed = "one of these numbers must be 1, or the prompts divide the videos"
        raise ValueError(f"`prompt` has {num_prompts} items for {num_videos} videos; {allowed}.")
    return batch_size


def check_upscale(pipe: Any, inputs: Inputs, num_prompts: int) -> int:
    """Checks what is upscaled to `height` and `width`, and what goes with it; returns how many videos a prompt has."""
    num_videos, latent_frames, *source = check_source(pipe, inputs)
    height, width, audio_latents = inputs["height"], inputs["width"], inputs["audio_latents"]
    if height < source[0] or width < source[1]:
        allowed = f"not be less than those of what is upscaled, {source[0]} and {source[1]}"
        raise ValueError(f"`height`={height} and `width`={width} must {allowed}.")
    batch_size = count_videos(num_videos, num_prompts)
    longest = latent_frames * pipe.vae_scale_factor_temporal
    num_frames = longest - pipe.vae_scale_factor_temporal + 1
    shape, audio_shape = latent_shapes(pipe, batch_size, num_frames, height, width)
    image_shape = (None, shape[1], 1, *shape[3:])
    check_tensors(inputs, image_latents=image_shape, audio_latents=(None, None, audio_shape[2]))
    if audio_latents is not None and not num_frames <= audio_latents.shape[1] <= longest:
        allowed = f"{latent_frames} latent frames of video last {num_frames} to {longest}"
        raise ValueError(f"`audio_latents` has length {audio_latents.shape[1]}, but {allowed}.")
    items = ("image", "audio", "image_latents", "audio_latents")
    check_lengths(pipe, inputs, *items, num_prompts=num_prompts, batch_size=batch_size)
    return batch_size // num_prompts


def prepare_upscale_latents(
    pipe: Any,
    latents: Tensor,
    audio_latents: Tensor | None,
    height: int,
    width: int,
    noise_level: int,
    audio_noise_scale: float,
    generator: Generators,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Resizes latents `(batch_size, channels, latent_frames, latent_height, latent_width)` to `height` and `width`
    in pixels and mixes them, and those of the audio `(batch_size, audio_length, channels)`, with noise, the
    video's drawn before the audio's as the original does. See the call for `noise_level`, an index into
    [`zero_snr_signal_scales`], and `audio_noise_scale`; without audio its latents are nothing but noise. Returns
    float32 latents of the video in high resolution, and of the audio that the transformer sees."""
    check_tensor("latents", latents, (None, pipe.transformer.config.in_channels, None, None, None))
    check_numbers(locals())
    check_generators(generator, len(latents), device)
    num_frames = (latents.shape[2] - 1) * pipe.vae_scale_factor_temporal + 1
    shape, audio_shape = latent_shapes(pipe, len(latents), num_frames, height, width)
    check_tensors(locals(), audio_latents=(len(latents), None, audio_shape[2]))
    latents = latents.to(device, torch.float32)
    latents = F.interpolate(latents, size=shape[2:], mode="trilinear", align_corners=True)
    noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    scale = zero_snr_signal_scales()[noise_level]
    latents = latents * scale + noise * (1 - scale**2).sqrt()

    audio_shape = audio_shape if audio_latents is None else audio_latents.shape
    noise = randn_tensor(audio_shape, generator=generator, device=device, dtype=torch.float32)
    if audio_latents is None:
        return latents, noise
    audio_latents = audio_latents.to(device, torch.float32)
    return latents, noise * audio_noise_scale + audio_latents * (1 - audio_noise_scale)


class MagiHumanLatentUpscalePipeline(MagiHumanPipeline):
    r"""Super-resolution of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986) in latent space: resizes the
    latents of a video, adds noise, and denoises them with the transformer for 540p or 1080p. The audio helps, and is
    passed through as it is.

    Args:
        tokenizer, text_encoder, scheduler, vae, audio_vae: See [`MagiHumanPipeline`].
        transformer ([`MagiHumanTransformer3DModel`]): One for super-resolution, with `coordinate_style="v1"`;
            `ValueError` for others.
        default_height, default_width (`int`, defaults to 1088 and 1920): Size in pixels when a call names none.
    """

    original_variants = {
        name: {"default_height": height, "default_width": width} for name, (height, width) in UPSCALE_SIZES.items()
    }

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
        check_numbers(locals())
        super().__init__(tokenizer, text_encoder, transformer, scheduler, vae, audio_vae)
        if transformer is not None and transformer.config.coordinate_style != "v1":
            style = transformer.config.coordinate_style
            raise ValueError(f"`transformer` has `coordinate_style`={style!r}; one for super-resolution has 'v1'.")
        self.register_to_config(default_height=default_height, default_width=default_width)

    def check_inputs(self, inputs: Inputs) -> int:
        """Checks all arguments, see [`MagiHumanPipeline.check_inputs`]. Returns how many videos a prompt has."""
        check_forms(inputs, "audio", "audio_latents")
        has_audio = inputs["audio"] is not None or inputs["audio_latents"] is not None
        return check_upscale(self, inputs, super().check_inputs(inputs, has_audio))

    prepare_latents = prepare_upscale_latents

    @one_at_a_time
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        video: VideoInput | list[VideoInput] | None = None,
        image: ImageInput | list[ImageInput] | None = None,
        audio: AudioInput | list[AudioInput] | None = None,
        latents: Tensor | None = None,
        audio_latents: Tensor | None = None,
        image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        leading_guidance_scale: float = 2.0,
        num_leading_frames: int = 13,
        noise_level: int = 220,
        audio_noise_scale: float = 0.7,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    ) -> MagiHumanPipelineOutput | tuple:
        r"""Upscales videos.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompt of the video, one for all or for each; several for
                one video upscale it once for each.
            negative_prompt (`str` or `list[str]`, *optional*): What to steer away from, with guidance only; by default
                faults of the picture, of the audio and of the delivery.
            video (path, array, tensor, list of frames or a list of these, *optional*): In place of `latents`, see
                [`~media.load_videos`]: `4 * k + 1` frames, 25 a second, height and width multiples of 16.
            image (path, PIL image, array, tensor or a list of these, *optional*): The first frame in high resolution,
                one for all or one for each video; cropped at the centre to the aspect of the video.
            audio (path, `(waveform, sampling_rate)` or a list of these, *optional*): Audio of the video, cut or padded
                with silence to its length and else returned as it is.
            latents (`torch.Tensor` of shape `(batch_size, channels, latent_frames, latent_height, latent_width)`,
                *optional*): Normalised latents of Wan 2.2's autoencoder, as [`MagiHumanAudioVideoPipeline`] and
                `WanPipeline` give with `output_type="latent"`.
            audio_latents (`torch.Tensor` of shape `(batch_size, audio_length, channels)`, *optional*): In place of
                `audio`, also one for all. Without either the video is upscaled without audio.
            image_latents (`torch.Tensor` of shape `(num_items, channels, 1, height / 16, width / 16)`, *optional*):
                Normalised latents in place of `image`.
            height, width (`int`, *optional*): Size in pixels, multiples of 32, at least the video's, at most 8192.
                What is left out keeps the aspect of the video, in about the area of the saved size, see
                [`default_size`]; a video of another aspect than both is stretched.
            num_inference_steps (`int`, defaults to 5): Number of steps.
            guidance_scale (`float`, defaults to 1.0): Guidance, off at 1; the original uses 3.5 where it is on.
            leading_guidance_scale (`float`, defaults to 2.0): Guidance of the first `num_leading_frames` latent
                frames, at most `guidance_scale`.
            num_leading_frames (`int`, defaults to 13): Number of these frames.
            noise_level (`int`, defaults to 220): How much noise is added, from 0 to 999 for nothing but noise.
            audio_noise_scale (`float`, defaults to 0.7): Share of noise in the audio that the transformer sees.
            generator (`torch.Generator` or a list, one for each video, *optional*): Makes the result deterministic.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): In place of the prompts, what
                [`~MagiHumanPipeline.encode_prompt`] returns, `(num_prompts, length, channels)`.
            prompt_embeds_mask, negative_prompt_embeds_mask (`torch.Tensor`, *optional*): `(num_prompts, length)`, true
                for real tokens; padding may stand on either side.
            output_type (`str`, defaults to `"np"`): `"np"`, `"pt"`, `"pil"`, `"latent"`, or `"stream"` for frames that
                are decoded as they are consumed, for example by [`export_to_mp4`].
            return_dict (`bool`, defaults to `True`): Whether to return a [`MagiHumanPipelineOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*): `scale` sets the scale of LoRA layers.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)`; returns
                those of `callback_on_step_end_tensor_inputs`, by default the latents, that it changes, or nothing.
            max_sequence_length (`int`, defaults to 640): Text tokens used; others are cut off, with a warning.

        Examples:
            ```py
            >>> import torch
            >>> from diffusers import DiffusionPipeline
            >>> from diffusers_magihuman import export_to_mp4
            >>> dtype = {"default": torch.bfloat16, "audio_vae": torch.float32}
            >>> pipe = DiffusionPipeline.from_pretrained("owner/magihuman-distilled", dtype=dtype)
            >>> pipe.enable_model_cpu_offload()
            >>> low = pipe(prompt, output_type="latent")
            >>> upscale = DiffusionPipeline.from_pretrained("owner/magihuman-sr-1080p", dtype=dtype)
            >>> upscale.enable_model_cpu_offload()
            >>> upscale.vae.enable_tiling()
            >>> high = upscale(prompt, latents=low.frames, audio_latents=low.audio, output_type="stream")
            >>> export_to_mp4(high.frames[0], "out.mp4", audio=high.audio[0])
            ```

        Returns:
            [`MagiHumanPipelineOutput`] or `tuple`: Frames and audio; with `"latent"` the audio's latents as given.

        Raises:
            `ValueError`: An argument is wrong; raised before any model runs.
            `OSError`: `video`, `image` or `audio` cannot be read.
        """
        # 1. Fill in defaults and read files
        inputs = dict(locals())
        self._guidance_scale = guidance_scale
        self._attention_kwargs, self._current_timestep, self._interrupt = attention_kwargs, None, False
        videos = None if video is None else load_videos(video, FRAME_RATE)
        images = None if image is None else load_images(image)
        if audio is not None:
            audio, passed_audio = load_audios(audio, self.audio_vae_sampling_rate, self.audio_sampling_rate)
        inputs |= {"video": videos, "image": images, "audio": audio}
        *_, source_height, source_width = check_source(self, inputs)
        default = self.config.default_height, self.config.default_width
        height, width = default_size((source_height, source_width), default, height, width)

        # 2. Check everything before a model runs
        # A callback of Diffusers names its tensors itself.
        step_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        inputs |= {"height": height, "width": width, "callback_on_step_end_tensor_inputs": step_inputs}
        inputs["num_videos_per_prompt"] = self.check_inputs(inputs)
        device = self._execution_device

        # 3. Encode the text
        is_guided = self.do_classifier_free_guidance
        prompts = {name: inputs[name] for name in inspect.signature(self.encode_prompt).parameters if name in inputs}
        text = self.encode_prompt(**prompts, do_classifier_free_guidance=is_guided, device=device)

        # 4. Encode the video, its first frame and its audio
        if videos is not None:
            latents = self.encode_video(torch.stack(videos).transpose(1, 2) * 2 - 1, device)
        batch_size, num_frames = len(text[0]), (latents.shape[2] - 1) * self.vae_scale_factor_temporal + 1
        latents = repeat(latents, batch_size)
        if images is not None:
            image_latents = self.encode_image(images, height, width, device)
        if image_latents is not None:
            image_latents = repeat(image_latents.to(device, torch.float32), batch_size)
        if audio is not None:
            audio_latents = self.encode_audio(repeat(audio, batch_size), generator, device, num_frames)
        if audio_latents is not None:
            audio_latents = repeat(audio_latents, batch_size)

        # 5. Resize the latents and add noise
        latents, noisy_audio_latents = self.prepare_latents(
            latents, audio_latents, height, width, noise_level, audio_noise_scale, generator, device
        )

        # 6. Denoise the video; the noisy audio stays as it is
        def guidance_at(_timestep: Tensor) -> Tensor:
            return leading_scales(latents, self.guidance_scale, leading_guidance_scale, num_leading_frames)

        options = {"image_latents": image_latents, "moves_audio": False}
        on_step_end = callback_on_step_end, step_inputs
        latents, _ = self.denoise(
            latents, noisy_audio_latents, text, num_inference_steps, guidance_at, generator, on_step_end, **options
        )

        # 7. Decode the video; the audio is the one that was given
        frames, output_audio = latents, audio_latents
        if output_type != "latent":
            frames = self.decode_latents(latents, output_type)
            if audio is not None:
                output_audio = pass_audio(self, passed_audio, batch_size, num_frames, output_type)
            elif audio_latents is not None:
                output_audio = self.decode_audio(audio_latents.to(device), output_type)
        self.maybe_free_model_hooks()
        return MagiHumanPipelineOutput(frames=frames, audio=output_audio) if return_dict else (frames, output_audio)
