"""What `magihuman plan` says is what the code then needs, measured in bytes of tensors."""

import itertools
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from helpers import assert_equal, generate, make_tiny_model, round_to_float8
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.constants import QUANTIZERS
from diffusers_magihuman.tools.cli import main
from diffusers_magihuman.tools.plan import (
    GIB,
    LEAN,
    OFFLOADING,
    SETTINGS,
    STORED,
    Kernels,
    MemoryTracker,
    Setting,
    Speed,
    choose,
    configured_pipeline,
    format_calls,
    format_plan,
    make_calls,
    make_settings,
    make_stages,
    measure_memory,
    plan_call,
    plan_pipeline,
    published_pipeline,
    quantize_weights,
    weights_in_ram,
    weights_on_gpu,
)
from diffusers_magihuman.tools.quantize import quantize_weight, torchao_config

SIZE = (64, 96, 18)
PIPELINES = {"base": make_tiny_pipeline, "upscale": make_tiny_upscale_pipeline}
# What a CPU has no streams, and Diffusers no offloading from it, for.
SUBSTITUTIONS = {"cuda": "cpu", "use_stream=True": "use_stream=False"}


@pytest.fixture(scope="session")
def tiny_plan(tiny_pipeline_dir):
    return plan_pipeline("tiny", configured_pipeline(str(tiny_pipeline_dir), torch.float32), *SIZE)


def size(*modules):
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


