# SPDX-License-Identifier: Apache-2.0
"""LoRAs of the transformer, from Diffusers and from the tools that train on the original's names.

A foreign LoRA is mapped by the table of the checkpoints, so its sum with the weights is the same on either side: rows
of `lora_B` go where the rows of the weight go, all of them share `lora_A`. Each module keeps its rank and alpha.
"""

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

from .conversion import Rule, transformer_rules

# Diffusers, PEFT, ComfyUI, DiffSynth, wrappers of PyTorch, kohya and musubi, LyCORIS; some of them together.
LORA_PREFIX = re.compile(
    r"^((base_model\.model|transformer|diffusion_model|model|pipe|dit|module|_orig_mod)\.|(lora_(unet|transformer)|lycoris)_)+"
)
# PEFT and Diffusers, kohya and musubi with ComfyUI's extraction, Diffusers once with a dot; `dora_scale` is LyCORIS'.
# Raw files of PEFT and DiffSynth have `default`, the name of the adapter, in between.
LORA_SUFFIXES = {
    "lora_A.weight": (".lora_A.weight", ".lora_down.weight", ".lora.down.weight"),
    "lora_B.weight": (".lora_B.weight", ".lora_up.weight", ".lora.up.weight"),
    "lora_B.bias": (".lora_B.bias",),
    "lora_magnitude_vector": (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"),
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
    rules = transformer_rules(config) | transformer_rules(config, is_split=True)
    rules |= {name: Rule({name: shape}) for rule in rules.values() for name, shape in rule.targets.items()}
    rules = {name.removesuffix(".weight"): rule for name, rule in rules.items() if name.endswith(".weight")}
    modules = group_by_module(state_dict, rules)
    tensors, alphas = {}, {}
    for module, parts in modules.items():
        rule = rules[module]
        for target, part in rule.apply(parts["diff"] if "diff" in parts else parts["lora_B.weight"]).items():
            if "diff" in parts:  # one factor, the smaller one, is an identity
                eye = torch.eye(min(part.shape), dtype=part.dtype, device=part.device)
                lora_a, lora_b = (part, eye) if len(part) < part.shape[1] else (eye, part)
            else:  # a copy, so that no two of our linears share a tensor
                lora_a, lora_b = parts["lora_A.weight"].clone(), part
            name = f"transformer.{target.removesuffix('.weight')}"
            tensors |= {f"{name}.lora_A.weight": lora_a, f"{name}.lora_B.weight": lora_b}
            for kind in parts.keys() & {"lora_B.bias", "lora_magnitude_vector"}:
                tensors[f"{name}.{kind}"] = rule.apply(parts[kind].flatten())[target]
            alphas[f"{name}.alpha"] = parts["alpha"].item() if "alpha" in parts else len(lora_a)
    return tensors, alphas


def group_by_module(state_dict: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> LoraModules:
    """The tensors of every module by their kind, once they are checked."""
    aliases = {module.replace(".", "_"): module for module in rules}
    modules: LoraModules = {}
    problems = defaultdict(list)
    for name, tensor in state_dict.items():
        module = re.sub(r"\.default(?=\.|$)", "", name)
        suffix = next((suffix for suffix in LORA_KINDS if module.endswith(suffix)), "")
        module, kind = LORA_PREFIX.sub("", module.removesuffix(suffix)), LORA_KINDS.get(suffix)
        module = aliases.get(module, module)
        if kind is None or module not in rules or kind in modules.get(module, {}) or not torch.is_tensor(tensor):
            problems["unknown or repeated names"].append(name)
        elif kind not in ("diff", "diff_b") or tensor.any():
            modules.setdefault(module, {})[kind] = tensor
    kinds = {kind for parts in modules.values() for kind in parts} & {"lora_magnitude_vector", "lora_B.bias"}
    for module, parts in modules.items():
        shape = rules[module].shape
        rank = max((1, *parts["lora_A.weight"].shape[:1])) if "lora_A.weight" in parts else 1
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
    if found := [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]:
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
        use_safetensors = kwargs.pop("use_safetensors", None)
        names = ("weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only", "proxies")
        # Goes when the `lora_state_dict` of Diffusers no longer drops `dora_scale`: then `super` serves.
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            use_safetensors=use_safetensors is None or use_safetensors,
            allow_pickle=use_safetensors is None,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **(dict.fromkeys(names) | {"force_download": False} | kwargs),
        )
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
        source = pretrained_model_name_or_path_or_dict
        self.transformer.check_projections_are_unfused()
        state_dict, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        if state_dict and not any("." in name for name in state_dict):
            # Of no module at all: Diffusers warns, and leaves the transformer as it was.
            return self.load_lora_into_transformer(state_dict, self.transformer, adapter_name, _pipeline=self)
        is_peft = any(name.startswith("base_model.model.") for name in state_dict)
        if metadata is None and is_peft and not any(name.endswith(".alpha") for name in state_dict):
            logging.get_logger(__name__).warning(
                "PEFT's `adapter_config.json` is not read, so alpha is the rank; `set_adapters` takes another weight."
            )
        state_dict, alphas = convert_lora_state_dict(state_dict, self.transformer.config)
        if metadata is not None:  # it has the alphas
            alphas, metadata = None, {f"transformer.{k.removeprefix('transformer.')}": v for k, v in metadata.items()}
        options = {"adapter_name": adapter_name, "hotswap": hotswap, "low_cpu_mem_usage": low_cpu_mem_usage}
        self.transformer.load_lora_adapter(
            state_dict, network_alphas=alphas, metadata=metadata, _pipeline=self, **options
        )
