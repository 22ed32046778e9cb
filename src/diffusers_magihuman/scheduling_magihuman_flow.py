# SPDX-License-Identifier: Apache-2.0
"""The flow scheduler of MagiHuman: the noise level lives here alone, since the model never sees a timestep."""

import inspect
import json
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import check_choice, check_integer, check_list, check_real, check_same_shapes, show

MAX_TIMESTEPS = 10**5
UNIPC_DEFAULTS = {name: item.default for name, item in inspect.signature(UniPCMultistepScheduler).parameters.items()}


class MagiHumanFlowScheduler(UniPCMultistepScheduler):
    r"""Flow-matching scheduler with the grid of [daVinci-MagiHuman](https://huggingface.co/papers/2603.21986): levels
    that fall linearly from `1 - 1 / num_train_timesteps` towards 0, shifted to `sigma = flow_shift * sigma / (1 +
    (flow_shift - 1) * sigma)`. Before `set_timesteps` it has `num_train_timesteps` levels, for training.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Timestep of pure noise, 2 to 100,000.
        flow_shift (`float`, defaults to 5.0): Shift of the noise levels towards noise, 0.001 to 1000.
        sampler (`str`, defaults to `"unipc"`):
            `"unipc"`: the [UniPC](https://huggingface.co/papers/2302.04867) multistep solver of the base model.
            `"renoise"`: the stochastic step of the distilled model, which predicts the clean sample and mixes it with
            fresh noise, `x = sigma_next * noise + (1 - sigma_next) * (x - sigma * velocity)`.
        solver_order (`int`, defaults to 2): Order of the multistep solver, 1 to 3.

    `ValueError` for other values. A saved config holds these alone, what is fixed here is not in it.
    """

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, flow_shift: float = 5.0, sampler: str = "unipc", solver_order: int = 2
    ) -> None:
        num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, 2, MAX_TIMESTEPS)
        flow_shift = check_real("flow_shift", flow_shift, 1e-3, 1e3)
        check_choice("sampler", sampler, "unipc", "renoise")
        solver_order = check_integer("solver_order", solver_order, 1, 3)
        grid = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}
        grid |= {"num_train_timesteps": num_train_timesteps, "solver_order": solver_order}
        defaults = self.config.get("_use_default_values")
        super().__init__(**UNIPC_DEFAULTS | grid)
        if defaults is not None:  # what other schedulers made from this one have their own of; not the shift
            defaults = {"sampler"}.intersection(defaults) or set(defaults) - {"flow_shift"}
            self.register_to_config(_use_default_values=sorted(defaults | (UNIPC_DEFAULTS.keys() - grid.keys())))
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        # What is fixed here must not come from the config of another scheduler, which may predict the noise.
        init_dict, unused_kwargs, hidden_dict = super().extract_init_dict(config_dict, **kwargs)
        hidden_dict = {name: value for name, value in hidden_dict.items() if name not in UNIPC_DEFAULTS}
        return init_dict, unused_kwargs, hidden_dict

    def to_json_string(self) -> str:
        """The config as it is saved: the scheduler's own arguments, and what class of what version has them."""
        config = json.loads(super().to_json_string())
        own = {"_class_name", "_diffusers_version", *inspect.signature(type(self)).parameters}
        return json.dumps({name: config[name] for name in sorted(own)}, indent=2) + "\n"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
    ) -> None:
        """Sets the noise levels of a run: those of `num_inference_steps`, 1 to 100,000, or else those of `sigmas`,
        levels before the shift that fall from at most 1 and stay above 0; `ValueError` for others. The timesteps go to
        `device`, the levels stay on the CPU."""
        if sigmas is None:
            num_inference_steps = check_integer("num_inference_steps", num_inference_steps, 1, MAX_TIMESTEPS)
            sigma_max = float(np.float32(1 - 1 / self.config.num_train_timesteps))
            sigmas = np.linspace(sigma_max, 0.0, num_inference_steps + 1)[:-1]
        levels = sigmas.tolist() if isinstance(sigmas, np.ndarray | Tensor) else sigmas
        check_list("sigmas", levels, None, check_real)
        sigmas = np.array(levels, dtype=np.float64)
        if not (sigmas.size and sigmas[0] <= 1 and sigmas[-1] > 0 and (np.diff(sigmas) < 0).all()):
            raise ValueError(f"`sigmas`={show(levels)} must fall from at most 1 and stay above 0.")
        super().set_timesteps(sigmas=sigmas)
        self.timestep_values = self.timesteps.tolist()  # asked for in each step, which must not wait for a device
        self.timesteps = self.timesteps.to(device)

    def index_for_timestep(self, timestep: int | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in `timesteps`, or those given; `ValueError` if it does not."""
        grid = self.timestep_values if schedule_timesteps is None else schedule_timesteps.tolist()
        is_number = isinstance(timestep, Tensor) and timestep.numel() == 1 and not timestep.is_meta
        value = timestep.item() if is_number else timestep
        if isinstance(value, bool) or not isinstance(value, Real) or value not in grid:
            allowed = f"one of the {len(grid)} timesteps from {grid[0]} to {grid[-1]}"
            raise ValueError(f"`timestep`={show(value)} must be {allowed}.")
        first = grid.index(value)  # of two, Diffusers takes the second
        return grid.index(value, first + 1) if grid.count(value) > 1 else first

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Goes from one noise level to the next; `ValueError` before `set_timesteps`, after its last one, and for a
        `timestep` that is not in `timesteps`.

        `model_output` is the velocity of `sample`, at the current noise level and of one shape; the first call of a
        run starts at `timestep`. The `"renoise"` sampler adds `variance_noise` of that shape, or draws it by
        `generator`, one or a list.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        noise = {} if variance_noise is None else {"variance_noise": variance_noise}
        check_same_shapes(has_data=False, sample=sample, model_output=model_output, **noise)
        if self.step_index is None or not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
            index = self.index_for_timestep(timestep)
            if self.step_index is None:
                self._step_index = index if self.begin_index is None else self.begin_index
        if self.step_index == len(self.timesteps):
            raise ValueError(f"`timestep`={timestep}: all {len(self.timesteps)} steps are done; call `set_timesteps`.")
        if self.config.sampler == "unipc":
            return super().step(model_output, timestep, sample, return_dict=return_dict)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        if variance_noise is None:
            # The last step's counts for nothing, but is drawn: a seed gives the original's sequence of draws.
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        prev_sample = sigma_next * variance_noise + (1 - sigma_next) * (sample - sigma * model_output)
        self._step_index += 1
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mixes samples `(batch_size, ...)` with noise of their shape, `(1 - sigma) * original_samples + sigma *
        noise`; `timesteps` of shape `(batch_size,)`, or `(1,)` for all, are out of ours. `ValueError` for others."""
        check_same_shapes(original_samples=original_samples, noise=noise)
        is_dense = isinstance(timesteps, Tensor) and timesteps.layout == torch.strided and not timesteps.is_meta
        if not is_dense or timesteps.shape not in ((1,), noise.shape[:1]):
            raise ValueError(f"`timesteps`={show(timesteps)} must be a tensor of shape {tuple(noise.shape[:1])}.")
        indices = [self.index_for_timestep(value) for value in timesteps.tolist()]
        if self.begin_index is not None:  # as in Diffusers: a run has begun, and its level is that of all
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(indices)
        sigma = self.sigmas[indices].to(original_samples).view(-1, *[1] * (noise.ndim - 1))
        return (1 - sigma) * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """[`add_noise`] under the name of Diffusers' other flow schedulers; noise that is left out is drawn."""
        if noise is None:
            check_same_shapes(sample=sample)
            noise = randn_tensor(sample.shape, device=sample.device, dtype=sample.dtype)
        return self.add_noise(sample, noise, timestep)
