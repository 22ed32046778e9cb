# Copyright 2026 The diffusers-magihuman authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a call needs of a GPU's memory, and which settings make it fit: `magihuman plan`.

Notable features:

- nothing is downloaded but configs, nothing computed: the real classes run on the meta device, where tensors have a
  shape and no data, while the bytes of their storages are counted
- so the figures follow the code: what it keeps, what it copies, which windows, tiles and casts it makes
- attention counts as flash kernels do it, with inputs and output but without a matrix of scores
- blocks of the transformer that are alike need the same, so that one of each kind is run
"""

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderOobleck, DiffusionPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, T5GemmaConfig, T5GemmaEncoderModel

from .autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from .checkpoints import UPSCALE_SIZES, variant_config
from .pipeline_components import FRAME_RATE, MAX_SEQUENCE_LENGTH
from .pipeline_magihuman import MagiHumanAudioVideoPipeline
from .pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from .scheduling_magihuman_flow import MagiHumanFlowScheduler
from .transformer_magihuman import MagiHumanTransformer3DModel


GIB = 2**30
# What CUDA's context, the workspaces of its libraries and the gaps between tensors take besides the tensors.
RESERVED_GIB = 1.0
# A video of more pixels than this many times those of the base model's default is planned with super-resolution.
MAX_BASE_SCALE = 2
META = torch.device("meta")

# The encoder of google/t5gemma-9b-9b-ul2, which is that of Gemma 2 9B.
T5GEMMA_9B = {
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}


class MemoryTracker(TorchDispatchMode):
    """
    Counts the bytes of the tensor storages that are alive, among those made in its context and those told to `hold`.

    It works on any device, the meta device too. Memory that a kernel takes and gives back inside is not seen.

    Attributes:
        live (`int`): Bytes of the storages that are alive now.
        peak (`int`): The largest value that `live` has had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._alive: set[int] = set()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors, each storage once, for as long as they are alive."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address, num_bytes = storage._cdata, storage.nbytes()
            if address not in self._alive:
                self._alive.add(address)
                weakref.finalize(storage, self._release, address, num_bytes).atexit = False
                self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def _release(self, address: int, num_bytes: int) -> None:
        self._alive.remove(address)
        self.live -= num_bytes

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        return output


