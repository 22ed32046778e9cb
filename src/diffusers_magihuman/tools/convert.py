# SPDX-License-Identifier: Apache-2.0
"""From a published checkpoint to a Diffusers repository, a tensor at a time."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderOobleck
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..conversion import UPSCALE_SIZES, Rule, check_variant, convert_tensors, guess_variant, plan_transformer
from ..loading import LazyTensors, load_part, load_video_vae, meta_model, open_text_encoder, open_transformer
from ..scheduling_magihuman_flow import MagiHumanFlowScheduler
from ..transformer_magihuman import MagiHumanTransformer3DModel
from .hub import make_licence_note, make_model_card, write_repository_code


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
    """Converts a published checkpoint to a Diffusers repository, a tensor at a time, and returns its directory.

    The directory appears under its name only when it is complete. A run that fails leaves nothing; one that is killed
    leaves a hidden directory beside it.

    Args:
        source, variant, subfolder: The transformer, see [`load_original_transformer`], also for errors.
        output (`str` or `os.PathLike`): Directory to write; a `ValueError` if it exists.
        dtype (`torch.dtype`): Dtype of what is not kept in float32.
        max_shard_size (`int` or `str`): Bytes of a file; also most of the memory that is needed.
        text_encoder, video_vae, turbo_vae, audio_vae (`str` or `os.PathLike`, *optional*): Directories or repositories
            of other parts to include; parts that are left out are given when loading.
        repo_id (`str`, *optional*): Repository that the examples of the model card load.
        hub_kwargs: `token`, `cache_dir`, `local_files_only` of all downloads, `revision` of the transformer's.
    """
    output = Path(output).absolute()
    if output.exists():
        raise ValueError(f"`output` is {str(output)!r}, which exists; it must be a new directory.")
    variant = check_variant(variant or guess_variant(source, subfolder))
    card = make_model_card(variant.replace("_", "-"), repo_id)
    tensors = open_transformer(source, subfolder, variant, **hub_kwargs)
    config, rules = plan_transformer(tensors, variant)
    hub_kwargs.pop("revision", None)  # the other parts are in other repositories

    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".incomplete", dir=output.parent))
    try:
        os.umask(umask := os.umask(0))
        folder.chmod(0o777 & ~umask)  # temporary ones are for their owner alone
        # The transformer, which takes the longest, comes last: a part that is missing is found before.
        sampler = "renoise" if variant == "distill" else "unipc"
        MagiHumanFlowScheduler(sampler=sampler).save_pretrained(folder / "scheduler")
        if video_vae is not None:
            load_video_vae(video_vae, turbo_vae, dtype, **hub_kwargs).save_pretrained(folder / "vae")
        if audio_vae is not None:
            load_part(AutoencoderOobleck, audio_vae, torch.float32, **hub_kwargs).save_pretrained(folder / "audio_vae")
        if text_encoder is not None:
            tokenizer, encoder, encoder_rules, encoder_config = open_text_encoder(text_encoder, **hub_kwargs)
            tokenizer.save_pretrained(folder / "tokenizer")
            encoder_config.architectures, encoder_config.dtype = ["T5GemmaEncoderModel"], dtype
            encoder_config.save_pretrained(folder / "text_encoder")
            write_shards(encoder, encoder_rules, dtype, folder / "text_encoder", "model", max_shard_size)
        meta_model(MagiHumanTransformer3DModel, config).save_config(folder / "transformer")
        write_shards(tensors, rules, dtype, folder / "transformer", "diffusion_pytorch_model", max_shard_size)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "NOTICE.md").write_text(make_licence_note(), encoding="utf-8")
        (folder / "model_index.json").write_text(json.dumps(make_index(folder, variant, turbo_vae), indent=2) + "\n")
        write_repository_code(folder)
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return output


def write_shards(
    source: LazyTensors, rules: dict[str, Rule], dtype: torch.dtype, folder: Path, stem: str, max_shard_size: int | str
) -> None:
    """Converts tensors and writes them to safetensors files of at most `max_shard_size` each."""
    dtypes = {name: torch.float32 if rule.is_float32 else dtype for rule in rules.values() for name in rule.targets}
    shapes = {name: shape for rule in rules.values() for name, shape in rule.targets.items()}
    described = {name: torch.empty(shapes[name], dtype=dtypes[name], device="meta") for name in shapes}
    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(described, filename_pattern=pattern, max_shard_size=max_shard_size)
    with tqdm(total=split.metadata["total_size"], unit="B", unit_scale=True, unit_divisor=1024) as progress:
        tensors = convert_tensors(source, rules, dtype)
        waiting: dict[str, torch.Tensor] = {}
        for file, names in split.filename_to_tensors.items():
            while not waiting.keys() >= set(names):
                name, waiting[name] = next(tensors)
                progress.update(waiting[name].nbytes)
            save_file({name: waiting.pop(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def make_index(folder: Path, variant: str, turbo_vae: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The `model_index.json` of the parts that the folder holds."""
    classes = {
        "tokenizer": ("transformers", "GemmaTokenizer"),
        "text_encoder": ("transformers", "T5GemmaEncoderModel"),
        "transformer": ("diffusers", "MagiHumanTransformer3DModel"),
        "scheduler": ("diffusers", "MagiHumanFlowScheduler"),
        "vae": ("diffusers", "AutoencoderKLWan" if turbo_vae is None else "AutoencoderKLMagiHumanTurbo"),
        "audio_vae": ("diffusers", "AutoencoderOobleck"),
    }
    index: dict[str, Any] = {"_class_name": "MagiHumanAudioVideoPipeline", "is_distilled": variant == "distill"}
    if variant in UPSCALE_SIZES:
        height, width = UPSCALE_SIZES[variant]
        index = {"_class_name": "MagiHumanLatentUpscalePipeline", "default_height": height, "default_width": width}
    index["_diffusers_version"] = diffusers.__version__
    return index | {name: value if (folder / name).is_dir() else (None, None) for name, value in classes.items()}
