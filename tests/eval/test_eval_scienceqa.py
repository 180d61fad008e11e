"""Which answers the parsers of ScienceQA understand, and the official table by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goose_mm.eval.metrics.scienceqa import parse_choice, scienceqa_scores

COLUMNS = ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]


def problem(answer=0, **changes):
    row = {
        "question": "Which is warm?",
        "choices": ["ice", "fire", "snow"],
        "answer": answer,
        "hint": "",
        "image": None,
        "grade": "grade2",
        "subject": "natural science",
        "split": "test",
    }
    return row | changes


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", 0),
        ("C", 2),
        ("B. fire", 1),
        ("B. ", 1),
        ("The answer is B.", 1),
        ("Fire is warm. The answer is B. So it is.", 1),
        # The stop of the pattern is any character but a line break ...
        ("The answer is B because it burns", 1),
        ("The answer is A fire", 0),
        # ... and it must be there.
        ("The answer is B", None),
        ("The answer is B\n", None),
        # The first letter goes before the sentence.
        ("C. The answer is B.", 2),
        ("D. The answer is B.", None),
        ("F. The answer is B.", 1),
        # One sentence, not two, even if they agree.
        ("The answer is B. The answer is B.", None),
        ("The answer is B. No, the answer is A.", 1),
        ("the answer is B.", None),
        ("The answer is b.", None),
        ("b", None),
        ("b. fire", None),
        ("(B)", None),
        ("B)", None),
        ("B.", None),
        ("B.fire", None),
        ("B ", None),
        (" B", None),
        ("fire", None),
        ("", None),
        # Letters beyond the choices.
        ("D", None),
        ("E. coal", None),
        ("The answer is D.", None),
        ("The answer is Z.", None),
    ],
)
def test_llava_wants_its_own_forms(text, choice):
    assert parse_choice(text, 3) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("b", 1),
        (" b ", 1),
        ("B\n", 1),
        ("b. fire", 1),
        ("B.", 1),
        ("B.fire", 1),
        ("(B)", 1),
        ("(b) fire", 1),
        ("B)", 1),
        ("B: fire", 1),
        ("The answer is B", 1),
        ("the answer is (b).", 1),
        ("Answer is: B", 1),
        ("The answer is B. Yes, the answer is B.", 1),
        ("The answer is A. No! The answer is B.", None),
        ("A fire is warm", None),
        ("Because fire is warm", None),
        ("the answer is a fire", None),
        ("d", None),
        ("(D)", None),
        ("", None),
    ],
)
def test_lenient_takes_other_forms(text, choice):
    assert parse_choice(text, 3, mode="lenient") == choice


@pytest.mark.parametrize("mode", ["llava", "lenient", "lmms_eval"])
def test_letters_reach_as_far_as_the_choices(mode):
    for n_choices in range(2, 6):
        parsed = [parse_choice(letter, n_choices, mode=mode) for letter in "ABCDE"]
        assert parsed == [i if i < n_choices else None for i in range(5)]
    assert parse_choice("F", 6, mode=mode) is None


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match=r"one of llava, lenient, lmms_eval, got 'strict'"):
        parse_choice("A", 2, mode="strict")


pieces = st.sampled_from(
    ["A", "B", "D", "F", "b", ".", ". ", " ", "(", ")", "\n", "fire", "The answer is ", "is "]
)
texts = st.one_of(st.lists(pieces, max_size=6).map("".join), st.text(max_size=5))


def official_llava(text, n_choices):
    options = ["A", "B", "C", "D", "E"]
    if text in options:
        answer = text
    elif len(text) >= 3 and text[0] in options and text[1] == "." and text[2] == " ":
        answer = text[0]
    else:
        tails = [text[found.end() :] for found in re.finditer("The answer is ", text)]
        letters = [tail[0] for tail in tails if re.match("[A-Z][^\n]", tail)]
        answer = letters[0] if len(letters) == 1 else "FAILED"
    return options.index(answer) if answer in options[:n_choices] else None


def official_lmms_eval(text, choice):
    target, text = "abcde"[choice], text.strip()
    return text.lower() == target or (text[:1].isupper() and text[:2].lower() == target + ".")


@given(texts, st.integers(2, 5))
def test_the_llava_parser_is_the_official_one(text, n_choices):
    assert parse_choice(text, n_choices) == official_llava(text, n_choices)


@given(texts, st.integers(2, 5))
def test_lenient_understands_what_llava_does(text, n_choices):
    strict, lenient = (parse_choice(text, n_choices, mode=mode) for mode in ("llava", "lenient"))
    assert strict is None or lenient == strict
    assert lenient is None or 0 <= lenient < n_choices


@given(texts, st.integers(0, 4))
def test_lenient_understands_what_lmms_eval_does(text, choice):
    if official_lmms_eval(text, choice):
        assert parse_choice(text, 5, mode="lenient") == choice


@given(texts, st.integers(0, 4))
def test_the_lmms_eval_parser_is_that_of_the_harness(text, choice):
    assert (parse_choice(text, 5, mode="lmms_eval") == choice) == official_lmms_eval(text, choice)


def test_the_table_by_hand():
    problems = {
        "1": problem(hint="warm is hot", image="image.png"),
        "2": problem(subject="social science", image="image.png", grade="grade6"),
        "3": problem(subject="language science", grade="grade7"),
        "4": problem(hint="warm is hot", grade="grade12"),
        "5": problem(grade="grade10"),
    }
    predictions = {"1": "A", "2": "B", "3": "A. ice", "4": "a", "5": "D"}
    assert scienceqa_scores(problems, predictions) == {
        "NAT": pytest.approx(100 / 3),
        "SOC": 0.0,
        "LAN": 100.0,
        "TXT": 50.0,
        "IMG": 50.0,
        "NO": 50.0,
        "G1-6": 50.0,
        "G7-12": pytest.approx(100 / 3),
        "Avg": 40.0,
        "unparsed": 40.0,
    }
    lenient = scienceqa_scores(problems, predictions, mode="lenient")
    assert (lenient["Avg"], lenient["unparsed"]) == (60.0, 20.0)


def test_empty_groups_are_none():
    scores = scienceqa_scores({"1": problem()}, {"1": "A"})
    empty = {name for name, value in scores.items() if value is None}
    assert empty == {"SOC", "LAN", "TXT", "IMG", "G7-12"}
    assert set(scienceqa_scores({}, {}).values()) == {None}


def test_every_problem_needs_a_prediction():
    with pytest.raises(ValueError, match="2 of 3 problems have no prediction, such as '2'"):
        scienceqa_scores({"1": problem(), "2": problem(), "3": problem()}, {"1": "A", "7": "B"})


problems = st.builds(
    problem,
    answer=st.integers(0, 2),
    hint=st.sampled_from(["", "warm is hot"]),
    image=st.sampled_from([None, "image.png"]),
    grade=st.integers(1, 12).map("grade{}".format),
    subject=st.sampled_from(["natural science", "social science", "language science"]),
)


@given(st.lists(st.tuples(problems, texts), min_size=1, max_size=8))
def test_the_table_is_the_official_one(rows):
    scores = scienceqa_scores(
        {str(i): row for i, (row, _) in enumerate(rows)},
        {str(i): text for i, (_, text) in enumerate(rows)},
    )
    members = {
        "NAT": [row["subject"] == "natural science" for row, _ in rows],
        "SOC": [row["subject"] == "social science" for row, _ in rows],
        "LAN": [row["subject"] == "language science" for row, _ in rows],
        "TXT": [row["hint"] != "" for row, _ in rows],
        "IMG": [row["image"] is not None for row, _ in rows],
        "NO": [row["hint"] == "" and row["image"] is None for row, _ in rows],
        "G1-6": [int(row["grade"][5:]) < 7 for row, _ in rows],
        "G7-12": [int(row["grade"][5:]) > 6 for row, _ in rows],
        "Avg": [True for _ in rows],
    }
    assert list(scores) == [*COLUMNS, "unparsed"]
    right = [official_llava(text, 3) == row["answer"] for row, text in rows]
    for name, belongs in members.items():
        inside = [hit for hit, member in zip(right, belongs, strict=True) if member]
        assert scores[name] == (pytest.approx(100 * sum(inside) / len(inside)) if inside else None)
    failed = [official_llava(text, 3) is None for _, text in rows]
    assert scores["unparsed"] == pytest.approx(100 * sum(failed) / len(failed))
