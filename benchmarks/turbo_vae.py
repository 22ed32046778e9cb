# SPDX-License-Identifier: Apache-2.0
"""Time the full-size Turbo VAE (107M, random weights, float32) decoding, 256x448 unless told, whole or in tiles.

    python benchmarks/turbo_vae.py --num-frames 125 [--height 1088 --width 1920 --tiling] [--device cuda]

Progress goes to stderr; the last line of stdout is JSON: hardware, versions, seconds of one decode, peak memory. On a
CPU the peak is that of the whole process, on a GPU that of PyTorch's allocator.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffusers_magihuman.autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    models = [line for line in cpu_info.read_text().splitlines() if "model name" in line] if cpu_info.exists() else []
    return models[0].split(":")[1].strip() if models else platform.processor()


def git_commit() -> str | None:
    command = ["git", "rev-parse", "--short", "--verify", "HEAD"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB on Linux


@torch.no_grad()
def decode(vae: AutoencoderKLMagiHumanTurbo, z: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Decode once; return the video and the seconds taken."""
    start = time.perf_counter()

    def report(_module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> None:
        print(f"window of {output.shape[2]} frames, {time.perf_counter() - start:.1f} s", file=sys.stderr)

    hook = vae.decoder.register_forward_hook(report)
    video = vae.decode(z).sample
    if z.device.type == "cuda":
        torch.cuda.synchronize(z.device)
    seconds = time.perf_counter() - start
    hook.remove()
    return video, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-frames", type=int, default=125, help="frames of the video, 4 * k + 1")
    parser.add_argument("--height", type=int, default=256, help="multiple of 16")
    parser.add_argument("--width", type=int, default=448, help="multiple of 16")
    parser.add_argument("--tiling", action="store_true", help="decode in tiles of the default size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.num_frames % 4 != 1:
        parser.error(f"--num-frames must be 4 * k + 1, but is {arguments.num_frames}")

    device = torch.device(arguments.device)
    torch.manual_seed(0)
    vae = AutoencoderKLMagiHumanTurbo().eval().to(device)
    if arguments.tiling:
        vae.enable_tiling()
    latent_frames = (arguments.num_frames - 1) // vae.temporal_compression_ratio + 1
    ratio = vae.spatial_compression_ratio
    size = arguments.height // ratio, arguments.width // ratio
    z = torch.randn(1, vae.config.latent_channels, latent_frames, *size).to(device)
    if device.type == "cuda":
        decode(vae, z)  # chooses the convolution algorithms
        torch.cuda.reset_peak_memory_stats(device)
    video, seconds = decode(vae, z)

    result = {
        "benchmark": "turbo_vae",
        "hardware": hardware(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "commit": git_commit(),
        "frames": video.shape[2],
        "height": video.shape[3],
        "width": video.shape[4],
        "tiling": arguments.tiling,
        "seconds": round(seconds, 2),
        "peak_gib": round(peak_gib(device), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
