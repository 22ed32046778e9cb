"""LoRAs on the original's names against the same change of the original's weights, before they are converted."""

import logging

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden_weights
from layouts import FLOAT8_SCALES, float8, split
from safetensors.torch import save_file

from diffusers_magihuman import MagiHumanAudioVideoPipeline, MagiHumanFlowScheduler, MagiHumanTransformer3DModel
from diffusers_magihuman.conversion import convert_transformer_state_dict, transformer_config_from_state_dict
from diffusers_magihuman.lora import convert_lora_state_dict

peft = pytest.importorskip("peft")

LAYOUTS = ("canonical", "split")
MODALITY_QKV = "block.layers.0.attention.linear_qkv"
SHARED_UP_GATE = "block.layers.2.mlp.up_gate_proj"


def load_weights(layout="canonical"):
    weights = load_golden_weights("dit_sr")
    weights = split(weights) if layout == "split" else weights
    return {name: tensor.float() for name, tensor in weights.items()}


def linears(weights):
    names = [name.removesuffix(".weight") for name, tensor in weights.items() if tensor.ndim == 2]
    return {name: weights[f"{name}.weight"] for name in names}


def make_pipeline(weights, **config):
    config = transformer_config_from_state_dict(weights) | config
    transformer = MagiHumanTransformer3DModel(**config).eval()
    transformer.load_state_dict(convert_transformer_state_dict(weights, config))
    return MagiHumanAudioVideoPipeline(None, None, transformer, MagiHumanFlowScheduler(), None, None)


@torch.no_grad()
def predict(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 2, 4, 4), (1, 5, 8), (1, 3, 24)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return torch.cat([output.flatten() for output in pipe.transformer(*inputs, return_dict=False, **kwargs)])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def is_changed(actual, expected):
    return (actual - expected).abs().max() > 1e-3


def make_lora(modules, down="lora_A", up="lora_B", alphas=True):
    """Random factors with another rank and alpha for every module, and the change of weights that they make."""
    lora, changes = {}, {}
    for number, (name, weight) in enumerate(modules.items()):
        rank, alpha = 2 + number % 3, 1.0 + 0.7 * (number % 4)
        factors = torch.randn(rank, weight.shape[1]) * 0.05, torch.randn(weight.shape[0], rank) * 0.3
        lora[f"{name}.{down}.weight"], lora[f"{name}.{up}.weight"] = factors
        changes[name] = factors[1] @ factors[0]
        if alphas:
            lora[f"{name}.alpha"] = torch.tensor(alpha)
            changes[name] *= alpha / rank
    return lora, changes


def add_changes(weights, changes):
    return weights | {f"{name}.weight": weights[f"{name}.weight"] + change for name, change in changes.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("down", "up", "alphas"), [("lora_A", "lora_B", False), ("lora_down", "lora_up", True)])
def test_factors(layout, down, up, alphas):
    weights = load_weights(layout)
    pipe = make_pipeline(weights)
    plain = predict(pipe)
    lora, changes = make_lora(linears(weights), down, up, alphas)
    pipe.load_lora_weights(lora)
    output = predict(pipe)
    assert is_changed(output, plain)
    assert_close(output, predict(make_pipeline(add_changes(weights, changes))))


@pytest.mark.parametrize("module", [MODALITY_QKV, SHARED_UP_GATE, "adapter.text_embedder", "final_linear_audio"])
def test_factors_of_one_module(module):
    weights = load_weights()
    pipe = make_pipeline(weights)
    plain = predict(pipe)
    lora, changes = make_lora({module: weights[f"{module}.weight"]})
    pipe.load_lora_weights(lora)
    assert is_changed(predict(pipe), plain)
    assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, changes))))


