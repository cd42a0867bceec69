"""The executable contract of an instrument."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.measure.backward import state_pass
from layerwise.measure.base import Forward, Instrument, Intervention, StateGradient
from layerwise.measure.engine import measure
from layerwise.measure.forward import Pass, forward_pass
from layerwise.measure.inputs import Inputs
from layerwise.measure.progress import Progress
from layerwise.measure.scores import Column, Scores
from layerwise.measure.seen import Reading, Seen, Vectors
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.testing.stacks import random_stack

LOOSE = 2e-5
"""Relative tolerance where float32 sums run in another order: batches of other shapes, packed kernels."""

TIMED = ("ms", "of peak", "of limit")
"""Units of measured time, which no two measurements share."""


def check_instrument(instrument: Instrument, stack: DecoderStack | None = None) -> None:
    """Assert what every instrument promises, on a small random decoder unless one is given.

    Parameters are plain values that survive JSON; measuring twice gives the same columns; batching, order
    and padding do not matter; a model streamed from disk gives the same; partial tallies merge; only
    declared sites are looked at; no hook, flag or weight is left changed. Columns in milliseconds, or in shares
    of what the machine can do, are measurements of time and only checked for being there.
    """
    stack = stack or random_stack()
    tokens_NT = torch.randint(stack.spec.vocabulary, (4, 12), generator=torch.Generator().manual_seed(0))
    check_parameters(instrument)
    before = _condition(stack)
    found = measure(stack, tokens_NT, [instrument], batch=2, progress=False)
    _check_columns(instrument, found)
    _same(found, measure(stack, tokens_NT, [instrument], batch=2, progress=False), 0.0, "repeatable")
    _same(found, measure(stack, tokens_NT, [instrument], batch=3, progress=False), LOOSE, "blind to batching")
    _same(
        found,
        measure(stack, tokens_NT.flip(0), [instrument], batch=2, progress=False),
        LOOSE,
        "blind to order",
    )
    _same(found, measure(stack, _padded(tokens_NT), [instrument], progress=False), LOOSE, "blind to padding")
    assert _condition(stack) == before, "no hook, flag or weight may be left changed"
    with tempfile.TemporaryDirectory() as folder:
        stack.save(Path(folder) / "model")
        streamed = open(Path(folder) / "model", stream=True)
        _same(
            found,
            measure(streamed, tokens_NT, [instrument], batch=2, progress=False),
            0.0,
            "the same streamed",
        )
        if isinstance(instrument, Intervention):
            _check_resume(instrument, stack, tokens_NT, found, Path(folder) / "trials.jsonl")
    if isinstance(instrument, (Forward, StateGradient)):
        check_merge(instrument, stack, tokens_NT)
    if isinstance(instrument, Forward):
        check_sites(instrument, stack)


def check_parameters(instrument: Instrument) -> None:
    """Parameters are plain, frozen, and rebuild the instrument."""
    values = json.loads(json.dumps(dataclasses.asdict(instrument)))  # type: ignore[call-overload]
    assert type(instrument)(**values) == instrument, "parameters must survive JSON"
    assert instrument.__dataclass_params__.frozen, "an instrument is a frozen dataclass"  # type: ignore[attr-defined]
    assert hash(instrument) == hash(type(instrument)(**values)), "equal instruments must be equal keys"


def check_merge(instrument: Forward[Any] | StateGradient, stack: DecoderStack, tokens_NT: Tensor) -> None:
    """Two partial tallies merge to that of the whole, and stay as they were."""
    whole, first, second = (
        _tally(instrument, stack, part) for part in (tokens_NT, tokens_NT[:2], tokens_NT[2:])
    )
    alone = instrument.finish(first)
    merged = instrument.finish(instrument.merge(first, second))
    for column, expected in zip(merged, instrument.finish(whole), strict=True):
        _close(column.values, expected.values, 1e-12, f"{column.name} must merge")
    assert repr(instrument.finish(first)) == repr(alone), "merging must leave its inputs alone"


def check_sites(instrument: Forward[Any], stack: DecoderStack) -> None:
    """The instrument looks only at the sites it declares."""
    generator = torch.Generator().manual_seed(0)

    def vectors() -> Vectors:
        return Vectors(torch.randn(2, 5, stack.spec.hidden, generator=generator))

    sites = {str(site): vectors() for site in sorted(instrument.sites - {"lens"})}
    readings = [Reading(torch.randn(7, stack.spec.vocabulary, generator=generator)) for _ in range(2)]
    lens = (readings[0], readings[1]) if "lens" in instrument.sites else None
    assert not (sites and lens), "the lens is not combined with other sites"
    seen = Seen(sites, earlier=[vectors() for _ in range(instrument.reach)], lens=lens)
    instrument.update(instrument.start(stack.spec), len(stack) - 1, seen)


def _tally(instrument: Forward[Any] | StateGradient, stack: DecoderStack, tokens_NT: Tensor) -> Any:
    inputs, progress = Inputs(stack, tokens_NT, 2), Progress("", 0, show=False)
    with torch.no_grad():
        if isinstance(instrument, StateGradient):
            return state_pass(stack, inputs, [instrument], progress)[0]
        tally = instrument.start(stack.spec)
        forward_pass(inputs, Pass(stack, [instrument], [tally], progress))
    return tally


def _check_columns(instrument: Instrument, found: Scores) -> None:
    assert found.columns, f"{instrument.name} makes no column"
    assert set(found.columns) <= set(instrument.columns()), (
        f"{instrument.name} makes columns it does not name"
    )
    for column in found.columns.values():
        assert column.name.startswith(instrument.name), f"{column.name} must begin with {instrument.name}"
        assert column.unit and column.about, f"{column.name} needs a unit and a description"
        said = (*column.values, *column.outside.values())
        assert any(not math.isnan(value) for value in said), f"{column.name} measures nothing"


def _check_resume(
    instrument: Intervention, stack: DecoderStack, tokens_NT: Tensor, found: Scores, path: Path
) -> None:
    """A sweep whose journal lost its second half, and broke off within a line, ends as if it had not."""
    whole = measure(stack, tokens_NT, [instrument], batch=2, progress=False, resume=path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[: len(lines) // 2]) + b"\n" + lines[-1][:20])
    resumed = measure(stack, tokens_NT, [instrument], batch=2, progress=False, resume=path)
    _same(found, whole, 0.0, "the same with a journal")
    _same(found, resumed, 0.0, "the same after it was cut off")


def _padded(tokens_NT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One batch with filling on the left of some rows and on the right of all."""
    count, length = tokens_NT.shape
    padded_NS = torch.zeros(count, length + 5, dtype=torch.int64)
    mask_NS = torch.zeros(count, length + 5, dtype=torch.bool)
    for row in range(count):
        start = row % 3
        padded_NS[row, start : start + length], mask_NS[row, start : start + length] = tokens_NT[row], True
    return [(padded_NS, mask_NS)]


