# SPDX-License-Identifier: Apache-2.0
"""daVinci-MagiHuman as native Diffusers components.

Importing this package registers its classes on `diffusers`, so that `DiffusionPipeline.from_pretrained` finds them,
and the pipelines on `diffusers.pipelines` too, where Diffusers looks for their sources, and where it looks for the
blocks of a repository. It imports nothing heavy: a name is imported when it is first asked for, here or there, and
Diffusers need not be imported yet.
"""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .constants import CLASSES, PIPELINE_MODULES
from .registration import register_auto_pipelines, register_modular_pipelines

if TYPE_CHECKING:
    from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
    from .guidance_magihuman import MagiHumanGuidance
    from .lora import MagiHumanLoraLoaderMixin
    from .media import export_to_mp4, load_audio
    from .modular.modular_blocks_magihuman import MagiHumanAutoBlocks
    from .modular.modular_blocks_magihuman_distilled import MagiHumanDistilledAutoBlocks
    from .modular.modular_blocks_magihuman_upscale import MagiHumanUpscaleAutoBlocks
    from .modular.modular_pipeline import (
        MagiHumanDistilledModularPipeline,
        MagiHumanModularPipeline,
        MagiHumanUpscaleModularPipeline,
    )
    from .pipeline_base import MagiHumanPipelineOutput
    from .pipeline_magihuman import MagiHumanAudioVideoPipeline
    from .pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
    from .prompts import format_prompt
    from .scheduling_magihuman_flow import MagiHumanFlowScheduler
    from .tools.embedded import embedded_model
    from .transformer_magihuman import QUANTIZATION_SKIP_MODULES, MagiHumanTransformer3DModel

__version__ = "0.1.0.dev0"

__all__ = [
    "QUANTIZATION_SKIP_MODULES",
    "AutoencoderKLMagiHumanTurbo",
    "MagiHumanAudioVideoPipeline",
    "MagiHumanAutoBlocks",
    "MagiHumanDistilledAutoBlocks",
    "MagiHumanDistilledModularPipeline",
    "MagiHumanFlowScheduler",
    "MagiHumanGuidance",
    "MagiHumanLatentUpscalePipeline",
    "MagiHumanLoraLoaderMixin",
    "MagiHumanModularPipeline",
    "MagiHumanPipelineOutput",
    "MagiHumanTransformer3DModel",
    "MagiHumanUpscaleAutoBlocks",
    "MagiHumanUpscaleModularPipeline",
    "embedded_model",
    "export_to_mp4",
    "format_prompt",
    "load_audio",
]

_SOURCES = CLASSES | {
    "QUANTIZATION_SKIP_MODULES": "transformer_magihuman",
    "MagiHumanLoraLoaderMixin": "lora",
    "MagiHumanPipelineOutput": "pipeline_base",
    "embedded_model": "tools.embedded",
    "export_to_mp4": "media",
    "format_prompt": "prompts",
    "load_audio": "media",
}
_LOCK = RLock()
_REGISTERED = {"diffusers": CLASSES, "diffusers.pipelines": PIPELINE_MODULES}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _LOCK:  # Diffusers' modules import each other in circles, which fails where two threads begin at once
        value = globals()[name] = getattr(import_module(f".{_SOURCES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(module: ModuleType) -> None:
    """Makes the classes attributes of a module of Diffusers, imported when they are first asked for."""
    names = _REGISTERED[module.__name__]

    class Registered(type(module)):
        def __getattr__(self, name: str) -> Any:
            if name not in names:
                return super().__getattr__(name)
            setattr(self, name, value := getattr(import_module(__name__), name))
            return value

        def __dir__(self) -> list[str]:
            return [*super().__dir__(), *(name for name in names if name not in vars(self))]

    module.__class__ = Registered


_REGISTER = dict.fromkeys(_REGISTERED, _register) | {
    "diffusers.modular_pipelines.modular_pipeline": register_modular_pipelines,
    "diffusers.pipelines.auto_pipeline": partial(register_auto_pipelines, find=__getattr__),
}


class _Finder(MetaPathFinder):
    """Has the later finders find a module of Diffusers, on which the classes are registered once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _REGISTER:
            return None
        finders = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _REGISTER[name](sys.modules[name])  # where Diffusers has put another object

            spec.loader.exec_module = execute_and_register
        return spec


sys.meta_path.insert(0, _Finder())
for _name in sys.modules.keys() & _REGISTER:
    _REGISTER[_name](sys.modules[_name])
