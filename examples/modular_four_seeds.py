# SPDX-License-Identifier: Apache-2.0
"""A prompt encoded once and sampled with four seeds: python examples/modular_four_seeds.py [DISTILLED_MODEL]"""

import sys

import torch

from diffusers_magihuman import MagiHumanDistilledAutoBlocks, embedded_model, export_to_mp4

line = "hello, thank you"  # what the tiny model knows
prompt = f'A speaker with red hair says in a deep voice, "{line}"\n\nDialogue:\n<Speaker, English>: "{line}"'
model, *_ = [*sys.argv[1:], embedded_model()]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}

blocks = MagiHumanDistilledAutoBlocks()
encoder = blocks.sub_blocks.pop("text_encoder").init_pipeline(model)
encoder.load_components(dtype=dtype)
encoder.to(device)
state = encoder(prompt=prompt)
del encoder  # second in size to the transformer alone, and no longer needed

pipe = blocks.init_pipeline(model)  # which has no text encoder
pipe.load_components(dtype=dtype)
pipe.to(device)
for seed in range(4):
    output = pipe(state=state, generator=torch.manual_seed(seed))  # `state` itself stays as it is
    path, rate = f"modular_four_seeds_{seed}.mp4", output.sampling_rate
    print(export_to_mp4(output.videos[0], path, output.audio[0], sampling_rate=rate))
