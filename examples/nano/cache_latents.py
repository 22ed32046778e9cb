# SPDX-License-Identifier: Apache-2.0
"""Draws clips and encodes them, so that training a transformer need do neither in every step.

Latents of sound are those that the sound autoencoder learns to compute, `Speech.latents`, not what it computes.

    python examples/nano/cache_latents.py --size 128 128 --frames 49 --clips 1000 --turbo-vae runs/turbo_vae \\
        --output cache/128x128x49/0
    python examples/nano/cache_latents.py --first 1000 ... --output cache/128x128x49/1000   # at the same time

Writes float16 `latents.npy` (clips x channels x latent frames x latent height x latent width), `audio_latents.npy`
(clips x length x channels), `eyes.npy` and `mouths.npy` (clips x latent frames x latent height x latent width), which
say how much of each position is eyes and mouth, and `scenes.jsonl`, whose words are numbers of `VOCABULARY`. Clip
number i is `clips.make_clip(i)`. A folder appears when it is complete; frames and voices are on no disk.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from clips import make_clip
from prompts import Scene
from recipe import to_tensor
from train_text_encoder import TEXT_TOKENS
from train_turbo_vae import SPATIAL, TEMPORAL, encode
from words import VOCABULARY

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo

ARRAYS = ("latents", "audio_latents", "eyes", "mouths")


class Cache(NamedTuple):
    """What `cache_latents.py` wrote; the arrays stay on disk until they are indexed."""

    latents: np.ndarray
    audio_latents: np.ndarray
    eyes: np.ndarray
    mouths: np.ndarray
    scenes: list[Scene]

    @property
    def num_tokens(self) -> int:
        """Of a transformer, for the video and the sound of a clip and its usual prompt."""
        return int(np.prod(self.latents.shape[2:])) + self.audio_latents.shape[1] + TEXT_TOKENS


def load_cache(folder: Path) -> Cache:
    """
    Opens a cache.

    Raises:
        `OSError`: The folder is no finished cache.
    """
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
    lines = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
    scenes = [Scene(**line | {"words": tuple(VOCABULARY[number] for number in line["words"])}) for line in lines]
    return Cache(*arrays, scenes)


def choose_cache(caches: list[Cache], rng: np.random.Generator) -> int:
    """Draws the number of a cache, in proportion to its tokens: batches of equal size hold each clip as often."""
    counts = np.array([cache.num_tokens * len(cache.scenes) for cache in caches])
    return int(rng.choice(len(caches), p=counts / counts.sum()))


def read_clips(cache: Cache, clips: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Latents of video and sound of these clips, and how much of each position is eyes and mouth, float32."""
    return tuple(
        torch.from_numpy(np.stack([values[clip] for clip in clips]).astype(np.float32)).to(device)
        for values in cache[: len(ARRAYS)]
    )


def find_shares(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """How much of each latent position a moving box covers, from none to all, `(latent frames, height, width)`."""
    covered = []
    for low, high, length in ((1, 3, height), (0, 2, width)):
        starts = np.arange(0, length, SPATIAL)
        ends = np.minimum(boxes[:, None, high], starts + SPATIAL)
        covered.append((ends - np.maximum(boxes[:, None, low], starts)).clip(0) / SPATIAL)
    shares = covered[0][:, :, None] * covered[1][:, None]
    return np.stack([part.mean(axis=0) for part in np.split(shares, range(1, len(shares), TEMPORAL))])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--turbo-vae", type=Path, required=True, help="output of train_turbo_vae.py")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), help="width and height, default: 128 128")
    parser.add_argument("--frames", type=int, default=49, help="of a clip, 4 * k + 1, default: %(default)s")
    parser.add_argument("--clips", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first clip, default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="default: no")
    arguments = parser.parse_args()
    if not (arguments.frames >= 1 and arguments.frames % 4 == 1):
        parser.error(f"--frames is {arguments.frames}, it must be 1, 5, 9 and so on")
    if any(size < SPATIAL or size % SPATIAL for size in arguments.size):
        parser.error(f"--size is {' '.join(map(str, arguments.size))}, both must be multiples of {SPATIAL}")

    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    turbo_vae = AutoencoderKLMagiHumanTurbo.from_pretrained(arguments.turbo_vae / "vae").to(accelerator.device)
    new = arguments.output.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    arrays = {}
    for start in range(0, arguments.clips, arguments.batch_size):
        numbers = range(start, min(start + arguments.batch_size, arguments.clips))
        clips = [make_clip(arguments.first + number, *arguments.size, arguments.frames) for number in numbers]
        video = to_tensor(np.stack([clip.drawing.frames for clip in clips])).to(accelerator.device)
        with accelerator.autocast():
            latents = encode(turbo_vae, video)
        audio_latents = np.stack([clip.speech.latents for clip in clips])
        shares = np.stack(
            [[find_shares(box, *arguments.size) for box in clip.drawing.boxes.swapaxes(0, 1)] for clip in clips]
        )
        covered = shares[:, :2].sum(axis=1), shares[:, 2]
        for name, values in zip(ARRAYS, (latents.float().cpu().numpy(), audio_latents, *covered), strict=True):
            if name not in arrays:
                shape = (arguments.clips, *values.shape[1:])
                arrays[name] = np.lib.format.open_memmap(new / f"{name}.npy", "w+", np.float16, shape)
            arrays[name][numbers.start : numbers.stop] = values
        with (new / "scenes.jsonl").open("a") as file:
            for clip in clips:
                words = [VOCABULARY.index(word) for word in clip.scene.words]
                file.write(json.dumps(asdict(clip.scene) | {"words": words}) + "\n")
        print(json.dumps({"clips": numbers.stop, "of": arguments.clips}), flush=True)
    new.replace(arguments.output)


if __name__ == "__main__":
    main()
