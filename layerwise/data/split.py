"""Cuts text in two halves that share nothing: one to calibrate on, one to verify with.

A document is cut into stretches of about `STRETCH` characters at paragraph ends, and stretches go to the
two halves in turn; a hash of the document decides which half begins, so a document's place depends on
nothing but its own text. Text that occurs in both halves is then taken out of the verification half: the
halves have no run of `RUN` consecutive words in common (the usual test for contamination, Brown et al. 2020).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import BadOption

Split = Literal["calibration", "verification"]
SPLITS: tuple[Split, ...] = get_args(Split)
STRETCH = 4000
RUN = 13

_ENDS = (r"\n[ \t]*\n\s*", r"\n", r"(?<=[.!?])\s+")
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]+")
_MULTIPLIERS = np.random.Generator(np.random.PCG64(RUN)).integers(
    0, 2**64, size=RUN, dtype=np.uint64
) | np.uint64(1)


def check_split(split: str) -> Split:
    """The same name, typed. Raises BadOption if it is no split."""
    if split not in SPLITS:
        raise BadOption(
            f"split={split!r}",
            expected=f"one of {', '.join(SPLITS)}",
            do="calibrate with one and verify with the other",
        )
    return split


def divide(documents: Iterable[str]) -> dict[Split, list[str]]:
    """Both halves of a text, each a list of stretches in the order of the documents."""
    halves: dict[Split, list[list[str]]] = {split: [] for split in SPLITS}
    for document in documents:
        first = hashlib.sha256(document.encode()).digest()[0] % 2
        for index, stretch in enumerate(stretches(document)):
            halves[SPLITS[(first + index) % 2]].append(stretch)
    clean = without_shared(halves["verification"], halves["calibration"])
    return {"calibration": _join(halves["calibration"]), "verification": _join(clean)}


def stretches(document: str) -> Iterator[list[str]]:
    """The units of a document, grouped until a group holds at least STRETCH characters."""
    group: list[str] = []
    for unit in units(document):
        group.append(unit)
        if sum(map(len, group)) >= STRETCH:
            yield group
            group = []
    if group:
        yield group


def units(text: str, level: int = 0) -> Iterator[str]:
    """Paragraphs; where one is longer than STRETCH, its lines, then sentences, then runs of words.

    Nothing is lost: joining the units gives the text.
    """
    if level and len(text) <= STRETCH:
        yield text
    elif level == len(_ENDS):
        yield from re.findall(rf"(?s).{{1,{STRETCH}}}(?:(?<=\s)|\Z)|.{{{STRETCH}}}", text)
    else:
        ends = [match.end() for match in re.finditer(_ENDS[level], text)]
        for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
            if end > start:
                yield from units(text[start:end], level + 1)


def words(text: str) -> list[str]:
    """Lower-cased words; every Chinese, Japanese or Korean character counts as one."""
    return _WORD.findall(text.lower())


def without_shared(groups: list[list[str]], other: list[list[str]]) -> list[list[str]]:
    """`groups` without every unit that touches a run of RUN words which `other` holds as well."""
    numbers: dict[str, int] = {}
    known = np.unique(_runs([unit for group in other for unit in group], numbers)[0])
    while True:
        flat = [unit for group in groups for unit in group]
        runs, owners = _runs(flat, numbers)
        starts = np.flatnonzero(np.isin(runs, known))
        if not len(starts):
            return [group for group in groups if group]
        shared = {int(owner) for offset in range(RUN) for owner in np.unique(owners[starts + offset])}
        index = iter(range(len(flat)))
        groups = [[unit for unit in group if next(index) not in shared] for group in groups]


def _runs(texts: list[str], numbers: dict[str, int]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A hash of every run of RUN words, and for every word the index of the text it stands in."""
    found = [words(text) for text in texts]
    ids = np.array(
        [numbers.setdefault(word, len(numbers) + 1) for text in found for word in text], dtype=np.uint64
    )
    owners = np.repeat(np.arange(len(found)), [len(text) for text in found])
    count = max(len(ids) - RUN + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset, multiplier in enumerate(_MULTIPLIERS):
        hashes += ids[offset : offset + count] * multiplier
    return hashes, owners


def _join(groups: list[list[str]]) -> list[str]:
    return ["".join(group) for group in groups]
