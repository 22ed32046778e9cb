# SPDX-License-Identifier: Apache-2.0
"""The names of the original's transformer and ours: one table, and pure functions.

A layout is rules, source tensor -> ours. Rows of a source tensor are split over its targets in order (all of video,
then audio, then text in a layer with three experts); a transform may change each part. Conversion is strict: every
name is used once, and a missing, unknown or misshapen tensor is an error that lists all of them.

Names and shapes follow from the config; no model is built, no file opened.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch


EXPERTS = ("video", "audio", "text")
ROPE_BANDS = "adapter.rope.bands"
FP8_SCALE = ".__fp8_scale"

VARIANTS = ("base", "distill", "sr_540p", "sr_1080p")
UPSCALE_SIZES = {"sr_540p": (512, 896), "sr_1080p": (1088, 1920)}  # height and width in pixels
GLOBAL_LAYERS_1080P = (3, 7, 11, 15, 19, 23, 27, 31)


class Rule(NamedTuple):
    """What becomes of one source tensor: its rows go to `targets`, each through `transform`.

    `is_float32` says whether they are float32 whatever the dtype of the model.
    """

    targets: dict[str, torch.Size]
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_float32: bool = False

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


# The transformer


def outer_table(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Source module -> our module and the shape of its weight, of what is float32 around the blocks."""
    hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
    video_token_size = config["in_channels"] * math.prod(config["patch_size"])
    return {
        "adapter.video_embedder": ("video_embedder", (hidden_size, video_token_size)),
        "adapter.audio_embedder": ("audio_embedder", (hidden_size, config["audio_in_channels"])),
        "adapter.text_embedder": ("text_embedder", (hidden_size, config["text_in_channels"])),
        "final_norm_video": ("video_norm_out", (hidden_size,)),
        "final_norm_audio": ("audio_norm_out", (hidden_size,)),
        "final_linear_video": ("video_proj_out", (video_token_size, hidden_size)),
        "final_linear_audio": ("audio_proj_out", (config["audio_in_channels"], hidden_size)),
    }


