# SPDX-License-Identifier: Apache-2.0
"""Trains the base transformer by flow matching, on video, sound and text together, in many sizes and lengths.

    python examples/nano/train_transformer.py --data cache/*/* --text runs/text_encoder --turbo-vae runs/turbo_vae \\
        --output runs/base

Some samples are shown their first frame, some their sound, and some batches the negative prompt in place of their
text: so the model learns to follow an image or a voice, and to be guided.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cache_latents import Cache, choose_cache, load_cache, read_clips
from clips import make_scene
from means import Looks, Means
from prompts import Scene, leave_out, make_prompt
from recipe import Run, make_parser, save_sheet, to_frames
from recognise import LOOKS
from train_text_encoder import HIDDEN_SIZE, TEXT_TOKENS, Texts
from words import FRAME_RATE

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo, MagiHumanFlowScheduler, MagiHumanTransformer3DModel
from diffusers_magihuman.training import flow_matching_loss, sample_noise_levels

USUAL_TOKENS = 13 * 8 * 8 + 49 + TEXT_TOKENS  # of a clip of 128 x 128 pixels and 49 frames


def make_transformer(cache: Cache) -> MagiHumanTransformer3DModel:
    """
    A tiny model whose tokens are single positions.

    A velocity has all the noise of its token in it, and that of 2 x 2 positions, 192 values, does not pass through the
    144 channels of such a model: walls have blotches, and mouths stay as they are.
    """
    return MagiHumanTransformer3DModel(
        patch_size=(1, 1, 1),
        in_channels=cache.latents.shape[1],
        audio_in_channels=cache.audio_latents.shape[2],
        text_in_channels=HIDDEN_SIZE,
        num_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_head_dim=72,
        modality_layers=(),
        gelu_layers=(0,),
        feed_forward_multiple=1,
    )


class Batch(NamedTuple):
    """Latents of video and sound, where eyes and mouths are, what clips show, what prompts say of it and the prompts,
    whose first frame and sound are given, bool `(batch_size,)`, and whether latents are means, for pure noise."""

    latents: torch.Tensor
    audio_latents: torch.Tensor
    eyes: torch.Tensor
    mouths: torch.Tensor
    scenes: list[Scene]
    said: list[Scene]
    prompts: list[str]
    has_frame: torch.Tensor
    has_audio: torch.Tensor
    is_pure: bool


def choose_said(rng: np.random.Generator, scene: Scene, has_frame: bool, has_audio: bool, seconds: float) -> Scene:
    """
    What a prompt says of a scene, which may leave things out.

    Where a first frame is given, half of the prompts say something else of what is seen. Where a sound is given, half
    have no line and a quarter another line. So the model learns to follow what it sees and hears, whatever it reads.
    """
    other = make_scene(rng, seconds)
    seen = other if has_frame and rng.random() < 0.5 else scene
    silent = replace(scene, words=())
    heard = (silent, silent, other, scene)[rng.integers(4)] if has_audio else scene
    return leave_out(rng, replace(seen, voice=heard.voice, words=heard.words))


def draw_batch(
    caches: list[Cache],
    rng: np.random.Generator,
    batch_size: int,
    device: torch.device,
    means: Means | None = None,
    pure_noise: float = 0.0,
) -> Batch:
    """
    Draws clips of one shape, as many as have about as many tokens as `batch_size` usual ones, and new prompts.

    If `means` knows the shape, a part of the batches, `pure_noise`, has means in place of clips, and nothing is given.
    """
    cache = caches[choose_cache(caches, rng)]
    count = max(1, round(batch_size * USUAL_TOKENS / cache.num_tokens))
    clips = rng.integers(len(cache.scenes), size=count)
    scenes = [cache.scenes[clip] for clip in clips]
    shape = cache.latents.shape[2:]
    is_pure = means is not None and means.knows(shape) and rng.random() < pure_noise
    has_frame = rng.random(count) < (0 if is_pure else 0.25)
    # It takes a given sound to learn what mouths have to do with it; first frames do not tell.
    has_audio = rng.random(count) < (0 if is_pure else 0.5)
    seconds = cache.audio_latents.shape[1] / FRAME_RATE
    said = [choose_said(rng, *each, seconds) for each in zip(scenes, has_frame, has_audio, strict=True)]
    prompts = [make_prompt(rng, scene) for scene in said]
    latents, *others = read_clips(cache, clips, device)
    if is_pure:
        latents = means.find(said, shape).to(device)
    given = (torch.from_numpy(has).to(device) for has in (has_frame, has_audio))
    return Batch(latents, *others, scenes, said, prompts, *given, is_pure)


def watch_looks(
    transformer: torch.nn.Module, batch: Batch, noise_levels: torch.Tensor, means: Means, rng: np.random.Generator
) -> Looks:
    """
    Weakens the looks of half of the clips that are noisy enough, each by as much as chance has it.

    Sampling begins with looks that are weaker than they should be, and what sees nothing but clips takes a faint beard
    for none, whatever the prompt says, so that each step would leave less of it.
    """
    added = means.find_added(batch.said, batch.latents.shape[2:], rng).to(batch.latents.device)
    # What is given is as it is, and where a prompt says something else, it says nothing of the clip.
    added[:, :, :, 0] *= ~batch.has_frame[:, None, None, None, None]
    agrees = [
        [getattr(scene, name) == getattr(said, name) for name in LOOKS]
        for scene, said in zip(batch.scenes, batch.said, strict=True)
    ]
    added *= torch.tensor(agrees, device=added.device)[:, :, None, None, None, None]
    is_weak = (torch.rand_like(noise_levels) < 0.5) & (noise_levels > 0.4) & (noise_levels < 1)
    weakness = torch.rand(added.shape[:2], device=added.device) * is_weak[:, None]
    return Looks(transformer, batch.latents, added, weakness, noise_levels)


@torch.no_grad()
def draw_samples(
    transformer: MagiHumanTransformer3DModel,
    vae: AutoencoderKLMagiHumanTurbo,
    texts: Texts,
    cache: Cache,
    scheduler: MagiHumanFlowScheduler,
) -> list[np.ndarray]:
    """Draws four held-out prompts without guidance, in the shape of the cache: every eighth frame of each."""
    rng = np.random.default_rng(0)
    prompts = [make_prompt(rng, make_scene(rng, 2, held_out=True), held_out=True) for _ in range(4)]
    embeds, mask = texts.embed(prompts)
    states = [torch.randn(4, *values.shape[1:], device=embeds.device) for values in cache[:2]]
    schedulers = [copy.deepcopy(scheduler), copy.deepcopy(scheduler)]
    for timestep in scheduler.timesteps:
        velocities = transformer(*states, embeds, encoder_attention_mask=mask, return_dict=False)
        steps = zip(schedulers, velocities, states, strict=True)
        states = [one.step(velocity, timestep, state)[0] for one, velocity, state in steps]
    return [frames[::8] for frames in to_frames(vae.decoder(states[0], is_first_chunk=True))]


def main() -> None:
    parser = make_parser(__doc__, steps=40000, batch_size=8, learning_rate=2e-3)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="outputs of cache_latents.py")
    parser.add_argument("--text", type=Path, required=True, help="output of train_text_encoder.py")
    parser.add_argument("--turbo-vae", type=Path, required=True, help="output of train_turbo_vae.py, to draw samples")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose weights go on to be trained")
    parser.add_argument("--shift", type=float, default=3.0, help="of the noise levels, default: %(default)s")
    parser.add_argument("--audio-weight", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--motion-weight", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--eye-weight", type=float, default=6.0, help="default: %(default)s")
    parser.add_argument("--mouth-weight", type=float, default=16.0, help="default: %(default)s")
    parser.add_argument("--text-dropout", type=float, default=0.05, help="part of the batches, default: %(default)s")
    parser.add_argument("--pure-noise", type=float, default=0.4, help="part of the batches, default: %(default)s")
    parser.add_argument("--mean-weight", type=float, default=8.0, help="in pure noise, default: %(default)s")
    parser.add_argument("--look-weight", type=float, default=2.0, help="in pure noise, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Data and model
    caches = [load_cache(folder) for folder in arguments.data]
    means = Means(caches)
    torch.manual_seed(arguments.seed)
    transformer = make_transformer(caches[0])
    if arguments.start_from is not None:
        transformer = MagiHumanTransformer3DModel.from_pretrained(arguments.start_from / "transformer")
    run = Run(arguments, {"transformer": transformer})
    texts = Texts(arguments.text, run.device)
    vae = AutoencoderKLMagiHumanTurbo.from_pretrained(arguments.turbo_vae / "vae").to(run.device)
    scheduler = MagiHumanFlowScheduler()
    scheduler.set_timesteps(16)

    # 2. Train
    for rng in run.steps():
        batch = draw_batch(caches, rng, arguments.batch_size, run.device, means, arguments.pure_noise)
        count, latents = len(batch.prompts), batch.latents
        # Whole batches, as the negative prompt is long and would stretch every batch that it is in.
        is_dropped = not batch.is_pure and rng.random() < arguments.text_dropout
        embeds, mask = texts.embed_negative(count) if is_dropped else texts.embed(batch.prompts)
        if batch.is_pure:
            # The prompt alone says what it becomes: the mean of all that fits. It has little noise of its own, so it
            # may count for much.
            noise_levels, weights = torch.ones(count, device=run.device), None
            video_weight, look_weight = arguments.mean_weight, arguments.look_weight
        else:
            noise_levels = sample_noise_levels(count, "uniform", arguments.shift, device=run.device)
            noise_levels[: round(0.1 * count)] = 1.0
            # What moves counts for more, eyes do, and mouths most: walls and shirts are easily learned, but what a
            # voice says of a mouth is a hundredth of all that a video holds, and whether an iris keeps its colour
            # hardly more.
            motion = latents.diff(dim=2, append=latents[:, :, -1:]).square().mean(dim=1, keepdim=True)
            weights = 1 + arguments.motion_weight * motion / motion.mean(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)
            weights *= 1 + (arguments.eye_weight * batch.eyes + arguments.mouth_weight * batch.mouths)[:, None]
            # Poses make clips stray from their means, also along what looks add.
            video_weight, look_weight = 1.0, arguments.look_weight / 8
        transformer = run.models["transformer"]
        if not is_dropped and means.knows(latents.shape[2:]):
            transformer = watch_looks(transformer, batch, noise_levels, means, rng)
        loss = flow_matching_loss(
            transformer,
            latents,
            batch.audio_latents,
            embeds,
            mask,
            noise_levels,
            video_weight,
            arguments.audio_weight,
            image_probability=batch.has_frame.float(),
            audio_probability=batch.has_audio.float(),
            latent_weights=weights,
        )
        looks = transformer.loss if isinstance(transformer, Looks) else torch.zeros((), device=run.device)
        shown = {"video": loss.video_loss, "audio": loss.audio_loss, "looks": looks}
        run.update("transformer", loss.loss + look_weight * looks, **shown)
        if (run.step + 1) % arguments.save_every == 0:
            samples = draw_samples(run.unwrap("transformer"), vae, texts, caches[0], scheduler)
            save_sheet(samples, run.output / "samples.png")
            run.models["transformer"].train()

    # 3. Save
    run.unwrap("transformer").save_pretrained(arguments.output / "transformer")


if __name__ == "__main__":
    main()
