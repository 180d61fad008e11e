"""Paint a scene: background, stickers, and for training other ways to draw and to photograph.

An encoder that is to know a cat in a style it has never seen needs to meet many styles. With
`scene.augment` a sticker is bent a little and redrawn: in few flat colours, with dark contours,
as a line drawing, blurred, in gray. Where a name hangs on its colour, the colour stays.
"""

from __future__ import annotations

import io
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from goose_mm.data.scenes.backgrounds import paint_background
from goose_mm.data.scenes.scene import Scene, Sticker
from goose_mm.data.scenes.stickers import cutout

COLOUR_WORDS = frozenset(("red", "orange", "yellow", "green", "blue", "pink", "brown")) | frozenset(
    ("black", "white", "golden", "silver", "polar")
)
LOOKS = {  # how often a sticker is redrawn in which way
    "as it is": 0.34,
    "flat": 0.18,
    "cartoon": 0.18,
    "contour": 0.10,
    "line": 0.03,
    "coarse": 0.10,
    "gray": 0.04,
    "rimmed": 0.03,
}
INK = (25, 22, 28)


def render(scene: Scene, root: Path) -> Image.Image:
    """Paint `scene` with the pictures under `root`: RGB, side x side; a pure function of both."""
    rng = random.Random(scene.seed)
    canvas = paint_background(scene.background, scene.side, rng, root)
    common = _look(rng) if scene.augment else "as it is"
    shadow = rng.random() < 0.2
    for sticker in scene.stickers:
        look = common if not scene.augment or rng.random() < 0.6 else _look(rng)
        picture = cutout(root / sticker.file)
        if scene.augment:
            picture = _jitter(_redraw(picture, look, sticker, rng), sticker, rng)
        picture = _bend(picture.convert("RGBa"), sticker, rng, scene.augment)
        _paste(canvas, picture, sticker, shadow)
    return camera(canvas, rng) if scene.augment else canvas


def _look(rng: random.Random) -> str:
    return rng.choices(list(LOOKS), list(LOOKS.values()))[0]


def keeps_colour(sticker: Sticker) -> bool:
    """True if another colour could make it another thing: a red apple, a lemon, a tangerine."""
    return sticker.category in ("food", "plant") or not COLOUR_WORDS.isdisjoint(
        sticker.name.split()
    )


