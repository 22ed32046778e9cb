"""Every published layout loads in one line, from local folders and files; the Hub is in test_hub."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, GGUFQuantizationConfig
from diffusers.loaders import FromOriginalModelMixin
from golden import load_golden, load_golden_weights
from helpers import PROMPT, assert_same, run, upscale
from layouts import (
    FLOAT8_SCALES,
    all_bf16,
    dequantised,
    expected_model,
    float8,
    fp8,
    outputs,
    write_external_repositories,
    write_file,
    write_repositories,
    write_shards,
    write_turbo_vae,
)
from safetensors.torch import load_file, save_file
from transformers import T5GemmaEncoderModel

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
    loading,
    single_file,
)
from diffusers_magihuman.files import reading
from diffusers_magihuman.loading import (
    convert_turbo_vae_state_dict,
    fetch,
    load_original_components,
    load_original_transformer,
    load_original_turbo_vae,
    load_text_encoder,
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    write_repositories(root)
    write_external_repositories(root)
    return root


@pytest.fixture(scope="module")
def base_weights():
    return load_golden_weights("dit_base")


def is_exact(model, weights):
    """Whether a model holds what canonical weights are converted to without any file."""
    expected, actual = expected_model(weights).state_dict(), model.state_dict()
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def assert_kept_in_float32(model):
    for name, parameter in model.named_parameters():
        is_kept = any(part in name for part in ("embedder", "norm", "proj_out"))
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name


LAYOUTS = {
    ("GAIR/daVinci-MagiHuman", "base"): None,
    ("GAIR/daVinci-MagiHuman", "distill"): None,
    ("FastVideo/MagiHuman-Diffusers", "distill"): None,
    ("smthem/MagiHuman/distill-merger_bf16.safetensors", None): all_bf16,
    ("DeepBeepMeep/MagiHuman", "magi_human_distill_bf16.safetensors"): all_bf16,
    ("SanDiegoDude/daVinci-MagiHuman-FP8", "distill_fp8"): lambda weights: dequantised(fp8(weights)),
}


@pytest.mark.parametrize("path, subfolder", LAYOUTS)
def test_every_layout_gives_what_it_holds(path, subfolder, repositories, base_weights):
    """Equal to the same weights under canonical names, and near to the golden output if they are rounded."""
    info, golden = load_golden("dit_base")
    rounding = LAYOUTS[path, subfolder]
    model = load_original_transformer(repositories / path, subfolder, dtype=torch.float32)
    assert is_exact(model, rounding(base_weights) if rounding else base_weights)
    for output, name in zip(outputs(model, golden, info["text_len"]), ("video", "audio"), strict=True):
        expected = golden[f"fp32.out.{name}"]
        if rounding is None:
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
        else:
            error = (output - expected).square().mean() / expected.square().mean()
            assert error.sqrt() < (0.12 if "FP8" in path else 0.02)


@pytest.mark.parametrize(
    "path, subfolder",
    [
        ("GAIR/daVinci-MagiHuman", "distill"),
        ("SanDiegoDude/daVinci-MagiHuman-FP8", "distill_fp8"),
        ("DeepBeepMeep/MagiHuman", "magi_human_distill_bf16.safetensors"),
    ],
)
def test_fp32_stays_fp32(path, subfolder, repositories):
    model = load_original_transformer(repositories / path, subfolder)
    assert_kept_in_float32(model)
    assert model.dtype == torch.bfloat16 and not model.training


@pytest.mark.parametrize(
    "path, subfolder, variant",
    [
        ("GAIR/daVinci-MagiHuman", "1080p_sr", "sr_1080p"),
        ("FastVideo/MagiHuman-Diffusers", "sr_1080p", "sr_1080p"),
        ("smthem/MagiHuman", "540p_sr_merge_bf16.safetensors", "sr-540p"),
    ],
)
def test_super_resolution_variants(path, subfolder, variant, repositories):
    model = load_original_transformer(repositories / path, subfolder, variant, dtype=torch.float32)
    assert model.config.num_layers == 4  # of FastVideo's two transformers the second
    assert model.config.coordinate_style == "v1" and model.config.local_attention_frames == 11
    assert model.config.local_attention_layers == ((0, 1, 2) if variant in ("sr_1080p", "sr-1080p") else ())
    weights = load_golden_weights("dit_sr")
    assert is_exact(model, all_bf16(weights) if "smthem" in path else weights)


@pytest.mark.parametrize(
    "file",
    ["smthem/MagiHuman/distill-merger_bf16.safetensors", "DeepBeepMeep/MagiHuman/magi_human_distill_bf16.safetensors"],
)
def test_from_single_file(file, repositories):
    expected = load_original_transformer(repositories / file).state_dict()
    model = MagiHumanTransformer3DModel.from_single_file(str(repositories / file))
    assert not model.training and model.config.coordinate_style == "v2"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == expected[name].dtype and torch.equal(parameter, expected[name]), name
    in_fp32 = MagiHumanTransformer3DModel.from_single_file(
        str(repositories / file), variant="sr_540p", dtype=torch.float32
    )
    assert in_fp32.dtype == torch.float32 and in_fp32.config.coordinate_style == "v1"


def test_from_single_file_with_scaled_float8(base_weights, tmp_path):
    write_file(fp8(base_weights), tmp_path / "distill_fp8.safetensors")
    model = MagiHumanTransformer3DModel.from_single_file(
        str(tmp_path / "distill_fp8.safetensors"), dtype=torch.float32
    )
    assert is_exact(model, dequantised(fp8(base_weights)))


def test_from_single_file_with_our_names(base_weights, tmp_path):
    model = expected_model(base_weights)
    model.save_pretrained(tmp_path / "transformer")
    file = str(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded = MagiHumanTransformer3DModel.from_single_file(file, config=str(tmp_path), subfolder="transformer")
    assert_kept_in_float32(loaded)
    with pytest.raises(ValueError, match="variant"):
        MagiHumanTransformer3DModel.from_single_file(file)


@pytest.mark.parametrize("file", ["original", "fp8", "ours", "padded"])
def test_files_of_either_size_are_padded(file, base_weights, tmp_path):
    plain = expected_model(base_weights)
    padded = expected_model(base_weights, feed_forward_multiple=96).state_dict()
    plain.save_pretrained(tmp_path / "config")
    kwargs = {"variant": "base"} if file in ("original", "fp8") else {"config": str(tmp_path / "config")}
    layout = {"original": base_weights, "fp8": fp8(base_weights), "ours": plain.state_dict(), "padded": padded}
    write_file(layout[file], tmp_path / "base.safetensors")
    if file == "fp8":
        padded = expected_model(dequantised(layout[file]), feed_forward_multiple=96).state_dict()
    kwargs |= {"dtype": torch.float32, "feed_forward_multiple": 96}
    models = [MagiHumanTransformer3DModel.from_single_file(str(tmp_path / "base.safetensors"), **kwargs)]
    if "config" not in kwargs:
        models.append(load_original_transformer(tmp_path / "base.safetensors", **kwargs))
    for model in models:
        assert model.config.feed_forward_multiple == 96
        assert model.transformer_blocks[2].ff.linear_out.weight.shape == (64, 192)
        assert all(torch.equal(tensor, padded[name]) for name, tensor in model.state_dict().items())
        model.save_pretrained(tmp_path / "saved")
        again = MagiHumanTransformer3DModel.from_pretrained(tmp_path / "saved")
        assert again.config.feed_forward_multiple == 96
    with pytest.raises(ValueError, match=r"another shape: .*(linear_out|down_proj)"):
        wide = {name: F.pad(tensor, (0, 4)) for name, tensor in layout[file].items() if tensor.ndim == 2}
        wrong = layout[file] | {name: x for name, x in wide.items() if "linear_out" in name or "down_proj" in name}
        MagiHumanTransformer3DModel.from_single_file(wrong, **kwargs)


PREFIXES = ["model.diffusion_model.", "diffusion_model.", "model.", "dit.", "pipe.dit.", "module.", "_orig_mod."]
PREFIXES += [
    "net.",
    "ema.",
    "generator.",
    "unet.",
    "_forward_module.module.",
    "transformer.",
    "base_model.model.",
    "module._orig_mod.",
    "base_model.model.transformer.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_other_tools(prefix, base_weights, tmp_path):
    """With other models in the same file, as ComfyUI saves them; with the original's names and ours."""
    model = expected_model(base_weights)
    others = {name: torch.zeros(2) for name in ("vae.decoder.x", "text_encoders.logit_scale", "model_ema.decay")}
    weights = {prefix + name: tensor for name, tensor in base_weights.items()} | others
    path = tmp_path / "base.safetensors"
    write_file(weights, path)
    from_single_file = MagiHumanTransformer3DModel.from_single_file
    assert is_exact(load_original_transformer(path, dtype="float32"), base_weights)
    assert is_exact(from_single_file(str(path), torch_dtype=torch.float32), base_weights)
    assert is_exact(from_single_file(weights, variant="base", dtype=torch.float32), base_weights)
    model.save_config(tmp_path / "config")
    ours = {prefix + name: tensor for name, tensor in model.state_dict().items()} | others
    assert is_exact(from_single_file(ours, config=tmp_path / "config", dtype=torch.float32), base_weights)


