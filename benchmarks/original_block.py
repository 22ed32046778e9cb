# SPDX-License-Identifier: Apache-2.0
"""A block as the original formulates it, written from what it computes, to time ours beside it in one run.

There the tokens are sorted by modality and the rows of all experts are stacked in one weight. One product gives query,
key, value and gate; channels of gate and linear of the feed-forward alternate; what a linear gives is cast back to
float32; local attention asks twice for each frame, the video near it and all else, and merges the two softmaxes.
Attention is PyTorch's flash kernel: with ours on the same (`_native_flash`) the ratio of their times is that of the
formulations, not that of kernels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.conversion import ROPE_BANDS, convert_transformer_state_dict, transformer_rules
from diffusers_magihuman.transformer_magihuman import RotaryEmb, SequenceLayout

Weights = Mapping[str, Tensor]  # by the original's names within a block


def make_pair(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[MagiHumanTransformer3DModel, Weights]:
    """A transformer of one layer with random weights, `dtype` but for what is always float32, and the original's."""
    with torch.device("meta"):
        model = MagiHumanTransformer3DModel(**config, num_layers=1).eval()
    source = {}
    for name, rule in transformer_rules(model.config).items():
        weight = torch.randn(rule.shape, device=device, dtype=torch.float32 if rule.is_float32 else dtype)
        source[name] = weight * (0.1 if len(rule.shape) == 1 else 2 * rule.shape[1] ** -0.5)  # some are cut at 7
    bands = torch.arange(model.rope.num_bands, dtype=torch.float32, device=device)
    source[ROPE_BANDS] = 1.0 / model.rope.theta ** (bands / len(bands))
    model.load_state_dict(convert_transformer_state_dict(source, model.config), assign=True)
    prefix = "block.layers.0."
    return model, {x.removeprefix(prefix).removesuffix(".weight"): source[x] for x in source if x.startswith(prefix)}


def sort_by_modality(layout: SequenceLayout, device: torch.device) -> Tensor:
    """The order of the tokens in a model, which gathers them once."""
    numbers = torch.arange(3, device=device)
    return torch.cat([number.expand(n) for number, n in zip(numbers, layout.modality_lengths, strict=True)]).argsort()


def rms_norm(states: Tensor, weight: Tensor, lengths: Sequence[int], eps: float) -> Tensor:
    """In float32, returned in the dtype of its input; weights are stored around zero."""
    normed = states.float()
    normed = normed * torch.rsqrt(normed.square().mean(dim=-1, keepdim=True) + eps)
    pairs = zip(normed.split(lengths), (weight + 1).chunk(len(lengths)), strict=True)
    return torch.cat([part * expert for part, expert in pairs]).to(states.dtype)


def linear(states: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """In the dtype of the weight, which it returns."""
    pairs = zip(states.to(weight.dtype).split(lengths), weight.chunk(len(lengths)), strict=True)
    return torch.cat([F.linear(part, expert) for part, expert in pairs])


def rotate(states: Tensor, rotary_emb: RotaryEmb) -> Tensor:
    """Rotates the leading channels of `(length, heads, head_dim)` in two halves."""
    cos, sin = (each[0].repeat(1, 1, 2) for each in rotary_emb)
    rotary, rest = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat([rotary * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of `(length, heads, head_dim)`, and the logarithm of the sums in its softmax, `(length, heads, 1)`."""
    # No public function but flex attention gives that logarithm.
    aten = torch.ops.aten
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    if query.is_cuda:
        attend = aten._scaled_dot_product_flash_attention
    output, sums, *_ = attend(*(states.transpose(0, 1)[None] for states in (query, key, value)))
    return output[0].transpose(0, 1), sums[0].transpose(0, 1)[: len(query), :, None]


def attend_locally(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, num_neighbours: int) -> Tensor:
    """A frame sees those nearby, and audio and text; both results are rounded, merged in float32, and rounded."""
    length, rest = layout.frame_length, slice(layout.video_length, None)
    outputs = []
    for frame in range(layout.num_frames):
        start, end = max(frame - num_neighbours, 0), min(frame + num_neighbours + 1, layout.num_frames)
        rows, window = slice(frame * length, (frame + 1) * length), slice(start * length, end * length)
        near, near_sums = flash(query[rows], key[window], value[window])
        other, other_sums = flash(query[rows], key[rest], value[rest])
        share = torch.sigmoid(near_sums - other_sums)
        outputs.append((near.float() * share + other.float() * (1 - share)).to(query.dtype))
    return torch.cat([*outputs, flash(query[rest], key, value)[0]])


def swiglu(states: Tensor) -> Tensor:
    gate, linear = states[..., ::2].clamp(max=7.0), states[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (linear + 1)


def gelu(states: Tensor) -> Tensor:
    states = states.clamp(max=7.0)
    return states * torch.sigmoid(1.702 * states)


def original_block(
    weights: Weights,
    config: Mapping[str, Any],
    hidden_states: Tensor,
    rotary_emb: RotaryEmb,
    layout: SequenceLayout,
    order: Tensor,
) -> Tensor:
    """What the block of [`make_pair`] gives, of one sample `(length, hidden_size)`, float32, gathered by `order`."""
    heads, kv_heads, head_dim = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "attention_head_dim")
    )
    dtype, eps = weights["attention.linear_proj"].dtype, config["norm_eps"]
    is_sandwich = len(weights["attention.q_norm"]) > head_dim
    lengths = layout.modality_lengths if is_sandwich else (len(hidden_states),)

    def norm(name: str, states: Tensor) -> Tensor:
        return rms_norm(states, weights[name], lengths, eps)

    states = norm("attention.pre_norm", hidden_states)
    states = linear(states, weights["attention.linear_qkv"], lengths).float()
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    query, key, value, gate = states.split([*sizes, states.shape[1] - sum(sizes)], dim=1)
    query, key, value = (each.unflatten(1, (-1, head_dim)) for each in (query, key, value))
    query, key = norm("attention.q_norm", query), norm("attention.k_norm", key)
    inverse = order.argsort()  # attention sees the sequence in its own order
    query, key, value = (each[inverse] for each in (query, key, value))
    query, key, value = (each.to(dtype) for each in (rotate(query, rotary_emb), rotate(key, rotary_emb), value))
    if 0 in config["local_attention_layers"]:
        attended = attend_locally(query, key, value, layout, config["local_attention_frames"])
    else:
        attended = flash(query, key, value)[0]
    attended = attended[order]
    if config["gated_attention"]:
        attended = attended * gate.sigmoid()[..., None]
    attended = linear(attended.flatten(1), weights["attention.linear_proj"], lengths)
    if "attn_post_norm" in weights:
        attended = norm("attn_post_norm", attended)
    hidden_states = hidden_states + attended

    states = linear(norm("mlp.pre_norm", hidden_states), weights["mlp.up_gate_proj"], lengths).float()
    is_gelu = weights["mlp.up_gate_proj"].shape[0] == len(lengths) * weights["mlp.down_proj"].shape[1]
    states = gelu(states) if is_gelu else swiglu(states)
    states = linear(states, weights["mlp.down_proj"], lengths).float()
    return hidden_states + (norm("mlp_post_norm", states) if "mlp_post_norm" in weights else states)
