# SPDX-License-Identifier: Apache-2.0
"""Trains the transformer of the latent upscale pipeline, from 128 x 128 to 256 x 256 pixels.

    python examples/nano/train_upscale.py --low cache/128x128x25/* --high cache/256x256x25/* \\
        --text runs/text_encoder --turbo-vae runs/turbo_vae --output runs/upscale

It starts from resized latents with noise, as the pipeline does, and learns the way to the latents of the large frames.
`sharpness` in the log is that of a clip that it upscales: the energy of differences of neighbouring pixels, decoded
true latents have 1.
"""

from pathlib import Path

import numpy as np
import torch
from cache_latents import choose_cache, load_cache, read_clips
from prompts import make_prompt
from recipe import Run, make_parser, save_sheet, to_frames
from train_text_encoder import HIDDEN_SIZE, Texts
from train_turbo_vae import SPATIAL

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)
from diffusers_magihuman.training import sample_noise_levels, upscale_loss


def make_transformer(channels: int, audio_channels: int) -> MagiHumanTransformer3DModel:
    return MagiHumanTransformer3DModel(
        patch_size=(1, 1, 1),  # noise of larger tokens does not pass through so few channels
        in_channels=channels,
        audio_in_channels=audio_channels,
        text_in_channels=HIDDEN_SIZE,
        num_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        attention_head_dim=40,
        modality_layers=(),
        gelu_layers=(0,),
        feed_forward_multiple=1,
        coordinate_style="v1",
        local_attention_layers=(0, 1, 2),
        local_attention_frames=1,
    )


def measure_energy(video: torch.Tensor) -> float:
    """Mean square of the differences of neighbouring pixels."""
    return sum(float(video.diff(dim=dim).square().mean()) for dim in (3, 4))


def main() -> None:
    parser = make_parser(__doc__, steps=10000, batch_size=4, learning_rate=1e-3)
    parser.add_argument("--low", type=Path, nargs="+", required=True, help="outputs of cache_latents.py")
    parser.add_argument("--high", type=Path, nargs="+", required=True, help="those of the same clips in larger frames")
    parser.add_argument("--text", type=Path, required=True, help="output of train_text_encoder.py")
    parser.add_argument("--turbo-vae", type=Path, required=True, help="output of train_turbo_vae.py, to draw samples")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose weights go on to be trained")
    parser.add_argument("--noise-level", type=int, default=220, help="of the resized latents, default: %(default)s")
    parser.add_argument("--text-dropout", type=float, default=0.1, help="part of the batches, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Data and model
    lows, highs = ([load_cache(folder) for folder in folders] for folders in (arguments.low, arguments.high))
    if [cache.scenes for cache in lows] != [cache.scenes for cache in highs]:
        raise ValueError("`--low` and `--high` must hold the same clips in the same order.")
    torch.manual_seed(arguments.seed)
    transformer = make_transformer(highs[0].latents.shape[1], highs[0].audio_latents.shape[2])
    if arguments.start_from is not None:
        transformer = MagiHumanTransformer3DModel.from_pretrained(arguments.start_from / "transformer")
    run = Run(arguments, {"transformer": transformer})
    texts = Texts(arguments.text, run.device)
    vae = AutoencoderKLMagiHumanTurbo.from_pretrained(arguments.turbo_vae / "vae").to(run.device)
    transformer = run.unwrap("transformer").train()
    pipe = MagiHumanLatentUpscalePipeline(None, None, transformer, MagiHumanFlowScheduler(), vae, None)
    pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def draw_samples() -> dict[str, float]:
        """Draws a clip as small latents that are resized, upscaled and true ones decode; the sharpness of these."""
        latents, audio_latents, *_ = read_clips(lows[0], np.arange(1), run.device)
        true, *_ = read_clips(highs[0], np.arange(1), run.device)
        embeds, mask = texts.embed([make_prompt(np.random.default_rng(0), highs[0].scenes[0])])
        upscaled = pipe(
            latents=latents,
            audio_latents=audio_latents,
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            height=SPATIAL * true.shape[3],
            width=SPATIAL * true.shape[4],
            noise_level=arguments.noise_level,
            guidance_scale=1.0,
            output_type="latent",
        ).frames
        resized = torch.nn.functional.interpolate(latents, size=true.shape[2:], mode="trilinear", align_corners=True)
        videos = [vae.decoder(states, is_first_chunk=True) for states in (resized, upscaled, true)]
        save_sheet([to_frames(video)[0, ::8] for video in videos], run.output / "samples.png")
        return {"sharpness": measure_energy(videos[1]) / measure_energy(videos[2])}

    # 2. Train
    for rng in run.steps():
        number = choose_cache(highs, rng)
        low, high = lows[number], highs[number]
        clips = rng.integers(len(high.scenes), size=arguments.batch_size)
        latents, *_ = read_clips(high, clips, run.device)
        size = [SPATIAL * length for length in latents.shape[3:]]
        low_latents, audio_latents = pipe.prepare_latents(
            *read_clips(low, clips, run.device)[:2], *size, arguments.noise_level, 0.7, None, run.device
        )
        embeds, mask = texts.embed([make_prompt(rng, high.scenes[clip]) for clip in clips])
        if rng.random() < arguments.text_dropout:
            embeds, mask = texts.embed_negative(arguments.batch_size)
        noise_levels = sample_noise_levels(arguments.batch_size, "uniform", 3.0, device=run.device)
        loss = upscale_loss(run.models["transformer"], latents, low_latents, audio_latents, embeds, mask, noise_levels)
        run.update("transformer", loss)
        run.measure(draw_samples)

    # 3. Save
    run.unwrap("transformer").save_pretrained(arguments.output / "transformer")


if __name__ == "__main__":
    main()
