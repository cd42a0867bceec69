"""Operations and bytes of whatever runs inside a context, operation by operation.

Counted are matrix products, convolutions and attention: two operations per multiply-accumulate, and the bytes
that each must read and write once (inputs, weights, outputs). Element-wise work moves bytes too where it is not
fused; it is left out, as it belongs to no matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry


class Traffic:
    """`operations` and `moved` bytes of what ran in the context, summed over all counted operations."""

    def __init__(self) -> None:
        self.operations, self.moved = 0.0, 0.0
        self._flops, self._bytes = FlopCounterMode(display=False), _Bytes()

    def __enter__(self) -> Traffic:
        self._inside = ExitStack()
        self._inside.enter_context(self._flops)
        self._inside.enter_context(self._bytes)
        return self

    def __exit__(self, *error: Any) -> None:
        self._inside.close()
        self.operations = float(self._flops.get_total_flops())
        self.moved = float(self._bytes.total)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.moved if self.moved else 0.0


class _Bytes(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._overloadpacket not in flop_registry:
            with self:  # without autograd, convolutions arrive whole
                found = function.decompose(*args, **kwargs)
            return function(*args, **kwargs) if found is NotImplemented else found
        found = function(*args, **kwargs)
        self.total += sum(t.numel() * t.element_size() for t in _tensors([*args, *kwargs.values(), found]))
        return found


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
