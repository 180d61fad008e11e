"""How people put a question: families on sticker scenes, and one on garment photos.

The first wording of a family is its template; the others say the same in other words, so that a
model is not bound to one sentence.
"""

from __future__ import annotations

import random
from typing import NamedTuple

WORDINGS: dict[str, tuple[str, ...]] = {
    "what": (
        "What is this?",
        "What do you see?",
        "What is in the picture?",
        "What is shown here?",
        "What object is this?",
        "Which thing is in the image?",
        "What does the picture show?",
        "What can you see in this image?",
        "Name the object.",
        "Tell me what this is.",
    ),
    "what_kind": ("What {kind} is this?", "Which {kind} do you see?", "Name the {kind}."),
    "count_all": (
        "How many objects are there?",
        "How many objects are in the picture?",
        "How many things are there?",
        "How many things do you see?",
        "How many items can you see in the image?",
        "How many objects can be seen?",
        "What is the number of objects?",
        "Count the objects.",
        "Count the things in the picture.",
    ),
    "count_name": (
        "How many {name}s are there?",
        "How many {name}s are in the picture?",
        "How many {name}s do you see?",
        "How many {name}s can you see in the image?",
        "How many {name}s are visible?",
        "What is the number of {name}s?",
        "Count the {name}s.",
        "Count the {name}s in the picture.",
    ),
    "exist": (
        "Is there {a} {name} in the picture?",
        "Is there {a} {name}?",
        "Is there {a} {name} in the image?",
        "Do you see {a} {name}?",
        "Can you see {a} {name} in the picture?",
        "Does the picture show {a} {name}?",
        "Does the image contain {a} {name}?",
        "Is {a} {name} in the picture?",
        "Is {a} {name} visible?",
    ),
    "exist_plural": (
        "Are there any {plural}?",
        "Are there any {plural} in the picture?",
        "Do you see any {plural}?",
        "Does the image contain any {plural}?",
    ),
    "category": (
        "What kind of thing is the {name}?",
        "What sort of thing is the {name}?",
        "What type of thing is the {name}?",
        "What kind of object is the {name}?",
        "What is the category of the {name}?",
        "Which category does the {name} belong to?",
        "To which group does the {name} belong?",
    ),
    "count_category": (
        "How many {plural} are there?",
        "How many {plural} are in the picture?",
        "How many {plural} do you see?",
        "How many {plural} can you see in the image?",
        "What is the number of {plural}?",
        "Count the {plural}.",
        "Count the {plural} in the picture.",
    ),
    "relation": (
        "What is {side} the {name}?",
        "What do you see {side} the {name}?",
        "What can be seen {side} the {name}?",
        "Which object is {side} the {name}?",
        "Which thing is {side} the {name}?",
        "What is located {side} the {name}?",
        "Name the object {side} the {name}.",
    ),
    "compare": (
        "Is the {a} {side} the {b}?",
        "Is the {a} located {side} the {b}?",
        "Do you see the {a} {side} the {b}?",
        "Does the {a} lie {side} the {b}?",
        "In the picture, is the {a} {side} the {b}?",
    ),
    "where": (
        "Where is the {name}?",
        "Where is the {name} in the picture?",
        "Where can I find the {name}?",
        "Where do you see the {name}?",
        "In which part of the picture is the {name}?",
        "What is the position of the {name}?",
        "Where in the image is the {name} located?",
    ),
    "at": (
        "What is in the {place}?",
        "What is in the {place} of the picture?",
        "What do you see in the {place}?",
        "Which object is in the {place}?",
        "Name the object in the {place}.",
    ),
    "list": (
        "What is in the picture, from left to right?",
        "List the objects from left to right.",
        "Name everything from left to right.",
        "Which objects are there, from left to right?",
    ),
    "background": (
        "What colour is the background?",
        "What color is the background?",
        "What is the colour of the background?",
        "What is the background color?",
        "Which colour does the background have?",
        "Which color is the background?",
        "What colour is behind the objects?",
        "Name the background colour.",
    ),
    "garment": (
        "What garment is this?",
        "Which garment is this?",
        "What garment do you see?",
        "What piece of clothing is this?",
        "What kind of garment is this?",
        "What type of clothing is shown?",
        "What item of clothing is in the photo?",
        "Which piece of clothing does the picture show?",
        "Name the garment.",
        "What is this?",
    ),
}
SIDES: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right of", "on the right side of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
PART_OF = {"what_kind": "what", "exist_plural": "exist"}


class QA(NamedTuple):
    family: str
    question: str
    answer: str


class Asker:
    """Puts a question into words: the template, or with probability `paraphrase` other words."""

    def __init__(self, rng: random.Random, paraphrase: float):
        self.rng, self.paraphrase = rng, paraphrase

    def freely(self) -> bool:
        return self.rng.random() < self.paraphrase

    def ask(self, family: str, answer: str | int, *, side: str = "", **slots: str) -> QA:
        """`family` may name a wording of a family: "exist_plural" belongs to "exist"."""
        wordings, sides = WORDINGS[family], SIDES.get(side, ("",))
        free = self.freely()
        wording = self.rng.choice(wordings) if free else wordings[0]
        slots["side"] = self.rng.choice(sides) if free else sides[0]
        question = wording.format(**slots)
        if free and self.rng.random() < 0.5:
            question = self._careless(question)
        return QA(PART_OF.get(family, family), question, str(answer))

    def _careless(self, question: str) -> str:
        """As people type: no capital, no question mark, now and then all in capitals."""
        if self.rng.random() < 0.7:
            question = question[0].lower() + question[1:]
        if self.rng.random() < 0.6:
            question = question.rstrip("?.")
        return question.upper() if self.rng.random() < 0.05 else question
