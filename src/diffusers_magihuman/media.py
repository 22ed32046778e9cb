# SPDX-License-Identifier: Apache-2.0
"""Audio and video in and out: mp4 files, audio files, images, resampling.

Frames are encoded one by one, so a video that is streamed never lies in memory as a whole; audio and picture of an mp4
end together; the same input gives the same bytes; a file gets its name only when it is complete.
"""

import contextlib
import itertools
import math
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from numbers import Integral
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import PIL.Image
import scipy.signal
import soundfile
import torch
from diffusers.utils import load_image
from torch import Tensor

Array = np.ndarray | Tensor
ImageInput = str | os.PathLike[str] | PIL.Image.Image | Array
VideoInput = str | os.PathLike[str] | Array | list[PIL.Image.Image | Array]
AudioInput = str | os.PathLike[str] | tuple[Array, int]

AAC_SAMPLING_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)

# BT.709, and tagged as such: players guess the colours of an untagged file, differently by its size.
_BT709 = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"
_H264 = f"-vf {_BT709} -c:v libx264 -pix_fmt yuv420p -preset medium -crf 18"
# A fixed number of threads, because x264's bytes depend on it; no date and no version.
_MP4 = "-threads 8 -map_metadata -1 -fflags +bitexact -flags +bitexact -movflags +faststart"
# Without noise substitution, which draws other noise for each channel, so that mono stays mono.
_AAC = "-c:a aac -b:a 192k -aac_pns 0"


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
            [0, 1]. Floats are clamped, multiplied by 255 and truncated.
        path: Destination, ending in `.mp4`, in a directory that exists.
        audio: Floats in [-1, 1], `(num_samples,)` or `(channels, num_samples)`, of one or two channels.
        fps, sampling_rate: Frames, and samples of `audio`, in a second; of these one of `AAC_SAMPLING_RATES`.

    Raises:
        ValueError: If an argument is none of the above, `frames` is empty, or a frame or the audio holds NaN.
        OSError: If the directory of `path` does not exist or ffmpeg fails, for example because the disk is full.
    """
    target = check_mp4_path(path)
    if not 0 < fps < math.inf:
        raise ValueError(f"`fps` is {fps}, it must be positive and finite.")
    if audio is not None:
        audio = _to_channels(audio, max_channels=2)
        if sampling_rate not in AAC_SAMPLING_RATES:
            raise ValueError(f"`sampling_rate` is {sampling_rate}, AAC allows one of {AAC_SAMPLING_RATES}.")
    frame_rate = Fraction(fps).limit_denominator()
    rgb_frames = (_to_rgb(frame, f"frames[{index}]") for index, frame in enumerate(frames))
    first = next(rgb_frames, None)
    if first is None:
        raise ValueError("`frames` is empty, at least one frame is needed.")
    height, width, _ = first.shape

    def chunks() -> Iterator[bytes]:
        for index, frame in enumerate(itertools.chain([first], rgb_frames)):
            if frame.shape != first.shape or height % 2 or width % 2:
                raise ValueError(f"`frames[{index}]` has shape {frame.shape}, sizes must be even and stay the same.")
            yield frame.tobytes()

    with tempfile.TemporaryDirectory(prefix=".export_to_mp4-", dir=target.parent) as folder:
        result = os.path.join(folder, "video.mp4")
        options = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {frame_rate} -i - {_H264} {_MP4}"
        num_frames = _run_ffmpeg([*options.split(), result], chunks())
        if audio is not None:
            num_samples = round(num_frames * sampling_rate / frame_rate)
            stereo = np.zeros((num_samples, 2), dtype="<f4")
            stereo[: audio.shape[1]] = audio.T[:num_samples]
            silent, result = result, os.path.join(folder, "video_with_audio.mp4")
            options = f"-f f32le -ar {sampling_rate} -ac 2 -i - -map 0:v -map 1:a -c:v copy {_AAC} {_MP4}"
            _run_ffmpeg(["-i", silent, *options.split(), result], [stereo.tobytes()])
        os.replace(result, target)
    return str(path)


def check_mp4_path(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path, or raises what [`export_to_mp4`] raises for it, to learn of it before long work."""
    target = Path(path).absolute()
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"`path` is {str(path)!r}, it must end in '.mp4'.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`path` is {str(path)!r}, but the directory {str(target.parent)!r} does not exist.")
    return target


def load_images(image: ImageInput | list[ImageInput]) -> list[PIL.Image.Image]:
    """Reads one image or several, a list or an array with a leading axis, as RGB: a path or URL, a PIL image, an array
    `(height, width, 3)`, float in [0, 1] or uint8, or a float tensor `(3, height, width)` in [0, 1]. ValueError for
    what is none, OSError for a file that is none."""
    is_several = isinstance(image, list) or (isinstance(image, Array) and image.ndim == 4)
    if is_several and not len(image):
        raise ValueError("`image` is an empty list, it must have at least one image.")
    return [_load_image(item) for item in (image if is_several else [image])]


