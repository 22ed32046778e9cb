# SPDX-License-Identifier: Apache-2.0
"""Measures the embedded models on prompts of combinations that they were not trained on, with fixed seeds.

    python examples/nano/evaluate.py
    python examples/nano/evaluate.py --parts upscale seconds    # these alone, the others stay as they were

Writes `benchmarks/embedded.json`, every number in it, and `embedded.png`, a contact sheet, beside it. What recognises
looks and syllables is `recognise.py`; its own errors, on drawn clips, are in the results, too.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import DiffusionPipeline
from recipe import save_sheet, to_frames, to_tensor
from recognise import (
    STEP,
    SyllableReader,
    edit_distance,
    measure_mouth,
    recognise_look,
    recognise_voice,
    to_voice,
    train_syllable_reader,
)

from diffusers_magihuman import embedded_model, export_to_mp4

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


PARTS = [
    "drawn",
    "seconds",
    "video_vae",
    "audio_vae",
    "distilled",
    "image_driven",
    "audio_driven",
    "image_against_prompt",
    "audio_against_prompt",
    "upscale",
    "base",
]


def measure_clips(
    scenes: list[world.Scene], videos: list[np.ndarray], voices: list[np.ndarray], reader: SyllableReader
) -> dict[str, float]:
    """
    Compares clips with what their prompts say.

    Returns:
        `dict`: Share of clips in which each attribute is right; syllable errors by syllables; and mean correlations
        of the mouth's opening with that of the prompt's syllables, and with that of what is heard in each frame.
    """
    right, errors, with_prompt, with_audio = defaultdict(list), [], [], []
    openings = np.array([vowel.mouth[1] for vowel in (world.CLOSED, *world.SYLLABLES.values())])
    times = np.arange(world.NUM_FRAMES) / world.FRAME_RATE
    for scene, frames, voice in zip(scenes, videos, voices, strict=True):
        for name, value in {**recognise_look(frames), "voice": recognise_voice(voice)}.items():
            right[name].append(value == getattr(scene, name))
        errors.append(edit_distance(reader.read(voice), scene.syllables))
        mouth = measure_mouth(frames)
        with_prompt.append(
            correlate(mouth, world.mouth_track(scene, times, world.NUM_FRAMES / world.FRAME_RATE)[:, 1])
        )
        labels = reader(torch.from_numpy(voice)[None]).argmax(dim=1)[0].numpy()
        with_audio.append(correlate(mouth, openings[labels[np.round(times * world.SAMPLING_RATE / STEP).astype(int)]]))
    return {
        **{name: float(np.mean(values)) for name, values in right.items()},
        "syllable_error_rate": sum(errors) / sum(len(scene.syllables) for scene in scenes),
        "mouth_correlation": float(np.mean(with_prompt)),
        "mouth_sound_correlation": float(np.mean(with_audio)),
    }


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation, 0 if one does not change."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def generate(
    pipe: DiffusionPipeline, clips: list[world.Clip], batch_size: int = 10, **conditions: list[Any]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs a pipeline with its defaults on the prompts of clips, clip number i with seed i."""
    videos, voices = [], []
    for start in range(0, len(clips), batch_size):
        batch = slice(start, start + batch_size)
        output = pipe(
            [clip.prompt for clip in clips[batch]],
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(clips))[batch]],
            **{name: values[batch] for name, values in conditions.items()},
        )
        videos += [np.round(frames * 255).astype(np.uint8) for frames in output.frames]
        voices += [to_voice(audio) for audio in output.audio]
    return videos, voices


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """In dB, of videos in [-1, 1]."""
    return float(-10 * torch.log10((first.clamp(-1, 1) - second).square().mean() / 4))


def measure_vaes(wan: torch.nn.Module, turbo: torch.nn.Module, clips: list[world.Clip]) -> dict[str, float]:
    """PSNR of both decoders on the same latents, and their times, from one run."""
    results = defaultdict(list)
    for clip in clips:
        video = to_tensor(clip.frames[None])
        latents = wan.encode(video).latent_dist.mode()
        for name, vae in (("wan", wan), ("turbo", turbo)):
            started = time.perf_counter()
            decoded = vae.decode(latents).sample
            results[f"{name}_seconds"].append(time.perf_counter() - started)
            results[f"{name}_psnr"].append(psnr(decoded, video))
    means = {
        name: float(np.median(values) if "seconds" in name else np.mean(values)) for name, values in results.items()
    }
    return {**means, "turbo_time_ratio": means["turbo_seconds"] / means["wan_seconds"]}


def measure_audio_vae(vae: torch.nn.Module, clips: list[world.Clip], reader: SyllableReader) -> dict[str, float]:
    """Signal-to-noise ratio in dB, and the syllable error rate of what went through the autoencoder."""
    ratios, errors = [], []
    for clip in clips:
        voice = torch.from_numpy(clip.voice)
        decoded = vae.decode(vae.encode(voice.expand(1, 2, -1)).latent_dist.mode()).sample[0].mean(dim=0)
        ratios.append(float(10 * torch.log10(voice.square().sum() / (decoded - voice).square().sum())))
        errors.append(edit_distance(reader.read(decoded.numpy()), clip.scene.syllables))
    syllables = sum(len(clip.scene.syllables) for clip in clips)
    return {"snr": float(np.mean(ratios)), "syllable_error_rate": sum(errors) / syllables}


