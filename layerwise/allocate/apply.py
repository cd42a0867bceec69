"""`apply`: carry out a plan, giving a new stack; `undo`: go back to the one before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.allocate.plan import Plan
from layerwise.data.text import TextData, by_frequency
from layerwise.errors import BadData, BadModel, BadOption, BadPlan
from layerwise.io.pages import trim
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, LayerSpec
from layerwise.stack.base import Stack, State
from layerwise.stack.decoder import DecoderStack
from layerwise.transform import TRANSFORMS
from layerwise.transform.base import Transform
from layerwise.transform.gram import grams, normed
from layerwise.transform.quantize import Quantize, pack_table, table_gram, values
from layerwise.transform.share_kv import ShareKV


def apply(stack: Stack, plan: Plan, data: TextData | None = None) -> DecoderStack:
    """A new stack with the plan's edits made; what no edit touches is shared with `stack`.

    Transforms that read calibration statistics (GPTQ) need `data`; layers are then edited in order, each
    seeing what the edited layers before it put out. Raises BadPlan where the plan was written for another
    model, and BadData where statistics are needed and there is no data.
    """
    if not isinstance(stack, DecoderStack):
        raise BadOption(
            f"a plan for {type(stack).__name__}",
            expected="a decoder language model",
            do="use the contexts stack.skip, stack.swap and stack.edit on other modules",
        )
    spec = plan.edited(stack.spec)
    layers, outside = _transforms(plan)
    _check_shared(layers, stack.spec.rows)
    tiers = any(transform.frequent is not None for transform in outside.values())
    if data is None and (tiers or any("gram" in transform.needs for edits in layers.values() for transform in edits)):
        raise BadData(
            "a plan that needs calibration statistics, without data",
            expected="calibration text",
            do="pass data=layerwise.data.text_blocks('default', stack.tokenizer)",
        )
    logits = outside.get("embedding" if stack.spec.tied else "head")
    trim()
    blocks, states = _edited_blocks(stack, layers, data, to_the_end=logits is not None and "gram" in logits.needs)
    gram_CC = table_gram(normed(stack, states), stack.spec.tied) if states else None
    del states
    trim()
    order_V = by_frequency(data, stack.spec.vocabulary) if tiers else None
    looked_up = gram_CC if stack.spec.tied else None
    slim = stack.rebuilt(
        spec,
        blocks,
        embedding=_packed_table(stack.decoder.embedding, outside.get("embedding"), looked_up, order_V),
        head=_packed_table(stack.decoder.head, outside.get("head"), gram_CC, order_V),
    )
    slim.origin = stack, plan
    trim()
    return slim


def undo(slim: Stack) -> Stack:
    """The stack that `apply` started from. Raises BadPlan where there was no plan."""
    origin = getattr(slim, "origin", None)
    if origin is None:
        raise BadPlan(
            f"{slim.name}, to which no plan was applied in this session",
            expected="a stack made by apply",
            do="open the original model again",
        )
    before: Stack = origin[0]
    return before


def _transforms(plan: Plan) -> tuple[dict[int, list[Transform]], dict[str, Quantize]]:
    layers: dict[int, list[Transform]] = defaultdict(list)
    outside: dict[str, Quantize] = {}
    for edit in plan.edits:
        transform: Any = TRANSFORMS[edit.transform](**edit.arguments)
        if isinstance(edit.target, int):
            layers[edit.target].append(transform)
        else:
            outside[edit.target] = transform
    return layers, outside


def _check_shared(layers: Mapping[int, Sequence[Transform]], rows: Sequence[LayerSpec]) -> None:
    """Raises BadPlan where values are rotated or scaled that a layer reads which does not know of it."""
    readers = {mixer.shares: layer for layer, mixer in ((n, row.mixer) for n, row in enumerate(rows))
               if isinstance(mixer, Attention) and mixer.shares is not None}
    readers |= {edit.source: layer for layer, edits in layers.items() for edit in edits if isinstance(edit, ShareKV)}
    for source, reader in readers.items():
        for edit in layers.get(source, ()):
            if edit.turns_values():
                raise BadPlan(f"{edit.name} for layer {source}, whose values layer {reader} shares",
                              expected="values that only their own layer reads",
                              do="remove this edit, or for scale-inputs the input 'o'")


def _packed_table(table: nn.Module | None, transform: Quantize | None, gram_CC: Tensor | None,
                  order_V: Tensor | None) -> nn.Module | None:
    if transform is None or table is None:
        return None
    return pack_table(values(table), transform.table_format, transform.method, gram_CC, order_V)


@torch.inference_mode()
def _edited_blocks(
    stack: DecoderStack, layers: dict[int, list[Transform]], data: TextData | None, to_the_end: bool
) -> tuple[list[nn.Module], list[State]]:
    """Edit the layers in order, carrying calibration states through the edited prefix while any edit needs them.

    With `to_the_end` also gives the states that leave the last layer, none without data.
    """
    last = max(
        (layer for layer, edits in layers.items() if any("gram" in t.needs for t in edits)), default=-1
    )
    last = len(stack) if to_the_end else last
    states: list[State] = []
    if last >= 0 and data is not None:
        states = [stack.start(batch.tokens_BT, batch.mask_BT) for batch in data.batches(4)]
        for state in states:
            state.shared.sources |= {t.source for edits in layers.values() for t in edits if isinstance(t, ShareKV)}
    blocks: list[nn.Module] = []
    for layer, row in enumerate(stack.spec.rows):
        block = stack.block(layer)
        assert isinstance(block, Block)
        edited = _edited(
            block, row, stack.spec.hidden, layers.get(layer, []), layer, states if layer <= last else []
        )
        if edited is not None:
            blocks.append(edited)
        if layer < last and edited is not None:
            states = [state.moved(edited(state.hidden, state.shared, layer), layer + 1) for state in states]
            trim()
    return blocks, states if to_the_end else []


def _edited(
    block: Block, row: LayerSpec, hidden: int, edits: Iterable[Transform], layer: int, states: list[State]
) -> nn.Module | None:
    stats: dict[str, Tensor] | None = None
    for transform in edits:
        if stats is None and states and "gram" in transform.needs | transform.wants:
            stats = grams(block, layer, states)
        edited_row = transform.edit(row, hidden)
        try:
            edited = transform.apply(block, row, stats)
        except (BadData, BadModel) as error:
            raise type(error)(f"layer {layer}: {error.given}", expected=error.expected, do=error.do) from error
        if edited is None or edited_row is None:
            return None
        assert isinstance(edited, Block)
        block, row = edited, edited_row
        stats = stats if transform.keeps_inputs else None
    return block
