# SPDX-License-Identifier: Apache-2.0
"""The tiny models that come with the package."""

import json
import os
import re
from pathlib import Path

from ..constants import spell_variant
from ..files import show
from ..prompts import CJK, QUOTED

EMBEDDED_MODELS = ("distilled", "base", "upscale")
TINY_NAMES = {"tiny": "distilled", "tiny-base": "base"}  # that commands take
TINY_UPSCALE_NAMES = {"tiny": "upscale"}


def embedded_model(name: str = "distilled") -> str:
    """
    Path of a tiny model of drawn people who speak, which needs no download and no GPU.

    Three Diffusers directories for `DiffusionPipeline.from_pretrained`. Unless asked for other sizes and lengths, they
    make 49 frames of 128x128 pixels, or 256x256 with `"upscale"`, of a person who knows nine words of each of seven
    languages. The model card beside them tells what a prompt may ask for and how well it is followed; the recipes that
    made them are `examples/nano`.

    Args:
        name (`str`, defaults to `"distilled"`):
            `"distilled"`: 8 steps without guidance. `"base"`: 32 steps with guidance. `"upscale"`: a
            [`MagiHumanLatentUpscalePipeline`] that doubles the size of what the other two make.

    Returns the path of the directory. `ValueError`: there is no model of this name.
    """
    if not isinstance(name, str) or spell_variant(name) not in EMBEDDED_MODELS:
        raise ValueError(f"`name`={show(name)} must be one of {EMBEDDED_MODELS}.")
    return str(Path(__file__).parents[1] / "embedded_models" / spell_variant(name))


def is_repository(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def find_model(option: str, name: str, tiny_names: dict[str, str]) -> str:
    """The directory or repository that is meant, or that of a tiny model by the name that commands take, which a
    directory of that name goes before; `OSError` for what is none of them."""
    if os.path.isdir(name) or (not os.path.exists(name) and is_repository(name)):
        return name
    if name in tiny_names:
        return embedded_model(tiny_names[name])
    allowed = "a directory that exists", "a repository 'owner/name'", *map(repr, tiny_names)
    raise OSError(f"{option} {show(name)} is neither {' nor '.join(allowed)}.")


def describe_line(model: str, prompt: str) -> str:
    """Which words of the lines in quotes a tiny model can say; empty if it can say all, and for other models."""
    if model not in map(embedded_model, EMBEDDED_MODELS):
        return ""
    words = json.loads((Path(model).parent / "words.json").read_text(encoding="utf-8"))
    # Longer ones first; letters that have no spaces between them may have got some, and begin anywhere.
    spellings = [
        r"\s?".join(word) if re.match(CJK, word) else rf"(?<!\w){re.escape(word)}(?!\w)"
        for word in sorted(words, key=len, reverse=True)
    ]
    spoken = re.compile("|".join(spellings), re.IGNORECASE)
    known, others = {}, {}
    for line in QUOTED.findall(prompt):
        known |= dict.fromkeys(spoken.findall(line))
        others |= dict.fromkeys(re.findall(r"\w[\w'’-]*", spoken.sub(" ", line)))
    if not others:
        return ""
    return f"Of the line, the tiny model knows {', '.join(known) or 'no word'}, and passes over {', '.join(others)}."