def _load_image(image: ImageInput) -> PIL.Image.Image:
    if isinstance(image, Array):
        return PIL.Image.fromarray(_to_rgb(image, "image"))
    if not isinstance(image, str | os.PathLike | PIL.Image.Image):
        raise ValueError(f"`image` is a {type(image).__name__}, allowed are a path, PIL image, array or tensor.")
    try:
        return load_image(image if isinstance(image, PIL.Image.Image) else os.fspath(image))
    except (OSError, ValueError) as error:
        raise OSError(f"`image` is {str(image)!r}, which cannot be read as an image: {error}") from error


def load_videos(video: VideoInput | list[VideoInput], frame_rate: int) -> list[Tensor]:
    """Reads one video or several, a list or an array with a leading axis, as float32 `(num_frames, 3, height, width)`
    in [0, 1]: a path of a file of `frame_rate`, an array `(num_frames, height, width, 3)`, float in [0, 1] or uint8, a
    float tensor `(num_frames, 3, height, width)` in [0, 1], or a list of frames. Raises what [`read_video`] does, and
    ValueError for what is no video."""
    first = video[0] if isinstance(video, list) and video else None
    is_batch = isinstance(video, Array) and video.ndim == 5
    is_several = is_batch or isinstance(first, str | os.PathLike | list) or np.ndim(first) == 4
    return [_load_video(item, frame_rate) for item in (video if is_several else [video])]


def _load_video(video: VideoInput, frame_rate: int) -> Tensor:
    if isinstance(video, str | os.PathLike):
        video, rate = read_video(video)
        if rate != frame_rate:
            raise ValueError(f"`video` has {rate:g} frames a second, it must have {frame_rate}.")
    if not (isinstance(video, list) or np.ndim(video) == 4) or not len(video):
        raise ValueError(
            f"`video` is a {type(video).__name__} of shape {tuple(np.shape(video))}, allowed are a path, an array"
            " (num_frames, height, width, 3), a tensor (num_frames, 3, height, width), or a list of frames."
        )
    frames = [_to_frame(frame, f"video[{index}]") for index, frame in enumerate(video)]
    if len(sizes := {frame.shape for frame in frames}) > 1:
        raise ValueError(f"`video` has frames of shapes {sizes}, all must have the same size.")
    floats = [frame if frame.dtype == np.float32 else frame / np.float32(255) for frame in frames]
    return torch.stack([torch.from_numpy(frame.transpose(2, 0, 1)) for frame in floats])


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """Reads a video file: uint8 frames `(num_frames, height, width, 3)` and how many there are in a second; OSError
    for a file that is missing, holds no readable video or is damaged."""
    with _decoded("video", path, "-map", "0:v:0", "-pix_fmt", "rgb24", "-f", "rawvideo") as file:
        meta = next(imageio_ffmpeg.read_frames(os.path.abspath(path)))
        width, height = meta["size"]
        return np.fromfile(file, dtype=np.uint8).reshape(-1, height, width, 3), meta["fps"]


def has_audio(path: str | os.PathLike[str]) -> bool:
    """Whether a video file, which must be readable, has an audio stream."""
    return "audio_codec" in next(imageio_ffmpeg.read_frames(os.path.abspath(path)))


