# SPDX-License-Identifier: Apache-2.0
"""Losses for training the transformer: flow matching of video and audio, super-resolution, distribution matching.

Pure functions of normalised latents, as the pipelines give them with `output_type="latent"`; loops are in `examples/`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from .checks import check_choice, check_integer, check_mask, check_real, check_same_shapes, check_tensor
from .transformer_magihuman import MagiHumanTransformer3DModel


class FlowMatchingLoss(NamedTuple):
    """The weighted sum of two losses, to go backward from, and both, the mean squared errors of velocity, detached."""

    loss: Tensor
    video_loss: Tensor
    audio_loss: Tensor


def sample_noise_levels(
    batch_size: int,
    weighting: str = "logit_normal",
    shift: float = 5.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws the noise level of each sample of a batch: `(batch_size,)` in (0, 1), 1 for pure noise.

    `weighting` is `"logit_normal"`, the logistic function of a normal variable
    ([arXiv 2403.03206](https://huggingface.co/papers/2403.03206)), or `"uniform"`; `shift` is towards noise, as the
    scheduler's `flow_shift`, 0.001 to 1000, 1 for none. A `generator`, on this `device`, makes the draw deterministic.
    """
    check_integer("batch_size", batch_size, 1, 2**20)
    check_choice("weighting", weighting, "logit_normal", "uniform")
    check_real("shift", shift, 1e-3, 1e3)
    options = {"logit_mean": 0.0, "logit_std": 1.0, "device": device, "generator": generator}
    levels = compute_density_for_timestep_sampling(weighting, batch_size, **options)
    return shift * levels / (1 + (shift - 1) * levels)


def check_batch(latents: Tensor, audio: Tensor, embeds: Tensor, mask: Tensor | None, noise_levels: Tensor) -> None:
    """What the losses train on: finite, and of one batch size."""
    check_tensor("latents", latents, [None] * 5)
    check_tensor("audio_latents", audio, (len(latents), None, None))
    check_tensor("prompt_embeds", embeds, (len(latents), None, None))
    if mask is not None:
        check_mask("prompt_embeds_mask", mask, embeds.shape[:2])
    check_tensor("noise_levels", noise_levels, [len(latents)], low=0, high=1)


def expand_as(values: Tensor, states: Tensor) -> Tensor:
    """Views one value for each sample, `(batch_size,)`, so that it multiplies states of any number of dimensions."""
    return values.view(-1, *[1] * (states.ndim - 1))


def mix(latents: Tensor, noise: Tensor, noise_levels: Tensor) -> Tensor:
    """[`add_noise`] of what is checked already; checks wait for the device."""
    levels = expand_as(noise_levels, latents)
    return (1 - levels) * latents + levels * noise


def add_noise(latents: Tensor, noise: Tensor, noise_levels: Tensor) -> Tensor:
    """Mixes latents with noise on a straight line, `(1 - level) * latents + level * noise`; levels `(batch_size,)`
    in [0, 1]."""
    check_same_shapes(has_data=False, latents=latents, noise=noise)
    check_tensor("noise_levels", noise_levels, [len(latents)], low=0, high=1)
    return mix(latents, noise, noise_levels)


def predict_clean(noisy: Tensor, velocity: Tensor, noise_levels: Tensor) -> Tensor:
    """Follows the velocity from noisy latents to clean ones, `noisy - level * velocity`."""
    check_same_shapes(has_data=False, noisy=noisy, velocity=velocity)
    check_tensor("noise_levels", noise_levels, [len(noisy)], low=0, high=1)
    return noisy - expand_as(noise_levels, noisy) * velocity


