# SPDX-License-Identifier: Apache-2.0
"""A transformer out of one file, safetensors in any format of the original or GGUF; a Turbo VAE likewise."""

import copy
import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.quantization_config import GGUFQuantizationConfig
from diffusers.utils import is_gguf_available
from huggingface_hub import hf_hub_download
from torch import Tensor

from . import conversion
from .checks import check_choice, check_dtype, check_options, show
from .files import naming, reading

if is_gguf_available():
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
    from gguf import GGUFReader, GGUFValueType

    class BoundedGGUFReader(GGUFReader):
        """Refuses a header that says more than the file holds. Goes when gguf does so, which else runs for ever."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            is_array = raw_type == GGUFValueType.ARRAY
            if orig_offs > len(self.data) or (is_array and self._get(orig_offs + 4, np.uint64)[0] > MAX_GGUF_ITEMS):
                raise ValueError(f"its header says more than it holds, or has a list of over {MAX_GGUF_ITEMS} items")
            return super()._get_field_parts(orig_offs, raw_type)


# The base class loads a GGUF file only into classes of this dict. Both functions hand on what is converted already: it
# would cast everything to `dtype`, as it honours `_keep_in_fp32_modules` for float16 alone. Once it does so for
# bfloat16, the conversions belong in here and most of `from_single_file` goes.
SINGLE_FILE_LOADABLE_CLASSES["MagiHumanTransformer3DModel"] = {
    "checkpoint_mapping_fn": lambda checkpoint, **_: checkpoint,
    "config_mapping_fn": lambda original_config, **_: original_config,
}

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "endpoint", "etag_timeout")
# Of Diffusers' own `from_single_file`, and all that they can be here; `low_cpu_mem_usage` is what is done anyway.
OTHER_OPTIONS = {"low_cpu_mem_usage": True, "proxies": None, "original_config": None, "quantization_config": None}
LINK = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+)")
MAX_GGUF_ITEMS = 2**22  # of an array; the largest vocabularies are a quarter of it
GGUF_CONFIG = "magihuman.config"  # the field of our own GGUF files that holds the config as JSON
TURBO_VAE_WRAPPED = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv_out", "time_conv", "upsampler2d_1")


def take_options(options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Those of the downloads, and whether the file is read instead of mapped."""
    check_options("from_single_file", options, (*HUB_OPTIONS, *OTHER_OPTIONS, "disable_mmap"))
    for name, value in OTHER_OPTIONS.items():
        check_choice(name, options.pop(name, value), value)
    check_choice("disable_mmap", disable_mmap := options.pop("disable_mmap", False), False, True)
    return options, disable_mmap


def read_checkpoint(source: Any, disable_mmap: bool, **hub_kwargs: Any) -> tuple[Path | None, dict[str, Tensor]]:
    """The file of a path or a link to the Hub, `None` for a dict, and its tensors by the names of the tables; a pickle
    must hold plain tensors only."""
    if isinstance(source, Mapping):
        return None, conversion.with_table_names(source)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"`pretrained_model_link_or_path_or_dict`={show(source)} must be a path, a link or a dict.")
    if (path := Path(source)).suffix == ".gguf" and not is_gguf_available():
        raise ImportError("GGUF files need the package `gguf`, 0.10 or newer.")
    if not path.is_file():
        with reading(source, "is no file, nor a link to one such as https://huggingface.co/owner/name/blob/main/FILE"):
            if not (link := LINK.fullmatch(os.fspath(source))):
                raise ValueError("it does not exist")
            hub_kwargs["revision"] = hub_kwargs.get("revision") or link[2]
            path = Path(hf_hub_download(link[1], link[3], **hub_kwargs))
    with reading(path):
        if path.suffix == ".gguf":
            BoundedGGUFReader(path)
        tensors = load_state_dict(str(path), disable_mmap)
        for key in ("ema_state_dict", "state_dict"):
            tensors = tensors.get(key, tensors)
    with naming(path):
        return path, conversion.with_table_names(tensors)


def read_gguf_config(path: Path) -> dict[str, Any] | None:
    """The config that a GGUF file of `magihuman convert` holds."""
    field = BoundedGGUFReader(path).get_field(GGUF_CONFIG)
    with reading(path, f"has a field {GGUF_CONFIG!r} that is no config"):
        return None if field is None else dict(json.loads(field.parts[-1].tobytes()))


