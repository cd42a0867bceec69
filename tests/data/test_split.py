"""Calibration and verification share no text, whatever the text is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.data.sources import default_text
from layerwise.data.split import RUN, SPLITS, STRETCH, check_split, divide, stretches, units, words
from layerwise.errors import BadOption

WORDS = st.sampled_from(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"])
SENTENCES = st.lists(WORDS, min_size=1, max_size=40).map(lambda found: " ".join(found) + ".")
PARAGRAPHS = st.lists(SENTENCES, min_size=1, max_size=30).map(" ".join)
DOCUMENTS = st.lists(PARAGRAPHS, min_size=1, max_size=12).map("\n\n".join)


def runs(texts: list[str]) -> set[tuple[str, ...]]:
    found = [word for text in texts for word in words(text)]
    return {tuple(found[start:start + RUN]) for start in range(len(found) - RUN + 1)}


@settings(max_examples=40, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1, max_size=4), st.data())
def test_no_run_of_words_is_in_both_halves(documents: list[str], data: st.DataObject) -> None:
    documents = [*documents, data.draw(st.sampled_from(documents)) + data.draw(PARAGRAPHS)]  # a near copy
    halves = divide(documents)
    assert not runs(halves["calibration"]) & runs(halves["verification"])


def test_default_text_shares_nothing_and_both_halves_are_large() -> None:
    halves = divide(default_text())
    assert not runs(halves["calibration"]) & runs(halves["verification"])
    sizes = [sum(map(len, halves[split])) for split in SPLITS]
    assert min(sizes) > 100_000


def test_calibration_keeps_all_its_text_and_verification_loses_copies_only() -> None:
    unique = "\n\n".join(" ".join(f"w{paragraph}x{word}" for word in range(150)) for paragraph in range(40))
    halves = divide([unique])
    assert sum(len(text) for half in halves.values() for text in half) == len(unique)
    assert sum(map(len, divide([unique, unique])["calibration"])) == 2 * sum(map(len, halves["calibration"]))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab .!?\n\t"), max_size=400).map(lambda text: text * 30))
def test_units_join_to_the_text_and_stay_short(text: str) -> None:
    found = list(units(text))
    assert "".join(found) == text
    assert all(0 < len(unit) <= STRETCH for unit in found)


@pytest.mark.parametrize("text", ["x" * 9001, "word " * 5000, "line of text\n" * 3000, "Yes. " * 4000])
def test_text_without_paragraphs_is_cut_all_the_same(text: str) -> None:
    found = list(units(text))
    assert "".join(found) == text
    assert max(map(len, found)) <= STRETCH


def test_stretches_end_with_a_paragraph() -> None:
    paragraph = "A sentence of some length stands here. " * 30 + "\n\n"
    groups = [group for group in stretches(paragraph * 20)]
    assert all(len("".join(group)) >= STRETCH for group in groups[:-1])
    assert all("".join(group).endswith("\n\n") for group in groups)


def test_another_document_moves_nothing() -> None:
    first, second = ("\n\n".join(f"{name} paragraph {n} " * 40 for n in range(20)) for name in ("one", "two"))
    alone, both = divide([first]), divide([second, first])
    assert set(alone["calibration"]) <= set(both["calibration"])
    assert not set(alone["calibration"]) & set(both["verification"])


def test_a_character_of_a_script_without_spaces_is_a_word() -> None:
    assert words("Die Katze, 猫です") == ["die", "katze", "猫", "で", "す"]


def test_unknown_split() -> None:
    with pytest.raises(BadOption, match="calibration, verification"):
        check_split("train")
