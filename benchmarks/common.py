# SPDX-License-Identifier: Apache-2.0
"""What every benchmark says beside its numbers: on what it ran, at which commit, with how much memory."""

import json
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Output = TypeVar("Output")


def hardware(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    models = [line for line in cpu_info.read_text().splitlines() if "model name" in line] if cpu_info.exists() else []
    return models[0].split(":")[1].strip() if models else platform.processor()


def git_commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "--short", "--verify", "HEAD"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def peak_gib(device: torch.device, who: int = resource.RUSAGE_SELF) -> float:
    """Peak of PyTorch's allocator on a GPU, on a CPU of the process, or of its children with `RUSAGE_CHILDREN`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(who).ru_maxrss / 2**20  # ru_maxrss is in KiB on Linux


def timed(function: Callable[[], Output], device: torch.device) -> tuple[Output, float]:
    """What the function returns, and its seconds."""
    start = time.perf_counter()
    output = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return output, time.perf_counter() - start


def print_result(benchmark: str, device: torch.device, **numbers: object) -> None:
    """The last line of stdout, as JSON."""
    result = {
        "benchmark": benchmark,
        "hardware": hardware(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        **numbers,
    }
    print(json.dumps(result))
