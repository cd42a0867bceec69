"""The report in a terminal, and its way to a file and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.data.bootstrap import Interval
from layerwise.errors import BadFile
from layerwise.report.report import Report
from layerwise.report.words import summary


def test_the_table_holds_every_quantity_and_the_layers(report: Report) -> None:
    text = str(report)
    for part in (
        "stored bytes", "parameters", "decode tokens/s", "prefill tokens/s", "peak memory", "not measured",
        "12.310 [11.900, 12.800]", "+0.73 % [+0.40, +1.02]", "2.65x", "KL 0.0123", "93.1 %", "0-2", "dropped",
        "piqa", "-0.5 [-2.0, +1.0] points", "a note",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) < 120


def test_the_keys_of_a_measurement_are_the_promised_ones(report: Report) -> None:
    promised = {
        "bytes", "parameters", "decode_tokens_per_s", "prefill_tokens_per_s", "peak_memory_bytes", "perplexity",
        "perplexity_interval",
    }  # fmt: skip
    assert promised <= set(report.before.to_json())


def test_saving_and_loading_gives_the_same_report(report: Report, tmp_path: Path) -> None:
    assert Report.load(report.save(tmp_path / "report.json")) == replace(
        report, tasks=dict(report.tasks), provenance=json.loads(json.dumps(report.provenance))
    )


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"format": "layerwise-report-1"}'])
def test_a_damaged_file_is_one_clear_error(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadFile, match=r"report\.json"):
        Report.load(path)


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.001, 0.02, "worse than before"),
    (-0.02, -0.001, "better than before"),
    (-0.01, 0.01, "cannot be told from no change"),
])  # fmt: skip
def test_the_summary_says_only_what_the_interval_allows(report: Report, low: float, high: float, verdict: str) -> None:
    changed = replace(report, log_perplexity_change=Interval(low, (low + high) / 2, high))
    assert verdict in " ".join(summary(changed))


def test_the_summary_names_the_best_control(report: Report, tried: list[dict[str, object]]) -> None:
    assert "nearer to the original than the best of 3 controls" in " ".join(summary(report, tried))
    tried = [dict(point, kl=0.001) if point["name"] == "uniform" else point for point in tried]
    assert "no nearer to the original than the best of 3 controls" in " ".join(summary(report, tried))