def test_names_of_wrappers_within_names(base_weights):
    weights = {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in base_weights.items()}
    model = MagiHumanTransformer3DModel.from_single_file(weights, variant="base", dtype=torch.float32)
    assert is_exact(model, base_weights)
    weights |= {f"model.{name}": tensor for name, tensor in base_weights.items()}
    with pytest.raises(ValueError, match="two names of one tensor"):
        MagiHumanTransformer3DModel.from_single_file(weights, variant="base")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("spelling", [None, *FLOAT8_SCALES])
def test_float8_of_other_tools(spelling, dtype, base_weights, tmp_path):
    weights, expected = float8(base_weights, spelling, dtype)
    write_file(weights, tmp_path / "base.safetensors")
    assert is_exact(load_original_transformer(tmp_path / "base.safetensors", dtype=torch.float32), expected)
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    model = MagiHumanTransformer3DModel.from_single_file(weights, variant="base", dtype=torch.float32)
    assert is_exact(model, expected)


def test_config_of_a_single_file_is_as_from_json(base_weights, tmp_path):
    model = MagiHumanTransformer3DModel.from_single_file(base_weights, variant="sr_1080p")
    model.save_pretrained(tmp_path)
    saved = MagiHumanTransformer3DModel.from_pretrained(tmp_path).config
    ignored = ("_name_or_path", "_diffusers_version", "_use_default_values")
    assert {name: value for name, value in model.config.items() if name not in ignored} == {
        name: saved[name] for name in saved if name not in ignored
    }


