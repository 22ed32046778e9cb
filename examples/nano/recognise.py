# SPDX-License-Identifier: Apache-2.0
"""Reads from the pixels and the sound of a clip what it shows and says, to measure models of the world.

- looks, the mouth's opening, lids, and where eyes and mouth are: a small network that sees each frame by itself
- words: a small network that hears bands of the sound every 10 ms, trained by CTC; words that differ by nothing but
  their tones count as the same one, no two of which are of one language
- both are trained on drawn clips that are blurred, noisy, shifted and coarse, as those of models are, in eight minutes
- speech that says the same words at other times is aligned by dynamic time warping

    python examples/nano/recognise.py --output runs/readers.safetensors

The readers' own errors are the part "drawn" of `evaluate.py`.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.signal
import torch
import torch.nn.functional as F
from people import (
    FACE,
    HAIR_COLOUR,
    HAIR_STYLE,
    SHIRT,
    SKIN,
    WALL,
    Drawing,
    Look,
    Motion,
    draw_look,
    draw_person,
    make_motion,
)
from recipe import to_tensor
from safetensors.torch import load_file, save_file
from torch import nn
from words import FRAME_RATE, MOUTH, SAMPLING_RATE, VOCABULARY, VOICE, Speech, Word, draw_words, say

from diffusers_magihuman.media import resample_audio

SIZE = 128  # of the square that a reader sees, in pixels
LOOKS = {
    "skin": tuple(SKIN),
    "hair_colour": tuple(HAIR_COLOUR),
    "hair_style": HAIR_STYLE,
    "glasses": (False, True),
    "beard": (False, True),
    "shirt": tuple(SHIRT),
    "wall": tuple(WALL),
}
STEP = 128  # samples between two looks at the sound, 10 ms; four are a frame
NUM_BANDS, HIGHEST = 48, 6400.0
FLOOR = 0.0006  # power below which sound counts as silence: white noise 46 dB below the peaks of a voice

# What is said


def without_tones(word: Word) -> tuple[str, ...]:
    """The sounds that a word reader tells apart."""
    return tuple(sound.rstrip("0123456789") for sound in word.sounds)


HEARD = tuple(dict.fromkeys(map(without_tones, VOCABULARY)))  # a word's number is its place


def heard(words: Sequence[Word]) -> tuple[int, ...]:
    """The numbers of words in `HEARD`."""
    return tuple(HEARD.index(without_tones(word)) for word in words)


def to_bands(voice: torch.Tensor) -> torch.Tensor:
    """Power in bands of equal ratios every 10 ms, `(num_samples,)` at 12,800 Hz to `(num_times, NUM_BANDS)`."""
    window = torch.hann_window(512)
    power = torch.stft(voice, 512, STEP, window=window, return_complex=True).abs().square()[:, :-1]
    centres = torch.logspace(np.log10(90.0), np.log10(HIGHEST), NUM_BANDS) / (SAMPLING_RATE / 512)
    widths = (0.1 * centres).clamp(min=1.0)
    weights = (1 - (torch.arange(len(power)) - centres[:, None]).abs() / widths[:, None]).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True) @ power).T


def to_levels(power: torch.Tensor) -> torch.Tensor:
    """Power on a logarithmic scale, 0 where it is silent and about 1 to 3 in speech."""
    return torch.log10(power / FLOOR + 1) / 2


class WordReader(nn.Module):
    """
    Hears levels `(batch_size, num_times, NUM_BANDS)`.

    Gives logits of words `(batch_size, num_times / 2, len(HEARD) + 1)`, 0 for none, and of voices `(batch_size, 3)`.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first = nn.Conv1d(NUM_BANDS, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width),
                nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation),
                nn.GELU(),
                nn.Conv1d(width, width, 1),
            )
            for dilation in (1, 2, 4, 8)
        )
        self.last = nn.Sequential(nn.GroupNorm(1, width), nn.GELU(), nn.Conv1d(width, len(HEARD) + 1, 1))
        self.voice = nn.Linear(width, len(VOICE))

    def forward(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = self.first(levels.transpose(1, 2))
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return self.last(hidden_states).transpose(1, 2), self.voice(hidden_states.mean(dim=2))

    @torch.inference_mode()
    def read(self, sound: np.ndarray) -> tuple[tuple[int, ...], str]:
        """The numbers in `HEARD` of the words in a sound at 12,800 Hz, and the key of `VOICE` that says them."""
        words, voice = self(to_levels(to_bands(torch.from_numpy(sound)))[None])
        return collapse(words[0].argmax(dim=1).tolist()), list(VOICE)[voice.argmax()]


def collapse(labels: Sequence[int]) -> tuple[int, ...]:
    """What labels of moments spell by CTC, where 0 is none, and a word that lasts is one."""
    return tuple(label - 1 for label, last in zip(labels, [0, *labels], strict=False) if label not in (0, last))


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions that make one sequence of the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def align(first: np.ndarray, second: np.ndarray, haste: float = 0.05) -> np.ndarray:
    """
    Finds the moments of one series at which it is like another, by dynamic time warping.

    Args:
        first, second (`np.ndarray` of shape `(num_times, num_bands)`): Two series, of any lengths.
        haste (`float`): What it costs that one stands still while the other goes on.

    Returns:
        `np.ndarray` of shape `(len(second),)`: For each moment of `second` the one of `first`, which never falls.
    """
    costs = np.abs(first[:, None] - second).mean(axis=2)
    totals = np.full((len(first) + 1, len(second) + 1), np.inf)
    totals[0, 0] = 0.0
    for row, cost in enumerate(costs, 1):
        start = np.minimum(totals[row - 1, :-1], totals[row - 1, 1:] + haste) + cost
        along = np.cumsum(cost + haste)  # of staying at this moment of `first`
        totals[row, 1:] = np.minimum.accumulate(start - along) + along
    i, j = len(first), len(second)
    moments = np.zeros(len(second))
    counts = np.zeros(len(second))
    while i > 0 and j > 0:
        moments[j - 1] += i - 1
        counts[j - 1] += 1
        steps = {(i - 1, j - 1): 0.0, (i - 1, j): haste, (i, j - 1): haste}
        i, j = min(steps, key=lambda place: totals[place] + steps[place])
    return moments / counts


def track_at(speech: Speech, voice: np.ndarray) -> np.ndarray:
    """The mouth's opening in `speech` when `voice`, which says the same, says it: a value for each frame."""
    first, second = (to_levels(to_bands(torch.from_numpy(sound))).numpy() for sound in (speech.voice, voice))
    per_frame = SAMPLING_RATE // FRAME_RATE // STEP
    moments = align(first, second)[::per_frame] / per_frame
    return np.interp(moments, np.arange(len(speech.mouth)), speech.mouth[:, 1])


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation, 0 if one does not change."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def to_voice(audio: np.ndarray, num_frames: int) -> np.ndarray:
    """Sound of a pipeline, `(channels, num_samples)` that last so many frames, as a voice at 12,800 Hz."""
    num_samples = num_frames * SAMPLING_RATE // FRAME_RATE
    return resample_audio(torch.from_numpy(audio), num_samples).mean(dim=0).numpy()


def distort(sound: np.ndarray, rng: np.random.Generator, snr: float, highest: float | None = None) -> np.ndarray:
    """Cuts off what is above `highest` Hz, and adds white noise `snr` dB below the sound."""
    if highest is not None:
        sound = scipy.signal.sosfiltfilt(scipy.signal.butter(6, highest, fs=SAMPLING_RATE, output="sos"), sound)
    noise = np.sqrt(np.square(sound).mean() / 10 ** (snr / 10)) * rng.standard_normal(len(sound))
    return (sound + noise).astype(np.float32)


# What is seen


class Seen(NamedTuple):
    """
    Args:
        look (`dict`): Keys and values of `LOOKS`, read from all frames together.
        is_open (`np.ndarray` of shape `(num_frames,)`): Whether the eyes are open.
        opening (`np.ndarray` of shape `(num_frames,)`): Of the mouth, in parts of the head's width.
        boxes (`np.ndarray` of shape `(num_frames, 3, 4)`): As those of `people.Drawing`: both eyes and the mouth.
    """

    look: dict[str, str | bool]
    is_open: np.ndarray
    opening: np.ndarray
    boxes: np.ndarray


class LookReader(nn.Module):
    """Sees frames `(num_frames, 3, SIZE, SIZE)` in [-1, 1]: logits of each look, of lids, the opening and boxes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 96)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(4, outer), nn.GELU())
                for inner, outer in itertools.pairwise(widths)
            ),
            nn.Flatten(),
            nn.Linear(widths[-1] * (SIZE // 32) ** 2, 128),
            nn.GELU(),
            nn.Linear(128, sum(map(len, LOOKS.values())) + 2 + 13),
        )

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layers(frames).split([*map(len, LOOKS.values()), 2, 1, 12], dim=1)

    @torch.inference_mode()
    def read(self, frames: np.ndarray) -> Seen:
        """Reads uint8 frames `(num_frames, height, width, 3)`: the square in the middle, at 128 pixels."""
        *size, _ = frames.shape[1:]
        side, corner = min(size), [(length - min(size)) // 2 for length in size]
        square = frames[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side]
        *looks, lids, opening, boxes = self(resize(to_tensor(square), SIZE))
        choices = [logits.log_softmax(dim=1).mean(dim=0).argmax() for logits in looks]
        return Seen(
            {name: LOOKS[name][choice] for name, choice in zip(LOOKS, choices, strict=True)},
            lids.argmax(dim=1).bool().numpy(),
            opening[:, 0].numpy(),
            side * boxes.view(-1, 3, 4).numpy() + np.tile(corner[::-1], 2),
        )


def resize(frames: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True)


def crops(frames: np.ndarray, boxes: np.ndarray) -> Iterator[np.ndarray]:
    """The luminance in [0, 1] of each frame in its boxes, `(num_frames, ..., 4)` in pixels."""
    height, width = frames.shape[1:3]
    for frame, places in zip(frames @ np.array([0.299, 0.587, 0.114]) / 255, boxes, strict=True):
        for left, top, right, bottom in np.round(places).astype(int).reshape(-1, 4):
            left, top = np.clip([left, top], 0, [width - 2, height - 2])
            yield frame[top : max(bottom, top + 2), left : max(right, left + 2)]


def contrast(frames: np.ndarray, boxes: np.ndarray) -> float:
    """Mean standard deviation of luminance in boxes; the lids' blinks are in it, as they are in what it is held to."""
    return float(np.mean([crop.std() for crop in crops(frames, boxes)]))


def sharpness(frames: np.ndarray, boxes: np.ndarray) -> float:
    """Mean energy of the gradient of luminance in boxes."""
    return float(
        np.mean([sum(np.square(slope).mean() for slope in np.gradient(crop)) for crop in crops(frames, boxes)])
    )


def lips_height(opening: np.ndarray) -> np.ndarray:
    """How high lips are that open so far, both in parts of the head's width, as `people.py` draws them: never 0."""
    return 0.055 / (2 * FACE.real) + opening


class Readers(nn.Module):
    """Both networks."""

    def __init__(self, looks: LookReader, words: WordReader) -> None:
        super().__init__()
        self.looks, self.words = looks, words

    @classmethod
    def load(cls, file: Path) -> "Readers":
        readers = cls(LookReader(), WordReader()).eval()
        readers.load_state_dict(load_file(file))
        return readers

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half() for name, value in self.state_dict().items()}, file)


