# SPDX-License-Identifier: Apache-2.0
"""Several GPUs: how context parallelism shares out the sequence, and tensor parallelism the weights of the blocks.

In context parallelism each process holds a shard, an equal part of the video, the audio and the text, padded to a
multiple of the number of processes. Attention gathers the whole sequence for a part of the heads.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from diffusers.hooks.tensor_parallel import PackedColwiseParallel  # every model's plan needs these: to be exported
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelModelPlan, ContextParallelOutput
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch import Tensor, nn

from .caches import check_cache
from .checks import check_integer, show

AnyParallelConfig = ParallelConfig | ContextParallelConfig | TensorParallelConfig


def pad_to_multiple(states: Tensor, multiple: int) -> Tensor:
    """Adds zeros at the end of dimension 1 until its length is a multiple."""
    return F.pad(states, [0, 0] * (states.ndim - 2) + [0, -states.shape[1] % multiple])


def to_shards(states: Tensor, modality_lengths: tuple[int, ...], num_shards: int) -> Tensor:
    """Pads every modality and orders the sequence (dimension 1) shard by shard."""
    if num_shards == 1:
        return states
    padded = [pad_to_multiple(part, num_shards) for part in states.split(modality_lengths, dim=1)]
    parts = [part.unflatten(1, (num_shards, -1)) for part in padded]
    return torch.cat(parts, dim=2).flatten(1, 2)


def from_shards(states: Tensor, modality_lengths: tuple[int, ...], num_shards: int) -> Tensor:
    """Undoes `to_shards`."""
    shard_lengths = [-(-length // num_shards) for length in modality_lengths]
    parts = states.unflatten(1, (num_shards, -1)).split(shard_lengths, dim=2)
    return torch.cat([x.flatten(1, 2)[:, :length] for x, length in zip(parts, modality_lengths, strict=True)], dim=1)


def ulysses_group(parallel_config: ParallelConfig | None) -> "dist.ProcessGroup | None":
    """The processes that share out the sequence, if it is shared out."""
    context = None if parallel_config is None else parallel_config.context_parallel_config
    # Diffusers keeps the mesh of the processes to itself; a public property there would replace the private name.
    return None if context is None else context._ulysses_mesh.get_group()


def gather_sequence(states: Tensor, lengths: tuple[int, ...], group: "dist.ProcessGroup") -> Tensor:
    """From a shard of the sequence and all heads to the whole sequence and an equal part of the heads."""
    num_shards, num_heads = group.size(), states.shape[2]
    if num_heads % num_shards:  # only so far that every process has one
        states = states.repeat_interleave(math.lcm(num_heads, num_shards) // num_heads, dim=2)
    return from_shards(SeqAllToAllDim.apply(group, states, 2, 1), lengths, num_shards)


def gather_heads(states: Tensor, modality_lengths: tuple[int, ...], group: "dist.ProcessGroup") -> Tensor:
    """Undoes `gather_sequence`."""
    return SeqAllToAllDim.apply(group, to_shards(states, modality_lengths, group.size()), 1, 2)


class MagiHumanParallelMixin:
    """Diffusers' context and tensor parallelism, for a transformer with `transformer_blocks`."""

    _cp_plan: ContextParallelModelPlan = {
        "shard_tokens": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "rope": dict.fromkeys((0, 1), ContextParallelInput(split_dim=1, expected_dims=4, split_output=True)),
        "gather_tokens": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    # Heads and inner channels are shared out. As blocks differ, what is alike in all of them is listed below.
    _tp_plan: dict[str, str | PackedColwiseParallel] = {
        **dict.fromkeys(("projections.*.to_q", "projections.*.to_k", "projections.*.to_v"), "colwise"),
        "gated_projections.*.to_gate": "colwise",
        "projections.*.to_out": "rowwise",
        "feed_forwards.*.linear_in": PackedColwiseParallel(),  # of the parts that each linear names
        "feed_forwards.*.linear_out": "rowwise",
    }

    def _parts_with(self, name: str) -> nn.ModuleList:
        """The parts of all blocks that have a linear of the name."""
        parts = self.transformer_blocks.modules()
        return nn.ModuleList(part for part in parts if isinstance(getattr(part, name, None), nn.Module))

    projections = property(lambda self: self._parts_with("to_out"))
    gated_projections = property(lambda self: self._parts_with("to_gate"))
    feed_forwards = property(lambda self: self._parts_with("linear_out"))

    def enable_parallelism(self, *, config: AnyParallelConfig, cp_plan: dict[str, Any] | None = None) -> None:
        """Shares the work out to the processes of `torch.distributed`, each of which must be given the same inputs.

        A `ContextParallelConfig` splits the sequence, of any lengths, to `ulysses_degree` processes, by a `cp_plan` or
        the model's own; a `TensorParallelConfig` splits the weights of the blocks to `tp_degree` (Diffusers has it on
        accelerators only). `ValueError`: `ulysses_degree` does not divide the attention heads, or comes with a
        first-block cache, or `ring_degree` is not 1; `tp_degree` does not divide the key and value heads, or
        projections are fused.
        """
        self.check_parallelism(config)
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def _resolve_parallel_config(self, config: AnyParallelConfig) -> ParallelConfig:
        # The one method that Diffusers calls both here and while it loads; goes once `from_pretrained` checks by a
        # method of the model whether the weights can be split.
        self.check_parallelism(config)
        return super()._resolve_parallel_config(config)

    def check_parallelism(self, config: AnyParallelConfig) -> None:
        """Raises the errors of `enable_parallelism`."""
        if not isinstance(config, AnyParallelConfig):
            raise ValueError(f"`config`={show(config)} must be a `ContextParallelConfig` or `TensorParallelConfig`.")
        context = config if isinstance(config, ContextParallelConfig) else None
        tensor = config if isinstance(config, TensorParallelConfig) else None
        if isinstance(config, ParallelConfig):
            context, tensor = config.context_parallel_config, config.tensor_parallel_config
        degrees = []
        if context is not None:
            if context.ring_degree > 1:
                reason = "it can neither leave out the padding of shards nor serve frame-local layers"
                raise ValueError(f"`ring_degree`={context.ring_degree} must be 1: {reason}. Use `ulysses_degree`.")
            check_cache(self._cache_config, is_shared_out=True)
            degrees.append(("ulysses_degree", context.ulysses_degree, self.config.num_attention_heads, "attention"))
        if tensor is not None:
            self.check_projections_are_unfused()
            degree = tensor.tp_degree if tensor.mesh is None else tensor.mesh.size()
            degrees.append(("tp_degree", degree, self.config.num_key_value_heads, "key and value"))
        for name, degree, num_heads, kind in degrees:
            if num_heads % check_integer(name, degree):
                allowed = [size for size in range(1, num_heads + 1) if num_heads % size == 0]
                raise ValueError(f"`{name}`={degree} must divide the {num_heads} {kind} heads: one of {allowed}.")

    @property
    def _num_shards(self) -> int:
        context = None if self._parallel_config is None else self._parallel_config.context_parallel_config
        return 1 if context is None else context.ulysses_degree
