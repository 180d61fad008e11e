"""Accuracy against ten human answers, as VQAv2 and TextVQA define it.

Rules re-derived from the official evaluators: GT-Vision-Lab/VQA (vqaEval.py) for VQAv2, and the
m4c evaluators of facebookresearch/mmf for TextVQA. A function whose name ends in a harness
computes what that harness prints instead; say so beside the number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

__all__ = [
    "normalize_evalai",
    "normalize_vqa",
    "textvqa_accuracy",
    "textvqa_accuracy_vlmevalkit",
    "vqa_accuracy",
    "vqa_accuracy_lmms_eval",
    "vqa_scores",
]

PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_DIGITS.split())}

# Words are lower case when they are looked up, so the official spellings with I never match.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
"""
# The three that do not follow the rule "one apostrophe forgotten"; the last is upside down.
_IRREGULAR = {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
CONTRACTIONS = _IRREGULAR | {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED.split()
    for at, letter in enumerate(word)
    if letter == "'"
}

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
# The official look-behind is a typo that never bites: "5." loses its stop.
_STOP = re.compile(r"\.(?!\d)")
_STOP_AWAY_FROM_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")
# The evaluators pass re.UNICODE, which is 32, where re.sub expects a count.
_MAX_STOPS = 32


def normalize_vqa(text: str) -> str:
    """An answer as VQAv2 compares it: blanks, punctuation, number words, articles, apostrophes."""
    return _words(_unpunctuated(_one_line(text)))


def normalize_evalai(text: str) -> str:
    """An answer as TextVQA compares it; the comma rule of VQAv2 never sees a comma here."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_unpunctuated(_one_line(text)))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQAv2 accuracy of one answer, 0..1, against its ten human answers.

    Mean over the references of min(1, matches among the other references / 3). If all references
    are spelled alike nothing is normalised: "Yes" against ten "yes" scores 0, so bring the
    prediction into the form of the answers (lower case, no final stop) first, and say so.
    Raises ValueError when there are no references.
    """
    prediction, references = _one_line(prediction), [_one_line(answer) for answer in references]
    if len(set(references)) > 1:
        prediction, references = normalize_vqa(prediction), [*map(normalize_vqa, references)]
    return _leave_one_out(prediction, references)


def vqa_accuracy_lmms_eval(prediction: str, references: Sequence[str]) -> float:
    """`vqa_accuracy` as lmms-eval computes it: normalised even when all references agree."""

    def normalize(text: str) -> str:
        return _words(_unpunctuated(_one_line(text), comma=_COMMAS_IN_NUMBER))

    return _leave_one_out(normalize(prediction), [*map(normalize, references)])


def vqa_scores(
    annotations: Sequence[Mapping[str, Any]], answers: Mapping[int, str]
) -> dict[str, Any]:
    """VQAv2 accuracy of a set, in percent with two decimals like the official evaluator.

    `annotations`: the list of that name in the official file. `answers` {question_id: answer}.
    Returns `overall`, `per_answer_type` and `per_question_type` {type: percent}. Raises ValueError
    unless every annotated question, and no other, is answered.
    """
    known = {row["question_id"] for row in annotations}
    missing, extra = known - answers.keys(), answers.keys() - known
    if missing or extra or not known:
        raise ValueError(
            f"the answers must be those to the {len(known)} annotated questions: "
            f"{len(missing)} are missing {sorted(missing)[:3]}, {len(extra)} are extra "
            f"{sorted(extra)[:3]}"
        )
    overall: list[float] = []
    answer_types: dict[str, list[float]] = defaultdict(list)
    question_types: dict[str, list[float]] = defaultdict(list)
    for row in annotations:
        references = [answer["answer"] for answer in row["answers"]]
        accuracy = vqa_accuracy(answers[row["question_id"]], references)
        overall.append(accuracy)
        answer_types[row["answer_type"]].append(accuracy)
        question_types[row["question_type"]].append(accuracy)
    return {
        "overall": _percent(overall),
        "per_answer_type": {name: _percent(each) for name, each in answer_types.items()},
        "per_question_type": {name: _percent(each) for name, each in question_types.items()},
    }


def textvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """TextVQA accuracy of one answer, 0..1; always normalised.

    Raises ValueError unless there are exactly ten references.
    """
    return _of_ten(normalize_evalai, prediction, references)


def textvqa_accuracy_vlmevalkit(prediction: str, references: Sequence[str]) -> float:
    """`textvqa_accuracy` as VLMEvalKit computes it.

    It repairs the look-behind, so that "5." keeps its stop, and leaves "'s" on its word.
    """

    def normalize(text: str) -> str:
        return _words(_unpunctuated(_one_line(text), stop=_STOP_AWAY_FROM_DIGITS))

    return _of_ten(normalize, prediction, references)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _unpunctuated(
    text: str, comma: re.Pattern[str] = _COMMA_IN_NUMBER, stop: re.Pattern[str] = _STOP
) -> str:
    """A mark becomes a space, or nothing if it stands beside one or if a number holds a comma."""
    in_number = comma.search(text)
    marks = {
        ord(mark): "" if in_number or f"{mark} " in text or f" {mark}" in text else " "
        for mark in PUNCTUATION.intersection(text)
    }
    return stop.sub("", text.translate(marks), count=_MAX_STOPS)


def _words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes put back."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _leave_one_out(prediction: str, references: Sequence[str]) -> float:
    """Counted in whole thirds, so that the order of the references cannot change a bit."""
    if not references:
        raise ValueError("an answer needs references to be scored against, got none")
    total, matching = len(references), sum(answer == prediction for answer in references)
    thirds = matching * min(3, matching - 1) + (total - matching) * min(3, matching)
    return thirds / (3 * total)


def _of_ten(normalize: Callable[[str], str], prediction: str, references: Sequence[str]) -> float:
    if len(references) != 10:
        raise ValueError(f"TextVQA has 10 reference answers a question, got {len(references)}")
    return _leave_one_out(normalize(prediction), [*map(normalize, references)])


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * fmean(accuracies), 2)