# Training, on what is drawn


def draw_moments(rng: np.random.Generator, count: int) -> tuple[Look, np.ndarray, np.ndarray, Drawing]:
    """Draws moments of a person in any pose: the look, whether eyes are open and the mouth's opening, and pictures."""
    look, motion = draw_look(rng), make_motion(rng, 100, np.full(100, rng.random()))
    moments = rng.choice(100, count, replace=False)
    lids = np.where(rng.random(count) < 0.2, rng.random(count), motion.lids[moments])
    motion = replace(Motion(*(values[moments] for values in vars(motion).values())), lids=lids)
    shapes, part = np.maximum(list(MOUTH.values()), 0), rng.random((count, 1)) * rng.integers(2, size=(count, 1))
    start, end = rng.integers(len(MOUTH), size=(2, count))
    mouth = (1 - part) * shapes[start] + part * shapes[end]
    return look, lids > 0.5, mouth[:, 1], draw_person(rng, look, motion, mouth, SIZE, SIZE)


def spoil(frames: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifts, scales, tints, coarsens and adds noise to frames; boxes `(num_frames, 12)` in parts move along."""
    count = len(frames)
    zoom, shift = 1 + 0.12 * (torch.rand(count, 1) - 0.5), 0.1 * (torch.rand(count, 2) - 0.5)
    places = torch.cat([zoom[..., None] * torch.eye(2), shift[..., None]], dim=2)
    grid = F.affine_grid(places, frames.shape, align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    boxes = 0.5 + ((2 * boxes - 1).view(count, 6, 2) - shift[:, None]).div(2 * zoom[..., None]).flatten(1)
    frames = frames * (1 + 0.1 * torch.randn(count, 1, 1, 1)) + 0.04 * torch.randn(count, 3, 1, 1)
    if torch.rand(()) < 0.7:
        frames = resize(resize(frames, int(torch.randint(40, SIZE, ()))), SIZE)
    return frames + 0.15 * torch.rand(count, 1, 1, 1) ** 2 * torch.randn_like(frames), boxes


def train_look_reader(people: int = 1400, steps: int = 1600, batch_size: int = 48, seed: int = 0) -> LookReader:
    """Trains on four moments each of so many people."""
    rng = np.random.default_rng([seed, 1])
    moments = [draw_moments(rng, 4) for _ in range(people)]
    frames = np.concatenate([drawing.frames for *_, drawing in moments])
    columns = [[values.index(getattr(look, name)) for look, *_ in moments] for name, values in LOOKS.items()]
    labels = torch.tensor(columns).repeat_interleave(4, dim=1)
    labels[list(LOOKS).index("hair_colour"), labels[2] == HAIR_STYLE.index("bald")] = -100  # which no loss counts
    lids, openings = (torch.from_numpy(np.concatenate(each)) for each in list(zip(*moments, strict=True))[1:3])
    boxes = [drawing.boxes for *_, drawing in moments]
    boxes = torch.from_numpy(np.concatenate(boxes)).float().flatten(1) / SIZE

    def loss(reader: LookReader, batch: torch.Tensor) -> torch.Tensor:
        inputs, places = spoil(to_tensor(frames[batch]), boxes[batch])
        *looks, open_lids, opening, found = reader(inputs)
        choices = zip([*looks, open_lids], [*labels, lids.long()], strict=True)
        distance = F.l1_loss(opening[:, 0], openings[batch].float()) + F.l1_loss(found, places)
        return sum(F.cross_entropy(logits, label[batch]) for logits, label in choices) + 20 * distance

    torch.manual_seed(seed)
    return fit(LookReader(), loss, steps, len(frames), batch_size)


def train_word_reader(lines: int = 3000, steps: int = 2500, batch_size: int = 16, seed: int = 0) -> WordReader:
    """Trains on so many lines, a batch of which last the same, 1 to 6 s."""
    rng = np.random.default_rng([seed, 2])
    lengths = np.linspace(25, 150, 12).astype(int)
    voices = torch.from_numpy(rng.integers(len(VOICE), size=(len(lengths), lines // len(lengths))))
    power, labels = [], []
    for row, length in zip(voices, lengths.tolist(), strict=True):
        spoken = [draw_words(rng, length / FRAME_RATE) for _ in row]
        sounds = [say(rng, words, list(VOICE)[voice], length).voice for words, voice in zip(spoken, row, strict=True)]
        power.append([to_bands(torch.from_numpy(sound)) for sound in sounds])
        labels.append([torch.tensor(heard(words), dtype=torch.long) + 1 for words in spoken])
    torch.manual_seed(seed)
    noise = to_bands(torch.randn(20 * SAMPLING_RATE))

    def loss(reader: WordReader, batch: torch.Tensor) -> torch.Tensor:
        which = int(torch.randint(len(lengths), ()))
        bands = torch.stack([power[which][line] for line in batch])
        start = int(torch.randint(len(noise) - bands.shape[1], ()))
        gain, level, highest = torch.rand(3, batch_size, 1, 1)
        bands = bands * 10 ** (gain - 0.7) * (torch.arange(NUM_BANDS) < 40 + 20 * highest)
        bands = bands + 10 ** (-4.0 - 4.6 * level) * noise[start : start + bands.shape[1]]
        logits, voice = reader(to_levels(bands))
        spoken = [labels[which][line] for line in batch]
        sizes = torch.full((batch_size,), logits.shape[1]), torch.tensor([len(words) for words in spoken])
        ctc = F.ctc_loss(logits.log_softmax(dim=2).transpose(0, 1), torch.cat(spoken), *sizes, zero_infinity=True)
        return ctc + 0.1 * F.cross_entropy(voice, voices[which, batch])

    return fit(WordReader(), loss, steps, lines // len(lengths), batch_size)


def fit(reader: nn.Module, loss_of: Callable[..., torch.Tensor], steps: int, count: int, batch_size: int) -> nn.Module:
    """Trains a reader by a loss of batches of numbers below `count`."""
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    losses = []
    for step in range(1, steps + 1):
        loss = loss_of(reader, torch.randint(count, (batch_size,)))
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            line = {"reader": type(reader).__name__, "step": step, "loss": round(np.mean(losses[-100:]), 3)}
            print(json.dumps(line), flush=True)
    return reader.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    Readers(train_look_reader(), train_word_reader()).save(arguments.output)


if __name__ == "__main__":
    main()
