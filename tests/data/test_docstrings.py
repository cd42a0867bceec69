"""The second text that every Python carries."""

from __future__ import annotations

import inspect
import textwrap

from layerwise.data.docstrings import docstrings
from layerwise.data.sources import documents


def test_it_is_what_the_modules_say_about_themselves() -> None:
    text = "\n\n".join(docstrings())
    assert len(text) > 200_000
    for thing in (textwrap, textwrap.TextWrapper, textwrap.dedent):
        assert inspect.getdoc(thing) in text  # type: ignore[operator]


def test_it_is_a_source_by_name_and_comes_in_a_stable_order() -> None:
    first, second = list(documents("docstrings")), list(documents("docstrings"))
    assert first == second and len(first) > 30
