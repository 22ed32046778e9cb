# SPDX-License-Identifier: Apache-2.0
"""Opens what is published, in any format, from the Hub or from disk, and loads it as components, tensor by tensor."""

import inspect
import json
import os
import pickle
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
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, T5GemmaConfig, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import ORIGINAL_OPTIONS, AutoencoderKLMagiHumanTurbo
from .conversion import Rule, check_names_and_shapes, check_variant, convert_tensors, guess_variant, plan_transformer
from .scheduling_magihuman_flow import MagiHumanFlowScheduler
from .transformer_magihuman import MagiHumanTransformer3DModel

ORIGINAL = "GAIR/daVinci-MagiHuman"
TEXT_ENCODER = "google/t5gemma-9b-9b-ul2"
AUDIO_VAE = "stabilityai/stable-audio-open-1.0"
VIDEO_VAE = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
VARIANT_FOLDERS = {"base": "base", "distill": "distill", "sr_540p": "540p_sr", "sr_1080p": "1080p_sr"}
TURBO_VAE_WRAPPED = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv_out", "time_conv", "upsampler2d_1")
Source = str | os.PathLike[str]


class LazyTensors(UserDict[str, Any]):
    """Tensors of safetensors files by name; a file is open for one tensor only, so that nothing read stays mapped."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__(files)
        self.shapes: dict[str, torch.Size] = {}
        for path in sorted(set(files.values())):
            with open_safetensors(path) as file:
                self.shapes |= {x: torch.Size(file.get_slice(x).get_shape()) for x in files if files[x] == path}

    def __getitem__(self, name: str) -> Tensor:
        with open_safetensors(self.data[name]) as file:
            return file.get_tensor(name)


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise OSError(f"{str(path)!r} is missing, damaged, or lacks what its index says it holds: {error}") from error


def open_checkpoint(path: Path) -> LazyTensors:
    """Opens a safetensors file, an index of several, or a directory that holds one of them."""
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
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = {name: path.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{str(path)!r} is no index of safetensors files: {error!r}") from error
    if outside := sorted({str(file) for name, file in files.items() if weight_map[name] != file.name}):
        raise ValueError(f"{str(path)!r} names the files {outside}, allowed are names of files beside it.")
    return files


def fetch(source: Source, patterns: list[str], **hub_kwargs: Any) -> Path:
    """The local path of a file or directory, or of a repository's snapshot with the files that match the patterns."""
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
    hub_kwargs["ignore_patterns"] = "*/transformer/*" if variant.startswith("sr") else "*/sr_transformer/*"
    folders = [subfolder] if subfolder else sorted({variant, VARIANT_FOLDERS[variant]})
    patterns = [f"{folder}/{kind}" for folder in folders for kind in ("*.safetensors", "*.json")]
    root = fetch(source, [*patterns, *folders], **hub_kwargs)
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
    dtype: torch.dtype = torch.bfloat16,
    **hub_kwargs: Any,
) -> MagiHumanTransformer3DModel:
    """Loads a transformer from any published format: canonical or split names, a file or shards, scaled float8 or not.

    Args:
        path_or_repo (`str` or `os.PathLike`): A safetensors file, a directory, or a repository on the Hub.
        subfolder (`str`, *optional*): Directory or file within it, for example `"distill"`.
        variant (`str`, *optional*): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`, guessed from the path.
        dtype (`torch.dtype`): What the linears compute in; norms, embedders and heads are always float32.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of the download.

    `ValueError`: the variant cannot be guessed, or tensors do not fit; `OSError`: a file or repository is missing,
    damaged or not accessible.
    """
    variant = check_variant(variant or guess_variant(path_or_repo, subfolder))
    source = open_transformer(path_or_repo, subfolder, variant, **hub_kwargs)
    config, rules = plan_transformer(source, variant)
    model = meta_model(MagiHumanTransformer3DModel, config)
    model.load_state_dict(dict(convert_tensors(source, rules, dtype)), assign=True)
    return model.eval()


def meta_model(model_class: type[ModelMixin], config: Mapping[str, Any]) -> ModelMixin:
    with torch.device("meta"):
        return model_class.from_config(dict(config))


