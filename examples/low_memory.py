# SPDX-License-Identifier: Apache-2.0
"""The leanest settings, for GPUs of 8 GB and more: python examples/low_memory.py [MODEL]; see also `magihuman plan`"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4, format_prompt

prompt = format_prompt("A man in a grey coat is slow.", [("Man", "English", "Hello, thank you, goodbye.")])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
dtype = {"default": compute_dtype, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(*(sys.argv[1:] or [embedded_model()]), dtype=dtype)

# Linears of the transformer take half of the memory; each is cast when it runs. Only this changes the video, a little.
pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype)
# Weights stay in RAM; the next layer is on its way to the GPU while one runs there.
streams = {"use_stream": device.type == "cuda", "exclude_modules": ["vae", "audio_vae"]}
pipe.enable_group_offload(device, offload_type="leaf_level", **streams)
# Runs the widest layers on a part of the tokens at a time.
pipe.transformer.enable_forward_chunking()
# Decodes a part of the picture, and a second of the video, at a time.
pipe.vae.enable_tiling()
output = pipe(prompt, generator=torch.manual_seed(42), output_type="stream")
print(export_to_mp4(output.frames[0], "low_memory.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate))
