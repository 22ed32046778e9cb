# SPDX-License-Identifier: Apache-2.0
"""Diffusers' caches of steps, made right for a transformer that runs the branches of guidance one after the other.

What is private here goes with changes of Diffusers: the hooks once pyramid attention broadcast and FasterCache keep a
state for each cache context, as its other caches do; the registries once a model can add its own classes to them;
where a module keeps its hooks once `HookRegistry` has a function that only looks.
"""

import dataclasses
from typing import Any

from diffusers.hooks import FasterCacheConfig, FirstBlockCacheConfig, HookRegistry, SeaCacheConfig
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.hooks.faster_cache import FasterCacheBlockHook, FasterCacheBlockState
from diffusers.hooks.hooks import CacheContext, ModelHook, StateManager
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook, PyramidAttentionBroadcastState
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from .checks import check_integer, check_real


class ContextStateMixin(ModelHook):
    """Takes over a hook's settings, with a state for each cache context: one for all would mix guidance's branches."""

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


class ContextPyramidHook(ContextStateMixin, PyramidAttentionBroadcastHook):
    state_class = PyramidAttentionBroadcastState


class ContextFasterHook(ContextStateMixin, FasterCacheBlockHook):
    state_class = FasterCacheBlockState


CONTEXT_HOOKS = {PyramidAttentionBroadcastHook: ContextPyramidHook, FasterCacheBlockHook: ContextFasterHook}


def register_block(block_class: type[nn.Module]) -> type[nn.Module]:
    """Tells the caches that skip blocks where a block, which returns one tensor, has its hidden states."""
    metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    TransformerBlockRegistry.register(block_class, metadata)
    return block_class


def register_processor(processor_class: type) -> type:
    """Tells the guiders that skip attention what it then gives: what goes in, as for other models."""
    metadata = AttentionProcessorMetadata(lambda _module, hidden_states, *_, **__: hidden_states)
    AttentionProcessorRegistry.register(processor_class, metadata)
    return processor_class


def hooks_of(module: nn.Module) -> dict[str, ModelHook]:
    """Diffusers' hooks of a module by their names."""
    return module._diffusers_hook.hooks if hasattr(module, "_diffusers_hook") else {}


def video_latents(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents that SeaCache compares between steps, each `(channels, num_frames, height, width)`."""
    return list((args[0] if args else kwargs["hidden_states"]).unbind())


def check_cache(config: Any, is_shared_out: bool) -> None:
    """Raises a `ValueError` for a cache that cannot work here, or not with the sequence shared out to processes."""
    counts = ["cache_interval", "disable_cache_before_step", "num_inference_steps", "max_order"]
    counts += [f"{kind}_attention_block_skip_range" for kind in ("spatial", "temporal", "cross")]
    for name in counts:
        if getattr(config, name, None) is not None:
            check_integer(name, getattr(config, name), int(name != "max_order"))
    check_real("threshold", getattr(config, "threshold", 0.0))
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
        raise ValueError(
            "`config`=FasterCacheConfig takes both branches of the guidance from one batch, but this transformer runs"
            " them in turn. Set `is_guidance_distilled=True`, which computes both, or take another cache."
        )
    if isinstance(config, FirstBlockCacheConfig) and is_shared_out:
        raise ValueError(
            "`FirstBlockCacheConfig` cannot work with `ContextParallelConfig`: a process would skip steps by its own"
            " part of the sequence, and others wait for it. Use `MagCacheConfig`."
        )


class MagiHumanCacheMixin(CacheMixin):
    """Diffusers' caches, each of which keeps the branches of the guidance apart."""

    def enable_cache(self, config: Any) -> None:
        """Lets later steps reuse what earlier ones computed; a `ValueError` if one is on already, or cannot work here.

        `config` is a `FirstBlockCacheConfig`, `MagCacheConfig`, `TaylorSeerCacheConfig`, `SeaCacheConfig`,
        `PyramidAttentionBroadcastConfig`, or `FasterCacheConfig` with `is_guidance_distilled=True`.
        """
        check_cache(config, is_shared_out=self._num_shards > 1)
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            config = dataclasses.replace(config, raw_vision_callback=video_latents)
        if getattr(config, "use_lite_mode", False):  # TaylorSeer's, which looks for a single head, `proj_out`
            names = {"skip_predict_identifiers": [r"transformer_blocks\.\d+"], "cache_identifiers": [".*_proj_out"]}
            config = dataclasses.replace(config, use_lite_mode=False, **names)
        parts = list(self.modules())[1:]
        num_hooks = sum(len(hooks_of(part)) for part in parts)
        super().enable_cache(config)
        if sum(len(hooks_of(part)) for part in parts) == num_hooks:
            self.disable_cache()
            raise ValueError(f"`config`={config} names no part of this transformer.")
        attentions = [module for module in self.modules() if isinstance(module, AttentionModuleMixin)]
        for registry in map(HookRegistry.check_if_exists_or_initialize, attentions):
            for name, hook in list(registry.hooks.items()):
                if type(hook) in CONTEXT_HOOKS:
                    registry.remove_hook(name, recurse=False)
                    registry.register_hook(CONTEXT_HOOKS[type(hook)](hook), name)
