# SPDX-License-Identifier: Apache-2.0
"""From a request, a row of a batch or what a service is asked for, to a clip and its record on disk.

A request is checked by the pipelines themselves, without their weights. A record is written last, so a clip that has
one is whole.
"""

import gc
import hashlib
import inspect
import json
import os
import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from uuid import uuid4

import diffusers
import fsspec
import torch
import transformers
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoTokenizer

from .. import __version__
from ..checks import check_integer, check_real, show, show_some
from ..constants import FRAME_RATE, MAX_FRAMES
from ..files import check_file, move_into_place, unfinished_folder
from ..media import export_to_mp4, load_audio, load_images, read_audio
from ..pipeline_base import check_forms
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline, count_frames
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from ..prompts import format_prompt
from .cli import describe, import_heavy
from .embedded import embedded_model
from .generate import check_run, choose_setting, frames_in, is_turbo, load_pipeline, upscaled_size
from .plan import configured_pipeline

Pipes = list[DiffusionPipeline]  # one, or one and another that upscales
Texts = dict[str, Tensor]  # embeddings of `prompt` and `negative_prompt`, `(1, length, channels)`
Callback = Callable[[str, int, int], None]  # stage, what is done of it, and of how much; an exception of it cancels
Record = dict[str, Any]  # what becomes JSON
Row = list[Any]  # for a worker, of what becomes JSON; the first entry names it

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)  # the name of a file
SIZE, READERS = ("height", "width", "num_frames"), {"image": load_images, "audio": read_audio}
FILES = (*READERS,)
GUIDANCE = ("guidance_scale", "audio_guidance_scale", "low_noise_guidance_scale")
ARGUMENTS = ("negative_prompt", *SIZE, "num_inference_steps", *GUIDANCE, "max_sequence_length")
PROMPT_PARTS = ("description", "dialogue", "background_sound")
FIELDS = ("id", "prompt", *PROMPT_PARTS, *FILES, "seed", "seconds", *ARGUMENTS)
# What workers are told of the command.
OPTIONS = ("model", "upscale", "device", "dtype", "offload", "quantize", "compile", "attention", "retries", "out")
MAX_DEATHS = 3  # of workers by one row, of which the next would die too
VERSIONS = {each.__name__: each.__version__ for each in (torch, diffusers, transformers)}
VERSIONS |= {"diffusers_magihuman": __version__}


class Models(NamedTuple):
    """What requests are checked against: pipelines without data, arguments of a call that are not given, and what else
    decides about the bytes of a clip."""

    pipe: MagiHumanAudioVideoPipeline
    upscale: MagiHumanLatentUpscalePipeline | None
    defaults: dict[str, Any]
    context: Record


class Request(NamedTuple):
    """A checked request: arguments of the call, the path and the digest of files, height, width and frames of each
    pipeline, and the hash of all that makes the clip."""

    id: str
    seed: int
    call: dict[str, Any]
    files: dict[str, tuple[str, str]]
    sizes: list[tuple[int, int, int]]
    hash: str


