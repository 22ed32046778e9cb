# SPDX-License-Identifier: Apache-2.0
"""What a call needs of a GPU's memory, and which settings make it fit: `magihuman plan`.

Only configs are downloaded: the real classes run on the meta device, where tensors have a shape but no data, while
the bytes of their storages are counted, so that the figures follow the code.
"""

import copy
import functools
import inspect
import itertools
import json
import os
import weakref
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderOobleck, DiffusionPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # this and the next have no public name; torch's own
from torch.utils._pytree import tree_leaves  # counters of operations are built on them
from transformers import T5GemmaConfig, T5GemmaEncoderModel

from ..autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo
from ..checks import INF, check_choice, check_dtype, check_integer, show
from ..constants import FRAME_RATE, MAX_PLANNED_FRAMES, QUANTIZERS
from ..conversion import UPSCALE_SIZES, variant_config
from ..files import naming
from ..pipeline_base import MAX_SEQUENCE_LENGTH, check_numbers
from ..pipeline_magihuman import MagiHumanAudioVideoPipeline
from ..pipeline_magihuman_latent_upscale import MagiHumanLatentUpscalePipeline
from ..scheduling_magihuman_flow import MagiHumanFlowScheduler
from ..transformer_magihuman import MagiHumanTransformer3DModel
from .embedded import find_model

GIB = 2**30
RESERVED_GIB = 1.0  # CUDA's context, the workspaces of its libraries and the gaps between tensors
PARTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae", "audio_vae")
PIPELINES = (MagiHumanAudioVideoPipeline, MagiHumanLatentUpscalePipeline)
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
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


def quantize_rows(states: Tensor) -> Tensor:
    """Rows in float8, with the copies of TorchAO, which live together."""
    scale = states.abs().amax(dim=-1, keepdim=True).float()
    whole = states.float()
    scaled = whole / scale
    clamped = scaled.clamp(-448.0, 448.0)
    return clamped.to(torch.float8_e4m3fn)


class Kernels(TorchFunctionMode):
    """Has attention on the meta device allocate what flash kernels do, not a matrix of scores, and linears of one byte
    a weight what TorchAO's do, copies that `torch.compile` spares too."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kernels = {F.scaled_dot_product_attention: self.attend, F.linear: self.project}
        return kernels.get(func, func)(*args, **(kwargs or {}))

    def project(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype == torch.int8:
            return F.linear(states, weight.to(states.dtype)) * states.new_empty(len(weight))
        if weight.dtype != torch.float8_e4m3fn:
            return F.linear(states, weight, bias)
        quantized = quantize_rows(states)
        return quantized.new_empty((*states.shape[:-1], len(weight)), dtype=states.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        if not query.is_meta:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **rest)
        # The flash kernel for CPUs is the only one that knows the meta device.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask)[0]


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(module))


def measure_memory(run: Callable[[], Any], *modules: nn.Module) -> tuple[int, int]:
    """Bytes that `run` needs at most, and that it leaves (as weight norm does), beyond what the modules weigh."""
    with torch.no_grad(), Kernels(), MemoryTracker() as tracker:
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


def load_index(model: str, allowed: Sequence[type] = PIPELINES, option: str = "`model`") -> dict[str, Any]:
    """What the `model_index.json` of a directory or repository gives its class, also by default; `OSError`
    if it cannot be read, `ValueError` if it is not that of an allowed class, or names parts that do not exist."""
    name, classes = f"{option} {show(model)}", {each.__name__: each for each in allowed}
    find_model(option, model, {})
    try:
        index = dict(DiffusionPipeline.load_config(model))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        message = f"{name} has no model_index.json that can be read; `magihuman convert` makes one: {error}"
        raise OSError(message) from error
    if (found := index.get("_class_name")) not in tuple(classes):
        raise ValueError(f"{name} holds a {str(found)[:120]}, it must hold a {' or a '.join(classes)}.")
    for part in PARTS:
        match index.get(part, (None, None)):
            case [None, None] if part not in ("transformer", "scheduler"):
                pass
            case [str(library), str(class_name)] if hasattr(LIBRARIES.get(library, diffusers), class_name):
                pass
            case entry:
                raise ValueError(f"{name} has the {part} {show(entry)}, it must be a library and a class of it.")
    known = {key: index[key] for key in inspect.signature(classes[found]).parameters if key in index}
    with naming(model):  # without parts, which checks the settings
        settings = classes[found](**known | dict.fromkeys(PARTS)).config
    return {**settings, **known, "_class_name": found}


def configured_pipeline(model: str, dtype: torch.dtype, allowed: Sequence[type] = PIPELINES) -> DiffusionPipeline:
    """A saved pipeline of an allowed class, without data: of a directory or repository only configs are read."""
    index, classes = load_index(model, allowed), {each.__name__: each for each in allowed}

    def make_component(name: str, library: str | None, class_name: str | None) -> Any:
        if name == "tokenizer" or class_name is None:
            return None
        part = getattr(LIBRARIES.get(library, diffusers), class_name)
        if name == "scheduler":
            return part.from_pretrained(model, subfolder=name)
        if library == "transformers":
            make, config = part, part.config_class.from_pretrained(model, subfolder=name)
        else:
            make, config = part.from_config, part.load_config(model, subfolder=name)
        made = make_meta_model(lambda: make(config), torch.float32 if name == "audio_vae" else dtype)
        if name == "transformer":  # which forgets it
            made.register_to_config(quantization_config=config.get("quantization_config"))
        return made

    arguments = {name: value for name, value in index.items() if not name.startswith("_")}
    parts = {name: make_component(name, *each) for name, each in arguments.items() if isinstance(each, (list, tuple))}
    return classes[index["_class_name"]](**arguments | parts)


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


class Stage(NamedTuple):
    """A part of a call in which one component runs; `peaks` are the bytes it needs beyond the weights, with what those
    before it leave, by what the transformer's weights are stored as and whether all is lean."""

    name: str
    component: str
    run: Callable[[], Any]
    peaks: dict[tuple[str | None, bool], int]
    measured: dict[tuple[str | None, bool], tuple[int, int]]


