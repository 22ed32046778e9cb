# SPDX-License-Identifier: Apache-2.0
"""A transformer out of one file: safetensors in any format of the original, or GGUF."""

import copy
from types import NoneType
from typing import Any

import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.quantization_config import GGUFQuantizationConfig
from diffusers.utils import is_gguf_available
from torch import Tensor

from .conversion import check_variant, checked_rules, convert_tensors, guess_variant, is_gguf, plan_transformer

if is_gguf_available():
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

# The base class loads a GGUF file only into classes of this dict. Both functions hand on what is converted already: it
# would cast everything to `dtype`, as it honours `_keep_in_fp32_modules` for float16 alone. Once it does so for
# bfloat16, the conversions belong in here and most of `from_single_file` goes.
SINGLE_FILE_LOADABLE_CLASSES["MagiHumanTransformer3DModel"] = {
    "checkpoint_mapping_fn": lambda checkpoint, **_: checkpoint,
    "config_mapping_fn": lambda original_config, **_: original_config,
}


class MagiHumanSingleFileMixin(FromOriginalModelMixin):
    """Gives [`MagiHumanTransformer3DModel`] its `from_single_file`."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | dict[str, Tensor],
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        config: str | None = None,
        subfolder: str | None = None,
        quantization_config: GGUFQuantizationConfig | None = None,
        **kwargs: Any,
    ) -> ModelMixin:
        """
        Loads a checkpoint out of one file: safetensors in any format of the original, or GGUF; with its names or ours.

        Args:
            pretrained_model_link_or_path_or_dict (`str` or `dict`): Path, link to the Hub, or tensors by name.
            variant (`str`, *optional*): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`, guessed from the path.
            dtype (`torch.dtype`, *optional*): What the linears compute in, bfloat16 or the `compute_dtype` of
                `quantization_config`; norms, embedders and heads are always float32.
            config (`str`, *optional*): Directory or repository of a config, which a file with our names needs.
            subfolder (`str`, *optional*): Directory within `config`, for example `"transformer"`.
            quantization_config (`GGUFQuantizationConfig`, *optional*): What a GGUF file needs, and no other takes.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and the like of the download.

        `ValueError`: the variant cannot be guessed, or tensors, `quantization_config` or `dtype` do not fit.
        """
        checkpoint = pretrained_model_link_or_path_or_dict
        path = "" if isinstance(checkpoint, dict) else str(checkpoint)
        has_gguf = path.endswith(".gguf") if path else any(is_gguf(tensor) for tensor in checkpoint.values())
        if not isinstance(quantization_config, GGUFQuantizationConfig if has_gguf else NoneType):
            raise ValueError(
                f"`quantization_config`={quantization_config} must be a `GGUFQuantizationConfig` for a GGUF file, and"
                f" None for another; {path or 'the dict'} is {'one' if has_gguf else 'none'}. Other quantisers work in"
                " `from_pretrained`."
            )
        default_dtype = quantization_config.compute_dtype if has_gguf else torch.bfloat16
        dtype = dtype or default_dtype
        if has_gguf and dtype != default_dtype:
            raise ValueError(f"`dtype`={dtype} must be the `compute_dtype` of `quantization_config`, {default_dtype}.")
        if path:
            checkpoint = load_single_file_checkpoint(path, **kwargs)
        if config is None:
            config, rules = plan_transformer(checkpoint, check_variant(variant or guess_variant(path, None)))
        else:
            config = cls.load_config(config, subfolder=subfolder)
            rules = checked_rules(checkpoint, config)
        whole = [name for name, rule in rules.items() if rule.is_float32 and is_gguf(checkpoint[name])]
        checkpoint = {**checkpoint, **{name: dequantize_gguf_tensor(checkpoint[name]) for name in whole}}
        state_dict = dict(convert_tensors(checkpoint, rules, dtype))
        if has_gguf:
            kwargs = {"dtype": dtype, "quantization_config": copy.deepcopy(quantization_config)}
            model = super().from_single_file(state_dict, original_config=dict(config), **kwargs)
            model.register_to_config(_pre_quantization_dtype=dtype)
            return model
        with torch.device("meta"):
            model = cls.from_config(config)
        model.load_state_dict(state_dict, assign=True)
        return model.eval()