def crop_to_aspect(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """Cuts the largest centred box of the aspect `height / width` out of an image, without resizing it."""
    # As the original computes it: the size is truncated to whole pixels, PIL rounds the corners.
    box_width, box_height = image.size
    if box_height / box_width > height / width:
        box_height = int(box_width * height / width)
    else:
        box_width = int(box_height * width / height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    return image.crop((left, top, left + box_width, top + box_height))


def load_audio(audio: AudioInput | Array, sampling_rate: int) -> Tensor:
    """Reads audio as stereo of `sampling_rate` samples a second, float32 `(2, num_samples)`.

    `audio` is a path, see [`read_audio`], or `(waveform, rate)`, or a waveform that has the right rate already. A
    waveform is `(num_samples,)` or `(channels, num_samples)`, float in about [-1, 1] or int16. Mono is duplicated, and
    more channels than two are averaged. Another rate is converted by polyphase filtering
    (`scipy.signal.resample_poly`) to `ceil(num_samples * sampling_rate / rate)` samples. Raises what [`read_audio`]
    does, and ValueError for what is none of these, empty or not finite.
    """
    if isinstance(audio, str | os.PathLike):
        audio = read_audio(audio)
    elif isinstance(audio, Array):
        audio = audio, sampling_rate
    if not isinstance(audio, tuple) or len(audio) != 2:
        raise ValueError(f"`audio` is a {type(audio).__name__}, allowed are a path or a tuple (waveform, rate).")
    samples, rate = _to_numpy(audio[0]), audio[1]
    if not all(isinstance(value, Integral) and value > 0 for value in (rate, sampling_rate)):
        raise ValueError(f"The rate of `audio`={rate!r} and `sampling_rate`={sampling_rate!r} must be integers > 0.")
    samples = _to_channels(samples / 32768 if samples.dtype == np.int16 else samples)
    if len(samples) > 2:
        samples = samples.mean(axis=0, keepdims=True)
    samples = scipy.signal.resample_poly(samples, sampling_rate, rate, axis=1)
    return torch.from_numpy(samples).expand(2, -1).contiguous()


def read_audio(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """Reads an audio file, or a video's first audio: float32 `(channels, num_samples)` and their rate. OSError for a
    file that is missing, damaged or has none, ValueError for audio that is empty or not finite."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError):  # AAC and video files, among others; TypeError: a name in .raw
        with _decoded("audio", path, "-map", "0:a:0", "-c:a", "pcm_f32le", "-f", "wav") as file:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return _to_channels(samples.T), rate


def resample_audio(audio: Tensor, num_samples: int) -> Tensor:
    """Resamples float32 `(..., num_samples_in)` by the FFT method, which takes the signal as one period."""
    resampled = scipy.signal.resample(audio.detach().float().cpu().numpy(), num_samples, axis=-1)
    return torch.from_numpy(resampled).to(audio.device)


def _to_numpy(data: Array | PIL.Image.Image) -> np.ndarray:
    """Copies a tensor from its device, floats as float32 (numpy has no bfloat16)."""
    if isinstance(data, Tensor):
        data = data.detach().cpu()
        return (data.float() if data.is_floating_point() else data).numpy()
    return np.asarray(data)


def _to_frame(frame: Array | PIL.Image.Image, name: str) -> np.ndarray:
    """Checks one frame and returns it as `(height, width, 3)`, uint8 or float32 in [0, 1]."""
    is_tensor = isinstance(frame, Tensor)
    array = _to_numpy(frame)
    is_float = array.dtype.kind == "f"
    if array.ndim != 3 or array.shape[0 if is_tensor else 2] != 3 or not (is_float or array.dtype == np.uint8):
        raise ValueError(
            f"`{name}` is a {type(frame).__name__} of shape {array.shape}, allowed are arrays (height, width, 3), RGB"
            f" images and tensors (3, height, width), of floats in [0, 1] or uint8, not of {array.dtype}."
        )
    if is_float and np.isnan(array).any():
        raise ValueError(f"`{name}` holds NaN, allowed are floats in [0, 1].")
    array = array.transpose(1, 2, 0) if is_tensor else array
    return array.clip(0, 1).astype(np.float32) if is_float else array


def _to_rgb(frame: Array | PIL.Image.Image, name: str) -> np.ndarray:
    frame = _to_frame(frame, name)
    return frame if frame.dtype == np.uint8 else (frame * 255).astype(np.uint8)


def _to_channels(audio: Array, max_channels: float = math.inf) -> np.ndarray:
    """Checks `audio` and returns a float32 copy `(channels, num_samples)`."""
    array = _to_numpy(audio)
    fits = array.ndim == 1 or (array.ndim == 2 and len(array) <= min(max_channels, array.shape[1]))
    if not fits or not array.size or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(
            f"`audio` has shape {array.shape} and dtype {array.dtype}, allowed are finite floats (num_samples,) or"
            " (channels, num_samples), of no more channels than samples, in an mp4 one or two."
        )
    return np.atleast_2d(array.astype(np.float32))


@contextlib.contextmanager
def _decoded(name: str, path: str | os.PathLike[str], *options: str) -> Iterator[str]:
    """A temporary file of what ffmpeg decodes of a media file; FileNotFoundError or OSError if it cannot."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{name}` is {os.fspath(path)!r}, but there is no such file.")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "decoded")
        try:  # -xerror: a damaged file fails instead of losing a part
            _run_ffmpeg(["-xerror", "-i", os.path.abspath(path), *options, file])
        except OSError as error:
            raise OSError(f"`{name}` is {os.fspath(path)!r}, which holds no readable {name}.") from error
        yield file


def _run_ffmpeg(arguments: list[str], chunks: Iterable[bytes] = ()) -> int:
    """Runs ffmpeg with `chunks` on its standard input and returns their number; OSError with its log if it fails."""
    # Not `imageio_ffmpeg.write_frames`: that ignores ffmpeg's exit status, so a full disk would go unseen.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *arguments]
    num_chunks = 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        try:
            for num_chunks, chunk in enumerate(chunks, 1):  # noqa: B007
                try:
                    process.stdin.write(chunk)
                except BrokenPipeError:  # ffmpeg has stopped and its log says why
                    break
        except BaseException:
            process.kill()
            raise
        finally:
            process.communicate()  # closes the input and waits
        if process.returncode:
            log.seek(0)
            message = log.read().decode(errors="replace").strip()
            raise OSError(f"ffmpeg ended with status {process.returncode}: {message}\nCommand: {' '.join(command)}")
    return num_chunks
