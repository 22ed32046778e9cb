# SPDX-License-Identifier: Apache-2.0
"""Expands a short prompt by an instruct model of Transformers, with a portrait by one that sees:

    python examples/enhance_prompt.py MODEL "a baker at dawn" --dialogue "Old baker, French: Bonjour." > prompt.txt
    magihuman generate --prompt-file prompt.txt --model DIR_OR_REPO

MODEL is for example Qwen/Qwen3-4B-Instruct-2507, or Qwen/Qwen3-VL-4B-Instruct with `--image portrait.png`. Without it
the request is printed, to be put to any other model.
"""

import argparse
import re
import sys

from transformers import pipeline, set_seed

from diffusers_magihuman import format_prompt
from diffusers_magihuman.media import load_images
from diffusers_magihuman.prompts import HEADER
from diffusers_magihuman.tools.cli import read_line

REQUEST = """Rewrite what follows as the description of a video of someone who speaks before a camera that never moves.
One paragraph in English of 150 to 200 words, in the order in which things happen: looks, clothes and place; the shot
and the light; the mood; then each movement of brows, eyes, lips, jaw and head, which are small, while the body stays
where it is. Where a line is spoken, have it in double quotes, word for word in its own language, and say after it how
the voice sounds: tone, pace, pitch and volume. Name what is seen and heard, without comparisons. {portrait}Answer with
the paragraph alone.

{prompt}
{lines}"""
PORTRAIT = "The picture is the first frame: describe the person and the place as they are there. "
SOUND = "Name the one sound, in at most eight words, that is heard behind the voice in this scene: {prompt}"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?")
parser.add_argument("prompt", nargs="?", default="a woman in a library, who is glad to see you")
parser.add_argument("--dialogue", action="append", type=read_line, metavar="'WHO, LANGUAGE: LINE'")
parser.add_argument("--background-sound", help="default: what the model thinks of")
parser.add_argument("--image", help="portrait, for a model that sees")
arguments = parser.parse_args()

lines = "\n".join('{} says in {}: "{}"'.format(*map(str.strip, line)) for line in arguments.dialogue or [])
request = REQUEST.format(portrait=PORTRAIT * (arguments.image is not None), prompt=arguments.prompt, lines=lines)
if arguments.model is None:
    sys.exit(print(request))
images = [] if arguments.image is None else [{"type": "image", "image": load_images(arguments.image)[0]}]
chat = pipeline("image-text-to-text" if images else "text-generation", arguments.model)
set_seed(42)


def ask(text: str) -> str:
    content = [*images, {"type": "text", "text": text}] if images else text
    answer = chat([{"role": "user", "content": content}], max_new_tokens=600, return_full_text=False)
    return answer[0]["generated_text"].split("</think>")[-1].strip()


description = HEADER.split(ask(request))[0]
sound = arguments.background_sound or re.sub("[<>]", "", ask(SOUND.format(prompt=arguments.prompt)))
if not 100 <= (count := len(description.split())) <= 250:
    print(f"The model's description has {count} words; 150 to 200 were asked for.", file=sys.stderr)
print(format_prompt(description, arguments.dialogue, sound))
