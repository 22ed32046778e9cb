# SPDX-License-Identifier: Apache-2.0
"""A world of talking heads, drawn and synthesised: a clip follows from its seed, and its prompt says most of it.

- a prompt in the three parts of MagiHuman, in many wordings
- frames of any size at 25 a second: skin, hair, glasses, shirt and background of the prompt, a head that moves
- a voice at 51,200 Hz by formant synthesis, which says three to five syllables at the pitch of the prompt, gliding
- mouth shapes that are those of the syllables
- one in five combinations of what the prompt names is held out: `make_scene` draws it only when asked

    python examples/nano/world.py sheet.png   # a contact sheet, and beside it the voices as sheet.wav
"""

import argparse
import hashlib
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import soundfile

FRAME_RATE = 25
SAMPLING_RATE = 51200
NUM_FRAMES = 49

SKIN = {"pale": (250, 220, 200), "tan": (222, 172, 130), "dark": (140, 88, 56)}
HAIR_COLOUR = {"black": (28, 24, 26), "brown": (112, 66, 30), "red": (196, 78, 32), "white": (234, 232, 236)}
HAIR_LENGTH = ("short", "long")
GLASSES = (False, True)
SHIRT = {
    "red": (206, 40, 48),
    "yellow": (242, 208, 50),
    "green": (46, 166, 76),
    "blue": (44, 84, 214),
    "grey": (130, 132, 140),
}
BACKGROUND = {
    "grey": (204, 206, 212),
    "green": (160, 226, 166),
    "purple": (212, 174, 240),
    "yellow": (250, 238, 160),
    "blue": (150, 196, 246),
}
# Pitch in Hz, a whole number of periods a frame so that phases go on smoothly, and a factor of the formants.
VOICE = {"deep": (100.0, 0.90), "medium": (175.0, 1.0), "high": (250.0, 1.15)}


class Vowel(NamedTuple):
    """Formants in Hz, and width and opening of the mouth in parts of the frame's size."""

    formants: tuple[float, float, float]
    mouth: tuple[float, float]


SYLLABLES = {
    "ma": Vowel((730, 1090, 2440), (0.150, 0.150)),
    "me": Vowel((530, 1840, 2480), (0.170, 0.085)),
    "mi": Vowel((270, 2290, 3010), (0.190, 0.040)),
    "mo": Vowel((480, 800, 2450), (0.105, 0.125)),
    "mu": Vowel((310, 900, 2240), (0.060, 0.065)),
}
CLOSED = Vowel((260, 1200, 2200), (0.140, 0.012))  # the hum of an m


