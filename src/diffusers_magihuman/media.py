# Copyright 2026 The diffusers-magihuman authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Sound and picture in and out: mp4 files, audio files, resampling.

Notable features:

- frames are encoded one by one, so a generator can stream a video that never lies in memory as a whole
- sound and picture of an mp4 end together, and the same input gives the same bytes on any number of cores
- a file appears under its final name only when it is complete
"""

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


ImageInput = str | os.PathLike[str] | PIL.Image.Image | np.ndarray | torch.Tensor
VideoInput = str | os.PathLike[str] | np.ndarray | torch.Tensor | list[PIL.Image.Image | np.ndarray | torch.Tensor]
AudioInput = str | os.PathLike[str] | tuple[np.ndarray | torch.Tensor, int]

AAC_SAMPLING_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)

# BT.709, and tagged as such: players guess the colours of an untagged file, differently by its size.
_BT709 = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"
_H264 = ["-vf", _BT709, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "medium", "-crf", "18"]
# A fixed number of threads, because x264's bytes depend on it; no date and no version.
_BITEXACT = ["-threads", "8", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags", "+bitexact"]
_MP4 = [*_BITEXACT, "-movflags", "+faststart"]
# Without noise substitution, which draws other noise for each channel, so that mono stays mono.
_AAC = ["-c:a", "aac", "-b:a", "192k", "-aac_pns", "0"]


def export_to_mp4(
    frames: Iterable[np.ndarray | torch.Tensor | PIL.Image.Image],
    path: str | os.PathLike[str],
    audio: np.ndarray | torch.Tensor | None = None,
    fps: float | Fraction = 25,
    sampling_rate: int = 44100,
) -> str:
    """
    Writes an mp4 (H.264 yuv420p, AAC stereo) that browsers play.

    Sound and picture end together: the audio is cut, or padded with silence, to `num_frames / fps` seconds. Nothing
    is rescaled. An existing file is replaced only once the new one is complete; a failure leaves it as it was.

    Args:
        frames: Any iterable of frames of one even height and width; it is consumed lazily, one frame at a time. A
            frame is a float array `(height, width, 3)` in [0, 1], a uint8 array of that shape, an RGB PIL image, or a
            float tensor `(3, height, width)` in [0, 1]; an array or tensor with a leading `num_frames` axis is such
            an iterable. Floats are clamped, multiplied by 255 and truncated.
        path: Destination, ending in `.mp4`, in a directory that exists.
        audio: Float waveform in [-1, 1] of shape `(channels, num_samples)` or `(num_samples,)`, one or two channels.
            Mono is written to both channels. `None` writes no audio stream.
        fps: Frames per second.
        sampling_rate: Samples per second of `audio` and of the file, one of `AAC_SAMPLING_RATES`.

    Returns:
        `str`: `path`.

    Raises:
        ValueError: If an argument is none of the above, `frames` is empty, or a frame or the audio holds NaN.
        FileNotFoundError: If the directory of `path` does not exist.
        OSError: If ffmpeg fails, for example because the disk is full.
    """
    target = check_mp4_path(path)
    if not 0 < fps < math.inf:
        raise ValueError(f"`fps` is {fps}, it must be positive and finite.")
    if audio is not None:
        audio = _to_waveform(audio)
        if len(audio) > 2:
            raise ValueError(f"`audio` has {len(audio)} channels, allowed are 1 or 2.")
        if sampling_rate not in AAC_SAMPLING_RATES:
            raise ValueError(f"`sampling_rate` is {sampling_rate}, AAC allows one of {AAC_SAMPLING_RATES}.")
    frame_rate = Fraction(fps).limit_denominator()
    with tempfile.TemporaryDirectory(prefix=".export_to_mp4-", dir=target.parent) as folder:
        result = os.path.join(folder, "video.mp4")
        num_frames = _encode_video(frames, frame_rate, result)
        if audio is not None:
            num_samples = round(num_frames * sampling_rate / frame_rate)
            stereo = np.zeros((num_samples, 2), dtype="<f4")
            stereo[: audio.shape[1]] = audio.T[:num_samples]
            silent, result = result, os.path.join(folder, "video_with_audio.mp4")
            _add_audio(silent, stereo, sampling_rate, result)
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


def _encode_video(frames: Iterable, frame_rate: Fraction, path: str) -> int:
    """Writes `frames` to a silent mp4 and returns their number."""
    rgb_frames = _to_rgb_frames(frames)
    first = next(rgb_frames, None)
    if first is None:
        raise ValueError("`frames` is empty, at least one frame is needed.")
    height, width, _ = first.shape
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {frame_rate} -i -".split()
    chunks = (frame.tobytes() for frame in itertools.chain([first], rgb_frames))
    return _run_ffmpeg([*source, *_H264, *_MP4, path], chunks)


def _add_audio(video_path: str, stereo: np.ndarray, sampling_rate: int, path: str) -> None:
    """Copies the picture of `video_path` and adds `stereo`, float32 `(num_samples, 2)`, as AAC."""
    source = f"-f f32le -ar {sampling_rate} -ac 2 -i - -map 0:v -map 1:a -c:v copy".split()
    _run_ffmpeg(["-i", video_path, *source, *_AAC, *_MP4, path], [stereo.tobytes()])


def _to_rgb_frames(frames: Iterable) -> Iterator[np.ndarray]:
    """Yields each frame as uint8 `(height, width, 3)`; all have the even size of the first."""
    first_shape = None
    for index, frame in enumerate(frames):
        rgb = _to_rgb(frame, f"frames[{index}]")
        first_shape = first_shape or rgb.shape
        if rgb.shape[0] % 2 or rgb.shape[1] % 2:
            raise ValueError(f"`frames[{index}]` has shape {rgb.shape}, H.264 with yuv420p needs even sizes.")
        if rgb.shape != first_shape:
            raise ValueError(f"`frames[{index}]` has shape {rgb.shape}, it must be {first_shape} like `frames[0]`.")
        yield rgb


def _to_rgb(frame: np.ndarray | torch.Tensor | PIL.Image.Image, name: str) -> np.ndarray:
    """Converts one frame to uint8 `(height, width, 3)`."""
    array = _to_frame(frame, name)
    return array if array.dtype == np.uint8 else (array.clip(0, 1).astype(np.float32) * 255).astype(np.uint8)


def _to_frame(frame: np.ndarray | torch.Tensor | PIL.Image.Image, name: str) -> np.ndarray:
    """Checks one frame and returns it as `(height, width, 3)`, uint8 or floats without NaN."""
    is_tensor = isinstance(frame, torch.Tensor)
    array = _to_numpy(frame)
    if array.ndim != 3 or array.shape[0 if is_tensor else 2] != 3:
        raise ValueError(
            f"`{name}` is a {type(frame).__name__} of shape {array.shape}, allowed are arrays of shape "
            "(height, width, 3), RGB images and tensors of shape (3, height, width)."
        )
    if array.dtype.kind == "f":
        if np.isnan(array).any():
            raise ValueError(f"`{name}` holds NaN, allowed are floats in [0, 1].")
    elif array.dtype != np.uint8:
        raise ValueError(f"`{name}` has dtype {array.dtype}, allowed are floats in [0, 1] and uint8.")
    return array.transpose(1, 2, 0) if is_tensor else array


def load_images(image: ImageInput | list[ImageInput]) -> list[PIL.Image.Image]:
    """
    Reads one image or several as RGB.

    Args:
        image: A path or URL, a PIL image, an array `(height, width, 3)`, float in [0, 1] or uint8, a float tensor
            `(3, height, width)` in [0, 1], or a list of these; an array or tensor with a leading axis is such a list.

    Returns:
        `list[PIL.Image.Image]`: RGB images.

    Raises:
        ValueError: If an item is none of the above, or the list is empty.
        OSError: If a file is missing or is no image.
    """
    if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 4:
        image = list(image)
    images = image if isinstance(image, list) else [image]
    if not images:
        raise ValueError("`image` is an empty list, it must have at least one image.")
    return [_load_image(item) for item in images]


def _load_image(image: ImageInput) -> PIL.Image.Image:
    if isinstance(image, str | os.PathLike):
        try:
            return load_image(os.fspath(image))
        except (OSError, ValueError) as error:
            raise OSError(f"`image` is {os.fspath(image)!r}, which cannot be read as an image: {error}") from error
    if isinstance(image, PIL.Image.Image):
        return load_image(image)
    if isinstance(image, np.ndarray | torch.Tensor):
        return PIL.Image.fromarray(_to_rgb(image, "image"))
    raise ValueError(
        f"`image` is a {type(image).__name__}, allowed are a path, a PIL image, an array, a tensor or a list of these."
    )


def load_videos(video: VideoInput | list[VideoInput], frame_rate: int) -> list[torch.Tensor]:
    """
    Reads one video or several.

    Args:
        video: A path; an array `(num_frames, height, width, 3)`, float in [0, 1] or uint8; a float tensor
            `(num_frames, 3, height, width)` in [0, 1]; or a list of frames, each a PIL image, an array or a tensor of
            those shapes. Also a list of these, or an array or tensor with a leading axis, for several videos.
        frame_rate: Frames per second that a file must have.

    Returns:
        `list[torch.Tensor]`: float32 of shape `(num_frames, 3, height, width)` in [0, 1].

    Raises:
        ValueError: If an item is none of the above or empty, its frames differ in size, or a file has another rate.
        OSError: If a file is missing or is no video.
    """
    is_array = isinstance(video, np.ndarray | torch.Tensor)
    if is_array and video.ndim == 5:
        videos = list(video)
    elif (
        isinstance(video, list) and video and (isinstance(video[0], list | str | os.PathLike) or _ndim(video[0]) == 4)
    ):
        videos = video
    else:
        videos = [video]
    return [_load_video(item, frame_rate) for item in videos]


def _ndim(item: object) -> int | None:
    return item.ndim if isinstance(item, np.ndarray | torch.Tensor) else None


def _load_video(video: VideoInput, frame_rate: int) -> torch.Tensor:
    if isinstance(video, str | os.PathLike):
        video, rate = read_video(video)
        if rate != frame_rate:
            raise ValueError(f"`video` has {rate:g} frames a second, it must have {frame_rate}.")
    if not (isinstance(video, list) or _ndim(video) == 4) or not len(video):
        shape = "" if _ndim(video) is None else f" of shape {tuple(video.shape)}"
        raise ValueError(
            f"`video` is a {type(video).__name__}{shape}, allowed are a path, an array (num_frames, height, width, 3),"
            " a tensor (num_frames, 3, height, width), or a list of frames."
        )
    frames = [_to_float_frame(frame, f"video[{index}]") for index, frame in enumerate(video)]
    if sizes := {tuple(frame.shape[1:]) for frame in frames} - {tuple(frames[0].shape[1:])}:
        raise ValueError(
            f"`video` has frames of {[*sizes, tuple(frames[0].shape[1:])]} pixels, all must have the same size."
        )
    return torch.stack(frames)


def _to_float_frame(frame: np.ndarray | torch.Tensor | PIL.Image.Image, name: str) -> torch.Tensor:
    """Converts one frame to float32 `(3, height, width)`, floats unrounded."""
    array = _to_frame(frame, name)
    if array.dtype == np.uint8:
        return torch.from_numpy(array.transpose(2, 0, 1) / np.float32(255))
    return torch.from_numpy(array.clip(0, 1).astype(np.float32).transpose(2, 0, 1))


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """
    Reads the frames of a video file.

    Returns:
        `tuple`: uint8 frames `(num_frames, height, width, 3)` and how many there are in a second.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If the file holds no readable video, or ffmpeg finds it damaged.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`video` is {os.fspath(path)!r}, but there is no such file.")
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "video.rgb")
        try:
            meta = next(imageio_ffmpeg.read_frames(os.path.abspath(path)))
            # -xerror: a damaged file fails instead of losing a part
            _run_ffmpeg(
                ["-xerror", "-i", os.path.abspath(path), "-map", "0:v:0", "-pix_fmt", "rgb24", "-f", "rawvideo", raw]
            )
        except (OSError, StopIteration) as error:
            raise OSError(f"`video` is {os.fspath(path)!r}, which holds no readable video.") from error
        width, height = meta["size"]
        return np.fromfile(raw, dtype=np.uint8).reshape(-1, height, width, 3), meta["fps"]


