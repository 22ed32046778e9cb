# SPDX-License-Identifier: Apache-2.0
"""Bounds and names that the command knows before it imports anything heavy."""

FRAME_RATE = 25  # frames, and audio latents, a second
# Bounds of a call: pixels of a side; frames, 11 minutes of them; videos, and steps.
MAX_SIZE, MAX_FRAMES, MAX_BATCH = 2**13, 2**14, 1000
MAX_PLANNED_FRAMES = 2**12  # takes half a minute
MAX_FEED_FORWARD_MULTIPLE = 4096  # to which inner sizes are rounded up
QUANTIZERS = ("int8", "float8")
QUANTIZE_KINDS = (*QUANTIZERS, "gguf:Q8_0", "gguf:Q4_0", "gguf:Q4_K")  # what `convert` writes

ORIGINAL = "GAIR/daVinci-MagiHuman"
TEXT_ENCODER = "google/t5gemma-9b-9b-ul2"
AUDIO_VAE = "stabilityai/stable-audio-open-1.0"
VIDEO_VAE = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
CONVERTED_VAES = {"turbo_vae": ORIGINAL, "audio_vae": AUDIO_VAE}  # with the video VAE, by default from there
VARIANTS = ("base", "distilled", "sr-540p", "sr-1080p")
CARD_VARIANTS = (*VARIANTS, "turbo-vae")

# The modules of the classes that are registered on Diffusers.
COMPONENT_MODULES = {
    "AutoencoderKLMagiHumanTurbo": "autoencoder_kl_magihuman_turbo",
    "MagiHumanFlowScheduler": "scheduling_magihuman_flow",
    "MagiHumanTransformer3DModel": "transformer_magihuman",
}
PIPELINE_MODULES = {
    "MagiHumanAudioVideoPipeline": "pipeline_magihuman",
    "MagiHumanLatentUpscalePipeline": "pipeline_magihuman_latent_upscale",
}
MODULAR_PIPELINES = {  # by the names of their models, see `MODULAR_PIPELINE_MAPPING` in Diffusers
    "magihuman": "MagiHumanModularPipeline",
    "magihuman-distilled": "MagiHumanDistilledModularPipeline",
    "magihuman-upscale": "MagiHumanUpscaleModularPipeline",
}
MODULAR_MODULES = dict.fromkeys(MODULAR_PIPELINES.values(), "modular.modular_pipeline") | {
    "MagiHumanAutoBlocks": "modular.modular_blocks_magihuman",
    "MagiHumanDistilledAutoBlocks": "modular.modular_blocks_magihuman_distilled",
    "MagiHumanGuidance": "guidance_magihuman",
    "MagiHumanUpscaleAutoBlocks": "modular.modular_blocks_magihuman_upscale",
}
CLASSES = COMPONENT_MODULES | PIPELINE_MODULES | MODULAR_MODULES


def spell_variant(name: str) -> str:
    """The one spelling of a variant, also for those of the original's files."""
    return {"distill": "distilled"}.get(name, name.replace("_", "-"))
