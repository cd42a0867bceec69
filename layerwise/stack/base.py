"""`Stack` and `State`: the one interface to every model.

    state = stack.start(tokens)                   # what enters layer 0
    state = stack.run(state, slice(0, 12))        # any slice of the layers
    logits = stack.finish(stack.run(state))       # the rest, and the head

Shapes: B batch, T tokens, C hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwise.errors import BadOption
from layerwise.spec import StackSpec

if TYPE_CHECKING:
    from layerwise.io.tokenizer import Tokenizer

Site = Literal["input", "output", "attention", "feed_forward", "neurons"]
SITES: tuple[Site, ...] = ("input", "output", "attention", "feed_forward", "neurons")
ENTERS = ("input", "neurons")
"""Sites that are what enters their module; the others are what leaves it."""

Seen = dict[tuple[int, Site], Tensor]


@dataclass(frozen=True)
class State:
    """What flows between layers: the hidden tensor that enters `layer`, and what the pass shares.

    `shared` holds positions, masks and caches (a `Flow`) for decoders, and the recorded call for other
    modules. Running a slice returns a new State; caches in `shared` are appended to in place.
    """

    hidden: Tensor
    layer: int
    shared: Any = field(repr=False)

    def moved(self, hidden: Tensor, layer: int) -> State:
        return replace(self, hidden=hidden, layer=layer)


class Stack(ABC):
    """A model opened to its layers: the table, the modules, the tokenizer.

    Attributes: `spec` the layer table; `name` where it came from; `tokenizer` or None; `folder` on disk
    or None.
    """

    spec: StackSpec
    name: str
    tokenizer: Tokenizer | None = None
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.spec.rows)

    def __repr__(self) -> str:
        size = f"{len(self)} layers, {self.spec.parameters() / 1e6:.1f}M parameters"
        return f"<{type(self).__name__} {self.name}: {size}>"

    # running -----------------------------------------------------------------------------------

    @abstractmethod
    def start(self, *args: Any, **kwargs: Any) -> State:
        """Everything before layer 0."""

    @abstractmethod
    def run(self, state: State, layers: slice = slice(None)) -> State:
        """Run `layers` on `state`; a missing start means `state.layer`, a missing stop the last layer.

        A slice that starts after `state.layer` skips the layers between.
        """

    @abstractmethod
    def finish(self, state: State) -> Any:
        """Everything after the last layer; the model's output (logits [B, T, V] for a decoder)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.finish(self.run(self.start(*args, **kwargs)))

    def bounds(self, state: State, layers: slice) -> tuple[int, int]:
        """The first layer and the one after the last of `layers`. Raises BadOption outside the table."""
        first = state.layer if layers.start is None else layers.start
        last = len(self) if layers.stop is None else layers.stop
        if layers.step not in (None, 1) or not 0 <= first <= len(self) or not 0 <= last <= len(self):
            raise BadOption(f"layers={layers}", expected=f"a plain slice within 0..{len(self)}",
                            do="count layers from 0")
        return first, max(first, last)

    def index(self, layer: int) -> int:
        """`layer` itself. Raises BadOption outside the table."""
        if not 0 <= layer < len(self):
            raise BadOption(f"layer {layer}", expected=f"a layer within 0..{len(self) - 1}",
                            do="count layers from 0")
        return layer

    # layers ------------------------------------------------------------------------------------

    @abstractmethod
    def block(self, layer: int) -> nn.Module:
        """The module of one layer."""

    @abstractmethod
    def swap(self, layer: int, block: nn.Module) -> AbstractContextManager[None]:
        """Run `block` in the place of `layer` while the context lasts."""

    @abstractmethod
    def module(self, layer: int, site: Site) -> nn.Module:
        """The module whose input ("input", "neurons") or output (the rest) is that site. BadOption without one."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    # looking and editing -----------------------------------------------------------------------

    @contextmanager
    def capture(self, *sites: Site, layers: range | None = None) -> Iterator[Seen]:
        """Keep the last tensor seen at each (layer, site) while the context lasts.

        Attention and feed-forward sites hold what that half adds to the residual stream, [B, T, C]; neurons
        what enters the last matrix of the feed-forward network, [B, T, W].
        """
        seen: Seen = {}
        handles = []
        try:
            for layer in layers if layers is not None else range(len(self)):
                for site in sites:
                    handles.append(self._watch(seen, layer, site))
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, seen: Seen, layer: int, site: Site) -> RemovableHandle:
        def keep(value: Any) -> None:
            seen[layer, site] = first_tensor(value)

        module = self.module(layer, site)
        if site in ENTERS:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: keep((*args, *kwargs.values())), with_kwargs=True)
        return module.register_forward_hook(lambda _, __, out: keep(out))

    @contextmanager
    def edit(self, layer: int, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Pass the tensor at one site through `change` while the context lasts; always restored."""
        handle = self._hook(layer, site, change)
        try:
            yield
        finally:
            handle.remove()

    def _hook(self, layer: int, site: Site, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        module = self.module(layer, site)
        if site in ENTERS:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: change_call(args, kwargs, change), with_kwargs=True)
        return module.register_forward_hook(
            lambda _, __, out: replace_first(out, change(first_tensor(out))))

    def skip(self, layer: int) -> AbstractContextManager[None]:
        """Leave a layer out: what enters it leaves it."""
        return self.swap(layer, self.absent(layer))

    def absent(self, layer: int) -> nn.Module:
        """What runs in the place of a layer that is left out."""
        return Skip()

    def zero(self, layer: int, site: Site) -> AbstractContextManager[None]:
        """Zeros at one site; on "attention" or "feed_forward" this knocks the half out."""
        return self.edit(layer, site, torch.zeros_like)

    def noise(self, layer: int, site: Site, std: float, seed: int = 0) -> AbstractContextManager[None]:
        """Add Gaussian noise of standard deviation `std`, the same for the same seed."""
        def change(x: Tensor) -> Tensor:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            return x + std * torch.randn(x.shape, generator=generator).to(x)
        return self.edit(layer, site, change)

    def patch(self, layer: int, site: Site, value: Tensor,
              positions: slice = slice(None)) -> AbstractContextManager[None]:
        """Put `value` at the given positions (axis 1) of one site, such as one captured in another run."""
        def change(x: Tensor) -> Tensor:
            patched = x.clone()
            patched[:, positions] = value.to(x)
            return patched
        return self.edit(layer, site, change)


class Skip(nn.Module):
    """A layer that is not there: returns what enters it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def first_tensor(value: Any) -> Tensor:
    """The hidden tensor of a layer's output or call: the value itself, or the first tensor in it."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(items, Iterable) else ():
        if isinstance(item, Tensor):
            return item
    raise BadOption(f"a layer that returns {type(value).__name__} without a tensor",
                    expected="a tensor, or a tuple or dict with one",
                    do="wrap the layer so that it returns a tensor")


def replace_first(value: Any, new: Tensor) -> Any:
    """`value` with its first tensor replaced by `new`."""
    if isinstance(value, Tensor):
        return new
    old = first_tensor(value)
    if isinstance(value, dict):
        return type(value)({key: new if item is old else item for key, item in value.items()})
    items = [new if item is old else item for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def change_call(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:
    """A call's arguments with its hidden tensor passed through `change`."""
    if any(isinstance(item, Tensor) for item in args):
        return replace_first(args, change(first_tensor(args))), kwargs
    return args, replace_first(kwargs, change(first_tensor(kwargs)))
