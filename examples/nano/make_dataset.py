# SPDX-License-Identifier: Apache-2.0
"""Draws clips into arrays on disk, which the autoencoders are trained on.

    python examples/nano/make_dataset.py data/128 --clips 3000
    python examples/nano/make_dataset.py data/96x160 --clips 800 --size 96 160

Writes `frames.npy` (uint8, clips x frames x height x width x 3) and `boxes.npy` (float32, clips x frames x 3 x 4: both
eyes and the mouth, left, top, right, bottom). Clip number i is `clips.make_clip(i)`, or the held-out one of that
number.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from clips import make_clip


class Dataset(NamedTuple):
    """What `make_dataset.py` wrote; the arrays stay on disk until they are indexed."""

    frames: np.ndarray
    boxes: np.ndarray


def load_dataset(folder: Path) -> Dataset:
    """
    Opens a dataset.

    Raises:
        `OSError`: The folder is no finished dataset.
    """
    return Dataset(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Dataset._fields))


def write_clip(folder: Path, number: int, size: tuple[int, int], num_frames: int, held_out: bool) -> None:
    """Draws one clip into its place in the arrays."""
    drawing = make_clip(number, *size, num_frames, held_out).drawing
    for name, values in zip(Dataset._fields, (drawing.frames, drawing.boxes), strict=True):
        np.load(folder / f"{name}.npy", mmap_mode="r+")[number] = values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--clips", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), help="width and height, default: 128 128")
    parser.add_argument("--frames", type=int, default=25, help="of a clip, default: %(default)s")
    parser.add_argument("--held-out", action="store_true", help="draw combinations that no training sees")
    parser.add_argument("--workers", type=int, help="processes, as many as there are cores if left out")
    arguments = parser.parse_args()

    new = arguments.output.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (width, height), clips, num_frames = arguments.size, arguments.clips, arguments.frames
    shapes = (
        (np.uint8, (clips, num_frames, height, width, 3)),
        (np.float32, (clips, num_frames, 3, 4)),
    )
    for name, (dtype, shape) in zip(Dataset._fields, shapes, strict=True):
        np.lib.format.open_memmap(new / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    with ProcessPoolExecutor(arguments.workers) as pool:
        options = ((width, height), num_frames, arguments.held_out)
        jobs = [pool.submit(write_clip, new, number, *options) for number in range(clips)]
        for job in jobs:
            job.result()
    new.replace(arguments.output)


if __name__ == "__main__":
    main()
