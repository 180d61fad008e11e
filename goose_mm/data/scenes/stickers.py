"""The user's stickers: names a picture question can use, and cut-out pictures for each of them.

Nothing of this ships with the package. The folder given as `data.path` holds

    stickers_vocab.json      names, categories, which names may be confused with which
    emoji96/STYLE/ID.webp    one drawing per emoji in the styles "fluent3d" and "noto"
    tux192/images/*.webp     stamps, mostly photographs: the style "tux"
    clothing224/             photographs of garments: train/CLASS/*.webp, validation/CLASS/*.webp

A *drawing* is an emoji id (all its styles together) or one stamp. Some drawings of names that
have several are kept out of training, so that new pictures of known names can be examined.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

EMOJI_STYLES = ("fluent3d", "noto")
STYLES = (*EMOJI_STYLES, "tux")
FAINT = 20  # compression leaves a veil of such alpha around a sticker
FILES = {
    "stickers_vocab.json": "names and categories",
    "emoji96": "emoji in two styles",
    "tux192": "Tux Paint stamps",
    "clothing224": "garment photos",
}

Pool = dict[str, dict[str, tuple[str, ...]]]
"""style -> name -> picture files, relative to the data folder"""


@dataclass(frozen=True)
class Name:
    """One thing a sticker can show. A drawing is a dict style -> file."""

    name: str
    category: str
    a_ok: bool  # takes the article "a"
    plural_ok: bool  # name + "s" is right English
    confusable: frozenset[str]  # never in one scene, never asked about beside this one
    drawings: tuple[dict[str, str], ...]

    @property
    def article(self) -> str | None:
        """ "a", "an", or None for names that take neither (bread, french fries)."""
        return "a" if self.a_ok else "an" if self.plural_ok else None


@dataclass(frozen=True)
class Vocabulary:
    """Names by name, plurals of the categories that questions use, names of colours."""

    names: dict[str, Name]
    plurals: dict[str, str]
    colours: tuple[str, ...]

    def clash(self, a: str, b: str) -> bool:
        """True if `a` and `b` are the same or may be taken for each other."""
        return a == b or a in self.names[b].confusable or b in self.names[a].confusable


@dataclass(frozen=True)
class Garment:
    file: str
    label: str


class Stickers:
    """The folder of stickers, opened.

    path: the folder described above. held_out_style: a style kept out of training altogether.
    new_pictures: share of the drawings of names with several that is kept out of training.
    Raises ValueError that says what is missing where.
    """

    def __init__(self, path: str | Path, *, held_out_style: str = "", new_pictures: float = 0.1):
        if held_out_style and held_out_style not in STYLES:
            raise ValueError(
                f"held_out_style must be one of {', '.join(STYLES)}, got {held_out_style!r}"
            )
        self.root = Path(path)
        if missing := [f"{n} ({what})" for n, what in FILES.items() if not self._has(path, n)]:
            raise ValueError(
                f"data.path={str(path)!r} must be a folder with {', '.join(FILES)}; "
                f"missing: {', '.join(missing)}"
            )
        self.held_out_style = held_out_style
        self.vocabulary = load_vocabulary(self.root / "stickers_vocab.json")
        self._check_pictures()
        self._new = frozenset(
            file
            for name in self.vocabulary.names.values()
            for file in self._pick_new(name, new_pictures).values()
        )

    @staticmethod
    def _has(path: str | Path, name: str) -> bool:
        return bool(str(path)) and (Path(path) / name).exists()

    def _check_pictures(self) -> None:
        drawings = (d for n in self.vocabulary.names.values() for d in n.drawings)
        files = [file for drawing in drawings for file in drawing.values()]
        missing = [file for file in files if not (self.root / file).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(files)} pictures named by stickers_vocab.json are not "
                f"in {self.root}, the first: {missing[0]}"
            )

    def _trains(self, drawing: dict[str, str]) -> bool:
        return any(style != self.held_out_style for style in drawing)

    def _pick_new(self, name: Name, share: float) -> dict[str, str]:
        """The drawing of `name` to keep for examination, or none; chosen by the name alone."""
        usable = [d for d in name.drawings if self._trains(d)]
        rng = random.Random(name.name)
        if len(usable) < 2 or rng.random() >= share * len(usable):
            return {}
        return rng.choice(usable)

    def pool(self, kind: str) -> Pool:
        """Pictures of one kind: "train", "new_pictures" (known names) or "new_style".

        "new_style" has the held-out style only, for the names that training shows in others.
        The pool is empty if this split has no such pictures.
        """
        pool: Pool = {}
        for name in self.vocabulary.names.values():
            if not any(self._trains(drawing) for drawing in name.drawings):
                continue
            for style in STYLES:
                files = [drawing[style] for drawing in name.drawings if style in drawing]
                files = tuple(file for file in files if self._kind(style, file) == kind)
                if files:
                    pool.setdefault(style, {})[name.name] = files
        return pool

    def _kind(self, style: str, file: str) -> str:
        if style == self.held_out_style:
            return "new_style"
        return "new_pictures" if file in self._new else "train"

    def garments(self, split: str) -> list[Garment]:
        """Photos of `split` ("train" or "validation"), labelled by their folder."""
        folder = self.root / "clothing224" / split
        found = [Garment(str(p.relative_to(self.root)), p.parent.name) for p in folder.glob("*/*")]
        if not found:
            raise ValueError(f"no garment photo in {folder}; expected {folder}/CLASS/*.webp")
        return sorted(found, key=lambda garment: garment.file)


def load_vocabulary(path: Path) -> Vocabulary:
    """Read stickers_vocab.json; ValueError if it is not the expected JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["name"]: _name(entry) for entry in values["names"]}
        plurals = {c["category"]: c["plural"] for c in values["categories"] if c["asked"]}
        return Vocabulary(names, plurals, tuple(values["colours"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a sticker vocabulary: {error!r}") from None


def _name(entry: dict) -> Name:
    emoji = [{s: f"emoji96/{s}/{i}.webp" for s in EMOJI_STYLES} for i in entry["emoji"]]
    stamps = [{"tux": f"tux192/{file}"} for file in entry["tux"]]
    return Name(
        name=entry["name"],
        category=entry["category"],
        a_ok=entry["a_ok"],
        plural_ok=entry["plural_ok"],
        confusable=frozenset(entry["confusable"]) - {entry["name"]},
        drawings=(*emoji, *stamps),
    )


@functools.cache
def cutout(path: Path) -> Image.Image:
    """One sticker, RGBA, cropped to what can be seen of it. Kept in memory: do not change it."""
    picture = open_picture(path, "RGBA")
    alpha = picture.getchannel("A").point([0] * FAINT + list(range(FAINT, 256)))
    picture.putalpha(alpha)
    box = alpha.getbbox()
    if box is None:
        raise ValueError(f"{path} is fully transparent")
    return picture.crop(box)


def open_picture(path: Path, mode: str) -> Image.Image:
    """Decode an image file; ValueError that names it if it cannot be read."""
    try:
        with Image.open(path) as file:
            return file.convert(mode)
    except OSError as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from None
