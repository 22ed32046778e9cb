# SPDX-License-Identifier: Apache-2.0
"""The MagiHuman transformer: one stream of video, audio and text tokens, self-attention alone, no timestep.

Notable features:

- the first and last layers ("sandwich") hold their own linears and norms, an expert each, for video, audio and text
- grouped-query attention with a sigmoid gate for every head, and optional frame-local attention
- rotary positions over time, height and width that put audio and video on one clock
- the residual stream, norms, embedders, heads and rotary table are float32; linears run in the dtype of the weights
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import Tensor, nn

from .caches import MagiHumanCacheMixin, register_block, register_processor
from .checks import check_choice, check_integer, check_list, check_mask, check_real, check_tensor
from .conversion import EXPERTS, FEED_FORWARD_MULTIPLE, MAX_FEED_FORWARD_MULTIPLE, feed_forward_size
from .parallel import MagiHumanParallelMixin, gather_heads, gather_sequence, pad_to_multiple, to_shards, ulysses_group
from .single_file import MagiHumanSingleFileMixin
from .weights import MagiHumanAdapterMixin, check_is_in_memory, give_zero_rows_a_direction, guarded

if TYPE_CHECKING:
    from peft import PeftConfig


RotaryEmb = tuple[Tensor, Tensor]  # cosine and sine

# Small, and what the latents and the text pass through: no quantiser may touch them.
QUANTIZATION_SKIP_MODULES = ["video_embedder", "audio_embedder", "text_embedder", "video_proj_out", "audio_proj_out"]

MAX_PARAMETERS = 10**11  # the published model has 15.3 billion


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with Python's own numbers; `ValueError` for what is no architecture, or too large a one."""
    limits = dict.fromkeys(("in_channels", "audio_in_channels", "text_in_channels"), 2**16)
    limits |= dict.fromkeys(("num_layers", "num_attention_heads", "num_key_value_heads", "attention_head_dim"), 1024)
    limits["feed_forward_multiple"] = MAX_FEED_FORWARD_MULTIPLE
    sizes = {name: check_integer(name, config[name], 1, high) for name, high in limits.items()}
    *channels, num_layers, heads, kv_heads, head_dim, multiple = sizes.values()
    checked = sizes | {"patch_size": check_list("patch_size", config["patch_size"], [3], check_integer, 1, 64)}
    for name in ("modality_layers", "gelu_layers", "post_norm_layers", "local_attention_layers"):
        checked[name] = check_list(name, config[name], None, check_integer, 0, num_layers - 1)
    checked["gated_attention"] = check_choice("gated_attention", config["gated_attention"], True, False)
    checked["rope_theta"] = check_real("rope_theta", config["rope_theta"], 1.0, 1e9)
    check_choice("coordinate_style", config["coordinate_style"], "v1", "v2")
    frames = check_integer("local_attention_frames", config["local_attention_frames"], 0, 2**20)
    checked |= {"local_attention_frames": frames, "norm_eps": check_real("norm_eps", config["norm_eps"], 1e-12, 1.0)}
    if heads % kv_heads:
        raise ValueError(f"`num_attention_heads`={heads} must be a multiple of `num_key_value_heads`={kv_heads}.")
    if head_dim % 8:
        raise ValueError(f"`attention_head_dim`={head_dim} must be a multiple of 8.")
    hidden_size, num_experts = heads * head_dim, num_layers + 2 * len(set(config["modality_layers"]))
    inner_sizes = [feed_forward_size(hidden_size, is_gelu, multiple) for is_gelu in (False, True)]
    num_rows = num_experts * (max(3 * inner_sizes[0], 2 * inner_sizes[1]) + 2 * (heads + kv_heads) * head_dim)
    num_rows += math.prod(config["patch_size"]) * sum(channels)
    if (num_parameters := num_rows * hidden_size) > MAX_PARAMETERS:
        given = ", ".join(f"`{name}`={size}" for name, size in sizes.items())
        raise ValueError(f"{given} give {num_parameters:.1e} parameters, more than {MAX_PARAMETERS:.0e}.")
    return checked


@dataclass
class MagiHumanTransformer3DModelOutput(BaseOutput):
    """Velocities that [`MagiHumanTransformer3DModel`] predicts, float32.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, num_frames, height, width)`): Of the video latents.
        audio_sample (`torch.Tensor` of shape `(batch_size, audio_length, audio_in_channels)`): Of the audio latents.
    """

    sample: Tensor
    audio_sample: Tensor | None = None  # the default lets accelerate's hooks rebuild an output from its values


