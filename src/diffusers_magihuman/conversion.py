# SPDX-License-Identifier: Apache-2.0
"""The names of the original's transformer and ours: one table, and pure functions that open no file, build no model.

Conversion is strict: every name is used once, and missing, unknown or misshapen tensors are an error that lists them.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from diffusers.utils import is_gguf_available
from torch import Tensor

from .checks import check_integer, show, show_some
from .constants import MAX_FEED_FORWARD_MULTIPLE, VARIANTS, spell_variant

if is_gguf_available():
    from gguf import GGML_QUANT_SIZES

EXPERTS = ("video", "audio", "text")
ROPE_BANDS = "adapter.rope.bands"

# What checkpoints and LoRAs have before their names, some of it together: ComfyUI, DiffSynth, vLLM-Omni, Diffusers,
# PEFT; and wrappers of PyTorch, which are anywhere.
PREFIX = re.compile(r"^(((base_|diffusion_)?model|transformer|pipe|dit|module|u?net|ema|generator|student)\.)+")
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
OTHER_MODELS = re.compile(r"((audio_)?vae|vocoder|text_encoders?|(first|cond)_stage_model|conditioner|model_ema)\.")
# The scale by which a float8 tensor is multiplied: of the published files; of vLLM and ComfyUI, DeepSeek, Quanto,
# ComfyUI's earlier files. What they say besides about activations or the format is of no use here.
FP8_SCALE = ".__fp8_scale"
FP8_SCALES = re.compile(r"\.(weight_scale|weight_scale_inv|weight\.scale|weight\._scale|scale_weight|scale)$")
FP8_UNUSED = re.compile(r"(.*\.)?(input_scale|scale_input|output_scale|comfy_quant|scaled_fp8)")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_BLOCK = 128  # rows and columns with one scale in DeepSeek's layout

UPSCALE_SIZES = {"sr-540p": (512, 896), "sr-1080p": (1088, 1920)}  # height and width in pixels
GLOBAL_LAYERS_1080P = (3, 7, 11, 15, 19, 23, 27, 31)

# Inner sizes of the feed-forward become multiples of it: kernels and quantisers cannot take the published 13,652.
FEED_FORWARD_MULTIPLE = 128


class Rule(NamedTuple):
    """Rows of one source tensor go to `targets` in order, through `transform`; to float32 always if `is_float32`.

    Where parts of the source have the shape `unpadded`, the targets have zeros at the end of each of their equal
    `groups` of rows, and of their columns.
    """

    targets: dict[str, torch.Size]
    transform: Callable[[Tensor], Tensor] | None = None
    is_float32: bool = False
    unpadded: torch.Size | None = None
    groups: int = 1

    @property
    def shape(self) -> torch.Size:
        sizes = [self.unpadded or size for size in self.targets.values()]
        return torch.Size([sum(size[0] for size in sizes), *sizes[0][1:]])

    def fitted(self, shape: torch.Size | None) -> "Rule":
        """The rule of a source that may have the zeros already."""
        padded = self._replace(unpadded=None)
        return padded if shape == padded.shape else self

    def apply(self, tensor: Tensor, has_columns: bool = True) -> dict[str, Tensor]:
        """The targets of a tensor, or of one with the same rows but other columns."""
        parts = dict(
            zip(self.targets, tensor.split([(self.unpadded or x)[0] for x in self.targets.values()]), strict=True)
        )
        if self.transform is not None:
            parts = {name: self.transform(part) for name, part in parts.items()}
        if self.unpadded is not None:
            sizes = {x: size if has_columns else (size[0], *tensor.shape[1:]) for x, size in self.targets.items()}
            parts = {name: pad(part, sizes[name], self.groups) for name, part in parts.items()}
        return parts


def pad(tensor: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
    """Zeros at the end of equal groups of rows, and of the columns, up to the shape."""
    if is_gguf(tensor):  # zero bytes are zeros in all its types
        block_size, block_bytes = GGML_QUANT_SIZES[tensor.quant_type]
        if shape[-1] % block_size:
            needed = f"a multiple of {block_size} for {tensor.quant_type.name}, or that of the file"
            raise ValueError(f"`feed_forward_multiple` gives rows of {shape[-1]}, it must be {needed}.")
        padded = pad(tensor.as_tensor(), (*shape[:-1], shape[-1] // block_size * block_bytes), groups)
        return type(tensor)(padded, quant_type=tensor.quant_type)
    parts, padded = tensor.unflatten(0, (groups, -1)), tensor.new_zeros(shape)
    padded.unflatten(0, (groups, -1))[tuple(map(slice, parts.shape))] = parts
    return padded


def add_one(weight: Tensor) -> Tensor:
    """Norm weights are stored around zero; the sum is taken in float32, as the original takes it in every call."""
    return weight.float() + 1


def deinterleave(weight: Tensor) -> Tensor:
    """Rows gate, linear, gate, linear, ... -> all of gate, then all of linear."""
    return torch.cat([weight[0::2], weight[1::2]])


def feed_forward_size(hidden_size: int, is_gelu: bool, multiple: int = 1) -> int:
    """Channels between the linears of a feed-forward, rounded up to a multiple."""
    size = hidden_size * 4 if is_gelu else int(hidden_size * 4 * 2 / 3) // 4 * 4
    return -(-size // multiple) * multiple


def layer_table(config: Mapping[str, Any], layer: int, multiple: int = 1) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Source module -> ours, `{}` for the expert, and its shape; canonical `linear_qkv` is `q, k, v, g` in one."""
    num_heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    hidden_size, key_value_dim = num_heads * head_dim, config["num_key_value_heads"] * head_dim
    is_gelu = layer in config["gelu_layers"]
    inner_size = feed_forward_size(hidden_size, is_gelu, multiple)
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


