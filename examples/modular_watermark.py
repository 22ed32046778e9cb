# SPDX-License-Identifier: Apache-2.0
"""A block of one's own, which marks the frames: python examples/modular_watermark.py [DISTILLED_MODEL]"""

import sys

import torch
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam, PipelineState

from diffusers_magihuman import MagiHumanDistilledAutoBlocks, embedded_model, export_to_mp4


class WatermarkStep(ModularPipelineBlocks):
    inputs, intermediate_outputs = [InputParam("videos", required=True)], [OutputParam("videos")]

    def __call__(self, components: object, state: PipelineState) -> tuple[object, PipelineState]:
        block_state = self.get_block_state(state)
        block_state.videos[..., -12:-4, 4:44, :] *= 0.5  # (batch_size, num_frames, height, width, 3), in [0, 1]
        self.set_block_state(state, block_state)
        return components, state


model, *_ = [*sys.argv[1:], embedded_model()]
device = "cuda" if torch.cuda.is_available() else "cpu"
blocks = MagiHumanDistilledAutoBlocks()
blocks.sub_blocks["watermark"] = WatermarkStep()  # last: before they are decoded there are no frames
pipe = blocks.init_pipeline(model)
pipe.load_components(dtype={"default": torch.bfloat16 if device == "cuda" else None, "audio_vae": torch.float32})
pipe.to(device)
output = pipe(prompt='A speaker says, "hello, thank you"', generator=torch.manual_seed(42))
print(export_to_mp4(output.videos[0], "modular_watermark.mp4", output.audio[0], sampling_rate=output.sampling_rate))
