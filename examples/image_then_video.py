# SPDX-License-Identifier: Apache-2.0
"""A picture of any text-to-image pipeline begins to speak: python examples/image_then_video.py IMAGE_MODEL MODEL"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import export_to_mp4

image_model, model = sys.argv[1:3]
look = "A fisherman with a grey beard and a yellow raincoat on a pier, medium close-up, static camera, soft daylight"

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
painter = DiffusionPipeline.from_pretrained(image_model, dtype=dtype["default"]).to(device)
portrait = painter(look, generator=torch.manual_seed(42)).images[0]
del painter

prompt = f"""{look}. He looks into the lens, his brow lifts, and he says slowly in a deep, rough voice,
"The wind turns at noon." Then his lips close and his eyes narrow against the light.\n
Dialogue:\n<Fisherman, English>: "The wind turns at noon."\n
Background Sound:\n<Gulls far away>"""
pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
output = pipe(prompt, image=portrait, generator=torch.manual_seed(42))
print(export_to_mp4(output.frames[0], "image_then_video.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate))
