# SPDX-License-Identifier: Apache-2.0
"""daVinci-MagiHuman as native Diffusers components.

Importing this package registers its classes on `diffusers`, so that `DiffusionPipeline.from_pretrained` finds them,
and the pipelines on `diffusers.pipelines` too, where Diffusers looks for their sources.
"""

import diffusers

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .lora import MagiHumanLoraLoaderMixin
from .media import export_to_mp4, load_audio
from .pipeline_base import MagiHumanPipelineOutput
from .pipeline_magihuman import MagiHumanAudioVideoPipeline
from .pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from .scheduling_magihuman_flow import MagiHumanFlowScheduler
from .tools.embedded import embedded_model
from .transformer_magihuman import QUANTIZATION_SKIP_MODULES, MagiHumanTransformer3DModel

__version__ = "0.1.0.dev0"

__all__ = [
    "QUANTIZATION_SKIP_MODULES",
    "AutoencoderKLMagiHumanTurbo",
    "MagiHumanAudioVideoPipeline",
    "MagiHumanFlowScheduler",
    "MagiHumanLatentUpscalePipeline",
    "MagiHumanLoraLoaderMixin",
    "MagiHumanPipelineOutput",
    "MagiHumanTransformer3DModel",
    "embedded_model",
    "export_to_mp4",
    "load_audio",
]

for _name in __all__:
    _class = globals()[_name]
    if isinstance(_class, type) and issubclass(_class, diffusers.ConfigMixin):
        setattr(diffusers, _name, _class)
        if issubclass(_class, diffusers.DiffusionPipeline):
            setattr(diffusers.pipelines, _name, _class)
