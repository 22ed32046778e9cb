# SPDX-License-Identifier: Apache-2.0
"""A prompt encoded once for the distilled model and its upscaling: python examples/shared_embeddings.py [MODEL SR]"""

import sys

import torch
from diffusers import DiffusionPipeline

import diffusers_magihuman as magihuman

model, upscale_model = sys.argv[1:3] or (magihuman.embedded_model(), magihuman.embedded_model("upscale"))
prompt = magihuman.format_prompt('A baker dusts his hands and says, "Hello, thank you."', None, "Oven fan")
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "audio_vae": torch.float32}

pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
with torch.no_grad():
    embeds, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
pipe.text_encoder = None  # second in size to the transformer alone, and no longer needed
low = pipe(prompt_embeds=embeds, output_type="latent", generator=torch.manual_seed(42))
pipe.transformer = None

transformer = magihuman.MagiHumanTransformer3DModel.from_pretrained(
    upscale_model, subfolder="transformer", dtype=dtype["default"]
).to(device)
scheduler = magihuman.MagiHumanFlowScheduler.from_pretrained(upscale_model, subfolder="scheduler")
upscale = magihuman.MagiHumanLatentUpscalePipeline.from_pipe(pipe, transformer=transformer, scheduler=scheduler)
size = {name: 2 * pipe.config[f"default_{name}"] for name in ("height", "width")}
high = upscale(prompt_embeds=embeds, latents=low.frames, audio_latents=low.audio, **size)
print(magihuman.export_to_mp4(high.frames[0], "shared_embeddings.mp4", high.audio[0]))
