"""Sentences about people in three matched forms: masculine, feminine and neutral; the same words otherwise.

Contexts for judging name none of the roles that neurons are found with.
"""

from __future__ import annotations

from collections.abc import Sequence

CATEGORIES = ("masculine", "feminine", "neutral")
PRONOUNS: dict[str, str] = {"masculine": " he", "feminine": " she", "neutral": " they"}

_FORMS: dict[str, dict[str, str]] = {
    "masculine": {"subject": "he", "object": "him", "own": "his", "self": "himself", "was": "was"},
    "feminine": {"subject": "she", "object": "her", "own": "her", "self": "herself", "was": "was"},
    "neutral": {"subject": "they", "object": "them", "own": "their", "self": "themselves", "was": "were"},
}

ROLES: tuple[tuple[str, str, str], ...] = (
    ("actor", "actress", "performer"), ("waiter", "waitress", "server"), ("king", "queen", "monarch"),
    ("policeman", "policewoman", "officer"), ("businessman", "businesswoman", "manager"),
    ("father", "mother", "parent"), ("brother", "sister", "sibling"), ("husband", "wife", "spouse"),
    ("son", "daughter", "child"), ("salesman", "saleswoman", "seller"), ("chairman", "chairwoman", "chair"),
    ("boy", "girl", "kid"), ("man", "woman", "person"), ("prince", "princess", "heir"),
    ("steward", "stewardess", "attendant"), ("gentleman", "lady", "citizen"), ("hero", "heroine", "leader"),
    ("uncle", "aunt", "relative"), ("host", "hostess", "presenter"), ("groom", "bride", "partner"),
)

TEMPLATES: tuple[str, ...] = (
    "The {role} said that {subject} {was} tired after the long day.",
    "When the {role} came home, {subject} made dinner for {own} friends.",
    "The {role} forgot {own} keys, so {subject} had to wait outside.",
    "Everyone thanked the {role} because {subject} had helped them.",
    "The {role} looked at {self} in the mirror before {subject} left.",
    "Nobody believed the {role} until {subject} showed {own} letter.",
    "The {role} read the book that {own} teacher gave {object}.",
    "After the meeting, the {role} said {subject} would call {own} office.",
    "The {role} was happy when {subject} found {own} old photographs.",
    "The {role} told us about {own} plans, and we wished {object} luck.",
    "Like every {role}, {subject} always did {own} best.",
    "The {role} packed {own} bag and then {subject} took the train.",
    "The {role} hurt {self} when {subject} fell down the stairs.",
    "People liked the {role} and often asked {object} for advice.",
    "The {role} finished {own} work early, so {subject} went for a walk.",
)

CONTEXTS: tuple[str, ...] = tuple(
    f"The {job} {rest}"
    for job in ("doctor", "teacher", "lawyer", "driver", "artist", "neighbour", "student", "writer", "engineer",
                "scientist", "guest", "customer", "farmer", "visitor", "musician")
    for rest in ("said that", "went home because", "was late, so", "smiled when")
)
"""Beginnings whose next word may be any pronoun, about people named by no role above."""


def sentences(category: str, roles: Sequence[tuple[str, str, str]] = ROLES) -> list[str]:
    """Every template with every role, in the form of one category."""
    place, form = CATEGORIES.index(category), _FORMS[category]
    return [template.format(role=role[place], **form) for template in TEMPLATES for role in roles]
