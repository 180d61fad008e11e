"""Sticker scenes: what lies where on which background. A scene is a record, not a picture.

`compose` draws a scene at random; `goose_mm.data.scenes.drawing.render` paints it and
`goose_mm.data.scenes.questions.questions` asks about it. Both are pure functions of the record.
Lengths and positions are in units of the canvas side, x to the right, y down.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from goose_mm.data.scenes.stickers import Pool, Vocabulary

MAX_STICKERS = 6
MIN_SIZE = 0.15
MAX_OVERLAP = 0.15  # of the smaller box
NUMBER_WEIGHTS = (0.30, 0.14, 0.16, 0.15, 0.13, 0.12)  # of 1, 2, ... stickers
LARGEST = {2: 0.60, 3: 0.50, 4: 0.45, 5: 0.40, 6: 0.36}
STYLE_WEIGHTS = {"fluent3d": 0.35, "noto": 0.35, "tux": 0.30}
# The first three are of one colour that a question may ask for.
BACKGROUNDS = {
    "plain": 0.30,
    "textured": 0.15,
    "shaded": 0.07,
    "gradient": 0.08,
    "pattern": 0.07,
    "clutter": 0.08,
    "photo": 0.25,
}
ONE_COLOUR = ("plain", "textured", "shaded")


@dataclass(frozen=True)
class Sticker:
    """One picture on the canvas; `size` is the longer side of what is seen of it."""

    name: str
    category: str
    style: str
    file: str
    x: float  # centre
    y: float
    size: float
    angle: float = 0.0  # degrees, counter-clockwise
    mirrored: bool = False


@dataclass(frozen=True)
class Background:
    kind: str
    colour: str | None = None  # the one colour it has, if it has one
    photo: str = ""


@dataclass(frozen=True)
class Scene:
    side: int  # pixels
    background: Background
    stickers: tuple[Sticker, ...]  # painted in this order
    absent: tuple[str, ...]  # names that are not in it, as likely as those that are
    seed: int  # of everything about the look that no question asks for
    augment: bool = False  # redraw the stickers in other ways and spoil the picture a little


def compose(
    rng: random.Random,
    vocabulary: Vocabulary,
    pool: Pool,
    photos: Sequence[str],
    *,
    side: int,
    augment: bool = False,
) -> Scene:
    """Draw a scene of 1 to 6 stickers from `pool`; `photos` are files for photo backgrounds."""
    background = _background(rng, vocabulary, photos)
    number = rng.choices(range(1, MAX_STICKERS + 1), NUMBER_WEIGHTS)[0]
    chosen, absent = _choose(rng, vocabulary, pool, number)
    places = _place(rng, len(chosen))
    stickers = tuple(
        Sticker(
            name=name,
            category=vocabulary.names[name].category,
            style=style,
            file=file,
            x=round(x, 4),
            y=round(y, 4),
            size=round(size, 4),
            angle=round(_angle(rng), 1),
            mirrored=rng.random() < 0.5,
        )
        for (name, style, file), (x, y, size) in zip(chosen, places, strict=True)
    )
    return Scene(side, background, stickers, absent, rng.getrandbits(32), augment)


def _background(rng: random.Random, vocabulary: Vocabulary, photos: Sequence[str]) -> Background:
    kind = rng.choices(list(BACKGROUNDS), list(BACKGROUNDS.values()))[0]
    return Background(
        kind,
        colour=rng.choice(vocabulary.colours) if kind in ONE_COLOUR else None,
        photo=rng.choice(photos) if kind == "photo" else "",
    )


def _angle(rng: random.Random) -> float:
    return rng.uniform(-25, 25) if rng.random() < 0.5 else 0.0


def _choose(
    rng: random.Random, vocabulary: Vocabulary, pool: Pool, number: int
) -> tuple[list[tuple[str, str, str]], tuple[str, ...]]:
    """(name, style, file) of `number` stickers, and names that are not among them.

    Half of the absent names are of the category of a sticker. There are fewer of either if the
    pool has no more names to give.
    """
    styles = [style for style in STYLE_WEIGHTS if style in pool]
    if rng.random() < 0.6:
        styles = rng.choices(styles, [STYLE_WEIGHTS[style] for style in styles])
    repeats = rng.random() < 0.5
    kindred = rng.random() < 0.3
    chosen: list[tuple[str, str, str]] = []
    names: list[str] = []
    while len(chosen) < number:
        name = _new_name(rng, vocabulary, pool, styles, names, kindred and rng.random() < 0.8)
        if name is None:
            break
        names.append(name)
        left = number - len(chosen)
        repeat = repeats and left > 1 and vocabulary.names[name].plural_ok
        for _ in range(rng.randint(2, left) if repeat else 1):
            style = rng.choice([style for style in styles if name in pool[style]])
            chosen.append((name, style, rng.choice(pool[style][name])))
    rng.shuffle(chosen)
    absent = [
        _new_name(rng, vocabulary, pool, styles, [rng.choice(names), *names], kindred)
        for kindred in (True, False) * 2
    ]
    return chosen, tuple(dict.fromkeys(name for name in absent if name))


def _new_name(
    rng: random.Random,
    vocabulary: Vocabulary,
    pool: Pool,
    styles: list[str],
    names: list[str],
    kindred: bool,
) -> str | None:
    """A name that clashes with none of `names`; of the category of the first if `kindred`."""
    style = rng.choices(styles, [STYLE_WEIGHTS[style] for style in styles])[0]
    candidates = list(pool[style])
    if kindred and names:
        category = vocabulary.names[names[0]].category
        candidates = [n for n in candidates if vocabulary.names[n].category == category]
    for _ in range(50 if candidates else 0):
        name = rng.choice(candidates)
        if not any(vocabulary.clash(name, other) for other in names):
            return name
    return None


def _place(rng: random.Random, number: int) -> list[tuple[float, float, float]]:
    """(x, y, size) of boxes that lie within the canvas and overlap little."""
    if number == 1:
        size = rng.uniform(0.3, 0.9) if rng.random() < 0.65 else rng.uniform(MIN_SIZE, 0.45)
        return [_spot(rng, size)]
    sizes = sorted((rng.uniform(MIN_SIZE, LARGEST[number]) for _ in range(number)), reverse=True)
    places: list[tuple[float, float, float]] = []
    if rng.random() < 0.2:
        places.append(_spot(rng, sizes[0], middle=True))
    while len(places) < number:
        size = sizes[len(places)]
        for _ in range(40):
            spot = _spot(rng, size)
            if all(overlap(spot, other) <= MAX_OVERLAP for other in places):
                places.append(spot)
                break
        else:
            sizes = [max(MIN_SIZE, 0.85 * s) for s in sizes]
            places = [] if sizes[0] == MIN_SIZE else places
    rng.shuffle(places)
    return places


def _spot(rng: random.Random, size: float, middle: bool = False) -> tuple[float, float, float]:
    if middle:
        return 0.5 + rng.uniform(-0.08, 0.08), 0.5 + rng.uniform(-0.08, 0.08), size
    low, high = size / 2, 1 - size / 2
    return rng.uniform(low, high), rng.uniform(low, high), size


def overlap(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Shared area of two square boxes (x, y, size), as a share of the smaller one."""
    wide = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    high = min(a[1] + a[2] / 2, b[1] + b[2] / 2) - max(a[1] - a[2] / 2, b[1] - b[2] / 2)
    return max(wide, 0.0) * max(high, 0.0) / min(a[2], b[2]) ** 2
