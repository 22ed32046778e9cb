"""Quantised transformers: what is quantised, how far off they are, saving, LoRAs on top."""

import copy
import importlib.util

import gguf
import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    DiffusionPipeline,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
    QuantoConfig,
    TorchAoConfig,
)
from golden import load_golden_weights
from helpers import make_inputs, make_tiny_model
from layouts import split
from peft import LoraConfig
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)

from diffusers_magihuman import QUANTIZATION_SKIP_MODULES, MagiHumanTransformer3DModel
from diffusers_magihuman.transformer_magihuman import MagiHumanFloat32Linear

# How far the output may be off, as a part of its norm: about twice of what was measured, which the README states.
KINDS = {
    "torchao int8": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 0.015),
    "torchao int8 dynamic": (lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), 0.03),
    "torchao float8": (lambda: TorchAoConfig(Float8WeightOnlyConfig()), 0.1),
    "quanto int8": (lambda: QuantoConfig("int8"), 0.015),
    "quanto float8": (lambda: QuantoConfig("float8"), 0.1),
}
GGUF_KINDS = {"Q8_0": 0.015, "Q4_0": 0.3, "BF16": 0.007}
GPU_KINDS = {
    "torchao float8 dynamic": (lambda: TorchAoConfig(Float8DynamicActivationFloat8WeightConfig()), 0.1),
    "bitsandbytes int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.05),
    "bitsandbytes nf4": (
        lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        0.25,
    ),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_tiny_model(num_attention_heads=6, post_norm_layers=(1,))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def predict(model, **kwargs):
    torch.manual_seed(1)
    inputs = [states.to(model.device) for states in make_inputs()]
    return torch.cat([output.flatten().cpu() for output in model(*inputs, return_dict=False, **kwargs)])


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def is_quantized(linear):
    return type(linear) not in (nn.Linear, MagiHumanFloat32Linear) or type(linear.weight) is not nn.Parameter


def check_what_is_quantized(model):
    """All linears of the blocks, also those of one modality, and nothing else."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, linear in linears.items() if is_quantized(linear)}
    assert quantized == {name for name in linears if name.startswith("transformer_blocks.")}
    assert linears.keys() - quantized == set(QUANTIZATION_SKIP_MODULES)
    assert sum(not {"video", "audio", "text"}.isdisjoint(name.split(".")) for name in quantized) == 2 * 3 * 7
    assert all(linears[name].weight.dtype == torch.float32 for name in QUANTIZATION_SKIP_MODULES)


def write_gguf(path, tensors, kind):
    """Linears in blocks of bits, other tensors in float32, as the tools that make such files write them."""
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "magihuman")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_quantized_and_saved(kind, model, folder, tmp_path):
    make_config, bound = KINDS[kind]
    quantized = MagiHumanTransformer3DModel.from_pretrained(
        folder, quantization_config=make_config(), dtype=torch.float32
    )
    check_what_is_quantized(quantized)
    assert quantized.dtype == torch.float32
    output = predict(quantized)
    assert bound / 10 < error(output, predict(model)) < bound

    quantized.save_pretrained(tmp_path)
    again = MagiHumanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32)
    check_what_is_quantized(again)
    assert torch.equal(predict(again), output)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_gguf(kind, model, folder, tmp_path):
    path = write_gguf(tmp_path / "ours.gguf", model.state_dict(), kind)
    quantized = MagiHumanTransformer3DModel.from_single_file(
        path, config=str(folder), quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32)
    )
    check_what_is_quantized(quantized)
    assert quantized.transformer_blocks[0].attn.video.to_q.weight.dtype == torch.uint8
    assert GGUF_KINDS[kind] / 10 < error(predict(quantized), predict(model)) < GGUF_KINDS[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_computes_in_its_dtype(dtype, model, folder, tmp_path):
    """Its linears hold whole numbers, and nothing else tells what they compute in."""
    path = write_gguf(tmp_path / "ours.gguf", model.state_dict(), "Q8_0")
    quantized = MagiHumanTransformer3DModel.from_single_file(
        path, config=str(folder), quantization_config=GGUFQuantizationConfig(compute_dtype=dtype)
    )
    assert quantized.dtype == dtype
    dtypes = []
    for block in quantized.transformer_blocks:
        block.attn.register_forward_hook(lambda _module, _args, output: dtypes.append(output.dtype))
    predict(quantized)
    assert dtypes == [dtype] * 3
    with pytest.raises(ValueError, match="not serializable"):
        quantized.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("layout", ["canonical", "split"])
def test_gguf_with_the_original_names(layout, tmp_path):
    """Its stacked rows are split, and norms, embedders and heads become float32."""
    weights = load_golden_weights("dit_base")
    weights = split(weights) if layout == "split" else weights
    path = write_gguf(tmp_path / "magihuman-base.gguf", weights, "Q8_0")
    quantized = MagiHumanTransformer3DModel.from_single_file(
        path, quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32)
    )
    expected = MagiHumanTransformer3DModel.from_single_file(weights, variant="base", dtype=torch.float32)
    assert quantized.config.modality_layers == expected.config.modality_layers
    norms = [each.transformer_blocks[0].norm1.audio.weight for each in (quantized, expected)]
    assert torch.equal(*norms)
    attention = quantized.transformer_blocks[2].attn
    assert all(is_quantized(linear) for linear in attention.modules() if isinstance(linear, nn.Linear))
    assert error(predict(quantized), predict(expected)) < 0.05


def test_safetensors_with_our_names(model, folder):
    path = str(folder / "diffusion_pytorch_model.safetensors")
    loaded = MagiHumanTransformer3DModel.from_single_file(path, config=str(folder), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.video_embedder.weight.dtype == torch.float32
    loaded = MagiHumanTransformer3DModel.from_single_file(path, config=str(folder), dtype=torch.float32)
    assert torch.equal(predict(loaded), predict(model))
    with pytest.raises(ValueError, match=r"missing: video_proj_out\.weight"):
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "video_proj_out.weight"}
        MagiHumanTransformer3DModel.from_single_file(weights, config=str(folder))


def test_pipeline_quantization_config(tiny_pipeline_dir):
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_dir, quantization_config=config, dtype=torch.float32)
    assert is_quantized(pipe.transformer.transformer_blocks[0].attn.video.to_q)
    assert not is_quantized(pipe.transformer.video_proj_out)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    plain = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    plain.set_progress_bar_config(disable=True)
    output, expected = (each("Hello", generator=torch.manual_seed(0), **call).frames for each in (pipe, plain))
    assert 0 < error(output, expected) < 0.02


HEADS = {
    "torchao nothing": lambda: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[]),
    "torchao head": lambda: TorchAoConfig(
        FqnToConfig({"video_proj_out": Int8WeightOnlyConfig(), "_default": Int8WeightOnlyConfig()})
    ),
    "torchao pattern": lambda: TorchAoConfig(
        FqnToConfig({r"re:.*_embedder\.weight": Int8WeightOnlyConfig(), r"re:.*to_q\.weight": Int8WeightOnlyConfig()})
    ),
    "quanto nothing": lambda: QuantoConfig("int8", modules_to_not_convert=[]),
    "quanto list": lambda: QuantoConfig("int8", modules_to_not_convert=[*QUANTIZATION_SKIP_MODULES, "to_gate"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", HEADS)
def test_embedders_heads_and_norms_stay_float32(config, dtype, folder):
    """Whatever a config names or leaves out: Diffusers' quantisers spare what a model keeps in float32."""
    quantized = MagiHumanTransformer3DModel.from_pretrained(folder, quantization_config=HEADS[config](), dtype=dtype)
    kept = {
        name: parameter
        for name, parameter in quantized.named_parameters()
        if not set(name.split(".")).isdisjoint(MagiHumanTransformer3DModel._keep_in_fp32_modules)
    }
    assert {name.split(".")[0] for name in kept} >= set(QUANTIZATION_SKIP_MODULES)
    assert all(type(value) is nn.Parameter and value.dtype == torch.float32 for value in kept.values())
    blocks = quantized.transformer_blocks
    assert is_quantized(blocks[0].attn.video.to_q) and is_quantized(blocks[1].attn.to_q)
    assert is_quantized(blocks[1].attn.to_gate) == ("nothing" in config or config == "torchao head")


# LoRAs


def load_quantized(kind, model, folder, tmp_path):
    if kind == "gguf":
        path = write_gguf(tmp_path / "ours.gguf", model.state_dict(), "Q8_0")
        config = GGUFQuantizationConfig(compute_dtype=torch.float32)
        return MagiHumanTransformer3DModel.from_single_file(path, config=str(folder), quantization_config=config)
    return MagiHumanTransformer3DModel.from_pretrained(
        folder, quantization_config=KINDS[kind][0](), dtype=torch.float32
    )


@pytest.mark.parametrize("kind", [*KINDS, "gguf"])
def test_lora_of_the_model_as_it_was(kind, model, folder, tmp_path):
    tuned = copy.deepcopy(model)
    tuned.add_adapter(LoraConfig(r=2, target_modules=["to_q", "linear_out"], init_lora_weights=False))
    tuned.save_lora_adapter(tmp_path)
    quantized = load_quantized(kind, model, folder, tmp_path)
    plain = predict(quantized)
    quantized.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="tuned")
    assert error(predict(quantized), predict(tuned)) < 0.1
    assert error(predict(quantized), plain) > 0.2
    assert torch.equal(predict(quantized, attention_kwargs={"scale": 0.0}), plain)
    quantized.unload_lora()
    assert torch.equal(predict(quantized), plain)


