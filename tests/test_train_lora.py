# SPDX-License-Identifier: Apache-2.0
"""Training of a LoRA on a folder of clips: it learns, goes on where it stopped, and follows a stored trajectory.

`python tests/test_train_lora.py` stores the trajectory anew.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
import train_lora
from accelerate import Accelerator
from clips import make_clip
from diffusers import DiffusionPipeline
from golden import DATA
from make_tiny_pipeline import make_tiny_pipeline
from safetensors.torch import load_file

from diffusers_magihuman import embedded_model, export_to_mp4

TRAJECTORY = DATA / "train_lora_trajectory.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline and ten clips of talking heads, half of them with their captions in one table."""
    folder = tmp_path_factory.mktemp("lora")
    make_tiny_pipeline().save_pretrained(folder / "tiny")
    (folder / "clips").mkdir()
    for seed in range(10):
        clip, path = make_clip(seed, 64, 64, num_frames=9), folder / "clips" / f"{seed}.mp4"
        voice = scipy.signal.resample(clip.speech.voice, 9 * 1920)
        export_to_mp4(clip.drawing.frames, path, audio=voice, sampling_rate=48000)
        if seed % 2:
            path.with_suffix(".txt").write_text(clip.prompt)
        else:
            with (folder / "clips" / "metadata.jsonl").open("a") as table:
                table.write(json.dumps({"file_name": path.name, "text": clip.prompt}) + "\n")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def run(output, options, height=64):
        options += f" --learning-rate 1e-2 --height {height} --width 64 --num-frames 5"
        command = f"train_lora.py --model tiny --data clips --output {output} --cache cache {options}"
        monkeypatch.setattr(sys, "argv", command.split())
        train_lora.main()
        return [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]

    return run


def generate(pipe):
    call = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    return pipe("A person says ma.", generator=torch.manual_seed(0), **call).frames


def test_loss_falls_and_the_lora_changes_the_output(run, folder):
    log = run("learns", "--steps 40 --batch-size 4 --rank 4 --target-modules to_q to_v to_out linear_out")
    assert [line["step"] for line in log] == list(range(1, 41))
    losses = [line["loss"] for line in log]
    assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:8])
    pipe = DiffusionPipeline.from_pretrained(folder / "tiny")
    plain = generate(pipe)
    pipe.load_lora_weights(folder / "learns")
    assert pipe.transformer.peft_config["default_0"].r == 4
    assert (generate(pipe) - plain).norm() > 0.05 * plain.norm()
    assert not list((folder / "learns").rglob("*incomplete*"))


