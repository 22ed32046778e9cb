# SPDX-License-Identifier: Apache-2.0
"""Opens what is published, in any of its layouts, from the Hub or from disk, and loads it as components.

The layout of a checkpoint (canonical or split names, one file or shards, bfloat16, float32 or scaled float8) is read
off its names. Tensors are read and converted one at a time.
"""

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, T5GemmaConfig, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .conversion import (
    Rule,
    apply_rules,
    check_names_and_shapes,
    check_variant,
    convert_tensors,
    guess_variant,
    plan_transformer,
    tensor_shapes,
)
from .scheduling_magihuman_flow import MagiHumanFlowScheduler
from .transformer_magihuman import MagiHumanTransformer3DModel


ORIGINAL = "GAIR/daVinci-MagiHuman"
TEXT_ENCODER = "google/t5gemma-9b-9b-ul2"
AUDIO_VAE = "stabilityai/stable-audio-open-1.0"
VIDEO_VAE = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
VARIANT_FOLDERS = {"base": "base", "distill": "distill", "sr_540p": "540p_sr", "sr_1080p": "1080p_sr"}
TURBO_VAE_WRAPPED = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv_out", "time_conv", "upsampler2d_1")


# Files


class LazyTensors(Mapping[str, torch.Tensor]):
    """
    Tensors of safetensors files, each read when it is asked for.

    A file is opened for one tensor and closed with it, so that what was read does not stay mapped.

    Args:
        files (`Mapping[str, Path]`): The file of every tensor.

    Raises:
        `OSError`: A file is missing, damaged, or lacks a tensor that it should hold.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.shapes: dict[str, torch.Size] = {}
        for path in sorted(set(files.values())):
            with open_safetensors(path) as file:
                names = [name for name in files if files[name] == path]
                if absent := sorted(set(names) - set(file.keys())):
                    raise OSError(f"{str(path)!r} lacks the tensors {absent}, which the index says it holds.")
                self.shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in names}

    def __getitem__(self, name: str) -> torch.Tensor:
        with open_safetensors(self.files[name]) as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_safetensors(path: Path) -> safe_open:
    if not path.is_file():
        raise OSError(f"{str(path)!r} is missing.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error


def open_checkpoint(path: Path) -> LazyTensors:
    """
    Opens a safetensors file, or a directory that holds one or an index of several.

    Raises:
        `OSError`: Nothing to open, or a file is missing or damaged.
        `ValueError`: An index names a file outside of its directory.
    """
    if path.is_dir():
        found = [*sorted(path.glob("*.safetensors.index.json")), *sorted(path.glob("*.safetensors"))]
        if len(found) != 1 and (not found or found[0].suffix != ".json" or found[1].suffix == ".json"):
            names = [file.name for file in found]
            raise OSError(f"{str(path)!r} must hold one index or one .safetensors file, but holds {names}.")
        path = found[0]
    if path.suffix == ".json":
        return LazyTensors(read_index(path))
    with open_safetensors(path) as file:
        return LazyTensors(dict.fromkeys(file.keys(), path))


def read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = {name: path.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{str(path)!r} is no index of safetensors files: {error!r}") from error
    if outside := sorted({str(file) for name, file in files.items() if weight_map[name] != file.name}):
        raise ValueError(f"{str(path)!r} names the files {outside}, allowed are names of files beside it.")
    return files


def fetch(source: str | os.PathLike[str], patterns: list[str], **hub_kwargs: Any) -> Path:
    """
    The local path of a file or directory, or of a repository's snapshot with the files that match the patterns.

    Raises:
        `OSError`: No such path or repository, or a repository to which access was not granted.
    """
    if os.path.exists(source):
        return Path(source)
    repo_id = os.fspath(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or repo_id.startswith("."):
        raise OSError(f"{repo_id!r} is neither a path that exists nor a repository `owner/name`.")
    page = f"https://huggingface.co/{repo_id}"
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **hub_kwargs))
    except GatedRepoError as error:
        raise OSError(
            f"Access to {repo_id!r} is gated. Open {page}, accept its terms, log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(f"{page} cannot be downloaded: {error}") from error


# The transformer


def fetch_transformer(source: str | os.PathLike[str], subfolder: str | None, variant: str, **hub_kwargs: Any) -> Path:
    """Finds the transformer's files; `subfolder` is a directory or file of the source, or follows from the variant."""
    is_sr = variant.startswith("sr")
    names, other = (["sr_transformer", "transformer"], "transformer") if is_sr else (["transformer"], "sr_transformer")
    hub_kwargs["ignore_patterns"] = f"*/{other}/*"
    folders = [subfolder] if subfolder else sorted({variant, VARIANT_FOLDERS[variant]})
    patterns = [f"{folder}/{kind}" for folder in folders for kind in ("*.safetensors", "*.json")]
    root = fetch(source, [*patterns, *folders], **hub_kwargs)
    if subfolder and not (root / subfolder).exists():
        raise OSError(f"{os.fspath(source)!r} has no {subfolder!r}.")
    found = next((root / folder for folder in folders if (root / folder).exists()), None)
    if found is None:  # the source itself is the transformer; of a repository nothing but files of standard names
        names_at_root = ["model*.safetensors*", "diffusion_pytorch_model*.safetensors*"]
        found = fetch(source, names_at_root, **hub_kwargs)
        has_some = any(found.glob("*.safetensors")) or any((found / name).is_dir() for name in names)
        if not found.is_file() and not has_some:
            raise OSError(
                f"{os.fspath(source)!r} has none of the folders {folders}; `subfolder` may name another, or a file."
            )
    return next((found / name for name in names if (found / name).is_dir()), found)


