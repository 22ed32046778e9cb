"""Media: every file is made in the test and read back with ffmpeg; resampling is held to golden tensors exactly."""

import json
import os
import re
import weakref
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest
import scipy
import soundfile
import torch
from golden import DATA
from helpers import peak_frequency, read_frames, read_header, read_sound, run_ffmpeg
from safetensors.torch import load_file

from diffusers_magihuman.media import (
    AAC_SAMPLING_RATES,
    crop_to_aspect,
    export_to_mp4,
    has_audio,
    load_audio,
    load_videos,
    read_video,
    resample_audio,
)

NUM_FRAMES, HEIGHT, WIDTH = 13, 62, 98  # even, but no multiples of 16


def make_frames(num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH):
    """A smooth gradient that grows brighter from frame to frame: float32 (num_frames, height, width, 3)."""
    time, y, x = np.meshgrid(*(np.linspace(0, 1, size) for size in (num_frames, height, width)), indexing="ij")
    return np.stack([x, y, 0.2 + 0.6 * time], axis=-1).astype(np.float32)


def make_sine(frequency=440.0, seconds=1.0, rate=44100):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    stereo = np.stack([make_sine(440.0, 0.52), make_sine(1000.0, 0.52)])
    return export_to_mp4(make_frames(), tmp_path_factory.mktemp("media") / "video.mp4", stereo)


# Resampling


@pytest.mark.parametrize("name", ["wave", "wave_odd"])
def test_resample_audio_equals_the_original(name):
    tensors, lengths = load_file(DATA / "resample.safetensors"), json.loads((DATA / "resample.json").read_text())
    expected = tensors[f"out.{name}"]
    assert len(expected) in lengths["out_lengths"]
    resampled = resample_audio(tensors[f"in.{name}"].T, len(expected))
    assert resampled.dtype == torch.float32
    # The original's values are those of SciPy 1.16 and later; before, its float32 arithmetic was in another order.
    tolerance = 0.0 if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 16) else 1e-6
    torch.testing.assert_close(resampled, expected.T, atol=tolerance, rtol=0)
    assert torch.equal(resample_audio(tensors[f"in.{name}"].T[None], len(expected))[0], resampled)


# Writing


def test_streams(mp4):
    header = read_header(mp4)
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709.*, 98x62.*, 25 fps", header), header
    assert re.search(r"Audio: aac .*, 44100 Hz, stereo", header), header
    assert imageio_ffmpeg.count_frames_and_secs(mp4) == (NUM_FRAMES, NUM_FRAMES / 25)


def test_index_comes_first(mp4):
    """A browser can start before it has the whole file."""
    content = Path(mp4).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_colours_and_order_survive(mp4):
    error = read_frames(mp4, HEIGHT, WIDTH).astype(np.float32) - make_frames() * 255
    assert np.abs(error).mean() < 2
    assert np.abs(error.mean(axis=(1, 2))).max() < 2  # of each frame and channel


def test_sound_survives(mp4):
    left, right = read_sound(mp4).T
    assert peak_frequency(left, 44100) == pytest.approx(440, abs=2)
    assert peak_frequency(right, 44100) == pytest.approx(1000, abs=2)
    middle, expected = slice(4096, -4096), make_sine(440.0, 0.52)
    agreement = {shift: left[middle] @ np.roll(expected, shift)[middle] for shift in range(-45, 46)}
    assert max(agreement, key=agreement.get) == 0  # in samples: a period is 100
    assert agreement[0] == pytest.approx(np.square(expected[middle]).sum(), rel=0.01)


@pytest.mark.parametrize("fps", [25, 29.97, Fraction(24000, 1001)])
@pytest.mark.parametrize("seconds", [0.1, 5.0])
def test_sound_and_picture_end_together(tmp_path, fps, seconds):
    path = export_to_mp4(make_frames(), tmp_path / "video.mp4", make_sine(seconds=seconds), fps=fps)
    num_frames, duration = imageio_ffmpeg.count_frames_and_secs(path)
    sound = read_sound(path)
    assert num_frames == NUM_FRAMES and duration == pytest.approx(NUM_FRAMES / fps, abs=0.006)
    assert len(sound) == round(NUM_FRAMES * 44100 / fps)
    assert (np.abs(sound[-2048:]).max() < 1e-3) == (seconds < NUM_FRAMES / fps)  # padded with silence, or cut


def test_mono_is_written_to_both_channels(tmp_path):
    path = export_to_mp4(make_frames(), tmp_path / "video.mp4", torch.from_numpy(make_sine()))
    left, right = read_sound(path).T
    assert np.allclose(left, right, atol=1e-4)
    assert peak_frequency(left, 44100) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("sampling_rate", [AAC_SAMPLING_RATES[0], AAC_SAMPLING_RATES[-1]])