def make_stages(pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> list[Stage]:
    """Every stage of a call that a pipeline has the components for, with the longest text, where the pipeline is."""
    # The pipelines' own way to ask; `device` is the CPU while weights are offloaded.
    config, device = pipe.transformer.config, pipe._execution_device
    zeros = functools.partial(torch.zeros, device=device)
    shape, audio_shape = pipe.latent_shapes(1, num_frames, height, width)
    # The masks of the text, which are small, would be computed from values.
    masks = dict.fromkeys(("full_attention", "sliding_attention"))

    def denoise() -> None:
        latents, audio = zeros(shape), zeros(audio_shape)
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
    return [Stage(*key, run, {}, {}) for key, run in stages.items() if getattr(pipe, key[1]) is not None]


AUTOENCODERS = ("vae", "audio_vae")  # stay on the GPU in group offloading
LEAN = "in tiles and chunks"
STORED = "float8-stored"  # cast back where it is used
# By the names that the command takes, from fast to slow.
OFFLOADING = {
    "none": "all on the GPU",
    "model": "model offload",
    "block": "group offload, blocks",
    "leaf": "group offload, leaves",
}
GROUPS = {"use_stream": True, "exclude_modules": [*AUTOENCODERS]}
LEVELS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
}


class Call(NamedTuple):
    """A call of a method of a loaded pipeline, or of a part of it; as a string what a user writes, of `pipe`."""

    part: str | None
    method: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = {}

    def __str__(self) -> str:
        def write(value: Any) -> str:
            if isinstance(value, torch.device):
                return f'torch.device("{value}")'
            return json.dumps(value) if isinstance(value, str | list) else repr(value)

        given = [*map(write, self.arguments), *(f"{name}={write(value)}" for name, value in self.options.items())]
        return f"pipe{f'.{self.part}' * (self.part is not None)}.{self.method}({', '.join(given)})"

    def run(self, pipe: DiffusionPipeline) -> None:
        owner = pipe if self.part is None else getattr(pipe, self.part)
        getattr(owner, self.method)(*self.arguments, **self.options)


class Speed(NamedTuple):
    """What is asked of the transformer: how it is quantised, whether its blocks are compiled, and its attention."""

    quantize: str | None = None
    compile: bool = False
    attention: str | None = None


