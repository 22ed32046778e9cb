# SPDX-License-Identifier: Apache-2.0
"""Opens what is published, in any format, from the Hub or from disk, and loads it as components, tensor by tensor."""

import json
import os
import re
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, T5GemmaConfig, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .checks import check_dtype, check_options, show, show_some
from .constants import AUDIO_VAE, ORIGINAL, TEXT_ENCODER, VIDEO_VAE
from .conversion import (
    Rule,
    check_feed_forward_multiple,
    check_names_and_shapes,
    convert_tensors,
    find_variant,
    plan_transformer,
    table_names,
    with_table_names,
)
from .files import naming, reading
from .scheduling_magihuman_flow import MagiHumanFlowScheduler
from .single_file import HUB_OPTIONS, empty_model, turbo_vae_rules
from .transformer_magihuman import MagiHumanTransformer3DModel

VARIANT_FOLDERS = {"base": ["base"], "distilled": ["distill"]}  # of the original, and of others
VARIANT_FOLDERS |= {f"sr-{size}": [f"{size}_sr", f"sr_{size}"] for size in ("540p", "1080p")}
Source = str | os.PathLike[str]


class LazyTensors(UserDict[str, Any]):
    """Tensors of safetensors files by name; a file is open for one tensor only, so that nothing read stays mapped."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__({name: (original, files[original]) for name, original in table_names(files).items()})
        self.shapes: dict[str, torch.Size] = {}
        for path in sorted(set(files.values())):
            with open_safetensors(path) as file:
                originals = {name: original for name, (original, where) in self.data.items() if where == path}
                self.shapes |= {x: torch.Size(file.get_slice(y).get_shape()) for x, y in originals.items()}

    def __getitem__(self, name: str) -> Tensor:
        original, path = self.data[name]
        with open_safetensors(path) as file:
            return file.get_tensor(original)


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    fault = "is missing, damaged, or lacks what its index says it holds"
    with reading(path, fault), safe_open(path, framework="pt") as file:
        yield file


def open_checkpoint(path: Path) -> LazyTensors:
    """Opens a safetensors file, an index of several, or a directory that holds one of them."""
    with naming(path):
        return LazyTensors(find_tensors(path))


def find_tensors(path: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("model.safetensors"))
        found = found or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise OSError(f"{str(path)!r} must hold an index or one .safetensors file, not {[f.name for f in found]}.")
        path = found[0]
    if path.suffix != ".json":
        with open_safetensors(path) as file:
            return dict.fromkeys(file.keys(), path)
    with reading(path, "is no index of safetensors files"):
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {name: path.parent / file for name, file in weight_map.items()}
    if outside := sorted({str(file) for name, file in files.items() if weight_map[name] != file.name}):
        raise ValueError(f"{str(path)!r} names the files {show_some(outside)}, allowed are names of files beside it.")
    return files


def fetch(source: Source, patterns: list[str], subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """The local path of a file or directory, or of a repository's snapshot with the files that match the patterns."""
    if not isinstance(source, str | os.PathLike) or not isinstance(subfolder, str | None):
        raise ValueError(f"`path_or_repo`={show(source)} and `subfolder`={show(subfolder)} must be paths.")
    if os.path.exists(source):
        return Path(source)
    repo_id = os.fspath(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or repo_id.startswith("."):
        raise OSError(f"{repo_id!r} is neither a path that exists nor a repository `owner/name`.")
    page = f"https://huggingface.co/{repo_id}"
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **hub_kwargs))
    except GatedRepoError as error:
        raise OSError(f"{repo_id!r} is gated. Open {page}, accept its terms, log in with `hf auth login`.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(f"{page} cannot be downloaded: {error}") from error


def open_transformer(source: Source, subfolder: str | None, variant: str, **hub_kwargs: Any) -> LazyTensors:
    """Opens a transformer; `subfolder` is a directory or file of the source, or follows from the variant."""
    names = ["sr_transformer", "transformer"] if variant.startswith("sr") else ["transformer"]
    folders = [subfolder] if subfolder else VARIANT_FOLDERS[variant]
    other = "transformer" if variant.startswith("sr") else "sr_transformer"  # beside it, and as large
    if f"/{other}/" not in f"{subfolder}/":
        hub_kwargs["ignore_patterns"] = f"*/{other}/*"
    patterns = [f"{folder}/{kind}" for folder in folders for kind in ("*.safetensors", "*.json")]
    root = fetch(source, [*patterns, *folders], subfolder, **hub_kwargs)
    found = next((root / folder for folder in folders if (root / folder).exists()), None)
    if found is None and not subfolder:  # the source is the transformer; of a repository nothing but standard names
        found = fetch(source, ["model*.safetensors*", "diffusion_pytorch_model*.safetensors*"], **hub_kwargs)
    if found is not None:
        found = next((found / name for name in names if (found / name).is_dir()), found)
        if found.is_file() or any(found.glob("*.safetensors")):
            return open_checkpoint(found)
    raise OSError(f"{os.fspath(source)!r} has no safetensors in {folders}; `subfolder` may name another, or a file.")


def load_original_transformer(
    path_or_repo: Source,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    feed_forward_multiple: int | None = None,
    **hub_kwargs: Any,
) -> MagiHumanTransformer3DModel:
    """Loads a transformer from any published format: canonical or split names, a file or shards, scaled float8 or not.

    Args:
        path_or_repo (`str` or `os.PathLike`): A safetensors file, a directory, or a repository on the Hub.
        subfolder (`str`, *optional*): Directory or file within it, for example `"distill"`.
        variant (`str`, *optional*): `"base"`, `"distilled"`, `"sr-540p"` or `"sr-1080p"`, guessed from the path.
        dtype, torch_dtype (`torch.dtype` or `str`, *optional*): What the linears compute in, bfloat16 by default;
            norms, embedders and heads are always float32.
        feed_forward_multiple (`int`, *optional*): Of the config, see [`MagiHumanTransformer3DModel`]; found by
            [`transformer_config_from_state_dict`] if left out.
        hub_kwargs: Of the download, one of `HUB_OPTIONS`; anything else is a `TypeError`.

    `ValueError`: the variant cannot be guessed, or tensors do not fit; `OSError`: a file or repository is missing,
    damaged or not accessible.
    """
    check_options("load_original_transformer", hub_kwargs, HUB_OPTIONS)
    check_feed_forward_multiple(feed_forward_multiple)
    dtype = check_dtype("dtype", torch_dtype if dtype is None else dtype)
    variant = find_variant(variant, path_or_repo, subfolder)
    source = open_transformer(path_or_repo, subfolder, variant, **hub_kwargs)
    with naming(path_or_repo):
        config, rules = plan_transformer(source, variant, feed_forward_multiple)
        model = empty_model(MagiHumanTransformer3DModel, config)
        model.load_state_dict(dict(convert_tensors(source, rules, dtype)), assign=True)
    return model.eval()


def convert_turbo_vae_state_dict(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts a decoder by the original's names, `decoder.` before each, to ours; a `ValueError` if one does not fit.
    Keys of `config` that [`AutoencoderKLMagiHumanTurbo`] does not know are ignored."""
    rules, state_dict = turbo_vae_rules(empty_model(AutoencoderKLMagiHumanTurbo, config)), with_table_names(state_dict)
    check_names_and_shapes(state_dict, rules)
    return dict(convert_tensors(state_dict, rules))


def load_original_turbo_vae(
    path_or_repo: Source,
    subfolder: str | None = None,
    encoder: Source | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **hub_kwargs: Any,
) -> AutoencoderKLMagiHumanTurbo:
    """
    Loads the Turbo VAE from the published checkpoint, a pickle of plain tensors (`OSError` for more), or safetensors.

    Args:
        path_or_repo, hub_kwargs: See [`load_original_transformer`], also for errors.
        dtype, torch_dtype (`torch.dtype` or `str`, *optional*): Of all weights, float32 by default.
        subfolder (`str`, *optional*): Directory within it; `"turbo_vae"` if there is one, and of a repository.
        encoder (`str` or `os.PathLike`, *optional*): Wan 2.2 VAE in Diffusers format whose encoder is taken along, a
            directory or a repository with a folder `vae`, whose newest revision is taken. Without it the model only
            decodes.
    """
    check_options("load_original_turbo_vae", hub_kwargs, HUB_OPTIONS)
    dtype = check_dtype("dtype", torch_dtype if dtype is None else dtype, torch.float32)
    path = fetch(path_or_repo, [f"{'turbo_vae' if subfolder is None else subfolder}/*"], subfolder, **hub_kwargs)
    if subfolder is None and (not os.path.exists(path_or_repo) or (path / "turbo_vae").is_dir()):
        subfolder = "turbo_vae"
    path /= subfolder or ""
    files = [path] if path.is_file() else sorted([*path.glob("*.ckpt"), *path.glob("*.safetensors")])
    if len(files) != 1:
        raise OSError(f"{str(path)!r} must hold one .ckpt or .safetensors file, but holds {[f.name for f in files]}.")
    model = AutoencoderKLMagiHumanTurbo.from_single_file(files[0])
    if encoder is not None:
        wan = load_part(AutoencoderKLWan, encoder, torch.float32, **hub_kwargs | {"revision": None})
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        config |= {f"encoder_{name}": wan.config[name] for name in ("base_dim", "dim_mult", "num_res_blocks")}
        config |= {name: wan.config[name] for name in ("latents_mean", "latents_std")}
        config["encoder_temporal_downsample"] = wan.config.temperal_downsample
        state_dict = {x: value for x, value in wan.state_dict().items() if x.startswith(("encoder.", "quant_conv."))}
        state_dict |= model.state_dict()
        model = empty_model(AutoencoderKLMagiHumanTurbo, config)
        model.load_state_dict(state_dict, assign=True)
    return model.eval().to(dtype)


def load_text_encoder(
    path_or_repo: Source = TEXT_ENCODER,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **hub_kwargs: Any,
) -> tuple[Any, T5GemmaEncoderModel]:
    """Loads T5Gemma's tokenizer and encoder, whose weights come in `dtype`, bfloat16 by default; shards that hold
    nothing but decoder are not downloaded. Other arguments and errors are those of [`load_original_transformer`]."""
    check_options("load_text_encoder", hub_kwargs, HUB_OPTIONS)
    dtype = check_dtype("dtype", torch_dtype if dtype is None else dtype)
    tokenizer, tensors, rules, config = open_text_encoder(path_or_repo, **hub_kwargs)
    weights = dict(convert_tensors(tensors, rules, dtype))
    return tokenizer, T5GemmaEncoderModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def open_text_encoder(source: Source, **hub_kwargs: Any) -> tuple[Any, LazyTensors, dict[str, Rule], T5GemmaConfig]:
    """The tokenizer of a T5Gemma checkpoint, the tensors of its encoder, their rules, and its config."""
    root = fetch(source, ["*.json", "tokenizer*", "model.safetensors"], **hub_kwargs)
    kept = ("model.encoder.", "encoder.")
    files = {name: path for name, path in find_tensors(root).items() if name.startswith(kept)}
    fetch(source, sorted({path.name for path in files.values()}), **hub_kwargs)
    with reading(root / "config.json"):
        config = T5GemmaConfig.from_pretrained(root)
        config.is_encoder_decoder = False
        with torch.device("meta"):
            expected = T5GemmaEncoderModel(config).state_dict()
    rules = {name: Rule({name: tensor.shape}) for name, tensor in expected.items()}
    with naming(root):
        tensors = LazyTensors(files)
        check_names_and_shapes(tensors, rules)  # Transformers would fill in what is missing at random
    with reading(root / "tokenizer.json"):
        return AutoTokenizer.from_pretrained(root), tensors, rules, config


def load_original_components(
    path_or_repo: Source = ORIGINAL,
    variant: str | None = None,
    dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
    subfolder: str | None = None,
    text_encoder: Source = TEXT_ENCODER,
    audio_vae: Source = AUDIO_VAE,
    video_vae: Source = VIDEO_VAE,
    turbo_vae: Source | None = ORIGINAL,
    torch_dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
    feed_forward_multiple: int | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Loads all components of a pipeline, by name, from the repositories that hold them, or from local copies.

    Args:
        path_or_repo, variant, subfolder, feed_forward_multiple: The transformer, see [`load_original_transformer`],
            also for errors.
        dtype, torch_dtype (`torch.dtype`, `str` or `dict`, *optional*): Dtype of all but the audio autoencoder, which
            is float32; bfloat16 by default. Or one for each part by its name, and `"default"`, else float32.
        text_encoder, audio_vae, video_vae (`str` or `os.PathLike`): Directories or repositories of the other parts.
        turbo_vae (`str` or `os.PathLike`, *optional*): The light decoder, which takes the encoder of `video_vae`;
            `None` for `video_vae` as a whole.
        hub_kwargs: `token`, `cache_dir`, `local_files_only` of all downloads, `revision` of the transformer's.
    """
    check_options("load_original_components", hub_kwargs, HUB_OPTIONS)
    dtypes = check_dtypes(torch_dtype if dtype is None else dtype)
    variant = find_variant(variant, path_or_repo, subfolder)
    options = {"dtype": dtypes["transformer"], "feed_forward_multiple": feed_forward_multiple}
    transformer = load_original_transformer(path_or_repo, subfolder, variant, **options, **hub_kwargs)
    hub_kwargs.pop("revision", None)  # the other parts are in other repositories
    tokenizer, encoder = load_text_encoder(text_encoder, dtypes["text_encoder"], **hub_kwargs)
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "transformer": transformer,
        "scheduler": MagiHumanFlowScheduler(sampler="renoise" if variant == "distilled" else "unipc"),
        "vae": load_video_vae(video_vae, turbo_vae, dtypes["vae"], **hub_kwargs),
        "audio_vae": load_part(AutoencoderOobleck, audio_vae, dtypes["audio_vae"], **hub_kwargs),
    }


def check_dtypes(dtype: Any) -> dict[str, torch.dtype]:
    """The dtype of each part of a pipeline, of one dtype for all, or of a dict."""
    parts = ("transformer", "text_encoder", "vae", "audio_vae")
    if not isinstance(dtype, dict):
        return dict.fromkeys(parts, check_dtype("dtype", dtype)) | {"audio_vae": torch.float32}
    if unknown := dtype.keys() - {"default", *parts}:
        raise ValueError(f"`dtype` has the keys {show(sorted(map(str, unknown)))}, allowed are {('default', *parts)}.")
    dtypes = {name: check_dtype(f"dtype[{name!r}]", value) for name, value in dtype.items()}
    return dict.fromkeys(parts, dtypes.get("default", torch.float32)) | {"audio_vae": torch.float32} | dtypes


def load_video_vae(video_vae: Source, turbo_vae: Source | None, dtype: torch.dtype, **hub_kwargs: Any) -> ModelMixin:
    if turbo_vae is None:
        return load_part(AutoencoderKLWan, video_vae, dtype, **hub_kwargs)
    return load_original_turbo_vae(turbo_vae, None, video_vae, dtype, **hub_kwargs)


def load_part(model_class: type[ModelMixin], source: Source, dtype: torch.dtype, **hub_kwargs: Any) -> ModelMixin:
    """An autoencoder out of a repository's folder `vae`, or out of a local directory that is the autoencoder."""
    root = fetch(source, ["vae/*"], **hub_kwargs)
    return model_class.from_pretrained(root if (root / "config.json").is_file() else root / "vae", dtype=dtype)
