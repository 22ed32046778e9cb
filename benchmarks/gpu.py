# SPDX-License-Identifier: Apache-2.0
"""Measure on one GPU what users run, at full size, with random weights made there: nothing is downloaded.

    python benchmarks/gpu.py [--minutes 8] [PART_OF_A_NAME ...]  # on a GPU with 80 GB or more
    python benchmarks/gpu.py --dry-run                           # each case at full size, without data or times
    python benchmarks/gpu.py --device cpu --tiny --compiler none # each case at tiny size

Prints each case as a line of JSON as soon as it is known, with what `plan` or the roofline says of it beside it, and
the figure of the paper if there is one. A case that fails prints its error, one that no longer fits into the minutes
prints that, and the run goes on. What comes first matters most; names are chosen by their parts.

Times are medians after warm-up, `first_s` is that of the first call, with compilation. Without data a pipeline cannot
be called, as its loop reads values: there its stages are run as `plan` runs them.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import git_commit, hardware, timed
from diffusers import AutoencoderOobleck, DiffusionPipeline
from original_block import make_pair, original_block, sort_by_modality
from roofline import ATTENTION_RATE, BANDWIDTH, RATES, Roofline, WholeKernels, summarise
from torch import Tensor, nn

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.conversion import variant_config
from diffusers_magihuman.tools.plan import (
    GIB,
    Kernels,
    make_meta_model,
    make_stages,
    measure_memory,
    models_of,
    tensors_of,
)
from diffusers_magihuman.transformer_magihuman import SequenceLayout

PACKAGES = ("diffusers", "torchao", "triton", "kernels", "flash-attn", "flash-attn-3", "sageattention", "xformers")
# PyTorch's own, and the others by the module that has them.
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient")
MODULES = {"flash": "flash_attn", "_flash_3": "flash_attn_interface", "sage": "sageattention", "xformers": "xformers"}


class Size(NamedTuple):
    """A call: variant, size in pixels, steps, how often it is timed, and what the paper has on an H100, in seconds."""

    variant: str
    height: int
    width: int
    num_steps: int
    repeats: int
    paper_s: float | None = None
    paper_decode_s: float | None = None


SIZES = {
    "256p": Size("base", 256, 448, 8, 3, 1.6, 0.4),
    "540p": Size("sr-540p", 512, 928, 5, 1),
    "1080p": Size("sr-1080p", 1088, 1920, 1, 1, 31.0 / 5, 5.8),
}
TINY_SIZES = {
    "256p": Size("base", 64, 96, 8, 3),
    "540p": Size("sr-540p", 96, 160, 5, 1),
    "1080p": Size("sr-1080p", 128, 192, 1, 1),
}
TINY = {
    "transformer": {
        "text_in_channels": 24,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 16,
        "modality_layers": (0, 3),
        "gelu_layers": (0,),
        "local_attention_frames": 1,
        "feed_forward_multiple": 16,
    },
    "vae": {"decoder_block_out_channels": (4, 4, 8, 8), "decoder_layers_per_block": (1, 1, 1, 1, 1)},
    "audio_vae": {
        "encoder_hidden_size": 16,
        "downsampling_ratios": [8, 16, 16],
        "channel_multiples": [1, 1, 1],
        "decoder_channels": 8,
    },
}
NUM_FRAMES, TEXT_LENGTH = 126, 400  # of a call at full size: 4,110, 15,374 and 65,806 tokens
TINY_FRAMES, TINY_TEXT = 17, 7

STAGES = ("denoising step", "decoding video")  # of those of `plan`

Figures = dict[str, Any]


def make_pipeline(size: Size, is_tiny: bool, multiple: int | None) -> DiffusionPipeline:
    """A pipeline without text encoder, on the meta device; an inner size of another multiple if one is given."""
    config = {"num_layers": 40} | (TINY["transformer"] if is_tiny else {})
    config |= variant_config(size.variant, config["num_layers"])
    config |= {} if multiple is None else {"feed_forward_multiple": multiple}
    vae, audio_vae = (TINY["vae"], TINY["audio_vae"]) if is_tiny else ({}, {})
    is_base = size.variant == "base"
    components = {
        "tokenizer": None,
        "text_encoder": None,
        "transformer": make_meta_model(lambda: MagiHumanTransformer3DModel(**config), torch.bfloat16),
        "scheduler": MagiHumanFlowScheduler(sampler="renoise" if is_base else "unipc"),
        "vae": make_meta_model(lambda: AutoencoderKLMagiHumanTurbo(**vae), torch.bfloat16),
        "audio_vae": make_meta_model(lambda: AutoencoderOobleck(**audio_vae), torch.float32),
    }
    if is_base:
        pipe = MagiHumanAudioVideoPipeline(**components, is_distilled=True)
    else:
        pipe = MagiHumanLatentUpscalePipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill(model: nn.Module, device: torch.device) -> None:
    """Random weights, drawn on the device."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)