def test_split_is_exact():
    """Whole numbers multiply without rounding, so here equal means equal."""
    weights = load_weights()
    config = transformer_config_from_state_dict(weights)
    factors = torch.randint(-8, 8, (3, 64)).float(), torch.randint(-8, 8, (396, 3)).float()
    names = (f"{MODALITY_QKV}.lora_A.weight", f"{MODALITY_QKV}.lora_B.weight")
    lora, alphas = convert_lora_state_dict(dict(zip(names, factors, strict=True)), config)
    expected = convert_transformer_state_dict(weights | {f"{MODALITY_QKV}.weight": factors[1] @ factors[0]}, config)
    targets = [name.removeprefix("transformer.").removesuffix(".alpha") for name in alphas]
    assert len(targets) == 12 and set(alphas.values()) == {3}
    for target in targets:
        change = lora[f"transformer.{target}.lora_B.weight"] @ lora[f"transformer.{target}.lora_A.weight"]
        assert torch.equal(change, expected[f"{target}.weight"])


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dora(layout, shape):
    weights = load_weights(layout)
    lora, changes = make_lora(linears(weights), "lora_down", "lora_up")
    for name, change in changes.items():
        weight = weights[f"{name}.weight"]
        magnitude = weight.norm(dim=1) * (1 + 0.2 * torch.rand(len(weight)))
        lora[f"{name}.dora_scale"] = magnitude.reshape(shape)
        changed = weight + change
        changes[name] = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True) - weight
    pipe = make_pipeline(weights)
    pipe.load_lora_weights(lora)
    assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, changes))))


@pytest.mark.parametrize("kind", ["factors", "dora", "diff"])
@pytest.mark.parametrize("names", ["canonical", "split", "ours", "padded"])
def test_padded_feed_forwards(names, kind):
    """A LoRA of the original's sizes, or trained at the padded ones, changes what it changes without padding."""
    weights = load_weights("split" if names == "split" else "canonical")
    modules = linears(weights)
    lora, changes = make_lora(modules)
    if kind == "diff":
        lora = {f"{name}.diff": change for name, change in changes.items()}
    elif kind == "dora":
        lora |= {f"{name}.dora_scale": weight.norm(dim=1) * 1.1 for name, weight in modules.items()}
    pipe, padded = make_pipeline(weights), make_pipeline(weights, feed_forward_multiple=128)
    pipe.load_lora_weights(lora)
    expected = predict(pipe)
    if names in ("ours", "padded"):
        of = padded if names == "padded" else pipe
        tensors, alphas = convert_lora_state_dict(lora, of.transformer.config)
        lora = tensors | {name: torch.tensor(alpha) for name, alpha in alphas.items()}
    padded.load_lora_weights(lora)
    assert padded.transformer.transformer_blocks[2].ff.linear_out.weight.shape == (64, 256)
    assert_close(predict(padded), expected)
    padded.fuse_lora(safe_fusing=True)
    assert_close(predict(padded), expected)
    padded.unfuse_lora()
    assert_close(predict(padded), expected)
    wrong = {name: F.pad(value, (0, 0, 0, 4)) for name, value in lora.items() if name.endswith("in.lora_B.weight")}
    if wrong:
        with pytest.raises(ValueError, match=r"tensors of another shape: .*ff"):
            convert_lora_state_dict(lora | wrong, padded.transformer.config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_rank(layout):
    """As tools extract LoRAs from a finetuned model: also zeros for norms and biases that did not change."""
    weights = load_weights(layout)
    changes = {name: torch.randn_like(weight) * 0.02 for name, weight in linears(weights).items()}
    lora = {f"{name}.diff": change for name, change in changes.items()}
    lora |= {name.replace(".weight", ".diff"): torch.zeros_like(weights[name]) for name in weights if "norm" in name}
    lora |= {name.replace(".bias", ".diff_b"): torch.zeros_like(weights[name]) for name in weights if "bias" in name}
    pipe = make_pipeline(weights)
    pipe.load_lora_weights(lora)
    assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, changes))))


def test_bias_of_every_module():
    weights = load_weights()
    module = {"adapter.audio_embedder": weights["adapter.audio_embedder.weight"]}
    lora, changes = make_lora(module, alphas=False)
    lora["adapter.audio_embedder.lora_B.bias"] = torch.randn(64)
    bias = weights["adapter.audio_embedder.bias"] + lora["adapter.audio_embedder.lora_B.bias"]
    pipe = make_pipeline(weights)
    pipe.load_lora_weights(lora)
    expected = add_changes(weights, changes) | {"adapter.audio_embedder.bias": bias}
    assert_close(predict(pipe), predict(make_pipeline(expected)))


def prefixed(prefix):
    return lambda module, *kind: ".".join([prefix + module, *kind])


def flat(prefix):
    return lambda module, *kind: ".".join([prefix + module.replace(".", "_"), *kind])


def kinds(a, b):
    """Other suffixes for `lora_A.weight` and `lora_B.weight`."""
    return lambda module, *kind: f"{module}.{ {'lora_A': a, 'lora_B': b}[kind[0]] if len(kind) > 1 else 'alpha' }"


