"""Tagging metrics: scikit-learn's numbers, ties and holes included, and laws of ranks."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import (
    average_precision_score,
    label_ranking_average_precision_score,
    roc_auc_score,
)

from goose_mm.eval.metrics.audio import fold_accuracy, tagging_metrics


@st.composite
def tables(draw):
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 6)))
    grid = st.integers(-3, 3).map(float)  # few values: many ties
    free = st.floats(-1e3, 1e3, allow_nan=False, width=32)
    scores = draw(arrays(np.float64, shape, elements=draw(st.sampled_from([grid, free]))))
    return scores, draw(arrays(np.int64, shape, elements=st.integers(0, 1)))


@settings(max_examples=300, deadline=None)
@given(tables())
def test_equals_scikit_learn(table):
    scores, targets = table
    found = tagging_metrics(scores, targets)
    for c in range(scores.shape[1]):
        truth = targets[:, c]
        ap, auc = found["per_class_ap"][c], found["per_class_auc"][c]
        if truth.any():
            assert ap == pytest.approx(average_precision_score(truth, scores[:, c]), abs=1e-9)
        else:
            assert ap is None
        if 0 < truth.sum() < len(truth):
            assert auc == pytest.approx(roc_auc_score(truth, scores[:, c]), abs=1e-9)
        else:
            assert auc is None
    defined = [ap for ap in found["per_class_ap"] if ap is not None]
    assert found["skipped"] == scores.shape[1] - len(defined)
    if not defined:
        assert found["mAP"] is None and found["lwlrap"] is None
        return
    assert found["mAP"] == pytest.approx(np.mean(defined), abs=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes without positives
        counted = average_precision_score(targets, scores, average="macro")
    if scores.shape[1] > 1:
        assert found["mAP_counting_empty_as_zero"] == pytest.approx(counted, abs=1e-9)
    micro = average_precision_score(targets.ravel(), scores.ravel())
    assert found["micro_AP"] == pytest.approx(micro, abs=1e-9)
    rows = targets.any(1)
    weights = targets[rows].sum(1)
    lwlrap = label_ranking_average_precision_score(
        targets[rows], scores[rows], sample_weight=weights
    )
    assert found["lwlrap"] == pytest.approx(lwlrap, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(tables(), st.integers(0, 2**31))
def test_only_ranks_count_and_the_order_of_clips_does_not(table, seed):
    scores, targets = table
    order = np.random.default_rng(seed).permutation(len(scores))
    found = tagging_metrics(scores, targets)
    assert tagging_metrics(2 * scores, targets) == found
    again = tagging_metrics(scores[order], targets[order])
    for key in ("mAP", "mAUC", "lwlrap", "micro_AP"):
        assert again[key] == pytest.approx(found[key], abs=1e-12)


def test_the_two_d_primes_differ_and_a_perfect_class_is_infinite():
    scores = np.array([[3.0, 1], [2, 2], [1, 3], [0, 0]])
    targets = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    found = tagging_metrics(scores, targets)
    assert found["per_class_auc"] == [1.0, 0.75]
    assert found["d_prime"] == pytest.approx(math.sqrt(2) * 1.1503493803760079)
    assert found["d_prime_per_class"] == math.inf


def test_equal_scores_are_one_threshold_whatever_the_order():
    for column in ([1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]):
        found = tagging_metrics(np.zeros((4, 1)), np.array(column)[:, None])
        assert found["mAP"] == 0.5 and found["mAUC"] == 0.5


@pytest.mark.parametrize(
    ("scores", "targets", "said"),
    [
        ([[math.nan, 1.0]], [[0, 1]], "1 of 2 scores are NaN"),
        ([[0.0, 1.0]], [[0, 2]], "targets must be 0 or 1"),
        ([[0.0, 1.0]], [[0]], r"\[samples, classes\]"),
    ],
)
def test_wrong_input_says_what(scores, targets, said):
    with pytest.raises(ValueError, match=said):
        tagging_metrics(scores, targets)


def test_folds():
    found = fold_accuracy([1, 1, 2, 2, 2, 2], list("aabbbb"), list("abbbba"))
    assert found["fold_accuracy"] == {1: 0.5, 2: 0.75}
    assert found["mean_of_folds"] == 0.625 and found["std_of_folds"] == 0.125
    assert found["pooled_accuracy"] == pytest.approx(4 / 6)
