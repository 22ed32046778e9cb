# SPDX-License-Identifier: Apache-2.0
"""Trains a video autoencoder, Diffusers' `AutoencoderKLWan` in the manner of Wan 2.2, in two independent halves.

What a latent says is settled first, by the principal components of 16 x 16 pixels of four frames; it takes a minute.
Then the decoder learns to draw the video from these components and the encoder learns to compute them. Neither waits
for the other, which is what makes joint training slow, and the transformer's latents exist before both are done.

    python examples/nano/train_video_vae.py --data data/128 data/256 --output runs/video_vae
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from make_dataset import load_dataset
from recipe import Run, make_parser, save_sheet, to_frames, to_tensor
from safetensors.torch import load_file, save_file
from torch import nn

LATENT_CHANNELS = 48
SPATIAL, TEMPORAL = 16, 4


class Projection(nn.Module):
    """
    Principal components of patches of 4 x 16 x 16 pixels: a linear autoencoder of the latents' shape.

    The first frame counts as four, as it has a latent frame of its own. A component's size goes with the square root
    of what it would be, so that what matters little to the eye matters little to the transformer, too.

    Args:
        channels (`int`): Number of components.
    """

    def __init__(self, channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        size = 3 * TEMPORAL * SPATIAL**2
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("components", torch.zeros(size, channels))  # orthonormal
        self.register_buffer("scale", torch.ones(channels))

    @staticmethod
    def to_patches(video: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, 4 * k + 1, height, width)` to `(batch, k + 1, height / 16, width / 16, 3072)`."""
        video = torch.cat([video[:, :, :1].expand(-1, -1, TEMPORAL - 1, -1, -1), video], dim=2)
        for dim, size in ((4, SPATIAL), (3, SPATIAL), (2, TEMPORAL)):
            video = video.unflatten(dim, (-1, size))
        return video.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)

    @torch.no_grad()
    def fit(self, patches: torch.Tensor) -> None:
        """Finds the components of patches `(number, 3072)`; those that move count for more."""
        motion = patches.unflatten(1, (3, TEMPORAL, -1)).diff(dim=2).square().mean(dim=(1, 2, 3))
        weights = 1 + 0.5 * motion / motion.mean().clamp(min=1e-9)
        weights = (weights / weights.sum())[:, None]
        self.mean.copy_((weights * patches).sum(dim=0))
        centred = (patches - self.mean) * weights.sqrt()
        variances, vectors = torch.linalg.eigh(centred.T @ centred)
        order = variances.argsort(descending=True)[: self.components.shape[1]]
        self.components.copy_(vectors[:, order])
        scale = variances[order].clamp(min=1e-9) ** -0.25
        latents = (patches - self.mean) @ self.components * scale
        self.scale.copy_(scale / latents.square().mean().sqrt())

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, channels, k + 1, height / 16, width / 16)` of a video in [-1, 1]."""
        return ((self.to_patches(video) - self.mean) @ self.components * self.scale).movedim(-1, 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The video of latents, as far as it lies in the components."""
        patches = (latents.movedim(1, -1) / self.scale) @ self.components.T + self.mean
        patches = patches.unflatten(4, (3, TEMPORAL, SPATIAL, SPATIAL)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return patches.flatten(6).flatten(4, 5).flatten(2, 3)[:, :, TEMPORAL - 1 :]

    def save(self, file: Path) -> None:
        save_file(self.state_dict(), file)

    @classmethod
    def load(cls, file: Path) -> "Projection":
        state = load_file(file)
        projection = cls(state["scale"].shape[0])
        projection.load_state_dict(state)
        return projection


def make_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=12,
        decoder_base_dim=10,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=SPATIAL,
        scale_factor_temporal=TEMPORAL,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What `vae.decode` gives, but unclamped, and with all frames after the first at once, which is faster."""
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    first = vae.decoder(latents[:, :, :1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)
    rest = vae.decoder(latents[:, :, 1:], feat_cache=vae._feat_map, feat_idx=[0])
    vae.clear_cache()
    return unpatchify(torch.cat([first, rest], dim=2), vae.config.patch_size)


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance that `vae.encode` gives, with all frames after the first at once."""
    vae.clear_cache()
    video = patchify(video, vae.config.patch_size)
    first = vae.encoder(video[:, :, :1], feat_cache=vae._enc_feat_map, feat_idx=[0])
    rest = vae.encoder(video[:, :, 1:], feat_cache=vae._enc_feat_map, feat_idx=[0])
    vae.clear_cache()
    return vae.quant_conv(torch.cat([first, rest], dim=2))


def draw_crops(datasets: list[np.ndarray], rng: np.random.Generator, count: int, frames: int, size: int) -> np.ndarray:
    """Draws pieces of clips, uint8 `(count, frames, size, size, 3)`, at places that latents start at."""
    crops = []
    for _ in range(count):
        # Three in four from the first dataset.
        clips = datasets[0] if rng.random() < 0.75 else datasets[-1]
        start = 4 * rng.integers((clips.shape[1] - frames) // 4 + 1)
        row, column = SPATIAL * rng.integers((clips.shape[2] - size) // SPATIAL + 1, size=2)
        clip = clips[rng.integers(len(clips))]
        crops.append(clip[start : start + frames, row : row + size, column : column + size])
    return np.stack(crops)


def detail_weights(video: torch.Tensor) -> torch.Tensor:
    """Weights of pixels, `(batch, 1, frames, height, width)`, 2 on average: eyes and lips are small, walls large."""
    differences = [video.diff(dim=dim, append=video.narrow(dim, -1, 1)) for dim in (3, 4)]
    detail = torch.stack(differences).square().sum(dim=(0, 2)).sqrt().unsqueeze(1)
    detail = F.avg_pool3d(detail, (1, 3, 3), stride=1, padding=(0, 1, 1))
    return 1 + detail / detail.mean(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)


def main() -> None:
    parser = make_parser(__doc__, steps=4000, batch_size=2, learning_rate=1e-3)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="datasets, of falling importance")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose weights go on to be trained")
    parser.add_argument("--frames", type=int, default=25, help="of a training clip, 4 * k + 1, default: %(default)s")
    parser.add_argument("--crop", type=int, default=96, help="pixels, a multiple of 16, default: %(default)s")
    arguments = parser.parse_args()

    # 1. What latents say
    torch.manual_seed(arguments.seed)
    datasets = [load_dataset(folder).frames for folder in arguments.data]
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "projection.safetensors"
    if arguments.start_from is not None:
        shutil.copy(arguments.start_from / "projection.safetensors", file)
    if not file.exists():
        rng = np.random.default_rng(arguments.seed)
        count = 120 // len(datasets)
        clips = [clips[seed] for clips in datasets for seed in rng.permutation(len(clips))[:count]]
        patches = [Projection.to_patches(to_tensor(clip[None])).flatten(0, 3) for clip in clips]
        projection = Projection()
        # A large frame has more patches than a small one, and no more to say.
        projection.fit(torch.cat([part[torch.randperm(len(part))[: 13 * 64]] for part in patches]))
        projection.save(file)
    projection = Projection.load(file)

    # 2. The decoder and the encoder of these latents
    vae = make_vae()
    if arguments.start_from is not None:
        vae = AutoencoderKLWan.from_pretrained(arguments.start_from / "vae")
    run = Run(arguments, {"vae": vae})
    vae, projection = run.unwrap("vae").train(), projection.to(run.device)
    for rng in run.steps():
        video = draw_crops(datasets, rng, arguments.batch_size, arguments.frames, arguments.crop)
        video = to_tensor(video).to(run.device)
        latents = projection.encode(video)
        with run.accelerator.autocast():
            mean, logvar = encode(vae, video).chunk(2, dim=1)
            encoder_loss = F.mse_loss(mean, latents)
            # A standard deviation of e^-3, so that a sample is as good as the mean.
            logvar_loss = (logvar + 6).square().mean()
            errors = (decode(vae, latents) - video).square()
        run.update(
            "vae",
            encoder_loss + 0.01 * logvar_loss + 2 * (detail_weights(video) * errors).mean(),
            encoder_mse=encoder_loss.detach(),
            psnr=-10 * torch.log10(errors.detach().mean() / 4),
        )

    # 3. Save, and look
    vae = run.unwrap("vae")
    vae.save_pretrained(arguments.output / "vae")
    video = to_tensor(datasets[0][:4]).to(run.device)
    with torch.no_grad():
        decoded, reconstructed = decode(vae, projection.encode(video)), vae(video).sample
    rows = [to_frames(part)[clip, ::8] for clip in range(len(video)) for part in (video, decoded, reconstructed)]
    save_sheet(rows, arguments.output / "samples.png")


if __name__ == "__main__":
    main()
