# SPDX-License-Identifier: Apache-2.0
"""What holds the components while blocks run."""

import os
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np
import PIL.Image
from diffusers import ModularPipeline
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks, PipelineState
from torch import Tensor

from ..checks import check_integer
from ..guidance_magihuman import check_guider
from ..lora import MagiHumanLoraLoaderMixin
from ..pipeline_base import check_forms, decode_latents, one_at_a_time, rates_of, stream_frames
from ..weights import check_is_saveable, portable_reference


class MagiHumanModularPipeline(ModularPipeline, MagiHumanLoraLoaderMixin):
    """Runs the blocks of the base model, by default [`MagiHumanAutoBlocks`]; `guider` and `audio_guider` guide the
    video and the audio.

    Unlike in [`MagiHumanAudioVideoPipeline`], guidance is set on the guiders, each block checks its own inputs when it
    runs, and a `ComponentsManager` offloads the models. A given `state` is copied, with its generators, so calls with
    one state repeat the noise; of one that holds final `latents` they are taken for noise, so go on from it by the
    blocks that come after those that made it.
    """

    default_blocks_name = "MagiHumanAutoBlocks"
    _interrupt = False

    def __init__(
        self,
        blocks: ModularPipelineBlocks | None = None,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        self.load_errors: dict[str, Exception] = {}
        path = pretrained_model_name_or_path
        # Diffusers loads no component, and saves no index, of a path that is no string.
        super().__init__(blocks, path if path is None else os.fspath(path), **kwargs)
        for spec in self._component_specs.values():
            # An index that `save_pretrained` writes names no place, so that its folder may be moved, or pushed.
            if spec.subfolder and spec.pretrained_model_name_or_path is None:
                spec.pretrained_model_name_or_path = self._pretrained_model_name_or_path
        if self.config.get("default_guidance_scale") is not None:
            for name in {"guider", "audio_guider"} & self.components.keys():
                guider = getattr(self, name).new(guidance_scale=self.config.default_guidance_scale)
                self.update_components(**{name: guider})

    def register_components(self, **kwargs: Any) -> None:
        super().register_components(**kwargs)
        vars(self).update(rates_of(getattr(self, "vae", None), getattr(self, "audio_vae", None)))

    def register_to_config(self, **kwargs: Any) -> None:
        """Registers our components as those of Diffusers, and what is saved here without the place."""
        for name, value in kwargs.items():
            if isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], dict):
                library, class_name, spec = portable_reference(value)
                spec = spec | {"type_hint": portable_reference(tuple(spec["type_hint"]))}
                if spec["pretrained_model_name_or_path"] == getattr(self, "_save_directory", ""):
                    spec["pretrained_model_name_or_path"] = None
                kwargs[name] = (library, class_name, spec)
        super().register_to_config(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in Diffusers, but the index names no directory. `ValueError` if weights are on disk, or there is a LoRA
        in the transformer."""
        check_is_saveable(self)
        self._save_directory = os.fspath(save_directory)
        super().save_pretrained(self._save_directory, *args, **{"overwrite_modular_index": True} | kwargs)

    def load_components(self, *args: Any, **kwargs: Any) -> None:
        """As in Diffusers, which logs the error of a component; the first block that needs this one raises it."""

        def remember(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
            def load_and_remember(**options: Any) -> Any:
                try:
                    return load(**options)
                except Exception as error:
                    self.load_errors[name] = error
                    raise

            return load_and_remember

        specs = dict(self._component_specs)
        for name, spec in specs.items():
            spec.load = remember(name, spec.load)
        try:
            super().load_components(*args, **kwargs)
        finally:
            for spec in specs.values():
                del spec.load

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Also that of the loops, which are within other blocks, where Diffusers does not look."""
        blocks = [self._blocks]
        for block in blocks:
            blocks += block.sub_blocks.values()
            if isinstance(block, LoopSequentialPipelineBlocks):
                block.set_progress_bar_config(**kwargs)

    # A callback sets `_interrupt`.
    interrupt = property(attrgetter("_interrupt"))
    do_classifier_free_guidance = property(attrgetter("requires_unconditional_embeds"))

    @property
    def guiders(self) -> list[Any]:
        names = ("guider", "audio_guider")
        return [getattr(self, name) for name in names if getattr(self, name, None) is not None]

    @property
    def requires_unconditional_embeds(self) -> bool:
        return any(guider.num_conditions > 1 for guider in map(check_guider, self.guiders))

    stream_frames = stream_frames

    def maybe_free_model_hooks(self) -> None:
        """Nothing, unlike in a pipeline with offloading of its own."""

    def preview(
        self, latents: Tensor, frame: int = 0, output_type: str = "np"
    ) -> np.ndarray | Tensor | list[PIL.Image.Image]:
        """One frame of each video, decoded from a latent frame alone, for a callback: of `clean_latents` the present
        estimate. `(batch_size, height, width, 3)` for `"np"`, `(batch_size, 3, height, width)` for `"pt"`, or a list
        for `"pil"`."""
        check_integer("frame", frame, 0, latents.shape[2] - 1)
        frames = decode_latents(self, latents[:, :, frame : frame + 1], output_type)
        return [first for first, *_ in frames] if output_type == "pil" else frames[:, 0]

    @one_at_a_time
    def __call__(
        self,
        state: PipelineState | None = None,
        output: str | list[str] | None = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the blocks; `audio` is what they call `input_audio`, as `audio` is what comes out. See `doc` for other
        inputs, and [`ModularPipeline`]."""
        self._interrupt = False
        if audio is not None:
            check_forms({"audio": audio, "input_audio": kwargs.get("input_audio")}, "audio", "input_audio")
            kwargs["audio" if "audio" in self._blocks.input_names else "input_audio"] = audio
        try:
            return super().__call__(state, output, **kwargs)
        finally:  # else guiders tell of the last step, where they may be off, whether they need negative prompts
            for guider in self.guiders:
                guider.set_state(None, None, None)


class MagiHumanDistilledModularPipeline(MagiHumanModularPipeline):
    """Runs the blocks of the distilled model, which needs no guidance: it has no guider and no negative prompt."""

    default_blocks_name = "MagiHumanDistilledAutoBlocks"


class MagiHumanUpscaleModularPipeline(MagiHumanModularPipeline):
    """Runs the blocks of the upscaler, as [`MagiHumanLatentUpscalePipeline`] does; `guider`, off by default, guides
    the video."""

    default_blocks_name = "MagiHumanUpscaleAutoBlocks"
