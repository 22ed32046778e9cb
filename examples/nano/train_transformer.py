# SPDX-License-Identifier: Apache-2.0
"""Trains the base transformer by flow matching, on video, sound and text together.

    python examples/nano/train_transformer.py --data cache/128 --text runs/text_encoder --output runs/base

Some samples are shown their first frame, some their sound, and some batches the negative prompt in place of their
text: so the model learns to follow an image or a voice, and to be guided.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import world
from cache_latents import Cache, load_cache
from recipe import Run, make_parser, save_sheet, to_frames
from train_text_encoder import HIDDEN_SIZE, Texts
from train_video_vae import Projection

from diffusers_magihuman import MagiHumanFlowScheduler, MagiHumanTransformer3DModel
from diffusers_magihuman.training import flow_matching_loss, sample_noise_levels


def make_transformer(cache: Cache) -> MagiHumanTransformer3DModel:
    return MagiHumanTransformer3DModel(
        in_channels=cache.latents.shape[1],
        audio_in_channels=cache.audio_latents.shape[2],
        text_in_channels=HIDDEN_SIZE,
        num_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_head_dim=32,
        modality_layers=(),
        gelu_layers=(0,),
    )


class Batch(NamedTuple):
    """Latents of video and sound, prompts, and whose first frame and whose sound are given, bool `(batch_size,)`."""

    latents: torch.Tensor
    audio_latents: torch.Tensor
    prompts: list[str]
    has_frame: torch.Tensor
    has_audio: torch.Tensor


def draw_batch(cache: Cache, rng: np.random.Generator, batch_size: int, device: torch.device) -> Batch:
    """
    Draws clips and a new prompt for each, which may leave things out.

    Where a first frame or a sound is given, half of the prompts say something else of it, so that the model learns to
    follow what it sees and hears, whatever it reads.
    """
    clips = rng.integers(len(cache.scenes), size=batch_size)
    latents, audio_latents = (
        torch.from_numpy(np.stack([values[clip] for clip in clips]).astype(np.float32)).to(device)
        for values in (cache.latents, cache.audio_latents)
    )
    has_frame, has_audio = rng.random((2, batch_size)) < 0.25
    prompts = []
    for clip, frame_is_given, audio_is_given in zip(clips, has_frame, has_audio, strict=True):
        scene, other = cache.scenes[clip], world.make_scene(rng)
        heard = other if audio_is_given and rng.random() < 0.5 else scene
        seen = other if frame_is_given and rng.random() < 0.5 else scene
        said = world.leave_out(replace(seen, voice=heard.voice, syllables=heard.syllables), rng)
        prompts.append(world.make_prompt(said, rng, parts=rng.random() < 0.5))
    return Batch(
        latents, audio_latents, prompts, *(torch.from_numpy(has).to(device) for has in (has_frame, has_audio))
    )


@torch.no_grad()
def draw_samples(
    transformer: MagiHumanTransformer3DModel,
    projection: Projection,
    texts: Texts,
    cache: Cache,
    scheduler: MagiHumanFlowScheduler,
) -> list[np.ndarray]:
    """Draws four held-out prompts without guidance, decoded by the projection: every eighth frame of each."""
    rng = np.random.default_rng(0)
    prompts = [world.make_prompt(world.make_scene(rng, held_out=True), rng) for _ in range(4)]
    embeds, mask = texts.embed(prompts)
    states = [torch.randn(4, *values.shape[1:], device=embeds.device) for values in cache[:2]]
    schedulers = [copy.deepcopy(scheduler), copy.deepcopy(scheduler)]
    for timestep in scheduler.timesteps:
        velocities = transformer(*states, embeds, encoder_attention_mask=mask, return_dict=False)
        steps = zip(schedulers, velocities, states, strict=True)
        states = [one.step(velocity, timestep, state)[0] for one, velocity, state in steps]
    return [frames[::8] for frames in to_frames(projection.decode(states[0]))]


def main() -> None:
    parser = make_parser(__doc__, steps=8000, batch_size=16, learning_rate=1e-3)
    parser.add_argument("--data", type=Path, required=True, help="output of cache_latents.py")
    parser.add_argument("--text", type=Path, required=True, help="output of train_text_encoder.py")
    parser.add_argument("--video-vae", type=Path, required=True, help="output of train_video_vae.py")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose weights go on to be trained")
    parser.add_argument("--shift", type=float, default=3.0, help="of the noise levels, default: %(default)s")
    parser.add_argument("--audio-weight", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--motion-weight", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--text-dropout", type=float, default=0.1, help="of a batch, default: %(default)s")
    parser.add_argument("--pure-noise", type=float, default=0.25, help="part of each batch, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Data and model
    cache = load_cache(arguments.data)
    torch.manual_seed(arguments.seed)
    transformer = make_transformer(cache)
    if arguments.start_from is not None:
        transformer = MagiHumanTransformer3DModel.from_pretrained(arguments.start_from / "transformer")
    run = Run(arguments, {"transformer": transformer})
    texts = Texts(arguments.text, run.device)
    projection = Projection.load(arguments.video_vae / "projection.safetensors").to(run.device)

    scheduler = MagiHumanFlowScheduler()
    scheduler.set_timesteps(16)

    # 2. Train
    for rng in run.steps():
        latents, audio_latents, prompts, has_frame, has_audio = draw_batch(
            cache, rng, arguments.batch_size, run.device
        )
        embeds, mask = texts.embed(prompts)
        # Whole batches, as the negative prompt is long and would stretch every batch that it is in.
        if rng.random() < arguments.text_dropout:
            embeds, mask = texts.negative.expand(arguments.batch_size, -1, -1), None
        noise_levels = sample_noise_levels(arguments.batch_size, "uniform", arguments.shift, device=run.device)
        # Of pure noise the prompt alone says what it becomes, which is what sampling begins with.
        noise_levels[: round(arguments.pure_noise * arguments.batch_size)] = 1.0
        # What moves counts for more: walls and shirts are easily learned, lips are not.
        motion = latents.diff(dim=2, append=latents[:, :, -1:]).square().mean(dim=1, keepdim=True)
        weights = 1 + arguments.motion_weight * motion / motion.mean(dim=(2, 3, 4), keepdim=True)
        with run.accelerator.autocast():
            loss = flow_matching_loss(
                run.models["transformer"],
                latents,
                audio_latents,
                embeds,
                mask,
                noise_levels,
                audio_weight=arguments.audio_weight,
                image_probability=has_frame.float(),
                audio_probability=has_audio.float(),
                latent_weights=weights,
            )
        run.update("transformer", loss.loss, video=loss.video_loss, audio=loss.audio_loss)
        if (run.step + 1) % arguments.save_every == 0:
            samples = draw_samples(run.unwrap("transformer"), projection, texts, cache, scheduler)
            save_sheet(samples, run.output / "samples.png")
            run.models["transformer"].train()

    # 3. Save
    run.unwrap("transformer").save_pretrained(arguments.output / "transformer")


if __name__ == "__main__":
    main()
