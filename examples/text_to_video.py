# SPDX-License-Identifier: Apache-2.0
"""Text to video with sound: python examples/text_to_video.py owner/magihuman-distill"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import export_to_mp4

PROMPT = """A woman with silver hair tied back and a dark green jumper stands before a bookshelf, medium close-up,
static camera, soft daylight from the left. She looks into the lens, draws a breath and says in a calm, clear voice,
"Welcome to our small library." The corners of her mouth lift, her lips close and her gaze stays on the viewer.

Dialogue:
<Woman with silver hair, English>: "Welcome to our small library."

Background Sound:
<Quiet room tone>"""

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=dtype).to(device)
output = pipe(PROMPT, generator=torch.manual_seed(42))
print(export_to_mp4(output.frames[0], "text_to_video.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate))