def processors(module, *kind):
    if len(kind) == 1:
        return f"{module}.alpha"
    parent, dot, name = module.rpartition(".")
    return f"{parent}{dot and '.processor.'}{name}_lora.{'down' if kind[0] == 'lora_A' else 'up'}.weight"


PREFIXES = ["transformer.", "diffusion_model.", "model.diffusion_model.", "model.", "base_model.model.", "dit."]
PREFIXES += ["unet.", "net.", "student.", "pipe.dit.", "module.", "_orig_mod.", "transformer._orig_mod."]
SPELLINGS = {
    **{prefix: prefixed(prefix) for prefix in PREFIXES},
    **{prefix: flat(prefix) for prefix in ("lora_unet_", "lora_dit_", "lora_transformer_", "lycoris_")},
    "kohya": kinds("lora_down.weight", "lora_up.weight"),
    "older Diffusers": kinds("lora.down.weight", "lora.up.weight"),
    "raw PEFT": kinds("lora_A.default.weight", "lora_B.default.weight"),
    "without weight": kinds("lora_A", "lora_B"),
    "raw PEFT without weight": kinds("lora_A.default", "lora_B.default"),
    "raw PEFT with a name": kinds("lora_A.my-style.weight", "lora_B.my-style.weight"),
    "old Diffusers": kinds("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "processors": processors,
}


@pytest.mark.parametrize("names", ["original", "ours"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, names):
    weights = load_weights()
    config = transformer_config_from_state_dict(weights)
    lora, _ = make_lora(linears(weights))
    expected = convert_lora_state_dict(lora, config)
    if names == "ours":
        lora = {name.removeprefix("transformer."): value for name, value in expected[0].items()}
        lora |= {name.removeprefix("transformer."): torch.tensor(value) for name, value in expected[1].items()}
    respelt = {}
    for name, value in lora.items():
        module, *kind = name.rsplit(".", 2 if name.endswith("weight") else 1)
        respelt[SPELLINGS[spelling](module, *kind)] = value.reshape(1, 1) if kind == ["alpha"] else value
    tensors, alphas = convert_lora_state_dict(respelt, config)
    assert_same_tensors(tensors, expected[0])
    assert alphas == pytest.approx(expected[1])
    numbers = {name: value.item() if name.endswith(".alpha") else value for name, value in respelt.items()}
    assert convert_lora_state_dict(numbers, config)[1] == alphas


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("spelling", [None, *FLOAT8_SCALES])
def test_float8(spelling, dtype):
    weights = load_weights()
    config = transformer_config_from_state_dict(weights)
    lora, expected = float8(make_lora(linears(weights))[0], spelling, dtype)
    lora = {f"model.diffusion_model.{name}": tensor for name, tensor in lora.items()}
    tensors, alphas = convert_lora_state_dict(lora, config)
    expected, expected_alphas = convert_lora_state_dict(expected, config)
    assert_same_tensors(tensors, expected)
    assert alphas == expected_alphas


BAD_ARGUMENTS = {
    "revison": "main",
    "adapter_name": 5,
    "adapter_name ": "a.b",
    "adapter_name  ": "keys",
    "hotswap": 1,
    "low_cpu_mem_usage": "yes",
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments_are_checked_first(name, unchanged_pipe):
    key = name.strip()
    with pytest.raises(TypeError if key == "revison" else ValueError, match=f"[`']{key}[`']"):
        unchanged_pipe.load_lora_weights({}, **{key: BAD_ARGUMENTS[name]})


@pytest.mark.parametrize("metadata", ["5", '{"transformer.r": 2}', '{"r": "x", "lora_alpha": 1}', "["])
def test_damaged_metadata_loads_nothing(metadata, unchanged_pipe, tmp_path):
    lora, _ = make_lora(linears(load_weights()))
    save_file(lora, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": metadata})
    with pytest.raises((ValueError, OSError), match=r"`r`|lora_alpha|cannot be read"):
        unchanged_pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")


def test_warns_of_an_alpha_that_is_not_read(caplog):
    weights = load_weights()
    lora, _ = make_lora({SHARED_UP_GATE: weights[f"{SHARED_UP_GATE}.weight"]}, alphas=False)
    with caplog.at_level("WARNING"):
        make_pipeline(weights).load_lora_weights({f"base_model.model.{name}": value for name, value in lora.items()})
    assert "adapter_config.json" in caplog.text


@pytest.mark.parametrize("kind", ["factors", "dora"])
@pytest.mark.parametrize("save", ["adapter", "pipeline"])
def test_diffusers_round_trip(tmp_path, kind, save):
    weights = load_weights()
    lora, _ = make_lora(linears(weights))
    if kind == "dora":
        lora |= {f"{name}.dora_scale": weight.norm(dim=1) for name, weight in linears(weights).items()}
    pipe = make_pipeline(weights)
    pipe.load_lora_weights(lora, adapter_name="style")
    tensors = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    if save == "adapter":
        pipe.transformer.save_lora_adapter(tmp_path, "style")
    else:
        metadata = pipe.transformer.peft_config["style"].to_dict()
        pipe.save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=metadata)
    again = make_pipeline(weights)
    again.load_lora_weights(tmp_path)
    assert torch.equal(predict(again), predict(pipe))
    loaded = peft.get_peft_model_state_dict(again.transformer, adapter_name="default_0")
    assert_same_tensors(loaded, tensors)


def test_trained_in_diffusers(tmp_path):
    """Saved without metadata, as a training script may: every alpha is then its rank."""
    weights = load_weights()
    pipe = make_pipeline(weights)
    targets = ["attn.video.to_q", "ff.text.linear_in", "2.attn.to_gate", "2.ff.linear_in", "audio_proj_out"]
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config, "trained")
    tensors = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="trained")
    pipe.save_lora_weights(tmp_path, tensors)
    again = make_pipeline(weights)
    again.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(predict(again), predict(pipe))


def test_pickle_of_more_than_tensors_is_refused(tmp_path):
    weights = load_weights()
    lora, _ = make_lora(linears(weights))
    torch.save(lora, tmp_path / "lora.bin")
    pipe = make_pipeline(weights)
    pipe.load_lora_weights(tmp_path, weight_name="lora.bin")
    expected = predict(pipe)
    torch.save(lora | {"code": make_lora}, tmp_path / "bad.bin")
    with pytest.raises(OSError, match=r"bad\.bin"):
        pipe.load_lora_weights(tmp_path, weight_name="bad.bin")
    with pytest.raises(OSError, match="no_such_file"):
        pipe.load_lora_weights(tmp_path, weight_name="no_such_file.safetensors")
    assert torch.equal(predict(pipe), expected)


def test_scale_and_fuse():
    weights = load_weights()
    pipe = make_pipeline(weights)
    plain = predict(pipe)
    lora, changes = make_lora(linears(weights))
    pipe.load_lora_weights(lora, adapter_name="style")
    full = predict(pipe)
    half = {name: change / 2 for name, change in changes.items()}
    assert_close(predict(pipe, attention_kwargs={"scale": 0.5}), predict(make_pipeline(add_changes(weights, half))))
    assert_close(predict(pipe, attention_kwargs={"scale": 0.0}), plain)
    assert torch.equal(predict(pipe), full)

    pipe.fuse_lora()
    assert_close(predict(pipe), full)
    pipe.unfuse_lora()
    assert_close(predict(pipe), full)


def test_unload_restores_every_bit():
    weights = load_weights()
    pipe = make_pipeline(weights)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    lora, _ = make_lora(linears(weights))
    pipe.load_lora_weights(lora)
    pipe.load_lora_weights(lora)
    pipe.unload_lora_weights()
    assert_same_tensors(pipe.transformer.state_dict(), before)


def test_two_adapters():
    weights = load_weights()
    pipe = make_pipeline(weights)
    first, first_changes = make_lora(linears(weights))
    second, second_changes = make_lora({SHARED_UP_GATE: weights[f"{SHARED_UP_GATE}.weight"]})
    pipe.load_lora_weights(first, adapter_name="first")
    pipe.load_lora_weights(second, adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, 2.0])
    changes = {name: change / 2 for name, change in first_changes.items()}
    changes[SHARED_UP_GATE] = changes[SHARED_UP_GATE] + 2 * second_changes[SHARED_UP_GATE]
    assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, changes))))
    pipe.set_adapters("second")
    assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, second_changes))))
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"transformer": ["first"]}
    with pytest.raises(ValueError, match="first"):
        pipe.load_lora_weights(first, adapter_name="first")


