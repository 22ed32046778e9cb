# SPDX-License-Identifier: Apache-2.0
"""Distils the base transformer to 8 steps without guidance, by distribution matching (DMD2, arXiv 2405.14867).

    python examples/nano/train_distilled.py --data cache/128 --base runs/base --text runs/text_encoder \\
        --video-vae runs/video_vae --output runs/distilled

The student generates in steps of the distilled scheduler and learns in one of them, drawn for each batch. Noise is
added to what it made; the base, with guidance, and a third transformer, the critic, say where it came from. The critic
is trained on what the student makes, several times for each of the student's steps. No clip of the dataset is looked
at, but for first frames and sounds that are given.
"""

from pathlib import Path

import torch
from cache_latents import load_cache
from recipe import Run, make_parser, save_sheet
from train_text_encoder import Texts
from train_transformer import draw_batch, draw_samples
from train_video_vae import Projection

from diffusers_magihuman import MagiHumanFlowScheduler, MagiHumanTransformer3DModel
from diffusers_magihuman.training import (
    add_noise,
    distribution_matching_loss,
    flow_matching_loss,
    predict_clean,
    sample_noise_levels,
)

States = tuple[torch.Tensor, torch.Tensor]  # of video and sound
NUM_STEPS = 8


def hold(states: States, given: States, held: States) -> States:
    """Puts what is given in its place: first frames and sounds, where `held` is true."""
    return tuple(torch.where(mask, known, state) for state, known, mask in zip(states, given, held, strict=True))


def generate(
    student: torch.nn.Module,
    text: tuple[torch.Tensor, torch.Tensor],
    given: States,
    held: States,
    sigmas: list[float],
) -> States:
    """Runs the student down the noise levels; the clean latents of the last, the only one with a gradient."""
    clean = given
    for number, sigma in enumerate(sigmas):
        noisy = tuple((1 - sigma) * state + sigma * torch.randn_like(state) for state in clean)
        if number == 0:
            noisy = tuple(torch.randn_like(state) for state in clean)
        with torch.set_grad_enabled(torch.is_grad_enabled() and number == len(sigmas) - 1):
            noisy = hold(noisy, given, held)
            velocities = student(*noisy, text[0], encoder_attention_mask=text[1], return_dict=False)
            clean = tuple(x - sigma * velocity for x, velocity in zip(noisy, velocities, strict=True))
            clean = hold(clean, given, held)
    return clean


def main() -> None:
    parser = make_parser(__doc__, steps=60, batch_size=16, learning_rate=5e-5)
    parser.add_argument("--data", type=Path, required=True, help="output of cache_latents.py")
    parser.add_argument("--base", type=Path, required=True, help="output of train_transformer.py")
    parser.add_argument("--text", type=Path, required=True, help="output of train_text_encoder.py")
    parser.add_argument("--video-vae", type=Path, required=True, help="output of train_video_vae.py")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose student goes on")
    parser.add_argument("--critic-steps", type=int, default=3, help="for each of the student's, default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=1.2, help="of the base, default: %(default)s")
    arguments = parser.parse_args()

    # 1. Three copies of the base, and the noise levels of the student
    cache = load_cache(arguments.data)
    torch.manual_seed(arguments.seed)
    teacher, student, critic = (
        MagiHumanTransformer3DModel.from_pretrained(folder / "transformer")
        for folder in (arguments.base, arguments.start_from or arguments.base, arguments.base)
    )
    run = Run(arguments, {"student": student, "critic": critic}, betas=(0.0, 0.95))
    teacher = teacher.to(run.device).eval().requires_grad_(False)
    texts = Texts(arguments.text, run.device)
    projection = Projection.load(arguments.video_vae / "projection.safetensors").to(run.device)
    scheduler = MagiHumanFlowScheduler(sampler="renoise")
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = scheduler.sigmas[:NUM_STEPS].tolist()
    student, critic = run.models["student"], run.models["critic"]

    # 2. Train
    for rng in run.steps():
        for number in range(arguments.critic_steps + 1):
            batch = draw_batch(cache, rng, arguments.batch_size, run.device)
            given, text = batch[:2], texts.embed(batch.prompts)
            held_frame = torch.zeros_like(batch.latents[:, :1, :, :1, :1], dtype=torch.bool)
            held_frame[:, 0, 0, 0, 0] = batch.has_frame
            held = (held_frame, batch.has_audio[:, None, None])
            learns = number == arguments.critic_steps
            levels = sample_noise_levels(arguments.batch_size, "uniform", 3.0, device=run.device)
            with run.accelerator.autocast(), torch.set_grad_enabled(learns):
                generated = generate(student, text, given, held, sigmas[: rng.integers(NUM_STEPS) + 1])

            if not learns:
                with run.accelerator.autocast():
                    loss = flow_matching_loss(
                        critic,
                        *generated,
                        *text,
                        levels,
                        image_probability=batch.has_frame.float(),
                        audio_probability=batch.has_audio.float(),
                    )
                run.update("critic", loss.loss)
                continue

            with run.accelerator.autocast(), torch.no_grad():
                noisy = tuple(add_noise(state, torch.randn_like(state), levels) for state in generated)
                noisy = hold(noisy, given, held)
                negative = texts.negative.expand(arguments.batch_size, -1, -1)
                predictions = []
                for model, embeds, mask in ((teacher, *text), (teacher, negative, None), (critic, *text)):
                    velocities = model(*noisy, embeds, encoder_attention_mask=mask, return_dict=False)
                    clean = tuple(predict_clean(x, v, levels) for x, v in zip(noisy, velocities, strict=True))
                    predictions.append(hold(clean, given, held))
            losses = [
                distribution_matching_loss(state, uncond + arguments.guidance_scale * (cond - uncond), fake)
                for state, cond, uncond, fake in zip(generated, *predictions, strict=True)
            ]
            run.update("student", losses[0] + losses[1], video=losses[0], audio=losses[1])
        if (run.step + 1) % arguments.save_every == 0:
            save_sheet(
                draw_samples(run.unwrap("student"), projection, texts, cache, scheduler), run.output / "samples.png"
            )
            student.train()

    # 3. Save
    run.unwrap("student").save_pretrained(arguments.output / "transformer")


if __name__ == "__main__":
    main()