def table_name(name: Any) -> str:
    """A name of a checkpoint or LoRA as the tables have it, without prefixes; a scale as in the published files."""
    if not isinstance(name, str):
        raise ValueError(f"`state_dict` must have strings as names, but has {show(name)}.")
    return FP8_SCALES.sub(f".weight{FP8_SCALE}", PREFIX.sub("", WRAPPERS.sub("", name)))


def table_names(names: Iterable[str], is_lora: bool = False) -> dict[str, str]:
    """The names of a file by those of [`table_name`]. Those of other models in the same checkpoint, as ComfyUI writes
    them, are left out, like what goes with float8 beside scales. `ValueError` for two names of one tensor."""
    found: dict[str, str] = {}
    for name in names:
        new = table_name(name)
        is_used = not FP8_UNUSED.fullmatch(new) and (is_lora or not OTHER_MODELS.match(new))
        if is_used and found.setdefault(new, name) != name:
            raise ValueError(f"`state_dict` has two names of one tensor, {found[new]!r} and {name!r}.")
    if any(name.endswith("scaled_fp8") for name in names) and not any(name.endswith(FP8_SCALE) for name in found):
        raise ValueError("`state_dict` says by `scaled_fp8` that it has scales of float8 tensors, but it has none.")
    return found


def with_table_names(state_dict: Mapping[str, Tensor], is_lora: bool = False) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"`state_dict`={show(state_dict)} must be tensors by their names.")
    if not is_lora and (wrong := [show(x) for x, tensor in state_dict.items() if not isinstance(tensor, Tensor)]):
        raise ValueError(f"`state_dict` holds what is no tensor: {show_some(wrong)}.")
    return {name: state_dict[original] for name, original in table_names(state_dict, is_lora).items()}


def stacked_name(name: str) -> str:
    """The canonical name of the tensor that a split one is part of; norms are always stacked."""
    name = re.sub(r"(linear_[qkvg]|_proj)_(video|audio|text)\.", r"\1.", name)
    return re.sub(r"linear_[qkvg]\.", "linear_qkv.", name)


