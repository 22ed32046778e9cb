# SPDX-License-Identifier: Apache-2.0
"""The console command `magihuman`."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from ..autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from ..conversion import VARIANTS
from ..loading import AUDIO_VAE, ORIGINAL, TEXT_ENCODER, VIDEO_VAE
from ..media import check_mp4_path, export_to_mp4, has_audio, load_images, load_videos, read_audio
from ..pipeline_base import FRAME_RATE, MagiHumanPipelineOutput
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from .convert import convert_checkpoint
from .embedded import embedded_model
from .hub import CARD_VARIANTS, make_model_card
from .plan import format_calls, format_plan, plan_call


DTYPES = ("float32", "bfloat16", "float16")


class OneLineParser(argparse.ArgumentParser):
    """Reports bad input in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_number(value: str) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} must be a positive number")
    return number


def device(value: str) -> torch.device:
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is not a device of torch, like 'cuda', 'mps' or 'cpu'") from error


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="magihuman", description="Video of a person speaking, with sound, from a prompt.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in (add_generate, add_upscale, add_convert, add_plan, add_card):
        add_command(commands)
    return parser


def add_generate(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    generate = commands.add_parser("generate", help="write an mp4 of what a prompt describes")
    add = generate.add_argument
    add("prompt", metavar="PROMPT", help="description, `Dialogue:` and `Background Sound:`")
    add("--model", metavar="DIR_OR_REPO", help="pipeline, a directory or on the Hub; default: the tiny one in here")
    add("--image", metavar="FILE", help="first frame")
    add("--audio", metavar="FILE", help="sound that drives the video")
    length = generate.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive_number, help="length; default: that of --audio, or the model's")
    length.add_argument("--num-frames", type=int, help=f"length in frames, {FRAME_RATE} a second")
    add_size(generate)
    add("--steps", type=int, help="default: 32, or 8 for a distilled model")
    add("--upscale", metavar="DIR_OR_REPO", help="super-resolution pipeline that the video goes through")
    add("--upscale-height", type=int, help="default: that of the model for --upscale")
    add("--upscale-width", type=int, help="default: that of the model for --upscale")
    add_run_options(generate)
    generate.set_defaults(run=run_generate)


