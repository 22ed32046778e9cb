# SPDX-License-Identifier: Apache-2.0
"""What `magihuman batch` costs beyond its clips, and how it grows with workers, on the embedded tiny model.

    python benchmarks/batch.py [--clips 12] [--frames 75] [--workers 1 2]

Clips are made in turn by a batch's worker and by the two calls that make one, so that both see the same machine. With
Ray installed, runs with different numbers of workers follow, timed from the fourth record to the last, without their
start. The last line of stdout is JSON; times of processors are those of the process and its children.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import torch
from common import print_result

from diffusers_magihuman import embedded_model, export_to_mp4
from diffusers_magihuman.tools import batch, requests

RUN = "from diffusers_magihuman.tools.cli import run_process; run_process()"
PROMPT = 'A man with a round face says: "one, two, three".'


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and of processors."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(rows: list[dict], folder: Path) -> dict[str, float]:
    """Seconds of a clip by the pipeline and `export_to_mp4`, and by a worker, and what that has in addition."""
    speed = {"quantize": None, "compile": False, "attention": None, "dtype": "float32"}
    arguments = Namespace(model=embedded_model(), upscale=None, device="cpu", offload="none", retries=1, **speed)
    arguments.out = str(folder / "out")
    models, store = requests.open_models(arguments), requests.Store(arguments.out)
    asked = [requests.check_request(row, models) for row in rows]
    options = requests.make_options(arguments, models, asked[0].sizes) | {"failures": {}}
    texts = {text[0]: text for each in asked for text in batch.texts_of(each, models.context).values()}
    list(batch.run_here(batch.load_encoder, options, list(texts.values())))
    worker = requests.Worker(batch.load_maker, options)
    (pipe,) = requests.load_pipes(worker.arguments, options["sizes"], "tokenizer", "text_encoder")
    embeds = batch.read_texts(worker.arguments, store, asked[0])
    totals = {"direct": [0.0, 0.0], "batch": [0.0, 0.0]}

    def make_directly(request: requests.Request) -> None:
        call = {name: value for name, value in request.call.items() if name != "prompt"}
        call |= {"prompt_embeds": embeds["prompt"], "generator": torch.Generator().manual_seed(request.seed)}
        output = pipe(output_type="stream", **call)
        export_to_mp4(output.frames[0], folder / "direct.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate)

    for index, request in enumerate(asked):
        ways = {"direct": lambda each: make_directly(each), "batch": lambda each: worker(list(each))}
        for name in sorted(ways, reverse=index % 2 == 0):
            begun = clocks()
            ways[name](request)
            if index:  # the first warms up
                totals[name] = [
                    total + end - start for total, start, end in zip(totals[name], begun, clocks(), strict=True)
                ]
        if (folder / "direct.mp4").read_bytes() != (folder / f"out/{request.id}.mp4").read_bytes():
            raise RuntimeError(f"{request.id} differs from the direct call's.")
    (wall, cpu), (batch_wall, batch_cpu) = ([total / (len(rows) - 1) for total in each] for each in totals.values())
    store.remove(".work")
    return {
        "direct_seconds": round(wall, 3),
        "batch_seconds": round(batch_wall, 3),
        "overhead": round(batch_wall / wall - 1, 4),
        "direct_cpu_seconds": round(cpu, 3),
        "cpu_overhead": round(batch_cpu / cpu - 1, 4),
    }


def measure_workers(rows: list[dict], folder: Path, num_workers: int) -> dict[str, float]:
    """Clips a minute of so many workers, and the share of their time in which they make clips, which does not depend
    on what else the machine does."""
    jobs, out = folder / "jobs.jsonl", folder / str(num_workers)
    jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-c", RUN, "batch", str(jobs), "--out", str(out), "--model", "tiny"]
    subprocess.run([*command, "--workers", str(num_workers), "--device", "cpu"], check=True)
    ends = sorted((path.stat().st_mtime, json.loads(path.read_text())["seconds"]) for path in out.glob("*.json"))
    begin, end = ends[3][0], ends[-num_workers][0]  # the last ones end alone
    # Of each clip the part between the two.
    inside = sum(max(0.0, min(time, end) - max(time - seconds, begin)) for time, seconds in ends)
    rate = 60 * (len(ends) - 3 - num_workers) / (end - begin)
    return {"clips_a_minute": round(rate, 2), "busy": round(inside / (end - begin) / num_workers, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--frames", type=int, default=75)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {"id": f"clip-{i}", "prompt": PROMPT, "seed": i, "num_frames": arguments.frames}
        for i in range(arguments.clips)
    ]
    with tempfile.TemporaryDirectory() as folder:
        numbers = compare(rows, Path(folder)) | {"load": os.getloadavg()[0]}
        if find_spec("ray") is not None:
            numbers["workers"] = {count: measure_workers(rows, Path(folder), count) for count in arguments.workers}
    print_result("batch", torch.device("cpu"), clips=arguments.clips, frames=arguments.frames, **numbers)
