# SPDX-License-Identifier: Apache-2.0
"""Latents to frames and audio."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState

from ..checks import check_choice
from ..pipeline_base import OUTPUT_TYPES, check_vae, decode_audio, decode_latents, pass_audio
from .encoders import AUDIO_VAE, VAE, Blocks
from .parameters import VIDEO_PROCESSOR, gives, takes


class FrameStream(Iterator[np.ndarray]):
    """Frames that are decoded as they are consumed, and are not copied with a state, as a generator cannot be."""

    def __init__(self, frames: Iterator[np.ndarray]) -> None:
        self.frames = frames

    def __next__(self) -> np.ndarray:
        return next(self.frames)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrameStream":
        return self


class MagiHumanDecodeStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Decodes video and audio; given audio comes out as it went in, cut or padded to the video's length."
    expected_components = [VAE, AUDIO_VAE, VIDEO_PROCESSOR]
    inputs = takes("latents", audio_latents=None, passed_audio=None, num_frames=None, output_type="np")
    intermediate_outputs = gives("videos", "audio", "sampling_rate")

    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        latents, audio_latents, output_type = block_state.latents, block_state.audio_latents, block_state.output_type
        check_choice("output_type", output_type, *OUTPUT_TYPES)
        block_state.videos, block_state.audio = latents, audio_latents
        block_state.sampling_rate = components.audio_sampling_rate
        if output_type != "latent":
            check_vae(components, encodes=False, output_type=output_type)
            frames = decode_latents(components, latents, output_type)
            block_state.videos = [*map(FrameStream, frames)] if output_type == "stream" else frames
            if block_state.passed_audio is not None:
                options = len(latents), block_state.num_frames, output_type
                block_state.audio = pass_audio(components, block_state.passed_audio, *options)
            elif audio_latents is not None:
                block_state.audio = decode_audio(components, audio_latents.to(latents.device), output_type)
        self.set_block_state(state, block_state)
        return components, state
