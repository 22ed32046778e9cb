# SPDX-License-Identifier: Apache-2.0
"""Has Diffusers find the pipelines of blocks; nothing public registers one. Where a name is missing, as in another
version of Diffusers, the plain pipelines work on."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .constants import MODULAR_PIPELINES, PIPELINE_MODULES


def pipeline_of_base_or_distilled(config: dict[str, Any] | None = None) -> str:
    is_distilled = config is not None and config.get("is_distilled", False)
    return MODULAR_PIPELINES["magihuman-distilled" if is_distilled else "magihuman"]


def register_modular_pipelines(module: ModuleType) -> None:
    """Has blocks find their pipeline by the name of their model, and of a repository by its config."""
    if (mapping := getattr(module, "MODULAR_PIPELINE_MAPPING", None)) is not None:
        mapping.update({name: lambda *_, value=value: value for name, value in MODULAR_PIPELINES.items()})
        mapping["magihuman"] = pipeline_of_base_or_distilled


def register_auto_pipelines(module: ModuleType, find: Callable[[str], type]) -> None:
    """Has the class of a repository's pipeline name the model of its blocks."""
    if (mapping := getattr(module, "AUTO_TEXT2VIDEO_PIPELINES_MAPPING", None)) is not None:
        mapping.update(zip(("magihuman", "magihuman-upscale"), map(find, PIPELINE_MODULES), strict=True))