class Setting(NamedTuple):
    """Where weights lie, what those of the transformer's blocks are stored as (`None`: as they are), whether its
    projections are fused, which takes memory, and whether the autoencoder works in tiles and the feed-forward of the
    transformer in chunks (`lean`)."""

    offload: str
    weights: str | None = None
    fused: bool = False
    lean: bool = False

    @property
    def name(self) -> str:
        kind = f", {self.weights} transformer" * (self.weights is not None)
        return OFFLOADING[self.offload] + kind + ", fused projections" * self.fused + f", {LEAN}" * self.lean


def make_settings(weights: str | None = None, compiled: bool = False, stored: bool = True) -> tuple[Setting, ...]:
    """From fast to slow, those first that round no weight; float8 storage can neither be quantised nor compiled."""
    kinds = (weights, STORED) if stored and not compiled and weights is None else (weights,)
    fused = [Setting("none", None, True, lean) for lean in (False, True)] if compiled and weights is None else []
    return *fused, *(Setting(x, y, False, lean) for y, x, lean in itertools.product(kinds, OFFLOADING, (False, True)))


SETTINGS = make_settings()


def offload_call(offload: str, device: str) -> Call:
    if offload == "none":
        return Call(None, "to", (device,))
    if offload == "model":
        return Call(None, "enable_model_cpu_offload", (), {"device": device})
    return Call(None, "enable_group_offload", (torch.device(device),), GROUPS | LEVELS[offload])


def make_calls(
    setting: Setting, speed: Speed, dtype: torch.dtype, device: str = "cuda", has_vae: bool = True
) -> list[Call]:
    """The one sequence of calls that puts a loaded pipeline into a setting: `plan` shows it, the command runs it."""
    whole = setting.offload in ("none", "model")  # where groups of weights come and go, the graph breaks
    steps = (
        (setting.weights == STORED, "transformer", "enable_layerwise_casting", (torch.float8_e4m3fn, dtype)),
        (True, *offload_call(setting.offload, device)),
        (setting.fused, "transformer", "fuse_qkv_projections"),
        (speed.attention is not None, "transformer", "set_attention_backend", (speed.attention,)),
        (setting.lean, "transformer", "enable_forward_chunking"),
        (setting.lean and has_vae, "vae", "enable_tiling"),
        (speed.compile, "transformer", "compile_repeated_blocks", (), {"fullgraph": whole, "dynamic": True}),
    )
    return [Call(*call) for is_made, *call in steps if is_made]


def quantize_weights(transformer: MagiHumanTransformer3DModel, kind: str) -> None:
    """Gives the linears of the blocks one byte a weight, for [`Kernels`] on the meta device."""
    transformer.register_to_config(_pre_quantization_dtype=transformer.dtype)
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    for linear in (module for module in transformer.transformer_blocks.modules() if isinstance(module, nn.Linear)):
        linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)


def group_offload_bytes(model: nn.Module, offload: str, num_in_flight: int) -> int:
    """Of a model on the meta device: groups that stay while others come and go, and the largest of the others."""
    model = copy.deepcopy(model)
    apply_group_offloading(model, torch.device("cpu"), torch.device("meta"), **LEVELS[offload])
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
) -> dict[str, dict[str, int]]:
    """Bytes of weights on the GPU by way of offloading and stage; with a stream one group runs, one is in flight."""
    models = models_of(pipe)
    sizes = {name: bytes_of(model) for name, model in models.items()}
    weights = {"none": {stage.name: sum(sizes.values()) for stage in stages}, "model": {}}

    # In model offloading a component that starts sends the one before it in the sequence away, and no other.
    sequence = [name for name in pipe.model_cpu_offload_seq.split("->") if name in models]
    present = set()
    for stage in stages:
        present.add(stage.component)
        present -= set(sequence[: sequence.index(stage.component)][-1:])
        weights["model"][stage.name] = sum(sizes[name] for name in present)

    for offload in LEVELS:
        held = dict.fromkeys(models, sum(sizes[name] for name in models if name in AUTOENCODERS))
        for name in models.keys() - set(AUTOENCODERS):
            held[name] += group_offload_bytes(models[name], offload, num_in_flight)
        weights[offload] = {stage.name: held[stage.component] for stage in stages}
    return weights


