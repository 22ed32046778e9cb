# SPDX-License-Identifier: Apache-2.0
"""Audio and video in and out: mp4 files, audio files, images, resampling.

Frames are encoded one by one, so a video that is streamed never lies in memory as a whole; audio and picture of an mp4
end together; the same input gives the same bytes; a file gets its name only when it is complete.

What is read is a regular file in a format that names no other, within the bounds below, by header and by counting.
"""

import contextlib
import itertools
import math
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import imageio_ffmpeg
import numpy as np
import PIL.Image
import PIL.ImageOps
import scipy  # which imports `scipy.signal` when it is first used
import soundfile
import torch
from torch import Tensor

from .checks import check_integer, check_real, show
from .files import check_file, check_mp4_path, move_into_place, naming, unfinished_folder

Array = np.ndarray | Tensor
ImageInput = str | os.PathLike[str] | PIL.Image.Image | Array
VideoInput = str | os.PathLike[str] | Array | list[PIL.Image.Image | Array]
AudioInput = str | os.PathLike[str] | tuple[Array, int]

MAX_DECODED_BYTES = 2**30  # of one file: of a video in uint8, of audio in float32, read or resampled to stereo
MAX_FRAMES = 2**16  # of one video, 43 minutes
MAX_IMAGE_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
SAMPLING_RATES = (4000, 768000)  # the lowest and the highest
FRAME_RATES = (0.1, 1000)  # the lowest and the highest of an mp4
MAX_FRAME_SIZE = 16384  # the largest height and width of H.264
MAX_AMPLITUDE = 1000  # of floats in about [-1, 1]: beyond are integers in floats
AAC_SAMPLING_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)

# BT.709, and tagged as such: players guess the colours of an untagged file, differently by its size.
_BT709 = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"
_H264 = f"-vf {_BT709} -c:v libx264 -pix_fmt yuv420p -preset medium -crf 18"
# A fixed number of threads, because x264's bytes depend on it; no date and no version.
_MP4 = "-threads 8 -map_metadata -1 -fflags +bitexact -flags +bitexact -movflags +faststart"
# Without noise substitution, which draws other noise for each channel, so that mono stays mono.
_AAC = "-c:a aac -b:a 192k -aac_pns 0"
# Formats are named, because playlists and patterns, which ffmpeg would guess, read other files.
_FORMATS = (
    "aac,ac3,aiff,amr,ape,apng,asf,au,avi,caf,dts,dtshd,dv,eac3,flac,flv,g722,gif,h264,hevc,ivf,loas,m4v,matroska,mlp"
    ",mov,mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,sbc,truehd,tta,voc,w64,wav,webp_anim,wv,yuv4mpegpipe"
)
# Without -nostdin a thread of ffmpeg may write its hint on keys into the line of its log that is parsed.
# The last two: pixels of a frame, and bytes that are allocated at once, for example for silence in a gap of years.
_READ = ["-nostdin", "-hide_banner", "-protocol_whitelist", "file", "-format_whitelist", _FORMATS]
_READ += ["-max_pixels", str(2**25), "-max_alloc", str(2**28)]
_ALL = "-map 0:a? -map 0:v? -c copy -frames 1 -f null -"  # to nowhere: MPEG-TS begins with its first stream in use
# Silence before audio that starts late and in its gaps, as in a player.
_WAV = f"-map 0:a:0 -af aresample=async=1:min_hard_comp=0.01:first_pts=0 -c:a pcm_f32le -bitexact -f wav - {_ALL}"
# Frames without one more for AAC, which in MPEG-TS begins 1024 samples before the picture.
_RGB = "-map 0:v:0 -vf setpts=PTS-STARTPTS*between(STARTT\\,0\\,0.03) -pix_fmt rgb24 -f rawvideo"