@dataclass(frozen=True)
class Scene:
    """What a prompt says: keys of the tables above, `None` where it says nothing."""

    skin: str | None
    hair_colour: str | None
    hair_length: str | None
    glasses: bool | None
    shirt: str | None
    background: str | None
    voice: str | None
    syllables: tuple[str, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether this combination is kept for evaluation, whatever the syllables."""
        return hashlib.sha256(repr(astuple(self)[:-1]).encode()).digest()[0] % 5 == 0


@dataclass(frozen=True)
class Clip:
    """
    Args:
        scene (`Scene`): What is seen and heard.
        prompt (`str`): One of its descriptions.
        frames (`np.ndarray` of shape `(num_frames, size, size, 3)`): uint8.
        voice (`np.ndarray` of shape `(num_frames * 2048,)`): float32 in [-1, 1] at 51,200 Hz.
        mouth (`np.ndarray` of shape `(num_frames, 2)`): Width and opening of the mouth in parts of the size.
    """

    scene: Scene
    prompt: str
    frames: np.ndarray
    voice: np.ndarray
    mouth: np.ndarray


def make_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draws a scene, of the held-out combinations or of the others."""
    while True:
        choices = (SKIN, HAIR_COLOUR, HAIR_LENGTH, GLASSES, SHIRT, BACKGROUND, VOICE)
        drawn = [list(table)[rng.integers(len(table))] for table in choices]
        syllables = tuple(list(SYLLABLES)[i] for i in rng.integers(len(SYLLABLES), size=rng.integers(3, 6)))
        scene = Scene(*drawn, syllables)
        if scene.is_held_out == held_out:
            return scene


def make_clip(seed: int, size: int = 128, num_frames: int = NUM_FRAMES, held_out: bool = False) -> Clip:
    """Makes a clip, always the same for a seed; its frames of different sizes are pictures of the same moments."""
    rng = np.random.default_rng([seed, held_out])
    scene = make_scene(rng, held_out)
    prompt = make_prompt(scene, rng)
    times = np.arange(num_frames) / FRAME_RATE
    mouth = mouth_track(scene, times, num_frames / FRAME_RATE)
    poses = make_poses(rng, times)
    voice = make_voice(scene, rng, num_frames)
    frames = np.stack([draw_frame(scene, pose, shape, size) for pose, shape in zip(poses, mouth, strict=True)])
    return Clip(scene, prompt, frames, voice, mouth)


# Prompts


def make_prompt(scene: Scene, rng: np.random.Generator, parts: bool = True) -> str:
    """Describes a scene in one of many wordings, and in MagiHuman's three parts or in the first of them alone."""

    def choose(*wordings: str) -> str:
        return wordings[rng.integers(len(wordings))]

    if scene.glasses:
        glasses = choose("with round glasses", "wearing glasses", "who wears glasses")
    else:
        glasses = choose("without glasses", "no glasses", "who wears no glasses")
    person = choose("person", "speaker", "presenter")
    hair = " ".join(word for word in (scene.hair_length, scene.hair_colour) if word)
    worn = f"{scene.hair_colour} hair worn {scene.hair_length}" if scene.hair_colour and scene.hair_length else None
    facts = [
        scene.skin and choose(f"{scene.skin} skin", f"a {scene.skin} complexion"),
        hair and choose(f"{hair} hair", worn or f"{hair} hair"),
    ]
    rng.shuffle(facts)
    with_facts = " and ".join(fact for fact in facts if fact)
    shirt = choose(f"in a {scene.shirt} shirt", f"wearing a {scene.shirt} shirt", f"dressed in {scene.shirt}")
    place = choose(
        f"before a {scene.background} wall",
        f"in front of a {scene.background} background",
        f"against a plain {scene.background} backdrop",
    )
    line = " ".join(scene.syllables)
    says = choose("says", "speaks", "slowly says", "clearly says")
    voice = choose(f" in a {scene.voice} voice", f" with a {scene.voice} voice") if scene.voice else ""
    camera = choose(" Static camera.", " Medium close-up, static camera.", "")
    described = [
        f"A {person} with {with_facts}" if with_facts else f"A {person}",
        glasses if scene.glasses is not None else None,
        scene.shirt and shirt,
        scene.background and place,
    ]
    look = ", ".join(filter(None, described))
    speech = choose(f'The {person} {says}{voice}: "{line}".', f'The {person} {says} "{line}"{voice}.')
    quiet = choose("Quiet room", "No prominent background sound", "Silence")
    description = f"{look}.{camera} {speech}"
    dialogue = f'<{person.capitalize()}, syllables>: "{line}"'
    return f"{description}\n\nDialogue:\n{dialogue}\n\nBackground Sound:\n<{quiet}>" if parts else description


def leave_out(scene: Scene, rng: np.random.Generator) -> Scene:
    """What a user may say of a scene: everything, or each of what is seen and heard but the syllables by chance."""
    chance = 0.5 * rng.integers(2)
    return replace(scene, **{field.name: None for field in fields(Scene)[:-1] if rng.random() < chance})


# What is said, as functions of time


def activations(scene: Scene, times: np.ndarray, duration: float) -> np.ndarray:
    """
    How far the mouth is in each syllable: closed at its beginning, then open, then closing.

    Args:
        scene (`Scene`): Its syllables share the time from 0.2 s to 0.15 s before the end.
        times (`np.ndarray` of shape `(num_times,)`): Seconds.
        duration (`float`): Length of the clip in seconds.

    Returns:
        `np.ndarray` of shape `(num_syllables, num_times)`: In [0, 1].
    """
    slot = (duration - 0.35) / len(scene.syllables)
    phase = (times - 0.2) / slot - np.arange(len(scene.syllables))[:, None]
    rise, fall = np.clip((phase - 0.2) / 0.2, 0, 1), np.clip((1.0 - phase) / 0.15, 0, 1)
    return np.minimum(rise, fall) ** 2 * (3 - 2 * np.minimum(rise, fall))


def mouth_track(scene: Scene, times: np.ndarray, duration: float) -> np.ndarray:
    """Width and opening of the mouth, `(num_times, 2)`, in parts of the frame's size."""
    shapes = np.array([SYLLABLES[name].mouth for name in scene.syllables]) - CLOSED.mouth
    return np.array(CLOSED.mouth) + activations(scene, times, duration).T @ shapes


def make_voice(scene: Scene, rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """Sums the harmonics of a gliding pitch, each as loud as formants that follow the syllables let it be."""
    duration = num_frames / FRAME_RATE
    num_samples = num_frames * SAMPLING_RATE // FRAME_RATE
    times = np.arange(num_samples) / SAMPLING_RATE
    control = np.arange(0, num_samples + 256, 256) / SAMPLING_RATE  # 200 times a second
    pitch, scale = VOICE[scene.voice]
    drift = 0.012 * np.sin(2 * np.pi * (0.5 * times + rng.random())) - 0.01 * times / duration
    frequency = pitch * (1 + 0.01 * rng.uniform(-1, 1) + drift)
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE

    active = activations(scene, control, duration)
    formants = np.array([SYLLABLES[name].formants for name in scene.syllables]) - CLOSED.formants
    formants = scale * (np.array(CLOSED.formants) + active.T @ formants)  # (num_controls, 3)
    speaking = np.clip((control - 0.2) / 0.04, 0, 1) * np.clip((duration - 0.15 - control) / 0.04, 0, 1)
    loudness = speaking * (0.25 + 0.75 * active.sum(axis=0))

    voice = np.zeros(num_samples)
    pitches = np.interp(control, times, frequency)
    for harmonic in range(1, int(5500 / frequency.max()) + 1):
        distance = (harmonic * pitches[:, None] - formants) / (45.0, 60.0, 90.0)
        gain = (np.array([1.0, 0.6, 0.3]) / (1 + distance**2)).sum(axis=1) + 0.004
        voice += np.interp(times, control, loudness * gain) * np.sin(harmonic * phase)
    return (0.5 * voice / np.abs(voice).max()).astype(np.float32)


# What is seen


def make_poses(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """Shift of the head right and down in parts of the size, and how far the eyes are open, `(num_times, 3)`."""
    sway = 0.012 * np.sin(2 * np.pi * (0.45 * times + rng.random()))
    nod = 0.008 * np.sin(2 * np.pi * (0.7 * times + rng.random()))
    blink = rng.uniform(0.3, 1.6)
    eyes = np.clip(np.abs(times - blink) / 0.08, 0.1, 1)
    return np.stack([sway, nod, eyes], axis=1)


def draw_frame(scene: Scene, pose: np.ndarray, mouth: np.ndarray, size: int) -> np.ndarray:
    """Draws one frame, uint8 `(size, size, 3)`, at four times its size for soft edges."""
    canvas = 4 * size
    image = PIL.Image.new("RGB", (canvas, canvas), BACKGROUND[scene.background])
    draw = PIL.ImageDraw.Draw(image)
    skin, hair = SKIN[scene.skin], HAIR_COLOUR[scene.hair_colour]
    shade = tuple(int(0.82 * value) for value in skin)
    dark = (24, 20, 24)
    x, y = 0.5 + pose[0], 0.42 + pose[1]

    def box(centre_x: float, centre_y: float, width: float, height: float) -> list[float]:
        left, top = centre_x - width / 2, centre_y - height / 2
        return [canvas * value for value in (left, top, left + width, top + height)]

    def ellipse(centre_x: float, centre_y: float, width: float, height: float, colour: tuple[int, int, int]) -> None:
        draw.ellipse(box(centre_x, centre_y, width, height), fill=colour)

    if scene.hair_length == "long":
        draw.rounded_rectangle(box(x, y + 0.14, 0.50, 0.62), radius=0.12 * canvas, fill=hair)
    ellipse(0.5, 1.08, 0.86, 0.62, SHIRT[scene.shirt])
    draw.rounded_rectangle(box(0.5 + 0.6 * pose[0], y + 0.27, 0.15, 0.22), radius=0.03 * canvas, fill=shade)
    for side in (-1, 1):
        ellipse(x + side * 0.192, y + 0.02, 0.06, 0.10, shade)
    ellipse(x, y, 0.38, 0.50, skin)
    draw.chord(box(x, y - 0.03, 0.42, 0.50), 180, 360, fill=hair)
    draw.chord(box(x, y - 0.015, 0.33, 0.30), 180, 360, fill=skin)

    for side in (-1, 1):
        eye_x, eye_y = x + side * 0.08, y + 0.005
        ellipse(eye_x, eye_y, 0.062, 0.05 * pose[2], (250, 250, 250))
        ellipse(eye_x, eye_y, 0.03, 0.03 * min(1.0, 1.4 * pose[2]), dark)
        draw.rounded_rectangle(box(eye_x, y - 0.06, 0.08, 0.014), radius=0.006 * canvas, fill=shade)
        if scene.glasses:
            draw.ellipse(box(eye_x, eye_y, 0.125, 0.115), outline=dark, width=int(0.016 * canvas))
    if scene.glasses:
        draw.rectangle(box(x, y, 0.045, 0.016), fill=dark)
    ellipse(x, y + 0.065, 0.035, 0.045, shade)

    width, opening = mouth
    mouth_y = y + 0.15
    lip = 0.022
    ellipse(x, mouth_y, width + lip, opening + 1.3 * lip, (186, 70, 76))
    ellipse(x, mouth_y, width, opening, (60, 12, 20))
    if opening > 0.03:
        draw.chord(box(x, mouth_y, 0.94 * width, 0.94 * opening), 205, 335, fill=(246, 246, 242))
    if opening > 0.09:
        draw.chord(box(x, mouth_y, 0.8 * width, 0.9 * opening), 30, 150, fill=(220, 96, 104))
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BOX))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--seeds", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="default: %(default)s")
    arguments = parser.parse_args()
    clips = [make_clip(seed, arguments.size) for seed in range(arguments.seeds)]
    rows = [np.concatenate(list(clip.frames[::6]), axis=1) for clip in clips]
    PIL.Image.fromarray(np.concatenate(rows)).save(arguments.output)
    soundfile.write(
        arguments.output.with_suffix(".wav"), np.concatenate([clip.voice for clip in clips]), SAMPLING_RATE
    )
    for clip in clips:
        print(clip.prompt.replace("\n", " | "))


if __name__ == "__main__":
    main()
