# SPDX-License-Identifier: Apache-2.0
"""What the people of the world say: words of seven languages as a table, as sound and as shapes of a mouth.

- a closed vocabulary whose spelling, romanisation and sounds are one table
- speech at 12,800 Hz: pitch with tones, formants that glide from sound to sound, bands of noise
- the mouth's width and opening at 25 frames a second, on the clock of the sound; m, b and p shut it
- rate, pitch, intonation, pauses and beginning are drawn

    python examples/nano/words.py words.png   # all words as spectrograms over mouths, and beside it words.wav
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import scipy.fft
import scipy.ndimage
import scipy.signal
import soundfile

FRAME_RATE = 25
MAX_WORDS = 8  # of a clip
SAMPLING_RATE = 12800  # 512 samples a frame, four times as fast to learn as the published model's 2,048
CONTROL_RATE = 200  # moments a second at which what is said is set

# Pitch in Hz, and a factor of the formants.
VOICE = {"deep": (100.0, 0.90), "medium": (175.0, 1.0), "high": (250.0, 1.15)}
SLOWEST, FASTEST = 0.8, 1.25
PAUSE = (0.08, 0.20)  # seconds between words
LEAD, TAIL = 0.16, 0.20  # seconds before the first and after the last sound; it fades in and out within 0.04 s of them

# Width and opening in parts of the head's width. Lips that shut press on: where the opening is negative, it is 0.
MOUTH = {
    "shut": (0.36, -0.10),
    "lip": (0.38, 0.04),
    "teeth": (0.42, 0.05),
    "a": (0.40, 0.30),
    "e": (0.44, 0.17),
    "i": (0.46, 0.08),
    "o": (0.28, 0.24),
    "u": (0.16, 0.12),
}


class Sound(NamedTuple):
    """
    Args:
        kind (`str`): Key of `ONSET`.
        formants (`tuple[float, float, float]`): Hz.
        level (`float`): Strength of what is voiced.
        noise (`tuple[float, float, float]`): Centre and width of a band in Hz, and its strength.
        seconds (`float`): Length at rate 1 where it is stressed.
        mouth (`str`, *optional*): Key of `MOUTH`; where it is `None`, that of the next sound, or of the last.
    """

    kind: str
    formants: tuple[float, float, float]
    level: float
    noise: tuple[float, float, float]
    seconds: float
    mouth: str | None


ONSET = {"vowel": 0.0, "nasal": 0.0, "glide": 0.0, "fricative": 0.0, "affricate": 0.4, "stop": 0.7}  # of the noise
UNSTRESSED = 0.75  # length of a vowel that is not stressed
NOISE = 0.03  # strength of all noise: s is 20 dB below a
TILT = 300.0  # Hz, from where harmonics weaken
FORMANTS = (500.0, 1500.0, 2500.0)  # Hz, which others are told by
CLEAR = (1000, 1000, 0.0)
# Means and deviations of what `Speech.latents` holds; phases are made larger, as they are the hardest to tell.
LATENTS = np.array(
    [
        (0, 0, 0, 0, 0, -0.19, -0.05, 0.01, 0.365, 0.365, 0.021, 0.027, 0.047),
        (2 / 3, 2 / 3, 2 / 3, 2 / 3, 0.4, 0.44, 0.39, 0.157, 0.34, 0.34, 0.105, 0.125, 0.185),
    ]
)
SOUNDS = {
    "a": Sound("vowel", (750, 1250, 2500), 1.00, CLEAR, 0.22, "a"),
    "ɛ": Sound("vowel", (580, 1800, 2500), 0.85, CLEAR, 0.22, "e"),
    "e": Sound("vowel", (430, 2050, 2600), 0.80, CLEAR, 0.22, "e"),
    "i": Sound("vowel", (280, 2290, 3010), 0.60, CLEAR, 0.22, "i"),
    "ɔ": Sound("vowel", (590, 920, 2450), 0.95, CLEAR, 0.22, "o"),
    "o": Sound("vowel", (450, 800, 2450), 0.85, CLEAR, 0.22, "o"),
    "u": Sound("vowel", (310, 750, 2240), 0.65, CLEAR, 0.22, "u"),
    "ə": Sound("vowel", (500, 1450, 2450), 0.75, CLEAR, 0.20, "e"),
    "ü": Sound("vowel", (280, 1850, 2250), 0.60, CLEAR, 0.22, "u"),
    "ö": Sound("vowel", (400, 1500, 2300), 0.70, CLEAR, 0.22, "u"),
    "õ": Sound("vowel", (370, 1000, 2300), 0.70, CLEAR, 0.24, "o"),
    "ẽ": Sound("vowel", (650, 1400, 2700), 0.75, CLEAR, 0.24, "e"),
    "m": Sound("nasal", (260, 1100, 2200), 0.25, CLEAR, 0.20, "shut"),
    "n": Sound("nasal", (260, 1550, 2600), 0.25, CLEAR, 0.10, "teeth"),
    "ng": Sound("nasal", (260, 2000, 2800), 0.25, CLEAR, 0.10, None),
    "l": Sound("glide", (350, 1100, 2700), 0.40, CLEAR, 0.10, "teeth"),
    "r": Sound("glide", (420, 1200, 1650), 0.40, CLEAR, 0.10, None),
    "w": Sound("glide", (290, 650, 2200), 0.40, CLEAR, 0.12, "u"),
    "y": Sound("glide", (270, 2300, 3000), 0.40, CLEAR, 0.10, "i"),
    "h": Sound("fricative", (500, 1500, 2500), 0.0, (1500, 900, 0.5), 0.10, None),
    "s": Sound("fricative", (300, 1700, 2600), 0.0, (5000, 800, 1.0), 0.13, "teeth"),
    "z": Sound("fricative", (280, 1700, 2600), 0.2, (5000, 800, 0.7), 0.11, "teeth"),
    "sh": Sound("fricative", (300, 1900, 2600), 0.0, (3200, 700, 1.0), 0.13, "teeth"),
    "zh": Sound("fricative", (280, 1900, 2600), 0.2, (3200, 700, 0.7), 0.11, "teeth"),
    "f": Sound("fricative", (300, 1100, 2300), 0.0, (4300, 1500, 0.4), 0.13, "lip"),
    "v": Sound("fricative", (280, 1100, 2300), 0.2, (4300, 1500, 0.3), 0.12, "lip"),
    "th": Sound("fricative", (300, 1400, 2600), 0.0, (4600, 1300, 0.4), 0.13, "lip"),
    "ts": Sound("affricate", (300, 1700, 2600), 0.0, (5000, 800, 1.0), 0.15, "teeth"),
    "ch": Sound("affricate", (300, 1900, 2600), 0.0, (3200, 700, 1.0), 0.15, "teeth"),
    "p": Sound("stop", (300, 900, 2200), 0.0, (1000, 500, 1.0), 0.20, "shut"),
    "b": Sound("stop", (250, 900, 2200), 0.1, (1000, 500, 0.5), 0.20, "shut"),
    "t": Sound("stop", (300, 1700, 2600), 0.0, (4200, 900, 1.0), 0.11, "teeth"),
    "d": Sound("stop", (250, 1700, 2600), 0.1, (4200, 900, 0.5), 0.11, "teeth"),
    "k": Sound("stop", (300, 1900, 2400), 0.0, (1900, 500, 1.0), 0.11, None),
    "g": Sound("stop", (250, 1900, 2400), 0.1, (1900, 500, 0.5), 0.11, None),
}


class Word(NamedTuple):
    """
    Args:
        language (`str`): One of seven, or "syllables".
        spelling (`str`): As natives write it.
        romanised (`str`): In Latin letters without accents.
        sounds (`tuple[str, ...]`): Keys of `SOUNDS`. Digits after one are its tone on a scale from 1, low, to 5, and
            make it stressed.
    """

    language: str
    spelling: str
    romanised: str
    sounds: tuple[str, ...]


# Hello, thank you, goodbye, yes, no, and the numbers from one to four.
TABLE = """
English    hello      hello       h ə l o42 u
English    thank you  thank you   th ɛ42 ng k y u
English    goodbye    goodbye     g u d b a42 i
English    yes        yes         y ɛ42 s
English    no         no          n o42 u
English    one        one         w ɔ42 n
English    two        two         t u42
English    three      three       th r i42
English    four       four        f ɔ42
French     bonjour    bonjour     b õ zh u42 r
French     merci      merci       m ɛ r s i42
French     au revoir  au revoir   o r ə v w a42 r
French     oui        oui         w i42
French     non        non         n õ42
French     un         un          ẽ42
French     deux       deux        d ö42
French     trois      trois       t r w a42
French     quatre     quatre      k a42 t r ə
German     hallo      hallo       h a42 l o
German     danke      danke       d a42 ng k ə
German     tschüss    tschuss     ch ü42 s
German     ja         ja          y a42
German     nein       nein        n a42 i n
German     eins       eins        a42 i n s
German     zwei       zwei        ts v a42 i
German     drei       drei        d r a42 i
German     vier       vier        f i42 ə
Mandarin   你好       ni hao      n i35 h a214 u
Mandarin   谢谢       xie xie     sh y ɛ51 sh y ɛ
Mandarin   再见       zai jian    ts a51 i ch y ɛ51 n
Mandarin   对         dui         d u51 e i
Mandarin   不         bu          b u51
Mandarin   一         yi          y i55
Mandarin   二         er          ə51 r
Mandarin   三         san         s a55 n
Mandarin   四         si          s ə51
Cantonese  你好       nei hou     n e23 i h o35 u
Cantonese  多謝       do ze       d ɔ55 ts ɛ22
Cantonese  再見       zoi gin     ts ɔ33 i g i33 n
Cantonese  係         hai         h a22 i
Cantonese  唔係       m hai       m21 h a22 i
Cantonese  一         jat         y a55 t
Cantonese  二         ji          y i22
Cantonese  三         saam        s a55 m
Cantonese  四         sei         s e33 i
Japanese   こんにちは  konnichiwa  k o n n i44 ch i w a
Japanese   ありがとう  arigato     a r i44 g a t o
Japanese   さようなら  sayonara    s a y o44 n a r a
Japanese   はい       hai         h a42 i
Japanese   いいえ     iie         i i44 e
Japanese   いち       ichi        i ch i44
Japanese   に         ni          n i42
Japanese   さん       san         s a33 n
Japanese   よん       yon         y o42 n
Korean     안녕       annyeong    a n n y ɔ44 ng
Korean     고마워     gomawo      g o m a44 w ɔ
Korean     잘 가      jal ga      ch a44 l g a
Korean     예         ye          y e42
Korean     아니       ani         a n i44
Korean     하나       hana        h a42 n a
Korean     둘         dul         d u42 l
Korean     셋         set         s e42 t
Korean     넷         net         n e42 t
syllables  ma         ma          m a33
syllables  me         me          m e33
syllables  mi         mi          m i33
syllables  mo         mo          m o33
syllables  mu         mu          m u33
"""
ROWS = [re.split(r" {2,}", row) for row in TABLE.strip().splitlines()]
VOCABULARY = tuple(Word(*row[:3], tuple(row[3].split())) for row in ROWS)
LANGUAGES = tuple(dict.fromkeys(word.language for word in VOCABULARY))


class Speech(NamedTuple):
    """
    Args:
        voice (`np.ndarray` of shape `(num_frames * 512,)`): float32 in [-0.5, 0.5] at 12,800 Hz.
        mouth (`np.ndarray` of shape `(num_frames, 2)`): float32, width and opening in parts of the head's width.
        stress (`np.ndarray` of shape `(num_frames,)`): float32 in [0, 1], high on stressed vowels.
        spans (`np.ndarray` of shape `(num_words, 2)`): float32, beginning and end of each word in seconds.
        latents (`np.ndarray` of shape `(num_frames, 13)`): float32, what the sound autoencoder's latents say, of mean
            0 and deviation 1: cosines and sines of the pitch's phase after one and three quarters of each frame; the
            pitch and the formants in its middle, in octaves; how loud what is voiced is after one and three quarters;
            and noise up to 2,500, up to 3,800 and up to 6,400 Hz in the middle. Phases, pitch and formants fade to
            those of `FORMANTS` where nothing is voiced.
    """

    voice: np.ndarray
    mouth: np.ndarray
    stress: np.ndarray
    spans: np.ndarray
    latents: np.ndarray


REST = Sound("nasal", (400, 1400, 2500), 0.0, CLEAR, 0.0, "shut")


class Segment(NamedTuple):
    """A sound in its place: its tone, empty where it is not stressed, the shape of the mouth and its length."""

    sound: Sound
    tone: str
    mouth: str
    seconds: float


# What is said when


def split(word: Word) -> list[Segment]:
    """The sounds of a word, as long as at rate 1."""
    names = [re.fullmatch(r"(\D+)(\d*)", name).groups() for name in word.sounds]
    shapes = [SOUNDS[name].mouth for name, _ in names]
    segments = []
    for i, (name, tone) in enumerate(names):
        sound = SOUNDS[name]
        shape = next(shape for shape in (*shapes[i:], *shapes[i::-1]) if shape)
        short = sound.kind == "vowel" and not tone
        segments.append(Segment(sound, tone, shape, sound.seconds * (UNSTRESSED if short else 1)))
    return segments


def duration(words: Sequence[Word], rate: float = 1.0, pause: float = sum(PAUSE) / 2) -> float:
    """Seconds of a clip that says the words: with pauses between, and with silence before and after."""
    speaking = sum(part.seconds for word in words for part in split(word))
    return LEAD + speaking / rate + pause * max(len(words) - 1, 0) + TAIL


def draw_words(rng: np.random.Generator, seconds: float) -> tuple[Word, ...]:
    """Draws up to `MAX_WORDS` of a language that a clip has time for, one time in five with syllables among them."""
    languages = {LANGUAGES[rng.integers(len(LANGUAGES))]} | ({"syllables"} if rng.random() < 0.2 else set())
    pool = [word for word in VOCABULARY if word.language in languages]
    rate = rng.uniform(SLOWEST, FASTEST)
    words: tuple[Word, ...] = ()
    for _ in range(rng.integers(1, MAX_WORDS + 1)):
        fitting = [word for word in pool if duration((*words, word), rate, PAUSE[0]) <= seconds]
        if not fitting:
            break
        words += (fitting[rng.integers(len(fitting))],)
    return words


def schedule(rng: np.random.Generator, words: Sequence[Word], seconds: float) -> tuple[list[Segment], np.ndarray]:
    """
    Draws the rate, the pauses and the beginning.

    Args:
        rng (`np.random.Generator`): What draws.
        words (`Sequence[Word]`): At least one.
        seconds (`float`): Length of the clip.

    Returns:
        `tuple[list[Segment], np.ndarray]`: Sounds and pauses that fill the clip, and the beginning and end of each
        word in seconds, float32 `(num_words, 2)`.

    Raises:
        ValueError: If the words do not fit in at the highest rate.
    """
    spare = seconds - duration(words, FASTEST, PAUSE[0])
    if spare < 0:
        said = " ".join(word.romanised for word in words)
        raise ValueError(f"words={said!r} take {seconds - spare:.2f} s at least, but the clip has {seconds:.2f} s")
    rate, pauses = rng.uniform(SLOWEST, FASTEST), rng.uniform(*PAUSE, len(words) - 1)
    wanted = duration(words, rate, PAUSE[0]) + (pauses - PAUSE[0]).sum() - (seconds - spare)
    share = min(1.0, spare / wanted)  # of what would be said more slowly than it must be
    slowness = 1 / FASTEST + share * (1 / rate - 1 / FASTEST)
    begin = LEAD + rng.random() * (spare - share * wanted)
    segments, spans, time = [], [], 0.0
    for pause, word in zip([begin, *(PAUSE[0] + share * (pauses - PAUSE[0]))], words, strict=True):
        sounds = [part._replace(seconds=slowness * part.seconds) for part in split(word)]
        spans.append((time + pause, time + pause + sum(part.seconds for part in sounds)))
        segments += [Segment(REST, "", "shut", pause), *sounds]
        time = spans[-1][1]
    return [*segments, Segment(REST, "", "shut", seconds - time)], np.array(spans, np.float32)


# How it sounds and looks


def say(
    rng: np.random.Generator, words: Sequence[Word], voice: str, num_frames: int, noise_repeats: bool = False
) -> Speech:
    """
    Says words, or is silent with a closed mouth if there are none.

    Args:
        rng (`np.random.Generator`): Draws rate, pitch, intonation, pauses and beginning.
        words (`Sequence[Word]`): What is said, in this order.
        voice (`str`): Key of `VOICE`.
        num_frames (`int`): Length of the clip.
        noise_repeats (`bool`): Whether noise has the same waveform in each frame of each clip, so that a decoder,
            which draws none, can make it. All else is the same.

    Raises:
        ValueError: If the words do not fit in.
    """
    seconds = num_frames / FRAME_RATE
    if words:
        segments, spans = schedule(rng, words, seconds)
    else:
        segments, spans = [Segment(REST, "", "shut", seconds)], np.zeros((0, 2), np.float32)
    ends = np.cumsum([part.seconds for part in segments])
    steps = CONTROL_RATE // FRAME_RATE
    times = np.arange(steps * num_frames + 1) / CONTROL_RATE
    which = np.searchsorted(ends[:-1], times, side="right")  # segment at each moment
    mouth = smooth(np.array([MOUTH[part.mouth] for part in segments])[which], 0.16)
    stress = smooth(np.array([float(part.tone != "") for part in segments])[which], 0.30)
    pitch, scale = VOICE[voice]
    pitch = pitch * make_pitch(rng, segments, times)
    sound, *controls = synthesise(rng, segments, which, times, pitch, scale, noise_repeats)
    gain = 0.5 / max(np.abs(sound).max(), 1e-6)
    phases, levels = (values[steps // 4 :: steps // 2].reshape(num_frames, 2) for values in controls[::2])
    pitch, formants, level, noise = (values[steps // 2 :: steps] for values in (pitch, *controls[1:]))
    voiced = np.minimum(8 * level, 1)[:, None]
    tone = np.concatenate([np.cos(phases), np.sin(phases), np.log2(pitch / 160)[:, None]], axis=1)
    loudness = gain * np.concatenate([levels, np.add.reduceat(noise, (0, 100, 152), axis=1)], axis=1)
    known = np.concatenate([voiced * tone, voiced * np.log2(formants / FORMANTS), loudness**0.3], axis=1)
    means, deviations = LATENTS
    return Speech(
        voice=(gain * sound).astype(np.float32),
        mouth=np.maximum(mouth[:-1:steps], 0).astype(np.float32),
        stress=stress[:-1:steps].astype(np.float32),
        spans=spans,
        latents=((known - means) / deviations).astype(np.float32),
    )


def smooth(track: np.ndarray, seconds: float) -> np.ndarray:
    """Averages what is set at `CONTROL_RATE` over time, the first axis, by a Hann window of so many seconds."""
    window = np.hanning(round(seconds * CONTROL_RATE) + 1)
    return scipy.ndimage.convolve1d(track, window / window.sum(), axis=0, mode="nearest")


def make_pitch(rng: np.random.Generator, segments: Sequence[Segment], times: np.ndarray) -> np.ndarray:
    """Pitch over that of the voice, `(num_times,)`: of a speaker, with tones and an intonation that falls."""
    moments, semitones, begin = [0.0], [0.0], 0.0
    for part in segments:
        moments += np.linspace(begin, begin + part.seconds, len(part.tone)).tolist()
        semitones += [1.5 * (int(digit) - 3) for digit in part.tone]
        begin += part.seconds
    tones = smooth(np.interp(times, moments, semitones), 0.12)
    sway = 0.5 * np.sin(2 * np.pi * (0.5 * times + rng.random()))
    return rng.uniform(0.92, 1.08) * 2 ** ((tones + sway + 0.5 - times / times[-1]) / 12)


def synthesise(
    rng: np.random.Generator,
    segments: Sequence[Segment],
    which: np.ndarray,
    times: np.ndarray,
    pitch: np.ndarray,
    scale: float,
    noise_repeats: bool,
) -> tuple[np.ndarray, ...]:
    """
    Sends harmonics of the pitch through formants, and noise through bands, by a filter that changes over time.

    Args:
        rng (`np.random.Generator`): Draws the noise.
        segments (`Sequence[Segment]`): What is said.
        which (`np.ndarray` of shape `(num_times,)`): Segment at each moment.
        times (`np.ndarray` of shape `(num_times,)`): Moments in seconds, `CONTROL_RATE` a second.
        pitch (`np.ndarray` of shape `(num_times,)`): Hz.
        scale (`float`): Factor of the formants.
        noise_repeats (`bool`): See [`say`].

    Returns:
        `tuple`: Sound at `SAMPLING_RATE`, of any level, `((num_times - 1) * 64,)`; and at each moment the phase of
        the pitch, the formants, how loud the voice is, and that of noise at multiples of 25 Hz.
    """
    hop, size = SAMPLING_RATE // CONTROL_RATE, 512
    num_samples = (len(times) - 1) * hop
    cycles = np.cumsum(np.interp(np.arange(num_samples) / SAMPLING_RATE, times, pitch)) / SAMPLING_RATE
    half = np.pi * (cycles + rng.random())
    count = int(SAMPLING_RATE / 2 / pitch.max())
    harmonics = np.sin(count * half) * np.sin((count + 1) * half) / np.sin(half)  # the sum of so many sines
    noise = rng.standard_normal(num_samples)
    if noise_repeats:
        noise = np.resize(np.random.default_rng(0).standard_normal(SAMPLING_RATE // FRAME_RATE), num_samples)

    bins = np.arange(0, SAMPLING_RATE / 2 + 1, SAMPLING_RATE // size, dtype=np.float32)  # Hz
    formants = scale * smooth(np.array([part.sound.formants for part in segments], np.float32)[which], 0.08)
    level = smooth(np.array([part.sound.level for part in segments], np.float32)[which], 0.04)
    peaks = [
        strength / (1 + ((bins - formants[:, i, None]) / width) ** 2)
        for i, (strength, width) in enumerate(((1.0, 70.0), (0.6, 90.0), (0.3, 130.0)))
    ]
    centre, width, strength = np.array([part.sound.noise for part in segments], np.float32).T[:, :, None]
    bands = NOISE * strength * np.exp(-(((bins - centre) / width) ** 2))  # (num_segments, num_bins)
    lengths = np.array([part.seconds for part in segments])
    begins = np.cumsum(lengths) - lengths
    begins += lengths * [ONSET[part.sound.kind] for part in segments]
    audible = (times >= begins[which])[:, None]

    tilt = TILT / (TILT + bins)  # what a throat gives and lips let out, falls by an octave's half in each octave
    gains = (level[:, None] * (sum(peaks) + 0.004) * tilt, smooth(bands[which] * audible, 0.03))
    sound = filter_over_time((harmonics, noise), gains, size)
    return sound, 2 * np.append(half, half[-1])[::hop], formants, level, gains[1]


def filter_over_time(sources: Sequence[np.ndarray], gains: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Sums sources, each times its gain `(num_times, num_bins)` at the lowest frequencies of a transform of a size."""
    num_times, num_bins = gains[0].shape
    hop = len(sources[0]) // (num_times - 1)
    window = np.pad(np.hanning(size // 2 + 1)[:-1], size // 4)  # the zeros are room for the filter to ring
    spectrum = 0
    for source, gain in zip(sources, gains, strict=True):
        frames = np.lib.stride_tricks.sliding_window_view(np.pad(source, size // 2), size)[::hop] * window
        spectrum += scipy.fft.rfft(frames.astype(np.float32))[:, :num_bins] * gain
    frames = scipy.fft.irfft(spectrum, size).reshape(num_times, -1, hop)
    output = np.zeros(len(sources[0]) + size)
    for i in range(frames.shape[1]):
        output[i * hop :][: num_times * hop] += frames[:, i].ravel()
    return output[size // 2 : -size // 2]


def draw_speech(speech: Speech, height: int = 96, speed: int = 150) -> PIL.Image.Image:
    """Draws a spectrogram, so many pixels a second wide, and beneath it opening and width of the mouth."""
    _, _, power = scipy.signal.spectrogram(speech.voice, SAMPLING_RATE, nperseg=256, noverlap=192)
    shade = np.clip(2.55 * (100 + 10 * np.log10(power + 1e-12)), 0, 255)
    width = round(speed * len(speech.mouth) / FRAME_RATE)
    image = PIL.Image.new("RGB", (width, 2 * height), "white")
    image.paste(PIL.Image.fromarray(255 - shade[::-1].astype(np.uint8)).resize((width, height)))
    draw = PIL.ImageDraw.Draw(image)
    for x in range(width):
        wide, opening = height / 2 * speech.mouth[x * FRAME_RATE // speed]
        draw.line([(x, 1.5 * height - opening), (x, 1.5 * height + opening)], fill="firebrick")
        draw.point([(x, 1.5 * height - wide), (x, 1.5 * height + wide)], fill="blue")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--voice", choices=VOICE, default="medium", help="default: %(default)s")
    arguments = parser.parse_args()
    print(TABLE.strip())
    rng, voices = np.random.default_rng(0), []
    sheet = PIL.Image.new("RGB", (2600, 210 * len(LANGUAGES)), "white")
    for row, language in enumerate(LANGUAGES):
        for column, word in enumerate(word for word in VOCABULARY if word.language == language):
            speech = say(rng, [word], arguments.voice, num_frames=48)
            voices.append(speech.voice)
            sheet.paste(draw_speech(speech), (288 * column, 210 * row + 16))
            PIL.ImageDraw.Draw(sheet).text((288 * column + 4, 210 * row + 2), word.romanised, fill="black")
    sheet.save(arguments.output)
    soundfile.write(arguments.output.with_suffix(".wav"), np.concatenate(voices), SAMPLING_RATE)


if __name__ == "__main__":
    main()
