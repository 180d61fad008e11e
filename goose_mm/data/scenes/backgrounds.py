"""Backgrounds of sticker scenes: one named colour, or several, or a photograph."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from goose_mm.data.scenes.scene import Background
from goose_mm.data.scenes.stickers import open_picture

Colour = tuple[int, int, int]

# Colours that everybody would call by the name; others are mixed from two of a row.
SHADES: dict[str, tuple[Colour, ...]] = {
    "red": ((255, 0, 0), (220, 20, 50), (200, 25, 25), (240, 60, 55), (170, 12, 20)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 130, 32), (251, 140, 20), (255, 152, 50)),
    "yellow": ((255, 255, 0), (255, 235, 59), (250, 220, 50), (255, 215, 0), (250, 240, 120)),
    "green": (
        *((0, 128, 0), (0, 230, 20), (76, 175, 80), (34, 139, 34), (50, 205, 50)),
        *((144, 225, 144), (20, 90, 35), (100, 160, 70)),
    ),
    "blue": (
        *((0, 0, 255), (30, 144, 255), (33, 150, 243), (65, 105, 225), (0, 0, 139)),
        *((70, 130, 180), (135, 206, 235), (30, 60, 120)),
    ),
    "purple": ((128, 0, 128), (106, 13, 173), (156, 39, 176), (147, 95, 219), (103, 58, 183)),
    "pink": ((255, 192, 203), (255, 105, 180), (244, 143, 177), (250, 160, 200)),
    "brown": ((165, 42, 42), (139, 69, 19), (121, 85, 72), (101, 60, 30), (160, 90, 50)),
    "black": ((0, 0, 0), (15, 15, 15), (32, 32, 32)),
    "white": ((255, 255, 255), (246, 246, 246), (252, 250, 243)),
    "gray": ((128, 128, 128), (158, 158, 158), (100, 100, 105), (180, 180, 180)),
}


def paint_background(
    background: Background, side: int, rng: random.Random, root: Path
) -> Image.Image:
    """An RGB picture of side x side; `root` holds the photo of a photo background."""
    kind = background.kind
    if kind == "photo":
        return _photo(root / background.photo, side, rng)
    if kind == "clutter":
        return _clutter(side, rng)
    if background.colour is None:
        first, second = any_colour(rng), any_colour(rng)
        return (
            _gradient(first, second, side, rng)
            if kind == "gradient"
            else _pattern(first, second, side, rng)
        )
    colour = shade(background.colour, rng)
    near = _near(colour, rng)
    if kind == "shaded":
        return _gradient(colour, near, side, rng)
    if kind == "textured":
        return _pattern(colour, near, side, rng)
    return Image.new("RGB", (side, side), colour)


def shade(name: str, rng: random.Random) -> Colour:
    """A colour of that name: a mixture of two of its row, a little off."""
    first, second, mix = rng.choice(SHADES[name]), rng.choice(SHADES[name]), rng.random()
    if rng.random() < 0.3:
        return first
    wobble = 3 if name in ("black", "white", "gray") else 8
    return _colour(
        a + (b - a) * mix + rng.uniform(-wobble, wobble) for a, b in zip(first, second, strict=True)
    )


def any_colour(rng: random.Random) -> Colour:
    return _colour(rng.randrange(256) for _ in range(3))


def _colour(values) -> Colour:
    red, green, blue = (min(255, max(0, round(value))) for value in values)
    return red, green, blue


def _near(colour: Colour, rng: random.Random) -> Colour:
    """A neighbour of `colour` that goes by the same name."""
    amount = rng.uniform(0.05, 0.16) * rng.choice((-1, 1))
    if max(colour) < 40:
        return _colour(value + 200 * abs(amount) * 0.7 for value in colour)
    if min(colour) > 235:
        return _colour(value * (1 - 0.5 * abs(amount)) for value in colour)
    return _colour(value * (1 + amount) for value in colour)


def _gradient(first: Colour, second: Colour, side: int, rng: random.Random) -> Image.Image:
    """From one colour to another along a random direction."""
    corners = np.array([[first, second], [first, second]], np.uint8)
    if rng.random() < 0.5:
        corners = corners.transpose(1, 0, 2)
    if rng.random() < 0.4:
        middle = [(a + b) // 2 for a, b in zip(first, second, strict=True)]
        corners[0, 1] = corners[1, 0] = middle
        corners[0, 0], corners[1, 1] = first, second
    picture = Image.fromarray(np.ascontiguousarray(corners))
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _pattern(first: Colour, second: Colour, side: int, rng: random.Random) -> Image.Image:
    """`first` with `second` on it as noise, stripes, checks or dots."""
    kind = rng.choice(("grain", "blotches", "stripes", "checks", "dots"))
    if kind in ("grain", "blotches"):
        cells = rng.randint(side // 3, side) if kind == "grain" else rng.randint(4, 40)
        seed = np.random.default_rng(rng.getrandbits(32))
        mask = Image.fromarray(seed.integers(0, 256, (cells, cells), dtype=np.uint8))
        mask = mask.resize((side, side), Image.Resampling.BILINEAR)
    else:
        mask = _tiles(kind, side, rng)
    canvas = Image.new("RGB", (side, side), first)
    canvas.paste(second, (0, 0), mask)
    return canvas


def _tiles(kind: str, side: int, rng: random.Random) -> Image.Image:
    """A mask of one repeated cell, by coordinates."""
    step = side / rng.uniform(5, 24)
    line = np.arange(side, dtype=np.float32) / step + rng.random()
    x, y = line[None], line[:, None]
    if rng.random() < 0.4:
        x, y = (x + y) * 0.7071, (x - y) * 0.7071
    if kind == "stripes":
        share = rng.uniform(0.2, 0.6)
        mask = (x % 1) < share
    elif kind == "checks":
        mask = (np.floor(x) + np.floor(y)) % 2 > 0
    else:
        radius = rng.uniform(0.15, 0.35)
        mask = ((x % 1) - 0.5) ** 2 + ((y % 1) - 0.5) ** 2 < radius**2
    return Image.fromarray(np.broadcast_to(mask, (side, side)).astype(np.uint8) * 255)


def _clutter(side: int, rng: random.Random) -> Image.Image:
    """Many colours without an object: soft clouds of colour, or large slanting planes."""
    if rng.random() < 0.6:
        cells = rng.randint(2, 12)
        seed = np.random.default_rng(rng.getrandbits(32))
        spread = rng.choice((0.7, 0.45, 0.3, 0.2))
        base = np.array(any_colour(rng), np.float32)
        values = base + spread * (seed.uniform(0, 255, (cells, cells, 3)) - base)
        return Image.fromarray(values.astype(np.uint8)).resize(
            (side, side), rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
        )
    canvas = Image.new("RGB", (side, side), any_colour(rng))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(3, 9)):
        at, slope = rng.uniform(-0.5, 1.2) * side, rng.uniform(-1, 1) * side
        wide = rng.uniform(0.15, 0.7) * side
        band = [(at, 0), (at + wide, 0), (at + wide + slope, side), (at + slope, side)]
        if rng.random() < 0.5:
            band = [(y, x) for x, y in band]
        draw.polygon(band, fill=any_colour(rng))
    return canvas


def _photo(path: Path, side: int, rng: random.Random) -> Image.Image:
    """A crop of a photograph, sharp or out of focus, in its own or in other colours."""
    photo = open_picture(path, "RGB")
    crop = rng.uniform(0.35, 1.0) * min(photo.size)
    left, top = rng.uniform(0, photo.width - crop), rng.uniform(0, photo.height - crop)
    box = (left, top, left + crop, top + crop)
    if rng.random() < 0.5:
        detail = rng.randint(10, 60)
        photo, box = photo.resize((detail, detail), Image.Resampling.BILINEAR, box=box), None
    if rng.random() < 0.3:
        photo = Image.merge("RGB", rng.sample(photo.split(), 3))
    photo = photo.resize((side, side), Image.Resampling.BICUBIC, box=box)
    turn = rng.choice((None, None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180))
    return photo if turn is None else photo.transpose(turn)