def test_hotswap():
    weights = load_weights()
    module = {MODALITY_QKV: weights[f"{MODALITY_QKV}.weight"]}
    pipe = make_pipeline(weights)
    pipe.load_lora_weights(make_lora(module)[0], adapter_name="style")
    lora, changes = make_lora(module)
    pipe.load_lora_weights(lora, adapter_name="style", hotswap=True)
    assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, changes))))


def test_scale_in_the_pipeline():
    weights = load_weights()
    pipe = make_pipeline(weights)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 24)

    def run(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            prompt_embeds=embeds,
            height=64,
            width=64,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=1.0,
            audio_guidance_scale=1.0,
            generator=generator,
            output_type="latent",
            **kwargs,
        ).frames

    plain = run()
    pipe.load_lora_weights(make_lora(linears(weights))[0], adapter_name="style")
    assert is_changed(run(), plain)
    scaled = run(attention_kwargs={"scale": 0.5})
    pipe.set_adapters("style", 0.5)
    assert torch.equal(run(), scaled)


def test_bf16_keeps_fp32_parts(tmp_path):
    weights = load_weights()
    make_pipeline(weights).transformer.save_pretrained(tmp_path)
    transformer = MagiHumanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pipe = MagiHumanAudioVideoPipeline(None, None, transformer, MagiHumanFlowScheduler(), None, None)
    lora, changes = make_lora(linears(weights))
    pipe.load_lora_weights(lora)
    assert transformer.dtype == torch.bfloat16
    assert transformer.video_embedder.lora_A["default_0"].weight.dtype == torch.float32
    assert transformer.transformer_blocks[2].attn.to_q.lora_B["default_0"].weight.dtype == torch.bfloat16
    expected = predict(make_pipeline(add_changes(weights, changes)))
    assert (predict(pipe) - expected).norm() / expected.norm() < 0.05


