# SPDX-License-Identifier: Apache-2.0
"""LoRAs of the transformer, from Diffusers and from the tools that train on the original's names.

A foreign LoRA is mapped by the table of the checkpoints, so its sum with the weights is the same on either side: rows
of `lora_B` go where the rows of the weight go, all of them share `lora_A`. Each module keeps its rank and alpha.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import logging
from diffusers.utils.peft_utils import require_peft_backend
from torch import Tensor

from .checks import check_choice, check_integer, check_options, check_real, show, show_some
from .conversion import FP8_SCALE, Rule, all_rules, pad, read_tensor, table_name, table_names, with_table_names
from .files import reading
from .weights import give_zero_rows_a_direction

# Beside the prefixes of checkpoints: kohya, musubi and others, LyCORIS, which have `_` for the dots after it.
LORA_PREFIX = re.compile(r"^(lora_(unet|transformer|dit)|lycoris)_")
# Raw files of PEFT and DiffSynth have the name of the adapter in between, `default` as a rule.
ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.(?!bias$)[^.]+(?=(\.bias)?$)|(?<=_magnitude_vector)\.[^.]+$")
MAX_LORA_RANK, MAX_ALPHA = 8192, 1e6
LORA_OPTIONS = ("weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only", "proxies")
LORA_OPTIONS += ("force_download", "use_safetensors")
# PEFT and Diffusers, kohya and musubi with ComfyUI's extraction, older Diffusers; `dora_scale` is LyCORIS'.
LORA_SUFFIXES = {  # each also with `.weight`
    "lora_A.weight": (".lora_A", ".lora_down", ".lora.down", ".lora_linear_layer.down", "_lora.down"),
    "lora_B.weight": (".lora_B", ".lora_up", ".lora.up", ".lora_linear_layer.up", "_lora.up"),
    "lora_B.bias": (".lora_B.bias",),
    "lora_magnitude_vector": (".lora_magnitude_vector", ".dora_scale"),
    "alpha": (".alpha",),
    "diff": (".diff",),  # ComfyUI's extraction of full rank, which also writes zeros for what did not change
    "diff_b": (".diff_b",),  # zeros alone, which are left out
}
LoraModules = dict[str, dict[str, Tensor]]
LORA_KINDS = {suffix: kind for kind, suffixes in LORA_SUFFIXES.items() for suffix in suffixes}


def convert_lora_state_dict(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Converts a LoRA to the names of [`MagiHumanTransformer3DModel`] and of PEFT.

    Modules may have the original's names, canonical or split, or ours; tensors the suffixes of `LORA_SUFFIXES`. A
    `diff` becomes a LoRA of full rank; one that is zero, as tools write for norms, is left out.

    Returns tensors by their names in PEFT, and the alpha of each linear, the rank where none is given; the names of
    both begin with `transformer.`. A `ValueError` lists modules that are unknown or given twice, tensors that are
    misshapen or lack another one, and what a LoRA in PEFT cannot hold: changes of norms and biases, DoRA or biases of
    some modules only.
    """
    rules = all_rules(config)
    rules = {name.removesuffix(".weight"): rule for name, rule in rules.items() if name.endswith(".weight")}
    modules = group_by_module(state_dict, rules)
    tensors, alphas = {}, {}
    for module, parts in modules.items():
        rule = rules[module]
        is_full = "diff" in parts
        for target, part in rule.apply(parts["diff" if is_full else "lora_B.weight"], has_columns=is_full).items():
            if is_full:  # one factor, the smaller one, is an identity
                eye = torch.eye(min(part.shape), dtype=part.dtype, device=part.device)
                lora_a, lora_b = (part, eye) if len(part) < part.shape[1] else (eye, part)
            else:  # a copy, so that no two of our linears share a tensor
                lora_a, lora_b = parts["lora_A.weight"], part
                lora_a = pad(lora_a, (len(lora_a), rule.targets[target][1]))
            name = f"transformer.{target.removesuffix('.weight')}"
            tensors |= {f"{name}.lora_A.weight": lora_a, f"{name}.lora_B.weight": lora_b}
            for kind in parts.keys() & {"lora_B.bias", "lora_magnitude_vector"}:
                tensors[f"{name}.{kind}"] = rule.apply(parts[kind].flatten(), has_columns=False)[target]
            alphas[f"{name}.alpha"] = parts["alpha"].item() if "alpha" in parts else len(lora_a)
    return tensors, alphas


