# SPDX-License-Identifier: Apache-2.0
"""The blocks of the base model."""

from diffusers.modular_pipelines import SequentialPipelineBlocks

from .before_denoise import (
    MagiHumanAutoPrepareFirstFrameStep,
    MagiHumanAutoPrepareLatentsStep,
    MagiHumanSetTimestepsStep,
    MagiHumanTextInputsStep,
)
from .decoders import MagiHumanDecodeStep
from .denoise import MagiHumanAutoDenoiseStep
from .encoders import MagiHumanAutoAudioVaeEncoderStep, MagiHumanAutoVaeEncoderStep, MagiHumanTextEncoderStep
from .parameters import OUTPUTS


class MagiHumanCoreDenoiseStep(SequentialPipelineBlocks):
    model_name = "magihuman"
    description = "Denoises with the text, and from a first frame or with audio that are given."
    block_classes = [
        MagiHumanTextInputsStep,
        MagiHumanAutoPrepareLatentsStep,
        MagiHumanAutoPrepareFirstFrameStep,
        MagiHumanSetTimestepsStep,
        MagiHumanAutoDenoiseStep,
    ]
    block_names = ["text_inputs", "prepare_latents", "prepare_first_frame", "set_timesteps", "denoise"]


class MagiHumanAutoBlocks(SequentialPipelineBlocks):
    model_name = "magihuman"
    description = "Text, and if given a first frame and audio, to a video with audio."
    block_classes = [
        MagiHumanTextEncoderStep,
        MagiHumanAutoVaeEncoderStep,
        MagiHumanAutoAudioVaeEncoderStep,
        MagiHumanCoreDenoiseStep,
        MagiHumanDecodeStep,
    ]
    block_names = ["text_encoder", "vae_encoder", "audio_vae_encoder", "denoise", "decode"]
    _workflow_map = {
        "text2video": {"prompt": True},
        "image2video": {"prompt": True, "image": True},
        "audio2video": {"prompt": True, "input_audio": True},
        "image_audio2video": {"prompt": True, "image": True, "input_audio": True},
    }
    outputs = OUTPUTS