def quantize(transformer: MagiHumanTransformer3DModel, device: torch.device) -> str:
    """The linears of the blocks in float8, as users load them; row by row where the device multiplies float8."""
    # Here, as without this package only the cases that need it fail.
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    config = Float8WeightOnlyConfig()
    if device.type == "cuda":
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(transformer.transformer_blocks, config)
    linears = [module for module in transformer.transformer_blocks.modules() if isinstance(module, nn.Linear)]
    num_plain = sum(type(linear.weight) is nn.Parameter for linear in linears)
    return f"{type(config).__name__}, {len(linears) - num_plain} of {len(linears)} linears"


class Expected(NamedTuple):
    """What is calculated before a size is run: GiB that `plan` counts for stages of `plan`, all weights included, and
    the least milliseconds of a forward and of decoding, see `roofline.py`."""

    planned_gib: dict[str, float]
    forward_ms: float
    decode_ms: float


def calculate(pipe: DiffusionPipeline, size: Size, num_frames: int, inputs: Sequence[Tensor]) -> Expected:
    """Of a pipeline on the meta device."""
    pipe.transformer.fuse_qkv_projections()
    models = list(models_of(pipe).values())
    weights = sum(tensor.nbytes for model in models for tensor in tensors_of(model))
    stages = {stage.name: stage.run for stage in make_stages(pipe, size.height, size.width, num_frames)}
    planned = {name: round((weights + measure_memory(stages[name], *models)[0]) / GIB, 2) for name in STAGES}
    inputs = [torch.empty_like(each, device="meta") for each in inputs]
    least = []
    for run in (functools.partial(pipe.transformer, *inputs), stages["decoding video"]):
        with Roofline() as roofline, WholeKernels(roofline):
            run()
        least.append(summarise(roofline.costs)["ms"])
    pipe.transformer.unfuse_qkv_projections()
    return Expected(planned, *least)


