"""Labels made visible: colours, overlays, legends, panels. Pillow and NumPy only; arrays are (H, W) and (H, W, 3)."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Palette = Sequence[Colour]

IGNORED: Colour = (40, 40, 40)
STRIP_ROWS = 128
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # successive hues stay far apart, however many there are


def default_palette(count: int) -> tuple[Colour, ...]:
    """`count` distinct colours, always the same ones; a longer palette begins with the shorter.

    Hues by the golden angle in OKLCh (Ottosson 2020), where equal steps look equal, over five levels of lightness.
    """
    # Five levels, because no small Fibonacci number (where the golden angle nearly closes a turn) but 5 divides by 5.
    levels = ((0.70, 0.15), (0.52, 0.13), (0.84, 0.11), (0.60, 0.14), (0.77, 0.13))  # lightness, chroma
    return tuple(_oklch(*levels[i % 5], 0.5 + i * GOLDEN_ANGLE) for i in range(count))


def _oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """sRGB bytes of an OKLCh colour; constants from Ottosson, "A perceptual color space for image processing"."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )

    def encoded(value: float) -> int:
        value = min(max(value, 0.0), 1.0)
        value = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
        return round(255 * value)

    red, green, blue = (encoded(v) for v in linear)
    return red, green, blue


def shades(colour: Colour, count: int) -> tuple[Colour, ...]:
    """`count` relatives of a colour, from dark to light with a turning hue: prototypes of one class, told apart."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in colour))
    relatives = []
    for i in range(count):
        step = i / (count - 1) - 0.5 if count > 1 else 0.0  # -0.5 to 0.5
        mixed = 0.3 * lightness + 0.7 * (0.52 + 0.5 * step) if count > 1 else lightness
        red, green, blue = colorsys.hls_to_rgb((hue + 0.12 * step) % 1, mixed, max(0.45, saturation))
        relatives.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(relatives)


def colourise(labels: np.ndarray, palette: Palette, ignore_index: int = 255) -> np.ndarray:
    """(H, W) labels -> (H, W, 3) uint8 colours; `ignore_index` and anything outside the palette is dark grey."""
    table = np.array([*palette, IGNORED], dtype=np.uint8)
    known = (labels >= 0) & (labels < len(palette)) & (labels != ignore_index)
    return table[np.where(known, labels, len(palette))]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    palette: Palette,
    *,
    opacity: float = 0.55,
    lines: bool = True,
    ignore_index: int = 255,
) -> Image.Image:
    """The image under its labels, with light lines between regions; ignored pixels show the bare image.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) integers.
        opacity: of the colours, 0 to 1.
        lines: draw the boundaries between regions.

    Raises:
        ValueError: image and labels differ in size.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f"the image is {image.shape[:2]} but the labels are {labels.shape} (height, width)")
    edge = region_edges(labels) if lines else np.zeros(labels.shape, dtype=bool)
    mixed = np.empty_like(image)
    for top in range(0, len(image), STRIP_ROWS):  # in floats, but never the whole of a large image
        rows = slice(top, top + STRIP_ROWS)
        shown = (labels[rows] != ignore_index)[..., None] * np.float32(opacity)
        strip = image[rows] * (1 - shown) + colourise(labels[rows], palette, ignore_index) * shown
        strip = np.where(edge[rows, :, None], 0.25 * strip + 0.75 * 255, strip)
        mixed[rows] = strip.round()
    return Image.fromarray(mixed)


def region_edges(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbour has another label, a line one pixel wide."""
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def index_image(labels: np.ndarray, palette: Palette, ignore_index: int = 255) -> Image.Image:
    """Labels as an image whose pixel values ARE the class indices.

    8-bit with a palette where every value fits a byte, otherwise 16-bit grey (PNG has no larger palette).

    Raises:
        ValueError: a label that does not fit 16 bits.
    """
    if labels.size and (labels.min() < 0 or labels.max() > 65535):
        raise ValueError(f"labels from {labels.min()} to {labels.max()} do not fit a 16-bit image")
    if len(palette) > 256 or (labels.size and labels.max() > 255):
        return Image.fromarray(labels.astype(np.uint16))
    colours = [*palette, *[(0, 0, 0)] * (256 - len(palette))]
    if len(palette) <= ignore_index <= 255:
        colours[ignore_index] = IGNORED
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(bytes(channel for colour in colours for channel in colour))
    return image


def legend(names: Sequence[str], palette: Palette, width: int, *, text: int = 14) -> Image.Image:
    """A white strip of `width` pixels with a colour chip and a name for every class, in as many lines as needed."""
    font = ImageFont.load_default(size=text)
    chip, gap, line = text, text // 2, round(1.7 * text)
    places, x, y = [], gap, gap // 2
    for name in names:
        needed = chip + gap + math.ceil(font.getlength(name)) + 2 * gap
        if x > gap and x + needed > width:
            x, y = gap, y + line
        places.append((x, y))
        x += needed
    strip = Image.new("RGB", (width, y + line if names else 0), "white")
    draw = ImageDraw.Draw(strip)
    for (x, y), name, colour in zip(places, names, palette):
        top = y + (line - chip) // 2
        draw.rectangle((x, top, x + chip, top + chip), fill=tuple(colour), outline=(90, 90, 90))
        draw.text((x + chip + gap, y + line // 2), name, fill=(30, 30, 30), font=font, anchor="lm")
    return strip


def panels(titled: Sequence[tuple[str, Image.Image]], *, columns: int = 0, text: int = 14, gap: int = 8) -> Image.Image:
    """Pictures side by side on white, each below its small title; `columns` 0 puts all in one line."""
    columns = columns or len(titled)
    width, height = max(i.width for _, i in titled), max(i.height for _, i in titled)
    title = round(1.6 * text)
    rows = math.ceil(len(titled) / columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (title + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=text)
    for index, (name, image) in enumerate(titled):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (title + height + gap)
        draw.text((x, y + title // 2), name, fill=(30, 30, 30), font=font, anchor="lm")
        sheet.paste(image.convert("RGB"), (x, y + title))
    return sheet


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other on white."""
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    y = 0
    for image in images:
        sheet.paste(image.convert("RGB"), (0, y))
        y += image.height
    return sheet