def measure_upscale(
    pipe: DiffusionPipeline, clips: list[world.Clip], large: list[world.Clip]
) -> tuple[dict[str, float], list[np.ndarray]]:
    """PSNR to the true frames of 256x256, of upscaled latents and of resized frames decoded from the same latents."""
    results, rows = defaultdict(list), []
    for seed, (clip, true_clip) in enumerate(zip(clips, large, strict=True)):
        true = to_tensor(true_clip.frames[None])
        latents = pipe.vae.encode(to_tensor(clip.frames[None])).latent_dist.mode()
        low = pipe.vae.decode(latents).sample.clamp(-1, 1)
        resized = F.interpolate(low, size=true.shape[2:], mode="trilinear", align_corners=False)
        started = time.perf_counter()
        frames = pipe(
            clip.prompt,
            latents=latents,
            generator=torch.Generator().manual_seed(seed),
            guidance_scale=1.0,
            output_type="pt",
        ).frames
        results["seconds"].append(time.perf_counter() - started)
        upscaled = frames.transpose(1, 2) * 2 - 1
        results["resized_psnr"].append(psnr(resized, true))
        results["upscaled_psnr"].append(psnr(upscaled, true))
        if seed < 2:
            rows += [to_frames(video)[0, 12:44:8] for video in (resized, upscaled, true)]
    means = {name: float(np.mean(values)) for name, values in results.items()}
    return {**means, "gain": means["upscaled_psnr"] - means["resized_psnr"]}, rows


def measure_seconds(pipe: DiffusionPipeline, clips: list[world.Clip]) -> dict[str, float]:
    """Seconds of a clip with its mp4: in a process that has loaded the model, and of the whole command."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        for clip in clips:
            started = time.perf_counter()
            output = pipe(clip.prompt, generator=torch.Generator().manual_seed(0))
            export_to_mp4(output.frames[0], file, audio=output.audio[0], sampling_rate=pipe.audio_sampling_rate)
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        subprocess.run(["magihuman", "generate", clips[0].prompt, "-o", file], check=True, capture_output=True)
    return {"loaded": float(np.median(times)), "command": time.perf_counter() - started}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200, help="prompts, default: %(default)s")
    parser.add_argument("--few", type=int, default=20, help="clips of the slower measurements, default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    parser.add_argument(
        "--output", type=Path, default=BENCHMARKS / "embedded.json", help="default: benchmarks/embedded.json"
    )
    arguments = parser.parse_args()
    counts = {"clips": arguments.clips, "few": arguments.few}
    results: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.parts != PARTS else {}
    for name, count in counts.items():
        if results.get(name, count) != count:
            parser.error(
                f"--{name} is {count}, it must be {results[name]} as for the other parts in {arguments.output}"
            )

    clips = [world.make_clip(seed, held_out=True) for seed in range(arguments.clips)]
    few = clips[: arguments.few]
    with torch.enable_grad():
        reader = train_syllable_reader()
    pipes = {
        name: DiffusionPipeline.from_pretrained(embedded_model(name)) for name in ("base", "distilled", "upscale")
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    distilled = pipes["distilled"]
    results |= counts | {"threads": torch.get_num_threads()}
    sheets = {}

    def measure(part: str) -> dict[str, float]:
        if part == "drawn":
            frames, voices = [clip.frames for clip in clips], [clip.voice for clip in clips]
            return measure_clips([clip.scene for clip in clips], frames, voices, reader)
        if part == "seconds":
            return measure_seconds(distilled, few[:5])
        if part == "video_vae":
            return measure_vaes(pipes["base"].vae, distilled.vae, few)
        if part == "audio_vae":
            return measure_audio_vae(distilled.audio_vae, few, reader)
        if part == "upscale":
            large = [world.make_clip(seed, size=256, held_out=True) for seed in range(len(few))]
            values, sheets["_upscale"] = measure_upscale(pipes["upscale"], few, large)
            return values
        images = [clip.frames[0].astype(np.float32) / 255 for clip in few]
        audios = [(torch.from_numpy(clip.voice), world.SAMPLING_RATE) for clip in few]
        # A picture and a sound that the prompt contradicts: those of one clip, and the prompt of the next.
        others = few[1:] + few[:1]
        mixed = [
            replace(seen.scene, voice=heard.scene.voice, syllables=heard.scene.syllables)
            for seen, heard in zip(few, others, strict=True)
        ]
        own = [clip.scene for clip in few]
        prompts, scenes, given = {
            "image_driven": (few, own, {"image": images}),
            "audio_driven": (few, own, {"audio": audios}),
            "image_against_prompt": (others, mixed, {"image": images}),
            "audio_against_prompt": (few, mixed, {"audio": audios[1:] + audios[:1]}),
        }.get(part, (clips, [clip.scene for clip in clips], {}))
        videos, voices = generate(pipes.get(part, distilled), prompts, **given)
        if part == "distilled":
            sheets[""] = [frames[4:45:8] for frames in videos[:6]]
        return measure_clips(scenes, videos, voices, reader)

    for part in arguments.parts:
        results[part] = {key: round(value, 4) for key, value in measure(part).items()}
        print(json.dumps({part: results[part]}), flush=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    for suffix, rows in sheets.items():
        save_sheet(rows, arguments.output.with_name(f"{arguments.output.stem}{suffix}.png"))


if __name__ == "__main__":
    main()
