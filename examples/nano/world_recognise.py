# SPDX-License-Identifier: Apache-2.0
"""Tells from the pixels and the sound of a clip what it shows and says, to measure models of the world.

Everything is measured at the places where `world.py` draws it.
"""

import numpy as np
import torch
import world

from diffusers_magihuman.media import resample_audio


def mean_colour(frames: np.ndarray, boxes: list[tuple[float, float, float, float]]) -> np.ndarray:
    """Median colour over all frames of boxes `(left, top, right, bottom)` in parts of the size."""
    size = frames.shape[1]
    pieces = []
    for box in boxes:
        left, top, right, bottom = (round(edge * size) for edge in box)
        pieces.append(frames[:, top:bottom, left:right].reshape(-1, 3))
    return np.median(np.concatenate(pieces), axis=0)


def nearest(colour: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: np.square(colour - np.array(table[name])).sum())


def recognise_look(frames: np.ndarray) -> dict[str, str | bool]:
    """
    Reads what is seen.

    Args:
        frames (`np.ndarray` of shape `(num_frames, size, size, 3)`): uint8.

    Returns:
        `dict`: `skin`, `hair_colour`, `hair_length`, `glasses`, `shirt` and `background` as in a `world.Scene`.
    """
    background_boxes = [(0.02, 0.02, 0.15, 0.4), (0.85, 0.02, 0.98, 0.4)]
    hair_boxes = [(0.42, 0.2, 0.58, 0.24)]
    beside_boxes = [(0.27, 0.62, 0.33, 0.72), (0.67, 0.62, 0.73, 0.72)]
    background = mean_colour(frames, background_boxes)
    skin = mean_colour(frames, [(0.36, 0.48, 0.42, 0.54), (0.58, 0.48, 0.64, 0.54)])
    hair = mean_colour(frames, hair_boxes)
    beside = mean_colour(frames, beside_boxes)
    is_long = np.square(beside - hair).sum() < np.square(beside - background).sum()
    # The bridge between the glasses crosses nothing but skin.
    bridge = mean_colour(frames, [(0.485, 0.41, 0.515, 0.43)])
    return {
        "skin": nearest(skin, world.SKIN),
        "hair_colour": nearest(hair, world.HAIR_COLOUR),
        "hair_length": "long" if is_long else "short",
        "glasses": bool(bridge.mean() < 0.72 * skin.mean()),
        "shirt": nearest(mean_colour(frames, [(0.3, 0.9, 0.7, 0.98)]), world.SHIRT),
        "background": nearest(background, world.BACKGROUND),
    }


def measure_mouth(frames: np.ndarray) -> np.ndarray:
    """How far the mouth is open in each frame: how much of a strip through its centre is no skin, `(num_frames,)`."""
    size = frames.shape[1]
    skin = mean_colour(frames, [(0.36, 0.48, 0.42, 0.54), (0.58, 0.48, 0.64, 0.54)])
    rows, columns = slice(round(0.46 * size), round(0.68 * size)), slice(round(0.47 * size), round(0.53 * size))
    strip = frames[:, rows, columns].astype(np.float32)
    distance = np.sqrt(np.square(strip - skin).sum(axis=3))
    return np.clip((distance - 40) / 60, 0, 1).mean(axis=(1, 2))


def measure_pitch(voice: np.ndarray) -> float:
    """Pitch in Hz of a voice at 51,200 Hz, by the mean autocorrelation of windows of 80 ms."""
    windows = np.lib.stride_tricks.sliding_window_view(voice, 4096)[::1024]
    windows = windows[np.square(windows).mean(axis=1) > 0.1 * np.square(windows).mean()]
    spectra = np.abs(np.fft.rfft(windows * np.hanning(4096), 8192)) ** 2
    correlation = np.fft.irfft(spectra)[:, :2048]
    correlation = (correlation / correlation[:, :1]).mean(axis=0)
    shortest, longest = world.SAMPLING_RATE // 330, world.SAMPLING_RATE // 75
    candidates = correlation[shortest:longest]
    # A multiple of the period correlates as well as the period: take the first peak that is nearly the best.
    peaks = (candidates >= np.roll(candidates, 1)) & (candidates >= np.roll(candidates, -1))
    return world.SAMPLING_RATE / (shortest + (peaks & (candidates >= 0.9 * candidates.max())).argmax())


def to_voice(audio: np.ndarray) -> np.ndarray:
    """Sound of a pipeline, `(channels, samples)` of two seconds, as a voice of the world at 51,200 Hz."""
    num_samples = world.NUM_FRAMES * world.SAMPLING_RATE // world.FRAME_RATE
    return resample_audio(torch.from_numpy(audio), num_samples).mean(dim=0).numpy()


def recognise_voice(voice: np.ndarray) -> str:
    """The voice of a `world.Scene` whose pitch is nearest on a logarithmic scale."""
    pitch = measure_pitch(voice)
    return min(world.VOICE, key=lambda name: abs(np.log(pitch / world.VOICE[name][0])))
