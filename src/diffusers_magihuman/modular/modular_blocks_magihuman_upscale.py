# SPDX-License-Identifier: Apache-2.0
"""The blocks of the upscaler."""

from diffusers.modular_pipelines import SequentialPipelineBlocks

from .before_denoise import (
    MagiHumanAutoPrepareFirstFrameStep,
    MagiHumanUpscalePrepareLatentsStep,
    MagiHumanUpscaleSetTimestepsStep,
    MagiHumanUpscaleTextInputsStep,
)
from .decoders import MagiHumanDecodeStep
from .denoise import MagiHumanUpscaleDenoiseStep
from .encoders import (
    MagiHumanUpscaleAutoAudioVaeEncoderStep,
    MagiHumanUpscaleAutoVaeEncoderStep,
    MagiHumanUpscaleAutoVideoEncoderStep,
    MagiHumanUpscaleTextEncoderStep,
)
from .parameters import OUTPUTS


class MagiHumanUpscaleCoreDenoiseStep(SequentialPipelineBlocks):
    model_name = "magihuman-upscale"
    description = "Resizes latents, adds noise and denoises them, from a first frame if it is given."
    block_classes = [
        MagiHumanUpscaleTextInputsStep,
        MagiHumanUpscalePrepareLatentsStep,
        MagiHumanAutoPrepareFirstFrameStep,
        MagiHumanUpscaleSetTimestepsStep,
        MagiHumanUpscaleDenoiseStep,
    ]
    block_names = ["text_inputs", "prepare_latents", "prepare_first_frame", "set_timesteps", "denoise"]


class MagiHumanUpscaleAutoBlocks(SequentialPipelineBlocks):
    model_name = "magihuman-upscale"
    description = "Latents of a video in low resolution, or the video, to the same video in high resolution."
    block_classes = [
        MagiHumanUpscaleTextEncoderStep,
        MagiHumanUpscaleAutoVideoEncoderStep,
        MagiHumanUpscaleAutoVaeEncoderStep,
        MagiHumanUpscaleAutoAudioVaeEncoderStep,
        MagiHumanUpscaleCoreDenoiseStep,
        MagiHumanDecodeStep,
    ]
    block_names = ["text_encoder", "video_encoder", "vae_encoder", "audio_vae_encoder", "denoise", "decode"]
    _workflow_map = {
        "latents": {"prompt": True, "latents": True},
        "image_latents": {"prompt": True, "latents": True, "image": True},
        "video": {"prompt": True, "video": True},
        "image_video": {"prompt": True, "video": True, "image": True},
        "audio_video": {"prompt": True, "video": True, "input_audio": True},
        "image_audio_video": {"prompt": True, "video": True, "image": True, "input_audio": True},
    }
    outputs = OUTPUTS