def _condition(stack: DecoderStack) -> list[Any]:
    """Everything that measuring must leave as it found it."""
    parts: list[Any] = []
    for name, module in stack.decoder.named_modules():
        parts.append((name, [len(getattr(module, hooks)) for hooks in _HOOKS], module.training))
    for name, tensor in stack.decoder.state_dict(keep_vars=True).items():
        grad = tensor.grad if isinstance(tensor, nn.Parameter) else None
        parts.append(
            (name, tensor.requires_grad, grad is None, tensor.detach().view(torch.uint8).sum().item())
        )
    return parts


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _same(a: Scores, b: Scores, tolerance: float, promise: str) -> None:
    assert list(a.columns) == list(b.columns), f"the columns must be {promise}"
    for column in _timeless(a.columns.values()):
        other = b[column.name]
        _close(column.values, other.values, tolerance, f"{column.name} must be {promise}")
        for place in column.outside.keys() & other.outside.keys():
            _close(
                [column.outside[place]], [other.outside[place]], tolerance, f"{column.name} must be {promise}"
            )


def _timeless(columns: Iterable[Column]) -> list[Column]:
    return [column for column in columns if column.unit not in TIMED]


def _close(a: Iterable[float], b: Iterable[float], tolerance: float, promise: str) -> None:
    for left, right in zip(a, b, strict=True):
        near = math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance)
        assert near or (math.isnan(left) and math.isnan(right)), f"{promise}: {left} is not {right}"
