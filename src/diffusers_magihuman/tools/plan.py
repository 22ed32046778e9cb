# SPDX-License-Identifier: Apache-2.0
"""What a call needs of a GPU's memory, and which settings make it fit: `magihuman plan`.

Only configs are downloaded: the real classes run on the meta device, where tensors have a shape but no data, while
the bytes of their storages are counted, so that the figures follow the code.
"""

import copy
import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderOobleck, DiffusionPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # this and the next have no public name; torch's own
from torch.utils._pytree import tree_leaves  # counters of operations are built on them
from transformers import T5GemmaConfig, T5GemmaEncoderModel

from ..autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from ..conversion import UPSCALE_SIZES, variant_config
from ..pipeline_base import FRAME_RATE, MAX_SEQUENCE_LENGTH
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from ..scheduling_magihuman_flow import MagiHumanFlowScheduler
from ..transformer_magihuman import MagiHumanTransformer3DModel

GIB = 2**30
RESERVED_GIB = 1.0  # CUDA's context, the workspaces of its libraries and the gaps between tensors
PIPELINES = (MagiHumanAudioVideoPipeline, MagiHumanLatentUpscalePipeline)
# The encoder of google/t5gemma-9b-9b-ul2, which is that of Gemma 2 9B.
T5GEMMA_9B = {"vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
T5GEMMA_9B |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256}


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of tensor storages, those made in its context and those told to `hold`, on any device: `live`
    now, and at most, `peak`. Memory that a kernel takes and gives back inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def hold(self, outputs: Any) -> None:
        """Counts tensors, each storage once, for as long as they are alive."""
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)):
            if storage not in self._alive:
                self._alive.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False

    def _count(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.hold(output)
        return output


class FlashAttention(TorchFunctionMode):
    """Has attention on the meta device allocate what flash kernels do; it would make a matrix of scores instead."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (self.attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        if not query.is_meta:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **rest)
        # The flash kernel for CPUs is the only one that knows the meta device.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask)[0]


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def measure_memory(run: Callable[[], Any], *modules: nn.Module) -> tuple[int, int]:
    """Bytes that `run` needs at most, and that it leaves (as weight norm does), beyond what the modules weigh."""
    with torch.no_grad(), FlashAttention(), MemoryTracker() as tracker:
        tracker.hold([tensors_of(module) for module in modules])
        weights = tracker.live
        run()
        return tracker.peak - weights, tracker.live - weights


def make_meta_model(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model without data, in the dtypes that `from_pretrained(dtype=...)` gives it."""
    with torch.device("meta"):
        model = make().eval()
    # Diffusers' own attribute, which each of its models declares and which has no public reader.
    for name, parameter in model.named_parameters():
        if set(model._keep_in_fp32_modules or ()).isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def published_pipeline(variant: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The published base, or super-resolution, without data; the audio autoencoder is float32, the rest of `dtype`."""
    config = variant_config(variant, num_layers=40)
    text_config = T5GemmaConfig(encoder=T5GEMMA_9B, decoder=T5GEMMA_9B, is_encoder_decoder=False)
    components = {
        "tokenizer": None,
        "text_encoder": make_meta_model(lambda: T5GemmaEncoderModel(text_config), dtype),
        "transformer": make_meta_model(lambda: MagiHumanTransformer3DModel(**config), dtype),
        "scheduler": MagiHumanFlowScheduler(),
        "vae": make_meta_model(lambda: AutoencoderKLMagiHumanTurbo(encoder_base_dim=160), dtype),
        "audio_vae": make_meta_model(AutoencoderOobleck, torch.float32),
    }
    if variant == "base":
        return MagiHumanAudioVideoPipeline(**components)
    height, width = UPSCALE_SIZES[variant]
    return MagiHumanLatentUpscalePipeline(**components, default_height=height, default_width=width)


def configured_pipeline(model: str, dtype: torch.dtype, allowed: Sequence[type] = PIPELINES) -> DiffusionPipeline:
    """A saved pipeline of an allowed class, without data: of a directory or repository only configs are read."""
    index = DiffusionPipeline.load_config(model)
    classes = {each.__name__: each for each in allowed}
    if index["_class_name"] not in classes:
        raise ValueError(f"{model!r} holds a {index['_class_name']}, it must hold a {' or a '.join(classes)}.")
    if index["transformer"][1] is None:
        raise ValueError(f"{model!r} has no transformer, there is nothing to plan.")

    def make_component(name: str, library: str | None, class_name: str | None) -> Any:
        if name == "tokenizer" or class_name is None:
            return None
        part = getattr(transformers if library == "transformers" else diffusers, class_name)
        if name == "scheduler":
            return part.from_pretrained(model, subfolder=name)
        if library == "transformers":
            make, config = part, part.config_class.from_pretrained(model, subfolder=name)
        else:
            make, config = part.from_config, part.load_config(model, subfolder=name)
        return make_meta_model(lambda: make(config), torch.float32 if name == "audio_vae" else dtype)

    arguments = {name: value for name, value in index.items() if not name.startswith("_")}
    parts = {name: make_component(name, *each) for name, each in arguments.items() if isinstance(each, (list, tuple))}
    return classes[index["_class_name"]](**arguments | parts)


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


class Stage(NamedTuple):
    """A part of a call in which one component runs; `peaks` are the bytes it needs beyond the weights, with what those
    before it leave, by whether the transformer is float8 and whether all is lean."""

    name: str
    component: str
    run: Callable[[], Any]
    peaks: dict[tuple[bool, bool], int]


def make_stages(pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> list[Stage]:
    """Every stage of a call that a pipeline has the components for, with the longest text, where the pipeline is."""
    # The pipelines' own way to ask; `device` is the CPU while weights are offloaded.
    config, device = pipe.transformer.config, pipe._execution_device
    zeros = functools.partial(torch.zeros, device=device)
    ratio, latent_frames = pipe.vae_scale_factor_spatial, (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    shape = (1, config.in_channels, latent_frames, height // ratio, width // ratio)
    # The masks of the text, which are small, would be computed from values.
    masks = dict.fromkeys(("full_attention", "sliding_attention"))

    def denoise() -> None:
        latents, audio = zeros(shape), zeros(1, num_frames, config.audio_in_channels)
        texts = zeros(2, 1, MAX_SEQUENCE_LENGTH, config.text_in_channels)
        # After two steps the solver has all the history that it keeps.
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps[:2]:
            latents = scheduler.step(torch.zeros_like(latents), t, latents, return_dict=False)[0]
        # The branches of guidance run one after the other, the second with the velocities of the first beside it.
        velocities = [torch.zeros_like(latents), torch.zeros_like(audio)]
        velocities += pipe.transformer(latents, audio, texts[0], return_dict=False)

    def decode_video() -> None:
        for window in pipe.decode_windows(zeros(shape)):
            pipe.video_processor.postprocess_video(window, output_type="pt")

    tokens, audio = (1, MAX_SEQUENCE_LENGTH), (2, num_frames * pipe.audio_hop_length)
    audio_latents = (1, config.audio_in_channels, num_frames)
    stages = {
        ("text", "text_encoder"): lambda: pipe.text_encoder(zeros(tokens, dtype=torch.long), attention_mask=masks),
        ("first frame", "vae"): lambda: pipe.encode_video(zeros(1, 3, 1, height, width), device),
        ("given audio", "audio_vae"): lambda: pipe.encode_audio(zeros(audio), None, device),
        ("denoising step", "transformer"): denoise,
        ("decoding video", "vae"): decode_video,
        ("decoding audio", "audio_vae"): lambda: pipe.audio_vae.decode(zeros(audio_latents).to(pipe.audio_vae.dtype)),
    }
    if pipe.vae is not None and pipe.vae.encoder is None:
        del stages["first frame", "vae"]
    return [Stage(*key, run, {}) for key, run in stages.items() if getattr(pipe, key[1]) is not None]


class Setting(NamedTuple):
    """Where weights lie, whether the transformer is float8, and whether the autoencoder works in tiles and the
    feed-forward of the transformer in chunks (`lean`); `calls` put a loaded pipeline `pipe` into it."""

    name: str
    offload: str | None
    float8: bool
    lean: bool
    calls: tuple[str, ...]


AUTOENCODERS = ("vae", "audio_vae")  # stay on the GPU in group offloading
LEAN = "in tiles and chunks"
GROUPS = 'pipe.enable_group_offload(torch.device("cuda"), use_stream=True, exclude_modules=["vae", "audio_vae"], {})'
OFFLOADING = (
    (None, "all on the GPU", 'pipe.to("cuda")'),
    ("model", "model offload", "pipe.enable_model_cpu_offload()"),
    ("block_level", "group offload, blocks", GROUPS.format('offload_type="block_level", num_blocks_per_group=1')),
    ("leaf_level", "group offload, leaves", GROUPS.format('offload_type="leaf_level"')),
)
FLOAT8_CALL = "pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, pipe.transformer.dtype)"
LEAN_CALLS = ("pipe.transformer.enable_forward_chunking()", "pipe.vae.enable_tiling()")
# From fast to slow, those first that change no number.
SETTINGS = tuple(
    Setting(
        name + ", float8 transformer" * float8 + f", {LEAN}" * lean,
        *(offload, float8, lean),
        (*(FLOAT8_CALL,) * float8, call, *LEAN_CALLS * lean),
    )
    for float8, (offload, name, call), lean in itertools.product((False, True), OFFLOADING, (False, True))
)


def group_offload_bytes(model: nn.Module, offload_type: str, num_in_flight: int) -> int:
    """Of a model on the meta device: groups that stay while others come and go, and the largest of the others."""
    model = copy.deepcopy(model)
    apply_group_offloading(model, torch.device("cpu"), torch.device("meta"), offload_type, num_blocks_per_group=1)
    # What a group holds, and which module fetches it, only Diffusers' hooks know.
    hooks = [HookRegistry.check_if_exists_or_initialize(each).get_hook("group_offloading") for each in model.modules()]
    groups = {hook.group for hook in hooks if hook is not None}
    leaders = {group.onload_leader for group in groups}
    staying, passing = [], []
    for group in groups:
        tensors = {*group.parameters, *group.buffers, *itertools.chain(*map(tensors_of, group.modules))}
        _, *within = group.onload_leader.modules()
        (passing if leaders.isdisjoint(within) else staying).append(sum(tensor.nbytes for tensor in tensors))
    return sum(staying) + sum(sorted(passing)[-num_in_flight:])


def weights_on_gpu(
    pipe: DiffusionPipeline, stages: Sequence[Stage], num_in_flight: int = 2
) -> dict[str | None, dict[str, int]]:
    """Bytes of weights on the GPU by way of offloading and stage; with a stream one group runs, one is in flight."""
    models = models_of(pipe)
    sizes = {name: sum(tensor.nbytes for tensor in tensors_of(model)) for name, model in models.items()}
    weights = {None: {stage.name: sum(sizes.values()) for stage in stages}, "model": {}}

    # In model offloading a component that starts sends the one before it in the sequence away, and no other.
    sequence = [name for name in pipe.model_cpu_offload_seq.split("->") if name in models]
    present = set()
    for stage in stages:
        present.add(stage.component)
        present -= set(sequence[: sequence.index(stage.component)][-1:])
        weights["model"][stage.name] = sum(sizes[name] for name in present)

    for offload_type in ("block_level", "leaf_level"):
        held = dict.fromkeys(models, sum(sizes[name] for name in models if name in AUTOENCODERS))
        for name in models.keys() - set(AUTOENCODERS):
            held[name] += group_offload_bytes(models[name], offload_type, num_in_flight)
        weights[offload_type] = {stage.name: held[stage.component] for stage in stages}
    return weights


class MemoryPlan(NamedTuple):
    """What a call needs: bytes of weights by component and dtype, of stages, and of stages in each setting."""

    model: str
    title: str
    size: tuple[int, int, int]
    weights: dict[str, dict[torch.dtype, int]]
    stages: list[Stage]
    needs: dict[Setting, dict[str, int]]


def plan_pipeline(model: str, pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> MemoryPlan:
    """What one call needs of a pipeline on the meta device, whose transformer is float8 and lean afterwards."""
    multiple = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
    if height % multiple or width % multiple or min(height, width, num_frames) < 1:
        size = f"`height`={height}, `width`={width} and `num_frames`={num_frames}"
        raise ValueError(f"{size} must be positive, the first two multiples of {multiple}.")
    models, transformer, dtype = models_of(pipe), pipe.transformer, pipe.transformer.dtype
    weights = {name: Counter() for name in models}
    for name, parameter in ((name, each) for name, part in models.items() for each in part.parameters()):
        weights[name][parameter.dtype] += parameter.nbytes
    stages = make_stages(pipe, height, width, num_frames)
    blocks = transformer.transformer_blocks
    # Blocks that are alike need the same memory, so one of each kind is run.
    kinds = nn.ModuleList({(repr(each), each.attn.local_attention_frames): each for each in blocks}.values())

    on_gpu, needed = {}, {}
    for float8, lean in itertools.product((False, True), repeat=2):
        transformer.transformer_blocks = blocks
        if float8 and not lean:
            transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
        on_gpu[float8] = on_gpu.get(float8) or weights_on_gpu(pipe, stages)
        transformer.enable_forward_chunking() if lean else transformer.disable_forward_chunking()
        if pipe.vae is not None:
            pipe.vae.use_tiling = lean
        transformer.transformer_blocks = kinds
        left = 0
        for stage in stages:
            # Where this stage ignores one of the two, it needs what it does without it, measured before.
            is_lean = lean and stage.component in ("transformer", "vae")
            key = stage.name, float8 and stage.component == "transformer", is_lean
            peak, kept = needed[key] = needed.get(key) or measure_memory(stage.run, models[stage.component])
            stage.peaks[float8, lean] = left + peak
            left += kept
    transformer.transformer_blocks = blocks

    needs = {
        each: {s.name: on_gpu[each.float8][each.offload][s.name] + s.peaks[each.float8, each.lean] for s in stages}
        for each in SETTINGS
    }
    size = f"{height}x{width}, {num_frames} frames ({num_frames / FRAME_RATE:.1f} s), {str(dtype)[6:]}"
    title = f"{model}, {type(pipe).__name__}: {size}"
    return MemoryPlan(model, title, (height, width, num_frames), weights, stages, needs)


def plan_call(
    model: str | None = None,
    upscale: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[MemoryPlan]:
    """A plan for each pipeline of a call, in the order in which they run, one at a time in memory.

    `model` and `upscale` are directories or repositories. Without `model` it is the published base, and for more than
    twice its pixels also the published super-resolution. Sizes default to the last pipeline's.
    """
    allowed = PIPELINES if upscale is None else PIPELINES[:1]
    pipe = published_pipeline("base", dtype) if model is None else configured_pipeline(model, dtype, allowed)
    last, low = pipe, (pipe.config.default_height, pipe.config.default_width)
    if upscale is not None:
        last = configured_pipeline(upscale, dtype, PIPELINES[1:])
    elif model is None and (pixels := (height or low[0]) * (width or low[1])) > 2 * low[0] * low[1]:
        variant = next((name for name, size in UPSCALE_SIZES.items() if size[0] * size[1] >= pixels), "sr_1080p")
        upscale, last = f"owner/magihuman-{variant.replace('_', '-')}", published_pipeline(variant, dtype)

    model = model or "owner/magihuman-base"
    num_frames = pipe.config.get("default_num_frames", 126) if num_frames is None else num_frames
    height = last.config.default_height if height is None else height
    width = last.config.default_width if width is None else width
    if upscale is None:
        return [plan_pipeline(model, pipe, height, width, num_frames)]
    low = sorted(low, reverse=height > width)
    if height < low[0] or width < low[1]:
        raise ValueError(f"`height`={height} and `width`={width} must not be less than what is upscaled, {low}.")
    return [plan_pipeline(model, pipe, *low, num_frames), plan_pipeline(upscale, last, height, width, num_frames)]


def choose(plan: MemoryPlan, vram: float) -> Setting:
    """The fastest setting that fits into `vram` GiB, of which 1 is left to CUDA; ValueError says what is missing."""
    peaks = {setting: max(needs.values()) / GIB + RESERVED_GIB for setting, needs in plan.needs.items()}
    for setting, needed in peaks.items():
        if needed <= vram:
            return setting
    leanest = min(peaks, key=peaks.get)
    needed, stage = peaks[leanest], max(plan.needs[leanest], key=plan.needs[leanest].get)
    raise ValueError(
        f"No setting makes {plan.size[0]}x{plan.size[1]}, {plan.size[2]} frames, fit into {vram:g} GiB: the leanest,"
        f" {leanest.name}, needs {needed:.1f} GiB, {needed - vram:.1f} more, in the stage {stage!r} of {plan.model}. A"
        " smaller or shorter video needs less."
    )


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str | int, ...]]) -> str:
    """A table in markdown; integers are bytes and are written in GiB."""
    rows = [header, *([f"{x / GIB:.2f}" if isinstance(x, int) else x for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def format_plan(plan: MemoryPlan, vram: float) -> str:
    """A plan as three tables in GiB: weights, what stages need beyond them, and settings with whether they fit."""
    weights = [
        (name, sum(sizes.values()), ", ".join(f"{size / GIB:.2f} {str(dtype)[6:]}" for dtype, size in sizes.items()))
        for name, sizes in plan.weights.items()
    ]
    stages = [(s.name, s.component, s.peaks[False, False], s.peaks[False, True]) for s in plan.stages]
    peaks = [max(needs.values()) for needs in plan.needs.values()]
    settings = []
    for setting, whole, lean in zip(SETTINGS[::2], peaks[::2], peaks[1::2], strict=True):
        fits, fits_lean = (peak / GIB + RESERVED_GIB <= vram for peak in (whole, lean))
        settings.append((setting.name, whole, lean, "yes" if fits else LEAN if fits_lean else "no"))
    parts = [
        f"{plan.title}. GiB throughout.",
        format_table(("part", "weights", "of these"), weights),
        format_table(("stage", "part", "beyond weights", LEAN), stages),
        format_table(("setting", "needs", LEAN, f"fits {vram:g}, {RESERVED_GIB:g} left free"), settings),
        f"Weights that are offloaded lie in RAM, {sum(row[1] for row in weights) / GIB:.2f} in all.",
    ]
    return "\n\n".join(parts)


def format_calls(plan: MemoryPlan, vram: float) -> str:
    """The calls of the fastest setting that fits, one a line; raises what [`choose`] does."""
    setting = choose(plan, vram)
    calls = [call for call in setting.calls if "vae" in plan.weights or not call.startswith("pipe.vae.")]
    return "\n".join((f"# {plan.model}: {setting.name}", *calls))
