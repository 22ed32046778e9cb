# SPDX-License-Identifier: Apache-2.0
"""What the people of the world say: words are told apart, and mouths move with them."""

import numpy as np
import pytest
import scipy.signal
from words import FASTEST, MOUTH, SAMPLING_RATE, SOUNDS, VOCABULARY, VOICE, Word, draw_words, duration, say, split


def speak(word, voice, seed):
    return say(np.random.default_rng(seed), (word,), voice, int(np.ceil(25 * duration([word], FASTEST))))


def features(speech):
    """Levels of 24 bands at 24 moments of a word."""
    _, times, power = scipy.signal.spectrogram(speech.voice, SAMPLING_RATE, nperseg=512, noverlap=384)
    bands = np.add.reduceat(power, np.geomspace(4, 250, 24).astype(int))
    moments = np.searchsorted(times, np.linspace(*speech.spans[0], 24))
    return 10 * np.log10(bands[:, moments] + 1e-10).ravel()


def test_vocabulary():
    languages = ["English", "French", "German", "Mandarin", "Cantonese", "Japanese", "Korean"]
    assert {word.language for word in VOCABULARY} == {*languages, "syllables"}
    assert all(sum(word.language == name for word in VOCABULARY) >= 8 for name in languages)
    assert len({(word.spelling, word.sounds) for word in VOCABULARY}) == len(VOCABULARY)
    assert len({(word.language, word.romanised) for word in VOCABULARY}) == len(VOCABULARY)
    assert all(word.romanised.isascii() for word in VOCABULARY)


def test_same_seed_says_the_same():
    first, second, other = (say(np.random.default_rng(seed), VOCABULARY[:2], "high", 60) for seed in (3, 3, 4))
    assert all(np.array_equal(*parts) for parts in zip(first, second, strict=True))
    assert not any(np.array_equal(*parts) for parts in zip(first, other, strict=True))


@pytest.mark.parametrize("voice", VOICE)
def test_each_word_is_between_silences(voice):
    for i, word in enumerate(VOCABULARY):
        speech = speak(word, voice, i)
        assert {part.dtype for part in speech} == {np.dtype(np.float32)}
        assert len(speech.voice) == 512 * len(speech.mouth) and np.isfinite(speech.voice).all()
        assert 0.49 < np.abs(speech.voice).max() <= 0.5 and 0.8 < speech.stress.max() <= 1
        lead, tail = int(0.12 * SAMPLING_RATE), int(0.16 * SAMPLING_RATE)
        assert max(np.abs(speech.voice[:lead]).max(), np.abs(speech.voice[-tail:]).max()) < 1e-6
        assert not speech.mouth[:4, 1].any() and not speech.mouth[-4:, 1].any()


def test_latents_are_normalised():
    rng = np.random.default_rng(0)
    speeches = [say(rng, draw_words(rng, 3), list(VOICE)[i % len(VOICE)], 75) for i in range(30)]
    latents = np.concatenate([speech.latents for speech in speeches])
    assert np.abs(latents.mean(axis=0)).max() < 0.3
    assert (latents[:, :4].std(axis=0) > 0.6).all() and (latents[:, 4:].std(axis=0) < 1.8).all()
    assert np.abs(np.hypot(*latents[:, [0, 2]].T)).max() < 1.51 and latents.shape == (30 * 75, 13)


def test_noise_that_repeats_is_the_same_in_each_frame_and_all_else_as_it_was():
    word = next(word for word in VOCABULARY if word.romanised == "si")
    repeats, correlations = (False, True), []
    speeches = [say(np.random.default_rng(5), (word,), "medium", 30, noise_repeats) for noise_repeats in repeats]
    for speech in speeches:
        sos = scipy.signal.butter(8, 4500, "highpass", fs=SAMPLING_RATE, output="sos")  # an s is there alone
        hiss = scipy.signal.sosfiltfilt(sos, speech.voice)
        assert np.abs(hiss).max() > 0.02
        correlations.append(np.dot(hiss[:-512], hiss[512:]) / np.dot(hiss, hiss))
    assert abs(correlations[0]) < 0.2 and correlations[1] > 0.4
    assert np.abs(speeches[0].latents - speeches[1].latents).max() < 0.01


