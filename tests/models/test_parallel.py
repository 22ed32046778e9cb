"""Context and tensor parallelism on the CPU: several processes with gloo give what one process gives."""

import traceback
from datetime import timedelta
from tempfile import TemporaryDirectory

import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    ParallelConfig,
    TensorParallelConfig,
)
from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs
from helpers import make_inputs, make_low, make_tiny_model, run, upscale
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor

from diffusers_magihuman import MagiHumanTransformer3DModel, parallel

# What the processes share by being forked from one that has it.
IMPORTS = ["diffusers_magihuman", "diffusers.models.autoencoders", "transformers.models.t5gemma", "peft", "pytest"]
PADDED = {"num_attention_heads": 8, "feed_forward_multiple": 96}
PROMPTS = ["A woman says hello.", "No.", "A man with a grey beard laughs."]


def enable(model, **kwargs):
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size(), **kwargs))


@torch.no_grad()
def compare_models(inputs=None, parallel_kwargs=None, fuse=False, **config):
    """The greatest difference between several processes and one."""
    model = make_tiny_model(**config)
    inputs = [make_inputs()] if inputs is None else inputs
    expected = [model(*args, return_dict=False) for args in inputs]
    if fuse:
        model.fuse_qkv_projections()
    enable(model, **(parallel_kwargs or {}))
    return difference([model(*args, return_dict=False) for args in inputs], expected)


def compare_pipelines(call, pipe, *args, **kwargs):
    """`call` is a short call of the pipeline."""
    expected = call(pipe, *args, **kwargs, return_dict=False)
    enable(pipe.transformer)
    return difference([call(pipe, *args, **kwargs, return_dict=False)], [expected])


def difference(outputs, expected):
    pairs = [pair for both in zip(outputs, expected, strict=True) for pair in zip(*both, strict=True)]
    assert all(output.shape == single.shape for output, single in pairs)
    return max((output - single).abs().max().item() for output, single in pairs)


def lengths():
    """Lengths that divide and that do not, down to fewer tokens than processes."""
    sizes = [(3, 9, 7), (2, 8, 4), (1, 2, 1)]
    return compare_models([make_inputs(2, *size) for size in sizes], post_norm_layers=(1, 2))


def mixed_texts():
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    return compare_models([(*make_inputs(3), mask)])


def local_layers():
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    inputs = [make_inputs(num_frames=4), (*make_inputs(2, num_frames=5), mask)]
    local = {"local_attention_layers": (0, 1), "local_attention_frames": 1}
    return compare_models(inputs, coordinate_style="v1", **local)


def fused_projections():
    return compare_models(fuse=True)


def no_gate():
    return compare_models(gated_attention=False)


@torch.no_grad()
def grouped_heads():
    """Key and value heads travel in groups, repeated only until each process has one."""
    differences, sent_heads, exchange = [], [], parallel.SeqAllToAllDim.apply

    def record(group, states, *dims):
        sent_heads.append(states.shape[2])
        return exchange(group, states, *dims)

    for num_key_value_heads, sent in ((1, {2: 2, 4: 4}), (3, {2: 6, 4: 12}), (4, {2: 4, 4: 4}), (12, {2: 12, 4: 12})):
        model = make_tiny_model(
            num_attention_heads=12, num_key_value_heads=num_key_value_heads, num_layers=1, modality_layers=(0,)
        )
        inputs = make_inputs()
        expected = model(*inputs, return_dict=False)
        enable(model)
        sent_heads.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel.SeqAllToAllDim, "apply", record)
            differences.append(difference([model(*inputs, return_dict=False)], [expected]))
        assert sent_heads[:3] == [12, *[sent[dist.get_world_size()]] * 2]
    return max(differences)