def test_other_sampling_rates(tmp_path, sampling_rate):
    sine = make_sine(rate=sampling_rate)
    path = export_to_mp4(make_frames(2), tmp_path / "video.mp4", sine, fps=2, sampling_rate=sampling_rate)
    assert f"{sampling_rate} Hz, stereo" in read_header(path)
    assert len(read_sound(path)) == sampling_rate


def test_every_kind_of_frames_gives_the_same_bytes(tmp_path):
    """Floats are truncated: they equal the uint8 frames that `astype` gives."""
    floats = make_frames()
    integers = (floats * 255).astype(np.uint8)
    assert not np.array_equal(integers, (floats * 255).round())
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    kinds = {
        "floats": floats,
        "float64": floats.astype(np.float64),
        "integers": integers,
        "images": [PIL.Image.fromarray(frame) for frame in integers],
        "tensor": tensor,
        "tensor with gradient": tensor.clone().requires_grad_(),
        "list of tensors": list(tensor),
        "generator": (frame for frame in floats),
    }
    files = {
        name: Path(export_to_mp4(frames, tmp_path / f"{name}.mp4")).read_bytes() for name, frames in kinds.items()
    }
    assert len(set(files.values())) == 1
    assert "Audio" not in read_header(tmp_path / "floats.mp4")
    assert imageio_ffmpeg.count_frames_and_secs(tmp_path / "floats.mp4") == (NUM_FRAMES, NUM_FRAMES / 25)


def test_half_precision_and_range(tmp_path):
    wide = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0]).view(5, 1, 1, 1).expand(5, 3, 16, 16)
    expected = np.array([0, 0, 127, 255, 255], np.uint8).reshape(5, 1, 1, 1) + np.zeros((1, 16, 16, 3), np.uint8)
    reference = Path(export_to_mp4(expected, tmp_path / "expected.mp4")).read_bytes()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Path(export_to_mp4(wide.to(dtype), tmp_path / "video.mp4")).read_bytes() == reference


def test_same_input_gives_the_same_bytes(tmp_path, mp4):
    stereo = np.stack([make_sine(440.0, 0.52), make_sine(1000.0, 0.52)])
    other = export_to_mp4(make_frames(), tmp_path / "another name.mp4", stereo)
    assert Path(other).read_bytes() == Path(mp4).read_bytes()


def test_frames_are_consumed_lazily(tmp_path):
    alive = []

    def generate():
        for _ in range(NUM_FRAMES):
            frame = np.zeros((64, 64, 3), np.uint8)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(reference() is not None for reference in alive) <= 2  # the first and the latest

    export_to_mp4(generate(), tmp_path / "video.mp4")
    assert len(alive) == NUM_FRAMES


