# SPDX-License-Identifier: Apache-2.0
"""Weights elsewhere, quantised or under other names: what may be done with them, and where on disk they go."""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import TorchAoConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .caches import hooks_of
from .checks import show_some
from .files import unfinished_folder


def guarded(method: Callable, check: Callable, mend: Callable | None = None) -> Callable:
    """The method, after a check of the model, and before what mends it."""

    @functools.wraps(method)
    def guard(self: ModelMixin, *args: Any, **kwargs: Any) -> Any:
        check(self)
        result = method(self, *args, **kwargs)
        if mend is not None:
            mend(self)
        return result

    return guard


def take_new_folder(arguments: dict[str, Any], name: str, *owners: Any) -> Callable[..., None]:
    """Puts a new folder within the one of that name, if it is given, in its place. It is there as long as one of its
    owners, to which what is returned adds others; of a killed process, the next new folder removes it."""
    stack = contextlib.ExitStack()
    if (path := arguments.get(name)) is not None:
        Path(path).mkdir(parents=True, exist_ok=True)
        arguments[name] = str(stack.enter_context(unfinished_folder(Path(path) / "weights")))
    holder: set = set()  # each owner's finalizer refers to it
    weakref.finalize(holder, stack.close)

    def add(*owners: Any) -> None:
        for owner in owners:
            weakref.finalize(owner, holder.clear)

    add(*owners)
    return add


def check_is_in_memory(module: nn.Module) -> None:
    """Raises a `ValueError` if weights are offloaded to disk."""
    hooks = (hooks_of(part).get("group_offloading") for part in module.modules())
    if any(hook is not None and hook.config.offload_to_disk_path for hook in hooks):
        raise ValueError("Weights on disk can neither be saved nor changed: do so before `enable_group_offload`.")


@torch.no_grad()
def fill_zero_rows(weight: Tensor) -> None:
    """Makes NaN of float8 zero: TorchAO and Quanto divide rows of zeros, as padding has, by their scale, 0. Goes when
    they do not."""
    for name in weight.__tensor_flatten__()[0]:
        values = getattr(weight, name)
        if values.itemsize == 1 and values.is_floating_point():
            values.view(torch.uint8).masked_fill_(values.to(torch.bfloat16).isnan(), 0)


def fill_quantized(model: nn.Module) -> None:
    """[`fill_zero_rows`] of all weights that are quantised."""
    for weight in (each for each in model.parameters() if hasattr(each, "__tensor_flatten__")):
        fill_zero_rows(weight)


def check_is_quantized(model: ModelMixin) -> None:
    """Raises a `ValueError` for linears whose sizes TorchAO does not take, which it leaves as they are. Goes when it
    raises an error itself. Configs by name leave out what they do not name."""
    config = model.hf_quantizer.quantization_config
    if not isinstance(config, TorchAoConfig) or "fqn_to_config" in vars(config.quant_type):
        return
    spared = model.hf_quantizer.modules_to_not_convert
    linears = {name: each.weight for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    plain = {name: tuple(x.shape) for name, x in linears.items() if type(x) is nn.Parameter}
    if left := [f"{name} {shape}" for name, shape in plain.items() if not any(f"{x}." in f"{name}." for x in spared)]:
        fix = "`modules_to_not_convert` may name them, a model with another `feed_forward_multiple` may fit"
        kind = type(config.quant_type).__name__
        raise ValueError(f"`quantization_config`, {kind}, does not take the sizes of {show_some(left, 4)}: {fix}.")


@torch.no_grad()
def give_zero_rows_a_direction(module: nn.Module) -> None:
    """DoRA divides rows by their norm. Those of length 0, as the feed-forward's padding has, get a direction, and a
    length that changes nothing but lets `unfuse_lora` divide too."""
    for layer in module.modules():
        for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
            rows = magnitude.weight == 0
            layer.lora_B[name].weight[rows, layer.lora_A[name].weight.norm(dim=1).argmax()] = 1.0
            magnitude.weight[rows] = 1e-30


class MagiHumanWeightsMixin:
    """For models: disk offloading that no other model's files reach, and no saving of weights that are not there."""

    @functools.wraps(ModelMixin.enable_group_offload)
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        take_new_folder(arguments, "offload_to_disk_path", self)
        super().enable_group_offload(**arguments)

    @classmethod
    @functools.wraps(ModelMixin.from_pretrained.__func__)
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        add_owner = take_new_folder(kwargs, "offload_folder")
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info`
        add_owner(model)
        if kwargs.get("quantization_config") is not None:
            check_is_quantized(model)
            fill_quantized(model)
        return loaded

    def check_is_saveable(self) -> None:
        """Raises a `ValueError` if weights are offloaded, or an adapter has changed their names."""
        check_is_in_memory(self)
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("Offloaded weights cannot be saved: load the model without a device map or offloading.")
        if any({"base_layer", "original_module"} & set(name.split(".")) for name, _ in self.named_parameters()):
            fix = "call `fuse_lora()`, if it is to be part of the weights, and `unload_lora()` first"
            raise ValueError(f"A model with a LoRA cannot be saved: {fix}; `save_lora_adapter` saves the LoRA apart.")

    save_pretrained = guarded(ModelMixin.save_pretrained, check_is_saveable)
    push_to_hub = guarded(ModelMixin.push_to_hub, check_is_saveable)  # before a repository is made


class MagiHumanAdapterMixin(MagiHumanWeightsMixin, PeftAdapterMixin):
    """[`PeftAdapterMixin`] that leaves weights on disk alone, and takes no LoRA that would be stored as float8."""

    def check_takes_lora(self) -> None:
        """Raises a `ValueError` if weights are on disk or float8."""
        check_is_in_memory(self)
        if any(parameter.dtype.itemsize == 1 and parameter.is_floating_point() for parameter in self.parameters()):
            raise ValueError("Weights in float8 take no LoRA: load or fuse it before `enable_layerwise_casting`.")

    def check_merges_lora(self) -> None:
        """Raises a `ValueError` for what else PEFT leaves as it is, Quanto's weights, or fails in, GGUF's."""
        self.check_takes_lora()
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None and (kind := quantizer.quantization_config.quant_method) in ("quanto", "gguf"):
            raise ValueError(
                f"Weights of `quant_method`={kind.value!r} cannot be fused with a LoRA: leave it unfused."
            )

    load_lora_adapter = guarded(PeftAdapterMixin.load_lora_adapter, check_takes_lora)
    fuse_lora = guarded(PeftAdapterMixin.fuse_lora, check_merges_lora, fill_quantized)
    unfuse_lora = guarded(PeftAdapterMixin.unfuse_lora, check_takes_lora, fill_quantized)
    unload_lora = guarded(PeftAdapterMixin.unload_lora, check_is_in_memory)
    delete_adapters = guarded(PeftAdapterMixin.delete_adapters, check_is_in_memory)


def check_is_saveable(pipe: Any) -> None:
    """Raises a `ValueError` if weights are on disk, or the transformer has a LoRA."""
    for part in filter(lambda part: isinstance(part, nn.Module), pipe.components.values()):
        check_is_in_memory(part)
    if getattr(pipe, "transformer", None) is not None:
        pipe.transformer.check_is_saveable()


def portable_reference(value: Any) -> Any:
    """What an index says of a component: ours as `("diffusers", ClassName)`, the only form that loads from the Hub."""
    is_ours = isinstance(value, tuple) and str(value[0]).startswith(("diffusers_magihuman.", "diffusers_modules."))
    return ("diffusers", *value[1:]) if is_ours and hasattr(diffusers, value[1]) else value
