# SPDX-License-Identifier: Apache-2.0
"""Clips of speaking people, drawn and synthesised: each follows from its seed, and its prompt says most of it.

`people.py` draws, `words.py` speaks and `prompts.py` describes. One in five combinations of looks is held out:
`make_scene` draws it only when asked. One clip in twelve is silent.

    python examples/nano/clips.py sheet.png   # a contact sheet, its voices beside it as sheet.wav, and its prompts
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import soundfile
from people import Drawing, draw_look, draw_person, make_motion
from prompts import Scene, make_prompt
from words import FRAME_RATE, SAMPLING_RATE, VOICE, Speech, draw_words, say

SILENT = 1 / 12


@dataclass(frozen=True)
class Clip:
    """
    Args:
        scene (`Scene`): All that is seen and heard.
        prompt (`str`): One of its descriptions.
        drawing (`Drawing`): Frames, and where eyes and mouth are.
        speech (`Speech`): The voice, and the mouth's width and opening.
    """

    scene: Scene
    prompt: str
    drawing: Drawing
    speech: Speech


def make_scene(rng: np.random.Generator, seconds: float, held_out: bool = False) -> Scene:
    """Draws a scene, of the held-out combinations or of the others, whose words fit in `seconds`."""
    while True:
        look, voice = draw_look(rng), list(VOICE)[rng.integers(len(VOICE))]
        scene = Scene(**asdict(look), voice=voice, words=())
        if scene.is_held_out == held_out:
            break
    words = () if rng.random() < SILENT else draw_words(rng, seconds)
    return Scene(**asdict(look), voice=voice, words=words)


def make_clip(
    seed: int,
    width: int = 128,
    height: int = 128,
    num_frames: int = 49,
    held_out: bool = False,
) -> Clip:
    """Makes a clip, always the same for a seed; its frames of different sizes are pictures of the same moments."""
    rng = np.random.default_rng([seed, held_out])
    scene = make_scene(rng, num_frames / FRAME_RATE, held_out)
    prompt = make_prompt(rng, scene, held_out)
    speech = say(rng, scene.words, scene.voice, num_frames)
    motion = make_motion(rng, num_frames, speech.stress)
    drawing = draw_person(rng, scene.look, motion, speech.mouth, width, height)
    return Clip(scene, prompt, drawing, speech)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--seeds", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), help="width and height, default: 128 128")
    arguments = parser.parse_args()
    clips = [make_clip(seed, *arguments.size) for seed in range(arguments.seeds)]
    rows = [np.concatenate(list(clip.drawing.frames[::6]), axis=1) for clip in clips]
    PIL.Image.fromarray(np.concatenate(rows)).save(arguments.output)
    voices = np.concatenate([clip.speech.voice for clip in clips])
    soundfile.write(arguments.output.with_suffix(".wav"), voices, SAMPLING_RATE)
    for clip in clips:
        print(clip.prompt.replace("\n", " | "))


if __name__ == "__main__":
    main()
