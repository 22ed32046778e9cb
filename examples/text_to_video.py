# SPDX-License-Identifier: Apache-2.0
"""Text to video with audio: python examples/text_to_video.py [owner/magihuman-distilled]"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4, format_prompt

line = "Welcome to our small library."
description = f"""A woman with silver hair tied back and a dark green jumper stands before a bookshelf, medium
close-up, static camera, soft daylight from the left. She looks into the lens, draws a breath and says in a calm, clear
voice, "{line}" The corners of her mouth lift, her lips close and her gaze stays on the viewer."""
prompt = format_prompt(description, [("Woman with silver hair", "English", line)], "Quiet room tone")
if len(sys.argv) == 1:  # the tiny model of the package, which knows other words
    description = "A woman with pale skin and long white hair, in a green shirt, before a blue wall. Static camera."
    prompt = format_prompt(description, [("Woman", "Korean", "annyeong, hana, dul")], "Quiet room")

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(*(sys.argv[1:] or [embedded_model()]), dtype=dtype).to(device)
output = pipe(prompt, generator=torch.manual_seed(42))
print(export_to_mp4(output.frames[0], "text_to_video.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate))
