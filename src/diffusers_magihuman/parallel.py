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
"""Several GPUs: which weights tensor parallelism splits, and what neither it nor context parallelism can serve."""

from typing import Any

from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks.tensor_parallel import PackedColwiseParallel
from diffusers.models._modeling_parallel import ContextParallelModelPlan


def make_tensor_parallel_plan(
    num_layers: int, modality_layers: tuple[int, ...], gelu_layers: tuple[int, ...], gated_attention: bool
) -> dict[str, str | PackedColwiseParallel]:
    """How each linear of the blocks is split, by its name: heads and inner channels are shared out."""
    plan = {}
    for layer in range(num_layers):
        styles = {
            "attn.to_q": "colwise",
            "attn.to_k": "colwise",
            "attn.to_v": "colwise",
            "attn.to_out": "rowwise",
            "ff.linear_in": "colwise" if layer in gelu_layers else PackedColwiseParallel([1, 1]),
            "ff.linear_out": "rowwise",
        }
        if gated_attention:
            styles["attn.to_gate"] = "colwise"
        for modality in (".video", ".audio", ".text") if layer in modality_layers else ("",):
            for path, style in styles.items():
                plan[f"transformer_blocks.{layer}.{path}{modality}"] = style
    return plan


def check_divides(name: str, degree: int, num_heads: int, kind: str) -> None:
    if num_heads % degree != 0:
        allowed = [size for size in range(1, num_heads + 1) if num_heads % size == 0]
        raise ValueError(f"`{name}`={degree} must divide the {num_heads} {kind} heads: one of {allowed}.")


def check_cache_of_shards(config: Any) -> None:
    if isinstance(config, FirstBlockCacheConfig):
        raise ValueError(
            "`FirstBlockCacheConfig` cannot work with `ContextParallelConfig`: a process would skip steps by its own"
            " part of the sequence, and others wait for it. Use `MagCacheConfig`."
        )


class MagiHumanParallelMixin:
    """Diffusers' context and tensor parallelism, for a transformer with `transformer_blocks`."""

    def enable_parallelism(
        self,
        *,
        config: ParallelConfig | ContextParallelConfig | TensorParallelConfig,
        cp_plan: dict[str, ContextParallelModelPlan] | None = None,
    ) -> None:
        """
        Shares the work out to the processes of `torch.distributed`, each of which must be given the same inputs.

        Context parallelism splits the sequence, for any lengths of video, audio and text. Tensor parallelism splits
        the weights of the blocks; Diffusers has it on accelerators only.

        Args:
            config (`ContextParallelConfig`, `TensorParallelConfig` or `ParallelConfig` with one of them):
                `ulysses_degree` or `tp_degree` is the number of processes.
            cp_plan (`dict`, *optional*): A plan of context parallelism in place of the model's own.

        Raises:
            `ValueError`: `ulysses_degree` does not divide the attention heads, or comes with a first-block cache;
                `ring_degree` is not 1; `tp_degree` does not divide the key and value heads, or comes with fused
                projections.
        """
        if isinstance(config, ContextParallelConfig):
            config = ParallelConfig(context_parallel_config=config)
        elif isinstance(config, TensorParallelConfig):
            config = ParallelConfig(tensor_parallel_config=config)

        context_config, tensor_config = config.context_parallel_config, config.tensor_parallel_config
        if context_config is not None:
            if context_config.ring_degree > 1:
                raise ValueError(
                    f"`ring_degree`={context_config.ring_degree} must be 1: ring attention can neither leave out the"
                    " padding of shards nor serve frame-local layers. Use `ulysses_degree`."
                )
            check_cache_of_shards(self._cache_config)
            check_divides(
                "ulysses_degree", context_config.ulysses_degree, self.config.num_attention_heads, "attention"
            )
        if tensor_config is not None:
            tp_degree = tensor_config.tp_degree if tensor_config.mesh is None else tensor_config.mesh.size()
            check_divides("tp_degree", tp_degree, self.config.num_key_value_heads, "key and value")
            if any(block.attn.fused_projections for block in self.transformer_blocks):
                raise ValueError(
                    "`TensorParallelConfig` cannot split fused projections: call `unfuse_qkv_projections()` first."
                )
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def enable_cache(self, config: Any) -> None:
        """
        Lets steps reuse what earlier ones computed, see [`~diffusers.CacheMixin.enable_cache`].

        Raises:
            `ValueError`: `config` is one that cannot work with context parallelism, or unknown.
        """
        if self._num_shards > 1:
            check_cache_of_shards(config)
        super().enable_cache(config)

    def fuse_qkv_projections(self) -> None:
        """
        Joins the projections of every attention layer in one linear, which gives the same result.

        Raises:
            `ValueError`: Tensor parallelism has split them.
        """
        if self._parallel_config is not None and self._parallel_config.tensor_parallel_config is not None:
            raise ValueError("Projections that `TensorParallelConfig` has split cannot be fused.")
        super().fuse_qkv_projections()

    @property
    def _num_shards(self) -> int:
        if self._parallel_config is None or self._parallel_config.context_parallel_config is None:
            return 1
        return self._parallel_config.context_parallel_config.ulysses_degree
