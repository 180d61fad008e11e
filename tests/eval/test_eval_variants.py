"""What harnesses print of the same answers: worked by hand, and against the harness itself."""

from __future__ import annotations

import copy
import json
import os
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eval_runs import OPTIONS, answers, picture, scored, write

from goose_mm.eval.command import open_task
from goose_mm.eval.metrics.gqa import gqa_correct_lmms_eval, gqa_correct_vlmevalkit
from goose_mm.eval.metrics.scienceqa import parse_choice
from goose_mm.eval.metrics.vqa import textvqa_accuracy, vqa_accuracy, vqa_accuracy_lmms_eval


@pytest.mark.parametrize(
    ("prediction", "answer", "official", "lmms_eval", "vlmevalkit"),
    [
        ("yes", "yes", True, True, True),
        ("Yes", "yes", False, True, True),
        ("yes.", "yes", False, True, False),
        (" yes\n", "yes", False, True, True),
        ("t-shirt", "tshirt", False, True, False),
        ("no", "yes", False, False, False),
        ("fire hydrant", "firehydrant", False, False, False),
    ],
)
def test_one_gqa_answer_has_three_verdicts(prediction, answer, official, lmms_eval, vlmevalkit):
    assert (prediction == answer) == official
    assert gqa_correct_lmms_eval(prediction, answer) == lmms_eval
    assert gqa_correct_vlmevalkit(prediction, answer) == vlmevalkit


def vqav2(folder):
    rows = [(1, answers("yes", "10")), (2, answers("two", "10")), (3, answers("cat", "10"))]
    questions = [{"question_id": i, "image_id": 7, "question": "?"} for i, _ in rows]
    known = [
        {
            "question_id": i, "image_id": 7, "question_type": "t", "answer_type": "other",
            "answers": a, "multiple_choice_answer": a[0]["answer"],
        }
        for i, a in rows
    ]  # fmt: skip
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": known})
    picture(folder / "val2014" / f"COCO_val2014_{7:012d}.jpg")


