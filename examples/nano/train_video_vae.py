# SPDX-License-Identifier: Apache-2.0
"""Trains the causal decoder of Diffusers' `AutoencoderKLWan`, in the manner of Wan 2.2, for the Turbo VAE's latents.

    python examples/nano/train_video_vae.py --data data/128 data/256 --held-out data/held_out \\
        --turbo-vae runs/turbo_vae --output runs/video_vae

The encoder is the Turbo VAE's and stays as it is, so both decode the same latents.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from make_dataset import load_dataset
from recipe import Run, make_parser, save_sheet, to_frames, to_tensor
from train_turbo_vae import SHAPES, SPATIAL, TEMPORAL, draw_crops, encode, measure_psnr

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo


def make_vae(turbo: AutoencoderKLMagiHumanTurbo) -> AutoencoderKLWan:
    """A Wan VAE with the encoder of a Turbo VAE."""
    config = turbo.config
    vae = AutoencoderKLWan(
        base_dim=config.encoder_base_dim,
        decoder_base_dim=10,
        z_dim=config.latent_channels,
        dim_mult=list(config.encoder_dim_mult),
        num_res_blocks=config.encoder_num_res_blocks,
        temperal_downsample=list(config.encoder_temporal_downsample),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=SPATIAL,
        scale_factor_temporal=TEMPORAL,
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )
    vae.encoder.load_state_dict(turbo.encoder.state_dict())
    vae.quant_conv.load_state_dict(turbo.quant_conv.state_dict())
    return vae


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What `vae.decode` gives, but unclamped, and with all frames after the first at once, which is faster."""
    cache: list[torch.Tensor | None] = [None] * 64
    latents = vae.post_quant_conv(latents)
    first = vae.decoder(latents[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
    rest = vae.decoder(latents[:, :, 1:], feat_cache=cache, feat_idx=[0])
    return unpatchify(torch.cat([first, rest], dim=2), vae.config.patch_size)


def main() -> None:
    parser = make_parser(__doc__, steps=20000, batch_size=1, learning_rate=1e-3)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="datasets, half of all from the first")
    parser.add_argument("--held-out", type=Path, required=True, help="dataset to measure on")
    parser.add_argument("--turbo-vae", type=Path, required=True, help="output of train_turbo_vae.py")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose decoder goes on")
    parser.add_argument("--noise", type=float, default=0.05, help="on latents, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Data and model
    datasets, held_out = [load_dataset(folder) for folder in arguments.data], load_dataset(arguments.held_out)
    turbo = AutoencoderKLMagiHumanTurbo.from_pretrained(arguments.turbo_vae / "vae")
    torch.manual_seed(arguments.seed)
    vae = make_vae(turbo)
    if arguments.start_from is not None:
        earlier = AutoencoderKLWan.from_pretrained(arguments.start_from / "vae").float()
        for name in ("decoder", "post_quant_conv"):
            getattr(vae, name).load_state_dict(getattr(earlier, name).state_dict())
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    run = Run(arguments, {"vae": vae})
    vae = run.unwrap("vae").train()

    def code(video: torch.Tensor) -> torch.Tensor:
        return decode(vae, encode(vae, video.to(run.device))).cpu()

    # 2. Train
    for rng in run.steps():
        count, frames, size = SHAPES[rng.integers(len(SHAPES))]
        crops = draw_crops(datasets, rng, arguments.batch_size * count, frames, size)
        video, weights = (values.to(run.device) for values in crops)
        with run.accelerator.autocast():
            with torch.no_grad():
                latents = encode(vae, video)
            decoded = decode(vae, latents + arguments.noise * torch.randn_like(latents))
        errors = (decoded.float() - video).square()
        run.update("vae", 4 * (weights * errors).mean(), error=errors.mean())
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
