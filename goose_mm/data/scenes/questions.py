"""Questions about a scene that its record answers.

A question is asked only where the answer is beyond doubt: the thresholds below hold, and names
that may be confused are never asked about side by side.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from goose_mm.data.scenes.scene import Scene, Sticker
from goose_mm.data.scenes.stickers import Name, Vocabulary
from goose_mm.data.scenes.wordings import QA, SIDES, Asker

CENTER = 1 / 6  # "center": both offsets from the middle at most this
CORNER = 0.14  # a corner: both offsets above this
BESIDE = 0.20  # relation: one object lies this far on the side asked about,
NEAR = 0.05  # and no other lies farther than this on it
APART = 0.15  # compare: the centres differ by more than this

KINDS = ("animal", "plant", "food", "drink", "vehicle", "building", "tool", "instrument", "toy")


def questions(
    scene: Scene,
    vocabulary: Vocabulary,
    rng: random.Random,
    paraphrase: float = 0.0,
    lessons: bool = False,
) -> list[QA]:
    """Questions on `scene`, up to two of each family that has an answer in it.

    Yes and no are equally likely wherever both can be asked. paraphrase: share of the questions
    in other words than the template. lessons: with the families that are only practised, which
    make a model name everything it sees.
    """
    facts, asker = _Facts(scene, vocabulary), Asker(rng, paraphrase)
    families = FAMILIES + LESSONS if lessons else FAMILIES
    return [qa for family in families for qa in family(facts, asker, rng)]


def garment_question(label: str, rng: random.Random, paraphrase: float = 0.0) -> QA:
    """The question on a garment photo; the answer is its class name."""
    return Asker(rng, paraphrase).ask("garment", label)


class _Facts:
    """What the record says, and which of it may be asked."""

    def __init__(self, scene: Scene, vocabulary: Vocabulary):
        self.scene, self.vocabulary = scene, vocabulary
        self.stickers = scene.stickers
        self.counts = Counter(s.name for s in scene.stickers)
        self.categories = Counter(s.category for s in scene.stickers)
        self.single = [s for s in scene.stickers if self.counts[s.name] == 1]
        # People on a photo wear clothes that are in no record.
        self.uncertain = {"clothing"} if scene.background.kind == "photo" else set()
        self.present = self._certain(self.counts)
        self.absent = self._certain(scene.absent)

    def _certain(self, names: Iterable[str]) -> list[Name]:
        entries = (self.vocabulary.names[name] for name in names)
        return [entry for entry in entries if entry.category not in self.uncertain]


def _some(rng: random.Random, items: Iterable, limit: int = 2) -> list:
    items = list(items)
    return rng.sample(items, min(limit, len(items)))


def _what(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    if len(facts.stickers) == 1:
        (sticker,) = facts.stickers
        kind = sticker.category
        if kind in KINDS and asker.freely() and rng.random() < 0.3:
            yield asker.ask("what_kind", sticker.name, kind=kind)
        else:
            yield asker.ask("what", sticker.name)


def _count_all(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    yield asker.ask("count_all", len(facts.stickers))


def _count_name(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    names = [n.name for n in facts.present if n.plural_ok]
    several = [name for name in names if facts.counts[name] > 1]
    for name in _some(rng, several) or _some(rng, names, rng.randint(0, 1)):
        yield asker.ask("count_name", facts.counts[name], name=name)
    if rng.random() < 0.15:
        for name in _some(rng, (n.name for n in facts.absent if n.plural_ok), 1):
            yield asker.ask("count_name", 0, name=name)


def _exist(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    for _ in range(2):
        plural, free = asker.freely() and rng.random() < 0.3, asker.freely()
        yes, no = (
            [n for n in names if (n.plural_ok if plural else n.article if free else n.a_ok)]
            for names in (facts.present, facts.absent)
        )
        if yes and no:
            answer = rng.choice(("yes", "no"))
            name = rng.choice(yes if answer == "yes" else no)
            if plural:
                yield asker.ask("exist_plural", answer, plural=name.name + "s")
            else:
                yield asker.ask("exist", answer, name=name.name, a=name.article or "")


def _category(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    for sticker in _some(rng, (s for s in facts.single if s.category in facts.vocabulary.plurals)):
        yield asker.ask("category", sticker.category, name=sticker.name)


def _count_category(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    asked = {c: p for c, p in facts.vocabulary.plurals.items() if c not in facts.uncertain}
    present = [c for c in facts.categories if c in asked]
    several = [c for c in present if facts.categories[c] > 1]
    for category in _some(rng, several) or _some(rng, present, rng.randint(0, 1)):
        yield asker.ask("count_category", facts.categories[category], plural=asked[category])
    if rng.random() < 0.15:
        for category in _some(rng, (c for c in asked if c not in present), 1):
            yield asker.ask("count_category", 0, plural=asked[category])


def beyond(sticker: Sticker, other: Sticker, side: str) -> float:
    """How far `other` lies on that side of `sticker`; negative if it is on the opposite one."""
    dx, dy = other.x - sticker.x, other.y - sticker.y
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}[side]


def _relation(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    found = []
    for sticker, side in itertools.product(facts.single, SIDES):
        others = (other for other in facts.stickers if other is not sticker)
        near = [other for other in others if beyond(sticker, other, side) > NEAR]
        if len(near) == 1 and near[0] in facts.single and beyond(sticker, near[0], side) > BESIDE:
            found.append((sticker, side, near[0]))
    for sticker, side, other in _some(rng, found):
        yield asker.ask("relation", other.name, side=side, name=sticker.name)


def _compare(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    """The template asks "to the left of"; other words ask for the other three sides too."""
    for _ in range(2):
        side = rng.choice(tuple(SIDES)) if asker.freely() else "left"
        pairs = [
            (a, b)
            for a, b in itertools.permutations(facts.single, 2)
            if abs(beyond(a, b, side)) > APART
        ]
        for a, b in _some(rng, pairs, 1):
            answer = "yes" if beyond(b, a, side) > 0 else "no"
            yield asker.ask("compare", answer, side=side, a=a.name, b=b.name)


def _where(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    placed = [(s, position(s)) for s in facts.single]
    for sticker, place in _some(rng, ((s, p) for s, p in placed if p)):
        yield asker.ask("where", place, name=sticker.name)


def position(sticker: Sticker) -> str | None:
    """ "center", one of the corners ("top left"), or None where neither or both would be right."""
    dx, dy = sticker.x - 0.5, sticker.y - 0.5
    middle = max(abs(dx), abs(dy)) <= CENTER
    corner = min(abs(dx), abs(dy)) > CORNER
    if middle == corner:
        return None
    if middle:
        return "center"
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def _background(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    if facts.scene.background.colour:
        yield asker.ask("background", facts.scene.background.colour)


def _at(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    """The other way round than "where": a place that clearly holds one sticker only."""
    found = []
    for sticker in facts.stickers:
        place = position(sticker)
        others = (other for other in facts.stickers if other is not sticker)
        if place and not any(_may_be_at(other, place) for other in others):
            found.append((sticker, place))
    for sticker, place in _some(rng, found):
        yield asker.ask("at", sticker.name, place=place)


def _may_be_at(sticker: Sticker, place: str) -> bool:
    dx, dy = sticker.x - 0.5, sticker.y - 0.5
    if place == "center":
        return max(abs(dx), abs(dy)) < 0.3
    down, right = place.startswith("bottom"), place.endswith("right")
    return (dy if down else -dy) > 0 and (dx if right else -dx) > 0


def _list(facts: _Facts, asker: Asker, rng: random.Random) -> Iterator[QA]:
    row = sorted(facts.stickers, key=lambda s: s.x)
    if len(row) > 1 and all(b.x - a.x > NEAR for a, b in itertools.pairwise(row)):
        yield asker.ask("list", ", ".join(s.name for s in row))


Family = Callable[[_Facts, Asker, random.Random], Iterator[QA]]
FAMILIES: tuple[Family, ...] = (
    _what,
    _count_all,
    _count_name,
    _exist,
    _category,
    _count_category,
    _relation,
    _compare,
    _where,
    _background,
)
LESSONS: tuple[Family, ...] = (_at, _list, _where, _compare)  # the last two once more
