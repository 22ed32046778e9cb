"""Media: every file is made in the test and read back with ffmpeg; resampling is held to golden tensors exactly."""

import itertools
import json
import os
import re
import struct
import subprocess
import sys
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest
import scipy
import soundfile
import torch
from filelock import FileLock
from golden import DATA
from helpers import peak_frequency, read_frames, read_header, read_sound, run_ffmpeg
from imageio_ffmpeg._parsing import LogCatcher
from safetensors.torch import load_file

from diffusers_magihuman.files import LOCK_NAME, write_text
from diffusers_magihuman.media import (
    AAC_SAMPLING_RATES,
    crop_to_aspect,
    export_to_mp4,
    has_audio,
    load_audio,
    load_images,
    load_videos,
    read_audio,
    read_video,
    read_video_header,
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


def test_links_are_followed_and_modes_kept(tmp_path):
    (tmp_path / "real").mkdir()
    path = tmp_path / "real" / "video.mp4"
    path.write_bytes(b"old")
    path.chmod(0o600)
    (tmp_path / "link.mp4").symlink_to("real/video.mp4")
    export_to_mp4(make_frames(2), tmp_path / "link.mp4", fps=np.float32(25))
    assert (tmp_path / "link.mp4").is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert read_frames(path, HEIGHT, WIDTH).shape[0] == 2
    assert os.listdir(tmp_path / "real") == ["video.mp4"]


def test_folders_of_dead_processes_are_removed(tmp_path):
    """Those of living ones, and those without our mark, stay."""
    for name in (".dead.incomplete", ".alive.incomplete", ".other.incomplete"):
        (tmp_path / name / "files").mkdir(parents=True)
    for name in (".dead.incomplete", ".alive.incomplete"):
        (tmp_path / name / LOCK_NAME).touch()
    with FileLock(tmp_path / ".alive.incomplete" / LOCK_NAME):
        export_to_mp4(make_frames(2), tmp_path / "video.mp4")
        assert sorted(os.listdir(tmp_path)) == [".alive.incomplete", ".other.incomplete", "video.mp4"]
    export_to_mp4(make_frames(2), tmp_path / "video.mp4")
    assert sorted(os.listdir(tmp_path)) == [".other.incomplete", "video.mp4"]


def test_writing_in_threads_keeps_the_umask(tmp_path):
    """Old versions of filelock set it to 0 for a moment, and threads that do so at once leave it there."""
    umask = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda index: write_text(tmp_path / f"{index % 8}.txt", "text"), range(800)))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(umask)


@pytest.mark.slow
def test_a_kill_leaves_what_the_next_writer_removes(tmp_path):
    script = """
import sys, itertools, numpy as np
from diffusers_magihuman import export_to_mp4
def frames():
    for index in itertools.count():
        yield np.zeros((64, 64, 3), np.uint8)
        if index == 20:
            print("ready", flush=True)
export_to_mp4(frames(), sys.argv[1])
"""
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    export_to_mp4(make_frames(2), path)
    assert os.listdir(tmp_path) == ["video.mp4"]


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
        ([PIL.Image.new("LAB", (8, 8))], r"frames\[0\]"),
        (np.full((2, 8, 8, 3), 200.0), r"frames\[0\]` holds values in 200 to 200"),
        (torch.zeros(2, 3, 8, 8, device="meta"), r"frames\[0\]"),
        (np.zeros((2, 2, 20000, 3), np.uint8), r"frames\[0\]"),
        ([[[0.0]]], r"frames\[0\]"),
        (None, "frames"),
        (np.zeros((8, 8, 3)), "frames"),
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
        {"fps": 1e-5, "audio": np.zeros(9)},
        {"fps": "25"},
        {"fps": True},
        {"sampling_rate": True},
        {"audio": np.full(9, 20000.0)},
        {"audio": torch.zeros(9, device="meta")},
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
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for name in ("folder.mp4", "fifo.mp4", "loop.mp4", "a\0.mp4", "a" * 300 + ".mp4", "video.mp4/video.mp4"):
        with pytest.raises(OSError, match="`path` is '"):
            export_to_mp4(None, tmp_path / name)  # before the frames are looked at
    with pytest.raises(ValueError, match="`path` is None"):
        export_to_mp4(None, None)
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
        with pytest.raises(OSError, match=r"ffmpeg ended with status (-25: .*exceeded|\d+: .*File too large)"):
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


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_times_of_a_file_are_kept(tmp_path, suffix):
    """Silence before late audio and in its gaps, so that a click stays with its flash."""
    click, frames = np.zeros(2 * 44100, np.float32), np.zeros((50, 64, 64, 3), np.uint8)
    click[44100:44500], frames[25] = 0.9 * np.sin(np.arange(400) / 3), 255
    source, path = export_to_mp4(frames, tmp_path / "source.mp4", click), tmp_path / f"file.{suffix}"
    late, late_picture = (
        ["-itsoffset", "0.4", "-i", source, "-map", f"{video}:v", "-map", f"{1 - video}:a", "-c", "copy"]
        for video in (0, 1)
    )
    gaps = [["-c:v", "copy", "-af", f"aselect='not(between(t,0.1,{end}))'", "-c:a", "aac"] for end in (0.15, 0.6)]
    in_step = ["-c", "copy"]
    for arguments, expected, num_frames, flash in (
        (late, 1.4, 50, 25),
        (late_picture, 1, 60, 35),
        (in_step, 1, 50, 25),  # no frame more for AAC, which in MPEG-TS begins before the picture
        (gaps[0], 1, 50, 25),
        (gaps[1], 1, 50, 25),
    ):
        run_ffmpeg("-i", source, *arguments, path)
        audio, rate = read_audio(path)
        assert np.abs(audio[0]).argmax() / rate == pytest.approx(expected, abs=0.04)
        brightness = read_video(path)[0].mean(axis=(1, 2, 3))
        half_a_frame = suffix == "ts" and arguments is late_picture  # that AAC begins earlier
        assert brightness.argmax() == flash + half_a_frame and len(brightness) == num_frames + half_a_frame


