# SPDX-License-Identifier: Apache-2.0
"""Low resolution, then high, with one manager of the models: python examples/modular_chain.py [DISTILLED UPSCALE]"""

import sys

import torch
from diffusers import ComponentsManager

from diffusers_magihuman import MagiHumanDistilledAutoBlocks, MagiHumanUpscaleAutoBlocks, embedded_model, export_to_mp4

line = "hello, thank you"  # what the tiny model knows
prompt = f'A speaker with red hair says in a deep voice, "{line}"\n\nDialogue:\n<Speaker, English>: "{line}"'
model, upscale_model = sys.argv[1:3] or (embedded_model(), embedded_model("upscale"))
dtype = {"default": torch.bfloat16 if torch.cuda.is_available() else torch.float32, "audio_vae": torch.float32}
manager = ComponentsManager()
low = MagiHumanDistilledAutoBlocks().init_pipeline(model, manager, collection="low")
low.load_components(dtype=dtype)
blocks = MagiHumanUpscaleAutoBlocks()
del blocks.sub_blocks["text_encoder"]  # it takes the embeddings of the first pipeline
high = blocks.init_pipeline(upscale_model, manager, collection="high")
high.update_components(vae=low.vae, audio_vae=low.audio_vae)
high.load_components(names=["transformer", "scheduler"], dtype=dtype)
if torch.cuda.is_available():  # there is only the part that runs
    manager.enable_auto_cpu_offload("cuda")
state = low(prompt=prompt, output_type="latent", generator=torch.manual_seed(42))
names = ("prompt_embeds", "prompt_embeds_mask", "latents", "audio_latents")
output = high(**{name: state.get(name) for name in names}, generator=torch.manual_seed(42))
print(export_to_mp4(output.videos[0], "modular_chain.mp4", output.audio[0], sampling_rate=output.sampling_rate))
