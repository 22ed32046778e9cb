"""Weights as TorchAO and GGUF hold them: at the published sizes without data, and what rounding leaves of them."""

from collections import Counter

import gguf
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from torchao.quantization import Float8Tensor, Int8Tensor

from diffusers_magihuman import QUANTIZATION_SKIP_MODULES, MagiHumanTransformer3DModel
from diffusers_magihuman.constants import QUANTIZE_KINDS
from diffusers_magihuman.conversion import transformer_rules
from diffusers_magihuman.tools import quantize
from diffusers_magihuman.tools.quantize import (
    check_quantize,
    plan_gguf,
    plan_torchao,
    quantize_q4_k,
    quantize_weight,
)

Q4_K = gguf.GGMLQuantizationType.Q4_K
NUM_LINEARS = 7 * (32 + 8 * 3)


def published_rules(**config):
    with torch.device("meta"):
        return transformer_rules(MagiHumanTransformer3DModel(**config).config)


@pytest.mark.parametrize("kind, weight_class, num_gates", [("int8", Int8Tensor, 0), ("float8", Float8Tensor, 56)])
def test_published_linears_are_quantized(kind, weight_class, num_gates):
    """By float8 all but the gates, whose 40 rows do not fit, and which the config names."""
    rules = published_rules()
    config, names = plan_torchao(rules, kind)
    shapes = {name: shape for rule in rules.values() for name, shape in rule.targets.items()}
    left = {name for name in shapes if name.endswith(".weight") and len(shapes[name]) == 2} - set(names)
    gates = {name for name in left if name.endswith("to_gate.weight")}
    assert {name.split(".")[0] for name in left - gates} == set(QUANTIZATION_SKIP_MODULES)
    assert len(gates) == num_gates and len(names) + num_gates == NUM_LINEARS
    for shape in {shapes[name] for name in names}:
        weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        quantized = quantize_weight(weight, config.quant_type)
        assert type(quantized) is weight_class and quantized.shape == shape
        assert (quantized.act_quant_kwargs is None) == (kind == "int8")


@pytest.mark.parametrize("kind, multiple", [("Q8_0", 128), ("Q4_0", 128), ("Q4_K", 256)])
def test_published_gguf(kind, multiple):
    writer, num_bytes = plan_gguf(published_rules(feed_forward_multiple=multiple), f"gguf:{kind}")
    kinds = Counter(info.dtype.name for info in writer.tensors[0].values())
    assert kinds.keys() == {kind, "F32"} and kinds[kind] == NUM_LINEARS
    assert {"Q8_0": 16, "Q4_0": 8.5, "Q4_K": 8.5}[kind] < num_bytes / 1e9 < {"Q8_0": 17, "Q4_0": 9, "Q4_K": 9}[kind]


@pytest.mark.parametrize(
    "kind, multiple, message",
    [
        ("float8", 1, r"multiples of 16, not .*ff\.linear_in\.weight \(27304, 5120\)"),
        ("gguf:Q8_0", 1, r"multiples of 32, not .*ff\.linear_out\.weight \(13652,\)"),
        ("gguf:Q4_K", 128, r"multiples of 256, not .*ff\.linear_out\.weight \(13696,\) and 36 more"),
    ],
)
def test_no_linear_is_left_out(kind, multiple, message):
    plan = plan_gguf if kind.startswith("gguf") else plan_torchao
    with pytest.raises(ValueError, match=f"`quantize`='{kind}' takes .*{message}.*`feed_forward_multiple`"):
        plan(published_rules(feed_forward_multiple=multiple), kind)


def dequantize(blocks):
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), Q4_K))


def test_q4_k_is_read_by_gguf_and_diffusers():
    weight = 0.02 * torch.randn(48, 5120, generator=torch.manual_seed(0))
    weight[:, :4] *= 10
    blocks = quantize_q4_k(weight)
    assert blocks.shape == (48, 5120 // 256 * 144) and blocks.dtype == torch.uint8
    values = dequantize(blocks)
    error = ((values - weight).norm() / weight.norm()).item()
    q4_0 = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    q4_0 = torch.from_numpy(gguf.quants.dequantize(q4_0, gguf.GGMLQuantizationType.Q4_0))
    assert 0.06 < error < 0.09 and error < 0.85 * (q4_0 - weight).norm() / weight.norm()
    in_diffusers = dequantize_gguf_tensor(GGUFParameter(blocks, quant_type=Q4_K)).float()  # by way of float16
    assert (in_diffusers - values).norm() < 2e-3 * values.norm()
    assert (dequantize(quantize_q4_k(values)) - values).norm() < 0.01 * values.norm()


@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, 1e3])
@pytest.mark.parametrize(
    "values", [[1.0], [-1.0], [0.0, 1.0], [0.0, -1.0], [1.0, 2.0], [-3.0, -2.0], [-1.0, 1.0, 0.5]]
)
def test_q4_k_of_few_values(values, scale):
    """Sixteen steps from the least value or 0 to the largest hold these; float16 units and 6 bits round them."""
    weight = scale * torch.tensor(values).repeat(512)[:512].view(2, 256)
    assert (dequantize(quantize_q4_k(weight)) - weight).abs().max() <= 0.021 * weight.abs().max()


def test_q4_k_parts_are_apart():
    """Each 32 values have a scale and an offset, in all the places of the packed bits."""
    weight = torch.linspace(0, 1, 32).repeat(8) * (torch.arange(8).repeat_interleave(32) + 1)
    weight = torch.stack([weight, -weight, weight.flip(0)])
    error = (dequantize(quantize_q4_k(weight)) - weight).unflatten(1, (8, 32)).norm(dim=-1)
    assert (error < 0.05 * weight.unflatten(1, (8, 32)).norm(dim=-1)).all()


@pytest.mark.parametrize(
    "kind, output, options, error, message",
    [
        ("int4", "out", {}, ValueError, "`quantize`='int4' must be None or 'int8' or"),
        (None, "out.gguf", {}, ValueError, "`output`='out.gguf' must be a directory for `quantize`=None"),
        ("gguf", "out.gguf", {}, ValueError, "`quantize`='gguf' must be"),
        (8, "out", {}, ValueError, "`quantize`=8 must be"),
        ("int8", "out.gguf", {}, ValueError, "`output`='out.gguf' must be a directory"),
        ("gguf:Q8_0", "out", {}, ValueError, "`output`='out' must be a file NAME.gguf"),
        ("gguf:Q8_0", "out.gguf", {"dtype": "float32"}, ValueError, "`dtype`='float32' must be None"),
        ("gguf:Q8_0", "out.gguf", {"text_encoder": "x"}, ValueError, "`text_encoder`='x' must be None"),
        ("gguf:Q8_0", "out.gguf", {"repo_id": "a/b"}, ValueError, "`repo_id`='a/b' must be None"),
        ("float8", "out", {"dtype": "float32"}, ValueError, "`dtype`='float32' must be bfloat16"),
    ],
)
def test_wrong_arguments(kind, output, options, error, message):
    with pytest.raises(error, match=message):
        check_quantize(kind, output, **{"dtype": None} | options)


@pytest.mark.parametrize("kind", QUANTIZE_KINDS)
def test_package_that_is_missing(kind, monkeypatch):
    output = "out.gguf" if kind.startswith("gguf") else "out"
    check_quantize(kind, output, dtype=None)
    monkeypatch.setattr(quantize, "has_torchao", False)
    monkeypatch.setattr(quantize, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=f"`quantize`='{kind}' needs the package `(gguf|torchao)`"):
        check_quantize(kind, output, dtype=None)