def load_original_transformer(
    path_or_repo: str | os.PathLike[str],
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **hub_kwargs: Any,
) -> MagiHumanTransformer3DModel:
    """
    Loads a transformer from any published layout.

    Args:
        path_or_repo (`str` or `os.PathLike`): A safetensors file, a directory, or a repository on the Hub.
        subfolder (`str`, *optional*): Directory or file within it, for example `"distill"`.
        variant (`str`, *optional*): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`, guessed from the path when it
            names just one.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): What the linears compute in; norms, embedders and heads
            are float32 whatever the file holds.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the download.

    Returns:
        [`MagiHumanTransformer3DModel`] in evaluation mode, on the CPU.

    Raises:
        `ValueError`: The variant cannot be guessed, or tensors do not fit.
        `OSError`: A file or repository is missing, damaged or not accessible.
    """
    variant = check_variant(variant or guess_variant(path_or_repo, subfolder))
    source = open_checkpoint(fetch_transformer(path_or_repo, subfolder, variant, **hub_kwargs))
    config, rules = plan_transformer(source, source.shapes, variant)
    model = meta_model(MagiHumanTransformer3DModel, config)
    model.load_state_dict(dict(convert_tensors(source, rules, dtype)), assign=True)
    return model.eval()


def meta_model(model_class: type[ModelMixin], config: Mapping[str, Any]) -> ModelMixin:
    with torch.device("meta"):
        return model_class.from_config(dict(config))


# The autoencoders


def turbo_vae_rules(config: Mapping[str, Any]) -> dict[str, Rule]:
    """Our names are the original's without a module `conv` that wraps some of its convolutions."""
    rules = {}
    decoder = meta_model(AutoencoderKLMagiHumanTurbo, config).decoder
    for module_name, module in decoder.named_modules(prefix="decoder"):
        source = f"{module_name}.conv" if module_name.split(".")[-1] in TURBO_VAE_WRAPPED else module_name
        for kind, parameter in module.named_parameters(recurse=False):
            rules[f"{source}.{kind}"] = Rule({f"{module_name}.{kind}": parameter.shape})
    return rules


