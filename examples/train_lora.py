# SPDX-License-Identifier: Apache-2.0
"""Trains a LoRA of the transformer on a folder of videos with audio and captions.

    python examples/train_lora.py --data clips --output lora
    python examples/train_lora.py --data clips --output lora --model owner/magihuman-base --mixed-precision bf16 \\
        --gradient-checkpointing

- `clips/a.mp4`, at 25 frames a second and with audio, has its caption in `clips/a.txt`, or in a line
  `{"file_name": "a.mp4", "text": "..."}` of `clips/metadata.jsonl`
- each clip is encoded once; later runs of the same model, size and length read it from the cache
- the frozen weights may be bfloat16, the LoRA is float32; `accelerate launch` trains on several GPUs
- a step draws all its randomness from the seed and its number: run the same command again to go on where a run was
  stopped, or with more `--steps` to train longer, and the weights are those of a run that never stopped
- `lora/log.jsonl` has a line for each step, and `pipe.load_lora_weights("lora")` loads the result

Without `--model` it trains the tiny model of the package, which a laptop can, and without `--data` on two clips of it.
"""

import argparse
import hashlib
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from diffusers_magihuman import (
    MagiHumanAudioVideoPipeline,
    MagiHumanTransformer3DModel,
    embedded_model,
    export_to_mp4,
    load_audio,
)
from diffusers_magihuman.checks import check_integer, check_real
from diffusers_magihuman.files import move_into_place, unfinished_folder
from diffusers_magihuman.media import crop_to_aspect, read_video, read_video_header
from diffusers_magihuman.pipeline_base import DEFAULT_NEGATIVE_PROMPT
from diffusers_magihuman.tools.cli import run_command
from diffusers_magihuman.tools.plan import load_index
from diffusers_magihuman.training import drop_text, flow_matching_loss, sample_noise_levels

FRAME_RATE = 25
Clip = dict[str, torch.Tensor]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of videos and captions, default: two clips of the tiny model, 10 steps")
    add("--output", type=Path, default="lora", help="of the LoRA, the log and the state to go on from, default: lora")
    add("--cache", type=Path, help="folder of encoded clips, which several runs may share, default: cache in --output")
    add("--model", help="directory or repository of a pipeline, default: the tiny one of the package")
    add("--height", type=int, help="pixels, which clips are cropped to, default: that of the model")
    add("--width", type=int, help="likewise")
    add("--num-frames", type=int, help="frames that each clip begins with, default: that of the model")
    add("--steps", type=int, help="in all, default: 500")
    add("--batch-size", type=int, default=1, help="on each GPU, default: %(default)s")
    add("--learning-rate", type=float, default=1e-4, help="default: %(default)s")
    add("--rank", type=int, default=16, help="also the alpha, default: %(default)s")
    add(
        "--target-modules",
        nargs="+",
        default=["to_q", "to_k", "to_v", "to_out"],
        help="names of linears, those of one modality as audio.to_q, default: to_q to_k to_v to_out",
    )
    add("--weighting", choices=("logit_normal", "uniform"), default="logit_normal", help="default: %(default)s")
    add("--shift", type=float, default=5.0, help="of the noise levels, default: %(default)s")
    add("--text-dropout", type=float, default=0.1, help="how often the text is the negative prompt, default: 0.1")
    add("--image-probability", type=float, default=0.25, help="how often the first frame is given, default: 0.25")
    add("--audio-probability", type=float, default=0.1, help="how often the audio is given, default: 0.1")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--save-every", type=int, default=100, help="steps, default: %(default)s")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="dtype of the frozen weights, default: no")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    arguments = parser.parse_args(arguments)
    if arguments.steps is None:
        arguments.steps = 10 if arguments.data is None else 500
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("height", "width", "num_frames", "steps", "batch_size", "rank", "save_every"):
        if getattr(arguments, name) is not None:
            check_integer(name, getattr(arguments, name))
    check_integer("seed", arguments.seed, 0, 2**63 - 1)
    check_real("learning_rate", arguments.learning_rate, 1e-12, 1e3)
    check_real("shift", arguments.shift, 1e-3, 1e3)
    for name in ("text_dropout", "image_probability", "audio_probability"):
        check_real(name, getattr(arguments, name), 0, 1)