def weights_in_ram(pipe: DiffusionPipeline) -> dict[str, int]:
    """Bytes in RAM by way of offloading; for `"none"` while they are loaded."""
    models = models_of(pipe)
    whole = sum(bytes_of(model) for model in models.values())
    offloaded = [tensor for name, model in models.items() if name not in AUTOENCODERS for tensor in tensors_of(model)]
    # What a stream reads is pinned, and PyTorch pins powers of two.
    rounding = sum((1 << (tensor.nbytes - 1).bit_length()) - tensor.nbytes for tensor in offloaded if tensor.nbytes)
    return dict.fromkeys(OFFLOADING, whole + rounding) | dict.fromkeys(("none", "model"), whole)


class MemoryPlan(NamedTuple):
    """What a call needs: bytes of files on disk, of weights by component and dtype, of stages, and in each setting of
    stages on the GPU, and in RAM; `speed` is what was asked for."""

    model: str
    title: str
    size: tuple[int, int, int]
    dtype: torch.dtype
    speed: Speed
    disk: int
    weights: dict[str, dict[torch.dtype, int]]
    stages: list[Stage]
    needs: dict[Setting, dict[str, int]]
    ram: dict[Setting, int]


def measure_stages(pipe: DiffusionPipeline, stages: Sequence[Stage], kind: str | None, lean: bool) -> None:
    """Fills in the peaks of stages, of a transformer with that kind of weights."""
    models, blocks, left = models_of(pipe), pipe.transformer.transformer_blocks, 0
    # Blocks that are alike need the same memory, so one of each kind is run.
    kinds = {(repr(each), each.attn.local_attention_frames): each for each in blocks}
    pipe.transformer.transformer_blocks = nn.ModuleList(kinds.values())
    pipe.transformer.enable_forward_chunking() if lean else pipe.transformer.disable_forward_chunking()
    if pipe.vae is not None:
        pipe.vae.use_tiling = lean
    for stage in stages:
        # Where this stage ignores one of the two, it needs what it does without it, measured before.
        key = kind if stage.component == "transformer" else None, lean and stage.component in ("transformer", "vae")
        peak, kept = stage.measured[key] = stage.measured.get(key) or measure_memory(
            stage.run, models[stage.component]
        )
        stage.peaks[kind, lean] = left + peak
        left += kept
    pipe.transformer.transformer_blocks = blocks


def plan_pipeline(
    model: str,
    pipe: DiffusionPipeline,
    height: int,
    width: int,
    num_frames: int,
    speed: Speed | None = None,
    stored: bool = True,
) -> MemoryPlan:
    """What one call needs of a pipeline on the meta device, whose transformer is changed. `stored` is whether settings
    that store its weights as float8 are planned too."""
    pipe.latent_shapes(1, num_frames, height, width)  # checks
    models, transformer, speed = models_of(pipe), pipe.transformer, speed or Speed()
    dtype, saved = transformer.dtype, transformer.config.get("quantization_config")
    if saved and speed.quantize is not None:
        raise ValueError(f"`quantize`={speed.quantize!r}, but the transformer of {show(model)} is quantised already.")
    kind = speed.quantize if not saved else "float8" if "Float8" in str(saved) else "int8"
    disk = sum(map(bytes_of, models.values()))
    if kind is not None:
        quantize_weights(transformer, kind)
    disk = sum(map(bytes_of, models.values())) if saved else disk
    weights = {name: Counter() for name in models}
    for name, parameter in ((name, each) for name, part in models.items() for each in part.parameters()):
        weights[name][parameter.dtype] += parameter.nbytes

    stages, settings = make_stages(pipe, height, width, num_frames), make_settings(kind, speed.compile, stored)
    on_gpu, in_ram, fused = {}, {}, 0
    if settings[0].fused:
        fused = -bytes_of(transformer)
        transformer.fuse_qkv_projections()
        fused += bytes_of(transformer)
        transformer.unfuse_qkv_projections()
    for key in dict.fromkeys((setting.weights, setting.lean) for setting in settings):
        if key == (STORED, False):
            transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
        if key[0] not in on_gpu:
            on_gpu[key[0]], in_ram[key[0]] = weights_on_gpu(pipe, stages), weights_in_ram(pipe)
        measure_stages(pipe, stages, *key)

    def need(setting: Setting, stage: Stage) -> int:
        weights = on_gpu[setting.weights][setting.offload][stage.name] + fused * setting.fused
        return weights + stage.peaks[setting.weights, setting.lean]

    needs = {each: {stage.name: need(each, stage) for stage in stages} for each in settings}
    ram = {each: in_ram[each.weights][each.offload] for each in settings}
    size = f"{height}x{width}, {num_frames} frames ({num_frames / FRAME_RATE:.1f} s), {str(dtype)[6:]}"
    model = model if model.isprintable() else repr(model)  # a line break would end the comment in the calls
    title = f"{model}, {type(pipe).__name__}: {size}"
    return MemoryPlan(model, title, (height, width, num_frames), dtype, speed, disk, weights, stages, needs, ram)


