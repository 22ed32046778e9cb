"""`handler.py` of a repository, loaded and called as an Inference Endpoint of Hugging Face does, in a new process."""

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import PROMPT, WITHOUT_PACKAGE
from PIL import Image

from diffusers_magihuman import export_to_mp4
from diffusers_magihuman.tools.handler import EndpointHandler
from diffusers_magihuman.tools.hub import write_repository_code

SMALL = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 1}
# What huggingface-inference-toolkit does with a repository: its folder is not the current one, nor on the path.
SERVER = """
import importlib.util
import json
import sys
spec = importlib.util.spec_from_file_location("handler", sys.argv[1] + "/handler.py")
sys.modules["handler"] = handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
endpoint = handler.EndpointHandler(sys.argv[1])
answers = [json.loads(json.dumps(endpoint(body))) for body in json.load(sys.stdin)]
print(json.dumps({"answers": answers, "module": type(endpoint.pipe).__module__}))
"""


def save(pipe, folder):
    pipe.save_pretrained(folder)
    write_repository_code(folder)
    return folder


def serve(repository, bodies, script, folder):
    command = [sys.executable, "-c", script + SERVER, str(repository)]
    result = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def expected_bytes(pipe, path, seed, **arguments):
    pipe.vae.enable_tiling()
    generator = torch.Generator().manual_seed(seed)
    output = pipe(PROMPT, generator=generator, output_type="stream", **arguments)
    export_to_mp4(output.frames[0], path, output.audio[0], sampling_rate=pipe.audio_sampling_rate)
    return path.read_bytes()


@pytest.mark.parametrize("is_installed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_endpoint_answers(is_installed, tiny_distilled_pipeline, tmp_path):
    """By the code of the repository, or the package where that is installed."""
    repository = save(tiny_distilled_pipeline, tmp_path / "repository")
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "png")
    image = base64.b64encode(file.getvalue()).decode()
    bodies = [
        {"inputs": PROMPT, "parameters": {"seed": 3, "image": image, **SMALL}},
        {"inputs": PROMPT, "parameters": SMALL},
    ]
    answer = serve(repository, bodies, "" if is_installed else WITHOUT_PACKAGE, tmp_path)
    assert answer["module"].startswith("diffusers_magihuman." if is_installed else "diffusers_modules.")
    first, second = answer["answers"]
    assert first["content_type"] == "video/mp4" and first["seed"] == 3
    image = Image.new("RGB", (64, 32), "red")
    expected = expected_bytes(tiny_distilled_pipeline, tmp_path / "x.mp4", 3, image=image, **SMALL)
    assert base64.b64decode(first["video"]) == expected
    expected = expected_bytes(tiny_distilled_pipeline, tmp_path / "x.mp4", second["seed"], **SMALL)
    assert base64.b64decode(second["video"]) == expected


@pytest.fixture(scope="module")
def upscaler(tiny_upscale_pipeline, tmp_path_factory):
    return EndpointHandler(str(save(tiny_upscale_pipeline, tmp_path_factory.mktemp("repository") / "upscale")))


def test_an_endpoint_upscales(upscaler, tiny_upscale_pipeline, tmp_path):
    export_to_mp4(np.zeros((5, 32, 64, 3)), tmp_path / "low.mp4")
    video = base64.b64encode((tmp_path / "low.mp4").read_bytes()).decode()
    size = {"height": 64, "width": 128, "num_inference_steps": 1}
    answer = upscaler({"inputs": PROMPT, "parameters": {"video": video, "seed": 0, **size}})
    pipe, generator = tiny_upscale_pipeline, torch.Generator().manual_seed(0)
    pipe.vae.enable_tiling()
    output = pipe(PROMPT, video=str(tmp_path / "low.mp4"), generator=generator, output_type="stream", **size)
    export_to_mp4(output.frames[0], tmp_path / "x.mp4")
    assert base64.b64decode(answer["video"]) == (tmp_path / "x.mp4").read_bytes()


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"num_frames": 5}, r"`parameters` has \['num_frames'\], allowed are audio, "),
        ({"generator": 0}, r"`parameters` has \['generator'\]"),
        ({"video": "/etc/passwd."}, "`video` must be a file in base64"),
        ({"video": "é"}, "`video` must be a file in base64"),
        ({"video": ["a"]}, "`video` must be a file in base64, of at most"),
        ({"video": "A" * (2**26 + 4)}, "`video` must be a file in base64, of at most"),
        ({"video": "AAAA"}, "`video`"),
        *(({"seed": seed}, "`seed`=") for seed in ("1", 1.0, True, 2**64)),
        ({}, "Exactly one of `latents`, `video`"),
    ],
)
def test_an_endpoint_names_what_is_wrong(parameters, message, upscaler):
    with pytest.raises((ValueError, OSError), match=message):
        upscaler({"inputs": PROMPT, "parameters": parameters})


@pytest.mark.parametrize("body", [{}, {"inputs": [PROMPT] * 2}, {"inputs": PROMPT, "parameters": "seed"}])
def test_an_endpoint_takes_a_prompt(body, upscaler):
    with pytest.raises(ValueError, match=r"`inputs`=.* must be a prompt, and `parameters` an object"):
        upscaler(body)


def test_an_endpoint_installs_what_the_package_does(tiny_upscale_pipeline, tmp_path):
    lines = (save(tiny_upscale_pipeline, tmp_path) / "requirements.txt").read_text().splitlines()
    assert {re.split("[>=]", line)[0] for line in lines} >= {"diffusers", "torch", "transformers", "imageio-ffmpeg"}
    assert not [line for line in lines if "extra" in line or "pytest" in line]