def check_device(device: Any, device_map: Any) -> torch.device:
    name, value = ("device", device or "cpu") if device_map is None else ("device_map", device_map)
    try:
        return torch.empty(0, device=value[""] if isinstance(value, dict) and len(value) == 1 else value).device
    except Exception as error:  # each kind of device that is not there fails in its own way
        hint = "for several, save the model and use `from_pretrained`"
        raise ValueError(f"`{name}`={show(value)} must be one device, and one that is there; {hint}.") from error


def empty_model(cls: type[ModelMixin], config: Mapping[str, Any]) -> ModelMixin:
    with torch.device("meta"):
        return cls.from_config(dict(config))


def load_config(cls: type[ModelMixin], config: Any, subfolder: str | None, **hub_kwargs: Any) -> dict[str, Any]:
    with reading(config, "cannot be read"):  # the revision is that of the file
        return cls.load_config(config, subfolder=subfolder, **hub_kwargs | {"revision": None})


def fill(model: ModelMixin, tensors: dict[str, Tensor], device: torch.device) -> ModelMixin:
    """Gives an empty model its tensors, on a device."""
    model.load_state_dict(tensors, assign=True)
    if device.type != "meta" and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`pretrained_model_link_or_path_or_dict` has tensors on the meta device, which have no data.")
    return model.eval().to(device)


