# SPDX-License-Identifier: Apache-2.0
"""What a call needs of a GPU's memory, and which settings make it fit: `magihuman plan`.

Nothing is downloaded but configs, nothing computed: the real classes run on the meta device, where tensors have a
shape but no data, while the bytes of their storages are counted, so that the figures follow the code. Attention counts
as flash kernels do it. Blocks of the transformer that are alike need the same, so one of each kind is run.
"""

import contextlib
import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderOobleck, DiffusionPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What counts and traces in torch itself is built on these two; they have no public name.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5GemmaConfig, T5GemmaEncoderModel

from ..autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from ..conversion import UPSCALE_SIZES, variant_config
from ..pipeline_base import FRAME_RATE, MAX_SEQUENCE_LENGTH
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from ..scheduling_magihuman_flow import MagiHumanFlowScheduler
from ..transformer_magihuman import MagiHumanTransformer3DModel


GIB = 2**30
# What CUDA's context, the workspaces of its libraries and the gaps between tensors take besides the tensors.
RESERVED_GIB = 1.0
# A video of more pixels than this many times those of the base model's default is planned with super-resolution.
MAX_BASE_SCALE = 2
PUBLISHED_LAYERS = 40
META = torch.device("meta")
PIPELINES = {each.__name__: each for each in (MagiHumanAudioVideoPipeline, MagiHumanLatentUpscalePipeline)}

# The encoder of google/t5gemma-9b-9b-ul2, which is that of Gemma 2 9B.
# fmt: off
T5GEMMA_9B = {
    "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
}
# fmt: on


class MemoryTracker(TorchDispatchMode):
    """
    Counts the bytes of tensor storages, those made in its context and those told to `hold`, on any device: `live` now,
    and at most, `peak`. Memory that a kernel takes and gives back inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._alive: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors, each storage once, for as long as they are alive."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # `data_ptr`, the public address, is 0 for every storage on the meta device.
            address, num_bytes = storage._cdata, storage.nbytes()
            if address not in self._alive:
                self._alive.add(address)
                weakref.finalize(storage, self._release, address, num_bytes).atexit = False
                self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def _release(self, address: int, num_bytes: int) -> None:
        self._alive.remove(address)
        self.live -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        return output


class FlashAttention(TorchFunctionMode):
    """Has attention on the meta device allocate what flash kernels do; it would make a matrix of scores instead."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            inputs = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
            if inputs["query"].is_meta:
                # The flash kernel for CPUs is the only one that knows the meta device.
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(**inputs)[0]
        return func(*args, **kwargs)


def measure_memory(run: Callable[[], Any], *modules: nn.Module) -> tuple[int, int]:
    """Bytes that `run` needs at most, and that it leaves (as weight norm does), beyond what the modules weigh."""
    with torch.no_grad(), FlashAttention(), MemoryTracker() as tracker:
        for module in modules:
            tracker.hold([*module.parameters(), *module.buffers()])
        weights = tracker.live
        run()
        return tracker.peak - weights, tracker.live - weights