def export_to_mp4(
    frames: Iterable[Array | PIL.Image.Image],
    path: str | os.PathLike[str],
    audio: Array | None = None,
    fps: float | Fraction = 25,
    sampling_rate: int = 44100,
) -> str:
    """Writes an mp4 (H.264 yuv420p, AAC stereo) that browsers play, and returns `path`. The audio is cut, or padded
    with silence, to `num_frames / fps` seconds. A failure leaves a file of this name as it was.

    Args:
        frames: Any iterable of frames of one even height and width, consumed one at a time: arrays
            `(height, width, 3)`, float in [0, 1] or uint8, RGB PIL images, or float tensors `(3, height, width)` in
            [0, 1], of at most `MAX_FRAME_SIZE` pixels a side. Floats are clamped, multiplied by 255 and truncated.
        path: Destination, ending in `.mp4`, in a directory that exists; if a link, its target is written.
        audio: Floats in [-1, 1], `(num_samples,)` or `(channels, num_samples)`, of one or two channels.
        fps, sampling_rate: Frames, in `FRAME_RATES`, and samples of `audio`, one of `AAC_SAMPLING_RATES`, in a second.

    Raises:
        ValueError: If an argument is none of the above, `frames` is empty, or a frame or the audio holds NaN.
        OSError: If `path` cannot be written or ffmpeg fails, for example because the disk is full.
    """
    target = check_mp4_path(path)
    fps = float(fps) if isinstance(fps, Fraction) else fps
    frame_rate = Fraction(check_real("fps", fps, *FRAME_RATES)).limit_denominator()
    sampling_rate = check_integer("sampling_rate", sampling_rate)
    if audio is not None:
        audio = _to_channels(audio, max_channels=2)
        if sampling_rate not in AAC_SAMPLING_RATES:
            raise ValueError(f"`sampling_rate` is {sampling_rate}, AAC allows one of {AAC_SAMPLING_RATES}.")
    if not isinstance(frames, Iterable) or (isinstance(frames, Array) and frames.ndim != 4):
        raise ValueError(f"`frames`={show(frames)} must be an iterable of frames.")
    rgb_frames = (_to_rgb(frame, f"frames[{index}]") for index, frame in enumerate(frames))
    first = next(rgb_frames, None)
    if first is None:
        raise ValueError("`frames` is empty, at least one frame is needed.")
    height, width, _ = first.shape

    def chunks() -> Iterator[bytes]:
        for index, frame in enumerate(itertools.chain([first], rgb_frames)):
            if frame.shape != first.shape or height % 2 or width % 2 or max(height, width) > MAX_FRAME_SIZE:
                allowed = f"be even, of at most {MAX_FRAME_SIZE} pixels, and stay the same"
                raise ValueError(f"`frames[{index}]` has shape {frame.shape}, sizes must {allowed}.")
            yield frame.tobytes()

    with unfinished_folder(target) as folder:
        result = folder / "video.mp4"
        options = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {frame_rate} -i - {_H264} {_MP4}"
        num_frames = _write([*options.split(), str(result)], chunks())
        if audio is not None:
            num_samples = round(num_frames * sampling_rate / frame_rate)
            stereo = np.empty((min(audio.shape[1], num_samples), 2), dtype="<f4")
            stereo[:] = audio.T[:num_samples]
            silence = 8 * (num_samples - len(stereo))  # bytes
            pieces = itertools.chain([stereo.tobytes(), bytes(silence % 2**20)], [bytes(2**20)] * (silence // 2**20))
            silent, result = result, folder / "video_with_audio.mp4"
            options = f"-f f32le -ar {sampling_rate} -ac 2 -i - -map 0:v -map 1:a -c:v copy {_AAC} {_MP4}"
            _write(["-i", str(silent), *options.split(), str(result)], pieces)
        move_into_place(result, target)
    return str(path)


def load_images(image: ImageInput | list[ImageInput]) -> list[PIL.Image.Image]:
    """Reads one image or several, a list or an array with a leading axis, as RGB: a path, a PIL image, an array
    `(height, width, 3)`, float in [0, 1] or uint8, or a float tensor `(3, height, width)` in [0, 1].

    Images are turned as their EXIF orientation says. Of 16 bits the upper 8 are kept; floats are in [0, 1], or in
    [0, 255] if one is above 2; and what is transparent is put on white, because the colours below are often arbitrary.
    ValueError for what is none of these, OSError for a file that is none, or has more than `MAX_IMAGE_PIXELS`.
    """
    is_several = isinstance(image, list) or (isinstance(image, Array) and image.ndim == 4)
    if is_several and not len(image):
        raise ValueError("`image` is an empty list, it must have at least one image.")
    return [_load_image(item) for item in (image if is_several else [image])]


def _load_image(image: ImageInput) -> PIL.Image.Image:
    if isinstance(image, Array):
        return PIL.Image.fromarray(_to_rgb(image, "image"))
    is_file = not isinstance(image, PIL.Image.Image)
    source = check_file("image", image) if is_file else image
    try:
        with PIL.Image.open(source) if is_file else contextlib.nullcontext(source) as opened:
            if not 0 < opened.width * opened.height <= MAX_IMAGE_PIXELS or opened.format == "EPS":  # EPS is a program
                found = f"{opened.width}x{opened.height} pixels in {opened.format}"
                raise ValueError(f"{found}, allowed are 1 to {MAX_IMAGE_PIXELS} pixels, not in EPS")
            return _flatten(PIL.ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow raises whatever the bytes of a damaged file lead it to
        kind = OSError if is_file else ValueError
        raise kind(f"`image` is {source!r}, which cannot be read as an image: {error}") from error


def _flatten(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns 8-bit RGB, which Pillow's own conversion does not for wide values and for what is transparent."""
    if image.mode[0] in "IF":
        values = np.asarray(image)
        # The largest value that is meant, and what makes 255 of it. Of 16 bits the upper 8, as Pillow reads colours.
        ranges = {"F": ((2, 255), (255, 1)), "I": ((255, 1), (65535, 1 / 256))}.get(image.mode, ((65535, 1 / 256),))
        for top, factor in ranges:
            if values.min() >= -0.5 and values.max() <= top:
                level = np.clip(values * np.float32(factor), 0, 255).astype(np.uint8)
                return PIL.Image.fromarray(level).convert("RGB")
        raise ValueError(f"values in {values.min()} to {values.max()} are neither of 8 or 16 bits nor in [0, 1]")
    if image.mode == "LAB":
        raise ValueError("LAB must be converted to RGB with its profile")
    if image.has_transparency_data:
        covered = image.convert("LA" if image.mode == "La" else "RGBA")
        image = PIL.Image.new("RGB", image.size, "white")
        image.paste(covered, mask=covered)
    return image.convert("RGB")


def load_videos(video: VideoInput | list[VideoInput], frame_rate: int) -> list[Tensor]:
    """Reads one video or several, a list or an array with a leading axis, as float32 `(num_frames, 3, height, width)`
    in [0, 1]: a path of a file of `frame_rate`, an array `(num_frames, height, width, 3)`, float in [0, 1] or uint8, a
    float tensor `(num_frames, 3, height, width)` in [0, 1], or a list of frames. Raises what [`read_video`] does, and
    ValueError for what is no video."""
    first = video[0] if isinstance(video, list) and video else None
    is_batch = isinstance(video, Array) and video.ndim == 5 and len(video)
    is_list = isinstance(first, str | os.PathLike | list) or (isinstance(first, Array) and first.ndim == 4)
    return [_load_video(item, frame_rate) for item in (video if is_batch or is_list else [video])]


def _load_video(video: VideoInput, frame_rate: int) -> Tensor:
    if isinstance(video, str | os.PathLike):
        video, _ = read_video(video, frame_rate=frame_rate)
    if not (isinstance(video, list) or (isinstance(video, Array) and video.ndim == 4)) or not len(video):
        allowed = "a path, an array (num_frames, height, width, 3), or a list of frames"
        raise ValueError(f"`video` is {show(video)}, allowed are {allowed}, of tensors (3, height, width).")
    frames = [_to_frame(frame, f"video[{index}]") for index, frame in enumerate(video)]
    if len(sizes := {frame.shape for frame in frames}) > 1:
        raise ValueError(f"`video` has frames of shapes {sizes}, all must have the same size.")
    floats = np.empty((len(frames), 3, *frames[0].shape[:2]), np.float32)
    for index, frame in enumerate(frames):
        floats[index] = (frame if frame.dtype == np.float32 else frame / np.float32(255)).transpose(2, 0, 1)
    return torch.from_numpy(floats)


def read_video(
    path: str | os.PathLike[str], num_frames: int | None = None, frame_rate: int | None = None
) -> tuple[np.ndarray, float]:
    """Reads a video file, or its first `num_frames`: uint8 frames `(num_frames, height, width, 3)` and how many there
    are in a second. ValueError for another rate than `frame_rate`, for more than `MAX_FRAMES` frames or
    `MAX_DECODED_BYTES`, or eight times as many where `num_frames` says so; OSError for a file that is missing, holds
    no readable video or is damaged."""
    header = read_video_header(path)
    (width, height), rate = header["size"], header["fps"]
    if frame_rate is not None and rate != frame_rate:
        raise ValueError(f"`video` has {rate:g} frames a second, it must have {frame_rate}.")
    limit = min(MAX_FRAMES, MAX_DECODED_BYTES * (1 if num_frames is None else 8) // (width * height * 3))
    if num_frames is not None:
        check_integer("num_frames", num_frames, 1, limit)
    elif header["duration"] * rate > limit + 1:
        duration = f"{header['duration']:g} seconds of {width}x{height}"
        raise ValueError(f"`video` is {os.fspath(path)!r} of {duration}, allowed are {limit} frames of that size.")
    options = f"-xerror {_RGB} -frames:v {num_frames or limit + 1} - {_ALL}"
    data = _decode("video", path, options, limit * width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3), rate


def read_video_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `fps`, `size` (width, height), `duration` in seconds, and `audio_codec` if there is audio, of a video
    file; OSError for one that is missing or holds no readable video."""
    file = check_file("video", path)
    try:
        frames = imageio_ffmpeg.read_frames(f"file:{file}", input_params=_READ, output_params=["-frames:v", "1"])
        with contextlib.closing(frames):
            return next(frames)
    except (OSError, RuntimeError, ValueError, LookupError, AttributeError) as error:  # of its parser too
        raise OSError(f"`video` is {file!r}, which holds no readable video: {str(error)[:300]}") from error


def has_audio(path: str | os.PathLike[str]) -> bool:
    """Whether a video file, which must be readable, has an audio stream."""
    return "audio_codec" in read_video_header(path)


def crop_to_aspect(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """Cuts the largest centred box of the aspect `height / width` out of an image, without resizing it."""
    # As the original computes it: the size is truncated to whole pixels, PIL rounds the corners.
    box_width, box_height = image.size
    if box_height / box_width > height / width:
        box_height = max(int(box_width * height / width), 1)
    else:
        box_width = max(int(box_height * width / height), 1)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    return image.crop((left, top, left + box_width, top + box_height))


def load_audio(audio: AudioInput | Array, sampling_rate: int) -> Tensor:
    """Reads audio as stereo of `sampling_rate` samples a second, float32 `(2, num_samples)`.

    `audio` is a path, see [`read_audio`], or `(waveform, rate)`, or a waveform that has the right rate already. A
    waveform is `(num_samples,)` or `(channels, num_samples)`, float in about [-1, 1] or int16. Mono is duplicated, and
    more channels than two are averaged. Another rate is converted by polyphase filtering
    (`scipy.signal.resample_poly`) to `ceil(num_samples * sampling_rate / rate)` samples. Rates are integers within
    `SAMPLING_RATES`. Raises what [`read_audio`] does, and ValueError for what is none of these, empty, not finite, or
    for a result of more than `MAX_DECODED_BYTES`.
    """
    if isinstance(audio, str | os.PathLike):
        audio = read_audio(audio)
    elif isinstance(audio, Array):
        audio = audio, sampling_rate
    if not isinstance(audio, tuple) or len(audio) != 2:
        raise ValueError(f"`audio` is a {type(audio).__name__}, allowed are a path or a tuple (waveform, rate).")
    sampling_rate = check_integer("sampling_rate", sampling_rate, *SAMPLING_RATES)
    rate = check_integer("audio[1]", audio[1], *SAMPLING_RATES)
    samples = _to_numpy(audio[0])
    samples = _to_channels(samples / np.float32(32768) if samples.dtype == np.int16 else samples)
    if 8 * samples.shape[1] * sampling_rate > MAX_DECODED_BYTES * rate:
        allowed = f"at {sampling_rate} Hz allowed are {MAX_DECODED_BYTES // (8 * sampling_rate)}"
        raise ValueError(f"`audio` has {samples.shape[1] / rate:g} seconds, {allowed}.")
    if len(samples) > 2:
        samples = samples.mean(axis=0, keepdims=True)
    samples = scipy.signal.resample_poly(samples, sampling_rate, rate, axis=1)
    return torch.from_numpy(samples).expand(2, -1).contiguous()


def read_audio(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """Reads an audio file, or a video's first audio, with silence where it has none: float32 `(channels, num_samples)`
    and their rate. OSError for a file that is missing, has none or is damaged, which in MP3 is passed over, ValueError
    for audio that is empty, not finite or decodes to more than `MAX_DECODED_BYTES`."""
    file, data, options = check_file("audio", path), bytearray(), f"-xerror {_WAV}"
    try:
        with open(file, "rb") as opened, soundfile.SoundFile(opened) as audio:
            channels, rate, is_mpeg = audio.channels, audio.samplerate, audio.subtype.startswith("MPEG")
            options = _WAV if is_mpeg else options  # whose length libsndfile guesses; tags and seams are no damage
            if not is_mpeg and audio.frames < 2**62:  # else unknown, as in FLAC that was streamed
                _check_bytes("audio", file, 4 * audio.frames * channels, MAX_DECODED_BYTES)
            block = memoryview(bytearray(2**22 // channels * channels * 4))
            while not is_mpeg and (num_samples := audio.buffer_read_into(block, "float32")):
                data += block[: num_samples * channels * 4]
                _check_bytes("audio", file, len(data), MAX_DECODED_BYTES)
    except (soundfile.LibsndfileError, OSError, TypeError):  # AAC and video files, among others; TypeError: .raw
        data.clear()
    if not data:
        wav = _decode("audio", file, options, MAX_DECODED_BYTES)
        channels, rate = struct.unpack_from("<HI", wav, 22)
        data = memoryview(wav)[wav.index(b"data") + 8 :]
    with naming(file, fault="holds no samples, or none that are finite"):
        return _to_channels(np.frombuffer(data, "<f4").reshape(-1, channels).T), rate


def resample_audio(audio: Tensor, num_samples: int) -> Tensor:
    """Resamples float32 `(..., num_samples_in)` by the FFT method, which takes the signal as one period."""
    check_integer("num_samples", num_samples, 1, MAX_DECODED_BYTES // 8)
    resampled = scipy.signal.resample(audio.detach().float().cpu().numpy(), num_samples, axis=-1)
    return torch.from_numpy(resampled).to(audio.device)


def _to_numpy(data: Array | PIL.Image.Image) -> np.ndarray:
    """Copies a tensor from its device, floats as float32 (numpy has no bfloat16); empty for what holds no array."""
    is_dense = isinstance(data, Tensor) and data.layout == torch.strided and not data.is_nested
    if is_dense and not data.is_meta and not data.is_quantized:
        data = data.detach().cpu()
        data = (data.float() if data.is_floating_point() else data).numpy()
    return np.asarray(data) if isinstance(data, np.ndarray | PIL.Image.Image) else np.empty(0, object)


def _to_frame(frame: Array | PIL.Image.Image, name: str) -> np.ndarray:
    """Checks one frame and returns it as `(height, width, 3)`, uint8 or float32 in [0, 1]."""
    is_tensor = isinstance(frame, Tensor)
    array = _to_numpy(frame)
    is_float = array.dtype.kind == "f"
    is_other_mode = isinstance(frame, PIL.Image.Image) and frame.mode != "RGB"
    fits = array.ndim == 3 and array.size and array.shape[0 if is_tensor else 2] == 3
    if not fits or not (is_float or array.dtype == np.uint8) or is_other_mode:
        raise ValueError(
            f"`{name}` is {show(frame)}, allowed are arrays (height, width, 3), RGB images and tensors"
            " (3, height, width), of floats in [0, 1] or uint8."
        )
    array = array.transpose(1, 2, 0) if is_tensor else array
    if not is_float:
        return array
    low, high = array.min(), array.max()
    if not (low >= -0.5 and high <= 2):
        found = "NaN" if np.isnan(low) else f"values in {low:g} to {high:g}"
        raise ValueError(f"`{name}` holds {found}, allowed are floats in [0, 1], and clamped a little outside.")
    return array.clip(0, 1).astype(np.float32, copy=False)


def _to_rgb(frame: Array | PIL.Image.Image, name: str) -> np.ndarray:
    frame = _to_frame(frame, name)
    return frame if frame.dtype == np.uint8 else (frame * 255).astype(np.uint8)


def _to_channels(audio: Array, max_channels: float = math.inf) -> np.ndarray:
    """Checks `audio` and returns it in float32 `(channels, num_samples)`."""
    array = _to_numpy(audio)
    fits = array.ndim == 1 or (array.ndim == 2 and len(array) <= min(max_channels, array.shape[1]))
    fits = fits and array.size and array.dtype.kind == "f"
    if not fits or not (array.min() >= -MAX_AMPLITUDE and array.max() <= MAX_AMPLITUDE):
        raise ValueError(
            f"`audio` is {show(audio)}, allowed are finite floats in about [-1, 1], (num_samples,) or (channels,"
            " num_samples), of no more channels than samples, in an mp4 one or two."
        )
    return np.atleast_2d(array.astype(np.float32, copy=False))


def _check_bytes(name: str, path: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ValueError(f"`{name}` is {path!r}, which decodes to {num_bytes} bytes or more, allowed are {limit}.")


def _decode(name: str, path: str | os.PathLike[str], options: str, limit: int) -> bytearray:
    """What ffmpeg decodes of a media file; ValueError for more than `limit` bytes, OSError if it cannot."""
    path, data = check_file(name, path), bytearray()
    try:
        with _ffmpeg([*_READ, "-i", f"file:{path}", *options.split()]) as process:
            while block := process.stdout.read(2**20):
                data += block
                _check_bytes(name, path, len(data), limit)
        if not data:
            raise OSError("nothing can be decoded")
    except OSError as error:
        raise OSError(f"`{name}` is {path!r}, which holds no readable {name}: {str(error)[:300]}") from error
    return data


def _write(arguments: list[str], chunks: Iterable[bytes]) -> int:
    """Runs ffmpeg with `chunks` on its standard input and returns their number; OSError with its log if it fails."""
    num_chunks = 0
    with _ffmpeg(arguments) as process:
        for num_chunks, chunk in enumerate(chunks, 1):  # noqa: B007
            try:
                process.stdin.write(chunk)
            except BrokenPipeError:  # ffmpeg has stopped and its log says why
                break
    return num_chunks


@contextlib.contextmanager
def _ffmpeg(arguments: list[str]) -> Iterator[subprocess.Popen]:
    # Not `imageio_ffmpeg.write_frames`: that ignores ffmpeg's exit status, so a full disk would go unseen.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            process.communicate()  # closes the input and waits
        log.seek(0)
        message = log.read(2**16).decode(errors="replace").strip()
        # A gap of audio that is too long to be filled is the one failure that leaves the status 0.
        if (status := process.returncode) or "Failed to compensate" in message:
            killed = signal.strsignal(-status) if status < 0 else ""
            raise OSError(f"ffmpeg ended with status {status}: {killed}{message}\nCommand: {' '.join(command)}")
