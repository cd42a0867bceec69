"""Durations in words."""

from __future__ import annotations

import pytest

from layerwise.errors import BadOption
from layerwise.train.duration import Duration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10m", Duration(seconds=600)),
        ("90s", Duration(seconds=90)),
        ("1h", Duration(seconds=3600)),
        ("1.5h", Duration(seconds=5400)),
        ("200steps", Duration(steps=200)),
        ("1 step", Duration(steps=1)),
        (" 10M ", Duration(seconds=600)),
    ],
)
def test_words_are_read(text: str, expected: Duration) -> None:
    assert Duration.parse(text) == expected


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "0s", "0steps", "1.5steps", "ten minutes", "10m30s", "5d"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="10m, 90s, 1h or 200steps"):
        Duration.parse(text)


def test_it_reads_as_it_is_said() -> None:
    assert [str(Duration.parse(text)) for text in ("10m", "90s", "30s", "200steps")] == [
        "10 minutes", "1.5 minutes", "30 seconds", "200 steps"]
