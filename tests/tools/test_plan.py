"""What `magihuman plan` says is what the code then needs, measured in bytes of tensors."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, generate, round_to_float8
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.tools.cli import main
from diffusers_magihuman.tools.plan import (
    GIB,
    LEAN,
    SETTINGS,
    MemoryTracker,
    choose,
    configured_pipeline,
    format_calls,
    format_plan,
    make_stages,
    measure_memory,
    plan_call,
    plan_pipeline,
    published_pipeline,
    weights_on_gpu,
)

SIZE = (64, 96, 18)
PIPELINES = {"base": make_tiny_pipeline, "upscale": make_tiny_upscale_pipeline}
# What a CPU has no streams, and Diffusers no offloading from it, for.
SUBSTITUTIONS = {
    "cuda": "cpu",
    "use_stream=True": "use_stream=False",
    "pipe.enable_model_cpu_offload()": 'pipe.enable_model_cpu_offload(device="cpu")',
}


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
    assert lengths[-1] == 8 and stage.peaks[True, True] == peak


# The plan


def assert_stages_need(pipe, plan):
    stages = make_stages(pipe, *plan.size)
    assert [stage.name for stage in stages] == [stage.name for stage in plan.stages]
    assert len(stages) == 6
    for float8, lean in itertools.product((False, True), repeat=2):
        if float8 and not lean:
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        pipe.transformer.enable_forward_chunking() if lean else pipe.transformer.disable_forward_chunking()
        pipe.vae.use_tiling = lean
        left = 0
        for stage, planned in zip(stages, plan.stages, strict=True):
            measured, kept = measure_memory(stage.run, getattr(pipe, stage.component))
            assert planned.peaks[float8, lean] == pytest.approx(left + measured, rel=0.02), (stage.name, float8, lean)
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
    assert tiny_plan.needs[SETTINGS[0]] == {stage.name: held + stage.peaks[False, False] for stage in tiny_plan.stages}


def test_group_offloading_holds_the_groups_that_stay_and_those_in_flight(tiny_pipeline_dir):
    pipe = configured_pipeline(str(tiny_pipeline_dir), torch.float32)
    stages = make_stages(pipe, 32, 32, 5)
    weights = weights_on_gpu(pipe, stages)
    autoencoders = size(pipe.vae, pipe.audio_vae)
    assert weights["block_level"]["decoding video"] == weights["leaf_level"]["given audio"] == autoencoders
    blocks = sorted(size(block) for block in pipe.transformer.transformer_blocks)
    outside = size(pipe.transformer) - sum(blocks)
    assert weights["block_level"]["denoising step"] == autoencoders + outside + sum(blocks[-2:])
    encoder = pipe.text_encoder.encoder
    assert weights["block_level"]["text"] == autoencoders + size(encoder)  # two layers, both in flight
    linears = sorted(size(module) for module in pipe.transformer.modules() if isinstance(module, torch.nn.Linear))
    assert weights["leaf_level"]["denoising step"] == autoencoders + sum(linears[-2:])
    one = weights_on_gpu(pipe, stages, num_in_flight=1)
    assert one["block_level"]["text"] == autoencoders + size(encoder) - size(encoder.layers[0])
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
    peaks = {(s.offload, s.float8): max(needs.values()) for s, needs in tiny_plan.needs.items() if s.lean}
    for offload in (None, "model", "block_level", "leaf_level"):
        assert peaks[offload, True] <= peaks[offload, False]
    for float8 in (False, True):
        assert peaks[None, float8] > peaks["model", float8]
        assert peaks["block_level", float8] >= peaks["leaf_level", float8]


def test_without_autoencoder_lean_is_chunks_alone(tiny_pipeline_dir):
    pipe = configured_pipeline(str(tiny_pipeline_dir), torch.float32)
    pipe.register_modules(vae=None)
    plan = plan_pipeline("tiny", pipe, 1024, 2048, 33)  # of 18432 tokens
    peaks = {stage.name: stage.peaks for stage in plan.stages}
    assert peaks.keys() == {"text", "given audio", "denoising step", "decoding audio"}
    assert peaks["denoising step"][False, True] < 0.75 * peaks["denoising step"][False, False]
    assert peaks["given audio"][False, True] == peaks["given audio"][False, False]
    calls = format_calls(plan._replace(needs={SETTINGS[1]: plan.needs[SETTINGS[1]]}), 80)
    assert "pipe.transformer.enable_forward_chunking()" in calls and "pipe.vae" not in calls


# The settings


@pytest.mark.parametrize("setting", SETTINGS[1::2], ids=[setting.name for setting in SETTINGS[1::2]])
def test_calls_of_every_setting_run_and_change_nothing(setting):
    kind = "upscale" if setting.float8 else "base"
    pipe = PIPELINES[kind]()
    if setting.float8:
        round_to_float8(pipe.transformer)
    expected = generate(pipe)
    pipe = PIPELINES[kind]()
    calls = "\n".join(setting.calls)
    assert ("float8" in calls) == setting.float8
    for old, new in SUBSTITUTIONS.items():
        calls = calls.replace(old, new)
    exec(calls, {"pipe": pipe, "torch": torch})
    assert pipe.vae.use_tiling and pipe.transformer.transformer_blocks[1].ff.chunk_size == 4096
    assert_equal(generate(pipe), expected)  # too small for more than one tile


def test_calls_of_a_setting_that_is_not_lean_are_the_others():
    for whole, lean in zip(SETTINGS[::2], SETTINGS[1::2], strict=True):
        assert not whole.lean and lean.lean and lean.name == f"{whole.name}, {LEAN}"
        assert lean.calls[: len(whole.calls)] == whole.calls and len(lean.calls) == len(whole.calls) + 2


def test_the_first_setting_that_fits_is_chosen(tiny_plan):
    needs = [20, 12, 15, 10, *[11] * 4, *[5] * (len(SETTINGS) - 8)]
    needs = {setting: {"text": need * GIB, "first frame": 1} for setting, need in zip(SETTINGS, needs, strict=True)}
    plan = tiny_plan._replace(needs=needs)
    for vram, index in ((24, 0), (21, 0), (20.9, 1), (13, 1), (12, 3), (11, 3), (10.9, 8), (6, 8)):
        assert choose(plan, vram) == SETTINGS[index]
        assert format_calls(plan, vram).splitlines()[1:] == list(SETTINGS[index].calls)
    with pytest.raises(ValueError, match=r"needs 6\.0 GiB, 0\.1 more"):
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


def test_command_prints_tables_and_then_what_is_missing(tiny_pipeline_dir, capsys):
    size = ["--height", "64", "--width", "64", "--num-frames", "5"]
    assert main(["plan", "--vram", "1", "--model", str(tiny_pipeline_dir), *size]) == 2
    captured = capsys.readouterr()
    assert "| group offload, leaves" in captured.out and "pipe." not in captured.out
    assert f"{tiny_pipeline_dir}, MagiHumanAudioVideoPipeline: 64x64, 5 frames (0.2 s), bfloat16" in captured.out
    (line,) = captured.err.splitlines()
    assert re.search(r"No setting makes 64x64, 5 frames, fit into 1 GiB: the leanest, [a-z ,]+, needs", line)
    assert re.search(r"needs \d\.\d GiB, \d\.\d more, in the stage '[a-z ]+' of .*tiny", line)


@pytest.mark.slow
def test_full_size_is_the_published_models():
    pipe = published_pipeline("sr_540p", torch.bfloat16)
    counts = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("transformer", "text_encoder")
    }
    assert counts == {"transformer": 15_299_419_136, "text_encoder": 9_241_705_984}
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe.transformer.video_embedder.weight.dtype == pipe.audio_vae.dtype == torch.float32


@pytest.mark.slow
def test_full_size_with_super_resolution():
    base, upscale = plan_call(height=512, width=896, num_frames=5)
    assert (base.model, base.size) == ("owner/magihuman-base", (256, 448, 5))
    assert (upscale.model, upscale.size) == ("owner/magihuman-sr-540p", (512, 896, 5))
    assert choose(upscale, 80) == SETTINGS[0]
    assert choose(upscale, 24).offload == "block_level"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vram", "0"], "--vram"),
        (["--vram", "16GB"], "--vram"),
        ([], "--vram"),
        (["--vram", "16", "--model", "BASE", "--height", "100"], "`height`=100"),
        (["--vram", "16", "--model", "BASE", "--num-frames", "0"], "`num_frames`=0"),
        (["--vram", "16", "--dtype", "float8"], "--dtype"),
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


def test_other_pipelines_are_refused(tiny_pipeline, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="holds a WanPipeline, it must hold a MagiHumanAudioVideo"):
        configured_pipeline(str(tmp_path), torch.float32)
    type(tiny_pipeline)(**tiny_pipeline.components | {"transformer": None}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no transformer"):
        configured_pipeline(str(tmp_path), torch.float32)
