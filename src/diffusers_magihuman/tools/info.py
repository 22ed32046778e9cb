# SPDX-License-Identifier: Apache-2.0
"""The command `magihuman info`."""

import os
import platform
import shutil
from argparse import Namespace
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from .. import __version__

GIB = 2**30
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "numpy")
EXTRAS = ("peft", "torchao", "optimum-quanto", "gguf", "bitsandbytes", "kernels", "xformers", "flash-attn", "gradio")


def run_info(_: Namespace) -> None:
    """Prints what a report of a fault needs, and nothing of the user's: no paths, no environment, no tokens."""
    found = dict.fromkeys((*PACKAGES, *EXTRAS), "not installed")
    for name in found:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    memory, folder = psutil.virtual_memory(), Path(HF_HUB_CACHE)
    folder = next(each for each in (folder, *folder.parents) if each.exists())  # it is made with the first download
    facts = {"magihuman": __version__, "python": f"{platform.python_version()} on {platform.platform()}", **found}
    facts["cuda of torch"] = torch.version.cuda or "none"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {torch.cuda.get_device_capability(index)}"
        facts[f"cuda:{index}"] = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    facts["mps"] = "available" if torch.backends.mps.is_available() else "none"
    facts["cpu"] = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts["memory"] = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    facts["disk"] = f"{shutil.disk_usage(folder).free / GIB:.1f} GiB free where models are downloaded to"
    for name, value in facts.items():
        print(f"{name + ':':17}{value}")