def gradients():
    """Each process has the part of its tokens; together they are the gradients of one process."""
    model, inputs = make_tiny_model(local_attention_layers=(1,), local_attention_frames=1), make_inputs(2)
    model.enable_gradient_checkpointing()

    def run():
        model.zero_grad()
        sum(output.square().sum() for output in model(*inputs, return_dict=False)).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = run()
    enable(model)
    parts = run()
    for part in parts.values():
        dist.all_reduce(part)
    return max(((parts[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected)


@torch.no_grad()
def adapters_come_and_go():
    """On embedders and heads too, where the model splits and gathers the sequence."""
    inputs, model = make_inputs(), make_tiny_model()
    plain = model(*inputs, return_dict=False)
    targets = ["video_embedder", "text_embedder", "video_proj_out", "audio_proj_out", "video.to_q", "1.attn.to_q"]
    adapter = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model.add_adapter(adapter)
    adapted = model(*inputs, return_dict=False)
    assert difference([adapted], [plain]) > 1e-2
    enable(model)
    differences = [difference([model(*inputs, return_dict=False)], [adapted])]
    model.unload_lora()
    differences.append(difference([model(*inputs, return_dict=False)], [plain]))
    torch.manual_seed(1)
    model.add_adapter(adapter)
    assert difference([model(*inputs, return_dict=False)], [plain]) > 1e-2
    return max(differences)


def any_lengths_option():
    return compare_models(parallel_kwargs={"ulysses_anything": True})


def given_mesh():
    shape = (1, dist.get_world_size(), 1)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses", "fsdp"))
    return compare_models(parallel_kwargs={"mesh": mesh})


@torch.no_grad()
def enabled_while_loading():
    model, inputs = make_tiny_model(), make_inputs()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
        config = ParallelConfig(context_parallel_config=config)  # what Diffusers takes here
        loaded = MagiHumanTransformer3DModel.from_pretrained(folder, parallel_config=config)
    assert loaded._parallel_config is config
    return difference([loaded(*inputs, return_dict=False)], [model(*inputs, return_dict=False)])


@torch.no_grad()
def tensor_parallel():
    """Diffusers lists the devices that it takes for it, of which the CPU is none."""
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    inputs, world_size = (*make_inputs(2), mask), dist.get_world_size()
    local = {"local_attention_layers": (1,), "local_attention_frames": 1}
    differences = []
    for config in ({"post_norm_layers": (2,)}, {"gated_attention": False}, {"num_attention_heads": 8}, PADDED):
        model = make_tiny_model(num_key_value_heads=4, **local, **config)
        expected = model(*inputs, return_dict=False)
        whole = [sum(parameter.numel() for parameter in block.parameters()) for block in model.transformer_blocks]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES", ("cpu",))
            model.enable_parallelism(config=TensorParallelConfig(tp_degree=world_size))
        differences.append(difference([model(*inputs, return_dict=False)], [expected]))
        for block, numel in zip(model.transformer_blocks, whole, strict=True):
            parts = [part.to_local() if isinstance(part, DTensor) else part for part in block.parameters()]
            assert sum(part.numel() for part in parts) < 1.1 * numel / world_size
        with pytest.raises(ValueError, match="Only plain linears can be fused"):
            model.fuse_qkv_projections()
    return max(differences)


@torch.no_grad()
def tensor_parallel_while_loading():
    """Each process reads its own part of the weights alone, which is that of a model that is split in memory."""
    inputs, world_size, differences = make_inputs(), dist.get_world_size(), []
    for config in ({"post_norm_layers": (2,)}, {"gated_attention": False}):
        model = make_tiny_model(num_key_value_heads=4, **config)
        expected = model(*inputs, return_dict=False)
        numel = sum(parameter.numel() for parameter in model.transformer_blocks.parameters())
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES", ("cpu",))
            model.save_pretrained(folder)
            parallel_config = TensorParallelConfig(tp_degree=world_size)
            loaded = MagiHumanTransformer3DModel.from_pretrained(folder, parallel_config=parallel_config)
            make_tiny_model(num_key_value_heads=1).save_pretrained(folder)
            with pytest.raises(ValueError, match=f"`tp_degree`={world_size} must divide the 1 key and value heads"):
                MagiHumanTransformer3DModel.from_pretrained(folder, parallel_config=parallel_config)
        differences.append(difference([loaded(*inputs, return_dict=False)], [expected]))
        parts = [x.to_local() if isinstance(x, DTensor) else x for x in loaded.transformer_blocks.parameters()]
        assert sum(part.numel() for part in parts) < 1.1 * numel / world_size
    return max(differences)


def guidance():
    return compare_pipelines(run, make_tiny_pipeline(), negative_prompt="Blur.")


def several_prompts():
    return compare_pipelines(run, make_tiny_pipeline(), PROMPTS, negative_prompt=["Blur.", "Wind.", "A"])


def distilled():
    return compare_pipelines(run, make_tiny_pipeline(is_distilled=True), num_inference_steps=3)


def image_and_sound():
    image = PIL.Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    sound = np.sin(np.arange(4000) / 9).astype(np.float32), 16000
    return compare_pipelines(run, make_tiny_pipeline(), negative_prompt="Blur.", image=image, audio=sound)


def mag_cache():
    """Put on after the sequence is shared out; processes skip the same blocks."""
    pipe, config = make_tiny_pipeline(), MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4))

    def run_guided():
        return run(pipe, negative_prompt="Blur.", num_inference_steps=4, return_dict=False)

    plain = run_guided()
    pipe.transformer.enable_cache(config)
    expected = run_guided()
    assert difference([expected], [plain]) > 1e-3
    pipe.transformer.disable_cache()
    enable(pipe.transformer)
    with pytest.raises(ValueError, match="`FirstBlockCacheConfig` cannot work"):
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
    pipe.transformer.enable_cache(config)
    return difference([run_guided()], [expected])


def upscale_pipeline():
    prompts, latents = PROMPTS[:2], make_low(2, latent_frames=4, audio_length=13)
    kwargs = {"latents": latents[0], "audio_latents": latents[1], "guidance_scale": 3.5, "negative_prompt": "Blur."}
    return compare_pipelines(upscale, make_tiny_upscale_pipeline(), prompts, **kwargs)


CASES = [
    lengths,
    mixed_texts,
    local_layers,
    fused_projections,
    no_gate,
    grouped_heads,
    gradients,
    adapters_come_and_go,
]
CASES += [
    any_lengths_option,
    given_mesh,
    enabled_while_loading,
    tensor_parallel,
    tensor_parallel_while_loading,
    guidance,
]
CASES += [several_prompts, distilled, image_and_sound, mag_cache, upscale_pipeline]


def run_cases(rank, world_size, folder):
    torch.set_num_threads(1)
    # Diffusers divides by the number of accelerators, and asks for one unless the backend names the CPU.
    torch.accelerator.device_count = lambda: world_size
    store = f"file://{folder}/store"
    dist.init_process_group("cpu:gloo", store, timedelta(minutes=5), world_size, rank)
    found = {}
    for case in CASES:
        torch.manual_seed(0)
        try:
            found[case.__name__] = case()
        except Exception:  # every process fails alike, so that none waits for another
            found[case.__name__] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """What every process found in every case; they are forked from one that has imported everything."""
    folder, world_size = tmp_path_factory.mktemp("processes"), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # Diffusers takes the accelerator where there is one
        mp.set_forkserver_preload(IMPORTS)
        mp.start_processes(run_cases, (world_size, folder), world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_equal_to_one_process(case, results):
    for found in results:
        assert isinstance(found[case], float), found[case]
        assert found[case] <= 1e-5


@pytest.mark.parametrize(
    "config, message",
    [
        (
            ContextParallelConfig(ulysses_degree=3),
            r"`ulysses_degree`=3 must divide the 4 attention heads: .* \[1, 2, 4\]",
        ),
        (
            ContextParallelConfig(ulysses_degree=8, ulysses_anything=True),
            "`ulysses_degree`=8 must divide the 4 attention",
        ),
        (ContextParallelConfig(ring_degree=2), "`ring_degree`=2 must be 1"),
        (ContextParallelConfig(ring_degree=2, ulysses_degree=2), "`ring_degree`=2 must be 1"),
        (TensorParallelConfig(tp_degree=True), "`tp_degree`=True must be an integer"),
        (TensorParallelConfig(tp_degree=4), r"`tp_degree`=4 must divide the 2 key and value heads: one of \[1, 2\]"),
    ],
)
@pytest.mark.parametrize("wrap", [False, True])
def test_degrees_that_cannot_work_raise(config, message, wrap):
    model = make_tiny_model()
    if wrap:
        is_context = isinstance(config, ContextParallelConfig)
        config = ParallelConfig(**{"context_parallel_config" if is_context else "tensor_parallel_config": config})
    with pytest.raises(ValueError, match=message):
        model.enable_parallelism(config=config)
    assert model._parallel_config is None
    with pytest.raises(ValueError, match="`config`=None must be"):
        model.enable_parallelism(config=None)


def test_plan_of_the_class_names_every_linear_once():
    assert isinstance(MagiHumanTransformer3DModel._tp_plan, dict)
    for config in ({}, {"modality_layers": (0, 1, 2)}, {"modality_layers": ()}, {"gelu_layers": ()}):
        for is_gated in (True, False):
            model = make_tiny_model(gated_attention=is_gated, **config)
            specs = resolve_tp_shard_specs(model, MagiHumanTransformer3DModel._tp_plan, 2)
            linears = [name for name, part in model.transformer_blocks.named_modules() if isinstance(part, nn.Linear)]
            assert specs.keys() == {f"transformer_blocks.{name}.weight" for name in linears}


def test_fused_projections_cannot_be_split():
    model = make_tiny_model()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call `unfuse_qkv_projections\(\)` first"):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))


def test_first_block_cache_cannot_be_shared_out():
    model = make_tiny_model()
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="`FirstBlockCacheConfig` cannot work with `ContextParallelConfig`"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