@pytest.mark.parametrize("value", ["float16", "torch.float16", torch.float16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes_mean_the_same_everywhere(name, value, repositories, base_weights):
    sources, given = local_sources(repositories), {name: value}
    for model in (
        load_original_transformer(sources["path_or_repo"] / "distill", **given),
        MagiHumanTransformer3DModel.from_single_file(base_weights, variant="base", **given),
        load_original_turbo_vae(sources["path_or_repo"], "turbo_vae", encoder=sources["video_vae"], **given),
        load_text_encoder(sources["text_encoder"], **given)[1],
    ):
        assert model.dtype == torch.float16
    parts = {"default": value, "text_encoder": "bfloat16", "audio_vae": "float32"}
    for dtype, expected in ((value, ["float16"] * 3), (parts, ["float16", "bfloat16", "float16"])):
        pipe = MagiHumanAudioVideoPipeline.from_original(variant="distill", turbo_vae=None, **sources, **{name: dtype})
        dtypes = [part.dtype for part in (pipe.transformer, pipe.text_encoder, pipe.vae, pipe.audio_vae)]
        assert [str(dtype) for dtype in dtypes] == [f"torch.{name}" for name in (*expected, "float32")]


def single(**kwargs):
    return MagiHumanTransformer3DModel.from_single_file({}, variant="base", **kwargs)


TRANSFORMER_LOADERS = ("load_original_transformer", "load_original_components", "from_single_file")
LOADERS = {
    "load_original_transformer": lambda **kwargs: load_original_transformer(
        **{"path_or_repo": "/", "variant": "base"} | kwargs
    ),
    "load_original_turbo_vae": lambda **kwargs: load_original_turbo_vae(**{"path_or_repo": "/"} | kwargs),
    "load_text_encoder": lambda **kwargs: load_text_encoder("/", **kwargs),
    "load_original_components": lambda **kwargs: load_original_components("/", "base", **kwargs),
    "from_single_file": single,
}


@pytest.mark.parametrize("function", LOADERS)
def test_unknown_arguments_are_type_errors_of_the_function(function):
    """Also where nothing is downloaded; other values than dtypes are refused before anything is opened."""
    with pytest.raises(TypeError, match=rf"{function}\(\) got an unexpected keyword argument 'revison'"):
        LOADERS[function](revison="main")
    for value in ({"path_or_repo": None}, {"path_or_repo": ["a"]}, {"subfolder": 3}):
        if function.startswith("load_original_t"):
            with pytest.raises(ValueError, match=next(iter(value))):
                LOADERS[function](**value)
    for dtype in ("half", torch.int8, torch.float8_e4m3fn, 16, {"unknown": torch.float32}, {"default": "auto"}):
        with pytest.raises(ValueError, match="`dtype"):
            LOADERS[function](dtype=dtype)
    for multiple in (0, -1, 1.5, True, "128", 10**9) if function in TRANSFORMER_LOADERS else ():
        with pytest.raises(ValueError, match=r"`feed_forward_multiple`=.* 1 to 4096"):
            LOADERS[function](feed_forward_multiple=multiple)


def test_options_of_diffusers_own_from_single_file(base_weights, tmp_path):
    """Those that change nothing are taken; others are not ignored."""
    path = tmp_path / "base.safetensors"
    save_file({name: tensor.float() for name, tensor in base_weights.items()}, path)
    options = {"proxies": None, "low_cpu_mem_usage": True, "original_config": None, "disable_mmap": True}
    model = MagiHumanTransformer3DModel.from_single_file(str(path), dtype=torch.float32, **options)
    with path.open("r+b") as file:  # as long as it is mapped, this changes the model
        file.write(bytes(path.stat().st_size))
    assert is_exact(model, base_weights)
    for name, value in {"proxies": {}, "low_cpu_mem_usage": False, "original_config": "x", "disable_mmap": 1}.items():
        with pytest.raises(ValueError, match=f"`{name}`="):
            single(**{name: value})
    with pytest.raises(OSError, match="'' is no file"):
        MagiHumanTransformer3DModel.from_single_file("", variant="base")


def test_device_of_a_single_file(base_weights):
    for where in ({"device": "meta"}, {"device_map": "meta"}, {"device_map": {"": "meta"}}):
        assert (
            MagiHumanTransformer3DModel.from_single_file(base_weights, variant="base", **where).device.type == "meta"
        )
    for where in ({"device": "hpu"}, {"device_map": "auto"}, {"device_map": {"video_embedder": "cpu"}}):
        with pytest.raises(ValueError, match=rf"`{next(iter(where))}`=.* must be one device.*`from_pretrained`"):
            single(**where)


def make_wrong(kind, weights, folder):
    """A base checkpoint in three shards with one thing wrong."""
    weights = dict(weights)
    if kind == "shape":
        weights["final_norm_audio.weight"] = torch.zeros(63)
    write_shards(weights, folder, "model")
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00002-of-00003.safetensors"
    content = json.loads(index.read_text())
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    if kind == "missing shard":
        shard.unlink()
    if kind == "absent tensor":
        content["weight_map"]["block.layers.99.mlp.pre_norm.weight"] = shard.name
    if kind == "climbs out":
        save_file({"x": torch.zeros(1)}, folder.parent / "secret.safetensors")
        content["weight_map"]["final_norm_audio.weight"] = "../secret.safetensors"
    if kind == "absolute":
        content["weight_map"]["final_norm_audio.weight"] = str(folder.parent / "secret.safetensors")
    index.write_text("[]" if kind == "no index" else json.dumps(content))


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("truncated", OSError, "model-00002-of-00003.safetensors' is missing, damaged"),
        ("missing shard", OSError, "model-00002-of-00003.safetensors' is missing.*No such file"),
        ("absent tensor", OSError, r"lacks what its index says it holds: .*block.layers.99.mlp.pre_norm.weight"),
        ("climbs out", ValueError, "names the files .*secret.safetensors"),
        ("absolute", ValueError, "names the files .*secret.safetensors"),
        ("no index", OSError, "model.safetensors.index.json' is no index of safetensors files"),
        ("shape", ValueError, r"final_norm_audio.weight \(63,\) instead of \(64,\)"),
    ],
)
def test_wrong_files_raise(kind, error, message, base_weights, tmp_path):
    make_wrong(kind, base_weights, tmp_path / "base")
    with pytest.raises(error, match=message):
        load_original_transformer(tmp_path / "base")


