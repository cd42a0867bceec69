"""Running a slice of a module that layerwise did not build, by replaying its own forward pass.

The module's glue (embeddings, masks, poolings between stages, the head) runs as it is. Calls of its
layers are intercepted: a layer before the slice returns what it returned when it ran, the first layer
receives the given hidden tensor, layers of the slice run, and the pass is cut off where the slice ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadModel, BadOption
from layerwise.stack.base import change_call, first_tensor, replace_first

Handler = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments, and the outputs of the layers that ran so far, layer 0 first."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Any, ...] = ()


class Stop(BaseException):
    """Carries the hidden tensor out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextmanager
def intercepted(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Calls of the given modules go to their handlers while the context lasts.

    A module keeps its identity, attributes and hooks; its class is swapped for a subclass with another
    `__call__`. Inside its own handler a module is itself again. Not for several threads at once.
    """
    original = {module: type(module) for module in handlers}
    try:
        for module, handler in handlers.items():
            module.__dict__["_layerwise_handler"] = handler
            _become(module, _intercepting(type(module)))  # type: ignore[arg-type]
        yield
    finally:
        for module, kind in original.items():
            _become(module, kind)
            module.__dict__.pop("_layerwise_handler", None)


@cache
def _intercepting(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        intercepting = type(self)
        _become(self, kind)
        try:
            return self.__dict__["_layerwise_handler"](*args, **kwargs)
        finally:
            _become(self, intercepting)

    names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


def _become(module: nn.Module, kind: type) -> None:
    object.__setattr__(module, "__class__", kind)


class Replay:
    """One pass over the layers of `call`, which enters at `enter` with `hidden`.

    Layers before `enter` return their recorded outputs, layers from `enter` to `first` are passed over,
    layers from `first` to `stop` run; `stop` None means that the pass goes on to the module's own end.
    `outputs` grows as layers run. Outputs are copied where they are kept and where they are given back,
    because glue may change them in place.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], call: Call, hidden: Tensor | None, *,
                 enter: int, first: int, stop: int | None, substitutes: Mapping[int, nn.Module],
                 passing: Callable[[int], nn.Module]) -> None:
        self.layers, self.call, self.hidden = layers, call, hidden
        self.enter, self.first, self.stop = enter, first, stop
        self.substitutes, self.passing = substitutes, passing
        self.outputs = list(call.outputs[:enter])
        self.next = 0

    def run(self, module: nn.Module) -> Any:
        """The hidden tensor at `stop`, or the module's output. BadModel where layers run in another order."""
        blocks = [block for _, block in self.layers]
        with intercepted({block: partial(self._reach, layer) for layer, block in enumerate(blocks)}):
            try:
                result = module(*self.call.args, **self.call.kwargs)
            except Stop as stop:
                return stop.hidden
        if self.next < len(self.layers):
            raise self._disorder("its end")
        return result

    def _reach(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        if layer != self.next:
            raise self._disorder(self._named(layer))
        self.next += 1
        if layer < self.enter:
            return self._recorded(layer)
        if layer == self.stop:
            raise Stop(first_tensor((*args, *kwargs.values())))
        if layer == self.enter and self.hidden is not None:
            entering = self.hidden.clone()
            args, kwargs = change_call(args, kwargs, lambda _: entering)
        output = self._block(layer)(*args, **kwargs)
        self.outputs.append(copied(output))
        if layer + 1 == len(self.layers) == self.stop:
            raise Stop(first_tensor(output))
        return output

    def _recorded(self, layer: int) -> Any:
        output = self.outputs[layer]
        if self.hidden is not None and layer + 1 == self.enter == len(self.layers):
            return replace_first(output, self.hidden.clone())
        return copied(output)

    def _block(self, layer: int) -> nn.Module:
        if layer < self.first:
            return self.passing(layer)
        return self.substitutes.get(layer, self.layers[layer][1])

    def _named(self, layer: int) -> str:
        return f"layer {layer} ({self.layers[layer][0]})" if layer < len(self.layers) else "its end"

    def _disorder(self, came: str) -> BadModel:
        return BadModel(f"a forward pass in which {came} came, not {self._named(self.next)}",
                        expected="every layer called once, in the order of the table",
                        do="list the layers that this input reaches, in call order: blocks=['body.0', ...]")


class Passing(nn.Module):
    """A layer left out of a module: what enters it leaves it, in the form in which the layer returns it.

    The form is learned by running the layer once for each kind of call; `forms` keeps it. A layer that
    returns other tensors too (such as position biases that later layers read) runs all the same, and
    only its hidden tensor is left as it was. Raises BadOption for a layer that changes the shape.
    """

    def __init__(self, block: nn.Module, path: str, forms: dict[Hashable, Any]) -> None:
        super().__init__()
        self.compute, self.path, self.forms = block.forward, path, forms

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = first_tensor((*args, *kwargs.values())).clone()
        kind = (*map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))
        form = self.forms.get(kind)
        if form is None:
            form = self.compute(*args, **kwargs)
            before, after = tuple(hidden.shape), tuple(first_tensor(form).shape)
            if before != after:
                raise BadOption(f"leaving out {self.path}, which changes the shape from {before} to {after}",
                                expected="a layer that keeps the shape", do="keep this layer")
            if _is_plain(form):
                self.forms[kind] = replace_first(form, torch.empty(0))
        return replace_first(form, hidden)


def copied(output: Any) -> Any:
    """`output` with a copy of its hidden tensor."""
    return replace_first(output, first_tensor(output).clone())


def _kind(value: Any) -> Hashable:
    return repr(value) if value is None or isinstance(value, (bool, str)) else type(value).__qualname__


def _is_plain(output: Any) -> bool:
    """Whether an output holds nothing but the hidden tensor and constants."""
    if isinstance(output, Tensor):
        return True
    items = list(output.values() if isinstance(output, dict) else output)
    constants = sum(item is None or isinstance(item, (bool, int, float, str)) for item in items)
    return constants == len(items) - 1
