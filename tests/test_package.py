"""What importing the package does, the example scripts, and the code of the README."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import soundfile
from helpers import read_header


ROOT = Path(__file__).parents[1]


def run_python(*arguments, **kwargs):
    return subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True, **kwargs)


def test_import_registers_the_classes_and_nothing_else():
    script = """
import sys, diffusers
before = set(dir(diffusers)) | set(vars(diffusers))
import diffusers_magihuman
print(*sorted((set(dir(diffusers)) | set(vars(diffusers))) - before))
print(*(name for name in ("cli", "hub", "training") if f"diffusers_magihuman.{name}" in sys.modules))
from diffusers import MagiHumanTransformer3DModel
assert MagiHumanTransformer3DModel is diffusers_magihuman.MagiHumanTransformer3DModel
"""
    added, modules = run_python("-c", script).stdout.split("\n")[:2]
    registered = "AutoencoderKLMagiHumanTurbo MagiHumanAudioVideoPipeline MagiHumanFlowScheduler "
    registered += "MagiHumanLatentUpscalePipeline MagiHumanTransformer3DModel"
    # Reaching a class of Diffusers makes its subpackages attributes too.
    assert [name for name in added.split() if name[0].isupper() and "Magi" in name] == registered.split()
    assert modules == ""


def test_make_tiny_pipeline_and_text_to_video(tmp_path):
    run_python(ROOT / "examples" / "make_tiny_pipeline.py", "tiny", "--distilled", cwd=tmp_path)
    output = run_python(ROOT / "examples" / "text_to_video.py", "tiny", "5", cwd=tmp_path).stdout
    assert output.splitlines()[-1] == "text_to_video.mp4"
    assert "Video: h264" in read_header(tmp_path / "text_to_video.mp4")


def test_portrait_and_voice(tiny_pipeline_dir, tmp_path):
    PIL.Image.new("RGB", (60, 80), "teal").save(tmp_path / "portrait.png")
    soundfile.write(tmp_path / "speech.wav", 0.2 * np.sin(np.arange(4000) / 9), 16000)
    script = ROOT / "examples" / "portrait_and_voice.py"
    run_python(script, tiny_pipeline_dir, "portrait.png", "speech.wav", cwd=tmp_path)
    assert "Audio: aac" in read_header(tmp_path / "portrait_and_voice.mp4")
