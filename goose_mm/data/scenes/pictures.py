"""Pictures with questions: sticker scenes and garment photos, made while the model trains.

Training pictures are never the same twice; examinations are fixed, on scenes from other seeds:
"seen" styles, "new_pictures" of known names, a "new_style" kept out of training, and "garments",
the validation photos. A model that never saw a picture gets a score too: `blind_baseline`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from goose_mm.config import ConfigError, EncoderSpec, SceneData, VisionConfig
from goose_mm.data.scenes.drawing import camera, render
from goose_mm.data.scenes.questions import garment_question, questions
from goose_mm.data.scenes.scene import Scene, compose
from goose_mm.data.scenes.stickers import Garment, Stickers, open_picture
from goose_mm.data.scenes.wordings import QA
from goose_mm.text.tokenizer import Tokenizer
from goose_mm.vision.model import prompt_text
from goose_mm.vision.preprocess import to_square

Exam = Iterable[tuple[Image.Image, list[QA]]]

EXAM_SCENES = 200
BLIND_SCENES = 4000  # training scenes whose answers the blind baseline learns by heart
PACK = 4  # tokens per question: what a batch's length is a multiple of


@runtime_checkable
class Answers(Protocol):
    """What an examination needs of a model."""

    def ask_many(self, image: Image.Image, questions: list[str]) -> list[str]: ...


class Scenes:
    """Batches of pictures and questions; `batch(step)` is a pure function of seed and step.

    B pictures, S pixels a side, Q questions each, T tokens:
    `pixels` uint8 [B, 3, S, S]; `ids` int64 [1, T], prompt then answer of every question, packed;
    `cu_seqlens` int32 [B * Q + 1], where they begin; `target` bool [1, T], True on the answer and
    the stop that ends it. T is rounded up to a multiple of PACK * B * Q, so that few shapes occur.
    Raises ValueError if data.path lacks something or a setting is out of range.
    """

    def __init__(
        self,
        config: SceneData,
        vision: VisionConfig,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
    ) -> None:
        _check(config)
        self.config, self.vision, self.tokenizer = config, vision, tokenizer
        self.batch_size, self.seed = batch_size, seed
        self.stickers = Stickers(
            config.path, held_out_style=config.held_out_style, new_pictures=config.new_pictures
        )
        kinds = ("train", "new_pictures", "new_style")
        self.pools = {kind: pool for kind in kinds if (pool := self.stickers.pool(kind))}
        self.garments = {s: self.stickers.garments(s) for s in ("train", "validation")}
        self.photos = {s: [g.file for g in found] for s, found in self.garments.items()}
        spec = vision.encoders[0] if vision.encoders else EncoderSpec()
        self.spec = replace(spec, image_size=config.image_size)

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = [
            self._example(random.Random(f"train {self.seed} {step} {row}"))
            for row in range(self.batch_size)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in rows]))
        return {"pixels": pixels.permute(0, 3, 1, 2), **self._tokens([qas for _, qas in rows])}

    def _example(self, rng: random.Random) -> tuple[Image.Image, list[QA]]:
        number, paraphrase = self.config.questions, self.config.paraphrase
        if rng.random() < self.config.photos:
            garment = rng.choice(self.garments["train"])
            asked = [garment_question(garment.label, rng, paraphrase) for _ in range(number)]
            return self._photo(garment, rng), asked
        scene = self._scene("train", rng, augment=True)
        asked = []
        while len(asked) < number:
            asked += questions(scene, self.stickers.vocabulary, rng, paraphrase, lessons=True)
        return render(scene, self.stickers.root), rng.sample(asked, number)

    def _scene(self, kind: str, rng: random.Random, augment: bool) -> Scene:
        return compose(
            rng,
            self.stickers.vocabulary,
            self.pools[kind],
            self.photos["train" if kind == "train" else "validation"],
            side=self.config.image_size,
            augment=augment,
        )

    def _photo(self, garment: Garment, rng: random.Random) -> Image.Image:
        """A training photo, cropped, mirrored and lit at random, as the encoder wants it."""
        photo = open_picture(self.stickers.root / garment.file, "RGB")
        width, height = (rng.uniform(0.75, 1.0) * length for length in photo.size)
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        photo = photo.crop((round(left), round(top), round(left + width), round(top + height)))
        if rng.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return camera(to_square(photo, self.spec), rng)

    def _tokens(self, rows: list[list[QA]]) -> dict[str, Tensor]:
        encode = self.tokenizer.encode
        coded = [
            (encode(prompt_text(self.vision, qa.question)), self._answer(qa))
            for row in rows
            for qa in row
        ]
        lengths = [len(prompt) + len(answer) for prompt, answer in coded]
        total = sum(lengths)
        lengths[-1] += -total % (PACK * len(coded))  # behind the last answer, where nobody looks
        ids = np.zeros((1, sum(lengths)), np.int64)
        target = np.zeros_like(ids, bool)
        ids[0, :total] = [token for pair in coded for part in pair for token in part]
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        for start, (prompt, answer) in zip(starts, coded, strict=False):
            begin = start + len(prompt)
            target[0, begin : begin + len(answer)] = True
        tokens = {"ids": ids, "target": target, "cu_seqlens": starts}
        return {name: torch.from_numpy(values) for name, values in tokens.items()}

    def _answer(self, qa: QA) -> list[int]:
        return self.tokenizer.encode(f" {qa.answer}{self.vision.stop}")

    @property
    def exams(self) -> list[str]:
        """The examinations this split allows."""
        return ["seen", *(kind for kind in self.pools if kind != "train"), "garments"]

    def exam(
        self, kind: str, number: int = EXAM_SCENES, seed: int = 0
    ) -> Iterator[tuple[Image.Image, list[QA]]]:
        """`number` pictures with their questions in the words of the templates.

        Nothing is redrawn or spoiled. "garments" takes `number` of the validation photos.
        ValueError for a kind that is not in `exams`.
        """
        for shown, asked in self._questions(kind, number, seed):
            if isinstance(shown, Scene):
                yield render(shown, self.stickers.root), asked
            else:
                yield open_picture(self.stickers.root / shown.file, "RGB"), asked

    def _questions(
        self, kind: str, number: int, seed: int
    ) -> Iterator[tuple[Scene | Garment, list[QA]]]:
        if kind not in self.exams:
            raise ValueError(f"no examination {kind!r}; there are: {', '.join(self.exams)}")
        if kind == "garments":
            rng = random.Random(f"exam {kind} {seed}")
            found = self.garments["validation"]
            for garment in rng.sample(found, min(number, len(found))):
                yield garment, [garment_question(garment.label, rng)]
            return
        for i in range(number):
            rng = random.Random(f"exam {kind} {seed} {i}")
            scene = self._scene("train" if kind == "seen" else kind, rng, augment=False)
            yield scene, questions(scene, self.stickers.vocabulary, rng)

    def evaluate(self, model: Answers) -> dict[str, float]:
        """Accuracy of every examination ("seen") and of each of its families ("seen/what")."""
        return {
            key: accuracy
            for kind in self.exams
            for key, accuracy in _named(kind, evaluate_answers(model, self.exam(kind))).items()
        }

    def baselines(self, number: int = EXAM_SCENES) -> dict[str, float]:
        """The question-only score under each key of `evaluate`."""
        rng = random.Random(f"blind {self.seed}")
        known = [garment_question(g.label, rng) for g in self.garments["train"]]
        for _ in range(BLIND_SCENES):
            scene = self._scene("train", rng, augment=False)
            known += questions(scene, self.stickers.vocabulary, rng)
        scores: dict[str, float] = {}
        for kind in self.exams:
            asked = [qa for _, qas in self._questions(kind, number, 0) for qa in qas]
            scores |= _named(kind, blind_baseline(known, asked))
        return scores


def _check(config: SceneData) -> None:
    for name in ("photos", "paraphrase", "new_pictures"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"data.{name} must lie in 0..1, got {getattr(config, name)}")
    for name, least in {"image_size": 32, "questions": 1}.items():
        if getattr(config, name) < least:
            raise ConfigError(f"data.{name} must be at least {least}, got {getattr(config, name)}")


def _named(kind: str, scores: dict[str, float]) -> dict[str, float]:
    return {kind if k == "overall" else f"{kind}/{k}": score for k, score in scores.items()}


def evaluate_answers(model: Answers, exam: Exam) -> dict[str, float]:
    """Share of right answers: "overall" and by family. Right is equal, but for case and ends."""
    right: dict[str, list[bool]] = defaultdict(list)
    for picture, asked in exam:
        answers = model.ask_many(picture, [qa.question for qa in asked])
        for qa, answer in zip(asked, answers, strict=True):
            right[qa.family].append(answer.strip().lower() == qa.answer)
    return _shares(right)


def blind_baseline(known: Iterable[QA], asked: Iterable[QA]) -> dict[str, float]:
    """Answer without looking: what was most often right for these very words in `known`.

    Words met seldom lean on the whole family: its answers count as `PRIOR` further examples.
    """
    words: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    families: dict[str, Counter[str]] = defaultdict(Counter)
    for qa in known:
        words[qa.family, _plain(qa.question)][qa.answer] += 1
        families[qa.family][qa.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for qa in asked:
        family = families[qa.family]
        score = {answer: PRIOR * n / family.total() for answer, n in family.items()}
        for answer, n in words.get((qa.family, _plain(qa.question)), {}).items():
            score[answer] += n
        guess = max(score, key=lambda answer: (score[answer], answer), default="")
        right[qa.family].append(guess == qa.answer)
    return _shares(right)


PRIOR = 3.0


def _plain(question: str) -> str:
    return question.lower().rstrip("?. ")


def _shares(right: dict[str, list[bool]]) -> dict[str, float]:
    every = [hit for hits in right.values() for hit in hits]
    scores = {family: sum(hits) / len(hits) for family, hits in sorted(right.items())}
    return {"overall": sum(every) / max(1, len(every)), **scores}
