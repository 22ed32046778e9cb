# SPDX-License-Identifier: Apache-2.0
"""Weights of the blocks' linears, one at a time, as TorchAO and GGUF hold them; all else stays as it is."""

import contextlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import TorchAoConfig
from diffusers.utils import is_gguf_available, is_torchao_available, is_torchao_version
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import check_choice, check_dtype, show, show_some
from ..constants import QUANTIZE_KINDS
from ..conversion import Rule
from ..single_file import GGUF_CONFIG
from ..weights import fill_zero_rows

if is_gguf_available():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize as quantize_blocks

if has_torchao := is_torchao_available() and is_torchao_version(">=", "0.18.0"):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8Tensor,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

# Scaled float8 products take multiples of 16 rows and columns; a gate has a row for each of 40 heads.
FLOAT8_MULTIPLE, FLOAT8_SKIP_MODULES = 16, ("to_gate",)
Q4_K_VALUES, Q4_K_PARTS, Q4_K_CHUNK = 256, 8, 2**20
Q4_K_STEPS = (13.5, 14.2, 15.0, 15.6)  # over the span of 32 values; the best of them has 6 % less error than 15


def check_quantize(kind: Any, output: str | os.PathLike[str], **options: Any) -> None:
    """`ValueError` for what is no kind or does not go with it; `ImportError` without the package that it needs."""
    check_choice("quantize", kind, None, *QUANTIZE_KINDS)
    if kind is not None:
        check_package(kind)
    if (is_gguf := str(kind).startswith("gguf")) != (Path(output).suffix == ".gguf"):
        needed = "a file NAME.gguf" if is_gguf else "a directory"
        raise ValueError(f"`output`={show(os.fspath(output))} must be {needed} for `quantize`={kind!r}.")
    if is_gguf and (given := [name for name, value in options.items() if value is not None]):
        value = show(options[given[0]])
        raise ValueError(
            f"`{given[0]}`={value} must be None for `quantize`={kind!r}, a file of the transformer alone."
        )
    if kind == "float8" and check_dtype("dtype", options["dtype"]) != torch.bfloat16:
        raise ValueError(f"`dtype`={show(options['dtype'])} must be bfloat16 for `quantize`={kind!r}.")


def check_package(kind: str) -> None:
    package, is_there = ("gguf", is_gguf_available()) if kind.startswith("gguf") else ("torchao", has_torchao)
    if not is_there:
        fix = 'pip install "diffusers-magihuman[quantize]"'
        raise ImportError(f"`quantize`={kind!r} needs the package `{package}`, in a recent version: {fix}.")


def torchao_config(kind: str) -> TorchAoConfig:
    """What `"int8"` (weights alone) and `"float8"` (activations too, a scale for each row) mean everywhere."""
    check_package(kind)
    if kind == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    return TorchAoConfig(config, modules_to_not_convert=[*FLOAT8_SKIP_MODULES])


def quantize_linears(module: nn.Module, kind: str) -> None:
    quantize_(module, torchao_config(kind).quant_type)


def linears_of(rules: Mapping[str, Rule]) -> dict[str, torch.Size]:
    """Names and shapes of the weights that are quantised: all that are not float32 in any model."""
    return {name: shape for rule in rules.values() if not rule.is_float32 for name, shape in rule.targets.items()}


def check_multiples(kind: str, multiple: int, shapes: Mapping[str, Iterable[int]]) -> None:
    """`ValueError` for weights that a kind cannot take: none is left as it is."""
    if wrong := [f"{name} {tuple(sizes)}" for name, sizes in shapes.items() if any(x % multiple for x in sizes)]:
        fix = "`feed_forward_multiple` may pad those of the feed-forward"
        raise ValueError(f"`quantize`={kind!r} takes sizes of multiples of {multiple}, not {show_some(wrong)}; {fix}.")


def plan_torchao(rules: Mapping[str, Rule], kind: str) -> tuple[TorchAoConfig, set[str]]:
    """The config, and the names of the weights that it quantises."""
    config = torchao_config(kind)
    spared = config.modules_to_not_convert or []
    shapes = {x: shape for x, shape in linears_of(rules).items() if not any(f".{each}." in x for each in spared)}
    if kind == "float8":
        check_multiples(kind, FLOAT8_MULTIPLE, shapes)
    return config, set(shapes)


def quantize_torchao(tensors: Mapping[str, Tensor], names: set[str], config: TorchAoConfig) -> Any:
    """Tensors as Diffusers saves them, those of `names` quantised, and the metadata of their files."""
    weights = {name: quantize_weight(tensors[name], config.quant_type) for name in tensors.keys() & names}
    return flatten_tensor_state_dict({**tensors, **weights})


