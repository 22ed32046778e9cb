# SPDX-License-Identifier: Apache-2.0
"""The commands `magihuman generate` and `magihuman upscale`."""

import gc
import math
import os
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.models.attention_dispatch import attention_backend
from tqdm import tqdm

from ..autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from ..checks import show
from ..constants import FRAME_RATE
from ..media import export_to_mp4, has_audio, load_images, load_videos, read_audio
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline, default_size
from ..transformer_magihuman import MagiHumanTransformer3DModel
from .cli import describe
from .embedded import describe_line, embedded_model
from .plan import (
    GIB,
    RESERVED_GIB,
    Setting,
    check_speed,
    choose,
    configured_pipeline,
    load_index,
    make_calls,
    plan_pipeline,
)
from .quantize import quantize_linears, torchao_config


def find_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:  # by use: each kind of device that is not there fails in its own way, in some only then
        torch.ones(1, device=name).item()
    except Exception as error:
        raise ValueError(f"--device {show(name)} is no device here: {describe(error).split('. ')[0]}.") from error
    return torch.device(name)


class Progress:
    """On a terminal one bar at a time, with the stage and how long it will take yet."""

    bar: tqdm | None = None
    seen = (0, 0, 0)  # frames of the last video, their height and width

    def begin(self, stage: str | None, total: int = 1) -> tqdm | None:
        """Ends the stage before, and shows that another one began, if any."""
        if self.bar is not None:
            self.bar.close()
        if stage is not None:
            form = "{desc} {percentage:3.0f}% |{bar}| {remaining} left"
            self.bar = tqdm(desc=stage, total=total, bar_format=form, leave=False, disable=None, dynamic_ncols=True)
        return self.bar

    @contextmanager
    def denoise(self, stage: str, following: str | None, total: int) -> Iterator[tqdm]:
        """In place of the bar of a pipeline, which encodes the text before it and decodes afterwards."""
        yield self.begin(stage, total)
        self.begin(following)

    def follow(self, stage: str, frames: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
        bar = self.begin(stage, total)
        for index, frame in enumerate(frames, 1):
            self.seen = (index, *frame.shape[:2])
            yield frame
            bar.update()


def run_generate(arguments: Namespace) -> None:
    # Whatever can be wrong with the files is found before gigabytes are loaded.
    check_run(arguments)
    image = None if arguments.image is None else load_images(arguments.image)
    audio = None if arguments.audio is None else read_audio(arguments.audio)
    if arguments.seconds is not None:
        arguments.num_frames = frames_in(arguments.seconds)
    if arguments.model is None:
        arguments.model = embedded_model()
        note = "no --model is given, so the package's tiny one draws people who say a few words of seven languages"
        print(f"magihuman: {note}", file=sys.stderr)
    if note := describe_line(arguments.model, arguments.prompt):
        print(f"magihuman: {note}", file=sys.stderr)
    base = load_index(arguments.model, [MagiHumanAudioVideoPipeline], "--model")
    upscale = check_upscale(arguments, base)
    size = [getattr(arguments, name) or base[f"default_{name}"] for name in ("height", "width")]
    num_frames = arguments.num_frames or base["default_num_frames"]
    if audio is not None and arguments.num_frames is None:
        num_frames = frames_of(audio)
    settings = [choose_setting(arguments, arguments.model, num_frames, *size)]
    if arguments.upscale is not None:
        wanted = arguments.upscale_height, arguments.upscale_width
        settings += [choose_setting(arguments, arguments.upscale, num_frames, *upscaled_size(upscale, size, *wanted))]

    pipe = load_pipeline(arguments.model, arguments, settings[0])
    generators = make_generators(pipe, arguments)
    inputs = {"image": image, "audio": audio, "num_inference_steps": arguments.steps} | guidance_options(arguments)
    inputs |= {"height": arguments.height, "width": arguments.width, "num_frames": arguments.num_frames}
    calls = [inputs | {"generator": generator} for generator in generators]
    if arguments.upscale is not None:
        lows = [run_pipeline(pipe, arguments, index, **call, output_type="latent") for index, call in enumerate(calls)]
        # Parts that are offloaded in groups cannot be again.
        changed = ("transformer", "scheduler") if settings[0].offload in ("none", "model") else pipe.components
        shared = {name: part for name, part in pipe.components.items() if name not in changed}
        del pipe  # makes room for the other transformer
        gc.collect()  # hooks refer to their models in circles
        pipe = load_pipeline(arguments.upscale, arguments, settings[1], **shared)
        inputs = {"image": image, "audio": audio, "height": wanted[0], "width": wanted[1]}
        calls = [
            inputs | {"generator": generator, "latents": low.frames} | ({} if audio else {"audio_latents": low.audio})
            for generator, low in zip(generators, lows, strict=True)
        ]
    write_videos(pipe, arguments, calls, num_frames)


def frames_in(seconds: float) -> int:
    return round(seconds * FRAME_RATE) + 1


def frames_of(audio: tuple[torch.Tensor, int]) -> int:
    """The length, or one frame more, that audio sets, to plan by."""
    return math.ceil(audio[0].shape[-1] / audio[1] * FRAME_RATE)


def run_upscale(arguments: Namespace) -> None:
    check_run(arguments)
    index = load_index(arguments.model, [MagiHumanLatentUpscalePipeline], "--model")
    video = load_videos(arguments.video, FRAME_RATE)
    image = None if arguments.image is None else load_images(arguments.image)
    source = arguments.audio or (arguments.video if has_audio(arguments.video) else None)
    audio = None if source is None else read_audio(source)
    size = upscaled_size(index, video[0].shape[2:], arguments.height, arguments.width)
    setting = choose_setting(arguments, arguments.model, len(video[0]), *size)
    pipe = load_pipeline(arguments.model, arguments, setting)
    (generator,) = make_generators(pipe, arguments)
    inputs = {"video": video, "image": image, "audio": audio, "num_inference_steps": arguments.steps}
    inputs |= {"height": arguments.height, "width": arguments.width, "generator": generator}
    write_videos(pipe, arguments, [inputs | guidance_options(arguments)], len(video[0]))


def guidance_options(arguments: Namespace) -> dict[str, Any]:
    """What is given of the guidance; the pipelines have defaults of their own."""
    options = {"guidance_scale": arguments.guidance_scale, "negative_prompt": arguments.negative_prompt}
    return {name: value for name, value in options.items() if value is not None}


def check_run(arguments: Namespace) -> None:
    """Checks how videos are computed."""
    arguments.device = find_device(arguments.device)
    is_cpu = arguments.device.type == "cpu"
    arguments.dtype = arguments.dtype or ("float32" if is_cpu else "bfloat16")
    if is_cpu and arguments.dtype == "float16":
        raise ValueError("--dtype float16 is many times slower than float32 on a cpu; float32 or bfloat16 is allowed.")
    if arguments.offload != "none" and arguments.device.type != "cuda":
        raise ValueError(f"--offload {arguments.offload} needs a cuda device; on {arguments.device} it must be none.")
    arguments.speed = check_speed(arguments.quantize, arguments.compile, arguments.attention)
    arguments.progress, arguments.begun = Progress(), time.monotonic()
    arguments.at_exit.callback(arguments.progress.begin, None)


def upscaled_size(index: dict[str, Any], source: Sequence[int], *wanted: int | None) -> tuple[int, int]:
    return default_size(tuple(source), (index["default_height"], index["default_width"]), *wanted)


def check_transformer(arguments: Namespace, model: str) -> None:
    """What is asked of the transformer must run on the device, which is found by use of a small one."""
    quantize, _, attention = arguments.speed
    if quantize is None and attention is None:
        return
    config = MagiHumanTransformer3DModel.load_config(model, subfolder="transformer")
    if quantize is not None and config.get("quantization_config"):
        raise ValueError(f"--quantize {quantize}, but the transformer of {show(model)} is quantised already.")
    small = dict.fromkeys(("in_channels", "audio_in_channels", "text_in_channels", "num_attention_heads"), 4)
    small |= {"attention_head_dim": config.get("attention_head_dim", 128), "num_key_value_heads": 2, "num_layers": 1}
    small |= {"modality_layers": (), "gelu_layers": ()}
    try:
        with torch.device(arguments.device), torch.no_grad():
            transformer = MagiHumanTransformer3DModel(**small)
            transformer.transformer_blocks.to(getattr(torch, arguments.dtype))
            if quantize is not None:
                quantize_linears(transformer.transformer_blocks, quantize)
            # `set_attention_backend` would leave it to other models.
            with nullcontext() if attention is None else attention_backend(attention):
                transformer(torch.ones(1, 4, 1, 2, 2), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    except Exception as error:
        asked = (
            f"--quantize {quantize}" * (quantize is not None),
            f"--attention {attention}" * (attention is not None),
        )
        where = f"on {arguments.device} in {arguments.dtype}"
        raise ValueError(f"{' '.join(filter(None, asked))} does not run {where}: {describe(error)}") from error


def choose_setting(
    arguments: Namespace, model: str, num_frames: int, height: int, width: int, *without: str
) -> Setting:
    """How a pipeline runs, `without` parts of it: on a GPU the fastest way that `--offload` allows and that fits into
    what is free there."""
    check_transformer(arguments, model)
    if arguments.device.type != "cuda":
        return Setting("none")
    vram, ram = torch.cuda.mem_get_info(arguments.device)[0] / GIB, psutil.virtual_memory().available / GIB
    return fit(arguments, model, (height, width, num_frames), vram, ram, *without)


def fit(
    arguments: Namespace, model: str, size: tuple[int, int, int], vram: float, ram: float, *without: str
) -> Setting:
    """What fits into so many GiB, of a GPU and of RAM; `ValueError` says what would."""
    pipe = configured_pipeline(model, getattr(torch, arguments.dtype))
    pipe.register_modules(**dict.fromkeys(without))
    plan = plan_pipeline(model, pipe, *size, arguments.speed, stored=False)
    setting = choose(plan, vram, ram, arguments.offload)
    if arguments.offload == "auto":
        needed = f"{max(plan.needs[setting].values()) / GIB + RESERVED_GIB:.1f} of {vram:.1f} GiB"
        print(f"magihuman: --offload auto takes {setting.name} for {model}, {needed}", file=sys.stderr)
    return setting


def check_upscale(arguments: Namespace, base: dict[str, Any]) -> dict[str, Any] | None:
    """What the second pipeline would refuse too, but after the first has run; returns its index."""
    sizes = {name: getattr(arguments, f"upscale_{name}") for name in ("height", "width")}
    if arguments.upscale is None:
        if unused := [f"--upscale-{name}" for name, size in sizes.items() if size is not None]:
            raise ValueError(f"{' and '.join(unused)} must come with --upscale.")
        return None
    index = load_index(arguments.upscale, [MagiHumanLatentUpscalePipeline], "--upscale")
    for name, size in sizes.items():  # one that is not given follows from the source
        source = getattr(arguments, name) or base[f"default_{name}"]
        if size is not None and (size < source or size % 32):
            limit = f"a multiple of 32 and not below --{name}, {source}"
            raise ValueError(f"--upscale-{name} is {size}, it must be {limit}.")
    return index


def load_pipeline(model: str, arguments: Namespace, setting: Setting, **parts: Any) -> DiffusionPipeline:
    arguments.progress.begin("loading")
    # Rounding the audio autoencoder would be heard, and it is small.
    dtype = {"default": getattr(torch, arguments.dtype), "audio_vae": torch.float32}
    config = None
    if (kind := arguments.speed.quantize) is not None:
        config = PipelineQuantizationConfig(quant_mapping={"transformer": torchao_config(kind)})
    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype, quantization_config=config, **parts)
    except MemoryError:
        raise
    except Exception as error:
        names = [name for name, value in load_index(model).items() if isinstance(value, list) and name not in parts]
        broken = names.copy()
        for name in names:
            with suppress(Exception):  # this part alone
                DiffusionPipeline.from_pretrained(model, dtype=dtype, **dict.fromkeys({*names, *parts} - {name}))
                broken.remove(name)
        fault = f"parts {broken}" if 0 < len(broken) < len(names) else "settings"
        raise OSError(f"{model!r} could not be loaded, its {fault}: {describe(error)}") from error
    for call in make_calls(setting, arguments.speed, dtype["default"], str(arguments.device), pipe.vae is not None):
        call.run(pipe)
    return pipe


def make_generators(pipe: DiffusionPipeline, arguments: Namespace) -> list[torch.Generator]:
    """One of each video, of seeds that follow each other; the first is drawn where none is given, and told."""
    first = secrets.randbits(32) if arguments.seed is None else arguments.seed
    arguments.seeds = [first, *((first + index) % 2**64 for index in range(1, len(arguments.outputs)))]
    device = pipe._execution_device  # the pipelines' own way to ask, where weights are offloaded too
    return [torch.Generator(device).manual_seed(seed) for seed in arguments.seeds]


def is_turbo(pipe: DiffusionPipeline) -> bool:
    """Whether the light autoencoder decodes, which can in tiles, and in windows as frames are consumed."""
    return isinstance(pipe.vae, AutoencoderKLMagiHumanTurbo)


def run_pipeline(pipe: DiffusionPipeline, arguments: Namespace, index: int, **inputs: Any) -> Any:
    """A call of a pipeline for the video of that index, the stages of which are shown."""
    count = len(arguments.outputs)
    stage = "upscaling" if isinstance(pipe, MagiHumanLatentUpscalePipeline) else "denoising"
    arguments.progress.begin("encoding text")
    following = None if inputs["output_type"] == "latent" else "decoding"
    stage += f" {index + 1} of {count}" * (count > 1)
    pipe.progress_bar = partial(arguments.progress.denoise, stage, following)
    return pipe(arguments.prompt, **inputs)


def write_videos(pipe: DiffusionPipeline, arguments: Namespace, calls: list[dict[str, Any]], num_frames: int) -> None:
    """Makes a video of each call, of about so many frames, and prints a line when it is written."""
    if is_turbo(pipe):
        pipe.vae.enable_tiling()  # as windows, it changes nothing but the memory
    output_type = "stream" if is_turbo(pipe) else "np"
    for index, (inputs, path) in enumerate(zip(calls, arguments.outputs, strict=True)):
        output = run_pipeline(pipe, arguments, index, **inputs, output_type=output_type)
        audio = None if output.audio is None else output.audio[0]
        frames = arguments.progress.follow("decoding and writing", output.frames[0], num_frames)
        export_to_mp4(frames, path, audio, sampling_rate=pipe.audio_sampling_rate)
        arguments.progress.begin(None)
        (count, height, width), size = arguments.progress.seen, os.path.getsize(path) / 1e3
        length, now = f"{count} frames of {count / FRAME_RATE:.1f} s, {size:,.0f} kB", time.monotonic()
        seconds = f"seed {arguments.seeds[index]}, in {now - arguments.begun:.0f} s"
        print(f"{path}: {width}x{height}, {length}, {seconds}", flush=True)
        arguments.begun = now