# 1. Data


def make_clips(folder: Path) -> Path:
    """Writes two clips of the tiny model with their captions, to try the training on."""
    pipe = DiffusionPipeline.from_pretrained(embedded_model())
    folder.mkdir(parents=True, exist_ok=True)
    for seed, colour in enumerate(("red", "green")):
        caption = f'A speaker with pale skin, in a {colour} shirt. The speaker says: "hello, thank you".'
        clip = pipe(caption, generator=torch.manual_seed(seed))
        export_to_mp4(clip.frames[0], folder / f"{colour}.mp4", clip.audio[0])
        (folder / f"{colour}.txt").write_text(caption)
    return folder


def read_captions(folder: Path) -> dict[Path, str]:
    """
    Finds the clips of a folder.

    Returns:
        `dict[Path, str]`: Their captions, in the order of their names.

    Raises:
        `OSError`: The folder or a clip is missing, or unreadable.
        `ValueError`: There is no clip; or one has no caption, no audio, or another frame rate.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`data` is {str(folder)!r}, but there is no such folder.")
    captions = {path: path.with_suffix(".txt") for path in sorted(folder.glob("*.mp4"))}
    captions = {path: text.read_text(encoding="utf-8") if text.is_file() else "" for path, text in captions.items()}
    table = folder / "metadata.jsonl"
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines() if table.is_file() else [], 1):
        try:
            entry = json.loads(line)
            captions[folder / entry["file_name"]] = entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(table)!r}, line {number}, must have `file_name` and `text`: {line!r}.") from error
    if not captions:
        raise ValueError(f"`data` is {str(folder)!r}, which holds no .mp4 file.")
    if silent := [path.name for path, caption in captions.items() if not caption.strip()]:
        raise ValueError(f"`data` has clips without a caption in a .txt file or in metadata.jsonl: {silent}.")
    for path in captions:
        if not path.is_file():
            raise FileNotFoundError(f"{str(table)!r} names {path.name!r}, but there is no such file.")
        try:
            facts = read_video_header(path)
        except OSError as error:
            raise OSError(f"{str(path)!r} holds no readable video.") from error
        if facts["fps"] != FRAME_RATE or "audio_codec" not in facts:
            audio = "audio" if "audio_codec" in facts else "no audio"
            raise ValueError(
                f"{str(path)!r} has {facts['fps']:g} frames a second and {audio}; {FRAME_RATE} and audio are needed."
            )
    return dict(sorted(captions.items()))


def load_clips(
    arguments: argparse.Namespace, captions: dict[Path, str], device: torch.device
) -> tuple[list[Clip], torch.Tensor]:
    """
    Encodes the clips that the cache lacks, and reads all of them from it.

    Returns:
        `tuple[list[dict[str, torch.Tensor]], torch.Tensor]`: Of each clip normalised `latents` `(channels,
        latent_frames, latent_height, latent_width)`, `audio_latents` `(num_frames, channels)` and `prompt_embeds`
        `(length, channels)`; embeddings of the negative prompt.

    Raises:
        `ValueError`: A clip is shorter than `num_frames`, or the size does not fit the model.
    """
    cache = arguments.cache or arguments.output / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    settings = [arguments.model, arguments.height, arguments.width, arguments.num_frames, arguments.seed]

    def file_of(*key: str | int) -> Path:
        return cache / f"{hashlib.sha256(json.dumps([*settings, *key]).encode()).hexdigest()[:32]}.safetensors"

    negative = file_of(DEFAULT_NEGATIVE_PROMPT)
    files = {
        path: file_of(path.name, path.stat().st_size, path.stat().st_mtime_ns, caption)
        for path, caption in captions.items()
    }
    missing = [path for path, file in files.items() if not file.is_file()]
    if missing or not negative.is_file():
        pipe = DiffusionPipeline.from_pretrained(arguments.model, transformer=None, dtype=torch.float32).to(device)
        multiple = 2 * pipe.vae_scale_factor_spatial
        for name in ("height", "width"):
            if getattr(arguments, name) % multiple:
                raise ValueError(f"`{name}`={getattr(arguments, name)} must be a multiple of {multiple}.")
        write_file(negative, {"prompt_embeds": encode_text(pipe, DEFAULT_NEGATIVE_PROMPT)})
        for path in missing:
            write_file(files[path], encode_clip(pipe, path, captions[path], arguments))
    return [load_file(file) for file in files.values()], load_file(negative)["prompt_embeds"]


def write_file(path: Path, tensors: Clip) -> None:
    with unfinished_folder(path) as folder:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / path.name)
        move_into_place(folder / path.name, path)


@torch.no_grad()
def encode_text(pipe: MagiHumanAudioVideoPipeline, text: str) -> torch.Tensor:
    """Embeddings in float16, to which the pipeline rounds them."""
    return pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0].half()


@torch.no_grad()
def encode_clip(pipe: MagiHumanAudioVideoPipeline, path: Path, caption: str, arguments: argparse.Namespace) -> Clip:
    height, width, num_frames, device = arguments.height, arguments.width, arguments.num_frames, pipe.device
    frames, _ = read_video(path, num_frames)
    if len(frames) < num_frames:
        raise ValueError(f"{str(path)!r} has {len(frames)} frames, fewer than `num_frames`={num_frames}.")
    # The autoencoder takes 4 k + 1 frames; a pipeline makes as many, to sound of `num_frames`.
    ratio = pipe.vae_scale_factor_temporal
    images = [PIL.Image.fromarray(frame) for frame in frames[: (num_frames - 1) // ratio * ratio + 1]]
    images = [crop_to_aspect(image, height, width) for image in images]
    pixels = torch.cat([pipe.video_processor.preprocess(image, height, width) for image in images])
    waveform = load_audio(path, pipe.audio_vae_sampling_rate)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    return {
        "latents": pipe.encode_video(pixels.movedim(1, 0)[None], device)[0],
        "audio_latents": pipe.encode_audio(waveform, generator, device, num_frames)[0],
        "prompt_embeds": encode_text(pipe, caption),
    }


def draw_batch(
    clips: list[Clip],
    negative_embeds: torch.Tensor,
    arguments: argparse.Namespace,
    rng: np.random.Generator,
    device: torch.device,
) -> dict[str, torch.Tensor | None]:
    """Draws clips, and which of them have the negative prompt; no mask where all texts are of one length."""
    drawn = [clips[index] for index in rng.integers(len(clips), size=arguments.batch_size)]
    texts = [clip["prompt_embeds"].float() for clip in drawn]
    lengths = torch.tensor([len(text) for text in texts])
    embeds, mask = drop_text(
        pad_sequence(texts, batch_first=True),
        torch.arange(int(lengths.max())) < lengths[:, None],
        negative_embeds[None].float(),
        arguments.text_dropout,
    )
    kept = mask.any(dim=0)
    return {
        "latents": torch.stack([clip["latents"] for clip in drawn]).to(device),
        "audio_latents": torch.stack([clip["audio_latents"] for clip in drawn]).to(device),
        "prompt_embeds": embeds[:, kept].to(device),
        "prompt_embeds_mask": None if mask[:, kept].all() else mask[:, kept].to(device),
    }


# 2. Training


def train(
    arguments: argparse.Namespace,
    accelerator: Accelerator,
    transformer: MagiHumanTransformer3DModel,
    clips: list[Clip],
    negative_embeds: torch.Tensor,
) -> None:
    """Adds a LoRA to the transformer, trains it from the state of an earlier run on, and saves it."""
    transformer.requires_grad_(False)
    torch.manual_seed(arguments.seed)
    transformer.add_adapter(
        LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=arguments.target_modules)
    )
    cast_training_params(transformer, torch.float32)
    if arguments.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, arguments.learning_rate)
    start = load_state(arguments, transformer, optimizer)
    model, optimizer = accelerator.prepare(transformer.train(), optimizer)

    for step in range(start + 1, arguments.steps + 1):
        rng = np.random.default_rng([arguments.seed, step, accelerator.process_index])
        torch.manual_seed(int(rng.integers(2**63)))
        loss = flow_matching_loss(
            model,
            **draw_batch(clips, negative_embeds, arguments, rng, accelerator.device),
            noise_levels=sample_noise_levels(
                arguments.batch_size, arguments.weighting, arguments.shift, device=accelerator.device
            ),
            image_probability=arguments.image_probability,
            audio_probability=arguments.audio_probability,
        )
        accelerator.backward(loss.loss)
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

        numbers = {"loss": loss.loss, "video_loss": loss.video_loss, "audio_loss": loss.audio_loss, "grad_norm": norm}
        means = {name: accelerator.reduce(value.detach(), "mean").item() for name, value in numbers.items()}
        if accelerator.is_main_process:
            line = json.dumps({"step": step, **{name: round(value, 6) for name, value in means.items()}})
            print(line, flush=True)
            with (arguments.output / "log.jsonl").open("a") as file:
                file.write(line + "\n")
            if step % arguments.save_every == 0 or step == arguments.steps:
                save_state(arguments, transformer, optimizer, step)
    accelerator.wait_for_everyone()


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What a run must have in common with the one that it goes on from."""
    others = ("output", "cache", "steps", "save_every", "gradient_checkpointing")
    return {name: str(value) for name, value in vars(arguments).items() if name not in others}


