"""What to do with the tensor at a site: small functions for `Stack.edit`, and where to do it.

    stack.edit(3, "neurons", scaled([7, 21], 0.0))                  # switch two neurons off
    stack.edit(0, "input", at(subject_BT, added(noise_BTC)))        # corrupt some tokens
    stack.edit(8, "output", at(last_BT, without(direction_C)))      # take a direction out
    with restored(stack, seen, places_BT): ...                      # states of another run

Shapes: B rows, T tokens, C width of the site (neurons: the inner width), K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.stack.base import Site, Stack

Change = Callable[[Tensor], Tensor]


def at(places_BT: Tensor, change: Change) -> Change:
    """`change`, but only where `places_BT` (bool, [B, T] or [T]) is True."""
    def only(x_BTC: Tensor) -> Tensor:
        return torch.where(places_BT.to(x_BTC.device)[..., None], change(x_BTC), x_BTC)
    return only


def put(value: Tensor) -> Change:
    """`value` in place of what is there: a mean [C], zeros, or states of another run [B, T, C]."""
    return lambda x_BTC: value.to(x_BTC).expand_as(x_BTC)


def added(value: Tensor) -> Change:
    """What is there plus `value`: noise drawn before, or a steering vector [C]."""
    return lambda x_BTC: x_BTC + value.to(x_BTC)


def without(directions: Tensor) -> Change:
    """What is there less its projection on `directions`, [C] or [K, C], which need not be orthogonal.

    Raises BadOption for directions of length zero, or that depend on each other.
    """
    basis_CK, upper_KK = torch.linalg.qr(directions.reshape(-1, directions.shape[-1]).T.double())
    lengths_K = upper_KK.diagonal().abs()
    if bool((lengths_K <= 1e-9 * lengths_K.max()).any()) or not bool(lengths_K.max() > 0):
        raise BadOption("directions to remove that are zero or depend on each other", expected="independent ones",
                        do="leave out those that the others span")

    def project(x_BTC: Tensor) -> Tensor:
        basis = basis_CK.to(x_BTC)
        kept_BTC: Tensor = x_BTC - x_BTC @ basis @ basis.T
        return kept_BTC
    return project


def clamped(units: Sequence[int] | Tensor, value: float | Tensor) -> Change:
    """Some units (indices of the last axis) at `value`, a number or one for each of them."""
    def clamp(x_BTC: Tensor) -> Tensor:
        changed_BTC = x_BTC.clone()
        changed_BTC[..., _indices(units, x_BTC)] = torch.as_tensor(value).to(x_BTC)
        return changed_BTC
    return clamp


def scaled(units: Sequence[int] | Tensor, factor: float | Tensor) -> Change:
    """Some units (indices of the last axis) times `factor`; 0 switches them off, 2 doubles them."""
    def scale(x_BTC: Tensor) -> Tensor:
        index = _indices(units, x_BTC)
        changed_BTC = x_BTC.clone()
        changed_BTC[..., index] = x_BTC[..., index] * torch.as_tensor(factor).to(x_BTC)
        return changed_BTC
    return scale


def _indices(units: Sequence[int] | Tensor, x_BTC: Tensor) -> Tensor:
    index = torch.as_tensor(units, dtype=torch.int64, device=x_BTC.device)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < x_BTC.shape[-1]:
        raise BadOption(f"unit {int(index.max())} of {x_BTC.shape[-1]}", expected="indices of the last axis",
                        do="count units from 0")
    return index


@contextmanager
def edits(stack: Stack, site: Site, changes: Mapping[int, Change]) -> Iterator[None]:
    """One change at the same site of several layers, by layer, while the context lasts."""
    with ExitStack() as context:
        for layer, change in changes.items():
            context.enter_context(stack.edit(layer, site, change))
        yield


@contextmanager
def restored(stack: Stack, seen: Mapping[tuple[int, Site], Tensor],
             places_BT: Tensor | None = None) -> Iterator[None]:
    """States captured in another run put back at every (layer, site) of `seen`, where `places_BT` is True.

    With the states of a clean run this restores, or freezes what a later edit must not reach; with those of
    another prompt it swaps. The two runs must have the same shape, or one row to stand for all.
    """
    with ExitStack() as context:
        for (layer, site), value in seen.items():
            change = put(value)
            context.enter_context(stack.edit(layer, site, change if places_BT is None else at(places_BT, change)))
        yield
