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
"""From the published checkpoints to our models and repositories.

A layout is one table, source module -> our modules. Rows of a source tensor are split over its targets in order (all
of video, then audio, then text in a layer with three experts); a transform may change each part. Conversion is strict:
every name is used once, and a missing, unknown or misshapen tensor is an error that lists all of them.

The layout of a checkpoint (canonical or split names, one file or shards, bfloat16, float32 or scaled float8) is read
off its names. Tensors are read, converted and written one at a time.
"""

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate.utils import convert_file_size_to_int
from diffusers import AutoencoderKLWan, AutoencoderOobleck, ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, T5GemmaConfig, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .scheduling_magihuman_flow import MagiHumanFlowScheduler
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
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("block.layers.")}
    parts = ("attention.pre_norm", "attention.q_norm", "attention.linear_qkv", "attention.linear_proj")
    parts += ("mlp.up_gate_proj", "mlp.down_proj")
    needed = [f"adapter.{modality}_embedder.weight" for modality in EXPERTS]
    needed += [f"block.layers.{layer}.{part}.weight" for layer in sorted(layers | {0}) for part in parts]
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"`state_dict` is not a MagiHuman transformer with the original's names, it lacks {missing}.")

    def size(layer: int, part: str, dim: int = 0) -> int:
        return shapes[f"block.layers.{layer}.{part}.weight"][dim]

    hidden_size, video_token_size = shapes["adapter.video_embedder.weight"]
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
        "audio_in_channels": shapes["adapter.audio_embedder.weight"][1],
        "text_in_channels": shapes["adapter.text_embedder.weight"][1],
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
            layer for layer in sorted(layers) if f"block.layers.{layer}.attn_post_norm.weight" in shapes
        ),
        "gated_attention": is_gated,
    }


def expert_name(target: str, expert: str) -> str:
    """The modality stands before the layer, `attn.video.to_q`, and after a lone norm, `norm1.video`."""
    module, _, layer = target.partition(".")
    return f"{module}{expert}.{layer}" if layer else f"{module}{expert}"


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
    rules = checked_transformer_rules(tensor_shapes(state_dict), config)
    check_rotary_bands(state_dict[ROPE_BANDS], config)
    return apply_rules(state_dict, rules)


