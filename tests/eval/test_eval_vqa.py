"""Laws and quirks of VQA accuracy; the official evaluators in their slowest form are the oracle."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goose_mm.eval.metrics.vqa import (
    CONTRACTIONS,
    PUNCTUATION,
    normalize_evalai,
    normalize_vqa,
    textvqa_accuracy,
    textvqa_accuracy_vlmevalkit,
    vqa_accuracy,
    vqa_accuracy_lmms_eval,
    vqa_scores,
)

# sha256 of the table in GT-Vision-Lab/VQA vqaEval.py, as JSON with sorted keys.
CONTRACTIONS_SHA256 = "52771f672b95913f862aae058e42219f9e1e4d7af64475a5cdf394301acf67a9"
METRICS = [
    vqa_accuracy,
    vqa_accuracy_lmms_eval,
    textvqa_accuracy,
    textvqa_accuracy_vlmevalkit,
]

MARKS = "; / [ ] { } ( ) = + \\ _ - > < @ ` , ? ! . . ' : %"
WORDS = "a An the none One ten yes dont Im y'alldve couldnt've hes let's cat"
BLANKS_AND_DIGITS = [" ", " ", "\n", "\t", '"', "1", "2", "30", "٣", "İ", "é"]

pieces = st.sampled_from([*MARKS.split(), *WORDS.split(), *BLANKS_AND_DIGITS])
texts = st.one_of(st.lists(pieces, max_size=8).map("".join), st.text(max_size=8))
answers = st.sampled_from(["yes", "Yes", "yes.", "no", "2", "two", "a cat", "cat", "1,000", "it's"])
tens = st.lists(answers, min_size=10, max_size=10)


def digits_around(text, at, step):
    return 0 <= at + step < len(text) and text[at + step].isdecimal()


def official_punctuation(text, keep_after_digit=False):
    comma = any(
        letter == "," and digits_around(text, at, -1) and digits_around(text, at, 1)
        for at, letter in enumerate(text)
    )
    out = text
    for mark in [*";/[]", '"', *"{}()=+\\_-><@`,?!"]:
        beside = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside or comma else " ")
    kept, removed = "", 0
    for at, letter in enumerate(out):
        stop = letter == "." and not digits_around(out, at, 1)
        if stop and keep_after_digit and digits_around(out, at, -1):
            stop = False
        if stop and removed < 32:
            removed += 1
        else:
            kept += letter
    return kept


def official_words(text):
    kept = []
    for word in text.lower().split():
        if word == "none":
            word = "0"
        for number, name in enumerate(
            ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        ):
            if word == name:
                word = str(number)
        if word not in ["a", "an", "the"]:
            kept.append(CONTRACTIONS.get(word, word))
    return " ".join(kept)


def official_vqa(prediction, references):
    def strip(text):
        return text.replace("\n", " ").replace("\t", " ").strip()

    rows = [{"answer": strip(text), "answer_id": i} for i, text in enumerate(references)]
    prediction = strip(prediction)
    if len({row["answer"] for row in rows}) > 1:
        prediction = official_words(official_punctuation(prediction))
        for row in rows:
            row["answer"] = official_words(official_punctuation(row["answer"]))
    scores = []
    for row in rows:
        others = [other for other in rows if other != row]
        scores.append(min(1, sum(other["answer"] == prediction for other in others) / 3))
    return sum(scores) / len(scores)


def annotation(number, references, answer_type="other", question_type="what"):
    return {
        "question_id": number,
        "question_type": question_type,
        "answer_type": answer_type,
        "answers": [{"answer": text, "answer_id": i + 1} for i, text in enumerate(references)],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" two\tbig\ndogs ", "2 big dogs"),
        ("None", "0"),
        ("zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("The cat on a mat", "cat on mat"),
        # A mark becomes a space ...
        ("left/right", "left right"),
        ("t-shirt", "t shirt"),
        # ... or goes if it stands beside a space anywhere, there and elsewhere.
        ("t-shirt -", "tshirt"),
        ("t-shirt - x-ray", "tshirt xray"),
        ("well, yes,no", "well yesno"),
        # A comma between digits removes every mark without a space, not only commas.
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("a,b", "b"),
        ("٣,٣", "٣٣"),
        # Only a stop before a digit stays; the look-behind that would keep "5." never bites.
        ("5.", "5"),
        ("5.5", "5.5"),
        ("e.g.", "eg"),
        (".5", ".5"),
        # Marks that survive.
        ("it's 50%: $3 & #1 *", "it's 50%: $3 & #1 *"),
        ("don't", "don't"),
        ("dont", "don't"),
        ("DONT", "don't"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        # Looked up in lower case, so the keys with capitals never match.
        ("Im", "im"),
        ("Ive", "ive"),
        ("I'dve", "i'dve"),
        ("Id've", "id've"),
        ("", ""),
        ("the", ""),
    ],
)
def test_normalize_vqa(text, expected):
    assert normalize_vqa(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, sir?", "yes sir"),
        ("1,000", "1000"),
        # The comma is gone before the comma rule: the hyphen becomes a space, unlike in VQAv2.
        ("1,000-2,000", "1000 2000"),
        ("Lay's", "lay 's"),
        ("let's", "let 's"),
        ("hes", "he's"),
        ("5.", "5"),
        ("5.5", "5.5"),
        ("\tThe\nStop ", "stop"),
        ("two-one", "2 1"),
    ],
)
def test_normalize_evalai(text, expected):
    assert normalize_evalai(text) == expected


def test_only_32_stops_are_removed():
    for normalize in normalize_vqa, normalize_evalai:
        assert normalize("." * 32) == ""
        assert normalize("." * 40) == "." * 8


def test_the_contraction_table_is_the_official_one():
    assert len(CONTRACTIONS) == 120
    assert {key for key in CONTRACTIONS if key != key.lower()} == {"Im", "Ive", "I'dve", "Id've"}
    canonical = json.dumps(CONTRACTIONS, sort_keys=True).encode()
    assert hashlib.sha256(canonical).hexdigest() == CONTRACTIONS_SHA256


def test_there_are_21_punctuation_marks():
    assert len(PUNCTUATION) == 21
    assert not PUNCTUATION & set(".':%$&#*")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("matching", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_leaving_one_out(metric, matching, expected):
    references = ["cat"] * matching + ["dog"] * (10 - matching)
    assert metric("cat", references) == expected


@pytest.mark.parametrize(
    ("prediction", "reference"), [("Yes", "yes"), ("yes.", "yes"), ("2", "two"), ("two", "2")]
)
def test_unanimous_references_are_not_normalised(prediction, reference):
    same, split = [reference] * 10, [reference] * 9 + ["maybe"]
    assert vqa_accuracy(prediction, same) == 0.0
    assert vqa_accuracy(prediction, split) == 1.0
    assert vqa_accuracy_lmms_eval(prediction, same) == 1.0
    assert textvqa_accuracy(prediction, same) == 1.0


def test_unanimity_is_judged_after_stripping():
    assert vqa_accuracy("Yes", ["yes", " yes", "yes\n", "\tyes"] + ["yes"] * 6) == 0.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0


def test_a_number_with_a_stop_divides_the_harnesses():
    assert textvqa_accuracy("5.", ["5"] * 10) == 1.0
    assert textvqa_accuracy_vlmevalkit("5.", ["5"] * 10) == 0.0
    assert textvqa_accuracy_vlmevalkit("yes.", ["yes"] * 10) == 1.0


def test_the_possessive_divides_the_harnesses():
    references = ["lay 's"] * 10
    assert textvqa_accuracy("Lay's", references) == 1.0
    assert textvqa_accuracy_vlmevalkit("Lay's", references) == 0.0


def test_two_commas_in_a_number_divide_the_harnesses():
    references = ["10"] * 9 + ["11"]
    assert vqa_accuracy("1,,0", references) == 0.0
    assert vqa_accuracy_lmms_eval("1,,0", references) == 1.0


@pytest.mark.parametrize("metric", [textvqa_accuracy, textvqa_accuracy_vlmevalkit])
@pytest.mark.parametrize("count", [0, 9, 11])
def test_textvqa_wants_ten_references(metric, count):
    with pytest.raises(ValueError, match=f"10 reference answers.*got {count}"):
        metric("yes", ["yes"] * count)


def test_vqa_wants_references():
    with pytest.raises(ValueError, match="got none"):
        vqa_accuracy("yes", [])


@given(texts)
def test_normalize_vqa_is_the_official_one(text):
    stripped = text.replace("\n", " ").replace("\t", " ").strip()
    assert normalize_vqa(text) == official_words(official_punctuation(stripped))


@given(texts)
def test_normalize_evalai_is_the_official_one(text):
    text_ = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    stripped = text_.replace("\n", " ").replace("\t", " ").strip()
    assert normalize_evalai(text) == official_words(official_punctuation(stripped))


@given(texts)
def test_normalising_twice_changes_nothing(text):
    assert normalize_vqa(normalize_vqa(text)) == normalize_vqa(text)


def test_normalize_evalai_is_not_idempotent():
    assert normalize_evalai("hes") == "he's"
    assert normalize_evalai("he's") == "he 's"


@given(answers, tens)
def test_vqa_accuracy_is_the_official_one(prediction, references):
    expected = official_vqa(prediction, references)
    assert vqa_accuracy(prediction, references) == pytest.approx(expected, abs=1e-12)


@given(texts, st.lists(texts, min_size=1, max_size=12))
def test_vqa_accuracy_is_the_official_one_on_any_text(prediction, references):
    references = [*references, prediction]
    expected = official_vqa(prediction, references)
    assert vqa_accuracy(prediction, references) == pytest.approx(expected, abs=1e-12)


@given(answers, tens)
def test_the_vlmevalkit_variant_is_a_repaired_stop(prediction, references):
    def normalize(text):
        return official_words(official_punctuation(text.strip(), keep_after_digit=True))

    matching = sum(normalize(text) == normalize(prediction) for text in references)
    expected = [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1][matching]
    assert textvqa_accuracy_vlmevalkit(prediction, references) == expected


@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data(), prediction=answers, references=tens)
def test_references_have_no_order_and_scores_have_bounds(metric, data, prediction, references):
    score = metric(prediction, references)
    assert score in (0.0, 0.3, 0.6, 0.9, 1.0)
    assert metric(prediction, data.draw(st.permutations(references))) == score


@given(answers, tens)
def test_a_guard_only_matters_when_references_agree(prediction, references):
    if len(set(references)) > 1:
        official = vqa_accuracy(prediction, references)
        assert vqa_accuracy_lmms_eval(prediction, references) == official


def test_vqa_scores_by_type():
    annotations = [
        annotation(1, ["yes"] * 10, "yes/no", "is the"),
        annotation(2, ["2"] * 3 + ["3"] * 7, "number", "how many"),
        annotation(3, ["red"] * 2 + ["blue"] * 8, "other", "what color"),
        annotation(4, ["no"] * 10, "yes/no", "is the"),
    ]
    scores = vqa_scores(annotations, {1: "yes", 2: "two", 3: "red", 4: "yes"})
    assert scores == {
        "overall": 62.5,
        "per_answer_type": {"yes/no": 50.0, "number": 90.0, "other": 60.0},
        "per_question_type": {"is the": 50.0, "how many": 90.0, "what color": 60.0},
    }


def test_vqa_scores_have_two_decimals():
    annotations = [annotation(i, ["cat"] * 10) for i in range(3)]
    assert vqa_scores(annotations, {0: "cat", 1: "cat", 2: "dog"})["overall"] == 66.67


def test_vqa_scores_leave_the_annotations_alone():
    annotations = [annotation(1, ["The cat."] * 5 + ["a dog"] * 5)]
    before = json.dumps(annotations)
    vqa_scores(annotations, {1: "cat"})
    assert json.dumps(annotations) == before


@pytest.mark.parametrize(
    ("given_answers", "message"),
    [
        ({1: "a"}, r"1 are missing \[2\], 0 are extra"),
        ({1: "a", 2: "b", 3: "c", 4: "d"}, r"0 are missing \[\], 2 are extra \[3, 4\]"),
        ({1: "a", 7: "b"}, r"1 are missing \[2\], 1 are extra \[7\]"),
        ({}, "2 are missing"),
    ],
)
def test_vqa_scores_want_the_annotated_questions(given_answers, message):
    annotations = [annotation(1, ["a"] * 10), annotation(2, ["b"] * 10)]
    with pytest.raises(ValueError, match=message):
        vqa_scores(annotations, given_answers)


def test_vqa_scores_want_questions():
    with pytest.raises(ValueError, match="0 annotated questions"):
        vqa_scores([], {})
