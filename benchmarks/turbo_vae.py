# SPDX-License-Identifier: Apache-2.0
"""Time the full-size Turbo VAE (107M, random weights, float32) decoding, 256x448 unless told, whole or in tiles.

    python benchmarks/turbo_vae.py --num-frames 125 [--height 1088 --width 1920 --tiling] [--device cuda]

Progress goes to stderr; the last line of stdout is JSON: hardware, versions, seconds of one decode, peak memory. On a
CPU the peak is that of the whole process, on a GPU that of PyTorch's allocator.
"""

import argparse
import sys
import time

import torch
from common import peak_gib, print_result, timed

from diffusers_magihuman.autoencoder_kl_magihuman_turbo import AutoencoderKLMagiHumanTurbo


@torch.no_grad()
def decode(vae: AutoencoderKLMagiHumanTurbo, z: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Decodes once; returns the video and the seconds taken."""
    start = time.perf_counter()

    def report(_module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> None:
        print(f"window of {output.shape[2]} frames, {time.perf_counter() - start:.1f} s", file=sys.stderr)

    hook = vae.decoder.register_forward_hook(report)
    video, seconds = timed(lambda: vae.decode(z).sample, z.device)
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

    print_result(
        "turbo_vae",
        device,
        dtype="float32",
        frames=video.shape[2],
        height=video.shape[3],
        width=video.shape[4],
        tiling=arguments.tiling,
        seconds=round(seconds, 2),
        peak_gib=round(peak_gib(device), 2),
    )


if __name__ == "__main__":
    main()