def checked_transformer_rules(shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules of a checkpoint whose names and shapes fit the config, whichever its layout."""
    rules = transformer_rules(config, is_split(shapes))
    expected = {name: rule.shape for name, rule in rules.items()}
    check_names_and_shapes(shapes, expected | {ROPE_BANDS: torch.Size([config["attention_head_dim"] // 8])})
    return rules


def check_rotary_bands(bands: torch.Tensor, config: Mapping[str, Any]) -> None:
    theta = config.get("rope_theta", 10000.0)
    expected = 1.0 / theta ** (torch.arange(len(bands), dtype=torch.float32) / len(bands))
    if not bands.is_meta and not torch.allclose(bands.float().cpu(), expected, rtol=1e-2):
        raise ValueError(f"{ROPE_BANDS!r} holds {bands.tolist()}, but `rope_theta`={theta} gives {expected.tolist()}.")


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
                f"transformer_blocks.{layer}.{expert_name(target, expert)}.weight": f"{part}{expert.replace('.', '_')}"
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
    check_names_and_shapes(tensor_shapes(state_dict), {name: rule.shape for name, rule in rules.items()})
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
        converted.update(rule.apply(state_dict[name]))
    return converted


# Files


FP8_SCALE = ".__fp8_scale"


class LazyTensors(Mapping[str, torch.Tensor]):
    """
    Tensors of safetensors files, each read when it is asked for.

    A file is opened for one tensor and closed with it, so that what was read does not stay mapped.

    Args:
        files (`Mapping[str, Path]`): The file of every tensor.

    Raises:
        `OSError`: A file is missing, damaged, or lacks a tensor that it should hold.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, str] = {}
        for path in sorted(set(files.values())):
            with open_safetensors(path) as file:
                names = [name for name in files if files[name] == path]
                if absent := sorted(set(names) - set(file.keys())):
                    raise OSError(f"{str(path)!r} lacks the tensors {absent}, which the index says it holds.")
                for name in names:
                    piece = file.get_slice(name)
                    self.shapes[name], self.dtypes[name] = torch.Size(piece.get_shape()), piece.get_dtype()

    def __getitem__(self, name: str) -> torch.Tensor:
        with open_safetensors(self.files[name]) as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_safetensors(path: Path) -> safe_open:
    if not path.is_file():
        raise OSError(f"{str(path)!r} is missing.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error


def open_checkpoint(path: Path) -> LazyTensors:
    """
    Opens a safetensors file, or a directory that holds one or an index of several.

    Raises:
        `OSError`: Nothing to open, or a file is missing or damaged.
        `ValueError`: An index names a file outside of its directory.
    """
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = sorted(path.glob("*.safetensors"))
        if len(indices) == 1:
            return LazyTensors(read_index(indices[0]))
        if len(files) != 1:
            found = [file.name for file in [*indices, *files]]
            raise OSError(f"{str(path)!r} must hold one index or one .safetensors file, but holds {found}.")
        path = files[0]
    with open_safetensors(path) as file:
        names = list(file.keys())
    return LazyTensors(dict.fromkeys(names, path))


def read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = {name: PurePosixPath(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{str(path)!r} is no index of safetensors files: {error!r}") from error
    for file in files.values():
        if file.is_absolute() or ".." in file.parts or "\\" in str(file):
            raise ValueError(f"{str(path)!r} names the file {str(file)!r}, allowed are files of its own directory.")
    return {name: path.parent / file for name, file in files.items()}


# Sources


ORIGINAL = "GAIR/daVinci-MagiHuman"
TEXT_ENCODER = "google/t5gemma-9b-9b-ul2"
AUDIO_VAE = "stabilityai/stable-audio-open-1.0"
VIDEO_VAE = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"

VARIANTS = ("base", "distill", "sr_540p", "sr_1080p")
VARIANT_FOLDERS = {"base": "base", "distill": "distill", "sr_540p": "540p_sr", "sr_1080p": "1080p_sr"}
UPSCALE_SIZES = {"sr_540p": (512, 896), "sr_1080p": (1088, 1920)}  # height and width in pixels
GLOBAL_LAYERS_1080P = (3, 7, 11, 15, 19, 23, 27, 31)


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


def fetch(source: str | os.PathLike[str], patterns: list[str], **hub_kwargs: Any) -> Path:
    """
    The local path of a file or directory, or of a repository's snapshot with the files that match the patterns.

    Raises:
        `OSError`: No such path or repository, or a repository to which access was not granted.
    """
    if os.path.exists(source):
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(source)) or os.fspath(source).startswith("."):
        raise OSError(f"{os.fspath(source)!r} is neither a path that exists nor a repository `owner/name`.")
    page = f"https://huggingface.co/{os.fspath(source)}"
    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=patterns, **hub_kwargs))
    except GatedRepoError as error:
        raise OSError(
            f"Access to {os.fspath(source)!r} is gated. Open {page}, accept its terms, log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(f"{page} cannot be downloaded: {error}") from error


def fetch_transformer(source: str | os.PathLike[str], subfolder: str | None, variant: str, **hub_kwargs: Any) -> Path:
    """Finds the transformer's files; `subfolder` is a directory or file of the source, or follows from the variant."""
    is_sr = variant.startswith("sr")
    names, other = (["sr_transformer", "transformer"], "transformer") if is_sr else (["transformer"], "sr_transformer")
    hub_kwargs["ignore_patterns"] = f"*/{other}/*"
    folders = [subfolder] if subfolder else sorted({variant, VARIANT_FOLDERS[variant]})
    kinds = ["*.safetensors", "*.json"]
    root = fetch(source, [f"{folder}/{kind}" for folder in folders for kind in kinds] + folders, **hub_kwargs)
    if subfolder and not (root / subfolder).exists():
        raise OSError(f"{os.fspath(source)!r} has no {subfolder!r}.")
    found = next((root / folder for folder in folders if (root / folder).exists()), None)
    if found is None:  # the source itself is the transformer; of a repository nothing but files of standard names
        names_at_root = ["model*.safetensors*", "diffusion_pytorch_model*.safetensors*"]
        found = fetch(source, names_at_root, **hub_kwargs)
        if not found.exists():
            raise OSError(
                f"{os.fspath(source)!r} has none of the folders {folders}; `subfolder` may name another, or a file."
            )
    return next((found / name for name in names if (found / name).is_dir()), found)


# Loading


def load_original_transformer(
    path_or_repo: str | os.PathLike[str],
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **hub_kwargs: Any,
) -> MagiHumanTransformer3DModel:
    """
    Loads a transformer from any published layout.

    Args:
        path_or_repo (`str` or `os.PathLike`): A safetensors file, a directory, or a repository on the Hub.
        subfolder (`str`, *optional*): Directory or file within it, for example `"distill"`.
        variant (`str`, *optional*): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`, guessed from the path when it
            names just one.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): What the linears compute in; norms, embedders and heads
            are float32 whatever the file holds.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the download.

    Returns:
        [`MagiHumanTransformer3DModel`] in evaluation mode, on the CPU.

    Raises:
        `ValueError`: The variant cannot be guessed, or tensors do not fit.
        `OSError`: A file or repository is missing, damaged or not accessible.
    """
    variant = check_variant(variant or guess_variant(path_or_repo, subfolder))
    source = open_checkpoint(fetch_transformer(path_or_repo, subfolder, variant, **hub_kwargs))
    config, rules = plan_transformer(source, source.shapes, source.dtypes, variant)
    model = meta_model(MagiHumanTransformer3DModel, config)
    model.load_state_dict(dict(convert_tensors(source, rules, dtype)), assign=True)
    return model.eval()


def plan_transformer(
    source: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], dtypes: Mapping[str, Any], variant: str
) -> tuple[dict[str, Any], dict[str, Rule]]:
    """The config and the rules of a checkpoint, once everything about it is checked that needs no large tensor."""
    weights = {name: shape for name, shape in shapes.items() if not name.endswith(FP8_SCALE)}
    config = transformer_config_from_shapes(weights)
    config |= variant_config(variant, config["num_layers"])
    rules = checked_transformer_rules(weights, config)
    check_rotary_bands(source[ROPE_BANDS], config)

    scaled = {name.removesuffix(FP8_SCALE) for name in shapes.keys() - weights.keys()}
    stored = {name for name, dtype in dtypes.items() if dtype in ("F8_E4M3", torch.float8_e4m3fn)}
    if scaled != stored:
        raise ValueError(
            f"Float8 tensors without scale: {sorted(stored - scaled)}; scales without: {sorted(scaled - stored)}."
        )
    for name in sorted(scaled):
        scale = source[name + FP8_SCALE]
        if scale.numel() != 1 or not torch.isfinite(scale).all() or scale.item() <= 0:
            raise ValueError(f"{name + FP8_SCALE!r} is {scale.tolist()}, it must be one positive, finite number.")
    return config, rules


