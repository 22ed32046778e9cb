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
"""LoRAs of the transformer, from Diffusers and from the tools that train on the original's names.

A foreign LoRA is mapped by the rules of the checkpoints, so its sum with the weights is the same on either side: the
rows of `lora_B` go where the rows of the weight go, `lora_A` is shared by all of them. Ranks and alphas are kept for
each module, nothing is multiplied into the weights. What PEFT cannot hold is an error that lists all of it.

Not every tool means the same by DoRA: its magnitudes belong to the rows of a weight in PEFT, and in LyCORIS with
`wd_on_out`; LyCORIS' other kind, of shape `(1, in_features)`, belongs to the columns and cannot be split by rows.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import USE_PEFT_BACKEND, get_adapter_name, logging

from .checkpoints import Rule, transformer_rules


LORA_PREFIX = re.compile(r"((base_model\.model|diffusion_model|model|transformer)\.|lora_unet_|lycoris_)+")

LORA_KINDS: dict[str, str] = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_B.bias": "lora_B.bias",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_down.weight": "lora_A.weight",
    ".lora_up.weight": "lora_B.weight",
    ".dora_scale": "lora_magnitude_vector",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
}

BIAS_KINDS = {"lora_B.bias", "diff_b"}

LoraParts = dict[str, torch.Tensor]


class LoraLinear(NamedTuple):
    """What PEFT holds for one linear: tensors by their names there, and the alpha that they are scaled with."""

    tensors: dict[str, torch.Tensor]
    alpha: float

    @property
    def rank(self) -> int:
        return self.tensors["lora_A.weight"].shape[0]


def convert_lora_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Converts a LoRA to the names of [`MagiHumanTransformer3DModel`] and of PEFT.

    Modules may have the original's names, canonical or split, or ours; tensors the suffixes `lora_A` and `lora_B`,
    `lora_down` and `lora_up`, `alpha`, `dora_scale`, `diff` and `diff_b`. A `diff` becomes a LoRA of full rank with an
    identity as one factor. One that is zero, as tools write for norms, changes nothing and is left out.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors of the LoRA.
        config (`Mapping`): Config of the transformer.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, Any]]`: Tensors and arguments of `peft.LoraConfig`, the names of
        both beginning with `transformer.`.

    Raises:
        `ValueError`: Lists modules that are unknown or given twice, tensors that are misshapen or lack another one,
            and what a LoRA in PEFT cannot express: changes of norms, DoRA of some modules only or with biases.
    """
    rules = lora_rules(config)
    modules, unknown = group_by_module(state_dict, rules)
    check_lora(modules, unknown, rules)
    linears: dict[str, LoraLinear] = {}
    for module, parts in modules.items():
        linears |= make_lora_linears(without_zero_diffs(parts), rules[f"{module}.weight"])
    tensors = {f"{name}.{kind}": tensor for name, linear in linears.items() for kind, tensor in linear.tensors.items()}
    return add_prefix(tensors), add_prefix(make_lora_config(linears))


def lora_rules(config: Mapping[str, Any]) -> dict[str, Rule]:
    """The rule of every parameter that a LoRA may name: canonical, split or ours."""
    rules = transformer_rules(config) | transformer_rules(config, is_split=True)
    ours = {name: Rule({name: shape}) for rule in rules.values() for name, shape in rule.targets.items()}
    return rules | ours


def add_prefix(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"transformer.{name.removeprefix('transformer.')}": value for name, value in values.items()}


def group_by_module(
    state_dict: Mapping[str, torch.Tensor], rules: Mapping[str, Rule]
) -> tuple[dict[str, LoraParts], list[str]]:
    """The tensors of every module by their kind, and the names that are of no module, of no kind, or given twice."""
    known = {name.removesuffix(".weight") for name in rules if name.endswith(".weight")}
    aliases = {module.replace(".", "_"): module for module in known}
    modules: dict[str, LoraParts] = {}
    unknown = []
    for name, tensor in state_dict.items():
        suffix = next((suffix for suffix in LORA_KINDS if name.endswith(suffix)), "")
        module = name.removesuffix(suffix)
        if prefix := LORA_PREFIX.match(module):
            module = module[prefix.end() :]
        module = aliases.get(module, module)
        kind = LORA_KINDS.get(suffix)
        if kind is None or module not in known or kind in modules.get(module, {}) or not torch.is_tensor(tensor):
            unknown.append(name)
        else:
            modules.setdefault(module, {})[kind] = tensor
    return modules, unknown