def test_lips_shut_for_three_frames_and_open_for_vowels():
    for i, word in enumerate(VOCABULARY):
        speech, sounds = speak(word, "deep", i), split(word)
        lengths = np.array([part.seconds for part in sounds])
        borders = speech.spans[0, 0] + np.cumsum([0, *lengths]) / lengths.sum() * np.diff(speech.spans[0])
        times = np.arange(len(speech.mouth)) / 25
        for part, begin, end in zip(sounds, borders[:-1], borders[1:], strict=True):
            opening = speech.mouth[(times > begin - 0.03) & (times < end + 0.03), 1]
            if part.mouth == "shut":
                assert (opening == 0).sum() >= 3, word
            if part.sound.kind == "vowel":
                assert opening.max() > 0.8 * MOUTH[part.mouth][1], word


@pytest.mark.parametrize("vowel", [name for name, sound in SOUNDS.items() if sound.kind == "vowel"])
def test_vowels_have_their_formants(vowel):
    voice = speak(Word("", vowel, vowel, (vowel + "33",)), "deep", 0).voice
    power, frequency = np.abs(np.fft.rfft(voice)) ** 2, np.fft.rfftfreq(len(voice), 1 / SAMPLING_RATE)
    first, second, _ = (VOICE["deep"][1] * formant for formant in SOUNDS[vowel].formants)
    above = np.where((frequency > (first + second) / 2) & (frequency < second + 300), power, 0)
    assert abs(frequency[power.argmax()] - first) < 60 and abs(frequency[above.argmax()] - second) < 60


def test_noise_is_20_decibels_softer_than_vowels():
    speech = speak(Word("", "sa", "sa", ("s", "a33")), "medium", 0)
    noise, vowel = np.split(speech.voice, [int(SAMPLING_RATE * (speech.spans[0] @ (0.65, 0.35)))])
    assert 0.05 < np.linalg.norm(noise) / np.linalg.norm(vowel) < 0.15


@pytest.mark.parametrize("voice", VOICE)
@pytest.mark.parametrize(("tone", "rise"), [("35", 1.12), ("33", 1.0), ("51", 0.8)])
def test_pitch_follows_voice_and_tone(voice, tone, rise):
    speech = speak(Word("", "a", "a", ("a" + tone,)), voice, 0)
    begin, end = (speech.spans[0] * SAMPLING_RATE).astype(int)
    halves = np.stack([speech.voice[begin:][: (end - begin) // 2], speech.voice[:end][(begin - end) // 2 :]])
    spectrum = np.abs(np.fft.rfft(halves * np.hanning(halves.shape[1]), SAMPLING_RATE))  # a bin is 1 Hz
    lowest, highest = (int(factor * VOICE[voice][0]) for factor in (0.7, 1.5))
    pitches = lowest + spectrum[:, lowest:highest].argmax(axis=1)  # the first harmonic
    assert abs(pitches.mean() / VOICE[voice][0] - 1) < 0.12 and abs(pitches[1] / pitches[0] - rise) < 0.06


def test_words_are_told_apart_and_mouths_follow_loudness():
    first, second = ([say(np.random.default_rng(seed), [w], "medium", 45) for w in VOCABULARY] for seed in (0, 1))
    distance = np.square(np.array([features(s) for s in first])[:, None] - [features(s) for s in second]).mean(axis=2)
    language = np.array([word.language for word in VOCABULARY])
    nearest = np.where(language[:, None] == language, distance, np.inf).argmin(axis=1)
    assert (nearest == np.arange(len(VOCABULARY))).mean() >= 0.95
    opening = np.concatenate([speech.mouth[:, 1] for speech in first])
    voice = np.concatenate([speech.voice for speech in first])
    around = np.lib.stride_tricks.sliding_window_view(np.pad(voice, 256), 512)[:-1:512]  # of each frame's moment
    assert np.corrcoef(opening, around.std(axis=1))[0, 1] > 0.7


def test_drawn_words_fit_and_others_raise():
    for seed, seconds in enumerate([1, 2, 5] * 20):
        words = draw_words(np.random.default_rng(seed), seconds)
        spans = say(np.random.default_rng(seed), words, "medium", 25 * seconds).spans
        assert 1 <= len(words) <= 8 and (spans[1:, 0] - spans[:-1, 1] > 0.079).all()
    with pytest.raises(ValueError, match="hello thank you goodbye"):
        say(np.random.default_rng(0), VOCABULARY[:3], "medium", 25)
    silent = say(np.random.default_rng(0), (), "medium", 25)
    assert not silent.voice.any() and not silent.mouth[:, 1].any() and silent.spans.shape == (0, 2)
