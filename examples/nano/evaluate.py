# SPDX-License-Identifier: Apache-2.0
"""Measures the embedded models as a visitor sees them, on prompts of looks that no training saw, with fixed seeds.

    python examples/nano/evaluate.py
    python examples/nano/evaluate.py --parts upscaled seconds  # the others stay

Writes `benchmarks/embedded.json`: first a table of what must be reached, with what the readers of `recognise.py` say
of drawn clips in the same place, then every number by parts; and `embedded.png` and `embedded_upscaled.png`, frames of
the first clips.

A model chooses its own rate and pauses, so no drawn clip's track says frame by frame what its mouth should do. The
prompt's words are synthesised once more, and the mouth's track of that is moved to where the model's sound says the
same, by dynamic time warping of both sounds: `recognise.track_at`.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from clips import make_scene
from diffusers import DiffusionPipeline
from make_dataset import Dataset
from people import Drawing, draw_person, make_motion
from prompts import Scene, make_prompt
from recipe import save_sheet, to_frames
from recognise import (
    LOOKS,
    Readers,
    contrast,
    correlate,
    distort,
    edit_distance,
    heard,
    lips_height,
    sharpness,
    to_voice,
    track_at,
)
from train_turbo_vae import measure_psnr
from words import FRAME_RATE, SAMPLING_RATE, Speech, say

from diffusers_magihuman import embedded_model, export_to_mp4

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
READERS = Path(__file__).parent / "readers.safetensors"
FIRST_SEED = 10_000  # no choice was made by looking at these scenes
NUM_FRAMES = 49
SIZES = ((128, 128), (96, 160), (160, 96), (128, 160), (160, 128))  # width and height
LENGTHS = (49, 25, 97, 149)


class Row(NamedTuple):
    """
    Args:
        part (`str`): Where it is measured.
        key (`str`): Of the value in that part.
        must, goal (`float`): Less is better where the goal is not more than what must be.
    """

    part: str
    key: str
    must: float
    goal: float

    def is_better(self, value: float, other: float) -> bool:
        return value < other if self.goal <= self.must else value > other


TABLE = {
    "Turbo VAE, PSNR whole": Row("autoencoders", "turbo_psnr_whole", 29, 32),
    "Turbo VAE, PSNR eyes": Row("autoencoders", "turbo_psnr_eyes", 23, 27),
    "Turbo VAE, PSNR mouth": Row("autoencoders", "turbo_psnr_mouth", 24, 28),
    "Wan VAE, PSNR whole": Row("autoencoders", "wan_psnr_whole", 29, 32),
    "Wan VAE, PSNR eyes": Row("autoencoders", "wan_psnr_eyes", 23, 27),
    "Wan VAE, PSNR mouth": Row("autoencoders", "wan_psnr_mouth", 24, 28),
    "sound autoencoder, signal to noise": Row("autoencoders", "sound_snr", 15, 17),
    "contrast of eyes without glasses, drawn = 1": Row("template", "eye_contrast", 0.7, 0.9),
    "looks and voice right, the worst, template wording": Row("template", "worst_look", 0.96, 0.99),
    "all looks of a prompt right, own words": Row("own_words", "all_looks", 0.8, 0.95),
    "words wrong": Row("template", "words_wrong", 0.12, 0.05),
    "mouth against the prompt's track, r": Row("template", "mouth_r", 0.82, 0.9),
    "mouth against the prompt's track, r, dark skin": Row("template", "mouth_r_dark", 0.8, 0.9),
    "lips in silence, a shut mouth's = 1": Row("silent", "lips_ratio", 1.3, 1.1),
    "mouth against a sound of another line, r": Row("given_sound", "other_line_mouth_r", 0.82, 0.9),
    "mouth against a sound, prompt without a line, r": Row("given_sound", "no_line_mouth_r", 0.82, 0.9),
    "sizes: looks lost at most": Row("sizes", "looks_lost", 0.05, 0.02),
    "sizes: r lost at most": Row("sizes", "mouth_r_lost", 0.05, 0.02),
    "lengths: looks lost at most": Row("lengths", "looks_lost", 0.05, 0.02),
    "lengths: r lost at most": Row("lengths", "mouth_r_lost", 0.05, 0.02),
    "upscaled: r lost": Row("upscaled", "mouth_r_lost", 0.0, 0.0),
    "upscaled: sharpness of eyes, drawn = 1": Row("upscaled", "eyes_sharpness", 0.7, 0.9),
    "upscaled: sharpness of mouth, drawn = 1": Row("upscaled", "mouth_sharpness", 0.7, 0.9),
    "base: rows in which it is worse than distilled": Row("base", "rows_worse", 0, 0),
}

# What is said, and what is drawn of it


class Wish(NamedTuple):
    seed: int
    scene: Scene
    num_frames: int = NUM_FRAMES
    size: tuple[int, int] = SIZES[0]

    def prompt(self, held_out: bool = False) -> str:
        """Its description: MagiHuman's three parts in wordings of training, or others in one or three parts."""
        return make_prompt(np.random.default_rng([self.seed, 1]), self.scene, held_out, None if held_out else 3)

    def speech(self, take: int = 0) -> Speech:
        """One of the ways to say its words."""
        return say(np.random.default_rng([self.seed, 2, take]), self.scene.words, self.scene.voice, self.num_frames)

    def drawing(self, speech: Speech) -> Drawing:
        rng = np.random.default_rng([self.seed, 3])
        motion = make_motion(rng, self.num_frames, speech.stress)
        return draw_person(rng, self.scene.look, motion, speech.mouth, *self.size)


