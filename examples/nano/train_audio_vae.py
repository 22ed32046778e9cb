# SPDX-License-Identifier: Apache-2.0
"""Trains a sound autoencoder, Diffusers' `AutoencoderOobleck`: 25 latents a second.

What a latent says is settled first, as the voices are synthesised: the phase of the pitch twice, the pitch, formants,
and how loud voice and noise are. The decoder learns to speak from it and the encoder, in every second step, to compute
it and what the decoder needs. Trained together from nothing they get no further than the few principal components of
a waveform that a dozen numbers hold: the phase of a pitch is hard to come upon, and easy to learn. So is noise: a
decoder draws none, and left to itself it is silent at an s, so what it should decode has noise that repeats.

    python examples/nano/train_audio_vae.py --output runs/audio_vae
"""

import itertools
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderOobleck
from recipe import Run, make_parser, save_picture
from torch import nn
from words import FRAME_RATE, LATENTS, SAMPLING_RATE, VOICE, Speech, draw_words, say

HOP = SAMPLING_RATE // FRAME_RATE
LATENT_CHANNELS = LATENTS.shape[1]
NUM_FRAMES = 49


def make_audio_vae() -> AutoencoderOobleck:
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * LATENT_CHANNELS,
        downsampling_ratios=[4, 4, 4, 8],
        channel_multiples=[2, 3, 4, 4],
        decoder_channels=16,
        decoder_input_channels=LATENT_CHANNELS,
        # What the pipelines resample to, as with the published model.
        sampling_rate=44100,
    )
    # The posterior's standard deviation is a constant, so small that a sample is as good as the mean.
    nn.init.zeros_(vae.encoder.conv2.weight_g[LATENT_CHANNELS:])
    nn.init.constant_(vae.encoder.conv2.bias[LATENT_CHANNELS:], -4.0)
    return vae


def make_speech(seed: int, num_frames: int = NUM_FRAMES, noise_repeats: bool = False) -> Speech:
    """A line in a voice, always the same for a seed."""
    rng = np.random.default_rng(seed)
    words = draw_words(rng, num_frames / FRAME_RATE)
    return say(rng, words, list(VOICE)[rng.integers(len(VOICE))], num_frames, noise_repeats)


def to_stereo(voices: torch.Tensor) -> torch.Tensor:
    """`(batch, samples)` to `(batch, 2, samples)`, the same on both sides."""
    return voices[:, None].expand(-1, 2, -1)