def check_speed(quantize: str | None = None, compile: bool = False, attention: str | None = None) -> Speed:
    """What is asked of the transformer; `ValueError` for what does not exist. Whether it runs depends on the GPU."""
    if quantize is not None:
        check_choice("quantize", quantize, *QUANTIZERS)
    if attention is not None:
        check_choice("attention", attention, *(backend.value for backend in AttentionBackendName))
    return Speed(quantize, check_choice("compile", compile, True, False), attention)


def plan_call(
    model: str | os.PathLike[str] | None = None,
    upscale: str | os.PathLike[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    attention: str | None = None,
) -> list[MemoryPlan]:
    """A plan for each pipeline of a call, in the order in which they run, one at a time in memory.

    `model` and `upscale` are directories or repositories. Without `model` it is the published base, and for more than
    twice its pixels also the published super-resolution. Sizes default to the last pipeline's, `dtype` to bfloat16.
    `quantize`, `"int8"` or `"float8"`, `compile` and `attention`, the name of a backend, are of the transformer.
    """
    check_numbers(locals(), "height", "width", "num_frames")
    dtype, speed = check_dtype("dtype", dtype), check_speed(quantize, compile, attention)
    if num_frames is not None:
        check_integer("num_frames", num_frames, 1, MAX_PLANNED_FRAMES)
    for name, path in (("model", model), ("upscale", upscale)):
        if not isinstance(path, str | os.PathLike | None):
            raise ValueError(f"`{name}`={show(path)} must be a directory or a repository.")
    model, upscale = (None if path is None else os.fspath(path) for path in (model, upscale))
    allowed = PIPELINES if upscale is None else PIPELINES[:1]
    pipe = published_pipeline("base", dtype) if model is None else configured_pipeline(model, dtype, allowed)
    last, low = pipe, (pipe.config.default_height, pipe.config.default_width)
    if upscale is not None:
        last = configured_pipeline(upscale, dtype, PIPELINES[1:])
    elif model is None and (pixels := (height or low[0]) * (width or low[1])) > 2 * low[0] * low[1]:
        variant = next((name for name, size in UPSCALE_SIZES.items() if size[0] * size[1] >= pixels), "sr-1080p")
        upscale, last = f"owner/magihuman-{variant}", published_pipeline(variant, dtype)

    model = model or "owner/magihuman-base"
    num_frames = pipe.config.get("default_num_frames", 126) if num_frames is None else num_frames
    height = last.config.default_height if height is None else height
    width = last.config.default_width if width is None else width
    if upscale is None:
        return [plan_pipeline(model, pipe, height, width, num_frames, speed)]
    low = sorted(low, reverse=height > width)
    if height < low[0] or width < low[1]:
        raise ValueError(f"`height`={height} and `width`={width} must not be less than what is upscaled, {low}.")
    sizes = ((model, pipe, *low), (upscale, last, height, width))
    return [plan_pipeline(*each, num_frames, speed) for each in sizes]


def choose(plan: MemoryPlan, vram: float, ram: float = INF, offload: str = "auto") -> Setting:
    """The fastest setting that fits into `vram` GiB, of which 1 is left to CUDA, with what is offloaded in `ram` GiB;
    `offload` other than `"auto"` allows it alone of `OFFLOADING`. `ValueError` says what is missing, or would fit."""
    peaks = {setting: max(needs.values()) / GIB + RESERVED_GIB for setting, needs in plan.needs.items()}
    in_ram = {setting: 0 if setting.offload == "none" else plan.ram[setting] / GIB for setting in peaks}
    fitting = [setting for setting, needed in peaks.items() if needed <= vram and in_ram[setting] <= ram]
    if allowed := [setting for setting in fitting if offload in ("auto", setting.offload)]:
        return allowed[0]
    what, others, hint = "No setting makes", [*peaks], "A smaller or shorter video needs less."
    if fitting:
        what, others = f"`offload`={offload!r} does not make", [each for each in peaks if each.offload == offload]
        names = dict.fromkeys(repr(setting.offload) for setting in fitting)
        hint = f"{', '.join(names)} would fit."
    # What needs the least of what lacks: of the GPU's memory, where that is enough of RAM.
    leanest = min(others, key=lambda each: (max(peaks[each], vram), in_ram[each] * (peaks[each] <= vram)))
    stage = max(plan.needs[leanest], key=plan.needs[leanest].get)
    amounts = ((peaks[leanest], vram, f"GiB in the stage {stage!r}"), (in_ram[leanest], ram, "GiB of RAM"))
    lacking = [f"{needed:.1f} {kind}, {needed - there:.1f} more" for needed, there, kind in amounts if needed > there]
    raise ValueError(
        f"{what} {plan.size[0]}x{plan.size[1]}, {plan.size[2]} frames, fit into {vram:g} GiB: the leanest,"
        f" {leanest.name}, needs {' and '.join(lacking)}, for {plan.model}. {hint}"
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
    settings = list(plan.needs)
    kind = settings[0].weights
    stages = [(s.name, s.component, s.peaks[kind, False], s.peaks[kind, True]) for s in plan.stages]
    rows = []
    for setting, lean in zip(settings[::2], settings[1::2], strict=True):
        peaks = [max(plan.needs[each].values()) for each in (setting, lean)]
        fits, fits_lean = (peak / GIB + RESERVED_GIB <= vram for peak in peaks)
        fits = "yes" if fits else LEAN if fits_lean else "no"
        rows.append((setting.name, *peaks, plan.ram[setting], fits))
    parts = [
        f"{plan.title}. GiB throughout.",
        format_table(("part", "weights", "of these"), weights),
        format_table(("stage", "part", "beyond weights", LEAN), stages),
        format_table(("setting", "needs", LEAN, "RAM", f"fits {vram:g}, {RESERVED_GIB:g} left free"), rows),
        f"Files on disk: {plan.disk / GIB:.2f}. Without offloading, RAM is needed while weights are loaded.",
    ]
    return "\n\n".join(parts)


def format_calls(plan: MemoryPlan, vram: float) -> str:
    """The calls of the fastest setting that fits, one a line; raises what [`choose`] does."""
    setting = choose(plan, vram)
    lines = [f"# {plan.model}: {setting.name}"]
    if plan.speed.quantize is not None:  # by `tools.quantize`, as the command does
        mapping = f'{{"transformer": torchao_config("{plan.speed.quantize}")}}'
        lines += [
            "from diffusers_magihuman.tools.quantize import torchao_config",
            f"config = PipelineQuantizationConfig(quant_mapping={mapping})",
            f'dtype = {{"default": {plan.dtype}, "audio_vae": torch.float32}}',
            f"pipe = DiffusionPipeline.from_pretrained({plan.model!r}, dtype=dtype, quantization_config=config)",
        ]
    calls = make_calls(setting, plan.speed, plan.dtype, has_vae="vae" in plan.weights)
    return "\n".join([*lines, *map(str, calls)])


def run_plan(arguments: Namespace) -> None:
    size = (arguments.height, arguments.width, arguments.num_frames)
    speed = (arguments.quantize, arguments.compile, arguments.attention)
    plans = plan_call(arguments.model, arguments.upscale, *size, arguments.dtype, *speed)
    for plan in plans:
        print(format_plan(plan, arguments.vram), end="\n\n")
    calls = "\n".join(format_calls(plan, arguments.vram) for plan in plans)
    if len(plans) > 1:
        disk, ram = (sum(plan.disk for plan in plans), [plan.ram[choose(plan, arguments.vram)] for plan in plans])
        sizes = [size / GIB for size in (disk, max(ram), sum(ram))]
        print("Both: {:.2f} on disk, {:.2f} in RAM one after the other, {:.2f} at once.\n".format(*sizes))
    print(calls)
