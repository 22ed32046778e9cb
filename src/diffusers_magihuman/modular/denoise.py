# SPDX-License-Identifier: Apache-2.0
"""The loop: pieces of a step, and for each kind of input the loop that is made of them."""

from typing import Any

import torch
from diffusers import AutoGuidance
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
)
from torch import Tensor

from ..denoising import check_step_end, keep_first_frame, predict_velocities, take_step, update_tensors
from ..guidance_magihuman import check_is_perturbed
from ..pipeline_base import part_of
from .before_denoise import NEGATIVE_VIDEO_TEXT
from .encoders import Blocks
from .parameters import AUDIO_GUIDER, GUIDANCE_SCALE, GUIDER, TRANSFORMER, UPSCALE_GUIDER, gives, takes

LoopBlocks = tuple[Any, BlockState]

# What a callback may change, by its name for it.
CALLBACK_TENSORS = [
    ("latents", "latents"),
    ("audio_latents", "audio_latents"),
    ("audio_latents", "noisy_audio_latents"),
]
CALLBACK_TENSORS += [(f"{x}prompt_embeds", f"{x}encoder_hidden_states") for x in ("", "negative_")]


class MagiHumanDistilledLoopDenoiser(ModularPipelineBlocks):
    model_name = "magihuman-distilled"
    description = "Within the loop: predicts the velocities of video and audio."
    expected_components = [TRANSFORMER]
    inputs = takes(
        *("latents", "audio_latents", "encoder_hidden_states", "video_scheduler"),
        **dict.fromkeys(("encoder_attention_mask", "attention_kwargs")),
    )

    def __call__(self, components: Any, block_state: BlockState, i: int, t: Tensor) -> LoopBlocks:  # noqa: ARG002
        text = block_state.encoder_hidden_states, block_state.encoder_attention_mask, block_state.video_scheduler, i
        inputs = block_state.latents, block_state.audio_latents, block_state.attention_kwargs
        velocities = predict_velocities(part_of(components, "transformer"), "cond", *text, *inputs)
        block_state.velocity, block_state.audio_velocity = velocities
        return components, block_state


class MagiHumanLoopDenoiser(ModularPipelineBlocks):
    """What the guiders of video and audio both ask for, with the model as it is, runs once."""

    model_name = "magihuman"
    description = "Within the loop: predicts the velocities of video and audio, each guided by its own guider."
    expected_components = [TRANSFORMER, GUIDER, AUDIO_GUIDER]
    expected_configs = [GUIDANCE_SCALE]
    inputs = takes(
        *("latents", "audio_latents", "encoder_hidden_states", "video_scheduler"),
        **dict.fromkeys(("encoder_attention_mask", *NEGATIVE_VIDEO_TEXT, "attention_kwargs")),
    )
    guider_names = ("guider", "audio_guider")
    audio_latents_name = "audio_latents"

    def __call__(self, components: Any, block_state: BlockState, i: int, t: Tensor) -> LoopBlocks:
        transformer, scheduler = part_of(components, "transformer"), block_state.video_scheduler
        inputs = block_state.latents, block_state[self.audio_latents_name], block_state.attention_kwargs
        names = ("encoder_hidden_states", "encoder_attention_mask")
        texts = {name: (block_state[name], block_state[f"negative_{name}"]) for name in names}
        velocities, predictions = {}, []
        for index, guider_name in enumerate(self.guider_names):
            guider = part_of(components, guider_name)
            guider.set_state(step=i, num_inference_steps=len(scheduler.timesteps), timestep=t)
            batches = guider.prepare_inputs(texts)
            for batch in batches:
                # Nothing public tells batches apart; others than these change the model, each guider in its own way.
                name = batch[guider._identifier_key]
                is_shared = name == "pred_cond" or (name == "pred_uncond" and not isinstance(guider, AutoGuidance))
                key = name if is_shared else f"{name} of {guider_name}"
                try:
                    guider.prepare_models(transformer)
                    if key not in velocities:
                        text = (batch[name] for name in names)
                        velocities[key] = predict_velocities(transformer, key, *text, scheduler, i, *inputs)
                finally:
                    guider.cleanup_models(transformer)
                if not is_shared:
                    check_is_perturbed(guider, velocities[key][index], velocities["pred_cond"][index])
                batch.noise_pred = velocities[key][index]
            predictions.append(guider(batches).pred)
        block_state.velocity, block_state.audio_velocity = predictions[0], predictions[-1]
        return components, block_state


class MagiHumanUpscaleLoopDenoiser(MagiHumanLoopDenoiser):
    model_name = "magihuman-upscale"
    description = "Within the loop: predicts the velocity of the video, guided by its guider; the noisy audio helps."
    expected_components = [TRANSFORMER, UPSCALE_GUIDER]
    expected_configs = []
    inputs = takes(
        *("latents", "noisy_audio_latents", "encoder_hidden_states", "video_scheduler"),
        **dict.fromkeys(("encoder_attention_mask", *NEGATIVE_VIDEO_TEXT, "attention_kwargs")),
    )
    guider_names = ("guider",)
    audio_latents_name = "noisy_audio_latents"


