# SPDX-License-Identifier: Apache-2.0
"""The drawn people: what a look names is seen, mouth and lids do as they are told, and boxes lie on them."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import people
import PIL.Image
import pytest
from people import HAIR_COLOUR, HAIR_STYLE, SHIRT, SKIN, WALL, Look, Motion, draw_look, draw_person, make_motion

LOOK = Look("tan", "brown", "short", False, False, "blue", "green")
SHUT, OPEN = (0.36, 0.0), (0.40, 0.30)


def draw(look=LOOK, mouths=(SHUT,), size=(128, 128), seed=0, **motion):
    num = len(mouths)
    still = {name: np.zeros(num) for name in ("turn", "tilt", "brows")} | {"lids": np.ones(num)}
    still |= {name: np.zeros((num, 2)) for name in ("shift", "gaze")} | {k: np.array(v) for k, v in motion.items()}
    return draw_person(np.random.default_rng(seed), look, Motion(**still), np.array(mouths), *size)


def crop(frame, box):
    left, top, right, bottom = box.round().astype(int)
    return frame[top:bottom, left:right].astype(int)


def is_throat(pixels):
    return (pixels[..., 1] < 36) & (pixels[..., 0].astype(int) - pixels[..., 1] > 36)


def test_a_seed_gives_the_same_clip_and_another_gives_another():
    def make(seed):
        rng = np.random.default_rng(seed)
        return draw_person(rng, draw_look(rng), make_motion(rng, 3, np.zeros(3)), np.array([SHUT] * 3), 64, 64).frames

    assert np.array_equal(make(1), make(1)) and not np.array_equal(make(1), make(2))


@pytest.mark.parametrize(
    ("field", "table", "x", "y"),
    [("shirt", SHIRT, 26, 124), ("wall", WALL, 8, 16), ("hair_colour", HAIR_COLOUR, 64, 19)],
)
def test_colours_are_those_of_the_tables(field, table, x, y):
    for name in table:
        pixel = draw(replace(LOOK, **{field: name}), seed=5).frames[0, y, x].astype(int)
        assert min(table, key=lambda key: np.abs(pixel - table[key]).sum()) == name


@pytest.mark.parametrize(
    "name, moved", [("turn", 0.2), ("tilt", 0.1), ("brows", 1.0), ("gaze", (1, 0)), ("gaze", (0, 1))]
)
def test_each_motion_is_seen(name, moved):
    frames = [draw(**motion).frames.astype(int) for motion in ({}, {name: [moved]})]
    assert (np.abs(frames[1] - frames[0]).sum(axis=-1) > 60).sum() > 5


def test_a_shift_moves_eyes_and_mouth():
    places = [draw(shift=[shift]).boxes.reshape(-1, 2) for shift in ((0, 0), (0.03, 0), (0, 0.03))]
    (right, none), (still, down) = ((place - places[0]).mean(axis=0) for place in places[1:])
    assert 3 < right < 5 and 3 < down < 9 and max(abs(none), abs(still)) < 0.5  # a nod moves a face more than its head


def test_every_fact_of_a_look_changes_many_pixels():
    looks = [replace(LOOK, hair_style=style) for style in HAIR_STYLE] + [replace(LOOK, skin=skin) for skin in SKIN]
    looks += [replace(LOOK, beard=True), *(replace(LOOK, skin=skin, glasses=True) for skin in SKIN)]
    frames = {look: draw(look).frames[0].astype(int) for look in looks}
    for look, frame in frames.items():
        changed = [(np.abs(frame - other).sum(axis=-1) > 60).sum() for key, other in frames.items() if key != look]
        assert min(changed) > 150


def test_sizes_show_the_same_moments():
    small, large = (draw(mouths=[OPEN], size=size, turn=[0.2], gaze=[[1, 0]]) for size in ((128, 128), (256, 256)))
    reduced = PIL.Image.fromarray(large.frames[0]).reduce(2)
    assert np.abs(np.asarray(reduced).astype(int) - small.frames[0]).mean() < 1.5
    assert np.allclose(large.eyes, 2 * small.eyes) and np.allclose(large.mouth, 2 * small.mouth)
    for size in ((96, 160), (160, 96)):
        other = draw(size=size)
        assert other.frames.shape == (1, size[1], size[0], 3)
        assert np.abs(other.eyes.mean(axis=1)[0, ::2].mean() - size[0] / 2) < 0.05 * min(size)


@pytest.mark.parametrize("skin", SKIN)
def test_the_mouth_opens_and_its_lips_stand_out(skin):
    drawing = draw(replace(LOOK, skin=skin), [SHUT, OPEN])
    shut, opened = (crop(frame, box) for frame, box in zip(drawing.frames, drawing.mouth, strict=True))
    assert not is_throat(shut).any() and is_throat(opened).mean() > 0.08
    height, width = shut.shape[:2]
    lip, chin = shut[round(0.7 * height), width // 2], shut[-1, width // 2]
    assert np.abs(lip - chin).sum() > 80


@pytest.mark.parametrize("glasses", [False, True])
@pytest.mark.parametrize("turn", [-0.28, 0.28])
def test_boxes_lie_on_eyes_and_mouth_and_a_blink_hides_the_iris(glasses, turn):
    poses = {"turn": [turn] * 4, "tilt": [0.06] * 4, "lids": [1, 1, 0, 0], "gaze": [[-1, 0], [1, 0]] * 2}
    drawing = draw(replace(LOOK, glasses=glasses), [OPEN] * 4, **poses)
    left, right, shut, also_shut = drawing.frames.astype(int)
    assert np.array_equal(shut, also_shut)
    moved = np.abs(left - right).sum(axis=-1) > 60
    assert all(crop(moved, box).sum() > 15 for box in drawing.eyes[0])
    assert sum(crop(np.abs(left - shut) > 9, box).sum() for box in drawing.eyes[0]) == (np.abs(left - shut) > 9).sum()
    assert is_throat(crop(shut, drawing.mouth[0])).sum() == is_throat(shut).sum() > 50


def test_motion_is_calm_blinks_and_follows_stress():
    motion = make_motion(np.random.default_rng(3), 500, np.repeat([0.0, 1.0], 250))
    shut = np.flatnonzero(np.diff((motion.lids < 1).astype(int), prepend=0, append=0)).reshape(-1, 2)
    assert set(shut[:, 1] - shut[:, 0]) <= {5, 6, 7} and 5 <= len(shut) <= 10
    assert motion.lids[(shut[:, 0] + shut[:, 1]) // 2].max() < 0.05
    assert np.abs(motion.tilt).max() <= np.radians(4)
    for track, limit in ((motion.turn, 0.03), (motion.shift, 0.004), (motion.brows, 0.2), (motion.gaze, 0.8)):
        assert np.abs(np.diff(track, axis=0)).max() < limit
    assert motion.brows[260:].mean() > motion.brows[:240].mean() + 0.5
    assert motion.shift[260:, 1].mean() > motion.shift[:240, 1].mean() + 0.008


def test_main_writes_a_sheet(tmp_path):
    sheet = tmp_path / "sheet.png"
    subprocess.run([sys.executable, people.__file__, sheet, "--seeds", "1", "--size", "48", "64"], check=True)
    assert PIL.Image.open(sheet).size == (8 * 48, 64)
