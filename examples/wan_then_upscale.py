# SPDX-License-Identifier: Apache-2.0
"""Latents of Wan 2.2, without sound, in high resolution: python examples/wan_then_upscale.py [WAN_MODEL UPSCALE_MODEL]

WAN_MODEL is Wan-AI/Wan2.2-TI2V-5B-Diffusers or another pipeline with the autoencoder of 48 channels;
without arguments it is the tiny model of the package.
"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4

model, upscale_model = sys.argv[1:3] or (embedded_model(), embedded_model("upscale"))
size = {"height": 256, "width": 448, "num_frames": 49} if sys.argv[1:] else {}
prompt = "A lighthouse keeper in a wool cap turns his head to the sea at dawn, medium close-up, static camera."
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}
generator = torch.manual_seed(42)

wan = DiffusionPipeline.from_pretrained(model, dtype=dtype["default"]).to(device)
low = wan(prompt, **size, output_type="latent", generator=generator).frames
del wan

upscale = DiffusionPipeline.from_pretrained(upscale_model, dtype=dtype).to(device)
upscale.vae.enable_tiling()
high = upscale(prompt, latents=low, output_type="stream", generator=generator)
print(export_to_mp4(high.frames[0], "wan_then_upscale.mp4", fps=24))  # Wan 2.2 makes 24 frames a second
