# SPDX-License-Identifier: Apache-2.0
"""Draws a speaking person: a look that prompts can name, a motion, and a mouth that follows what is said.

- any size: the head follows the shorter side, and two sizes of one state of `rng` are pictures of the same moments
- points are complex numbers, right + 1j * down; a head's are in parts of the shorter side, from the middle of the face
- features lie on an ellipsoid: when the head turns they move further than its outline
- everything is drawn larger with hard edges and reduced: edges are two pixels soft, areas are smooth

    python examples/nano/people.py sheet.png --size 128 128   # a contact sheet: seeds as rows, moments as columns
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
from scipy.ndimage import gaussian_filter1d
from words import FRAME_RATE

Colour = tuple[int, int, int]

SKIN = {"pale": (252, 218, 196), "tan": (222, 168, 126), "brown": (178, 118, 80), "dark": (96, 58, 46)}
HAIR_COLOUR = {
    "black": (36, 32, 42),
    "brown": (150, 94, 48),
    "red": (208, 82, 30),
    "blond": (236, 190, 80),
    "white": (230, 232, 240),
}
HAIR_STYLE = ("short", "long", "curly", "bun", "bob", "bald")
SHIRT = {
    "red": (212, 50, 56),
    "yellow": (244, 200, 44),
    "green": (40, 156, 88),
    "blue": (46, 92, 214),
    "purple": (142, 66, 188),
    "grey": (100, 104, 116),
}
WALL = {
    "yellow": (250, 232, 156),
    "green": (150, 214, 164),
    "blue": (142, 194, 240),
    "purple": (196, 170, 236),
    "grey": (158, 164, 180),
    "pink": (244, 168, 196),
}

# What prompts do not say.
LIPS = {"pale": (212, 90, 98), "tan": (192, 70, 74), "brown": (204, 78, 80), "dark": (204, 98, 100)}
IRIS = ((92, 56, 30), (54, 110, 178), (62, 128, 84), (96, 106, 122))
LASH, FRAME, PUPIL = (44, 30, 32), (40, 36, 44), (18, 14, 20)
THROAT, TONGUE, WHITE = (74, 14, 26), (226, 96, 104), (252, 252, 250)


@dataclass(frozen=True)
class Look:
    """What a prompt can say of a person: keys of the tables above."""

    skin: str
    hair_colour: str
    hair_style: str
    glasses: bool
    beard: bool
    shirt: str
    wall: str


@dataclass(frozen=True)
class Motion:
    """How a person moves, frame by frame."""

    turn: np.ndarray  # (num_frames,), radians to the right
    tilt: np.ndarray  # (num_frames,), radians clockwise
    shift: np.ndarray  # (num_frames, 2), right and down in parts of the shorter side; down is a nod, too
    lids: np.ndarray  # (num_frames,), 1 open, 0 shut
    gaze: np.ndarray  # (num_frames, 2), right and down in [-1, 1]
    brows: np.ndarray  # (num_frames,), how far they are raised in [-1, 1]


@dataclass(frozen=True)
class Drawing:
    """A clip, and where its eyes and mouth are: left, top, right, bottom in pixels with a margin of a fifth."""

    frames: np.ndarray  # (num_frames, height, width, 3), uint8
    eyes: np.ndarray  # (num_frames, 2, 4), from left to right, as large as if they were open
    mouth: np.ndarray  # (num_frames, 4), the lips

    @property
    def boxes(self) -> np.ndarray:
        """Both eyes and the mouth, `(num_frames, 3, 4)`."""
        return np.concatenate([self.eyes, self.mouth[:, None]], axis=1)


def draw_look(rng: np.random.Generator) -> Look:
    """Draws a look."""
    tables = (SKIN, HAIR_COLOUR, HAIR_STYLE, (False, True), (False, True, False), SHIRT, WALL)
    return Look(*(list(table)[rng.integers(len(table))] for table in tables))


def make_motion(rng: np.random.Generator, num_frames: int, stress: np.ndarray) -> Motion:
    """Draws a calm motion whose brows and nods follow `stress`, `(num_frames,)` in [0, 1]."""
    frames = np.arange(num_frames)

    def drift(rate: float) -> np.ndarray:
        """A smooth wander in [-1, 1], about `rate` times a second to and fro."""
        rates, phases = rate * rng.uniform([0.6, 1.1], [0.9, 1.6]), rng.uniform(0, 2 * np.pi, 2)
        return np.sin(2 * np.pi * np.outer(frames / FRAME_RATE, rates) + phases) @ [0.6, 0.4]

    lids, gaze = np.ones(num_frames), np.zeros((num_frames, 2))
    blink, look = FRAME_RATE * rng.uniform(0.4, 2.5), 0.0
    while blink < num_frames:
        lids = np.minimum(lids, np.clip((np.abs(frames - blink) - 0.8) / 2.4, 0, 1))
        blink += FRAME_RATE * rng.uniform(2, 4)
    while look < num_frames:
        target = rng.uniform(-1, 1, 2) * rng.integers(2)  # half of the time straight ahead
        gaze[frames >= look] = target
        look += FRAME_RATE * rng.uniform(1.0, 2.2)
    stressed = gaussian_filter1d(np.asarray(stress, float), 2.5, mode="nearest")
    return Motion(
        turn=0.28 * drift(0.3),
        tilt=np.radians(4) * drift(0.3),
        shift=np.stack([0.02 * drift(0.3), 0.008 * drift(0.35) + 0.016 * stressed], axis=1),
        lids=lids**2 * (3 - 2 * lids),
        gaze=gaussian_filter1d(gaze, 1.3, axis=0, mode="nearest"),
        brows=np.clip(0.25 * drift(0.3) + 0.75 * stressed, -1, 1),
    )


# Curves and colours


def mix(colour: Colour, other: Colour, part: float) -> Colour:
    """Goes `part` of the way from `colour` to `other`."""
    return tuple(round((1 - part) * a + part * b) for a, b in zip(colour, other, strict=True))


def ellipse(middle: complex, radii: complex, num_points: int = 28) -> np.ndarray:
    """An ellipse, `(num_points,)` complex, as all outlines are."""
    angles = 2 * np.pi * np.arange(num_points) / num_points
    return middle + radii.real * np.cos(angles) + 1j * radii.imag * np.sin(angles)


def smooth(points: list[complex], steps: int = 6) -> np.ndarray:
    """A closed curve through points (Catmull-Rom)."""
    before, start, end, after = (np.roll(points, -shift)[:, None] for shift in (-1, 0, 1, 2))
    t = np.arange(steps) / steps
    slope, other = (end - before) / 2, (after - start) / 2
    bend = 3 * (end - start) - 2 * slope - other
    return (start + t * (slope + t * (bend + t * (2 * (start - end) + slope + other)))).ravel()


def mirrored(*right: complex) -> np.ndarray:
    """A closed curve through points of the right half and their reflections."""
    return smooth([*right, *(complex(-point.real, point.imag) for point in reversed(right) if point.real > 0)])


def ribbon(curve: np.ndarray, thickness: float, taper: float = 0.6) -> np.ndarray:
    """A band around a curve that runs from left to right, thinner at both ends."""
    half = 0.5j * thickness * (1 - taper * np.linspace(-1, 1, len(curve)) ** 2)
    return np.concatenate([curve - half, (curve + half)[::-1]])


def arc(middle: complex, radii: complex, power: float = 1.5) -> np.ndarray:
    """A curve from left to right that bulges by `radii.imag`, down if positive: half an ellipse, a parabola at 2."""
    angles = np.linspace(0, np.pi, 17)
    return middle - radii.real * np.cos(angles) + 1j * radii.imag * np.sin(angles) ** power


def bounds(points: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom."""
    return np.array([points.real.min(), points.imag.min(), points.real.max(), points.imag.max()])


