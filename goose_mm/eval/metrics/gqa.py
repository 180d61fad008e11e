"""The scores of the official GQA script (Hudson and Manning 2019, eval.py), except grounding."""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

__all__ = ["gqa_correct_lmms_eval", "gqa_correct_vlmevalkit", "gqa_scores", "normalize_gqa_llava"]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

_COMMON = ("color", "material", "shape")
# Substrings of "operation: argument"; the final asking does not count as a step of reasoning.
_ASKING = ("exist", "query: name", "choose name")


def _steps(question: Mapping[str, Any]) -> int:
    calls = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(asking in call for asking in _ASKING) for call in calls)


_TRAITS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "accuracyPerStructuralType": lambda question: question["types"]["structural"],
    "accuracyPerSemanticType": lambda question: question["types"]["semantic"],
    "accuracyPerLength": lambda question: len(question["question"].split()),
    "accuracyPerSteps": _steps,
}


def normalize_gqa_llava(text: str) -> str:
    """A prediction as LLaVA converts it before it is scored: final stops removed, lower case."""
    return text.rstrip(".").lower()


def gqa_correct_lmms_eval(prediction: str, answer: str) -> bool:
    """Whether lmms-eval counts a prediction as right: case and punctuation do not matter."""
    found, wanted = (
        text.lower().translate(_NO_PUNCTUATION) for text in (prediction.strip(), answer)
    )
    return found == wanted


def gqa_correct_vlmevalkit(prediction: str, answer: str) -> bool:
    """Whether VLMEvalKit counts a prediction as right: case does not matter, a final stop does."""
    return prediction.strip().lower() == answer.strip().lower()


def gqa_scores(
    questions: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Collection[str]]] | None = None,
) -> dict[str, Any]:
    """Score predictions {question id: answer} of the balanced questions by exact equality.

    `questions` {id: question} and `choices` {id: {"valid", "plausible"}} as in the official files.
    Values are percent, except `distribution`; what is not measured is None.

    accuracy, binary, open     of all questions, of all but structural type query, of query
    validity, plausibility     answers among the valid or plausible choices
    consistency                mean accuracy on the questions that correct answers entail; measured
                               if all entailed questions, balanced or not, are known and answered
    distribution               chi-square of answers per global group / 100, lower is better
    accuracyPerStructuralType, accuracyPerSemanticType, accuracyPerLength (words),
    accuracyPerSteps           {type: (percent, count)}

    Raises ValueError when a balanced question has no prediction or, with choices, no choices.
    """
    balanced = {key: question for key, question in questions.items() if question["isBalanced"]}
    _require(balanced, predictions, "predictions")
    right = {key: predictions[key] == question["answer"] for key, question in balanced.items()}
    valid = plausible = None
    if choices is not None:
        _require(balanced, choices, "choices")
        valid, plausible = (
            [_belongs(predictions[key], choices[key][kind], balanced[key]) for key in balanced]
            for kind in ("valid", "plausible")
        )
    is_open = {
        key: question["types"]["structural"] == "query" for key, question in balanced.items()
    }
    return {
        "accuracy": _percent(list(right.values())),
        "binary": _percent([right[key] for key in balanced if not is_open[key]]),
        "open": _percent([right[key] for key in balanced if is_open[key]]),
        "validity": _percent(valid),
        "plausibility": _percent(plausible),
        "consistency": _consistency(questions, balanced, predictions, right),
        "distribution": _distribution(balanced, predictions),
    } | {
        name: _per({key: trait(question) for key, question in balanced.items()}, right)
        for name, trait in _TRAITS.items()
    }


def _require(balanced: Collection[str], given: Mapping[str, Any], what: str) -> None:
    missing = [key for key in balanced if key not in given]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(balanced)} balanced questions have no {what}, such as "
            f"{missing[0]!r}"
        )


def _belongs(prediction: str, group: Collection[str], question: Mapping[str, Any]) -> bool:
    return prediction in (_COMMON if "Common" in question["types"]["detailed"] else group)


def _consistency(
    questions: Mapping[str, Mapping[str, Any]],
    balanced: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, str],
    right: Mapping[str, bool],
) -> float | None:
    entailed = {
        key: [other for other in question["entailed"] if other != key]
        for key, question in balanced.items()
    }
    needed = {other for others in entailed.values() for other in others}
    if not needed <= questions.keys() & predictions.keys():
        return None
    return _percent(
        [
            fmean(predictions[other] == questions[other]["answer"] for other in others)
            for key, others in entailed.items()
            if others and right[key]
        ]
    )


def _distribution(
    balanced: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, str]
) -> float | None:
    """Only answers that are right somewhere in their group enter its chi-square."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for key, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            gold[group][question["answer"]] += 1
            predicted[group][predictions[key]] += 1
    if not gold:
        return None
    sizes = {group: counts.total() for group, counts in gold.items()}
    weighted = sum(
        sizes[group] * sum((predicted[group][a] - n) ** 2 / n for a, n in counts.items())
        for group, counts in gold.items()
    )
    return weighted / sum(sizes.values()) / 100


def _per(types: Mapping[str, Any], right: Mapping[str, bool]) -> dict[Any, tuple[float, int]]:
    groups: dict[Any, list[bool]] = defaultdict(list)
    for key, name in types.items():
        groups[name].append(right[key])
    return {name: (100 * fmean(each), len(each)) for name, each in sorted(groups.items())}


def _percent(scores: Sequence[bool | float] | None) -> float | None:
    return 100 * fmean(scores) if scores else None
