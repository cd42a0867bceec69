"""Guesses from a model: the served one with some of its layers or in another order, or a smaller one.

A guess is drawn with the very number that its place will be drawn with (`sampler.uniform`), so that where the two
distributions agree, so do the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

from layerwise.errors import BadOption
from layerwise.serve.drafts import Drafter
from layerwise.serve.plan import Action, Entry, in_order
from layerwise.serve.runner import Runner
from layerwise.serve.sampler import Position, sample
from layerwise.serve.sequence import Row, Sequence
from layerwise.serve.table import LayerCache, LayerTable, layer_table
from layerwise.stack.decoder import DecoderStack


class SomeLayers(Drafter):
    """The served model, running only `layers` (None: all) by `action`, guesses `most` tokens, one pass each.

    What it leaves in the caches of those layers is overwritten when the guesses are verified. Raises BadOption for
    layers that are not there or not in ascending order.
    """

    def __init__(self, layers: Many[int] | None, most: int = 4, action: Action = in_order) -> None:
        self.layers, self.most, self.action = layers, most, action

    def begin(self, runner: Runner) -> None:
        depth = len(runner.stack)
        layers = tuple(range(depth) if self.layers is None else self.layers)
        if not layers or list(layers) != sorted({layer for layer in layers if 0 <= layer < depth}):
            raise BadOption(f"guesses from the layers {layers}", expected=f"some of 0..{depth - 1}, ascending",
                            do="count layers from 0")
        self.runner, self.spans = runner, spans(layers)

    def draft(self, rows: Many[Row]) -> None:
        chosen = [row for row in rows if row.room]
        _extend(self.runner, chosen, [Row(row.sequence, row.start, 1, 1, row.layers) for row in chosen], self.spans,
                self.action, self.action)

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""


class SecondModel(Drafter):
    """Another stack with the same vocabulary guesses `most` tokens; its keys lie in the same blocks as the model's.

    It reads every prompt as well. Guesses are made by `action`; with `calibrate` whatever was accepted is read again
    with its layers in order, which yields the first guess, and nothing that an action left in the caches lasts (the
    bonus calibration of arXiv 2502.02493). Raises BadOption where the vocabularies differ, or where the served model
    has no layer that keeps all tokens.
    """

    def __init__(self, stack: DecoderStack, most: int = 4, action: Action = in_order, calibrate: bool = False) -> None:
        self.stack, self.most, self.action, self.calibrate = stack, most, action, calibrate
        self._known: dict[Sequence, int] = {}

    def begin(self, runner: Runner) -> None:
        if runner.stack.spec.vocabulary != self.stack.spec.vocabulary:
            raise BadOption(f"guesses from {self.stack.name}, of {self.stack.spec.vocabulary} tokens",
                            expected=f"the {runner.stack.spec.vocabulary} tokens of {runner.stack.name}",
                            do="choose a model with the same tokenizer")
        table = layer_table(self.stack.spec)
        if table.is_recurrent:
            raise BadOption(f"guesses from {self.stack.name}, some of whose layers keep a state",
                            expected="layers that can take a refused guess back", do="choose another model")
        full = [index for index, group in enumerate(runner.table.groups) if group.kind == "full"]
        if not full:
            raise BadOption(f"guesses beside {runner.stack.name}, which keeps no layer's tokens in full",
                            expected="a layer without a window or budget", do="use prompt lookup")
        self.runner = Runner(self.stack, _in_group(table, full[0]), runner.blocks, runner.block)
        self.spans = [range(len(self.stack))]

    def draft(self, rows: Many[Row]) -> None:
        chosen = [row for row in rows if row.room]
        reading = [row for row in rows if not row.room and row.start < row.sequence.prompt and row.layers.start == 0]
        self._read([self._unread(row, 0) for row in reading])
        _extend(self.runner, chosen, [self._unread(row, 1) for row in chosen], self.spans, self.action,
                in_order if self.calibrate else self.action)
        for row in (*chosen, *reading):
            kept = 0 if self.calibrate else max(0, len(row.drafts) - 1)
            self._known[row.sequence] = row.start + row.count + kept

    def forget(self, sequence: Sequence) -> None:
        self._known.pop(sequence, None)

    def _unread(self, row: Row, wanted: int) -> Row:
        """What this model has not read of a sequence, up to the end of the row."""
        start = min(row.start, self._known.get(row.sequence, row.start))
        return Row(row.sequence, start, row.start + row.count - start, wanted, range(len(self.stack)))

    def _read(self, rows: list[Row]) -> None:
        if rows:
            rows.sort(key=lambda row: row.size)
            self.runner.run(rows, [Entry(tuple(range(len(rows))), self.spans[0])])


def spans(layers: Many[int]) -> list[range]:
    """Ascending layers as runs of neighbours."""
    found: list[range] = []
    for layer in layers:
        if found and found[-1].stop == layer:
            found[-1] = range(found[-1].start, layer + 1)
        else:
            found.append(range(layer, layer + 1))
    return found


def _extend(runner: Runner, rows: list[Row], passes: list[Row], spans: list[range], action: Action,
            first: Action) -> None:
    """Fill the drafts of `rows`; `passes` are the rows of the `first` pass, each with logits of its last token."""
    while rows:
        order = sorted(range(len(rows)), key=lambda index: passes[index].size)
        rows, passes = [rows[index] for index in order], [passes[index] for index in order]
        logits_PV = runner.run(passes, [Entry(tuple(range(len(rows))), span, first) for span in spans])
        first = action
        for row, token in zip(rows, sample(logits_PV, [_position(row) for row in rows]), strict=True):
            row.drafts.append(token)
        rows = [row for row in rows if len(row.drafts) < row.room]
        passes = [Row(row.sequence, row.start + row.count + len(row.drafts) - 1, 0, 0, range(len(runner.stack)),
                      drafts=row.drafts[-1:]) for row in rows]


def _position(row: Row) -> Position:
    sequence = row.sequence
    return Position(sequence.request.params, sequence.seed, sequence.tokens + row.drafts, sequence.prompt)


def _in_group(table: LayerTable, group: int) -> LayerTable:
    """Every layer keeps all tokens, in the blocks of `group`."""
    layers = (entry if entry.kind in ("none", "shared") else LayerCache("full", precision=entry.precision)
              for entry in table.layers)
    return LayerTable(tuple(replace(entry, group=group) for entry in layers), table.groups)