def make_wishes(count: int, num_frames: int = NUM_FRAMES, speaks: bool = False) -> list[Wish]:
    """The first scenes of so many frames, or the first that have a line; looks are the same in all lengths."""
    wishes, seed = [], FIRST_SEED
    while len(wishes) < count:
        scene = make_scene(np.random.default_rng([seed, True]), num_frames / FRAME_RATE, held_out=True)
        # Whether a scene has a line is drawn, too, before the words that its length has room for.
        if scene.words or not speaks:
            wishes.append(Wish(seed, scene, num_frames))
        seed += 1
    return wishes


class Shown(NamedTuple):
    """
    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8.
        voice (`np.ndarray` of shape `(num_frames * 512,)`): At 12,800 Hz.
    """

    frames: np.ndarray
    voice: np.ndarray


def show_drawn(wishes: Iterable[Wish]) -> Iterator[Shown]:
    for wish in wishes:
        speech = wish.speech()
        yield Shown(wish.drawing(speech).frames, speech.voice)


def generate(
    pipe: DiffusionPipeline, wishes: Sequence[Wish], held_out: bool = False, batch_size: int = 10, **given: list[Any]
) -> Iterator[Shown]:
    """Runs a pipeline with its defaults on prompts of wishes of one size and length."""
    (width, height), num_frames = wishes[0].size, wishes[0].num_frames
    for start in range(0, len(wishes), batch_size):
        batch = slice(start, start + batch_size)
        output = pipe(
            [wish.prompt(held_out) for wish in wishes[batch]],
            generator=[torch.Generator().manual_seed(wish.seed) for wish in wishes[batch]],
            width=width,
            height=height,
            num_frames=num_frames,
            **{name: values[batch] for name, values in given.items()},
        )
        for frames, audio in zip(output.frames, output.audio, strict=True):
            yield Shown(to_bytes(frames), to_voice(audio, num_frames))


def to_bytes(frames: np.ndarray) -> np.ndarray:
    return np.round(frames * 255).astype(np.uint8)


# What is read


class Meter:
    """Means by name, each of values with weights."""

    def __init__(self) -> None:
        self.sums, self.weights = Counter(), Counter()

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        self.sums[name] += float(value)
        self.weights[name] += weight

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / weight for name, weight in sorted(self.weights.items()) if weight}