def without_zero_diffs(parts: LoraParts) -> LoraParts:
    return {kind: tensor for kind, tensor in parts.items() if kind not in ("diff", "diff_b") or tensor.any()}


def check_lora(modules: Mapping[str, LoraParts], unknown: list[str], rules: Mapping[str, Rule]) -> None:
    changed = {module: parts for module, whole in modules.items() if (parts := without_zero_diffs(whole))}
    targets = Counter(target for module in changed for target in rules[f"{module}.weight"].targets)
    norms = [module for module in changed if len(rules[f"{module}.weight"].shape) == 1]
    is_dora = any("lora_magnitude_vector" in parts for parts in changed.values())
    problems = {
        "unknown or repeated names": unknown,
        "tensors of another shape": [
            text for module, parts in modules.items() for text in misshapen(module, parts, rules)
        ],
        "modules with tensors that do not go together": [
            module for module, parts in changed.items() if not is_complete(parts)
        ],
        "changes of norms, which a LoRA cannot hold": norms,
        "modules given as a whole and in parts": [target for target, count in targets.items() if count > 1],
        "modules without the magnitudes of DoRA, which others have": [
            module for module, parts in changed.items() if is_dora and "lora_magnitude_vector" not in parts
        ],
        "modules with a bias besides DoRA": [
            module for module, parts in changed.items() if is_dora and not BIAS_KINDS.isdisjoint(parts)
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"The LoRA does not fit the transformer. It holds {'; '.join(found)}.")
    if not changed:
        raise ValueError(f"The LoRA changes nothing; it holds {sorted(modules) or 'no tensors'}.")


def misshapen(module: str, parts: LoraParts, rules: Mapping[str, Rule]) -> Iterator[str]:
    shape = rules[f"{module}.weight"].shape
    allowed: dict[str, list[tuple[int, ...]]] = {"diff": [shape]}
    if f"{module}.bias" in rules:
        allowed["diff_b"] = [rules[f"{module}.bias"].shape]
    if len(shape) == 2:
        out_features, in_features = shape
        rank = max((1, *parts["lora_A.weight"].shape[:1])) if "lora_A.weight" in parts else 1
        allowed["lora_A.weight"] = [(rank, in_features)]
        allowed["lora_B.weight"] = [(out_features, rank)]
        allowed["lora_B.bias"] = [(out_features,)]
        allowed["lora_magnitude_vector"] = [(out_features,), (out_features, 1)]
        allowed["alpha"] = [(), (1,)]
    for kind, tensor in parts.items():
        if tensor.shape not in allowed.get(kind, []):
            shapes = " or ".join(str(tuple(size)) for size in allowed.get(kind, [])) or "none"
            yield f"{module} ({kind} {tuple(tensor.shape)}, allowed: {shapes})"


def is_complete(parts: LoraParts) -> bool:
    kinds = parts.keys()
    if kinds <= {"diff", "diff_b"}:
        return True
    return kinds >= {"lora_A.weight", "lora_B.weight"} and "diff" not in kinds and not kinds >= BIAS_KINDS


def make_lora_linears(parts: LoraParts, rule: Rule) -> dict[str, LoraLinear]:
    """Splits what a LoRA holds for one module over our linears."""
    if "diff_b" in parts:
        parts = with_lora_bias(parts, rule)
    factors = {}
    if "diff" in parts:
        factors = {name: factorise(part) for name, part in rule.apply(parts["diff"]).items()}
    elif "lora_B.weight" in parts:
        # Copies, so that no two of our linears share a tensor.
        lora_b = rule.apply(parts["lora_B.weight"])
        factors = {name: (parts["lora_A.weight"].clone(), part) for name, part in lora_b.items()}

    linears = {}
    for name, (lora_a, lora_b) in factors.items():
        tensors = {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
        for kind in ("lora_B.bias", "lora_magnitude_vector"):
            if kind in parts:
                tensors[kind] = rule.apply(parts[kind].flatten())[name]
        alpha = parts["alpha"].item() if "alpha" in parts else len(lora_a)
        linears[name.removesuffix(".weight")] = LoraLinear(tensors, alpha)
    return linears


def with_lora_bias(parts: LoraParts, rule: Rule) -> LoraParts:
    """Turns a `diff_b` into PEFT's bias, which alpha scales too: so alpha goes into the weights, in float32."""
    parts = dict(parts)
    bias = parts.pop("diff_b")
    if not parts:
        parts["lora_A.weight"] = bias.new_zeros(1, rule.shape[1])
        parts["lora_B.weight"] = bias.new_zeros(rule.shape[0], 1)
    if "alpha" in parts:
        scale = parts.pop("alpha").item() / len(parts["lora_A.weight"])
        parts["lora_B.weight"] = parts["lora_B.weight"].float() * scale
    return parts | {"lora_B.bias": bias}


def factorise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors, the smaller one an identity, whose product is the weight."""
    out_features, in_features = weight.shape
    identity = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
    return (weight, identity) if out_features < in_features else (identity, weight)


def make_lora_config(linears: Mapping[str, LoraLinear]) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig`: the most frequent rank and alpha, and patterns for the modules with others."""
    rank = Counter(linear.rank for linear in linears.values()).most_common(1)[0][0]
    alpha = Counter(linear.alpha for linear in linears.values()).most_common(1)[0][0]
    kinds = {kind for linear in linears.values() for kind in linear.tensors}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: linear.rank for name, linear in linears.items() if linear.rank != rank},
        "alpha_pattern": {name: linear.alpha for name, linear in linears.items() if linear.alpha != alpha},
        "target_modules": list(linears),
        "use_dora": "lora_magnitude_vector" in kinds,
        "lora_bias": "lora_B.bias" in kinds,
    }


