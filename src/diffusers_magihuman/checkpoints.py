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
"""From the published checkpoints' tensors to ours.

A layout is one table, source module -> our modules. Rows of a source tensor are split over its targets in order (all
of video, then audio, then text in a layer with three experts); a transform may change each part. Conversion is strict:
every name is used once, and a missing, unknown or misshapen tensor is an error that lists all of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .transformer_magihuman import MagiHumanTransformer3DModel


Transform = Callable[[torch.Tensor], torch.Tensor]


class Rule(NamedTuple):
    """What becomes of one source tensor: its rows go to `targets`, each through `transform`."""

    targets: dict[str, torch.Size]
    transform: Transform | None = None

    @property
    def shape(self) -> torch.Size:
        sizes = list(self.targets.values())
        return torch.Size([sum(size[0] for size in sizes), *sizes[0][1:]])

    def apply(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = tensor.split([size[0] for size in self.targets.values()])
        if self.transform is not None:
            parts = [self.transform(part) for part in parts]
        return dict(zip(self.targets, parts, strict=True))


def add_one(weight: torch.Tensor) -> torch.Tensor:
    """Norm weights are stored around zero; the sum is taken in float32, as the original takes it in every call."""
    return weight.float() + 1


def deinterleave(weight: torch.Tensor) -> torch.Tensor:
    """Rows gate, linear, gate, linear, ... -> all of gate, then all of linear."""
    return torch.cat([weight[0::2], weight[1::2]])


EXPERTS = ("video", "audio", "text")

TRANSFORMER_TABLE: dict[str, str] = {
    "adapter.video_embedder": "video_embedder",
    "adapter.audio_embedder": "audio_embedder",
    "adapter.text_embedder": "text_embedder",
    "final_norm_video": "video_norm_out",
    "final_norm_audio": "audio_norm_out",
    "final_linear_video": "video_proj_out",
    "final_linear_audio": "audio_proj_out",
}

TRANSFORMER_LAYER_TABLE: dict[str, tuple[str, ...]] = {
    "attention.pre_norm": ("norm1",),
    "attention.linear_qkv": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate"),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "attention.linear_proj": ("attn.to_out",),
    "attn_post_norm": ("post_norm1",),
    "mlp.pre_norm": ("norm2",),
    "mlp.up_gate_proj": ("ff.linear_in",),
    "mlp.down_proj": ("ff.linear_out",),
    "mlp_post_norm": ("post_norm2",),
}

SPLIT_TABLE: dict[str, tuple[str, ...]] = {
    "attention.linear_qkv": tuple(f"attention.linear_{part}" for part in "qkvg"),
}

TURBO_VAE_WRAPPED = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv_out", "time_conv", "upsampler2d_1")

ROPE_BANDS = "adapter.rope.bands"


def transformer_config_from_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    Reads the config of [`MagiHumanTransformer3DModel`] off the shapes of a checkpoint with canonical names.

    Shapes do not tell the positions of audio and text (`coordinate_style`) nor which layers attend locally; both keep
    the base model's values.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors by their canonical names; meta tensors will do.

    Returns:
        `dict`: Arguments of [`MagiHumanTransformer3DModel`].

    Raises:
        `ValueError`: Names that the config is read from are missing.
    """
    layers = {int(name.split(".")[2]) for name in state_dict if name.startswith("block.layers.")}
    parts = ("attention.pre_norm", "attention.q_norm", "attention.linear_qkv", "attention.linear_proj")
    parts += ("mlp.up_gate_proj", "mlp.down_proj")
    needed = [f"adapter.{modality}_embedder.weight" for modality in EXPERTS]
    needed += [f"block.layers.{layer}.{part}.weight" for layer in sorted(layers | {0}) for part in parts]
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(f"`state_dict` is not a MagiHuman transformer with canonical names, it lacks {missing}.")

    def size(layer: int, part: str, dim: int = 0) -> int:
        return state_dict[f"block.layers.{layer}.{part}.weight"].shape[dim]

    hidden_size, video_token_size = state_dict["adapter.video_embedder.weight"].shape
    experts = {layer: size(layer, "attention.pre_norm") // hidden_size for layer in layers}
    head_dim = size(0, "attention.q_norm") // experts[0]
    num_heads = size(0, "attention.linear_proj", 1) // head_dim
    # Rows beyond the queries: keys, values and, if gated, a gate for each head.
    rest = size(0, "attention.linear_qkv") // experts[0] - num_heads * head_dim
    is_gated = (rest - num_heads) % (2 * head_dim) == 0
    patch_size = (1, 2, 2)
    return {
        "patch_size": patch_size,
        "in_channels": video_token_size // math.prod(patch_size),
        "audio_in_channels": state_dict["adapter.audio_embedder.weight"].shape[1],
        "text_in_channels": state_dict["adapter.text_embedder.weight"].shape[1],
        "num_layers": max(layers) + 1,
        "num_attention_heads": num_heads,
        "num_key_value_heads": (rest - num_heads * is_gated) // (2 * head_dim),
        "attention_head_dim": head_dim,
        "modality_layers": tuple(layer for layer in sorted(layers) if experts[layer] == len(EXPERTS)),
        "gelu_layers": tuple(
            layer
            for layer in sorted(layers)
            if size(layer, "mlp.up_gate_proj") == experts[layer] * size(layer, "mlp.down_proj", 1)
        ),
        "post_norm_layers": tuple(
            layer for layer in sorted(layers) if f"block.layers.{layer}.attn_post_norm.weight" in state_dict
        ),
        "gated_attention": is_gated,
    }


def convert_transformer_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    Converts a transformer checkpoint with canonical names to the state dict of [`MagiHumanTransformer3DModel`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors by their canonical names.
        config (`Mapping`): Config of the model, see [`transformer_config_from_state_dict`].

    Returns:
        `dict[str, torch.Tensor]`: Norm weights in float32, everything else in its own dtype. Split tensors are views.

    Raises:
        `ValueError`: Names that are missing or unknown, shapes that do not fit, rotary frequencies that the config
            does not give.
    """
    rules = transformer_rules(config)
    num_bands = config["attention_head_dim"] // 8
    shapes = {name: rule.shape for name, rule in rules.items()} | {ROPE_BANDS: torch.Size([num_bands])}
    check_names_and_shapes(state_dict, shapes)

    bands = state_dict[ROPE_BANDS]
    theta = config.get("rope_theta", 10000.0)
    expected = 1.0 / theta ** (torch.arange(num_bands, dtype=torch.float32) / num_bands)
    if not bands.is_meta and not torch.allclose(bands.float().cpu(), expected, rtol=1e-2):
        raise ValueError(f"{ROPE_BANDS!r} holds {bands.tolist()}, but `rope_theta`={theta} gives {expected.tolist()}.")
    return apply_rules(state_dict, rules)


def transformer_rules(config: Mapping[str, Any], is_split: bool = False) -> dict[str, Rule]:
    """
    The rule of every tensor of a transformer except the rotary frequencies, which the model computes.

    Args:
        config (`Mapping`): Config of [`MagiHumanTransformer3DModel`].
        is_split (`bool`, defaults to `False`): Whether every linear of every modality has a name of its own, as in
            single files of some tools, instead of the canonical stacked ones. Norms are stacked in both.
    """
    ours = {
        name: tensor.shape for name, tensor in meta_model(MagiHumanTransformer3DModel, config).state_dict().items()
    }
    rules = {}
    for source, target in TRANSFORMER_TABLE.items():
        for kind in ("weight", "bias"):
            if f"{target}.{kind}" in ours:
                transform = add_one if "norm" in target else None
                rules[f"{source}.{kind}"] = Rule({f"{target}.{kind}": ours[f"{target}.{kind}"]}, transform)

    for layer in range(config["num_layers"]):
        experts = [f".{expert}" for expert in EXPERTS] if layer in config["modality_layers"] else [""]
        for source, targets in TRANSFORMER_LAYER_TABLE.items():
            names = {
                f"transformer_blocks.{layer}.{target}{expert}.weight": f"{part}{expert.replace('.', '_')}"
                for expert in experts
                for target, part in zip(targets, SPLIT_TABLE.get(source, (source,)), strict=True)
            }
            shapes = {name: ours[name] for name in names if name in ours}
            transform = add_one if "norm" in source else None
            if source == "mlp.up_gate_proj" and layer not in config["gelu_layers"]:
                transform = deinterleave
            if is_split and "norm" not in source:
                for name, shape in shapes.items():
                    rules[f"block.layers.{layer}.{names[name]}.weight"] = Rule({name: shape}, transform)
            elif shapes:
                rules[f"block.layers.{layer}.{source}.weight"] = Rule(shapes, transform)
    return rules


def convert_turbo_vae_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    Converts a published Turbo VAE, a decoder alone, to the decoder of [`AutoencoderKLMagiHumanTurbo`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors by the original's names, each beginning with `decoder.`.
        config (`Mapping`): Config of the model; further keys of the published json are ignored.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors by our names.

    Raises:
        `ValueError`: Names that are missing or unknown, shapes that do not fit.
    """
    rules = turbo_vae_rules(config)
    check_names_and_shapes(state_dict, {name: rule.shape for name, rule in rules.items()})
    return apply_rules(state_dict, rules)


def turbo_vae_rules(config: Mapping[str, Any]) -> dict[str, Rule]:
    """Our names are the original's without a module `conv` that wraps some of its convolutions."""
    rules = {}
    decoder = meta_model(AutoencoderKLMagiHumanTurbo, config).decoder
    for module_name, module in decoder.named_modules(prefix="decoder"):
        source = f"{module_name}.conv" if module_name.split(".")[-1] in TURBO_VAE_WRAPPED else module_name
        for kind, parameter in module.named_parameters(recurse=False):
            rules[f"{source}.{kind}"] = Rule({f"{module_name}.{kind}": parameter.shape})
    return rules


def meta_model(model_class: type[ModelMixin], config: Mapping[str, Any]) -> ModelMixin:
    with torch.device("meta"):
        return model_class.from_config(dict(config))


def check_names_and_shapes(state_dict: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    wrong_shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(shapes[name])}"
        for name, tensor in state_dict.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    problems = {
        "missing": sorted(shapes.keys() - state_dict.keys()),
        "unknown": sorted(state_dict.keys() - shapes.keys()),
        "of another shape": wrong_shapes,
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"`state_dict` does not fit the config. Tensors {'; '.join(found)}.")


def apply_rules(state_dict: Mapping[str, torch.Tensor], rules: Mapping[str, Rule]) -> dict[str, torch.Tensor]:
    converted: dict[str, torch.Tensor] = {}
    for name, rule in rules.items():
        converted.update(rule.apply(state_dict[name]))
    return converted
