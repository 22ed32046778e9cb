# SPDX-License-Identifier: Apache-2.0
"""The page of `magihuman demo`: a prompt, a portrait and a voice become a clip, with a preview while it is made.

[`Studio`] makes clips and knows nothing of pages; [`build_page`] is what is seen of it.
"""

import gc
import html
import math
import os
import queue
import random
import re
import tempfile
import threading
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import PIL.Image
import psutil
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from ..checks import check_choice, check_integer, show
from ..constants import FRAME_RATE, MAX_BATCH
from ..media import export_to_mp4, load_images, read_audio
from ..pipeline_base import latent_statistics
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from ..prompts import format_prompt
from .cli import PIXELS, SEED, describe, read_line, read_number
from .embedded import EMBEDDED_MODELS, TINY_NAMES, describe_line, embedded_model
from .generate import check_run, check_transformer, frames_in, frames_of, is_turbo, load_pipeline, upscaled_size
from .plan import GIB, MemoryPlan, Setting, Speed, choose, configured_pipeline, load_index, make_calls, plan_pipeline

logger = logging.get_logger(__name__)

TINY = {name: embedded_model(variant) for name, variant in TINY_NAMES.items()}
READERS, READING = {"image": load_images, "audio": read_audio}, threading.Lock()
MAX_SECONDS = 120  # of a clip
SECONDS = partial(read_number, float, 1 / FRAME_RATE, MAX_SECONDS)
# Of the package's own models on a CPU, which then need below 1 GiB, a plan would take longer than the clip.
UNPLANNED_PIXELS = 256 * 448 * 126
EXAMPLES = {  # name: description, dialogue; what the tiny models know
    "Example: deep voice": (
        "A man with brown skin, short black hair and no glasses, in a green jumper, in front of a blue wall.",
        "The man in a deep voice, English: hello, one, two",
    ),
    "Example: high voice": (
        "A woman with pale skin, long red hair and glasses, in a blue top, in front of a yellow wall.",
        "The woman in a high voice, French: bonjour, merci",
    ),
}
KNOWN = "The tiny models know nine words of each of seven languages, such as hello, merci, danke and 谢谢."
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # no request to anybody else
CSS = """
.gradio-container { max-width: 1320px !important; width: 100%; margin: 0 auto !important }
main { padding: 16px 0 32px !important }
#title h1 { font-size: 1.5rem; margin: 0 } #title p { opacity: 0.75; margin: 0 0 4px }
#preview img { width: 100%; height: 100%; object-fit: contain }
#status { min-height: 4rem } #status .generating { display: none }
#status p { margin: 0 0 6px; overflow-wrap: anywhere }
#status div:has(> i) { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden }
#status i { display: block; height: 100%; background: var(--color-accent) }
#status [role=alert] { border-left: 3px solid #dc2626; padding: 8px 12px; background: #dc262614 }
"""


class Ask(NamedTuple):
    """What a page asks for: the name of a model, the arguments of `format_prompt`, paths and numbers by the names of
    the call's arguments."""

    model: str
    prompt: tuple[str, list[tuple[str, ...]] | None, str | None]
    files: dict[str, str]
    numbers: dict[str, int]
    seed: int
    upscale: bool


class News(NamedTuple):
    """What a page is told: words, the part that is done, an estimate of a frame; at the end the Python of the clip."""

    text: str
    done: float = 0.0
    preview: PIL.Image.Image | None = None
    code: str | None = None


Report = Callable[[News], None]


class Cancelled(Exception):
    pass


def read_text(name: str, read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text.strip())
    except ArgumentTypeError as error:
        raise ValueError(f"`{name}`={error}.") from error