class FlashAttention(TorchFunctionMode):
    """Has attention on the meta device allocate what flash kernels do; it would make a matrix of scores instead."""

    def __torch_function__(
        self, func: Callable[..., Any], types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            func = flash_attention
        return func(*args, **kwargs)


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention`, on the meta device by the flash kernel for CPUs, which knows that device."""
    if not query.is_meta:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def measure_memory(run: Callable[[], Any], *modules: nn.Module) -> tuple[int, int]:
    """
    Bytes of tensors that `run` needs at most, and that it leaves, beyond the weights that the modules have before.

    A module that weight norm is applied to keeps the weight that it computed last.
    """
    with torch.no_grad(), FlashAttention(), MemoryTracker() as tracker:
        for module in modules:
            tracker.hold([*module.parameters(), *module.buffers()])
        weights = tracker.live
        run()
        return tracker.peak - weights, tracker.live - weights


# Pipelines on the meta device


def make_meta_model(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model without data, in the dtypes that `from_pretrained(dtype=...)` gives it."""
    with META:
        model = make().eval()
    kept_in_fp32 = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if kept_in_fp32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def published_pipeline(variant: str, dtype: torch.dtype) -> DiffusionPipeline:
    """
    The published models of a variant, without data.

    Args:
        variant (`str`): `"base"`, `"distill"`, `"sr_540p"` or `"sr_1080p"`.
        dtype (`torch.dtype`): Dtype of all but the float32 parts and the sound autoencoder, which is float32.
    """
    num_layers = inspect.signature(MagiHumanTransformer3DModel.__init__).parameters["num_layers"].default
    config = variant_config(variant, num_layers)
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
    """
    A saved pipeline, without data: of a repository only the configs are read.

    Args:
        model (`str`): Directory or repository of a pipeline of this package.
        dtype (`torch.dtype`): Dtype of all but the float32 parts and the sound autoencoder, which is float32.

    Raises:
        `ValueError`: It is another pipeline, or has no transformer.
        `OSError`: There is no such directory or repository.
    """
    index = DiffusionPipeline.load_config(model)
    classes = {
        pipeline_class.__name__: pipeline_class
        for pipeline_class in (MagiHumanAudioVideoPipeline, MagiHumanLatentUpscalePipeline)
    }
    if index["_class_name"] not in classes:
        raise ValueError(f"{model!r} holds a {index['_class_name']}, it must hold one of {list(classes)}.")
    components, settings = {}, {}
    for name, value in index.items():
        if isinstance(value, (list, tuple)):
            components[name] = None
            if value[1] is not None and name != "tokenizer":
                component_dtype = torch.float32 if name == "audio_vae" else dtype
                components[name] = configured_component(model, name, *value, component_dtype)
        elif not name.startswith("_"):
            settings[name] = value
    if components["transformer"] is None:
        raise ValueError(f"{model!r} has no transformer, there is nothing to plan.")
    return classes[index["_class_name"]](**components, **settings)


def configured_component(model: str, name: str, library: str, class_name: str, dtype: torch.dtype) -> Any:
    if library == "transformers":
        config = AutoConfig.from_pretrained(model, subfolder=name)
        return make_meta_model(lambda: getattr(transformers, class_name)(config), dtype)
    component_class = getattr(diffusers, class_name)
    config = component_class.load_config(model, subfolder=name)
    if name == "scheduler":
        return component_class.from_config(config)
    return make_meta_model(lambda: component_class.from_config(config), dtype)


# Stages of a call


class Stage(NamedTuple):
    """A part of a call in which one component runs."""

    name: str
    component: str
    run: Callable[[], Any]


def make_stages(pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> Iterator[Stage]:
    """Every stage of a call that a pipeline has the components for, with the longest text, where the pipeline is."""
    config, device = pipe.transformer.config, pipe._execution_device
    latent_frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    ratio = pipe.vae_scale_factor_spatial
    shape = (1, config.in_channels, latent_frames, height // ratio, width // ratio)

    def encode_text() -> None:
        # The masks, which are small, would be computed from values.
        masks = dict.fromkeys(("full_attention", "sliding_attention"))
        input_ids = torch.zeros(1, MAX_SEQUENCE_LENGTH, dtype=torch.long, device=device)
        pipe.text_encoder(input_ids=input_ids, attention_mask=masks)

    def encode_image() -> None:
        pipe.encode_video(torch.zeros(1, 3, 1, height, width, device=device), device)

    def encode_sound() -> None:
        pipe.encode_audio(torch.zeros(2, num_frames * pipe.audio_hop_length, device=device), None, device)

    def denoise() -> None:
        latents = torch.zeros(shape, device=device)
        audio_latents = torch.zeros(1, num_frames, config.audio_in_channels, device=device)
        texts = torch.zeros(2, 1, MAX_SEQUENCE_LENGTH, config.text_in_channels, device=device)
        # After two steps the solver has all the history that it keeps.
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps[:2]:
            latents = scheduler.step(torch.zeros_like(latents), t, latents, return_dict=False)[0]
        # The branches of guidance run one after the other, the second with the velocities of the first beside it.
        velocities = [torch.zeros_like(latents), torch.zeros_like(audio_latents)]
        velocities += pipe.transformer(latents, audio_latents, texts[0], return_dict=False)

    def decode_video() -> None:
        for window in pipe._decode_windows(torch.zeros(shape, device=device)):
            pipe.video_processor.postprocess_video(window, output_type="pt")

    def decode_sound() -> None:
        latents = torch.zeros(1, config.audio_in_channels, num_frames, device=device)
        pipe.audio_vae.decode(latents.to(pipe.audio_vae.dtype))

    if pipe.text_encoder is not None:
        yield Stage("text", "text_encoder", encode_text)
    if pipe.vae is not None and pipe.vae.encoder is not None:
        yield Stage("first frame", "vae", encode_image)
    if pipe.audio_vae is not None:
        yield Stage("given sound", "audio_vae", encode_sound)
    yield Stage("denoising step", "transformer", denoise)
    if pipe.vae is not None:
        yield Stage("decoding video", "vae", decode_video)
    if pipe.audio_vae is not None:
        yield Stage("decoding sound", "audio_vae", decode_sound)


# Settings


class Setting(NamedTuple):
    """
    Where weights lie and in which dtype.

    Args:
        name (`str`): For the table.
        offload (`str`, *optional*): `"model"`, or the type of group offloading of text encoder and transformer.
        float8 (`bool`): Whether the linears of the transformer are stored as float8 and cast one at a time.
    """

    name: str
    offload: str | None
    float8: bool


# From fast to slow, those first that change no number.
SETTINGS = tuple(
    Setting(f"{name}, float8 transformer" if float8 else name, offload, float8)
    for float8 in (False, True)
    for name, offload in (
        ("all on the GPU", None),
        ("model offload", "model"),
        ("group offload, blocks", "block_level"),
        ("group offload, leaves", "leaf_level"),
    )
)
AUTOENCODERS = ["vae", "audio_vae"]  # stay on the GPU in group offloading
LEAN = "in tiles and chunks"  # the autoencoder and the feed-forward of the transformer


def count_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def group_offload_bytes(model: nn.Module, offload_type: str, num_in_flight: int) -> int:
    """
    Bytes of weights that are on the GPU at most while a model on the meta device runs under group offloading.

    These are the groups that stay while others come and go, and the largest `num_in_flight` of the others.
    """
    model = copy.deepcopy(model)
    apply_group_offloading(model, torch.device("cpu"), META, offload_type, num_blocks_per_group=1)
    hooks = [
        HookRegistry.check_if_exists_or_initialize(module).get_hook("group_offloading") for module in model.modules()
    ]
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


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def weights_on_gpu(
    pipe: DiffusionPipeline, stages: Sequence[Stage], num_in_flight: int = 2
) -> dict[str | None, dict[str, int]]:
    """
    Bytes of weights on the GPU in each stage, by way of offloading.

    Args:
        pipe (`DiffusionPipeline`): The pipeline on the meta device.
        stages (`Sequence[Stage]`): Its stages in the order in which they run.
        num_in_flight (`int`, defaults to 2):
            Groups on the GPU at once in group offloading: with a stream one runs while the next is fetched.
    """
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


def set_lean(pipe: DiffusionPipeline, lean: bool) -> None:
    """Has the transformer run its feed-forward in chunks and the video autoencoder, if there is one, work in tiles."""
    if lean:
        pipe.transformer.enable_forward_chunking()
    else:
        pipe.transformer.disable_forward_chunking()
    if pipe.vae is not None and lean:
        pipe.vae.enable_tiling()
    elif pipe.vae is not None:
        pipe.vae.disable_tiling()


def choice_name(setting: Setting, lean: bool) -> str:
    return f"{setting.name}, {LEAN}" if lean else setting.name


def setting_lines(setting: Setting, lean: bool, dtype: torch.dtype, has_vae: bool = True) -> list[str]:
    """The lines of Python that put a loaded pipeline `pipe` into a setting, with those of [`set_lean`] if `lean`."""
    lines = []
    if setting.float8:
        lines.append(f"pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, {dtype})")
    if setting.offload is None:
        lines.append('pipe.to("cuda")')
    elif setting.offload == "model":
        lines.append("pipe.enable_model_cpu_offload()")
    else:
        blocks = ["    num_blocks_per_group=1,"] if setting.offload == "block_level" else []
        lines += [
            "pipe.enable_group_offload(",
            '    torch.device("cuda"),',
            f'    offload_type="{setting.offload}",',
            *blocks,
            "    use_stream=True,",
            f"    exclude_modules={AUTOENCODERS},".replace("'", '"'),
            ")",
        ]
    if lean:
        lines.append("pipe.transformer.enable_forward_chunking()")
        lines += ["pipe.vae.enable_tiling()"] * has_vae
    return lines


# The plan


class StagePlan(NamedTuple):
    """
    Bytes that a stage needs beyond the weights, with what those before it leave, by whether the transformer is float8
    and whether all is lean.
    """

    name: str
    component: str
    peaks: dict[tuple[bool, bool], int]


class Choice(NamedTuple):
    """What a call needs in a setting, `lean` in tiles and chunks: the bytes of its hungriest stage."""

    setting: Setting
    lean: bool
    peak: int
    stage: str


class MemoryPlan(NamedTuple):
    """
    What one call of a pipeline needs.

    Args:
        model (`str`): Directory or repository of the pipeline.
        pipeline_name (`str`): Its class.
        height, width (`int`): Size of the video in pixels.
        num_frames (`int`): Length at 25 frames a second.
        dtype (`torch.dtype`): What the linears compute in.
        weights (`dict[str, dict[torch.dtype, int]]`): Bytes by component and dtype.
        stages (`list[StagePlan]`): What each stage needs beyond the weights.
        choices (`list[Choice]`): What each setting needs, as a whole and lean, from fast to slow.
    """

    model: str
    pipeline_name: str
    height: int
    width: int
    num_frames: int
    dtype: torch.dtype
    weights: dict[str, dict[torch.dtype, int]]
    stages: list[StagePlan]
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


def plan_pipeline(model: str, pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> MemoryPlan:
    """
    Finds out what one call of a pipeline needs.

    Args:
        model (`str`): Directory or repository of the pipeline, for the lines of Python.
        pipe (`DiffusionPipeline`):
            The pipeline on the meta device. Afterwards it has a float8 transformer and works in tiles and chunks.
        height, width (`int`): Size of the video in pixels.
        num_frames (`int`): Length at 25 frames a second.

    Raises:
        `ValueError`: A size or number that the pipeline does not take.
    """
    pipe.check_settings(height, width, {"num_frames": num_frames}, "np", [], MAX_SEQUENCE_LENGTH)
    models = models_of(pipe)
    weights: dict[str, dict[torch.dtype, int]] = {name: {} for name in models}
    for name, part in models.items():
        for parameter in part.parameters():
            weights[name][parameter.dtype] = weights[name].get(parameter.dtype, 0) + parameter.nbytes
    dtype = pipe.transformer.dtype
    stages = list(make_stages(pipe, height, width, num_frames))

    on_gpu, needed = {}, {}
    stage_plans = [StagePlan(stage.name, stage.component, {}) for stage in stages]
    for float8 in (False, True):
        if float8:
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
        on_gpu[float8] = weights_on_gpu(pipe, stages)
        for lean in (False, True):
            set_lean(pipe, lean)
            left = 0
            for stage, stage_plan in zip(stages, stage_plans, strict=True):
                # Where this stage ignores one of the two, it needs what it does without it, measured before.
                is_float8 = float8 and stage.component == "transformer"
                is_lean = lean and stage.component in ("transformer", "vae")
                key = stage.name, is_float8, is_lean
                if key not in needed:
                    with one_block_of_each_kind(pipe.transformer):
                        needed[key] = measure_memory(stage.run, models[stage.component])
                peak, kept = needed[key]
                stage_plan.peaks[float8, lean] = left + peak
                left += kept

    choices = []
    for setting in SETTINGS:
        for lean in (False, True):
            peaks = {
                stage.name: on_gpu[setting.float8][setting.offload][stage.name] + stage.peaks[setting.float8, lean]
                for stage in stage_plans
            }
            hungriest = max(peaks, key=peaks.get)
            choices.append(Choice(setting, lean, peaks[hungriest], hungriest))
    return MemoryPlan(model, type(pipe).__name__, height, width, num_frames, dtype, weights, stage_plans, choices)


def plan_call(
    model: str | None = None,
    upscale: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[MemoryPlan]:
    """
    Finds out what it takes to make a video, with the published models unless told.

    Args:
        model (`str`, *optional*):
            Directory or repository of a pipeline. Left out, it is the published base, and for more than twice the
            pixels of its default also the published super-resolution for this size.
        upscale (`str`, *optional*): Super-resolution pipeline that follows `model`, which then makes its default size.
        height, width (`int`, *optional*): Size in pixels; defaults to that of the last pipeline.
        num_frames (`int`, *optional*): Length at 25 frames a second, 126 by default.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): What the linears compute in.

    Returns:
        `list[MemoryPlan]`: A plan for each pipeline, in the order in which they run, one at a time in memory.

    Raises:
        `ValueError`: A size, number or pipeline that does not fit.
        `OSError`: There is no such directory or repository.
    """
    name = model or "owner/magihuman-base"
    pipe = published_pipeline("base", dtype) if model is None else configured_pipeline(model, dtype)
    upscale_pipe = None
    if upscale is not None:
        upscale_pipe = configured_pipeline(upscale, dtype)
        if not isinstance(pipe, MagiHumanAudioVideoPipeline):
            raise ValueError(f"{name!r} holds a {type(pipe).__name__}; `upscale` must follow another pipeline.")
        if not isinstance(upscale_pipe, MagiHumanLatentUpscalePipeline):
            raise ValueError(f"`upscale`={upscale!r} must hold a MagiHumanLatentUpscalePipeline.")
    elif model is None:
        pixels = (height or pipe.config.default_height) * (width or pipe.config.default_width)
        if pixels > MAX_BASE_SCALE * pipe.config.default_height * pipe.config.default_width:
            fitting = [variant for variant, (rows, columns) in UPSCALE_SIZES.items() if rows * columns >= pixels]
            variant = fitting[0] if fitting else "sr_1080p"
            upscale, upscale_pipe = f"owner/magihuman-{variant.replace('_', '-')}", published_pipeline(variant, dtype)

    num_frames = num_frames or pipe.config.get("default_num_frames", 126)
    last = pipe if upscale_pipe is None else upscale_pipe
    height, width = height or last.config.default_height, width or last.config.default_width
    if upscale_pipe is None:
        return [plan_pipeline(name, pipe, height, width, num_frames)]
    low = sorted((pipe.config.default_height, pipe.config.default_width), reverse=height > width)
    if height < low[0] or width < low[1]:
        raise ValueError(
            f"`height`={height} and `width`={width} must not be less than those of what is upscaled, {low[0]} and"
            f" {low[1]}."
        )
    return [
        plan_pipeline(name, pipe, *low, num_frames),
        plan_pipeline(upscale, upscale_pipe, height, width, num_frames),
    ]


def choose(plan: MemoryPlan, vram: float) -> Choice:
    """
    The fastest setting that fits, one without float8 if there is any.

    Args:
        plan (`MemoryPlan`): The plan.
        vram (`float`): Memory of the GPU in GiB, of which [`RESERVED_GIB`] are left to CUDA.

    Raises:
        `ValueError`: None fits; says what is missing.
    """
    for choice in plan.choices:
        if choice.peak <= (vram - RESERVED_GIB) * GIB:
            return choice
    leanest = min(plan.choices, key=lambda choice: choice.peak)
    needed = leanest.peak / GIB + RESERVED_GIB
    raise ValueError(
        f"No setting makes {plan.height}x{plan.width}, {plan.num_frames} frames, fit into {vram:g} GiB: the leanest,"
        f" {choice_name(leanest.setting, leanest.lean)}, needs {needed:.1f} GiB, {needed - vram:.1f} more,"
        f" in the stage {leanest.stage!r} of {plan.model}. A smaller or shorter video needs less."
    )


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rows = [header, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def format_plan(plan: MemoryPlan, vram: float) -> str:
    """A plan as three tables in GiB: weights, what stages need beyond them, and settings with whether they fit."""

    def gib(number: int) -> str:
        return f"{number / GIB:.2f}"

    weights = [
        (name, gib(sum(by_dtype.values())), ", ".join(f"{gib(n)} {str(d)[6:]}" for d, n in by_dtype.items()))
        for name, by_dtype in plan.weights.items()
    ]
    stages = [
        (stage.name, stage.component, *(gib(stage.peaks[False, lean]) for lean in (False, True)))
        for stage in plan.stages
    ]
    settings = []
    for setting in SETTINGS:
        choices = [choice for choice in plan.choices if choice.setting == setting]
        fits = [choice.peak <= (vram - RESERVED_GIB) * GIB for choice in choices]
        verdict = "yes" if fits[0] else LEAN if fits[1] else "no"
        settings.append((setting.name, *(gib(choice.peak) for choice in choices), verdict))
    total = sum(sum(by_dtype.values()) for by_dtype in plan.weights.values())
    return "\n\n".join(
        (
            f"{plan.model}, {plan.pipeline_name}: {plan.height}x{plan.width}, {plan.num_frames} frames"
            f" ({plan.num_frames / FRAME_RATE:.1f} s), {str(plan.dtype)[6:]}. GiB throughout.",
            format_table(("part", "weights", "of these"), weights),
            format_table(("stage", "part", "beyond weights", LEAN), stages),
            format_table(("setting", "needs", LEAN, f"fits {vram:g}, {RESERVED_GIB:g} left free"), settings),
            f"Weights that are offloaded lie in RAM, {gib(total)} in all.",
        )
    )


def format_script(plans: list[MemoryPlan], vram: float) -> str:
    """The Python that makes the video in the chosen settings; raises what [`choose`] does."""
    first = plans[0]
    lines = [
        "import torch",
        "import diffusers_magihuman  # registers the classes on diffusers",
        "from diffusers import DiffusionPipeline",
        "from diffusers_magihuman import export_to_mp4",
        "",
        f'dtype = {{"default": {first.dtype}, "audio_vae": torch.float32}}',
    ]
    for index, plan in enumerate(plans):
        choice = choose(plan, vram)
        if index:
            lines += ["del pipe  # makes room for the next one"]
        lines += [
            f'pipe = DiffusionPipeline.from_pretrained("{plan.model}", dtype=dtype)',
            *setting_lines(choice.setting, choice.lean, plan.dtype, "vae" in plan.weights),
        ]
        arguments = f"height={plan.height}, width={plan.width}"
        if plan.pipeline_name == MagiHumanAudioVideoPipeline.__name__:
            arguments += f", num_frames={plan.num_frames}"
        else:
            arguments += ", latents=out.frames, audio_latents=out.audio"
        output_type = "latent" if plan is not plans[-1] else "np"
        lines.append(f'out = pipe(prompt, {arguments}, output_type="{output_type}")')
    lines.append('export_to_mp4(out.frames[0], "out.mp4", audio=out.audio[0])')
    return "\n".join(lines)
