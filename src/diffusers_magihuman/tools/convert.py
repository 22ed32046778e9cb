# SPDX-License-Identifier: Apache-2.0
"""From a published checkpoint to a Diffusers repository or a GGUF file, a tensor at a time."""

import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderOobleck, TorchAoConfig
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..checks import check_dtype, check_integer, check_options, show
from ..constants import CONVERTED_VAES
from ..conversion import (
    UPSCALE_SIZES,
    Rule,
    check_feed_forward_multiple,
    convert_tensors,
    find_variant,
    plan_transformer,
)
from ..files import unfinished_folder
from ..loading import LazyTensors, load_part, load_video_vae, open_text_encoder, open_transformer
from ..scheduling_magihuman_flow import MagiHumanFlowScheduler
from ..single_file import HUB_OPTIONS, empty_model
from ..transformer_magihuman import MagiHumanTransformer3DModel
from .hub import make_licence_note, make_model_card, write_repository_code
from .quantize import Q4_K_VALUES, check_quantize, plan_gguf, plan_torchao, quantize_torchao, write_gguf


def convert_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    variant: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    text_encoder: str | os.PathLike[str] | None = None,
    video_vae: str | os.PathLike[str] | None = None,
    turbo_vae: str | os.PathLike[str] | None = None,
    audio_vae: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    feed_forward_multiple: int | None = None,
    quantize: str | None = None,
    **hub_kwargs: Any,
) -> Path:
    """Converts a published checkpoint to a Diffusers repository, a tensor at a time, and returns its directory; or to
    a GGUF file of the transformer.

    It appears under its name only when it is complete. A run that fails leaves nothing; what one that is killed
    leaves, a hidden directory beside it, the next one removes. `OSError` before anything is converted if it cannot be
    written there, or does not fit on the disk.

    Args:
        source, variant, subfolder, feed_forward_multiple: The transformer, see [`load_original_transformer`], also for
            errors; `"gguf:Q4_K"` pads feed-forwards to 256 by default.
        output (`str` or `os.PathLike`): Directory, or file `NAME.gguf`, to write; a `ValueError` if it exists.
        dtype (`torch.dtype` or `str`, *optional*): Dtype of what is neither quantised nor kept in float32, bfloat16 by
            default; `"float8"` allows no other.
        max_shard_size (`int` or `str`): Bytes of a file; also most of the memory that is needed.
        text_encoder, video_vae, turbo_vae, audio_vae (`str` or `os.PathLike`, *optional*): Directories or repositories
            of other parts to include; parts that are left out are given when loading.
        repo_id (`str`, *optional*): Repository that the examples of the model card load.
        quantize (`str`, *optional*): What the blocks' linears are rounded to, one of `QUANTIZE_KINDS`; `ValueError` if
            one has a size that is not taken. `"int8"` and `"float8"`, see [`torchao_config`], need no argument when
            loading. `"gguf:..."` writes one file of the transformer alone, for `from_single_file`.
        hub_kwargs: `token`, `cache_dir`, `local_files_only` of all downloads, `revision` of the transformer's.
    """
    check_options("convert_checkpoint", hub_kwargs, HUB_OPTIONS)
    check_feed_forward_multiple(feed_forward_multiple)
    check_arguments(source, output, max_shard_size)
    if turbo_vae is not None and video_vae is None:
        raise ValueError(f"`turbo_vae`={show(turbo_vae)} needs `video_vae`, whose encoder it takes.")
    parts = {"text_encoder": text_encoder, "video_vae": video_vae, "turbo_vae": turbo_vae, "audio_vae": audio_vae}
    check_quantize(quantize, output, dtype=dtype, repo_id=repo_id, **parts)
    dtype = check_dtype("dtype", dtype)
    output = Path(output).absolute()
    variant = find_variant(variant, source, subfolder)
    card = make_model_card(variant, repo_id)
    tensors = open_transformer(source, subfolder, variant, **hub_kwargs)
    multiple = Q4_K_VALUES if feed_forward_multiple is None and quantize == "gguf:Q4_K" else feed_forward_multiple
    config, rules = plan_transformer(tensors, variant, multiple)
    model = empty_model(MagiHumanTransformer3DModel, config)
    hub_kwargs.pop("revision", None)  # the other parts are in other repositories

    existing = next(folder for folder in output.parents if folder.exists())  # the others are made in the end
    with unfinished_folder(existing / output.name) as unfinished:
        new = unfinished / output.name
        if output.suffix == ".gguf":
            writer, num_bytes = plan_gguf(rules, quantize)
            check_space(unfinished, num_bytes)
            tensors = convert_tensors(tensors, rules, torch.float32)
            write_gguf(writer, num_bytes, tensors, model.to_json_string(), new)
        else:
            new.mkdir()
            transformer = plan_shards(tensors, rules, dtype)
            if quantize is not None:
                torchao, names = plan_torchao(rules, quantize)
                transformer = quantize_shards(transformer, names, torchao)
                model.register_to_config(quantization_config=torchao)
            write_parts(new, variant, dtype, max_shard_size, transformer, **parts, **hub_kwargs)
            model.save_config(new / "transformer")
            (new / "README.md").write_text(card, encoding="utf-8")
            (new / "NOTICE.md").write_text(make_licence_note(), encoding="utf-8")
            index = make_index(new, variant, turbo_vae)
            (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
            write_repository_code(new)
        output.parent.mkdir(parents=True, exist_ok=True)
        new.rename(output)
    return output


def check_arguments(source: Any, output: Any, max_shard_size: Any) -> None:
    for name, path in (("source", source), ("output", output)):
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"`{name}`={show(path)} must be a path.")
    if os.path.lexists(output):
        raise ValueError(f"`output` is {str(output)!r}, which exists; it must be new.")
    if (Path(source) / "model_index.json").is_file():
        raise ValueError(f"`source` is {os.fspath(source)!r}, which is a Diffusers directory already.")
    if not isinstance(max_shard_size, str):
        check_integer("max_shard_size", max_shard_size, 1, 2**63)
    elif not re.fullmatch(r"\d{1,12}(\.\d+)?\s*[KMGT]B", max_shard_size.strip(), re.IGNORECASE):
        raise ValueError(f"`max_shard_size`={show(max_shard_size)} must be a number of bytes, or a text like '5GB'.")