def test_names_and_silence(tmp_path, monkeypatch, capfd):
    """Relative paths, spaces, ffmpeg's own special characters; the given path comes back; nothing on the terminal."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("-a:b %03d")
    for path in ("video.MP4", "-a:b %03d/-c:d é.mp4"):
        assert export_to_mp4(make_frames(2), path, make_sine()) == path
        assert load_audio(path, 44100).shape == (2, 3528)
    assert sorted(os.listdir()) == ["-a:b %03d", "video.MP4"]
    assert capfd.readouterr() == ("", "")


# Refusing, and what a failure leaves


@pytest.mark.parametrize(
    "frames, name",
    [
        ([], "frames"),
        (np.zeros((2, 7, 8, 3)), r"frames\[0\]"),
        (torch.zeros(2, 3, 8, 9), r"frames\[0\]"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 6, 3))], r"frames\[1\]"),
        (np.full((2, 8, 8, 3), np.nan), r"frames\[0\]` holds NaN"),
        (torch.full((2, 3, 8, 8), torch.nan), r"frames\[0\]` holds NaN"),
        (np.zeros((2, 8, 8, 3), np.int64), r"frames\[0\]"),
        (np.zeros((2, 3, 8, 8)), r"frames\[0\]"),
        (torch.zeros(2, 8, 8, 3), r"frames\[0\]"),
        ([PIL.Image.new("L", (8, 8))], r"frames\[0\]"),
        ([[PIL.Image.new("RGB", (8, 8))]], r"frames\[0\]"),
    ],
)
def test_bad_frames(tmp_path, frames, name):
    with pytest.raises(ValueError, match=f"`{name}"):
        export_to_mp4(frames, tmp_path / "video.mp4")
    assert not os.listdir(tmp_path)


BAD_AUDIO = [
    np.zeros((1, 2, 9)),
    np.zeros(()),
    torch.zeros(2, 0),
    np.zeros((9, 2)),  # samples before channels
    np.zeros(9, np.int32),
    np.array([0.0, np.nan]),
    torch.tensor([0.0, -torch.inf]),
]


@pytest.mark.parametrize(
    "arguments",
    [
        {"fps": 0},
        {"fps": float("nan")},
        {"fps": float("inf")},
        *({"audio": audio} for audio in BAD_AUDIO),
        {"audio": np.zeros((3, 9))},
        {"audio": np.zeros(9, np.int16)},
        {"sampling_rate": 51200, "audio": np.zeros(9)},
    ],
)
def test_bad_arguments(tmp_path, arguments):
    frames = iter(make_frames(2))
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        export_to_mp4(frames, tmp_path / "video.mp4", **arguments)
    assert len(list(frames)) == 2  # refused before any work
    assert not os.listdir(tmp_path)


def test_bad_paths(tmp_path):
    frames = iter(make_frames(2))
    with pytest.raises(ValueError, match=r"`path` is '.*video.webm'"):
        export_to_mp4(frames, tmp_path / "video.webm")
    with pytest.raises(FileNotFoundError, match=r"the directory '.*missing' does not exist"):
        export_to_mp4(frames, tmp_path / "missing" / "video.mp4")
    assert len(list(frames)) == 2


def test_a_frame_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    frames = make_frames()
    frames[7, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"`frames\[7\]` holds NaN"):
        export_to_mp4(frames, path, make_sine())
    for error in (RuntimeError, BrokenPipeError, KeyboardInterrupt):

        def generate(error=error):
            yield from make_frames(3)
            raise error("from the caller")

        with pytest.raises(error, match="from the caller"):
            export_to_mp4(generate(), path)
    assert os.listdir(tmp_path) == ["video.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("num_frames", [2, 200])
def test_a_file_too_large_leaves_the_old_file(tmp_path, num_frames):
    """A stand-in for a full disk, met at the end of the video or midway."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(num_frames))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="ffmpeg ended with status"):
            export_to_mp4(noise, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["video.mp4"]
    assert path.read_bytes() == b"old"


# Reading


def test_every_kind_of_video_gives_the_same_floats():
    floats = make_frames()
    expected = torch.from_numpy(floats).permute(0, 3, 1, 2)
    for video in (floats, list(floats), expected, floats.astype(np.float64), [expected[0], *floats[1:]]):
        assert torch.equal(*load_videos([video, video], 25))
        assert torch.equal(load_videos(video, 25)[0], expected)
    assert torch.equal(torch.stack(load_videos(np.stack([floats, floats]), 25)), torch.stack([expected, expected]))
    integers = (floats * 255).astype(np.uint8)
    for video in (integers, [PIL.Image.fromarray(frame) for frame in integers]):
        assert torch.equal(load_videos(video, 25)[0], torch.from_numpy(integers).permute(0, 3, 1, 2) / 255)


def test_a_video_that_is_read_is_the_one_in_the_file(tmp_path, mp4):
    frames, rate = read_video(mp4)
    assert frames.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3) and rate == 25
    assert np.abs(frames.astype(np.float32) - make_frames() * 255).mean() < 3
    assert torch.equal(load_videos(mp4, 25)[0], torch.from_numpy(frames).permute(0, 3, 1, 2) / 255)
    slow = export_to_mp4(make_frames(2), tmp_path / "slow.mp4", fps=24)
    with pytest.raises(ValueError, match="`video` has 24 frames a second"):
        load_videos([mp4, slow], 25)


@pytest.mark.parametrize(("size", "box"), [((99, 25), (33, 25)), ((25, 99), (25, 18))])
def test_crops_have_truncated_sizes(size, box):
    assert crop_to_aspect(PIL.Image.new("RGB", size), 48, 64).size == box


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "m4a", "mkv"])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_load_audio_from_a_file(tmp_path, suffix, num_channels):
    path = tmp_path / f"sound.{suffix}"
    sines = np.stack([make_sine(440.0, rate=22050), make_sine(1000.0, rate=22050)])[:num_channels]
    soundfile.write(tmp_path / "source.wav", sines.T, 22050)
    run_ffmpeg("-i", tmp_path / "source.wav", path)
    loaded = load_audio(path, 22050)
    assert loaded.dtype == torch.float32
    assert loaded.shape[0] == 2
    assert loaded.shape[1] == pytest.approx(22050, abs=2000)  # a lossy format may round up to its block
    for channel, frequency in zip(loaded.numpy(), (440, 1000) if num_channels == 2 else (440, 440), strict=True):
        assert peak_frequency(channel, 22050) == pytest.approx(frequency, abs=2)


