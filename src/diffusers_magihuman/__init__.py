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
"""daVinci-MagiHuman as native Diffusers components.

Importing this package registers its classes on `diffusers`, so that `DiffusionPipeline.from_pretrained` finds them,
and the pipelines on `diffusers.pipelines` too, where Diffusers looks for their sources.
"""

import diffusers

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .lora import MagiHumanLoraLoaderMixin
from .media import export_to_mp4, load_audio
from .pipeline_magihuman import MagiHumanAudioVideoPipeline
from .pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from .pipeline_output import MagiHumanPipelineOutput
from .quantization import QUANTIZATION_SKIP_MODULES
from .scheduling_magihuman_flow import MagiHumanFlowScheduler
from .tools.embedded import embedded_model
from .transformer_magihuman import MagiHumanTransformer3DModel


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

for _class in (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
):
    setattr(diffusers, _class.__name__, _class)
    if issubclass(_class, diffusers.DiffusionPipeline):
        setattr(diffusers.pipelines, _class.__name__, _class)