def add_upscale(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    upscale = commands.add_parser("upscale", help="write an mp4 in high resolution")
    add = upscale.add_argument
    add("video", metavar="VIDEO", help=f"video in low resolution, {FRAME_RATE} frames a second")
    add("prompt", metavar="PROMPT", help="the prompt of the video")
    add("--model", required=True, metavar="DIR_OR_REPO", help="super-resolution pipeline")
    add("--image", metavar="FILE", help="first frame in high resolution")
    add("--audio", metavar="FILE", help="its sound; default: that of VIDEO, if it has any")
    add_size(upscale)
    add("--steps", type=int, default=5, help="default: %(default)s")
    add_run_options(upscale)
    upscale.set_defaults(run=run_upscale)


def add_size(command: argparse.ArgumentParser) -> None:
    for name in ("height", "width"):
        command.add_argument(f"--{name}", type=int, help="multiple of 32, default: that of the model")


def add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", default="out.mp4", metavar="FILE", help="default: %(default)s")
    command.add_argument("--seed", type=int, help="the same seed gives the same video")
    command.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on the cpu float32")


def add_convert(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    convert = commands.add_parser("convert", help="convert a published checkpoint to a Diffusers repository")
    add = convert.add_argument
    add("source", metavar="SOURCE", help="file, directory, or repository on the Hub, in any layout")
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
    convert.set_defaults(run=run_convert)


def add_plan(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    plan = commands.add_parser("plan", help="say what a video needs of a GPU's memory, and which settings make it fit")
    add = plan.add_argument
    add("--vram", type=positive_number, required=True, metavar="GIB", help="memory of the GPU")
    add_size(plan)
    add("--num-frames", type=int, help=f"length in frames, {FRAME_RATE} a second")
    add("--model", metavar="DIR_OR_REPO", help="pipeline; default: the published ones for the size")
    add("--upscale", metavar="DIR_OR_REPO", help="super-resolution pipeline that follows --model")
    add("--dtype", choices=DTYPES, default="bfloat16")
    plan.set_defaults(run=run_plan)


def add_card(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    card = commands.add_parser("card", help="write the model card of a published variant")
    card.add_argument("variant", choices=CARD_VARIANTS)
    card.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    card.set_defaults(run=run_card)


def run_generate(arguments: argparse.Namespace) -> None:
    # Whatever can be wrong with the files is found before gigabytes are loaded.
    check_mp4_path(arguments.output)
    image = None if arguments.image is None else load_images(arguments.image)
    audio = None if arguments.audio is None else read_audio(arguments.audio)
    num_frames = arguments.num_frames
    if arguments.seconds is not None:
        num_frames = round(arguments.seconds * FRAME_RATE) + 1
    if arguments.model is None:
        arguments.model = embedded_model()
        note = "no --model is given, so the package's tiny one draws heads that say ma, me, mi, mo and mu"
        print(f"magihuman: {note}", file=sys.stderr)
    index = check_pipeline("--model", arguments.model, MagiHumanAudioVideoPipeline)
    check_upscale(arguments, index)

    pipe = load_pipeline(arguments.model, arguments)
    generator = make_generator(pipe, arguments.seed)
    output = pipe(
        arguments.prompt,
        image=image,
        audio=audio,
        height=arguments.height,
        width=arguments.width,
        num_frames=num_frames,
        num_inference_steps=arguments.steps,
        generator=generator,
        output_type="latent" if arguments.upscale is not None else lean_output_type(pipe),
    )
    if arguments.upscale is not None:
        shared = {name: part for name, part in pipe.components.items() if name not in ("transformer", "scheduler")}
        del pipe  # makes room for the other transformer
        pipe = load_pipeline(arguments.upscale, arguments, **shared)
        output = pipe(
            arguments.prompt,
            image=image,
            latents=output.frames,
            audio_latents=output.audio,
            height=arguments.upscale_height,
            width=arguments.upscale_width,
            generator=generator,
            output_type=lean_output_type(pipe),
        )
    write_output(output, pipe, arguments.output)


def run_upscale(arguments: argparse.Namespace) -> None:
    check_mp4_path(arguments.output)
    video = load_videos(arguments.video, FRAME_RATE)
    image = None if arguments.image is None else load_images(arguments.image)
    source = arguments.audio or (arguments.video if has_audio(arguments.video) else None)
    audio = None if source is None else read_audio(source)
    check_pipeline("--model", arguments.model, MagiHumanLatentUpscalePipeline)

    pipe = load_pipeline(arguments.model, arguments)
    output = pipe(
        arguments.prompt,
        video=video,
        image=image,
        audio=audio,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        generator=make_generator(pipe, arguments.seed),
        output_type=lean_output_type(pipe),
    )
    write_output(output, pipe, arguments.output)


def run_convert(arguments: argparse.Namespace) -> None:
    path = convert_checkpoint(
        arguments.source,
        arguments.output,
        variant=arguments.variant,
        subfolder=arguments.subfolder,
        dtype=getattr(torch, arguments.dtype),
        max_shard_size=arguments.max_shard_size,
        text_encoder=arguments.with_text_encoder,
        video_vae=arguments.with_vaes,
        turbo_vae=arguments.turbo_vae if arguments.with_vaes else None,
        audio_vae=arguments.audio_vae if arguments.with_vaes else None,
        repo_id=arguments.push_to_hub,
    )
    print(path)
    if arguments.push_to_hub is not None:
        repo = HfApi().create_repo(arguments.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=arguments.push_to_hub, folder_path=path)
        print(repo)


def run_plan(arguments: argparse.Namespace) -> None:
    size = (arguments.height, arguments.width, arguments.num_frames)
    plans = plan_call(arguments.model, arguments.upscale, *size, getattr(torch, arguments.dtype))
    for plan in plans:
        print(format_plan(plan, arguments.vram), end="\n\n")
    print("\n".join(format_calls(plan, arguments.vram) for plan in plans))


def run_card(arguments: argparse.Namespace) -> None:
    card = make_model_card(arguments.variant)
    if arguments.output is None:
        print(card, end="")
    else:
        Path(arguments.output).write_text(card, encoding="utf-8")


def check_pipeline(option: str, model: str, pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    """Reads the index of a pipeline, before anything large is read or computed."""
    index = DiffusionPipeline.load_config(model)
    found = index["_class_name"]
    if found != pipeline_class.__name__:
        raise ValueError(f"{option} {model!r} holds a {found}, it must hold a {pipeline_class.__name__}.")
    return index


def check_upscale(arguments: argparse.Namespace, base: dict[str, Any]) -> None:
    """The second pipeline would refuse these too, but after the first has run."""
    index = {}
    if arguments.upscale is not None:
        index = check_pipeline("--upscale", arguments.upscale, MagiHumanLatentUpscalePipeline)
    for name in ("height", "width"):
        option, target = f"--upscale-{name}", getattr(arguments, f"upscale_{name}")
        if not index and target is not None:
            raise ValueError(f"{option} must come with --upscale.")
        target, source = target or index.get(f"default_{name}"), getattr(arguments, name) or base[f"default_{name}"]
        if index and (target < source or target % 32):
            raise ValueError(f"{option} is {target}, it must be a multiple of 32 and not below --{name}, {source}.")


def load_pipeline(model: str, arguments: argparse.Namespace, **components: Any) -> DiffusionPipeline:
    target = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("float32" if target.type == "cpu" else "bfloat16"))
    # Rounding its autoencoder is heard in the sound, and it is small.
    dtype = {"default": dtype, "audio_vae": torch.float32}
    return DiffusionPipeline.from_pretrained(model, dtype=dtype, **components).to(target)


def make_generator(pipe: DiffusionPipeline, seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator(pipe.device).manual_seed(seed)


def lean_output_type(pipe: DiffusionPipeline) -> str:
    """Has the light autoencoder decode in tiles and windows, which changes nothing but the memory."""
    if not isinstance(pipe.vae, AutoencoderKLMagiHumanTurbo):
        return "np"
    pipe.vae.enable_tiling()
    return "stream"


def write_output(output: MagiHumanPipelineOutput, pipe: DiffusionPipeline, path: str) -> None:
    audio = None if output.audio is None else output.audio[0]
    print(export_to_mp4(output.frames[0], path, audio=audio, sampling_rate=pipe.audio_sampling_rate))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 if it succeeds, 2 with one line on standard error for bad input."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"magihuman: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
