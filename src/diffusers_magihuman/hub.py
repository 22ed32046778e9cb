# Copyright 2026 The diffusers-magihuman authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a published repository holds besides weights: the code that loads it, its model card, its licence note."""

import ast
import importlib
import inspect
import json
import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData


PACKAGE = "diffusers_magihuman"
BUNDLE = "magihuman_bundle"
REGISTERED = (
    "AutoencoderKLMagiHumanTurbo",
    "MagiHumanAudioVideoPipeline",
    "MagiHumanFlowScheduler",
    "MagiHumanTransformer3DModel",
)


# The code


def make_bundle() -> str:
    """
    Makes one flat module of the package's own sources, for `trust_remote_code=True` without the package.

    Diffusers copies only direct relative imports of `pipeline.py`, so the module has none.

    Raises:
        `ValueError`: Two sources define the same name.
    """
    package = importlib.import_module(PACKAGE)
    sources: dict[str, str] = {}
    for class_name in REGISTERED:
        collect_sources(getattr(package, class_name).__module__.removeprefix(f"{PACKAGE}."), sources)
    header = inspect.getsource(package).split('"""')[0]
    origin = (
        f"# Generated from the sources of diffusers-magihuman {package.__version__}; change them, not this file.\n"
    )
    parts = [header + origin]
    owners: dict[str, str] = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        for defined in defined_names(tree):
            if defined in owners:
                raise ValueError(f"`{defined}` is defined in {owners[defined]}.py and in {name}.py.")
            owners[defined] = name
        parts.append(f"\n\n# {name}.py\n\n{without_relative_imports(source, tree)}")
    return "".join(parts)


def collect_sources(name: str, sources: dict[str, str]) -> None:
    """Adds a module's source after those of the modules that it imports from the package."""
    if name in sources:
        return
    source = inspect.getsource(importlib.import_module(f"{PACKAGE}.{name}"))
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            collect_sources(node.module, sources)
    sources[name] = source


def defined_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def without_relative_imports(source: str, tree: ast.Module) -> str:
    """The source from its docstring on, less its imports from the package."""
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines[tree.body[0].lineno - 1 :]).rstrip() + "\n"


def make_pipeline_file(class_name: str) -> str:
    """
    Makes `pipeline.py`, which takes a pipeline out of the package where it is installed, else out of the bundle.

    Args:
        class_name (`str`): Name of the pipeline; the file defines no other one.
    """
    return f'''"""Loads this repository without the package diffusers-magihuman, if it is not installed."""

import diffusers


try:
    from {PACKAGE} import {class_name}
except ImportError:
    from . import {BUNDLE}
    from .{BUNDLE} import {class_name}

    for _name in {REGISTERED!r}:
        setattr(diffusers, _name, getattr({BUNDLE}, _name))
'''


def write_repository_code(folder: str | os.PathLike[str]) -> None:
    """
    Writes `pipeline.py` and the bundle into a saved pipeline.

    Raises:
        `OSError`: `folder` holds no `model_index.json`.
        `ValueError`: Its pipeline is none of this package.
    """
    folder = Path(folder)
    class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if class_name not in REGISTERED:
        raise ValueError(f"{str(folder)!r} holds a {class_name}, allowed are pipelines of {PACKAGE}.")
    write_file(folder / "pipeline.py", make_pipeline_file(class_name))
    write_file(folder / f"{BUNDLE}.py", make_bundle())


def write_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# Cards


class CardFacts(NamedTuple):
    """What tells one variant's card from another's."""

    title: str
    what: str
    size: str
    steps: str
    weights: str


CARD_FACTS = {
    "base": CardFacts(
        "base",
        "The base model: a prompt, and if wanted a portrait or a voice, becomes a video of a person who speaks.",
        "about 256x448, five seconds",
        "32 steps with guidance 5 for video and sound, 2 for video in the lower half of the timesteps",
        "30.6 GB in bfloat16, 15.4 GB with float8 storage",
    ),
    "distill": CardFacts(
        "distilled",
        "The distilled model: the same as the base in a quarter of the steps and without guidance, so eight times"
        " fewer runs of the transformer.",
        "about 256x448, five seconds",
        "8 stochastic steps, no guidance",
        "30.6 GB in bfloat16, 15.4 GB with float8 storage",
    ),
    "sr-540p": CardFacts(
        "super-resolution to 540p",
        "Takes latents of the base or distilled model to 512x896 in latent space; the sound passes through.",
        "512x896",
        "5 steps from noise index 220, guidance off",
        "30.6 GB in bfloat16, 15.4 GB with float8 storage",
    ),
    "sr-1080p": CardFacts(
        "super-resolution to 1080p",
        "Takes latents of the base or distilled model to 1088x1920 in latent space; 32 of its 40 layers attend to the"
        " eleven frames on either side only. The sound passes through.",
        "1088x1920",
        "5 steps from noise index 220, guidance off",
        "30.6 GB in bfloat16, 15.4 GB with float8 storage",
    ),
    "turbo-vae": CardFacts(
        "Turbo VAE",
        "A light decoder, 107M parameters, for the latents of the Wan 2.2 VAE, whose encoder it can carry.",
        "any multiple of 16",
        "none",
        "0.4 GB in float32",
    ),
}
CARD_VARIANTS = tuple(CARD_FACTS)
TEMPLATES = {"base": "pipeline", "distill": "pipeline", "sr-540p": "transformer", "sr-1080p": "transformer"}


def make_model_card(variant: str, repo_id: str | None = None) -> str:
    """
    Makes the model card of a variant.

    Args:
        variant (`str`): One of `CARD_VARIANTS`.
        repo_id (`str`, *optional*): Repository that the examples load; `owner/magihuman-VARIANT` if left out.

    Returns:
        `str`: Markdown with metadata.

    Raises:
        `ValueError`: Another variant.
    """
    if variant not in CARD_FACTS:
        raise ValueError(f"`variant`={variant!r} must be one of {CARD_VARIANTS}.")
    facts = CARD_FACTS[variant]
    data = ModelCardData(
        library_name="diffusers",
        license="apache-2.0",
        base_model="GAIR/daVinci-MagiHuman",
        language=["zh", "yue", "en", "ja", "ko", "de", "fr"],
        pipeline_tag="text-to-video",
        tags=["diffusers", "magihuman", "video", "audio", "talking-head", "image-to-video", "audio-to-video"],
    )
    usage = read_template(TEMPLATES.get(variant, "autoencoder"))
    body = read_template("card").replace("{{ usage }}", usage)
    for key, value in {**facts._asdict(), "repo": repo_id or f"owner/magihuman-{variant}"}.items():
        body = body.replace(f"{{{{ {key} }}}}", value)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def make_licence_note() -> str:
    """Makes `NOTICE.md`: the parts of a repository that have other terms than the code."""
    return read_template("notice")


def read_template(name: str) -> str:
    return resources.files(PACKAGE).joinpath("templates", f"{name}.md").read_text(encoding="utf-8")
