# SPDX-License-Identifier: Apache-2.0
"""Encodes a dataset once, so that training a transformer need not encode it in every step.

    python examples/nano/cache_latents.py --data data/128 --video-vae runs/video_vae --audio-vae runs/audio_vae \\
        --output cache/128

Writes float16 `latents.npy` (clips x channels x latent frames x latent height x latent width), `audio_latents.npy`
(clips x length x channels) and a copy of the dataset's `scenes.jsonl`. The latents are those of the projection and the
analysis that the autoencoders' encoders learn, which take a tenth of the time.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import world
from accelerate import Accelerator
from make_dataset import load_dataset, load_scenes
from recipe import to_tensor
from train_audio_vae import Analysis, to_mono
from train_video_vae import Projection


class Cache(NamedTuple):
    """What `cache_latents.py` wrote."""

    latents: np.ndarray
    audio_latents: np.ndarray
    scenes: list[world.Scene]


def load_cache(folder: Path) -> Cache:
    """
    Opens a cache; the arrays stay on disk until they are indexed.

    Raises:
        `OSError`: The folder is no finished cache.
    """
    scenes = load_scenes(folder)
    latents, audio_latents = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "audio_latents"))
    return Cache(latents, audio_latents, scenes)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset")
    parser.add_argument("--video-vae", type=Path, required=True, help="output of train_video_vae.py")
    parser.add_argument("--audio-vae", type=Path, required=True, help="output of train_audio_vae.py")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    arguments = parser.parse_args()

    device = Accelerator().device
    projection = Projection.load(arguments.video_vae / "projection.safetensors").to(device)
    analysis = Analysis.load(arguments.audio_vae / "analysis.safetensors").to(device)
    frames, voices, scenes = load_dataset(arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for start in range(0, len(scenes), arguments.batch_size):
        batch = slice(start, start + arguments.batch_size)
        encoded = {
            "latents": projection.encode(to_tensor(frames[batch]).to(device)),
            "audio_latents": analysis.encode(to_mono(voices[batch]).to(device)).transpose(1, 2),
        }
        for name, values in encoded.items():
            if name not in arrays:
                arrays[name] = np.lib.format.open_memmap(
                    arguments.output / f"{name}.npy", "w+", np.float16, (len(scenes), *values.shape[1:])
                )
            arrays[name][batch] = values.cpu().numpy()
        if start % (64 * arguments.batch_size) == 0:
            print(json.dumps({"clips": start, "of": len(scenes)}), flush=True)
    # The last file to be written is the one that `load_cache` opens first.
    shutil.copyfile(arguments.data / "scenes.jsonl", arguments.output / "scenes.tmp")
    (arguments.output / "scenes.tmp").replace(arguments.output / "scenes.jsonl")


if __name__ == "__main__":
    main()
