# SPDX-License-Identifier: Apache-2.0
"""Measure what each memory setting needs and how long it takes, and compare with what `magihuman plan` says.

    python benchmarks/memory.py table --size mid [--device cuda]   # markdown: each setting, planned and measured
    python benchmarks/memory.py check --size mid                   # stage by stage; fails beyond 15 %
    python benchmarks/memory.py gpus                               # markdown: the plan for GPUs of several sizes
    python benchmarks/memory.py run --size mid --setting 2         # one setting; the others run this in a process each

Random weights. `tiny` and `mid` are for CPUs, in float32; there the peak is that of resident memory less what it was
before there were models, and group offloading is to disk, as weights in RAM are where the model runs. `256p`, `540p`
and `1080p` are the full-size models in bfloat16 at 126 frames, for a GPU; there the peak is that of PyTorch's
allocator. The last line of stdout is JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import print_result, timed
from diffusers import AutoencoderOobleck, DiffusionPipeline
from transformers import T5GemmaConfig, T5GemmaEncoderModel

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanFlowScheduler,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.tools.plan import (
    GIB,
    SETTINGS,
    Setting,
    Speed,
    choose,
    format_table,
    make_calls,
    make_meta_model,
    make_stages,
    models_of,
    plan_call,
    plan_pipeline,
    published_pipeline,
    weights_on_gpu,
)

FULL = {"256p": ("base", 256, 448), "540p": ("sr-540p", 512, 896), "1080p": ("sr-1080p", 1088, 1920)}
# Heads of 64 channels, layers, and channels of the autoencoders; height, width and frames.
SMALL = {"tiny": (4, 3, 8, (128, 192, 9)), "mid": (16, 8, 16, (320, 512, 25))}
GPUS = (8, 12, 16, 24, 32, 48, 80, 141)
TOLERANCE = 0.15
# The other stages of the mid-size models are so small that the scratch memory of CPU libraries shows. And of an
# embedding that lies in a file, only the rows that are read become resident.
CHECKED_STAGES = ("denoising step", "decoding video")


def make_small_pipeline(heads: int, num_layers: int, channels: int) -> DiffusionPipeline:
    """A pipeline on the meta device, proportioned like the full-size one."""
    width = 64 * heads
    text = {
        "vocab_size": 32 * width,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
    }
    text_config = T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False)
    transformer_config = {
        "text_in_channels": width,
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "attention_head_dim": 64,
        "modality_layers": (0, num_layers - 1),
        "gelu_layers": (0,),
    }
    vae_config = {
        "decoder_block_out_channels": (channels, 2 * channels, 4 * channels, 8 * channels),
        "encoder_base_dim": channels,
    }
    audio_config = {"encoder_hidden_size": 2 * channels, "decoder_channels": 2 * channels}
    pipe = MagiHumanAudioVideoPipeline(
        tokenizer=None,
        text_encoder=make_meta_model(lambda: T5GemmaEncoderModel(text_config), torch.float32),
        transformer=make_meta_model(lambda: MagiHumanTransformer3DModel(**transformer_config), torch.float32),
        scheduler=MagiHumanFlowScheduler(),
        vae=make_meta_model(lambda: AutoencoderKLMagiHumanTurbo(**vae_config), torch.float32),
        audio_vae=make_meta_model(lambda: AutoencoderOobleck(**audio_config), torch.float32),
    )
    return pipe


def make_pipeline(size: str) -> tuple[DiffusionPipeline, tuple[int, int, int]]:
    if size in FULL:
        variant, height, width = FULL[size]
        return published_pipeline(variant, torch.bfloat16), (height, width, 126)
    *shape, video = SMALL[size]
    pipe = make_small_pipeline(*shape)
    pipe.vae.tile_sample_min_height, pipe.vae.tile_sample_min_width = video[0] // 2, video[1] // 2
    return pipe, video


@torch.no_grad()
def materialise(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Gives a pipeline on the meta device random weights in RAM, drawn on the device."""
    for model in models_of(pipe).values():
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(std=0.02))