def read(
    readers: Readers,
    wishes: Iterable[Wish],
    clips: Iterable[Shown],
    tracks: Sequence[np.ndarray] | None = None,
    last: bool = False,
) -> dict[str, float]:
    """
    Reads how clips do what wishes say.

    Args:
        readers (`Readers`): What reads.
        wishes (`Iterable[Wish]`): What the clips should show and say.
        clips (`Iterable[Shown]`): As many.
        tracks (`Sequence[np.ndarray]`, *optional*): How far each mouth should be open, `(num_frames,)`; if `None`, as
            far as the words open it when they are heard.
        last (`bool`): Whether looks are read in the last frame alone.

    Returns:
        `dict[str, float]`: Shares of clips in which each look is right, and what else is measured.
    """
    meter = Meter()
    for number, (wish, (frames, sound)) in enumerate(zip(wishes, clips, strict=True)):
        scene, seen = wish.scene, readers.looks.read(frames)
        look = readers.looks.read(frames[-1:]).look if last else seen.look
        right = {name: value == getattr(scene, name) for name, value in look.items()}
        if scene.hair_style == "bald":
            del right["hair_colour"]
        for name, value in right.items():
            meter.add(name, value)
            meter.add("looks", value)
            if getattr(scene, name) is True:  # glasses and beards, which most do not have
                meter.add(f"{name}_if_asked", value)
        meter.add("all_looks", all(right.values()))
        meter.add("eyes_shut", 1 - seen.is_open.mean())
        if not scene.glasses:
            meter.add("eye_deviation", contrast(frames, seen.boxes[:, :2]))
        words, voice = readers.words.read(sound)
        errors = edit_distance(words, heard(scene.words))
        meter.add("words_wrong", errors, len(scene.words))
        if not scene.words:
            meter.add("words_in_silence", errors)
            meter.add("lips_height", lips_height(seen.opening).mean())
            continue
        languages = Counter(word.language for word in scene.words if word.language != "syllables")
        language = max(languages, key=languages.get, default="syllables")
        meter.add(f"words_wrong_{language.lower()}", errors, len(scene.words))
        meter.add("voice", voice == scene.voice)
        track = track_at(wish.speech(take=1), sound) if tracks is None else tracks[number]
        similarity = correlate(seen.opening, track)
        meter.add("mouth_r", similarity)
        if scene.skin == "dark":
            meter.add("mouth_r_dark", similarity)
    means = meter.means()
    return means | {"worst_look": min(means[name] for name in (*LOOKS, "voice") if name in means)}


def prefixed(prefix: str, values: dict[str, float], *names: str) -> dict[str, float]:
    """Those of the names that there are, or all, with a prefix."""
    return {f"{prefix}_{name}": values[name] for name in names or values if name in values}