def read_ask(
    model: str,
    description: str,
    dialogue: str,
    background_sound: str,
    image: str | None,
    audio: str | None,
    size: str | None,
    seconds: str,
    steps: int | None,
    seed: str,
    upscale: bool,
) -> Ask:
    """The values of a page, checked as far as no model is needed. Without `seconds` the audio, or the model, sets the
    length; without `steps` the model sets them; without `seed` it is a new one. `ValueError` names what is wrong."""
    width, by, height = (size or "").partition("x")  # none if it was emptied
    if not by:
        raise ValueError(f"`size`={show(size)} must be width x height in pixels, such as 448 x 256.")
    numbers = {"height": read_text("height", PIXELS, height), "width": read_text("width", PIXELS, width)}
    if seconds.strip():
        numbers["num_frames"] = frames_in(read_text("seconds", SECONDS, seconds))
    if steps is not None:
        numbers["num_inference_steps"] = check_integer("steps", steps, 1, MAX_BATCH)
    spoken = (read_text("dialogue", read_line, line) for line in dialogue.splitlines() if line.strip())
    lines = [tuple(map(str.strip, parts)) for parts in spoken]
    prompt = description, lines or None, background_sound.strip() or None
    format_prompt(*prompt)
    files = {name: path for name, path in (("image", image), ("audio", audio)) if path is not None}
    seed = read_text("seed", SEED, seed) if seed.strip() else random.randrange(2**32)
    return Ask(model, prompt, files, numbers, seed, upscale)


def read_file(name: str, path: str) -> Any:
    """What the package's reader makes of an upload; errors know its name, not where it lies."""
    try:
        with READING:  # one at a time, as one may take a gigabyte
            return READERS[name](path)
    except (OSError, ValueError) as error:
        message = str(error).replace(path, Path(path).name).split(": ffmpeg ended")[0]
        raise ValueError(message) from error