EMBEDDER, LINEAR = "adapter.video_embedder.weight", "block.layers.0.attention.linear_proj.weight"
ODD_SHAPES = {
    "1-d": {EMBEDDER: torch.zeros(64)},
    "empty": {EMBEDDER: torch.zeros(0, 16)},
    "empty norm": {"block.layers.0.attention.q_norm.weight": torch.zeros(0)},
    "5-d": {LINEAR: torch.zeros(1, 1, 1, 1, 1)},
    "small norm": {"block.layers.0.attention.q_norm.weight": torch.zeros(2)},
    "no layer": {"block.layers.99999999999.attention.q_norm.weight": torch.zeros(3)},
    "many layers": {"block.layers.9999.attention.q_norm.weight": torch.zeros(3)},
    "bool": {LINEAR: torch.zeros(192, 64, dtype=torch.bool)},
    "int": {LINEAR: torch.zeros(192, 64, dtype=torch.int8)},
    "complex": {LINEAR: torch.zeros(192, 64, dtype=torch.complex64)},
    "one float8 of many without a scale": {LINEAR: torch.zeros(192, 64).to(torch.float8_e4m3fn)},
    "float8 that says it has scales": {"scaled_fp8": torch.zeros(2)},
    "NaN as scale": {f"{LINEAR}_scale": torch.tensor(torch.nan)},
}