def transformer_rules(config: Mapping[str, Any], is_split: bool = False) -> dict[str, Rule]:
    """The rule of every tensor of a transformer except the rotary frequencies, which the model computes.

    With `is_split` every linear of every modality has a name of its own, as in single files of some tools, instead of
    the canonical stacked ones. Norms are stacked in both. The source's feed-forwards are as large as the original's.
    """
    multiple = config.get("feed_forward_multiple", FEED_FORWARD_MULTIPLE)
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
            unpadded = layer_table(config, layer)
            for module, (target, shape) in layer_table(config, layer, multiple).items():
                is_norm, size = "norm" in module, torch.Size(unpadded[module][1])
                rule = Rule({}, add_one if is_norm else None, is_norm, None if size == shape else size)
                if module == "mlp.up_gate_proj" and layer not in config["gelu_layers"]:
                    rule = rule._replace(transform=deinterleave, groups=2)
                suffix = f"_{expert}" if expert and not is_norm else ""
                source = f"block.layers.{layer}.{module}{suffix}.weight"
                rule = rules.setdefault(source if is_split else stacked_name(source), rule)
                name = f"transformer_blocks.{layer}.{target.format(f'.{expert}' if expert else '')}.weight"
                rule.targets[name] = torch.Size(shape)
    return rules


def transformer_config_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the arguments of [`MagiHumanTransformer3DModel`] off the shapes of tensors with canonical or split names.

    Shapes do not tell the positions of audio and text (`coordinate_style`) nor which layers attend locally; both keep
    the base model's values. `feed_forward_multiple` is 128 where that adds at most 1 % to each inner size, as it does
    to the published ones, else 1; where zeros are added already, what gives the size that is found. Meta tensors will
    do. Raises a `ValueError` if names that it is read from are missing.
    """
    shapes: dict[str, torch.Size] = {}
    for name, shape in tensor_shapes(state_dict).items():
        name = stacked_name(table_name(name))
        rows = shapes[name][0] if name in shapes else 0
        shapes[name] = torch.Size([rows + shape[0], *shape[1:]]) if shape else shape
    numbers = [int(match[1]) for name in shapes if (match := re.match(r"block\.layers\.(\d{1,3})\.", name))]
    layers = range(max(numbers, default=0) + 1)
    parts = ("attention.pre_norm", "attention.q_norm", "attention.linear_qkv", "attention.linear_proj")
    parts += ("mlp.up_gate_proj", "mlp.down_proj")
    needed = [f"adapter.{modality}_embedder.weight" for modality in EXPERTS]
    needed += [f"block.layers.{layer}.{part}.weight" for layer in layers for part in parts]
    if missing := [name for name in needed if name not in shapes]:
        found = f"it lacks {show_some(missing)}. With our names it needs `config`"
        raise ValueError(f"`state_dict` is not a MagiHuman transformer with the original's names, {found}.")
    if wrong := [x for x in needed if len(shapes[x]) != (1 if "norm" in x else 2) or 0 in shapes[x]]:
        raise ValueError(f"`state_dict` has shapes that no transformer has, of {show_some(wrong)}.")

    def size(layer: int, part: str, dim: int = 0) -> int:
        return shapes[f"block.layers.{layer}.{part}.weight"][dim]

    hidden_size, video_token_size = shapes["adapter.video_embedder.weight"]
    experts = {layer: size(layer, "attention.pre_norm") // hidden_size for layer in layers}
    if odd := [x for x in layers if experts[x] not in (1, len(EXPERTS)) or size(x, "attention.q_norm") < experts[x]]:
        raise ValueError(f"`state_dict` has norms neither of one expert nor of three in the layers {show_some(odd)}.")
    head_dim = size(layers[0], "attention.q_norm") // experts[layers[0]]
    num_heads = size(layers[0], "attention.linear_proj", 1) // head_dim
    # Rows beyond the queries: keys, values and, if gated, a gate for each head.
    rest = size(layers[0], "attention.linear_qkv") // experts[layers[0]] - num_heads * head_dim
    is_gated = (rest - num_heads) % (2 * head_dim) == 0
    inner_sizes = {layer: size(layer, "mlp.down_proj", 1) for layer in layers}
    gelu_layers = tuple(x for x in layers if size(x, "mlp.up_gate_proj") == experts[x] * inner_sizes[x])
    found = {(layer in gelu_layers, inner_size) for layer, inner_size in inner_sizes.items()}
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
        "gelu_layers": gelu_layers,
        "post_norm_layers": tuple(x for x in layers if f"block.layers.{x}.attn_post_norm.weight" in shapes),
        "gated_attention": is_gated,
        "feed_forward_multiple": find_feed_forward_multiple(hidden_size, found),
    }


def find_feed_forward_multiple(hidden_size: int, found: Iterable[tuple[bool, int]]) -> int:
    """The `feed_forward_multiple` for pairs of `is_gelu` and the inner size that is found."""

    def fits(multiple: int, most: float = 1.0) -> bool:
        return all(x <= feed_forward_size(hidden_size, is_gelu, multiple) <= most * x for is_gelu, x in found)

    if fits(1):
        return FEED_FORWARD_MULTIPLE if fits(FEED_FORWARD_MULTIPLE, 1.01) else 1
    return next(filter(fits, (128, 256, *range(2, MAX_FEED_FORWARD_MULTIPLE + 1))), 1)


def convert_transformer_state_dict(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts tensors with canonical or split names to the state dict of [`MagiHumanTransformer3DModel`].

    Norms, embedders and heads come in float32, the others in their own dtype. Raises a `ValueError` for names that are
    missing or unknown, and for shapes or rotary frequencies that the config does not give.
    """
    state_dict = with_table_names(state_dict)
    return dict(convert_tensors(state_dict, checked_rules(state_dict, config)))


