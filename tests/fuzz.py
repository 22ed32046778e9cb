"""Random bad arguments, damaged files of every format that is read, random command lines: what becomes of them.

    python -m pytest -m slow tests/fuzz.py -s

prints how many were `fine`, `refused` in words, `unclear`, `silent` (taken, though no value of its kind), `wrong` (not
finite), `huge` (more than a GiB wanted at once) or `hang` (more than a minute).
"""

import collections
import contextlib
import io
import json
import re
import resource
import signal
import struct
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from arguments import FUNCTIONS, bad_values
from diffusers import GGUFQuantizationConfig
from golden import load_golden_weights
from layouts import write_external_repositories
from make_tiny_pipeline import make_tiny_pipeline, make_tiny_upscale_pipeline
from safetensors.torch import save_file

from diffusers_magihuman import AutoencoderKLMagiHumanTurbo, MagiHumanTransformer3DModel, export_to_mp4, media
from diffusers_magihuman.checkpoints import load_original_transformer, load_original_turbo_vae, load_text_encoder
from diffusers_magihuman.checks import show
from diffusers_magihuman.tools.cli import main

pytestmark = pytest.mark.slow
SECONDS = {"arguments": 30, "files": 40, "commands": 25}
CLASSES = ("fine", "refused", "unclear", "silent", "wrong", "huge", "hang")


class HangError(BaseException):
    """Nothing catches it by mistake."""