class MagiHumanLoopVideoStep(ModularPipelineBlocks):
    model_name = "magihuman"
    description = "Within the loop: takes the video to the next noise level; the audio stays as it is."
    inputs = takes("latents", "video_scheduler", generator=None)
    intermediate_outputs = gives("latents")

    def __call__(self, components: Any, block_state: BlockState, i: int, t: Tensor) -> LoopBlocks:
        latents, velocity, scheduler = block_state.latents, block_state.velocity, block_state.video_scheduler
        block_state.clean_latents = latents - scheduler.sigmas[i] * velocity
        block_state.latents = take_step(scheduler, velocity, t, latents, block_state.generator)
        return components, block_state


class MagiHumanLoopStep(MagiHumanLoopVideoStep):
    description = "Within the loop: takes video and audio to the next noise level."
    inputs = takes("latents", "video_scheduler", "audio_latents", "audio_scheduler", generator=None)
    intermediate_outputs = gives("latents", "audio_latents")

    def __call__(self, components: Any, block_state: BlockState, i: int, t: Tensor) -> LoopBlocks:
        components, block_state = super().__call__(components, block_state, i, t)
        inputs = block_state.audio_velocity, t, block_state.audio_latents, block_state.generator
        block_state.audio_latents = take_step(block_state.audio_scheduler, *inputs)
        return components, block_state


class MagiHumanDenoiseLoopWrapper(LoopSequentialPipelineBlocks):
    """Diffusers has neither a callback nor an interrupt here."""

    model_name = "magihuman"
    description = (
        "Denoises, and keeps a given first frame. A callback returns the tensors that it changes, or nothing, and may "
        "set `pipe._interrupt`; `pipe.preview` decodes a frame of `clean_latents`, the present estimate of the video."
    )
    loop_inputs = takes(
        "timesteps",
        callback_on_step_end_tensor_inputs=("latents",),
        **dict.fromkeys(("first_frame_latents", "callback_on_step_end", "attention_kwargs")),
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> Blocks:
        block_state = self.get_block_state(state)
        first_frame = block_state.first_frame_latents
        callback, attention_kwargs = block_state.callback_on_step_end, block_state.attention_kwargs
        # A callback of Diffusers names its tensors itself.
        step_inputs = getattr(callback, "tensor_inputs", block_state.callback_on_step_end_tensor_inputs)
        fields = {name: field for name, field in CALLBACK_TENSORS if hasattr(block_state, field)}
        inputs = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": step_inputs}
        check_step_end(inputs | {"attention_kwargs": attention_kwargs}, [*fields, "clean_latents"])
        with self.progress_bar(total=len(block_state.timesteps)) as progress_bar:
            for i, t in enumerate(block_state.timesteps):
                if components.interrupt:
                    break
                block_state.latents = keep_first_frame(block_state.latents, first_frame)
                components, block_state = self.loop_step(components, block_state, i=i, t=t)
                if callback is not None:
                    tensors = {name: block_state[field] for name, field in fields.items()}
                    clean = keep_first_frame(block_state.clean_latents, first_frame)
                    shown = tensors | {"clean_latents": clean}
                    returned = callback(components, i, t, {name: shown[name] for name in step_inputs})
                    masks = block_state.encoder_attention_mask, block_state["negative_encoder_attention_mask"]
                    update_tensors(tensors, returned, any(mask is not None for mask in masks))
                    for name, field in fields.items():
                        block_state[field] = tensors[name]
                progress_bar.update()
        block_state.latents = keep_first_frame(block_state.latents, first_frame)
        # Copied with the state, a method would act on a copy of its object.
        block_state.callback_on_step_end = None
        self.set_block_state(state, block_state)
        return components, state


class MagiHumanDenoiseStep(MagiHumanDenoiseLoopWrapper):
    block_classes = [MagiHumanLoopDenoiser, MagiHumanLoopStep]
    block_names = ["denoiser", "step"]


class MagiHumanAudio2VideoDenoiseStep(MagiHumanDenoiseLoopWrapper):
    block_classes = [MagiHumanLoopDenoiser, MagiHumanLoopVideoStep]
    block_names = ["denoiser", "step"]


class MagiHumanDistilledDenoiseStep(MagiHumanDenoiseLoopWrapper):
    block_classes = [MagiHumanDistilledLoopDenoiser, MagiHumanLoopStep]
    block_names = ["denoiser", "step"]


class MagiHumanDistilledAudio2VideoDenoiseStep(MagiHumanDenoiseLoopWrapper):
    block_classes = [MagiHumanDistilledLoopDenoiser, MagiHumanLoopVideoStep]
    block_names = ["denoiser", "step"]


class MagiHumanUpscaleDenoiseStep(MagiHumanDenoiseLoopWrapper):
    block_classes = [MagiHumanUpscaleLoopDenoiser, MagiHumanLoopVideoStep]
    block_names = ["denoiser", "step"]


class MagiHumanAutoDenoiseStep(AutoPipelineBlocks):
    description = "Denoises video and audio, or the video alone if audio is given."
    block_classes = [MagiHumanAudio2VideoDenoiseStep, MagiHumanDenoiseStep]
    block_names = ["audio2video", "text2video"]
    block_trigger_inputs = ["conditioning_audio_latents", None]


class MagiHumanDistilledAutoDenoiseStep(MagiHumanAutoDenoiseStep):
    block_classes = [MagiHumanDistilledAudio2VideoDenoiseStep, MagiHumanDistilledDenoiseStep]