def test_goes_on_as_if_it_never_stopped(run, folder):
    options = "--batch-size 2 --text-dropout 0.5 --gradient-checkpointing"
    whole = run("whole", f"--steps 5 {options}")
    run("parts", f"--steps 3 {options}")
    encoded = {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    assert len(encoded) == 11  # of the clips and of the negative prompt
    with (folder / "parts" / "log.jsonl").open("a") as log:
        log.write("a step that was not saved before the power failed\n")
    assert run("parts", f"--steps 5 {options}") == whole
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()} == encoded
    first, second = (load_file(folder / each / "pytorch_lora_weights.safetensors") for each in ("whole", "parts"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="`rank`=8 was 16"):
        run("parts", f"--steps 5 --rank 8 {options}")


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process(folder):
    """Sets of names have another order there. What is wrong is one line, a SIGTERM leaves nothing unfinished."""
    files = []
    options = "--model tiny --data clips --cache cache --height 64 --width 64 --num-frames 5 --steps 1 --save-every 1"
    command = [sys.executable, train_lora.__file__, *options.split(), "--output"]
    for seed in "12":
        subprocess.run([*command, f"hash{seed}"], cwd=folder, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        files.append((folder / f"hash{seed}" / "pytorch_lora_weights.safetensors").read_bytes())
    assert files[0] == files[1]
    done = subprocess.run([*command, "hash1", "--rank", "8"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "train_lora.py: error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    process = subprocess.Popen([*command, "killed", "--steps", "1000"], cwd=folder, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.terminate()
    assert process.wait() == 143
    assert {path.name for path in (folder / "killed").iterdir()} <= {*os.listdir(folder / "hash1")}


def test_state_that_is_damaged(run, folder):
    run("damaged", "--steps 1")
    (folder / "damaged" / "state.pt").write_bytes(b"PK")
    with pytest.raises(OSError, match=r"state\.pt' is damaged"):
        run("damaged", "--steps 2")


def test_frozen_weights_in_bfloat16(run, folder):
    log = run("bf16", "--steps 1 --mixed-precision bf16")
    assert np.isfinite(log[0]["loss"]) and log[0]["grad_norm"] > 0
    weights = load_file(folder / "bf16" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def follow_trajectory(folder):
    """Losses and gradient norms of twenty steps of a seeded transformer on seeded numbers."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    clips = [
        {"latents": draw(8, 2, 4, 4), "audio_latents": draw(5, 8), "prompt_embeds": draw(length, 16)}
        for length in (3, 5, 4)
    ]
    options = f"--data . --output {folder} --steps 20 --batch-size 2 --rank 2 --learning-rate 1e-2 --text-dropout 0.3"
    arguments = train_lora.parse_arguments(options.split())
    train_lora.train(arguments, Accelerator(), make_tiny_pipeline().transformer, clips, draw(6, 16))
    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in log] for name in ("loss", "grad_norm")}


def test_trajectory(tmp_path):
    trajectory = follow_trajectory(tmp_path)
    expected = json.loads(TRAJECTORY.read_text())
    assert len(expected["loss"]) == len(expected["grad_norm"]) == 20
    for name in expected:
        assert trajectory[name] == pytest.approx(expected[name], rel=1e-3)


def test_default_is_the_tiny_model_of_the_package(folder, tmp_path, monkeypatch):
    """Its size and length too: the clips of 9 frames are too short for it."""
    monkeypatch.setattr(sys, "argv", f"train_lora.py --data {folder}/clips --output {tmp_path} --steps 1".split())
    with pytest.raises(ValueError, match=r"0\.mp4' has 9 frames, fewer than `num_frames`=49"):
        train_lora.main()
    assert "magihuman" in embedded_model("base")


@pytest.mark.parametrize(
    "name, value",
    [
        *(("steps", 0), ("rank", -1), ("seed", -1), ("learning_rate", 0.0), ("shift", -1.0), ("text_dropout", 1.5)),
        *(("learning_rate", math.inf), ("shift", math.nan), ("image_probability", math.nan)),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}`={value} must be"):
        train_lora.parse_arguments(["--data", ".", "--output", ".", f"--{name.replace('_', '-')}", str(value)])


def test_size_that_does_not_fit(run):
    with pytest.raises(ValueError, match="`height`=60 must be a multiple of 32"):
        run("size", "--steps 1", height=60)


@pytest.mark.parametrize(
    "files, error, message",
    [
        ({}, ValueError, "holds no .mp4 file"),
        ({"a.mp4": b""}, ValueError, r"without a caption .*\['a.mp4'\]"),
        ({"a.mp4": b"", "a.txt": b" "}, ValueError, r"\['a.mp4'\]"),
        ({"a.mp4": b"no video", "a.txt": b"Hello"}, OSError, r"a\.mp4' holds no readable video"),
        ({"metadata.jsonl": b'{"file_name": "b.mp4", "text": "Hello"}'}, OSError, "names 'b.mp4', but there is no"),
        ({"metadata.jsonl": b'{"file": "b.mp4"}'}, ValueError, "line 1, must have `file_name` and `text`"),
    ],
)
def test_folders_that_cannot_be_read(files, error, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        train_lora.read_captions(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        train_lora.read_captions(tmp_path / "none")


def test_clip_without_audio_or_of_another_rate(tmp_path):
    frames = np.zeros((4, 32, 32, 3), np.float32)
    (tmp_path / "a.txt").write_text("Hello")
    export_to_mp4(frames, tmp_path / "a.mp4", fps=24)
    with pytest.raises(ValueError, match=r"a\.mp4' has 24 frames a second and no audio; 25 and audio are needed"):
        train_lora.read_captions(tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        TRAJECTORY.write_text(json.dumps(follow_trajectory(folder), indent=1) + "\n")