@contextlib.contextmanager
def limits(seconds=60, num_bytes=2**30):
    """Ends what takes too long, and fails what wants too much memory at once."""

    def stop(*_):
        raise HangError

    status = Path("/proc/self/status").read_text()
    used = int(re.search(r"VmData:\s+(\d+)", status)[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (used + num_bytes, before[0][1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, before[0])
        signal.signal(signal.SIGALRM, before[1])


def is_finite(output):
    """Whether no tensor or array in a result holds NaN or infinity."""
    if isinstance(output, torch.Tensor):
        return output.is_meta or bool(torch.isfinite(output.float()).all())
    if isinstance(output, np.ndarray) and output.dtype.kind == "f":
        return bool(np.isfinite(output).all())
    if isinstance(output, dict):
        output = list(output.values())
    return all(is_finite(each) for each in output) if isinstance(output, list | tuple) else True


def classify(run, is_bad, names=()):
    """The class of a try, and what to say of it; `names`, if there are any, of which the error must say one."""
    try:
        with limits():
            output = run()
    except HangError:
        return "hang", "more than a minute"
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
        # ffmpeg says the same of a block above the bound that it is given.
        is_bounded = "holds no readable" in text
        if isinstance(error, MemoryError) or ("allocate memory" in text and not is_bounded):
            return "huge", text
        is_clear = isinstance(error, ValueError | OSError) and len(text) < 2000
        return "refused" if is_clear and (not names or any(name in text for name in names)) else "unclear", text
    except Exception as error:
        return "unclear", f"{type(error).__name__}: {error}"
    if not is_finite(output):
        return "wrong", "not finite"
    return ("silent", "taken") if is_bad else ("fine", "")


def report(kind, tries):
    """Prints the counts and what is not as it should be; fails beyond what is allowed."""
    counts = collections.Counter(name for name, _, _ in tries)
    print(f"\n{kind}: {len(tries)} tries,", ", ".join(f"{counts[name]} {name}" for name in CLASSES))
    odd = {(name, what): text for name, what, text in tries if name not in ("fine", "refused")}
    for (name, what), text in sorted(odd.items()):
        print(f"  {name}: {what}: {text[:200]!r}")
    bad = len(tries) - counts["fine"]
    assert len(tries) > 50 and not counts["wrong"] + counts["huge"] + counts["hang"]
    assert counts["silent"] <= 0.02 * bad and counts["unclear"] <= 0.08 * bad


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# Arguments


def random_value(random, kind, good):
    """Something that is no value of the kind, seldom one that only looks odd."""
    values = bad_values(kind, good)
    value = values[random.integers(len(values))]
    return [value, value] if random.random() < 0.05 and kind not in ("layers", "names") else value


def test_arguments():
    random, tries = np.random.default_rng(0), []
    cases = [(name, argument) for name, (_, _, kinds) in FUNCTIONS.items() for argument in kinds]
    end = time.monotonic() + SECONDS["arguments"]
    while time.monotonic() < end:
        name, argument = cases[random.integers(len(cases))]
        function, good, kinds = FUNCTIONS[name]
        changed = {argument: random_value(random, kinds[argument], good.get(argument))}
        if random.random() < 0.3:  # a second one
            other = [*kinds][random.integers(len(kinds))]
            changed[other] = random_value(random, kinds[other], good.get(other))
        result = classify(lambda: function(**good | changed), True, [*changed])  # noqa: B023
        tries.append((result[0], f"{name}, {', '.join(f'{x}={show(y):.50}' for x, y in changed.items())}", result[1]))
    report("arguments", tries)


# Files


def write_images(folder):
    picture = np.random.default_rng(0).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    for suffix in ("png", "gif", "webp", "tiff", "bmp"):
        PIL.Image.fromarray(picture[..., :3]).save(folder / f"rgb.{suffix}")
        yield folder / f"rgb.{suffix}", media.load_images
    PIL.Image.fromarray(picture[..., :3]).save(folder / "rgb.jpg")
    PIL.Image.fromarray(picture).save(folder / "rgba.png")
    PIL.Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(folder / "grey.png")
    for name in ("rgb.jpg", "rgba.png", "grey.png"):
        yield folder / name, media.load_images


def write_media(folder):
    tone = np.sin(np.arange(9000) / 9).astype(np.float32) * 0.5
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff"):
        soundfile.write(folder / f"tone.{suffix}", tone, 44100)
        yield folder / f"tone.{suffix}", lambda path: media.load_audio(path, 16000)
    path = folder / "clip.mp4"
    export_to_mp4(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8), path, tone)
    for read in (media.read_video, media.read_audio, media.has_audio):
        yield path, read


def write_gguf(weights, path):
    """The format by hand: a header, names and shapes, then float32 data at multiples of 32 bytes."""
    infos, data = b"", b""
    for name, tensor in weights.items():
        data += bytes(-len(data) % 32)
        shape = tensor.shape[::-1]
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}QIQ", *shape, 0, len(data))
        data += tensor.float().numpy().tobytes()
    text = b"general.architecture"
    key = struct.pack("<Q", len(text)) + text + struct.pack("<IQ", 8, 4) + b"magi"
    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), 1) + key + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def write_checkpoints(folder):
    weights = load_golden_weights("dit_base")
    save_file(weights, folder / "distill.safetensors")
    yield folder / "distill.safetensors", load_original_transformer
    yield folder / "distill.safetensors", MagiHumanTransformer3DModel.from_single_file
    pipe = make_tiny_pipeline(is_distilled=True)
    write_external_repositories(folder)
    for path in sorted((folder / "GAIR" / "daVinci-MagiHuman" / "turbo_vae").iterdir()):
        yield path, lambda path: load_original_turbo_vae(path.parent) and None
    for path in sorted((folder / "google" / "t5gemma-9b-9b-ul2").iterdir()):
        yield path, lambda path: load_text_encoder(path.parent) and None
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="200KB")
    for path in sorted((folder / "transformer").iterdir()):
        yield path, lambda path: MagiHumanTransformer3DModel.from_pretrained(path.parent) and None
    pipe.vae.save_pretrained(folder / "vae")
    yield folder / "vae/config.json", lambda path: AutoencoderKLMagiHumanTurbo.from_pretrained(path.parent) and None
    pipe.scheduler.save_pretrained(folder / "scheduler")
    yield folder / "scheduler/scheduler_config.json", lambda path: type(pipe.scheduler).from_pretrained(path.parent)
    name, linear = next(
        (n, m) for n, m in pipe.transformer.named_modules() if n.endswith("to_q") and hasattr(m, "in_features")
    )
    low = {"lora_A": torch.ones(4, linear.in_features), "lora_B": torch.ones(linear.out_features, 4)}
    save_file({f"transformer.{name}.{kind}.weight": value for kind, value in low.items()}, folder / "lora.safetensors")

    def load_lora(path):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(str(path))

    yield folder / "lora.safetensors", load_lora
    ours = dict(pipe.transformer.state_dict())
    write_gguf(ours, folder / "distill.gguf")
    options = {"config": str(folder / "transformer"), "quantization_config": GGUFQuantizationConfig(torch.float32)}
    yield (
        folder / "distill.gguf",
        lambda path: MagiHumanTransformer3DModel.from_single_file(str(path), **options) and None,
    )


def mutate(random, data):
    """A damaged copy: cut, holes, other bytes, large numbers, mostly near the beginning where headers are."""
    data = bytearray(data)
    near = min(len(data), int(10 ** random.uniform(1, 5)))
    kind = random.integers(6)
    if kind == 0:
        return bytes(data[: random.integers(len(data))])
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(max(near - 8, 1)))
        if kind == 1:
            data[place : place + 8] = struct.pack("<Q", int(2.0 ** random.uniform(8, 63)))[: len(data) - place]
        elif kind == 2:
            data[place] ^= 1 << int(random.integers(8))
        elif kind == 3:
            data[place : place + int(random.integers(1, 64))] = b""
        elif kind == 4:
            data[place:place] = bytes(random.integers(0, 256, int(random.integers(1, 64)), dtype=np.uint8))
        else:
            digits = [index for index in range(near) if 48 <= data[index] <= 57]
            if digits:
                data[digits[random.integers(len(digits))]] = random.choice(
                    [b"-9", b"9999999999", b'"8"', b"0", b"[]"]
                )[0]
    return bytes(data)


