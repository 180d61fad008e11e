"""Sound tagging and classification metrics in plain numpy: no torch, no model, no files.

All tagging metrics are ranks in disguise. The precision at a positive is the share of positives
among everything that scores at least as high: read down a column of [samples, classes] it gives
average precision, read along a row it gives lwlrap. Equal scores are one threshold, so a tie never
helps. Logits serve as well as probabilities, and better than rounded ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["fold_accuracy", "tagging_metrics"]


def tagging_metrics(scores: ArrayLike, targets: ArrayLike) -> dict[str, Any]:
    """Score tags of clips as AudioSet, FSD50K and the Freesound tasks do.

    `scores` [samples, classes]: logits or probabilities, higher is likelier; infinite is allowed.
    `targets` [samples, classes]: 0/1 or bool. Undefined values are None, infinite ones stay inf.

    mAP                          mean average precision over classes with positives
    mAP_counting_empty_as_zero   the same over all classes, as AST's code averages
    micro_AP                     average precision of all (sample, class) decisions in one list
    mAUC                         mean ROC-AUC over classes with positives and negatives
    d_prime                      sqrt(2) * normal quantile of mAUC (PANNs, AST)
    d_prime_per_class            mean of the d' of classes (AudioSet paper, YAMNet)
    lwlrap                       label-weighted label-ranking average precision
    lwlrap_balanced              mean over classes with positives of the class's lwlrap
    per_class_ap, per_class_auc  lists [classes]
    skipped                      how many classes have no positives

    Raises ValueError for NaN scores, other targets than 0/1 and shapes that do not fit.
    """
    scores, truth = _check(scores, targets)
    positives = truth.sum(0)
    aps = [
        float(_precisions(s, t).mean()) if t.any() else None
        for s, t in zip(scores.T, truth.T, strict=True)
    ]
    aucs = [_auc(s, t) for s, t in zip(scores.T, truth.T, strict=True)]
    m_auc = _mean(aucs)
    ranking = np.zeros(scores.shape)
    for row, s, t in zip(ranking, scores, truth, strict=True):
        row[t] = _precisions(s, t)
    found = positives > 0
    balanced = ranking.sum(0)[found] / positives[found]
    return {
        "mAP": _mean(aps),
        "mAP_counting_empty_as_zero": _mean(ap or 0.0 for ap in aps),
        "micro_AP": float(_precisions(scores.ravel(), truth.ravel()).mean())
        if found.any()
        else None,
        "mAUC": m_auc,
        "d_prime": None if m_auc is None else _d_prime(m_auc),
        "d_prime_per_class": _mean(None if auc is None else _d_prime(auc) for auc in aucs),
        "lwlrap": float(ranking.sum() / positives.sum()) if found.any() else None,
        "lwlrap_balanced": _mean(balanced.tolist()),
        "per_class_ap": aps,
        "per_class_auc": aucs,
        "skipped": int((~found).sum()),
    }


def fold_accuracy(folds: ArrayLike, targets: ArrayLike, predictions: ArrayLike) -> dict[str, Any]:
    """Accuracy of single-label clips, fold by fold, as ESC-50 and UrbanSound8K are reported.

    All three are [clips]: the official fold, the class and the predicted class (numbers or names).
    `fold_accuracy` {fold: 0..1}, `mean_of_folds`, `std_of_folds` (ddof 0) over those, and
    `pooled_accuracy` over all clips at once. Raises ValueError when the lengths differ or are 0.
    """
    named = {"folds": folds, "targets": targets, "predictions": predictions}
    columns = {name: np.asarray(column) for name, column in named.items()}
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1 or any(
        len(shape) != 1 or not shape[0] for shape in shapes.values()
    ):
        raise ValueError(f"give one fold, target and prediction per clip, got {shapes}")
    numeric = {name: columns[name].dtype.kind in "biuf" for name in ("targets", "predictions")}
    if len(set(numeric.values())) > 1:
        kinds = {name: str(columns[name].dtype) for name in numeric}
        raise ValueError(f"targets and predictions must both be numbers or both names, got {kinds}")
    right = columns["targets"] == columns["predictions"]
    names = np.unique(columns["folds"])
    each = [float(right[columns["folds"] == name].mean()) for name in names]
    return {
        "fold_accuracy": dict(zip(names.tolist(), each, strict=True)),
        "mean_of_folds": float(np.mean(each)),
        "std_of_folds": float(np.std(each)),
        "pooled_accuracy": float(right.mean()),
    }


def _check(scores: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = np.asarray(scores, np.float64), np.asarray(targets)
    if scores.shape != truth.shape or scores.ndim != 2 or not scores.size:
        raise ValueError(
            f"scores and targets must both be [samples, classes] and not empty, "
            f"got {scores.shape} and {truth.shape}"
        )
    if broken := int(np.isnan(scores).sum()):
        sample, label = np.argwhere(np.isnan(scores))[0].tolist()
        raise ValueError(
            f"{broken} of {scores.size} scores are NaN, the first in sample {sample}, class "
            f"{label}; NaN has no rank, so leave such clips out and say how many"
        )
    wrong = truth[(truth != 0) & (truth != 1)]
    if wrong.size:
        raise ValueError(
            f"targets must be 0 or 1, got {wrong.size} others such as {wrong[0]}; soft labels "
            "need a threshold first"
        )
    return scores, truth.astype(bool)


def _at_least(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many values reach each threshold."""
    return len(values) - np.searchsorted(np.sort(values), thresholds, side="left")


def _precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Precision at the threshold of every positive, in their order; both arguments [items]."""
    hits = scores[truth]
    return _at_least(hits, hits) / _at_least(scores, hits)


def _auc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Chance that a positive beats a negative; a tie is half a win. None if either is absent."""
    hits, misses = scores[truth], np.sort(scores[~truth])
    if not len(hits) or not len(misses):
        return None
    beaten = np.searchsorted(misses, hits, side="left")
    reached = np.searchsorted(misses, hits, side="right")
    # Whole numbers until the last step: a perfect class gives exactly 1, whose d' is inf.
    return float((beaten + reached).sum()) / (2 * len(hits) * len(misses))


def _d_prime(auc: float) -> float:
    if 0 < auc < 1:
        return math.sqrt(2) * NormalDist().inv_cdf(auc)
    return math.copysign(math.inf, auc - 0.5)


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is defined; None if nothing is, or if inf meets -inf."""
    defined = [value for value in values if value is not None]
    if not defined or {math.inf, -math.inf} <= set(defined):
        return None
    return math.fsum(defined) / len(defined)
