# SPDX-License-Identifier: Apache-2.0
"""What the recipes have in common: arguments, a log, states to resume from, and pictures of how it goes."""

import argparse
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from accelerate import Accelerator
from torch import nn


def make_parser(description: str, steps: int, batch_size: int, learning_rate: float) -> argparse.ArgumentParser:
    """Makes a parser of the arguments that every recipe has; the numbers are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights, the log and the pictures")
    parser.add_argument("--steps", type=int, default=steps, help="in all, resumed ones too, default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="default: %(default)s")
    parser.add_argument("--decay", type=float, default=0.25, help="part of the steps that ends at 0, default: 0.25")
    parser.add_argument("--log-every", type=int, default=20, help="steps, default: %(default)s")
    parser.add_argument("--save-every", type=int, default=1000, help="steps, default: %(default)s")
    parser.add_argument("--stop-at", type=int, help="stop after this step, as if interrupted; run again to go on")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="compile models, which pays off in long runs")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="default: no")
    return parser


class Muon(torch.optim.Optimizer):
    """
    Momentum made orthogonal (Jordan et al., 2024), in steps of AdamW's size: torch's Muon with its defaults, also for
    weights of convolutions, which it sees as matrices.

    And in float32. Torch multiplies in bfloat16, which takes half as long as all else on a CPU without instructions
    for it.
    """

    def __init__(self, weights: list[nn.Parameter], learning_rate: float) -> None:
        super().__init__(weights, {"lr": learning_rate, "momentum": 0.95})

    @torch.no_grad()
    def step(self, _: None = None) -> None:  # a closure, which Accelerate passes on
        for group in self.param_groups:
            for weight in group["params"]:
                if (gradient := weight.grad) is not None:
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    momentum.lerp_(gradient, 1 - group["momentum"])
                    update = orthogonalise(gradient.lerp(momentum, group["momentum"]).flatten(1))
                    scale = 0.2 * math.sqrt(max(update.shape))
                    weight.sub_(update.view_as(weight), alpha=scale * group["lr"])


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Brings all singular values of a matrix near 1, by five Newton-Schulz steps of the fifth order."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)  # of at most 1, which the steps begin with
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.775 * gram) @ wide
    return wide.T if len(matrix) > matrix.shape[1] else wide


def make_optimizers(
    model: nn.Module, arguments: argparse.Namespace, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and convolutions, with AdamW's learning rate, and AdamW for embeddings and all else."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [
        weight for weight in weights if sum(size > 1 for size in weight.shape) > 1 and id(weight) not in embeddings
    ]
    others = [weight for weight in weights if all(weight is not matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, arguments.learning_rate, betas, weight_decay=0.0)
    return [Muon(matrices, arguments.learning_rate), adam]


class Run:
    """
    One training: moves models to the device, steps their optimisers, logs, and saves states.

    A step draws all its randomness from the seed and its number, so a run that is resumed gives the same weights as
    one that never stopped. The learning rate rises over the first steps, stays, and falls to 0 at the end.

    Args:
        arguments (`argparse.Namespace`): Of [`make_parser`].
        models (`dict[str, nn.Module]`): What to train by name, each with optimisers of its own.
        betas (`tuple[float, float]`): Of AdamW.
    """

    def __init__(
        self, arguments: argparse.Namespace, models: dict[str, nn.Module], betas: tuple[float, float] = (0.9, 0.95)
    ) -> None:
        self.arguments = arguments
        self.accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
        self.device = self.accelerator.device
        self.models = {name: self.accelerator.prepare_model(model.train()) for name, model in models.items()}
        if arguments.compile:
            torch._dynamo.config.recompile_limit = 64  # shapes; one graph for all of them is slow on a CPU
            for model in self.models.values():
                model.compile(dynamic=False)
        self.optimizers = {
            name: [self.accelerator.prepare_optimizer(one) for one in make_optimizers(model, arguments, betas)]
            for name, model in self.models.items()
        }
        self.output = arguments.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.step, self.seconds, self.sums, self.measured = 0, 0.0, {}, {}
        self.log = self.output / "log.jsonl"
        state = self.output / "state"
        if state.exists():
            self.accelerator.load_state(state)
            progress = json.loads((state / "progress.json").read_text())
            self.step, self.seconds, self.sums = progress["step"], progress["seconds"], progress["sums"]
            lines = self.log.read_text().splitlines()[: progress["lines"]] if self.log.exists() else []
            self.log.write_text("".join(line + "\n" for line in lines))
        elif self.log.exists():
            self.log.unlink()

    def steps(self) -> Iterator[np.random.Generator]:
        """Gives each remaining step its source of randomness; torch's own is seeded with it."""
        arguments, started = self.arguments, time.monotonic() - self.seconds
        while self.step < min(arguments.steps, arguments.stop_at or arguments.steps):
            rng = np.random.default_rng([arguments.seed, self.step, self.accelerator.process_index])
            torch.manual_seed(int(rng.integers(2**63)))
            for optimizer in itertools.chain(*self.optimizers.values()):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate()
            yield rng
            self.step += 1
            self.seconds = time.monotonic() - started
            if self.step % arguments.log_every == 0:
                self._write_log()
            if self.step % arguments.save_every == 0:
                self.save_state()
        self.save_state()
        draw_curves(self.log, self.output / "loss.png")

    def compile(self, module: nn.Module) -> Callable[..., torch.Tensor]:
        """A part of a model that is called by itself, compiled for each shape if that is asked for."""
        return torch.compile(module, dynamic=False) if self.arguments.compile else module

    def learning_rate(self) -> float:
        arguments = self.arguments
        warmup = min(100, math.ceil(arguments.steps / 10))
        left = (arguments.steps - self.step) / max(arguments.decay * arguments.steps, 1)
        return arguments.learning_rate * min((self.step + 1) / warmup, left, 1.0)

    def update(self, name: str, loss: torch.Tensor, **shown: torch.Tensor | float) -> None:
        """
        Takes one step of the optimisers of a model, and adds its loss and `shown` to the log.

        Raises:
            `FloatingPointError`: The gradient is not finite. The last state stays as it is.
        """
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.models[name].parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"in step {self.step} the gradient of {name} is not finite, its loss is {loss}")
        for optimizer in self.optimizers[name]:
            optimizer.step()
        self.models[name].zero_grad()
        for key, value in {f"{name}_loss": loss, f"{name}_norm": norm, **shown}.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(torch.as_tensor(value).detach())

    @torch.no_grad()
    def measure(self, measurement: Callable[[], dict[str, float]]) -> None:
        """Adds what `measurement` returns to the next line of the log, in every step before a state is saved."""
        if self.step % self.arguments.save_every == self.arguments.save_every - 1:
            self.measured |= measurement()

    def _write_log(self) -> None:
        """Appends the means since the last line."""
        means = {key: round(value / self.arguments.log_every, 6) for key, value in self.sums.items()}
        means |= {key: round(value, 3) for key, value in self.measured.items()}
        self.sums, self.measured = {}, {}
        if self.accelerator.is_main_process:
            line = {"step": self.step, "seconds": round(self.seconds, 1), **means, "lr": self.learning_rate()}
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)

    def save_state(self) -> None:
        """Saves what resuming needs; the previous state stays until the new one is complete."""
        state, new, old = (self.output / name for name in ("state", "state.new", "state.old"))
        self.accelerator.save_state(new)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            lines = len(self.log.read_text().splitlines()) if self.log.exists() else 0
            progress = {"step": self.step, "seconds": self.seconds, "sums": self.sums, "lines": lines}
            (new / "progress.json").write_text(json.dumps(progress))
            if state.exists():
                state.replace(old)
            new.replace(state)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # else the next state begins in the folder that is moved

    def unwrap(self, name: str) -> nn.Module:
        """The trained model itself, ready to be saved or used."""
        return self.accelerator.unwrap_model(self.models[name]).eval()


