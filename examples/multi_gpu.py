# SPDX-License-Identifier: Apache-2.0
"""One video on several GPUs, or processes of a CPU: torchrun --nproc-per-node 2 examples/multi_gpu.py [MODEL]"""

import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline

from diffusers_magihuman import embedded_model, export_to_mp4

prompt = 'A person with pale skin and short red hair, in a blue shirt. The person says in a high voice: "mi ma mu".'
model = sys.argv[1] if len(sys.argv) > 1 else embedded_model()
on_gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpus else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
if on_gpus:
    torch.cuda.set_device(rank)
else:
    torch.accelerator.device_count = dist.get_world_size  # Diffusers divides by it, and a CPU has 0

dtype = {"default": torch.bfloat16 if on_gpus else torch.float32, "audio_vae": torch.float32}
pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to("cuda" if on_gpus else "cpu")
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world_size))
# All processes draw the same noise, and the first one alone decodes.
output = pipe(prompt, generator=torch.manual_seed(42), output_type="np" if rank == 0 else "latent")
if rank == 0:
    print(export_to_mp4(output.frames[0], "multi_gpu.mp4", output.audio[0], sampling_rate=pipe.audio_sampling_rate))
dist.destroy_process_group()
