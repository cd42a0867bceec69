"""The layer table of serving: what each layer keeps of the past, how precisely, and whether new tokens run it.

Layers that keep the same tokens form a group, which has one block table for each sequence; groups differ in the
tokens they keep, so a token's place in the cache (its slot) need not be its position. Recurrent layers keep one state
of each sequence instead; they form a group whose blocks are states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from layerwise.errors import BadModel, BadOption
from layerwise.spec import Attention, Opaque, Precision, StackSpec, StateSpace

Kind = Literal["full", "window", "budget", "recurrent", "shared", "none"]
Scorer = Literal["recent", "norm", "attention"]
Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps: all tokens, the last `tokens`, the best `tokens`, one state, what layer `source` keeps, or
    nothing.

    `skipped` layers are run by prompts only: tokens that were generated pass them by and leave nothing there. The
    layer's weights wait in `residency` and are brought to the device when their turn comes.
    """

    kind: Kind
    tokens: int | None = None
    source: int | None = None
    scorer: Scorer = "recent"
    precision: Precision = "model"
    group: int | None = None
    skipped: bool = False
    residency: Place = "device"


@dataclass(frozen=True)
class Group:
    """Layers that keep the same tokens; a block of the group is a block in each of them.

    A token takes `token_bytes` in all of them together, a sequence's state `state_bytes`.
    """

    kind: Kind
    tokens: int | None
    layers: tuple[int, ...]
    token_bytes: int
    scorer: Scorer = "recent"
    state_bytes: int = 0


