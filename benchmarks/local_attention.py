# SPDX-License-Identifier: Apache-2.0
"""Measure frame-local attention, float32, random weights: a whole step, a layer by frames, and ways to compute it.

    python benchmarks/local_attention.py step [--device cuda]
    python benchmarks/local_attention.py layer --latent-frames 32
    python benchmarks/local_attention.py variants
    python benchmarks/local_attention.py plot   # layer for several lengths, each in a process of its own

`step` runs a transformer of width 64 and 4 layers with the 1080p config once on the tokens of 1088x1920, 125 frames.
`layer` runs one block of it on frames of that size. `variants` compares ways to compute the same local attention on
frames of a quarter of it. The last line of stdout is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import peak_gib, print_result, timed

from diffusers_magihuman import MagiHumanTransformer3DModel
from diffusers_magihuman.transformer_magihuman import MagiHumanAttnProcessor, SequenceLayout

NEIGHBOURS, TEXT_LENGTH = 11, 640
LENGTHS = (12, 16, 32, 64, 128)


def make_transformer(device: torch.device) -> MagiHumanTransformer3DModel:
    model = MagiHumanTransformer3DModel(
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_head_dim=16,
        modality_layers=(0, 3),
        gelu_layers=(0,),
        coordinate_style="v1",
        local_attention_layers=(0, 1, 2),
        local_attention_frames=NEIGHBOURS,
    )
    return model.eval().to(device)


def run_step(device: torch.device) -> dict:
    video = torch.randn(1, 48, 32, 68, 120, device=device)
    audio, text = torch.randn(1, 125, 64, device=device), torch.randn(1, TEXT_LENGTH, 3584, device=device)
    model = make_transformer(device)
    output, seconds = timed(lambda: model(video, audio, text).sample, device)
    assert output.shape == video.shape
    return {"video_tokens": 32 * 34 * 60, "seconds": round(seconds, 1), "peak_gib": round(peak_gib(device), 2)}


def run_layer(device: torch.device, latent_frames: int) -> dict:
    model = make_transformer(device)
    block = model.transformer_blocks[1]
    layout = SequenceLayout(latent_frames, 34, 60, 4 * latent_frames - 3, TEXT_LENGTH)
    rotary_emb = model.rope(layout, None, device)
    hidden_states = torch.randn(1, sum(layout.modality_lengths), 64, device=device)
    before = peak_gib(device)
    _, seconds = timed(lambda: block(hidden_states, rotary_emb, layout, None, torch.float32), device)
    return {
        "latent_frames": latent_frames,
        "seconds": round(seconds, 2),
        "added_peak_gib": round(peak_gib(device) - before, 3),
    }


def run_variants(device: torch.device) -> dict:
    layout = SequenceLayout(32, 17, 30, 125, TEXT_LENGTH)
    num_tokens, num_video = sum(layout.modality_lengths), layout.video_length
    query, key, value = torch.randn(3, 1, num_tokens, 4, 16, device=device).unbind()
    processor = MagiHumanAttnProcessor()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def by_frame() -> torch.Tensor:
        return processor._attend_locally(query, key.clone(), value.clone(), None, layout, NEIGHBOURS)

    def masked() -> torch.Tensor:
        frame = torch.arange(num_video, device=device) // layout.frame_length
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
        mask[:num_video, :num_video] = (frame[:, None] - frame).abs() <= NEIGHBOURS
        return attend(query, key, value, mask)

    def with_copies() -> torch.Tensor:
        """As in training, where a window is a copy unless it ends at the last frame."""
        with torch.enable_grad():
            return by_frame()

    def by_batch() -> torch.Tensor:
        """The frames whose windows are full as one batch, which needs a copy of keys and values for each."""
        length = layout.frame_length
        inner = range(NEIGHBOURS, layout.num_frames - NEIGHBOURS)

        def window(states: torch.Tensor, frame: int) -> torch.Tensor:
            start, end = max(frame - NEIGHBOURS, 0), min(frame + NEIGHBOURS + 1, layout.num_frames)
            return torch.cat([states[:, start * length : end * length], states[:, num_video:]], dim=1)

        frames = query[:, :num_video].unflatten(1, (layout.num_frames, length))[0]
        keys, values = (torch.cat([window(states, frame) for frame in inner]) for states in (key, value))
        together = attend(frames[inner.start : inner.stop], keys, values)
        alone = {
            frame: attend(frames[frame : frame + 1], window(key, frame), window(value, frame))
            for frame in range(layout.num_frames)
            if frame not in inner
        }
        outputs = [alone[f] if f in alone else together[f - inner.start][None] for f in range(layout.num_frames)]
        return torch.cat([*outputs, attend(query[:, num_video:], key, value)], dim=1)

    expected = by_frame()
    result = {"tokens": num_tokens}
    for function in (by_frame, with_copies, by_batch, masked):
        runs = [timed(function, device) for _ in range(3)]
        torch.testing.assert_close(runs[0][0], expected, atol=1e-5, rtol=0)
        result[function.__name__] = round(statistics.median(seconds for _, seconds in runs), 2)
    _, result["not_local"] = timed(lambda: attend(query, key, value), device)
    result["not_local"] = round(result["not_local"], 2)
    return result


def plot() -> dict:
    import matplotlib.pyplot as plt

    rows = []
    for latent_frames in LENGTHS:
        command = [sys.executable, __file__, "layer", "--latent-frames", str(latent_frames)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    for axis, name, label in ((axes[0], "seconds", "seconds"), (axes[1], "added_peak_gib", "peak memory added, GiB")):
        axis.plot(LENGTHS, [row[name] for row in rows], "o-", color="teal")
        axis.set(xlabel="latent frames of 1088x1920", ylabel=label, xlim=0, ylim=0)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)
    return {name: [row[name] for row in rows] for name in ("latent_frames", "seconds", "added_peak_gib")}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("step", "layer", "variants", "plot"))
    parser.add_argument("--latent-frames", type=int, default=32, help="for layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    cases = {
        "step": lambda: run_step(device),
        "layer": lambda: run_layer(device, arguments.latent_frames),
        "variants": lambda: run_variants(device),
        "plot": plot,
    }
    print_result(f"local_attention {arguments.case}", device, **cases[arguments.case]())


if __name__ == "__main__":
    main()
