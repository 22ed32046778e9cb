# SPDX-License-Identifier: Apache-2.0
"""Puts what the recipes trained together as three Diffusers directories in float16: base, distilled, upscale.

    python examples/nano/assemble.py runs models

A directory that is there already is replaced, but for its model card.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from transformers import AutoTokenizer, T5GemmaEncoderModel
from words import VOCABULARY

from diffusers_magihuman import (
    AutoencoderKLMagiHumanTurbo,
    MagiHumanAudioVideoPipeline,
    MagiHumanFlowScheduler,
    MagiHumanLatentUpscalePipeline,
    MagiHumanTransformer3DModel,
)


def load(model_class: type[ModelMixin], folder: Path) -> ModelMixin:
    """A model in half precision, without the path that it came from in its config."""
    model = model_class.from_pretrained(folder).half()
    model.register_to_config(_name_or_path=None)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the recipes' outputs")
    parser.add_argument("output", type=Path, help="folder to write")
    arguments = parser.parse_args()

    # 1. Load
    runs, half = arguments.runs, {"dtype": torch.float16}
    common = {
        "tokenizer": AutoTokenizer.from_pretrained(runs / "text_encoder" / "tokenizer"),
        "text_encoder": T5GemmaEncoderModel.from_pretrained(runs / "text_encoder" / "text_encoder", **half),
        "audio_vae": load(AutoencoderOobleck, runs / "audio_vae" / "audio_vae"),
    }
    wan = load(AutoencoderKLWan, runs / "video_vae" / "vae")
    turbo = load(AutoencoderKLMagiHumanTurbo, runs / "turbo_vae" / "vae")
    transformers = {
        name: load(MagiHumanTransformer3DModel, runs / name / "transformer")
        for name in ("base", "distilled", "upscale")
    }

    # 2. Put together and save
    low = {"default_height": 128, "default_width": 128, "default_num_frames": 49}
    pipelines: dict[str, DiffusionPipeline] = {
        "base": MagiHumanAudioVideoPipeline(
            **common,
            transformer=transformers["base"],
            scheduler=MagiHumanFlowScheduler(),
            vae=wan,
            default_guidance_scale=1.5,
            **low,
        ),
        "distilled": MagiHumanAudioVideoPipeline(
            **common,
            transformer=transformers["distilled"],
            scheduler=MagiHumanFlowScheduler(sampler="renoise"),
            vae=turbo,
            is_distilled=True,
            **low,
        ),
        "upscale": MagiHumanLatentUpscalePipeline(
            **common,
            transformer=transformers["upscale"],
            scheduler=MagiHumanFlowScheduler(),
            vae=turbo,
            default_height=256,
            default_width=256,
        ),
    }
    new = arguments.output.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    for name, pipe in pipelines.items():
        pipe.save_pretrained(new / name)
    words = dict.fromkeys(text.lower() for word in VOCABULARY for text in (word.spelling, word.romanised))
    (new / "words.json").write_text(json.dumps([*words], ensure_ascii=False), encoding="utf-8")

    # 3. Replace what was there, but for the card
    for file in arguments.output.glob("*.md"):
        shutil.copy(file, new / file.name)
    shutil.rmtree(arguments.output, ignore_errors=True)
    new.replace(arguments.output)
    files = [file for file in arguments.output.rglob("*") if file.is_file()]
    print(f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB in {arguments.output}")


if __name__ == "__main__":
    main()
