# SPDX-License-Identifier: Apache-2.0
"""Trains a sound autoencoder, Diffusers' `AutoencoderOobleck`, in two independent halves: 25 latents a second.

What a latent says is settled first, by an analysis of the voice's pitch, phase and spectrum. Then the decoder learns
to speak from it and the encoder learns to compute it. Trained together they get no further than the few principal
components of a waveform that eight numbers hold: the phase of a pitch is hard to come upon, and easy to learn.

    python examples/nano/train_audio_vae.py --data data/128 --output runs/audio_vae
"""

import itertools
import math
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderOobleck
from make_dataset import load_dataset
from recipe import Run, make_parser, save_picture
from safetensors.torch import load_file, save_file
from torch import nn
from world import SAMPLING_RATE

HOP = 2048
LATENT_CHANNELS = 8
NUM_BANDS = 24


def make_audio_vae() -> AutoencoderOobleck:
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * LATENT_CHANNELS,
        downsampling_ratios=[16, 16, 8],
        channel_multiples=[2, 4, 8],
        decoder_channels=16,
        decoder_input_channels=LATENT_CHANNELS,
        # What the pipelines resample to, as with the published model; AAC knows no 51,200 Hz.
        sampling_rate=44100,
    )
    # The posterior's standard deviation is a constant, so small that a sample is as good as the mean.
    nn.init.zeros_(vae.encoder.conv2.weight_g[LATENT_CHANNELS:])
    nn.init.constant_(vae.encoder.conv2.bias[LATENT_CHANNELS:], -4.0)
    return vae


def to_mono(voices: np.ndarray) -> torch.Tensor:
    """int16 to float32 in [-1, 1]."""
    return torch.from_numpy(voices.astype(np.float32) / 32767)


def to_stereo(voices: torch.Tensor) -> torch.Tensor:
    """`(batch, samples)` to `(batch, 2, samples)`, the same on both sides."""
    return voices[:, None].expand(-1, 2, -1)


