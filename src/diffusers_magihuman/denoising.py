# SPDX-License-Identifier: Apache-2.0
"""A step of denoising, which the loop of the pipelines and that of the blocks are made of."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_real, check_tensor, show


def prepare_schedulers(scheduler: Any, num_inference_steps: int, device: torch.device) -> tuple[Any, Any]:
    """Those of the video and of the audio, whose solvers keep a state each; the given one is not changed."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler, copy.deepcopy(scheduler)


def predict_velocities(
    transformer: nn.Module,
    context: str,
    embeds: Tensor,
    mask: Tensor | None,
    scheduler: Any,
    step: int,
    latents: Tensor,
    audio_latents: Tensor,
    attention_kwargs: dict[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """The velocities of video and audio at a step, with one text; `context` is what caches know its branch by."""
    options = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "attention_kwargs": attention_kwargs}
    sigma, num_steps = float(scheduler.sigmas[step]), len(scheduler.timesteps)
    with transformer.cache_context(context, num_inference_steps=num_steps, step_index=step, sigma=sigma):
        return transformer(latents, audio_latents, **options, return_dict=False)


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    return uncond + scale * (cond - uncond)


def take_step(scheduler: Any, velocity: Tensor, timestep: Tensor, latents: Tensor, generator: Any) -> Tensor:
    """The latents at the next noise level, with noise by the generator where the scheduler adds any."""
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    return scheduler.step(velocity, timestep, latents, **options, return_dict=False)[0]


def keep_first_frame(latents: Tensor, image_latents: Tensor | None) -> Tensor:
    return latents if image_latents is None else torch.cat([image_latents, latents[:, :, 1:]], dim=2)


def scale_at(timestep: Tensor | float, middle: float, scale: float, low_scale: float | None) -> float:
    """The guidance of the video: another one in the lower half of the timesteps, by default 2.0 at most."""
    if timestep > middle:
        return scale
    return min(2.0, scale) if low_scale is None else low_scale


def leading_scales(latents: Tensor, scale: float, leading_scale: float, num_leading_frames: int) -> Tensor:
    """The guidance of each latent frame, at most `leading_scale` for the first ones."""
    scales = latents.new_full((1, 1, latents.shape[2], 1, 1), scale)
    scales[:, :, :num_leading_frames].clamp_(max=leading_scale)
    return scales


def check_step_end(inputs: dict[str, Any], names: Sequence[str]) -> None:
    """What steps are given: a callback, the names of its tensors, among `names`, and the scale of a LoRA."""
    callback, step_inputs = inputs["callback_on_step_end"], inputs["callback_on_step_end_tensor_inputs"]
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end`={show(callback)} must be callable.")
    if not isinstance(step_inputs, list | tuple) or not all(isinstance(x, str) and x in names for x in step_inputs):
        raise ValueError(f"`callback_on_step_end_tensor_inputs`={show(step_inputs)} must be a list out of {names}.")
    options = {} if inputs["attention_kwargs"] is None else inputs["attention_kwargs"]
    if not isinstance(options, dict) or not options.keys() <= {"scale"}:
        raise ValueError(f"`attention_kwargs`={show(options)} must be a dict with nothing but `scale`.")
    check_real('attention_kwargs["scale"]', options.get("scale", 1.0), -1000, 1000)


def update_tensors(tensors: dict[str, Tensor | None], returned: Any, has_masks: bool) -> None:
    """Takes what a callback returns: nothing, or finite tensors of the same shape by their names. Embeddings without
    masks may have another length, and negative ones may come and go."""
    returned = {} if returned is None else returned
    if not isinstance(returned, dict) or not returned.keys() <= tensors.keys():
        allowed = f"nothing, or a dict with names out of {[*tensors]}"
        raise ValueError(f"`callback_on_step_end` returned {show(returned)}, but must return {allowed}.")
    for name, tensor in returned.items():
        like = tensors["prompt_embeds"] if tensors[name] is None else tensors[name]
        is_free = name.endswith("embeds") and not has_masks
        shape = (len(like), None, like.shape[2]) if is_free else like.shape
        if tensor is not None or name != "negative_prompt_embeds":
            check_tensor(f"{name} of callback_on_step_end", tensor, shape)
        tensors[name] = None if tensor is None else tensor.to(like)
