# SPDX-License-Identifier: Apache-2.0
"""One item for each video, noise and noise levels."""

from typing import Any

from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    BlockState,
    ComponentSpec,
    ConfigSpec,
    ModularPipelineBlocks,
    PipelineState,
)
from torch import Tensor

from ..denoising import prepare_schedulers
from ..pipeline_base import check_lengths, check_numbers, check_tensors, encode_prompt, part_of, repeat, trim_embeds
from ..pipeline_magihuman import count_frames, prepare_latents
from ..pipeline_magihuman_latent_upscale import check_source, check_upscale, count_videos, prepare_upscale_latents
from ..scheduling_magihuman_flow import MagiHumanFlowScheduler
from .encoders import NEGATIVE_TEXT, SIZE, TEXT, UPSCALE_SIZE, Blocks, upscaled_size
from .parameters import TRANSFORMER, gives, takes

# As the arguments of the transformer are called. Those of each prompt stay in the state as they are, for other calls.
VIDEO_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
NEGATIVE_VIDEO_TEXT = ("negative_encoder_hidden_states", "negative_encoder_attention_mask")


def repeat_for_videos(components: Any, block_state: BlockState, name: str) -> Tensor:
    """Items that are one for all, one for each prompt or one for each video."""
    lengths = {"num_prompts": len(block_state.prompt_embeds), "batch_size": block_state.batch_size}
    inputs = {name: block_state[name], "generator": None}
    check_lengths(components, inputs, name, **lengths)
    return repeat(inputs[name], block_state.batch_size)


class MagiHumanTextInputsStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = (
        "Repeats the embeddings of each prompt, and if a guider needs them the negative ones, for its videos."
    )
    inputs = takes("prompt_embeds", prompt_embeds_mask=None, num_videos_per_prompt=1, **dict.fromkeys(NEGATIVE_TEXT))
    intermediate_outputs = gives("batch_size", *VIDEO_TEXT, *NEGATIVE_VIDEO_TEXT)

    def count(self, _components: Any, block_state: BlockState) -> int:
        """Number of videos for each prompt."""
        return block_state.num_videos_per_prompt

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state, is_guided = self.get_block_state(state), components.requires_unconditional_embeds
        inputs = {name: block_state[name] for name in (*TEXT, *NEGATIVE_TEXT)}
        if is_guided and inputs["negative_prompt_embeds"] is None:
            raise ValueError("`negative_prompt_embeds` is None, but a guider needs them; encode the text with it.")
        inputs |= {"num_videos_per_prompt": self.count(components, block_state)}
        *text, negative, mask = encode_prompt(components, None, **inputs, do_classifier_free_guidance=is_guided)
        block_state.batch_size = len(text[0])
        text = [*trim_embeds(*text), *(trim_embeds(negative, mask) if is_guided else (None, None))]
        for name, value in zip((*VIDEO_TEXT, *NEGATIVE_VIDEO_TEXT), text, strict=True):
            block_state[name] = value
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanDistilledTextInputsStep(MagiHumanTextInputsStep):
    model_name = "magihuman-distilled"
    description = "Repeats the embeddings of each prompt for its videos."
    inputs = takes("prompt_embeds", prompt_embeds_mask=None, num_videos_per_prompt=1)
    intermediate_outputs = gives("batch_size", *VIDEO_TEXT)


class MagiHumanUpscaleTextInputsStep(MagiHumanTextInputsStep):
    model_name = "magihuman-upscale"
    description = "Repeats the embeddings of each prompt for the videos that are upscaled with it."
    expected_components = [TRANSFORMER]
    inputs = takes("prompt_embeds", "latents", prompt_embeds_mask=None, **dict.fromkeys(NEGATIVE_TEXT))

    def count(self, components: Any, block_state: BlockState) -> int:
        num_videos, *_ = check_source(components, {"latents": block_state.latents, "video": None})
        return count_videos(num_videos, len(block_state.prompt_embeds)) // len(block_state.prompt_embeds)


class MagiHumanPrepareLatentsStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Draws the noise of the audio, then of the video, unless it is given."
    expected_components = [TRANSFORMER]
    expected_configs = [*SIZE, ConfigSpec("default_num_frames", 126)]
    inputs = takes(
        "batch_size", height=None, width=None, num_frames=None, generator=None, latents=None, audio_latents=None
    )
    # The last two as none: neither is an input of the whole, where no block before or after this one makes it.
    intermediate_outputs = gives("latents", "audio_latents", "num_frames", "first_frame_latents", "passed_audio")

    def set_audio(self, components: Any, block_state: BlockState) -> None:  # noqa: ARG002
        """Sets the audio's latents, and the length, if they are given."""
        block_state.passed_audio = None

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state, config = self.get_block_state(state), components.config
        part_of(components, "transformer")
        self.set_audio(components, block_state)
        size = {name: block_state[name] for name in ("height", "width", "num_frames")}
        size = {name: config[f"default_{name}"] if value is None else value for name, value in size.items()}
        options = {name: block_state[name] for name in ("batch_size", "generator", "latents", "audio_latents")}
        latents = prepare_latents(components, device=components._execution_device, **size, **options)
        block_state.latents, block_state.audio_latents = latents
        block_state.num_frames, block_state.first_frame_latents = size["num_frames"], None
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanAudio2VideoPrepareLatentsStep(MagiHumanPrepareLatentsStep):
    description = "Draws the noise of the video, unless it is given; the latents of the audio are the given ones."
    inputs = takes(
        *("batch_size", "prompt_embeds", "conditioning_audio_latents"),
        **dict.fromkeys(("height", "width", "num_frames", "generator", "latents")),
    )
    intermediate_outputs = gives("latents", "audio_latents", "num_frames", "first_frame_latents")

    def set_audio(self, components: Any, block_state: BlockState) -> None:
        if block_state.num_frames is None:
            block_state.num_frames = count_frames(components, None, block_state.conditioning_audio_latents)
        block_state.audio_latents = repeat_for_videos(components, block_state, "conditioning_audio_latents")


class MagiHumanPrepareFirstFrameStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Repeats the latents of the first frame for each video."
    inputs = takes("image_latents", "prompt_embeds", "latents", "batch_size")
    intermediate_outputs = gives("first_frame_latents")

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        _, channels, _, *size = block_state.latents.shape
        check_tensors({"image_latents": block_state.image_latents}, image_latents=(None, channels, 1, *size))
        image_latents = repeat_for_videos(components, block_state, "image_latents")
        block_state.first_frame_latents = image_latents.to(block_state.latents)
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanAutoPrepareLatentsStep(AutoPipelineBlocks):
    description = "Draws noise, for the audio only if there are no latents of given audio."
    block_classes = [MagiHumanAudio2VideoPrepareLatentsStep, MagiHumanPrepareLatentsStep]
    block_names = ["audio2video", "text2video"]
    block_trigger_inputs = ["conditioning_audio_latents", None]


class MagiHumanAutoPrepareFirstFrameStep(AutoPipelineBlocks):
    description = "Repeats the latents of the first frame for each video, if there are any."
    block_classes = [MagiHumanPrepareFirstFrameStep]
    block_names = ["first_frame"]
    block_trigger_inputs = ["image_latents"]


class MagiHumanSetTimestepsStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Copies the scheduler for the video and the audio, whose solvers keep a state each."
    expected_components = [ComponentSpec("scheduler", MagiHumanFlowScheduler)]
    inputs = takes(num_inference_steps=32)
    intermediate_outputs = gives("video_scheduler", "audio_scheduler", "timesteps")

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        check_numbers({"num_inference_steps": block_state.num_inference_steps})
        inputs = part_of(components, "scheduler"), block_state.num_inference_steps, components._execution_device
        block_state.video_scheduler, block_state.audio_scheduler = prepare_schedulers(*inputs)
        block_state.timesteps = block_state.video_scheduler.timesteps
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanDistilledSetTimestepsStep(MagiHumanSetTimestepsStep):
    model_name = "magihuman-distilled"
    inputs = takes(num_inference_steps=8)


class MagiHumanUpscaleSetTimestepsStep(MagiHumanSetTimestepsStep):
    model_name = "magihuman-upscale"
    inputs = takes(num_inference_steps=5)


class MagiHumanUpscalePrepareLatentsStep(ModularPipelineBlocks):
    model_name = "magihuman-upscale"
    description = "Resizes the latents and adds noise, and to what the transformer sees of the audio, which stays."
    expected_components = [TRANSFORMER]
    expected_configs = UPSCALE_SIZE
    inputs = takes(
        *("latents", "prompt_embeds", "batch_size"),
        **dict.fromkeys(("audio_latents", "height", "width", "generator")),
        noise_level=220,
        audio_noise_scale=0.7,
    )
    intermediate_outputs = gives(
        *("latents", "audio_latents", "noisy_audio_latents", "num_frames", "first_frame_latents")
    )

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        part_of(components, "transformer")
        height, width = upscaled_size(components, block_state)
        inputs = {name: block_state[name] for name in ("latents", "audio_latents", "generator")}
        inputs |= {"height": height, "width": width}
        absent = dict.fromkeys(("video", "image", "image_latents", "audio"))
        check_upscale(components, inputs | absent, len(block_state.prompt_embeds))
        for name in ("latents", "audio_latents"):
            inputs[name] = None if inputs[name] is None else repeat(inputs[name], block_state.batch_size)
        options = {name: block_state[name] for name in ("noise_level", "audio_noise_scale")}
        latents = prepare_upscale_latents(components, **inputs, **options, device=components._execution_device)
        block_state.latents, block_state.noisy_audio_latents = latents
        block_state.audio_latents, block_state.first_frame_latents = inputs["audio_latents"], None
        block_state.num_frames = (block_state.latents.shape[2] - 1) * components.vae_scale_factor_temporal + 1
        self.set_block_state(state, block_state)
        return components, state
