# SPDX-License-Identifier: Apache-2.0
"""Has mkdocstrings read docstrings of Diffusers' style: names as [`Name`] become links, types lose their marks."""

import re
from pathlib import Path
from typing import Any

import griffe

PATHS = re.findall(r"^::: (\S+)", (Path(__file__).parent / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
TARGETS = {path.rpartition(".")[2]: path for path in PATHS}
NAME = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")
ARGUMENT = re.compile(r"^    ([\w*]+(?:, \w+)*) \((.+?)\): ", re.MULTILINE)
KIND = re.compile(r"^    ((?:\[?`[^`]+`\]?(?: or | of )?)+): ", re.MULTILINE)  # of what is returned, or raised


def link(match: re.Match[str]) -> str:
    """To the last name of `module.Class.method` that has a section."""
    names = match[2].split(".")
    shown = names[-1] if match[1] else ".".join(names)
    path = next((TARGETS[name] for name in reversed(names) if name in TARGETS), None)
    return f"`{shown}`" if path is None else f"[`{shown}`][{path}]"


def plain(text: str) -> str:
    return re.sub(r"[`*\[\]~]", "", text)


def describe(match: re.Match[str]) -> str:
    kind = re.sub(r"\[`~?(\w+)`\]", r"\1", match[2]).replace("`", "").replace("*", "")
    if "," not in match[1]:  # one argument, whose default is read from the signature
        kind = re.sub(r", (defaults to .+|optional)$", "", kind)
    return f"    {match[1]} ({kind}): "


class DiffusersDocstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = KIND.sub(lambda match: f"    {plain(match[1])}: ", obj.docstring.value)
            obj.docstring.value = NAME.sub(link, ARGUMENT.sub(describe, text))
