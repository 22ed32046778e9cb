# SPDX-License-Identifier: Apache-2.0
"""Trains the transformer of the latent upscale pipeline, from 128 x 128 to 256 x 256 pixels.

    python examples/nano/train_upscale.py --low cache/128 --high cache/256 --text runs/text_encoder \\
        --video-vae runs/video_vae --output runs/upscale

It starts from resized latents with noise, as the pipeline does, and learns the way to the latents of the large frames.
"""

from pathlib import Path

import numpy as np
import torch
import world
from cache_latents import load_cache
from recipe import Run, make_parser, save_sheet, to_frames
from train_text_encoder import HIDDEN_SIZE, Texts
from train_video_vae import SPATIAL, TEMPORAL, Projection

from diffusers_magihuman import (
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.training import sample_noise_levels, upscale_loss


def make_transformer(channels: int, audio_channels: int) -> MagiHumanTransformer3DModel:
    return MagiHumanTransformer3DModel(
        in_channels=channels,
        audio_in_channels=audio_channels,
        text_in_channels=HIDDEN_SIZE,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_head_dim=32,
        modality_layers=(),
        gelu_layers=(0,),
        coordinate_style="v1",
        local_attention_layers=(0, 1, 2),
        local_attention_frames=1,
    )


def main() -> None:
    parser = make_parser(__doc__, steps=3000, batch_size=4, learning_rate=1e-3)
    parser.add_argument("--low", type=Path, required=True, help="output of cache_latents.py in low resolution")
    parser.add_argument("--high", type=Path, required=True, help="that of the same clips in high resolution")
    parser.add_argument("--text", type=Path, required=True, help="output of train_text_encoder.py")
    parser.add_argument("--video-vae", type=Path, required=True, help="output of train_video_vae.py")
    parser.add_argument("--noise-level", type=int, default=220, help="of the resized latents, default: %(default)s")
    parser.add_argument("--text-dropout", type=float, default=0.1, help="of a batch, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Data and model
    low, high = load_cache(arguments.low), load_cache(arguments.high)
    torch.manual_seed(arguments.seed)
    run = Run(arguments, {"transformer": make_transformer(high.latents.shape[1], high.audio_latents.shape[2])})
    texts = Texts(arguments.text, run.device)
    projection = Projection.load(arguments.video_vae / "projection.safetensors").to(run.device)
    transformer = run.unwrap("transformer").train()
    pipe = MagiHumanLatentUpscalePipeline(None, None, transformer, MagiHumanFlowScheduler(), None, None)
    pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal = SPATIAL, TEMPORAL
    size = [SPATIAL * length for length in high.latents.shape[3:]]

    def start(latents: np.ndarray, audio_latents: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        states = (torch.from_numpy(values.astype(np.float32)) for values in (latents, audio_latents))
        return pipe.prepare_latents(*states, *size, arguments.noise_level, 0.7, None, run.device)

    # 2. Train
    for rng in run.steps():
        clips = rng.integers(min(len(low.scenes), len(high.scenes)), size=arguments.batch_size)
        low_latents, audio_latents = start(*(np.stack([v[clip] for clip in clips]) for v in low[:2]))
        latents = torch.from_numpy(np.stack([high.latents[clip] for clip in clips]).astype(np.float32))
        embeds, mask = texts.embed([world.make_prompt(high.scenes[clip], rng) for clip in clips])
        if rng.random() < arguments.text_dropout:
            embeds, mask = texts.negative.expand(arguments.batch_size, -1, -1), None
        noise_levels = sample_noise_levels(arguments.batch_size, "uniform", 3.0, device=run.device)
        with run.accelerator.autocast():
            loss = upscale_loss(
                run.models["transformer"],
                latents.to(run.device),
                low_latents,
                audio_latents,
                embeds,
                mask,
                noise_levels,
            )
        run.update("transformer", loss)

    # 3. Save, and look: resized, upscaled and true, by the projection alone
    transformer = run.unwrap("transformer")
    transformer.save_pretrained(arguments.output / "transformer")
    embeds, mask = texts.embed([world.make_prompt(scene, np.random.default_rng(0)) for scene in high.scenes[:1]])
    latents = torch.from_numpy(low.latents[:1].astype(np.float32))
    upscaled = pipe(
        latents=latents,
        audio_latents=torch.from_numpy(low.audio_latents[:1].astype(np.float32)),
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        height=size[0],
        width=size[1],
        noise_level=arguments.noise_level,
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    true = torch.from_numpy(high.latents[:1].astype(np.float32))
    resized = torch.nn.functional.interpolate(latents, size=true.shape[2:], mode="trilinear", align_corners=True)
    videos = (resized.to(run.device), upscaled, true.to(run.device))
    save_sheet([to_frames(projection.decode(video))[0, ::12] for video in videos], arguments.output / "samples.png")


if __name__ == "__main__":
    main()
