"""How well cheap scores rank layers, against what trying changes on the model showed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from layerwise.measure.scores import Column, Scores
from layerwise.nets.decoder import MATRICES

TRIED = ("response", "output-error", "quantization-sensitivity", "leave-one-out")
"""Instruments that try the alternatives themselves, and so are no surrogates."""


def rank_agreement(scores: Scores) -> dict[str, float]:
    """Spearman's correlation, by column, of a cheap ranking with the measured effect of disturbing each layer.

    1 is the same order, 0 no relation, below 0 rather the reverse. Empty where nothing was tried per matrix, or
    there are fewer than three layers.
    """
    from scipy.stats import spearmanr

    measured = _measured(scores.columns)
    if len(measured) < 3:
        return {}
    found = {}
    for name, column in scores.columns.items():
        if column.important is None or name.partition(":")[0] in TRIED:
            continue
        sign = 1 if column.important == "high" else -1
        pairs = [(sign * value, tried) for value, tried in zip(column.values, measured, strict=True)
                 if math.isfinite(value) and math.isfinite(tried)]
        if len(pairs) > 2 and len({value for value, _ in pairs}) > 1:
            found[name] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return found


def sentence(scores: Scores) -> str | None:
    """One sentence about it; None where there is nothing to say."""
    found = sorted(rank_agreement(scores).items(), key=lambda item: -item[1])
    if not found:
        return None
    listed = ", ".join(f"{name} {value:+.2f}" for name, value in found)
    return f"rank correlation of cheap scores with the tried disturbances of each layer: {listed}"


def _measured(columns: Mapping[str, Column]) -> list[float]:
    """Sum over matrices of what disturbing them does, layer by layer."""
    tried = [columns[f"response:{matrix}"].values for matrix in MATRICES if f"response:{matrix}" in columns]
    return [math.fsum(value for value in values if not math.isnan(value)) for values in zip(*tried, strict=True)]