def make_bad_loras():
    weights = load_weights()
    good, _ = make_lora({name: weights[f"{name}.weight"] for name in (MODALITY_QKV, SHARED_UP_GATE)})
    pair = {
        f"{SHARED_UP_GATE}.lora_A.weight": torch.ones(2, 64),
        f"{SHARED_UP_GATE}.lora_B.weight": torch.ones(336, 2),
    }
    wan = {f"blocks.0.self_attn.q.{part}.weight": torch.ones(4, 4) for part in ("lora_A", "lora_B")}
    norm = "block.layers.0.attention.pre_norm"
    return {
        "foreign": ({f"diffusion_model.{name}": value for name, value in wan.items()}, r"blocks\.0\.self_attn\.q"),
        "foreign in Diffusers": ({f"transformer.{name}": value for name, value in wan.items()}, "unknown"),
        "partly foreign": (good | wan, r"blocks\.0\.self_attn\.q"),
        "another kind": (good | {f"{MODALITY_QKV}.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a"),
        "no number": (good | {f"{SHARED_UP_GATE}.alpha": "1"}, "alpha"),
        "rows of one expert": (
            good | {f"{MODALITY_QKV}.lora_B.weight": torch.ones(132, 2)},
            r"linear_qkv \(lora_B\.weight \(132, 2\), allowed: \(396, 2\)\)",
        ),
        "rank": (good | {f"{MODALITY_QKV}.lora_A.weight": torch.ones(0, 64)}, r"allowed: \(1, 64\)"),
        "no dimensions": (good | {f"{MODALITY_QKV}.lora_A.weight": torch.ones(())}, "another shape"),
        "half a pair": ({f"{MODALITY_QKV}.lora_A.weight": torch.ones(2, 64)}, "do not go together"),
        "both": (good | {f"{MODALITY_QKV}.diff": torch.ones(396, 64)}, "do not go together"),
        "repeated": (good | {f"model.{MODALITY_QKV}.lora_down.weight": torch.ones(2, 64)}, "repeated"),
        "whole and part": (
            good
            | {
                "block.layers.0.attention.linear_q_video.lora_A.weight": torch.ones(2, 64),
                "block.layers.0.attention.linear_q_video.lora_B.weight": torch.ones(64, 2),
            },
            "whole and in parts",
        ),
        "norm": (good | {f"{norm}.diff": torch.ones(192)}, rf"norms.*: {norm}"),
        "change of a bias": (
            good | {"adapter.text_embedder.diff_b": torch.ones(64)},
            "biases.*: adapter.text_embedder",
        ),
        "columns of DoRA": (pair | {f"{SHARED_UP_GATE}.dora_scale": torch.ones(1, 64)}, r"\(336,\) or \(336, 1\)"),
        "DoRA of some": (good | {f"{SHARED_UP_GATE}.dora_scale": torch.ones(336)}, f"others have: {MODALITY_QKV}"),
        "biases of some": (good | {f"{SHARED_UP_GATE}.lora_B.bias": torch.ones(336)}, f"others have: {MODALITY_QKV}"),
        "DoRA and bias": (
            pair | {f"{SHARED_UP_GATE}.dora_scale": torch.ones(336), f"{SHARED_UP_GATE}.lora_B.bias": torch.ones(336)},
            "lora_bias",
        ),
        "kohya text encoder": (good | {"lora_te_text_model.lora_down.weight": torch.ones(2, 2)}, "unknown.*lora_te_"),
        "NaN": (good | {f"{MODALITY_QKV}.lora_A.weight": torch.full((2, 64), torch.nan)}, "not finite.*linear_qkv"),
        "alpha": (good | {f"{MODALITY_QKV}.alpha": torch.tensor(1e30)}, "alphas too large.*linear_qkv"),
        "integers": (good | {f"{MODALITY_QKV}.lora_A.weight": torch.ones(2, 64, dtype=torch.int8)}, "floating dtype"),
        "complex": (good | {f"{MODALITY_QKV}.alpha": torch.tensor(1j)}, "floating dtype"),
        "no data": (good | {f"{MODALITY_QKV}.lora_A.weight": torch.ones(2, 64, device="meta")}, "not finite"),
        "huge rank": (
            good | {f"{MODALITY_QKV}.lora_A.weight": torch.ones(1).expand(10**9, 64)},
            r"another shape.*linear_qkv",
        ),
        "no string": ({**good, 5: torch.ones(1)}, "strings as names"),
        "scale of nothing": (good | {f"{MODALITY_QKV}.lora_C.weight_scale": torch.ones(1)}, "unknown.*lora_C"),
        "negative scale": (good | {f"{MODALITY_QKV}.lora_A.weight_scale": -torch.ones(1)}, "not negative"),
        "empty": ({}, "no tensors"),
        "zeros": ({f"{norm}.diff": torch.zeros(192)}, "changes nothing"),
    }


def test_tensors_of_no_module_load_nothing(tiny_pipeline, caplog):
    logger = logging.getLogger("diffusers.loaders.peft")
    logger.addHandler(caplog.handler)
    tiny_pipeline.load_lora_weights({"lora_alpha": torch.tensor(2.0)})
    logger.removeHandler(caplog.handler)
    assert caplog.messages[0].startswith("No LoRA keys associated to MagiHumanTransformer3DModel")
    assert not hasattr(tiny_pipeline.transformer, "peft_config")


BAD_LORAS = make_bad_loras()


@pytest.fixture(scope="module")
def unchanged_pipe():
    pipe = make_pipeline(load_weights())
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    yield pipe
    assert pipe.get_list_adapters() == {}
    assert_same_tensors(pipe.transformer.state_dict(), before)


@pytest.mark.parametrize("case", BAD_LORAS)
def test_what_does_not_fit_is_listed_and_nothing_loaded(case, unchanged_pipe):
    lora, message = BAD_LORAS[case]
    names = list(unchanged_pipe.transformer.state_dict())
    with pytest.raises(ValueError, match=message):
        unchanged_pipe.load_lora_weights(lora)
    assert list(unchanged_pipe.transformer.state_dict()) == names


def test_fused_projections_are_refused():
    weights = load_weights()
    pipe = make_pipeline(weights)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        pipe.load_lora_weights(make_lora(linears(weights))[0])


# Adapters of a model's own, as training adds them


def test_target_means_all_linears_of_a_layer():
    transformer = make_pipeline(load_weights()).transformer
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    adapted = {name for name, module in transformer.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    linears = {name for name, _ in transformer.named_parameters() if "to_q" in name and "lora" not in name}
    assert len(adapted) == 8  # one for each modality in the outer blocks, one for all in the inner ones
    assert adapted == {name.removesuffix(".base_layer.weight") for name in linears}


def test_trained_adapter_round_trip(tmp_path):
    """Trained for a step, saved with its config by the pipeline, loaded elsewhere, with another adapter beside it."""
    weights = load_weights()
    pipe = make_pipeline(weights)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_out", "linear_out"])
    pipe.transformer.add_adapter(config, "trained")
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    plain = predict(pipe)
    optimizer = torch.optim.SGD(parameters, 1.0)
    pipe.transformer(torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 8), torch.randn(1, 3, 24)).sample.sum().backward()
    optimizer.step()
    pipe.save_lora_weights(
        tmp_path,
        peft.get_peft_model_state_dict(pipe.transformer, adapter_name="trained"),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["trained"].to_dict(),
    )
    again = make_pipeline(weights)
    again.load_lora_weights(make_lora(linears(weights))[0], adapter_name="other")
    again.load_lora_weights(tmp_path, adapter_name="trained")
    again.set_adapters(["trained", "other"], [1.0, 0.0])
    assert is_changed(predict(again), plain)
    assert_close(predict(again), predict(pipe))
    again.delete_adapters("other")
    assert torch.equal(predict(again), predict(pipe))
    loaded, saved = (each.transformer.peft_config["trained"].to_dict() for each in (again, pipe))
    assert {name: loaded[name] for name in ("r", "lora_alpha")} == {"r": 2, "lora_alpha": 3}
    assert loaded["target_modules"] == saved["target_modules"]


def test_adapters_are_switched_off_and_on():
    weights = load_weights()
    pipe = make_pipeline(weights)
    plain = predict(pipe)
    pipe.load_lora_weights(make_lora(linears(weights))[0], adapter_name="style")
    changed = predict(pipe)
    pipe.disable_lora()
    assert torch.equal(predict(pipe), plain)
    pipe.enable_lora()
    assert pipe.get_active_adapters() == ["style"]
    assert torch.equal(predict(pipe), changed)


def test_several_adapters_are_fused_together():
    weights = load_weights()
    pipe = make_pipeline(weights)
    plain = predict(pipe)
    changes = []
    for name in ("first", "second"):
        lora, change = make_lora(linears(weights))
        pipe.load_lora_weights(lora, adapter_name=name)
        changes.append(change)
    both = {name: changes[0][name] + changes[1][name] for name in changes[0]}
    pipe.fuse_lora(adapter_names=["first", "second"])
    assert pipe.num_fused_loras == 2
    assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, both))))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_close(predict(pipe), plain)