def test_no_silence_of_an_hour(tmp_path):
    source, path = export_to_mp4(make_frames(), tmp_path / "source.mp4", make_sine()), tmp_path / "late.mkv"
    run_ffmpeg("-i", source, "-itsoffset", "4000", "-i", source, "-map", "0:v", "-map", "1:a", "-c", "copy", path)
    with pytest.raises(OSError, match=r"`audio` is .*: ffmpeg ended with status 0: .*Failed to compensate"):
        read_audio(path)


def write_playlists(folder):
    """What other software opens, with what it names; the path of the secret."""
    secret = export_to_mp4(np.full((5, 32, 32, 3), 77, np.uint8), folder / "secret.mp4", np.zeros(44100))
    (folder / "list.m3u").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n")
    (folder / "list.ffconcat").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    (folder / "list.mpd").write_text(
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"'
        ' type="static" mediaPresentationDuration="PT1S"'
        ' profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1" codecs="avc1"><BaseURL>{secret}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    PIL.Image.new("RGB", (32, 32)).save(folder / "shot1.png")
    PIL.Image.new("RGB", (32, 32)).save(folder / "shot%d.png")


def test_no_file_opens_another(tmp_path):
    write_playlists(tmp_path)
    os.mkfifo(tmp_path / "fifo.wav")
    names = ["shot%d.png", "fifo.wav", "."]
    for playlist, suffix in itertools.product(("m3u", "ffconcat", "mpd"), ("mp4", "wav", "m3u8")):
        names.append(f"{playlist}.{suffix}")
        (tmp_path / names[-1]).write_bytes((tmp_path / f"list.{playlist}").read_bytes())
    for name in names:
        for read, argument in ((read_video, "video"), (has_audio, "video"), (read_audio, "audio")):
            with pytest.raises(OSError, match=f"`{argument}` is "):
                read(tmp_path / name)
    for name in ("http://127.0.0.1/a.png", "file:a.png", "pipe:0", "/dev/zero"):
        for read in (read_video, read_audio, load_images):
            with pytest.raises(OSError, match="` is '"):
                read(name)


def test_videos_are_bounded_before_and_while_they_are_read(tmp_path, monkeypatch):
    """By the header, and by counting where it says nothing; with no file for frames in between."""
    path = export_to_mp4(make_frames(), tmp_path / "video.mp4")
    run_ffmpeg("-i", path, "-c", "copy", tmp_path / "video.h264")
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)
    for name in ("video.mp4", "video.h264"):
        assert len(read_video(tmp_path / name)[0]) == NUM_FRAMES
        assert len(read_video(tmp_path / name, num_frames=4)[0]) == 4
    monkeypatch.setattr("diffusers_magihuman.media.MAX_FRAMES", NUM_FRAMES - 2)
    with pytest.raises(ValueError, match=r"`video` is .* of 0.52 seconds of 98x62, allowed are 11 frames"):
        read_video(path)
    with pytest.raises(ValueError, match=r"`video` is .* which decodes to \d+ bytes or more"):
        read_video(tmp_path / "video.h264")
    with pytest.raises(ValueError, match="`num_frames`=12"):
        read_video(path, num_frames=12)