def load_state(
    arguments: argparse.Namespace, transformer: MagiHumanTransformer3DModel, optimizer: torch.optim.Optimizer
) -> int:
    """
    Puts the LoRA and its optimiser where the last state has them, and cuts what came later from the log.

    Returns:
        `int`: Steps that are done.

    Raises:
        `ValueError`: The earlier run had other settings.
    """
    log, path = arguments.output / "log.jsonl", arguments.output / "state.pt"
    lines = log.read_text().splitlines() if log.is_file() else []
    if not path.is_file():
        log.unlink(missing_ok=True)
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise OSError(f"{str(path)!r} is damaged, remove it to train from the start: {error}") from error
    wanted = settings_of(arguments)
    changed = [
        f"`{name}`={wanted[name]} was {value}" for name, value in state["settings"].items() if wanted[name] != value
    ]
    if changed:
        raise ValueError(f"{str(path)!r} is of a run with other settings: {', '.join(changed)}. Use another `output`.")
    set_peft_model_state_dict(transformer, state["lora"])
    optimizer.load_state_dict(state["optimizer"])
    with unfinished_folder(log) as folder:
        (folder / log.name).write_text("".join(f"{line}\n" for line in lines[: state["step"]]))
        move_into_place(folder / log.name, log)
    return state["step"]


