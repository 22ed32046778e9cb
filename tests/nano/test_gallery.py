# SPDX-License-Identifier: Apache-2.0
"""The moving pictures of the README and the gallery."""

import gallery
import numpy as np
import PIL.Image
import pytest


def test_draws_clips_that_move_above_their_captions(tmp_path):
    frames = np.stack([np.full((16, 16, 3), level, np.float32) for level in (0.0, 0.5, 1.0)])
    clips = [gallery.Clip(frames, np.zeros(4), caption) for caption in ("short", "a caption of several long lines")]
    gallery.draw(clips, tmp_path / "clips.webp", columns=2, size=64, quality=90)
    with PIL.Image.open(tmp_path / "clips.webp") as image:
        levels, inks = [], []
        for moment in range(image.n_frames):
            image.seek(moment)
            pixels = np.asarray(image.convert("L"), np.float32)
            left, right = np.split(pixels, 2, axis=1)
            levels.append([half[8:72, 8:72].mean() / 255 for half in (left, right)])
            inks.append([(half[76:] < 160).sum() for half in (left, right)])
    assert np.allclose(levels, [[0, 0], [0.5, 0.5], [1, 1]], atol=0.03)
    assert all(0 < short < long for short, long in inks)
    assert (pixels[-4:] > 240).all()  # no line is cut off


@pytest.mark.slow
def test_draws_all_pictures(tmp_path):
    gallery.main(["--output", str(tmp_path)])
    expected = {path.name for path in gallery.IMAGES.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for path in tmp_path.iterdir():
        with PIL.Image.open(path) as image:
            assert image.n_frames == 49