class MagiHumanSingleFileMixin(FromOriginalModelMixin):
    """Gives [`MagiHumanTransformer3DModel`] its `from_single_file`."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | dict[str, Tensor],
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        config: str | None = None,
        subfolder: str | None = None,
        quantization_config: GGUFQuantizationConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: torch.device | str | dict[str, Any] | None = None,
        feed_forward_multiple: int | None = None,
        **hub_kwargs: Any,
    ) -> ModelMixin:
        """
        Loads a checkpoint out of one file: safetensors in any format of the original, or GGUF; with its names or ours.

        Args:
            pretrained_model_link_or_path_or_dict (`str` or `dict`): Path, link to the Hub, or tensors by name.
            variant (`str`, *optional*): `"base"`, `"distilled"`, `"sr-540p"` or `"sr-1080p"`, guessed from the path; a
                config that is given, or in the file, says all of it.
            dtype, torch_dtype (`torch.dtype` or `str`, *optional*): What the linears compute in, bfloat16 or the
                `compute_dtype` of `quantization_config`; norms, embedders and heads are always float32.
            config (`str`, *optional*): Directory or repository of a config, which a file with our names needs; a
                GGUF file of `magihuman convert` holds it.
            subfolder (`str`, *optional*): Directory within `config`, for example `"transformer"`.
            quantization_config (`GGUFQuantizationConfig`, *optional*): What a GGUF file needs, and no other takes.
            device, device_map (`torch.device` or `str`, *optional*): The one device that the model is on in the end.
            feed_forward_multiple (`int`, *optional*): See [`~checkpoints.load_original_transformer`]; that of `config`
                if it is given.
            hub_kwargs: Of the downloads, one of `HUB_OPTIONS`, or `disable_mmap`; others are a `TypeError`.

        Names may have the prefixes of other tools; tensors of other models in the file are left out. `ValueError`: the
        variant cannot be guessed, or an argument or tensors do not fit; `OSError`: the file is missing or damaged.
        """
        hub_kwargs, disable_mmap = take_options(hub_kwargs)
        conversion.check_feed_forward_multiple(feed_forward_multiple)
        device, dtype = check_device(device, device_map), torch_dtype if dtype is None else dtype
        checkpoint = pretrained_model_link_or_path_or_dict
        path, given = ("", checkpoint.values()) if isinstance(checkpoint, Mapping) else (str(checkpoint), ())
        has_gguf = path.endswith(".gguf") or any(map(conversion.is_gguf, given))
        if not isinstance(quantization_config, GGUFQuantizationConfig if has_gguf else NoneType):
            needed = f"{'a `GGUFQuantizationConfig`' if has_gguf else 'None'} for {path or 'the dict'}"
            found = show(quantization_config)
            raise ValueError(f"`quantization_config`={found} must be {needed}; `from_pretrained` takes others.")
        default_dtype = quantization_config.compute_dtype if has_gguf else torch.bfloat16
        dtype = check_dtype("dtype", dtype, default_dtype)
        if has_gguf and dtype != default_dtype:
            raise ValueError(f"`dtype`={dtype} must be the `compute_dtype` of `quantization_config`, {default_dtype}.")
        if config is not None:
            config = load_config(cls, config, subfolder, **hub_kwargs)
        elif variant is not None or not has_gguf:
            variant = conversion.find_variant(variant, path)
        file, checkpoint = read_checkpoint(checkpoint, disable_mmap, **hub_kwargs)
        if has_gguf and config is None and file is not None:
            config = read_gguf_config(file)
        with naming(path or "the dict"):
            if config is None:  # as from a file, without tuples
                variant = conversion.find_variant(variant, path)
                found, _ = conversion.plan_transformer(checkpoint, variant, feed_forward_multiple)
                config = json.loads(json.dumps({"_class_name": cls.__name__, **found}))
            elif feed_forward_multiple is not None:
                config["feed_forward_multiple"] = feed_forward_multiple
            model = empty_model(cls, config)
            rules = conversion.checked_rules(checkpoint, model.config)
            whole = [name for name, rule in rules.items() if rule.is_float32 and conversion.is_gguf(checkpoint[name])]
            checkpoint |= {name: dequantize_gguf_tensor(checkpoint[name]) for name in whole}
            tensors = dict(conversion.convert_tensors(checkpoint, rules, dtype))
        if not has_gguf:
            return fill(model, tensors, device)
        options = {"dtype": dtype, "quantization_config": copy.deepcopy(quantization_config)}
        model = super().from_single_file(tensors, original_config=dict(model.config), **options)
        model.register_to_config(_pre_quantization_dtype=dtype)
        return model.to(device)


class MagiHumanTurboSingleFileMixin(FromOriginalModelMixin):
    """Gives [`AutoencoderKLMagiHumanTurbo`] its `from_single_file`."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | dict[str, Tensor],
        dtype: torch.dtype | str | None = None,
        config: str | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: torch.device | str | dict[str, Any] | None = None,
        **hub_kwargs: Any,
    ) -> ModelMixin:
        """Loads the published checkpoint, a pickle of plain tensors, or safetensors, with its names or ours.

        Arguments are those of [`MagiHumanTransformer3DModel.from_single_file`]; the `dtype` of all weights is float32
        by default. Without `config`, settings are those of JSON files beside a local file, else as published. Keys and
        files that the class does not know are ignored. `ValueError`: tensors do not fit; `OSError`: a damaged file.
        """
        hub_kwargs, disable_mmap = take_options(hub_kwargs)
        device, source = check_device(device, device_map), pretrained_model_link_or_path_or_dict
        dtype = check_dtype("dtype", torch_dtype if dtype is None else dtype, torch.float32)
        if config is not None:
            config = load_config(cls, config, subfolder, **hub_kwargs)
        file, tensors = read_checkpoint(source, disable_mmap, **hub_kwargs)
        if config is None:
            config = {}
            for beside in sorted(file.parent.glob("*.json")) if file else []:
                with reading(beside):
                    found = json.loads(beside.read_text(encoding="utf-8"))
                config |= found if isinstance(found, dict) and "decoder_block_out_channels" in found else {}
            # Less the keys of its training, which Diffusers would warn of.
            known = cls.original_options.keys() | inspect.signature(cls).parameters
            config = {name: value for name, value in config.items() if name in known}
        with naming(file or "the dict"):
            model = empty_model(cls, config)
            parts = tuple(f"{name}." for name, _ in model.named_children())
            tensors = {x if x.startswith(parts) else f"decoder.{x}": tensor for x, tensor in tensors.items()}
            rules = turbo_vae_rules(model, is_ours="decoder.conv_in.weight" in tensors)
            conversion.check_names_and_shapes(tensors, rules)
            tensors = dict(conversion.convert_tensors(tensors, rules, dtype))
        return fill(model, tensors, device)


def turbo_vae_rules(model: ModelMixin, is_ours: bool = False) -> dict[str, conversion.Rule]:
    """Our names are the original's without a module `conv` that wraps some of its convolutions."""
    if is_ours:
        return {name: conversion.Rule({name: tensor.shape}) for name, tensor in model.state_dict().items()}
    rules = {}
    for name, parameter in model.decoder.named_parameters(prefix="decoder"):
        module, _, kind = name.rpartition(".")
        wrapper = ".conv" if module.split(".")[-1] in TURBO_VAE_WRAPPED else ""
        rules[f"{module}{wrapper}.{kind}"] = conversion.Rule({name: parameter.shape})
    return rules