@pytest.mark.parametrize("kind", ODD_SHAPES)
def test_odd_tensors_raise_with_the_file(kind, base_weights, tmp_path):
    weights = base_weights if "float8" not in kind or "says" in kind else fp8(base_weights)
    weights = {name: tensor for name, tensor in weights.items() if LINEAR not in name} | {LINEAR: base_weights[LINEAR]}
    path = tmp_path / "base.safetensors"
    write_file(weights | ODD_SHAPES[kind], path)
    for load in (load_original_transformer, MagiHumanTransformer3DModel.from_single_file):
        with pytest.raises((ValueError, OSError), match=r"base\.safetensors'"):
            load(str(path))
    for wrong in (
        {5: torch.zeros(1)},
        {"x": None},
        {"x": 1.0},
        [],
        {**weights, LINEAR: torch.zeros(192, 64).to_sparse()},
    ):
        with pytest.raises(ValueError, match=r"`pretrained_model|`state_dict`|linear_proj"):
            MagiHumanTransformer3DModel.from_single_file(wrong, variant="base")


def test_deep_headers_and_indices_raise(tmp_path):
    deep = b"[" * 100_000
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors.index.json").write_bytes(deep)
    (tmp_path / "base.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    for load, name in (
        (load_original_transformer, "base"),
        (load_original_transformer, "base.safetensors"),
        (MagiHumanTransformer3DModel.from_single_file, "base.safetensors"),
    ):
        (tmp_path / "base" / "x.safetensors").touch()
        with pytest.raises(OSError, match=name):
            load(tmp_path / name)


def gguf_field(kind, *value):
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"x", kind) + struct.pack(*value)


@pytest.mark.parametrize(
    "content",
    [
        *(gguf_field(9, "<IQ", kind, 2**40) for kind in (0, 4, 8, 9, 99)),
        gguf_field(9, "<" + "IQ" * 20_000, *(9, 1) * 20_000),
        gguf_field(8, "<Q", 2**63),
        b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62),
        b"GG",
    ],
)
def test_gguf_whose_header_lies_raises_at_once(content, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "base.gguf"
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=r"base\.gguf'"):
        MagiHumanTransformer3DModel.from_single_file(path, quantization_config=GGUFQuantizationConfig())


def test_nothing_to_open_raises(tmp_path, base_weights):
    (tmp_path / "base").mkdir()
    with pytest.raises(OSError, match=r"has no safetensors in \['base'\]"):
        load_original_transformer(tmp_path / "base")
    for name in ("one", "two"):
        save_file({"x": torch.zeros(1)}, tmp_path / "base" / f"{name}.safetensors")
    with pytest.raises(OSError, match="must hold an index or one"):
        load_original_transformer(tmp_path / "base")
    with pytest.raises(OSError, match=r"'./missing' is neither a path that exists nor a repository"):
        load_original_transformer("./missing", variant="base")
    with pytest.raises(OSError, match=r"has no safetensors in \['nowhere'\]"):
        load_original_transformer(tmp_path, subfolder="nowhere", variant="base")
    write_shards(base_weights, tmp_path / "x", "model")
    with pytest.raises(ValueError, match="`variant`='large' must be one of"):
        load_original_transformer(tmp_path / "x", variant="large")


