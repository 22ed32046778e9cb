# SPDX-License-Identifier: Apache-2.0
"""What the clips that fit a prompt look like on average, which is all that a transformer can say of pure noise.

As its target there, one clip is this mean with a pose and a light that no prompt tells: thousands of clips have to be
seen until those cancel, and what a beard adds is far less than they do. Least squares over all clips take seconds, and
leave less than a tenth of that variance (stable targets, as in arXiv 2302.00670, but of what prompts say).

The difference of two means is what a look adds, such as a beard to a shaven face. Few positions have it, so hardly any
loss tells whether it is drawn; [`look_loss`] counts each look alike.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from cache_latents import Cache
from prompts import Scene, without_needless
from recognise import LOOKS
from torch import nn

MIN_CLIPS = 10  # for each number of a fit
PAIRS = (  # looks that are drawn over one another
    ("hair_style", "hair_colour"),
    ("hair_style", "skin"),
    ("hair_style", "glasses"),
    ("hair_style", "beard"),
    ("beard", "skin"),
    ("beard", "hair_colour"),
    ("glasses", "skin"),
)


def count_looks(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Which value each look has, 1 in one column of `(scenes, values)`, and nan in all where nothing is said of it."""
    said = [without_needless(scene) for scene in scenes]
    values = {name: [getattr(scene, name) for scene in said] for name in LOOKS}
    return {
        name: np.array([[np.nan if value is None else value == each for each in table] for value in values[name]])
        for name, table in LOOKS.items()
    }


def count_numbers(pairs: Sequence[tuple[str, str]]) -> int:
    """How many numbers a fit has for each position."""
    free = {name: len(table) - 1 for name, table in LOOKS.items()}
    return 1 + sum(free.values()) + sum(free[first] * free[second] for first, second in pairs)


class Fit:
    """
    Least squares of pictures by looks, and by pairs of looks.

    Args:
        scenes (`list[Scene]`): What the clips show.
        pictures (`np.ndarray` of shape `(len(scenes), channels, height, width)`): Latents of one moment of each.
        pairs (`Sequence[tuple[str, str]]`): Of names of looks.
    """

    def __init__(self, scenes: list[Scene], pictures: np.ndarray, pairs: Sequence[tuple[str, str]]) -> None:
        self.shares = {name: np.nanmean(values, axis=0) for name, values in count_looks(scenes).items()}
        self.pairs, self.shape = pairs, pictures.shape[1:]
        numbers = self.encode(scenes)
        ridge = np.eye(numbers.shape[1])  # as if there were one more clip of each, which is no other than the mean
        ridge[0, 0] = 0
        flat = pictures.reshape(len(pictures), -1).astype(np.float64)
        self.weights = np.linalg.solve(numbers.T @ numbers + ridge, numbers.T @ flat)

    def encode(self, scenes: Sequence[Scene]) -> np.ndarray:
        """A row of numbers for each scene; what is not said counts as all values in their shares."""
        looks = {name: np.where(np.isnan(one), self.shares[name], one) for name, one in count_looks(scenes).items()}
        looks = {name: one[:, 1:] - self.shares[name][1:] for name, one in looks.items()}
        products = [looks[first][:, :, None] * looks[second][:, None] for first, second in self.pairs]
        columns = chain([np.ones((len(scenes), 1))], looks.values(), products)
        return np.concatenate([each.reshape(len(scenes), -1) for each in columns], axis=1)

    def mean(self, scenes: Sequence[Scene]) -> np.ndarray:
        """Float32 `(len(scenes), channels, height, width)`."""
        return (self.encode(scenes) @ self.weights).astype(np.float32).reshape(-1, *self.shape)