@dataclass(frozen=True)
class SequenceLayout:
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

    def split(self, states: Tensor, num_experts: int = len(EXPERTS)) -> tuple[Tensor, ...]:
        """Splits the sequence, or the shard of it (dimension 1), into what each expert sees; one expert sees all."""
        lengths = [-(-length // self.num_shards) for length in self.modality_lengths]
        return states.split(lengths, dim=1) if num_experts > 1 else (states,)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Undoes `SequenceLayout.split`."""
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def make_experts(make: Callable[[], nn.Module], per_modality: bool) -> nn.Module:
    """A module for each modality, or one for all of them."""
    return nn.ModuleDict({name: make() for name in EXPERTS}) if per_modality else make()


def experts_of(module: nn.Module) -> list[nn.Module]:
    return list(module.values()) if isinstance(module, nn.ModuleDict) else [module]


class MagiHumanRMSNorm(nn.RMSNorm):
    """RMSNorm that computes and returns float32 whatever the dtype of its input and weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)


class MagiHumanFloat32Linear(nn.Linear):
    """Linear that computes in float32 whatever the dtype of its input and weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden_states.float(), self.weight.float(), bias)


class MagiHumanRotaryPosEmbed(nn.Module):
    """Rotary positions of a video, audio and text sequence.

    The time of a video token is its latent frame; height and width are centred on 0. Audio is stretched over the time
    of the video. Text has no position of its own in style "v2" (base, distilled), and spans 0 to 1 in style "v1".

    There are `attention_head_dim // 8` frequencies for each of the three axes.
    """

    def __init__(self, attention_head_dim: int, theta: float, coordinate_style: str) -> None:
        super().__init__()
        self.num_bands = attention_head_dim // 8
        self.theta = theta
        self.coordinate_style = coordinate_style

    def forward(self, layout: SequenceLayout, text_mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each float32 of shape `(batch_size or 1, sequence_length, 1, 3 * num_bands)`, in the order
        of the shards and padded like them if there are several; `text_mask` is true for real tokens."""
        num_frames, height, width, audio_length = layout.num_frames, layout.height, layout.width, layout.audio_length
        if text_mask is None:
            text_mask = torch.ones(1, layout.text_length, dtype=torch.bool, device=device)

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
        angles = to_shards(angles, layout.modality_lengths, layout.num_shards)
        return angles.cos()[:, :, None], angles.sin()[:, :, None]


def multiply(states: Tensor, factor: Tensor) -> Tensor:
    """The product, written over `states`, so rounded to their dtype, unless autograd may need them."""
    return states * factor if torch.is_grad_enabled() else states.mul_(factor)


def apply_rotary_emb(hidden_states: Tensor, rotary_emb: RotaryEmb) -> Tensor:
    """Rotates the leading channels of every head in two halves; `(batch_size, sequence_length, heads, head_dim)`.
    Without autograd it writes over its input."""
    cos, sin = rotary_emb
    half = cos.shape[-1]
    if torch.is_grad_enabled():
        first, second, rest = hidden_states.split([half, half, hidden_states.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    halves = hidden_states[..., : 2 * half].unflatten(-1, (2, half))
    sines = halves * sin[..., None, :]
    halves.mul_(cos[..., None, :])
    halves[..., 0, :].sub_(sines[..., 1, :])
    halves[..., 1, :].add_(sines[..., 0, :])
    return hidden_states


# Backends that want as many key and value heads as query heads.
UNGROUPED_BACKENDS = ("_native_efficient", "_native_npu", "_native_xla", "sage_blackwell_hub", "xformers")


@register_processor
class MagiHumanAttnProcessor:
    """Gated grouped-query self-attention, over the whole sequence or local to the neighbouring video frames.

    Without autograd what `norm_q`, `norm_k` and `to_v` give is written over: a hook that keeps it must copy it.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MagiHumanAttention",
        hidden_states: Tensor,
        rotary_emb: RotaryEmb,
        layout: SequenceLayout,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        experts = attn.experts
        parts = zip(*(layout.split(states, len(experts)) for states in (hidden_states, *rotary_emb)), strict=True)
        projected = [expert.project(*part) for expert, part in zip(experts, parts, strict=True)]
        query, key, value, gate = (join(parts) for parts in zip(*projected, strict=True))

        group = ulysses_group(self._parallel_config)
        if group is not None:
            query, key, value = (gather_sequence(x, layout.modality_lengths, group) for x in (query, key, value))

        if attn.local_attention_frames is None:
            attn_output = self._attend(query, key, value, attention_mask)
        else:
            attn_output = self._attend_locally(query, key, value, attention_mask, layout, attn.local_attention_frames)

        if group is not None:
            attn_output = gather_heads(attn_output, layout.modality_lengths, group)
        if attn.is_gated:
            attn_output = multiply(attn_output, gate.float().sigmoid()[..., None])
        attn_output = layout.split(attn_output.flatten(2).to(hidden_states.dtype), len(experts))
        return join([expert.to_out(part) for expert, part in zip(experts, attn_output, strict=True)])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        # Private until Diffusers says in public which backend is active, and which of them group heads.
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        if backend == AttentionBackendName.XFORMERS and attention_mask is not None:
            # Diffusers adds a boolean mask of four dimensions to xformers' scores. Goes once `_xformers_attention`
            # converts it as it does one of two dimensions.
            attention_mask = attention_mask[:, 0, 0]
        # Of PyTorch's kernels for accelerators only those group heads that take neither masks nor float32; the one
        # that is left to choose would hold the whole matrix of scores.
        is_ungrouped = backend == AttentionBackendName.NATIVE and query.device.type not in ("cpu", "meta")
        is_ungrouped &= attention_mask is not None or query.dtype == torch.float32
        if is_ungrouped or backend in UNGROUPED_BACKENDS:
            num_groups = query.shape[2] // key.shape[2]
            key, value = (states.repeat_interleave(num_groups, dim=2) for states in (key, value))
        kwargs = {"attn_mask": attention_mask, "enable_gqa": key.shape[2] != query.shape[2]}
        output = dispatch_attention_fn(query, key, value, **kwargs, backend=self._attention_backend)
        # Perturbed attention guidance has the values in place of attention, which have fewer heads.
        is_perturbed = output.shape[2] != query.shape[2]
        return output.repeat_interleave(query.shape[2] // output.shape[2], dim=2) if is_perturbed else output

    def _attend_locally(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        layout: SequenceLayout,
        num_neighbours: int,
    ) -> Tensor:
        """A frame sees the frames up to `num_neighbours` away, all audio and all text; audio and text see everything.

        One softmax over the keys of each frame needs no mask, so every backend can serve it. Frames whose neighbours
        are the same, as all are in a short video, go together. Without autograd, key and value are written over.
        """
        frame_length, video_length = layout.frame_length, layout.video_length
        outputs = [self._attend(query[:, video_length:], key, value, attention_mask)]
        # From the last frame to the first, so that what lies behind a window is not needed again: audio and text are
        # put there, and no window is copied. In compiled code that might be a copy of all keys and values each time.
        is_copied = torch.is_grad_enabled() or torch.compiler.is_compiling()
        rests = [states[:, video_length:].clone() for states in (key, value)]

        def window(states: Tensor, rest: Tensor, start: int, end: int) -> Tensor:
            if end == video_length:
                return states[:, start:]
            if is_copied:
                return torch.cat([states[:, start:end], rest], dim=1)
            states[:, end : end + rest.shape[1]] = rest
            return states[:, start : end + rest.shape[1]]

        # A loop down from the number of frames, so that a compiled graph need not fix it while every frame sees all.
        last = layout.num_frames
        while last > 0:
            start, end = max(last - 1 - num_neighbours, 0), min(last + num_neighbours, layout.num_frames)
            first = max(layout.num_frames - 1 - num_neighbours, 0) if end - start == layout.num_frames else last - 1
            start, end = start * frame_length, end * frame_length
            frame_query = query[:, first * frame_length : last * frame_length]
            frame_mask = attention_mask
            if attention_mask is not None:
                frame_mask = torch.cat([attention_mask[..., start:end], attention_mask[..., video_length:]], dim=-1)
            frame_key, frame_value = window(key, rests[0], start, end), window(value, rests[1], start, end)
            outputs.append(self._attend(frame_query, frame_key, frame_value, frame_mask))
            last = first
        return torch.cat(outputs[::-1], dim=1)


def drop_fused_projections(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Leaves fused projections out of what is saved, as the linears that they were made of are there."""
    state_dict.pop(f"{prefix}to_qkv.weight", None)


class MagiHumanProjections(nn.Module):
    """The linears and norms of attention for the tokens of one modality, or of all; a gate for each query head."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        eps: float,
        is_gated: bool,
    ) -> None:
        super().__init__()
        query_dim, key_value_dim = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.head_dim = head_dim
        self.projection_dims = (query_dim, key_value_dim, key_value_dim)
        self.to_q = nn.Linear(hidden_size, query_dim, bias=False)
        self.to_k = nn.Linear(hidden_size, key_value_dim, bias=False)
        self.to_v = nn.Linear(hidden_size, key_value_dim, bias=False)
        self.to_gate = nn.Linear(hidden_size, num_attention_heads, bias=False) if is_gated else None
        self.to_out = nn.Linear(query_dim, hidden_size, bias=False)
        self.norm_q = MagiHumanRMSNorm(head_dim, eps=eps)
        self.norm_k = MagiHumanRMSNorm(head_dim, eps=eps)
        self.to_qkv = None  # `make_fused`, once the projections are fused
        self.register_state_dict_post_hook(drop_fused_projections)

    def project(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value `(batch_size, length, heads, head_dim)`, gate `(batch_size, length, heads or 0)`."""
        if self.to_qkv is not None:
            query, key, value = self.to_qkv(hidden_states).split(self.projection_dims, dim=-1)
        else:
            query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        gate = hidden_states[..., :0] if self.to_gate is None else self.to_gate(hidden_states)
        query, key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key, value))
        # Norm and rotation are float32; only their result is rounded to the dtype of the values.
        query = apply_rotary_emb(self.norm_q(query), (cos, sin)).to(value.dtype)
        key = apply_rotary_emb(self.norm_k(key), (cos, sin)).to(value.dtype)
        return query, key, value, gate

    @torch.no_grad()
    def make_fused(self) -> nn.Linear:
        """The linears of query, key and value in one; with the rows of the gates, float8 would not take it."""
        linears = [self.to_q, self.to_k, self.to_v]
        for linear in linears:
            if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
                found = f"one is a {type(linear)} with a weight of {type(linear.weight)}"
                advice = "fuse before quantising or sharing out weights, and without a LoRA"
                raise ValueError(f"Only plain linears can be fused, but {found}: {advice}.")
        weight = torch.cat([linear.weight for linear in linears])
        fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        fused.weight.copy_(weight)
        return fused


class MagiHumanAttention(MagiHumanProjections, AttentionModuleMixin):
    """Self-attention with grouped key and value heads, RMS-normed queries and keys and an optional gate per head.

    In a sandwich block `video`, `audio` and `text` hold the [`MagiHumanProjections`], else the attention itself does.
    `local_attention_frames` is how many frames a video token sees on either side, `None` for all.
    """

    _default_processor_cls = MagiHumanAttnProcessor
    _available_processors = [MagiHumanAttnProcessor]
    is_cross_attention = False

    def __init__(self, per_modality: bool, local_attention_frames: int | None, **projections: Any) -> None:
        if per_modality:
            nn.Module.__init__(self)
            for name in EXPERTS:
                self.add_module(name, MagiHumanProjections(**projections))
        else:
            super().__init__(**projections)
        self.per_modality = per_modality
        self.is_gated = projections["is_gated"]
        self.local_attention_frames = local_attention_frames
        self.set_processor(self._default_processor_cls())

    @property
    def experts(self) -> list[MagiHumanProjections]:
        return [getattr(self, name) for name in EXPERTS] if self.per_modality else [self]

    def fuse_projections(self) -> None:
        """Joins query, key and value in one linear `to_qkv`, which gives the same result."""
        for expert, fused in [(expert, expert.make_fused()) for expert in self.experts]:
            expert.to_qkv = fused
        self.fused_projections = True

    def unfuse_projections(self) -> None:
        for expert in self.experts:
            expert.to_qkv = None
        self.fused_projections = False

    def forward(
        self, hidden_states: Tensor, rotary_emb: RotaryEmb, layout: SequenceLayout, attention_mask: Tensor | None
    ) -> Tensor:
        return self.processor(self, hidden_states, rotary_emb, layout, attention_mask)


def widen(states: Tensor) -> Tensor:
    """Float32 for gradients, which add up there, or where nothing shorter is wanted; else as they are."""
    return states.float() if torch.is_grad_enabled() or states.element_size() > 2 else states


class ClampedGELU(nn.Module):
    """`x * sigmoid(1.702 x)` of values cut at 7, in float32; without autograd the result has the dtype of the input.

    The wide activations of the feed-forward are the largest tensors of a block. Values are cut before they become
    float32, which is the same in less memory, and without autograd a product is written over one of its factors, the
    last one over values that were cut.
    """

    def gate(self, states: Tensor) -> Tensor:
        """`sigmoid(1.702 x)`, float32, as a tensor of one dimension, unlike a number, makes its product."""
        factor = torch.full((1,), 1.702, dtype=torch.float32, device=states.device)
        return (states * factor).sigmoid_()

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = widen(hidden_states.clamp(max=7.0))
        return multiply(hidden_states, self.gate(hidden_states))


class ClampedSwiGLU(ClampedGELU):
    """[`ClampedGELU`] of the first half of the channels times one plus the second half, which is cut at -7 and 7."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated, linear = hidden_states.chunk(2, dim=-1)
        gated = widen(gated.clamp(max=7.0))
        gated = multiply(self.gate(gated), gated)
        linear = widen(linear.clamp(-7.0, 7.0))
        if linear.dtype == torch.float32:
            return multiply(gated, linear.add_(1.0))
        return torch.mul(gated, linear + torch.ones(1, dtype=torch.float32, device=linear.device), out=linear)


class MagiHumanFeedForward(nn.Module):
    """Two linears around [`ClampedGELU`] (inner size `4 * hidden_size`) or [`ClampedSwiGLU`] (two thirds of that).

    Channels that round the inner size up to a multiple are zero with the original's weights, and in training too.
    """

    def __init__(self, hidden_size: int, use_gelu: bool, multiple: int) -> None:
        super().__init__()
        inner_size, self.unpadded_size = (feed_forward_size(hidden_size, use_gelu, each) for each in (multiple, 1))
        self.linear_in = nn.Linear(hidden_size, inner_size if use_gelu else 2 * inner_size, bias=False)
        self.linear_in._tp_packed_col_blocks = [1] if use_gelu else [1, 1]  # Diffusers' name, for tensor parallelism
        self.act = ClampedGELU() if use_gelu else ClampedSwiGLU()
        self.linear_out = nn.Linear(inner_size, hidden_size, bias=False)
        self.chunk_size = None  # tokens at a time, or all of them

    def forward(self, hidden_states: Tensor) -> Tensor:
        chunks = (hidden_states,) if self.chunk_size is None else hidden_states.split(self.chunk_size, dim=1)
        return join([self.linear_out(self.act(self.linear_in(chunk)).to(chunk.dtype)) for chunk in chunks])


def pad_gradient(grad: Tensor, size: int) -> Tensor:
    """Zeros beyond the first channels: DoRA's padding is nearly zero, which optimizers that scale gradients undo."""
    return F.pad(grad[:, :size], (0, grad.shape[1] - size))


@register_block
class MagiHumanTransformerBlock(nn.Module):
    """Attention and feed-forward on a float32 residual stream, with an expert for each modality or one for all."""

    def __init__(
        self,
        per_modality: bool,
        use_gelu: bool,
        use_post_norm: bool,
        local_attention_frames: int | None,
        feed_forward_multiple: int,
        **projections: Any,
    ) -> None:
        super().__init__()
        hidden_size = projections["hidden_size"]

        def make_norm() -> nn.Module:
            return MagiHumanRMSNorm(hidden_size, eps=projections["eps"])

        make_post_norm = make_norm if use_post_norm else nn.Identity
        self.norm1 = make_experts(make_norm, per_modality)
        self.attn = MagiHumanAttention(per_modality, local_attention_frames, **projections)
        self.post_norm1 = make_experts(make_post_norm, per_modality)
        self.norm2 = make_experts(make_norm, per_modality)
        self.ff = make_experts(
            lambda: MagiHumanFeedForward(hidden_size, use_gelu, feed_forward_multiple), per_modality
        )
        self.post_norm2 = make_experts(make_post_norm, per_modality)

    def forward(
        self,
        hidden_states: Tensor,
        rotary_emb: RotaryEmb,
        layout: SequenceLayout,
        attention_mask: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """`(batch_size, sequence_length, hidden_size)`; `dtype` is what the linears compute in."""
        modules = (self.norm1, self.post_norm1, self.norm2, self.ff, self.post_norm2)
        experts = list(zip(*(experts_of(module) for module in modules), strict=True))

        parts = layout.split(hidden_states, len(experts))
        attn_input = join([norm1(part).to(dtype) for (norm1, *_), part in zip(experts, parts, strict=True)])
        attn_parts = layout.split(self.attn(attn_input, rotary_emb, layout, attention_mask), len(experts))
        # The norm after attention is rounded to the dtype of the linears, the norm after the feed-forward is not.
        parts = [
            part + post_norm1(attn_part).to(dtype)
            for (_, post_norm1, *_), part, attn_part in zip(experts, parts, attn_parts, strict=True)
        ]
        del attn_input, attn_parts  # the feed-forward needs the most memory
        pairs = zip(experts, parts, strict=True)
        return join([part + post_norm2(ff(norm2(part).to(dtype))) for (*_, norm2, ff, post_norm2), part in pairs])


class MagiHumanTransformer3DModel(
    MagiHumanParallelMixin,
    MagiHumanAdapterMixin,
    ModelMixin,
    ConfigMixin,
    AttentionMixin,
    MagiHumanSingleFileMixin,
    MagiHumanCacheMixin,
):
    r"""The single-stream transformer of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986): predicts the
    flow velocity of video and audio latents together, from their noisy latents and a text.

    The model never sees a timestep. The defaults are those of the published base model with 15.3B parameters.

    Args:
        patch_size (`tuple[int, int, int]`, defaults to `(1, 2, 2)`): Latent frames, rows and columns in a video token.
        in_channels, audio_in_channels, text_in_channels (`int`, defaults to 48, 64 and 3584): Channels of the video
            latents, of the audio latents and of the text embeddings.
        num_layers (`int`, defaults to 40): Number of blocks.
        num_attention_heads, num_key_value_heads (`int`, defaults to 40 and 8): Query heads, and key and value heads.
        attention_head_dim (`int`, defaults to 128): Channels of a head, a multiple of 8; all query heads' together are
            the hidden size.
        modality_layers (`tuple[int, ...]`): Blocks with their own linears and norms for each modality.
        gelu_layers (`tuple[int, ...]`): Blocks whose feed-forward is a clamped GELU instead of a clamped SwiGLU.
        post_norm_layers (`tuple[int, ...]`): Blocks that also normalise the outputs of attention and feed-forward.
        gated_attention (`bool`, defaults to `True`): Whether a sigmoid gate scales each head.
        rope_theta (`float`, defaults to 10000.0): Base of the rotary frequencies.
        coordinate_style (`str`, defaults to `"v2"`): Positions of audio and text, `"v1"` for super-resolution, see
            [`MagiHumanRotaryPosEmbed`].
        local_attention_layers (`tuple[int, ...]`): Blocks in which a video token sees of the video only frames nearby.
        local_attention_frames (`int`, defaults to 11): Frames seen on either side in these blocks.
        norm_eps (`float`, defaults to 1e-6): Epsilon of every norm.
        feed_forward_multiple (`int`, defaults to 128): To a multiple of it the inner size of every feed-forward is
            rounded up, which the original's weights are given zeros for; 1 for the sizes as they are.

    `ValueError`: a value is out of range, or the model has more than `MAX_PARAMETERS`, see [`check_config`].
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MagiHumanTransformerBlock"]
    _repeated_blocks = ["MagiHumanTransformerBlock"]
    _keep_in_fp32_modules = [*QUANTIZATION_SKIP_MODULES, "norm1", "norm2", "norm_q", "norm_k"]
    _keep_in_fp32_modules += ["post_norm1", "post_norm2", "video_norm_out", "audio_norm_out"]
    _skip_layerwise_casting_patterns = ["embedder", "norm", "proj_out"]

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
        feed_forward_multiple: int = FEED_FORWARD_MULTIPLE,
    ) -> None:
        super().__init__()
        self.register_to_config(**check_config(self.config))
        hidden_size = num_attention_heads * attention_head_dim
        video_token_size = in_channels * math.prod(patch_size)
        self.gradient_checkpointing = False

        self.video_embedder = MagiHumanFloat32Linear(video_token_size, hidden_size)
        self.audio_embedder = MagiHumanFloat32Linear(audio_in_channels, hidden_size)
        self.text_embedder = MagiHumanFloat32Linear(text_in_channels, hidden_size)
        self.rope = MagiHumanRotaryPosEmbed(attention_head_dim, rope_theta, coordinate_style)

        heads = {"num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads}
        heads |= {"head_dim": attention_head_dim, "is_gated": gated_attention}
        self.transformer_blocks = nn.ModuleList()
        for layer in range(num_layers):
            window = local_attention_frames if layer in local_attention_layers else None
            kind = {"per_modality": layer in modality_layers, "use_gelu": layer in gelu_layers}
            kind |= {"use_post_norm": layer in post_norm_layers, "local_attention_frames": window}
            kind |= {"feed_forward_multiple": feed_forward_multiple}
            block = MagiHumanTransformerBlock(**kind, **heads, hidden_size=hidden_size, eps=norm_eps)
            self.transformer_blocks.append(block)

        self.video_norm_out = MagiHumanRMSNorm(hidden_size, eps=norm_eps)
        self.audio_norm_out = MagiHumanRMSNorm(hidden_size, eps=norm_eps)
        self.video_proj_out = MagiHumanFloat32Linear(hidden_size, video_token_size, bias=False)
        self.audio_proj_out = MagiHumanFloat32Linear(hidden_size, audio_in_channels, bias=False)

        # Where the hooks of context parallelism sit: not on linears, which adapters wrap and unwrap.
        self.shard_tokens = nn.Identity()
        self.gather_tokens = nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """What the linears of the blocks compute in; of quantised ones the dtype that they were loaded with."""
        return self.config.get("_pre_quantization_dtype") or get_parameter_dtype(self)

    def add_adapter(self, adapter_config: "PeftConfig", adapter_name: str = "default") -> None:
        """Adds an adapter for training, see [`~loaders.PeftAdapterMixin.add_adapter`]. `target_modules=["to_q"]` means
        the query projections of every block, in sandwich blocks those of each modality, `"video.to_q"` one of them."""
        self.check_projections_are_unfused()
        self.check_takes_lora()
        super().add_adapter(adapter_config, adapter_name)
        give_zero_rows_a_direction(self)
        with torch.no_grad():
            for ff in self.feed_forwards:
                if adapter_name in getattr(ff.linear_out, "lora_A", {}):  # else training would fill the padding
                    weight, size = ff.linear_out.lora_A[adapter_name].weight, ff.unpadded_size
                    weight[:, size:] = 0.0
                    weight.register_hook(partial(pad_gradient, size=size))

    fuse_qkv_projections = guarded(AttentionMixin.fuse_qkv_projections, check_is_in_memory)

    def check_projections_are_unfused(self) -> None:
        """Raises a `ValueError` after `fuse_qkv_projections`: `to_q`, its adapter or its shard would not be read."""
        if any(block.attn.fused_projections for block in self.transformer_blocks):
            raise ValueError("Fused projections take neither LoRA nor split: call `unfuse_qkv_projections()` first.")

    def enable_forward_chunking(self, chunk_size: int = 4096) -> None:
        """Runs the feed-forward of every block on `chunk_size` tokens, 1 or more, at a time: its wide activations are
        the largest tensors of a long or large video. The result differs by rounding at most."""
        self._set_chunk_size(check_integer("chunk_size", chunk_size))

    def disable_forward_chunking(self) -> None:
        """Undoes `enable_forward_chunking`."""
        self._set_chunk_size(None)

    def _set_chunk_size(self, chunk_size: int | None) -> None:
        for ff in self.feed_forwards:
            ff.chunk_size = chunk_size

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,  # noqa: ARG002 (read by the decorator)
        return_dict: bool = True,
    ) -> MagiHumanTransformer3DModelOutput | tuple[Tensor, Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels, num_frames, height, width)`): Noisy video
                latents; number of frames, height and width are multiples of `patch_size`.
            audio_hidden_states (`torch.Tensor` of shape `(batch_size, audio_length, audio_in_channels)`): Noisy audio.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, text_length, text_in_channels)`): Text.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*): True, or 1, for
                real tokens; padding may stand anywhere. Left out, all are real, and attention needs no mask.
            attention_kwargs (`dict`, *optional*): `scale` sets the scale of LoRA layers for this call.
            return_dict (`bool`, defaults to `True`): Whether to return a [`MagiHumanTransformer3DModelOutput`], or the
                tuple of its two tensors.

        `ValueError`: a tensor is not floating or does not fit the config, or a mask that is not boolean holds others
        than 0 and 1, which compiled code does not look at.
        """
        layout = self._get_layout(hidden_states, audio_hidden_states, encoder_hidden_states)
        patch_size, dtype = self.config.patch_size, self.dtype

        attention_mask = None
        if encoder_attention_mask is not None:
            is_bool = getattr(encoder_attention_mask, "dtype", None) == torch.bool
            # Else no values are waited for, nor are there any.
            has_data = not is_bool and not torch.compiler.is_compiling() and not hidden_states.is_meta
            check_mask("encoder_attention_mask", encoder_attention_mask, encoder_hidden_states.shape[:2], has_data)
            # Padding goes to the end, where attention kernels for several lengths take it to be.
            order = encoder_attention_mask.int().argsort(dim=1, descending=True, stable=True)
            encoder_attention_mask = encoder_attention_mask.gather(1, order).bool()
            encoder_hidden_states = encoder_hidden_states.gather(1, order[..., None].expand_as(encoder_hidden_states))
            attention_mask = F.pad(encoder_attention_mask, (layout.video_length + layout.audio_length, 0), value=True)
            attention_mask = attention_mask[:, None, None]  # (batch, 1, 1, sequence)
        rotary_emb = self.rope(layout, encoder_attention_mask, hidden_states.device)

        # (batch, channels, T, H, W) -> (batch, tokens in the order T H W, values in the order channels, patch)
        video = hidden_states.unflatten(4, (layout.width, patch_size[2]))
        video = video.unflatten(3, (layout.height, patch_size[1])).unflatten(2, (layout.num_frames, patch_size[0]))
        video = video.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

        embedders = (self.video_embedder, self.audio_embedder, self.text_embedder)
        tokens = zip(embedders, (video, audio_hidden_states, encoder_hidden_states), strict=True)
        tokens = [embed(self.shard_tokens(pad_to_multiple(states, layout.num_shards))) for embed, states in tokens]
        hidden_states = join(tokens).float()
        del tokens, video

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                inputs = (hidden_states, rotary_emb, layout, attention_mask, dtype)
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(hidden_states, rotary_emb, layout, attention_mask, dtype)

        video, audio, _ = layout.split(hidden_states)
        video = self.video_proj_out(self.video_norm_out(video)).float()
        audio = self.audio_proj_out(self.audio_norm_out(audio)).float()

        video = self.gather_tokens(video)[:, : layout.video_length]
        audio = self.gather_tokens(audio)[:, : layout.audio_length]

        # Unlike at the input, the values of an output token are in the order patch, channels.
        video = video.unflatten(2, (*patch_size, -1)).unflatten(1, (layout.num_frames, layout.height, layout.width))
        video = video.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)

        if not return_dict:
            return video, audio
        return MagiHumanTransformer3DModelOutput(sample=video, audio_sample=audio)

    def _get_layout(self, video: Tensor, audio: Tensor, text: Tensor) -> SequenceLayout:
        config = self.config
        check_tensor("hidden_states", video, (None, config.in_channels, None, None, None), has_data=False)
        batch_size = video.shape[0]
        if any(size % patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True)):
            sizes, multiples = tuple(video.shape[2:]), f"multiples of `patch_size`={tuple(config.patch_size)}"
            raise ValueError(f"Frames, height and width of `hidden_states`, {sizes}, must be {multiples}.")
        check_tensor("audio_hidden_states", audio, (batch_size, None, config.audio_in_channels), has_data=False)
        check_tensor("encoder_hidden_states", text, (batch_size, None, config.text_in_channels), has_data=False)
        if config.coordinate_style == "v1" and (text.shape[1] == 1 or (audio.shape[1] == 1 and video.shape[2] > 1)):
            raise ValueError(
                f"`coordinate_style`='v1' stretches text and audio over the video, so each needs two tokens or more,"
                f" but there are {text.shape[1]} text tokens and {audio.shape[1]} audio tokens."
            )
        grid = (size // patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True))
        return SequenceLayout(*grid, audio.shape[1], text.shape[1], self._num_shards)