def box_around(outline: np.ndarray) -> np.ndarray:
    """Bounds with a margin of a fifth of the size on each side."""
    box = bounds(outline)
    margin = 0.2 * (box[2:] - box[:2])
    return box + np.concatenate([-margin, margin])


# Places and outlines from the middle of the face, in parts of the shorter side; of hair with the parting on the left.
# fmt: off
FACE, EYE_WHITE = 0.24 + 0.285j, 0.075 + 0.047j  # half widths and heights
EYE, NOSE, MOUTH = 0.112, 0.076j, 0.14j  # middles; of the right eye
FRINGE = {
    "short": smooth([
        -0.236 + 0.01j, -0.264 - 0.1j, -0.235 - 0.24j, -0.11 - 0.325j, 0.06 - 0.335j, 0.21 - 0.265j, 0.266 - 0.12j,
        0.238 + 0.01j, 0.212 - 0.09j, 0.16 - 0.165j, 0.03 - 0.165j, -0.09 - 0.205j, -0.16 - 0.165j, -0.208 - 0.1j,
    ]),
    "long": smooth([
        -0.262 + 0.2j, -0.275 - 0.04j, -0.25 - 0.22j, -0.13 - 0.325j, 0.06 - 0.335j, 0.22 - 0.26j, 0.276 - 0.06j,
        0.262 + 0.2j, 0.225 + 0.06j, 0.2 - 0.07j, 0.11 - 0.165j, -0.06 - 0.225j, -0.15 - 0.15j, -0.208 - 0.05j,
        -0.228 + 0.06j,
    ]),
    "curly": mirrored(-0.31j, 0.12 - 0.3j, 0.25 - 0.2j, 0.236 - 0.03j, 0.19 - 0.14j, 0.08 - 0.18j, -0.185j),
    "bun": mirrored(
        -0.32j, 0.08 - 0.315j, 0.2 - 0.26j, 0.256 - 0.12j, 0.238 + 0j, 0.212 - 0.1j, 0.12 - 0.19j, -0.212j
    ),
    "bob": mirrored(
        -0.335j, 0.12 - 0.325j, 0.25 - 0.23j, 0.288 - 0.04j, 0.262 + 0.14j, 0.22 + 0.04j, 0.195 - 0.09j, 0.1 - 0.13j,
        -0.134j,
    ),
}
BACK = {
    "long": mirrored(-0.3j, 0.2 - 0.24j, 0.28 - 0.04j, 0.3 + 0.2j, 0.31 + 0.38j, 0.22 + 0.46j, 0.44j),
    "bob": mirrored(-0.3j, 0.22 - 0.23j, 0.3 - 0.02j, 0.31 + 0.16j, 0.25 + 0.24j, 0.1 + 0.22j, 0.2j),
}
BALLS = {  # of hair, behind the head: middles and radii
    "curly": [(ellipse(-0.06j, 0.24 + 0.24j, 36)[k % 36], 0.085) for k in range(-20, 4, 2)],
    "bun": [(-0.325j, 0.08)],
}
BEARD = mirrored(0.105j, 0.12 + 0.115j, 0.2 + 0.08j, 0.243 + 0j, 0.25 + 0.12j, 0.2 + 0.23j, 0.09 + 0.31j)
NECK = np.array([0.1 + 0.35j, 0.06 + 0.385j, -0.06 + 0.385j, -0.1 + 0.35j])
BODY = mirrored(
    0.25j, 0.1 + 0.35j, 0.2 + 0.385j, 0.36 + 0.43j, 0.49 + 0.51j, 0.56 + 0.66j, 0.57 + 1j, 0.5 + 3j
)
HEM = {
    "round": mirrored(0.25j, 0.16 + 0.32j, 0.12 + 0.41j, 0.44j),
    "v": mirrored(0.25j, 0.15 + 0.32j, 0.14 + 0.37j, 0.07 + 0.45j, 0.525j),
    "flaps": mirrored(0.25j, 0.16 + 0.32j, 0.2 + 0.37j, 0.13 + 0.48j, 0.01 + 0.4j),
}
NECKLINE = {
    "round": mirrored(0.25j, 0.125 + 0.32j, 0.09 + 0.385j, 0.405j),
    "v": mirrored(0.25j, 0.115 + 0.32j, 0.108 + 0.36j, 0.05 + 0.43j, 0.485j),
    "flaps": mirrored(0.25j, 0.12 + 0.32j, 0.1 + 0.36j, 0.4j),
}
# fmt: on