def has_sound(path: str | os.PathLike[str]) -> bool:
    """Whether a video file, which must be readable, has an audio stream."""
    return "audio_codec" in next(imageio_ffmpeg.read_frames(os.path.abspath(path)))


def crop_to_aspect(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """
    Cuts the largest centred box of the aspect `height / width` out of an image, without resizing it.

    The box is computed as the original does: its size is truncated to whole pixels, its corners are rounded by PIL.
    """
    box_width, box_height = image.size
    if box_height / box_width > height / width:
        box_height = int(box_width * height / width)
    else:
        box_width = int(box_height * width / height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    return image.crop((left, top, left + box_width, top + box_height))


def load_audio(audio: AudioInput | np.ndarray | torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    Reads audio as stereo at a given rate.

    Mono is duplicated, stereo kept, and more channels are averaged to mono. Another rate is converted by polyphase
    filtering (`scipy.signal.resample_poly`) to `ceil(num_samples * sampling_rate / rate)` samples; at an equal
    rate the values are unchanged.

    Args:
        audio: Path of an audio file, or of a video file whose first audio stream is taken; or `(waveform, rate)` with
            a waveform `(num_samples,)` or `(channels, num_samples)` that is float in about [-1, 1] or int16. A
            waveform alone is one at `sampling_rate` already.
        sampling_rate: Samples per second of the result.

    Returns:
        `torch.Tensor`: float32 of shape `(2, num_samples)`.

    Raises:
        ValueError: If an argument is none of the above, or the audio is empty or not finite.
        FileNotFoundError: If there is no such file.
        OSError: If the file holds no readable audio, or ffmpeg finds it damaged.
    """
    if isinstance(audio, str | os.PathLike):
        waveform, rate = read_audio(audio)
    elif isinstance(audio, tuple) and len(audio) == 2:
        waveform, rate = _to_numpy(audio[0]), audio[1]
    elif isinstance(audio, np.ndarray | torch.Tensor):
        waveform, rate = _to_numpy(audio), sampling_rate
    else:
        raise ValueError(f"`audio` is a {type(audio).__name__}, allowed are a path or a tuple (waveform, rate).")
    for name, value in (("rate of `audio`", rate), ("`sampling_rate`", sampling_rate)):
        if not isinstance(value, Integral) or value <= 0:
            raise ValueError(f"The {name} is {value!r}, it must be a positive integer.")
    waveform = _to_waveform(waveform / 32768 if waveform.dtype == np.int16 else waveform)
    if len(waveform) > 2:
        waveform = waveform.mean(axis=0, keepdims=True)
    waveform = scipy.signal.resample_poly(waveform, sampling_rate, rate, axis=1)
    return torch.from_numpy(waveform).expand(2, -1).contiguous()


def read_audio(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """
    Reads an audio file, or the first audio stream of a video file, at its own rate.

    Returns:
        `tuple`: float32 waveform `(channels, num_samples)` and samples per second, as [`load_audio`] takes them.

    Raises:
        ValueError: If the audio is empty or not finite.
        FileNotFoundError: If there is no such file.
        OSError: If the file holds no readable audio, or ffmpeg finds it damaged.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`audio` is {os.fspath(path)!r}, but there is no such file.")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError):  # AAC and video files, among others; TypeError: a name in .raw
        with tempfile.TemporaryDirectory() as folder:
            wav = os.path.join(folder, "audio.wav")
            try:  # -xerror: a damaged file fails instead of losing a part
                _run_ffmpeg(["-xerror", "-i", os.path.abspath(path), "-map", "0:a:0", "-c:a", "pcm_f32le", wav])
            except OSError as error:
                raise OSError(f"`audio` is {os.fspath(path)!r}, which holds no readable audio.") from error
            samples, rate = soundfile.read(wav, dtype="float32", always_2d=True)
    return _to_waveform(samples.T), rate


def resample_audio(waveform: torch.Tensor, num_samples: int) -> torch.Tensor:
    """
    Resamples by the FFT method (`scipy.signal.resample`), which takes the signal as one period.

    Args:
        waveform: float32 of shape `(..., num_samples_in)`.
        num_samples: Length of the result.

    Returns:
        `torch.Tensor`: float32 of shape `(..., num_samples)` on the device of `waveform`.

    Raises:
        ValueError: If `waveform` is not float32 or is empty, or `num_samples` is not positive.
    """
    if waveform.dtype != torch.float32 or not waveform.numel():
        raise ValueError(f"`waveform` is {waveform.dtype} {tuple(waveform.shape)}, it must be float32 and not empty.")
    if num_samples <= 0:
        raise ValueError(f"`num_samples` is {num_samples}, it must be positive.")
    resampled = scipy.signal.resample(waveform.detach().cpu().numpy(), num_samples, axis=-1)
    return torch.from_numpy(resampled).to(waveform.device)


def _to_numpy(data: np.ndarray | torch.Tensor | PIL.Image.Image) -> np.ndarray:
    """Copies a tensor from its device, floats as float32 (numpy has no bfloat16)."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        return (data.float() if data.is_floating_point() else data).numpy()
    return np.asarray(data)


def _to_waveform(audio: np.ndarray | torch.Tensor) -> np.ndarray:
    """Checks `audio` and returns a float32 copy `(channels, num_samples)`."""
    array = _to_numpy(audio)
    if array.ndim not in (1, 2) or not array.size or (array.ndim == 2 and array.shape[0] > array.shape[1]):
        raise ValueError(
            f"`audio` has shape {array.shape}, allowed are (num_samples,) and (channels, num_samples) with at least "
            "one sample and no more channels than samples."
        )
    if array.dtype.kind != "f":
        raise ValueError(f"`audio` has dtype {array.dtype}, allowed are floats in [-1, 1].")
    if not np.isfinite(array).all():
        raise ValueError("`audio` holds NaN or infinity, allowed are floats in [-1, 1].")
    return np.atleast_2d(array.astype(np.float32))


def _run_ffmpeg(arguments: list[str], chunks: Iterable[bytes] = ()) -> int:
    """Runs ffmpeg with `chunks` on its standard input and returns their number; OSError with its log if it fails."""
    # Not `imageio_ffmpeg.write_frames`: that ignores ffmpeg's exit status, so a full disk would go unseen.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *arguments]
    num_chunks = 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        try:
            for chunk in chunks:
                try:
                    process.stdin.write(chunk)
                except BrokenPipeError:  # ffmpeg has stopped and its log says why
                    break
                num_chunks += 1
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
