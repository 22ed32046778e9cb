# SPDX-License-Identifier: Apache-2.0
"""The flow scheduler of MagiHuman: the noise level lives here alone, since the model never sees a timestep."""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class MagiHumanFlowScheduler(UniPCMultistepScheduler):
    r"""Flow-matching scheduler with the grid of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986): levels
    that fall linearly from `1 - 1 / num_train_timesteps` towards 0, shifted to `sigma = flow_shift * sigma / (1 +
    (flow_shift - 1) * sigma)`. Before `set_timesteps` it has `num_train_timesteps` levels, for training.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Timestep of pure noise.
        flow_shift (`float`, defaults to 5.0): Shift of the noise levels towards noise.
        sampler (`str`, defaults to `"unipc"`):
            `"unipc"`: the [UniPC](https://huggingface.co/papers/2302.04867) multistep solver of the base model.
            `"renoise"`: the stochastic step of the distilled model, which predicts the clean sample and mixes it with
            fresh noise, `x = sigma_next * noise + (1 - sigma_next) * (x - sigma * velocity)`.
        solver_order (`int`, defaults to 2): Order of the multistep solver.
    """

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, flow_shift: float = 5.0, sampler: str = "unipc", solver_order: int = 2
    ) -> None:
        if sampler not in ("unipc", "renoise"):
            raise ValueError(f"`sampler`={sampler!r} must be 'unipc' or 'renoise'.")
        grid = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}
        super().__init__(num_train_timesteps=num_train_timesteps, solver_order=solver_order, **grid)
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        # What is fixed here must not come from the config of another scheduler, which may predict the noise.
        init_dict, unused_kwargs, hidden_dict = super().extract_init_dict(config_dict, **kwargs)
        fixed = inspect.signature(UniPCMultistepScheduler).parameters
        return init_dict, unused_kwargs, {name: value for name, value in hidden_dict.items() if name not in fixed}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
    ) -> None:
        """Sets the noise levels of a run: those of `num_inference_steps`, 1 or more, or else `sigmas`, levels before
        the shift that fall from at most 1 and stay above 0; `ValueError` for others. The timesteps go to `device`, the
        levels stay on the CPU."""
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps`={num_inference_steps} must be 1 or more.")
            sigma_max = float(np.float32(1 - 1 / self.config.num_train_timesteps))
            sigmas = np.linspace(sigma_max, 0.0, num_inference_steps + 1)[:-1]
        sigmas = np.array(sigmas, dtype=np.float64)
        if not (sigmas.size and sigmas[0] <= 1 and sigmas[-1] > 0 and (np.diff(sigmas) < 0).all()):
            raise ValueError(f"`sigmas`={sigmas.tolist()} must fall from at most 1 and stay above 0.")
        super().set_timesteps(device=device, sigmas=sigmas)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Goes from one noise level to the next; `ValueError` before `set_timesteps`.

        `model_output` is the velocity of `sample`, at the current noise level and of one shape; only the first call of
        a run looks `timestep` up. The `"renoise"` sampler adds `variance_noise` of that shape, or draws it by
        `generator`, one or a list.
        """
        if self.config.sampler == "unipc":
            return super().step(model_output, timestep, sample, return_dict=return_dict)
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        if variance_noise is None:
            # The last step's counts for nothing, but is drawn: a seed gives the original's sequence of draws.
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        prev_sample = sigma_next * variance_noise + (1 - sigma_next) * (sample - sigma * model_output)
        self._step_index += 1
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mixes samples with noise (drawn if left out), `(1 - sigma) * sample + sigma * noise`, as Diffusers' other
        flow schedulers do; `timestep` of shape `(batch_size,)` is out of `timesteps`."""
        if noise is None:
            noise = randn_tensor(sample.shape, device=sample.device, dtype=sample.dtype)
        return self.add_noise(sample, noise, timestep)
