# SPDX-License-Identifier: Apache-2.0
"""The guidance of the original as a guider of Diffusers, and which of Diffusers' guiders cannot be used here."""

import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines import BlockState
from torch import Tensor

from .checks import check_real
from .denoising import guide, leading_scales, scale_at
from .pipeline_base import check_numbers

# By name, as not every version of Diffusers has them all.
UNUSABLE = {
    "FrequencyDecoupledGuidance": "it splits pictures, not videos or audio, into frequencies",
    "LTX2Guidance": "it needs arguments of the transformer of LTX-2",
    "MagnitudeAwareGuidance": "its norms are of two dimensions at most, those of videos of four",
    "SmoothedEnergyGuidance": "it blurs the tokens as those of one square picture, and in Diffusers it is never on",
}


def check_guider(guider: BaseGuidance) -> BaseGuidance:
    """The guider; `ValueError` for one of Diffusers that cannot guide this model."""
    for name in UNUSABLE.keys() & {kind.__name__ for kind in type(guider).__mro__}:
        raise ValueError(f"`guider`={name} cannot guide videos with audio: {UNUSABLE[name]}.")
    return guider


def check_is_perturbed(guider: BaseGuidance, velocity: Tensor, unperturbed: Tensor) -> None:
    """`ValueError` for what would be no guidance at all, though it takes its time."""
    if torch.equal(velocity, unperturbed):
        reason = "of layers it skips the whole or the attention; it perturbs the attention of PyTorch, where not local"
        raise ValueError(f"`guider`={type(guider).__name__} changes nothing in the transformer: {reason}.")


class MagiHumanGuidance(BaseGuidance):
    """Classifier-free guidance whose scale may fall in the lower half of the timesteps, or for the leading frames.

    Args:
        guidance_scale (`float`, defaults to 5.0): Off at 1.
        low_noise_guidance_scale (`float`, *optional*): The most that the scale is from `low_noise_timestep` down.
        low_noise_timestep (`float`, defaults to 500): Half of the scheduler's `num_train_timesteps`.
        leading_guidance_scale (`float`, *optional*): The most that the scale is for the leading latent frames.
        num_leading_frames (`int`, defaults to 13): Number of these frames.
        start, stop (`float`, defaults to 0.0 and 1.0): The share of the steps between which it is on.
        enabled (`bool`, defaults to `True`): Whether it is on at all.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 5.0,
        low_noise_guidance_scale: float | None = None,
        low_noise_timestep: float = 500,
        leading_guidance_scale: float | None = None,
        num_leading_frames: int = 13,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        check_numbers(locals(), "low_noise_guidance_scale", "leading_guidance_scale")
        check_real("low_noise_timestep", low_noise_timestep)
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self.low_noise_guidance_scale, self.low_noise_timestep = low_noise_guidance_scale, low_noise_timestep
        self.leading_guidance_scale, self.num_leading_frames = leading_guidance_scale, num_leading_frames

    def prepare_inputs(self, data: dict[str, tuple[Any, Any]]) -> list[BlockState]:
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, index, name) for index, name in enumerate(names)]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        scale = self.guidance_scale
        if self.low_noise_guidance_scale is not None:
            scale = scale_at(self._timestep, self.low_noise_timestep, scale, min(self.low_noise_guidance_scale, scale))
        if self.leading_guidance_scale is not None:
            scale = leading_scales(pred_cond, scale, self.leading_guidance_scale, self.num_leading_frames)
        return GuiderOutput(pred=guide(pred_cond, pred_uncond, scale), pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        is_on = self._enabled and not math.isclose(self.guidance_scale, 1.0)
        if is_on and self._num_inference_steps is not None:
            first, end = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
            is_on = first <= self._step < end
        return 2 if is_on else 1
