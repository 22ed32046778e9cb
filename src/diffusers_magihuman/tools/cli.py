# SPDX-License-Identifier: Apache-2.0
"""The console command `magihuman`."""

import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from ..autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from ..conversion import VARIANTS
from ..loading import AUDIO_VAE, ORIGINAL, TEXT_ENCODER, VIDEO_VAE
from ..media import check_mp4_path, export_to_mp4, has_audio, load_images, load_videos, read_audio
from ..pipeline_base import FRAME_RATE
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from .convert import convert_checkpoint
from .embedded import embedded_model
from .hub import CARD_VARIANTS, make_model_card
from .plan import format_calls, format_plan, plan_call

DTYPES = ("float32", "bfloat16", "float16")


class OneLineParser(ArgumentParser):
    """Reports bad input in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{value!r} must be a positive number")
    return number


def device(value: str) -> torch.device:
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ArgumentTypeError(f"{value!r} is not a device of torch, like 'cuda', 'mps' or 'cpu'") from error


def add_generate(command: ArgumentParser) -> None:
    add = command.add_argument
    add("prompt", metavar="PROMPT", help="description, `Dialogue:` and `Background Sound:`")
    add("--model", metavar="DIR_OR_REPO", help="pipeline, a directory or on the Hub; default: the tiny one in here")
    add("--image", metavar="FILE", help="first frame")
    add("--audio", metavar="FILE", help="audio that drives the video")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive_number, help="length; default: that of --audio, or the model's")
    length.add_argument("--num-frames", type=int, help=f"length in frames, {FRAME_RATE} a second")
    add_size(command)
    add("--steps", type=int, help="default: 32, or 8 for a distilled model")
    add("--upscale", metavar="DIR_OR_REPO", help="super-resolution pipeline that the video goes through")
    add("--upscale-height", type=int, help="default: that of the model for --upscale")
    add("--upscale-width", type=int, help="default: that of the model for --upscale")
    add_run_options(command)


def add_upscale(command: ArgumentParser) -> None:
    add = command.add_argument
    add("video", metavar="VIDEO", help=f"video in low resolution, {FRAME_RATE} frames a second")
    add("prompt", metavar="PROMPT", help="the prompt of the video")
    add("--model", required=True, metavar="DIR_OR_REPO", help="super-resolution pipeline")
    add("--image", metavar="FILE", help="first frame in high resolution")
    add("--audio", metavar="FILE", help="its audio; default: that of VIDEO, if it has any")
    add_size(command)
    add("--steps", type=int, default=5, help="default: %(default)s")
    add_run_options(command)


def add_size(command: ArgumentParser) -> None:
    for name in ("height", "width"):
        command.add_argument(f"--{name}", type=int, help="multiple of 32, default: that of the model")


def add_run_options(command: ArgumentParser) -> None:
    command.add_argument("-o", "--output", default="out.mp4", metavar="FILE", help="default: %(default)s")
    command.add_argument("--seed", type=int, help="the same seed gives the same video")
    command.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on the cpu float32")


def add_convert(command: ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SOURCE", help="file, directory, or repository on the Hub, in any published format")
    add("output", metavar="OUTPUT", help="directory to write; must not exist")
    add("--variant", choices=VARIANTS, help="default: guessed from SOURCE")
    add("--subfolder", help="directory or file within SOURCE; default: that of the variant")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--max-shard-size", default="5GB", help="default: %(default)s; bounds the memory too")
    part = {"metavar": "DIR_OR_REPO", "help": "default: %(default)s"}
    included = {"metavar": "DIR_OR_REPO", "nargs": "?", "help": "include it, by default from %(const)s"}
    add("--with-text-encoder", const=TEXT_ENCODER, **included)
    add("--with-vaes", const=VIDEO_VAE, **included)
    add("--turbo-vae", default=ORIGINAL, **part)
    add("--audio-vae", default=AUDIO_VAE, **part)
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the directory when it is complete")


def add_plan(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--vram", type=positive_number, required=True, metavar="GIB", help="memory of the GPU")
    add_size(command)
    add("--num-frames", type=int, help=f"length in frames, {FRAME_RATE} a second")
    add("--model", metavar="DIR_OR_REPO", help="pipeline; default: the published ones for the size")
    add("--upscale", metavar="DIR_OR_REPO", help="super-resolution pipeline that follows --model")
    add("--dtype", choices=DTYPES, default="bfloat16")


def add_card(command: ArgumentParser) -> None:
    command.add_argument("variant", choices=CARD_VARIANTS)
    command.add_argument("-o", "--output", metavar="FILE", help="default: standard output")


def run_generate(arguments: Namespace) -> None:
    # Whatever can be wrong with the files is found before gigabytes are loaded.
    check_mp4_path(arguments.output)
    image = None if arguments.image is None else load_images(arguments.image)
    audio = None if arguments.audio is None else read_audio(arguments.audio)
    if arguments.seconds is not None:
        arguments.num_frames = round(arguments.seconds * FRAME_RATE) + 1
    if arguments.model is None:
        arguments.model = embedded_model()
        note = "magihuman: no --model is given, so the package's tiny one draws heads that say ma, me, mi, mo and mu"
        print(note, file=sys.stderr)
    check_upscale(arguments, check_pipeline("--model", arguments.model, MagiHumanAudioVideoPipeline))

    pipe, generator = load_pipeline(arguments.model, arguments)
    inputs = {"image": image, "audio": audio, "num_inference_steps": arguments.steps, "generator": generator}
    inputs |= {"height": arguments.height, "width": arguments.width, "num_frames": arguments.num_frames}
    if arguments.upscale is not None:
        low = pipe(arguments.prompt, **inputs, output_type="latent")
        shared = {name: part for name, part in pipe.components.items() if name not in ("transformer", "scheduler")}
        del pipe  # makes room for the other transformer
        pipe, _ = load_pipeline(arguments.upscale, arguments, **shared)
        inputs = {"image": image, "latents": low.frames, "audio_latents": low.audio, "generator": generator}
        inputs |= {"height": arguments.upscale_height, "width": arguments.upscale_width}
    write_video(pipe, arguments, **inputs)


def run_upscale(arguments: Namespace) -> None:
    check_mp4_path(arguments.output)
    video = load_videos(arguments.video, FRAME_RATE)
    image = None if arguments.image is None else load_images(arguments.image)
    source = arguments.audio or (arguments.video if has_audio(arguments.video) else None)
    audio = None if source is None else read_audio(source)
    check_pipeline("--model", arguments.model, MagiHumanLatentUpscalePipeline)
    pipe, generator = load_pipeline(arguments.model, arguments)
    inputs = {"video": video, "image": image, "audio": audio, "num_inference_steps": arguments.steps}
    inputs |= {"height": arguments.height, "width": arguments.width, "generator": generator}
    write_video(pipe, arguments, **inputs)


def run_convert(arguments: Namespace) -> None:
    vaes = {"turbo_vae": arguments.turbo_vae, "audio_vae": arguments.audio_vae} if arguments.with_vaes else {}
    path = convert_checkpoint(
        arguments.source,
        arguments.output,
        variant=arguments.variant,
        subfolder=arguments.subfolder,
        dtype=getattr(torch, arguments.dtype),
        max_shard_size=arguments.max_shard_size,
        text_encoder=arguments.with_text_encoder,
        video_vae=arguments.with_vaes,
        repo_id=arguments.push_to_hub,
        **vaes,
    )
    print(path)
    if arguments.push_to_hub is not None:
        repo = HfApi().create_repo(arguments.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=arguments.push_to_hub, folder_path=path)
        print(repo)


def run_plan(arguments: Namespace) -> None:
    size = (arguments.height, arguments.width, arguments.num_frames)
    plans = plan_call(arguments.model, arguments.upscale, *size, getattr(torch, arguments.dtype))
    for plan in plans:
        print(format_plan(plan, arguments.vram), end="\n\n")
    print("\n".join(format_calls(plan, arguments.vram) for plan in plans))


def run_card(arguments: Namespace) -> None:
    card = make_model_card(arguments.variant)
    if arguments.output is None:
        print(card, end="")
    else:
        Path(arguments.output).write_text(card, encoding="utf-8")


def check_pipeline(option: str, model: str, pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    """Reads the index of a pipeline, before anything large is read or computed."""
    index = DiffusionPipeline.load_config(model)
    if (found := index["_class_name"]) != pipeline_class.__name__:
        raise ValueError(f"{option} {model!r} holds a {found}, it must hold a {pipeline_class.__name__}.")
    return index


def check_upscale(arguments: Namespace, base: dict[str, Any]) -> None:
    """The second pipeline would refuse these too, but after the first has run."""
    sizes = {name: getattr(arguments, f"upscale_{name}") for name in ("height", "width")}
    if arguments.upscale is None:
        if unused := [f"--upscale-{name}" for name, size in sizes.items() if size is not None]:
            raise ValueError(f"{' and '.join(unused)} must come with --upscale.")
        return
    index = check_pipeline("--upscale", arguments.upscale, MagiHumanLatentUpscalePipeline)
    for name, size in sizes.items():
        target = size or index[f"default_{name}"]
        source = getattr(arguments, name) or base.get(f"default_{name}", 0)
        if target < source or target % 32:
            limit = f"a multiple of 32 and not below --{name}, {source}"
            raise ValueError(f"--upscale-{name} is {target}, it must be {limit}.")


def load_pipeline(model: str, arguments: Namespace, **parts: Any) -> tuple[DiffusionPipeline, torch.Generator | None]:
    target = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("float32" if target.type == "cpu" else "bfloat16"))
    dtype = {"default": dtype, "audio_vae": torch.float32}  # rounding would be heard, and it is small
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype, **parts).to(target)
    return pipe, None if arguments.seed is None else torch.Generator(pipe.device).manual_seed(arguments.seed)


def write_video(pipe: DiffusionPipeline, arguments: Namespace, **inputs: Any) -> None:
    output_type = "np"
    if isinstance(pipe.vae, AutoencoderKLMagiHumanTurbo):
        # The light autoencoder decodes in tiles and windows, which changes nothing but the memory.
        pipe.vae.enable_tiling()
        output_type = "stream"
    output = pipe(arguments.prompt, **inputs, output_type=output_type)
    audio = None if output.audio is None else output.audio[0]
    print(export_to_mp4(output.frames[0], arguments.output, audio, sampling_rate=pipe.audio_sampling_rate))


COMMANDS = (
    ("generate", "write an mp4 of what a prompt describes", add_generate, run_generate),
    ("upscale", "write an mp4 in high resolution", add_upscale, run_upscale),
    ("convert", "convert a published checkpoint to a Diffusers repository", add_convert, run_convert),
    ("plan", "say what a video needs of a GPU's memory, and which settings make it fit", add_plan, run_plan),
    ("card", "write the model card of a published variant", add_card, run_card),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 if it succeeds, 2 with one line on standard error for bad input."""
    parser = OneLineParser(prog="magihuman", description="Video of a person speaking, with sound, from a prompt.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, add_arguments, run in COMMANDS:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"magihuman: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
