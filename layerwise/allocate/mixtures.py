"""Mixtures: every matrix of a layer may get its own alternative; of all combinations the useful ones remain.

Costs and predicted losses add up over matrices, so the combinations of a layer are sums of one option per
matrix. They are formed matrix by matrix, and after each step only the front is kept: combinations that no
other beats in loss and in every limited currency at once. Where layers may read each other's keys, what a
combination does about keys (Option.keys) matters to others too, so each way has a front of its own. A front finer
than CELLS steps of cost is thinned to the best of each step.

Shapes: N combinations, K limited currencies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.allocate.cost import Cost
from layerwise.allocate.plan import Edit

CELLS = {1: 300, 2: 24}
"""Steps into which the range of costs of a front is divided, by number of currencies; with more, 12."""

FIRST = ("drop", "narrow", "share-kv", "cache-precision", "scale-inputs", "rotate-values", "learn-rotation", "low-rank")
"""Transforms that come before rounding, in the order in which they are carried out."""

TURNED = "turned"


@dataclass(frozen=True)
class Option:
    """Some edits of one layer with what they are predicted to lose, and what they add to the cost of keeping it.

    `keys` names the layer whose keys are read instead of its own, or says that the layer has "none" that others could
    read or that its values are TURNED; "" where they stay, or where no layer reads those of another.
    """

    label: str
    edits: tuple[Edit, ...]
    loss: float
    cost: Cost
    keys: str = ""

    def __add__(self, other: Option) -> Option:
        label = self.label if self.label == other.label else "mixed"
        return Option(label, self.edits + other.edits, self.loss + other.loss,
                      {name: value + other.cost[name] for name, value in self.cost.items()},
                      self.keys or other.keys)


def combined(parts: Iterable[Sequence[Option]], currencies: Sequence[str]) -> list[Option]:
    """The useful sums of one option from each part; sums of options that share a label always remain."""
    return reduce(lambda a, b: _sums(a, b, currencies), map(list, parts))


def _sums(a: list[Option], b: list[Option], currencies: Sequence[str]) -> list[Option]:
    """Only the pairs that remain are built."""
    loss_N = np.add.outer(_losses(a), _losses(b)).ravel()
    cost_NK = (_costs(a, currencies)[:, None] + _costs(b, currencies)[None]).reshape(len(loss_N), -1)
    alike_N = np.equal.outer([option.label for option in a], [option.label for option in b]).ravel()
    alike_N &= np.repeat([option.label != "mixed" for option in a], len(b))
    keys_N = [first.keys or second.keys for first in a for second in b]
    kept = fronts(loss_N, cost_NK, keys_N) | alike_N
    return [a[n // len(b)] + b[n % len(b)] for n in map(int, np.flatnonzero(kept))]


def useful(options: Sequence[Option], currencies: Sequence[str]) -> list[Option]:
    """The options of the front, and all that have the same alternative everywhere."""
    kept = fronts(_losses(options), _costs(options, currencies), [option.keys for option in options])
    return [option for option, stays in zip(options, kept, strict=True) if stays or option.label != "mixed"]


def fronts(loss_N: NDArray[np.float64], cost_NK: NDArray[np.float64], keys_N: Sequence[str]) -> NDArray[np.bool_]:
    """The points of the front of each kind of keys; kinds without keys of their own share the cells of one front."""
    names, kind_N = np.unique(np.array(keys_N), return_inverse=True)
    kept, own = np.zeros(len(loss_N), dtype=bool), ("", TURNED)
    others = sum(name not in own for name in names)
    for kind, name in enumerate(names):
        (place,) = np.nonzero(kind_N == kind)
        kept[place] = front(loss_N[place], cost_NK[place], 1 if name in own else others)
    return kept


def front(loss_N: NDArray[np.float64], cost_NK: NDArray[np.float64], among: int = 1) -> NDArray[np.bool_]:
    """Which points no other beats in loss and all costs; where there are very many, the best of each cell.

    It is one of `among` fronts and has so many times fewer cells, in currencies in which its points differ.
    """
    kept = np.zeros(len(loss_N), dtype=bool)
    differ_K = np.ptp(cost_NK, axis=0) > 0
    cost_NK = cost_NK[:, differ_K] if differ_K.any() else cost_NK[:, :1]
    order = _best_of_cells(loss_N, cost_NK, among)
    if cost_NK.shape[1] == 1:
        order = order[np.lexsort((loss_N[order], cost_NK[order, 0]))]
        best = np.minimum.accumulate(loss_N[order])
        kept[order[np.r_[True, loss_N[order][1:] < best[:-1]]]] = True
        return kept
    for n in order:
        beaten = (cost_NK[order] <= cost_NK[n]).all(1) & (loss_N[order] <= loss_N[n])
        strictly = (cost_NK[order] < cost_NK[n]).any(1) | (loss_N[order] < loss_N[n])
        kept[n] = not (beaten & strictly).any()
    return kept


def _best_of_cells(loss_N: NDArray[np.float64], cost_NK: NDArray[np.float64], among: int) -> NDArray[np.intp]:
    cells = max(1, round(CELLS.get(cost_NK.shape[1], 12) / among ** (1 / cost_NK.shape[1])))
    low_K, high_K = cost_NK.min(0), cost_NK.max(0)
    step_K = np.where(high_K > low_K, (high_K - low_K) / cells, 1.0)
    place_NK = np.ceil((cost_NK - low_K) / step_K - 1e-9).astype(np.int64)
    order = np.lexsort((loss_N, *place_NK.T))
    first = np.r_[True, (place_NK[order][1:] != place_NK[order][:-1]).any(1)]
    found: NDArray[np.intp] = order[first]
    return found


def merged_edits(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Edits that differ only in their matrices made one, in the order in which they must be carried out."""
    groups: dict[Any, list[Edit]] = {}
    for edit in edits:
        rest = {name: value for name, value in edit.arguments.items() if name != "matrices"}
        groups.setdefault((edit.transform, tuple(sorted(rest.items(), key=lambda item: item[0]))), []).append(edit)
    made = [_one(group) for group in groups.values()]
    return tuple(sorted(made, key=lambda edit: FIRST.index(edit.transform) if edit.transform in FIRST else len(FIRST)))


def _one(group: Sequence[Edit]) -> Edit:
    first, losses = group[0], [edit.predicted_loss for edit in group if edit.predicted_loss is not None]
    matrices = [name for edit in group for name in edit.arguments.get("matrices") or ()]
    arguments: Mapping[str, Any] = {**first.arguments, "matrices": matrices} if matrices else first.arguments
    return Edit(first.target, first.transform, arguments, sum(losses) if losses else None)


def _losses(options: Sequence[Option]) -> NDArray[np.float64]:
    return np.array([option.loss for option in options], dtype=np.float64)


def _costs(options: Sequence[Option], currencies: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[option.cost[name] for name in currencies] for option in options], dtype=np.float64)
