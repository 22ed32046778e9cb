# SPDX-License-Identifier: Apache-2.0
"""Another guider, which also steers away from a model that lacks a layer: python examples/modular_guider.py [MODEL]"""

import sys

import torch
from diffusers import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig

from diffusers_magihuman import MagiHumanAutoBlocks, embedded_model, export_to_mp4

line = "hello, thank you"  # what the tiny model knows
prompt = f'A speaker with red hair says in a deep voice, "{line}"\n\nDialogue:\n<Speaker, English>: "{line}"'
model, *_ = [*sys.argv[1:], embedded_model("base")]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}

pipe = MagiHumanAutoBlocks().init_pipeline(model)
pipe.load_components(dtype=dtype)
pipe.to(device)
skipped = LayerSkipConfig([pipe.transformer.config.num_layers // 2])
when = {"skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.5}  # shares of the steps
scales = pipe.guider.guidance_scale, 1.0
pipe.update_components(guider=SkipLayerGuidance(*scales, skip_layer_config=skipped, **when))
output = pipe(prompt=prompt, generator=torch.manual_seed(42))
print(export_to_mp4(output.videos[0], "modular_guider.mp4", output.audio[0], sampling_rate=output.sampling_rate))
