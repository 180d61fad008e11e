"""Sticker scenes: every answer follows from the record, and nothing held out is ever seen.

The stickers are coloured shapes made here, with a vocabulary of a dozen names.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from goose_mm.config import ConfigError, SceneData, VisionConfig
from goose_mm.data.scenes.drawing import render
from goose_mm.data.scenes.pictures import PACK, Scenes, blind_baseline, evaluate_answers
from goose_mm.data.scenes.questions import questions
from goose_mm.data.scenes.scene import Background, Scene, Sticker, compose, overlap
from goose_mm.data.scenes.stickers import Stickers
from goose_mm.data.scenes.wordings import QA, WORDINGS
from goose_mm.text.tokenizer import WorldTokenizer

# name, category, emoji ids, stamps, a_ok, plural_ok, confusable
NAMES = [
    ("cat", "animal", ["cat", "cat2"], ["cat"], True, True, ["black cat"]),
    ("black cat", "animal", ["black_cat"], [], True, True, ["cat"]),
    ("dog", "animal", ["dog"], ["dog1", "dog2"], True, True, []),
    ("owl", "animal", ["owl"], [], False, True, []),
    ("fish", "animal", [], ["fish"], True, False, ["fish"]),
    ("red apple", "food", ["apple"], ["apple1", "apple2", "apple3"], True, True, ["bread"]),
    ("bread", "food", ["bread"], [], False, False, []),
    ("lemon", "food", ["lemon"], ["lemon"], True, True, []),
    ("car", "vehicle", ["car", "car2", "car3"], [], True, True, []),
    ("sailboat", "vehicle", ["sailboat"], ["boat1", "boat2"], True, True, []),
    ("hat", "clothing", ["hat"], [], True, True, []),
    ("sock", "clothing", [], ["sock"], True, True, []),
    ("ghost", "face", ["ghost", "ghost2"], [], True, True, []),
    ("key", "object", ["key"], ["key1", "key2"], True, True, []),
]
COLOURS = "red orange yellow green blue purple pink brown black white gray".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stickers")
    plurals = {"animal": "animals", "food": "foods", "vehicle": "vehicles", "clothing": "clothes"}
    categories = [
        {"category": c, "plural": plurals.get(c, c + "s"), "asked": c in plurals}
        for c in dict.fromkeys(entry[1] for entry in NAMES)
    ]
    names = [
        {
            "name": name,
            "category": category,
            "emoji": emoji,
            "tux": [f"images/{stamp}.webp" for stamp in stamps],
            "a_ok": a_ok,
            "plural_ok": plural_ok,
            "confusable": confusable,
        }
        for name, category, emoji, stamps, a_ok, plural_ok, confusable in NAMES
    ]
    vocabulary = {"categories": categories, "colours": COLOURS, "names": names}
    (root / "stickers_vocab.json").write_text(json.dumps(vocabulary))
    files = [
        *(f"emoji96/{s}/{i}.webp" for n in names for i in n["emoji"] for s in ("fluent3d", "noto")),
        *(f"tux192/{file}" for n in names for file in n["tux"]),
    ]
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        _shape(random.Random(file)).save(root / file, lossless=True)
    rng = np.random.default_rng(0)
    splits, labels = ("train", "validation"), ("dress", "hat")
    for split, label, i in itertools.product(splits, labels, range(3)):
        path = root / "clothing224" / split / label / f"{i}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return root


def _shape(rng: random.Random) -> Image.Image:
    """A filled shape with transparency around it."""
    picture = Image.new("RGBA", (32, 32))
    draw = ImageDraw.Draw(picture)
    colour = tuple(rng.randrange(256) for _ in range(3))
    outline = rng.choice((draw.ellipse, draw.rectangle))
    outline((4, rng.randint(2, 10), 28, 28), fill=colour)
    return picture


def scenes(
    folder: Path,
    number: int,
    *,
    kind: str = "train",
    seed: int = 0,
    augment: bool = False,
    **split: object,
) -> tuple[Stickers, list[Scene]]:
    stickers = Stickers(folder, **split)  # type: ignore[arg-type]
    rng, pool = random.Random(seed), stickers.pool(kind)
    photos = [garment.file for garment in stickers.garments("train")]
    make = [
        compose(rng, stickers.vocabulary, pool, photos, side=64, augment=augment)
        for _ in range(number)
    ]
    return stickers, make


@functools.cache
def tokenizer() -> WorldTokenizer:
    return WorldTokenizer()


def dataset(folder: Path, batch_size: int = 3, seed: int = 1, **settings: object) -> Scenes:
    config = SceneData(path=str(folder), image_size=64, questions=4, **settings)  # type: ignore[arg-type]
    return Scenes(config, VisionConfig(), tokenizer(), batch_size, seed)


# --- questions -----------------------------------------------------------------------------


def expected(scene: Scene, qa: QA) -> str:
    """The right answer, worked out again from the words of the question and the record alone."""
    text = qa.question.lower()
    by_name = {entry[0]: entry for entry in NAMES}
    stickers = list(scene.stickers)
    pattern = "|".join(sorted(by_name, key=len, reverse=True))
    if qa.family == "background":
        assert scene.background.kind in ("plain", "textured", "shaded")
        return str(scene.background.colour)
    if qa.family == "what":
        assert len(stickers) == 1
        return stickers[0].name
    if qa.family == "count_all":
        return str(len(stickers))
    if qa.family == "count_category":
        plurals = {"animals": "animal", "foods": "food", "vehicles": "vehicle"}
        plurals["clothes"] = "clothing"
        found = re.search(r"\b(" + "|".join(plurals) + r")\b", text)
        assert found
        return str(sum(s.category == plurals[found[1]] for s in stickers))

    named = re.findall(rf"\b({pattern})s?\b", text)
    if qa.family == "count_name":
        (name,) = named
        assert by_name[name][5] and f"{name}s" in text
        return str(sum(s.name == name for s in stickers))
    if qa.family == "exist":
        (name,) = named
        if f"{name}s" in text:
            assert by_name[name][5]
        else:
            assert re.search(rf"\ban? {name}\b", text)
            assert (" a " in text) == by_name[name][4]
        return "yes" if any(s.name == name for s in stickers) else "no"

    for name in named:
        assert sum(s.name == name for s in stickers) == 1, f"{name} is not one thing"
    spots = [next(s for s in stickers if s.name == name) for name in named]
    if qa.family == "category":
        return spots[0].category
    if qa.family == "where":
        x, y = spots[0].x - 0.5, spots[0].y - 0.5
        if abs(x) <= 1 / 6 and abs(y) <= 1 / 6:
            return "center"
        assert abs(x) > 0.14 and abs(y) > 0.14
        return ("bottom " if y > 0 else "top ") + ("right" if x > 0 else "left")

    word = re.search(r"\b(left|right|above|over|below|under|beneath)\b", text)
    assert word
    across = word[1] in ("left", "right")
    sign = 1 if word[1] in ("right", "below", "under", "beneath") else -1

    def along(s: Sticker) -> float:
        return sign * (s.x if across else s.y)

    if qa.family == "compare":
        first, second = spots
        assert abs(along(first) - along(second)) > 0.15
        return "yes" if along(first) > along(second) else "no"
    assert qa.family == "relation"
    (anchor,) = spots
    beside = [s for s in stickers if s is not anchor and along(s) - along(anchor) > 0.05]
    assert len(beside) == 1 and along(beside[0]) - along(anchor) > 0.20
    assert sum(s.name == beside[0].name for s in stickers) == 1
    return beside[0].name


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), paraphrase=st.sampled_from((0.0, 0.5, 1.0)))
def test_every_answer_follows_from_the_record(folder: Path, seed: int, paraphrase: float) -> None:
    stickers, (scene,) = scenes(folder, 1, seed=seed)
    for qa in questions(scene, stickers.vocabulary, random.Random(seed), paraphrase):
        assert qa.answer == expected(scene, qa), (qa, scene)


def test_every_family_is_asked_and_templates_are_exact(folder: Path) -> None:
    stickers, made = scenes(folder, 150)
    rng = random.Random(0)
    asked = [qa for scene in made for qa in questions(scene, stickers.vocabulary, rng)]
    families = {family for family in WORDINGS if family not in ("what_kind", "exist_plural")}
    assert {qa.family for qa in asked} == families - {"garment", "at", "list"}
    assert "What is this?" in {qa.question for qa in asked}
    assert {qa.question for qa in asked if qa.family == "count_all"} == {WORDINGS["count_all"][0]}
    sides = {found[1] for qa in asked if (found := re.match(r"What is (.+) the \w", qa.question))}
    assert sides == {"to the left of", "to the right of", "above", "below"}


def test_lessons_name_what_is_there(folder: Path) -> None:
    stickers, made = scenes(folder, 200)
    rng, seen = random.Random(0), Counter()
    for scene in made:
        for qa in questions(scene, stickers.vocabulary, rng, lessons=True):
            if qa.family == "list":
                row = sorted(scene.stickers, key=lambda s: s.x)
                assert qa.answer.split(", ") == [s.name for s in row] and len(row) > 1
            elif qa.family == "at" and "center" not in qa.question:
                down, right = "bottom" in qa.question, "right" in qa.question
                there = [s for s in scene.stickers if (s.y > 0.5, s.x > 0.5) == (down, right)]
                assert [s.name for s in there] == [qa.answer]
            seen[qa.family] += 1
    assert seen["list"] > 20 and seen["at"] > 20


def test_paraphrases_use_other_words(folder: Path) -> None:
    stickers, made = scenes(folder, 100)
    rng = random.Random(0)
    asked = [qa for scene in made for qa in questions(scene, stickers.vocabulary, rng, 1.0)]
    assert len({qa.question.lower().rstrip("?.") for qa in asked if qa.family == "count_all"}) > 6
    assert any(not qa.question.endswith(("?", ".")) for qa in asked)


@pytest.mark.parametrize("paraphrase", [0.0, 1.0])
def test_yes_and_no_are_balanced(folder: Path, paraphrase: float) -> None:
    stickers, made = scenes(folder, 600)
    rng = random.Random(0)
    answers: dict[str, Counter[str]] = {"exist": Counter(), "compare": Counter()}
    for scene in made:
        for qa in questions(scene, stickers.vocabulary, rng, paraphrase):
            if qa.family in answers:
                answers[qa.family][qa.answer] += 1
    for family, counts in answers.items():
        assert counts.total() > 200
        assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.08), family


def test_photos_of_clothes_hide_clothes(folder: Path) -> None:
    stickers, made = scenes(folder, 400)
    rng = random.Random(0)
    photos = [scene for scene in made if scene.background.kind == "photo"]
    assert photos
    for scene in photos:
        for qa in questions(scene, stickers.vocabulary, rng, 0.5):
            if qa.family in ("exist", "count_name", "count_category"):
                assert not re.search(r"\b(hat|sock|clothes)", qa.question.lower())


# --- scenes --------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_scene_is_legible(folder: Path, seed: int) -> None:
    stickers, (scene,) = scenes(folder, 1, seed=seed)
    placed = [(s.x, s.y, s.size) for s in scene.stickers]
    assert 1 <= len(placed) <= 6
    for i, (x, y, size) in enumerate(placed):
        assert 0.1499 <= size <= 0.9
        assert min(x, y) >= size / 2 - 0.001 and max(x, y) <= 1 - size / 2 + 0.001
        assert all(overlap(placed[i], other) < 0.151 for other in placed[:i])
    names = {s.name for s in scene.stickers}
    clash = stickers.vocabulary.clash
    assert not any(clash(a, b) for a in names for b in names - {a})
    assert not any(clash(a, b) for a in names for b in scene.absent)
    assert json.loads(json.dumps(dataclasses.asdict(scene)))["seed"] == scene.seed


def test_held_out_pictures_stay_out_of_training(folder: Path) -> None:
    split = {"held_out_style": "noto", "new_pictures": 0.5}
    used: dict[str, set[str]] = {}
    for kind in ("train", "new_pictures", "new_style"):
        _, made = scenes(folder, 120, kind=kind, **split)
        used[kind] = {s.file for scene in made for s in scene.stickers}
    assert not any("/noto/" in file for file in used["train"] | used["new_pictures"])
    assert used["train"].isdisjoint(used["new_pictures"])
    assert used["new_style"] and all("/noto/" in file for file in used["new_style"])
    stickers, _ = scenes(folder, 1, **split)
    known = {name for names in stickers.pool("train").values() for name in names}
    asked = {n for k in ("new_pictures", "new_style") for p in stickers.pool(k).values() for n in p}
    assert asked <= known


def test_a_name_that_only_the_held_out_style_draws_is_never_examined(folder: Path) -> None:
    stickers = Stickers(folder, held_out_style="tux")
    assert "sock" not in stickers.pool("new_style")["tux"]
    assert "dog" in stickers.pool("new_style")["tux"]
    assert "tux" not in stickers.pool("train")


# --- pictures ------------------------------------------------------------------------------


def test_rendering_is_a_function_of_the_record(folder: Path) -> None:
    for augment in (False, True):
        stickers, made = scenes(folder, 40, augment=augment)
        for scene in made:
            picture = render(scene, stickers.root)
            assert picture.mode == "RGB" and picture.size == (64, 64)
            assert picture.tobytes() == render(scene, stickers.root).tobytes()


@pytest.mark.parametrize("angle", [0.0, 20.0])
def test_a_sticker_is_seen_where_the_record_says(folder: Path, angle: float) -> None:
    place = Sticker("dog", "animal", "tux", "tux192/images/dog1.webp", 0.3, 0.6, 0.4, angle, True)
    plain = Scene(200, Background("plain", "white"), (), (), seed=3)
    scene = dataclasses.replace(plain, stickers=(place,))
    picture, empty = (np.asarray(render(s, folder), int) for s in (scene, plain))
    rows, columns = (abs(picture - empty).sum(-1) > 60).nonzero()
    assert max(np.ptp(rows), np.ptp(columns)) == pytest.approx(80, abs=4)
    middle = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
    assert middle == pytest.approx((60, 120), abs=3)


# --- batches and examinations ----------------------------------------------------------------


def test_a_batch_is_a_pure_function_of_seed_and_step(folder: Path) -> None:
    first, again = dataset(folder), pickle.loads(pickle.dumps(dataset(folder)))
    later = first.batch(7)
    batch = first.batch(4)
    for name, values in again.batch(4).items():
        assert torch.equal(batch[name], values), name
    assert not torch.equal(batch["pixels"], later["pixels"])
    assert not torch.equal(batch["pixels"], dataset(folder, seed=2).batch(4)["pixels"])


def test_a_batch_holds_prompts_and_answers(folder: Path) -> None:
    data = dataset(folder, photos=0.5)
    for step in range(4):
        batch = data.batch(step)
        assert batch["pixels"].shape == (3, 3, 64, 64) and batch["pixels"].dtype == torch.uint8
        assert batch["ids"].shape == batch["target"].shape and len(batch["cu_seqlens"]) == 3 * 4 + 1
        assert batch["ids"].shape[1] == batch["cu_seqlens"][-1]
        assert batch["ids"].shape[1] % (3 * 4 * PACK) == 0
        for start, stop in itertools.pairwise(batch["cu_seqlens"].tolist()):
            ids, target = (batch[key][0, start:stop] for key in ("ids", "target"))
            end = int(target.nonzero().max()) + 1  # only padding may follow the answer
            assert not ids[end:].any() and (end == len(ids) or stop == batch["cu_seqlens"][-1])
            text = data.tokenizer.decode(ids[:end].tolist())
            answer = data.tokenizer.decode(ids[target].tolist())
            assert re.fullmatch(r"\n[^\n]+\n\nAssistant: [^\n]+\n\n", text)
            assert text.endswith("Assistant:" + answer) and answer.startswith(" ")


class Oracle:
    """Knows the answers to an examination by its pictures."""

    def __init__(self, exams: list[tuple[Image.Image, list[QA]]]) -> None:
        self.answers = {image.tobytes(): {qa.question: qa.answer for qa in q} for image, q in exams}

    def ask_many(self, image: Image.Image, questions: list[str]) -> list[str]:
        return [f" {self.answers[image.tobytes()][question].upper()}\n" for question in questions]


def test_examinations_are_fixed_and_scored(folder: Path) -> None:
    data = dataset(folder, held_out_style="fluent3d", new_pictures=0.5)
    assert data.exams == ["seen", "new_pictures", "new_style", "garments"]
    for kind in data.exams:
        exam, again = list(data.exam(kind, 20)), list(data.exam(kind, 20))
        assert [q for _, q in exam] == [q for _, q in again]
        scores = evaluate_answers(Oracle(exam), again)
        assert set(scores.values()) == {1.0} and "overall" in scores
        silent = type("Silent", (), {"ask_many": lambda self, image, asked: [""] * len(asked)})()
        assert set(evaluate_answers(silent, again).values()) == {0.0}
    assert len(list(data.exam("garments", 100))) == 6, "all validation photos, none of training"
    with pytest.raises(ValueError, match="there are: seen"):
        next(data.exam("unseen"))


def test_evaluation_and_baseline_have_the_same_keys(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("goose_mm.data.scenes.pictures.BLIND_SCENES", 250)
    monkeypatch.setattr("goose_mm.data.scenes.pictures.EXAM_SCENES", 40)
    data = dataset(folder, held_out_style="fluent3d", new_pictures=0.0)
    silent = type("Silent", (), {"ask_many": lambda self, image, asked: [""] * len(asked)})()
    blind = data.baselines()
    assert data.evaluate(silent).keys() == blind.keys()
    assert {"seen", "seen/what", "new_style/exist", "garments/garment"} <= blind.keys()
    assert blind["seen/category"] > 0.9, "the name alone tells the category"
    assert blind["seen/exist"] < 0.75


def test_blind_baseline_learns_by_heart() -> None:
    known = [QA("where", "Where is the cat?", "center")] * 9
    known += [QA("where", "Where is the dog?", "top left")] * 4
    asked = [QA("where", "where is the dog", "top left"), QA("where", "Where is it?", "center")]
    assert blind_baseline(known, asked) == {"overall": 1.0, "where": 1.0}
    assert blind_baseline(known, [QA("what", "What is this?", "cat")])["what"] == 0.0


# --- what users get wrong --------------------------------------------------------------------


def test_a_wrong_folder_is_explained(folder: Path, tmp_path: Path) -> None:
    for path in ("", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"data\.path.*missing: stickers_vocab\.json"):
            Stickers(path)
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "stickers_vocab.json").unlink()
    (tmp_path / "stickers_vocab.json").write_text('{"names": 3}')
    with pytest.raises(ValueError, match="is not a sticker vocabulary"):
        Stickers(tmp_path)
    (tmp_path / "stickers_vocab.json").unlink()
    (tmp_path / "stickers_vocab.json").symlink_to(folder / "stickers_vocab.json")
    (tmp_path / "tux192").unlink()
    (tmp_path / "tux192").mkdir()
    with pytest.raises(ValueError, match=r"13 of 45 pictures .* the first: tux192/images/cat"):
        Stickers(tmp_path)
    with pytest.raises(ValueError, match="must be one of fluent3d, noto, tux, got 'twemoji'"):
        Stickers(folder, held_out_style="twemoji")


def test_an_unreadable_sticker_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.webp"
    broken.write_bytes(b"RIFF....WEBP")
    place = Sticker("dog", "animal", "tux", "broken.webp", 0.5, 0.5, 0.5)
    scene = Scene(64, Background("plain", "red"), (place,), (), seed=0)
    with pytest.raises(ValueError, match=r"cannot read the picture .*broken\.webp"):
        render(scene, tmp_path)


def test_settings_out_of_range_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.photos must lie in 0\.\.1, got 1\.5"):
        dataset(folder, photos=1.5)
    with pytest.raises(ConfigError, match=r"data\.image_size must be at least 32, got 8"):
        Scenes(SceneData(path=str(folder), image_size=8), VisionConfig(), tokenizer(), 1, 0)