@dataclasses.dataclass
class Bench:
    """Where cases run, how large and until when, and the one pipeline that lives at a time."""

    device: torch.device
    is_tiny: bool
    compiler: str
    deadline: float
    attention: Sequence[str]
    attention_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    key: tuple | None = None
    pipe: DiffusionPipeline | None = None
    quantized: str | None = None
    expected: dict[str, Expected] = dataclasses.field(default_factory=dict)

    def size(self, name: str) -> Size:
        return (TINY_SIZES if self.is_tiny else SIZES)[name]

    @property
    def backend(self) -> str:
        """Of attention, the fastest that was timed, or the first."""
        return min(self.attention_ms, key=self.attention_ms.get, default=self.attention[0])

    @property
    def compiles(self) -> bool:
        return self.device.type != "meta" and self.compiler != "none"

    @property
    def lengths(self) -> tuple[int, int]:
        """Frames and text tokens."""
        return (TINY_FRAMES, TINY_TEXT) if self.is_tiny else (NUM_FRAMES, TEXT_LENGTH)

    def layout(self, name: str) -> SequenceLayout:
        num_frames, text_length = self.lengths
        _, height, width, *_ = self.size(name)
        return SequenceLayout((num_frames - 1) // 4 + 1, height // 32, width // 32, num_frames, text_length)

    def config(self, **changes: Any) -> dict[str, Any]:
        """Of a transformer of one layer, that of SwiGLU which most layers are, unless changed."""
        config = TINY["transformer"] if self.is_tiny else {}
        config = {name: value for name, value in config.items() if name != "num_layers"}
        return config | {"modality_layers": (), "gelu_layers": ()} | changes

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def first_s(self, run: Callable[[], Any]) -> float | None:
        """Seconds of a first call."""
        _, seconds = timed(run, self.device)
        return None if self.device.type == "meta" else round(seconds, 3)

    def time_ms(self, run: Callable[[], Any], repeats: int = 5, warmups: int = 2) -> float | None:
        """Median milliseconds of a call; none without data, where it runs once."""
        if self.device.type == "meta":
            run()
            return None
        for _ in range(warmups):
            run()
        if self.device.type != "cuda":
            return round(1000 * statistics.median(timed(run, self.device)[1] for _ in range(repeats)), 3)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return round(statistics.median(start.elapsed_time(end) for start, end in events), 3)

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated(self.device) / GIB, 2) if self.device.type == "cuda" else None

    def pipeline(
        self, name: str, mode: str | None = None, is_float8: bool = False, multiple: int | None = None
    ) -> DiffusionPipeline:
        """That of a size, its blocks compiled in a mode if one is given. Variants share their weights in turn."""
        weights_key, mode = (is_float8, multiple), mode if self.compiles else None
        if self.key == (name, mode, weights_key):
            return self.pipe
        pipe = make_pipeline(self.size(name), self.is_tiny, multiple)
        if name not in self.expected:
            self.expected[name] = calculate(pipe, self.size(name), self.lengths[0], inputs_of(self, name))
        is_same = self.key is not None and self.key[-1] == weights_key and not is_float8
        old = models_of(self.pipe) if is_same else {}
        self.release()
        for part, model in models_of(pipe).items():
            if is_same:
                model.load_state_dict(old.pop(part).state_dict(), assign=True)
            else:
                fill(model, self.device)
        pipe.transformer.fuse_qkv_projections()
        pipe.transformer.set_attention_backend(self.backend)
        self.quantized = quantize(pipe.transformer, self.device) if is_float8 else None
        if mode is not None:
            torch.compiler.reset()
            pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, mode=mode, backend=self.compiler)
        self.key, self.pipe = (name, mode, weights_key), pipe
        return pipe

    def release(self) -> None:
        self.key = self.pipe = self.quantized = None
        self.reset_peak()

    def state(self, mode: str | None, *stages: str) -> Figures:
        """Memory, also planned for stages in bfloat16, and in what the transformer runs."""
        name, *_ = self.key
        planned = None if self.quantized else max(self.expected[name].planned_gib[stage] for stage in stages)
        figures = {"peak_gib": self.peak_gib(), "planned_gib": planned, "compile": mode if self.compiles else None}
        return figures | {"attention": self.backend, "quantized": self.quantized}


def measure_ceilings(bench: Bench) -> Figures:
    """What the roofline takes for given: the rate of a product and of a copy."""
    size = 64 if bench.is_tiny else 8192
    left, right = bench.randn(2, size, size, dtype=torch.bfloat16)
    copied = bench.randn(16 * size, size)
    target = torch.empty_like(copied)
    product_ms = bench.time_ms(lambda: left @ right)
    copy_ms = bench.time_ms(lambda: target.copy_(copied))
    return {
        "bf16_tflops": rate(2 * size**3, product_ms),
        "roofline_tflops": RATES[torch.bfloat16] / 1e12,
        "copy_tb_per_s": rate(2 * copied.nbytes, copy_ms),
        "roofline_tb_per_s": BANDWIDTH / 1e12,
    }


def rate(amount: float, milliseconds: float | None) -> float | None:
    """In units of 10**12 a second."""
    return None if milliseconds is None else round(amount / milliseconds / 1e9, 3)