# Drawing


SPOT = np.clip(1 - np.hypot(*np.mgrid[-1:1:48j, -1:1:48j]), 0, 1)
SPOT = PIL.Image.fromarray((255 * SPOT**2 * (3 - 2 * SPOT)).astype(np.uint8))  # a soft one


class Canvas:
    """An image to draw on: the whole, or a part of it whose left upper corner is at `corner`."""

    def __init__(self, image: PIL.Image.Image, corner: complex = 0j) -> None:
        self.image, self.corner, self.pen = image, corner, PIL.ImageDraw.Draw(image)

    def fill(self, outline: np.ndarray, colour: Colour | int) -> None:
        self.pen.polygon((outline - self.corner + (0.5 + 0.5j)).view(float).tolist(), fill=colour)

    @contextmanager
    def inside(self, outline: np.ndarray, paint: PIL.Image.Image) -> Iterator["Canvas"]:
        """Covers an outline with a painting of the whole canvas; what is drawn on the result stays inside."""
        left, top, right, bottom = (bounds(outline) + np.array([-1, -1, 2, 2])).astype(int).tolist()
        part = Canvas(paint.crop((left, top, right, bottom)), complex(left, top))
        yield part
        mask = Canvas(PIL.Image.new("L", part.image.size), part.corner)
        mask.fill(outline, 255)
        corner = part.corner - self.corner
        self.image.paste(part.image, (int(corner.real), int(corner.imag)), mask.image)

    def cover(self, outline: np.ndarray, paint: PIL.Image.Image) -> None:
        with self.inside(outline, paint):
            pass

    def spot(self, outline: np.ndarray, colour: Colour) -> None:
        """A soft spot within the bounds of an outline."""
        left, top, right, bottom = bounds(outline - self.corner).round().astype(int)
        self.image.paste(colour, (left, top), SPOT.resize((right - left, bottom - top)))


