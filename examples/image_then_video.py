# SPDX-License-Identifier: Apache-2.0
"""A picture of any text-to-image pipeline begins to speak: python examples/image_then_video.py [IMAGE_MODEL MODEL]"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4, format_prompt

image_model, model = sys.argv[1:3] or (None, embedded_model())
look = "A fisherman with a grey beard and a yellow raincoat on a pier, medium close-up, static camera, soft daylight"
line = "Yes, one, two."
description = f"""{look}. He looks into the lens, his brow lifts, and he says slowly in a deep, rough voice,
"{line}" Then his lips close and his eyes narrow against the light."""

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
if image_model is None:  # a video of one frame is a picture, too
    portrait = pipe(look, num_frames=1, generator=torch.manual_seed(42)).frames[0][0]
else:
    painter = DiffusionPipeline.from_pretrained(image_model, dtype=dtype["default"]).to(device)
    portrait = painter(look, generator=torch.manual_seed(42)).images[0]
    del painter
prompt = format_prompt(description, [("Fisherman", "English", line)], "Gulls far away")
output = pipe(prompt, image=portrait, generator=torch.manual_seed(42))
print(export_to_mp4(output.frames[0], "image_then_video.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate))
