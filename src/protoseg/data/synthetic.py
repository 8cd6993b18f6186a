"""Painted landscapes with exact masks: nothing to download, learned in about a minute, nice to look at.

Every class has several looks (a tree is a fir, a round crown, an autumn or a blossoming one; the sky is clear, at
dusk, at night or grey) and looks of different classes share colours, so that one centre per class is a poor summary:
the case prototypes are for. A scene is a function of (split, index) and its size alone. While it is painted the mask
holds class + 8 * look, so that both are known of every pixel (`Scenes.looks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from protoseg.config import DataError
from protoseg.data.labels import LabelSpace

SKY, MOUNTAIN, MEADOW, LAKE, TREE, HOUSE, BALLOON = range(7)
LABELS = LabelSpace(
    names=("sky", "mountain", "meadow", "lake", "tree", "house", "balloon"),
    palette=(
        (120, 180, 235), (140, 120, 110), (150, 200, 90), (40, 100, 200), (20, 110, 60), (200, 60, 50), (245, 180, 40),
    ),
)  # fmt: skip
# What each class may look like, in the order of the tables below.
LOOKS = (
    ("clear", "dusk", "night", "overcast"),
    ("peaks", "hills", "tables"),
    ("grass", "wheat", "snow", "sand"),
    ("blue", "turquoise", "dark"),
    ("fir", "round", "autumn", "blossom"),
    ("brick", "white", "timber"),
    ("gores", "belt", "dots"),
)
STRIDE = 8  # of the looks in the codes that are painted; more than there are classes
SPLITS = {"train": 0, "val": 1, "test": 2}
FINE = 2  # scenes are painted at twice their size and averaged, so that edges are soft as in photos

# (top, bottom) colours of the sky, the light they cast, and how many stars.
SKIES = (
    ((70, 140, 220), (190, 220, 245), 1.0, 0),
    ((80, 60, 130), (250, 160, 90), 0.9, 0),
    ((10, 15, 45), (45, 50, 95), 0.6, 60),
    ((150, 155, 165), (205, 208, 212), 0.85, 0),
)
MEADOWS = ((96, 158, 62), (222, 190, 96), (235, 238, 245), (205, 160, 115))  # grass, wheat, snow, sand
LAKES = ((50, 110, 190), (70, 190, 185), (30, 55, 75))
MOUNTAINS = ((125, 125, 135), (100, 140, 90), (178, 98, 66))  # snow-capped peaks, round hills, red tables
TREES = ((24, 84, 54), (70, 150, 60), (215, 110, 40), (240, 170, 195))  # fir, round, autumn, blossom
HOUSES = (((178, 70, 55), (90, 45, 40)), ((238, 234, 222), (70, 80, 95)), ((140, 96, 58), (58, 98, 160)))
BALLOONS = (((220, 50, 60), (250, 240, 220)), ((240, 190, 40), (40, 110, 190)), ((120, 60, 160), (80, 200, 160)))

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Scenes:
    """`count` generated scenes of `size` (height, width); `number` tells the splits apart."""

    number: int
    count: int
    size: tuple[int, int]

    @property
    def stems(self) -> tuple[str, ...]:
        return tuple(f"scene_{self.number}_{i:05d}" for i in range(self.count))

    def item(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Image (H, W, 3) uint8 and train ids (H, W) int64 of scene `index`."""
        image, codes = paint(np.random.default_rng([self.number, index]), self.size)
        return image, codes % STRIDE

    def looks(self, index: int) -> NDArray[np.int64]:
        """(H, W) int64, the look of every pixel of scene `index`: its number in `LOOKS[train id]`."""
        return paint(np.random.default_rng([self.number, index]), self.size)[1] // STRIDE