# Counting


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tracker_counts_each_storage_while_it_is_alive(device):
    held = torch.zeros(1000, device=device)
    with MemoryTracker() as tracker:
        tracker.hold([held, held[:10]])
        assert tracker.live == 4000
        first = torch.zeros(500, device=device)
        second = first + 1
        view = second.view(5, 100).t()
        assert tracker.live == 4000 + 2000 + 2000
        del first, second
        assert (tracker.live, tracker.peak) == (6000, 8000)
        held.data = torch.zeros(10, device=device)
        assert tracker.live == 2000 + 40
        del view
    assert (tracker.live, tracker.peak) == (40, 8000)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_has_no_scores(has_mask, device):
    query, key, value = (torch.zeros(1, 4, 2048, 16, device=device) for _ in range(3))
    mask = torch.zeros(1, 1, 1, 2048, device=device) if has_mask else None
    peak, _ = measure_memory(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    assert peak == query.nbytes + 4 * 4 * 2048  # the output, and a log of sums for each query


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantised_linears_need_what_those_of_torchao_do(kind):
    peaks = {}
    for is_planned in (True, False):
        with torch.device("meta"):
            model = make_tiny_model(num_attention_heads=4, attention_head_dim=32, feed_forward_multiple=16).bfloat16()
            states = torch.zeros(1, 1000, 128, dtype=torch.bfloat16)
        linears = [each for each in model.transformer_blocks[1].ff.modules() if isinstance(each, torch.nn.Linear)]
        if is_planned:
            quantize_weights(model, kind)
            weights = [linear.weight for linear in linears]
        else:
            for linear in linears:
                quantized = quantize_weight(linear.weight.detach(), torchao_config(kind).quant_type)
                linear.weight = torch.nn.Parameter(quantized, requires_grad=False)
            weights = [getattr(linear.weight, x) for linear in linears for x in linear.weight.__tensor_flatten__()[0]]
        with torch.no_grad(), Kernels(), MemoryTracker() as tracker:
            tracker.hold([weights, states])
            held = tracker.live
            for linear in linears:
                linear(torch.zeros(1, 1000, linear.in_features, dtype=torch.bfloat16, device="meta"))
            peaks[is_planned] = tracker.peak - held, held
    assert peaks[True] == pytest.approx(peaks[False], rel=0.03)
    assert peaks[True][0] > 1.5 * 1000 * 2 * linears[0].out_features  # more than plain ones


def test_one_block_of_each_kind_needs_what_all_do(tiny_pipeline_dir):
    layers = {"num_layers": 8, "modality_layers": (0, 1, 6, 7), "gelu_layers": (0, 1)}
    layers |= {"local_attention_layers": (1, 2, 4, 5, 7), "local_attention_frames": 1}
    pipe = configured_pipeline(str(tiny_pipeline_dir), torch.float32)
    with torch.device("meta"):
        transformer = MagiHumanTransformer3DModel.from_config(pipe.transformer.config, **layers)
    pipe.register_modules(transformer=transformer, text_encoder=None, vae=None, audio_vae=None)
    lengths = []
    transformer.rope.register_forward_hook(lambda *_: lengths.append(len(transformer.transformer_blocks)))
    (stage,) = plan_pipeline("tiny", pipe, *SIZE).stages
    assert set(lengths) == {6} and len(transformer.transformer_blocks) == 8
    peak, _ = measure_memory(stage.run, transformer)
    assert lengths[-1] == 8 and stage.peaks[STORED, True] == peak


# The plan


def assert_stages_need(pipe, plan):
    stages = make_stages(pipe, *plan.size)
    assert [stage.name for stage in stages] == [stage.name for stage in plan.stages]
    assert len(stages) == 6
    for weights, lean in itertools.product((None, STORED), (False, True)):
        if weights and not lean:
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        pipe.transformer.enable_forward_chunking() if lean else pipe.transformer.disable_forward_chunking()
        pipe.vae.use_tiling = lean
        left = 0
        for stage, planned in zip(stages, plan.stages, strict=True):
            measured, kept = measure_memory(stage.run, getattr(pipe, stage.component))
            assert planned.peaks[weights, lean] == pytest.approx(left + measured, rel=0.02), (stage.name, lean)
            if stage.component == "audio_vae":
                assert kept > 0  # the weights that weight norm makes
            left += kept


def test_planned_bytes_are_those_of_a_real_run(tiny_plan):
    assert_stages_need(make_tiny_pipeline(is_distilled=True), tiny_plan)


@pytest.mark.slow
def test_planned_bytes_of_an_upscaling_are_those_of_a_real_run(tiny_upscale_dir):
    plan = plan_pipeline("tiny", configured_pipeline(str(tiny_upscale_dir), torch.float32), *SIZE)
    assert_stages_need(make_tiny_upscale_pipeline(), plan)


@pytest.mark.parametrize("kind", PIPELINES)
def test_planned_weights_are_those_of_a_real_pipeline(kind, tiny_pipeline_dir, tiny_upscale_dir):
    folder = {"base": tiny_pipeline_dir, "upscale": tiny_upscale_dir}[kind]
    planned = configured_pipeline(str(folder), torch.bfloat16)
    loaded = type(planned).from_pretrained(folder, dtype={"default": torch.bfloat16, "audio_vae": torch.float32})
    for name in ("text_encoder", "transformer", "vae", "audio_vae"):
        parts = [dict(getattr(pipe, name).named_parameters()) for pipe in (planned, loaded)]
        shapes = [{key: (value.shape, value.dtype) for key, value in part.items()} for part in parts]
        assert shapes[0] == shapes[1]
    assert type(planned.scheduler) is type(loaded.scheduler) and planned.scheduler.config == loaded.scheduler.config


def test_weights_are_counted_by_dtype(tiny_plan, tiny_pipeline):
    models = ("text_encoder", "transformer", "vae", "audio_vae")
    expected = {
        name: {torch.float32: sum(p.nbytes for p in getattr(tiny_pipeline, name).parameters())} for name in models
    }
    assert tiny_plan.weights == expected
    held = sum(size(getattr(tiny_pipeline, name)) for name in models)
    assert tiny_plan.needs[SETTINGS[0]] == {stage.name: held + stage.peaks[None, False] for stage in tiny_plan.stages}


def test_group_offloading_holds_the_groups_that_stay_and_those_in_flight(tiny_pipeline_dir):
    pipe = configured_pipeline(str(tiny_pipeline_dir), torch.float32)
    stages = make_stages(pipe, 32, 32, 5)
    weights = weights_on_gpu(pipe, stages)
    autoencoders = size(pipe.vae, pipe.audio_vae)
    assert weights["block"]["decoding video"] == weights["leaf"]["given audio"] == autoencoders
    blocks = sorted(size(block) for block in pipe.transformer.transformer_blocks)
    outside = size(pipe.transformer) - sum(blocks)
    assert weights["block"]["denoising step"] == autoencoders + outside + sum(blocks[-2:])
    encoder = pipe.text_encoder.encoder
    assert weights["block"]["text"] == autoencoders + size(encoder)  # two layers, both in flight
    linears = sorted(size(module) for module in pipe.transformer.modules() if isinstance(module, torch.nn.Linear))
    assert weights["leaf"]["denoising step"] == autoencoders + sum(linears[-2:])
    one = weights_on_gpu(pipe, stages, num_in_flight=1)
    assert one["block"]["text"] == autoencoders + size(encoder) - size(encoder.layers[0])
    # In model offloading a component that starts sends the one before it away.
    assert weights["model"] == {
        "text": size(pipe.text_encoder),
        "first frame": size(pipe.text_encoder, pipe.vae),
        "given audio": size(pipe.text_encoder, pipe.audio_vae),
        "denoising step": size(pipe.transformer, pipe.audio_vae),
        "decoding video": size(pipe.vae, pipe.audio_vae),
        "decoding audio": size(pipe.audio_vae),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_model_offload_on_a_gpu_leaves_there_what_is_planned(tiny_pipeline_dir):
    planned = configured_pipeline(str(tiny_pipeline_dir), torch.float32)
    weights = weights_on_gpu(planned, make_stages(planned, 32, 32, 5))["model"]
    pipe = make_tiny_pipeline()
    pipe.enable_model_cpu_offload()
    for stage in make_stages(pipe, 32, 32, 5):
        with torch.no_grad():
            stage.run()
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert weights[stage.name] == size(*(part for part in modules if part.device.type == "cuda")), stage.name


def test_figures_fall_along_the_settings(tiny_plan):
    assert tuple(tiny_plan.needs) == SETTINGS
    assert [setting.name for setting in SETTINGS[:2]] == ["all on the GPU", f"all on the GPU, {LEAN}"]
    peaks = {(s.offload, s.weights): max(needs.values()) for s, needs in tiny_plan.needs.items() if s.lean}
    for offload in OFFLOADING:
        assert peaks[offload, STORED] <= peaks[offload, None]
    for weights in (None, STORED):
        assert peaks["none", weights] > peaks["model", weights]
        assert peaks["block", weights] >= peaks["leaf", weights]


def test_without_autoencoder_lean_is_chunks_alone(tiny_pipeline_dir):
    pipe = configured_pipeline(str(tiny_pipeline_dir), torch.float32)
    pipe.register_modules(vae=None)
    plan = plan_pipeline("tiny", pipe, 1024, 2048, 33)  # of 18432 tokens
    peaks = {stage.name: stage.peaks for stage in plan.stages}
    assert peaks.keys() == {"text", "given audio", "denoising step", "decoding audio"}
    assert peaks["denoising step"][None, True] < 0.75 * peaks["denoising step"][None, False]
    assert peaks["given audio"][None, True] == peaks["given audio"][None, False]
    calls = format_calls(plan._replace(needs={SETTINGS[1]: plan.needs[SETTINGS[1]]}), 80)
    assert "pipe.transformer.enable_forward_chunking()" in calls and "pipe.vae" not in calls


# The settings


def write_calls(*args):
    return "\n".join(map(str, make_calls(*args)))


def run_calls(calls, pipe):
    for old, new in SUBSTITUTIONS.items():
        calls = calls.replace(old, new)
    exec(calls, {"pipe": pipe, "torch": torch})


@pytest.mark.parametrize("setting", SETTINGS[1::2], ids=[setting.name for setting in SETTINGS[1::2]])
def test_calls_of_every_setting_run_and_change_nothing(setting):
    kind = "upscale" if setting.weights else "base"
    pipe = PIPELINES[kind]()
    if setting.weights:
        round_to_float8(pipe.transformer)
    expected = generate(pipe)
    pipe = PIPELINES[kind]()
    calls = write_calls(setting, Speed(), torch.float32)
    assert ("float8" in calls) == (setting.weights == STORED)
    run_calls(calls, pipe)
    assert pipe.vae.use_tiling and pipe.transformer.transformer_blocks[1].ff.chunk_size == 4096
    assert_equal(generate(pipe), expected)  # too small for more than one tile


@pytest.mark.parametrize("offload", ["model", "leaf"])
def test_calls_of_quantised_settings_run_and_change_nothing(offload, tiny_pipeline_dir):
    config = PipelineQuantizationConfig(quant_mapping={"transformer": torchao_config("int8")})
    pipe, other = (
        DiffusionPipeline.from_pretrained(tiny_pipeline_dir, dtype=torch.float32, quantization_config=config)
        for _ in range(2)
    )
    run_calls(write_calls(Setting(offload, "int8"), Speed("int8", attention="native"), torch.float32), pipe)
    assert_equal(generate(pipe), generate(other))


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "block"])
def test_calls_with_compilation_run(offload):
    torch.compiler.reset()  # what other tests have compiled counts against its limit
    expected, pipe = generate(make_tiny_pipeline()), make_tiny_pipeline()
    calls = write_calls(Setting(offload, fused=offload == "none"), Speed(compile=True), torch.float32)
    assert ("fuse_qkv" in calls) == ("fullgraph=True" in calls) == (offload == "none")
    run_calls(calls.replace("dynamic=True", 'dynamic=True, backend="eager"'), pipe)
    output = generate(pipe)
    assert pipe.transformer.transformer_blocks[0]._compiled_call_impl is not None
    torch.testing.assert_close(output[0], expected[0], atol=1e-3, rtol=0)