def convert_turbo_vae_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    Converts a published Turbo VAE, a decoder alone, to the decoder of [`AutoencoderKLMagiHumanTurbo`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors by the original's names, each beginning with `decoder.`.
        config (`Mapping`): Config of the model; further keys of the published json are ignored.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors by our names.

    Raises:
        `ValueError`: Names that are missing or unknown, shapes that do not fit.
    """
    rules = turbo_vae_rules(config)
    check_names_and_shapes(tensor_shapes(state_dict), {name: rule.shape for name, rule in rules.items()})
    return apply_rules(state_dict, rules)


def load_original_turbo_vae(
    path_or_repo: str | os.PathLike[str],
    subfolder: str | None = None,
    encoder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **hub_kwargs: Any,
) -> AutoencoderKLMagiHumanTurbo:
    """
    Loads the Turbo VAE from the published checkpoint, a pickle of plain tensors, or from safetensors.

    Args:
        path_or_repo (`str` or `os.PathLike`): A file, a directory, or a repository on the Hub.
        subfolder (`str`, *optional*): Directory within it; `"turbo_vae"` of a repository.
        encoder (`str` or `os.PathLike`, *optional*): Wan 2.2 VAE in Diffusers format whose encoder is taken along, a
            directory or a repository with a folder `vae`. Without it the model only decodes.
        dtype (`torch.dtype`, defaults to `torch.float32`): Dtype of all weights.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the download.

    Returns:
        [`AutoencoderKLMagiHumanTurbo`] in evaluation mode, on the CPU.

    Raises:
        `ValueError`: Tensors do not fit.
        `OSError`: A file or repository is missing, damaged, not accessible, or a pickle that holds more than tensors.
    """
    if subfolder is None and not os.path.exists(path_or_repo):
        subfolder = "turbo_vae"
    root = fetch(path_or_repo, [f"{subfolder}/*"], **hub_kwargs)
    config, weights = read_turbo_vae(root / subfolder if subfolder else root)
    if encoder is not None:
        wan = load_part(AutoencoderKLWan, encoder, torch.float32, **hub_kwargs)
        config |= {
            "encoder_base_dim": wan.config.base_dim,
            "encoder_dim_mult": wan.config.dim_mult,
            "encoder_num_res_blocks": wan.config.num_res_blocks,
            "encoder_temporal_downsample": wan.config.temperal_downsample,
            "latents_mean": wan.config.latents_mean,
            "latents_std": wan.config.latents_std,
        }
    state_dict = convert_turbo_vae_state_dict(weights, config)
    if encoder is not None:
        kept = ("encoder.", "quant_conv.")
        state_dict |= {name: tensor for name, tensor in wan.state_dict().items() if name.startswith(kept)}
    model = meta_model(AutoencoderKLMagiHumanTurbo, config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state_dict.items()}, assign=True)
    return model.eval()


def read_turbo_vae(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config beside a checkpoint, or the published one, and the decoder's tensors under their full names."""
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted([*path.glob("*.ckpt"), *path.glob("*.safetensors")])
    if len(files) != 1:
        raise OSError(f"{str(path)!r} must hold one .ckpt or .safetensors file, but holds {[f.name for f in files]}.")
    published: dict[str, Any] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            published |= json.loads(file.read_text())
        except (ValueError, TypeError) as error:
            raise OSError(f"{str(file)!r} is no config: {error}") from error
    config, _, _ = AutoencoderKLMagiHumanTurbo.extract_init_dict(published)  # less the keys of its training

    is_pickle = files[0].suffix != ".safetensors"
    weights = read_pickle(files[0]) if is_pickle else dict(open_checkpoint(files[0]))
    names = {name: name.removeprefix("module.").removeprefix("decoder.") for name in weights}
    return config, {f"decoder.{names[name]}": tensor for name, tensor in weights.items()}


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return dict(checkpoint.get("ema_state_dict", checkpoint))
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        raise OSError(f"{str(path)!r} is damaged, or holds more than plain tensors: {error}") from error


def load_text_encoder(
    path_or_repo: str | os.PathLike[str] = TEXT_ENCODER, dtype: torch.dtype = torch.bfloat16, **hub_kwargs: Any
) -> tuple[Any, T5GemmaEncoderModel]:
    """
    Loads the tokenizer of T5Gemma and its encoder; shards that hold nothing but decoder are not downloaded.

    Args:
        path_or_repo (`str` or `os.PathLike`): A T5Gemma checkpoint, a directory or a repository.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all weights.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the download.

    Raises:
        `ValueError`: Tensors of the encoder are missing or misshapen.
        `OSError`: A file or repository is missing, damaged or not accessible.
    """
    tokenizer, source, rules, config = open_text_encoder(path_or_repo, **hub_kwargs)
    weights = dict(convert_tensors(source, rules, dtype))
    return tokenizer, T5GemmaEncoderModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def open_text_encoder(
    path_or_repo: str | os.PathLike[str], **hub_kwargs: Any
) -> tuple[Any, LazyTensors, dict[str, Rule], T5GemmaConfig]:
    """The tokenizer of a T5Gemma checkpoint, the tensors of its encoder, their rules, and its config."""
    root = fetch(path_or_repo, ["*.json", "tokenizer*"], **hub_kwargs)
    index = root / "model.safetensors.index.json"
    files = read_index(index) if index.is_file() else None
    if files is None:
        fetch(path_or_repo, ["model.safetensors"], **hub_kwargs)
        files = open_checkpoint(root / "model.safetensors").files
    files = {name: path for name, path in files.items() if name.startswith(("model.encoder.", "encoder."))}
    fetch(path_or_repo, sorted({path.name for path in files.values()}), **hub_kwargs)

    source, config = LazyTensors(files), T5GemmaConfig.from_pretrained(root)
    config.is_encoder_decoder = False
    with torch.device("meta"):
        expected = tensor_shapes(T5GemmaEncoderModel(config).state_dict())
    # Transformers would fill in what is missing at random.
    check_names_and_shapes({name.removeprefix("model."): shape for name, shape in source.shapes.items()}, expected)
    rules = {name: Rule({name.removeprefix("model."): shape}) for name, shape in source.shapes.items()}
    return AutoTokenizer.from_pretrained(root), source, rules, config


def load_original_components(
    path_or_repo: str | os.PathLike[str] = ORIGINAL,
    variant: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    subfolder: str | None = None,
    text_encoder: str | os.PathLike[str] = TEXT_ENCODER,
    audio_vae: str | os.PathLike[str] = AUDIO_VAE,
    video_vae: str | os.PathLike[str] = VIDEO_VAE,
    turbo_vae: str | os.PathLike[str] | None = ORIGINAL,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """
    Loads all components of a pipeline from the repositories that hold them, or from local copies.

    Args:
        path_or_repo (`str` or `os.PathLike`): The transformer, see [`load_original_transformer`].
        variant (`str`, *optional*): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): Dtype of all but the audio autoencoder, which is float32.
        subfolder (`str`, *optional*): Where the transformer is, if not in the published folder of the variant.
        text_encoder, audio_vae, video_vae (`str` or `os.PathLike`): Directories or repositories of the other parts.
        turbo_vae (`str` or `os.PathLike`, *optional*):
            The light decoder, which takes the encoder of `video_vae`; `None` for `video_vae` as a whole.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the downloads.

    Returns:
        `dict`: Components by name.

    Raises:
        `ValueError`: The variant cannot be guessed, or tensors do not fit.
        `OSError`: A file or repository is missing, damaged or not accessible; gated ones are named with their page.
    """
    variant = variant or guess_variant(path_or_repo, subfolder)
    shared_kwargs = {name: value for name, value in hub_kwargs.items() if name != "revision"}
    transformer = load_original_transformer(path_or_repo, subfolder, variant, dtype, **hub_kwargs)
    tokenizer, encoder = load_text_encoder(text_encoder, dtype, **shared_kwargs)
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "transformer": transformer,
        "scheduler": MagiHumanFlowScheduler(sampler="renoise" if variant == "distill" else "unipc"),
        "vae": load_video_vae(video_vae, turbo_vae, dtype, **shared_kwargs),
        "audio_vae": load_part(AutoencoderOobleck, audio_vae, torch.float32, **shared_kwargs),
    }


def load_video_vae(
    video_vae: str | os.PathLike[str],
    turbo_vae: str | os.PathLike[str] | None,
    dtype: torch.dtype,
    **hub_kwargs: Any,
) -> AutoencoderKLWan | AutoencoderKLMagiHumanTurbo:
    if turbo_vae is None:
        return load_part(AutoencoderKLWan, video_vae, dtype, **hub_kwargs)
    subfolder = "turbo_vae" if not os.path.exists(turbo_vae) or os.path.isdir(Path(turbo_vae) / "turbo_vae") else None
    return load_original_turbo_vae(turbo_vae, subfolder, video_vae, dtype, **hub_kwargs)


def load_part(
    model_class: type[ModelMixin], path_or_repo: str | os.PathLike[str], dtype: torch.dtype, **hub_kwargs: Any
) -> ModelMixin:
    """An autoencoder out of a repository's folder `vae`, or out of a local directory that is the autoencoder."""
    root = fetch(path_or_repo, ["vae/*"], **hub_kwargs)
    return model_class.from_pretrained(root if (root / "config.json").is_file() else root / "vae", dtype=dtype)