def quantize_weight(weight: Tensor, config: Any) -> Tensor:
    if not isinstance(config, Float8DynamicActivationFloat8WeightConfig):
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(linear, config)
        return linear.weight.data
    # `quantize_` does the same, but where there is a GPU that multiplies float8 only.
    granularities, preference = config.granularity, config.kernel_preference
    activations = QuantizeTensorToFloat8Kwargs(config.activation_dtype, granularities[0], kernel_preference=preference)
    options = {"kernel_preference": preference, "act_quant_kwargs": activations}
    quantized = Float8Tensor.from_hp(weight, config.weight_dtype, granularities[1], config.mm_config, **options)
    fill_zero_rows(quantized)
    return quantized


def plan_gguf(rules: Mapping[str, Rule], kind: str) -> tuple["GGUFWriter", int]:
    """A writer of a GGUF file that knows its tensors, in the order of the rules, and their bytes."""
    quantized, shapes = GGMLQuantizationType[kind.removeprefix("gguf:")], linears_of(rules)
    num_values, num_bytes = GGML_QUANT_SIZES[quantized]
    check_multiples(kind, num_values, {name: shape[-1:] for name, shape in shapes.items()})
    writer = GGUFWriter(None, "magihuman")
    writer.add_quantization_version(2)
    for name, shape in ((name, shape) for rule in rules.values() for name, shape in rule.targets.items()):
        if name in shapes:
            shape = (*shape[:-1], shape[-1] // num_values * num_bytes)
            writer.add_tensor_info(name, shape, np.uint8, math.prod(shape), raw_dtype=quantized)
        else:
            writer.add_tensor_info(name, shape, np.float32, 4 * shape.numel())
    return writer, sum(info.nbytes for info in writer.tensors[0].values())


def write_gguf(
    writer: "GGUFWriter", num_bytes: int, tensors: Iterable[tuple[str, Tensor]], config: str, path: Path
) -> None:
    """Writes planned tensors, float32 and in order, one at a time, and the config as JSON."""
    infos = dict(writer.tensors[0])
    writer.add_string(GGUF_CONFIG, config)
    with contextlib.closing(writer), tqdm(total=num_bytes, unit="B", unit_scale=True, unit_divisor=1024) as progress:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            is_q4_k = (kind := infos[name].dtype) == GGMLQuantizationType.Q4_K
            blocks = quantize_q4_k(tensor).numpy() if is_q4_k else quantize_blocks(tensor.numpy(), kind)
            writer.write_tensor_data(blocks)
            progress.update(infos[name].nbytes)


def quantize_q4_k(weight: Tensor) -> Tensor:
    """Rows of float32 in GGUF's `Q4_K`, which its own package only reads: `(..., 256 n)` -> bytes `(..., 144 n)`.

    Each 32 values are `scale * q - offset` with `q` in 0 to 15. Eight scales and eight offsets, 6 bits each, share a
    float16 unit of scales and one of offsets.
    """
    chunks = weight.reshape(-1).split(Q4_K_CHUNK)
    return torch.cat([quantize_q4_k_blocks(chunk) for chunk in chunks]).view(*weight.shape[:-1], -1)


def quantize_q4_k_blocks(values: Tensor) -> Tensor:
    values = values.view(-1, Q4_K_PARTS, Q4_K_VALUES // Q4_K_PARTS)
    size = values.shape[-1]
    low = values.amin(-1, keepdim=True).clamp_(max=0)  # offsets are not negative
    span = values.amax(-1, keepdim=True) - low
    unit_values = (values - low) / torch.where(span > 0, span, 1)
    low, total = low[..., 0], values.sum(-1)
    factors, least = torch.zeros(2, *total.shape), torch.full_like(total, math.inf)
    for steps in Q4_K_STEPS:
        # What fits best, by least squares, to the whole numbers that these steps give; and what it leaves.
        q = (unit_values * steps).round_().clamp_(max=15)
        sum_q, sum_qq, sum_qx = q.sum(-1), (q * q).sum(-1), (q * values).sum(-1)
        determinant = size * sum_qq - sum_q * sum_q
        fitted = (sum_qq * total - sum_q * sum_qx) / determinant.clamp(min=1)
        base = torch.where(determinant > 0, fitted, low).clamp_(max=0)
        scale = ((sum_qx - base * sum_q) / sum_qq.clamp(min=1)).clamp_(min=0)
        left = scale * (scale * sum_qq + 2 * (base * sum_q - sum_qx)) + base * (size * base - 2 * total)
        factors = torch.where(left < least, torch.stack([scale, -base]), factors)
        least = torch.minimum(left, least)

    units = (factors.amax(-1, keepdim=True) / 63).half()
    codes = (factors / torch.where(units > 0, units, 1).float()).round_().clamp_(max=63).to(torch.uint8)
    scale, offset = (codes * units.float())[..., None]
    q = ((values + offset) / torch.where(scale > 0, scale, math.inf)).round_().clamp_(0, 15).to(torch.uint8)
    q = q.unflatten(1, (-1, 2))  # two parts share bytes
    first, last = codes.chunk(2, dim=-1)  # the upper 2 bits of the last four lie over the first four
    six_bits = [*(first | last >> 4 << 6), last[0] & 15 | last[1] << 4]
    return torch.cat([*units.view(torch.uint8), *six_bits, (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)], dim=1)