def mutate_json(random, data):
    """A value of a JSON file replaced by another, any key or item at any depth."""
    content = json.loads(data)
    holder = content
    while isinstance(holder, dict | list) and holder:
        key = (
            list(holder)[random.integers(len(holder))]
            if isinstance(holder, dict)
            else int(random.integers(len(holder)))
        )
        if not isinstance(holder[key], dict | list) or not holder[key] or random.random() < 0.3:
            odd = [None, True, -1, 0, 10**9, 1e300, "8", "", [], {}, [[]], "nonsense", [1, "a"], 0.5]
            holder[key] = odd[random.integers(len(odd))]
            break
        holder = holder[key]
    return json.dumps(content).encode()


def test_files(tmp_path):
    random, tries = np.random.default_rng(0), []
    files = [*write_images(tmp_path), *write_media(tmp_path), *write_checkpoints(tmp_path)]
    whole = {path: path.read_bytes() for path, _ in files}
    for path, read in files:
        assert classify(lambda: read(path), False)[0] == "fine", path  # noqa: B023
    end = time.monotonic() + SECONDS["files"]
    while time.monotonic() < end:
        path, read = files[random.integers(len(files))]
        is_json = path.suffix == ".json" and random.random() < 0.7
        path.write_bytes((mutate_json if is_json else mutate)(random, whole[path]))
        result = classify(lambda: read(path), False)  # noqa: B023
        tries.append((result[0], f"{path.relative_to(tmp_path)} by {getattr(read, '__name__', read)}", result[1]))
        path.write_bytes(whole[path])
    report("files", tries)


# Command lines


def test_commands(tmp_path):
    random, tries = np.random.default_rng(0), []
    small = {"default_height": 64, "default_width": 64, "default_num_frames": 5}
    make_tiny_pipeline(is_distilled=True, **small).save_pretrained(tmp_path / "base")
    make_tiny_upscale_pipeline(96, 96).save_pretrained(tmp_path / "up")
    export_to_mp4(np.zeros((5, 64, 64, 3), np.uint8), tmp_path / "clip.mp4")
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "picture.png")
    soundfile.write(tmp_path / "tone.wav", np.zeros(9000, np.float32), 44100)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty").mkdir()
    names = [
        "base",
        "up",
        "clip.mp4",
        "picture.png",
        "tone.wav",
        "text.txt",
        "folder.mp4",
        "empty",
        "nowhere",
        "/no/such",
    ]
    odd = [
        "",
        "-1",
        "0",
        "nan",
        "inf",
        "1e9",
        "1e300",
        "9" * 5000,
        "abc",
        "\udcff",
        "cuda",
        "cuda:7",
        "mps",
        "meta",
        "a\nb",
    ]
    words = [*names, *odd, "cpu", "float16", "float32", "1", "32", "64", "out.mp4", "no/such/out.mp4", "base.mp4"]
    words += ["auto", "leaf", "int8", "float8", "native", "_native_cudnn", "sage"]
    flags = {
        "generate": "model image audio seconds num-frames height width steps upscale upscale-height output seed device"
        " dtype offload quantize attention",
        "upscale": "model image audio height width steps output seed device dtype offload quantize attention",
        "convert": "variant subfolder dtype quantize feed-forward-multiple max-shard-size with-text-encoder turbo-vae"
        " push-to-hub",
        "plan": "vram model upscale height width num-frames dtype quantize attention",
        "card": "output",
    }
    right = {
        "generate": ["A", "--model", "base", "--steps", "1"],
        "upscale": ["clip.mp4", "A b", "--model", "up", "--steps", "1"],
        "convert": ["base", "new"],
        "plan": ["--vram", "24", "--model", "base"],
        "card": ["base"],
    }
    end = time.monotonic() + SECONDS["commands"]
    while time.monotonic() < end:
        command = [*flags][random.integers(len(flags))]
        argv = [command, *right[command]]
        if random.random() < 0.3:
            argv[random.integers(1, len(argv))] = words[random.integers(len(words))]
        for _ in range(random.integers(1, 4)):
            options = flags[command].split()
            argv += [f"--{options[random.integers(len(options))]}", words[random.integers(len(words))]]
        status, error, out = None, io.StringIO(), io.StringIO()

        def run():
            nonlocal status
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):  # noqa: B023
                try:
                    status = main(argv)  # noqa: B023
                except SystemExit as ended:
                    status = ended.code

        kind, text = classify(run, False)
        lines = [line for line in error.getvalue().splitlines() if line.startswith("magihuman")]
        if kind == "fine" and status != 0:
            text = error.getvalue()
            is_clear = status == 2 and "Traceback" not in text and lines and len(lines[-1]) < 1000
            kind = "refused" if is_clear and not leaks_class(lines[-1]) else "unclear"
        tries.append((kind, " ".join(f"{word!r:.40}" for word in argv), text))
        assert not list(tmp_path.glob(".*.incomplete")), argv
    report("commands", tries)


def leaks_class(line):
    """Whether a line is what a library said to a programmer."""
    return any(name in line for name in ("object has no attribute", "Traceback", "unhashable", "not subscriptable"))