def plan_transformer(folder, speed):
    """A plan of the transformer alone, which is quick."""
    pipe = configured_pipeline(str(folder), torch.float32)
    pipe.register_modules(text_encoder=None, vae=None, audio_vae=None)
    return pipe, plan_pipeline("tiny", pipe, 64, 96, 5, speed, stored=False)


def test_what_is_asked_decides_on_settings_and_calls(tiny_pipeline_dir):
    compiled, int8 = make_settings(compiled=True), make_settings("int8", True)
    assert [each.name for each in compiled[:3:2]] == ["all on the GPU, fused projections", "all on the GPU"]
    assert not any(each.weights for each in compiled) and not any(each.fused for each in int8)
    assert {each.weights for each in int8} == {"int8"} and len(make_settings(stored=False)) == 8
    whole = [x for x in OFFLOADING if "fullgraph=True" in write_calls(Setting(x), Speed(compile=True), torch.float32)]
    assert whole == ["none", "model"]
    _, plan = plan_transformer(tiny_pipeline_dir, Speed("int8", True, "_flash_3_hub"))
    lines = format_calls(plan, 80).splitlines()
    assert lines == [
        "# tiny: all on the GPU, int8 transformer",
        "from diffusers_magihuman.tools.quantize import torchao_config",
        'config = PipelineQuantizationConfig(quant_mapping={"transformer": torchao_config("int8")})',
        'dtype = {"default": torch.float32, "audio_vae": torch.float32}',
        "pipe = DiffusionPipeline.from_pretrained('tiny', dtype=dtype, quantization_config=config)",
        'pipe.to("cuda")',
        'pipe.transformer.set_attention_backend("_flash_3_hub")',
        "pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)",
    ]