def noise_picture(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_pictures_of_8_bits_are_what_pillow_makes_of_them(mode):
    image = PIL.Image.fromarray(noise_picture(9, 8, 3)).convert(mode)
    assert np.array_equal(load_images(image)[0], image.convert("RGB"))


@pytest.mark.parametrize(
    "dtype, suffix", [("<u2", "png"), *itertools.product(["<u2", ">u2", "i4", "f4"], ["tiff", ""])]
)
def test_wide_pictures_are_scaled(tmp_path, dtype, suffix):
    wide = noise_picture(9, 8, dtype=np.uint16)
    levels = wide >> 8
    if dtype == "f4":
        wide = wide / np.float32(65536)
        levels = wide * 255
    expected = PIL.Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    image = PIL.Image.fromarray(wide.astype(dtype))
    if suffix:
        image.save(image := tmp_path / f"image.{suffix}")
    assert np.array_equal(load_images(image)[0], expected)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "RGB"])
def test_what_is_transparent_is_white(mode):
    image = PIL.Image.new("RGBA", (4, 2), (10, 10, 10, 255))
    image.putpixel((0, 0), (200, 200, 200, 0))
    image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    if mode in ("P", "RGB"):
        image.info["transparency"] = image.getpixel((0, 0))
    pixels = np.asarray(load_images(image)[0])
    assert (pixels[0, 0] == 255).all() and (pixels[1:] == 10).all()


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)),
        PIL.Image.fromarray(np.full((4, 4), np.nan, np.float32)),
        PIL.Image.fromarray(np.full((4, 4), 1e5, np.float32)),
        PIL.Image.new("LAB", (4, 4)),
        np.full((4, 4, 3), 200.0),
        np.zeros((4, 4, 3), np.uint16),
    ],
)
def test_pictures_that_are_none(image):
    with pytest.raises(ValueError, match="`image`"):
        load_images(image)


