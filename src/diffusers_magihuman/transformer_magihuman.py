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
"""The MagiHuman transformer: one stream of video, audio and text tokens, self-attention alone, no timestep.

Notable features:

- the first and last layers ("sandwich") hold their own linears and norms for video, audio and text
- grouped-query attention with a sigmoid gate for every head, and optional frame-local attention
- rotary positions over time, height and width that put audio and video on one clock
- the residual stream, norms, embedders, heads and rotary table are float32; linears run in the dtype of the weights
"""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    SeqAllToAllDim,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.utils import BaseOutput, apply_lora_scale

from .caches import MagiHumanCacheMixin
from .parallel import MagiHumanParallelMixin, make_tensor_parallel_plan
from .quantization import QUANTIZATION_SKIP_MODULES, check_quantization_config
from .single_file import MagiHumanSingleFileMixin


if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class MagiHumanTransformer3DModelOutput(BaseOutput):
    """
    Output of [`MagiHumanTransformer3DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, num_frames, height, width)`):
            Velocity of the video latents, float32.
        audio_sample (`torch.Tensor` of shape `(batch_size, audio_length, audio_in_channels)`):
            Velocity of the audio latents, float32.
    """

    sample: torch.Tensor
    audio_sample: torch.Tensor | None = None  # the default lets accelerate's hooks rebuild an output from its values


def pad_to_multiple(states: torch.Tensor, multiple: int) -> torch.Tensor:
    """Adds zeros at the end of dimension 1 until its length is a multiple."""
    return F.pad(states, [0, 0] * (states.ndim - 2) + [0, -states.shape[1] % multiple])