def test_quantised_weights_are_a_byte_each_in_files_only_if_saved_so(tiny_pipeline_dir, tmp_path):
    _, plain = plan_transformer(tiny_pipeline_dir, Speed())
    (_, plan), whole = plan_transformer(tiny_pipeline_dir, Speed("int8")), plain.weights["transformer"][torch.float32]
    assert plan.disk == plain.disk and list(plan.weights["transformer"]) == [torch.float32, torch.int8]
    spared = 3 * plan.weights["transformer"][torch.int8]
    assert sum(plan.weights["transformer"].values()) == whole - spared and spared > whole / 2
    assert plan.ram[Setting("model", "int8")] == plain.ram[Setting("model")] - spared
    shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    file = tmp_path / "model/transformer/config.json"
    config = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    _, saved = plan_transformer(tmp_path / "model", Speed())
    assert saved.disk == plan.disk - spared and saved.needs == plan.needs and saved.ram == plan.ram
    assert "config" not in format_calls(saved, 8)
    with pytest.raises(ValueError, match=r"`quantize`='int8', but .* is quantised already"):
        plan_transformer(tmp_path / "model", Speed("int8"))


def test_fused_projections_need_their_weights_twice(tiny_pipeline_dir):
    pipe, plan = plan_transformer(tiny_pipeline_dir, Speed(compile=True))
    linears = {name: linear.weight.nbytes for name, linear in pipe.transformer.named_modules() if "to_" in name}
    twice = sum(size for name, size in linears.items() if name.endswith(("to_q", "to_k", "to_v", "to_gate")))
    fused, plain = (plan.needs[Setting("none", fused=x)]["denoising step"] for x in (True, False))
    assert 0.9 * twice < fused - plain <= twice  # the gate may stay apart


