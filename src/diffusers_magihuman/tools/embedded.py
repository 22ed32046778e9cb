# SPDX-License-Identifier: Apache-2.0
"""The tiny models that come with the package."""

from pathlib import Path

EMBEDDED_MODELS = ("distilled", "base", "upscale")


def embedded_model(name: str = "distilled") -> str:
    """
    Path of a tiny model of drawn talking heads, which needs no download and no GPU.

    Three Diffusers directories for `DiffusionPipeline.from_pretrained`. They make 49 frames of 128x128 pixels, or
    256x256 with `"upscale"`, of a head that says the syllables ma, me, mi, mo and mu. The model card beside them tells
    what a prompt may ask for and how well it is followed; the recipes that made them are `examples/nano`.

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
    return str(Path(__file__).parents[1] / "embedded_models" / name)
