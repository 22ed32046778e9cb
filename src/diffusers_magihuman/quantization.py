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
"""What of the transformer may be quantised.

The linears of the blocks, shared and of each modality, may be stored in few bits; embedders and heads are small, carry
the latents themselves, and stay in float32. Diffusers' quantisers leave alone what a model keeps in float32, so a
config need not say so, and one that says otherwise is an error.
"""

import re
from typing import Any

from diffusers import TorchAoConfig
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin


QUANTIZATION_SKIP_MODULES = ["video_embedder", "audio_embedder", "text_embedder", "video_proj_out", "audio_proj_out"]


def check_quantization_config(quantization_config: QuantizationConfigMixin | dict[str, Any]) -> None:
    """
    Args:
        quantization_config (`QuantizationConfigMixin` or `dict`): Of any backend of Diffusers.

    Raises:
        `ValueError`: The config would convert embedders or heads: its list of modules to leave alone is empty, or a
            config of TorchAO for single modules names them.
    """
    if isinstance(quantization_config, dict):
        quantization_config = DiffusersAutoQuantizer.from_dict(quantization_config)
    settings = vars(quantization_config)
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if settings.get(name) == []:
            raise ValueError(
                f"`quantization_config` with `{name}`=[] would convert {', '.join(QUANTIZATION_SKIP_MODULES)}, which"
                f" must stay in float32: leave `{name}` out, or pass `QUANTIZATION_SKIP_MODULES` with what you add."
            )
    if isinstance(quantization_config, TorchAoConfig):
        patterns = vars(quantization_config.quant_type).get("fqn_to_config", {})
        converted = [
            module
            for module in QUANTIZATION_SKIP_MODULES
            if any(config is not None and matches(pattern, module) for pattern, config in patterns.items())
        ]
        if converted:
            raise ValueError(
                f"`quantization_config` with `fqn_to_config` for {list(patterns)} would convert"
                f" {', '.join(converted)}, which must stay in float32: name other modules, or use '_default', which"
                " leaves them alone."
            )


def matches(pattern: str, module: str) -> bool:
    """Whether TorchAO takes a key of `FqnToConfig`, a name or a regular expression after `re:`, for the module."""
    names = (module, f"{module}.weight")
    return any(re.fullmatch(pattern[3:], name) if pattern.startswith("re:") else pattern == name for name in names)
