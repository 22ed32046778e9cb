# SPDX-License-Identifier: Apache-2.0
"""The names of the original's transformer and ours: one table, and pure functions that open no file, build no model.

Conversion is strict: every name is used once, and missing, unknown or misshapen tensors are an error that lists them.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

EXPERTS = ("video", "audio", "text")
ROPE_BANDS = "adapter.rope.bands"
FP8_SCALE = ".__fp8_scale"

VARIANTS = ("base", "distill", "sr_540p", "sr_1080p")
UPSCALE_SIZES = {"sr_540p": (512, 896), "sr_1080p": (1088, 1920)}  # height and width in pixels
GLOBAL_LAYERS_1080P = (3, 7, 11, 15, 19, 23, 27, 31)


class Rule(NamedTuple):
    """Rows of one source tensor go to `targets` in order, through `transform`; to float32 always if `is_float32`."""

    targets: dict[str, torch.Size]
    transform: Callable[[Tensor], Tensor] | None = None
    is_float32: bool = False

    @property
    def shape(self) -> torch.Size:
        sizes = list(self.targets.values())
        return torch.Size([sum(size[0] for size in sizes), *sizes[0][1:]])

    def apply(self, tensor: Tensor) -> dict[str, Tensor]:
        parts = tensor.split([size[0] for size in self.targets.values()])
        if self.transform is not None:
            parts = [self.transform(part) for part in parts]
        return dict(zip(self.targets, parts, strict=True))


def add_one(weight: Tensor) -> Tensor:
    """Norm weights are stored around zero; the sum is taken in float32, as the original takes it in every call."""
    return weight.float() + 1


def deinterleave(weight: Tensor) -> Tensor:
    """Rows gate, linear, gate, linear, ... -> all of gate, then all of linear."""
    return torch.cat([weight[0::2], weight[1::2]])


def layer_table(config: Mapping[str, Any], layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Source module -> ours, `{}` for the expert, and its shape; canonical `linear_qkv` is `q, k, v, g` in one."""
    num_heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    hidden_size, key_value_dim = num_heads * head_dim, config["num_key_value_heads"] * head_dim
    is_gelu = layer in config["gelu_layers"]
    inner_size = hidden_size * 4 if is_gelu else int(hidden_size * 4 * 2 / 3) // 4 * 4
    table = {
        "attention.pre_norm": ("norm1{}", (hidden_size,)),
        "attention.linear_q": ("attn{}.to_q", (hidden_size, hidden_size)),
        "attention.linear_k": ("attn{}.to_k", (key_value_dim, hidden_size)),
        "attention.linear_v": ("attn{}.to_v", (key_value_dim, hidden_size)),
        "attention.linear_g": ("attn{}.to_gate", (num_heads, hidden_size)),
        "attention.q_norm": ("attn{}.norm_q", (head_dim,)),
        "attention.k_norm": ("attn{}.norm_k", (head_dim,)),
        "attention.linear_proj": ("attn{}.to_out", (hidden_size, hidden_size)),
        "attn_post_norm": ("post_norm1{}", (hidden_size,)),
        "mlp.pre_norm": ("norm2{}", (hidden_size,)),
        "mlp.up_gate_proj": ("ff{}.linear_in", (inner_size if is_gelu else 2 * inner_size, hidden_size)),
        "mlp.down_proj": ("ff{}.linear_out", (hidden_size, inner_size)),
        "mlp_post_norm": ("post_norm2{}", (hidden_size,)),
    }
    if not config["gated_attention"]:
        del table["attention.linear_g"]
    if layer not in config["post_norm_layers"]:
        del table["attn_post_norm"], table["mlp_post_norm"]
    return table


def stacked_name(name: str) -> str:
    """The canonical name of the tensor that a split one is part of; norms are always stacked."""
    name = re.sub(r"(linear_[qkvg]|_proj)_(video|audio|text)\.", r"\1.", name)
    return re.sub(r"linear_[qkvg]\.", "linear_qkv.", name)