def layer_table(config: Mapping[str, Any], layer: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Source module of a layer -> our modules and the shapes of their weights, for each of its experts."""
    num_heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    hidden_size, key_value_dim = num_heads * head_dim, config["num_key_value_heads"] * head_dim
    is_gelu = layer in config["gelu_layers"]
    inner_size = hidden_size * 4 if is_gelu else int(hidden_size * 4 * 2 / 3) // 4 * 4
    table = {
        "attention.pre_norm": {"norm1": (hidden_size,)},
        "attention.linear_qkv": {
            "attn.to_q": (hidden_size, hidden_size),
            "attn.to_k": (key_value_dim, hidden_size),
            "attn.to_v": (key_value_dim, hidden_size),
            "attn.to_gate": (num_heads, hidden_size),
        },
        "attention.q_norm": {"attn.norm_q": (head_dim,)},
        "attention.k_norm": {"attn.norm_k": (head_dim,)},
        "attention.linear_proj": {"attn.to_out": (hidden_size, hidden_size)},
        "attn_post_norm": {"post_norm1": (hidden_size,)},
        "mlp.pre_norm": {"norm2": (hidden_size,)},
        "mlp.up_gate_proj": {"ff.linear_in": (inner_size if is_gelu else 2 * inner_size, hidden_size)},
        "mlp.down_proj": {"ff.linear_out": (hidden_size, inner_size)},
        "mlp_post_norm": {"post_norm2": (hidden_size,)},
    }
    if not config["gated_attention"]:
        del table["attention.linear_qkv"]["attn.to_gate"]
    if layer not in config["post_norm_layers"]:
        del table["attn_post_norm"], table["mlp_post_norm"]
    return table


# In split names each of our linears has a source of its own.
SPLIT_SOURCES = {
    "attn.to_q": "attention.linear_q",
    "attn.to_k": "attention.linear_k",
    "attn.to_v": "attention.linear_v",
    "attn.to_gate": "attention.linear_g",
}


def expert_name(target: str, expert: str) -> str:
    """Our module of one modality in a layer with three experts; a layer without has `expert` empty."""
    part, _, inner = target.partition(".")  # the modality stands outside, the layer inside: attn.video.to_q
    return ".".join(filter(None, (part, expert, inner)))


def transformer_rules(config: Mapping[str, Any], is_split: bool = False) -> dict[str, Rule]:
    """
    The rule of every tensor of a transformer except the rotary frequencies, which the model computes.

    Args:
        config (`Mapping`): Config of [`MagiHumanTransformer3DModel`].
        is_split (`bool`, defaults to `False`): Whether every linear of every modality has a name of its own, as in
            single files of some tools, instead of the canonical stacked ones. Norms are stacked in both.
    """
    rules = {}
    for source, (target, shape) in outer_table(config).items():
        transform = add_one if "norm" in source else None
        rules[f"{source}.weight"] = Rule({f"{target}.weight": torch.Size(shape)}, transform, is_float32=True)
        if "embedder" in source:
            rules[f"{source}.bias"] = Rule({f"{target}.bias": torch.Size(shape[:1])}, is_float32=True)

    for layer in range(config["num_layers"]):
        experts = EXPERTS if layer in config["modality_layers"] else ("",)
        for source, shapes in layer_table(config, layer).items():
            is_norm = "norm" in source
            transform = add_one if is_norm else None
            if source == "mlp.up_gate_proj" and layer not in config["gelu_layers"]:
                transform = deinterleave
            targets, parts = {}, {}
            for expert in experts:
                for target, shape in shapes.items():
                    name = f"transformer_blocks.{layer}.{expert_name(target, expert)}.weight"
                    targets[name] = torch.Size(shape)
                    parts[name] = SPLIT_SOURCES.get(target, source) + (f"_{expert}" if expert else "")
            if is_split and not is_norm:
                for name, shape in targets.items():
                    rules[f"block.layers.{layer}.{parts[name]}.weight"] = Rule({name: shape}, transform)
            else:
                rules[f"block.layers.{layer}.{source}.weight"] = Rule(targets, transform, is_float32=is_norm)
    return rules


def transformer_config_from_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    Reads the config of [`MagiHumanTransformer3DModel`] off the shapes of a checkpoint with canonical names.

    Shapes do not tell the positions of audio and text (`coordinate_style`) nor which layers attend locally; both keep
    the base model's values.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors by canonical or split names; meta tensors will do.

    Returns:
        `dict`: Arguments of [`MagiHumanTransformer3DModel`].

    Raises:
        `ValueError`: Names that the config is read from are missing.
    """
    return transformer_config_from_shapes(tensor_shapes(state_dict))


def transformer_config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    if is_split(shapes):
        shapes = stacked_shapes(shapes)
    layers = sorted({int(name.split(".")[2]) for name in shapes if name.startswith("block.layers.")})
    parts = ("attention.pre_norm", "attention.q_norm", "attention.linear_qkv", "attention.linear_proj")
    parts += ("mlp.up_gate_proj", "mlp.down_proj")
    needed = [f"adapter.{modality}_embedder.weight" for modality in EXPERTS]
    needed += [f"block.layers.{layer}.{part}.weight" for layer in layers or [0] for part in parts]
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"`state_dict` is not a MagiHuman transformer with the original's names, it lacks {missing}.")

    def size(layer: int, part: str, dim: int = 0) -> int:
        return shapes[f"block.layers.{layer}.{part}.weight"][dim]

    first = layers[0]
    hidden_size, video_token_size = shapes["adapter.video_embedder.weight"]
    experts = {layer: size(layer, "attention.pre_norm") // hidden_size for layer in layers}
    head_dim = size(first, "attention.q_norm") // experts[first]
    num_heads = size(first, "attention.linear_proj", 1) // head_dim
    # Rows beyond the queries: keys, values and, if gated, a gate for each head.
    rest = size(first, "attention.linear_qkv") // experts[first] - num_heads * head_dim
    is_gated = (rest - num_heads) % (2 * head_dim) == 0
    patch_size = (1, 2, 2)
    return {
        "patch_size": patch_size,
        "in_channels": video_token_size // math.prod(patch_size),
        "audio_in_channels": shapes["adapter.audio_embedder.weight"][1],
        "text_in_channels": shapes["adapter.text_embedder.weight"][1],
        "num_layers": layers[-1] + 1,
        "num_attention_heads": num_heads,
        "num_key_value_heads": (rest - num_heads * is_gated) // (2 * head_dim),
        "attention_head_dim": head_dim,
        "modality_layers": tuple(layer for layer in layers if experts[layer] == len(EXPERTS)),
        "gelu_layers": tuple(
            layer
            for layer in layers
            if size(layer, "mlp.up_gate_proj") == experts[layer] * size(layer, "mlp.down_proj", 1)
        ),
        "post_norm_layers": tuple(
            layer for layer in layers if f"block.layers.{layer}.attn_post_norm.weight" in shapes
        ),
        "gated_attention": is_gated,
    }


def is_split(shapes: Mapping[str, torch.Size]) -> bool:
    return any(".attention.linear_q." in name or ".attention.linear_q_" in name for name in shapes)


def stacked_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The shapes that split linears have once they are stacked under their canonical names."""
    stacked: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        name = re.sub(r"(\.(linear_[qkvg]|linear_proj|up_gate_proj|down_proj))_(video|audio|text)\.", r"\1.", name)
        name = re.sub(r"\.linear_[qkvg]\.", ".linear_qkv.", name)
        rows = stacked[name][0] if name in stacked else 0
        stacked[name] = torch.Size([rows + shape[0], *shape[1:]])
    return stacked


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
    rules = checked_transformer_rules(state_dict, tensor_shapes(state_dict), config)
    return apply_rules(state_dict, rules)


def checked_transformer_rules(
    source: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], config: Mapping[str, Any]
) -> dict[str, Rule]:
    """The rules of a checkpoint whose names, shapes and rotary frequencies fit the config, whichever its layout."""
    rules = transformer_rules(config, is_split(shapes))
    expected = {name: rule.shape for name, rule in rules.items()}
    check_names_and_shapes(shapes, expected | {ROPE_BANDS: torch.Size([config["attention_head_dim"] // 8])})
    bands, theta = source[ROPE_BANDS], config.get("rope_theta", 10000.0)
    computed = 1.0 / theta ** (torch.arange(len(bands), dtype=torch.float32) / len(bands))
    if not bands.is_meta and not torch.allclose(bands.float().cpu(), computed, rtol=1e-2):
        raise ValueError(f"{ROPE_BANDS!r} holds {bands.tolist()}, but `rope_theta`={theta} gives {computed.tolist()}.")
    return rules


def plan_transformer(
    source: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], variant: str
) -> tuple[dict[str, Any], dict[str, Rule]]:
    """The config and the rules of a checkpoint, once all names and shapes are checked."""
    weights = {name: shape for name, shape in shapes.items() if not name.endswith(FP8_SCALE)}
    config = transformer_config_from_shapes(weights)
    config |= variant_config(variant, config["num_layers"])
    return config, checked_transformer_rules(source, weights, config)


def convert_tensors(
    source: Mapping[str, torch.Tensor], rules: Mapping[str, Rule], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Our tensors one after the other: scaled float8 multiplied out, fp32 parts in float32, the others in `dtype`.

    What GGUF holds in blocks of bits stays so; a block is part of a row, so whole rows can go anywhere.

    Raises:
        `ValueError`: A float8 tensor without its scale, or a scale that does not fit.
    """
    for name, rule in rules.items():
        tensor, scale = source[name], source.get(name + FP8_SCALE)
        if (scale is not None) != (tensor.dtype == torch.float8_e4m3fn):
            raise ValueError(f"{name!r} is {tensor.dtype}; float8 tensors, and no others, must have a {FP8_SCALE!r}.")
        if scale is not None:
            if scale.numel() != 1 or not torch.isfinite(scale).all() or scale.item() <= 0:
                raise ValueError(f"{name + FP8_SCALE!r} is {scale.tolist()}, it must be one positive, finite number.")
            tensor = tensor.float() * scale.float()
        for target, part in rule.apply(tensor).items():
            if not is_gguf(part):
                part = part.to(torch.float32 if rule.is_float32 else dtype)
            yield target, part.contiguous()


# Any state dict


def is_gguf(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "quant_type")


def tensor_shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor, of a quantised one of GGUF that of its values."""
    shapes = {name: tensor.quant_shape if is_gguf(tensor) else tensor.shape for name, tensor in state_dict.items()}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def check_names_and_shapes(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    wrong_shapes = [
        f"{name} {tuple(shape)} instead of {tuple(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown": sorted(shapes.keys() - expected.keys()),
        "of another shape": wrong_shapes,
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"`state_dict` does not fit the config. Tensors {'; '.join(found)}.")


def apply_rules(state_dict: Mapping[str, torch.Tensor], rules: Mapping[str, Rule]) -> dict[str, torch.Tensor]:
    converted: dict[str, torch.Tensor] = {}
    for name, rule in rules.items():
        converted |= rule.apply(state_dict[name])
    return converted


# Variants


def check_variant(variant: str) -> str:
    if variant not in VARIANTS:
        raise ValueError(f"`variant`={variant!r} must be one of {VARIANTS}.")
    return variant


def variant_config(variant: str, num_layers: int) -> dict[str, Any]:
    """What no published file states: the positions of audio and text, and which layers attend locally."""
    local_layers = ()
    if variant == "sr_1080p":
        local_layers = tuple(layer for layer in range(num_layers) if layer not in GLOBAL_LAYERS_1080P)
    return {
        "coordinate_style": "v1" if variant.startswith("sr") else "v2",
        "local_attention_layers": local_layers,
    }


def guess_variant(source: str | os.PathLike[str], subfolder: str | None) -> str:
    """
    Reads the variant off the last part of a path that names one.

    Raises:
        `ValueError`: No part, or a part that names several.
    """
    patterns = {"sr_1080p": "1080", "sr_540p": "540", "distill": "distill", "base": r"(?<![a-z])base(?![a-z])"}
    parts = [*PurePosixPath(os.fspath(source)).parts, *PurePosixPath(subfolder or "").parts]
    for part in reversed(parts[-3:]):
        found = [variant for variant, pattern in patterns.items() if re.search(pattern, part.lower())]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ValueError(f"The path {'/'.join(parts)!r} does not tell the variant; pass `variant=`, one of {VARIANTS}.")
