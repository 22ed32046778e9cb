# SPDX-License-Identifier: Apache-2.0
"""What `magihuman serve` costs beyond its clips, on the embedded tiny model, as a client sees it.

    python benchmarks/serve.py [--clips 8] [--frames 75]

Clips are asked for over HTTP, and made by the two calls that make one, in turn, so that both see the same machine,
with a thread each. `worker_seconds` is the part of a clip's time in the service's worker. The last line of stdout is
JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from common import print_result
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4

RUN = "from diffusers_magihuman.tools.cli import run_process; run_process()"
PROMPT = 'A man with a round face says: "one, two, three".'


def ask(address: str, fields: dict | None = None) -> bytes:
    body = None if fields is None else json.dumps(fields).encode()
    call = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call) as answer:
        return answer.read()


def make_by_service(address: str, seed: int, frames: int) -> tuple[str, bytes]:
    video = json.loads(ask(address, {"prompt": PROMPT, "seed": seed, "num_frames": frames}))
    while video["status"] in ("queued", "in_progress"):
        time.sleep(0.05)
        video = json.loads(ask(f"{address}/{video['id']}"))
    return video["id"], ask(f"{address}/{video['id']}/content")


def make_directly(pipe: DiffusionPipeline, path: Path, seed: int, frames: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    output = pipe(PROMPT, num_frames=frames, generator=generator, output_type="stream")
    export_to_mp4(output.frames[0], path, output.audio[0], sampling_rate=pipe.audio_sampling_rate)
    return path.read_bytes()


def compare(folder: Path, num_clips: int, frames: int) -> dict[str, float]:
    command = [sys.executable, "-c", RUN, "serve", "--out", str(folder / "out"), "--port", "0", "--workers", "1"]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[-1]
        pipe = DiffusionPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.enable_tiling()
        direct, served, worker = [], [], []
        for index in range(num_clips + 1):
            clips = []
            for is_service in (index % 2 == 0, index % 2 == 1):
                begun = time.perf_counter()
                if is_service:
                    name, clip = make_by_service(address, index, frames)
                else:
                    clip = make_directly(pipe, folder / "direct.mp4", index, frames)
                (served if is_service else direct).append(time.perf_counter() - begun)
                clips.append(clip)
            worker.append(json.loads((folder / f"out/{name}.json").read_text())["seconds"])
            if clips[0] != clips[1]:
                raise RuntimeError(f"Clip {index} differs from the direct call's.")
    finally:
        process.terminate()
        process.wait()
    means = [sum(seconds[1:]) / num_clips for seconds in (direct, served, worker)]  # the first warms up
    names = ("direct_seconds", "served_seconds", "worker_seconds")
    numbers = {name: round(mean, 3) for name, mean in zip(names, means, strict=True)}
    return numbers | {
        "overhead": round(means[1] / means[0] - 1, 4),
        "beside_worker": round(means[1] / means[2] - 1, 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=75)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the service's worker
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = compare(Path(folder), arguments.clips, arguments.frames) | {"load": os.getloadavg()[0]}
    print_result("serve", torch.device("cpu"), clips=arguments.clips, frames=arguments.frames, **numbers)