@dataclass(frozen=True)
class LayerTable:
    """One entry a layer, and the groups they form."""

    layers: tuple[LayerCache, ...]
    groups: tuple[Group, ...]

    @property
    def skipped(self) -> frozenset[int]:
        return frozenset(layer for layer, entry in enumerate(self.layers) if entry.skipped)

    @property
    def elsewhere(self) -> dict[int, Place]:
        """Layers whose weights wait elsewhere, and where."""
        return {layer: entry.residency for layer, entry in enumerate(self.layers) if entry.residency != "device"}

    @property
    def has_budgets(self) -> bool:
        return any(group.kind == "budget" for group in self.groups)

    @property
    def is_recurrent(self) -> bool:
        """Whether any layer keeps a state, which cannot go back to an earlier token."""
        return any(group.kind == "recurrent" for group in self.groups)

    def fingerprint(self) -> str:
        """A short hash; caches of equal tables over equal weights hold equal values."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def layer_table(spec: StackSpec, *, precision: Precision | Mapping[int, Precision] = "model",
                budgets: Mapping[int, int] | None = None, scorer: Scorer = "recent",
                skip: Collection[int] = (), residency: Mapping[int, Place] | None = None) -> LayerTable:
    """Read the table off the rows; `budgets` limits the tokens that a layer keeps after its prompt.

    A layer of precision "model" keeps keys and values as its row says, by default in the dtype of the model.
    A layer whose keys others read keeps what any of them needs. Raises BadModel for rows that layerwise did not
    build, BadOption for a layer that is not there, a name that is not known, a budget of none, or one for a layer
    whose cache is not its own.
    """
    budgets, residency, depth = budgets or {}, residency or {}, len(spec.rows)
    each = dict.fromkeys(range(depth), precision) if isinstance(precision, str) else precision
    for layer in (*budgets, *skip, *residency, *each):
        if not 0 <= layer < depth:
            raise BadOption(f"layer {layer}", expected=f"a layer within 0..{depth - 1}", do="count layers from 0")
    _known("precision", each.values(), get_args(Precision))
    _known("residency", residency.values(), get_args(Place))
    _known("scorer", [scorer], get_args(Scorer))
    entries = [replace(_kept(spec, layer, budgets.get(layer), scorer), skipped=layer in skip,
                       precision=_precision(spec, layer, each), residency=residency.get(layer, "device"))
               for layer in range(depth)]
    keys = _group_keys(entries)
    place = {layer: index for index, layers in enumerate(keys) for layer in layers}
    table = tuple(replace(entry, group=place.get(layer if entry.source is None else entry.source))
                  for layer, entry in enumerate(entries))
    for layer, entry in enumerate(table):
        if entry.source is not None and table[entry.source].skipped and not entry.skipped:
            raise BadOption(f"skipping layer {entry.source}, whose keys layer {layer} reads",
                            expected="a layer whose keys no running layer needs", do=f"skip layer {layer} as well")
    return LayerTable(table, tuple(_group(spec, entries, layers) for layers in keys))


def _known(what: str, given: Iterable[str], names: tuple[str, ...]) -> None:
    for name in given:
        if name not in names:
            raise BadOption(f"{what} {name!r}", expected=f"one of {', '.join(names)}", do="choose one of these")


def _kept(spec: StackSpec, layer: int, budget: int | None, scorer: Scorer) -> LayerCache:
    mixer = spec.rows[layer].mixer
    if isinstance(mixer, Opaque):
        raise BadModel(f"layer {layer}, {mixer.type}", expected="a decoder language model of a known family",
                       do="open its Hugging Face folder instead of the module")
    whole = isinstance(mixer, Attention) and mixer.shares is None and mixer.window is None
    if budget is not None and (not whole or budget < 1):
        raise BadOption(f"a budget of {budget} tokens for layer {layer}",
                        expected="1 or more, for a layer that keeps all tokens in a cache of its own",
                        do="leave this layer out")
    if mixer is None:
        return LayerCache("none")
    if isinstance(mixer, StateSpace):
        return LayerCache("recurrent")
    if mixer.shares is not None:
        return LayerCache("shared", source=mixer.shares)
    if budget is not None:
        return LayerCache("budget", budget, scorer=scorer)
    window = _needed(spec, layer)
    return LayerCache("full" if window is None else "window", window)


def _needed(spec: StackSpec, layer: int) -> int | None:
    """How far back the layer and those that read its keys look; None for everything."""
    readers = [row.mixer for row in spec.rows if isinstance(row.mixer, Attention) and row.mixer.shares == layer]
    mixer = spec.rows[layer].mixer
    assert isinstance(mixer, Attention)
    windows = [reader.window for reader in (mixer, *readers)]
    return None if None in windows else max(window for window in windows if window is not None)


def _group_keys(entries: list[LayerCache]) -> list[tuple[int, ...]]:
    """The layers of each group: one for all full layers, for each window, each budgeted layer, all recurrent layers."""
    groups: dict[object, list[int]] = {}
    for layer, entry in enumerate(entries):
        if entry.kind in ("full", "window"):
            groups.setdefault(entry.tokens, []).append(layer)
        elif entry.kind == "budget":
            groups.setdefault(("budget", layer), []).append(layer)
        elif entry.kind == "recurrent":
            groups.setdefault("recurrent", []).append(layer)
    return [tuple(layers) for layers in groups.values()]


def _group(spec: StackSpec, entries: list[LayerCache], layers: tuple[int, ...]) -> Group:
    first, mixers = entries[layers[0]], [spec.rows[layer].mixer for layer in layers]
    if first.kind == "recurrent":
        states = sum(mixer.state_bytes(spec.dtype) for mixer in mixers if isinstance(mixer, StateSpace))
        return Group(first.kind, None, layers, 0, state_bytes=states)
    size = sum(_token_bytes(spec, layer, entries[layer].precision) for layer in layers)
    return Group(first.kind, first.tokens, layers, size, first.scorer)


def _token_bytes(spec: StackSpec, layer: int, precision: Precision) -> int:
    mixer = spec.rows[layer].mixer
    assert isinstance(mixer, Attention)
    try:
        return replace(mixer, cache=precision).token_bytes(spec.dtype)
    except BadOption as error:
        raise BadOption(f"for layer {layer} {error.given}", expected=error.expected, do=error.do) from error


def _precision(spec: StackSpec, layer: int, asked: Mapping[int, Precision]) -> Precision:
    """What is asked for, or where nothing is, what the row says."""
    mixer, precision = spec.rows[layer].mixer, asked.get(layer, "model")
    return mixer.cache if precision == "model" and isinstance(mixer, Attention) else precision
