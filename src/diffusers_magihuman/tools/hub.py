# SPDX-License-Identifier: Apache-2.0
"""What a published repository holds besides weights: the code that loads it, its model card, its licence note."""

import json
import os
import re
from argparse import Namespace
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

from ..checks import show
from ..constants import CARD_VARIANTS, CLASSES, COMPONENT_MODULES, MODULAR_PIPELINES, PIPELINE_MODULES
from ..conversion import check_variant
from ..files import write_text
from ..registration import pipeline_of_base_or_distilled

PACKAGE = Path(__file__).parents[1]

CODE_FILE = '''# SPDX-License-Identifier: Apache-2.0
"""Loads this repository without the package diffusers-magihuman, if it is not installed."""

import diffusers

# Diffusers runs this file of every local directory in one and the same module, and allows one pipeline in it.
for _name in [name for name, value in globals().items() if isinstance(value, type)]:
    del globals()[_name]

try:
    from diffusers_magihuman import {wanted}
except ImportError:
    # Of a local directory Diffusers copies what this file imports, so it imports every source.
    {imports}
    vars(diffusers).update({{_class.__name__: _class for _class in ({classes})}})
'''
REGISTRATION = """\
    from diffusers.modular_pipelines import modular_pipeline as _modular
    from diffusers.pipelines import auto_pipeline as _auto

    register_modular_pipelines(_modular)
    register_auto_pipelines(_auto, globals().__getitem__)
"""
REGISTER = {"register_auto_pipelines": "registration", "register_modular_pipelines": "registration"}


def write_repository_code(folder: str | os.PathLike[str]) -> None:
    """Writes what loads a saved pipeline where the package is not installed: `pipeline.py` for one with a
    `model_index.json`, and `handler.py` and `requirements.txt`, of which an Inference Endpoint serves it; for its
    blocks `modular_config.json`, which names `modular_blocks.py`; the sources they need.

    Raises an `OSError` if `folder` holds no index, a `ValueError` if that names no pipeline of ours.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"`folder`={show(folder)} must be a path.")
    plain, modular = (Path(folder) / name for name in ("model_index.json", "modular_model_index.json"))
    pipelines = list(MODULAR_PIPELINES.values())
    files = {"modular_blocks.py": ([name for name in CLASSES if name.endswith("AutoBlocks")], CLASSES | REGISTER)}
    if plain.is_file() or not modular.is_file():
        pipeline, config = read_index(plain, [*PIPELINE_MODULES])
        files["pipeline.py"] = ([pipeline], {pipeline: PIPELINE_MODULES[pipeline]} | COMPONENT_MODULES)
        write_text(Path(folder) / "handler.py", (PACKAGE / "tools/handler.py").read_text(encoding="utf-8"))
        needed = [f"{line}\n" for line in requires("diffusers-magihuman") if "extra ==" not in line]
        write_text(Path(folder) / "requirements.txt", "".join(needed))
        is_base = pipeline == "MagiHumanAudioVideoPipeline"
        blocks = pipeline_of_base_or_distilled(config) if is_base else pipelines[-1]
    if modular.is_file():
        blocks, _ = read_index(modular, pipelines)
    blocks = blocks.replace("ModularPipeline", "AutoBlocks")
    for name, (wanted, classes) in files.items():
        sources = find_sources([PACKAGE / f"{module.replace('.', '/')}.py" for module in classes.values()])
        for source in sources:
            # All lie in one folder there. From the Hub, Diffusers gets a source anew for each chain of imports that
            # leads to it, thousands of times; without the space it sees those of the file that it runs alone.
            text = re.sub(r"^from \.+(?=\w)", "from.", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
            write_text(Path(folder) / source.name, text)
        write_text(Path(folder) / name, make_code_file(wanted, classes, {source.stem for source in sources}))
    config = {"_class_name": blocks, "auto_map": {"ModularPipelineBlocks": f"modular_blocks.{blocks}"}}
    write_text(Path(folder) / "modular_config.json", json.dumps(config, indent=2) + "\n")


def read_index(path: Path, pipelines: list[str]) -> tuple[str, dict[str, Any]]:
    """The pipeline that an index names, one of `pipelines`, and its config."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return pipelines[pipelines.index(config["_class_name"])], config
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} must name one of the pipelines {pipelines}: {error!r}.") from error


def find_sources(sources: list[Path]) -> set[Path]:
    """These and all that they import."""
    sources = list(sources)
    for source in sources:
        for dots, name in re.findall(r"^from (\.+)(\w+) import", source.read_text(encoding="utf-8"), re.MULTILINE):
            sources += {source.parents[len(dots) - 1] / f"{name}.py"} - {*sources}
    return {*sources}


def make_code_file(wanted: list[str], classes: dict[str, str], sources: set[str]) -> str:
    """Makes a file that takes the wanted classes out of the package if it is installed, else out of the sources."""
    names = {x: [name for name, module in classes.items() if module.split(".")[-1] == x] for x in sources}
    imports = [f"from .{x} import {', '.join(names[x]) or '__name__ as _'}" for x in sorted(sources)]
    registered = ", ".join(name for name in classes if name not in REGISTER)
    code = CODE_FILE.format(wanted=", ".join(wanted), imports="\n    ".join(imports), classes=registered)
    return code + REGISTRATION if REGISTER.keys() <= classes.keys() else code


def make_model_card(variant: str, repo_id: str | None = None) -> str:
    """The model card of one of `CARD_VARIANTS`, whose examples load `repo_id`, or else `owner/magihuman-VARIANT`;
    `ValueError` for another variant, and for what is no name of a repository."""
    variant = check_variant(variant, CARD_VARIANTS)
    default = f"owner/magihuman-{variant}"
    repo_id = default if repo_id is None else repo_id
    if not re.fullmatch(r"[\w./-]+", str(repo_id), re.ASCII):  # some versions of the next let a line break pass
        raise ValueError(f"`repo_id`={show(repo_id)} is no Repo id, 'owner/name'.")
    validate_repo_id(repo_id)
    return (PACKAGE / "model_cards" / f"{variant}.md").read_text(encoding="utf-8").replace(default, repo_id)


def make_licence_note() -> str:
    """Makes `NOTICE.md`: the parts of a repository that have other terms than the code."""
    return (PACKAGE / "model_cards" / "NOTICE.md").read_text(encoding="utf-8")


def run_card(arguments: Namespace) -> None:
    card = make_model_card(arguments.variant)
    if arguments.output is None:
        print(card, end="")
    else:
        write_text(arguments.output, card)