@pytest.mark.parametrize("kind", ["torchao int8", "torchao float8", "quanto int8", "quanto float8", "gguf"])
def test_adapter_learns_on_quantized_linears(kind, model, folder, tmp_path):
    """Where the weights alone are quantised; TorchAO's rounding of activations lets no gradient through."""
    quantized = load_quantized(kind, model, folder, tmp_path)
    quantized.add_adapter(LoraConfig(r=2, target_modules=["to_q", "linear_out"]))
    parameters = {name: parameter for name, parameter in quantized.named_parameters() if parameter.requires_grad}
    assert len(parameters) == 2 * 2 * (3 + 1 + 3)
    optimizer, losses = torch.optim.AdamW(parameters.values(), 1e-2), []
    inputs = make_inputs()
    for _ in range(3):
        losses.append(quantized(*inputs).sample.square().mean())
        losses[-1].backward()
        assert all(parameter.grad.isfinite().all() for parameter in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]


# Errors


@pytest.mark.parametrize("path", ["base.gguf", "base.safetensors"])
def test_single_file_and_config_go_together(path):
    """Neither file exists: the arguments are looked at first."""
    config = None if path.endswith(".gguf") else GGUFQuantizationConfig()
    with pytest.raises(ValueError, match=f"`quantization_config`.*{path} is {'one' if config is None else 'none'}"):
        MagiHumanTransformer3DModel.from_single_file(path, quantization_config=config)
    with pytest.raises(ValueError, match="`quantization_config`=TorchAoConfig"):
        MagiHumanTransformer3DModel.from_single_file(path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def test_gguf_refuses_another_dtype():
    with pytest.raises(ValueError, match=r"`dtype`=torch\.float16 must be the `compute_dtype`.* torch\.bfloat16"):
        MagiHumanTransformer3DModel.from_single_file(
            "base.gguf", dtype=torch.float16, quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
        )


# What needs a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_on_a_gpu(kind, folder, model, tmp_path):
    if kind.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    make_config, bound = GPU_KINDS[kind]
    dtype = torch.float16 if kind == "bitsandbytes int8" else torch.bfloat16
    quantized = MagiHumanTransformer3DModel.from_pretrained(
        folder, quantization_config=make_config(), dtype=dtype, device_map="cuda"
    )
    check_what_is_quantized(quantized)
    assert quantized.dtype == dtype
    output = predict(quantized)
    assert bound / 20 < error(output, predict(model)) < bound
    quantized.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert error(predict(quantized), output) > bound / 20
    quantized.unload_lora()

    quantized.save_pretrained(tmp_path)
    again = MagiHumanTransformer3DModel.from_pretrained(tmp_path, dtype=dtype, device_map="cuda")
    assert torch.equal(predict(again), output)
