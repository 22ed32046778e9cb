"""Tiny models, short calls, and readers of what they write."""

import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_magihuman import MagiHumanLatentUpscalePipeline, MagiHumanTransformer3DModel
from diffusers_magihuman.conversion import ROPE_BANDS, transformer_rules

ROOT = Path(__file__).parents[1]
PROMPT = (
    'A woman with short grey hair looks at the camera and says, "Hello."\n\n'
    'Dialogue:\n<Woman, English>: "Hello."\n\nBackground Sound:\n<Quiet room>'
)

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1"}

# Put before a script, it makes Python forget that the package is installed.
WITHOUT_PACKAGE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_magihuman":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@contextmanager
def count_reads():
    """The list of the values that Python reads from tensors, for each of which it would wait for an accelerator."""
    reads = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append(args[0])
            return function(*args, **kwargs or {})

    with Recorder():
        yield reads


# Transformers


def make_tiny_model(**config):
    return MagiHumanTransformer3DModel(
        **{
            "in_channels": 4,
            "audio_in_channels": 8,
            "text_in_channels": 24,
            "num_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_head_dim": 16,
            "modality_layers": (0, 2),
            "gelu_layers": (0,),
            "feed_forward_multiple": 1,
        }
        | config
    ).eval()


def make_original(**config):
    """Random weights of a tiny model with the original's names."""
    config = dict(make_tiny_model(**config).config)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, rule in transformer_rules(config | {"feed_forward_multiple": 1}).items():
        weights[name] = torch.randn(rule.shape, generator=generator) * (0.1 if "norm" in name else 0.02)
    num_bands = config["attention_head_dim"] // 8
    weights[ROPE_BANDS] = 1.0 / config["rope_theta"] ** (torch.arange(num_bands) / num_bands)
    return weights


def multiplies_float8_by_row():
    """Whether the CPU does: in torch 2.10 it takes one scale alone."""
    row = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(row, row.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def make_inputs(batch_size=1, num_frames=3, audio_length=9, text_length=7):
    return (
        torch.randn(batch_size, 4, num_frames, 4, 6),
        torch.randn(batch_size, audio_length, 8),
        torch.randn(batch_size, text_length, 24),
    )


def round_to_float8(model):
    """The model with the linears of its blocks rounded as float8 storage rounds them."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks."):
            module.weight.data = module.weight.to(torch.float8_e4m3fn).to(module.weight.dtype)
    return model


# Pipelines


def run(pipe, prompt=PROMPT, **kwargs):
    """A short call of `MagiHumanAudioVideoPipeline`."""
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 9}
    kwargs = {**size, "num_inference_steps": 2, "generator": seeded(), "output_type": "latent"} | kwargs
    return pipe(prompt, **kwargs)


def make_low(batch_size=1, latent_frames=3, audio_length=9):
    """Latents of a video of 32x64 pixels and of its sound."""
    generator = seeded(3)
    latents = torch.randn(batch_size, 8, latent_frames, 2, 4, generator=generator)
    return latents, torch.randn(batch_size, audio_length, 8, generator=generator)


def upscale(pipe, prompt=PROMPT, **kwargs):
    """A short call of `MagiHumanLatentUpscalePipeline`."""
    pipe.set_progress_bar_config(disable=True)
    if "latents" not in kwargs and "video" not in kwargs:
        latents, audio_latents = make_low()
        kwargs = {"latents": latents} | ({} if "audio" in kwargs else {"audio_latents": audio_latents}) | kwargs
    size = {"height": 64, "width": 96}
    kwargs = {**size, "num_inference_steps": 2, "generator": seeded(), "output_type": "latent"} | kwargs
    return pipe(prompt, **kwargs)


def assert_same(output, expected, tolerance=0.0):
    for name in ("frames", "audio"):
        torch.testing.assert_close(
            torch.as_tensor(output[name]), torch.as_tensor(expected[name]), atol=tolerance, rtol=0, msg=name
        )


def generate(pipe, **arguments):
    """Frames and sound of a call with guidance, a first frame and a sound, so that every part runs."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0} | arguments
    if isinstance(pipe, MagiHumanLatentUpscalePipeline):
        arguments["latents"] = torch.randn(1, 8, 3, 1, 2, generator=generator)
        arguments["audio_latents"] = torch.randn(1, 9, 8, generator=generator)
    else:
        arguments["num_frames"] = 9
        arguments["audio"] = (torch.randn(2, 9 * 2048, generator=generator), 51200)
    image = torch.rand(3, 32, 64, generator=generator)
    output = pipe(PROMPT, negative_prompt="blurred", image=image, generator=generator, **arguments)
    return output.frames, output.audio


def assert_equal(output, expected):
    for value, other in zip(output, expected, strict=True):
        assert np.array_equal(value, other)


# Media


def run_ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def read_header(path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    return subprocess.run(command, check=False, capture_output=True, text=True).stderr


def read_frames(path, height, width):
    """uint8 (num_frames, height, width, 3)"""
    flags = "accurate_rnd+full_chroma_int+bicubic"
    video = run_ffmpeg("-i", path, "-sws_flags", flags, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(video, np.uint8).reshape(-1, height, width, 3)


def read_sound(path):
    """float32 (num_samples, 2)"""
    return np.frombuffer(run_ffmpeg("-i", path, "-map", "0:a", "-f", "f32le", "-"), "<f4").reshape(-1, 2)


def peak_frequency(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * rate / len(samples)


def listened_at(processes):
    """The addresses at which processes can be reached."""
    addresses = set()
    for process in processes:
        with suppress(psutil.Error):
            connections = process.net_connections("inet")
            addresses |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    return addresses
