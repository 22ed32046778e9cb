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
import symtable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from huggingface_hub import ModelCard, ModelCardData


PACKAGE = "diffusers_magihuman"
BUNDLE = "magihuman_bundle"
# What importing the package has put on diffusers.
REGISTERED = tuple(name for name in importlib.import_module(PACKAGE).__all__ if hasattr(diffusers, name))
PIPELINES = tuple(name for name in REGISTERED if issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline))


# The code


def make_bundle() -> str:
    """
    Makes one flat module of the package's own sources, for `trust_remote_code=True` without the package.

    Diffusers copies only direct relative imports of `pipeline.py`, so the module has none.

    Raises:
        `ValueError`: Two sources give one name two meanings, or one imports from the package in a way that cannot be
            left out.
    """
    package = importlib.import_module(PACKAGE)
    sources: dict[str, str] = {}
    for class_name in REGISTERED:
        collect_sources(getattr(package, class_name).__module__.removeprefix(f"{PACKAGE}."), sources)
    header = inspect.getsource(package).split('"""')[0]
    origin = (
        f"# Generated from the sources of diffusers-magihuman {package.__version__}; change them, not this file.\n"
    )
    return header + origin + flatten_sources(sources)


def flatten_sources(sources: dict[str, str]) -> str:
    """Joins modules, given in the order in which they need each other, to one."""
    parts = []
    owners: dict[str, tuple[str, Any]] = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        for bound, meaning in bindings(tree).items():
            owner, other = owners.setdefault(bound, (name, meaning))
            if meaning != other:
                raise ValueError(f"`{bound}` stands for different things in {owner}.py and in {name}.py.")
        parts.append(f"\n\n# {name}.py\n\n{without_relative_imports(name, source, tree)}")
    return "".join(parts)


def collect_sources(name: str, sources: dict[str, str]) -> None:
    """Adds a module's source after those of the modules that it imports from the package."""
    if name in sources:
        return
    source = inspect.getsource(importlib.import_module(f"{PACKAGE}.{name}"))
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            collect_sources(node.module, sources)
    sources[name] = source


def bindings(tree: ast.Module) -> dict[str, Any]:
    """The names that a module binds, less those of the package: the object behind an import, else the statement."""
    bound = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                bound[alias.asname or alias.name] = getattr(importlib.import_module(node.module), alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                bound[name] = importlib.import_module(alias.name if alias.asname else name)
        elif not isinstance(node, ast.ImportFrom):
            statement = ast.unparse(node)
            symbols = symtable.symtable(statement, "", "exec").get_symbols()
            bound |= {symbol.get_name(): statement for symbol in symbols if symbol.is_assigned()}
    return bound


def without_relative_imports(name: str, source: str, tree: ast.Module) -> str:
    """The source from its docstring on, less its imports from the package."""
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node not in tree.body or node.module is None or any(alias.asname for alias in node.names):
            raise ValueError(
                f"{name}.py, line {node.lineno}: `{ast.unparse(node)}` cannot be bundled; import names from a module"
                " of the package, unchanged and at the top, or absolutely what is not needed without the package."
            )
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


# Diffusers runs this file of every local directory in one and the same module, and allows one pipeline in it.
for _name in [name for name, value in globals().items() if isinstance(value, type)]:
    del globals()[_name]

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
        `OSError`: `folder` holds no `model_index.json`, or cannot be written.
        `ValueError`: That file is damaged, or its pipeline is none of this package.
    """
    index = Path(folder) / "model_index.json"
    try:
        class_name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(index)!r} names no pipeline: {error!r}.") from error
    if class_name not in PIPELINES:
        raise ValueError(f"{str(folder)!r} holds a {class_name}, allowed are pipelines of {PACKAGE}: {PIPELINES}.")
    write_file(index.with_name(f"{BUNDLE}.py"), make_bundle())
    write_file(index.with_name("pipeline.py"), make_pipeline_file(class_name))


def write_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# Cards


class CardFacts(NamedTuple):
    """What tells one variant's card from another's."""

    template: str
    pipeline_tag: str | None
    tags: list[str]
    title: str
    what: str
    size: str = ""
    sampling: str = ""


TALKING = ["audio", "talking-head", "lip-sync", "image-to-video", "audio-to-video", "text-to-audio"]
CARD_FACTS = {
    "base": CardFacts(
        "pipeline",
        "text-to-video",
        TALKING,
        "base",
        "The base model: a prompt, and if wanted a portrait or a voice, becomes a video of a person who speaks.",
        "256x448",
        "32 steps with guidance 5 for video and sound, 2 for video in the lower half of the timesteps",
    ),
    "distill": CardFacts(
        "pipeline",
        "text-to-video",
        TALKING,
        "distilled",
        "The distilled model: the same as the base in a quarter of the steps and without guidance, so eight times"
        " fewer runs\nof the transformer.",
        "256x448",
        "8 stochastic steps, no guidance",
    ),
    "sr-540p": CardFacts(
        "upscale",
        "video-to-video",
        ["super-resolution"],
        "super-resolution to 540p",
        "Takes the latents of the base or distilled model to 512x896 without leaving latent space. The sound stays as"
        " it is.",
        "512x896, 14,336 video tokens for five seconds, four times those of 256x448",
        "5 steps from noise index 220, guidance off",
    ),
    "sr-1080p": CardFacts(
        "upscale",
        "video-to-video",
        ["super-resolution"],
        "super-resolution to 1080p",
        "Takes the latents of the base or distilled model to 1088x1920 without leaving latent space. The sound stays"
        " as it is.\nIn 32 of its 40 layers a frame attends only to the 11 on either side, besides sound and text.",
        "1088x1920, 65,280 video tokens for five seconds, 18 times those of 256x448",
        "5 steps from noise index 220, guidance off",
    ),
    "turbo-vae": CardFacts(
        "autoencoder",
        None,
        ["autoencoder"],
        "Turbo VAE",
        "A light decoder for the latents of the Wan 2.2 VAE, whose encoder it can carry. It slides a window over the"
        " frames, so\nits memory hardly grows with the length of the video.",
    ),
}
CARD_VARIANTS = tuple(CARD_FACTS)


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
        pipeline_tag=facts.pipeline_tag,
        tags=["diffusers", "magihuman", "video", *facts.tags],
    )
    values = {
        "template": read_template(facts.template),
        "prompts": read_template("prompts"),
        "parts": read_template("parts"),
        "title": facts.title,
        "what": facts.what,
        "size": facts.size,
        "sampling": facts.sampling,
        "repo": repo_id or f"owner/magihuman-{variant}",
    }
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{fill_template('card', values)}"))


def make_licence_note() -> str:
    """Makes `NOTICE.md`: the parts of a repository that have other terms than the code."""
    return fill_template("notice", {"parts": read_template("parts")})


def fill_template(name: str, values: dict[str, str]) -> str:
    """A template with its `{{ name }}` replaced, in the order of `values`: early ones may hold later ones."""
    text = read_template(name) + "\n"
    for key, value in values.items():
        text = text.replace(f"{{{{ {key} }}}}", value)
    return text


def read_template(name: str) -> str:
    return resources.files(PACKAGE).joinpath("templates", f"{name}.md").read_text(encoding="utf-8").rstrip("\n")
