# SPDX-License-Identifier: Apache-2.0
"""The console command `magihuman`: light modules alone read what is asked, then the one that does it is imported."""

import gc
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from ipaddress import ip_address
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from ..constants import (
    CARD_VARIANTS,
    CONVERTED_VAES,
    FRAME_RATE,
    MAX_BATCH,
    MAX_FEED_FORWARD_MULTIPLE,
    MAX_FRAMES,
    MAX_PLANNED_FRAMES,
    MAX_SIZE,
    QUANTIZE_KINDS,
    QUANTIZERS,
    TEXT_ENCODER,
    VIDEO_VAE,
    spell_variant,
)
from ..files import check_file, check_mp4_path, reading, show
from ..prompts import format_prompt
from .embedded import TINY_NAMES, TINY_UPSCALE_NAMES, find_model, is_repository

DTYPES = ("float32", "bfloat16", "float16")
MAX_PROMPT_BYTES = 2**20
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # Windows has no last
OFFLOADS = ("none", "model", "block", "leaf", "auto")


def describe(error: BaseException) -> str:
    """An error in a line of at most 600 letters, with its class where the message alone says little."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-195:]}"


class OneLineParser(ArgumentParser):
    """Reports bad input in one line, without the usage, and says what may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        parsed, rest = super().parse_known_args(args, namespace)
        if rest and rest[0][:1] != "-" and getattr(parsed, "prompt", "") is None:
            parsed.prompt = rest.pop(0)  # argparse looks for what may be left out in one place alone
        if rest:  # that of a command knows its options, which the one of all commands does not
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        hint, near = "", []
        if match := re.match(r"unrecognized arguments: ([^\s=]*)", message):
            hint = "" if match[1].startswith("-") else "; a prompt of several words must be in quotes"
            near = get_close_matches(match[1], re.findall(r"--[\w-]+", self.format_help()), cutoff=0.7)
        elif match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = get_close_matches(match[1], re.findall(r"[\w:.-]+", match[2]))
        hint = f"; did you mean {near[0]}?" if near else hint
        self.exit(2, f"{self.prog}: error: {describe(ValueError(message))}{hint}\n")


def read_number(kind: type, low: float, high: float, value: str) -> float:
    with suppress(ValueError):
        if low <= (number := kind(value)) <= high:
            return number
    name = "an integer" if kind is int else "a number"
    raise ArgumentTypeError(f"{show(value)} must be {name} in {low} to {high}")


PIXELS, FRAMES, STEPS = (partial(read_number, int, 1, high) for high in (MAX_SIZE, MAX_FRAMES, MAX_BATCH))
SEED = partial(read_number, int, -(2**63), 2**64 - 1)


def read_line(value: str) -> tuple[str, ...]:
    if match := re.fullmatch(r"\s*([^:]+),([^,:]+):(.+)", value, re.DOTALL):
        return match.groups()
    raise ArgumentTypeError(f"{show(value)} must be 'WHO, LANGUAGE: LINE', in quotes")


def read_size(value: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", value, re.ASCII):
        return PIXELS(match[1]), PIXELS(match[2])
    raise ArgumentTypeError(f"{show(value)} must be WIDTHxHEIGHT, such as 448x256")


MODEL = {"metavar": "DIR_OR_REPO"}
TINY = "tiny or tiny-base, a directory or repository on the Hub; default: tiny"
TINY_UPSCALE = "tiny, a directory or repository of a super-resolution pipeline"


def add_prompt(command: ArgumentParser, prompt: str) -> None:
    add = command.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help=prompt)
    add("--prompt-file", metavar="FILE", help="in place of PROMPT; -: standard input")
    add("--dialogue", action="append", type=read_line, metavar="LINE", help="'WHO, LANGUAGE: LINE'; for each line")
    add("--background-sound", metavar="TEXT", help="what else is heard; default with --dialogue: nothing")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from, with guidance")
    add("--guidance-scale", type=partial(read_number, float, -1000, 1000), help="default: that of the model")


