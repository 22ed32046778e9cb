# SPDX-License-Identifier: Apache-2.0
"""Serves a repository as a Hugging Face Inference Endpoint, which looks for this file and class in it.

`{"inputs": "a prompt", "parameters": {"seed": 0, "num_frames": 126, "image": "base64"}}` gives
`{"video": "base64 of an mp4", "content_type": "video/mp4", "seed": 0}`; parameters are arguments of the pipeline's
call, and a `video` in a repository of super-resolution. It needs nothing but what lies beside it.
"""

import base64
import inspect
import secrets
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

FILES = ("image", "audio", "video")
PARAMETERS = {"seed", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "max_sequence_length"}
PARAMETERS |= {"guidance_scale", "audio_guidance_scale", "low_noise_guidance_scale", "leading_guidance_scale"}
PARAMETERS |= {"num_leading_frames", "noise_level", "audio_noise_scale", *FILES}
MAX_FILE_LETTERS = 2**26  # of base64, 48 MiB


class EndpointHandler:
    def __init__(self, path: str = "") -> None:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        options = {"custom_pipeline": "pipeline", "trust_remote_code": True}
        dtype = {"default": dtype, "audio_vae": torch.float32}
        self.pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, **options).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        # Of the package if it is installed, else of the repository.
        self.media = import_module(f"{type(self.pipe).__module__.rpartition('.')[0]}.media")
        self.is_stream = hasattr(self.pipe.vae, "decode_windows")
        if self.is_stream:
            self.pipe.vae.enable_tiling()

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        prompt, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(prompt, str) or not isinstance(parameters, dict):  # several prompts would be several videos
            raise ValueError(f"`inputs`={prompt!r:.80} must be a prompt, and `parameters` an object.")
        parameters = dict(parameters)  # the caller's stay as they are
        allowed = PARAMETERS & {"seed", *inspect.signature(self.pipe.__call__).parameters}
        if unknown := parameters.keys() - allowed:
            raise ValueError(f"`parameters` has {sorted(unknown)[:9]}, allowed are {', '.join(sorted(allowed))}.")
        seed = parameters.pop("seed", None)
        seed = secrets.randbits(32) if seed is None else seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"`seed`={seed!r:.80} must be an integer of 64 bits.")
        generator = torch.Generator(self.pipe.device).manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            for name in parameters.keys() & set(FILES):  # never a path, which would be one of this machine
                if not isinstance(parameters[name], str) or len(parameters[name]) > MAX_FILE_LETTERS:
                    raise ValueError(f"`{name}` must be a file in base64, of at most {MAX_FILE_LETTERS} letters.")
                file = Path(folder, name)
                try:
                    file.write_bytes(base64.b64decode(parameters[name], validate=True))
                except ValueError as error:
                    raise ValueError(f"`{name}` must be a file in base64: {error}") from error
                parameters[name] = str(file)
            parameters |= {"generator": generator, "output_type": "stream" if self.is_stream else "np"}
            output = self.pipe(prompt, **parameters)
            clip, audio = Path(folder, "clip.mp4"), None if output.audio is None else output.audio[0]
            self.media.export_to_mp4(output.frames[0], clip, audio, sampling_rate=self.pipe.audio_sampling_rate)
            video = base64.b64encode(clip.read_bytes()).decode()
        return {"video": video, "content_type": "video/mp4", "seed": seed}
