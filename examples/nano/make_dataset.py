# SPDX-License-Identifier: Apache-2.0
"""Draws clips of the world of talking heads into arrays on disk, which every other recipe reads.

    python examples/nano/make_dataset.py data/128 --clips 6000
    python examples/nano/make_dataset.py data/256 --clips 1200 --size 256

Writes `frames.npy` (uint8, clips x frames x size x size x 3), `voices.npy` (int16, clips x samples at 51,200 Hz) and
`scenes.jsonl`. Clip number i is `world.make_clip(i, size)`, so that clips of two sizes show the same moments.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import world


class Dataset(NamedTuple):
    """What `make_dataset.py` wrote; the arrays stay on disk until they are indexed."""

    frames: np.ndarray
    voices: np.ndarray
    scenes: list[world.Scene]


def load_dataset(folder: Path) -> Dataset:
    """
    Opens a dataset.

    Raises:
        `OSError`: The folder is no finished dataset.
    """
    scenes = load_scenes(folder)
    return Dataset(*(np.load(folder / name, mmap_mode="r") for name in ("frames.npy", "voices.npy")), scenes)


def load_scenes(folder: Path) -> list[world.Scene]:
    """Reads the scenes of a dataset, or of a cache of its latents."""
    scenes = map(json.loads, (folder / "scenes.jsonl").read_text().splitlines())
    return [world.Scene(**{**scene, "syllables": tuple(scene["syllables"])}) for scene in scenes]


def write_clip(folder: Path, seed: int, size: int) -> world.Scene:
    """Draws one clip into its place in the arrays."""
    clip = world.make_clip(seed, size)
    np.load(folder / "frames.npy", mmap_mode="r+")[seed] = clip.frames
    np.load(folder / "voices.npy", mmap_mode="r+")[seed] = np.round(clip.voice * 32767)
    return clip.scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--clips", type=int, default=6000, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="height and width of the frames, default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes, as many as there are cores if left out")
    arguments = parser.parse_args()

    folder, num_frames = arguments.output, world.NUM_FRAMES
    folder.mkdir(parents=True, exist_ok=True)
    num_samples = num_frames * world.SAMPLING_RATE // world.FRAME_RATE
    shapes = {
        "frames.npy": (np.uint8, (arguments.clips, num_frames, arguments.size, arguments.size, 3)),
        "voices.npy": (np.int16, (arguments.clips, num_samples)),
    }
    for name, (dtype, shape) in shapes.items():
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=shape)
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = [pool.submit(write_clip, folder, seed, arguments.size) for seed in range(arguments.clips)]
        lines = [json.dumps(asdict(job.result())) + "\n" for job in jobs]
    # The last file to be written is the one that `load_dataset` opens first.
    (folder / "scenes.tmp").write_text("".join(lines))
    (folder / "scenes.tmp").replace(folder / "scenes.jsonl")


if __name__ == "__main__":
    main()