def add_generate(command: ArgumentParser) -> None:
    add = command.add_argument
    add_prompt(command, "description alone, or with `Dialogue:` and `Background Sound:`")
    add("--model", **MODEL, help=TINY)
    add("--num-videos", type=STEPS, default=1, metavar="N", help="of seeds that follow each other: out-1.mp4, ...")
    add("--image", metavar="FILE", help="first frame")
    add("--audio", metavar="FILE", help="audio that drives the video")
    length = command.add_mutually_exclusive_group()
    seconds = partial(read_number, float, 0.001, MAX_FRAMES / FRAME_RATE - 1)
    length.add_argument("--seconds", type=seconds, help="length; default: that of --audio, or the model's")
    length.add_argument("--num-frames", type=FRAMES, help=f"length in frames, {FRAME_RATE} a second")
    add_size(command)
    add("--steps", type=STEPS, help="default: 32, or 8 for a distilled model")
    add("--upscale", **MODEL, help=f"{TINY_UPSCALE}, that the video goes through")
    add("--upscale-height", type=PIXELS, help="default: that of the model for --upscale")
    add("--upscale-width", type=PIXELS, help="default: that of the model for --upscale")
    add_run_options(command)


def add_upscale(command: ArgumentParser) -> None:
    add = command.add_argument
    add("video", metavar="VIDEO", help=f"video in low resolution, {FRAME_RATE} frames a second")
    add_prompt(command, "the prompt of the video")
    add("--model", required=True, **MODEL, help=TINY_UPSCALE)
    add("--image", metavar="FILE", help="first frame in high resolution")
    add("--audio", metavar="FILE", help="its audio; default: that of VIDEO, if it has any")
    add_size(command)
    add("--steps", type=STEPS, default=5, help="default: %(default)s")
    add_run_options(command)


def add_size(command: ArgumentParser) -> None:
    for name in ("height", "width"):
        command.add_argument(f"--{name}", type=PIXELS, help="multiple of 32, default: that of the model")


def add_run_options(command: ArgumentParser) -> None:
    command.add_argument("-o", "--output", default="out.mp4", metavar="FILE", help="default: %(default)s")
    command.add_argument("--seed", type=SEED, help="the same seed gives the same video; default: any")
    add_device(command)


def add_device(command: ArgumentParser) -> None:
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on the cpu float32")
    offload = "on a GPU, where weights wait in RAM: the whole model's, blocks' or leaves'; auto: as fast as fits"
    command.add_argument("--offload", choices=OFFLOADS, default="none", help=offload)
    add_speed(command)


def add_speed(command: ArgumentParser) -> None:
    command.add_argument("--quantize", choices=QUANTIZERS, help="the transformer, by TorchAO; float8 needs a GPU")
    command.add_argument("--compile", action="store_true", help="the blocks of the transformer")
    command.add_argument("--attention", metavar="NAME", help="backend of Diffusers, such as _flash_3_hub")


