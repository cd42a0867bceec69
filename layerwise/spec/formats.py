"""How a packed matrix is stored, and what that takes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from layerwise.errors import BadOption

BITS = (2, 3, 4, 5, 6, 8)
SCALE_BITS = (4, 6, 16)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Precision = Literal["model", "int8", "int4"]
"""How a cache holds keys and values: in the dtype of the model, or as integers with scales (`nets/key_codes.py`)."""


@dataclass(frozen=True)
class Format:
    """How a packed matrix is stored: integers of `bits` bits, one scale for `group` inputs of a row.

    `group` 0 means one scale per row. A symmetric format stores no zero point. Scales and zero points are
    bfloat16, or, with `scale_bits` 4 or 6, integers of as many bits times one bfloat16 number of the row each.
    """

    bits: int
    group: int = 0
    symmetric: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadOption(f"bits={self.bits}", expected=f"one of {BITS}", do="choose a supported width")
        if self.group < 0:
            raise BadOption(f"group={self.group}", expected="0 (whole row) or a positive size", do="use group=32")
        if self.scale_bits not in SCALE_BITS or (self.scale_bits != 16 and not self.group):
            raise BadOption(f"scale_bits={self.scale_bits} in groups of {self.group or 'the whole row'}",
                            expected=f"one of {SCALE_BITS}, and groups where it is not 16",
                            do="use scale_bits=6 with group=32")

    @property
    def label(self) -> str:
        """A short name: `4/128` is 4 bits in groups of 128, `8/row=` symmetric with one scale a row, `3/32s6` has
        scales of 6 bits.
        """
        scales = "" if self.scale_bits == 16 else f"s{self.scale_bits}"
        return f"{self.bits}/{self.group or 'row'}{'=' if self.symmetric else ''}{scales}"

    @property
    def words(self) -> str:
        """For a reader."""
        return f"{self.bits} bits"

    @staticmethod
    def parse(label: str) -> Format:
        """The inverse of `label`. Raises BadOption for text that names no format."""
        match = re.fullmatch(r"(\d+)/(\d+|row)(=?)(?:s(\d+))?", label)
        if not match:
            raise BadOption(f"the format {label!r}", expected="bits/group, such as 4/128 or 8/row=",
                            do="correct the text")
        bits, group, symmetric, scale_bits = match.groups()
        return Format(int(bits), 0 if group == "row" else int(group), bool(symmetric), int(scale_bits or 16))

    def bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a `rows` x `columns` matrix: packed integers, scales, zero points.

        Rows are padded to whole groups and to whole bytes.
        """
        group = self.group or columns
        groups = math.ceil(columns / group)
        packed = math.ceil(groups * group * self.bits / 8) if self.group else math.ceil(columns * self.bits / 8)
        scales = groups * 2 if self.scale_bits == 16 else math.ceil(groups * self.scale_bits / 8) + 2
        return rows * (packed + scales * (1 if self.symmetric else 2))


@dataclass(frozen=True)
class Tiers:
    """How a token table is stored whose rows differ: those of the `rows` most frequent tokens in one format, all others
    in another. Which tokens those are is stored beside them, in four bytes a token.
    """

    rows: int
    frequent: Format
    rare: Format

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise BadOption(f"a table with {self.rows} rows of frequent tokens", expected="at least one",
                            do="use one format for the whole table")

    @property
    def label(self) -> str:
        """A short name: `8/row=@8192+3/64` is 8 bits for 8192 tokens and 3 for all others."""
        return tiers_label(self.frequent.label, self.rows, self.rare.label)

    @property
    def words(self) -> str:
        """For a reader."""
        return f"{self.frequent.words} for {self.rows:,} frequent tokens, {self.rare.words} for all others"

    def mean_bits(self, rows: int) -> float:
        """Bits of a number in a table of so many rows, scales left out."""
        share = self.rows / rows
        return share * self.frequent.bits + (1 - share) * self.rare.bits

    def bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a table of so many rows. Raises as `parts`."""
        few, many = self.parts(rows)
        return self.frequent.bytes(few, columns) + self.rare.bytes(many, columns) + 4 * rows

    def parts(self, rows: int) -> tuple[int, int]:
        """How many rows of a table are in which format. Raises BadOption where none would be left for rare tokens."""
        if self.rows >= rows:
            raise BadOption(f"{self.rows} frequent ones of {rows} tokens", expected="fewer than there are",
                            do="use one format for the whole table")
        return self.rows, rows - self.rows


TableFormat = Format | Tiers
"""How a packed token table is stored."""


def tiers_label(frequent: str, rows: int, rare: str) -> str:
    """That of tiers whose formats have these labels, which need not be right ones."""
    return f"{frequent}@{rows}+{rare}"


def parse_table_format(label: str) -> TableFormat:
    """The inverse of `label` of either. Raises BadOption for text that names none."""
    match = re.fullmatch(r"(.+)@(\d+)\+(.+)", label)
    if not match:
        return Format.parse(label)
    return Tiers(int(match[2]), Format.parse(match[1]), Format.parse(match[3]))


def group_of(width: int) -> int:
    """Neighbouring numbers of a head that share a scale in 4 bits: 32, or the largest power of two that divides it."""
    return math.gcd(width, 32)


def key_bytes(width: int, precision: Precision, dtype: str) -> int:
    """Bytes of a key or value of one head of `width` numbers in a cache."""
    if precision == "model":
        return width * DTYPE_BYTES[dtype]
    return width + 4 if precision == "int8" else width // 2 + 4 * (width // group_of(width))
