# SPDX-License-Identifier: Apache-2.0
"""A portrait speaks a given sound: python examples/portrait_and_voice.py MODEL portrait.png speech.wav"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import export_to_mp4

model, portrait, speech = sys.argv[1:4]
prompt = (
    "The person of the picture faces the camera and speaks at an even pace; the lips follow every syllable, the head"
    " moves a little, the eyes stay on the lens. Medium close-up, static camera, soft light.\n\n"
    'Dialogue:\n<Person, English>: "Good morning."\n\nBackground Sound:\n<No prominent background sound>'
)

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)

# The video gets the length of the sound; give only one of the two to have the model invent the other.
output = pipe(prompt, image=portrait, audio=speech, generator=torch.manual_seed(42))
print(
    export_to_mp4(output.frames[0], "portrait_and_voice.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate)
)