def checked_rules(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules of a transformer whose names, shapes and rotary frequencies fit the config, whichever its format."""
    rules = transformer_rules(config, is_split=any(re.search(r"\.linear_q[._]", name) for name in source))
    is_ours, shapes = "video_embedder.weight" in source, tensor_shapes(source)
    rules = our_rules(rules) if is_ours else rules
    rules = {name: rule.fitted(shapes.get(name)) for name, rule in rules.items()}
    bands_rule = Rule({ROPE_BANDS: torch.Size([config["attention_head_dim"] // 8])})
    check_names_and_shapes(source, rules if is_ours else rules | {ROPE_BANDS: bands_rule})
    if is_ours:
        return rules
    bands, theta = read_tensor(source, ROPE_BANDS), config.get("rope_theta", 10000.0)
    computed = 1.0 / theta ** (torch.arange(len(bands), dtype=torch.float32) / len(bands))
    rtol, atol = (0.15, 1e-3) if source[ROPE_BANDS].dtype in FP8_DTYPES else (1e-2, 0)  # what rounding changes
    if not bands.is_meta and not torch.allclose(bands.float().cpu(), computed, rtol, atol):
        raise ValueError(f"{ROPE_BANDS!r} holds {bands.tolist()}, but `rope_theta`={theta} gives {computed.tolist()}.")
    return rules


def our_rules(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of a source with our names."""
    ours = [(name, shape, rule) for rule in rules.values() for name, shape in rule.targets.items()]
    return {name: rule._replace(targets={name: shape}, transform=None) for name, shape, rule in ours}


def all_rules(config: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules of all names, canonical, split and ours."""
    rules = transformer_rules(config) | transformer_rules(config, is_split=True)
    return rules | our_rules(rules)


def check_feed_forward_multiple(value: Any) -> int | None:
    """An argument that may be `None`, for what [`transformer_config_from_state_dict`] finds."""
    return None if value is None else check_integer("feed_forward_multiple", value, 1, MAX_FEED_FORWARD_MULTIPLE)


def plan_transformer(
    source: Mapping[str, Tensor], variant: str, feed_forward_multiple: int | None = None
) -> tuple[dict[str, Any], dict[str, Rule]]:
    """The config and the rules of a checkpoint, once all names and shapes are checked."""
    config = transformer_config_from_state_dict(source)
    config |= variant_config(variant, config["num_layers"])
    if feed_forward_multiple is not None:
        config["feed_forward_multiple"] = feed_forward_multiple
    return config, checked_rules(source, config)


def convert_tensors(
    source: Mapping[str, Tensor], rules: Mapping[str, Rule], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one: scaled float8 multiplied out, fp32 parts in float32, others in `dtype`, if given.

    What GGUF holds in blocks of bits stays so; a block is part of a row, so whole rows can go anywhere.
    """
    for name, rule in rules.items():
        tensor = read_tensor(source, name)
        for target, part in rule.apply(tensor).items():
            if not is_gguf(part):
                part = part.to(torch.float32 if rule.is_float32 else dtype or part.dtype)
            yield target, part.contiguous()


def read_tensor(source: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a source, float8 as float32 times its scale: one number, one for each row, or one for each block as
    in DeepSeek's files, which other dtypes may have too. Where no tensor has a scale, float8 is a plain cast."""
    tensor, scale = source[name], source.get(name + FP8_SCALE)
    if is_gguf(tensor):
        return tensor
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ValueError(f"{name!r} is {show(tensor)}, it must be a dense tensor of a floating dtype.")
    is_float8 = tensor.dtype in FP8_DTYPES
    if is_float8 and scale is None and any(other.endswith(FP8_SCALE) for other in source):
        raise ValueError(f"{name!r} is {tensor.dtype}, it must have a scale, as others of the file have.")
    if scale is None:
        return tensor.float() if is_float8 else tensor
    rows, blocks = tensor.shape[:1].numel(), torch.Size(-(-size // FP8_BLOCK) for size in tensor.shape)
    fits = not scale.is_meta and (scale.numel() == 1 or scale.shape in (blocks, (rows,), (rows, 1)))
    scale = scale.float()
    if not fits or not ((scale >= 0) & (scale < math.inf)).all():
        needed = f"finite and not negative: one number, {rows} or {tuple(blocks)}"
        raise ValueError(f"{name + FP8_SCALE!r} is {show(scale)}, it must be {needed}.")
    if scale.shape == blocks and scale.numel() != 1:
        for dim, size in enumerate(tensor.shape):
            scale = scale.repeat_interleave(FP8_BLOCK, dim).narrow(dim, 0, size)
    return tensor.float() * (scale if scale.shape == tensor.shape else scale.reshape(-1, *[1] * (tensor.ndim - 1)))


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
    if found := [f"{kind}: {show_some(names)}" for kind, names in problems.items() if names]:
        raise ValueError(f"`state_dict` does not fit the config. Tensors {'; '.join(found)}.")


def check_variant(variant: str, allowed: Sequence[str] = VARIANTS, argument: str = "variant") -> str:
    """The one of the allowed names that is meant, see [`spell_variant`]; `ValueError` if none is."""
    name = spell_variant(variant) if isinstance(variant, str) else None
    if name not in allowed:
        raise ValueError(f"`{argument}`={show(variant)} must be one of {tuple(allowed)}.")
    return name


def find_variant(
    variant: str | None,
    source: str | os.PathLike[str],
    subfolder: str | None = None,
    allowed: Sequence[str] = VARIANTS,
) -> str:
    """The variant that is meant, see [`check_variant`], or else the one that the path names."""
    return check_variant(guess_variant(source, subfolder, allowed) if variant is None else variant, allowed)


def variant_config(variant: str, num_layers: int) -> dict[str, Any]:
    """What no published file states: the positions of audio and text, and which layers attend locally."""
    variant = check_variant(variant)
    local_layers = set(range(num_layers if variant == "sr-1080p" else 0)) - set(GLOBAL_LAYERS_1080P)
    style = "v1" if variant.startswith("sr") else "v2"
    return {"coordinate_style": style, "local_attention_layers": tuple(sorted(local_layers))}


def guess_variant(source: str | os.PathLike[str], subfolder: str | None, allowed: Sequence[str] = VARIANTS) -> str:
    """Reads the variant off the last part of a path that names one, else raises a `ValueError`."""
    if not isinstance(source, str | os.PathLike) or not isinstance(subfolder, str | None):
        raise ValueError(f"`path_or_repo`={show(source)} and `subfolder`={show(subfolder)} must be paths.")
    patterns = {"sr-1080p": "1080", "sr-540p": "540", "distilled": "distill", "base": r"(?<![a-z])base(?![a-z])"}
    parts = [*PurePosixPath(os.fspath(source)).parts, *PurePosixPath(subfolder or "").parts]
    named = ([x for x, pattern in patterns.items() if re.search(pattern, part.lower())] for part in parts[:-4:-1])
    found = next(filter(None, named), [])
    if len(found) == 1:
        return found[0]
    path = "/".join(parts)
    raise ValueError(f"The path {path!r} does not tell the variant; pass `variant=`, one of {tuple(allowed)}.")
