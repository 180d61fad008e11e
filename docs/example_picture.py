"""Draw goose_mm/pretrained/example/picture.png: a sun, a sailboat, a house, an apple and a ladybug.

    python docs/example_picture.py

All shapes are drawn here, four times too large and then reduced, so the picture is our own.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, OVERSAMPLE = 384, 4
TARGET = Path(__file__).parents[1] / "goose_mm" / "pretrained" / "example" / "picture.png"
Point = tuple[float, float]


class Pen:
    """Draws in units of pixels of the final picture, around a centre."""

    def __init__(self, canvas: Image.Image, x: float, y: float) -> None:
        self.draw, self.x, self.y = ImageDraw.Draw(canvas), x, y

    def _at(self, points: list[Point]) -> list[Point]:
        return [((self.x + x) * OVERSAMPLE, (self.y + y) * OVERSAMPLE) for x, y in points]

    def shape(self, colour: str, *points: Point) -> None:
        self.draw.polygon(self._at(list(points)), fill=colour)

    def oval(self, colour: str, x: float, y: float, rx: float, ry: float = 0.0) -> None:
        ry = ry or rx
        self.draw.ellipse(self._at([(x - rx, y - ry), (x + rx, y + ry)]), fill=colour)

    def line(self, colour: str, width: float, *points: Point) -> None:
        self.draw.line(self._at(list(points)), colour, round(width * OVERSAMPLE), joint="curve")


def curve(a: Point, bend: Point, b: Point, steps: int = 24) -> list[Point]:
    """A quadratic curve from `a` to `b`."""
    weights = [
        ((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in (i / steps for i in range(steps + 1))
    ]
    return [
        (u * a[0] + v * bend[0] + w * b[0], u * a[1] + v * bend[1] + w * b[1])
        for u, v, w in weights
    ]


def sun(pen: Pen) -> None:
    for i in range(12):
        turn = 2 * math.pi * i / 12
        tip = (64 * math.cos(turn), 64 * math.sin(turn))
        sides = [(38 * math.cos(turn + d), 38 * math.sin(turn + d)) for d in (-0.2, 0.2)]
        pen.shape("#ffc107", tip, *sides)
    pen.oval("#ffca28", 0, 0, 34)


def sailboat(pen: Pen) -> None:
    pen.line("#6b4226", 4, (0, -54), (0, 26))
    pen.shape("#fdfdfb", *curve((5, -52), (46, -18), (46, 16)), (5, 16))
    pen.shape("#e4473c", *curve((-5, -38), (-30, -14), (-34, 16)), (-5, 16))
    hull = curve((50, 24), (44, 48), (28, 50))
    pen.shape("#a9663a", (-48, 24), *hull, (-26, 50), *curve((-26, 50), (-42, 48), (-48, 24)))
    pen.shape("#874a26", (-48, 24), (50, 24), (48, 32), (-46, 32))


def house(pen: Pen) -> None:
    pen.shape("#9a4a3c", (22, -46), (36, -46), (36, -10), (22, -10))
    pen.shape("#f6e3bd", (-44, -8), (44, -8), (44, 52), (-44, 52))
    pen.shape("#c9402f", (0, -54), (58, -6), (-58, -6))
    pen.shape("#8a5330", (-12, 14), (12, 14), (12, 52), (-12, 52))
    pen.oval("#f3c64a", 7, 34, 2.5)
    for x in (-30, 30):
        pen.shape("#7a5a3a", (x - 11, 6), (x + 11, 6), (x + 11, 28), (x - 11, 28))
        pen.shape("#9fdcf5", (x - 8.5, 8.5), (x + 8.5, 8.5), (x + 8.5, 25.5), (x - 8.5, 25.5))
        pen.line("#7a5a3a", 2, (x, 7), (x, 27))
        pen.line("#7a5a3a", 2, (x - 10, 17), (x + 10, 17))


def red_apple(pen: Pen) -> None:
    right = [
        *curve((0, -22), (14, -36), (32, -28), 16),
        *curve((32, -28), (54, -14), (42, 18), 16),
        *curve((42, 18), (34, 44), (16, 46), 16),
        *curve((16, 46), (8, 46), (0, 42), 8),
    ]
    pen.shape("#d92b2b", *right, *[(-x, y) for x, y in reversed(right)])
    pen.oval("#ef6a5e", -24, -8, 8, 14)
    pen.line("#6b4226", 5, *curve((0, -22), (0, -38), (6, -50)))
    pen.shape(
        "#5cae3c", *curve((4, -34), (14, -58), (38, -54)), *curve((38, -54), (30, -32), (4, -34))
    )


def ladybug(pen: Pen) -> None:
    for side in (-1, 1):
        for y, reach in ((-12, -26), (8, 6), (26, 38)):
            pen.line("#232326", 4, (side * 28, y), (side * 44, (y + reach) / 2), (side * 50, reach))
        pen.line("#232326", 3, *curve((side * 7, -42), (side * 10, -56), (side * 22, -58)))
    pen.oval("#232326", 0, -32, 22, 17)
    for side in (-1, 1):
        pen.oval("#ffffff", side * 12, -38, 5)
    pen.oval("#e03a2f", 0, 8, 38, 40)
    pen.line("#232326", 3, (0, -31), (0, 48))
    for x, y, radius in ((18, -12, 7), (21, 12, 8), (13, 32, 6)):
        for side in (-1, 1):
            pen.oval("#232326", side * x, y, radius)


def main() -> None:
    canvas = Image.new("RGB", (SIDE * OVERSAMPLE,) * 2, "#5aa9e6")
    places = {
        sun: (80, 82),
        sailboat: (298, 88),
        ladybug: (192, 194),
        house: (84, 300),
        red_apple: (300, 302),
    }
    for thing, (x, y) in places.items():
        thing(Pen(canvas, x, y))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(TARGET, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