def spectral_loss(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean difference of log-magnitudes in windows of 10, 20 and 40 ms, `(batch, samples)` each."""
    losses = []
    for size in (128, 256, 512):
        window = torch.hann_window(size, device=target.device)
        spectra = [
            torch.stft(audio, size, size // 2, window=window, return_complex=True).abs() for audio in (decoded, target)
        ]
        losses.append(F.l1_loss(*(torch.log(spectrum + 0.01) for spectrum in spectra)))  # an s has about 0.15
    return torch.stack(losses).mean()


def waveform_loss(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Error of waveforms relative to their power, `(batch, samples)` each, in octaves from 300 Hz on.

    Low octaves count as much as loud ones, because the phase of the pitch is learned there first.
    """
    spectra = torch.fft.rfft(torch.stack([decoded - target, target])).abs().square().sum(dim=1) / target.shape[1]
    edges = [round(edge * target.shape[1] / SAMPLING_RATE) for edge in (0, 300, 600, 1200, 2400, 6400)]
    bands = [spectra[:, low:high].sum(dim=1) for low, high in itertools.pairwise(edges)]
    errors, powers = torch.stack(bands, dim=1)
    return (errors / (powers + 0.03 * powers.sum(dim=0) + 0.75)).mean()  # a voice has a power of about 25


def draw_spectrogram(audio: torch.Tensor) -> np.ndarray:
    """Grey picture, uint8 `(height, width)`, over 80 dB."""
    spectrum = torch.stft(audio.cpu(), 512, 128, window=torch.hann_window(512), return_complex=True)
    decibels = 20 * torch.log10(spectrum.abs().flip(0) + 1e-4)
    return ((decibels - decibels.max() + 80).clamp(min=0) / 80 * 255).byte().numpy()


def measure_snr(vae: AutoencoderOobleck, voices: torch.Tensor, latents: torch.Tensor) -> dict[str, float]:
    """Mean signal-to-noise ratios in dB of voices that the decoder spoke from latents, and from the encoder's."""

    def ratio(latents: torch.Tensor) -> float:
        noise = vae.decode(latents).sample.float().mean(dim=1) - voices
        return float(10 * torch.log10(voices.square().sum(dim=1) / noise.square().sum(dim=1)).mean())

    return {"decoder_snr": ratio(latents), "snr": ratio(vae.encode(to_stereo(voices)).latent_dist.mode())}


def main() -> None:
    parser = make_parser(__doc__, steps=20000, batch_size=4, learning_rate=3e-3)
    parser.add_argument("--start-from", type=Path, help="output of an earlier run, whose weights go on to be trained")
    parser.add_argument("--lines", type=int, default=3000, help="voices of two seconds, default: %(default)s")
    parser.add_argument("--length", type=int, default=24, help="latents of a training clip, default: %(default)s")
    arguments = parser.parse_args()
    if not 1 <= arguments.length <= NUM_FRAMES:
        parser.error(f"--length is {arguments.length}, it must be 1 to {NUM_FRAMES}, the frames of a voice")

    # 1. What latents say
    torch.manual_seed(arguments.seed)
    seeds = (*range(arguments.lines), *range(2**32, 2**32 + 12))
    speeches = [make_speech(seed) for seed in seeds]
    voices = torch.stack([torch.from_numpy(speech.voice) for speech in speeches])
    states = torch.from_numpy(np.stack([speech.latents.T for speech in speeches]))
    (voices, held_out), (states, held_out_states) = (
        values.split([arguments.lines, 12]) for values in (voices, states)
    )
    targets = np.stack([make_speech(seed, noise_repeats=True).voice for seed in seeds[: arguments.lines]])
    targets = torch.from_numpy(targets)
    vae = make_audio_vae()
    if arguments.start_from is not None:
        vae = AutoencoderOobleck.from_pretrained(arguments.start_from / "audio_vae").float()
    run = Run(arguments, {"audio_vae": vae})
    vae = run.unwrap("audio_vae").train()
    held_out, held_out_states = held_out.to(run.device), held_out_states.to(run.device)
    encode, decode = run.compile(vae.encoder), run.compile(vae.decoder)

    # 2. The decoder and the encoder of these latents
    for rng in run.steps():
        clips = rng.integers(len(voices), size=arguments.batch_size)
        starts = rng.integers(states.shape[2] - arguments.length + 1, size=arguments.batch_size)
        pieces = [(clip, slice(start, start + arguments.length)) for clip, start in zip(clips, starts, strict=True)]
        latents = torch.stack([states[clip][:, piece] for clip, piece in pieces]).to(run.device)
        audio, target = (
            torch.stack([values[clip, HOP * piece.start : HOP * piece.stop] for clip, piece in pieces]).to(run.device)
            for values in (voices, targets)
        )
        with run.accelerator.autocast():
            encoded = encode(to_stereo(audio)).chunk(2, dim=1)[0] if run.step % 2 else latents
            decoded = decode(encoded)
        encoder_loss, decoded = F.mse_loss(encoded.float(), latents), decoded.float()
        waveform, spectrum = (loss(decoded[:, 0], target) for loss in (waveform_loss, spectral_loss))
        sides = (decoded[:, 0] - decoded[:, 1]).abs().mean()
        run.update(
            "audio_vae",
            waveform + spectrum + sides + encoder_loss,
            encoder_mse=2 * encoder_loss,  # which half of the steps have
            waveform=waveform,
            spectrum=spectrum,
        )
        run.measure(lambda: measure_snr(vae, held_out, held_out_states))

    # 3. Save, and look: true and decoded one above the other
    vae = run.unwrap("audio_vae")
    vae.save_pretrained(arguments.output / "audio_vae")
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_stereo(held_out[:4])).latent_dist.mode()).sample[:, 0]
    pairs = zip(held_out, decoded, strict=False)
    columns = [np.concatenate([draw_spectrogram(one) for one in pair]) for pair in pairs]
    save_picture(PIL.Image.fromarray(np.concatenate(columns, axis=1)), arguments.output / "samples.png")


if __name__ == "__main__":
    main()