def convert_tensors(
    source: Mapping[str, torch.Tensor], rules: Mapping[str, Rule], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors one after the other: scaled float8 multiplied out, fp32 parts in float32, the others in `dtype`.

    Linears of GGUF stay in their blocks of bits; a block is part of a row, so whole rows can go anywhere.
    """
    for name, rule in rules.items():
        tensor = source[name]
        if name + FP8_SCALE in source:
            tensor = tensor.float() * source[name + FP8_SCALE].float()
        if is_gguf(tensor) and any(is_kept_in_fp32(target) for target in rule.targets):
            # Absolutely and here: this module of Diffusers needs the package gguf.
            from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

            tensor = dequantize_gguf_tensor(tensor)
        for target, part in rule.apply(tensor).items():
            if not is_gguf(part):
                part = part.to(torch.float32 if is_kept_in_fp32(target) else dtype)
            yield target, part.contiguous()


def is_gguf(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "quant_type")


def is_kept_in_fp32(name: str) -> bool:
    return not set(name.split(".")).isdisjoint(MagiHumanTransformer3DModel._keep_in_fp32_modules)


def single_file_config(
    original_config: Mapping[str, str], checkpoint: Mapping[str, torch.Tensor], variant: str | None = None
) -> dict[str, Any]:
    """The config for [`~MagiHumanTransformer3DModel.from_single_file`]; the file's path may tell the variant."""
    variant = check_variant(variant or guess_variant(original_config["path"], None))
    dtypes = {name: tensor.dtype for name, tensor in checkpoint.items()}
    return plan_transformer(checkpoint, tensor_shapes(checkpoint), dtypes, variant)[0]


def single_file_state_dict(
    checkpoint: Mapping[str, torch.Tensor], config: Mapping[str, Any], linear_dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """The state dict for [`~MagiHumanTransformer3DModel.from_single_file`], from the original's names or from ours."""
    weights = {name: shape for name, shape in tensor_shapes(checkpoint).items() if not name.endswith(FP8_SCALE)}
    if "video_embedder.weight" in weights:
        ours = tensor_shapes(meta_model(MagiHumanTransformer3DModel, config).state_dict())
        check_names_and_shapes(weights, ours)
        rules = {name: Rule({name: shape}) for name, shape in ours.items()}
    else:
        rules = checked_transformer_rules(weights, config)
    return dict(convert_tensors(checkpoint, rules, linear_dtype))


SINGLE_FILE_LOADABLE_CLASSES["MagiHumanTransformer3DModel"] = {
    "checkpoint_mapping_fn": single_file_state_dict,
    "config_mapping_fn": single_file_config,
}


def load_original_turbo_vae(
    path_or_repo: str | os.PathLike[str],
    subfolder: str | None = None,
    encoder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **hub_kwargs: Any,
) -> AutoencoderKLMagiHumanTurbo:
    """
    Loads the Turbo VAE from the published checkpoint, a pickle of plain tensors, or from safetensors.

    Args:
        path_or_repo (`str` or `os.PathLike`): A file, a directory, or a repository on the Hub.
        subfolder (`str`, *optional*): Directory within it; `"turbo_vae"` of a repository.
        encoder (`str` or `os.PathLike`, *optional*): Wan 2.2 VAE in Diffusers format whose encoder is taken along, a
            directory or a repository with a folder `vae`. Without it the model only decodes.
        dtype (`torch.dtype`, defaults to `torch.float32`): Dtype of all weights.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the download.

    Returns:
        [`AutoencoderKLMagiHumanTurbo`] in evaluation mode, on the CPU.

    Raises:
        `ValueError`: Tensors do not fit.
        `OSError`: A file or repository is missing, damaged, not accessible, or a pickle that holds more than tensors.
    """
    if subfolder is None and not os.path.exists(path_or_repo):
        subfolder = "turbo_vae"
    root = fetch(path_or_repo, [f"{subfolder}/*"], **hub_kwargs)
    config, weights = read_turbo_vae(root / subfolder if subfolder else root)
    if encoder is not None:
        wan = load_part(AutoencoderKLWan, encoder, torch.float32, **hub_kwargs)
        config |= {
            "encoder_base_dim": wan.config.base_dim,
            "encoder_dim_mult": wan.config.dim_mult,
            "encoder_num_res_blocks": wan.config.num_res_blocks,
            "encoder_temporal_downsample": wan.config.temperal_downsample,
            "latents_mean": wan.config.latents_mean,
            "latents_std": wan.config.latents_std,
        }
    state_dict = convert_turbo_vae_state_dict(weights, config)
    if encoder is not None:
        kept = ("encoder.", "quant_conv.")
        state_dict |= {name: tensor for name, tensor in wan.state_dict().items() if name.startswith(kept)}
    model = meta_model(AutoencoderKLMagiHumanTurbo, config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state_dict.items()}, assign=True)
    return model.eval()


def read_turbo_vae(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config beside a checkpoint, or the published one, and the decoder's tensors under their full names."""
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted([*path.glob("*.ckpt"), *path.glob("*.safetensors")])
    if len(files) != 1:
        raise OSError(f"{str(path)!r} must hold one .ckpt or .safetensors file, but holds {[f.name for f in files]}.")
    known = AutoencoderKLMagiHumanTurbo._get_init_keys(AutoencoderKLMagiHumanTurbo)
    config = {}
    for file in sorted(folder.glob("*.json")):
        try:
            config |= {name: value for name, value in json.loads(file.read_text()).items() if name in known}
        except (ValueError, AttributeError) as error:
            raise OSError(f"{str(file)!r} is no config: {error}") from error

    is_pickle = files[0].suffix != ".safetensors"
    weights = read_pickle(files[0]) if is_pickle else dict(open_checkpoint(files[0]))
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return config, {f"decoder.{name.removeprefix('decoder.')}": tensor for name, tensor in weights.items()}


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return dict(checkpoint.get("ema_state_dict", checkpoint))
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        raise OSError(f"{str(path)!r} is damaged, or holds more than plain tensors: {error}") from error


def load_text_encoder(
    path_or_repo: str | os.PathLike[str] = TEXT_ENCODER, dtype: torch.dtype = torch.bfloat16, **hub_kwargs: Any
) -> tuple[Any, T5GemmaEncoderModel]:
    """
    Loads the tokenizer of T5Gemma and its encoder; shards that hold nothing but decoder are not downloaded.

    Args:
        path_or_repo (`str` or `os.PathLike`): A T5Gemma checkpoint, a directory or a repository.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all weights.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the download.

    Raises:
        `ValueError`: Tensors of the encoder are missing or misshapen.
        `OSError`: A file or repository is missing, damaged or not accessible.
    """
    source, config = open_text_encoder(path_or_repo, **hub_kwargs)
    weights = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in source.items()}
    model = T5GemmaEncoderModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return AutoTokenizer.from_pretrained(next(iter(source.files.values())).parent), model


def open_text_encoder(path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> tuple[LazyTensors, T5GemmaConfig]:
    """The encoder's tensors of a T5Gemma checkpoint, of which only the files that hold some are downloaded."""
    root = fetch(path_or_repo, ["*.json", "tokenizer*"], **hub_kwargs)
    index = root / "model.safetensors.index.json"
    if index.is_file():
        files = encoder_files(read_index(index))
        fetch(path_or_repo, sorted({path.name for path in files.values()}), **hub_kwargs)
    else:
        fetch(path_or_repo, ["model.safetensors"], **hub_kwargs)
        files = encoder_files(open_checkpoint(root / "model.safetensors").files)

    source, config = LazyTensors(files), T5GemmaConfig.from_pretrained(root)
    config.is_encoder_decoder = False
    with torch.device("meta"):
        expected = tensor_shapes(T5GemmaEncoderModel(config).state_dict())
    # Transformers would fill in what is missing at random.
    shapes = {name.removeprefix("model."): shape for name, shape in source.shapes.items()}
    check_names_and_shapes(shapes, expected)
    return source, config


def encoder_files(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if name.startswith(("model.encoder.", "encoder."))}


def load_original_components(
    path_or_repo: str | os.PathLike[str] = ORIGINAL,
    variant: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    subfolder: str | None = None,
    text_encoder: str | os.PathLike[str] = TEXT_ENCODER,
    audio_vae: str | os.PathLike[str] = AUDIO_VAE,
    video_vae: str | os.PathLike[str] = VIDEO_VAE,
    turbo_vae: str | os.PathLike[str] | None = ORIGINAL,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """
    Loads all components of a pipeline from the repositories that hold them, or from local copies.

    Args:
        path_or_repo (`str` or `os.PathLike`): The transformer, see [`load_original_transformer`].
        variant (`str`, *optional*): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all but the sound autoencoder, which is float32.
        subfolder (`str`, *optional*): Where the transformer is, if not in the published folder of the variant.
        text_encoder, audio_vae, video_vae (`str` or `os.PathLike`): Directories or repositories of the other parts.
        turbo_vae (`str` or `os.PathLike`, *optional*):
            The light decoder, which takes the encoder of `video_vae`; `None` for `video_vae` as a whole.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the downloads.

    Returns:
        `dict`: Components by name.

    Raises:
        `ValueError`: The variant cannot be guessed, or tensors do not fit.
        `OSError`: A file or repository is missing, damaged or not accessible; gated ones are named with their page.
    """
    variant = variant or guess_variant(path_or_repo, subfolder)
    shared_kwargs = {name: value for name, value in hub_kwargs.items() if name != "revision"}
    transformer = load_original_transformer(path_or_repo, subfolder, variant, dtype, **hub_kwargs)
    tokenizer, encoder = load_text_encoder(text_encoder, dtype, **shared_kwargs)
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "transformer": transformer,
        "scheduler": MagiHumanFlowScheduler(sampler="renoise" if variant == "distill" else "unipc"),
        "vae": load_video_vae(video_vae, turbo_vae, dtype, **shared_kwargs),
        "audio_vae": load_part(AutoencoderOobleck, audio_vae, torch.float32, **shared_kwargs),
    }


def load_video_vae(
    video_vae: str | os.PathLike[str],
    turbo_vae: str | os.PathLike[str] | None,
    dtype: torch.dtype,
    **hub_kwargs: Any,
) -> AutoencoderKLWan | AutoencoderKLMagiHumanTurbo:
    if turbo_vae is None:
        return load_part(AutoencoderKLWan, video_vae, dtype, **hub_kwargs)
    subfolder = "turbo_vae" if not os.path.exists(turbo_vae) or os.path.isdir(Path(turbo_vae) / "turbo_vae") else None
    return load_original_turbo_vae(turbo_vae, subfolder, video_vae, dtype, **hub_kwargs)


def load_part(
    model_class: type[ModelMixin], path_or_repo: str | os.PathLike[str], dtype: torch.dtype, **hub_kwargs: Any
) -> ModelMixin:
    """An autoencoder out of a repository's folder `vae`, or out of a local directory that is the autoencoder."""
    return model_class.from_pretrained(fetch_part(path_or_repo, **hub_kwargs), dtype=dtype)


def fetch_part(path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> Path:
    root = fetch(path_or_repo, ["vae/*"], **hub_kwargs)
    return root if (root / "config.json").is_file() else root / "vae"


# Converting


def convert_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    variant: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    text_encoder: str | os.PathLike[str] | None = None,
    video_vae: str | os.PathLike[str] | None = None,
    turbo_vae: str | os.PathLike[str] | None = None,
    audio_vae: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    **hub_kwargs: Any,
) -> Path:
    """
    Converts a published checkpoint to a Diffusers repository, a tensor at a time.

    The directory appears under its name only when it is complete. A run that fails leaves nothing; one that is killed
    leaves a hidden directory beside it, which the next run removes.

    Args:
        source (`str` or `os.PathLike`): The transformer, see [`load_original_transformer`].
        output (`str` or `os.PathLike`): Directory to write; it must not exist.
        variant (`str`, *optional*): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`, guessed from the path.
        subfolder (`str`, *optional*): Directory or file within the source.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of what is not kept in float32.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Bytes of a file; also most of the memory that is needed.
        text_encoder, video_vae, turbo_vae, audio_vae (`str` or `os.PathLike`, *optional*):
            Directories or repositories of other parts to include; parts that are left out are given when loading.
        repo_id (`str`, *optional*): Repository that the examples of the model card load.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the downloads.

    Returns:
        `Path`: The directory.

    Raises:
        `ValueError`: `output` exists, the variant cannot be guessed, or tensors do not fit.
        `OSError`: A file or repository is missing, damaged or not accessible, or the disk is too small.
    """
    output = Path(output).absolute()
    if output.exists():
        raise ValueError(f"`output` is {str(output)!r}, which exists; it must be a new directory.")
    max_bytes = convert_file_size_to_int(max_shard_size)
    variant = check_variant(variant or guess_variant(source, subfolder))
    tensors = open_checkpoint(fetch_transformer(source, subfolder, variant, **hub_kwargs))
    config, rules = plan_transformer(tensors, tensors.shapes, tensors.dtypes, variant)
    part_kwargs = {name: value for name, value in hub_kwargs.items() if name != "revision"}
    encoder, encoder_config = (None, None) if text_encoder is None else open_text_encoder(text_encoder, **part_kwargs)
    sizes = {
        target: shape.numel() * (torch.float32 if is_kept_in_fp32(target) else dtype).itemsize
        for rule in rules.values()
        for target, shape in rule.targets.items()
    }
    encoder_sizes = {} if encoder is None else text_encoder_sizes(encoder, dtype)
    # The autoencoders at the size that they have where they are; the light decoder is smaller than what it replaces.
    vae_files = [
        file
        for part in (video_vae, audio_vae)
        if part is not None
        for file in fetch_part(part, **part_kwargs).glob("*.safetensors")
    ]
    num_bytes = [*sizes.values(), *encoder_sizes.values(), *(file.stat().st_size for file in vae_files)]
    check_free_disk(output.parent, sum(num_bytes))

    incomplete = output.with_name(f".{output.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir(parents=True)
    try:
        folder = incomplete / "transformer"
        meta_model(MagiHumanTransformer3DModel, config).save_config(folder)
        write_shards(convert_tensors(tensors, rules, dtype), sizes, folder, "diffusion_pytorch_model", max_bytes)
        scheduler = MagiHumanFlowScheduler(sampler="renoise" if variant == "distill" else "unipc")
        scheduler.save_pretrained(incomplete / "scheduler")
        if encoder is not None:
            write_text_encoder(encoder, encoder_config, encoder_sizes, incomplete, dtype, max_bytes)
        if video_vae is not None:
            load_video_vae(video_vae, turbo_vae, dtype, **part_kwargs).save_pretrained(incomplete / "vae")
        if audio_vae is not None:
            sound = load_part(AutoencoderOobleck, audio_vae, torch.float32, **part_kwargs)
            sound.save_pretrained(incomplete / "audio_vae")
        write_repository_files(incomplete, variant, repo_id)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise
    incomplete.rename(output)
    return output


def check_free_disk(folder: Path, num_bytes: int) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(f"The converted tensors take {num_bytes} bytes, but only {free} are free in {str(folder)!r}.")


def write_shards(
    tensors: Iterator[tuple[str, torch.Tensor]], sizes: Mapping[str, int], folder: Path, stem: str, max_bytes: int
) -> None:
    """Writes tensors, in the order of `sizes` (bytes by name), to safetensors files of at most `max_bytes` each."""
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_bytes:
            shards.append([])
        shards[-1].append(name)

    weight_map = {}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for number, names in enumerate(shards, start=1):
            numbered = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            file = f"{stem}.safetensors" if len(shards) == 1 else numbered
            shard = {}
            for expected in names:
                name, shard[expected] = next(tensors)
                if name != expected:
                    raise ValueError(f"The tensors come in another order than their sizes: {name!r} for {expected!r}.")
                progress.update(sizes[name])
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def text_encoder_sizes(source: LazyTensors, dtype: torch.dtype) -> dict[str, int]:
    return {name.removeprefix("model."): shape.numel() * dtype.itemsize for name, shape in source.shapes.items()}


def write_text_encoder(
    source: LazyTensors,
    config: T5GemmaConfig,
    sizes: Mapping[str, int],
    output: Path,
    dtype: torch.dtype,
    max_bytes: int,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(next(iter(source.files.values())).parent)
    tokenizer.save_pretrained(output / "tokenizer")
    config.architectures, config.dtype = ["T5GemmaEncoderModel"], dtype
    config.save_pretrained(output / "text_encoder")
    tensors = ((name.removeprefix("model."), source[name].to(dtype)) for name in source.shapes)
    write_shards(tensors, sizes, output / "text_encoder", "model", max_bytes)


def write_repository_files(folder: Path, variant: str, repo_id: str | None) -> None:
    """Writes the card, the licence note, `model_index.json` and the code that loads it without this package."""
    # Here and absolute, because the generator bundles this very file for those who do not have the package.
    from diffusers_magihuman.hub import make_licence_note, make_model_card, write_repository_code

    (folder / "README.md").write_text(make_model_card(variant.replace("_", "-"), repo_id))
    (folder / "NOTICE.md").write_text(make_licence_note())

    classes = {
        "tokenizer": ("transformers", "GemmaTokenizer"),
        "text_encoder": ("transformers", "T5GemmaEncoderModel"),
        "transformer": ("diffusers", "MagiHumanTransformer3DModel"),
        "scheduler": ("diffusers", "MagiHumanFlowScheduler"),
        "vae": ("diffusers", "AutoencoderKLWan"),
        "audio_vae": ("diffusers", "AutoencoderOobleck"),
    }
    if (folder / "vae").is_dir():
        classes["vae"] = ("diffusers", json.loads((folder / "vae" / "config.json").read_text())["_class_name"])
    if variant in UPSCALE_SIZES:
        height, width = UPSCALE_SIZES[variant]
        index = {"_class_name": "MagiHumanLatentUpscalePipeline", "default_height": height, "default_width": width}
    else:
        index = {"_class_name": "MagiHumanAudioVideoPipeline", "is_distilled": variant == "distill"}
    index["_diffusers_version"] = diffusers.__version__
    index |= {name: value if (folder / name).is_dir() else (None, None) for name, value in classes.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_repository_code(folder)