def decode_preview(pipe: DiffusionPipeline, latents: Tensor) -> PIL.Image.Image:
    """The middle frame of clean latents, decoded alone."""
    frame = latents[:1, :, latents.shape[2] // 2, None]
    if not is_turbo(pipe):
        return pipe.decode_latents(frame, "pil")[0][0]
    mean, inverse_std = latent_statistics(pipe.vae, frame.device)  # without the window that it would be padded to
    pixels = pipe.vae.decoder((frame / inverse_std + mean).to(pipe.vae.dtype), is_first_chunk=True)
    return pipe.video_processor.postprocess_video(pixels.float(), "pil")[0][0]


def call_pipeline(pipe: DiffusionPipeline, report: Report, has_preview: bool, **inputs: Any) -> Any:
    """A call that reports its steps, with previews that take an eighth of its time."""
    seen, started, spent = [], time.monotonic(), 0.0

    def on_step_end(pipe: DiffusionPipeline, step: int, timestep: Tensor, _: dict) -> dict:
        nonlocal spent
        (latents, velocity), *_ = seen  # with guidance the branch of the prompt comes first
        seen.clear()
        preview, now = None, time.monotonic()
        if has_preview and spent <= (now - started) / 8:
            sigma = float(timestep) / pipe.scheduler.config.num_train_timesteps
            preview = decode_preview(pipe, latents - sigma * velocity)
            spent += time.monotonic() - now
        done, total = step + 1, pipe.num_timesteps
        left = (time.monotonic() - started) / done * (total - done)
        report(News(f"Step {done} of {total}, about {left:.0f} s left", done / total, preview))
        return {}

    hook = pipe.transformer.register_forward_hook(lambda _, given, made: seen.append((given[0], made[0])))
    try:
        return pipe(**inputs, callback_on_step_end=on_step_end)
    except Exception:
        pipe.maybe_free_model_hooks()
        raise
    finally:
        hook.remove()


@lru_cache(maxsize=32)
def plan_of(model: str, dtype: str, speed: Speed, *size: int) -> MemoryPlan:
    pipe = configured_pipeline(model, getattr(torch, dtype))
    return plan_pipeline(Path(model).name, pipe, *size, speed, stored=False)


class Studio:
    """The models that pages choose from, those of them in memory, and what makes clips by them, one at a time.

    `arguments` are those of the command; `ValueError` or `OSError` says what is wrong before anything is loaded."""

    def __init__(self, arguments: Namespace) -> None:
        check_run(arguments)
        self.arguments, self.lock, self.loaded = arguments, threading.Lock(), {}
        self.jobs: dict[str, threading.Event] = {}  # by page
        names = {path: name for name, path in TINY.items()}
        own = arguments.model or TINY["tiny"]
        name = names.get(own, Path(own).absolute().name)
        self.models = {name: own} | TINY | {name: own}  # the first, whatever it is called
        self.upscale = arguments.upscale
        allowed = [MagiHumanAudioVideoPipeline]
        self.indices = {name: load_index(path, allowed, "--model") for name, path in self.models.items()}
        if self.upscale is not None:
            self.upscale_index = load_index(self.upscale, [MagiHumanLatentUpscalePipeline], "--upscale")
        for path in filter(None, (own, self.upscale)):
            check_transformer(arguments, path)

    def find_stages(self, ask: Ask, given: dict[str, Any]) -> list[tuple[str, int, int, int]]:
        """The paths of the pipelines of a clip, with height, width and frames."""
        size = ask.numbers["height"], ask.numbers["width"]
        num_frames = self.indices[ask.model]["default_num_frames"]
        if "audio" in given:
            num_frames = frames_of(given["audio"])
            if "num_frames" not in ask.numbers and num_frames > MAX_SECONDS * FRAME_RATE:
                raise ValueError(f"`audio` lasts more than {MAX_SECONDS} seconds; `seconds` may cut it.")
        num_frames = ask.numbers.get("num_frames", num_frames)
        stages = [(self.models[ask.model], *size, num_frames)]
        if ask.upscale and self.upscale is not None:
            stages.append((self.upscale, *upscaled_size(self.upscale_index, size, None, None), num_frames))
        return stages

    def measure_room(self, *models: str) -> tuple[float, float]:
        """GiB that a call may take on the device, and in RAM, with what these models take of both."""
        device, taken = self.arguments.device, {"cpu": 0, self.arguments.device.type: 0}
        parts = [part for name in models if name in self.loaded for part in self.loaded[name][1].components.values()]
        for tensor in (t for part in parts if isinstance(part, nn.Module) for t in part.state_dict().values()):
            taken[tensor.device.type] += tensor.nbytes
        ram = (psutil.virtual_memory().available + taken["cpu"]) / GIB
        if device.type != "cuda":
            return ram, 0.0  # nothing is offloaded
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached + taken["cuda"]) / GIB, ram

    def choose(self, model: str, size: tuple[int, ...], *others: str) -> Setting:
        """How a model runs; `ValueError` if it does not fit, even when the others are gone."""
        is_small = model in map(embedded_model, EMBEDDED_MODELS) and math.prod(size) <= UNPLANNED_PIXELS
        if is_small and self.arguments.device.type == "cpu":
            return Setting("none")
        plan = plan_of(model, self.arguments.dtype, self.arguments.speed, *size)
        if self.arguments.device.type != "cuda":
            plan = plan._replace(needs={key: needs for key, needs in plan.needs.items() if key.offload == "none"})
        return choose(plan, *self.measure_room(model, *others), self.arguments.offload)

    def load(self, model: str, size: tuple[int, ...]) -> tuple[Setting, DiffusionPipeline]:
        """A pipeline in the setting that fits; others go if there is no room beside them."""
        try:
            setting = self.choose(model, size)
        except ValueError:
            self.drop(*self.loaded.keys() - {model})
            setting = self.choose(model, size)
        if model not in self.loaded or self.loaded[model][0] != setting:
            self.drop(model)
            pipe = load_pipeline(model, self.arguments, setting)
            self.arguments.progress.begin(None)
            pipe.set_progress_bar_config(disable=True)
            if is_turbo(pipe):
                pipe.vae.enable_tiling()  # which changes nothing but the memory
            self.loaded[model] = setting, pipe
        return self.loaded[model]

    def drop(self, *models: str) -> None:
        for model in models:
            self.loaded.pop(model, None)
        gc.collect()  # hooks refer to their models in circles
        torch.cuda.empty_cache()

    def make_clip(self, ask: Ask, output: str, report: Report) -> None:
        """Makes a clip and writes it; bad files and lack of memory are found before anything is loaded."""
        report(News("Checking the files and the memory"))
        check_choice("model", ask.model, *self.models)
        given = {name: read_file(name, path) for name, path in ask.files.items()}
        stages = self.find_stages(ask, given)
        for model, *size in stages:
            self.choose(model, tuple(size), *self.loaded)
        generator = torch.Generator(self.arguments.device).manual_seed(ask.seed)
        common = {"prompt": format_prompt(*ask.prompt), **given, "generator": generator}
        inputs, texts, code = ask.numbers, {name: str(value) for name, value in ask.numbers.items()}, []
        for model, *size in stages:
            report(News("Starting" if model in self.loaded else "Loading the model"))
            setting, pipe = self.load(model, tuple(size))
            is_last = model == stages[-1][0]
            inputs = inputs | {"output_type": ("stream" if is_turbo(pipe) else "np") if is_last else "latent"}
            has_preview = setting.offload == "none" and pipe.vae is not None
            out = call_pipeline(pipe, report, has_preview, **common, **inputs)
            texts["output_type"] = repr(inputs["output_type"])
            code += write_call(ask, self.arguments, model, pipe, setting, texts)
            inputs, texts = {"latents": out.frames}, {"latents": "out.frames"}
            if "audio" not in given:
                inputs["audio_latents"], texts["audio_latents"] = out.audio, "out.audio"
            sampling_rate = pipe.audio_sampling_rate
            del pipe  # which else would stay where the next one needs its room

        def frames() -> Iterator[Any]:
            for index, frame in enumerate(out.frames[0]):
                report(News("Decoding and writing", index / size[-1]))
                yield frame

        export_to_mp4(frames(), output, audio=out.audio[0], sampling_rate=sampling_rate)
        words = describe_line(self.models[ask.model], common["prompt"])
        report(News(f"Seed {ask.seed}. {words}".strip(), 1.0, code=write_code(ask, self.arguments, code)))

    def follow(self, ask: Ask, output: str, stop: threading.Event) -> Iterator[News]:
        """What is told while a clip is made in a thread of its own, until it is there or stopped."""
        told: queue.Queue[News | Exception] = queue.Queue()

        def report(news: News) -> None:
            if stop.is_set():
                raise Cancelled
            told.put(news)

        def work() -> None:
            try:
                with self.lock:
                    self.make_clip(ask, output, report)
            except Exception as error:
                told.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while not stop.is_set():
                with suppress(queue.Empty):
                    news = told.get(timeout=0.2)
                    if isinstance(news, Exception):
                        raise news
                    yield news
                    if news.code is not None:
                        return
            raise Cancelled
        finally:  # also where the page is left
            stop.set()

    def close(self) -> None:
        """Cancels all, and waits a while for what is at work, so that it writes no more."""
        for stop in self.jobs.values():
            stop.set()
        self.lock.acquire(timeout=10)


