# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README and of the model cards runs, against tiny repositories on a loopback hub."""

import json
import re
import subprocess
import sys

import PIL.Image
import pytest
import soundfile
import torch
from helpers import ROOT
from hub_server import HubServer
from layouts import write_external_repositories, write_repositories
from make_tiny_pipeline import make_transformer
from peft import LoraConfig

from diffusers_magihuman.tools.hub import write_repository_code

# Their blocks are those of the other card of their kind, but for the names of repositories.
SLOW = ("base.md", "sr-540p.md")
# What the tiny models on a CPU cannot: the GPU and its kernels, bfloat16 and compilation in little time, full sizes.
SUBSTITUTIONS = {
    '"cuda"': '"cpu"',
    "torch.bfloat16": "torch.float32",
    '"_flash_3_hub"': '"native"',
    "fullgraph=True, dynamic=True": 'fullgraph=True, dynamic=True, backend="eager"',
    ".enable_model_cpu_offload()": '.to("cpu")',
    '"use_stream": True': '"use_stream": False',
    "height=1088, width=1920": "height=64, width=96",
    "pipe(prompt, ": "pipe(prompt, height=32, width=32, num_frames=5, num_inference_steps=1, ",
}
# Runs blocks one by one, each with names of its own, and prints what each raised.
RUNNER = """
import json, sys, traceback
blocks, failures = json.load(sys.stdin), {}
for name, block in blocks.items():
    try:
        exec(compile(block, name, "exec"), {"prompt": "A woman says hello."})
    except Exception:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


def find_blocks():
    """Code by its file and its line."""
    blocks = {}
    for document in (ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))):
        text = document.read_text()
        for match in re.finditer(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            blocks[f"{document.name}:{text.count(chr(10), 0, match.start(1)) + 1}"] = match[1]
    return blocks


BLOCKS = find_blocks()


@pytest.fixture(scope="module")
def hub(tiny_distilled_pipeline, tiny_upscale_pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_repositories(root)
    write_external_repositories(root)
    for variant in ("base", "distill", "sr-540p", "sr-1080p"):
        pipe = tiny_upscale_pipeline if variant.startswith("sr") else tiny_distilled_pipeline
        pipe.save_pretrained(root / "owner" / f"magihuman-{variant}")
        write_repository_code(root / "owner" / f"magihuman-{variant}")
    tiny_distilled_pipeline.vae.save_pretrained(root / "owner" / "magihuman-turbo-vae")
    with HubServer(root) as server:
        yield server


@pytest.fixture(scope="module")
def failures(request, hub, tmp_path_factory):
    """What the blocks of the selected tests raise, all of them in one process."""
    folder = tmp_path_factory.mktemp("documents")
    PIL.Image.new("RGB", (40, 60), "teal").save(folder / "portrait.png")
    soundfile.write(folder / "speech.wav", torch.randn(8000).numpy() * 0.1, 16000)
    for name in ("lora", "other-lora"):
        transformer = make_transformer()
        transformer.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
        transformer.save_lora_adapter(folder / name)
    single_file = hub.root / "smthem" / "MagiHuman" / "distill-merger_bf16.safetensors"
    (folder / single_file.name).write_bytes(single_file.read_bytes())

    selected = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    blocks = {name: BLOCKS[name] for name in selected}
    for old, new in SUBSTITUTIONS.items():
        blocks = {name: block.replace(old, new) for name, block in blocks.items()}
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(blocks),
        env=hub.environment(folder / "cache"),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(SLOW)) for name in BLOCKS]
)
def test_block_runs(name, failures):
    assert name not in failures, failures[name]