def turbo_vae_rules(config: Mapping[str, Any]) -> dict[str, Rule]:
    """Our names are the original's without a module `conv` that wraps some of its convolutions."""
    rules = {}
    for name, parameter in meta_model(AutoencoderKLMagiHumanTurbo, config).decoder.named_parameters(prefix="decoder"):
        module, _, kind = name.rpartition(".")
        wrapper = ".conv" if module.split(".")[-1] in TURBO_VAE_WRAPPED else ""
        rules[f"{module}{wrapper}.{kind}"] = Rule({name: parameter.shape})
    return rules


def convert_turbo_vae_state_dict(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts a decoder by the original's names, `decoder.` before each, to ours; a `ValueError` if one does not fit.
    Keys of `config` that [`AutoencoderKLMagiHumanTurbo`] does not know are ignored."""
    rules = turbo_vae_rules(config)
    check_names_and_shapes(state_dict, rules)
    return dict(convert_tensors(state_dict, rules))


def load_original_turbo_vae(
    path_or_repo: Source,
    subfolder: str | None = None,
    encoder: Source | None = None,
    dtype: torch.dtype = torch.float32,
    **hub_kwargs: Any,
) -> AutoencoderKLMagiHumanTurbo:
    """
    Loads the Turbo VAE from the published checkpoint, a pickle of plain tensors (`OSError` for more), or safetensors.

    Args:
        path_or_repo, hub_kwargs: See [`load_original_transformer`], also for errors; `dtype` is that of all weights.
        subfolder (`str`, *optional*): Directory within it; `"turbo_vae"` if there is one, and of a repository.
        encoder (`str` or `os.PathLike`, *optional*): Wan 2.2 VAE in Diffusers format whose encoder is taken along, a
            directory or a repository with a folder `vae`. Without it the model only decodes.
    """
    if subfolder is None and (not os.path.exists(path_or_repo) or (Path(path_or_repo) / "turbo_vae").is_dir()):
        subfolder = "turbo_vae"
    path = fetch(path_or_repo, [f"{subfolder}/*"], **hub_kwargs) / (subfolder or "")
    files = [path] if path.is_file() else sorted([*path.glob("*.ckpt"), *path.glob("*.safetensors")])
    if len(files) != 1:
        raise OSError(f"{str(path)!r} must hold one .ckpt or .safetensors file, but holds {[f.name for f in files]}.")
    published: dict[str, Any] = {}
    try:
        for file in sorted(files[0].parent.glob("*.json")):
            published |= json.loads(file.read_text())
        file = files[0]
        is_pickle = file.suffix != ".safetensors"
        weights = torch.load(file, map_location="cpu", weights_only=True) if is_pickle else open_checkpoint(file)
        weights = dict(weights.get("ema_state_dict", weights))
    except (ValueError, TypeError, pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        raise OSError(f"{str(file)!r} is damaged, or holds more than plain tensors or settings: {error}") from error
    # Less the keys of its training, which Diffusers would warn of.
    known = ORIGINAL_OPTIONS.keys() | inspect.signature(AutoencoderKLMagiHumanTurbo).parameters
    published = {name: value for name, value in published.items() if name in known}
    config, _, _ = AutoencoderKLMagiHumanTurbo.extract_init_dict(published)
    names = {name: f"decoder.{name.removeprefix('module.').removeprefix('decoder.')}" for name in weights}
    state_dict = convert_turbo_vae_state_dict({names[name]: tensor for name, tensor in weights.items()}, config)
    if encoder is not None:
        wan = load_part(AutoencoderKLWan, encoder, torch.float32, **hub_kwargs)
        config |= {f"encoder_{name}": wan.config[name] for name in ("base_dim", "dim_mult", "num_res_blocks")}
        config |= {name: wan.config[name] for name in ("latents_mean", "latents_std")}
        config["encoder_temporal_downsample"] = wan.config.temperal_downsample
        state_dict |= {x: value for x, value in wan.state_dict().items() if x.startswith(("encoder.", "quant_conv."))}
    model = meta_model(AutoencoderKLMagiHumanTurbo, config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state_dict.items()}, assign=True)
    return model.eval()


def load_text_encoder(
    path_or_repo: Source = TEXT_ENCODER, dtype: torch.dtype = torch.bfloat16, **hub_kwargs: Any
) -> tuple[Any, T5GemmaEncoderModel]:
    """Loads T5Gemma's tokenizer and encoder, whose weights come in `dtype`; shards that hold nothing but decoder are
    not downloaded. `hub_kwargs` and errors are those of [`load_original_transformer`]."""
    tokenizer, tensors, rules, config = open_text_encoder(path_or_repo, **hub_kwargs)
    weights = dict(convert_tensors(tensors, rules, dtype))
    return tokenizer, T5GemmaEncoderModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def open_text_encoder(source: Source, **hub_kwargs: Any) -> tuple[Any, LazyTensors, dict[str, Rule], T5GemmaConfig]:
    """The tokenizer of a T5Gemma checkpoint, the tensors of its encoder, their rules, and its config."""
    root = fetch(source, ["*.json", "tokenizer*", "model.safetensors"], **hub_kwargs)
    kept = ("model.encoder.", "encoder.")
    files = {name: path for name, path in find_tensors(root).items() if name.startswith(kept)}
    fetch(source, sorted({path.name for path in files.values()}), **hub_kwargs)
    tensors, config = LazyTensors(files), T5GemmaConfig.from_pretrained(root)
    config.is_encoder_decoder = False
    with torch.device("meta"):
        expected = T5GemmaEncoderModel(config).state_dict()
    prefix = "model." if any(name.startswith(kept[0]) for name in files) else ""
    rules = {prefix + name: Rule({name: tensor.shape}) for name, tensor in expected.items()}
    check_names_and_shapes(tensors, rules)  # Transformers would fill in what is missing at random
    return AutoTokenizer.from_pretrained(root), tensors, rules, config


def load_original_components(
    path_or_repo: Source = ORIGINAL,
    variant: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    subfolder: str | None = None,
    text_encoder: Source = TEXT_ENCODER,
    audio_vae: Source = AUDIO_VAE,
    video_vae: Source = VIDEO_VAE,
    turbo_vae: Source | None = ORIGINAL,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Loads all components of a pipeline, by name, from the repositories that hold them, or from local copies.

    Args:
        path_or_repo, variant, subfolder: The transformer, see [`load_original_transformer`], also for errors.
        dtype (`torch.dtype`): Dtype of all but the audio autoencoder, which is float32.
        text_encoder, audio_vae, video_vae (`str` or `os.PathLike`): Directories or repositories of the other parts.
        turbo_vae (`str` or `os.PathLike`, *optional*): The light decoder, which takes the encoder of `video_vae`;
            `None` for `video_vae` as a whole.
        hub_kwargs: `token`, `cache_dir`, `local_files_only` of all downloads, `revision` of the transformer's.
    """
    variant = variant or guess_variant(path_or_repo, subfolder)
    transformer = load_original_transformer(path_or_repo, subfolder, variant, dtype, **hub_kwargs)
    hub_kwargs.pop("revision", None)  # the other parts are in other repositories
    tokenizer, encoder = load_text_encoder(text_encoder, dtype, **hub_kwargs)
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "transformer": transformer,
        "scheduler": MagiHumanFlowScheduler(sampler="renoise" if variant == "distill" else "unipc"),
        "vae": load_video_vae(video_vae, turbo_vae, dtype, **hub_kwargs),
        "audio_vae": load_part(AutoencoderOobleck, audio_vae, torch.float32, **hub_kwargs),
    }


def load_video_vae(video_vae: Source, turbo_vae: Source | None, dtype: torch.dtype, **hub_kwargs: Any) -> ModelMixin:
    if turbo_vae is None:
        return load_part(AutoencoderKLWan, video_vae, dtype, **hub_kwargs)
    return load_original_turbo_vae(turbo_vae, None, video_vae, dtype, **hub_kwargs)


def load_part(model_class: type[ModelMixin], source: Source, dtype: torch.dtype, **hub_kwargs: Any) -> ModelMixin:
    """An autoencoder out of a repository's folder `vae`, or out of a local directory that is the autoencoder."""
    root = fetch(source, ["vae/*"], **hub_kwargs)
    return model_class.from_pretrained(root if (root / "config.json").is_file() else root / "vae", dtype=dtype)
