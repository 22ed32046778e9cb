# SPDX-License-Identifier: Apache-2.0
"""Text, and if wanted a first frame or audio, to a video of a person speaking, with audio."""

from typing import Any

import PIL.Image
import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import GemmaTokenizer, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .media import AudioInput, ImageInput, load_images
from .pipeline_base import (
    FRAME_RATE,
    MAX_SEQUENCE_LENGTH,
    Generators,
    MagiHumanPipeline,
    MagiHumanPipelineOutput,
    StepCallback,
    check_forms,
    check_lengths,
    check_numbers,
    check_tensor,
    count_audio_latents,
    load_audios,
    repeat,
)
from .transformer_magihuman import MagiHumanTransformer3DModel


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> import diffusers_magihuman
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers_magihuman import export_to_mp4

        >>> dtype = {"default": torch.bfloat16, "audio_vae": torch.float32}
        >>> pipe = DiffusionPipeline.from_pretrained("owner/magihuman-distill", dtype=dtype).to("cuda")
        >>> out = pipe(prompt, image="portrait.png", generator=torch.Generator("cuda").manual_seed(42))
        >>> export_to_mp4(out.frames[0], "out.mp4", audio=out.audio[0])
        ```
"""


class MagiHumanAudioVideoPipeline(MagiHumanPipeline):
    r"""
    Pipeline of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986): text to video with audio, optionally
    from a first frame, given audio, or both.

    Args:
        tokenizer, text_encoder, transformer, scheduler, vae, audio_vae: See [`MagiHumanPipeline`].
        is_distilled (`bool`, defaults to `False`): Whether the defaults are 8 steps without guidance.
        default_height, default_width (`int`, defaults to 256 and 448): Size in pixels when a call names none.
        default_num_frames (`int`, defaults to 126): Length when a call gives neither a length nor audio.
        default_guidance_scale (`float`, *optional*): Guidance when a call names none; 5, or 1 when distilled.
    """

    original_variants = {"base": {"is_distilled": False}, "distill": {"is_distilled": True}}

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: T5GemmaEncoderModel,
        transformer: MagiHumanTransformer3DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKLMagiHumanTurbo | AutoencoderKLWan,
        audio_vae: AutoencoderOobleck,
        is_distilled: bool = False,
        default_height: int = 256,
        default_width: int = 448,
        default_num_frames: int = 126,
        default_guidance_scale: float | None = None,
    ) -> None:
        super().__init__(tokenizer, text_encoder, transformer, scheduler, vae, audio_vae)
        self.register_to_config(
            is_distilled=is_distilled,
            default_height=default_height,
            default_width=default_width,
            default_num_frames=default_num_frames,
            default_guidance_scale=default_guidance_scale,
        )

    def check_inputs(
        self,
        *,
        images: list[PIL.Image.Image] | None,
        audio: list[torch.Tensor] | None,
        height: int,
        width: int,
        num_frames: int,
        num_videos_per_prompt: int,
        low_noise_guidance_scale: float | None,
        generator: Generators,
        latents: torch.Tensor | None,
        audio_latents: torch.Tensor | None,
        image_latents: torch.Tensor | None,
        conditioning_audio_latents: torch.Tensor | None,
        **shared: Any,
    ) -> int:
        """
        Checks everything before any model runs; [`MagiHumanPipeline.check_inputs`] takes `shared`. Raises a
        `ValueError` that names the argument, its value and what is allowed. Returns the number of prompts.
        """
        check_numbers(num_frames=num_frames, num_videos_per_prompt=num_videos_per_prompt)
        check_numbers(guidance_scale=self.guidance_scale, audio_guidance_scale=self.audio_guidance_scale)
        if low_noise_guidance_scale is not None:
            check_numbers(low_noise_guidance_scale=low_noise_guidance_scale)
        encodes = [name for name, items in (("vae", images), ("audio_vae", audio)) if items is not None]
        num_prompts = super().check_inputs(
            height=height, width=width, encodes=encodes, decodes=("vae", "audio_vae"), **shared
        )
        batch_size = num_prompts * num_videos_per_prompt
        shape, audio_shape = self.latent_shapes(batch_size, num_frames, height, width)
        for name, tensor, allowed in (
            ("latents", latents, shape),
            ("audio_latents", audio_latents, audio_shape),
            ("image_latents", image_latents, (None, shape[1], 1, *shape[3:])),
            ("conditioning_audio_latents", conditioning_audio_latents, (None, *audio_shape[1:])),
        ):
            if tensor is not None:
                check_tensor(name, tensor, allowed)
        forms = {"conditioning_audio_latents": conditioning_audio_latents, "audio": audio}
        check_forms(False, image=images, image_latents=image_latents)
        check_forms(False, **forms, audio_latents=audio_latents)
        check_lengths(num_prompts, batch_size, generator, image=images, image_latents=image_latents, **forms)
        return num_prompts

    def prepare_latents(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        generator: Generators,
        device: torch.device,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws the initial noise, the audio's before the video's as the original does, unless it is given.

        Returns:
            `tuple`: Float32 latents of the video `(batch_size, channels, latent_frames, latent_height, latent_width)`
            and of the audio `(batch_size, num_frames, audio_channels)`; height and width are in pixels.
        """
        shape, audio_shape = self.latent_shapes(batch_size, num_frames, height, width)
        if audio_latents is None:
            audio_latents = randn_tensor(audio_shape, generator=generator, device=device, dtype=torch.float32)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32), audio_latents.to(device, torch.float32)

    def _default_num_frames(
        self, audio: list[torch.Tensor] | None, conditioning_audio_latents: torch.Tensor | None
    ) -> int:
        if conditioning_audio_latents is not None:
            return conditioning_audio_latents.shape[1]
        if audio is None:
            return self.config.default_num_frames
        lengths = {count_audio_latents(item.shape[1], self.audio_hop_length) for item in audio}
        if len(lengths) > 1 or min(lengths) < 1:
            raise ValueError(
                f"`audio` lasts {sorted(lengths)} frames of 1/{FRAME_RATE} s; without `num_frames` it must last one or"
                " more, all items of a list the same."
            )
        return lengths.pop()

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | list[ImageInput] | None = None,
        audio: AudioInput | list[AudioInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        audio_guidance_scale: float | None = None,
        low_noise_guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        conditioning_audio_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    ) -> MagiHumanPipelineOutput | tuple:
        r"""
        Generates videos with audio.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to show and to say: a description of 150 to 200 words, then
                `Dialogue:` and `Background Sound:`.
            negative_prompt (`str` or `list[str]`, *optional*): What to steer away from, with guidance only; by default
                faults of the picture, of the audio and of the delivery.
            image (path, PIL image, array, tensor or a list of these, *optional*): First frame, one for all or one for
                each prompt; cropped at the centre to the aspect of the video.
            audio (path, `(waveform, sampling_rate)` or a list of these, *optional*): Drives the video and stays as
                given, one for all or one for each prompt; `(num_samples,)` or `(channels, num_samples)`.
            height, width (`int`, *optional*): Size in pixels, multiples of 32. Default to the model's, 256 and 448.
            num_frames (`int`, *optional*): Length at 25 frames a second; the audio gets exactly this length, cut or
                padded with silence if given, the video the nearest `4 * k + 1` frames below. Defaults to the length of
                `audio`, or the model's, 126.
            num_inference_steps (`int`, *optional*): Defaults to 32, or 8 when distilled.
            guidance_scale, audio_guidance_scale (`float`, *optional*): Guidance of video and audio, off at 1 for both.
                Default to 5.0, or 1.0 when distilled.
            low_noise_guidance_scale (`float`, *optional*): Guidance of the video in the lower half of the timesteps.
                Defaults to 2.0 or less, `guidance_scale`.
            num_videos_per_prompt (`int`, defaults to 1): Videos for each prompt.
            generator (`torch.Generator` or a list, one for each video, *optional*): Makes the result deterministic.
            latents, audio_latents (`torch.Tensor`, *optional*): Initial noise of video `(batch_size, channels,
                latent_frames, latent_height, latent_width)` and audio `(batch_size, num_frames, channels)`.
            image_latents, conditioning_audio_latents (`torch.Tensor`, *optional*): Normalised latents in place of
                `image` `(num_items, channels, 1, latent_height, latent_width)` and of `audio`
                `(num_items, num_frames, channels)`.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(num_prompts, length, channels)`,
                *optional*): Embeddings in place of the prompts, see [`~MagiHumanPipeline.encode_prompt`].
            prompt_embeds_mask, negative_prompt_embeds_mask (`torch.Tensor` of shape `(num_prompts, length)`,
                *optional*): True for real tokens; padding may stand on either side.
            output_type (`str`, defaults to `"np"`): `"np"`, `"pt"`, `"pil"`, `"latent"`, or `"stream"` for frames that
                are decoded as they are consumed, for example by [`export_to_mp4`].
            return_dict (`bool`, defaults to `True`): Whether to return a [`MagiHumanPipelineOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*): `scale` sets the scale of LoRA layers.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)`; may
                return a `dict` of tensors that it changed.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Tensors that it is given.
            max_sequence_length (`int`, defaults to 640): Text tokens used.

        Examples:

        Returns:
            [`MagiHumanPipelineOutput`] or `tuple`: Frames and audio.

        Raises:
            `ValueError`: An argument is wrong; raised before any model runs.
            `OSError`: `image` or `audio` cannot be read.
        """
        # 1. Fill in defaults and read files
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        default_steps, default_scale = (8, 1.0) if self.config.is_distilled else (32, 5.0)
        if self.config.default_guidance_scale is not None:
            default_scale = self.config.default_guidance_scale
        num_inference_steps = default_steps if num_inference_steps is None else num_inference_steps
        height = self.config.default_height if height is None else height
        width = self.config.default_width if width is None else width
        self._guidance_scale = default_scale if guidance_scale is None else guidance_scale
        self._audio_guidance_scale = default_scale if audio_guidance_scale is None else audio_guidance_scale
        self._attention_kwargs, self._current_timestep, self._interrupt = attention_kwargs, None, False
        images = None if image is None else load_images(image)
        audio = None if audio is None else load_audios(audio, self.audio_vae_sampling_rate)[0]
        if num_frames is None:
            num_frames = self._default_num_frames(audio, conditioning_audio_latents)

        # 2. Check everything before a model runs
        prompts = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "prompt_embeds_mask": prompt_embeds_mask,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_embeds_mask": negative_prompt_embeds_mask,
            "max_sequence_length": max_sequence_length,
        }
        num_prompts = self.check_inputs(
            images=images,
            audio=audio,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
            low_noise_guidance_scale=low_noise_guidance_scale,
            generator=generator,
            latents=latents,
            audio_latents=audio_latents,
            image_latents=image_latents,
            conditioning_audio_latents=conditioning_audio_latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            **prompts,
        )
        batch_size, device = num_prompts * num_videos_per_prompt, self._execution_device

        # 3. Encode the text
        text = self.encode_prompt(
            **prompts,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            device=device,
        )

        # 4. Encode the first frame and the given audio
        if images is not None:
            image_latents = self.encode_image(images, height, width, device)
        if image_latents is not None:
            image_latents = repeat(image_latents.to(device, torch.float32), batch_size)
        if audio is not None:
            conditioning_audio_latents = self.encode_audio(repeat(audio, batch_size), generator, device, num_frames)
        if conditioning_audio_latents is not None:
            audio_latents = repeat(conditioning_audio_latents, batch_size)

        # 5. Draw the noise
        latents, audio_latents = self.prepare_latents(
            batch_size, num_frames, height, width, generator, device, latents, audio_latents
        )

        # 6. Denoise; given audio stays as it is
        def guidance_at(timestep: torch.Tensor) -> float:
            if timestep > 0.5 * self.scheduler.config.num_train_timesteps:
                return self.guidance_scale
            return min(2.0, self.guidance_scale) if low_noise_guidance_scale is None else low_noise_guidance_scale

        latents, audio_latents = self.denoise(
            latents,
            audio_latents,
            text,
            num_inference_steps,
            guidance_at,
            generator,
            image_latents=image_latents,
            moves_audio=conditioning_audio_latents is None,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 7. Decode
        frames, audio = latents, audio_latents
        if output_type != "latent":
            frames = self.decode_latents(latents, output_type)
            audio = self.decode_audio(audio_latents, output_type)
        self.maybe_free_model_hooks()
        return MagiHumanPipelineOutput(frames=frames, audio=audio) if return_dict else (frames, audio)