def check_space(folder: Path, num_bytes: int) -> None:
    """`OSError` if what is converted does not fit on the disk."""
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise OSError(f"`output` needs {num_bytes / 1e9:.1f} GB on the disk, where {free / 1e9:.1f} GB are free.")


class Shards(NamedTuple):
    """What goes to files: tensors one by one, all of them without data, and the metadata of each file."""

    tensors: Iterator[tuple[str, torch.Tensor]]
    described: dict[str, torch.Tensor]
    metadata: dict[str, str]


def plan_shards(source: LazyTensors, rules: dict[str, Rule], dtype: torch.dtype) -> Shards:
    described = {
        name: torch.empty(shape, dtype=torch.float32 if rule.is_float32 else dtype, device="meta")
        for rule in rules.values()
        for name, shape in rule.targets.items()
    }
    return Shards(convert_tensors(source, rules, dtype), described, {})


def quantize_shards(shards: Shards, names: set[str], config: TorchAoConfig) -> Shards:
    """As Diffusers saves them, those of `names` quantised."""
    described, metadata = quantize_torchao(shards.described, names, config)
    tensors = (quantize_torchao({name: tensor}, names, config)[0] for name, tensor in shards.tensors)
    return Shards((pair for parts in tensors for pair in parts.items()), described, metadata)