def spectral_loss(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean difference of log-magnitudes in windows of 10, 20 and 40 ms, `(batch, samples)` each."""
    losses = []
    for size in (512, 1024, 2048):
        window = torch.hann_window(size, device=target.device)
        spectra = [
            torch.stft(audio, size, size // 2, window=window, return_complex=True)[:, : size // 8].abs()
            for audio in (decoded, target)
        ]
        losses.append(F.l1_loss(*(torch.log(spectrum + 1e-2) for spectrum in spectra)))
    return torch.stack(losses).mean()


def waveform_loss(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Error of waveforms relative to their power, `(batch, samples)` each, in octaves from 300 Hz.

    Low octaves count as much as loud ones, because the phase of the pitch is learned there first.
    """
    spectra = torch.fft.rfft(torch.stack([decoded - target, target])).abs().square().sum(dim=1)
    edges = [round(edge * target.shape[1] / SAMPLING_RATE) for edge in (0, 300, 600, 1200, 2400, 6400)]
    bands = [spectra[:, low:high].sum(dim=1) for low, high in itertools.pairwise(edges)]
    errors, powers = torch.stack(bands, dim=1)
    return (errors / (powers + 0.03 * powers.sum(dim=0))).mean()


class Analysis(nn.Module):
    """
    What a latent says of a voice: the phase of its pitch, the pitch, and the envelope of its spectrum.

    Autocorrelation finds the pitch, a Fourier coefficient at the pitch its phase, and principal components of powers
    in bands the envelope, all in windows of 80 ms around the latent. Phase and pitch fade out in silence.

    Args:
        channels (`int`): Number of latent channels, three more than there are components.
    """

    def __init__(self, channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_BANDS))
        self.register_buffer("components", torch.zeros(NUM_BANDS, channels - 3))  # of standard deviation 1

    def _windows(self, voices: torch.Tensor) -> torch.Tensor:
        """`(batch, samples)` to `(batch, length, 4096)`, centred on the latents."""
        windows = F.pad(voices, (HOP // 2, HOP // 2)).unfold(1, 2 * HOP, HOP)
        return windows * torch.hann_window(2 * HOP, device=voices.device)

    def _levels(self, windows: torch.Tensor) -> torch.Tensor:
        """Decibels in bands, `(batch, length, bands)`."""
        power = torch.fft.rfft(windows).abs().square()
        edges = torch.linspace(math.log(75), math.log(6400), NUM_BANDS + 1).exp() * 2 * HOP / SAMPLING_RATE
        edges = edges.round().long().tolist()
        bands = [power[..., low : max(high, low + 1)].mean(dim=2) for low, high in itertools.pairwise(edges)]
        return 10 * torch.log10(torch.stack(bands, dim=2) + 1e-2)

    @torch.no_grad()
    def fit(self, voices: torch.Tensor) -> None:
        """Finds the components of the envelopes of voices `(number, samples)`."""
        levels = self._levels(self._windows(voices)).flatten(0, 1)
        self.mean.copy_(levels.mean(dim=0))
        _, values, vectors = torch.linalg.svd(levels - self.mean, full_matrices=False)
        count = self.components.shape[1]
        self.components.copy_(vectors[:count].T / values[:count] * len(levels) ** 0.5)

    @torch.no_grad()
    def encode(self, voices: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, channels, samples / 2048)` of voices `(batch, samples)`."""
        windows = self._windows(voices)
        correlation = torch.fft.irfft(torch.fft.rfft(windows, 4 * HOP).abs().square())
        # Longer lags have fewer products; undo what the window takes from them.
        window = torch.hann_window(2 * HOP, device=voices.device)
        taken = torch.fft.irfft(torch.fft.rfft(window, 4 * HOP).abs().square())
        shortest, longest = SAMPLING_RATE // 330, SAMPLING_RATE // 75
        candidates = (correlation / taken.clamp(min=1e-3))[..., shortest:longest]
        inner = candidates[..., 1:-1]
        is_peak = (inner >= candidates[..., :-2]) & (inner >= candidates[..., 2:])
        is_peak &= inner >= 0.9 * candidates.amax(dim=2, keepdim=True)
        lag = shortest + 1 + is_peak.float().argmax(dim=2)
        # A parabola through the peak and its neighbours finds it between the samples.
        left, peak, right = (correlation.gather(2, (lag + shift)[..., None])[..., 0] for shift in (-1, 0, 1))
        curve = (left - 2 * peak + right).clamp(max=-1e-9)
        pitch = SAMPLING_RATE / (lag + (0.5 * (left - right) / curve).clamp(-1, 1))

        times = (torch.arange(2 * HOP, device=voices.device) - HOP) / SAMPLING_RATE
        wave = torch.exp(-2j * math.pi * pitch[..., None] * times)
        coefficient = (windows * wave).sum(dim=2)
        phase = coefficient / coefficient.abs().clamp(min=1e-9)

        level = 10 * torch.log10(windows.square().mean(dim=2) + 1e-9)
        voiced = ((level + 55) / 15).clamp(0, 1)
        # The scales say what matters: a little error of the pitch is heard more than one of the envelope.
        tone = (
            torch.stack([1.5 * phase.real, 1.5 * phase.imag, 4 * torch.log2(pitch / 160)], dim=2) * voiced[..., None]
        )
        return torch.cat([tone, (self._levels(windows) - self.mean) @ self.components], dim=2).transpose(1, 2)

    @classmethod
    def load(cls, file: Path) -> "Analysis":
        analysis = cls()
        analysis.load_state_dict(load_file(file))
        return analysis


def draw_spectrogram(audio: torch.Tensor) -> np.ndarray:
    """Grey picture, uint8 `(height, width)`, of the lowest 6.4 kHz over 80 dB."""
    spectrum = torch.stft(audio.cpu(), 2048, 512, window=torch.hann_window(2048), return_complex=True)
    decibels = 20 * torch.log10(spectrum.abs()[:256].flip(0) + 1e-4)
    return ((decibels - decibels.max() + 80).clamp(min=0) / 80 * 255).byte().numpy()


def main() -> None:
    parser = make_parser(__doc__, steps=8000, batch_size=2, learning_rate=1e-3)
    parser.add_argument("--data", type=Path, required=True, help="dataset")
    parser.add_argument("--length", type=int, default=16, help="latents of a training clip, default: %(default)s")
    arguments = parser.parse_args()

    # 1. What latents say
    torch.manual_seed(arguments.seed)
    voices = load_dataset(arguments.data).voices
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "analysis.safetensors"
    if not file.exists():
        analysis = Analysis()
        analysis.fit(to_mono(voices[:200]))
        save_file(analysis.state_dict(), file)
    analysis = Analysis.load(file)

    # 2. The decoder and the encoder of these latents
    run = Run(arguments, {"audio_vae": make_audio_vae()})
    vae, analysis = run.unwrap("audio_vae").train(), analysis.to(run.device)
    for rng in run.steps():
        clips = rng.integers(len(voices), size=arguments.batch_size)
        starts = rng.integers(voices.shape[1] // HOP - arguments.length + 1, size=arguments.batch_size)
        whole = to_mono(np.stack([voices[clip] for clip in clips])).to(run.device)
        pairs = list(zip(analysis.encode(whole), whole, starts.tolist(), strict=True))
        latents = torch.stack([states[:, start : start + arguments.length] for states, _, start in pairs])
        audio = torch.stack([voice[HOP * start : HOP * (start + arguments.length)] for _, voice, start in pairs])
        with run.accelerator.autocast():
            encoder_loss = F.mse_loss(vae.encode(to_stereo(audio)).latent_dist.mean, latents)
            decoded = vae.decode(latents).sample.float()
        error = (decoded - audio[:, None]).square().mean() / audio.square().mean()
        waveform = waveform_loss(decoded[:, 0], audio)
        spectrum = spectral_loss(decoded[:, 0], audio)
        sides = (decoded[:, 0] - decoded[:, 1]).abs().mean()
        run.update(
            "audio_vae",
            waveform + 0.2 * spectrum + sides + encoder_loss,
            encoder_mse=encoder_loss,
            error=error,
            waveform=waveform,
            spectrum=spectrum,
        )

    # 3. Save, and look: true and decoded one above the other
    vae = run.unwrap("audio_vae")
    vae.save_pretrained(arguments.output / "audio_vae")
    audio = to_mono(voices[:4]).to(run.device)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_stereo(audio)).latent_dist.mode()).sample[:, 0]
    columns = [np.concatenate([draw_spectrogram(one) for one in pair]) for pair in zip(audio, decoded, strict=True)]
    save_picture(PIL.Image.fromarray(np.concatenate(columns, axis=1)), arguments.output / "samples.png")


if __name__ == "__main__":
    main()
