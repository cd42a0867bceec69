"""Links between choices: a layer that reads another's keys and values needs that one to keep them, heads as they are.

Both sides follow from a choice's row and edits, so a choice says nothing more than that, and tables in which layers
share already have links too. Sources keep keys of their own, hence there are no chains.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from layerwise.allocate.choices import Choice, Groups
from layerwise.spec import Attention
from layerwise.transform import TRANSFORMS

Keys = tuple[int, int]
"""Key heads and their width."""


@dataclass(frozen=True)
class Link:
    """Each of the choices `taking` of the group `reader` needs one of the choices `giving` of the group `source`."""

    reader: int
    taking: frozenset[int]
    source: int
    giving: frozenset[int]


def needs(choice: Choice) -> tuple[int, Keys] | None:
    """The layer whose keys the choice reads, and which keys it takes them to be; None where it reads none."""
    mixer = choice.row.mixer if choice.row else None
    if not isinstance(mixer, Attention) or mixer.shares is None:
        return None
    return mixer.shares, (mixer.kv_heads, mixer.head_dim)


def offers(choice: Choice) -> Keys | None:
    """The keys of its own that others may read; None where there are none."""
    mixer = choice.row.mixer if choice.row else None
    if not isinstance(mixer, Attention) or mixer.shares is not None:
        return None
    turned = any(TRANSFORMS[edit.transform](**edit.arguments).turns_values() for edit in choice.edits)
    return None if turned else (mixer.kv_heads, mixer.head_dim)


def links(groups: Groups) -> tuple[Link, ...]:
    """Every link there may be between choices of `groups`."""
    place = {group[0].target: g for g, group in enumerate(groups)}
    found = []
    for g, group in enumerate(groups):
        taking: dict[tuple[int, Keys], set[int]] = {}
        for c, choice in enumerate(group):
            if need := needs(choice):
                taking.setdefault(need, set()).add(c)
        for (layer, keys), choices in taking.items():
            source = place.get(layer, g)  # a layer that is not there, or no earlier one, gives nothing
            giving = {c for c, choice in enumerate(groups[source]) if source < g and offers(choice) == keys}
            found.append(Link(g, frozenset(choices), source, frozenset(giving)))
    return tuple(found)


def consistent(picked: Sequence[Choice]) -> bool:
    """Whether every layer that reads keys finds them. `picked` holds one choice from each group."""
    return all(0 in link.giving for link in links([[choice] for choice in picked]))


def settled(groups: Groups, links: Collection[Link], places: Sequence[int]) -> Groups:
    """Those choices that need nothing of one another once sources are what they are at `places`, which is consistent.

    The sources there keep what is read from them, and what other sources would have to keep is no longer offered. Any
    choice from each group is then consistent with any of the others.
    """
    left = [set(range(len(group))) for group in groups]
    for link in links:
        if places[link.reader] in link.taking:
            left[link.source] &= link.giving
    for link in links:
        if not left[link.source] <= link.giving:
            left[link.reader] -= link.taking
    return [[group[c] for c in sorted(kept)] for group, kept in zip(groups, left, strict=True)]
