# SPDX-License-Identifier: Apache-2.0
"""A longer video of clips that begin at the last frame of the one before: python examples/long_video.py [MODEL]"""

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4, format_prompt

lines = "Hello, hello.", "One, two, three, four.", "Thank you, goodbye."  # the words that tiny models know

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(*(sys.argv[1:] or [embedded_model()]), dtype=dtype).to(device)
frames, audio, last_frame, generator = [], None, None, torch.manual_seed(42)
num_frames = (pipe.config.default_num_frames - 1) // 4 * 4 + 1  # so that sound and video are of one length
overlap = pipe.audio_sampling_rate // 25  # the sound of the frame that two clips share
for line in lines:
    prompt = format_prompt("An old woman in a blue shawl is calm.", [("Old woman", "English", line)])
    clip = pipe(prompt, image=last_frame, num_frames=num_frames, generator=generator)
    own, fade = clip.audio[0], np.linspace(0, 1, overlap, dtype=np.float32)
    if audio is not None:
        own[:, :overlap] = own[:, :overlap] * fade + audio[:, -overlap:] * (1 - fade)
    audio = own if audio is None else np.concatenate([audio[:, :-overlap], own], axis=1)
    frames.extend(clip.frames[0][1 if frames else 0 :])
    last_frame = frames[-1]
print(export_to_mp4(frames, "long_video.mp4", audio, sampling_rate=pipe.audio_sampling_rate))
