# SPDX-License-Identifier: Apache-2.0
"""Low resolution, then 540p or 1080p: python examples/base_then_upscale.py [MODEL UPSCALE_MODEL]"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4, format_prompt

model, upscale_model = sys.argv[1:3] or (embedded_model(), embedded_model("upscale"))
prompt = format_prompt("A woman in a green jumper smiles.", [("Woman", "English", "Hello, thank you.")])
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
generator = torch.manual_seed(42)

pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype)
# On a GPU there is only the part that runs.
pipe.enable_model_cpu_offload() if device == "cuda" else pipe.to(device)
low = pipe(prompt, output_type="latent", generator=generator)

parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae", "audio_vae")}
pipe.remove_all_hooks()
del pipe  # with its transformer, before the other one is read
upscale = DiffusionPipeline.from_pretrained(upscale_model, **parts, dtype=dtype)
upscale.enable_model_cpu_offload() if device == "cuda" else upscale.to(device)
upscale.vae.enable_tiling()
high = upscale(prompt, latents=low.frames, audio_latents=low.audio, output_type="stream", generator=generator)
print(export_to_mp4(high.frames[0], "base_then_upscale.mp4", high.audio[0]))