def time_linear(bench: Bench, inner_size: int) -> Figures:
    """The two products of a feed-forward on the tokens of 256p; the published one has 13,652 channels inside."""
    hidden_size, inner_size = (64, inner_size // 80) if bench.is_tiny else (5120, inner_size)
    tokens = sum(bench.layout("256p").modality_lengths)
    figures = {}
    for name, columns, rows in (("in", hidden_size, 2 * inner_size), ("out", inner_size, hidden_size)):
        states, weight = (bench.randn(size, columns, dtype=torch.bfloat16) for size in (tokens, rows))
        figures[f"{name}_ms"] = bench.time_ms(functools.partial(F.linear, states, weight))
        figures[f"{name}_roofline_ms"] = round(2e3 * tokens * columns * rows / RATES[torch.bfloat16], 3)
    return figures


def time_attention(bench: Bench, name: str, backend: str, is_local: bool = False) -> Figures:
    """Attention of a layer as the model calls it, with a backend."""
    layout = bench.layout(name)
    with torch.device("meta"):
        layers = {"local_attention_layers": (0,)} if is_local else {}
        model = MagiHumanTransformer3DModel(**bench.config(num_layers=1, **layers))
    model.set_attention_backend(backend)
    attn, config, tokens = model.transformer_blocks[0].attn, model.config, sum(layout.modality_lengths)
    heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
    shapes = [(1, tokens, number, config.attention_head_dim) for number in heads]
    query, key, value = (bench.randn(*shape, dtype=torch.bfloat16) for shape in shapes)
    pairs = tokens**2
    run = functools.partial(attn.processor._attend, query, key, value, None)
    if is_local:
        near = attn.local_attention_frames
        arguments = query, key, value, None, layout, near
        run = functools.partial(attn.processor._attend_locally, *arguments)
        frames = range(layout.num_frames)
        seen = sum(min(frame + near + 1, layout.num_frames) - max(frame - near, 0) for frame in frames)
        rest = tokens - layout.video_length
        pairs = layout.frame_length * (seen * layout.frame_length + layout.num_frames * rest) + rest * tokens
    milliseconds = bench.time_ms(run, repeats=3)
    if milliseconds is not None and name == "1080p" and not is_local and backend in bench.attention:
        bench.attention_ms[backend] = milliseconds
    operations = 4 * pairs * config.num_attention_heads * config.attention_head_dim
    figures = {"tokens": tokens, "ms": milliseconds, "roofline_ms": round(1e3 * operations / ATTENTION_RATE, 3)}
    return figures | {"tflops": rate(operations, milliseconds), "peak_gib": bench.peak_gib()}


def time_block(bench: Bench, name: str, **changes: Any) -> Figures:
    """A block of ours and as the original formulates it, same weights and same kernel of attention."""
    layout, device = bench.layout(name), bench.device
    model, weights = make_pair(bench.config(**changes), device, torch.bfloat16)
    model.set_attention_backend("_native_flash")
    rotary_emb, order = model.rope(layout, None, device), sort_by_modality(layout, device)
    states = bench.randn(1, sum(layout.modality_lengths), model.video_proj_out.in_features)
    ours = functools.partial(model.transformer_blocks[0], states, rotary_emb, layout, None, torch.bfloat16)
    original = functools.partial(original_block, weights, model.config, states[0, order], rotary_emb, layout, order)
    figures = {"ms": bench.time_ms(ours), "original_ms": bench.time_ms(original), "ratio": None, "difference": None}
    if bench.device.type != "meta":
        figures["ratio"] = round(figures["ms"] / figures["original_ms"], 3)
        # Root mean square, by that of what the block adds.
        output = ours()[0, order]
        difference = (original() - output).norm() / (output - states[0, order]).norm()
        figures["difference"] = round(difference.item(), 5)
    return figures


def inputs_of(bench: Bench, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of video and audio, and text."""
    layout, (num_frames, text_length) = bench.layout(name), bench.lengths
    channels = TINY["transformer"]["text_in_channels"] if bench.is_tiny else 3584
    video = bench.randn(1, 48, layout.num_frames, 2 * layout.height, 2 * layout.width)
    return video, bench.randn(1, num_frames, 64), bench.randn(1, text_length, channels)


def time_forward(bench: Bench, name: str, mode: str | None, **weights: Any) -> Figures:
    """One forward of the transformer."""
    pipe, inputs = bench.pipeline(name, mode, **weights), inputs_of(bench, name)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        pipe.transformer(*inputs, return_dict=False)

    bench.reset_peak()
    first_s = bench.first_s(run)
    figures = {"ms": bench.time_ms(run, warmups=3), "roofline_ms": bench.expected[name].forward_ms, "first_s": first_s}
    return figures | bench.state(mode, STAGES[0])


def time_call(bench: Bench, name: str, mode: str | None, output_type: str = "latent", **weights: Any) -> Figures:
    """A call of the pipeline, with what decodes unless latents are wanted, from embeddings of the text."""
    pipe, size, (num_frames, _) = bench.pipeline(name, mode, **weights), bench.size(name), bench.lengths
    *latents, text = inputs_of(bench, "256p")
    source = {"num_frames": num_frames}
    if size.variant != "base":
        source = dict(zip(("latents", "audio_latents"), latents, strict=True))
    arguments = {"prompt_embeds": text, "height": size.height, "width": size.width, "output_type": output_type}
    figures = {"steps": size.num_steps, "s": None, "first_s": None, "paper_s": None}
    expected, has_frames = bench.expected[name], output_type != "latent"
    figures["roofline_s"] = round((size.num_steps * expected.forward_ms + has_frames * expected.decode_ms) / 1e3, 3)
    if size.paper_s is not None:
        figures["paper_s"] = round(size.paper_s + has_frames * size.paper_decode_s, 2)
    bench.reset_peak()
    if bench.device.type != "meta":
        call = functools.partial(pipe, **arguments, **source)
        figures["first_s"] = bench.first_s(functools.partial(call, num_inference_steps=1))
        runs = [timed(lambda: call(num_inference_steps=size.num_steps), bench.device) for _ in range(size.repeats)]
        figures["s"] = round(statistics.median(seconds for _, seconds in runs), 3)
    return figures | bench.state(mode, *STAGES[: 1 + has_frames])


def time_decode(bench: Bench, name: str, way: str | None = None) -> Figures:
    """The latents of a video to its frames, which stay on the device, or in a memory format, or compiled."""
    pipe, size = bench.pipeline(name), bench.size(name)
    if way == "channels_last_3d":
        for module in pipe.vae.decoder.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
    elif way == "compiled" and bench.compiles:
        pipe.vae.decoder.compile(backend=bench.compiler)
    latents, *_ = inputs_of(bench, name)
    bench.reset_peak()
    run, expected = functools.partial(pipe.decode_latents, latents, "pt"), bench.expected[name]
    figures = {"first_s": bench.first_s(run), "ms": bench.time_ms(run, size.repeats, warmups=0)}
    figures |= {"roofline_ms": expected.decode_ms, "paper_ms": size.paper_decode_s and 1000 * size.paper_decode_s}
    figures |= {"peak_gib": bench.peak_gib(), "planned_gib": expected.planned_gib["decoding video"]}
    if way is not None:
        bench.release()
    return figures


def describe(bench: Bench) -> Figures:
    """The card, and versions."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    is_cuda = bench.device.type == "cuda"
    return {
        "hardware": hardware(bench.device),
        "gib": round(torch.cuda.get_device_properties(bench.device).total_memory / GIB, 1) if is_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **versions,
        "commit": git_commit(),
    }


def make_cases(attention: Sequence[str]) -> Iterator[tuple[str, float, Callable[[Bench], Figures]]]:
    """Name, seconds that a case may take on an H100, and what measures it; those first that matter most."""
    yield "card", 0, describe
    yield "ceilings", 2, measure_ceilings
    for inner_size in (13652, 13696):
        yield f"linear {inner_size}", 2, functools.partial(time_linear, inner_size=inner_size)
    for name in ("256p", "1080p"):
        for backend in attention:
            yield f"attention {name} {backend}", 5, functools.partial(time_attention, name=name, backend=backend)
    for backend in attention:
        local = functools.partial(time_attention, name="1080p", backend=backend, is_local=True)
        yield f"attention 1080p local {backend}", 5, local
    sandwich = {"modality_layers": (0,), "gelu_layers": (0,)}
    local = {"local_attention_layers": (0,), "coordinate_style": "v1"}
    for name, kind, changes in (("256p", "shared", {}), ("256p", "sandwich", sandwich), ("1080p", "local", local)):
        yield f"block {name} {kind}", 10, functools.partial(time_block, name=name, **changes)

    forward, call = functools.partial(time_forward, name="256p"), functools.partial(time_call, name="256p")
    yield "forward 256p eager", 20, functools.partial(forward, mode=None)
    yield "forward 256p compiled", 60, functools.partial(forward, mode="default")
    yield "call 256p compiled", 15, functools.partial(call, mode="default", output_type="pt")
    yield "call 1080p eager", 35, functools.partial(time_call, name="1080p", mode=None)
    yield "decode 1080p", 25, functools.partial(time_decode, name="1080p")
    yield "call 1080p compiled", 100, functools.partial(time_call, name="1080p", mode="default")
    yield "call 540p compiled", 60, functools.partial(time_call, name="540p", mode="default")
    yield "forward 256p graphs", 60, functools.partial(forward, mode="reduce-overhead")
    yield "forward 256p float8", 60, functools.partial(forward, mode="default", is_float8=True)
    yield "call 256p float8", 10, functools.partial(call, mode="default", output_type="pt", is_float8=True)
    unpadded = functools.partial(forward, mode="default", is_float8=True, multiple=1)
    yield "forward 256p float8 unpadded", 60, unpadded
    for way in (None, "channels_last_3d", "compiled"):
        name = "decode 256p" if way is None else f"decode 256p {way}"
        yield name, 60 if way == "compiled" else 10, functools.partial(time_decode, name="256p", way=way)


def stop(*_: Any) -> None:
    raise TimeoutError("the minutes are over")


def run_case(bench: Bench, needed: float, measure: Callable[[Bench], Figures]) -> Figures:
    """Its figures, its error, or that too little time is left."""
    left = bench.deadline - time.perf_counter()
    if needed > left:
        return {"skipped": f"may take {needed} s, {max(left, 0):.0f} are left"}
    try:
        signal.setitimer(signal.ITIMER_REAL, left)
        bench.reset_peak()
        return measure(bench)
    except Exception as error:  # whatever it is, the other cases are worth knowing
        with contextlib.suppress(Exception):  # after some errors a GPU answers nothing any more
            bench.release()
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="run the cases alone whose name has one of these parts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="on the meta device")
    parser.add_argument("--tiny", action="store_true", help="tiny models and videos")
    parser.add_argument(
        "--compiler",
        default="inductor",
        help="backend of torch.compile; `eager` only traces, `none` runs what is compiled as it is",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing runs any more")
    parser.add_argument(
        "--attention", nargs="+", help="backends, the fastest of which models use; by default PyTorch's"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.minutes <= 1440:
        parser.error(f"--minutes {options.minutes:g} must be in 0 to 1440")
    try:
        device = torch.empty(0, device="meta" if options.dry_run else options.device).device
    except Exception as error:  # each kind of device that is not there fails in its own way
        parser.error(f"--device {options.device} is no device here: {str(error).splitlines()[0]}")
    torch.manual_seed(0)
    signal.signal(signal.SIGALRM, stop)
    installed = (name for name, module in MODULES.items() if importlib.util.find_spec(module))
    attention = options.attention or BACKENDS
    deadline = time.perf_counter() + 60 * options.minutes
    bench = Bench(device, options.tiny, options.compiler, deadline, attention)
    cases = list(make_cases(options.attention or [*BACKENDS, *installed]))
    if unknown := [part for part in options.parts if not any(part in name for name, *_ in cases)]:
        parser.error(f"no case has {unknown[0]!r} in its name")
    with Kernels() if device.type == "meta" else contextlib.nullcontext():
        for name, needed, measure in cases:
            if any(part in name for part in options.parts or ("",)):
                start = time.perf_counter()
                figures = run_case(bench, needed, measure)
                took_s = round(time.perf_counter() - start, 1)
                print(json.dumps({"case": name, **figures, "took_s": took_s}), flush=True)


if __name__ == "__main__":
    main()
