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
    "autoencoder_kl_magihuman_turbo": "AutoencoderKLMagiHumanTurbo",
    "scheduling_magihuman_flow": "MagiHumanFlowScheduler",
    "transformer_magihuman": "MagiHumanTransformer3DModel",
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
    vars(diffusers).update({{_class.__name__: _class for _class in ({classes})}})
'''


def write_repository_code(folder: str | os.PathLike[str]) -> None:
    """Writes `pipeline.py` and the sources that it needs where the package is not installed into a saved pipeline.

    Raises an `OSError` if `folder` holds no `model_index.json`, a `ValueError` if that names no pipeline of ours.
    """
    index = Path(folder) / "model_index.json"
    try:
        pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        first = [PACKAGE / f"{module}.py" for module in (PIPELINES[pipeline], *COMPONENTS)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(index)!r} must name one of the pipelines {[*PIPELINES]}: {error!r}.") from error
    # On the Hub, Diffusers follows the sources' imports by this very function.
    sources = {Path(file) for source in first for file in (source, *get_relative_import_files(source))}
    for source in sources:
        shutil.copyfile(source, index.with_name(source.name))
    index.with_name("pipeline.py").write_text(make_pipeline_file(pipeline, {path.stem for path in sources}), "utf-8")


def make_pipeline_file(pipeline: str, sources: set[str]) -> str:
    """Makes `pipeline.py`, which takes a pipeline out of the package if it is installed, else out of the sources."""
    names = {PIPELINES[pipeline]: pipeline, **COMPONENTS}
    imports = [f"from .{source} import {names.get(source, '__name__ as _')}" for source in sorted(sources)]
    return PIPELINE_FILE.format(pipeline=pipeline, imports="\n    ".join(imports), classes=", ".join(names.values()))


def make_model_card(variant: str, repo_id: str | None = None) -> str:
    """The model card of one of `CARD_VARIANTS`, whose examples load `repo_id`, or else `owner/magihuman-VARIANT`."""
    if variant not in CARD_VARIANTS:
        raise ValueError(f"`variant`={variant!r} must be one of {CARD_VARIANTS}.")
    default = f"owner/magihuman-{variant}"
    repo_id = default if repo_id is None else repo_id
    validate_repo_id(repo_id)
    return (PACKAGE / "model_cards" / f"{variant}.md").read_text(encoding="utf-8").replace(default, repo_id)


def make_licence_note() -> str:
    """Makes `NOTICE.md`: the parts of a repository that have other terms than the code."""
    return (PACKAGE / "model_cards" / "NOTICE.md").read_text(encoding="utf-8")
