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
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, AutoencoderOobleck, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch.nn.utils.rnn import pad_sequence
from transformers import GemmaTokenizer, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .lora import MagiHumanLoraLoaderMixin
from .media import AudioInput, ImageInput, crop_to_aspect, load_audio, load_images, resample_audio
from .pipeline_output import MagiHumanPipelineOutput, RegisteredComponentsMixin
from .transformer_magihuman import MagiHumanTransformer3DModel


logger = logging.get_logger(__name__)

FRAME_RATE = 25  # frames, and audio latents, a second
DEFAULT_NUM_FRAMES = 126
MAX_SEQUENCE_LENGTH = 640
AUDIO_WINDOW_SECONDS = 29
OUTPUT_TYPES = ("latent", "pt", "np", "pil")

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
    """Raises a `ValueError` unless the tensor is finite and of the shape; `None` allows any size."""
    allowed = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if tensor.ndim != len(shape) or any(
        size not in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but must have shape {allowed}.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"`{name}` holds NaN or infinite values; all of them must be finite.")


class MagiHumanAudioVideoPipeline(RegisteredComponentsMixin, DiffusionPipeline, MagiHumanLoraLoaderMixin):
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
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae"
    _callback_tensor_inputs = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: T5GemmaEncoderModel,
        transformer: MagiHumanTransformer3DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKLMagiHumanTurbo | AutoencoderKLWan,
        audio_vae: AutoencoderOobleck,
        is_distilled: bool = False,
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
        self.register_to_config(is_distilled=is_distilled)

        # `AutoencoderKLWan` and the published Turbo VAE name the same ratio differently.
        self.vae_scale_factor_temporal = 4
        self.vae_scale_factor_spatial = 16
        if vae is not None:
            config = vae.config
            self.vae_scale_factor_temporal = config.get("scale_factor_temporal") or config.temporal_compression_ratio
            self.vae_scale_factor_spatial = vae.spatial_compression_ratio
        self.audio_sampling_rate = audio_vae.config.sampling_rate if audio_vae is not None else 44100
        self.audio_hop_length = audio_vae.hop_length if audio_vae is not None else 2048
        # The autoencoder runs on sound of 25 latents a second (51200 Hz), and is declared at the rate of the output.
        self.audio_vae_sampling_rate = self.audio_hop_length * FRAME_RATE
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

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
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def audio_guidance_scale(self) -> float:
        return self._audio_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 or self._audio_guidance_scale > 1

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
        image: ImageInput | list[ImageInput] | None,
        image_latents: torch.Tensor | None,
        audio: AudioInput | list[AudioInput] | None,
        conditioning_audio_latents: torch.Tensor | None,
        audio_latents: torch.Tensor | None,
    ) -> None:
        """Raises a `ValueError` for conditions that exclude each other or need a component that is not loaded."""
        sound_is_given = audio is not None or conditioning_audio_latents is not None
        for name, is_given, other, other_is_given in (
            ("image", image is not None, "image_latents", image_latents is not None),
            ("audio", audio is not None, "conditioning_audio_latents", conditioning_audio_latents is not None),
            ("audio_latents", audio_latents is not None, "given sound", sound_is_given),
        ):
            if is_given and other_is_given:
                raise ValueError(f"At most one of `{name}` and `{other}` may be given.")
        for item in audio if isinstance(audio, list) else [audio]:
            if isinstance(item, (np.ndarray, torch.Tensor)):
                raise ValueError(
                    "`audio` is a waveform without its rate; it must be a tuple (waveform, sampling_rate)."
                )
        for name, condition, component in (("image", image, "vae"), ("audio", audio, "audio_vae")):
            if condition is not None and getattr(self, component) is None:
                raise ValueError(f"`{name}` needs `{component}`, which the pipeline was loaded without.")

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
        multiple = self.vae_scale_factor_spatial * self.transformer.config.patch_size[1]
        for name, size in (("height", height), ("width", width)):
            if not isinstance(size, Integral) or size < multiple or size % multiple:
                raise ValueError(f"`{name}`={size!r} must be a positive multiple of {multiple}.")
        for name, number in (
            ("num_frames", num_frames),
            ("num_inference_steps", num_inference_steps),
            ("num_videos_per_prompt", num_videos_per_prompt),
        ):
            if not isinstance(number, Integral) or number < 1:
                raise ValueError(f"`{name}`={number!r} must be an integer of 1 or more.")
        if not isinstance(max_sequence_length, Integral) or not 1 <= max_sequence_length <= MAX_SEQUENCE_LENGTH:
            raise ValueError(f"`max_sequence_length`={max_sequence_length!r} must be in 1 to {MAX_SEQUENCE_LENGTH}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type`={output_type!r} must be one of {OUTPUT_TYPES}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, allowed are {self._callback_tensor_inputs}."
            )
        self._check_components(prompt, negative_prompt_embeds, output_type)

        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        masks = {"prompt_embeds": prompt_embeds_mask, "negative_prompt_embeds": negative_prompt_embeds_mask}
        num_prompts = self._check_prompts(prompt, negative_prompt, embeds, masks)
        batch_size = num_prompts * num_videos_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but must have {batch_size}, one for each video."
            )

        shape, audio_shape = self._latent_shapes(batch_size, num_frames, height, width)
        for name, tensor, allowed in (
            ("latents", latents, shape),
            ("audio_latents", audio_latents, audio_shape),
            ("image_latents", image_latents, (None, shape[1], 1, *shape[3:])),
            ("conditioning_audio_latents", conditioning_audio_latents, (None, *audio_shape[1:])),
        ):
            if tensor is not None:
                check_tensor(name, tensor, allowed)
        for name, items in (
            ("image", images),
            ("audio", waveforms),
            ("image_latents", image_latents),
            ("conditioning_audio_latents", conditioning_audio_latents),
        ):
            if items is not None and len(items) not in (1, num_prompts, batch_size):
                raise ValueError(
                    f"`{name}` has {len(items)} items, but must have 1, one for each prompt ({num_prompts}) or one for"
                    f" each video ({batch_size})."
                )
        return num_prompts

    def _check_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: dict[str, torch.Tensor | None],
        masks: dict[str, torch.Tensor | None],
    ) -> int:
        prompt_embeds, negative_prompt_embeds = embeds.values()
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
        for name, tensor in embeds.items():
            if tensor is not None:
                check_tensor(name, tensor, (num_prompts, None, self.transformer.config.text_in_channels))
            mask, size = masks[name], None if tensor is None else tuple(tensor.shape[:2])
            if mask is not None and tuple(mask.shape) != size:
                raise ValueError(
                    f"`{name}_mask` has shape {tuple(mask.shape)}, but must have the first two sizes of `{name}`,"
                    f" {size}."
                )
        return num_prompts

    def _check_components(
        self, prompt: str | list[str] | None, negative_prompt_embeds: torch.Tensor | None, output_type: str
    ) -> None:
        encodes_text = prompt is not None or (self.do_classifier_free_guidance and negative_prompt_embeds is None)
        needed = dict.fromkeys(("tokenizer", "text_encoder"), encodes_text)
        needed |= dict.fromkeys(("vae", "audio_vae"), output_type != "latent")
        missing = [name for name, is_needed in needed.items() if is_needed and getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"This call needs {missing}, which the pipeline was loaded without. Load them, or pass embeddings"
                " (with guidance also negative ones) instead of prompts and `output_type='latent'`."
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
                raise ValueError(f"The tokenizer finds no token in the prompt {text!r}; at least one is needed.")
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
        latents = self.vae.encode(pixels[:, :, None].to(device, self.vae.dtype)).latent_dist.mode().float()
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

    def predict_velocity(
        self,
        latents: torch.Tensor,
        audio_latents: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor | None],
        negative_text: tuple[torch.Tensor, torch.Tensor | None] | None,
        guidance_scale: float,
        audio_guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity of video and sound; with guidance its two branches run one after the other, each unpadded."""
        velocities = []
        for name, branch in (("cond", text), ("uncond", negative_text)):
            if branch is not None:
                with self.transformer.cache_context(name):
                    velocities.append(
                        self.transformer(
                            latents,
                            audio_latents,
                            encoder_hidden_states=branch[0],
                            encoder_attention_mask=branch[1],
                            attention_kwargs=self.attention_kwargs,
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

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list:
        """Decodes normalised video latents to frames, see [`MagiHumanPipelineOutput`]."""
        mean, inverse_std = self._latents_mean_and_inverse_std(latents.device)
        latents = (latents / inverse_std + mean).to(self.vae.dtype)
        video = self.vae.decode(latents, return_dict=False)[0].float()
        return self.video_processor.postprocess_video(video, output_type=output_type)

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

    def _default_num_frames(
        self, waveforms: list[torch.Tensor] | None, conditioning_audio_latents: torch.Tensor | None
    ) -> int:
        if conditioning_audio_latents is not None:
            return conditioning_audio_latents.shape[1]
        if waveforms is None:
            return DEFAULT_NUM_FRAMES
        lengths = {self._num_audio_latents(waveform) for waveform in waveforms}
        if len(lengths) > 1 or min(lengths) < 1:
            raise ValueError(
                f"`audio` lasts {sorted(lengths)} frames of 1/{FRAME_RATE} s; without `num_frames` it must last one or"
                " more, all items of a list the same."
            )
        return lengths.pop()

    def _fit_waveform(self, waveform: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Cuts sound, or pads it with silence, to a number of latents, unless it has just as many."""
        if self._num_audio_latents(waveform) == num_frames:
            return waveform
        length = num_frames * self.audio_hop_length
        return F.pad(waveform[:, :length], (0, max(length - waveform.shape[1], 0)))

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | list[ImageInput] | None = None,
        audio: AudioInput | list[AudioInput] | None = None,
        height: int = 256,
        width: int = 448,
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
            height, width (`int`, defaults to 256 and 448): Size in pixels, multiples of 32.
            num_frames (`int`, *optional*):
                Length at 25 frames a second; the sound gets exactly this length, the video the nearest `4 * k + 1`
                frames below. Defaults to the length of `audio`, or 126. `audio` is cut or padded with silence to it.
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
            output_type (`str`, defaults to `"np"`): `"np"`, `"pt"`, `"pil"` or `"latent"`.
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
        num_inference_steps = default_steps if num_inference_steps is None else num_inference_steps
        self._guidance_scale = default_scale if guidance_scale is None else guidance_scale
        self._audio_guidance_scale = default_scale if audio_guidance_scale is None else audio_guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        self.check_conditions(image, image_latents, audio, conditioning_audio_latents, audio_latents)
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
            waveforms = [self._fit_waveform(waveform, num_frames) for waveform in waveforms]
            waveforms = [waveform for waveform in waveforms for _ in range(batch_size // len(waveforms))]
            generators = generator if isinstance(generator, list) else [generator] * batch_size
            conditioning_audio_latents = torch.cat(
                [self.encode_audio(*item, device) for item in zip(waveforms, generators, strict=True)]
            )
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