def local_sources(root):
    return {
        "path_or_repo": root / "GAIR" / "daVinci-MagiHuman",
        "text_encoder": root / "google" / "t5gemma-9b-9b-ul2",
        "audio_vae": root / "stabilityai" / "stable-audio-open-1.0",
        "video_vae": root / "Wan-AI" / "Wan2.2-TI2V-5B-Diffusers",
    }


@pytest.mark.parametrize("prefix", ["module.decoder.", "module.", "decoder.", ""])
@torch.no_grad()
def test_turbo_vae_from_the_published_pickle(prefix, tmp_path):
    info, golden = load_golden("turbo_vae")
    weights, config = load_golden_weights("turbo_vae"), info["turbo_vaed_config"]
    write_turbo_vae(weights, config, tmp_path / "turbo_vae", prefix)
    expected = AutoencoderKLMagiHumanTurbo.from_config(config)
    expected.load_state_dict(convert_turbo_vae_state_dict(weights, config))
    for path, subfolder in ((tmp_path, "turbo_vae"), (tmp_path / "turbo_vae" / "checkpoint-340000.ckpt", None)):
        vae = load_original_turbo_vae(path, subfolder)
        assert vae.encoder is None and not vae.training
        assert torch.equal(vae.decode(golden["in.latent_f4"]).sample, expected.decode(golden["in.latent_f4"]).sample)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch should-not-exist",)


def test_pickle_that_runs_code_raises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"ema_state_dict": RunsCode()}))
    torch.save({"ema_state_dict": RunsCode()}, tmp_path / "evil_zip.ckpt")
    for name in ("evil.ckpt", "evil_zip.ckpt"):
        with pytest.raises(OSError, match=f"{name}' is damaged, or holds more than plain tensors"):
            load_original_turbo_vae(tmp_path / name)
    assert not (tmp_path / "should-not-exist").exists()