def drop_text(
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor,
    negative_prompt_embeds: Tensor,
    probability: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces the text of some samples, each with the `probability`, by the negative prompt, which classifier-free
    guidance needs. Takes embeddings `(batch_size, length, channels)`, padded at the end, their mask, true for real
    tokens, and negative ones `(1, negative_length, channels)`, unpadded. Returns embeddings and mask, padded to the
    longer of the two lengths; a `generator` makes the draw deterministic."""
    check_tensor("prompt_embeds", prompt_embeds, (None, None, None))
    check_mask("prompt_embeds_mask", prompt_embeds_mask, prompt_embeds.shape[:2])
    check_tensor("negative_prompt_embeds", negative_prompt_embeds, (1, None, prompt_embeds.shape[2]))
    check_real("probability", probability, 0.0, 1.0)
    negative_length, (batch_size, length, _) = negative_prompt_embeds.shape[1], prompt_embeds.shape
    missing = max(negative_length - length, 0)
    prompt_embeds, mask = F.pad(prompt_embeds, (0, 0, 0, missing)), F.pad(prompt_embeds_mask, (0, missing))
    negative = F.pad(negative_prompt_embeds, (0, 0, 0, max(length - negative_length, 0)))
    negative_mask = torch.arange(negative.shape[1], device=mask.device) < negative_length
    dropped = torch.rand(batch_size, 1, generator=generator, device=prompt_embeds.device) < probability
    return torch.where(dropped[..., None], negative, prompt_embeds), torch.where(dropped, negative_mask, mask)


def flow_matching_loss(
    transformer: MagiHumanTransformer3DModel,
    latents: Tensor,
    audio_latents: Tensor,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor | None,
    noise_levels: Tensor,
    video_weight: float = 1.0,
    audio_weight: float = 1.0,
    image_probability: float | Tensor = 0.0,
    audio_probability: float | Tensor = 0.0,
    latent_weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> FlowMatchingLoss:
    """Loss of the velocity from latents to noise, of video and audio at the same noise level
    ([arXiv 2210.02747](https://huggingface.co/papers/2210.02747)). A first frame or audio that is given is shown as it
    is and left out of the loss, since the pipelines keep it.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, channels, latent_frames, latent_height, latent_width)`): Video.
        audio_latents (`torch.Tensor` of shape `(batch_size, audio_length, audio_channels)`): Audio.
        prompt_embeds, prompt_embeds_mask (`torch.Tensor`): Embeddings of the prompts `(batch_size, length, channels)`
            and, if not all tokens are real, their mask `(batch_size, length)`, true for real ones.
        noise_levels (`torch.Tensor` of shape `(batch_size,)`): See [`sample_noise_levels`].
        video_weight, audio_weight (`float`, defaults to 1.0): Weights of the two losses.
        image_probability, audio_probability (`float` or `torch.Tensor` of shape `(batch_size,)`, defaults to 0.0):
            How often the first frame or the audio is given, for all samples or for each.
        latent_weights (`torch.Tensor`, *optional*): How much each position of the video counts, relative to the
            others, such as lips to the rest of a picture; 0 or more, and it broadcasts to the latents.
        generator (`torch.Generator`, *optional*): Draws the noise and what is given; on the device of the latents.

    `ValueError`: a number is negative or, of a probability or level, above 1; a tensor is not finite or does not fit.
    """
    check_batch(latents, audio_latents, prompt_embeds, prompt_embeds_mask, noise_levels)
    check_real("video_weight", video_weight, 0.0)
    check_real("audio_weight", audio_weight, 0.0)
    for name, probability in (("image_probability", image_probability), ("audio_probability", audio_probability)):
        if isinstance(probability, Tensor):
            check_tensor(name, probability, [len(latents)], low=0, high=1)
        else:
            check_real(name, probability, 0.0, 1.0)
    if latent_weights is not None:
        sizes = zip(reversed(getattr(latent_weights, "shape", ())), reversed(latents.shape), strict=False)
        allowed = [1 if size == 1 else full for size, full in sizes][::-1]
        check_tensor("latent_weights", latent_weights, allowed, low=0, mask=True)
    draw = {"generator": generator, "device": latents.device}
    noise, audio_noise = (torch.randn(states.shape, **draw) for states in (latents, audio_latents))
    learns_frame = torch.ones_like(latents[:, :1, :, :1, :1], dtype=torch.bool)
    learns_frame[:, 0, 0] = (torch.rand(len(latents), **draw) >= image_probability)[:, None, None]
    learns_audio = (torch.rand(len(latents), **draw) >= audio_probability)[:, None, None]
    noisy = torch.where(learns_frame, mix(latents, noise, noise_levels), latents)
    noisy_audio = torch.where(learns_audio, mix(audio_latents, audio_noise, noise_levels), audio_latents)
    velocity, audio_velocity = transformer(noisy, noisy_audio, prompt_embeds, prompt_embeds_mask, return_dict=False)
    weights = learns_frame if latent_weights is None else learns_frame * latent_weights
    video_loss = masked_mean((velocity - (noise - latents)).square(), weights)
    audio_loss = masked_mean((audio_velocity - (audio_noise - audio_latents)).square(), learns_audio)
    loss = video_weight * video_loss + audio_weight * audio_loss
    return FlowMatchingLoss(loss, video_loss.detach(), audio_loss.detach())


def masked_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the values; weights broadcast to them, a mask is one of 0 and 1; 0 where all weights are."""
    weights = weights.expand_as(values).to(values.dtype)
    total = weights.sum()
    return (values * weights).sum() / torch.where(total > 0, total, 1)


def upscale_loss(
    transformer: MagiHumanTransformer3DModel,
    latents: Tensor,
    low_latents: Tensor,
    audio_latents: Tensor,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor | None,
    noise_levels: Tensor,
) -> Tensor:
    """Loss of the velocity from latents in high resolution to what the upscale pipeline starts from in place of noise:
    `low_latents`, resized and noisy, of the shape of `latents`, with noisy `audio_latents`, both as
    [`~MagiHumanLatentUpscalePipeline.prepare_latents`] gives them. All else is that of [`flow_matching_loss`]."""
    check_batch(latents, audio_latents, prompt_embeds, prompt_embeds_mask, noise_levels)
    check_tensor("low_latents", low_latents, latents.shape)
    noisy = mix(latents, low_latents, noise_levels)
    velocity, _ = transformer(noisy, audio_latents, prompt_embeds, prompt_embeds_mask, return_dict=False)
    return F.mse_loss(velocity, low_latents - latents)


def distribution_matching_loss(generated: Tensor, real_prediction: Tensor, fake_prediction: Tensor) -> Tensor:
    """Loss whose gradient moves generated latents from where a model of them is to where the teacher is
    (DMD2, [arXiv 2405.14867](https://huggingface.co/papers/2405.14867)). Its value means little; its gradient is the
    difference of the two, divided by the sample's mean distance from the teacher's and by the number of values.

    `generated` are clean latents of the student `(batch_size, ...)`, with gradient; `real_prediction` those that the
    teacher, with guidance, predicts from them with noise added, see [`predict_clean`]; `fake_prediction` those that a
    model of the student's output predicts, trained beside it with [`flow_matching_loss`] on what it generates.
    """
    check_same_shapes(generated=generated, real_prediction=real_prediction, fake_prediction=fake_prediction)
    with torch.no_grad():
        distance = (generated - real_prediction).abs().reshape(len(generated), -1).mean(dim=1).clamp(min=1e-6)
        gradient = (fake_prediction - real_prediction) / expand_as(distance, generated)
    return 0.5 * F.mse_loss(generated, (generated - gradient).detach())