def add_convert(command: ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SOURCE", help="file, directory, or repository on the Hub, in any published format")
    add("output", metavar="OUTPUT", help="directory, or file NAME.gguf, to write; must not exist")
    add("--variant", type=spell_variant, choices=CARD_VARIANTS[:-1], help="default: guessed from SOURCE")
    add("--subfolder", help="directory or file within SOURCE; default: that of the variant")
    add("--dtype", choices=DTYPES, help="of what is not quantised; default: bfloat16")
    add("--quantize", choices=QUANTIZE_KINDS, help="the blocks' linears; gguf: one file, the transformer alone")
    add("--max-shard-size", default="5GB", help="default: %(default)s; bounds the memory too")
    multiple = partial(read_number, int, 1, MAX_FEED_FORWARD_MULTIPLE)
    add("--feed-forward-multiple", type=multiple, metavar="N", help="pad feed-forwards to it; default: 128 if small")
    included = {"metavar": "DIR_OR_REPO", "nargs": "?", "help": "include it, by default from %(const)s"}
    add("--with-text-encoder", const=TEXT_ENCODER, **included)
    add("--with-vaes", const=VIDEO_VAE, **included)
    for part, default in CONVERTED_VAES.items():
        add(f"--{part.replace('_', '-')}", metavar="DIR_OR_REPO", help=f"with --with-vaes; default: {default}")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the directory when it is complete")


def add_plan(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--vram", type=partial(read_number, float, 0.001, 1e6), required=True, metavar="GIB", help="memory of the GPU")
    add_size(command)
    frames = partial(read_number, int, 1, MAX_PLANNED_FRAMES)
    add("--num-frames", type=frames, help=f"length in frames, {FRAME_RATE} a second")
    add("--model", **MODEL, help="as for generate; default: the published ones for the size")
    add("--upscale", **MODEL, help=f"{TINY_UPSCALE}, that follows --model")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add_speed(command)


def add_card(command: ArgumentParser) -> None:
    command.add_argument("variant", type=spell_variant, choices=CARD_VARIANTS)
    command.add_argument("-o", "--output", metavar="FILE", help="default: standard output")


def add_workers(command: ArgumentParser, help_text: str) -> None:
    command.add_argument("--workers", type=partial(read_number, int, 1, 10_000), metavar="N", help=help_text)
    gpus = partial(read_number, float, 0, 64)
    command.add_argument("--gpus-per-worker", type=gpus, metavar="G", help="default: 1, or 0 where there is none")


def add_batch(command: ArgumentParser) -> None:
    add = command.add_argument
    add("jobs", metavar="JOBS", help="JSON lines or parquet; a row has an `id`, a `prompt`, and arguments of the call")
    add("--out", required=True, metavar="DIR_OR_URL", help="where clips and records go, such as s3://bucket/folder")
    add("--model", **MODEL, help=TINY)
    add("--upscale", **MODEL, help=f"{TINY_UPSCALE}, that the videos go through")
    add_workers(command, "on Ray; default with --address: what there are GPUs for")
    add("--address", metavar="auto|URL", help="a Ray cluster; default with --workers: one that is started here")
    add("--retries", type=partial(read_number, int, 0, 100), default=1, metavar="N", help="default: %(default)s")
    add("--overwrite", action="store_true", help="make clips anew whose rows have changed")
    add("--skip-bad", action="store_true", help="run the good rows of a file that has bad ones")
    add_device(command)


def add_serve(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--out", default="served", metavar="DIR", help="where jobs and clips are kept; default: %(default)s")
    add("--model", **MODEL, help=TINY)
    add("--upscale", **MODEL, help=f"{TINY_UPSCALE}, that the videos go through")
    add("--host", default="127.0.0.1", help="address to listen at; default: %(default)s; others need --token-env")
    add("--port", type=partial(read_number, int, 0, 65535), default=8000, help="default: %(default)s; 0: any free one")
    add("--token-env", metavar="NAME", help="environment variable with the token that all must send")
    add("--max-queue", type=partial(read_number, int, 1, 10**5), default=100, metavar="N", help="default: %(default)s")
    add("--max-size", type=read_size, metavar="WxH", help="largest frame, before --upscale; default: the model's size")
    seconds = partial(read_number, float, 0.001, MAX_FRAMES / FRAME_RATE - 1)
    add("--max-seconds", type=seconds, default=10, metavar="S", help="of a clip; default: %(default)s")
    add("--keep-days", type=partial(read_number, float, 0, 1e6), default=1e6, metavar="D", help="default: for ever")
    add("--keep-gb", type=partial(read_number, float, 0, 1e9), default=1e9, metavar="GB", help="default: all clips")
    add_workers(command, "default: what there are GPUs for")
    add_device(command)
    command.set_defaults(retries=0, address=None)


def add_demo(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--model", **MODEL, help=TINY)
    add("--upscale", **MODEL, help=f"{TINY_UPSCALE}, that the video may go through")
    add("--host", default="127.0.0.1", help="address to listen at; default: %(default)s, this machine alone")
    add("--port", type=partial(read_number, int, 0, 65535), default=7860, help="default: %(default)s; 0: any free one")
    add("--share", action="store_true", help="also a public address of Gradio, for 72 hours")
    add_device(command)


# The last is the module that has `run_` and the name.
COMMANDS = (
    ("generate", "write an mp4 of what a prompt describes", add_generate, "generate"),
    ("upscale", "write an mp4 in high resolution", add_upscale, "generate"),
    ("batch", "write an mp4 of each row of a file, on one machine or many", add_batch, "batch"),
    ("serve", "make clips on request over HTTP", add_serve, "serve"),
    ("convert", "convert a published checkpoint to a Diffusers repository", add_convert, "convert"),
    ("plan", "say what a video needs of a GPU's memory, and which settings make it fit", add_plan, "plan"),
    ("demo", "open a page in the browser that does what generate does", add_demo, "demo"),
    ("card", "write the model card of a published variant", add_card, "hub"),
    ("info", "print versions, devices, memory and disk: what a report of a fault needs", lambda _: None, "info"),
)


def read_prompt(arguments: Namespace) -> str:
    """The prompt from the command line, a file or standard input, in three parts where options give the others."""
    prompt, file = arguments.prompt, arguments.prompt_file
    if (prompt is None) == (file is None):
        raise ValueError(f"{'A' if file is None else 'One'} prompt is needed, PROMPT or --prompt-file.")
    if file is not None:
        with sys.stdin.buffer if file == "-" else open(check_file("prompt-file", file), "rb") as opened:
            data = opened.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise ValueError(f"--prompt-file {show(file)} has more than {MAX_PROMPT_BYTES} bytes.")
        with reading(file, "is no text in UTF-8", ValueError, ValueError):
            prompt = data.decode("utf-8-sig").strip()
    if not prompt.strip():
        raise ValueError("The prompt is empty.")
    if arguments.dialogue is None and arguments.background_sound is None:
        return prompt
    return format_prompt(prompt, arguments.dialogue, arguments.background_sound)


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def check_serve(arguments: Namespace) -> None:
    """Also takes the token out of the environment, of which workers get a copy."""
    if missing := [name for name in ("ray", "fastapi", "uvicorn", "python_multipart") if find_spec(name) is None]:
        hint = 'in the clone, `pip install ".[scale]"` installs it'
        raise ValueError(f"The service needs {', '.join(missing)}; {hint}.")
    if "://" in arguments.out or not arguments.out:
        raise ValueError(f"--out {show(arguments.out)} must be a folder.")
    name = arguments.token_env
    arguments.token = None if name is None else os.environ.pop(name, "")
    if arguments.token is not None and not re.fullmatch("[!-~]+", arguments.token):
        raise ValueError(f"--token-env {show(name)} names no environment variable with a token of ASCII letters.")
    if arguments.token is None and not is_loopback(arguments.host):
        raise ValueError(f"--host {arguments.host} can be reached from elsewhere, which needs --token-env.")


def check_arguments(arguments: Namespace) -> None:
    """Finds what is wrong without PyTorch: prompts, files and models."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if arguments.command in ("generate", "upscale"):
        arguments.prompt = read_prompt(arguments)
        arguments.outputs, count = [arguments.output], given.get("num_videos", 1)
        if count > 1:
            root, suffix = os.path.splitext(arguments.output)
            arguments.outputs = [f"{root}-{number}{suffix}" for number in range(1, count + 1)]
            if existing := [output for output in arguments.outputs if os.path.lexists(output)]:
                raise ValueError(f"--output {existing[0]} exists; with --num-videos all files must be new.")
        for output in arguments.outputs:
            check_mp4_path(output)
        for name in {"video", "image", "audio"} & given.keys():
            check_file(name, given[name])
    if arguments.command == "serve":
        check_serve(arguments)
    if arguments.command == "batch":
        arguments.jobs, on_ray = check_file("jobs", arguments.jobs), {"workers", "address"} & given.keys()
        if not arguments.out:  # which would be the current folder
            raise ValueError("--out is empty, it must be a folder or a URL.")
        if on_ray and find_spec("ray") is None:
            raise ValueError("--workers and --address need Ray, which comes with the extra `scale`.")
        if "gpus_per_worker" in given and not on_ray:
            raise ValueError("--gpus-per-worker must come with --workers or --address.")
    if arguments.command == "convert":
        if not os.path.exists(source := arguments.source) and not is_repository(source):
            raise OSError(f"SOURCE {show(source)} is neither a path that exists nor a repository 'owner/name'.")
        if (unused := sorted(CONVERTED_VAES.keys() & given.keys())) and arguments.with_vaes is None:
            raise ValueError(f"--{unused[0].replace('_', '-')} must come with --with-vaes.")
    if arguments.command == "demo" and find_spec("gradio") is None:
        raise ValueError('The demo page needs Gradio; in the clone, `pip install ".[demo]"` installs it.')
    for name in {"model", "upscale"} & given.keys():
        names = TINY_UPSCALE_NAMES if "upscale" in (name, arguments.command) else TINY_NAMES
        setattr(arguments, name, find_model(f"--{name}", given[name], names))


@contextmanager
def quiet() -> Iterator[Callable[[], None]]:
    """Shows nothing of other libraries but errors: while they are imported, and once it is called, while they run."""
    with warnings.catch_warnings(), ExitStack() as restored:  # for those who call `main`
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        restored.callback(logging.disable, logging.NOTSET)

        def silence_libraries() -> None:
            logging.disable(logging.NOTSET)
            loggers = logging.root.manager.loggerDict.values()
            for handler in {logging.lastResort, *(x for each in loggers for x in getattr(each, "handlers", ()))}:
                restored.callback(handler.setLevel, handler.level)
                handler.setLevel(logging.ERROR)
            ours, handler = logging.getLogger(__package__.partition(".")[0]), logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("magihuman: %(message)s"))
            ours.addHandler(handler)
            restored.callback(ours.removeHandler, handler)
            for module in map(sys.modules.get, ("diffusers.utils.logging", "transformers.utils.logging")):
                if module is not None:
                    module.disable_progress_bar()
                    restored.callback(module.enable_progress_bar)

        yield silence_libraries


@contextmanager
def signals_handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Has a handler for signals that end the command, but for those that are ignored."""
    handlers = {}
    try:
        for number in SIGNALS:
            with suppress(ValueError):  # in another thread than the first
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not set by Python, nor restored
                    handlers[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in handlers.items():
            signal.signal(number, earlier)


def run_command(program: str, run: Callable[[], int | None], debug: bool = False) -> int:
    """Returns the status of what it runs, or, with a line on standard error, 2 for whatever is wrong, 130 after
    Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, which let it remove what is unfinished. `debug` prints where an error
    comes from."""
    received = []

    def interrupt(number: int, _: Any) -> NoReturn:
        received.append(number)  # libraries make other errors of what this raises
        raise KeyboardInterrupt

    try:
        with signals_handled(interrupt):
            return run() or 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        if received or isinstance(error, KeyboardInterrupt):
            print(f"{program}: interrupted", file=sys.stderr)
            return 128 + (received or [signal.SIGINT])[0]
        print(f"{program}: error: {describe(error)}", file=sys.stderr)
        return 2


def import_heavy(name: str) -> ModuleType:
    """Imports a module of this folder with PyTorch and Diffusers, for less processor time than they take alone."""
    name = f"{__package__}.{name}"
    if name in sys.modules:  # in a process of others, whose garbage would never be found
        return sys.modules[name]
    # Threads that wait for work would spin, for several times the time of the tiny model where the machine is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # What a signal raises in PyTorch's C++ code ends the process without a word, so signals wait for the import's end.
    waiting = []
    gc.disable()  # what is imported stays, so looking for garbage in it is in vain, now and later
    try:
        with signals_handled(lambda number, _: waiting.append(number)):
            return import_module(name)
    finally:
        gc.freeze()
        gc.enable()
        for number in waiting[:1]:
            signal.raise_signal(number)


def main(argv: list[str] | None = None) -> int:
    """The command `magihuman`; its status is that of [`run_command`]."""
    parser = OneLineParser(prog="magihuman", description="Video of a person speaking, with sound, from a prompt.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, add_arguments, module in COMMANDS:
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(module=module)
        add_arguments(command)
        command.add_argument("--verbose", action="store_true", help="show what other libraries say")
        command.add_argument("--debug", action="store_true", help="print where an error comes from")
    argv = sys.argv[1:] if argv is None else argv

    def parse_and_run() -> int | None:
        arguments = parser.parse_args(argv or ["--help"])
        check_arguments(arguments)
        silent = nullcontext(lambda: None) if arguments.verbose else quiet()
        with ExitStack() as arguments.at_exit, silent as silence_libraries:
            arguments.at_exit.callback(sys.stdout.flush)  # where what is printed goes may be full, or gone
            module = import_heavy(arguments.module)
            silence_libraries()
            return getattr(module, f"run_{arguments.command}")(arguments)

    return run_command("magihuman", parse_and_run, "--debug" in argv)


def run_process() -> NoReturn:
    """Runs the command as a process of its own, which ends at once, without taking a million objects apart first."""
    os._exit(main())
