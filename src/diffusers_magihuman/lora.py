# SPDX-License-Identifier: Apache-2.0
"""LoRAs of the transformer, from Diffusers and from the tools that train on the original's names.

A foreign LoRA is mapped by the table of the checkpoints, so its sum with the weights is the same on either side: the
rows of `lora_B` go where the rows of the weight go, `lora_A` is shared by all of them. Ranks and alphas are kept for
each module, nothing is multiplied into the weights. What PEFT cannot hold is an error that lists all of it.

The magnitudes of DoRA belong to the rows of a weight in PEFT, and in LyCORIS with `wd_on_out`; LyCORIS' other kind, of
shape `(1, in_features)`, belongs to the columns and cannot be split by rows.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import USE_PEFT_BACKEND, logging

from .conversion import Rule, transformer_rules


# Diffusers, PEFT, ComfyUI, DiffSynth, wrappers of PyTorch, kohya and musubi, LyCORIS; some of them together.
LORA_PREFIX = re.compile(
    r"((base_model\.model|transformer|diffusion_model|model|pipe|dit|module|_orig_mod)\.|lora_unet_|lora_transformer_|"
    r"lycoris_)+"
)

LORA_KINDS: dict[str, str] = {
    # PEFT and Diffusers; raw ones of PEFT and DiffSynth with `default`, the name of the adapter, in between
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_B.bias": "lora_B.bias",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    # kohya and musubi, ComfyUI's extraction, and Diffusers once with a dot
    ".lora_down.weight": "lora_A.weight",
    ".lora_up.weight": "lora_B.weight",
    ".lora.down.weight": "lora_A.weight",
    ".lora.up.weight": "lora_B.weight",
    ".alpha": "alpha",
    # LyCORIS
    ".dora_scale": "lora_magnitude_vector",
    # ComfyUI's extraction of full rank, which also writes zeros for what did not change
    ".diff": "diff",
    ".diff_b": "diff_b",
}

LoraParts = dict[str, torch.Tensor]


def convert_lora_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """
    Converts a LoRA to the names of [`MagiHumanTransformer3DModel`] and of PEFT.

    Modules may have the original's names, canonical or split, or ours; tensors the suffixes of `LORA_KINDS`. A `diff`
    becomes a LoRA of full rank with an identity as one factor. One that is zero, as tools write for norms, changes
    nothing and is left out.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors of the LoRA.
        config (`Mapping`): Config of the transformer.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, float]]`: Tensors by their names in PEFT, and the alpha of each
        linear, the rank where none is given; the names of both begin with `transformer.`.

    Raises:
        `ValueError`: Lists modules that are unknown or given twice, tensors that are misshapen or lack another one,
            and what a LoRA in PEFT cannot express: changes of norms and biases, DoRA or biases of some modules only.
    """
    rules = lora_rules(config)
    modules, unknown = group_by_module(state_dict, rules)
    check_lora(modules, unknown, rules)
    tensors, alphas = {}, {}
    for module, parts in modules.items():
        rule = rules[module]
        if "diff" in parts:
            factors = {name: factorise(part) for name, part in rule.apply(parts["diff"]).items()}
        else:
            # Copies, so that no two of our linears share a tensor.
            lora_b = rule.apply(parts["lora_B.weight"])
            factors = {name: (parts["lora_A.weight"].clone(), part) for name, part in lora_b.items()}
        for target, (lora_a, lora_b) in factors.items():
            name = f"transformer.{target.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = lora_a, lora_b
            for kind in ("lora_B.bias", "lora_magnitude_vector"):
                if kind in parts:
                    tensors[f"{name}.{kind}"] = rule.apply(parts[kind].flatten())[target]
            alphas[f"{name}.alpha"] = parts["alpha"].item() if "alpha" in parts else len(lora_a)
    return tensors, alphas


def lora_rules(config: Mapping[str, Any]) -> dict[str, Rule]:
    """The rule of the weight of every module that a LoRA may name: canonical, split or ours."""
    rules = transformer_rules(config) | transformer_rules(config, is_split=True)
    rules |= {name: Rule({name: shape}) for rule in rules.values() for name, shape in rule.targets.items()}
    return {name.removesuffix(".weight"): rule for name, rule in rules.items() if name.endswith(".weight")}


def group_by_module(
    state_dict: Mapping[str, torch.Tensor], rules: Mapping[str, Rule]
) -> tuple[dict[str, LoraParts], list[str]]:
    """The tensors of every module by their kind, and the names that are of no module, of no kind, or given twice."""
    aliases = {module.replace(".", "_"): module for module in rules}
    modules: dict[str, LoraParts] = {}
    unknown = []
    for name, tensor in state_dict.items():
        module = re.sub(r"\.default(?=\.|$)", "", name)
        suffix = next((suffix for suffix in LORA_KINDS if module.endswith(suffix)), "")
        module = module.removesuffix(suffix)
        if prefix := LORA_PREFIX.match(module):
            module = module[prefix.end() :]
        module = aliases.get(module, module)
        kind = LORA_KINDS.get(suffix)
        if kind is None or module not in rules or kind in modules.get(module, {}) or not torch.is_tensor(tensor):
            unknown.append(name)
        elif kind not in ("diff", "diff_b") or tensor.any():
            modules.setdefault(module, {})[kind] = tensor
    return modules, unknown


def check_lora(modules: Mapping[str, LoraParts], unknown: list[str], rules: Mapping[str, Rule]) -> None:
    targets = Counter(target for module in modules for target in rules[module].targets)
    kinds = {kind for parts in modules.values() for kind in parts}
    pair = {"lora_A.weight", "lora_B.weight"}
    problems = {
        "unknown or repeated names": unknown,
        "tensors of another shape": [
            f"{module} ({kind} {tuple(parts[kind].shape)}, allowed: {' or '.join(str(tuple(size)) for size in sizes)})"
            for module, parts in modules.items()
            for kind, sizes in allowed_shapes(parts, rules[module].shape).items()
            if parts[kind].shape not in sizes
        ],
        "modules with tensors that do not go together": [
            module for module, parts in modules.items() if (parts.keys() >= pair) == ("diff" in parts)
        ],
        "changes of norms or biases, which a LoRA cannot hold": [
            module for module, parts in modules.items() if len(rules[module].shape) == 1 or "diff_b" in parts
        ],
        "modules given as a whole and in parts": [target for target, count in targets.items() if count > 1],
    }
    for kind in kinds & {"lora_magnitude_vector", "lora_B.bias"}:
        problems[f"modules without {kind}, which others have"] = [
            module for module, parts in modules.items() if kind not in parts
        ]
    found = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"The LoRA does not fit the transformer. It holds {'; '.join(found)}.")
    if not modules:
        raise ValueError("The LoRA changes nothing; it holds no tensors but zeros.")


def allowed_shapes(parts: LoraParts, shape: torch.Size) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each of the tensors for a weight may have."""
    rank = max((1, *parts["lora_A.weight"].shape[:1])) if "lora_A.weight" in parts else 1
    shapes = {
        "lora_A.weight": [(rank, *shape[1:])],
        "lora_B.weight": [(shape[0], rank)],
        "lora_B.bias": [shape[:1]],
        "lora_magnitude_vector": [shape[:1], (shape[0], 1)],
        "alpha": [(), (1,), (1, 1)],
        "diff": [shape],
        "diff_b": [shape[:1]],
    }
    return {kind: shapes[kind] for kind in parts}


def factorise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors, the smaller one an identity, whose product is the weight."""
    out_features, in_features = weight.shape
    identity = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
    return (weight, identity) if out_features < in_features else (identity, weight)


class MagiHumanLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """
    Loads LoRAs into the transformer of a pipeline, see [`convert_lora_state_dict`] for what a file may hold.

    To save a loaded LoRA with its ranks and alphas, use `pipe.transformer.save_lora_adapter(directory, adapter_name)`.
    The base class is that of a pipeline whose one part with LoRAs is a transformer, as here.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """
        Reads a LoRA as it is; unlike the base class this keeps DoRA. Pickles are read as plain tensors only.

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`): Repository, directory, file or tensors by name.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
                `proxies`, `use_safetensors`; `return_lora_metadata` adds the LoRA's config, if the file has one.
        """
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

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Loads a LoRA with the names of Diffusers or of the original, see [`convert_lora_state_dict`].

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`): Repository, directory, file or tensors by name.
            adapter_name (`str`, *optional*): Name for `set_adapters` and others, `default_0` and so on without it.
            hotswap (`bool`, defaults to `False`): Whether to replace the weights of the adapter of this name.
            low_cpu_mem_usage (`bool`, defaults to `True`): Whether to skip the initialisation of the new weights.
            kwargs: How to read the file, see [`~MagiHumanLoraLoaderMixin.lora_state_dict`].

        Raises:
            `ValueError`: PEFT is missing, the projections of the transformer are fused, or the LoRA does not fit; the
                transformer is left as it was.
            `OSError`: A file or repository is missing, damaged or not accessible, or a pickle of more than tensors.
        """
        if not USE_PEFT_BACKEND:
            raise ValueError("`load_lora_weights` needs `peft`: pip install peft")
        self.transformer.check_projections_are_unfused()
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        alphas = None
        # Of tensors without a module Diffusers warns, and leaves the transformer as it was.
        if not state_dict or any("." in name for name in state_dict):
            is_peft = any(name.startswith("base_model.model.") for name in state_dict)
            if metadata is None and is_peft and not any(name.endswith(".alpha") for name in state_dict):
                logging.get_logger(__name__).warning(
                    "The LoRA was saved by PEFT, which keeps its alpha in `adapter_config.json`. That file is not"
                    " read, so the LoRA is loaded with alpha equal to its rank; `set_adapters` takes another weight."
                )
            state_dict, alphas = convert_lora_state_dict(state_dict, self.transformer.config)
        if metadata is not None:
            metadata = {f"transformer.{name.removeprefix('transformer.')}": value for name, value in metadata.items()}
        self.transformer.load_lora_adapter(
            state_dict,
            network_alphas=alphas if metadata is None else None,
            metadata=metadata,
            adapter_name=adapter_name,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
        )
