"""The three forms match word for word, but for roles and pronouns, and contexts name none of the roles."""

from __future__ import annotations

from layerwise.data.genders import CATEGORIES, CONTEXTS, ROLES, TEMPLATES, sentences


def test_the_forms_match() -> None:
    forms = [sentences(category) for category in CATEGORIES]
    assert {len(form) for form in forms} == {len(ROLES) * len(TEMPLATES)}
    for three in zip(*forms, strict=True):
        assert len({len(sentence.split()) for sentence in three}) == 1
        assert len(set(three)) == 3


def test_forms_are_as_they_should_be() -> None:
    assert sentences("feminine", ROLES[:1])[0] == "The actress said that she was tired after the long day."
    assert sentences("neutral", ROLES[:1])[0] == "The performer said that they were tired after the long day."
    assert "himself in the mirror before he left" in " ".join(sentences("masculine"))


def test_contexts_name_no_role() -> None:
    roles = {word for role in ROLES for word in role}
    assert len(CONTEXTS) == 60 and not any(roles & set(context.lower().split()) for context in CONTEXTS)
