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

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import cached_assets_path


EMBEDDED_MODELS = ("distilled", "base", "upscale")


def embedded_model(name: str = "distilled") -> str:
    """
    Path of a tiny model of drawn talking heads, which needs no download and no GPU.

    Three Diffusers directories for `DiffusionPipeline.from_pretrained`. They make 49 frames of 128x128 pixels, or
    256x256 with `"upscale"`, of a head that says the syllables ma, me, mi, mo and mu. The model card beside them tells
    what a prompt may ask for and how well it is followed; the recipes that made them are `examples/training`.

    `"distilled"` lies in the package as it is. The others share parts with it, and are put together in the assets
    cache of the Hugging Face Hub when they are first asked for.

    Args:
        name (`str`, defaults to `"distilled"`):
            `"distilled"`: 8 steps without guidance. `"base"`: 32 steps with guidance. `"upscale"`: a
            [`MagiHumanLatentUpscalePipeline`] that doubles the size of what the other two make.

    Returns:
        `str`: The path of the directory.

    Raises:
        `ValueError`: There is no model of this name.
        `OSError`: The assets cache cannot be written.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"`name`={name!r} must be one of {EMBEDDED_MODELS}.")
    models = Path(__file__).parent / "embedded_models"
    folder = models / name
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [part for part, loaded_by in index.items() if isinstance(loaded_by, list)]
    shared = [models / "distilled" / part for part in parts if not (folder / part).is_dir()]
    if not shared:
        return str(folder)

    files = sorted(file for source in (folder, *shared) for file in source.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(models)).encode() + file.read_bytes())
    whole = cached_assets_path("diffusers-magihuman", "embedded-models") / f"{name}-{digest.hexdigest()[:16]}"
    if not whole.is_dir():
        with tempfile.TemporaryDirectory(dir=whole.parent) as temporary:
            new = Path(temporary) / name
            shutil.copytree(folder, new)
            for source in shared:
                shutil.copytree(source, new / source.name)
            try:
                new.rename(whole)
            except OSError:
                if not whole.is_dir():  # another process was first
                    raise
    return str(whole)
