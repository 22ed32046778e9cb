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
"""Diffusers' caches of steps, made right for a transformer that runs the branches of guidance one after the other."""

import dataclasses
from typing import Any

import torch
import torch.nn as nn
from diffusers.hooks import FasterCacheConfig, HookRegistry, SeaCacheConfig
from diffusers.hooks.faster_cache import _FASTER_CACHE_BLOCK_HOOK, FasterCacheBlockHook, FasterCacheBlockState
from diffusers.hooks.hooks import CacheContext, ModelHook, StateManager
from diffusers.hooks.pyramid_attention_broadcast import (
    _PYRAMID_ATTENTION_BROADCAST_HOOK,
    PyramidAttentionBroadcastHook,
    PyramidAttentionBroadcastState,
)
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.cache_utils import CacheMixin


class ContextStateMixin(ModelHook):
    """Takes over another hook's settings, with a state for each cache context in place of one for all.

    With one state, the branches of the guidance would take from each other.
    """

    state_class: type

    def __init__(self, hook: ModelHook) -> None:
        vars(self).update(vars(hook))

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.state_manager = StateManager(self.state_class)
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state_manager.reset()
        return module

    @property
    def state(self) -> Any:
        if self.state_manager._context is None:
            self.state_manager.set_context(CacheContext(name="inference"))
        return self.state_manager.get_state()


class ContextPyramidAttentionBroadcastHook(ContextStateMixin, PyramidAttentionBroadcastHook):
    state_class = PyramidAttentionBroadcastState


class ContextFasterCacheBlockHook(ContextStateMixin, FasterCacheBlockHook):
    state_class = FasterCacheBlockState


CONTEXT_HOOKS = {
    _PYRAMID_ATTENTION_BROADCAST_HOOK: ContextPyramidAttentionBroadcastHook,
    _FASTER_CACHE_BLOCK_HOOK: ContextFasterCacheBlockHook,
}


def video_latents(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The latents that SeaCache compares between steps, each `(channels, num_frames, height, width)`."""
    return list((args[0] if args else kwargs["hidden_states"]).unbind())


class MagiHumanCacheMixin(CacheMixin):
    """Diffusers' caches, each of which keeps the branches of the guidance apart."""

    def enable_cache(self, config: Any) -> None:
        """
        Lets later steps reuse what earlier ones computed.

        Args:
            config: `FirstBlockCacheConfig`, `MagCacheConfig`, `TaylorSeerCacheConfig`, `SeaCacheConfig`,
                `PyramidAttentionBroadcastConfig`, or `FasterCacheConfig` with `is_guidance_distilled=True`.

        Raises:
            `ValueError`: A cache is enabled already, or this one cannot work here.
        """
        if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
            raise ValueError(
                "`config`=FasterCacheConfig predicts one branch of the guidance from the other inside one batch, but"
                " this transformer runs them one after the other. Set `is_guidance_distilled=True`, which leaves both"
                " branches to be computed, or take FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig,"
                " SeaCacheConfig or PyramidAttentionBroadcastConfig."
            )
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            config = dataclasses.replace(config, raw_vision_callback=video_latents)
        super().enable_cache(config)
        for module in self.modules():
            if isinstance(module, AttentionModuleMixin):
                registry = HookRegistry.check_if_exists_or_initialize(module)
                for name, hook_class in CONTEXT_HOOKS.items():
                    hook = registry.get_hook(name)
                    if hook is not None:
                        registry.remove_hook(name, recurse=False)
                        registry.register_hook(hook_class(hook), name)
