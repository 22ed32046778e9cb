# Copyright 2026 The diffusers-magihuman authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the pipelines return."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class MagiHumanPipelineOutput(BaseOutput):
    """
    Output of the MagiHuman pipelines.

    Args:
        frames (`torch.Tensor`, `np.ndarray`, `list[list[PIL.Image.Image]]` or `list[Iterator[np.ndarray]]`):
            Videos at 25 frames a second: `(batch_size, num_frames, height, width, 3)` for `"np"`,
            `(batch_size, num_frames, 3, height, width)` for `"pt"`, both in [0, 1]; a list of frames for each video
            for `"pil"`; for `"stream"` an iterator for each video, which decodes as it is consumed and gives the
            frames of `"np"`; latents `(batch_size, channels, latent_frames, latent_height, latent_width)` for
            `"latent"`.
        audio (`torch.Tensor` or `np.ndarray`, *optional*):
            Sound, `(batch_size, 2, num_samples)` in about [-1, 1] at the pipeline's `audio_sampling_rate`: a tensor
            for `"pt"`, an array for `"np"`, `"pil"` and `"stream"`; latents `(batch_size, audio_length, channels)`
            for `"latent"`. `None` where a video without sound was upscaled.
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]] | list[Iterator[np.ndarray]]
    audio: torch.Tensor | np.ndarray | None
