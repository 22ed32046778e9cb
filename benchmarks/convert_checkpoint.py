# SPDX-License-Identifier: Apache-2.0
"""Peak memory of `magihuman convert` on a synthetic checkpoint with the 331 full-size names, about 6 GB in all.

    python benchmarks/convert_checkpoint.py WORK_DIRECTORY [--heads 18]

Writes the checkpoint, converts it once with a kill at a random point, checks that nothing looks finished, converts it
again, and compares every tensor. The last line of stdout is JSON; the peak is the resident set of the converting
process, mapped pages of the source included.
"""

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import peak_gib, print_result, timed
from safetensors.torch import save_file

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.conversion import ROPE_BANDS, convert_tensors, plan_transformer, transformer_rules
from diffusers_magihuman.loading import open_checkpoint

SHARD_BYTES = 2 * 2**30


def write_source(folder: Path, num_heads: int) -> int:
    """Random linears in bfloat16 and everything else in float32, in shards; returns the bytes written."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = MagiHumanTransformer3DModel(num_attention_heads=num_heads, num_key_value_heads=num_heads // 3)
    generator = torch.Generator().manual_seed(0)
    shard, weight_map, total = {ROPE_BANDS: 1 / 10000.0 ** (torch.arange(16) / 16)}, {}, 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, rule in transformer_rules(model.config).items():
        is_linear = name.startswith("block") and "norm" not in name
        dtype = torch.bfloat16 if is_linear else torch.float32
        shard[name] = torch.empty(rule.shape, dtype=dtype).uniform_(-1, 1, generator=generator)
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    print(f"source: {len(weight_map)} tensors, {total / 2**30:.2f} GiB", file=sys.stderr)
    return total


def convert(source: Path, output: Path, max_shard_size: str) -> subprocess.Popen:
    command = ["magihuman", "convert", source, output, "--variant", "base", "--max-shard-size", max_shard_size]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def kill_halfway(source: Path, output: Path, max_shard_size: str) -> int:
    """Kills a run at a random point once it has begun to write; returns the bytes that it left."""
    process = convert(source, output, max_shard_size)
    while not (left := list(output.parent.glob(f".{output.name}.*.incomplete"))):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if output.exists():
        raise SystemExit("The killed run left something that looks finished, or had already ended.")
    return sum(file.stat().st_size for file in left[0].rglob("*.safetensors"))


def compare(source: Path, output: Path) -> int:
    """Compares every tensor of the output with the conversion of the source; returns their number."""
    tensors, converted = open_checkpoint(source), open_checkpoint(output / "transformer")
    _, rules = plan_transformer(tensors, "base")
    number = 0
    for name, expected in convert_tensors(tensors, rules, torch.bfloat16):
        if not torch.equal(converted[name], expected):
            raise SystemExit(f"{name} differs.")
        number += 1
    if number != len(converted):
        raise SystemExit(f"{len(converted)} tensors were written, {number} expected.")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", type=int, default=18, help="width in heads of 128; 18 gives about 6 GB")
    parser.add_argument("--max-shard-size", default="5GB")
    arguments = parser.parse_args()
    source, output = arguments.folder / "source", arguments.folder / "converted"
    total = write_source(source, arguments.heads)
    left = kill_halfway(source, output, arguments.max_shard_size)
    device = torch.device("cpu")
    status, seconds = timed(lambda: convert(source, output, arguments.max_shard_size).wait(), device)
    if status != 0:
        raise SystemExit("The second run failed.")
    print_result(
        "convert_checkpoint",
        device,
        source_gib=round(total / 2**30, 2),
        max_shard_size=arguments.max_shard_size,
        killed_run_left_gib=round(left / 2**30, 2),
        seconds=round(seconds, 1),
        peak_gib=round(peak_gib(device, resource.RUSAGE_CHILDREN), 2),
        tensors_compared=compare(source, output),
    )


if __name__ == "__main__":
    main()