def resident_bytes(field: str) -> int:
    """`VmRSS`, or `VmHWM` for the peak since the last [`reset_peak`]; Linux alone has both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, which would count as resident
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def run_setting(size: str, device: torch.device, index: int) -> dict:
    """Planned and measured bytes of every stage in a setting, and its seconds."""
    setting = SETTINGS[index]
    pipe, video = make_pipeline(size)
    plan = plan_pipeline(size, pipe, *video)  # which leaves a float8 transformer
    if setting.weights is None:
        pipe, _ = make_pipeline(size)
    # From RAM the next group is fetched on a stream while one runs, from disk each when it runs.
    num_in_flight = 2 if device.type == "cuda" else 1
    weights = weights_on_gpu(pipe, make_stages(pipe, *video), num_in_flight)[setting.offload]
    planned = {stage.name: weights[stage.name] + stage.peaks[setting.weights, setting.lean] for stage in plan.stages}

    # Libraries take memory that they keep, their own code too, when they first run: none of a model's.
    run_stages("tiny", device, setting)
    reset_peak(device)
    measured = run_stages(size, device, setting)
    return {
        "setting": setting.name,
        "stages": {name: {"planned": planned[name], **values} for name, values in measured.items()},
    }


@torch.no_grad()
def run_stages(size: str, device: torch.device, setting: Setting) -> dict[str, dict]:
    """Measured bytes and seconds of every stage of a pipeline with random weights."""
    baseline = 0 if device.type == "cuda" else resident_bytes("VmRSS")
    pipe, video = make_pipeline(size)
    materialise(pipe, device)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for call in make_calls(setting, Speed(), pipe.transformer.dtype, device.type):
            if device.type == "cpu" and call.options.pop("use_stream", False):
                call.options["offload_to_disk_path"] = folder
            call.run(pipe)
        for stage in make_stages(pipe, *video):
            # With a stream the order of the groups is known after a first run.
            peak = 0
            for _ in range(2 if device.type == "cuda" else 1):
                reset_peak(device)
                _, seconds = timed(stage.run, device)
                peak = max(peak, peak_bytes(device) - baseline)
            results[stage.name] = {"measured": peak, "seconds": round(seconds, 2)}
    return results


def run_all(size: str, device: torch.device) -> list[dict]:
    """Every setting in a process of its own, whose allocator gives memory back to the system at once."""
    results = []
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for index, setting in enumerate(SETTINGS):
        if device.type == "cpu" and setting.offload == "model":
            continue  # nothing moves
        command = [sys.executable, __file__, "run", "--size", size, "--device", str(device), "--setting", str(index)]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            results.append({"setting": setting.name, "stages": None})
        else:
            results.append(json.loads(result.stdout.splitlines()[-1])["result"])
        print(results[-1], file=sys.stderr, flush=True)
    return results


def format_results(results: list[dict]) -> str:
    """A table of peaks, those of the hungriest stage, and of the time of all stages in units of the first row's."""
    rows, first = [], None
    for result in results:
        if result["stages"] is None:
            rows.append((result["setting"], "", "out of memory", ""))
            continue
        stages = result["stages"].values()
        seconds = sum(stage["seconds"] for stage in stages)
        first = first or seconds
        peaks = [f"{max(stage[name] for stage in stages) / GIB:.3f}" for name in ("planned", "measured")]
        rows.append((result["setting"], *peaks, f"{seconds / first:.2f}"))
    return format_table(("setting", "planned, GiB", "measured, GiB", "time, ratio"), rows)


def check_results(results: list[dict]) -> list[str]:
    """Prints every stage of every setting; returns those checked that are beyond the tolerance."""
    rows, wrong = [], []
    for result in results:
        for name, stage in result["stages"].items():
            ratio = stage["measured"] / stage["planned"]
            rows.append((result["setting"], name, f"{stage['planned'] / GIB:.3f}", f"{stage['measured'] / GIB:.3f}"))
            rows[-1] += (f"{ratio:.3f}",)
            if name in CHECKED_STAGES and abs(ratio - 1) > TOLERANCE:
                wrong.append(f"{result['setting']}, {name}: {ratio:.3f}")
    print(format_table(("setting", "stage", "planned, GiB", "measured, GiB", "ratio"), rows))
    return wrong


def plan_gpus() -> list[tuple[str, ...]]:
    """The chosen setting, and what it needs, of the published models on GPUs of several sizes."""
    (low,) = plan_call()
    _, high = plan_call(height=1088, width=1920)
    rows = []
    for vram in GPUS:
        row = [f"{vram} GB"]
        for plan in (low, high):
            try:
                setting = choose(plan, vram)
            except ValueError:
                row.append("does not fit")
            else:
                row.append(f"{setting.name}: {max(plan.needs[setting].values()) / GIB:.1f}")
        rows.append(tuple(row))
    print(format_table(("GPU", *(f"{plan.size[0]}x{plan.size[1]}: GiB" for plan in (low, high))), rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("table", "check", "gpus", "run"))
    parser.add_argument("--size", choices=(*SMALL, *FULL), default="mid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), help="for run, an index", default=0)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.size in FULL and device.type != "cuda":
        parser.error(f"--size {arguments.size} is the full-size model, which needs --device cuda")

    wrong = []
    if arguments.case == "run":
        result = run_setting(arguments.size, device, arguments.setting)
    elif arguments.case == "gpus":
        result = plan_gpus()
    else:
        result = run_all(arguments.size, device)
        if arguments.case == "check":
            wrong = check_results(result)
        else:
            print(format_results(result))
    print_result(f"memory {arguments.case} {arguments.size}", device, beyond_tolerance=wrong, result=result)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
