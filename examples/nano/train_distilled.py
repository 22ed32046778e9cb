# SPDX-License-Identifier: Apache-2.0
"""Distils the base transformer to 8 steps without guidance, by distribution matching (DMD2, arXiv 2405.14867).

    python examples/nano/train_distilled.py --data cache/*/* --base runs/base --text runs/text_encoder \\
        --turbo-vae runs/turbo_vae --output runs/distilled

The student generates in steps of the distilled scheduler and learns in one of them, drawn for each batch. Noise is
added to what it made; the base, with guidance, and a third transformer, the critic, say where it came from. The critic
is trained on what the student made, several times with other noise, as making it takes longest. Looks are compared
with the mean of all clips that fit a prompt (`means.py`), too, as some are lost else. No other clip of the caches is
looked at, but for first frames and sounds that are given. What is saved is a mean of the student's weights.

The losses of single batches say little. So the same prompts are generated from the same noise before the first step
and with each saved state: `judged_by_teacher` and `judged_by_critic` are losses of flow matching on the result, which
meet when the student draws what the base does; the mean squares of its latents are 1 in clips, and less in blurs.
"""

from pathlib import Path

import numpy as np
import torch
from cache_latents import load_cache
from means import Means, look_loss
from recipe import Run, make_parser, save_sheet
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_text_encoder import Texts
from train_transformer import draw_batch, draw_samples

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo, MagiHumanFlowScheduler, MagiHumanTransformer3DModel
from diffusers_magihuman.training import (
    add_noise,
    distribution_matching_loss,
    flow_matching_loss,
    predict_clean,
    sample_noise_levels,
)

States = tuple[torch.Tensor, torch.Tensor]  # of video and sound
NUM_STEPS = 8


class Student(torch.nn.Module):
    """A transformer that is trained, and the exponential mean of its weights, which is saved with them."""

    def __init__(self, transformer: MagiHumanTransformer3DModel, decay: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.average = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)

    def forward(self, *inputs: torch.Tensor, **options: torch.Tensor | bool | None) -> States:
        return self.transformer(*inputs, **options)


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
    parser = make_parser(__doc__, steps=300, batch_size=8, learning_rate=1e-4)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="outputs of cache_latents.py")
    parser.add_argument("--base", type=Path, required=True, help="output of train_transformer.py")
    parser.add_argument("--text", type=Path, required=True, help="output of train_text_encoder.py")
    parser.add_argument("--turbo-vae", type=Path, required=True, help="output of train_turbo_vae.py, to draw samples")
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose student goes on")
    parser.add_argument("--critic-steps", type=int, default=3, help="for each of the student's, default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="of the base, default: %(default)s")
    parser.add_argument("--look-weight", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--average", type=float, default=0.85, help="decay of the mean, 0 for none, default: 0.85")
    arguments = parser.parse_args()

    # 1. Three copies of the base, and the noise levels of the student
    caches = [load_cache(folder) for folder in arguments.data]
    torch.manual_seed(arguments.seed)
    teacher, student, critic = (
        MagiHumanTransformer3DModel.from_pretrained(folder / "transformer")
        for folder in (arguments.base, arguments.start_from or arguments.base, arguments.base)
    )
    models = {"student": Student(student, arguments.average), "critic": critic}
    run = Run(arguments, models, betas=(0.0, 0.95))
    student, critic = run.models["student"], run.models["critic"]
    average = run.unwrap("student").average
    teacher = teacher.to(run.device).eval().requires_grad_(False)
    texts = Texts(arguments.text, run.device)
    vae = AutoencoderKLMagiHumanTurbo.from_pretrained(arguments.turbo_vae / "vae").to(run.device)
    scheduler = MagiHumanFlowScheduler(sampler="renoise")
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = scheduler.sigmas[:NUM_STEPS].tolist()
    fixed = draw_batch(caches[:1], np.random.default_rng(0), arguments.batch_size, run.device)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        torch.manual_seed(0)
        text, nothing = texts.embed(fixed.prompts), (torch.zeros(1, dtype=torch.bool, device=run.device),) * 2
        with run.accelerator.autocast():
            generated = generate(average.module, text, fixed[:2], nothing, sigmas)
            losses = {}
            for name, model in (("teacher", teacher), ("critic", critic)):
                torch.manual_seed(1)
                levels = sample_noise_levels(len(fixed.prompts), "uniform", 3.0, device=run.device)
                losses[f"judged_by_{name}"] = float(flow_matching_loss(model, *generated, *text, levels).loss)
        squares = (float(states.square().mean()) for states in generated)
        return losses | dict(zip(("video_square", "audio_square"), squares, strict=True))

    if run.step == 0:
        run.measured |= measure()

    # 2. Train
    means = Means(caches)
    for rng in run.steps():
        batch = draw_batch(caches, rng, arguments.batch_size, run.device)
        count, given, text = len(batch.prompts), batch[:2], texts.embed(batch.prompts)
        held_frame = torch.zeros_like(batch.latents[:, :1, :, :1, :1], dtype=torch.bool)
        held_frame[:, 0, 0, 0, 0] = batch.has_frame
        held = (held_frame, batch.has_audio[:, None, None])
        generated = generate(student, text, given, held, sigmas[: rng.integers(NUM_STEPS) + 1])

        levels = sample_noise_levels(count, "uniform", 3.0, device=run.device)
        with run.accelerator.autocast(), torch.no_grad():
            noisy = tuple(add_noise(state, torch.randn_like(state), levels) for state in generated)
            noisy = hold(noisy, given, held)
            negative = texts.embed_negative(count)
            predictions = []
            for model, embeds, mask in ((teacher, *text), (teacher, *negative), (critic, *text)):
                velocities = model(*noisy, embeds, encoder_attention_mask=mask, return_dict=False)
                clean = tuple(predict_clean(x, v, levels) for x, v in zip(noisy, velocities, strict=True))
                predictions.append(hold(clean, given, held))
        losses = [
            distribution_matching_loss(state, uncond + arguments.guidance_scale * (cond - uncond), fake)
            for state, cond, uncond, fake in zip(generated, *predictions, strict=True)
        ]
        looks = torch.zeros((), device=run.device)
        if means.knows(shape := batch.latents.shape[2:]):
            mean, added = means.find(batch.said, shape), means.find_added(batch.said, shape, rng)
            added *= ~batch.has_frame.cpu()[:, None, None, None, None, None]
            looks = look_loss(generated[0], mean.to(run.device), added.to(run.device))
        total = losses[0] + losses[1] + arguments.look_weight * looks
        run.update("student", total, video=losses[0], audio=losses[1], looks=looks)
        average.update_parameters(run.unwrap("student").train().transformer)

        # The critic comes second, so that what it judges is nothing it has learned.
        for _ in range(arguments.critic_steps):
            loss = flow_matching_loss(
                critic,
                *(state.detach() for state in generated),
                *text,
                sample_noise_levels(count, "uniform", 3.0, device=run.device),
                image_probability=batch.has_frame.float(),
                audio_probability=batch.has_audio.float(),
            )
            run.update("critic", loss.loss)
        run.measure(measure)
        if (run.step + 1) % arguments.save_every == 0:
            save_sheet(draw_samples(average.module, vae, texts, caches[0], scheduler), run.output / "samples.png")

    # 3. Save
    average.module.save_pretrained(arguments.output / "transformer")


if __name__ == "__main__":
    main()
