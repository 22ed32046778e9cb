"""Diffusers' attention backends: each gives what native gives, or says by name what it cannot serve."""

import importlib.util

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from helpers import make_inputs, make_tiny_model
from torch._subclasses import FakeTensorMode

from diffusers_magihuman import transformer_magihuman
from diffusers_magihuman.transformer_magihuman import MagiHumanAttnProcessor

# Those that run on a CPU, and those that take no mask, which Diffusers says by name.
CPU_BACKENDS = ("native", "_native_math", "_native_flash", "flex")
MASKLESS = ("_native_flash", "flash", "_flash_3", "flash_hub", "_flash_3_hub", "sage", "sage_hub")


@pytest.fixture(autouse=True)
def _restore_backend():
    """`set_attention_backend` of a model also sets the one of all models."""
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(backend)


def make_model(**config):
    return make_tiny_model(coordinate_style="v1", local_attention_layers=(0, 1), local_attention_frames=1, **config)


def make_mask(text_length=7):
    """Padding on the right of one text, on the left of another one."""
    position = torch.arange(text_length)
    return torch.stack([position < text_length, position < 3, position > 2])


def run(model, inputs, mask=None):
    output = model(*inputs, encoder_attention_mask=mask)
    return torch.cat([output.sample.flatten(), output.audio_sample.flatten()])


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@torch.no_grad()
def test_backends_of_a_cpu_agree(backend, is_masked):
    model, inputs = make_model(), make_inputs(batch_size=3, num_frames=4)
    mask = make_mask() if is_masked else None
    expected = run(model, inputs, mask)
    with attention_backend(backend):
        if is_masked and backend in MASKLESS:
            with pytest.raises(ValueError, match="`attn_mask` is not supported"):
                run(model, inputs, mask)
            return
        output = run(model, inputs, mask)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)

    model.set_attention_backend(backend)
    assert all(processor._attention_backend.value == backend for processor in model.attn_processors.values())
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert torch.equal(run(model, inputs, mask), output)
    model.reset_attention_backend()
    assert torch.equal(run(model, inputs, mask), expected)


@torch.no_grad()
def test_xformers_gets_a_mask_of_two_dimensions(monkeypatch):
    """Of four dimensions Diffusers would add zeros and ones to the scores."""
    model, inputs, mask, masks = make_model(), make_inputs(batch_size=3), make_mask(), []
    expected = run(model, inputs, mask)

    def native_in_its_place(query, key, value, attn_mask, **_):
        masks.append(attn_mask.shape)
        return dispatch_attention_fn(query, key, value, attn_mask=attn_mask[:, None, None])

    monkeypatch.setattr(transformer_magihuman, "dispatch_attention_fn", native_in_its_place)
    for processor in model.attn_processors.values():
        processor._attention_backend = AttentionBackendName.XFORMERS
    assert torch.equal(run(model, inputs, mask), expected)
    assert {len(shape) for shape in masks} == {2}


@torch.no_grad()
def test_backend_may_differ_between_blocks():
    model, inputs = make_model(), make_inputs(num_frames=4)
    expected = run(model, inputs)
    model.transformer_blocks[1].attn.set_attention_backend("_native_math")
    backends = [block.attn.processor._attention_backend for block in model.transformer_blocks]
    assert backends == [None, AttentionBackendName._NATIVE_MATH, None]
    with attention_backend("_native_flash"):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)


class RepeatingProcessor(MagiHumanAttnProcessor):
    """Gives every query head its own key and value head."""

    def _attend(self, query, key, value, attention_mask):
        num_groups = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(num_groups, dim=2), value.repeat_interleave(num_groups, dim=2)
        return super()._attend(query, key, value, attention_mask)


@pytest.mark.parametrize("is_masked", [False, True])
@torch.no_grad()
def test_grouped_heads_are_exact(is_masked):
    model, inputs = make_model(), make_inputs(batch_size=3, num_frames=4)
    mask = make_mask() if is_masked else None
    expected = run(model, inputs, mask)
    model.set_attn_processor(RepeatingProcessor())
    assert torch.equal(run(model, inputs, mask), expected)


UNGROUPED = {"_native_efficient", "_native_npu", "_native_xla", "sage_blackwell_hub", "xformers"}


@pytest.mark.parametrize(
    "device, dtype, is_masked, ungrouped",
    [
        ("cpu", torch.float32, True, UNGROUPED),
        ("cuda", torch.bfloat16, False, UNGROUPED),
        ("cuda", torch.bfloat16, True, UNGROUPED | {"native"}),
        ("cuda", torch.float32, False, UNGROUPED | {"native"}),
    ],
)
def test_heads_are_repeated_where_a_backend_does_not_group_them(device, dtype, is_masked, ungrouped, monkeypatch):
    heads, processor = {}, MagiHumanAttnProcessor()

    def record(query, key, value, enable_gqa, backend, **_):
        heads[backend.value] = key.shape[2], value.shape[2], enable_gqa
        return query

    monkeypatch.setattr(transformer_magihuman, "dispatch_attention_fn", record)
    with FakeTensorMode():
        query, key = (torch.empty(1, 3, num_heads, 8, device=device, dtype=dtype) for num_heads in (4, 2))
        mask = torch.ones(1, 1, 1, 3, device=device, dtype=torch.bool) if is_masked else None
        for processor._attention_backend in AttentionBackendName:
            processor._attend(query, key, key, mask)
    expected = {
        each.value: (4, 4, False) if each.value in ungrouped else (2, 2, True) for each in AttentionBackendName
    }
    assert heads == expected


# Least cosine with native's result in bfloat16; sage computes products in 8 bits.
GPU_BACKENDS = {
    "_native_cudnn": (None, 0.999),
    "_native_efficient": (None, 0.999),
    "_native_flash": (None, 0.999),
    "flex": (None, 0.999),
    "flash": ("flash_attn", 0.999),
    "flash_varlen": ("flash_attn", 0.999),
    "_flash_3": ("flash_attn_interface", 0.999),
    "_flash_varlen_3": ("flash_attn_interface", 0.999),
    "flash_hub": ("kernels", 0.999),
    "flash_varlen_hub": ("kernels", 0.999),
    "_flash_3_hub": ("kernels", 0.999),
    "_flash_3_varlen_hub": ("kernels", 0.999),
    "sage": ("sageattention", 0.99),
    "sage_hub": ("kernels", 0.99),
    "sage_varlen": ("sageattention", 0.99),
    "xformers": ("xformers", 0.999),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@torch.no_grad()
def test_backends_of_a_gpu_agree(backend, is_masked, tmp_path):
    package, least_cosine = GPU_BACKENDS[backend]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    make_model(num_attention_heads=2, num_key_value_heads=1, attention_head_dim=64).save_pretrained(tmp_path)
    model = type(make_model()).from_pretrained(tmp_path, dtype=torch.bfloat16).to("cuda")
    inputs = [tensor.to("cuda") for tensor in make_inputs(batch_size=3, num_frames=4)]
    mask = make_mask().to("cuda") if is_masked else None
    expected = run(model, inputs, mask)
    with attention_backend(backend):
        if is_masked and backend in MASKLESS:
            with pytest.raises(ValueError, match="`attn_mask` is not"):
                run(model, inputs, mask)
            return
        output = run(model, inputs, mask)
    assert torch.cosine_similarity(output, expected, dim=0) > least_cosine