def transformer_rules(config: Mapping[str, Any], is_split: bool = False) -> dict[str, Rule]:
    """The rule of every tensor of a transformer except the rotary frequencies, which the model computes.

    With `is_split` every linear of every modality has a name of its own, as in single files of some tools, instead of
    the canonical stacked ones. Norms are stacked in both.
    """
    hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
    video_token_size = config["in_channels"] * math.prod(config["patch_size"])
    outer_table = {
        "adapter.video_embedder": ("video_embedder", (hidden_size, video_token_size)),
        "adapter.audio_embedder": ("audio_embedder", (hidden_size, config["audio_in_channels"])),
        "adapter.text_embedder": ("text_embedder", (hidden_size, config["text_in_channels"])),
        "final_norm_video": ("video_norm_out", (hidden_size,)),
        "final_norm_audio": ("audio_norm_out", (hidden_size,)),
        "final_linear_video": ("video_proj_out", (video_token_size, hidden_size)),
        "final_linear_audio": ("audio_proj_out", (config["audio_in_channels"], hidden_size)),
    }
    rules: dict[str, Rule] = {}
    for source, (target, shape) in outer_table.items():
        transform = add_one if "norm" in source else None
        rules[f"{source}.weight"] = Rule({f"{target}.weight": torch.Size(shape)}, transform, is_float32=True)
        if "embedder" in source:
            rules[f"{source}.bias"] = Rule({f"{target}.bias": torch.Size(shape[:1])}, is_float32=True)
    for layer in range(config["num_layers"]):
        for expert in EXPERTS if layer in config["modality_layers"] else ("",):
            for module, (target, shape) in layer_table(config, layer).items():
                is_norm = "norm" in module
                transform = add_one if is_norm else None
                if module == "mlp.up_gate_proj" and layer not in config["gelu_layers"]:
                    transform = deinterleave
                suffix = f"_{expert}" if expert and not is_norm else ""
                source = f"block.layers.{layer}.{module}{suffix}.weight"
                rule = rules.setdefault(source if is_split else stacked_name(source), Rule({}, transform, is_norm))
                name = f"transformer_blocks.{layer}.{target.format(f'.{expert}' if expert else '')}.weight"
                rule.targets[name] = torch.Size(shape)
    return rules


def transformer_config_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the arguments of [`MagiHumanTransformer3DModel`] off the shapes of tensors with canonical or split names.

    Shapes do not tell the positions of audio and text (`coordinate_style`) nor which layers attend locally; both keep
    the base model's values. Meta tensors will do. Raises a `ValueError` if names that it is read from are missing.
    """
    shapes: dict[str, torch.Size] = {}
    for name, shape in tensor_shapes(state_dict).items():
        name = stacked_name(name)
        rows = shapes[name][0] if name in shapes else 0
        shapes[name] = torch.Size([rows + shape[0], *shape[1:]]) if shape else shape
    layers = sorted({int(name.split(".")[2]) for name in shapes if name.startswith("block.layers.")}) or [0]
    parts = ("attention.pre_norm", "attention.q_norm", "attention.linear_qkv", "attention.linear_proj")
    parts += ("mlp.up_gate_proj", "mlp.down_proj")
    needed = [f"adapter.{modality}_embedder.weight" for modality in EXPERTS]
    needed += [f"block.layers.{layer}.{part}.weight" for layer in layers for part in parts]
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"`state_dict` is not a MagiHuman transformer with the original's names, it lacks {missing}.")

    def size(layer: int, part: str, dim: int = 0) -> int:
        return shapes[f"block.layers.{layer}.{part}.weight"][dim]

    hidden_size, video_token_size = shapes["adapter.video_embedder.weight"]
    experts = {layer: size(layer, "attention.pre_norm") // hidden_size for layer in layers}
    head_dim = size(layers[0], "attention.q_norm") // experts[layers[0]]
    num_heads = size(layers[0], "attention.linear_proj", 1) // head_dim
    # Rows beyond the queries: keys, values and, if gated, a gate for each head.
    rest = size(layers[0], "attention.linear_qkv") // experts[layers[0]] - num_heads * head_dim
    is_gated = (rest - num_heads) % (2 * head_dim) == 0
    return {
        "patch_size": (1, 2, 2),
        "in_channels": video_token_size // (1 * 2 * 2),
        "audio_in_channels": shapes["adapter.audio_embedder.weight"][1],
        "text_in_channels": shapes["adapter.text_embedder.weight"][1],
        "num_layers": layers[-1] + 1,
        "num_attention_heads": num_heads,
        "num_key_value_heads": (rest - num_heads * is_gated) // (2 * head_dim),
        "attention_head_dim": head_dim,
        "modality_layers": tuple(x for x in layers if experts[x] == len(EXPERTS)),
        "gelu_layers": tuple(
            x for x in layers if size(x, "mlp.up_gate_proj") == experts[x] * size(x, "mlp.down_proj", 1)
        ),
        "post_norm_layers": tuple(x for x in layers if f"block.layers.{x}.attn_post_norm.weight" in shapes),
        "gated_attention": is_gated,
    }


def convert_transformer_state_dict(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts tensors with canonical or split names to the state dict of [`MagiHumanTransformer3DModel`].

    Norms, embedders and heads come in float32, the others in their own dtype. Raises a `ValueError` for names that are
    missing or unknown, and for shapes or rotary frequencies that the config does not give.
    """
    return dict(convert_tensors(state_dict, checked_rules(state_dict, config)))


