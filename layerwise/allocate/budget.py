"""`Budget`: how large or how slow the model may be, in one or several currencies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from layerwise.errors import BadBudget

Amount = int | float | str

_UNITS: dict[str, dict[str, float]] = {
    "bytes": {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "parameters": {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9},
    "layers": {"layers": 1},
    "cache": {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "KiB": 2**10, "MiB": 2**20},
    "milliseconds": {"us": 1e-3, "ms": 1, "s": 1e3},
    "prefill": {"us": 1e-3, "ms": 1, "s": 1e3},
    "bits": {"bits": 1},
}


@dataclass(frozen=True)
class Budget:
    """Limits a model must stay under; each is None or an amount.

    - `bytes`: stored bytes of the whole model, exactly as a saved file holds them.
    - `parameters`: number of parameters.
    - `layers`: number of layers.
    - `cache`: bytes of keys and values (or states) per token of a sequence that fills the context, as computed.
    - `milliseconds`: measured time to decode one token.
    - `prefill`: measured milliseconds to read a prompt (see `stopwatch.PROMPT`).
    - `bits`: stored bits per parameter of the original, scales and zero points included.

    An amount is an absolute number (`layers=22`, `bits=3.5`, `bytes="120MB"`), a share of the original
    (a float below 1, `bytes=0.55`, or `"55%"`), or a factor to shrink or speed up by (`"2.5x"`).
    Several limits hold together. Raises BadBudget where an amount cannot be read.
    """

    bytes: Amount | None = None
    parameters: Amount | None = None
    layers: Amount | None = None
    cache: Amount | None = None
    milliseconds: Amount | None = None
    prefill: Amount | None = None
    bits: Amount | None = None

    def __post_init__(self) -> None:
        if not self.given():
            raise BadBudget("a budget without a limit", expected=f"at least one of {', '.join(_UNITS)}",
                            do="write Budget(bytes=0.55)")
        for currency, amount in self.given().items():
            _read(currency, amount)

    def given(self) -> dict[str, Amount]:
        """The limits as they were written, by currency."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {currency: amount for currency, amount in values.items() if amount is not None}

    def limits(self, original: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits by currency, given what the original model costs (see `cost.totals`).

        Raises BadBudget for a currency the original was not measured in.
        """
        resolved = {}
        for currency, amount in self.given().items():
            if currency not in original:
                raise BadBudget(f"a limit on {currency}", expected=f"one of {', '.join(sorted(original))}",
                                do=f"measure the {currency} of the original first")
            value, relative = _read(currency, amount)
            resolved[currency] = value * original[currency] if relative else value
        return resolved

    def __str__(self) -> str:
        return ", ".join(f"{currency} {_written(amount)}" for currency, amount in self.given().items())


def show(currency: str, value: float) -> str:
    """An absolute amount with its unit, for people."""
    if currency == "bytes":
        return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value:.0f} bytes"
    if currency == "cache":
        return f"{value:,.0f} bytes of cache per token"
    if currency in ("milliseconds", "prefill"):
        return f"{value:.3g} ms{' of prefill' if currency == 'prefill' else ''}"
    return f"{value:.3f} bits per parameter" if currency == "bits" else f"{value:.0f} {currency}"


def _written(amount: Amount) -> str:
    if isinstance(amount, float) and amount < 1:
        return f"{100 * amount:.4g}%"
    return amount if isinstance(amount, str) else f"{amount:,}"


def _read(currency: str, amount: Amount) -> tuple[float, bool]:
    """The number, and whether it is a share of the original."""
    value, relative = _read_text(currency, amount) if isinstance(amount, str) else _read_number(amount)
    if not value > 0 or value == float("inf") or (relative and value > 1):
        raise _unreadable(currency, amount)
    return value, relative


def _read_number(amount: int | float) -> tuple[float, bool]:
    return float(amount), isinstance(amount, float) and amount < 1


def _read_text(currency: str, amount: str) -> tuple[float, bool]:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z%]*)\s*", amount)
    if not match:
        raise _unreadable(currency, amount)
    digits, unit = match.groups()
    number = float(digits)
    if unit == "%":
        return number / 100, True
    if unit == "x":
        return (1 / number if number else 0.0), True
    if unit in _UNITS[currency]:
        return number * _UNITS[currency][unit], False
    if unit:
        raise _unreadable(currency, amount)
    return _read_number(int(digits) if digits.isdigit() else number)


def _unreadable(currency: str, amount: Amount) -> BadBudget:
    units = ", ".join(f'"{unit}"' for unit in _UNITS[currency])
    return BadBudget(
        f"{currency}={amount!r}",
        expected=f'a positive number, a share below 1, "55%", "2.5x" (from "1x"), or a number with {units}',
        do=f'write for example {currency}="55%"')
