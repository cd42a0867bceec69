"""The execution plan of a step: which rows go through which layers together, and how.

An ordinary step is one entry: all rows, all layers. A prompt that passes the layers in several steps, tokens that
leave layers out, and layers that run in another order are other plans for the same runner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from layerwise.nets.attend import Pages
from layerwise.nets.flow import Flow
from layerwise.nets.prepared import DirectBlock
from layerwise.nets.step import Step, through
from layerwise.serve.sequence import Row
from layerwise.stack.decoder import DecoderStack

Action = Callable[[DecoderStack, Tensor, Flow, range], Tensor]
"""Runs a span of layers on hidden states [1, N, C]."""


def in_order(stack: DecoderStack, x_1NC: Tensor, flow: Flow, layers: range) -> Tensor:
    """One layer after the other; neighbours that are a compiled call each are one call together.

    Where the last layer of all is such a call, it leaves tokens that are not wanted as they come.
    """
    passed: list[tuple[Step, Pages]] = []
    for layer in layers:
        block = stack.block(layer)
        one = block.passed(x_1NC, flow, layer) if isinstance(block, DirectBlock) else None
        if one is not None:
            passed.append(one)
            continue
        x_1NC = block(through(passed, x_1NC[0])[None] if passed else x_1NC, flow, layer)
        passed = []
    if not passed:
        return x_1NC
    return through(passed, x_1NC[0], flow.wanted_P if layers.stop == len(stack) else None)[None]


@dataclass(frozen=True)
class Entry:
    """`rows` (indices into the step) go through `layers` by `action`."""

    rows: tuple[int, ...]
    layers: range
    action: Action = in_order


def plan(rows: list[Row], skipped: Collection[int] = (), action: Action = in_order) -> list[Entry]:
    """Every row through its own span of layers, without `skipped` ones where its tokens were generated.

    Neighbouring layers with the same rows make one entry.
    """
    if not rows:
        return []
    if not skipped and all(row.layers == rows[0].layers for row in rows):
        return [Entry(tuple(range(len(rows))), rows[0].layers, action)]
    entries: list[Entry] = []
    for layer in range(min(row.layers.start for row in rows), max(row.layers.stop for row in rows)):
        chosen = tuple(index for index, row in enumerate(rows) if layer in row.layers
                       and not (layer in skipped and row.start >= row.sequence.prompt))
        if entries and entries[-1].rows == chosen and entries[-1].layers.stop == layer:
            entries[-1] = Entry(chosen, range(entries[-1].layers.start, layer + 1), action)
        elif chosen:
            entries.append(Entry(chosen, range(layer, layer + 1), action))
    return entries