def checked_rules(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules of a transformer whose names, shapes and rotary frequencies fit the config, whichever its format."""
    rules = transformer_rules(config, is_split=any(re.search(r"\.linear_q[._]", name) for name in source))
    if "video_embedder.weight" in source:  # our names
        ours = [(name, shape, rule) for rule in rules.values() for name, shape in rule.targets.items()]
        rules = {name: Rule({name: shape}, is_float32=rule.is_float32) for name, shape, rule in ours}
        check_names_and_shapes(source, rules)
        return rules
    bands_rule = Rule({ROPE_BANDS: torch.Size([config["attention_head_dim"] // 8])})
    check_names_and_shapes(source, rules | {ROPE_BANDS: bands_rule})
    bands, theta = source[ROPE_BANDS], config.get("rope_theta", 10000.0)
    computed = 1.0 / theta ** (torch.arange(len(bands), dtype=torch.float32) / len(bands))
    if not bands.is_meta and not torch.allclose(bands.float().cpu(), computed, rtol=1e-2):
        raise ValueError(f"{ROPE_BANDS!r} holds {bands.tolist()}, but `rope_theta`={theta} gives {computed.tolist()}.")
    return rules


def plan_transformer(source: Mapping[str, Tensor], variant: str) -> tuple[dict[str, Any], dict[str, Rule]]:
    """The config and the rules of a checkpoint, once all names and shapes are checked."""
    config = transformer_config_from_state_dict(source)
    config |= variant_config(variant, config["num_layers"])
    return config, checked_rules(source, config)


def convert_tensors(
    source: Mapping[str, Tensor], rules: Mapping[str, Rule], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one: scaled float8 multiplied out, fp32 parts in float32, others in `dtype`, if given.

    What GGUF holds in blocks of bits stays so; a block is part of a row, so whole rows can go anywhere.
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
                part = part.to(torch.float32 if rule.is_float32 else dtype or part.dtype)
            yield target, part.contiguous()


def is_gguf(tensor: Tensor) -> bool:
    return hasattr(tensor, "quant_type")


def tensor_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor but the scales of float8; of a quantised one of GGUF that of its values."""
    shapes = getattr(state_dict, "shapes", None) or {  # those of files are known without reading tensors
        name: tensor.quant_shape if is_gguf(tensor) else tensor.shape for name, tensor in state_dict.items()
    }
    return {name: torch.Size(shape) for name, shape in shapes.items() if not name.endswith(FP8_SCALE)}


def check_names_and_shapes(source: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> None:
    shapes, expected = tensor_shapes(source), {name: rule.shape for name, rule in rules.items()}
    wrong = [name for name, shape in shapes.items() if name in expected and shape != expected[name]]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown": sorted({*shapes, *(name.removesuffix(FP8_SCALE) for name in source)} - expected.keys()),
        "of another shape": [f"{x} {tuple(shapes[x])} instead of {tuple(expected[x])}" for x in wrong],
    }
    if found := [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]:
        raise ValueError(f"`state_dict` does not fit the config. Tensors {'; '.join(found)}.")


def check_variant(variant: str) -> str:
    if variant not in VARIANTS:
        raise ValueError(f"`variant`={variant!r} must be one of {VARIANTS}.")
    return variant


def variant_config(variant: str, num_layers: int) -> dict[str, Any]:
    """What no published file states: the positions of audio and text, and which layers attend locally."""
    local_layers = set(range(num_layers if variant == "sr_1080p" else 0)) - set(GLOBAL_LAYERS_1080P)
    style = "v1" if variant.startswith("sr") else "v2"
    return {"coordinate_style": style, "local_attention_layers": tuple(sorted(local_layers))}


def guess_variant(source: str | os.PathLike[str], subfolder: str | None) -> str:
    """Reads the variant off the last part of a path that names one, else raises a `ValueError`."""
    patterns = {"sr_1080p": "1080", "sr_540p": "540", "distill": "distill", "base": r"(?<![a-z])base(?![a-z])"}
    parts = [*PurePosixPath(os.fspath(source)).parts, *PurePosixPath(subfolder or "").parts]
    named = ([x for x, pattern in patterns.items() if re.search(pattern, part.lower())] for part in parts[:-4:-1])
    found = next(filter(None, named), [])
    if len(found) == 1:
        return found[0]
    raise ValueError(f"The path {'/'.join(parts)!r} does not tell the variant; pass `variant=`, one of {VARIANTS}.")
