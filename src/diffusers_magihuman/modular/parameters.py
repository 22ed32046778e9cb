# SPDX-License-Identifier: Apache-2.0
"""What blocks take and give, by name; one that several name means the same for all of them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from ..guidance_magihuman import MagiHumanGuidance
from ..media import AudioInput, ImageInput, VideoInput
from ..pipeline_base import Audio, Frames
from ..scheduling_magihuman_flow import MagiHumanFlowScheduler
from ..transformer_magihuman import MagiHumanTransformer3DModel

PARAMETERS: dict[str, tuple[Any, str]] = {
    "prompt": (str | list[str], "What to show and to say, one prompt or several."),
    "negative_prompt": (str | list[str], "What to steer away from, one for all or one for each prompt."),
    "max_sequence_length": (int, "Text tokens used; others are cut off, with a warning."),
    "image": (ImageInput | list[ImageInput], "First frame, one for all or one for each prompt."),
    # Not `audio`, which comes out: a second call with the state would take it for the input.
    "input_audio": (AudioInput | list[AudioInput], "Path, `(waveform, sampling_rate)` or several; stays as given."),
    "video": (VideoInput | list[VideoInput], "Videos of `4 * k + 1` frames, 25 a second, in place of `latents`."),
    "height": (int, "Height in pixels, by default the model's."),
    "width": (int, "Width in pixels, by default the model's."),
    "num_frames": (int, "Length at 25 frames a second, by default that of given audio, or the model's."),
    "num_videos_per_prompt": (int, "Videos for each prompt."),
    "num_inference_steps": (int, "Number of steps."),
    "noise_level": (int, "How much noise is added, from 0 to 999 for nothing but noise."),
    "audio_noise_scale": (float, "Share of noise in the audio that the transformer sees."),
    "generator": (torch.Generator | list[torch.Generator], "Makes the result deterministic."),
    "attention_kwargs": (dict[str, Any], "`scale` sets the scale of LoRA layers."),
    "callback_on_step_end": (Callable, "Called as `callback(pipe, step, timestep, tensors)`, see the loop."),
    "callback_on_step_end_tensor_inputs": (list[str], "Names of the tensors that the callback is given."),
    "output_type": (str, "`np`, `pt`, `pil`, `latent`, or `stream` for frames that are decoded as they are consumed."),
    "prompt_embeds": (Tensor, "Embeddings for each prompt."),
    "prompt_embeds_mask": (Tensor, "Their mask, true for real tokens."),
    "negative_prompt_embeds": (Tensor, "Negative embeddings for each prompt, if a guider needs them."),
    "negative_prompt_embeds_mask": (Tensor, "The mask of negative embeddings."),
    "image_latents": (Tensor, "Normalised latents of `image`."),
    "conditioning_audio_latents": (Tensor, "Latents of given audio."),
    "passed_audio": (list[Tensor], "Given audio at the rate of the output."),
    "batch_size": (int, "Number of videos."),
    "encoder_hidden_states": (Tensor, "Embeddings for each video."),
    "encoder_attention_mask": (Tensor, "Their mask, if one is shorter."),
    "negative_encoder_hidden_states": (Tensor, "Negative embeddings for each video."),
    "negative_encoder_attention_mask": (Tensor, "The mask of negative embeddings for each video."),
    "first_frame_latents": (Tensor, "Latents of the first frame of each video."),
    "latents": (Tensor, "Normalised latents of the video: noise at first, or a video to be upscaled."),
    "audio_latents": (Tensor, "Latents of the audio: noise at first, or the audio of a video to be upscaled."),
    "noisy_audio_latents": (Tensor, "Latents of the audio that the transformer sees."),
    "timesteps": (Tensor, "Noise levels."),
    "video_scheduler": (MagiHumanFlowScheduler, "Solver of the video."),
    "audio_scheduler": (MagiHumanFlowScheduler, "Solver of the audio."),
    "videos": (Frames, "Frames in [0, 1], or latents."),
    "audio": (Audio, "Audio `(batch_size, 2, num_samples)`, or latents; none for a video without audio."),
    "sampling_rate": (int, "Samples of the audio in a second."),
}

TRANSFORMER = ComponentSpec("transformer", MagiHumanTransformer3DModel)


def from_config(name: str, kind: type, **config: Any) -> ComponentSpec:
    """A component that no repository holds, and that `update_components` swaps."""
    return ComponentSpec(name, kind, config=FrozenDict(config), default_creation_method="from_config")


VIDEO_PROCESSOR = from_config("video_processor", VideoProcessor, vae_scale_factor=16)
# Also in blocks that only ask them whether negative prompts are needed; they must be the same in all of a pipeline.
GUIDER = from_config("guider", MagiHumanGuidance, guidance_scale=5.0, low_noise_guidance_scale=2.0)
GUIDANCE_SCALE = ConfigSpec("default_guidance_scale", None)  # of both, in place of theirs, if a repository has it
AUDIO_GUIDER = from_config("audio_guider", MagiHumanGuidance, guidance_scale=5.0)
UPSCALE_GUIDER = from_config("guider", MagiHumanGuidance, guidance_scale=1.0, leading_guidance_scale=2.0)


def takes(*required: str, **optional: Any) -> property:
    """The `inputs` of a block, of which others have a default; made anew each time, as Diffusers changes them."""

    def inputs(_block: Any) -> list[InputParam]:
        params = [InputParam(name, PARAMETERS[name][0], None, True, PARAMETERS[name][1]) for name in required]
        return params + [InputParam(x, PARAMETERS[x][0], optional[x], False, PARAMETERS[x][1]) for x in optional]

    return property(inputs)


def gives(*names: str) -> list[OutputParam]:
    return [OutputParam(name, *PARAMETERS[name]) for name in names]


OUTPUTS = property(lambda _block: gives("videos", "audio", "sampling_rate"))