def test_hotswap_after_compiling():
    """Adapters of other ranks and alphas take each other's place without another compilation."""
    weights = load_weights()
    module = {MODALITY_QKV: weights[f"{MODALITY_QKV}.weight"]}
    pipe = make_pipeline(weights)
    pipe.enable_lora_hotswap(target_rank=8)
    first, first_changes = make_lora(module)
    pipe.load_lora_weights(first, adapter_name="style")
    factors = torch.randn(5, 64) * 0.05, torch.randn(396, 5) * 0.3
    second = {f"{MODALITY_QKV}.lora_A.weight": factors[0], f"{MODALITY_QKV}.lora_B.weight": factors[1]}
    second[f"{MODALITY_QKV}.alpha"] = torch.tensor(4.0)
    second_changes = {MODALITY_QKV: factors[1] @ factors[0] * 4 / 5}

    torch.compiler.reset()
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, first_changes))))
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
        assert_close(predict(pipe), predict(make_pipeline(add_changes(weights, second_changes))))


def test_hotswap_of_what_does_not_fit_leaves_the_adapter():
    weights = load_weights()
    pipe = make_pipeline(weights)
    module = {MODALITY_QKV: weights[f"{MODALITY_QKV}.weight"]}
    pipe.load_lora_weights(make_lora(module)[0], adapter_name="style")
    expected = predict(pipe)
    lora, message = BAD_LORAS["foreign"]
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(lora, adapter_name="style", hotswap=True)
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        pipe.load_lora_weights(make_lora(module)[0], adapter_name="other", hotswap=True)
    assert torch.equal(predict(pipe), expected)


@pytest.mark.parametrize("source, options", [("/no/such/dir", {}), (".", {"weight_name": "none.safetensors"})])
def test_missing_files_are_not_called_damaged(source, options, unchanged_pipe):
    with pytest.raises(OSError, match=f"^'{source}' cannot be read: "):
        unchanged_pipe.load_lora_weights(source, **options)
