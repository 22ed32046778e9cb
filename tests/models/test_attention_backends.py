"""Diffusers' attention backends: each gives what native gives, or says by name what it cannot serve."""

import importlib.util

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from helpers import make_inputs, make_tiny_model

from diffusers_magihuman.transformer_magihuman import CPU_BACKENDS, MASK_BACKENDS, check_attention_backend


def is_served(backend, is_masked):
    return not is_masked or backend in MASK_BACKENDS


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


@pytest.mark.parametrize(
    "backend, is_masked",
    [(backend, is_masked) for backend in CPU_BACKENDS for is_masked in (False, True) if is_served(backend, is_masked)],
)
@torch.no_grad()
def test_backends_of_a_cpu_agree(backend, is_masked):
    model, inputs = make_model(), make_inputs(batch_size=3, num_frames=4)
    mask = make_mask() if is_masked else None
    expected = run(model, inputs, mask)
    with attention_backend(backend):
        output = run(model, inputs, mask)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)

    model.set_attention_backend(backend)
    assert all(processor._attention_backend.value == backend for processor in model.attn_processors.values())
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert torch.equal(run(model, inputs, mask), output)
    model.reset_attention_backend()
    assert torch.equal(run(model, inputs, mask), expected)


@torch.no_grad()
def test_backend_names_what_it_cannot_serve():
    model, inputs = make_model(), make_inputs(batch_size=3)
    with attention_backend("_native_flash"):
        run(model, inputs)
        with pytest.raises(ValueError, match="'_native_flash' does not work for texts of different lengths"):
            run(model, inputs, make_mask())
    with attention_backend("_native_efficient"), pytest.raises(ValueError, match=r"'_native_efficient' .* on a CPU"):
        run(model, inputs)
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("quick")


@pytest.mark.parametrize(
    "backend, serves_float32, serves_masks",
    [
        ("native", True, True),
        ("_native_cudnn", False, True),
        ("_native_flash", False, False),
        ("_native_xla", True, False),
        ("xformers", True, True),
        ("flash", False, False),
        ("flash_varlen_hub", False, True),
        # These take it that padding stands at the end, but a text may begin with it.
        ("flash_varlen", False, False),
        ("_flash_varlen_3", False, False),
        ("sage_varlen", False, False),
        ("sage", False, False),
    ],
)
def test_backend_is_checked_before_it_runs(backend, serves_float32, serves_masks):
    """Without its device or package: the check looks at nothing but device, dtype and whether there is a mask."""
    backend, mask = AttentionBackendName(backend), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    half = torch.empty(1, 5, 4, 16, dtype=torch.bfloat16, device="meta")
    check_attention_backend(backend, half, None)
    for is_served, query, attention_mask in ((serves_float32, half.float(), None), (serves_masks, half, mask)):
        if is_served:
            check_attention_backend(backend, query, attention_mask)
        else:
            with pytest.raises(ValueError, match=f"The attention backend '{backend.value}' does not work"):
                check_attention_backend(backend, query, attention_mask)


@torch.no_grad()
def test_backend_may_differ_between_blocks():
    model, inputs = make_model(), make_inputs(num_frames=4)
    expected = run(model, inputs)
    model.transformer_blocks[1].attn.set_attention_backend("_native_math")
    backends = [block.attn.processor._attention_backend for block in model.transformer_blocks]
    assert backends == [None, AttentionBackendName._NATIVE_MATH, None]
    with attention_backend("_native_flash"):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)


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
        if not is_served(backend, is_masked):
            with pytest.raises(ValueError, match=f"'{backend}' does not work for texts of different lengths"):
                run(model, inputs, mask)
            return
        output = run(model, inputs, mask)
    assert torch.cosine_similarity(output, expected, dim=0) > least_cosine