def write_code(ask: Ask, arguments: Namespace, calls: list[str]) -> str:
    """Python that makes the same clip again, to the byte on the same machine."""
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    lines += ["from diffusers_magihuman import embedded_model, export_to_mp4, format_prompt", ""]
    lines += ["prompt = format_prompt(", *(f"    {part!r}," for part in ask.prompt), ")"]
    lines += [f"generator = torch.Generator({str(arguments.device)!r}).manual_seed({ask.seed})"]
    lines += [f'dtype = {{"default": torch.{arguments.dtype}, "audio_vae": torch.float32}}']
    if (kind := arguments.speed.quantize) is not None:
        lines[1] += ", PipelineQuantizationConfig"
        lines.insert(3, "from diffusers_magihuman.tools.quantize import torchao_config")
        mapping = f'{{"transformer": torchao_config({kind!r})}}'
        lines += [f"config = PipelineQuantizationConfig(quant_mapping={mapping})"]
    options = "audio=out.audio[0], sampling_rate=pipe.audio_sampling_rate"
    return "\n".join([*lines, *calls, f'export_to_mp4(out.frames[0], "clip.mp4", {options})'])


def write_call(
    ask: Ask, arguments: Namespace, model: str, pipe: DiffusionPipeline, setting: Setting, texts: dict[str, str]
) -> list[str]:
    """Python that loads a pipeline and calls it."""
    names = {repr(embedded_model(name)): f"embedded_model({name!r})" for name in EMBEDDED_MODELS}
    source = names.get(repr(model), repr(model)) + ", dtype=dtype"
    source += ", quantization_config=config" * (arguments.speed.quantize is not None)
    settings = setting, arguments.speed, getattr(torch, arguments.dtype), str(arguments.device), pipe.vae is not None
    lines = ["", f"pipe = DiffusionPipeline.from_pretrained({source})", *map(str, make_calls(*settings))]
    lines += ["pipe.vae.enable_tiling()"] * is_turbo(pipe)
    given = {name: repr(Path(path).name) for name, path in ask.files.items()}
    call = ["prompt", "generator=generator", *(f"{name}={text}" for name, text in (given | texts).items())]
    return [*lines, "out = pipe(", *(f"    {argument}," for argument in call), ")"]


