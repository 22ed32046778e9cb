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
"""Text, and if wanted a portrait or a voice, to a video of a person speaking, with sound."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import GemmaTokenizer, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .lora import MagiHumanLoraLoaderMixin
from .media import AudioInput, ImageInput, load_audio, load_images
from .pipeline_components import (
    FRAME_RATE,
    MAX_SEQUENCE_LENGTH,
    MagiHumanComponentsMixin,
    check_at_most_one,
    check_tensor,
)
from .pipeline_output import MagiHumanPipelineOutput
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


class MagiHumanAudioVideoPipeline(MagiHumanComponentsMixin, DiffusionPipeline, MagiHumanLoraLoaderMixin):
    r"""
    Pipeline of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986): text to video with sound, optionally
    from a first frame, a given sound, or both.

    Any component may be `None` in calls that do not need it, for example `text_encoder` when embeddings are given or
    the autoencoders with `output_type="latent"`.

    Args:
        tokenizer (`GemmaTokenizer`): Tokenizer of the text encoder.
        text_encoder (`T5GemmaEncoderModel`): The encoder of T5Gemma 9B.
        transformer ([`MagiHumanTransformer3DModel`]): Predicts the velocity of video and audio latents together.
        scheduler ([`MagiHumanFlowScheduler`]):
            Noise levels and solver. Video and audio each get a copy. Any flow scheduler of Diffusers may replace it.
        vae ([`AutoencoderKLMagiHumanTurbo`] or `AutoencoderKLWan`): Autoencoder of Wan 2.2 video latents.
        audio_vae (`AutoencoderOobleck`): Autoencoder of 25 sound latents a second. The original runs it in float32.
        is_distilled (`bool`, defaults to `False`): Whether the defaults are 8 steps without guidance.
        default_height, default_width (`int`, defaults to 256 and 448): Size in pixels when a call names none.
        default_num_frames (`int`, defaults to 126): Length when a call gives neither a length nor a sound.
        default_guidance_scale (`float`, *optional*): Guidance when a call names none; 5, or 1 when distilled.
    """

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
        super().__init__()
        self.register_components(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            audio_vae=audio_vae,
        )
        self.register_to_config(
            is_distilled=is_distilled,
            default_height=default_height,
            default_width=default_width,
            default_num_frames=default_num_frames,
            default_guidance_scale=default_guidance_scale,
        )

    @classmethod
    def from_original(
        cls,
        path_or_repo: str = "GAIR/daVinci-MagiHuman",
        variant: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **kwargs: Any,
    ) -> "MagiHumanAudioVideoPipeline":
        """
        Puts the pipeline together from the original's repositories, or local copies, as they are published.

        Args:
            path_or_repo (`str`): Directory, file or repository of the transformer in any published layout.
            variant (`str`, *optional*): `"base"` or `"distill"`, guessed from the path when it names just one.
            dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all but the float32 parts.
            kwargs: `subfolder`, `text_encoder`, `audio_vae`, `video_vae`, `turbo_vae` and arguments of the downloads,
                see [`~checkpoints.load_original_components`].

        Raises:
            `ValueError`: The variant is not one of this pipeline, cannot be guessed, or tensors do not fit.
            `OSError`: A repository is missing, or gated: it is named with the page where access is granted.
        """
        # Absolute and here: the file that repositories carry for users without the package cannot convert.
        from diffusers_magihuman.checkpoints import guess_variant, load_original_components

        variant = variant or guess_variant(path_or_repo, kwargs.get("subfolder"))
        if variant not in ("base", "distill"):
            raise ValueError(f"`variant`={variant!r} must be 'base' or 'distill'.")
        components = load_original_components(path_or_repo, variant, dtype, **kwargs)
        return cls(**components, is_distilled=variant == "distill")

    @property
    def audio_guidance_scale(self) -> float:
        return self._audio_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 or self._audio_guidance_scale > 1

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        images: list[PIL.Image.Image] | None,
        waveforms: list[torch.Tensor] | None,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        num_videos_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        audio_latents: torch.Tensor | None,
        image_latents: torch.Tensor | None,
        conditioning_audio_latents: torch.Tensor | None,
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
            `int`: Number of prompts.

        Raises:
            `ValueError`: Names the argument, its value and what is allowed.
        """
        counts = {
            "num_frames": num_frames,
            "num_inference_steps": num_inference_steps,
            "num_videos_per_prompt": num_videos_per_prompt,
        }
        self.check_settings(
            height, width, counts, output_type, callback_on_step_end_tensor_inputs, max_sequence_length
        )
        decoders = () if output_type == "latent" else ("vae", "audio_vae")
        self.check_components(prompt, negative_prompt_embeds, decoders)
        num_prompts = self.check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        batch_size = num_prompts * num_videos_per_prompt

        shape, audio_shape = self._latent_shapes(batch_size, num_frames, height, width)
        for name, tensor, allowed in (
            ("latents", latents, shape),
            ("audio_latents", audio_latents, audio_shape),
            ("image_latents", image_latents, (None, shape[1], 1, *shape[3:])),
            ("conditioning_audio_latents", conditioning_audio_latents, (None, *audio_shape[1:])),
        ):
            if tensor is not None:
                check_tensor(name, tensor, allowed)
        self.check_lengths(
            num_prompts,
            batch_size,
            generator,
            image=images,
            audio=waveforms,
            image_latents=image_latents,
            conditioning_audio_latents=conditioning_audio_latents,
        )
        return num_prompts

    def prepare_latents(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws the initial noise, the sound's before the video's as the original does, unless it is given.

        Args:
            batch_size (`int`): Number of videos.
            num_frames (`int`): Frames of the video, and latents of the sound.
            height, width (`int`): Size of the video in pixels.
            generator (`torch.Generator` or a list of them, *optional*): Draws the noise.
            device (`torch.device`): Where the latents go.
            latents, audio_latents (`torch.Tensor`, *optional*): Latents to use as they are.

        Returns:
            `tuple`: Float32 latents of the video `(batch_size, channels, latent_frames, latent_height, latent_width)`
            and of the sound `(batch_size, num_frames, audio_channels)`.
        """
        shape, audio_shape = self._latent_shapes(batch_size, num_frames, height, width)
        if audio_latents is None:
            audio_latents = randn_tensor(audio_shape, generator=generator, device=device, dtype=torch.float32)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32), audio_latents.to(device, torch.float32)

    def _latent_shapes(
        self, batch_size: int, num_frames: int, height: int, width: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        size = height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial
        config = self.transformer.config
        return (batch_size, config.in_channels, frames, *size), (batch_size, num_frames, config.audio_in_channels)

    def _default_num_frames(
        self, waveforms: list[torch.Tensor] | None, conditioning_audio_latents: torch.Tensor | None
    ) -> int:
        if conditioning_audio_latents is not None:
            return conditioning_audio_latents.shape[1]
        if waveforms is None:
            return self.config.default_num_frames
        lengths = {self._num_audio_latents(waveform) for waveform in waveforms}
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
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    ) -> MagiHumanPipelineOutput | tuple:
        r"""
        Generates videos with sound.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to show and to say: a description of 150 to 200 words, then `Dialogue:` and `Background Sound:`.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, with guidance only. The default covers faults of the picture, of the sound and
                of the delivery.
            image (path, PIL image, array, tensor or a list of these, *optional*):
                First frame, one for all or one for each prompt; cropped at the centre to the aspect of the video.
            audio (path, `(waveform, sampling_rate)` or a list of these, *optional*):
                Sound that drives the video, one for all or one for each prompt; it stays as given. A waveform has
                shape `(num_samples,)` or `(channels, num_samples)`.
            height, width (`int`, *optional*): Size in pixels, multiples of 32. Default to the model's, 256 and 448.
            num_frames (`int`, *optional*):
                Length at 25 frames a second; the sound gets exactly this length, the video the nearest `4 * k + 1`
                frames below. Defaults to the length of `audio`, or the model's, 126. `audio` is cut or padded with
                silence to it.
            num_inference_steps (`int`, *optional*): Defaults to 32, or 8 when distilled.
            guidance_scale, audio_guidance_scale (`float`, *optional*):
                Guidance of video and sound, off at 1 for both. Default to 5.0, or 1.0 when distilled.
            low_noise_guidance_scale (`float`, *optional*):
                Guidance of the video in the lower half of the timesteps. Defaults to 2.0 or less, `guidance_scale`.
            num_videos_per_prompt (`int`, defaults to 1): Videos for each prompt.
            generator (`torch.Generator` or a list, one for each video, *optional*): Makes the result deterministic.
            latents (`torch.Tensor` of shape `(batch_size, channels, latent_frames, latent_height, latent_width)`,
                *optional*): Initial noise of the video.
            audio_latents (`torch.Tensor` of shape `(batch_size, num_frames, channels)`, *optional*): Initial noise of
                the sound.
            image_latents, conditioning_audio_latents (`torch.Tensor`, *optional*):
                Normalised latents in place of `image` `(num_items, channels, 1, latent_height, latent_width)` and of
                `audio` `(num_items, num_frames, channels)`.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(num_prompts, length, channels)`,
                *optional*): Embeddings in place of the prompts, see [`~MagiHumanAudioVideoPipeline.encode_prompt`].
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
            [`MagiHumanPipelineOutput`] or `tuple`: Frames and sound.

        Raises:
            `ValueError`: An argument is wrong; raised before any model runs.
            `OSError`: `image` or `audio` cannot be read.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Fill in defaults, read files, check everything
        default_steps, default_scale = (8, 1.0) if self.config.is_distilled else (32, 5.0)
        if self.config.default_guidance_scale is not None:
            default_scale = self.config.default_guidance_scale
        num_inference_steps = default_steps if num_inference_steps is None else num_inference_steps
        height = self.config.default_height if height is None else height
        width = self.config.default_width if width is None else width
        self._guidance_scale = default_scale if guidance_scale is None else guidance_scale
        self._audio_guidance_scale = default_scale if audio_guidance_scale is None else audio_guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        check_at_most_one(image=image, image_latents=image_latents)
        check_at_most_one(
            audio=audio, conditioning_audio_latents=conditioning_audio_latents, audio_latents=audio_latents
        )
        self.check_conditions(image=image, audio=audio)
        images = None if image is None else load_images(image)
        sounds = audio if isinstance(audio, list) else [audio]
        waveforms = None if audio is None else [load_audio(item, self.audio_vae_sampling_rate) for item in sounds]
        if num_frames is None:
            num_frames = self._default_num_frames(waveforms, conditioning_audio_latents)
        num_prompts = self.check_inputs(
            prompt,
            negative_prompt,
            images,
            waveforms,
            height,
            width,
            num_frames,
            num_inference_steps,
            num_videos_per_prompt,
            generator,
            latents,
            audio_latents,
            image_latents,
            conditioning_audio_latents,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            output_type,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
        )
        batch_size = num_prompts * num_videos_per_prompt
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

        # 3. Encode the first frame and the given sound
        if images is not None:
            image_latents = self.encode_image(images, height, width, device)
        if image_latents is not None:
            image_latents = image_latents.to(device, torch.float32)
            image_latents = image_latents.repeat_interleave(batch_size // len(image_latents), dim=0)
        if waveforms is not None:
            conditioning_audio_latents = self.encode_sounds(waveforms, num_frames, batch_size, generator, device)
        audio_is_given = conditioning_audio_latents is not None
        if audio_is_given:
            repeats = batch_size // len(conditioning_audio_latents)
            audio_latents = conditioning_audio_latents.repeat_interleave(repeats, dim=0)

        # 4. Draw the noise
        latents, audio_latents = self.prepare_latents(
            batch_size, num_frames, height, width, generator, device, latents, audio_latents
        )

        # 5. Set the noise levels; both solvers keep a state of their own, and the component keeps its own
        scheduler, audio_scheduler = copy.deepcopy(self.scheduler), copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=device)
        audio_scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        # 6. Denoise
        attention_inputs = {}
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                if image_latents is not None:
                    latents = torch.cat([image_latents, latents[:, :, 1:]], dim=2)

                scale = self.guidance_scale
                if t <= 0.5 * scheduler.config.num_train_timesteps:
                    scale = min(2.0, scale) if low_noise_guidance_scale is None else low_noise_guidance_scale
                guided = self.do_classifier_free_guidance and negative_prompt_embeds is not None
                velocity, audio_velocity = self.predict_velocity(
                    latents,
                    audio_latents,
                    (prompt_embeds, prompt_embeds_mask),
                    (negative_prompt_embeds, negative_prompt_embeds_mask) if guided else None,
                    scale,
                    self.audio_guidance_scale,
                    attention_inputs,
                    i,
                    float(scheduler.sigmas[i]),
                )
                latents = scheduler.step(velocity, t, latents, **step_kwargs, return_dict=False)[0]
                if not audio_is_given:
                    audio_latents = audio_scheduler.step(
                        audio_velocity, t, audio_latents, **step_kwargs, return_dict=False
                    )[0]

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

        # 7. Decode
        frames, audio = latents, audio_latents
        if output_type != "latent":
            frames = self.decode_latents(latents, output_type)
            audio = self.decode_audio(audio_latents, output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return frames, audio
        return MagiHumanPipelineOutput(frames=frames, audio=audio)
