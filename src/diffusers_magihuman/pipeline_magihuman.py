# SPDX-License-Identifier: Apache-2.0
"""Text, and if wanted a first frame or audio, to a video of a person speaking, with audio."""

import inspect
from typing import Any

import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import GemmaTokenizer, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .checks import check_choice, check_tensor
from .constants import FRAME_RATE
from .denoising import scale_at
from .media import AudioInput, ImageInput, load_images
from .pipeline_base import (
    MAX_SEQUENCE_LENGTH,
    Generators,
    Inputs,
    MagiHumanPipeline,
    MagiHumanPipelineOutput,
    StepCallback,
    check_forms,
    check_generators,
    check_lengths,
    check_numbers,
    check_tensors,
    count_audio_latents,
    latent_shapes,
    load_audios,
    one_at_a_time,
    pass_audio,
    repeat,
)
from .prompts import count_words
from .transformer_magihuman import MagiHumanTransformer3DModel

logger = logging.get_logger(__name__)


def prepare_latents(
    pipe: Any,
    batch_size: int,
    num_frames: int,
    height: int,
    width: int,
    generator: Generators,
    device: torch.device,
    latents: Tensor | None = None,
    audio_latents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws the initial noise, the audio's before the video's as the original does, unless it is given: float32
    latents of the video `(batch_size, channels, latent_frames, latent_height, latent_width)` and of the audio
    `(batch_size, num_frames, audio_channels)`; height and width are in pixels."""
    shape, audio_shape = latent_shapes(pipe, batch_size, num_frames, height, width)
    check_tensors(locals(), latents=shape, audio_latents=audio_shape)
    check_generators(generator, batch_size, device)
    if audio_latents is None:
        audio_latents = randn_tensor(audio_shape, generator=generator, device=device, dtype=torch.float32)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    return latents.to(device, torch.float32), audio_latents.to(device, torch.float32)


def count_frames(pipe: Any, audio: list[Tensor] | None, conditioning_audio_latents: Tensor | None) -> int | None:
    """The length that given audio sets, in latents or samples, if a call names none."""
    if conditioning_audio_latents is not None:
        check_tensor("conditioning_audio_latents", conditioning_audio_latents, (None, None, None))
        return conditioning_audio_latents.shape[1]
    if audio is None:
        return None
    lengths = sorted({count_audio_latents(item.shape[1], pipe.audio_hop_length) for item in audio})
    if len(lengths) > 1 or lengths[0] < 1:
        allowed = f"without `num_frames` all must last the same, 1/{FRAME_RATE} s or more"
        raise ValueError(f"`audio` lasts {lengths} frames; {allowed}.")
    return lengths[0]


class MagiHumanAudioVideoPipeline(MagiHumanPipeline):
    r"""Pipeline of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986): text to video with audio, optionally
    from a first frame, given audio, or both.

    Args:
        tokenizer, text_encoder, transformer, scheduler, vae, audio_vae: See [`MagiHumanPipeline`].
        is_distilled (`bool`, defaults to `False`): Whether the defaults are 8 steps without guidance.
        default_height, default_width (`int`, defaults to 256 and 448): Size in pixels when a call names none.
        default_num_frames (`int`, defaults to 126): Length when a call gives neither a length nor audio.
        default_guidance_scale (`float`, *optional*): Guidance when a call names none; 5, or 1 when distilled.
    """

    original_variants = {"base": {"is_distilled": False}, "distilled": {"is_distilled": True}}

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
        check_choice("is_distilled", is_distilled, True, False)
        check_numbers(locals(), "default_guidance_scale")
        super().__init__(tokenizer, text_encoder, transformer, scheduler, vae, audio_vae)
        self.register_to_config(is_distilled=is_distilled, default_height=default_height, default_width=default_width)
        self.register_to_config(default_num_frames=default_num_frames, default_guidance_scale=default_guidance_scale)

    def check_inputs(self, inputs: Inputs) -> int:
        """Checks all arguments, see [`MagiHumanPipeline.check_inputs`]. Returns the number of prompts."""
        num_prompts = super().check_inputs(inputs)
        batch_size = num_prompts * inputs["num_videos_per_prompt"]
        size = (inputs[name] for name in ("num_frames", "height", "width"))
        shape, audio_shape = self.latent_shapes(batch_size, *size)
        check_tensors(inputs, latents=shape, image_latents=(None, shape[1], 1, *shape[3:]))
        check_tensors(inputs, audio_latents=audio_shape, conditioning_audio_latents=(None, *audio_shape[1:]))
        check_forms(inputs, "conditioning_audio_latents", "audio", "audio_latents")
        items = ("image", "image_latents", "audio", "conditioning_audio_latents")
        check_lengths(self, inputs, *items, num_prompts=num_prompts, batch_size=batch_size)
        texts = [inputs["prompt"]] if isinstance(inputs["prompt"], str) else inputs["prompt"] or []
        # The tiny models know short prompts.
        if self.transformer.config.num_layers >= 40 and (short := min(map(count_words, texts), default=60)) < 60:
            wanted = "the models were trained on 150 to 200, and fewer than 60 give blur and ghosting"
            logger.warning(f"The description in the prompt has {short} words; {wanted}.")
        return num_prompts

    prepare_latents = prepare_latents

    @one_at_a_time
    @torch.no_grad()
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
        latents: Tensor | None = None,
        audio_latents: Tensor | None = None,
        image_latents: Tensor | None = None,
        conditioning_audio_latents: Tensor | None = None,
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
        r"""Generates videos with audio.

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
            >>> pipe = DiffusionPipeline.from_pretrained("owner/magihuman-distilled", dtype=dtype).to("cuda")
            >>> out = pipe(prompt, image="portrait.png", generator=torch.Generator("cuda").manual_seed(42))
            >>> export_to_mp4(out.frames[0], "out.mp4", audio=out.audio[0])
            ```

        Returns:
            [`MagiHumanPipelineOutput`] or `tuple`: Frames and audio.

        Raises:
            `ValueError`: An argument is wrong; raised before any model runs.
            `OSError`: `image` or `audio` cannot be read.
        """
        # 1. Fill in defaults and read files
        inputs = dict(locals())
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
        if audio is not None:
            audio, passed_audio = load_audios(audio, self.audio_vae_sampling_rate, self.audio_sampling_rate)
        if num_frames is None:
            num_frames = count_frames(self, audio, conditioning_audio_latents)
            num_frames = self.config.default_num_frames if num_frames is None else num_frames

        # 2. Check everything before a model runs
        # A callback of Diffusers names its tensors itself.
        step_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        inputs |= {"image": images, "audio": audio, "height": height, "width": width, "num_frames": num_frames}
        inputs |= {"num_inference_steps": num_inference_steps, "callback_on_step_end_tensor_inputs": step_inputs}
        inputs |= {"guidance_scale": self.guidance_scale, "audio_guidance_scale": self.audio_guidance_scale}
        batch_size, device = self.check_inputs(inputs) * num_videos_per_prompt, self._execution_device

        # 3. Encode the text
        is_guided = self.do_classifier_free_guidance
        prompts = {name: inputs[name] for name in inspect.signature(self.encode_prompt).parameters if name in inputs}
        text = self.encode_prompt(**prompts, do_classifier_free_guidance=is_guided, device=device)

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
        def guidance_at(timestep: Tensor) -> float:
            middle = 0.5 * self.scheduler.config.num_train_timesteps
            return scale_at(timestep, middle, self.guidance_scale, low_noise_guidance_scale)

        options = {"image_latents": image_latents, "moves_audio": conditioning_audio_latents is None}
        on_step_end = callback_on_step_end, step_inputs
        latents, audio_latents = self.denoise(
            latents, audio_latents, text, num_inference_steps, guidance_at, generator, on_step_end, **options
        )

        # 7. Decode; given audio comes out as it went in
        frames, output_audio = latents, audio_latents
        if output_type != "latent":
            frames = self.decode_latents(latents, output_type)
            if audio is None:
                output_audio = self.decode_audio(audio_latents, output_type)
            else:
                output_audio = pass_audio(self, passed_audio, batch_size, num_frames, output_type)
        self.maybe_free_model_hooks()
        return MagiHumanPipelineOutput(frames=frames, audio=output_audio) if return_dict else (frames, output_audio)
