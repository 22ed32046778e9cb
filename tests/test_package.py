# SPDX-License-Identifier: Apache-2.0
"""What importing the package does, and the versions that it asks for."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.version import Version

import diffusers_magihuman
from diffusers_magihuman.constants import CLASSES


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
        "MagiHumanAutoBlocks",
        "MagiHumanDistilledAutoBlocks",
        "MagiHumanDistilledModularPipeline",
        "MagiHumanFlowScheduler",
        "MagiHumanGuidance",
        "MagiHumanLatentUpscalePipeline",
        "MagiHumanModularPipeline",
        "MagiHumanTransformer3DModel",
        "MagiHumanUpscaleAutoBlocks",
        "MagiHumanUpscaleModularPipeline",
    ]
    assert result["foreign"] == []
    assert set(result["modules"]).isdisjoint({"cli", "convert", "hub", "plan", "training"})


def test_package_and_command_import_nothing_heavy():
    """Before something is asked for, and not for what is on the command line either."""
    script = """
import sys
import diffusers_magihuman
from diffusers_magihuman.tools.cli import main
for arguments in (["--help"], ["generate", "--help"], ["generate", "a", "--width", "x"], ["--version"]):
    try:
        main(arguments)
    except SystemExit as error:
        print(error.code)
print(*sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    *lines, modules = output.splitlines()
    assert [line for line in lines if line.isdigit()] == ["0", "0", "2", "0"]
    assert f"magihuman {diffusers_magihuman.__version__}" in lines
    modules = modules.split()
    assert "diffusers_magihuman.tools.cli" in modules
    assert {"torch", "numpy", "diffusers", "transformers", "huggingface_hub"}.isdisjoint(modules)


@pytest.mark.parametrize(
    "imports",
    [
        "import diffusers_magihuman, importlib.util; importlib.util.find_spec('diffusers'); import diffusers",
        pytest.param("import diffusers.pipelines, diffusers_magihuman", marks=pytest.mark.slow),
        pytest.param("import diffusers_magihuman.pipeline_base, diffusers", marks=pytest.mark.slow),
    ],
)
def test_classes_are_registered_whenever_diffusers_is_imported(imports):
    same = "\n".join(f"assert diffusers.{name} is diffusers_magihuman.{name}" for name in CLASSES)
    script = f"""
{imports}
import pickle
{same}
assert diffusers.pipelines.MagiHumanAudioVideoPipeline is diffusers.MagiHumanAudioVideoPipeline
assert diffusers.AutoencoderKLWan and not hasattr(diffusers, "x") and not hasattr(diffusers_magihuman, "x")
assert {{*{list(CLASSES)}}} <= {{*dir(diffusers)}}
assert {{*diffusers_magihuman.__all__}} <= {{*dir(diffusers_magihuman)}}
assert pickle.loads(pickle.dumps(diffusers.MagiHumanFlowScheduler)) is diffusers_magihuman.MagiHumanFlowScheduler
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_threads_may_be_the_first_to_ask_for_names():
    script = """
import threading, diffusers_magihuman
names, found = diffusers_magihuman.__all__, []
threads = [threading.Thread(target=lambda n=n: found.append(getattr(diffusers_magihuman, n))) for n in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == len(names)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_names_for_type_checkers_are_those_of_the_package():
    tree = ast.parse(Path(diffusers_magihuman.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == diffusers_magihuman._SOURCES and sorted(imported) == sorted(diffusers_magihuman.__all__)
    assert all(getattr(diffusers_magihuman, name) is not None for name in imported)


def test_lowest_versions_are_those_of_setup():
    """`.ci/run` tests with these, so they must be what `setup.py` promises."""
    bounds = dict(re.findall(r'"([\w-]+)(?:\[data\])?>=([\d.]+)"', (ROOT / "setup.py").read_text()))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/constraints-lowest.txt").read_text(), re.MULTILINE))
    assert len(bounds) > 15
    assert {name: Version(pin) for name, pin in pins.items()} == {name: Version(low) for name, low in bounds.items()}