class SequenceLayout(NamedTuple):
    """Where the tokens of one sequence lie: video (frame by frame, row by row), then audio, then text.

    With context parallelism each process holds a shard, an equal part of the video, of the audio and of the text.
    """

    num_frames: int
    height: int
    width: int
    audio_length: int
    text_length: int
    num_shards: int = 1

    @property
    def frame_length(self) -> int:
        return self.height * self.width

    @property
    def video_length(self) -> int:
        return self.num_frames * self.frame_length

    @property
    def modality_lengths(self) -> tuple[int, int, int]:
        return self.video_length, self.audio_length, self.text_length

    @property
    def shard_lengths(self) -> tuple[int, ...]:
        return tuple(-(-length // self.num_shards) for length in self.modality_lengths)

    def to_shards(self, states: torch.Tensor) -> torch.Tensor:
        """Pads every modality and orders the sequence (dimension 1) shard by shard."""
        parts = [
            pad_to_multiple(part, self.num_shards).unflatten(1, (self.num_shards, length))
            for part, length in zip(states.split(self.modality_lengths, dim=1), self.shard_lengths, strict=True)
        ]
        return torch.cat(parts, dim=2).flatten(1, 2)

    def from_shards(self, states: torch.Tensor) -> torch.Tensor:
        """Undoes `to_shards`."""
        parts = states.unflatten(1, (self.num_shards, -1)).split(self.shard_lengths, dim=2)
        lengths = self.modality_lengths
        return torch.cat([part.flatten(1, 2)[:, :n] for part, n in zip(parts, lengths, strict=True)], dim=1)


class MagiHumanAttentionInputs(NamedTuple):
    """What attention needs besides the tokens; it depends on their numbers and on the text mask alone.

    `rotary_emb` is the table of [`MagiHumanRotaryPosEmbed`], `attention_mask` is boolean of shape
    `(batch_size, 1, 1, sequence_length)`, or `None` when every token is real.
    """

    rotary_emb: tuple[torch.Tensor, torch.Tensor]
    attention_mask: torch.Tensor | None


class MagiHumanRMSNorm(nn.RMSNorm):
    """RMSNorm that computes and returns float32 whatever the dtype of its input and weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)


class MagiHumanFloat32Linear(nn.Linear):
    """Linear that computes in float32 whatever the dtype of its input and weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden_states.float(), self.weight.float(), bias)


class ModalityLayer(nn.Module):
    """Three copies of a layer, one for each modality, each applied to its own slice of the sequence (dimension 1)."""

    def __init__(self, video: nn.Module, audio: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.video = video
        self.audio = audio
        self.text = text

    def forward(self, hidden_states: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        video, audio, text = hidden_states.split(layout.shard_lengths, dim=1)
        return torch.cat([self.video(video), self.audio(audio), self.text(text)], dim=1)


class ModalityLinear(ModalityLayer):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(*(nn.Linear(in_features, out_features, bias=False) for _ in range(3)))


class ModalityRMSNorm(ModalityLayer):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(*(MagiHumanRMSNorm(dim, eps=eps) for _ in range(3)))


def make_linear(in_features: int, out_features: int, per_modality: bool) -> nn.Module:
    if per_modality:
        return ModalityLinear(in_features, out_features)
    return nn.Linear(in_features, out_features, bias=False)


def make_norm(dim: int, eps: float, per_modality: bool) -> nn.Module:
    return ModalityRMSNorm(dim, eps) if per_modality else MagiHumanRMSNorm(dim, eps=eps)


def concatenate_linears(layers: Sequence[nn.Linear]) -> nn.Linear:
    for layer in layers:
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
            raise ValueError(
                f"Only plain linears can be fused, but one is a {type(layer)} with a weight of {type(layer.weight)}:"
                " fuse before quantising, and without a LoRA."
            )
    weight = torch.cat([layer.weight for layer in layers])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    fused.weight.copy_(weight)
    return fused


def apply_layer(layer: nn.Module, hidden_states: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Runs a layer that all modalities share, or one that needs to know where each of them lies."""
    return layer(hidden_states, layout) if isinstance(layer, ModalityLayer) else layer(hidden_states)


class MagiHumanRotaryPosEmbed(nn.Module):
    """
    Rotary positions of a video, audio and text sequence.

    The time of a video token is its latent frame; height and width are centred on 0. Audio is stretched over the time
    of the video. Text has no position of its own in style "v2" and spans 0 to 1 in style "v1".

    Args:
        attention_head_dim (`int`): Size of a head; `attention_head_dim // 8` frequencies for each of the three axes.
        theta (`float`): Base of the frequencies.
        coordinate_style (`str`): `"v2"` (base and distilled) or `"v1"` (super-resolution).
    """

    def __init__(self, attention_head_dim: int, theta: float, coordinate_style: str) -> None:
        super().__init__()
        self.num_bands = attention_head_dim // 8
        self.theta = theta
        self.coordinate_style = coordinate_style

    def forward(
        self, layout: SequenceLayout, text_mask: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            layout (`SequenceLayout`): Token grid of the video and lengths of audio and text.
            text_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*): True for real tokens.

        Returns:
            Cosine and sine, each float32 of shape `(batch_size or 1, sequence_length, 1, 3 * num_bands)`, in the order
            of the shards and padded like them if there are several.
        """
        num_frames, height, width, audio_length, text_length, _ = layout
        if text_mask is None:
            text_mask = torch.ones(1, text_length, dtype=torch.bool, device=device)

        axes = [torch.arange(size, dtype=torch.float32, device=device) for size in (num_frames, height, width)]
        axes = [axes[0], axes[1] - (height - 1) / 2, axes[2] - (width - 1) / 2]
        video = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)

        audio_frames = num_frames if self.coordinate_style == "v1" else (audio_length - 1) // 4 + 1
        audio_scale = (audio_frames - 1) / (audio_length - 1) if audio_length > 1 else 1.0
        audio_time = torch.arange(audio_length, dtype=torch.float32, device=device) * audio_scale

        text_position = text_mask.cumsum(dim=1).float() - 1
        text_lengths = text_mask.sum(dim=1, keepdim=True).float()
        if self.coordinate_style == "v1":
            text_time = text_position * (1 / (text_lengths - 1).clamp(min=1))
        else:
            # A lone token stands one step before the video; more of them are all at the origin.
            text_time = torch.where(text_lengths > 1, 0.0, text_position - text_lengths)

        batch_size = text_time.shape[0]
        time = torch.cat([audio_time.expand(batch_size, -1), text_time], dim=1)
        coordinates = torch.cat([video.expand(batch_size, -1, -1), F.pad(time[..., None], (0, 2))], dim=1)

        bands = torch.arange(self.num_bands, dtype=torch.float32, device=device) / self.num_bands
        angles = (coordinates[..., None] * (1.0 / self.theta**bands)).flatten(2)  # (batch, sequence, 3 * bands)
        angles = layout.to_shards(angles)
        return angles.cos()[:, :, None], angles.sin()[:, :, None]


def apply_rotary_emb(hidden_states: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the leading channels of every head in two halves; `(batch_size, sequence_length, heads, head_dim)`."""
    cos, sin = rotary_emb
    half = cos.shape[-1]
    first, second, rest = hidden_states.split([half, half, hidden_states.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


# Diffusers' attention backends by what they can serve. Others fail there in obscure ways, or silently: some with masks
# take padding at the end for granted.
CPU_BACKENDS = ("native", "_native_flash", "_native_math", "flex")
FLOAT32_BACKENDS = ("native", "_native_efficient", "_native_math", "_native_xla", "flex", "xformers")
MASK_BACKENDS = (
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_math",
    "_native_npu",
    "flex",
    "flash_varlen_hub",
    "_flash_3_varlen_hub",
    "xformers",
)


def check_attention_backend(
    backend: AttentionBackendName, query: torch.Tensor, attention_mask: torch.Tensor | None
) -> None:
    """Raises a `ValueError` if the backend cannot serve the device, the dtype or the mask."""
    is_on_cpu = query.device.type == "cpu"
    for is_needed, allowed, case in (
        (is_on_cpu, CPU_BACKENDS, "on a CPU"),
        (not is_on_cpu and query.dtype == torch.float32, FLOAT32_BACKENDS, "in float32"),
        (attention_mask is not None, MASK_BACKENDS, "for texts of different lengths in one batch"),
    ):
        if is_needed and backend.value not in allowed:
            raise ValueError(f"The attention backend '{backend.value}' does not work {case}; take one of {allowed}.")


class MagiHumanAttnProcessor:
    """Gated grouped-query self-attention, over the whole sequence or local to the neighbouring video frames."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MagiHumanAttention",
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        layout: SequenceLayout,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value, gate = apply_layer(attn.to_qkv, hidden_states, layout).split(attn.projection_dims, -1)
        else:
            query, key, value = (apply_layer(to, hidden_states, layout) for to in (attn.to_q, attn.to_k, attn.to_v))
            gate = apply_layer(attn.to_gate, hidden_states, layout) if attn.is_gated else None

        query = apply_layer(attn.norm_q, query.unflatten(-1, (-1, attn.head_dim)), layout)
        key = apply_layer(attn.norm_k, key.unflatten(-1, (-1, attn.head_dim)), layout)
        value = value.unflatten(-1, (-1, attn.head_dim))

        # Norm and rotation are float32; only their result is rounded to the dtype of the values.
        query = apply_rotary_emb(query, rotary_emb).to(value.dtype)
        key = apply_rotary_emb(key, rotary_emb).to(value.dtype)

        if layout.num_shards > 1:
            # Key and value heads are repeated before they are sent only as far as every process needs one.
            num_repeats = math.lcm(key.shape[2], layout.num_shards) // key.shape[2]
            key = key.repeat_interleave(num_repeats, dim=2)
            value = value.repeat_interleave(num_repeats, dim=2)
            query, key, value = (self._gather_sequence(states, layout) for states in (query, key, value))

        # Few backends group key and value heads themselves, so they are repeated here.
        num_groups = query.shape[2] // key.shape[2]
        key = key.repeat_interleave(num_groups, dim=2)
        value = value.repeat_interleave(num_groups, dim=2)

        if attn.local_attention_frames is None:
            attn_output = self._attend(query, key, value, attention_mask)
        else:
            attn_output = self._attend_locally(query, key, value, attention_mask, layout, attn.local_attention_frames)

        if layout.num_shards > 1:
            attn_output = self._gather_heads(attn_output, layout)
        if attn.is_gated:
            attn_output = attn_output * gate.float().sigmoid()[..., None]
        return apply_layer(attn.to_out, attn_output.flatten(2).to(hidden_states.dtype), layout)

    def _gather_sequence(self, states: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """From a shard of the sequence and all heads to the whole sequence and an equal part of the heads."""
        return layout.from_shards(SeqAllToAllDim.apply(self._ulysses_group, states, 2, 1))

    def _gather_heads(self, states: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """Undoes `_gather_sequence`."""
        return SeqAllToAllDim.apply(self._ulysses_group, layout.to_shards(states), 1, 2)

    @property
    def _ulysses_group(self) -> "torch.distributed.ProcessGroup":
        return self._parallel_config.context_parallel_config._ulysses_mesh.get_group()

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        check_attention_backend(backend, query, attention_mask)
        if backend == AttentionBackendName.XFORMERS and attention_mask is not None:
            attention_mask = attention_mask[:, 0, 0]  # a boolean mask of four dimensions would be added to the scores
        return dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=backend)

    def _attend_locally(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layout: SequenceLayout,
        num_neighbours: int,
    ) -> torch.Tensor:
        """A frame sees the frames up to `num_neighbours` away, all audio and all text; audio and text see everything.

        One softmax over concatenated keys for each frame needs no mask, so every backend can serve it, and cost grows
        linearly with the number of frames. Frames whose neighbours are the same, as all are in a short video, go
        together.
        """

        def window(states: torch.Tensor, start: int, end: int, dim: int = 1) -> torch.Tensor:
            if start == 0 and end == layout.num_frames:
                return states
            video = states.narrow(dim, start * layout.frame_length, (end - start) * layout.frame_length)
            rest = states.narrow(dim, layout.video_length, states.shape[dim] - layout.video_length)
            return torch.cat([video, rest], dim=dim)

        # A loop up to the number of frames, so that a compiled graph need not fix it while every frame sees all.
        outputs, first = [], 0
        while first < layout.num_frames:
            start, end = max(first - num_neighbours, 0), min(first + num_neighbours + 1, layout.num_frames)
            last = min(num_neighbours + 1, layout.num_frames) if end - start == layout.num_frames else first + 1
            frame_query = query.narrow(1, first * layout.frame_length, (last - first) * layout.frame_length)
            frame_mask = None if attention_mask is None else window(attention_mask, start, end, dim=-1)
            outputs.append(self._attend(frame_query, window(key, start, end), window(value, start, end), frame_mask))
            first = last
        outputs.append(self._attend(query[:, layout.video_length :], key, value, attention_mask))
        return torch.cat(outputs, dim=1)


def drop_fused_projections(_attn: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, _metadata: Any) -> None:
    """Leaves fused projections out of what is saved, as the linears that they were made of are there."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}to_qkv.")]:
        del state_dict[name]


class MagiHumanAttention(nn.Module, AttentionModuleMixin):
    """Self-attention with grouped key and value heads, RMS-normed queries and keys and an optional gate per head.

    `fuse_projections` joins query, key, value and gate in one linear, which gives the same result.
    """

    _default_processor_cls = MagiHumanAttnProcessor
    _available_processors = [MagiHumanAttnProcessor]

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        eps: float,
        is_gated: bool,
        per_modality: bool,
        local_attention_frames: int | None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.is_gated = is_gated
        self.local_attention_frames = local_attention_frames
        self.use_bias = False
        query_dim, key_value_dim = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.projection_dims = (query_dim, key_value_dim, key_value_dim, num_attention_heads if is_gated else 0)

        self.to_q = make_linear(hidden_size, query_dim, per_modality)
        self.to_k = make_linear(hidden_size, key_value_dim, per_modality)
        self.to_v = make_linear(hidden_size, key_value_dim, per_modality)
        if is_gated:
            self.to_gate = make_linear(hidden_size, num_attention_heads, per_modality)
        self.to_out = make_linear(query_dim, hidden_size, per_modality)
        self.norm_q = make_norm(head_dim, eps, per_modality)
        self.norm_k = make_norm(head_dim, eps, per_modality)
        self.set_processor(self._default_processor_cls())
        self.register_state_dict_post_hook(drop_fused_projections)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """
        Adds `to_qkv`, the linears of query, key, value and gate in one; `unfuse_projections` removes it.

        Raises:
            `ValueError`: The linears are quantised or have a LoRA.
        """
        if self.fused_projections:
            return
        layers = [self.to_q, self.to_k, self.to_v] + ([self.to_gate] if self.is_gated else [])
        if isinstance(self.to_q, ModalityLinear):
            experts = [[layer.video, layer.audio, layer.text] for layer in layers]
            self.to_qkv = ModalityLayer(*(concatenate_linears(expert) for expert in zip(*experts, strict=True)))
        else:
            self.to_qkv = concatenate_linears(layers)
        self.fused_projections = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        layout: SequenceLayout,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary_emb, layout, attention_mask)


def multiply(states: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product, written over `states` unless autograd may need them."""
    return states * factor if torch.is_grad_enabled() else states.mul_(factor)


class ClampedGELU(nn.Module):
    """`x * sigmoid(1.702 x)` of values cut at 7, in float32.

    The wide activations of the feed-forward are the largest tensors of a block. Values are cut before they become
    float32, which is the same in less memory, and without autograd a product takes the place of one of its factors.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.clamp(max=7.0).float()
        return multiply(hidden_states, (1.702 * hidden_states).sigmoid_())


class ClampedSwiGLU(ClampedGELU):
    """[`ClampedGELU`] of the first half of the channels times one plus the second half, which is cut at -7 and 7."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, linear = hidden_states.chunk(2, dim=-1)
        gate = super().forward(gate)
        return multiply(gate, linear.clamp(-7.0, 7.0).float().add_(1.0))


class MagiHumanFeedForward(nn.Module):
    """Two linears around [`ClampedGELU`] (inner size `4 * hidden_size`) or [`ClampedSwiGLU`] (two thirds of that)."""

    def __init__(self, hidden_size: int, use_gelu: bool, per_modality: bool) -> None:
        super().__init__()
        inner_size = hidden_size * 4 if use_gelu else int(hidden_size * 4 * 2 / 3) // 4 * 4
        self.linear_in = make_linear(hidden_size, inner_size if use_gelu else 2 * inner_size, per_modality)
        self.act = ClampedGELU() if use_gelu else ClampedSwiGLU()
        self.linear_out = make_linear(inner_size, hidden_size, per_modality)
        self.chunk_size = None  # tokens at a time, or all of them

    def forward(self, hidden_states: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        linears, parts = [(self.linear_in, self.linear_out)], [hidden_states]
        if isinstance(self.linear_in, ModalityLayer):
            linears = zip(self.linear_in.children(), self.linear_out.children(), strict=True)
            parts = hidden_states.split(layout.shard_lengths, dim=1)
        outputs = []
        for (linear_in, linear_out), part in zip(linears, parts, strict=True):
            for chunk in (part,) if self.chunk_size is None else part.split(self.chunk_size, dim=1):
                outputs.append(linear_out(self.act(linear_in(chunk)).to(chunk.dtype)))
        return torch.cat(outputs, dim=1)


class MagiHumanTransformerBlock(nn.Module):
    """Attention and feed-forward on a float32 residual stream; `dtype` is what the linears compute in."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        eps: float,
        is_gated: bool,
        per_modality: bool,
        use_gelu: bool,
        use_post_norm: bool,
        local_attention_frames: int | None,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(hidden_size, eps, per_modality)
        self.attn = MagiHumanAttention(
            hidden_size,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            eps,
            is_gated,
            per_modality,
            local_attention_frames,
        )
        self.post_norm1 = make_norm(hidden_size, eps, per_modality) if use_post_norm else nn.Identity()
        self.norm2 = make_norm(hidden_size, eps, per_modality)
        self.ff = MagiHumanFeedForward(hidden_size, use_gelu, per_modality)
        self.post_norm2 = make_norm(hidden_size, eps, per_modality) if use_post_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        layout: SequenceLayout,
        attention_mask: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        norm_hidden_states = apply_layer(self.norm1, hidden_states, layout).to(dtype)
        attn_output = self.attn(norm_hidden_states, rotary_emb, layout, attention_mask)
        # The norm after attention is rounded to the dtype of the linears, the norm after the feed-forward is not.
        hidden_states = hidden_states + apply_layer(self.post_norm1, attn_output, layout).to(dtype)
        del attn_output  # the feed-forward needs the most memory

        norm_hidden_states = apply_layer(self.norm2, hidden_states, layout).to(dtype)
        ff_output = self.ff(norm_hidden_states, layout)
        return hidden_states + apply_layer(self.post_norm2, ff_output, layout)


TransformerBlockRegistry.register(
    MagiHumanTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


class MagiHumanTransformer3DModel(
    MagiHumanParallelMixin,
    ModelMixin,
    ConfigMixin,
    AttentionMixin,
    PeftAdapterMixin,
    MagiHumanSingleFileMixin,
    MagiHumanCacheMixin,
):
    r"""
    The single-stream transformer of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986): predicts the flow
    velocity of video and audio latents together, from their noisy latents and a text.

    The model never sees a timestep. The defaults are those of the published base model with 15.3B parameters.

    Args:
        patch_size (`tuple[int, int, int]`, defaults to `(1, 2, 2)`):
            Latent frames, rows and columns in one video token.
        in_channels (`int`, defaults to 48): Channels of the video latents.
        audio_in_channels (`int`, defaults to 64): Channels of the audio latents.
        text_in_channels (`int`, defaults to 3584): Channels of the text embeddings.
        num_layers (`int`, defaults to 40): Number of blocks.
        num_attention_heads (`int`, defaults to 40): Query heads; the hidden size is this times `attention_head_dim`.
        num_key_value_heads (`int`, defaults to 8): Key and value heads.
        attention_head_dim (`int`, defaults to 128): Channels of a head.
        modality_layers (`tuple[int, ...]`): Blocks with their own linears and norms for each modality.
        gelu_layers (`tuple[int, ...]`): Blocks whose feed-forward is a clamped GELU instead of a clamped SwiGLU.
        post_norm_layers (`tuple[int, ...]`): Blocks that also normalise the outputs of attention and feed-forward.
        gated_attention (`bool`, defaults to `True`): Whether a sigmoid gate scales each head.
        rope_theta (`float`, defaults to 10000.0): Base of the rotary frequencies.
        coordinate_style (`str`, defaults to `"v2"`): Positions of audio and text, see [`MagiHumanRotaryPosEmbed`].
        local_attention_layers (`tuple[int, ...]`):
            Blocks in which a video token sees only the frames around its own, besides audio and text.
        local_attention_frames (`int`, defaults to 11): Frames seen on either side in these blocks.
        norm_eps (`float`, defaults to 1e-6): Epsilon of every norm.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MagiHumanTransformerBlock"]
    _repeated_blocks = ["MagiHumanTransformerBlock"]
    _keep_in_fp32_modules = [
        *QUANTIZATION_SKIP_MODULES,
        "norm1",
        "norm2",
        "norm_q",
        "norm_k",
        "post_norm1",
        "post_norm2",
        "video_norm_out",
        "audio_norm_out",
    ]
    _skip_layerwise_casting_patterns = ["embedder", "norm", "proj_out"]
    _cp_plan = {
        "shard_tokens": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "rope": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "gather_tokens": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 48,
        audio_in_channels: int = 64,
        text_in_channels: int = 3584,
        num_layers: int = 40,
        num_attention_heads: int = 40,
        num_key_value_heads: int = 8,
        attention_head_dim: int = 128,
        modality_layers: tuple[int, ...] = (0, 1, 2, 3, 36, 37, 38, 39),
        gelu_layers: tuple[int, ...] = (0, 1, 2, 3),
        post_norm_layers: tuple[int, ...] = (),
        gated_attention: bool = True,
        rope_theta: float = 10000.0,
        coordinate_style: str = "v2",
        local_attention_layers: tuple[int, ...] = (),
        local_attention_frames: int = 11,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_attention_heads % num_key_value_heads != 0:
            raise ValueError(
                f"`num_attention_heads`={num_attention_heads} must be a multiple of"
                f" `num_key_value_heads`={num_key_value_heads}."
            )
        if coordinate_style not in ("v1", "v2"):
            raise ValueError(f"`coordinate_style`={coordinate_style!r} must be 'v1' or 'v2'.")

        hidden_size = num_attention_heads * attention_head_dim
        video_token_size = in_channels * math.prod(patch_size)
        self.gradient_checkpointing = False

        self.video_embedder = MagiHumanFloat32Linear(video_token_size, hidden_size)
        self.audio_embedder = MagiHumanFloat32Linear(audio_in_channels, hidden_size)
        self.text_embedder = MagiHumanFloat32Linear(text_in_channels, hidden_size)
        self.rope = MagiHumanRotaryPosEmbed(attention_head_dim, rope_theta, coordinate_style)

        self.transformer_blocks = nn.ModuleList(
            [
                MagiHumanTransformerBlock(
                    hidden_size,
                    num_attention_heads,
                    num_key_value_heads,
                    attention_head_dim,
                    norm_eps,
                    is_gated=gated_attention,
                    per_modality=layer in modality_layers,
                    use_gelu=layer in gelu_layers,
                    use_post_norm=layer in post_norm_layers,
                    local_attention_frames=local_attention_frames if layer in local_attention_layers else None,
                )
                for layer in range(num_layers)
            ]
        )

        self.video_norm_out = MagiHumanRMSNorm(hidden_size, eps=norm_eps)
        self.audio_norm_out = MagiHumanRMSNorm(hidden_size, eps=norm_eps)
        self.video_proj_out = MagiHumanFloat32Linear(hidden_size, video_token_size, bias=False)
        self.audio_proj_out = MagiHumanFloat32Linear(hidden_size, audio_in_channels, bias=False)

        # Where the hooks of context parallelism sit: not on linears, which adapters wrap and unwrap.
        self.shard_tokens = nn.Identity()
        self.gather_tokens = nn.Identity()
        self._tp_plan = make_tensor_parallel_plan(num_layers, modality_layers, gelu_layers, gated_attention)

    @property
    def dtype(self) -> torch.dtype:
        """What the linears of the blocks compute in; of quantised ones the dtype that they were loaded with."""
        return self.config.get("_pre_quantization_dtype") or get_parameter_dtype(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "MagiHumanTransformer3DModel":
        """
        As [`ModelMixin.from_pretrained`], after a look at `quantization_config`.

        Raises:
            `ValueError`: `quantization_config` would convert embedders or heads.
        """
        if kwargs.get("quantization_config") is not None:
            check_quantization_config(kwargs["quantization_config"])
            # Diffusers adds the names of the float32 modules to the list that the caller's config holds.
            kwargs["quantization_config"] = copy.deepcopy(kwargs["quantization_config"])
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def add_adapter(self, adapter_config: "PeftConfig", adapter_name: str = "default") -> None:
        """
        Adds an adapter for training.

        `target_modules` that name a layer with a linear for each modality, as `"to_q"` does in the first and last
        blocks, mean its three linears; `"to_q.video"` means one of them.

        Args:
            adapter_config (`PeftConfig`): For example a `peft.LoraConfig`; it is copied.
            adapter_name (`str`, defaults to `"default"`): Name for `set_adapters` and others.

        Raises:
            `ValueError`: No linear is targeted, or something else; the name is taken; the projections are fused. The
                model is left as it was.
        """
        from peft import PeftConfig
        from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

        if not isinstance(adapter_config, PeftConfig):
            raise ValueError(f"`adapter_config` must be a `PeftConfig`, but is a {type(adapter_config).__name__}.")
        self.check_projections_are_unfused()
        targets = {}
        for name, module in self.named_modules():
            if not check_target_module_exists(adapter_config, name):
                continue
            if isinstance(module, ModalityLinear):
                targets |= {f"{name}.{modality}": linear for modality, linear in module.named_children()}
            else:
                targets[name] = module
        others = [name for name, module in targets.items() if not isinstance(module, nn.Linear | BaseTunerLayer)]
        if others or not targets:
            raise ValueError(
                f"`target_modules`={adapter_config.target_modules} of `adapter_config` must target linears of"
                f" {type(self).__name__}, but match {', '.join(others) or 'nothing'}. Allowed are for example 'to_q',"
                " 'to_out', 'linear_in', 'to_q.video', 'video_embedder'."
            )
        adapter_config = copy.copy(adapter_config)
        adapter_config.target_modules = set(targets)
        super().add_adapter(adapter_config, adapter_name)

    def check_projections_are_unfused(self) -> None:
        """
        Raises:
            `ValueError`: `fuse_qkv_projections` was called: an adapter of `to_q` would not be read.
        """
        attentions = (module for module in self.modules() if isinstance(module, MagiHumanAttention))
        if any(attention.fused_projections for attention in attentions):
            raise ValueError(
                "Fused projections would ignore a LoRA: call `transformer.unfuse_qkv_projections()` first."
            )

    def enable_forward_chunking(self, chunk_size: int = 4096) -> None:
        """
        Runs the feed-forward of every block on a part of the tokens at a time.

        Its wide activations are the largest tensors of a long or large video. The result differs by rounding at most.

        Args:
            chunk_size (`int`, defaults to 4096): Number of tokens.

        Raises:
            `ValueError`: `chunk_size` is less than 1.
        """
        if chunk_size < 1:
            raise ValueError(f"`chunk_size`={chunk_size} must be 1 or more.")
        for block in self.transformer_blocks:
            block.ff.chunk_size = chunk_size

    def disable_forward_chunking(self) -> None:
        """Undoes `enable_forward_chunking`."""
        for block in self.transformer_blocks:
            block.ff.chunk_size = None

    def prepare_attention_inputs(
        self,
        hidden_states: torch.Tensor,
        audio_hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> MagiHumanAttentionInputs:
        """
        Computes what is the same in every step of a generation, for `forward`'s `attention_inputs`.

        No weights are needed, so it may be called while the model is offloaded. The arguments are those of `forward`,
        of which only shapes, the mask and the device of the video latents count.

        Raises:
            `ValueError`: A shape that does not fit the config.
        """
        layout = self._get_layout(hidden_states, audio_hidden_states, encoder_hidden_states)
        rotary_emb = self.rope(layout, encoder_attention_mask, hidden_states.device)
        attention_mask = None
        if encoder_attention_mask is not None:
            attention_mask = F.pad(encoder_attention_mask, (layout.video_length + layout.audio_length, 0), value=True)
            attention_mask = attention_mask[:, None, None]  # (batch, 1, 1, sequence)
        return MagiHumanAttentionInputs(rotary_emb, attention_mask)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        audio_hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,  # noqa: ARG002 (read by the decorator)
        attention_inputs: MagiHumanAttentionInputs | None = None,
        return_dict: bool = True,
    ) -> MagiHumanTransformer3DModelOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels, num_frames, height, width)`):
                Noisy video latents; number of frames, height and width are multiples of `patch_size`.
            audio_hidden_states (`torch.Tensor` of shape `(batch_size, audio_length, audio_in_channels)`):
                Noisy audio latents.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, text_length, text_in_channels)`):
                Text embeddings.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*):
                Boolean, true for real tokens. Leave it out when every token is real: then attention needs no mask.
            attention_kwargs (`dict`, *optional*): `scale` sets the scale of LoRA layers for this call.
            attention_inputs (`MagiHumanAttentionInputs`, *optional*):
                Result of [`~MagiHumanTransformer3DModel.prepare_attention_inputs`] in place of the mask, for calls
                that share it. Computed if left out.
            return_dict (`bool`, defaults to `True`): Whether to return a [`MagiHumanTransformer3DModelOutput`].

        Returns:
            [`MagiHumanTransformer3DModelOutput`] or the tuple of its two tensors.

        Raises:
            `ValueError`: A shape does not fit the config; `attention_inputs` of another length, or beside a mask.
        """
        layout = self._get_layout(hidden_states, audio_hidden_states, encoder_hidden_states)
        patch_size, dtype = self.config.patch_size, self.dtype
        if attention_inputs is None:
            attention_inputs = self.prepare_attention_inputs(
                hidden_states, audio_hidden_states, encoder_hidden_states, encoder_attention_mask
            )
        elif encoder_attention_mask is not None:
            raise ValueError(
                "`attention_inputs` hold the mask already, so `encoder_attention_mask` must not be given beside them."
            )
        rotary_emb, attention_mask = attention_inputs
        if rotary_emb[0].shape[1] != sum(layout.shard_lengths):
            raise ValueError(
                f"`attention_inputs` were made for {rotary_emb[0].shape[1]} tokens, but there are"
                f" {sum(layout.shard_lengths)}: {layout}."
            )

        # (batch, channels, T, H, W) -> (batch, tokens in the order T H W, values in the order channels, patch)
        video = hidden_states.unflatten(4, (layout.width, patch_size[2]))
        video = video.unflatten(3, (layout.height, patch_size[1])).unflatten(2, (layout.num_frames, patch_size[0]))
        video = video.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

        # Nothing else holds the tokens of each modality, so their memory is free again when the blocks run.
        hidden_states = torch.cat(
            [
                embedder(self.shard_tokens(pad_to_multiple(states, layout.num_shards)))
                for embedder, states in (
                    (self.video_embedder, video),
                    (self.audio_embedder, audio_hidden_states),
                    (self.text_embedder, encoder_hidden_states),
                )
            ],
            dim=1,
        ).float()

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, rotary_emb, layout, attention_mask, dtype
                )
            else:
                hidden_states = block(hidden_states, rotary_emb, layout, attention_mask, dtype)

        video, audio, _ = hidden_states.split(layout.shard_lengths, dim=1)
        video = self.video_proj_out(self.video_norm_out(video)).float()
        audio = self.audio_proj_out(self.audio_norm_out(audio)).float()

        video = self.gather_tokens(video)[:, : layout.video_length]
        audio = self.gather_tokens(audio)[:, : layout.audio_length]

        # Unlike at the input, the values of an output token are in the order patch, channels.
        video = video.unflatten(2, (*patch_size, -1)).unflatten(1, layout[:3])
        video = video.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)

        if not return_dict:
            return video, audio
        return MagiHumanTransformer3DModelOutput(sample=video, audio_sample=audio)

    def _get_layout(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> SequenceLayout:
        config = self.config
        if video.ndim != 5 or video.shape[1] != config.in_channels:
            raise ValueError(
                f"`hidden_states` must have shape (batch_size, {config.in_channels}, num_frames, height, width), but"
                f" has {tuple(video.shape)}."
            )
        if any(size % patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True)):
            raise ValueError(
                f"Frames, height and width of `hidden_states` {tuple(video.shape[2:])} must be multiples of"
                f" `patch_size`={tuple(config.patch_size)}."
            )
        for name, states, channels in (
            ("audio_hidden_states", audio, config.audio_in_channels),
            ("encoder_hidden_states", text, config.text_in_channels),
        ):
            if states.ndim != 3 or states.shape[0] != video.shape[0] or states.shape[2] != channels:
                raise ValueError(
                    f"`{name}` must have shape ({video.shape[0]}, length, {channels}), but has {tuple(states.shape)}."
                )
        if config.coordinate_style == "v1" and (text.shape[1] == 1 or (audio.shape[1] == 1 and video.shape[2] > 1)):
            raise ValueError(
                f"`coordinate_style`='v1' stretches text and audio over the video, so each needs two tokens or more,"
                f" but there are {text.shape[1]} text tokens and {audio.shape[1]} audio tokens."
            )
        grid = (size // patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True))
        return SequenceLayout(*grid, audio.shape[1], text.shape[1], self._num_shards)
