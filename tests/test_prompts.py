# SPDX-License-Identifier: Apache-2.0
"""Prompts in the form that the models were trained on."""

import re

import numpy as np
import pytest
from clips import make_scene
from prompts import make_prompt

from diffusers_magihuman import format_prompt
from diffusers_magihuman.prompts import count_words, space

QUIET = "\n\nBackground Sound:\n<No prominent background sound>"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("A man\nsits.",), "A man\nsits." + QUIET),
        (("A man sits.", None, "Rain"), "A man sits.\n\nBackground Sound:\n<Rain>"),
        (  # the line is in both parts, once in each
            ('He says, "Hi."', [("Man", "English", "Hi.")]),
            'He says, "Hi."\n\nDialogue:\n<Man, English>: "Hi."' + QUIET,
        ),
        (
            ("Two sit.", (("Anna", "French", " Bon\njour "), ("A man", "German", '"Guten Tag."'))),
            'Two sit. Anna says, "Bon jour" A man says, "Guten Tag."\n\n'
            'Dialogue:\n<Anna, French>: "Bon jour"\n<A man, German>: "Guten Tag."' + QUIET,
        ),
        (
            ("One.", [["Man", "English", 'He called me "old".']]),
            "One. Man says, \"He called me 'old'.\"\n\nDialogue:\n<Man, English>: \"He called me 'old'.\"" + QUIET,
        ),
        (
            ("她说“你好”, OK中文", [("Woman", "Mandarin", "你好，世界 abc"), ("Man", "Korean", "나비 번알")], "雨声"),
            '她 说“你 好”, OK中 文 Woman says, "你 好，世 界 abc" Man says, "나 비 번 알"\n\n'
            'Dialogue:\n<Woman, Mandarin>: "你 好，世 界 abc"\n<Man, Korean>: "나 비 번 알"\n\n'
            "Background Sound:\n<雨 声>",
        ),
        (("x", [("A", "Japanese", "カメラが々ーン")]), None),
    ],
)
def test_three_parts(arguments, expected):
    prompt = format_prompt(*arguments)
    assert prompt == expected if expected else "カ メ ラ が 々 ー ン" in prompt
    if len(arguments) < 2:
        assert count_words(prompt) == len(arguments[0].split())


@pytest.mark.parametrize("seed", range(8))
def test_prompts_of_the_tiny_models_are_of_this_form(seed):
    rng = np.random.default_rng(seed)
    prompt = space(make_prompt(rng, make_scene(rng, seconds=2), parts=3))
    description, *dialogue, background = prompt.split("\n\n")
    parts = re.fullmatch(r'Dialogue:\n<(.+), (.+)>: "(.+)"', *dialogue).groups() if dialogue else None
    sound = background.removeprefix("Background Sound:\n<").removesuffix(">")
    formatted = format_prompt(description, [parts] if parts else None, sound)
    assert formatted.startswith(description) and formatted.split("\n\n")[1:] == [*dialogue, background]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((" ",), "`description`=' '"),
        ((None,), "`description`=None"),
        (("A man.\nDialogue: x",), "'Dialogue:', which begins or ends a part"),
        (("A man.", []), r"`dialogue`=\[\] must be a list of \(who, language, line\)"),
        (("A man.", "Anna, French: bonjour"), "`dialogue`='Anna"),
        (("A man.", [("Anna", "bonjour")]), r"`dialogue\[0\]`=\('Anna', 'bonjour'\) must be \(who"),
        (("A man.", [("Anna", "French", "a"), ("Anna", "", "b")]), r"`dialogue\[1\]`=''"),
        (("A man.", [("Anna", "French", '""')]), r"`dialogue\[0\]`"),
        (("A man.", [("Anna>", "French", "a")]), "without '>'"),
        (("A man.", None, ""), "`background_sound`=''"),
        (("A man.", None, "<rain>"), "without '<'"),
    ],
)
def test_what_would_break_the_form(arguments, message):
    with pytest.raises(ValueError, match=message):
        format_prompt(*arguments)
