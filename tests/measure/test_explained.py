"""R^2 and F against scipy's own analysis of variance and regression."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import f_oneway, linregress

from layerwise.errors import BadData
from layerwise.measure.explained import f_test, factor, fit, interaction, within

DRAW = np.random.default_rng(0)
LABELS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
X, Y = DRAW.normal(size=12), DRAW.normal(size=12)


def test_one_predictor_is_simple_regression() -> None:
    found = linregress(X, Y)
    model = fit(Y, X[:, None])
    assert model.r2 == pytest.approx(found.rvalue**2)
    assert f_test(fit(Y, np.empty((12, 0))), model) == pytest.approx(found.pvalue)


def test_a_factor_is_one_way_analysis_of_variance() -> None:
    groups = [[y for y, label in zip(Y, LABELS, strict=True) if label == kind] for kind in range(3)]
    assert f_test(fit(Y, np.empty((12, 0))), fit(Y, factor(LABELS))) == pytest.approx(f_oneway(*groups).pvalue)


def test_an_interaction_is_one_line_per_label() -> None:
    left = 0.0
    for kind in range(3):
        chosen = [index for index, label in enumerate(LABELS) if label == kind]
        line = linregress(X[chosen], Y[chosen])
        left += float(((Y[chosen] - line.intercept - line.slope * X[chosen]) ** 2).sum())
    model = fit(Y, interaction(LABELS, X))
    assert (model.r2, model.rank) == (pytest.approx(1 - left / ((Y - Y.mean()) ** 2).sum()), 6)


def test_what_adds_nothing_is_not_significant() -> None:
    model = fit(Y, factor(LABELS))
    assert f_test(model, model) == 1.0


def test_correlation_within_labels_ignores_their_means() -> None:
    means = np.array([100.0, -50.0, 7.0])[LABELS]
    assert within(LABELS, X + means, Y) == pytest.approx(within(LABELS, X, Y - means))
    assert within(LABELS, X, X + means) == pytest.approx(1)
    assert within(LABELS, means, Y) == 0.0


def test_equal_scores_have_nothing_to_explain() -> None:
    with pytest.raises(BadData, match="all the same"):
        fit([0.3] * 12, X[:, None])