class Means:
    """
    Means of clips by what is said of their looks: of the first latent frame, of the second, and of all that follow,
    whose poses no prompt tells.

    Args:
        caches (`list[Cache]`): Of any sizes and lengths.
    """

    def __init__(self, caches: list[Cache]) -> None:
        moments = defaultdict(list)
        for cache in caches:
            for moment, frames in enumerate((slice(0, 1), slice(1, 2), slice(2, None))):
                if (latents := cache.latents[:, :, frames]).shape[2]:
                    pictures = latents.mean(axis=2, dtype=np.float32)
                    moments[(*cache.latents.shape[3:], moment)].append((cache.scenes, pictures))
        self.fits = {}
        for key, parts in moments.items():
            scenes, pictures = [*chain(*(part[0] for part in parts))], np.concatenate([part[1] for part in parts])
            for pairs in ((), PAIRS):
                if len(scenes) >= MIN_CLIPS * count_numbers(pairs):
                    self.fits[key] = Fit(scenes, pictures, pairs)

    def knows(self, shape: Sequence[int]) -> bool:
        """Whether enough clips are known for videos of so many latent frames, and of such height and width."""
        return all((*shape[1:], moment) in self.fits for moment in range(min(shape[0], 3)))

    def find(self, scenes: Sequence[Scene], shape: Sequence[int]) -> torch.Tensor:
        """Means `(len(scenes), channels, *shape)`; the shape must be known."""
        moments = [self.fits[(*shape[1:], moment)].mean(scenes) for moment in range(min(shape[0], 3))]
        return torch.from_numpy(np.stack([moments[min(frame, 2)] for frame in range(shape[0])], axis=2))

    def find_added(self, scenes: Sequence[Scene], shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """What each look adds to one of its other values, drawn for each scene, `(len(scenes), looks, channels,
        *shape)`; 0 where nothing is said of it."""
        mean, added = self.find(scenes, shape), []
        for name, table in LOOKS.items():
            others = []
            for scene in map(without_needless, scenes):
                value = getattr(scene, name)
                # Without hair none of its colours would be seen.
                rest = [other for other in table if other not in (value, "bald")]
                others.append(scene if value is None else replace(scene, **{name: rest[rng.integers(len(rest))]}))
            added.append(mean - self.find(others, shape))
        return torch.stack(added, dim=1)


def look_loss(latents: torch.Tensor, target: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """How much of the looks of `target` latents lack or exaggerate: squares, summed over looks and 1 for each that is
    missing, and their mean over the batch. `added` is from [`Means.find_added`]."""
    # A look that adds next to nothing, such as a colour to short hair, would be all noise.
    squares = added.square().sum(dim=(2, 3, 4, 5)) + 0.002 * added[0, 0].numel()
    missing = ((target - latents).float()[:, None] * added).sum(dim=(2, 3, 4, 5)) / squares
    # Nor may what is five times as strong as it should be, which is no look any more, decide what is learned.
    return missing.square().clamp(max=25).sum(dim=1).mean()


class Looks(nn.Module):
    """
    A transformer in training that is shown clips whose looks are too weak, as its own are while it samples, and the
    [`look_loss`] of what it predicts.

    What it predicts is still compared with the whole clip: its velocity is turned into that from what the caller
    believes to have shown.

    Args:
        transformer (`nn.Module`): What is trained.
        latents (`torch.Tensor` of shape `(batch_size, channels, latent_frames, height, width)`): Clean.
        added (`torch.Tensor` of shape `(batch_size, looks, *latents.shape[1:])`): See [`Means.find_added`].
        weakness (`torch.Tensor` of shape `(batch_size, looks)`): How much of each is not shown, 0 to 1.
        noise_levels (`torch.Tensor` of shape `(batch_size,)`): Above 0 where anything is not shown.
    """

    def __init__(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        added: torch.Tensor,
        weakness: torch.Tensor,
        noise_levels: torch.Tensor,
    ) -> None:
        super().__init__()
        self.transformer, self.latents, self.added = transformer, latents, added
        self.hidden = (weakness[:, :, None, None, None, None] * added).sum(dim=1)
        self.levels = noise_levels[:, None, None, None, None]

    def forward(
        self, noisy: torch.Tensor, *inputs: torch.Tensor, **options: torch.Tensor | bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = (1 - self.levels) * self.hidden
        velocity, audio_velocity = self.transformer(noisy - hidden, *inputs, **options)
        velocity = velocity + hidden / self.levels.clamp(min=1e-6)  # 0 by 0 would be nan
        self.loss = look_loss(noisy - self.levels * velocity, self.latents, self.added)
        return velocity, audio_velocity