def test_weights_in_ram_are_pinned_in_powers_of_two(tiny_pipeline_dir):
    pipe = configured_pipeline(str(tiny_pipeline_dir), torch.float32)
    whole = size(pipe.text_encoder, pipe.transformer, pipe.vae, pipe.audio_vae)
    ram = weights_in_ram(pipe)
    assert ram["none"] == ram["model"] == whole < ram["block"] == ram["leaf"] < 2 * whole
    pipe.register_modules(transformer=None, text_encoder=torch.nn.Linear(3, 100, bias=False))
    assert weights_in_ram(pipe)["leaf"] == size(pipe.vae, pipe.audio_vae) + 2048  # of 1200


def test_ram_and_the_given_offloading_decide_too(tiny_plan):
    needs = {each: {"text": need * GIB} for each, need in zip(SETTINGS, (20, 12, 15, 10, 7, 7, 6, 6), strict=False)}
    ram = {each: (30 if each.offload in ("none", "model") else 60) * GIB for each in needs}
    plan = tiny_plan._replace(needs=needs, ram=ram)
    for vram, in_ram, offload, index in ((24, 0, "auto", 0), (24, 0, "none", 0), (13, 0, "auto", 1)):
        assert choose(plan, vram, in_ram, offload) == SETTINGS[index]
    for vram, in_ram, offload, index in ((24, 30, "model", 2), (12, 30, "auto", 3), (24, 60, "leaf", 6)):
        assert choose(plan, vram, in_ram, offload) == SETTINGS[index]
    for vram, in_ram, offload, message in (
        (
            9,
            60,
            "none",
            "`offload`='none' does not .* needs 13.0 GiB in .* 'text', 4.0 more, for tiny. 'block', 'leaf' would",
        ),
        (24, 50, "block", "blocks, needs 60.0 GiB of RAM, 10.0 more, for tiny. 'none', 'model' would fit"),
        (9, 50, "auto", "into 9 GiB: .* blocks, needs 60.0 GiB of RAM, 10.0 more, for tiny"),
        (6, 60, "model", "leaves, needs 7.0 GiB in the stage 'text', 1.0 more"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(plan, vram, in_ram, offload)


def test_calls_of_a_setting_that_is_not_lean_are_the_others():
    for whole, lean in zip(SETTINGS[::2], SETTINGS[1::2], strict=True):
        assert not whole.lean and lean.lean and lean.name == f"{whole.name}, {LEAN}"
        calls = [write_calls(setting, Speed(), torch.float32).splitlines() for setting in (whole, lean)]
        assert calls[1][: len(calls[0])] == calls[0] and len(calls[1]) == len(calls[0]) + 2


def test_the_first_setting_that_fits_is_chosen(tiny_plan):
    needs = [20, 12, 15, 10, *[11] * 4, *[5] * (len(SETTINGS) - 8)]
    needs = {setting: {"text": need * GIB, "first frame": 1} for setting, need in zip(SETTINGS, needs, strict=True)}
    plan = tiny_plan._replace(needs=needs)
    for vram, index in ((24, 0), (21, 0), (20.9, 1), (13, 1), (12, 3), (11, 3), (10.9, 8), (6, 8)):
        assert choose(plan, vram) == SETTINGS[index]
        calls = write_calls(SETTINGS[index], Speed(), torch.float32)
        assert format_calls(plan, vram) == f"# tiny: {SETTINGS[index].name}\n{calls}"
    with pytest.raises(ValueError, match=r"needs 6\.0 GiB in the stage 'text', 0\.1 more"):
        choose(plan, 5.9)
    for vram, verdicts in ((14, [LEAN, LEAN, "yes"]), (11.5, ["no", LEAN, "no"])):
        rows = format_plan(plan, vram).split("| setting")[1].splitlines()[2:5]
        assert [row.split("|")[-2].strip() for row in rows] == verdicts


# The command


@pytest.mark.slow
def test_command_prints_a_plan_of_both_pipelines(tiny_pipeline_dir, tiny_upscale_dir, capsys):
    size = ["--height", "256", "--width", "480", "--num-frames", "5"]
    command = ["plan", "--vram", "2", *size, "--model", str(tiny_pipeline_dir), "--upscale", str(tiny_upscale_dir)]
    assert main([*command, "--dtype", "float32"]) == 0
    output = capsys.readouterr().out
    assert f"{tiny_pipeline_dir}, MagiHumanAudioVideoPipeline: 256x448, 5 frames (0.2 s), float32" in output
    assert f"{tiny_upscale_dir}, MagiHumanLatentUpscalePipeline: 256x480, 5 frames (0.2 s), float32" in output
    assert output.count('pipe.to("cuda")') == 2
    disk, ram = (
        sum(map(float, re.findall(pattern, output))) for pattern in (r"disk: (.*)\. ", r"GPU  .* (\S+) \| yes")
    )
    both = re.search(r"Both: (.*) on disk, .* one after the other, (.*) at once", output)
    assert [float(each) for each in both.groups()] == pytest.approx([disk, ram], abs=0.011)


def test_command_prints_tables_and_then_what_is_missing(tiny_pipeline_dir, capsys):
    size = ["--height", "64", "--width", "64", "--num-frames", "5"]
    assert main(["plan", "--vram", "1", "--model", str(tiny_pipeline_dir), *size]) == 2
    captured = capsys.readouterr()
    assert "| group offload, leaves" in captured.out and "pipe." not in captured.out
    assert f"{tiny_pipeline_dir}, MagiHumanAudioVideoPipeline: 64x64, 5 frames (0.2 s), bfloat16" in captured.out
    (line,) = captured.err.splitlines()
    assert re.search(r"No setting makes 64x64, 5 frames, fit into 1 GiB: the leanest, [a-z ,]+, needs", line)
    assert re.search(r"needs \d\.\d GiB in the stage '[a-z ]+', \d\.\d more, for .*tiny", line)


@pytest.mark.slow
def test_full_size_is_the_published_models():
    pipe = published_pipeline("sr-540p", torch.bfloat16)
    counts = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("transformer", "text_encoder")
    }
    assert counts == {"transformer": 15_329_156_096, "text_encoder": 9_241_705_984}
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe.transformer.video_embedder.weight.dtype == pipe.audio_vae.dtype == torch.float32


@pytest.mark.slow
def test_full_size_with_super_resolution():
    base, upscale = plan_call(height=512, width=896, num_frames=5)
    assert (base.model, base.size) == ("owner/magihuman-base", (256, 448, 5))
    assert (upscale.model, upscale.size) == ("owner/magihuman-sr-540p", (512, 896, 5))
    assert choose(upscale, 80) == SETTINGS[0]
    assert choose(upscale, 24).offload == "block"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vram", "0"], "--vram"),
        (["--vram", "16GB"], "--vram"),
        ([], "--vram"),
        (["--vram", "16", "--model", "BASE", "--height", "100"], "`height`=100"),
        (["--vram", "16", "--model", "BASE", "--num-frames", "0"], "--num-frames"),
        (["--vram", "16", "--dtype", "float8"], "--dtype"),
        (["--vram", "16", "--quantize", "gguf:Q8_0"], "--quantize"),
        (["--vram", "16", "--attention", "flash_9"], "`attention`='flash_9' must be 'flash' or"),
        (["--vram", "16", "--model", "./missing-model"], "missing-model"),
        (["--vram", "16", "--model", "UPSCALE", "--upscale", "UPSCALE"], "holds a MagiHumanLatentUpscale"),
        (["--vram", "16", "--model", "BASE", "--upscale", "BASE"], "holds a MagiHumanAudioVideo"),
        (
            ["--vram", "16", "--model", "BASE", "--upscale", "UPSCALE", "--height", "64", "--width", "480"],
            "`height`=64 and `width`=480 must not be less",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments, message, tiny_pipeline_dir, tiny_upscale_dir, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"BASE": str(tiny_pipeline_dir), "UPSCALE": str(tiny_upscale_dir)}
    try:
        status = main(["plan", *(names.get(argument, argument) for argument in arguments)])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and not captured.out
    assert message in captured.err and len(captured.err.splitlines()) == 1


def test_name_of_a_model_is_no_code(tiny_plan, tiny_pipeline_dir):
    """In what is printed to be run, a line break in it would end the comment."""
    name = "tiny\nimport os"
    plan = plan_pipeline(name, configured_pipeline(str(tiny_pipeline_dir), torch.float32), *SIZE)
    assert len(format_calls(plan, 8).splitlines()) == len(format_calls(tiny_plan, 8).splitlines())
    assert format_calls(plan, 8).startswith("# 'tiny\\nimport os'")


def test_other_pipelines_are_refused(tiny_pipeline, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="holds a WanPipeline, it must hold a MagiHumanAudioVideo"):
        configured_pipeline(str(tmp_path), torch.float32)
    type(tiny_pipeline)(**tiny_pipeline.components | {"transformer": None}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has the transformer"):
        configured_pipeline(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", 3),
        ("upscale", 3),
        ("height", "x"),
        ("width", 1.5),
        ("num_frames", True),
        ("dtype", "int8"),
        ("num_frames", 2**13),
        ("quantize", "int4"),
        ("quantize", 8),
        ("compile", 1),
        ("attention", True),
    ],
)
def test_bad_arguments_are_named_before_anything_is_planned(name, value, monkeypatch):
    monkeypatch.setattr("diffusers_magihuman.tools.plan.published_pipeline", None)
    with pytest.raises(ValueError, match=f"`{name}`={value!r} must be"):
        plan_call(**{name: value})


def test_paths_and_names_of_dtypes_are_planned(tiny_pipeline_dir, monkeypatch):
    def plan_dtype(model, pipe, *size):
        return model, pipe.transformer.dtype, *size

    monkeypatch.setattr("diffusers_magihuman.tools.plan.plan_pipeline", plan_dtype)
    (found,) = plan_call(tiny_pipeline_dir, height=64, width=96, num_frames=5, dtype="bfloat16")
    assert found == (str(tiny_pipeline_dir), torch.bfloat16, 64, 96, 5, Speed())