def test_load_audio_from_an_exported_video(mp4):
    loaded = load_audio(mp4, 44100)
    assert np.array_equal(loaded.numpy(), read_sound(mp4).T)
    assert has_audio(mp4)


def test_load_audio_keeps_values_at_an_equal_rate(tmp_path):
    stereo = np.random.default_rng(0).uniform(-1, 1, (2, 100)).astype(np.float32)
    soundfile.write(tmp_path / "sound.wav", stereo.T, 16000, subtype="FLOAT")
    for audio in (tmp_path / "sound.wav", str(tmp_path / "sound.wav"), (stereo, 16000), (torch.tensor(stereo), 16000)):
        assert np.array_equal(load_audio(audio, 16000).numpy(), stereo)
    mono = load_audio((stereo[0].astype(np.float64), np.int64(16000)), 16000)
    assert np.array_equal(mono.numpy(), stereo[[0, 0]])
    mono[0] = 7  # channels that share no memory, with each other or with the input
    assert np.array_equal(mono[1].numpy(), stereo[0])


def test_load_audio_averages_more_than_two_channels():
    surround = np.random.default_rng(0).uniform(-1, 1, (6, 100)).astype(np.float32)
    loaded = load_audio((surround, 16000), 16000)
    assert loaded.shape == (2, 100)
    assert np.allclose(loaded.numpy(), surround.mean(axis=0), atol=1e-7)


def test_load_audio_takes_a_waveform_alone_as_it_is():
    sine = make_sine()
    for waveform in (sine, torch.from_numpy(sine)):
        assert torch.equal(load_audio(waveform, 51200), load_audio((waveform, 51200), 51200))


def test_load_audio_scales_int16():
    values = np.array([-32768, -1, 0, 16384], np.int16)
    expected = np.array([-1, -(2**-15), 0, 0.5], np.float32)
    for waveform in (values, torch.from_numpy(values)):
        assert np.array_equal(load_audio((waveform, 16000), 16000)[0].numpy(), expected)


@pytest.mark.parametrize("num_samples", [22050, 22051, 1])
def test_load_audio_resamples(num_samples):
    sine = make_sine(seconds=2, rate=22050)[:num_samples]
    loaded = load_audio((sine, 22050), 51200)
    assert loaded.shape == (2, -(-num_samples * 1024 // 441))
    if num_samples > 1:
        assert peak_frequency(loaded[0].numpy(), 51200) == pytest.approx(440, abs=1)
        expected = make_sine(seconds=2, rate=51200)[: loaded.shape[1]]
        assert np.abs(loaded[0].numpy() - expected)[1024:-1024].max() < 1e-3


@pytest.mark.parametrize(
    "audio, sampling_rate, name",
    [
        ([0.0] * 9, 16000, "audio"),
        ((np.zeros(9), 0), 16000, "audio"),
        ((np.zeros(9), 22050.5), 16000, "audio"),
        ((16000, np.zeros(9)), 16000, "audio"),
        ((np.zeros(9), 16000), -1, "sampling_rate"),
        *(((audio, 16000), 16000, "audio") for audio in BAD_AUDIO),
    ],
)
def test_load_audio_bad_arguments(audio, sampling_rate, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        load_audio(audio, sampling_rate)


def test_load_audio_bad_files(tmp_path, mp4):
    with pytest.raises(FileNotFoundError, match=r"`audio` is '.*missing.wav', but there is no such file"):
        load_audio(tmp_path / "missing.wav", 16000)
    (tmp_path / "notes.wav").write_text("no sound at all")
    (tmp_path / "empty.m4a").touch()
    (tmp_path / "headless.raw").write_bytes(bytes(1000))
    (tmp_path / "damaged.mp4").write_bytes(Path(mp4).read_bytes()[:-2000])
    export_to_mp4(make_frames(2), tmp_path / "silent.mp4")
    assert not has_audio(tmp_path / "silent.mp4")
    for name in ("notes.wav", "empty.m4a", "headless.raw", "damaged.mp4", "silent.mp4"):
        with pytest.raises(OSError, match=rf"`audio` is '.*{name}', which holds no readable audio"):
            load_audio(tmp_path / name, 16000)
    soundfile.write(tmp_path / "nothing.wav", np.zeros((0, 2)), 16000)
    with pytest.raises(ValueError, match="`audio`"):
        load_audio(tmp_path / "nothing.wav", 16000)
