# SPDX-License-Identifier: Apache-2.0
"""Trains the Turbo VAE: the encoder of a Wan 2.2 VAE and the light decoder that the pipelines run, together.

    python examples/nano/train_turbo_vae.py --data data/128 data/256 --held-out data/held_out --output runs/turbo_vae

Crops mostly hold a part of the face, and errors in eyes and mouth count for more: they are small, and what one sees.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from make_dataset import Dataset, load_dataset
from recipe import Run, make_parser, save_sheet, to_frames, to_tensor

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo

LATENT_CHANNELS = 48
SPATIAL, TEMPORAL = 16, 4
PARTS = ("whole", "eyes", "mouth")
# Of a step's crops: number, frames and size, all of about as many pixels. Few and long ones teach how time goes on.
SHAPES = ((4, 5, 64), (2, 9, 64), (1, 17, 64), (2, 5, 96))


def make_turbo_vae(window: int = 13) -> AutoencoderKLMagiHumanTurbo:
    """A tiny model that decodes so many latent frames at once."""
    vae = AutoencoderKLMagiHumanTurbo(
        latent_channels=LATENT_CHANNELS,
        decoder_block_out_channels=(16, 32, 64, 64),
        decoder_layers_per_block=(0, 1, 1, 1, 1),
        encoder_base_dim=16,
        encoder_num_res_blocks=1,
        first_chunk_size=window,
        step_size=window,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    # The posterior's standard deviation is a constant, so small that a sample is as good as the mean.
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0.0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -8.0
    return vae


def encode(vae: AutoencoderKLMagiHumanTurbo, video: torch.Tensor) -> torch.Tensor:
    """The mean that `vae.encode` gives, with all frames after the first at once, which is faster."""
    cache: list[torch.Tensor | None] = [None] * 64
    patches = patchify(video, 2)
    parts = [part for part in (patches[:, :, :1], patches[:, :, 1:]) if part.shape[2]]
    states = [vae.encoder(part, feat_cache=cache, feat_idx=[0]) for part in parts]
    return vae.quant_conv(torch.cat(states, dim=2))[:, :LATENT_CHANNELS]


def draw_crops(
    datasets: list[Dataset], rng: np.random.Generator, count: int, frames: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws pieces of clips, half of them of the first dataset; three in five hold the middle of an eye or the mouth.

    Returns:
        `tuple`: Videos in [-1, 1], `(count, 3, frames, size, size)`, and weights of their pixels, 2 in eyes and mouth
        and 1 elsewhere, `(count, 1, frames, size, size)`.
    """
    crops, weights = [], np.ones((count, 1, frames, size, size), dtype=np.float32)
    for weight in weights[:, 0]:
        clips, boxes = datasets[rng.integers(1, max(len(datasets), 2)) % len(datasets) if rng.random() < 0.5 else 0]
        if clips.shape[1] < frames or min(clips.shape[2:4]) < size:
            asked = f"at least {frames} frames of {size}x{size} pixels"
            raise ValueError(f"A dataset has clips of shape {clips.shape[1:4]}, but crops need {asked}.")
        clip, start = rng.integers(len(clips)), rng.integers(clips.shape[1] - frames + 1)
        room = np.array(clips.shape[3:1:-1]) - size
        corner = rng.integers(room + 1)
        if rng.random() < 0.6:
            box = boxes[clip, start + frames // 2, rng.integers(3)]
            corner = ((box[:2] + box[2:]) / 2 - rng.integers(size // 4, size - size // 4 + 1, size=2)).astype(int)
            corner = np.clip(corner, 0, room)
        left, top = corner
        crops.append(clips[clip, start : start + frames, top : top + size, left : left + size])
        places = np.clip(np.round(boxes[clip, start : start + frames] - np.tile(corner, 2)), 0, size).astype(int)
        for number, (x, y, right, bottom) in enumerate(places.reshape(-1, 4)):
            weight[number // 3, y:bottom, x:right] = 2.0
    return to_tensor(np.stack(crops)), torch.from_numpy(weights)


def measure_psnr(dataset: Dataset, code: Callable[[torch.Tensor], torch.Tensor], clips: int = 12) -> dict[str, float]:
    """Mean PSNR over clips of whole frames, eyes and mouths that went through `code`, in dB."""
    chosen, sums = list(zip(*dataset, strict=True))[:clips], np.zeros(3)
    for frames, boxes in chosen:
        errors = (to_tensor(frames[None]) - code(to_tensor(frames[None])).clamp(-1, 1)).square().mean(dim=1)[0] / 4
        regions = [[], []]
        for error, places in zip(errors, np.round(boxes).clip(0).astype(int), strict=True):
            for number, (left, top, right, bottom) in enumerate(places):
                regions[number // 2].append(error[top:bottom, left:right].flatten())
        sums += [-10 * torch.log10(torch.cat(region).mean()) for region in ([errors.flatten()], *regions)]
    return {f"psnr_{part}": value for part, value in zip(PARTS, (sums / len(chosen)).tolist(), strict=True)}


def main() -> None:
    parser = make_parser(__doc__, steps=40000, batch_size=1, learning_rate=1e-3)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="datasets, half of all from the first")
    parser.add_argument("--held-out", type=Path, required=True, help="dataset to measure on")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose weights go on to be trained")
    parser.add_argument("--noise", type=float, default=0.05, help="on latents, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Data and model
    datasets, held_out = [load_dataset(folder) for folder in arguments.data], load_dataset(arguments.held_out)
    torch.manual_seed(arguments.seed)
    vae = make_turbo_vae()
    if arguments.start_from is not None:
        vae = AutoencoderKLMagiHumanTurbo.from_pretrained(arguments.start_from / "vae").float()
    run = Run(arguments, {"vae": vae})
    vae = run.unwrap("vae").train()
    decode = run.compile(vae.decoder)

    def code(video: torch.Tensor) -> torch.Tensor:
        return vae.decoder(encode(vae, video.to(run.device)), is_first_chunk=True).cpu()

    # 2. Train
    for rng in run.steps():
        count, frames, size = SHAPES[rng.integers(len(SHAPES))]
        crops = draw_crops(datasets, rng, arguments.batch_size * count, frames, size)
        video, weights = (values.to(run.device) for values in crops)
        with run.accelerator.autocast():
            latents = encode(vae, video)
            decoded = decode(latents + arguments.noise * torch.randn_like(latents), is_first_chunk=True)
        errors = (decoded.float() - video).square()
        # Transformers want latents of mean 0 and variance 1.
        means, powers = (values.float().mean(dim=(0, 2, 3, 4)) for values in (latents, latents.square()))
        scale_loss = (means.square() + (powers - 1).square()).mean()
        loss = 4 * (weights * errors).mean() + 1e-3 * scale_loss
        run.update("vae", loss, error=errors.mean(), scale_loss=scale_loss)
        run.measure(lambda: measure_psnr(held_out, code))

    # 3. Save, and look
    vae = run.unwrap("vae")
    vae.save_pretrained(arguments.output / "vae")
    video = to_tensor(held_out.frames[:6])
    with torch.no_grad():
        pairs = to_frames(video), to_frames(code(video))
    save_sheet([part[clip, ::4] for clip in range(len(video)) for part in pairs], arguments.output / "samples.png")


if __name__ == "__main__":
    main()
