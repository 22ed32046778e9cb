"""Quantised transformers: what is quantised, how far off they are, saving, LoRAs on top."""

import copy
import functools
import importlib.util
from collections import Counter

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
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from golden import load_golden_weights
from helpers import make_inputs, make_original, make_tiny_model, multiplies_float8_by_row
from layouts import split
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
)

from diffusers_magihuman import QUANTIZATION_SKIP_MODULES, MagiHumanTransformer3DModel
from diffusers_magihuman.tools.convert import convert_checkpoint
from diffusers_magihuman.transformer_magihuman import MagiHumanFloat32Linear, SequenceLayout

# How far the output may be off, as a part of its norm: about twice of what was measured, which the README states.
KINDS = {
    "torchao int8": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 0.015),
    "torchao int8 dynamic": (lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), 0.03),
    "torchao float8": (lambda: TorchAoConfig(Float8WeightOnlyConfig()), 0.1),
    "quanto int8": (lambda: QuantoConfig("int8"), 0.015),
    "quanto float8": (lambda: QuantoConfig("float8"), 0.1),
}
GGUF_KINDS = {"Q8_0": 0.015, "Q4_0": 0.3, "BF16": 0.007}
FLOAT8_DYNAMIC = {  # on GPUs that multiply float8 alone; the rows of a gate are no multiple of 16
    name: functools.partial(TorchAoConfig, config, modules_to_not_convert=["to_gate"])
    for name, config in {
        "torchao float8 dynamic": Float8DynamicActivationFloat8WeightConfig(),
        "torchao float8 dynamic by row": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }.items()
}
GPU_KINDS = {
    **{name: (make_config, 0.1) for name, make_config in FLOAT8_DYNAMIC.items()},
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


def check_what_is_quantized(model, *spared):
    """All linears of the blocks but those of these names, also those of one modality, and nothing else."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, linear in linears.items() if is_quantized(linear)}
    in_blocks = {name for name in linears if name.startswith("transformer_blocks.")}
    assert quantized == {name for name in in_blocks if not name.endswith(spared)}
    assert linears.keys() - in_blocks == set(QUANTIZATION_SKIP_MODULES)
    num_experts = sum(not {"video", "audio", "text"}.isdisjoint(name.split(".")) for name in quantized)
    assert num_experts == 2 * 3 * (7 - len(spared))
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


def quantize_published(config, kind=None):
    """What loading does of a model without data, with blocks of each kind of the published sizes."""
    sizes = {"num_layers": 3, "modality_layers": (0, 2), "gelu_layers": (0,)}
    sizes["feed_forward_multiple"] = 256 if kind == "Q4_K" else 128
    with torch.device("meta"):
        model = MagiHumanTransformer3DModel(**sizes)
        weights = model.state_dict()
        if kind is not None:
            kind = gguf.GGMLQuantizationType[kind]
            num_values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name not in QUANTIZATION_SKIP_MODULES:
                    blocks, rest = divmod(module.in_features, num_values)
                    rows = torch.empty(module.out_features, blocks * num_bytes, dtype=torch.uint8)
                    weights[f"{name}.weight"] = GGUFParameter(rows, quant_type=kind)
                    assert rest == 0
        quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=kind is not None)
        fixed = {"device_map": None, "keep_in_fp32_modules": MagiHumanTransformer3DModel._keep_in_fp32_modules}
        quantizer.preprocess_model(model=model, state_dict=weights, **fixed)
        for name, weight in weights.items():
            weight = weight.to(torch.bfloat16) if weight.is_floating_point() else weight
            if quantizer.check_if_quantized_param(model, weight, name, weights):
                quantizer.create_quantized_param(model, weight, name, torch.device("meta"), weights, [])
        quantizer.postprocess_model(model)
    return model


NEEDS_FLOAT8 = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that multiplies float8")


@pytest.mark.parametrize(
    "make_config, kind, linear, weight",
    [
        (lambda: TorchAoConfig(Int8WeightOnlyConfig()), None, "Linear", "Int8Tensor"),
        (lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), None, "Linear", "Int8Tensor"),
        (lambda: TorchAoConfig(Float8WeightOnlyConfig()), None, "Linear", "Float8Tensor"),
        *(
            pytest.param(make, None, "Linear", "Float8Tensor", marks=[pytest.mark.gpu, NEEDS_FLOAT8])
            for make in FLOAT8_DYNAMIC.values()
        ),
        (lambda: QuantoConfig("int8"), None, "QLinear", "WeightQBytesTensor"),
        (lambda: QuantoConfig("float8"), None, "QLinear", "WeightQBytesTensor"),
        *((GGUFQuantizationConfig, kind, "GGUFLinear", "GGUFParameter") for kind in ("Q8_0", "Q4_0", "Q4_K")),
    ],
)
def test_published_sizes_are_quantized(make_config, kind, linear, weight):
    config = make_config()
    model = quantize_published(config, kind)
    gates = ["to_gate"] if getattr(config, "modules_to_not_convert", None) else []
    check_what_is_quantized(model, *gates)
    kinds = Counter(type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and m.out_features != 40)
    assert kinds == {linear: 6 * 7, "MagiHumanFloat32Linear": 5}
    assert type(model.transformer_blocks[1].ff.linear_out.weight).__name__ == weight


@pytest.mark.parametrize("kind", KINDS)
def test_padded_model_is_quantized_and_takes_a_lora(kind, tmp_path):
    """Quantisers to float8 would make NaN of rows of zeros, which padding therefore has none of."""
    original = make_original()
    plain, padded = (
        MagiHumanTransformer3DModel.from_single_file(
            original, variant="base", dtype=torch.float32, feed_forward_multiple=multiple
        )
        for multiple in (1, 128)
    )
    padded.save_pretrained(tmp_path)
    make_config, bound = KINDS[kind]
    quantized = MagiHumanTransformer3DModel.from_pretrained(
        tmp_path, quantization_config=make_config(), dtype=torch.float32
    )
    check_what_is_quantized(quantized)
    assert quantized.transformer_blocks[1].ff.linear_out.weight.shape == (64, 256)
    assert bound / 20 < error(predict(quantized), predict(plain)) < bound

    lora = LoraConfig(r=2, target_modules=["to_q", "linear_in", "linear_out"], init_lora_weights=False)
    padded.add_adapter(lora)
    for ff in padded.feed_forwards:
        ff.linear_in.lora_B["default"].weight.data.zero_()
    padded.save_lora_adapter(tmp_path / "lora")
    quantized.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True)
    with_lora = predict(padded)
    assert error(predict(quantized), with_lora) < 0.1 < error(predict(quantized), predict(plain))
    if kind.startswith("torchao"):
        quantized.fuse_lora()
        quantized.unload_lora()
        assert error(predict(quantized), with_lora) < 0.15


def test_linears_that_torchao_leaves_out_are_an_error(folder):
    """As it does without a word where their sizes do not fit; rows here have 96 and 256."""
    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=64))
    load = functools.partial(MagiHumanTransformer3DModel.from_pretrained, folder, quantization_config=config)
    config.modules_to_not_convert = ["linear_out", "to_out", "ff"]
    message = (
        r"`quantization_config`, Int4WeightOnlyConfig, does not take .*\.0\.attn\.video\.to_q \(96, 96\), .* more"
    )
    with pytest.raises(ValueError, match=message):
        load(dtype=torch.bfloat16)
    config.modules_to_not_convert = ["transformer_blocks"]
    assert load(dtype=torch.bfloat16).dtype == torch.bfloat16


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


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_gguf_is_padded(kind, tmp_path):
    """Rows of inner channels anywhere, and columns if they are in whole blocks; what is added is 0."""
    model = make_tiny_model(num_attention_heads=6, gelu_layers=(), modality_layers=(0,))  # its inner size is 256
    model.save_pretrained(tmp_path)
    path, options = write_gguf(tmp_path / "ours.gguf", model.state_dict(), kind), {"config": str(tmp_path)}
    options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=torch.float32)
    expected = MagiHumanTransformer3DModel.from_single_file(path, **options)
    padded = MagiHumanTransformer3DModel.from_single_file(path, **options, feed_forward_multiple=96)
    for block in padded.transformer_blocks:
        assert all(is_quantized(linear) for linear in block.modules() if isinstance(linear, nn.Linear))
    ff = padded.transformer_blocks[1].ff
    assert dequantize_gguf_tensor(ff.linear_in.weight).shape == (2 * 288, 96)
    assert dequantize_gguf_tensor(ff.linear_out.weight).shape == (96, 288)
    assert not dequantize_gguf_tensor(ff.linear_out.weight)[:, 256:].any()
    assert error(predict(padded), predict(expected)) < 1e-6
    if kind != "BF16":
        with pytest.raises(ValueError, match=r"`feed_forward_multiple` gives rows of 300, .* a multiple of 32 for Q"):
            MagiHumanTransformer3DModel.from_single_file(path, **options, feed_forward_multiple=100)


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


# One layer of the published size

REAL_LAYER = {  # how far off what a layer adds to its input is, as a part of its norm; the README states it
    "bfloat16": 0.0045,
    "torchao int8": 0.044,
    "torchao int8 dynamic": 0.082,
    "torchao float8": 0.049,
    "quanto int8": 0.044,
    "quanto float8": 0.049,
    "float8": 0.068,
    "gguf:Q8_0": 0.012,
    "gguf:Q4_0": 0.174,
    "gguf:Q4_K": 0.143,
}


@pytest.fixture(scope="module")
def real_layer(tmp_path_factory):
    """The original's weights in bfloat16, normal with a deviation of 0.02, in 16 of 5120 channels of 0.1; an input
    with 16 channels ten times as large as the others; and what the layer adds to it in float32, not padded."""
    sizes = {"num_layers": 1, "num_attention_heads": 40, "num_key_value_heads": 8, "attention_head_dim": 128}
    weights = make_original(modality_layers=(), gelu_layers=(), **sizes)
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if weight.ndim == 2 and "block" in name:
            weight[:, torch.randperm(weight.shape[1], generator=generator)[:16]] *= 5
            weights[name] = weight.bfloat16()
    path = tmp_path_factory.mktemp("real") / "distill.safetensors"
    save_file(weights, path)
    states = torch.randn(1, 24, 5120, generator=generator)
    states[..., :16] *= 10
    model = MagiHumanTransformer3DModel.from_single_file(path, dtype=torch.float32, feed_forward_multiple=1)
    return path, states, add_by_layer(model, states)


@torch.no_grad()
def add_by_layer(model, states):
    layout = SequenceLayout(num_frames=2, height=2, width=2, audio_length=8, text_length=8)
    rotary_emb = model.rope(layout, None, states.device)
    return model.transformer_blocks[0](states, rotary_emb, layout, None, model.dtype) - states


@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL_LAYER)
def test_real_layer(kind, real_layer, tmp_path):
    if kind == "float8" and not multiplies_float8_by_row():
        pytest.skip("needs a newer torch, or a GPU")
    path, states, expected = real_layer
    if kind.startswith("gguf"):
        file = convert_checkpoint(path, tmp_path / "distill.gguf", quantize=kind)
        model = MagiHumanTransformer3DModel.from_single_file(
            str(file), quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
        )
    else:
        folder = convert_checkpoint(path, tmp_path / "out", quantize=kind if kind == "float8" else None)
        config = KINDS[kind][0]() if kind in KINDS else None
        model = MagiHumanTransformer3DModel.from_pretrained(
            folder / "transformer", quantization_config=config, dtype=torch.bfloat16
        )
    size = 13_824 if kind == "gguf:Q4_K" else 13_696
    assert model.transformer_blocks[0].ff.linear_out.in_features == size
    assert error(add_by_layer(model, states), expected) == pytest.approx(REAL_LAYER[kind], rel=0.15)


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
    if not kind.startswith("torchao"):
        with pytest.raises(ValueError, match=r"`quant_method`='(quanto|gguf)' cannot be fused"):
            quantized.fuse_lora()
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
    with pytest.raises(
        ValueError, match=f"`quantization_config`.* must be {'a' if config is None else 'None'}.*{path}"
    ):
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
    check_what_is_quantized(quantized, *(["to_gate"] if kind in FLOAT8_DYNAMIC else []))
    assert quantized.dtype == dtype
    output = predict(quantized)
    assert bound / 20 < error(output, predict(model)) < bound
    quantized.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert error(predict(quantized), output) > bound / 20
    quantized.unload_lora()

    quantized.save_pretrained(tmp_path)
    again = MagiHumanTransformer3DModel.from_pretrained(tmp_path, dtype=dtype, device_map="cuda")
    assert torch.equal(predict(again), output)
