# SPDX-License-Identifier: Apache-2.0
"""What a published repository holds besides weights: the code that loads it, its model card, its licence note."""

import json
import os
import shutil
from pathlib import Path

from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from huggingface_hub.utils import validate_repo_id


PACKAGE = Path(__file__).parents[1]
PIPELINES = {
    "MagiHumanAudioVideoPipeline": "pipeline_magihuman",
    "MagiHumanLatentUpscalePipeline": "pipeline_magihuman_latent_upscale",
}
COMPONENTS = {
    "AutoencoderKLMagiHumanTurbo": "autoencoder_kl_magihuman_turbo",
    "MagiHumanFlowScheduler": "scheduling_magihuman_flow",
    "MagiHumanTransformer3DModel": "transformer_magihuman",
}
CARD_VARIANTS = ("base", "distill", "sr-540p", "sr-1080p", "turbo-vae")

PIPELINE_FILE = '''# SPDX-License-Identifier: Apache-2.0
"""Loads this repository without the package diffusers-magihuman, if it is not installed."""

import diffusers


# Diffusers runs this file of every local directory in one and the same module, and allows one pipeline in it.
for _name in [name for name, value in globals().items() if isinstance(value, type)]:
    del globals()[_name]

try:
    from diffusers_magihuman import {pipeline}
except ImportError:
    # Of a local directory Diffusers copies what this file imports, so it imports every source.
    {imports}

    for _class in ({classes}):
        setattr(diffusers, _class.__name__, _class)
    del _class
'''


def write_repository_code(folder: str | os.PathLike[str]) -> None:
    """
    Writes `pipeline.py` and the sources that it needs where the package is not installed into a saved pipeline.

    Raises:
        `OSError`: `folder` holds no `model_index.json`, or cannot be written.
        `ValueError`: That file is damaged, or its pipeline is none of this package.
    """
    index = Path(folder) / "model_index.json"
    try:
        pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(index)!r} names no pipeline: {error!r}.") from error
    if pipeline not in PIPELINES:
        raise ValueError(f"{str(folder)!r} holds a {pipeline}, allowed are {', '.join(PIPELINES)}.")
    # On the Hub, Diffusers follows the sources' imports by this very function.
    first = [PACKAGE / f"{module}.py" for module in (PIPELINES[pipeline], *COMPONENTS.values())]
    sources = {Path(file) for source in first for file in (source, *get_relative_import_files(source))}
    for source in sources:
        shutil.copyfile(source, index.with_name(source.name))
    write_file(index.with_name("pipeline.py"), make_pipeline_file(pipeline, {source.stem for source in sources}))


def make_pipeline_file(pipeline: str, sources: set[str]) -> str:
    """Makes `pipeline.py`, which takes a pipeline out of the package if it is installed, else out of the sources."""
    classes = {pipeline: PIPELINES[pipeline], **COMPONENTS}
    names = {module: name for name, module in classes.items()}
    imports = [f"from .{source} import {names.get(source, '__name__ as _')}" for source in sorted(sources)]
    return PIPELINE_FILE.format(pipeline=pipeline, imports="\n    ".join(imports), classes=", ".join(classes))


def make_model_card(variant: str, repo_id: str | None = None) -> str:
    """
    The model card of one of `CARD_VARIANTS`, whose examples load `repo_id`, or else `owner/magihuman-VARIANT`.

    Raises:
        `ValueError`: Another variant, or what is no name of a repository.
    """
    if variant not in CARD_VARIANTS:
        raise ValueError(f"`variant`={variant!r} must be one of {CARD_VARIANTS}.")
    card = (PACKAGE / "model_cards" / f"{variant}.md").read_text(encoding="utf-8")
    if repo_id is None:
        return card
    validate_repo_id(repo_id)
    return card.replace(f"owner/magihuman-{variant}", repo_id)


def make_licence_note() -> str:
    """Makes `NOTICE.md`: the parts of a repository that have other terms than the code."""
    return (PACKAGE / "model_cards" / "NOTICE.md").read_text(encoding="utf-8")


def write_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