def scenes(split: str, length: int, size: tuple[int, int], limit: int | None = None) -> Scenes:
    """The scenes of a split: `length` to train on, a quarter as many (at least 8) in val and in test.

    Raises:
        DataError: another split, no scenes, or a size below 16 pixels.
    """
    if split not in SPLITS:
        raise DataError(f"synthetic has no split {split!r}; expected one of {', '.join(SPLITS)}")
    if length < 1 or min(size) < 16:
        raise DataError(f"synthetic needs data.length >= 1 and data.crop_size >= 16 x 16; given {length} and {size}")
    count = length if split == "train" else max(8, length // 4)
    return Scenes(SPLITS[split], min(count, limit or count), size)


def paint(rng: np.random.Generator, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One landscape, from the back to the front: sky, mountains, meadow, lake, balloons, houses, trees.

    Returns:
        Image (H, W, 3) uint8 and codes (H, W) int64, class + STRIDE * look.
    """
    height, width = size[0] * FINE, size[1] * FINE
    look = int(rng.integers(len(SKIES)))
    top, bottom, light, stars = SKIES[look]
    down = np.linspace(0, 1, height)[:, None, None]
    picture = np.asarray(top) * (1 - down) + np.asarray(bottom) * down + np.zeros((height, width, 1))
    picture = picture.astype(np.float32)
    codes = np.full((height, width), code(SKY, look), dtype=np.uint8)
    for y, x in zip(rng.integers(0, height, stars), rng.integers(0, width, stars)):
        picture[y : y + FINE, x : x + FINE] = 230
    horizon = rng.uniform(0.4, 0.6) * height
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    if rng.random() < 0.8:
        _mountains(rng, picture, codes, rows, columns, horizon, light)
    _meadow(rng, picture, codes, rows, columns, horizon, light)
    if rng.random() < 0.7:
        _lake(rng, picture, codes, rows, columns, horizon, light)
    canvas = Canvas(picture, codes, light)
    _things(rng, canvas, horizon)
    image = np.asarray(canvas.image.reduce(FINE)) + rng.normal(0, 4, (*size, 1))
    codes = np.asarray(canvas.codes)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    return image.round().clip(0, 255).astype(np.uint8), codes.astype(np.int64)


def code(label: int, look: int) -> int:
    """What is painted into the mask for a class in one of its looks."""
    return label + STRIDE * look


class Canvas:
    """An image and its mask of codes that receive the same shapes."""

    def __init__(self, picture: NDArray[np.floating], codes: NDArray[np.uint8], light: float) -> None:
        self.image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        self.codes = Image.fromarray(codes)
        self.light = light
        self._pens = (ImageDraw.Draw(self.image), ImageDraw.Draw(self.codes))

    def polygon(self, points: Points, colour: Colour, what: int) -> None:
        self._pens[0].polygon(points, fill=self._lit(colour))
        self._pens[1].polygon(points, fill=what)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, what: int) -> None:
        box = (x - rx, y - ry, x + rx, y + ry)
        self._pens[0].ellipse(box, fill=self._lit(colour))
        self._pens[1].ellipse(box, fill=what)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour, what: int) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, what)

    def _lit(self, colour: Colour) -> Colour:
        red, green, blue = (max(0, min(255, round(c * self.light))) for c in colour)
        return red, green, blue


def _mountains(
    rng: np.random.Generator, picture: NDArray[np.floating], codes: NDArray[np.uint8],
    rows: NDArray[np.float32], columns: NDArray[np.float32], horizon: float, light: float,
) -> None:  # fmt: skip
    look = int(rng.integers(len(MOUNTAINS)))
    height, width = codes.shape
    across = columns[0] / width
    if look == 0:  # peaks: the upper hull of a few triangles
        ridge = np.zeros(width)
        for _ in range(4):
            peak, tall = rng.uniform(0, 1), rng.uniform(0.15, 0.33)
            ridge = np.maximum(ridge, tall - np.abs(across - peak) * rng.uniform(0.7, 1.3))
    elif look == 1:  # hills
        ridge = 0.14 + 0.07 * np.sin(across * rng.uniform(4, 9) + rng.uniform(0, 6))
        ridge = ridge + 0.03 * np.sin(across * rng.uniform(12, 20))
    else:  # tables
        ridge = 0.06 + 0.2 * (np.sin(across * rng.uniform(6, 11) + rng.uniform(0, 6)) > 0.1)
    crest = horizon - ridge * height  # W
    inside = rows > crest
    colour = _vary(rng, MOUNTAINS[look]) * light
    depth = (rows - crest)[..., None] / height
    shaded = colour * (1.05 - 0.8 * depth)
    if look == 0:
        shaded = np.where(depth < 0.07 + 0.02 * np.sin(columns * 0.5)[..., None], 238 * light, shaded)
    elif look == 2:  # layers of rock
        shaded = shaded * (1 + 0.12 * np.sign(np.sin(rows * 0.55))[..., None])
    picture[inside] = shaded[inside]
    codes[inside] = code(MOUNTAIN, look)


def _meadow(
    rng: np.random.Generator, picture: NDArray[np.floating], codes: NDArray[np.uint8],
    rows: NDArray[np.float32], columns: NDArray[np.float32], horizon: float, light: float,
) -> None:  # fmt: skip
    look = int(rng.integers(len(MEADOWS)))
    height, width = codes.shape
    edge = horizon + 0.02 * height * np.sin(columns[0] / width * rng.uniform(3, 9) + rng.uniform(0, 6))
    inside = rows > edge
    grain = (6.0, 8.0, 2.0, 5.0)[look] * rng.standard_normal((height, width), dtype=np.float32)
    if look == 1:  # furrows that run towards the viewer
        away = (columns - width / 2) / (rows - horizon + 0.15 * height)
        grain = grain + 16 * np.sin(away * 30)
    elif look == 3:  # ripples
        grain = grain + 8 * np.sin(rows * 0.5 + 3 * np.sin(columns * 0.06))
    near = ((rows - horizon) / height)[..., None]
    colour = _vary(rng, MEADOWS[look]) * light * (0.85 + 0.4 * near) + grain[..., None]
    picture[inside] = colour[inside]
    codes[inside] = code(MEADOW, look)


def _lake(
    rng: np.random.Generator, picture: NDArray[np.floating], codes: NDArray[np.uint8],
    rows: NDArray[np.float32], columns: NDArray[np.float32], horizon: float, light: float,
) -> None:  # fmt: skip
    look = int(rng.integers(len(LAKES)))
    height, width = codes.shape
    middle = (horizon + rng.uniform(0.12, 0.4) * height, rng.uniform(0.1, 0.9) * width)
    radius = (rng.uniform(0.05, 0.13) * height, rng.uniform(0.2, 0.5) * width)
    wobble = 1 + 0.12 * np.sin(columns * (10 / width) + rng.uniform(0, 6))
    far = ((rows - middle[0]) / radius[0]) ** 2 + ((columns - middle[1]) / radius[1]) ** 2
    inside = (far < wobble) & (codes % STRIDE == MEADOW)
    waves = (10, 5, 14)[look] * np.sin(rows * (0.9, 0.4, 1.3)[look] + 2 * np.sin(columns * 0.05))
    colour = _vary(rng, LAKES[look]) * light + waves[..., None]
    picture[inside] = colour[inside]
    codes[inside] = code(LAKE, look)


def _things(rng: np.random.Generator, canvas: Canvas, horizon: float) -> None:
    """Balloons in the sky; houses and trees on the ground, far ones first and smaller."""
    width, height = canvas.image.size
    for _ in range(rng.integers(0, 3)):
        radius = rng.uniform(0.07, 0.13) * height
        spot = rng.uniform(0.08, 0.92) * width, rng.uniform(0.12, 0.35) * height
        _balloon(canvas, *spot, radius, int(rng.integers(len(BALLOONS))))
    painters: list[Callable[[np.random.Generator, Canvas, float, float, float], None]] = [_house, _tree]
    chosen = [0] * int(rng.integers(0, 4)) + [1] * int(rng.integers(2, 8))
    feet = rng.uniform(0.02, 0.42, len(chosen))
    for place in np.argsort(feet, kind="stable"):
        tall = (0.13 + 0.45 * feet[place]) * rng.uniform(0.85, 1.25) * height
        x, y = rng.uniform(0.03, 0.97) * width, horizon + feet[place] * height
        painters[chosen[place]](rng, canvas, x, y, tall)


def _balloon(canvas: Canvas, x: float, y: float, radius: float, look: int) -> None:
    what = code(BALLOON, look)
    first, second = BALLOONS[look]
    ropes: Points = [(x - radius * 0.6, y + radius * 0.7), (x + radius * 0.6, y + radius * 0.7)]
    ropes += [(x + radius * 0.15, y + radius * 1.4), (x - radius * 0.15, y + radius * 1.4)]
    canvas.polygon(ropes, second, what)
    canvas.ellipse(x, y, radius, radius, first, what)
    if look == 0:  # gores
        canvas.ellipse(x, y, radius * 0.62, radius, second, what)
        canvas.ellipse(x, y, radius * 0.24, radius, first, what)
    elif look == 1:  # a belt
        canvas.box(x - radius * 0.93, y - radius * 0.3, x + radius * 0.93, y + radius * 0.3, second, what)
    else:  # dots
        for dx, dy in ((-0.45, -0.3), (0.4, -0.4), (0.0, 0.2), (-0.5, 0.4), (0.55, 0.3)):
            canvas.ellipse(x + dx * radius, y + dy * radius, radius * 0.17, radius * 0.17, second, what)
    canvas.box(x - radius * 0.2, y + radius * 1.4, x + radius * 0.2, y + radius * 1.7, (110, 75, 45), what)


def _house(rng: np.random.Generator, canvas: Canvas, x: float, y: float, tall: float) -> None:
    look = int(rng.integers(len(HOUSES)))
    what = code(HOUSE, look)
    wall, roof = (_whole(_vary(rng, colour)) for colour in HOUSES[look])
    wide = tall * (0.5, 0.65, 0.28)[look]
    body = tall * (0.55, 0.5, 0.7)[look]
    canvas.box(x - wide, y - body, x + wide, y, wall, what)
    if look == 1:  # a hipped roof
        eaves = [(x - wide * 1.1, y - body), (x + wide * 1.1, y - body)]
        canvas.polygon([*eaves, (x + wide * 0.6, y - body * 1.55), (x - wide * 0.6, y - body * 1.55)], roof, what)
    else:
        canvas.polygon([(x - wide * 1.15, y - body), (x + wide * 1.15, y - body), (x, y - tall)], roof, what)
    lamp = (255, 225, 130) if canvas.light < 0.7 else (70, 90, 120)
    for dx in (-0.5, 0.5):
        side = wide * 0.2
        canvas.box(x + dx * wide - side, y - body * 0.7, x + dx * wide + side, y - body * 0.4, lamp, what)
    canvas.box(x - wide * 0.14, y - body * 0.45, x + wide * 0.14, y, (75, 50, 35), what)


def _tree(rng: np.random.Generator, canvas: Canvas, x: float, y: float, tall: float) -> None:
    look = int(rng.integers(len(TREES)))
    what = code(TREE, look)
    crown = _whole(_vary(rng, TREES[look]))
    bright = _whole(np.asarray(crown) * 1.2)
    canvas.box(x - tall * 0.04, y - tall * 0.45, x + tall * 0.04, y, (95, 65, 45), what)
    if look == 0:
        for base, tip, half in ((0.15, 0.6, 0.28), (0.4, 0.8, 0.22), (0.62, 1.0, 0.15)):
            left, right = (x - tall * half, y - tall * base), (x + tall * half, y - tall * base)
            canvas.polygon([left, right, (x, y - tall * tip)], crown, what)
        return
    canvas.ellipse(x, y - tall * 0.65, tall * 0.3, tall * 0.32, crown, what)
    for turn in rng.uniform(0, 2 * math.pi, 5):  # leaves, inside the crown
        dx, dy = math.cos(turn) * 0.16, math.sin(turn) * 0.17
        canvas.ellipse(x + dx * tall, y + (dy - 0.65) * tall, tall * 0.08, tall * 0.07, bright, what)


def _vary(rng: np.random.Generator, colour: Colour) -> NDArray[np.floating]:
    """The colour a little brighter or darker, with a slight cast."""
    return np.asarray(colour) * rng.uniform(0.9, 1.1) + rng.uniform(-8, 8, 3)


def _whole(colour: NDArray[np.floating]) -> Colour:
    red, green, blue = (int(max(0, min(255, c))) for c in colour)
    return red, green, blue