def draw_curves(log: Path, picture: Path, width: int = 960, height: int = 320) -> None:
    """Draws the losses of a log over the steps, on a logarithmic scale."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = [key for key in (lines[0] if lines else {}) if key not in ("step", "seconds", "lr") and "norm" not in key]
    image = PIL.Image.new("RGB", (width, height), "white")
    draw = PIL.ImageDraw.Draw(image)
    values = {name: np.log10([max(line.get(name, 1e-9), 1e-9) for line in lines]) for name in names}
    if len(lines) > 1 and values:
        low, high = (edge(np.concatenate(list(values.values()))) for edge in (np.min, np.max))
        for number, (name, series) in enumerate(values.items()):
            colour = ("#c02020", "#2040c0", "#208040", "#a06000", "#602080", "#404040")[number % 6]
            x = np.linspace(10, width - 10, len(series))
            y = height - 10 - (series - low) / max(high - low, 1e-9) * (height - 40)
            draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=colour, width=2)
            text = f"{name} {10 ** series[0]:.4g} to {10 ** series[-1]:.4g}, step {lines[-1]['step']}"
            draw.text((width // 2, 8 + 14 * number), text, fill=colour)
    save_picture(image, picture)


def save_sheet(rows: list[np.ndarray], picture: Path) -> None:
    """Saves rows of frames, each uint8 `(frames, height, width, 3)`, as one picture."""
    save_picture(PIL.Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])), picture)


def save_picture(image: PIL.Image.Image, picture: Path) -> None:
    temporary = picture.with_suffix(f".{os.getpid()}.png")  # as several processes may draw
    image.save(temporary)
    os.replace(temporary, picture)


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """Uint8 `(batch, frames, height, width, 3)` to `(batch, 3, frames, height, width)` in [-1, 1]; images, too."""
    return torch.from_numpy(np.array(frames)).movedim(-1, 1).float() / 127.5 - 1


def to_frames(video: torch.Tensor) -> np.ndarray:
    """The reverse of [`to_tensor`]."""
    return ((video.movedim(1, -1).clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