def group_by_module(state_dict: Mapping[str, Tensor], rules: dict[str, Rule]) -> LoraModules:
    """The tensors of every module by their kind, once they are checked; rules become those of padded LoRAs."""
    aliases = {module.replace(".", "_"): module for module in rules}
    modules: LoraModules = {}
    problems = defaultdict(list)
    originals, source = table_names(state_dict, is_lora=True), with_table_names(state_dict, is_lora=True)
    for name in source:
        is_scale = name.endswith(FP8_SCALE)
        module = ADAPTER_NAME.sub("", name.removesuffix(FP8_SCALE).removesuffix(".weight")).replace(".processor.", ".")
        suffix = next((suffix for suffix in LORA_KINDS if module.endswith(suffix)), "")
        module, kind = LORA_PREFIX.sub("", module.removesuffix(suffix)), LORA_KINDS.get(suffix)
        module = aliases.get(module, module)
        if is_scale and name.removesuffix(FP8_SCALE) in source and kind is not None:
            continue
        if (is_alpha := kind == "alpha") and not torch.is_tensor(source[name]):
            source[name] = torch.tensor(check_real(originals[name], source[name], -MAX_ALPHA, MAX_ALPHA))
        if kind is None or module not in rules or kind in modules.get(module, {}) or not torch.is_tensor(source[name]):
            problems["unknown or repeated names"].append(originals[name])
            continue
        if is_alpha and not (source[name].is_floating_point() or source[name].is_complex()):
            source[name] = source[name].float()
        if source[name].numel() > MAX_LORA_RANK * max(rules[module].shape):  # nothing is computed of such
            problems["tensors of another shape"].append(f"{originals[name]} {tuple(source[name].shape)}")
            continue
        tensor = read_tensor(source, name)
        if tensor.is_meta or not (tensor.abs() <= (MAX_ALPHA if is_alpha else torch.finfo(tensor.dtype).max)).all():
            problems["tensors that are not finite, or alphas too large"].append(originals[name])
        elif kind not in ("diff", "diff_b") or tensor.any():
            modules.setdefault(module, {})[kind] = tensor
    kinds = {kind for parts in modules.values() for kind in parts} & {"lora_magnitude_vector", "lora_B.bias"}
    for module, parts in modules.items():
        factors = parts.get("lora_B.weight", torch.ones(0)), parts.get("lora_A.weight", torch.ones(0))
        found = parts["diff"].shape if "diff" in parts else (*factors[0].shape[:1], *factors[1].shape[1:])
        rules[module] = rules[module].fitted(torch.Size(found))
        shape = rules[module].shape
        rank = min(max(parts.get("lora_A.weight", torch.ones(1)).shape[:1].numel(), 1), MAX_LORA_RANK)
        allowed = {"lora_A.weight": [(rank, *shape[1:])], "lora_B.weight": [(shape[0], rank)], "diff": [shape]}
        # DoRA of the rows, as in PEFT, and in LyCORIS with `wd_on_out`; one of the columns cannot be split by rows.
        allowed |= {"lora_magnitude_vector": [shape[:1], (shape[0], 1)], "alpha": [(), (1,), (1, 1)]}
        for kind, part in parts.items():
            if part.shape not in (sizes := allowed.get(kind, [shape[:1]])):
                wrong = f"{module} ({kind} {tuple(part.shape)}, allowed: {' or '.join(str(tuple(x)) for x in sizes)})"
                problems["tensors of another shape"].append(wrong)
        if ({"lora_A.weight", "lora_B.weight"} <= parts.keys()) == ("diff" in parts):
            problems["modules with tensors that do not go together"].append(module)
        if len(shape) == 1 or "diff_b" in parts:
            problems["changes of norms or biases, which a LoRA cannot hold"].append(module)
        for kind in kinds - parts.keys():
            problems[f"modules without {kind}, which others have"].append(module)
    targets = Counter(target for module in modules for target in rules[module].targets)
    problems["modules given as a whole and in parts"] = [target for target, count in targets.items() if count > 1]
    if found := [f"{problem}: {show_some(names)}" for problem, names in problems.items() if names]:
        raise ValueError(f"The LoRA does not fit the transformer. It holds {'; '.join(found)}.")
    if not modules:
        raise ValueError("The LoRA changes nothing; it holds no tensors but zeros.")
    return modules


class MagiHumanLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """Loads LoRAs into the transformer of a pipeline; the base class is that of another with such a transformer alone.

    To save a loaded LoRA with its ranks and alphas, use `pipe.transformer.save_lora_adapter(directory, adapter_name)`.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Reads a LoRA as it is, as the base class does, but keeps DoRA. Pickles are read as plain tensors only."""
        return_lora_metadata = kwargs.pop("return_lora_metadata", False)
        check_options("lora_state_dict", kwargs, LORA_OPTIONS)
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, str | os.PathLike | dict):
            raise ValueError(f"`pretrained_model_name_or_path_or_dict`={show(source)} must be a path or a dict.")
        options = dict.fromkeys(LORA_OPTIONS) | {"force_download": False} | kwargs
        options["allow_pickle"] = options["use_safetensors"] is None
        options["use_safetensors"] = options["use_safetensors"] is not False
        # Goes when the `lora_state_dict` of Diffusers no longer drops `dora_scale`: then `super` serves.
        with reading("the dict" if isinstance(source, dict) else source, "cannot be read"):
            user_agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
            state_dict, metadata = _fetch_state_dict(source, user_agent=user_agent, **options)
            if not isinstance(metadata, dict | None):
                raise ValueError("its metadata is no dict")
        return (state_dict, metadata) if return_lora_metadata else state_dict

    @require_peft_backend
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """Loads a LoRA with the names of Diffusers or of the original, see [`convert_lora_state_dict`].

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`): Repository, directory, file or tensors by name.
            adapter_name (`str`, *optional*): Name for `set_adapters` and others, `default_0` and so on without it.
            hotswap (`bool`, defaults to `False`): Whether to replace the weights of the adapter of this name.
            low_cpu_mem_usage (`bool`, defaults to `True`): Whether to skip the initialisation of the new weights.
            kwargs: How to find and read the file, such as `weight_name`, `subfolder`, `revision`, `use_safetensors`.

        `ValueError`: PEFT is missing, projections are fused, or the LoRA does not fit; nothing is changed then.
        `OSError`: a file or repository is missing, damaged or not accessible, or a pickle of more than tensors.
        """
        check_options("load_lora_weights", kwargs, LORA_OPTIONS)
        is_name = isinstance(adapter_name, str) and adapter_name and "." not in adapter_name  # as PyTorch's modules
        if adapter_name is not None and (not is_name or hasattr(torch.nn.ModuleDict(), adapter_name)):
            raise ValueError(f"`adapter_name`={show(adapter_name)} must be a word without dots, none of PyTorch's.")
        check_choice("hotswap", hotswap, False, True)
        check_choice("low_cpu_mem_usage", low_cpu_mem_usage, False, True)
        source = pretrained_model_name_or_path_or_dict
        self.transformer.check_projections_are_unfused()
        state_dict, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        metadata = metadata or None  # an empty one says nothing
        if state_dict and not any("." in table_name(name) for name in state_dict):
            # Of no module at all: Diffusers warns, and leaves the transformer as it was.
            return self.load_lora_into_transformer(state_dict, self.transformer, adapter_name, _pipeline=self)
        is_peft = any(str(name).startswith("base_model.model.") for name in state_dict)
        if metadata is None and is_peft and not any(name.endswith(".alpha") for name in state_dict):
            logging.get_logger(__name__).warning(
                "PEFT's `adapter_config.json` is not read, so alpha is the rank; `set_adapters` takes another weight."
            )
        state_dict, alphas = convert_lora_state_dict(state_dict, self.transformer.config)
        if metadata is not None:  # it has the alphas
            metadata = {f"transformer.{name.removeprefix('transformer.')}": value for name, value in metadata.items()}
            check_integer("r", metadata.get("transformer.r"), high=MAX_LORA_RANK)
            check_real("lora_alpha", metadata.get("transformer.lora_alpha"), -MAX_ALPHA, MAX_ALPHA)
            alphas = None
        options = {"adapter_name": adapter_name, "hotswap": hotswap, "low_cpu_mem_usage": low_cpu_mem_usage}
        options |= {"network_alphas": alphas, "metadata": metadata}
        self.transformer.load_lora_adapter(state_dict, _pipeline=self, **options)
        give_zero_rows_a_direction(self.transformer)