def list_sizes(index: dict[str, Any]) -> list[str]:
    """Sizes of about the pixels that a model is made for."""
    height, width = index["default_height"], index["default_width"]
    side = round(math.sqrt(height * width) / 32) * 32
    return list(dict.fromkeys(f"{x} x {y}" for x, y in ((width, height), (height, width), (side, side))))


def show_status(text: str, done: float | None = None, is_error: bool = False) -> str:
    text = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
    bar = "" if done is None else f'<div><i style="width: {done:.0%}"></i></div>'
    return f'<div role="{"alert" if is_error else "status"}"><p>{text}</p>{bar}</div>'


def find_upload(file: Any) -> str | None:
    """The path of an upload, as Gradio describes it; `ValueError` for any other file, which a request may name too."""
    if file is None:
        return None
    folder = os.path.realpath(os.environ["GRADIO_TEMP_DIR"])
    path = os.path.realpath(file["path"]) if isinstance(file, dict) and isinstance(file.get("path"), str) else ""
    if not path.startswith(folder + os.sep):
        raise ValueError("The file is no upload; choose it once more.")
    return path


def check_upload(name: str, file: Any) -> tuple[Any, str]:
    """What becomes of an upload, which goes if it is bad, and of the status."""
    try:
        if (path := find_upload(file)) is not None:
            read_file(name, path)
        return gr.skip(), show_status("")
    except ValueError as error:
        return None, show_status(describe(error), is_error=True)


