# SPDX-License-Identifier: Apache-2.0
"""Draws the moving pictures of the README and of `docs/gallery.md`: clips of the tiny models above what was asked for.

    python examples/nano/gallery.py

Run it again whenever the models of the package are trained anew: looks and lines are the table below, seeds are fixed.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, format_prompt
from diffusers_magihuman.files import move_into_place, unfinished_folder

IMAGES = Path(__file__).parents[2] / "docs" / "images"
MARGIN, LINE_HEIGHT = 8, 18


class Wish(NamedTuple):
    look: str
    voice: str
    language: str
    line: str

    @property
    def prompt(self) -> str:
        return format_prompt(f"{self.look}, with a {self.voice} voice.", [("Speaker", self.language, self.line)])


WISHES = (
    Wish(
        "A woman with tan skin and long red hair, no glasses, in a green shirt, before a blue wall",
        "high",
        "English",
        "hello, one",
    ),
    Wish(
        "A man with dark skin, short black hair and glasses, in a yellow jumper, before a green wall",
        "deep",
        "French",
        "bonjour",
    ),
    Wish(
        "A lady with pale skin and a white bob, without glasses, in a blue top, before a yellow wall",
        "medium",
        "Mandarin",
        "ni hao",
    ),
    Wish("A bald man with glasses, in a purple shirt, before a grey wall", "deep", "German", "eins, zwei"),
    Wish(
        "A person with curly brown hair, no glasses, in a red shirt, before a purple wall",
        "high",
        "Japanese",
        "hai, arigato",
    ),
    Wish(
        "A woman with long blond hair and glasses, in a grey sweater, before a pink wall",
        "high",
        "Korean",
        "annyeong, hana",
    ),
)


class Clip(NamedTuple):
    frames: np.ndarray  # (num_frames, height, width, 3), in [0, 1]
    audio: np.ndarray
    caption: str


def generate(pipe: DiffusionPipeline, wish: Wish, seed: int, caption: str | None = None, **given: object) -> Clip:
    output = pipe(wish.prompt, generator=torch.Generator().manual_seed(seed), **given)
    return Clip(output.frames[0], output.audio[0], caption or f"“{wish.line}”, {wish.language}\n{wish.look}")


def make_prompted(pipe: DiffusionPipeline) -> list[Clip]:
    return [generate(pipe, wish, seed) for seed, wish in enumerate(WISHES)]


def make_given(pipe: DiffusionPipeline, clips: list[Clip]) -> list[Clip]:
    """The first face with other lines, then the second voice in other faces."""
    face, voice = clips[0].frames[0], (clips[1].audio, pipe.audio_sampling_rate)
    says = [
        generate(pipe, wish, 7, f"the first frame given,\n“{wish.line}”, {wish.language}", image=face)
        for wish in (WISHES[0]._replace(language=each.language, line=each.line) for each in WISHES[1:4])
    ]
    lips = [
        generate(pipe, wish, 7, f"the voice given\n{wish.look}", audio=voice)
        for wish in (WISHES[1]._replace(look=each.look) for each in WISHES[2:5])
    ]
    return says + lips


def make_upscaled(pipe: DiffusionPipeline, upscale: DiffusionPipeline) -> list[Clip]:
    """Low resolution as it is, enlarged, beside what the upscaler makes of its latents."""
    wish = WISHES[2]
    low = pipe(wish.prompt, generator=torch.manual_seed(2), output_type="latent")
    high = upscale(wish.prompt, latents=low.frames, audio_latents=low.audio, generator=torch.manual_seed(2))
    size = "x".join(map(str, high.frames.shape[2:4]))
    return [
        generate(pipe, wish, 2, "low resolution, enlarged"),
        Clip(high.frames[0], high.audio[0], f"upscaled to {size}"),
    ]


def draw(clips: list[Clip], path: Path, columns: int, size: int, quality: int) -> None:
    """Saves clips side by side, each frame `size` pixels wide, with their captions below, as a picture that moves."""
    font = PIL.ImageFont.load_default(LINE_HEIGHT - 6)
    captions = ["\n".join(wrap(line, font, size) for line in clip.caption.splitlines()) for clip in clips]
    num_lines = max(len(caption.splitlines()) for caption in captions)
    cell = size + 2 * MARGIN, size + 2 * MARGIN + num_lines * LINE_HEIGHT
    sheets = []
    for moment in range(min(len(clip.frames) for clip in clips)):
        sheet = PIL.Image.new("RGB", (columns * cell[0], -(-len(clips) // columns) * cell[1]), "white")
        pen = PIL.ImageDraw.Draw(sheet)
        for number, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
            left, top = (number % columns) * cell[0] + MARGIN, (number // columns) * cell[1] + MARGIN
            frame = PIL.Image.fromarray(np.round(clip.frames[moment] * 255).astype(np.uint8))
            sheet.paste(frame.resize((size, size), PIL.Image.Resampling.LANCZOS), (left, top))
            pen.multiline_text((left, top + size + 3), caption, fill="#333", font=font, spacing=3)
        sheets.append(sheet)
    with unfinished_folder(path) as folder:
        first, *others = sheets
        first.save(folder / path.name, save_all=True, append_images=others, duration=40, loop=0, quality=quality)
        move_into_place(folder / path.name, path)


def wrap(line: str, font: PIL.ImageFont.FreeTypeFont, width: int) -> str:
    lines = [""]
    for word in line.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder to write, default: docs/images")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    pipe, upscale = (DiffusionPipeline.from_pretrained(embedded_model(name)) for name in ("distilled", "upscale"))
    clips = make_prompted(pipe)
    draw(clips, output / "clips.webp", columns=3, size=192, quality=60)
    draw(make_given(pipe, clips), output / "given.webp", columns=3, size=160, quality=50)
    draw(make_upscaled(pipe, upscale), output / "upscaled.webp", columns=2, size=256, quality=60)


if __name__ == "__main__":
    main()
