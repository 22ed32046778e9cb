# SPDX-License-Identifier: Apache-2.0
"""A transformer out of one file: safetensors in any layout of the original, or GGUF."""

import copy
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.quantization_config import GGUFQuantizationConfig
from diffusers.utils import is_gguf_available

from .conversion import (
    FP8_SCALE,
    Rule,
    check_names_and_shapes,
    check_variant,
    checked_transformer_rules,
    convert_tensors,
    guess_variant,
    is_gguf,
    plan_transformer,
    tensor_shapes,
    transformer_rules,
)


if is_gguf_available():
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor


# The base class loads a GGUF file only into classes of this dict. Both functions hand on what is converted already: it
# would cast everything to `dtype`, as it honours `_keep_in_fp32_modules` for float16 alone. Once it does so for
# bfloat16, the conversions belong in here and most of `from_single_file` goes.
SINGLE_FILE_LOADABLE_CLASSES["MagiHumanTransformer3DModel"] = {
    "checkpoint_mapping_fn": lambda checkpoint, **_: checkpoint,
    "config_mapping_fn": lambda original_config, **_: original_config,
}


def convert_single_file(
    checkpoint: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The state dict of a model with this config, from the original's names or from ours."""
    shapes = {name: shape for name, shape in tensor_shapes(checkpoint).items() if not name.endswith(FP8_SCALE)}
    if "video_embedder.weight" in shapes:
        rules = {
            name: Rule({name: shape}, is_float32=rule.is_float32)
            for rule in transformer_rules(config).values()
            for name, shape in rule.targets.items()
        }
        check_names_and_shapes(shapes, {name: rule.shape for name, rule in rules.items()})
    else:
        rules = checked_transformer_rules(checkpoint, shapes, config)
    kept = {
        name: dequantize_gguf_tensor(checkpoint[name])
        for name, rule in rules.items()
        if rule.is_float32 and is_gguf(checkpoint[name])
    }
    return dict(convert_tensors({**checkpoint, **kept}, rules, dtype))


class MagiHumanSingleFileMixin(FromOriginalModelMixin):
    """Gives [`MagiHumanTransformer3DModel`] its `from_single_file`."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | dict[str, torch.Tensor],
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        config: str | None = None,
        subfolder: str | None = None,
        quantization_config: GGUFQuantizationConfig | None = None,
        **kwargs: Any,
    ) -> ModelMixin:
        """
        Loads a checkpoint out of one file: safetensors in any layout of the original, or GGUF; with its names or ours.

        Args:
            pretrained_model_link_or_path_or_dict (`str` or `dict`): Path, link to the Hub, or tensors by name.
            variant (`str`, *optional*):
                `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`, guessed from the path when it names just one.
            dtype (`torch.dtype`, *optional*):
                What the linears compute in: bfloat16, or the `compute_dtype` of `quantization_config`. Norms,
                embedders and heads are float32 whatever the file holds.
            config (`str`, *optional*):
                Directory or repository of a config to use; a file with our names needs one, and then no `variant`.
            subfolder (`str`, *optional*): Directory within `config`, for example `"transformer"`.
            quantization_config (`GGUFQuantizationConfig`, *optional*): What a GGUF file needs, and no other takes.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and the like of the download.

        Raises:
            `ValueError`: The variant cannot be guessed, tensors do not fit, a GGUF file without
                `quantization_config` or another file with one, or a `dtype` that is not its `compute_dtype`.
        """
        checkpoint, path = pretrained_model_link_or_path_or_dict, ""
        if isinstance(checkpoint, dict):
            has_gguf = any(is_gguf(tensor) for tensor in checkpoint.values())
        else:
            path = str(checkpoint)
            has_gguf = path.endswith(".gguf")
        if not isinstance(quantization_config, GGUFQuantizationConfig if has_gguf else NoneType):
            raise ValueError(
                f"`quantization_config`={quantization_config} must be a `GGUFQuantizationConfig` for a GGUF file, and"
                f" None for another; {path or 'the dict'} is {'one' if has_gguf else 'none'}. Other quantisers work in"
                " `from_pretrained`."
            )
        if has_gguf and dtype not in (None, quantization_config.compute_dtype):
            raise ValueError(
                f"`dtype`={dtype} must be the `compute_dtype` of `quantization_config`,"
                f" {quantization_config.compute_dtype}."
            )
        dtype = dtype or (quantization_config.compute_dtype if has_gguf else torch.bfloat16)
        if path:
            checkpoint = load_single_file_checkpoint(path, **kwargs)

        if config is None:
            variant = check_variant(variant or guess_variant(path, None))
            config, _ = plan_transformer(checkpoint, tensor_shapes(checkpoint), variant)
        else:
            config = cls.load_config(config, subfolder=subfolder)
        state_dict = convert_single_file(checkpoint, config, dtype)
        if has_gguf:
            quantization_config = copy.deepcopy(quantization_config)
            model = super().from_single_file(
                state_dict, original_config=dict(config), dtype=dtype, quantization_config=quantization_config
            )
            model.register_to_config(_pre_quantization_dtype=dtype)
            return model
        with torch.device("meta"):
            model = cls.from_config(config)
        model.load_state_dict(state_dict, assign=True)
        return model.eval()
