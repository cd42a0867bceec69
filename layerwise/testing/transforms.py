"""The executable contract of a transform."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from torch import Tensor

from layerwise.nets.decoder import Block
from layerwise.spec import Attention, LayerSpec
from layerwise.stack.base import State
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.base import Transform
from layerwise.transform.gram import grams


def check_transform(transform: Transform, stack: DecoderStack | None = None) -> None:
    """Assert what every transform promises, on a small random decoder unless one is given.

    Parameters are plain values; `edit` is pure and editing twice equals editing once; `apply` agrees with
    the edited row in names, shapes and stored bytes, leaves its input's bytes alone, gives the same weights
    each time, and runs.
    """
    stack = stack or random_stack()
    tokens_BT = torch.randint(stack.spec.vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    state, hidden = stack.start(tokens_BT), stack.spec.hidden
    parameters = asdict(transform)  # type: ignore[call-overload]
    assert type(transform)(**json.loads(json.dumps(parameters))) == transform, (
        "parameters must be plain"
    )
    for layer, row in enumerate(stack.spec.rows):
        block = stack.block(layer)
        assert isinstance(block, Block)
        edited = transform.edit(row, hidden)
        assert transform.edit(row, hidden) == edited, "edit must be pure"
        assert edited is None or transform.edit(edited, hidden) == edited, (
            "editing twice must equal editing once"
        )
        stats = grams(block, layer, [state]) if "gram" in transform.needs else None
        before = _bytes(block)
        new, again = transform.apply(block, row, stats), transform.apply(block, row, stats)
        assert _equal(before, _bytes(block)), "apply must leave its input alone"
        assert (new is None) == (edited is None), "edit and apply must agree on whether the layer is gone"
        if new is None or edited is None:
            continue
        assert again is not None and _equal(_bytes(new), _bytes(again)), "apply must be repeatable"
        _check_row(new, edited, stack, state, layer)


def _check_row(block: torch.nn.Module, row: LayerSpec, stack: DecoderStack, state: State, layer: int) -> None:
    stored = sum(tensor.numel() * tensor.element_size() for tensor in block.state_dict().values())
    expected = row.bytes(stack.spec.hidden, stack.spec.dtype)
    assert stored == expected, f"the row says {expected} bytes, the weights take {stored}"
    source = row.mixer.shares if isinstance(row.mixer, Attention) else None
    if source is not None:
        if source >= layer:  # the table refuses it
            return
        state.shared.sources = frozenset({source})
        state = stack.run(state, slice(0, layer))
    out_BTC = block(state.hidden, state.shared, layer)
    assert out_BTC.shape == state.hidden.shape and bool(torch.isfinite(out_BTC).all()), (
        "the edited layer must run"
    )


def _bytes(block: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