class Evaluation:
    """
    Measures in parts, each a method that returns values by name.

    Args:
        readers (`Readers`): What reads clips.
        clips, few (`int`): How many clips the larger and the slower parts measure.
        of_drawn (`dict[str, float]`): What the part `drawn` gave; the other parts need it.
    """

    def __init__(self, readers: Readers, clips: int, few: int, of_drawn: dict[str, float]) -> None:
        self.readers, self.of_drawn, self.sheets = readers, of_drawn, {}
        self.wishes, self.few = make_wishes(clips), make_wishes(few, speaks=True)
        self.mute = [wish._replace(scene=replace(wish.scene, words=())) for wish in self.few]
        self.pipes = {
            name: DiffusionPipeline.from_pretrained(embedded_model(name)) for name in ("base", "distilled", "upscale")
        }
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)

    def read(self, wishes: Sequence[Wish], clips: Iterable[Shown], **options: Any) -> dict[str, float]:
        """What readers see, with eyes and shut lips by those of drawn clips."""
        values = read(self.readers, wishes, clips, **options)
        for name, ratio in (("eye_deviation", "eye_contrast"), ("lips_height", "lips_ratio")):
            if name in values:
                values[ratio] = values[name] / self.of_drawn[name]
        return values

    def drawn(self) -> dict[str, float]:
        """The readers' own errors; words also in noise 20 dB below, and when they are muffled and noisier."""
        values = read(self.readers, self.wishes, show_drawn(self.wishes))
        silent = read(self.readers, self.mute, show_drawn(self.mute))
        values |= {name: silent[name] for name in ("lips_height", "words_in_silence")}
        meter = Meter()
        for wish, clip in zip(self.few, show_drawn(self.few), strict=True):
            speech, said = wish.speech(), heard(wish.scene.words)
            drawing, seen = wish.drawing(speech), self.readers.looks.read(clip.frames)
            meter.add("mouth_r_exact", correlate(seen.opening, speech.mouth[:, 1]))
            eyes = contrast(clip.frames, drawing.eyes)
            meter.add("eye_contrast", contrast(clip.frames, seen.boxes[:, :2]) / eyes)
            for name, options in {"in_noise": {"snr": 20.0}, "muffled": {"snr": 15.0, "highest": 5000.0}}.items():
                words, _ = self.readers.words.read(distort(clip.voice, np.random.default_rng(wish.seed), **options))
                meter.add(f"words_wrong_{name}", edit_distance(words, said), len(said))
        lips_ratio = silent["lips_height"] / lips_height(np.zeros(1)).item()
        return values | meter.means() | {"lips_ratio": lips_ratio}

    def autoencoders(self) -> dict[str, float]:
        """What is left of drawn clips, and what readers see of that: no model can do better."""
        speeches = [wish.speech() for wish in self.few]
        drawings = [wish.drawing(speech) for wish, speech in zip(self.few, speeches, strict=True)]
        voices = [speech.voice for speech in speeches]
        dataset = Dataset([drawing.frames for drawing in drawings], [drawing.boxes for drawing in drawings])
        values = {}
        for name, pipe in (("wan", "base"), ("turbo", "distilled")):
            vae, decoded, seconds = self.pipes[pipe].vae, [], []

            def code(video: torch.Tensor, vae: Any = vae, decoded: list = decoded, seconds: list = seconds) -> Any:
                latents = vae.encode(video).latent_dist.mode()
                started = time.perf_counter()
                decoded.append(vae.decode(latents).sample)
                seconds.append(time.perf_counter() - started)
                return decoded[-1]

            values |= prefixed(name, measure_psnr(dataset, code, len(self.few)))
            values[f"{name}_seconds"] = float(np.median(seconds))
        audio_vae, sounds, ratios = self.pipes["distilled"].audio_vae, [], []
        for voice in map(torch.from_numpy, voices):
            mode = audio_vae.encode(voice.expand(1, 2, -1)).latent_dist.mode()
            sound = audio_vae.decode(mode).sample[0].mean(dim=0)
            sounds.append(F.pad(sound, (0, len(voice) - len(sound))))  # where the end is no whole latent
            ratios.append(10 * torch.log10(voice.square().sum() / (sounds[-1] - voice).square().sum()))
        clips = [Shown(to_frames(video)[0], sound.numpy()) for video, sound in zip(decoded, sounds, strict=True)]
        read_back = prefixed("read", self.read(self.few, clips))
        time_ratio = values["turbo_seconds"] / values["wan_seconds"]
        return {**values, "turbo_time_ratio": time_ratio, "sound_snr": float(np.mean(ratios)), **read_back}

    def template(self, pipe: str = "distilled", wishes: Sequence[Wish] = ()) -> dict[str, float]:
        wishes = wishes or self.wishes
        clips = generate(self.pipes[pipe], wishes)
        first = list(itertools.islice(clips, 6))
        self.sheets.setdefault("", [clip.frames[4:45:8] for clip in first])
        return self.read(wishes, itertools.chain(first, clips))

    def own_words(self, pipe: str = "distilled", wishes: Sequence[Wish] = ()) -> dict[str, float]:
        wishes = wishes or self.wishes
        return self.read(wishes, generate(self.pipes[pipe], wishes, held_out=True))

    def silent(self, pipe: str = "distilled", _: Sequence[Wish] = ()) -> dict[str, float]:
        return self.read(self.mute, generate(self.pipes[pipe], self.mute))

    def given_sound(self, pipe: str = "distilled", _: Sequence[Wish] = ()) -> dict[str, float]:
        """The sound of the next clip, and a prompt with a line of its own or none; the sound's track is known."""
        others = self.few[1:] + self.few[:1]
        speeches = [wish.speech() for wish in others]
        given = {"audio": [(torch.from_numpy(speech.voice), SAMPLING_RATE) for speech in speeches]}
        tracks, wishes = [speech.mouth[:, 1] for speech in speeches], mixed(self.few, others)
        values = {}
        for name, asked in (("other_line", self.few), ("no_line", self.mute)):
            found = self.read(wishes, generate(self.pipes[pipe], asked, **given), tracks=tracks)
            values |= prefixed(name, found, "looks", "all_looks", "mouth_r", "mouth_r_dark", "eye_contrast")
        return values

    def given_picture(self) -> dict[str, float]:
        """A drawn first frame, and its own prompt or that of the next clip; looks are read in the last frame."""
        others, values = self.few[1:] + self.few[:1], {}
        images = [wish.drawing(wish.speech()).frames[0].astype(np.float32) / 255 for wish in self.few]
        for name, asked, wishes in (
            ("own_prompt", self.few, self.few),
            ("other_prompt", others, mixed(self.few, others)),
        ):
            clips = generate(self.pipes["distilled"], asked, image=images)
            values |= prefixed(name, self.read(wishes, clips, last=True))
        return values

    def sizes(self) -> dict[str, float]:
        return self.compare(
            {f"{size[0]}x{size[1]}": [wish._replace(size=size) for wish in self.few] for size in SIZES}
        )

    def lengths(self) -> dict[str, float]:
        return self.compare(
            {f"{length}_frames": make_wishes(len(self.few), length, speaks=True) for length in LENGTHS}
        )

    def compare(self, kinds: dict[str, list[Wish]]) -> dict[str, float]:
        """What is read in clips of each kind, and how much others lose at most against the first."""
        found = {name: self.read(wishes, generate(self.pipes["distilled"], wishes)) for name, wishes in kinds.items()}
        first, *others = found.values()
        values = {f"{key}_lost": max(first[key] - other[key] for other in others) for key in ("looks", "mouth_r")}
        shown = ("looks", "all_looks", "worst_look", "words_wrong", "mouth_r")
        return values | {key: value for name in kinds for key, value in prefixed(name, found[name], *shown).items()}

    def upscaled(self) -> dict[str, float]:
        """Generated clips of 128x128 made 256x256: what is read in both, and how sharp they are beside drawn ones."""
        distilled, upscale, meter = self.pipes["distilled"], self.pipes["upscale"], Meter()
        low_clips, high_clips, rows, seconds = [], [], [], []
        for wish in self.few:
            prompt, generator = wish.prompt(), torch.Generator().manual_seed(wish.seed)
            low = distilled(prompt, generator=generator, output_type="latent")
            started = time.perf_counter()
            high = upscale(prompt, latents=low.frames, audio_latents=low.audio, generator=generator)
            seconds.append(time.perf_counter() - started)
            sound = to_voice(high.audio[0], wish.num_frames)
            low_clips.append(Shown(to_bytes(distilled.decode_latents(low.frames, "np")[0]), sound))
            high_clips.append(Shown(to_bytes(high.frames[0]), sound))
            true = wish._replace(size=(256, 256)).drawing(wish.speech()).frames
            for name, frames in (("", high_clips[-1].frames), ("drawn_", true)):
                boxes = self.readers.looks.read(frames).boxes
                meter.add(f"{name}eyes", sharpness(frames, boxes[:, :2]))
                meter.add(f"{name}mouth", sharpness(frames, boxes[:, 2]))
            resized = low_clips[-1].frames.repeat(2, axis=1).repeat(2, axis=2)
            rows += [frames[12:44:8] for frames in (resized, high_clips[-1].frames, true)]
        self.sheets["_upscaled"] = rows[:6]
        low, high, sharp = self.read(self.few, low_clips), self.read(self.few, high_clips), meter.means()
        return {
            **{f"{part}_sharpness": sharp[part] / sharp[f"drawn_{part}"] for part in ("eyes", "mouth")},
            "mouth_r_lost": low["mouth_r"] - high["mouth_r"],
            "seconds": float(np.median(seconds)),
            **prefixed("low", low, "looks", "all_looks", "mouth_r"),
            **prefixed("high", high, "looks", "all_looks", "mouth_r"),
        }

    def base(self) -> dict[str, float]:
        """Base and distilled on the same few clips."""
        values, worse = {}, 0
        for part in ("template", "own_words", "silent", "given_sound"):
            base, distilled = (PARTS[part](self, pipe, self.few) for pipe in ("base", "distilled"))
            rows = [row for row in TABLE.values() if row.part == part and row.key in base]
            worse += sum(row.is_better(distilled[row.key], base[row.key]) for row in rows)
            values |= prefixed(part, base) | prefixed(f"distilled_{part}", distilled)
        return {"rows_worse": worse, **values}

    def seconds(self) -> dict[str, float]:
        """Of a clip with its mp4: in a process that has loaded the model, and of the whole command."""
        times, pipe, prompts = [], self.pipes["distilled"], [wish.prompt() for wish in self.few[:5]]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "clip.mp4"
            for prompt in prompts:
                started = time.perf_counter()
                output = pipe(prompt, generator=torch.Generator().manual_seed(0))
                export_to_mp4(output.frames[0], file, audio=output.audio[0], sampling_rate=pipe.audio_sampling_rate)
                times.append(time.perf_counter() - started)
            started = time.perf_counter()
            subprocess.run(["magihuman", "generate", prompts[0], "-o", file], check=True, capture_output=True)
        command = time.perf_counter() - started
        return {"loaded": float(np.median(times)), "command": command, "threads": torch.get_num_threads()}