def digest_of(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def find_revision(model: str) -> str:
    """What names the weights: the commit of a repository; of a directory a hash of names, sizes, and the first and
    last MiB of each file, as whole ones would take minutes."""
    if not os.path.isdir(model):
        return Path(hf_hub_download(model, "model_index.json")).parent.name
    digest, root = hashlib.sha256(), Path(model)
    for path in sorted(path for path in root.glob("**/*.*") if path.suffix in (".json", ".safetensors", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def choose_run(arguments: Namespace) -> None:
    """Fills in what is left to be chosen."""
    arguments.model = arguments.model or embedded_model()
    for name in ("model", "upscale", "out"):  # workers are elsewhere
        path = getattr(arguments, name)
        if path is not None and (os.path.isdir(path) or (name == "out" and "://" not in path)):
            setattr(arguments, name, os.path.abspath(path))
    if arguments.gpus_per_worker == 0:
        arguments.device = arguments.device or "cpu"
    if arguments.address is None:
        check_run(arguments)
        arguments.device = str(arguments.device)
    else:  # of machines which this one may not be like
        arguments.device = arguments.device or "cuda"
        arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")


def open_models(arguments: Namespace) -> Models:
    """Reads the configs and the tokenizer of `arguments.model` and `arguments.upscale`."""
    dtype, upscale = getattr(torch, arguments.dtype), None
    pipe = configured_pipeline(arguments.model, dtype, [MagiHumanAudioVideoPipeline])
    pipe.register_modules(tokenizer=AutoTokenizer.from_pretrained(arguments.model, subfolder="tokenizer"))
    pipe._guidance_scale = pipe._audio_guidance_scale = 1.0  # of a call, which there is none of
    if arguments.upscale is not None:
        upscale = configured_pipeline(arguments.upscale, dtype, [MagiHumanLatentUpscalePipeline])
    defaults = {name: each.default for name, each in inspect.signature(type(pipe).__call__).parameters.items()}
    defaults |= {name: pipe.config[f"default_{name}"] for name in SIZE}
    defaults |= {"num_inference_steps": 1, **dict.fromkeys(GUIDANCE, 1.0)}
    context = {name: getattr(arguments, name) for name in ("dtype", "quantize", "compile", "attention")}
    for name in ("model", "upscale"):
        model = getattr(arguments, name)
        is_folder = model is not None and os.path.isdir(model)
        context[name] = os.path.basename(os.path.abspath(model)) if is_folder else model  # it may move
        context[f"{name}_revision"] = None if model is None else find_revision(model)
    return Models(pipe, upscale, defaults, context)


def check_request(row: Any, models: Models, folder: str | os.PathLike[str] = ".") -> Request:
    """Checks the fields of a row, `None` for those that are not given; paths are relative to `folder`. `ValueError` or
    `OSError` with the field's name."""
    if not isinstance(row, dict):
        raise ValueError(f"{show(row)} must be an object with fields, such as {show_some(FIELDS[:3])}.")
    if unknown := [show(name) for name in row if name not in FIELDS]:
        raise ValueError(f"{unknown[0]} is no field; fields are {', '.join(FIELDS)}.")
    row = dict.fromkeys(FIELDS) | row
    if not isinstance(row["id"], str) or not ID.fullmatch(row["id"]):
        allowed = "a string of 1 to 100 letters, digits, '.', '-' and '_' that begins with a letter or digit"
        raise ValueError(f"`id`={show(row['id'])} must be {allowed}.")
    seed = int(digest_of(row["id"])[:8], 16) if row["seed"] is None else row["seed"]
    seed = check_integer("seed", seed, -(2**63), 2**63 - 1)  # what tables hold
    call = {name: row[name] for name in ARGUMENTS if row[name] is not None} | {"prompt": make_prompt(row)}
    call |= {name: check_real(name, call[name]) for name in GUIDANCE if name in call}
    check_forms(row, "seconds", "num_frames")
    if row["seconds"] is not None:
        call["num_frames"] = frames_in(check_real("seconds", row["seconds"], 0.001, MAX_FRAMES / FRAME_RATE - 1))
    files = {name: row[name] for name in FILES if row[name] is not None}
    for name, path in files.items():
        files[name] = check_file(name, os.path.join(folder, path) if isinstance(path, str) else path)
    inputs = models.defaults | call | {name: [path] for name, path in files.items()}
    if "audio" in files and "num_frames" not in call:
        audio = load_audio(files["audio"], models.pipe.audio_vae_sampling_rate)
        inputs["num_frames"] = count_frames(models.pipe, [audio], None)
    models.pipe.check_inputs(inputs)
    sizes = check_sizes(models, tuple(inputs[name] for name in SIZE))
    files = {name: (path, digest_file(path)) for name, path in files.items()}
    digests = {name: digest for name, (_, digest) in files.items()}
    return Request(row["id"], seed, call, files, sizes, digest_of(seed, call, digests, models.context))


def make_prompt(row: dict[str, Any]) -> str:
    check_forms(row, "prompt", "description", is_needed=True)
    for name in ("prompt", "negative_prompt"):
        if not isinstance(row[name], str | None):
            raise ValueError(f"`{name}`={show(row[name])} must be a string.")
    if row["prompt"] is None:
        return format_prompt(*(row[name] for name in PROMPT_PARTS))
    check_forms(row, "prompt", "dialogue", "background_sound")
    return row["prompt"]


def check_sizes(models: Models, size: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Height, width and frames of each pipeline; what the second would refuse is found before the first runs."""
    if models.upscale is None:
        return [size]
    upscaled = upscaled_size(models.upscale.config, size[:2])
    models.upscale.latent_shapes(1, size[2], *upscaled)
    return [size, (*upscaled, size[2])]


class Store:
    """Where clips and records go: a folder or a URL of fsspec. A file is there whole or not at all."""

    def __init__(self, out: str) -> None:
        try:
            self.fs, self.root = fsspec.url_to_fs(out)
            self.fs.makedirs(self.path(".work"), exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise ValueError(f"`out`={show(out)} must be a folder or a URL that fsspec opens: {error}") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def size(self, name: str) -> int | None:
        return self.fs.size(self.path(name)) if self.fs.exists(self.path(name)) else None

    def read(self, name: str) -> bytes | None:
        return self.fs.cat_file(self.path(name)) if self.fs.exists(self.path(name)) else None

    def write(self, name: str, data: bytes | Record) -> None:
        if isinstance(data, dict):
            data = (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
        with self.writing(name) as path:
            path.write_bytes(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path for what gets its name at the end, or goes, even if its process is killed, when more is written."""
        work, path = self.path(".work") if self.is_local else tempfile.gettempdir(), self.path(name)
        with unfinished_folder(Path(work, os.path.basename(name))) as folder:
            yield (file := folder / os.path.basename(name))
            if not self.is_local:
                return self.fs.put_file(str(file), path)
            with open(file, "rb+") as opened:  # a machine that loses power must not keep the name alone
                os.fsync(opened.fileno())
            os.makedirs(os.path.dirname(path), exist_ok=True)
            move_into_place(file, Path(path))

    def remove(self, name: str) -> None:
        if self.fs.exists(self.path(name)):
            self.fs.rm(self.path(name), recursive=True)

    def lock(self) -> AbstractContextManager[Any]:
        """Has no second run write to a folder; at a URL it is not seen."""
        try:
            # Its file stays, as another run may have opened it.
            return FileLock(self.path(".lock")).acquire(timeout=0) if self.is_local else nullcontext()
        except Timeout as error:
            raise OSError(f"`out`={show(self.root)} is being written by another run.") from error

    def read_record(self, name: str) -> Record:
        """What a record holds, nothing if there is none, or if it is none."""
        try:
            record = json.loads(self.read(name) or b"{}")
        except (ValueError, RecursionError):
            record = {}
        return record if isinstance(record, dict) else {}

    def holds(self, name: str, record: Record) -> bool:
        """Whether a file is that of its record; at a URL by the size alone, as nothing is downloaded."""
        if "hash" not in record or self.size(name) != record.get("bytes"):
            return False
        return not self.is_local or digest_file(self.path(name)) == record.get("sha256")


def note_of(request: Request) -> str:
    """A file that holds the record before the clip is put in its place, and before that who has begun it."""
    return f".work/{request.id}.json"


def find_record(store: Store, request: Request) -> tuple[str, Record]:
    """How far a request is, and its record: `"done"`; `"changed"`, which has made another clip; `"foreign"`, for
    whose clip there is a file that no batch has made; or `"new"`."""
    clip, name = f"{request.id}.mp4", f"{request.id}.json"
    note, record = store.read_record(note_of(request)), store.read_record(name)
    if store.holds(clip, note):  # killed after the clip, before the record
        store.write(name, record := note)
        store.remove(note_of(request))
    if "hash" not in record:
        is_there = any(store.size(each) is not None for each in (clip, name))
        return "foreign" if is_there and "hash" not in note else "new", {}
    if record["hash"] != request.hash:
        return "changed", record
    return "done" if store.holds(clip, record) else "new", record


def load_pipes(arguments: Namespace, sizes: list[tuple[int, int, int]], *without: str) -> Pipes:
    """Loads what `arguments.model` and `arguments.upscale` name, at the revisions in `arguments.context`, for requests
    up to these sizes, `without` parts; what both have is loaded once. `ValueError` if they do not fit on the GPU."""
    parts: dict[str, Any] = dict.fromkeys(without)
    pipes: Pipes = []
    for name, (height, width, num_frames) in zip(("model", "upscale"), sizes, strict=False):
        model, revision = getattr(arguments, name), arguments.context[f"{name}_revision"]
        loaded = {"text_encoder"} & parts.keys()  # VAEs count, as what they decode does
        setting = choose_setting(arguments, model, num_frames, height, width, *loaded.union(without))
        pipe = load_pipeline(model, arguments, setting, revision=revision, **parts)  # which folders do not look at
        pipe.set_progress_bar_config(disable=True)
        if is_turbo(pipe):
            pipe.vae.enable_tiling()
        if setting.offload == "none":  # else the hooks of one would move the parts of the other
            shared = pipe.components.keys() - {"transformer", "scheduler"}
            parts |= {part: pipe.components[part] for part in shared}
        pipes.append(pipe)
    arguments.progress.begin(None)
    return pipes


def read_files(request: Request) -> dict[str, Any]:
    for name, (path, digest) in request.files.items():
        if digest_file(check_file(name, path)) != digest:
            raise ValueError(f"`{name}` is {show(path)}, which has changed since it was checked.")
    return {name: READERS[name](path) for name, (path, _) in request.files.items()}


def make_clip(pipes: Pipes, request: Request, path: Path, texts: Texts | None, report: Callback) -> Record:
    """Writes the clip of a request; `texts` go in place of its prompts. Returns what the record says of it."""
    files, facts = read_files(request), {}
    generator = torch.Generator(pipes[0]._execution_device).manual_seed(request.seed)

    def on_step_end(stage: str, pipe: Any, step: int, *_: Any) -> None:
        report(stage, step + 1, pipe.num_timesteps)

    def follow(frames: Iterable[Any]) -> Iterator[Any]:
        for count, frame in enumerate(frames, 1):
            facts.update(frames=count, height=frame.shape[0], width=frame.shape[1])
            yield frame
            report("decoding", count, request.sizes[0][2])

    inputs = request.call | files
    if texts is not None:
        inputs = {name: value for name, value in inputs.items() if name not in ("prompt", "negative_prompt")}
        inputs |= {f"{name}_embeds": value for name, value in texts.items()}
    for pipe, stage in zip(pipes, ("denoising", "upscaling"), strict=False):
        report(stage, 0, 1)
        kind = "latent" if pipe is not pipes[-1] else "stream" if is_turbo(pipe) else "np"
        common = {"generator": generator, "output_type": kind, "callback_on_step_end": partial(on_step_end, stage)}
        output = pipe(**inputs, **common)
        kept = inputs.keys() & {"prompt", "prompt_embeds", "max_sequence_length", *FILES}
        inputs = {name: inputs[name] for name in kept}
        inputs |= {"latents": output.frames} | ({} if "audio" in files else {"audio_latents": output.audio})
    audio = None if output.audio is None else output.audio[0]
    export_to_mp4(follow(output.frames[0]), path, audio, sampling_rate=pipe.audio_sampling_rate)
    return facts | {"audio_sampling_rate": None if audio is None else pipe.audio_sampling_rate}


def run_request(
    pipes: Pipes,
    request: Request,
    store: Store,
    context: Record,
    texts: Texts | None = None,
    callback: Callback = lambda *_: None,
) -> Record:
    """Makes the clip of a request and then its record, which it returns; see [`make_clip`]."""
    begun, digests = time.monotonic(), {name: digest for name, (_, digest) in request.files.items()}
    with store.writing(f"{request.id}.mp4") as clip:
        try:
            facts = make_clip(pipes, request, clip, texts, callback)
        except Exception:  # else what is offloaded would stay beside what comes next
            for pipe in pipes:
                pipe.maybe_free_model_hooks()
            raise
        record = {"id": request.id, "hash": request.hash, "seed": request.seed, **context, "versions": VERSIONS}
        record |= {"request": request.call | digests, **facts, "seconds": round(time.monotonic() - begun, 3)}
        record |= {"bytes": clip.stat().st_size, "sha256": digest_file(clip)}
        store.write(note_of(request), record)
    store.write(f"{request.id}.json", record)
    store.remove(note_of(request))
    return record


def make_options(arguments: Namespace, models: Models, sizes: list[tuple[int, int, int]]) -> Record:
    """What workers are told: among others the largest size of each pipeline, which must fit."""
    options = {"context": models.context, "sizes": sizes, "run": uuid4().hex}
    return options | {name: getattr(arguments, name) for name in OPTIONS}


def import_ray_pool(arguments: Namespace) -> ModuleType:
    """Imports Ray, which looks then at what makes the one that is started here listen on 127.0.0.1 alone."""
    if arguments.address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return import_heavy("ray_pool")


Load = Callable[[Namespace, Store], Callable[[Row], Record]]


class Worker:
    """Runs rows by what `load` returns for arguments of the command and a store: to a record, or, after the retries,
    to what the `error` was."""

    def __init__(self, load: Load, options: Record) -> None:
        self.arguments = Namespace(**options, at_exit=ExitStack())
        check_run(self.arguments)
        self.run = load(self.arguments, Store(self.arguments.out))

    def __call__(self, row: Row) -> Record:
        for attempt in range(self.arguments.retries + 1):
            try:
                return self.run(row)
            except Exception as error:
                failure = {"id": row[0], "error": describe(error), "attempts": attempt + 1}
                if isinstance(error, ValueError):  # which it would raise again
                    break
            free_memory()
        return failure


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # raises where nothing can run any more, which ends a worker
        torch.cuda.empty_cache()
