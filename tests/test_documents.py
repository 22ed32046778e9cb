"""Every Python block of the README and of the model cards runs, against tiny repositories on a loopback hub."""

import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import soundfile
import torch
from hub_server import HubServer
from layouts import write_external_repositories, write_repositories
from make_tiny_pipeline import make_transformer
from peft import LoraConfig

from diffusers_magihuman.tools.hub import write_repository_code


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))]
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


def test_python_blocks_run(hub, tmp_path):
    PIL.Image.new("RGB", (40, 60), "teal").save(tmp_path / "portrait.png")
    soundfile.write(tmp_path / "speech.wav", torch.randn(8000).numpy() * 0.1, 16000)
    for name in ("lora", "other-lora"):
        transformer = make_transformer()
        transformer.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
        transformer.save_lora_adapter(tmp_path / name)
    single_file = hub.root / "smthem" / "MagiHuman" / "distill-merger_bf16.safetensors"
    (tmp_path / single_file.name).write_bytes(single_file.read_bytes())
    script, number = "", 0
    for document in DOCUMENTS:
        for block in re.findall(r"```py\n(.*?)```", document.read_text(), re.DOTALL):
            for old, new in SUBSTITUTIONS.items():
                block = block.replace(old, new)
            script += f"exec({block!r}, {{'prompt': 'A woman says hello.'}})\n"
            number += 1
    assert number >= 9
    environment = hub.environment(tmp_path / "cache")
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out.mp4").is_file()
