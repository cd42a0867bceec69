"""Reading layer after layer along one walk: all batches stand at a layer, it is read, and they move on.

Memory holds the states of all batches at one depth and whatever one layer's reading needs, so a streamed
model works too. Finished layers go to a journal, so that a killed walk continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerwise.errors import BadData
from layerwise.measure.base import Reading
from layerwise.measure.inputs import Inputs
from layerwise.measure.journal import Journal
from layerwise.measure.progress import Progress
from layerwise.measure.scores import Column
from layerwise.stack.base import Stack, State


def read(stack: Stack, inputs: Inputs, readings: Sequence[Reading], journals: Sequence[Journal],
         progress: Progress) -> list[tuple[Column, ...]]:
    """The columns of every reading."""
    states = [item.start(stack) for item in inputs]
    values: list[list[Mapping[str, float]]] = [[] for _ in readings]
    for layer in range(len(stack)):
        for reading, journal, found in zip(readings, journals, values, strict=True):
            if f"{layer}" not in journal:
                for part, value in reading.of_layer(stack, layer, states).items():
                    journal[f"{layer}/{part}"] = value
                journal[f"{layer}"] = 1.0
            found.append({part: journal[f"{layer}/{part}"] for part in reading.parts
                          if f"{layer}/{part}" in journal})
        states = [stack.run(state, slice(layer, layer + 1)) for state in states]
        _check(states, layer, stack.name)
        progress.step()
    return [reading.finish(found, _tables(reading, stack, states, journal))
            for reading, found, journal in zip(readings, values, journals, strict=True)]


def _tables(reading: Reading, stack: Stack, states: Sequence[State], journal: Journal) -> dict[str, dict[str, float]]:
    if "tables/" not in journal:
        for place, values in reading.of_tables(stack, states).items():
            for part, value in values.items():
                journal[f"{place}/{part}"] = value
        journal["tables/"] = 1.0
    return {place: {part: journal[f"{place}/{part}"] for part in reading.parts if f"{place}/{part}" in journal}
            for place in ("embedding", "head")}


def _check(states: Sequence[State], layer: int, name: str) -> None:
    for batch, state in enumerate(states):
        if not bool(state.hidden.isfinite().all()):
            raise BadData(f"activations of {name} that are not finite after layer {layer}, in batch {batch}",
                          expected="finite activations",
                          do="check the weights with `layerwise doctor`, or compute in float32")