def textvqa(folder):
    rows = [
        {"question_id": 1, "image_id": "a", "question": "?", "answers": ["5"] * 10},
        {"question_id": 2, "image_id": "a", "question": "?", "answers": ["lay's"] * 10},
        {"question_id": 3, "image_id": "a", "question": "?", "answers": ["nokia"] * 10},
        {"question_id": 4, "image_id": "a", "question": "?", "answers": ["nokia"] * 10},
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    picture(folder / "train_images" / "a.jpg")


def gqa(folder):
    common = {
        "question": "?", "imageId": "3", "isBalanced": True, "entailed": [], "equivalent": [],
        "types": {"structural": "query", "semantic": "obj", "detailed": "x"},
        "groups": {"global": None, "local": None},
        "semantic": [{"operation": "select", "argument": "dog", "dependencies": []}],
    }  # fmt: skip
    wanted = ["yes", "yes", "t-shirt", "dog"]
    rows = {str(i): common | {"answer": answer} for i, answer in enumerate(wanted, start=1)}
    write(folder / "testdev_balanced_questions.json", rows)
    picture(folder / "images" / "3.jpg")


def scienceqa(folder):
    common = {
        "question": "?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None,
        "subject": "natural science", "grade": "grade2", "task": "", "topic": "", "category": "",
        "skill": "", "lecture": "",
    }  # fmt: skip
    write(folder / "problems.json", {str(i): common for i in range(1, 5)})
    write(folder / "pid_splits.json", {"test": ["1", "2", "3", "4"]})
    (folder / "test").mkdir()


TEXT = "TextVQA accuracy, no OCR tokens"


@pytest.mark.parametrize(
    ("name", "make", "predictions", "scores"),
    [
        (
            # before the official score answers are made lower case and lose a final stop, so "2"
            # against ten "two" is left, which agreeing references keep from being normalised
            "vqav2",
            vqav2,
            ["Yes.", "2", "cat"],
            {"VQA accuracy": 66.67, "VQA accuracy (lmms-eval)": 100.0},
        ),
        (
            "textvqa",
            textvqa,
            ["5.", "Lay's", "Nokia", "sony"],
            {TEXT: 75.0, f"{TEXT} (lmms-eval)": 75.0, f"{TEXT} (VLMEvalKit)": 50.0},
        ),
        (
            # the final stop is gone before the official score, and so is the capital
            "gqa",
            gqa,
            ["Yes.", "Yes", "tshirt", "dog."],
            {"accuracy": 75.0, "accuracy (lmms-eval)": 100.0, "accuracy (VLMEvalKit)": 25.0},
        ),
        (
            "scienceqa",
            scienceqa,
            ["b", "B.", "B", "(B)"],
            {
                "Avg (llava parser)": 25.0,
                "Avg (lenient parser)": 100.0,
                "Avg (lmms-eval)": 75.0,
                "IMG (lmms-eval)": None,
            },
        ),
    ],
)
def test_a_report_shows_the_official_score_first(name, make, predictions, scores, tmp_path):
    make(tmp_path)
    given_ = {str(i): text for i, text in enumerate(predictions, start=1)}
    report = scored(open_task(name, tmp_path, OPTIONS), given_, tmp_path / "out")
    official = next(iter(scores))
    assert report["measure"] == official and next(iter(report["scores"])) == official
    for label, value in scores.items():
        assert report["scores"][label] == (value if value is None else pytest.approx(value)), label
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index(f"**{official}") < text.index("(lmms-eval)")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["score"] == scores[official]


# --- the harness itself -------------------------------------------------------------------------

lmms_eval = pytest.mark.skipif(
    "CI" not in os.environ and not find_spec("lmms_eval"),
    reason="lmms_eval is not installed: pip install lmms-eval==0.7.3",
)
words = st.sampled_from(
    ["yes", "Yes", "yes.", "2", "two", "a dog", "dog", "1,,0", "10", "lay's", "hes", "t-shirt", ""]
)
texts = words | st.text(alphabet="aB1 .,'?-!\t\n", max_size=8)
tens = st.lists(texts, min_size=2, max_size=4).flatmap(
    lambda few: st.lists(st.sampled_from(few), min_size=10, max_size=10)
)


@lmms_eval
@settings(max_examples=300, deadline=None)
@given(texts, tens)
def test_vqav2_and_textvqa_are_what_lmms_eval_computes(prediction, references):
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    rows = [{"answer": text, "answer_id": i} for i, text in enumerate(references)]
    doc = {"question_id": 1, "answers": rows}
    theirs = vqav2_process_results(copy.deepcopy(doc), [prediction])["exact_match"]
    assert vqa_accuracy_lmms_eval(prediction, references) == pytest.approx(theirs)
    doc = {"question_id": 1, "answers": list(references)}
    theirs = textvqa_process_results(doc, [prediction])["exact_match"]
    assert textvqa_accuracy(prediction, references) == pytest.approx(theirs)


@lmms_eval
@settings(max_examples=300, deadline=None)
@given(texts, texts)
def test_gqa_is_what_lmms_eval_computes(prediction, answer):
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    theirs = exact_match_hf_evaluate(
        [prediction.strip()], [answer], ignore_case=True, ignore_punctuation=True
    )
    assert gqa_correct_lmms_eval(prediction, answer) == bool(theirs["exact_match"])


@lmms_eval
@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ABCbd. (\n", max_size=4), st.integers(0, 3))
def test_scienceqa_is_what_lmms_eval_computes(text, answer):
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results

    doc = {"choices": ["w", "x", "y", "z"], "answer": answer}
    theirs = sqa_process_results(doc, [text])["exact_match"]
    assert (parse_choice(text, 4, mode="lmms_eval") == answer) == bool(theirs)


def test_the_guard_of_the_official_evaluator():
    for text, reference in (("Yes", "yes"), ("yes.", "yes"), ("2", "two")):
        assert vqa_accuracy(text, [reference] * 10) == 0.0
        assert vqa_accuracy_lmms_eval(text, [reference] * 10) == 1.0
