"""The one pass that all forward instruments share.

A resident decoder runs batch by batch, so memory does not grow with the data. A streamed one runs layer by
layer over all batches, so each layer is read from disk once; the hidden states of all batches are kept. Any
other module runs as it is, and its layers are watched as they go by.

Shapes: B rows, T tokens, C hidden width, P sampled positions, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.data.metrics import CHUNK
from layerwise.errors import BadModel
from layerwise.measure.base import Forward
from layerwise.measure.inputs import Input, Inputs
from layerwise.measure.memory import enough_memory
from layerwise.measure.progress import Progress
from layerwise.measure.sample import real, sample
from layerwise.measure.seen import Reading, Seen, Vectors, fitting
from layerwise.stack.base import Site, Stack, State
from layerwise.stack.decoder import DecoderStack

LENS_SHARE = 32
"""By default one token in so many is read through the lens, which keeps the head's cost below the layers'."""

HALVES: tuple[Site, ...] = ("attention", "feed_forward")
BeforeLayer = Callable[[int], None]


@dataclass(frozen=True)
class Pass:
    """What one pass is asked for, and the tallies it fills.

    `lens_tokens` is the number of positions read in every row, None for one in 32.
    """

    stack: Stack
    instruments: Sequence[Forward[Any]]
    tallies: list[Any]
    progress: Progress
    seed: int = 0
    lens_tokens: int | None = None

    @property
    def halves(self) -> list[Site]:
        return [site for site in HALVES if any(site in instrument.sites for instrument in self.instruments)]

    @property
    def lens(self) -> bool:
        return any("lens" in instrument.sites for instrument in self.instruments)

    @property
    def reach(self) -> int:
        return max((instrument.reach for instrument in self.instruments), default=0)

    def show(self, layer: int, seen: Seen, lens: bool = False) -> None:
        """Let the instruments that look at the lens, or the others, update their tallies."""
        for instrument, tally in zip(self.instruments, self.tallies, strict=True):
            if ("lens" in instrument.sites) == lens:
                with enough_memory(self.stack, f"{instrument.name!r} reads layer {layer}", repr(instrument.name)):
                    instrument.update(tally, layer, seen)

    def places(self, item: Input) -> Tensor | None:
        """The positions of a batch that the lens reads, as indices into the flattened [B, T]."""
        if not self.lens or item.tokens_BT is None:
            return None
        wanted = self.lens_tokens
        return sample(item.tokens_BT, real(item.tokens_BT, item.mask_BT),
                      lambda length: wanted or max(1, length // LENS_SHARE), self.seed)


def forward_pass(inputs: Inputs, wanted: Pass, before_layer: BeforeLayer | None = None) -> None:
    """Run the data once, filling the tallies. `before_layer` is called once for every layer, in order.

    Raises BadModel where activations are not finite, naming the layer and the first batch, and BadOption where
    memory runs out, naming the instrument that asked for it.
    """
    stack = wanted.stack
    with enough_memory(stack, "running the layers"):
        _run(stack, inputs, wanted, before_layer)


def _run(stack: Stack, inputs: Inputs, wanted: Pass, before_layer: BeforeLayer | None) -> None:
    if not isinstance(stack, DecoderStack):
        for index, item in enumerate(inputs):
            _watch_module(stack, index, item, wanted)
    elif stack.streamed:
        passages = [Passage(stack, index, item, wanted) for index, item in enumerate(inputs)]
        _climb(stack, passages, wanted, before_layer)
    else:
        for index, item in enumerate(inputs):
            _climb(stack, [Passage(stack, index, item, wanted)], wanted, before_layer if index == 0 else None)


def _climb(stack: Stack, passages: Sequence[Passage], wanted: Pass, before_layer: BeforeLayer | None) -> None:
    for layer in range(len(stack)):
        if before_layer:
            before_layer(layer)
        for passage in passages:
            passage.advance(layer)
            if len(passages) > 1:
                passage.forget()
            wanted.progress.step()
    for passage in passages:
        passage.read_lens()


@dataclass
class View:
    """What one batch has shown so far."""

    index: int
    mask_BT: Tensor | None
    earlier: deque[Vectors]

    def show(self, wanted: Pass, layer: int, sites: dict[str, Vectors]) -> None:
        """Show one layer to the instruments. Raises BadModel where it holds NaN or infinity."""
        if layer == 0:
            self._check(sites["input"], "entering layer 0")
        self._check(sites["output"], f"after layer {layer}")
        wanted.show(layer, Seen(sites, fitting(self.mask_BT, sites["output"]), self.earlier))
        self.earlier.append(sites["input"])

    def _check(self, vectors: Vectors, where: str) -> None:
        mask_BT = fitting(self.mask_BT, vectors)
        squares_BT = vectors.squares_BT if mask_BT is None else vectors.squares_BT[mask_BT]
        if not bool(torch.isfinite(squares_BT.sum())):
            raise BadModel(f"activations {where} are NaN or infinite, first in batch {self.index}",
                           expected="finite activations",
                           do="check the data and the weights there, or compute in float32: open(..., dtype='float32')")


@dataclass
class Passage:
    """One batch on its way through the layers of a decoder."""

    stack: Stack
    index: int
    item: Input
    wanted: Pass
    kept_PC: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state: State = self.item.start(self.stack)
        self.entering = Vectors(self.state.hidden)
        self.view = View(self.index, self.item.mask_BT, deque(maxlen=self.wanted.reach))
        places_P = self.wanted.places(self.item)
        self.places_P = None if places_P is None else places_P.to(self.state.hidden.device)

    def advance(self, layer: int) -> None:
        """Run one layer and show it to the instruments."""
        self._keep()
        row = self.stack.spec.rows[layer]
        halves = {"attention": row.mixer, "feed_forward": row.feed_forward}
        present = [site for site in self.wanted.halves if halves[site] is not None]
        with self.stack.capture(*present, layers=range(layer, layer + 1)) as captured:
            self.state = self.stack.run(self.state, slice(layer, layer + 1))
        sites = {"input": self.entering, "output": Vectors(self.state.hidden)}
        for site in self.wanted.halves:
            half = captured.get((layer, site))
            sites[site] = Vectors(torch.zeros_like(self.entering.tensor) if half is None else half)
        self.view.show(self.wanted, layer, sites)
        self.entering = sites["output"]

    def forget(self) -> None:
        """Let go of what was computed about the hidden states, while other batches have their turn."""
        self.entering = Vectors(self.entering.tensor)

    def read_lens(self) -> None:
        """Read what was kept for the lens, against the model's own prediction."""
        if self.places_P is None:
            return
        self._keep()
        most = max(1, CHUNK // self.stack.spec.vocabulary)
        for rows_LPC in _chunks(self.kept_PC, most):
            (final,) = self._read(rows_LPC[-1:])
            together = max(1, most // len(rows_LPC[0]))
            for first in range(0, len(rows_LPC) - 1, together):
                readings = self._read(rows_LPC[first : min(first + together, len(rows_LPC) - 1)])
                for layer, reading in enumerate(readings, first):
                    self.wanted.show(layer, Seen({}, lens=(reading, final)), lens=True)

    def _keep(self) -> None:
        if self.places_P is not None:
            self.kept_PC.append(self.state.hidden.flatten(0, 1)[self.places_P])

    def _read(self, rows_LPC: Sequence[Tensor]) -> Iterator[Reading]:
        """What the head makes of the rows of several layers, in one product."""
        rows_1MC = torch.cat([*rows_LPC])[None]
        logits_1MV: Tensor = self.stack.finish(self.state.moved(rows_1MC, len(self.stack)))
        yield from map(Reading, logits_1MV[0].split(len(rows_LPC[0])))


def _chunks(rows_LPC: list[Tensor], step: int) -> Iterator[list[Tensor]]:
    yield from (list(part) for part in zip(*(rows_PC.split(step) for rows_PC in rows_LPC), strict=True))


def _watch_module(stack: Stack, index: int, item: Input, wanted: Pass) -> None:
    """Run a module once; tensors are copied as they pass, since a module may change them in place."""
    view = View(index, item.mask_BT, deque(maxlen=wanted.reach))
    sites: dict[str, Vectors] = {}

    def watch(layer: int, site: Site) -> Callable[[Tensor], Tensor]:
        def look(tensor: Tensor) -> Tensor:
            sites[site] = Vectors(tensor.detach().clone())
            if site == "output":
                view.show(wanted, layer, sites.copy())
                wanted.progress.step()
            return tensor
        return look

    with ExitStack() as watching:
        for layer in range(len(stack)):
            for site in ("input", *wanted.halves, "output"):
                watching.enter_context(stack.edit(layer, site, watch(layer, site)))
        stack(*item.args, **item.kwargs)