def _bend(picture: Image.Image, sticker: Sticker, rng: random.Random, augment: bool) -> Image.Image:
    """Mirror and turn an RGBa picture; in training also stretch it and shift a grid of nodes."""
    if sticker.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cells, shift, stretch = 1, 0.0, 1.0
    if augment:
        stretch = math.exp(rng.gauss(0, 0.12))
        if rng.random() < 0.4:
            cells, shift = 3, rng.uniform(0.01, 0.07)
    if not sticker.angle and cells == 1:
        size = (max(4, round(picture.width * stretch)), picture.height)
        return picture.resize(size, Image.Resampling.BILINEAR)
    width, height = picture.width * stretch, float(picture.height)
    turn = math.radians(sticker.angle)
    cos, sin = math.cos(turn), math.sin(turn)
    margin = 1 + 2 * shift
    wide = math.ceil((width * abs(cos) + height * abs(sin)) * margin)
    high = math.ceil((width * abs(sin) + height * abs(cos)) * margin)

    def source(u: float, v: float) -> tuple[float, float]:
        """Where the pixel (u, v) of the turned picture comes from."""
        u, v = u - wide / 2, v - high / 2
        x, y = (u * cos - v * sin) / width + 0.5, (u * sin + v * cos) / height + 0.5
        x, y = x + rng.uniform(-shift, shift), y + rng.uniform(-shift, shift)
        return x * picture.width, y * picture.height

    xs = [round(wide * i / cells) for i in range(cells + 1)]
    ys = [round(high * i / cells) for i in range(cells + 1)]
    nodes = [[source(float(x), float(y)) for x in xs] for y in ys]
    mesh = [
        (
            (xs[j], ys[i], xs[j + 1], ys[i + 1]),
            (*nodes[i][j], *nodes[i + 1][j], *nodes[i + 1][j + 1], *nodes[i][j + 1]),
        )
        for i in range(cells)
        for j in range(cells)
    ]
    bent = picture.transform((wide, high), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return bent.crop(bent.getbbox())


def _paste(canvas: Image.Image, picture: Image.Image, sticker: Sticker, shadow: bool) -> None:
    scale = sticker.size * canvas.width / max(picture.size)
    width, height = (max(2, round(scale * length)) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    picture = picture.convert("RGBA")
    left = round(sticker.x * canvas.width - width / 2)
    top = round(sticker.y * canvas.height - height / 2)
    if shadow:
        offset = max(2, round(0.03 * max(width, height)))
        dark = Image.new("L", (width + 4 * offset, height + 4 * offset))
        dark.paste(picture.getchannel("A").point(lambda alpha: alpha // 3), (2 * offset,) * 2)
        dark = dark.filter(ImageFilter.BoxBlur(offset))
        canvas.paste(0, (left - offset, top - offset), dark)
    canvas.paste(picture, (left, top), picture)


def _redraw(picture: Image.Image, look: str, sticker: Sticker, rng: random.Random) -> Image.Image:
    """The same sticker, as another hand would draw it. RGBA in and out."""
    if look == "as it is":
        return picture
    if look == "rimmed":
        return _rim(picture, rng.choice((INK, (255, 255, 255))), rng)
    if look == "coarse":
        return _shrunk(picture, rng.randint(28, 64))
    picture = _shrunk(picture, 128)
    alpha, colours = picture.getchannel("A"), _opaque(picture)
    if look == "gray":
        strength = 0.6 if keeps_colour(sticker) else rng.uniform(0, 0.4)
        colours = ImageEnhance.Color(colours).enhance(strength)
    else:
        if look != "contour":
            colours = _flatten(colours, rng)
            alpha = alpha.point(_STEEP)
        if look != "flat":
            ink = _contours(colours, rng)
            if look == "line":
                colours = Image.new("RGB", picture.size, (250, 250, 250))
            colours.paste(INK, (0, 0), ink)
    colours.putalpha(alpha)
    return _rim(colours, INK, rng) if look in ("cartoon", "contour", "line") else colours


def _shrunk(picture: Image.Image, longest: int) -> Image.Image:
    """At most `longest` pixels wide and high."""
    scale = longest / max(picture.size)
    if scale >= 1:
        return picture
    size = [max(4, round(length * scale)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BOX)


def _opaque(picture: Image.Image) -> Image.Image:
    """RGB, with the average colour where nothing was drawn."""
    average = picture.convert("RGBa").resize((1, 1), Image.Resampling.BOX).convert("RGBA")
    colours = average.convert("RGB").resize(picture.size)
    colours.paste(picture, (0, 0), picture)
    return colours


_STEEP = [min(255, max(0, 4 * (alpha - 96))) for alpha in range(256)]


def _flatten(colours: Image.Image, rng: random.Random) -> Image.Image:
    """Few colours in smooth areas."""
    smooth = _shrunk(colours, 48).filter(ImageFilter.MedianFilter(3))
    palette = smooth.quantize(rng.randint(4, 10), method=Image.Quantize.MEDIANCUT)
    smooth = smooth.resize(colours.size, Image.Resampling.BICUBIC)
    flat = smooth.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")
    if rng.random() < 0.5:
        flat = ImageEnhance.Color(flat).enhance(rng.uniform(1.0, 1.6))
    return flat


def _contours(colours: Image.Image, rng: random.Random) -> Image.Image:
    """Mask of dark lines where the colour changes."""
    edges = colours.filter(ImageFilter.BoxBlur(1)).filter(ImageFilter.FIND_EDGES)
    red, green, blue = edges.split()
    edges = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    low = rng.randint(40, 90)
    return edges.point([min(255, max(0, 5 * (value - low))) for value in range(256)])


def _rim(picture: Image.Image, colour: tuple[int, int, int], rng: random.Random) -> Image.Image:
    """A line of `colour` around what is seen of the picture."""
    thick = max(1, round(max(picture.size) * rng.uniform(0.012, 0.035)))
    size = (picture.width + 2 * thick, picture.height + 2 * thick)
    alpha = Image.new("L", size)
    alpha.paste(picture.getchannel("A"), (thick, thick))
    grown = alpha.filter(ImageFilter.BoxBlur(thick)).point(lambda value: min(255, 4 * value))
    rimmed = Image.new("RGBA", size, colour)
    rimmed.paste(picture, (thick, thick), picture)
    rimmed.putalpha(grown)
    return rimmed


def _jitter(picture: Image.Image, sticker: Sticker, rng: random.Random) -> Image.Image:
    """Other light and, where the name allows it, other colours."""
    if rng.random() < 0.35:
        return picture
    alpha, colours = picture.getchannel("A"), picture.convert("RGB")
    if rng.random() < 0.5:
        low = 0.75 if keeps_colour(sticker) else 0.4
        colours = ImageEnhance.Color(colours).enhance(rng.uniform(low, 1.6))
    if rng.random() < 0.3:
        turn = rng.gauss(0, 5 if keeps_colour(sticker) else 18)
        hue, saturation, value = colours.convert("HSV").split()
        hue = hue.point([round(h + turn * 256 / 360) % 256 for h in range(256)])
        colours = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    colours = colours.point(_tone(rng, 0.25))
    colours.putalpha(alpha)
    return colours


def _tone(rng: random.Random, strength: float) -> list[int]:
    """A lookup table of random gamma, contrast and brightness, for three channels."""
    gamma = math.exp(rng.gauss(0, strength))
    contrast, brightness = math.exp(rng.gauss(0, 0.6 * strength)), rng.gauss(0, 50 * strength)
    curve = 255 * (np.arange(256) / 255) ** gamma
    table = ((curve - 128) * contrast + 128 + brightness).clip(0, 255).round()
    return table.astype(np.uint8).tolist() * 3


def camera(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """What happens to a whole picture on its way: light, resolution, noise, compression."""
    if rng.random() < 0.4:
        canvas = canvas.point(_tone(rng, 0.1))
    if rng.random() < 0.12:
        side = round(canvas.width * rng.uniform(0.4, 0.8))
        canvas = canvas.resize((side, side), Image.Resampling.BOX).resize(canvas.size)
    if rng.random() < 0.1:
        seed = np.random.default_rng(rng.getrandbits(32))
        strength = rng.randint(4, 24)
        noise = seed.integers(0, 2 * strength, canvas.size, dtype=np.uint8)
        grain = Image.fromarray(noise).convert("RGB")
        canvas = ImageChops.add(canvas, grain, offset=-strength)
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=rng.randint(35, 90))
        canvas = Image.open(buffer).convert("RGB")
    return canvas
