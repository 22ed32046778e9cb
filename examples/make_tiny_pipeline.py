# SPDX-License-Identifier: Apache-2.0
"""Writes a complete pipeline of the real classes at toy width with random weights, as a Diffusers directory.

It makes a second of noise in 64x96 pixels on any machine, which is enough to try an installation or to test code:

    python examples/make_tiny_pipeline.py tiny-magihuman
"""

import argparse
import copy
import string
from typing import Any

import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck
from transformers import GemmaTokenizer, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)


def make_text_encoder(hidden_size: int) -> tuple[GemmaTokenizer, T5GemmaEncoderModel]:
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])
    module = T5GemmaModuleConfig(
        vocab_size=len(vocab),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        sliding_window=16,
        query_pre_attn_scalar=8,
    )
    decoder = copy.deepcopy(module)  # some versions of Transformers mark it as causal
    config = T5GemmaConfig(encoder=module, decoder=decoder, is_encoder_decoder=False, vocab_size=len(vocab))
    return tokenizer, T5GemmaEncoderModel(config).eval()


def make_turbo_vae(latent_channels: int = 8, encoder_base_dim: int | None = 4) -> AutoencoderKLMagiHumanTurbo:
    return AutoencoderKLMagiHumanTurbo(
        latent_channels=latent_channels,
        decoder_block_out_channels=(4, 4, 8, 8),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_base_dim=encoder_base_dim,
        encoder_dim_mult=(1, 1, 1, 1),
        encoder_num_res_blocks=1,
        latents_mean=[0.1, -0.2] * (latent_channels // 2),
        latents_std=[0.8, 1.2] * (latent_channels // 2),
    ).eval()


def make_wan_vae(z_dim: int = 8) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.1, -0.2] * (z_dim // 2),
        latents_std=[0.8, 1.2] * (z_dim // 2),
    ).eval()


def make_audio_vae() -> AutoencoderOobleck:
    return AutoencoderOobleck(
        encoder_hidden_size=16,
        downsampling_ratios=[8, 16, 16],
        channel_multiples=[1, 1, 1],
        decoder_channels=8,
        decoder_input_channels=8,
    ).eval()


def make_transformer(**config: Any) -> MagiHumanTransformer3DModel:
    return MagiHumanTransformer3DModel(
        in_channels=8,
        audio_in_channels=8,
        text_in_channels=16,
        num_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_head_dim=16,
        modality_layers=(0, 2),
        gelu_layers=(0,),
        feed_forward_multiple=1,
        **config,
    ).eval()


def make_tiny_pipeline(
    is_distilled: bool = False, use_wan_vae: bool = False, **defaults: int
) -> MagiHumanAudioVideoPipeline:
    """`defaults` are the size and the length that are saved with it, those of the full-size model if left out."""
    torch.manual_seed(0)
    tokenizer, text_encoder = make_text_encoder(hidden_size=16)
    return MagiHumanAudioVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=make_transformer(),
        scheduler=MagiHumanFlowScheduler(sampler="renoise" if is_distilled else "unipc"),
        vae=make_wan_vae() if use_wan_vae else make_turbo_vae(),
        audio_vae=make_audio_vae(),
        is_distilled=is_distilled,
        **defaults,
    )


def make_tiny_upscale_pipeline(default_height: int = 288, default_width: int = 480) -> MagiHumanLatentUpscalePipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = make_text_encoder(hidden_size=16)
    return MagiHumanLatentUpscalePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=make_transformer(coordinate_style="v1", local_attention_layers=(0, 2), local_attention_frames=1),
        scheduler=MagiHumanFlowScheduler(),
        vae=make_turbo_vae(),
        audio_vae=make_audio_vae(),
        default_height=default_height,
        default_width=default_width,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="tiny-magihuman", help="directory to write; default: %(default)s")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--distilled", action="store_true", help="8 stochastic steps without guidance")
    kind.add_argument("--upscale", action="store_true", help="super-resolution of latents, to 128x192 unless told")
    arguments = parser.parse_args()
    if arguments.upscale:
        pipe = make_tiny_upscale_pipeline(default_height=128, default_width=192)
    else:
        size = {"default_height": 64, "default_width": 96, "default_num_frames": 25}
        pipe = make_tiny_pipeline(arguments.distilled, **size)
    pipe.save_pretrained(arguments.output)
    print(arguments.output)