class Head(NamedTuple):
    """Where the head is in a frame."""

    middle: complex
    unit: complex  # of lengths, turned by the tilt
    stretch: complex  # of the head's width and height
    turn: float
    nod: float

    def __call__(self, points: np.ndarray | complex) -> np.ndarray:
        """Places points of the head on the canvas; the middle of the face is nearest and moves most when it turns."""
        depth = np.sqrt(np.clip(1 - (points.real / FACE.real) ** 2 - (points.imag / 0.37) ** 2, 0, None))
        moved = points + depth * (FACE.real * np.sin(self.turn) + 1j * self.nod)
        return self.middle + self.unit * (moved.real * self.stretch.real + 1j * moved.imag * self.stretch.imag)

    def ball(self, middle: complex, radius: float) -> np.ndarray:
        """A ball on the head, whose shape no turn changes."""
        return self(middle) + self.unit * ellipse(0j, radius * (1 + 1j))


class Studio:
    """What stays the same for a clip: paintings of the whole canvas, lit from one side, and the body."""

    def __init__(self, rng: np.random.Generator, look: Look, width: int, height: int) -> None:
        self.look, self.frame_size = look, (width, height)
        self.scale = max(2, 768 // min(width, height))  # how many times larger than its frames the canvas is
        self.size = (self.scale * width, self.scale * height)
        self.unit = min(self.size)
        self.stretch = rng.uniform(1.0, 1.07) * complex(rng.uniform(0.97, 1.03), rng.uniform(0.97, 1.02))
        place = complex(rng.uniform(-0.02, 0.02), rng.uniform(-0.062, -0.042))
        self.middle = complex(*self.size) / 2 + self.unit * place
        self.light, parting = 2 * rng.integers(2, size=2) - 1  # 1: from the right, on the left
        self.iris = IRIS[rng.integers(len(IRIS))]
        self.lips = mix(LIPS[look.skin], (216, 70, 92), rng.uniform(0, 0.3))
        self.collar = list(HEM)[rng.integers(len(HEM))]

        skin, hair = SKIN[look.skin], HAIR_COLOUR[look.hair_colour]
        self.skin = self.paint(skin, 1.06, 0.72, 0.7)
        self.hair = self.paint(hair, 1.12, 0.7, 0.62)
        self.back = self.paint(mix(hair, (50, 34, 40), 0.13), 1.0, 0.78, 0.9)
        self.beard = self.paint(mix(hair, (60, 50, 56), 0.16), 1.0, 0.8, 0.7)
        self.wall = self.paint(WALL[look.wall], 1.05, 0.82, 1.2)
        self.white = PIL.Image.new("RGB", self.size, WHITE)
        self.stubble = mix(skin, hair, 0.5)
        self.brow = mix(hair, (60, 40, 36), 0.35)
        self.shade = mix(skin, (110, 30, 30), 0.22)
        self.glow = mix(skin, (255, 214, 190), 0.2)
        self.lid = mix(skin, (206, 120, 110), 0.25)
        self.lens = mix(skin, (226, 236, 250), 0.17)
        self.blush = mix(skin, (244, 60, 76), 0.27)
        self.fringe = FRINGE.get(look.hair_style)
        if self.fringe is not None and parting < 0:
            self.fringe = -self.fringe.conj()
        self.body, self.body_mask = self.draw_body()

    def paint(self, colour: Colour, near: float, far: float, reach: float) -> PIL.Image.Image:
        """A colour lit from beside the head: `near` times as bright there, `far` times at a distance of `reach`."""
        y, x = np.mgrid[0 : self.size[1] : 48j, 0 : self.size[0] : 48j]
        light = self.middle + self.unit * (0.16 * self.light - 0.2j)
        distance = np.clip(np.abs(x + 1j * y - light) / (reach * self.unit), 0, 1)
        bright = near + (far - near) * distance**2 * (3 - 2 * distance)
        lit = colour * bright[..., None] ** np.array([0.86, 1.0, 1.06])  # shadows are warm
        small = PIL.Image.fromarray(np.clip(lit, 0, 255).round().astype(np.uint8))
        return small.resize(self.size, PIL.Image.Resampling.BICUBIC)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Places points of the body on the canvas."""
        return self.middle + self.unit * points

    def draw_body(self) -> tuple[PIL.Image.Image, PIL.Image.Image]:
        """Draws shirt, collar and what the neckline shows, and the mask of all."""
        shirt = SHIRT[self.look.shirt]
        mask = Canvas(PIL.Image.new("L", self.size))
        mask.fill(self.place(BODY), 255)
        body = Canvas(self.paint(shirt, 1.12, 0.8, 1.1))
        body.fill(self.place(HEM[self.collar]), mix(shirt, WHITE, 0.25))
        body.cover(self.place(NECKLINE[self.collar]), self.skin)
        return body.image, mask.image

    def draw_frame(
        self, head: Head, lids: float, gaze: complex, brows: float, mouth: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Draws a frame; returns it, and the boxes of eyes and mouth as in `Drawing`."""
        style, canvas = self.look.hair_style, Canvas(self.wall.copy())
        if style in BACK:
            canvas.cover(head(BACK[style]), self.back)
        for middle, radius in BALLS.get(style, ()):
            canvas.cover(head.ball(middle, radius), self.hair)
        canvas.image.paste(self.body, None, self.body_mask)
        self.draw_face(canvas, head, mouth[1])
        for side in (-1, 1):
            self.draw_eye(canvas, head, side, lids, gaze, brows)
        lips = self.draw_mouth(canvas, head, mouth)
        if self.fringe is not None:
            canvas.cover(head(self.fringe), self.hair)
        if self.look.glasses:
            self.draw_glasses(canvas, head)
        image = canvas.image.resize(self.frame_size, PIL.Image.Resampling.BILINEAR)
        eyes = [box_around(head(ellipse(side * EYE, EYE_WHITE))) for side in (-1, 1)]
        return np.asarray(image), np.stack(eyes) / self.scale, box_around(lips) / self.scale

    def draw_face(self, canvas: Canvas, head: Head, opening: float) -> None:
        """Draws neck, ears and face, with all that lies on the skin under eyes and mouth."""
        neck = np.concatenate([head.middle + head.unit * np.array([-0.1 + 0.12j, 0.1 + 0.12j]), self.place(NECK)])
        with canvas.inside(neck, self.skin) as part:
            part.spot(head.middle + head.unit * ellipse(0.25j, 0.34 + 0.17j), self.shade)
        if self.look.hair_style not in BACK:
            for side in (-1, 1):
                ear = head.middle + head.unit * (side * 0.24 + 0.02j - 0.08 * head.turn)
                with canvas.inside(ear + head.unit * ellipse(0j, 0.04 + 0.058j), self.skin) as part:
                    part.spot(ear + head.unit * ellipse(side * 0.01, 0.04 + 0.05j), self.shade)

        def with_jaw(points: np.ndarray) -> np.ndarray:
            low = np.clip(points.imag / FACE.imag, 0, None)
            return head(points.real * (1 - 0.1 * low**2) + 1j * points.imag * (1 + 0.45 * opening * low**2))

        with canvas.inside(with_jaw(ellipse(0j, FACE, 48)), self.skin) as face:
            for side in (-1, 1):
                face.spot(head(ellipse(side * 0.15 + 0.095j, 0.09 + 0.075j)), self.blush)
            if self.look.beard:
                face.cover(with_jaw(BEARD), self.beard)
            face.fill(head(ellipse(NOSE, 0.03 + 0.022j)), self.shade)
            if self.look.glasses:
                for side in (-1, 1):
                    face.fill(head(ellipse(side * EYE, 0.097 * (1 + 1j))), self.lens)
            face.spot(head(ellipse(NOSE + 0.01 * self.light - 0.02j, 0.042 + 0.045j)), self.glow)
            if self.fringe is not None:
                face.fill(head(self.fringe + 0.016j), self.shade)

    def draw_eye(self, canvas: Canvas, head: Head, side: int, lids: float, gaze: complex, brows: float) -> None:
        middle = side * EYE
        lower = arc(middle, EYE_WHITE)
        upper = arc(middle, complex(EYE_WHITE.real, EYE_WHITE.imag * (0.85 - 1.85 * lids)))
        if lids < 1:
            open_lid = arc(middle, EYE_WHITE.conjugate())
            canvas.fill(head(np.concatenate([open_lid, lower[::-1]])), self.lid)
        if lids > 0.05:
            with canvas.inside(head(np.concatenate([upper, lower[::-1]])), self.white) as eye:
                iris = middle + complex(0.026 * gaze.real, 0.009 * gaze.imag)
                eye.fill(head(ellipse(iris, 0.0385 * (1 + 1j))), self.iris)
                eye.fill(head(ellipse(iris, 0.0195 * (1 + 1j))), PUPIL)
                eye.fill(head(ellipse(iris + 0.013 * self.light - 0.014j, 0.0105 * (1 + 1j))), WHITE)
        canvas.fill(head(ribbon(upper, 0.018)), LASH)
        canvas.fill(head(ribbon(arc(side * EYE - (0.098 + 0.02 * brows) * 1j, 0.066 - 0.018j, 2), 0.022)), self.brow)

    def draw_mouth(self, canvas: Canvas, head: Head, mouth: np.ndarray) -> np.ndarray:
        """Draws lips, and teeth and tongue between them; returns the outline of the lips on the canvas."""
        width, opening = FACE.real * mouth[0], 2 * FACE.real * mouth[1]  # half the width, all of the opening
        middle, smile = MOUTH + 0.2j * opening, 0.42 * max(0.0, width - 0.03)
        over, under = smile - 0.45 * opening, smile + 0.55 * opening  # where the middles of the lips are
        upper, lower = arc(middle, complex(width, over)), arc(middle, complex(width, under), 1.1)
        rim = arc(middle, complex(width + 0.014, over - 0.026), 1.2)
        bow = rim + 0.007j * np.exp(-(((rim - middle).real / 0.02) ** 2))
        lips = np.concatenate([bow, arc(middle, complex(width + 0.014, under + 0.029), 1.1)[::-1]])
        dark = mix(self.lips, THROAT, min(1.0, 0.5 + 20 * opening))
        if self.look.beard:  # thinner around the lips, or a red one would hide them
            away = lips - lips.mean()
            canvas.fill(head(lips + 0.013 * away / np.abs(away)), self.stubble)
        canvas.fill(head(lips), self.lips)
        canvas.fill(head(ribbon(arc(middle, complex(width, smile)), 0.013)), dark)
        if opening > 0.004:
            teeth = 0.028j * np.clip(15 * opening - 0.2, 0, 1) * np.clip((width - 0.04) / 0.03, 0, 1)
            with canvas.inside(head(np.concatenate([upper, lower[::-1]])), self.white) as hole:
                hole.fill(head(np.concatenate([upper + teeth, lower[::-1] + 0.01j])), dark)
                hole.fill(head(ellipse(middle + under * 1j, complex(0.6 * width, 0.36 * opening))), TONGUE)
        return head(lips)

    def draw_glasses(self, canvas: Canvas, head: Head) -> None:
        for side in (-1, 1):
            for half in (1, -1):
                rims = [arc(side * EYE, complex(radius, half * radius), 1.0) for radius in (0.104, 0.09)]
                canvas.fill(head(np.concatenate([rims[0], rims[1][::-1]])), FRAME)
        canvas.fill(head(ribbon(arc(-0.012j, 0.016 - 0.006j), 0.016, 0)), FRAME)


def draw_person(
    rng: np.random.Generator, look: Look, motion: Motion, mouth: np.ndarray, width: int, height: int
) -> Drawing:
    """
    Draws a clip.

    Args:
        rng (`np.random.Generator`): Draws what the look does not say.
        look (`Look`): Who is seen.
        motion (`Motion`): How the head, lids, eyes and brows move.
        mouth (`np.ndarray` of shape `(num_frames, 2)`): Width and opening in parts of the head's width.
        width, height (`int`): Size of the frames in pixels.
    """
    studio = Studio(rng, look, width, height)
    drawn = []
    for index, shape in enumerate(mouth):
        shift = complex(*motion.shift[index])
        unit = studio.unit * np.exp(1j * motion.tilt[index])
        head = Head(studio.middle + studio.unit * shift, unit, studio.stretch, motion.turn[index], shift.imag)
        gaze = complex(*motion.gaze[index])
        drawn.append(studio.draw_frame(head, motion.lids[index], gaze, motion.brows[index], shape))
    return Drawing(*(np.stack(each) for each in zip(*drawn, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--seeds", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), help="width and height, default: 128 128")
    arguments = parser.parse_args()
    rows = []
    shapes = np.array([(0.36, 0.0), (0.40, 0.30), (0.46, 0.08), (0.16, 0.12), (0.30, 0.2), (0.36, 0.0)])
    for seed in range(arguments.seeds):
        rng = np.random.default_rng(seed)
        speech = np.linspace(0, len(shapes) - 1, 64)
        mouth = np.stack([np.interp(speech, np.arange(len(shapes)), column) for column in shapes.T], axis=1)
        motion = make_motion(rng, len(mouth), mouth[:, 1] / 0.3)
        drawing = draw_person(rng, draw_look(rng), motion, mouth, *arguments.size)
        rows.append(np.concatenate(list(drawing.frames[4::8]), axis=1))
    PIL.Image.fromarray(np.concatenate(rows)).save(arguments.output)


if __name__ == "__main__":
    main()