def write_parts(
    folder: Path, variant: str, dtype: torch.dtype, max_shard_size: int | str, transformer: Shards, **options: Any
) -> None:
    """Writes the components. The transformer, which takes the longest, comes last: a part that is missing is found
    before."""
    names = ("text_encoder", "video_vae", "turbo_vae", "audio_vae")
    text_encoder, video_vae, turbo_vae, audio_vae = (options.pop(name) for name in names)
    described = [transformer.described]
    if text_encoder is not None:
        tokenizer, tensors, rules, config = open_text_encoder(text_encoder, **options)
        encoder = plan_shards(tensors, rules, dtype)
        described.append(encoder.described)
    check_space(folder, sum(tensor.nbytes for each in described for tensor in each.values()))
    sampler = "renoise" if variant == "distilled" else "unipc"
    MagiHumanFlowScheduler(sampler=sampler).save_pretrained(folder / "scheduler")
    if video_vae is not None:
        load_video_vae(video_vae, turbo_vae, dtype, **options).save_pretrained(folder / "vae")
    if audio_vae is not None:
        load_part(AutoencoderOobleck, audio_vae, torch.float32, **options).save_pretrained(folder / "audio_vae")
    if text_encoder is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
        config.architectures, config.dtype = ["T5GemmaEncoderModel"], dtype
        config.save_pretrained(folder / "text_encoder")
        write_shards(encoder, folder / "text_encoder", "model", max_shard_size)
    write_shards(transformer, folder / "transformer", "diffusion_pytorch_model", max_shard_size)


def write_shards(shards: Shards, folder: Path, stem: str, max_shard_size: int | str) -> None:
    """Converts tensors and writes them to safetensors files of at most `max_shard_size` each."""
    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(
        shards.described, filename_pattern=pattern, max_shard_size=max_shard_size
    )
    folder.mkdir(exist_ok=True)
    with tqdm(total=split.metadata["total_size"], unit="B", unit_scale=True, unit_divisor=1024) as progress:
        waiting: dict[str, torch.Tensor] = {}
        for file, names in split.filename_to_tensors.items():
            while not waiting.keys() >= set(names):
                name, waiting[name] = next(shards.tensors)
                progress.update(waiting[name].nbytes)
            metadata = {"format": "pt"} | shards.metadata
            save_file({name: waiting.pop(name) for name in names}, folder / file, metadata=metadata)
    if split.is_sharded:
        index = {"metadata": split.metadata | shards.metadata, "weight_map": split.tensor_to_filename}
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
    index: dict[str, Any] = {"_class_name": "MagiHumanAudioVideoPipeline", "is_distilled": variant == "distilled"}
    if variant in UPSCALE_SIZES:
        height, width = UPSCALE_SIZES[variant]
        index = {"_class_name": "MagiHumanLatentUpscalePipeline", "default_height": height, "default_width": width}
    index["_diffusers_version"] = diffusers.__version__
    return index | {name: value if (folder / name).is_dir() else (None, None) for name, value in classes.items()}


def run_convert(arguments: Namespace) -> None:
    if arguments.push_to_hub is not None:
        make_model_card("base", arguments.push_to_hub)  # checks the name; the next call, who is logged in
        HfApi().whoami()
    vaes = {}
    if arguments.with_vaes is not None:
        vaes = {name: getattr(arguments, name) or default for name, default in CONVERTED_VAES.items()}
    names = ("source", "output", "variant", "subfolder", "dtype", "max_shard_size")
    options = {name: getattr(arguments, name) for name in names} | {"repo_id": arguments.push_to_hub}
    options |= {"text_encoder": arguments.with_text_encoder, "video_vae": arguments.with_vaes}
    options |= {"quantize": arguments.quantize, "feed_forward_multiple": arguments.feed_forward_multiple}
    path = convert_checkpoint(**options, **vaes)
    print(path)
    if arguments.push_to_hub is not None:
        repo = HfApi().create_repo(arguments.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=arguments.push_to_hub, folder_path=path)
        print(repo)
