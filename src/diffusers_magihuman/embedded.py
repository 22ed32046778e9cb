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
"""The tiny models that come with the package."""

from pathlib import Path


EMBEDDED_MODELS = ("distilled", "base", "upscale")


def embedded_model(name: str = "distilled") -> str:
    """
    Path of a tiny model of drawn talking heads, which needs no download and no GPU.

    Three Diffusers directories for `DiffusionPipeline.from_pretrained`, which share files. They make 49 frames of
    128x128 pixels, or 256x256 with `"upscale"`, of a head that says the syllables ma, me, mi, mo and mu. The model
    card beside them tells what a prompt may ask for and how well it is followed; the recipes that made them are
    `examples/training`.

    Args:
        name (`str`, defaults to `"distilled"`):
            `"distilled"`: 8 steps without guidance. `"base"`: 32 steps with guidance. `"upscale"`: a
            [`MagiHumanLatentUpscalePipeline`] that doubles the size of what the other two make.

    Returns:
        `str`: The path of the directory.

    Raises:
        `ValueError`: There is no model of this name.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"`name`={name!r} must be one of {EMBEDDED_MODELS}.")
    return str(Path(__file__).parent / "embedded_models" / name)