def save_state(
    arguments: argparse.Namespace,
    transformer: MagiHumanTransformer3DModel,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """Saves the LoRA, and what going on needs; each file is whole at any time."""
    output, lora = arguments.output, get_peft_model_state_dict(transformer)
    config = transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # a set, which has another order in each run
    state = {"step": step, "lora": lora, "optimizer": optimizer.state_dict(), "settings": settings_of(arguments)}
    with unfinished_folder(output / "state.pt") as folder:
        MagiHumanAudioVideoPipeline.save_lora_weights(folder / "lora", lora, transformer_lora_adapter_metadata=config)
        sort_metadata(next((folder / "lora").iterdir()))
        torch.save(state, folder / "state.pt")
        for file in (*(folder / "lora").iterdir(), folder / "state.pt"):
            move_into_place(file, output / file.name)


def sort_metadata(path: Path) -> None:
    """Orders the metadata of a safetensors file, which it writes in another order each time."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def main() -> None:
    arguments = parse_arguments()
    captions = read_captions(arguments.data or make_clips(arguments.output / "clips"))
    arguments.model = arguments.model or embedded_model("base")
    index = load_index(arguments.model, [MagiHumanAudioVideoPipeline], "--model")
    for name in ("height", "width", "num_frames"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, index[f"default_{name}"])
    arguments.output.mkdir(parents=True, exist_ok=True)

    accelerator = Accelerator()
    with accelerator.main_process_first():
        clips, negative_embeds = load_clips(arguments, captions, accelerator.device)
    dtype = torch.bfloat16 if arguments.mixed_precision == "bf16" else torch.float32
    transformer = MagiHumanTransformer3DModel.from_pretrained(arguments.model, subfolder="transformer", dtype=dtype)
    train(arguments, accelerator, transformer, clips, negative_embeds)


if __name__ == "__main__":
    sys.exit(run_command("train_lora.py", main))
