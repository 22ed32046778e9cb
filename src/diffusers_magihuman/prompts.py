# SPDX-License-Identifier: Apache-2.0
"""Prompts in the form that the models were trained on; imports nothing heavy, as the command builds them too."""

import re
from collections.abc import Sequence

from .files import show

# Letters of Chinese, Japanese and Korean: kana, ideographs, Hangul.
CJK = r"[々぀-ゟ゠-ヺー-ヿ㐀-䶿一-鿿가-힣豈-﫿\U00020000-\U0003ffff]"
HEADER = re.compile(r"^(Dialogue|Background Sound):", re.MULTILINE)
BRACKET = re.compile("[<>]")
QUOTED = re.compile(r'["“]([^"“”]+)["”]')


def format_prompt(
    description: str, dialogue: Sequence[tuple[str, str, str]] | None = None, background_sound: str | None = None
) -> str:
    """
    A prompt of three parts as the models were trained on: what is seen, what is said, what else is heard.

    Chinese, Japanese and Korean letters are set apart by spaces, and a line that the description does not have is
    added to its end, as each stood in both parts in the training.

    Args:
        description (`str`):
            Looks, place, face and voice in the order of time, with a static camera; in English, of 150 to 200 words
            for the published models.
        dialogue (`list[tuple[str, str, str]]`, *optional*):
            Who speaks, in about five words, the language, and the line, for each line; without it there is no such
            part. Double quotes, which end a line, become single ones.
        background_sound (`str`, *optional*):
            The most prominent one; by default there is none.

    Returns the prompt. `ValueError`: a part is empty or no string, or holds what would end it.
    """
    check_text("description", description, HEADER)
    description, lines = space(description.strip()), []
    if dialogue is not None and not (isinstance(dialogue, list | tuple) and dialogue):
        raise ValueError(f"`dialogue`={show(dialogue)} must be a list of (who, language, line), not empty.")
    for index, entry in enumerate(dialogue or ()):
        name = f"dialogue[{index}]"
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ValueError(f"`{name}`={show(entry)} must be (who, language, line).")
        who, language, line = map(check_text, (name,) * 3, entry, (BRACKET, BRACKET, None))
        quoted = QUOTED.fullmatch(line)
        line = (quoted[1] if quoted else line).replace('"', "'")
        lines.append(f'<{who}, {language}>: "{line}"')
        description += "" if line in description else f' {who} says, "{line}"'
    sound = "No prominent background sound" if background_sound is None else background_sound
    dialogue = ["\n".join(["Dialogue:", *lines])] if lines else []
    return "\n\n".join([description, *dialogue, f"Background Sound:\n<{check_text('background_sound', sound)}>"])


def check_text(name: str, value: str, forbidden: re.Pattern | None = BRACKET) -> str:
    """Returns a text in one line, spaced as the models know it; it must hold something, but not what ends it."""
    if not isinstance(value, str) or not value.strip('"“”\n\t '):
        raise ValueError(f"`{name}`={show(value)} must be a string that is not empty.")
    if forbidden is not None and (found := forbidden.search(value)):
        raise ValueError(f"`{name}`={show(value)} must be a text without {found[0]!r}, which begins or ends a part.")
    return space(" ".join(value.split()))


def space(text: str) -> str:
    return re.sub(f"(?<={CJK})(?={CJK})", " ", text)


def count_words(prompt: str) -> int:
    """Words of the description of a prompt."""
    return len(HEADER.split(prompt, maxsplit=1)[0].split())
