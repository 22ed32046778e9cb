# SPDX-License-Identifier: Apache-2.0
"""Text, a first frame, audio and video to what the denoising takes."""

from typing import Any

import torch
from diffusers import AutoencoderOobleck
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    BlockState,
    ComponentSpec,
    ConfigSpec,
    ModularPipelineBlocks,
    PipelineState,
)
from transformers import GemmaTokenizer, T5GemmaEncoderModel

from ..autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from ..constants import FRAME_RATE
from ..media import load_images, load_videos
from ..pipeline_base import (
    MAX_SEQUENCE_LENGTH,
    check_lengths,
    check_numbers,
    check_prompts,
    check_vae,
    encode_audio,
    encode_image,
    encode_prompt,
    encode_video,
    load_audios,
    repeat,
)
from ..pipeline_magihuman import count_frames
from ..pipeline_magihuman_latent_upscale import check_source, count_videos, default_size
from .parameters import AUDIO_GUIDER, GUIDANCE_SCALE, GUIDER, UPSCALE_GUIDER, VIDEO_PROCESSOR, gives, takes

Blocks = tuple[Any, PipelineState]

TEXT_COMPONENTS = [ComponentSpec("tokenizer", GemmaTokenizer), ComponentSpec("text_encoder", T5GemmaEncoderModel)]
TEXT = ("prompt_embeds", "prompt_embeds_mask")
NEGATIVE_TEXT = ("negative_prompt_embeds", "negative_prompt_embeds_mask")
VAE, AUDIO_VAE = ComponentSpec("vae", AutoencoderKLMagiHumanTurbo), ComponentSpec("audio_vae", AutoencoderOobleck)
SIZE = [ConfigSpec("default_height", 256), ConfigSpec("default_width", 448)]
UPSCALE_SIZE = [ConfigSpec("default_height", 1088), ConfigSpec("default_width", 1920)]


class MagiHumanTextEncoderStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Encodes each prompt alone, and if a guider needs them negative ones, by default a list of faults."
    expected_components = [*TEXT_COMPONENTS, GUIDER, AUDIO_GUIDER]
    expected_configs = [GUIDANCE_SCALE]
    inputs = takes("prompt", negative_prompt=None, max_sequence_length=MAX_SEQUENCE_LENGTH)
    intermediate_outputs = gives(*TEXT, *NEGATIVE_TEXT)

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        inputs = {name: block_state[name] for name in ("prompt", "negative_prompt", "max_sequence_length")}
        check_prompts(components, inputs | dict.fromkeys((*TEXT, *NEGATIVE_TEXT)))
        is_guided = components.requires_unconditional_embeds
        text = encode_prompt(components, **inputs, do_classifier_free_guidance=is_guided)
        for name, value in zip((*TEXT, *NEGATIVE_TEXT), text, strict=True):
            block_state[name] = value
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanDistilledTextEncoderStep(MagiHumanTextEncoderStep):
    model_name = "magihuman-distilled"
    description = "Encodes each prompt alone."
    expected_components = TEXT_COMPONENTS
    expected_configs = []
    inputs = takes("prompt", max_sequence_length=MAX_SEQUENCE_LENGTH)
    intermediate_outputs = gives(*TEXT)


class MagiHumanUpscaleTextEncoderStep(MagiHumanTextEncoderStep):
    model_name = "magihuman-upscale"
    expected_components = [*TEXT_COMPONENTS, UPSCALE_GUIDER]
    expected_configs = []


def upscaled_size(components: Any, block_state: BlockState) -> tuple[int, int]:
    """Height and width that `latents` are upscaled to."""
    *_, height, width = check_source(components, {"latents": block_state.latents, "video": None})
    default = components.config.default_height, components.config.default_width
    return default_size((height, width), default, block_state.height, block_state.width)


class MagiHumanVaeEncoderStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Reads and encodes the first frame, cropped at the centre to the aspect of the video."
    expected_components = [VAE, VIDEO_PROCESSOR]
    expected_configs = SIZE
    inputs = takes("image", height=None, width=None)
    intermediate_outputs = gives("image_latents")

    def size(self, components: Any, block_state: BlockState) -> tuple[int, int]:
        config, height, width = components.config, block_state.height, block_state.width
        return config.default_height if height is None else height, config.default_width if width is None else width

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        images, size = load_images(block_state.image), self.size(components, block_state)
        check_vae(components, encodes=True)
        block_state.image_latents = encode_image(components, images, *size, components._execution_device)
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanUpscaleVaeEncoderStep(MagiHumanVaeEncoderStep):
    model_name = "magihuman-upscale"
    expected_configs = UPSCALE_SIZE
    inputs = takes("image", "latents", height=None, width=None)

    def size(self, components: Any, block_state: BlockState) -> tuple[int, int]:
        return upscaled_size(components, block_state)


class MagiHumanAudioVaeEncoderStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Reads and encodes given audio, sampled for each video; its length is the default of the video's."
    expected_components = [AUDIO_VAE]
    inputs = takes("input_audio", num_frames=None, num_videos_per_prompt=1, prompt_embeds=None, generator=None)
    intermediate_outputs = gives("conditioning_audio_latents", "passed_audio", "num_frames")
    latents_name = "conditioning_audio_latents"

    def count(self, components: Any, block_state: BlockState, audio: list[torch.Tensor]) -> tuple[int, int, int]:
        """Number of prompts, of videos, and their length."""
        num_prompts = len(audio) if block_state.prompt_embeds is None else len(block_state.prompt_embeds)
        num_frames, num_videos = block_state.num_frames, block_state.num_videos_per_prompt
        num_frames = count_frames(components, audio, None) if num_frames is None else num_frames
        check_numbers({"num_frames": num_frames, "num_videos_per_prompt": num_videos})
        return num_prompts, num_prompts * num_videos, num_frames

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state, device = self.get_block_state(state), components._execution_device
        rates = components.audio_vae_sampling_rate, components.audio_sampling_rate
        audio, block_state.passed_audio = load_audios(block_state.input_audio, *rates)
        num_prompts, batch_size, block_state.num_frames = self.count(components, block_state, audio)
        inputs, generator = {"audio": audio, "generator": block_state.generator}, block_state.generator
        check_lengths(components, inputs, "audio", num_prompts=num_prompts, batch_size=batch_size)
        audio = repeat(audio, batch_size)
        block_state[self.latents_name] = encode_audio(components, audio, generator, device, block_state.num_frames)
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanUpscaleAudioVaeEncoderStep(MagiHumanAudioVaeEncoderStep):
    model_name = "magihuman-upscale"
    description = "Reads and encodes the audio of the video, cut or padded to its length, sampled for each video."
    inputs = takes("input_audio", "latents", "prompt_embeds", generator=None)
    intermediate_outputs = gives("audio_latents", "passed_audio", "num_frames")
    latents_name = "audio_latents"

    def count(self, components: Any, block_state: BlockState, audio: list[torch.Tensor]) -> tuple[int, int, int]:  # noqa: ARG002
        num_videos, latent_frames, *_ = check_source(components, {"latents": block_state.latents, "video": None})
        num_frames = (latent_frames - 1) * components.vae_scale_factor_temporal + 1
        num_prompts = len(block_state.prompt_embeds)
        return num_prompts, count_videos(num_videos, num_prompts), num_frames


class MagiHumanUpscaleVideoEncoderStep(ModularPipelineBlocks):
    model_name = "magihuman-upscale"
    description = "Reads and encodes the video that is upscaled."
    expected_components = [VAE]
    inputs = takes("video")
    intermediate_outputs = gives("latents")

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        videos = load_videos(block_state.video, FRAME_RATE)
        check_source(components, {"latents": None, "video": videos})
        check_vae(components, encodes=True)
        pixels = torch.stack(videos).transpose(1, 2) * 2 - 1
        block_state.latents = encode_video(components, pixels, components._execution_device)
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanAutoVaeEncoderStep(AutoPipelineBlocks):
    description = "Encodes the first frame, if `image` is given."
    block_classes = [MagiHumanVaeEncoderStep]
    block_names = ["image"]
    block_trigger_inputs = ["image"]


class MagiHumanAutoAudioVaeEncoderStep(AutoPipelineBlocks):
    description = "Encodes given audio, if `input_audio` is given."
    block_classes = [MagiHumanAudioVaeEncoderStep]
    block_names = ["audio"]
    block_trigger_inputs = ["input_audio"]


class MagiHumanUpscaleAutoVaeEncoderStep(MagiHumanAutoVaeEncoderStep):
    description = "Encodes the first frame in high resolution, if `image` is given."
    block_classes = [MagiHumanUpscaleVaeEncoderStep]


class MagiHumanUpscaleAutoAudioVaeEncoderStep(MagiHumanAutoAudioVaeEncoderStep):
    description = "Encodes the audio of the video, if `input_audio` is given."
    block_classes = [MagiHumanUpscaleAudioVaeEncoderStep]


class MagiHumanUpscaleAutoVideoEncoderStep(AutoPipelineBlocks):
    description = "Encodes the video that is upscaled, if `video` is given in place of `latents`."
    block_classes = [MagiHumanUpscaleVideoEncoderStep]
    block_names = ["video"]
    block_trigger_inputs = ["video"]