def mixed(seen: Sequence[Wish], said: Sequence[Wish]) -> list[Wish]:
    """The looks of some scenes with the voices and lines of others."""
    return [
        wish._replace(scene=replace(wish.scene, voice=other.scene.voice, words=other.scene.words))
        for wish, other in zip(seen, said, strict=True)
    ]


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    "drawn": Evaluation.drawn,
    "autoencoders": Evaluation.autoencoders,
    "template": Evaluation.template,
    "own_words": Evaluation.own_words,
    "silent": Evaluation.silent,
    "given_sound": Evaluation.given_sound,
    "given_picture": Evaluation.given_picture,
    "sizes": Evaluation.sizes,
    "lengths": Evaluation.lengths,
    "upscaled": Evaluation.upscaled,
    "base": Evaluation.base,
    "seconds": Evaluation.seconds,
}


def make_table(results: dict[str, Any]) -> dict[str, dict[str, float | bool]]:
    """The rows that are measured; `reader` is what the readers say of drawn clips."""
    table = {}
    for name, row in TABLE.items():
        value = results.get(row.part, {}).get(row.key)
        if value is not None:
            reader = {"reader": results["drawn"][row.key]} if row.key in results["drawn"] else {}
            is_met = not row.is_better(row.must, value)
            table[name] = {"value": value, "must": row.must, "goal": row.goal, "is_met": is_met, **reader}
    return table


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--readers", type=Path, default=READERS, help="output of recognise.py, default: that beside this"
    )
    parser.add_argument("--clips", type=int, default=200, help="prompts, default: %(default)s")
    parser.add_argument("--few", type=int, default=20, help="clips of the slower measurements, default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--output", type=Path, default=BENCHMARKS / "embedded.json", help="default: benchmarks/embedded.json"
    )
    arguments = parser.parse_args()
    settings = {"clips": arguments.clips, "few": arguments.few}
    results: dict[str, Any] = {}
    if arguments.output.exists() and set(arguments.parts) < set(PARTS):
        results = json.loads(arguments.output.read_text())
        for name, count in settings.items():
            if results[name] != count:
                parser.error(f"--{name} is {count}, it must be {results[name]} as for the other parts")
    if "drawn" not in {*arguments.parts, *results}:
        parser.error("--parts must have drawn, what the others are compared with, as no file has it")
    evaluation = Evaluation(Readers.load(arguments.readers), arguments.clips, arguments.few, results.get("drawn", {}))
    for part in PARTS:
        if part in arguments.parts:
            values = {key: round(value, 4) for key, value in PARTS[part](evaluation).items()}
            print(json.dumps({part: values}), flush=True)
            parts = {name: values if name == part else results[name] for name in PARTS if name in {part, *results}}
            results = {**settings, "table": make_table(parts), **parts}
            evaluation.of_drawn = results["drawn"]
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    for suffix, rows in evaluation.sheets.items():
        save_sheet(rows, arguments.output.with_name(f"{arguments.output.stem}{suffix}.png"))


if __name__ == "__main__":
    main()
