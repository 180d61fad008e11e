"""ScienceQA (Lu et al. 2022): letters out of answers, and the official table of accuracies.

The table is that of lupantech/ScienceQA (evaluate_acc.py), the strict parser that of LLaVA
(eval_science_qa.py). How answers are parsed moves the score, so always name the parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

__all__ = ["parse_choice", "scienceqa_scores"]

MODES = ("llava", "lenient", "lmms_eval")
_LETTERS = ["A", "B", "C", "D", "E"]
# The unescaped stop is LLaVA's: some character must follow the letter, any but a line break.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_LETTER_FIRST = re.compile(r"\s*\(?([A-Za-z])(?:[.):]|\s*$)")
_LETTER_AFTER_IS = re.compile(r"(?i:answer is):?\s*\(?([A-Za-z])(?=[.):]|\s*$)")

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADES = {f"grade{number}": "G1-6" if number <= 6 else "G7-12" for number in range(1, 13)}
_COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")


def parse_choice(text: str, n_choices: int, mode: str = "llava") -> int | None:
    """The choice an answer names, 0..n_choices-1, or None.

    "llava" accepts only "B", "B. ..." and one "The answer is B." anywhere, in these capitals.
    "lenient" accepts those, then the same in any case, "(B)", "B)", "B:", "B." and "answer is B".
    "lmms_eval" accepts what that harness does: a letter alone in any case, or whatever begins
    with a capital and a stop. None knows more than five letters. Raises ValueError for another
    mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "lmms_eval":
        return _index(_lmms_eval_letter(text.strip()), n_choices)
    choice = _index(_llava_letter(text), n_choices)
    if choice is None and mode == "lenient":
        choice = _index(_lenient_letter(text), n_choices)
    return choice


def scienceqa_scores(
    problems: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, str],
    mode: str = "llava",
) -> dict[str, float | None]:
    """Accuracy by subject, context and grade in percent; None where there are no problems.

    `problems` {id: problem} as in problems.json, only those to be scored; `predictions` {id: text}.

    NAT, SOC, LAN   natural, social and language science
    TXT, IMG, NO    problems with a hint, with an image, with neither; TXT and IMG overlap
    G1-6, G7-12     school grades
    Avg             all problems
    unparsed        answers in which the parser found no valid choice; they count as wrong

    Raises ValueError when a problem has no prediction.
    """
    if missing := [key for key in problems if key not in predictions]:
        raise ValueError(
            f"{len(missing)} of {len(problems)} problems have no prediction, such as {missing[0]!r}"
        )
    right: dict[str, list[bool]] = {name: [] for name in _COLUMNS}
    unparsed = []
    for key, problem in problems.items():
        choice = parse_choice(predictions[key], len(problem["choices"]), mode)
        unparsed.append(choice is None)
        for name in _columns(problem):
            right[name].append(choice == problem["answer"])
    return {name: _percent(each) for name, each in (right | {"unparsed": unparsed}).items()}


def _llava_letter(text: str) -> str:
    if text in _LETTERS:
        return text
    if text[:1] in _LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else ""


def _lmms_eval_letter(text: str) -> str:
    if len(text) == 1:
        return text.upper()
    return text[0] if text[1:2] == "." and text[0].isupper() else ""


def _lenient_letter(text: str) -> str:
    if first := _LETTER_FIRST.match(text):
        return first[1].upper()
    found = {letter.upper() for letter in _LETTER_AFTER_IS.findall(text)}
    return found.pop() if len(found) == 1 else ""


def _index(letter: str, n_choices: int) -> int | None:
    offered = _LETTERS[:n_choices]
    return offered.index(letter) if letter in offered else None


def _columns(problem: Mapping[str, Any]) -> Iterator[str]:
    yield "Avg"
    if problem["subject"] in _SUBJECTS:
        yield _SUBJECTS[problem["subject"]]
    if problem["grade"] in _GRADES:
        yield _GRADES[problem["grade"]]
    if problem["hint"]:
        yield "TXT"
    if problem["image"]:
        yield "IMG"
    if not problem["hint"] and not problem["image"]:
        yield "NO"


def _percent(values: list[bool]) -> float | None:
    return 100 * fmean(values) if values else None
