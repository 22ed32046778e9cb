# SPDX-License-Identifier: Apache-2.0
"""The blocks of the distilled model, which has neither guider nor negative prompt."""

from diffusers.modular_pipelines import SequentialPipelineBlocks

from .before_denoise import (
    MagiHumanAutoPrepareFirstFrameStep,
    MagiHumanAutoPrepareLatentsStep,
    MagiHumanDistilledSetTimestepsStep,
    MagiHumanDistilledTextInputsStep,
)
from .decoders import MagiHumanDecodeStep
from .denoise import MagiHumanDistilledAutoDenoiseStep
from .encoders import MagiHumanAutoAudioVaeEncoderStep, MagiHumanAutoVaeEncoderStep, MagiHumanDistilledTextEncoderStep
from .parameters import OUTPUTS


class MagiHumanDistilledCoreDenoiseStep(SequentialPipelineBlocks):
    model_name = "magihuman-distilled"
    description = "Denoises with the text, and from a first frame or with audio that are given."
    block_classes = [
        MagiHumanDistilledTextInputsStep,
        MagiHumanAutoPrepareLatentsStep,
        MagiHumanAutoPrepareFirstFrameStep,
        MagiHumanDistilledSetTimestepsStep,
        MagiHumanDistilledAutoDenoiseStep,
    ]
    block_names = ["text_inputs", "prepare_latents", "prepare_first_frame", "set_timesteps", "denoise"]


class MagiHumanDistilledAutoBlocks(SequentialPipelineBlocks):
    model_name = "magihuman-distilled"
    description = "Text, and if given a first frame and audio, to a video with audio."
    block_classes = [
        MagiHumanDistilledTextEncoderStep,
        MagiHumanAutoVaeEncoderStep,
        MagiHumanAutoAudioVaeEncoderStep,
        MagiHumanDistilledCoreDenoiseStep,
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