def make_meta_model(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model without data, in the dtypes that `from_pretrained(dtype=...)` gives it."""
    with META:
        model = make().eval()
    # Diffusers' own attribute, which each of its models declares and which has no public reader.
    kept_in_fp32 = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if kept_in_fp32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def published_pipeline(variant: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The published models of a variant, without data; the audio autoencoder is float32, the others of `dtype`."""
    config = variant_config(variant, PUBLISHED_LAYERS)
    text_config = T5GemmaConfig(encoder=T5GEMMA_9B, decoder=T5GEMMA_9B, is_encoder_decoder=False)
    components = {
        "tokenizer": None,
        "text_encoder": make_meta_model(lambda: T5GemmaEncoderModel(text_config), dtype),
        "transformer": make_meta_model(lambda: MagiHumanTransformer3DModel(**config), dtype),
        "scheduler": MagiHumanFlowScheduler(sampler="renoise" if variant == "distill" else "unipc"),
        "vae": make_meta_model(lambda: AutoencoderKLMagiHumanTurbo(encoder_base_dim=160), dtype),
        "audio_vae": make_meta_model(AutoencoderOobleck, torch.float32),
    }
    if variant not in UPSCALE_SIZES:
        return MagiHumanAudioVideoPipeline(**components, is_distilled=variant == "distill")
    height, width = UPSCALE_SIZES[variant]
    return MagiHumanLatentUpscalePipeline(**components, default_height=height, default_width=width)


def configured_pipeline(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A saved pipeline, without data: of a directory or repository only the configs are read."""
    index = DiffusionPipeline.load_config(model)
    if index["_class_name"] not in PIPELINES:
        raise ValueError(f"{model!r} holds a {index['_class_name']}, it must hold one of {list(PIPELINES)}.")
    arguments = {name: value for name, value in index.items() if not name.startswith("_")}
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            is_left_out = name == "tokenizer" or value[1] is None
            part_dtype = torch.float32 if name == "audio_vae" else dtype
            arguments[name] = None if is_left_out else configured_component(model, name, *value, part_dtype)
    if arguments["transformer"] is None:
        raise ValueError(f"{model!r} has no transformer, there is nothing to plan.")
    return PIPELINES[index["_class_name"]](**arguments)


def configured_component(model: str, name: str, library: str, class_name: str, dtype: torch.dtype) -> Any:
    if library == "transformers":
        text_class = getattr(transformers, class_name)
        text_config = text_class.config_class.from_pretrained(model, subfolder=name)
        return make_meta_model(lambda: text_class(text_config), dtype)
    component_class = getattr(diffusers, class_name)
    config = component_class.load_config(model, subfolder=name)
    if name == "scheduler":
        return component_class.from_config(config)
    return make_meta_model(lambda: component_class.from_config(config), dtype)


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


class Stage(NamedTuple):
    """
    A part of a call in which one component runs; `peaks` are the bytes it needs beyond the weights, with what those
    before it leave, by whether the transformer is float8 and whether all is lean.
    """

    name: str
    component: str
    run: Callable[[], Any]
    peaks: dict[tuple[bool, bool], int]


def make_stages(pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> list[Stage]:
    """Every stage of a call that a pipeline has the components for, with the longest text, where the pipeline is."""
    # The pipelines' own way to ask; `device` is the CPU while weights are offloaded.
    config, device = pipe.transformer.config, pipe._execution_device
    zeros = functools.partial(torch.zeros, device=device)
    latent_frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    ratio = pipe.vae_scale_factor_spatial
    shape = (1, config.in_channels, latent_frames, height // ratio, width // ratio)
    # The masks of the text, which are small, would be computed from values.
    masks = dict.fromkeys(("full_attention", "sliding_attention"))

    def denoise() -> None:
        latents, audio_latents = zeros(shape), zeros(1, num_frames, config.audio_in_channels)
        texts = zeros(2, 1, MAX_SEQUENCE_LENGTH, config.text_in_channels)
        # After two steps the solver has all the history that it keeps.
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps[:2]:
            latents = scheduler.step(torch.zeros_like(latents), t, latents, return_dict=False)[0]
        # The branches of guidance run one after the other, the second with the velocities of the first beside it.
        velocities = [torch.zeros_like(latents), torch.zeros_like(audio_latents)]
        velocities += pipe.transformer(latents, audio_latents, texts[0], return_dict=False)

    def decode_video() -> None:
        for window in pipe.decode_windows(zeros(shape)):
            pipe.video_processor.postprocess_video(window, output_type="pt")

    input_ids, audio = (1, MAX_SEQUENCE_LENGTH), (2, num_frames * pipe.audio_hop_length)
    audio_shape = (1, config.audio_in_channels, num_frames)
    stages = {
        ("text", "text_encoder"): lambda: pipe.text_encoder(zeros(input_ids, dtype=torch.long), attention_mask=masks),
        ("first frame", "vae"): lambda: pipe.encode_video(zeros(1, 3, 1, height, width), device),
        ("given audio", "audio_vae"): lambda: pipe.encode_audio(zeros(audio), None, device),
        ("denoising step", "transformer"): denoise,
        ("decoding video", "vae"): decode_video,
        ("decoding audio", "audio_vae"): lambda: pipe.audio_vae.decode(zeros(audio_shape).to(pipe.audio_vae.dtype)),
    }
    if pipe.vae is not None and pipe.vae.encoder is None:
        del stages["first frame", "vae"]
    return [Stage(*key, run, {}) for key, run in stages.items() if getattr(pipe, key[1]) is not None]


class Setting(NamedTuple):
    """
    Where weights lie, whether the transformer is float8, and whether the autoencoder works in tiles and the
    feed-forward of the transformer in chunks (`lean`); `calls` put a loaded pipeline `pipe` into it.
    """

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


def count_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def group_offload_bytes(model: nn.Module, offload_type: str, num_in_flight: int) -> int:
    """Of a model on the meta device: groups that stay while others come and go, and the largest of the others."""
    model = copy.deepcopy(model)
    apply_group_offloading(model, torch.device("cpu"), META, offload_type, num_blocks_per_group=1)
    # What a group holds, and which module fetches it, only Diffusers' hooks know.
    hooks = [HookRegistry.check_if_exists_or_initialize(each).get_hook("group_offloading") for each in model.modules()]
    groups = {id(hook.group): hook.group for hook in hooks if hook is not None}.values()
    leaders = {id(group.onload_leader) for group in groups}
    staying, passing = 0, []
    for group in groups:
        tensors = [*group.parameters, *group.buffers]
        tensors += [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
        size = sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
        within = [id(module) for module in group.onload_leader.modules()]
        if leaders.isdisjoint(within[1:]):
            passing.append(size)
        else:
            staying += size
    return staying + sum(sorted(passing)[-num_in_flight:])


def weights_on_gpu(
    pipe: DiffusionPipeline, stages: Sequence[Stage], num_in_flight: int = 2
) -> dict[str | None, dict[str, int]]:
    """Bytes of weights on the GPU by way of offloading and stage; with a stream one group runs, one is in flight."""
    models = models_of(pipe)
    sizes = {name: count_bytes(model) for name, model in models.items()}
    weights = {None: {stage.name: sum(sizes.values()) for stage in stages}, "model": {}}

    # In model offloading a component that starts sends the one before it in the sequence away, and no other.
    sequence = [name for name in pipe.model_cpu_offload_seq.split("->") if name in models]
    present = set()
    for stage in stages:
        present.add(stage.component)
        present -= set(sequence[: sequence.index(stage.component)][-1:])
        weights["model"][stage.name] = sum(sizes[name] for name in present)

    autoencoders = sum(sizes[name] for name in models if name in AUTOENCODERS)
    for offload_type in ("block_level", "leaf_level"):
        held = dict.fromkeys(AUTOENCODERS, autoencoders)
        for name in models.keys() - held:
            held[name] = autoencoders + group_offload_bytes(models[name], offload_type, num_in_flight)
        weights[offload_type] = {stage.name: held[stage.component] for stage in stages}
    return weights


class Choice(NamedTuple):
    """The bytes that a call needs in a setting, those of its hungriest stage."""

    setting: Setting
    peak: int
    stage: str


class MemoryPlan(NamedTuple):
    """What one call of a pipeline needs: bytes of weights by component and dtype, of stages, and in each setting."""

    model: str
    pipeline_name: str
    height: int
    width: int
    num_frames: int
    dtype: torch.dtype
    weights: dict[str, dict[torch.dtype, int]]
    stages: list[Stage]
    choices: list[Choice]


@contextlib.contextmanager
def one_block_of_each_kind(transformer: MagiHumanTransformer3DModel) -> Iterator[None]:
    """Leaves out the blocks that are like another one: these need the same memory, and most of the time to plan."""
    blocks = transformer.transformer_blocks
    kinds = {(repr(block), block.attn.local_attention_frames): block for block in blocks}
    transformer.transformer_blocks = nn.ModuleList(kinds.values())
    try:
        yield
    finally:
        transformer.transformer_blocks = blocks


def set_lean(pipe: DiffusionPipeline, lean: bool) -> None:
    """Does what the calls of a lean setting do, or undoes it."""
    pipe.transformer.enable_forward_chunking() if lean else pipe.transformer.disable_forward_chunking()
    if pipe.vae is not None:
        pipe.vae.use_tiling = lean


def plan_pipeline(model: str, pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> MemoryPlan:
    """What one call needs of a pipeline on the meta device, whose transformer is float8 afterwards."""
    multiple = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
    if height % multiple or width % multiple or min(height, width, num_frames) < 1:
        raise ValueError(
            f"`height`={height} and `width`={width} must be positive multiples of {multiple}, and"
            f" `num_frames`={num_frames} must be 1 or more."
        )
    models = models_of(pipe)
    weights: dict[str, dict[torch.dtype, int]] = {name: {} for name in models}
    for name, part in models.items():
        for parameter in part.parameters():
            weights[name][parameter.dtype] = weights[name].get(parameter.dtype, 0) + parameter.nbytes
    dtype = pipe.transformer.dtype
    stages = make_stages(pipe, height, width, num_frames)

    on_gpu, needed = {}, {}
    for float8, lean in itertools.product((False, True), repeat=2):
        if float8 and not lean:
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
        on_gpu[float8] = on_gpu.get(float8) or weights_on_gpu(pipe, stages)
        set_lean(pipe, lean)
        left = 0
        for stage in stages:
            # Where this stage ignores one of the two, it needs what it does without it, measured before.
            is_float8 = float8 and stage.component == "transformer"
            key = stage.name, is_float8, lean and stage.component in ("transformer", "vae")
            if key not in needed:
                with one_block_of_each_kind(pipe.transformer):
                    needed[key] = measure_memory(stage.run, models[stage.component])
            peak, kept = needed[key]
            stage.peaks[float8, lean] = left + peak
            left += kept

    choices = []
    for setting in SETTINGS:
        held = on_gpu[setting.float8][setting.offload]
        peaks = {stage.name: held[stage.name] + stage.peaks[setting.float8, setting.lean] for stage in stages}
        hungriest = max(peaks, key=peaks.get)
        choices.append(Choice(setting, peaks[hungriest], hungriest))
    return MemoryPlan(model, type(pipe).__name__, height, width, num_frames, dtype, weights, stages, choices)


def plan_call(
    model: str | None = None,
    upscale: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[MemoryPlan]:
    """
    What it takes to make a video: a plan for each pipeline, in the order in which they run, one at a time in memory.

    `model` and `upscale` are directories or repositories of pipelines. Without `model` it is the published base, and
    for more than twice the pixels of its default also the published super-resolution for this size. The size defaults
    to that of the last pipeline; what is upscaled has its own default size.
    """
    name = model or "owner/magihuman-base"
    pipe = published_pipeline("base", dtype) if model is None else configured_pipeline(model, dtype)
    upscale_pipe = None
    if upscale is not None:
        upscale_pipe = configured_pipeline(upscale, dtype)
        for argument, part, wanted in zip(("model", "upscale"), (pipe, upscale_pipe), PIPELINES.values(), strict=True):
            if not isinstance(part, wanted):
                raise ValueError(f"`{argument}` holds a {type(part).__name__}, it must hold a {wanted.__name__}.")
    elif model is None:
        pixels = (height or pipe.config.default_height) * (width or pipe.config.default_width)
        if pixels > MAX_BASE_SCALE * pipe.config.default_height * pipe.config.default_width:
            fitting = (variant for variant, (rows, columns) in UPSCALE_SIZES.items() if rows * columns >= pixels)
            variant = next(fitting, "sr_1080p")
            upscale, upscale_pipe = f"owner/magihuman-{variant.replace('_', '-')}", published_pipeline(variant, dtype)

    config = (upscale_pipe or pipe).config
    num_frames = pipe.config.get("default_num_frames", 126) if num_frames is None else num_frames
    height = config.default_height if height is None else height
    width = config.default_width if width is None else width
    if upscale_pipe is None:
        return [plan_pipeline(name, pipe, height, width, num_frames)]
    low = sorted((pipe.config.default_height, pipe.config.default_width), reverse=height > width)
    if height < low[0] or width < low[1]:
        raise ValueError(f"`height`={height} and `width`={width} must not be less than what is upscaled, {low}.")
    first = plan_pipeline(name, pipe, *low, num_frames)
    return [first, plan_pipeline(upscale, upscale_pipe, height, width, num_frames)]


def choose(plan: MemoryPlan, vram: float) -> Choice:
    """The fastest setting that fits into `vram` GiB, of which 1 is left to CUDA; ValueError says what is missing."""
    for choice in plan.choices:
        if choice.peak <= (vram - RESERVED_GIB) * GIB:
            return choice
    leanest = min(plan.choices, key=lambda choice: choice.peak)
    needed = leanest.peak / GIB + RESERVED_GIB
    raise ValueError(
        f"No setting makes {plan.height}x{plan.width}, {plan.num_frames} frames, fit into {vram:g} GiB: the leanest,"
        f" {leanest.setting.name}, needs {needed:.1f} GiB, {needed - vram:.1f} more, in the stage {leanest.stage!r} of"
        f" {plan.model}. A smaller or shorter video needs less."
    )


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def format_plan(plan: MemoryPlan, vram: float) -> str:
    """A plan as three tables in GiB: weights, what stages need beyond them, and settings with whether they fit."""
    weights = [
        (name, gib(sum(by_dtype.values())), ", ".join(f"{gib(n)} {str(d)[6:]}" for d, n in by_dtype.items()))
        for name, by_dtype in plan.weights.items()
    ]
    stages = [
        (each.name, each.component, *(gib(each.peaks[False, lean]) for lean in (False, True))) for each in plan.stages
    ]
    settings = []
    for whole, lean in zip(plan.choices[::2], plan.choices[1::2], strict=True):
        fits, fits_lean = (choice.peak <= (vram - RESERVED_GIB) * GIB for choice in (whole, lean))
        verdict = "yes" if fits else LEAN if fits_lean else "no"
        settings.append((whole.setting.name, gib(whole.peak), gib(lean.peak), verdict))
    total = sum(sum(by_dtype.values()) for by_dtype in plan.weights.values())
    seconds, dtype = plan.num_frames / FRAME_RATE, str(plan.dtype)[6:]
    return f"""\
{plan.model}, {plan.pipeline_name}: {plan.height}x{plan.width}, {plan.num_frames} frames ({seconds:.1f} s), {dtype}.\
 GiB throughout.

{format_table(("part", "weights", "of these"), weights)}

{format_table(("stage", "part", "beyond weights", LEAN), stages)}

{format_table(("setting", "needs", LEAN, f"fits {vram:g}, {RESERVED_GIB:g} left free"), settings)}

Weights that are offloaded lie in RAM, {gib(total)} in all."""


def format_calls(plan: MemoryPlan, vram: float) -> str:
    """The calls of the fastest setting that fits, one a line; raises what [`choose`] does."""
    setting = choose(plan, vram).setting
    calls = [call for call in setting.calls if "vae" in plan.weights or not call.startswith("pipe.vae.")]
    return "\n".join((f"# {plan.model}: {setting.name}", *calls))
