"""Input for any module, whatever its forward pass takes: positional and named arguments, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from layerwise.data.images import ImageData
from layerwise.data.text import TextData
from layerwise.errors import BadData


@dataclass(frozen=True)
class Call:
    """One forward pass, `module(*args, **kwargs)`, and the labels of its rows if there are any."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels_B: Tensor | None = None


class Batches:
    """Calls that can be walked through any number of times.

    Each item may be a Call, a tensor, a mapping (named arguments), a pair of a tuple and a mapping
    (positional and named arguments), or another tuple or list (positional arguments). An iterator is
    stored; a DataLoader or a list is read anew each time. Raises BadData if there is no item.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = list(items) if isinstance(items, Iterator) else items
        if next(iter(self.items), None) is None:
            raise BadData(
                "data without a batch", expected="at least one batch", do="check where the data comes from"
            )

    def __iter__(self) -> Iterator[Call]:
        return map(as_call, self.items)


def as_call(item: Any) -> Call:
    """One batch in any of the forms `Batches` takes. Raises BadData for another form."""
    if isinstance(item, Call):
        return item
    if isinstance(item, Tensor):
        return Call((item,))
    if isinstance(item, Mapping):
        return Call(kwargs=item)
    if isinstance(item, (tuple, list)):
        if len(item) == 2 and isinstance(item[0], tuple) and isinstance(item[1], Mapping):
            return Call(item[0], item[1])
        return Call(tuple(item))
    raise BadData(
        f"a batch of type {type(item).__name__}",
        expected="a tensor, a mapping or a tuple",
        do="let the data yield what the module's forward pass takes",
    )


def labelled(call: Call, module: nn.Module) -> Call:
    """The call without what is a label and no input: `labels` by name, or the last of (inputs, labels).

    Labels are integers, one a row. A module that itself requires so many inputs, or one named `labels`, keeps them.
    """
    if call.labels_B is not None:
        return call
    required = [item for item in inspect.signature(module.forward).parameters.values()
                if item.default is item.empty and item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
    if _is_labels(call.kwargs.get("labels"), call) and "labels" not in [item.name for item in required]:
        rest = {name: value for name, value in call.kwargs.items() if name != "labels"}
        return replace(call, kwargs=rest, labels_B=call.kwargs["labels"])
    if len(call.args) > max(1, len(required)) and _is_labels(call.args[-1], call):
        return replace(call, args=call.args[:-1], labels_B=call.args[-1])
    return call


def _is_labels(value: Any, call: Call) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point():
        return False
    inputs = [item for item in (*call.args, *call.kwargs.values()) if isinstance(item, Tensor) and item is not value]
    return bool(inputs) and inputs[0].dim() > 1 and len(inputs[0]) == len(value)


def calls(data: TextData | ImageData | Iterable[Any], size: int = 8) -> Iterator[Call]:
    """Any data as calls: text as `input_ids` and `attention_mask`, images as one positional tensor."""
    if isinstance(data, TextData):
        for batch in data.batches(size):
            mask = {} if batch.mask_BT is None else {"attention_mask": batch.mask_BT.long()}
            yield Call(kwargs={"input_ids": batch.tokens_BT, **mask}, labels_B=batch.labels_B)
    elif isinstance(data, ImageData):
        for images in data.batches(size):
            yield Call((images.pixels_BCHW,), labels_B=images.labels_B)
    else:
        yield from Batches(data)
