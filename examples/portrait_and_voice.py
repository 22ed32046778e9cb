# SPDX-License-Identifier: Apache-2.0
"""A portrait speaks given audio: python examples/portrait_and_voice.py [MODEL portrait.png speech.wav]"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4, format_prompt

model, portrait, speech = sys.argv[1:4] or (embedded_model(), None, None)
description = """The person of the picture faces the camera and speaks at an even pace; the lips follow every syllable,
the head moves a little, the eyes stay on the lens. Medium close-up, static camera, soft light."""
prompt = format_prompt(description, [("Person", "English", "Good morning.")])

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
if portrait is None:  # a face, and the voice of another one
    first, second = (pipe('A speaker says: "hello, goodbye".', generator=torch.manual_seed(seed)) for seed in (1, 2))
    portrait, speech = first.frames[0][0], (second.audio[0], pipe.audio_sampling_rate)

# The video gets the length of the audio; give only one of the two to have the model invent the other.
output = pipe(prompt, image=portrait, audio=speech, generator=torch.manual_seed(42))
print(
    export_to_mp4(output.frames[0], "portrait_and_voice.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate)
)