def test_pictures_that_are_too_large_or_damaged(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for size in (30000, 10000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
        (tmp_path / f"{size}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    PIL.Image.fromarray(noise_picture(64, 64, 3)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    for name in ("30000.png", "10000.png", "program.eps", "half.png", "text.png"):
        with pytest.raises((OSError, ValueError), match=rf"`image` is '.*{name}'"):
            load_images(tmp_path / name)


@pytest.mark.parametrize(("size", "box"), [((99, 25), (33, 25)), ((25, 99), (25, 18)), ((1, 9), (1, 1))])
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


@pytest.mark.parametrize("suffix", ["mp3", "mp2", "wav"])
def test_mpeg_audio_is_read_to_its_end(tmp_path, suffix):
    """Without a header that says its length, twice in a file, with other bytes in between, and cut."""
    path = tmp_path / f"audio.{suffix}"
    codec = "mp2" if suffix == "mp2" else "libmp3lame"
    options = ["-q:a", "5", "-write_xing", "0"] if suffix == "mp3" else []
    run_ffmpeg("-f", "lavfi", "-i", "sine=440:d=5", "-c:a", codec, *options, path)
    content = path.read_bytes()
    variants = {0: content, 1: content[: len(content) * 3 // 4 + 7]}
    variants |= {2: content * 2, 3: content + bytes(range(256)) + content} if suffix != "wav" else {}
    for variant, seconds in zip(variants.values(), (5, 3.75, 10, 10), strict=False):
        path.write_bytes(variant)
        audio, rate = read_audio(path)
        assert audio.shape[1] / rate == pytest.approx(seconds, abs=0.2)
        assert peak_frequency(audio[0], rate) == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    "codec, options",
    [
        *(("dca", "-f dts"), ("mlp", "-f mlp"), ("truehd", "-f truehd"), ("aac", "-f latm"), ("sbc", "-f sbc")),
        *(("ac3", "-f rm"), ("g722", "-f g722 -ar 16000 -ac 1")),
    ],
)
def test_rarer_formats(tmp_path, codec, options):
    path = tmp_path / f"audio.{options.split()[1]}"
    sine = ("-f", "lavfi", "-i", "sine=440:r=48000", "-t", "1", "-ac", "2", "-c:a", codec, "-strict", "-2")
    run_ffmpeg(*sine, *options.split(), path)
    audio, rate = read_audio(path)
    assert audio.shape[1] / rate == pytest.approx(1, abs=0.1)
    assert peak_frequency(audio[0], rate) == pytest.approx(440, abs=2)


def test_names_that_are_not_unicode(tmp_path, mp4):
    path = tmp_path / os.fsdecode(b"\xff.mp4")
    try:
        path.write_bytes(Path(mp4).read_bytes())
    except OSError:
        pytest.skip("the file system takes Unicode only")
    assert np.array_equal(load_audio(path, 44100), load_audio(mp4, 44100))
    assert np.array_equal(read_video(path)[0], read_video(mp4)[0])


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
        ((np.zeros(9), 0), 16000, r"audio\[1\]"),
        ((np.zeros(9), 22050.5), 16000, r"audio\[1\]"),
        ((16000, np.zeros(9)), 16000, r"audio\[1\]"),
        ((np.zeros(9), 16000), -1, "sampling_rate"),
        ((np.zeros(9), True), 16000, r"audio\[1\]"),
        ((np.zeros(9), 10**9 + 7), 16000, r"audio\[1\]"),
        ((np.zeros(9), 1), 16000, r"audio\[1\]"),
        ((np.zeros(2**20), 4000), 768000, "audio"),
        ((np.full(9, 20000.0), 16000), 16000, "audio"),
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
    with pytest.raises(ValueError, match=r"'.*nothing.wav' holds no samples, .*`audio` is"):
        load_audio(tmp_path / "nothing.wav", 16000)
    run_ffmpeg("-i", mp4, "-vn", tmp_path / "whole.ogg")
    (tmp_path / "headers.ogg").write_bytes((tmp_path / "whole.ogg").read_bytes()[:4500])
    with pytest.raises(OSError, match=r"`audio` is '.*headers.ogg', which holds no readable audio"):
        load_audio(tmp_path / "headers.ogg", 16000)


def test_audio_whose_header_lies(tmp_path, monkeypatch):
    """One that says 2^36 samples is refused by its header; one that says nothing is counted."""
    noise = make_sine()
    soundfile.write(tmp_path / "audio.flac", noise, 16000)
    content = bytearray((tmp_path / "audio.flac").read_bytes())
    for name, high, low in (("long", 15, 255), ("unknown", 0, 0)):
        content[21], content[22:26] = content[21] & 0xF0 | high, bytes([low] * 4)
        (tmp_path / f"{name}.flac").write_bytes(content)
    with pytest.raises(ValueError, match=r"`audio` is '.*long.flac', which decodes to 274877906940 bytes or more"):
        load_audio(tmp_path / "long.flac", 16000)
    assert load_audio(tmp_path / "unknown.flac", 16000).shape == (2, len(noise))
    run_ffmpeg("-i", tmp_path / "audio.flac", tmp_path / "audio.m4a")
    monkeypatch.setattr("diffusers_magihuman.media.MAX_DECODED_BYTES", 9999)
    for name in ("audio.flac", "unknown.flac", "audio.m4a"):
        with pytest.raises(ValueError, match=rf"`audio` is '.*{name}', which decodes to \d+ bytes or more"):
            read_audio(tmp_path / name)


def test_folders_and_marks_that_are_links_are_left_alone(tmp_path):
    """Else a folder that anybody can write to could have us remove, or empty, what is not ours."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / LOCK_NAME).write_text("mine")
    out = tmp_path / "out"
    (out / ".a.incomplete").mkdir(parents=True)
    (out / ".a.incomplete" / LOCK_NAME).symlink_to(victim / LOCK_NAME)
    (out / ".b.incomplete").symlink_to(victim)
    write_text(out / "text", "hello")
    assert (out / "text").read_text() == "hello" and (victim / LOCK_NAME).read_text() == "mine"
    assert {path.name for path in out.iterdir()} == {".a.incomplete", ".b.incomplete", "text"}


def test_ffmpeg_writes_no_hint_into_the_line_that_is_parsed(tmp_path, monkeypatch):
    """It comes from another thread, within the line of the stream in one of some hundred calls."""
    logs, get_text = [], LogCatcher.get_text
    monkeypatch.setattr(LogCatcher, "stop_me", lambda self: logs.append(get_text(self, timeout=5)))
    export_to_mp4(make_frames(), tmp_path / "video.mp4")
    assert read_video_header(tmp_path / "video.mp4")["size"] == (WIDTH, HEIGHT)
    assert "Output #0" in logs[0] and "to stop" not in logs[0]
