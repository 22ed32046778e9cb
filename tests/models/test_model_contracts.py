"""What Diffusers expects of every model, and its own testers check, as far as no other file tests it."""

import json

import numpy as np
import pytest
import torch
from diffusers.utils import constants
from helpers import make_inputs, make_tiny_model
from make_tiny_pipeline import make_turbo_vae

from diffusers_magihuman.transformer_magihuman import MagiHumanAttnProcessor

LOCAL = {"coordinate_style": "v1", "local_attention_layers": (0, 1), "local_attention_frames": 1}


@pytest.fixture(params=["transformer", "vae"])
def model_and_inputs(request):
    torch.manual_seed(0)
    if request.param == "vae":
        return make_turbo_vae(), (torch.randn(2, 3, 5, 32, 32),)
    return make_tiny_model(post_norm_layers=(1,)), make_inputs(batch_size=2)


@torch.no_grad()
def test_output_is_the_same_each_time_and_as_a_tuple(model_and_inputs):
    model, inputs = model_and_inputs
    first, second, as_tuple = model(*inputs), model(*inputs), model(*inputs, return_dict=False)
    assert list(first) == (["sample", "audio_sample"] if len(inputs) > 1 else ["sample"])
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(first)
    for output, expected in ((second.to_tuple(), as_tuple), (first.to_tuple(), as_tuple)):
        assert all(torch.equal(*pair) for pair in zip(output, expected, strict=True))


@pytest.mark.parametrize("variant, workers", [(None, 1), ("fp16", 2)])
@torch.no_grad()
def test_shards_and_variants(variant, workers, model_and_inputs, tmp_path, monkeypatch):
    model, inputs = model_and_inputs
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", workers > 1)
    monkeypatch.setattr(constants, "DEFAULT_HF_PARALLEL_LOADING_WORKERS", workers)
    size = model.get_memory_footprint() * 3 // 4 // 1000
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=f"{size}KB")
    index = json.loads(next(tmp_path.glob("*.index*.json")).read_text())
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards and len(shards) == 2
    assert all((".fp16" in name) == (variant is not None) for name in shards)

    if variant is not None:
        with pytest.raises(OSError, match="no file named"):
            type(model).from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, variant=variant)
    assert not loaded.training and torch.equal(loaded(*inputs)[0], model(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_casting_equals_loading_in_half_precision(dtype, tmp_path):
    """`to` casts the float32 parts too, but they compute in float32 all the same: only their weights are rounded."""
    model, inputs = make_tiny_model(post_norm_layers=(1,)).to(dtype), make_inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == loaded.dtype == dtype
    assert model.video_embedder.weight.dtype == dtype and loaded.video_embedder.weight.dtype == torch.float32
    inputs = [states.to(dtype) for states in inputs]
    for output, expected in zip(model(*inputs).to_tuple(), loaded(*inputs).to_tuple(), strict=True):
        assert output.dtype == torch.float32 and torch.equal(output, expected)


@torch.no_grad()
def test_weights_on_disk_give_the_same_output(tmp_path):
    """accelerate puts the output together anew, out of a dictionary."""
    model, inputs = make_tiny_model(), make_inputs()
    expected = model(*inputs)
    model.save_pretrained(tmp_path)
    memory = {"cpu": model.get_memory_footprint() * 3 // 4}
    loaded = type(model).from_pretrained(tmp_path, device_map="auto", max_memory=memory, offload_folder=tmp_path)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    output = loaded(*inputs)
    assert torch.equal(output.sample, expected.sample) and torch.equal(output["audio_sample"], expected[1])


# Training


def loss_and_gradients(model, inputs, dtype=None, **kwargs):
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = model(*inputs, **kwargs, return_dict=False)
        loss = sum(output.square().mean() for output in outputs)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, LOCAL])
def test_checkpointing_and_autocast_in_training(config, dtype):
    model, inputs = make_tiny_model(**config).train(), make_inputs(batch_size=2)
    forwards = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    loss, gradients = loss_and_gradients(model, inputs, dtype, encoder_attention_mask=mask)
    assert loss.dtype == torch.float32
    # What the last block makes of the text is not used.
    idle = {name for name, gradient in gradients.items() if not gradient.any()}
    assert all(name.startswith("transformer_blocks.2.") and ".text." in name for name in idle)

    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    checkpointed_loss, checkpointed = loss_and_gradients(model, inputs, dtype, encoder_attention_mask=mask)
    assert torch.equal(checkpointed_loss, loss) and len(forwards) == 3  # the last of them in the backward pass
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=0, msg=name)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing

    if dtype is not None:
        _, full = loss_and_gradients(model, inputs, encoder_attention_mask=mask)
        both = [torch.cat([gradient.flatten() for gradient in each.values()]) for each in (gradients, full)]
        assert torch.cosine_similarity(*both, dim=0) > 0.999


def test_vae_trains_without_gradient_checkpointing():
    vae = make_turbo_vae().train()
    _, gradients = loss_and_gradients(vae, (torch.randn(1, 3, 5, 32, 32),))
    assert all(gradient.any() for name, gradient in gradients.items() if name.startswith("decoder"))
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        vae.enable_gradient_checkpointing()


# Attention processors


class SilentProcessor(MagiHumanAttnProcessor):
    """Attention that adds nothing."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return torch.zeros_like(super().__call__(attn, hidden_states, *args, **kwargs))


@torch.no_grad()
def test_attention_processors_are_exchanged_one_by_one_and_together():
    model, inputs = make_tiny_model(), make_inputs()
    original, expected = model.attn_processors, model(*inputs).sample
    names = [f"transformer_blocks.{layer}.attn.processor" for layer in range(3)]
    assert list(original) == names and all(type(each) is MagiHumanAttnProcessor for each in original.values())

    second = SilentProcessor()
    model.set_attn_processor({**original, names[1]: second})
    assert model.transformer_blocks[1].attn.get_processor() is second
    without_second = model(*inputs).sample
    model.set_attn_processor(SilentProcessor())
    without_any = model(*inputs).sample
    assert len({output.sum().item() for output in (expected, without_second, without_any)}) == 3

    with pytest.raises(ValueError, match="number of processors 1 does not match the number of attention layers: 3"):
        model.set_attn_processor({names[0]: MagiHumanAttnProcessor()})
    model.set_attn_processor(original)
    assert torch.equal(model(*inputs).sample, expected)


@pytest.mark.parametrize("make", [make_tiny_model, make_turbo_vae])
def test_configs_of_numpys_numbers_are_saved(make, tmp_path):
    model = make()
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    of_numpy = {
        name: [np.asarray(item)[()] for item in value] if isinstance(value, tuple | list) else np.asarray(value)[()]
        for name, value in config.items()
        if value is not None
    }
    type(model)(**of_numpy).save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in config} == json.loads(json.dumps(config))