def build_page(studio: Studio) -> gr.Blocks:
    """The page, as Gradio's blocks."""
    names = list(studio.models)
    is_tiny = {name: path in TINY.values() for name, path in studio.models.items()}
    first = next(iter(EXAMPLES.values())) if is_tiny[names[0]] else ("", "")
    with gr.Blocks(title="MagiHuman", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML("<h1>MagiHuman</h1><p>A person who speaks, from words, a portrait or a voice.</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                hint = "Who is seen, where, and what the voice is like"
                description = gr.Textbox(first[0], label="Description", lines=6, placeholder=hint)
                dialogue = gr.Textbox(first[1], label="Dialogue", lines=2, placeholder="Anna, French: Bonjour !")
                sound = gr.Textbox(label="Background sound", placeholder="none")
                with gr.Row():
                    examples = [gr.Button(name, size="sm", min_width=80) for name in EXAMPLES]
            with gr.Column(scale=5, min_width=300):
                stage = {"interactive": False, "height": 400}
                clip = gr.Video(label="Clip", autoplay=True, **stage)
                preview = gr.Image(label="Preview", buttons=[], visible=False, elem_id="preview", **stage)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", scale=3, min_width=120)
                    cancel = gr.Button("Cancel", interactive=False, min_width=90)
                status = gr.HTML(show_status(""), elem_id="status")
                code = gr.Code(label="Python", language="python", visible=False, max_lines=16, show_line_numbers=False)
            with gr.Column(scale=4, min_width=300):
                files = {"type": "filepath", "elem_classes": "upload"}
                image = gr.Image(label="Portrait", image_mode=None, sources=["upload", "webcam"], height=200, **files)
                audio = gr.Audio(label="Voice", sources=["upload", "microphone"], buttons=[], **files)
                model = gr.Dropdown(names, label="Model")
                size = gr.Dropdown([], label="Size", allow_custom_value=True)
                with gr.Row():
                    seconds = gr.Textbox(label="Seconds", placeholder="auto", min_width=70)
                    steps = gr.Number(label="Steps", precision=0, min_width=70)
                    seed = gr.Textbox(label="Seed", placeholder="any", min_width=70)
                upscale = gr.Checkbox(label="Upscale", visible=studio.upscale is not None)
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asked = [model, description, dialogue, sound, image, audio, size, seconds, steps, seed, upscale]
        connect(studio, asked, [clip, preview, status, code, generate, cancel], quick)

        def set_model(name: str) -> tuple[Any, int, Any]:
            index = studio.indices[name]
            sizes = list_sizes(index)
            steps = 8 if index["is_distilled"] else 32
            return gr.update(choices=sizes, value=sizes[0]), steps, gr.update(info=KNOWN if is_tiny[name] else None)

        gr.on([model.change, page.load], set_model, model, [size, steps, dialogue], **quick)
        for name, file in (("image", image), ("audio", audio)):
            file.input(partial(check_upload, name), file, [file, status], preprocess=False, **quick)
        for button, parts in zip(examples, EXAMPLES.values(), strict=True):
            button.click(partial(tuple, parts), outputs=[description, dialogue], **quick)
    return page.queue(max_size=20)


def connect(studio: Studio, asked: list[Any], shown: list[Any], quick: dict[str, Any]) -> None:
    """Has the buttons make clips and cancel them; calls wait for each other in Gradio's queue, which shows where."""
    clip, preview, status, code, generate, cancel = shown

    def show_state(text: str, done: float | None = None, is_error: bool = False) -> dict[Any, Any]:
        is_idle = done is None
        buttons = {generate: gr.update(interactive=is_idle), cancel: gr.update(interactive=not is_idle)}
        views = {preview: gr.update(visible=False), clip: gr.update(visible=True)} if is_idle else {}
        return {status: show_status(text, done, is_error), **buttons, **views}

    def start(request: gr.Request) -> dict[Any, Any]:
        studio.jobs[request.session_hash] = threading.Event()
        return show_state("Waiting", 0.0)

    def run(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        try:
            # Out of the folder Gradio copies to its own; both lie in the page's, with which they go at the latest.
            with tempfile.TemporaryDirectory(dir=os.path.dirname(os.environ["GRADIO_TEMP_DIR"])) as folder:
                output = f"{folder}/clip.mp4"
                *texts, image, audio, size, seconds, steps, seed, upscale = values
                ask = read_ask(*texts, *map(find_upload, (image, audio)), size, seconds, steps, seed, upscale)
                for news in studio.follow(ask, output, studio.jobs[request.session_hash]):
                    if news.code is not None:
                        made = {clip: gr.update(value=output, visible=True)}
                        made[code] = gr.update(value=news.code, visible=True)
                        yield show_state(news.text) | made
                    else:
                        changes = show_state(news.text, news.done)
                        if news.preview is not None:
                            changes[clip] = gr.update(visible=False)
                            changes[preview] = gr.update(value=news.preview, visible=True)
                        yield changes
        except Cancelled:
            yield show_state("Cancelled")
        except Exception as error:
            if not isinstance(error, ValueError | OSError):  # no fault of what was asked for
                logger.exception("A clip could not be made.")
            yield show_state(describe(error), is_error=True)

    def stop(request: gr.Request) -> dict[Any, Any]:
        studio.jobs[request.session_hash].set()
        return show_state("Cancelled") | {generate: gr.skip(), cancel: gr.update(interactive=False)}

    def finish() -> Any:
        time.sleep(0.3)  # until `cancels` has arrived, which would end the next call too
        return gr.update(interactive=True)

    begun = generate.click(start, outputs=shown, **quick)
    # Gradio's own reading would open what may be no image before the package's reader does.
    slow = {"concurrency_limit": 1, "preprocess": False, "show_progress_on": status, "api_visibility": "private"}
    running = begun.then(run, asked, shown, **slow)
    # `cancels` ends calls that wait yet, which `stop` does not, and what running ones would still show.
    cancel.click(stop, outputs=shown, cancels=[running], **quick).then(finish, outputs=generate, **quick)


def run_demo(arguments: Namespace) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "files")  # uploads and clips
        page = build_page(studio := Studio(arguments))
        _, address, public = page.launch(
            share=arguments.share,
            server_name=arguments.host,
            server_port=arguments.port or None,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            max_file_size="32mb",
            ssr_mode=False,
            theme=gr.themes.Base(neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
        )
        print(f"magihuman demo: {public or address}", flush=True)
        try:
            page.block_thread()
        finally:
            studio.close()