def has_separate_alpha(names: Iterable[str]) -> bool:
    is_peft = any(name.startswith("base_model.model.") for name in names)
    return is_peft and not any(name.endswith(".alpha") for name in names)


def add_zero_biases(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Adds a bias of zeros to each module of a LoRA that has none, and returns the names of these modules."""
    weights = {name.removesuffix(".weight"): name for name in state_dict if name.endswith(".lora_B.weight")}
    unbiased = [name for name in weights if f"{name}.bias" not in state_dict]
    for name in unbiased:
        weight = state_dict[weights[name]]
        state_dict[f"{name}.bias"] = weight.new_zeros(weight.shape[0])
    return [name.removeprefix("transformer.").removesuffix(".lora_B") for name in unbiased]


class MagiHumanLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """
    Loads LoRAs into the transformer of a pipeline, see [`convert_lora_state_dict`] for what a file may hold.

    To save a loaded LoRA with its ranks and alphas, use `pipe.transformer.save_lora_adapter(directory, adapter_name)`.
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
        transformer = self.transformer
        transformer.check_projections_are_unfused()
        state_dict, saved_config = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if state_dict and not any("." in name for name in state_dict):
            # Of no module at all: Diffusers warns, and leaves the transformer as it was.
            self.load_lora_into_transformer(state_dict, transformer, adapter_name, _pipeline=self)
            return
        if saved_config is None and has_separate_alpha(state_dict):
            logging.get_logger(__name__).warning(
                "The LoRA was saved by PEFT, which keeps its alpha in `adapter_config.json`. That file is not read, so"
                " the LoRA is loaded with alpha equal to its rank; `set_adapters` takes another weight."
            )
        state_dict, lora_config = convert_lora_state_dict(state_dict, transformer.config)
        adapter_name = get_adapter_name(transformer) if adapter_name is None else adapter_name
        # PEFT knows biases for all modules or none: those without get one of zeros, and lose it once it is loaded.
        unbiased = [] if hotswap or not lora_config["transformer.lora_bias"] else add_zero_biases(state_dict)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
            self.load_lora_into_transformer(
                state_dict,
                transformer,
                adapter_name=adapter_name,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
                metadata=lora_config if saved_config is None else add_prefix(saved_config),
            )
        for name in unbiased:
            layer = transformer.get_submodule(name)
            layer.lora_B[adapter_name].bias = None
            layer.lora_bias[adapter_name] = False
