# SPDX-License-Identifier: Apache-2.0
"""What importing the package does, and the versions that it asks for."""

import json
import re
import subprocess
import sys

from helpers import ROOT
from packaging.version import Version


def test_import_registers_the_classes_and_nothing_else():
    """In a fresh process. Reaching a class of Diffusers makes the subpackage that it is in an attribute, too."""
    script = """
import json, sys, types, diffusers
before = set(dir(diffusers)) | set(vars(diffusers))
import diffusers_magihuman
added = {name: getattr(diffusers, name) for name in (set(dir(diffusers)) | set(vars(diffusers))) - before}
subpackages = [n for n, v in added.items() if isinstance(v, types.ModuleType) and v.__name__ == f"diffusers.{n}"]
classes = {name: value for name, value in added.items() if name not in subpackages}
print(json.dumps({
    "classes": sorted(classes),
    "foreign": [name for name, value in classes.items() if getattr(diffusers_magihuman, name, None) is not value],
    "modules": [name.split(".")[-1] for name in sys.modules if name.startswith("diffusers_magihuman.")],
}))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert result["classes"] == [
        "AutoencoderKLMagiHumanTurbo",
        "MagiHumanAudioVideoPipeline",
        "MagiHumanFlowScheduler",
        "MagiHumanLatentUpscalePipeline",
        "MagiHumanTransformer3DModel",
    ]
    assert result["foreign"] == []
    assert set(result["modules"]).isdisjoint({"cli", "convert", "hub", "plan", "training"})


def test_lowest_versions_are_those_of_setup():
    """`.ci/run` tests with these, so they must be what `setup.py` promises."""
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "setup.py").read_text()))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/constraints-lowest.txt").read_text(), re.MULTILINE))
    assert len(bounds) > 15
    assert {name: Version(pin) for name, pin in pins.items()} == {name: Version(low) for name, low in bounds.items()}