@torch.no_grad()
def test_turbo_vae_from_single_file(tmp_path):
    """By the published names and settings beside the file, and by ours and a config."""
    info, golden = load_golden("turbo_vae")
    weights, config = load_golden_weights("turbo_vae"), info["turbo_vaed_config"]
    write_turbo_vae(weights, config, tmp_path / "turbo_vae")
    expected = load_original_turbo_vae(tmp_path, "turbo_vae")
    assert isinstance(expected, FromOriginalModelMixin)
    expected.save_pretrained(tmp_path / "vae")
    ours = str(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    write_file(weights, tmp_path / "file" / "x.safetensors")
    from_single_file, vae = AutoencoderKLMagiHumanTurbo.from_single_file, str(tmp_path / "vae")
    for model in (
        from_single_file(str(tmp_path / "turbo_vae" / "checkpoint-340000.ckpt")),
        from_single_file(ours),
        from_single_file(ours, config=str(tmp_path), subfolder="vae"),
        from_single_file(str(tmp_path / "file" / "x.safetensors"), config=vae),
        from_single_file({f"first_stage_model.{x}": torch.ones(1) for x in "ab"} | weights, config=vae),
    ):
        assert model.dtype == torch.float32 and not model.training
        assert torch.equal(model.decode(golden["in.latent_f4"]).sample, expected.decode(golden["in.latent_f4"]).sample)
    assert from_single_file(ours, torch_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x\.safetensors' does not fit: .*of another shape"):
        from_single_file(str(tmp_path / "file" / "x.safetensors"))  # the settings are the published ones


BAD_PICKLES = [{"ema_state_dict": "text"}, {"ema_state_dict": [1]}, {1: torch.zeros(1)}, {"x": 1}, "text", [1], None]


@pytest.mark.parametrize("content", BAD_PICKLES)
def test_pickles_of_other_things_raise_with_the_file(content, tmp_path):
    path = tmp_path / "vae.ckpt"
    torch.save(content, path)
    for load in (load_original_turbo_vae, AutoencoderKLMagiHumanTurbo.from_single_file):
        with pytest.raises((ValueError, OSError), match=r"vae\.ckpt'"):
            load(path)
    content = path.read_bytes()
    for damaged in (content[:20], b"", b"\x80\x02.", content.replace(b"}", b"0")):
        path.write_bytes(damaged)
        with pytest.raises((ValueError, OSError), match=r"vae\.ckpt'"):
            load_original_turbo_vae(path)


@torch.no_grad()
def test_turbo_vae_takes_the_encoder_of_wan(repositories):
    sources = local_sources(repositories)
    vae = load_original_turbo_vae(sources["path_or_repo"], "turbo_vae", encoder=sources["video_vae"])

    wan = AutoencoderKLWan.from_pretrained(sources["video_vae"], subfolder="vae")
    video = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(vae.encode(video).latent_dist.mode(), wan.encode(video).latent_dist.mode())
    assert list(vae.config.latents_mean) == list(wan.config.latents_mean)


@torch.no_grad()
def test_text_encoder_is_the_encoder_of_the_whole_model(repositories):
    path = local_sources(repositories)["text_encoder"]
    tokenizer, encoder = load_text_encoder(path, torch.float32)
    input_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    (path / "model-00002-of-00002.safetensors").rename(path / "hidden")  # the decoder is never opened
    _, again = load_text_encoder(path, torch.float32)
    (path / "hidden").rename(path / "model-00002-of-00002.safetensors")

    whole = T5GemmaEncoderModel.from_pretrained(path, is_encoder_decoder=False)
    expected = whole(input_ids=input_ids).last_hidden_state
    for model in (encoder, again):
        assert not model.training and torch.equal(model(input_ids=input_ids).last_hidden_state, expected)


def test_text_encoder_with_a_missing_tensor_raises(repositories, tmp_path):
    path = tmp_path / "t5gemma"
    shutil.copytree(local_sources(repositories)["text_encoder"], path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.encoder.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"t5gemma' does not fit: .*missing: encoder\.norm\.weight"):
        load_text_encoder(path)


def test_damaged_turbo_vae_config_is_named(tmp_path):
    info, _ = load_golden("turbo_vae")
    write_turbo_vae(load_golden_weights("turbo_vae"), info["turbo_vaed_config"], tmp_path / "turbo_vae")
    (tmp_path / "turbo_vae" / "config.json").write_text("")
    with pytest.raises(OSError, match=r"config\.json' is damaged"):
        load_original_turbo_vae(tmp_path / "turbo_vae")
    (tmp_path / "turbo_vae" / "config.json").write_text(json.dumps(info["turbo_vaed_config"]))
    for name, content in (("a.json", "[1]"), ("workflow.json", '{"patch_size": 7}')):  # of others
        (tmp_path / "turbo_vae" / name).write_text(content)
    load_original_turbo_vae(tmp_path / "turbo_vae")


@pytest.mark.parametrize("error", [MemoryError("full"), ImportError("no package")])
def test_what_is_no_fault_of_the_file_is_raised_as_it_is(error):
    with pytest.raises(type(error), match=f"^{error}$"), reading("file"):
        raise error


@pytest.mark.parametrize("model", [MagiHumanTransformer3DModel, AutoencoderKLMagiHumanTurbo])
def test_gguf_without_its_package(model, monkeypatch, tmp_path):
    monkeypatch.setattr(single_file, "is_gguf_available", lambda: False)
    is_transformer = model is MagiHumanTransformer3DModel
    options = {"variant": "base", "quantization_config": GGUFQuantizationConfig()} if is_transformer else {}
    with pytest.raises(ImportError, match="`gguf`"):
        model.from_single_file(tmp_path / "missing.gguf", **options)
    with pytest.raises(OSError, match=r"^'/no/such/config' cannot be read: "):
        model.from_single_file({}, config="/no/such/config")


def test_text_encoder_in_float8(repositories, tmp_path):
    path = tmp_path / "t5gemma"
    shutil.copytree(local_sources(repositories)["text_encoder"], path)
    file = path / "model-00001-of-00002.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    scale = 0.5 + torch.rand(len(weights[name]))
    save_file(weights | {name: weights[name].to(torch.float8_e5m2), f"{name}_scale": scale}, file)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{name}_scale"] = file.name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = weights[name].to(torch.float8_e5m2).float() * scale[:, None]
    assert torch.equal(load_text_encoder(path, "float32")[1].state_dict()[name.removeprefix("model.")], expected)


@pytest.mark.parametrize("turbo", [True, False])
@pytest.mark.parametrize("variant", ["base", "distill"])
def test_from_original_with_local_directories(variant, turbo, repositories):
    sources = local_sources(repositories)
    pipe = MagiHumanAudioVideoPipeline.from_original(
        variant=variant, dtype=torch.float32, turbo_vae=sources["path_or_repo"] if turbo else None, **sources
    )
    assert pipe.config.is_distilled == (variant == "distill")
    assert pipe.scheduler.config.sampler == ("renoise" if variant == "distill" else "unipc")
    assert type(pipe.vae).__name__ == ("AutoencoderKLMagiHumanTurbo" if turbo else "AutoencoderKLWan")
    output = run(pipe, output_type="np")
    assert output.frames.shape == (1, 9, 64, 64, 3)


def test_revision_is_that_of_the_transformer_alone(repositories, monkeypatch):
    revisions = {}

    def record(source, *args, **hub_kwargs):
        revisions.setdefault(source, set()).add(hub_kwargs.get("revision"))
        return fetch(source, *args, **hub_kwargs)

    monkeypatch.setattr(loading, "fetch", record)
    sources = local_sources(repositories)
    sources["turbo_vae"] = sources.pop("path_or_repo")
    transformer = sources["turbo_vae"] / "distill"
    load_original_components(transformer, "distill", revision="v1", **sources)
    assert revisions == {transformer: {"v1"}} | {source: {None} for source in sources.values()}

    revisions.clear()
    load_original_turbo_vae(sources["turbo_vae"], encoder=sources["video_vae"], revision="v1")
    assert revisions == {sources["turbo_vae"]: {"v1"}, sources["video_vae"]: {None}}


def test_variants_that_a_pipeline_does_not_take_are_not_offered(tmp_path):
    with pytest.raises(ValueError, match=r"`variant=`, one of \('sr-540p', 'sr-1080p'\)"):
        MagiHumanLatentUpscalePipeline.from_original(tmp_path)


def test_from_original_in_bf16_keeps_fp32_parts(repositories, tmp_path):
    sources = local_sources(repositories)
    sources |= {"turbo_vae": sources["path_or_repo"], "default_height": 64}  # a setting of the pipeline
    pipe = MagiHumanAudioVideoPipeline.from_original(variant="distilled", feed_forward_multiple=32, **sources)
    assert pipe.transformer.transformer_blocks[2].ff.linear_out.in_features == 192
    assert pipe.config.default_height == 64
    assert pipe.config.is_distilled and pipe.scheduler.config.sampler == "renoise"  # by its other spelling too
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.text_embedder.weight.dtype == pipe.audio_vae.dtype == torch.float32
    pipe.save_pretrained(tmp_path)
    dtype = {"default": torch.bfloat16, "audio_vae": torch.float32}
    assert_same(run(MagiHumanAudioVideoPipeline.from_pretrained(tmp_path, dtype=dtype)), run(pipe))


@pytest.mark.parametrize("turbo", [True, False])
@pytest.mark.parametrize("variant, size", [("sr-540p", (512, 896)), ("sr_1080p", (1088, 1920))])
def test_upscale_from_original_with_local_directories(variant, size, turbo, repositories):
    sources = local_sources(repositories)
    pipe = MagiHumanLatentUpscalePipeline.from_original(
        variant=variant, dtype=torch.float32, turbo_vae=sources["path_or_repo"] if turbo else None, **sources
    )
    assert (pipe.config.default_height, pipe.config.default_width) == size
    assert pipe.transformer.config.coordinate_style == "v1"
    assert bool(pipe.transformer.config.local_attention_layers) == (variant in ("sr_1080p", "sr-1080p"))
    assert pipe.scheduler.config.sampler == "unipc"
    assert type(pipe.vae).__name__ == ("AutoencoderKLMagiHumanTurbo" if turbo else "AutoencoderKLWan")
    low = {"latents": torch.randn(1, 4, 3, 2, 4), "audio_latents": torch.randn(1, 9, 8)}
    output = upscale(pipe, **low, output_type="np")
    assert output.frames.shape == (1, 9, 64, 96, 3) and output.audio.shape[:2] == (1, 2)


def test_from_original_refuses_the_other_pipelines_variants(repositories):
    source = repositories / "GAIR" / "daVinci-MagiHuman"
    with pytest.raises(ValueError, match="`variant`='sr-540p' must be"):
        MagiHumanAudioVideoPipeline.from_original(source, subfolder="540p_sr")
    with pytest.raises(ValueError, match="`variant`='distilled' must be"):
        MagiHumanLatentUpscalePipeline.from_original(source, subfolder="distill")
