"""Any `torch.nn.Module` as a `Stack`: encoders, vision networks, diffusion networks, your own.

Layers are found in the module as it is (`blocks.py`), slices run by replaying its forward pass
(`replay.py`). What that costs and where it ends:

- Everything outside the layers runs again for every slice, and so does the random number generator that
  it uses: open a network with dropout in evaluation mode.
- Outputs of the layers that ran stay in the state, so a long pass holds its activations.
- What the module collects from its layers (`hidden_states`, key-value caches) holds in `finish` only the
  layers that ran in that last step. Do not pass a cache that the module appends to.
- Layers must be called once, in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwise.errors import BadOption
from layerwise.spec import DTYPE_BYTES, LayerSpec, Opaque, StackSpec
from layerwise.stack.base import Seen, Site, Stack, State
from layerwise.stack.blocks import find
from layerwise.stack.graph import halves
from layerwise.stack.replay import Call, Passing, Replay, intercepted

if TYPE_CHECKING:
    from layerwise.io.tokenizer import Tokenizer


class ModuleStack(Stack):
    """A module opened to its layers; the module itself is left as it is.

    `blocks` is a test for layers or their paths in call order; without it they are found (see
    `layerwise.stack.blocks`). The hidden tensor of a layer is the first tensor it is called with and the
    first tensor it returns. Raises BadModel where no layers are found.
    """

    def __init__(self, module: nn.Module, blocks: Callable[[nn.Module], bool] | Sequence[str] | None = None,
                 name: str | None = None, tokenizer: Tokenizer | None = None) -> None:
        layers = find(module, blocks)
        self.root, self.name, self.tokenizer = module, name or type(module).__name__, tokenizer
        self.layers = tuple(layers.items())
        self.spec = table(module, layers)
        self._swapped: dict[int, nn.Module] = {}
        self._forms: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()
        self._halves: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        first = next(self.root.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    # running -----------------------------------------------------------------------------------

    def start(self, *args: Any, **kwargs: Any) -> State:
        """Everything before layer 0; takes what the module's forward pass takes."""
        return self._replay(Call(args, kwargs), None, enter=0, first=0, stop=0)

    def run(self, state: State, layers: slice = slice(None)) -> State:
        """Run `layers`, and leave out those between `state.layer` and the slice.

        Raises BadOption where a layer that is left out changes the shape.
        """
        first, stop = self.bounds(state, layers)
        enter = min(state.layer, first)
        if enter == stop:
            return state
        return self._replay(self._call(state), state.hidden, enter=enter, first=first, stop=stop)

    def finish(self, state: State) -> Any:
        """The module's own output; layers after `state.layer` are left out."""
        return self._pass(self._call(state), state.hidden, enter=state.layer, first=len(self), stop=None)[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._swapped:
            return self.root(*args, **kwargs)
        with intercepted({self.layers[layer][1]: block for layer, block in self._swapped.items()}):
            return self.root(*args, **kwargs)

    def _replay(self, call: Call, hidden: Tensor | None, *, enter: int, first: int, stop: int) -> State:
        reached, outputs = self._pass(call, hidden, enter=enter, first=first, stop=stop)
        return State(reached, stop, Call(call.args, call.kwargs, outputs))

    def _pass(self, call: Call, hidden: Tensor | None, *, enter: int, first: int,
              stop: int | None) -> tuple[Any, tuple[Any, ...]]:
        replay = Replay(self.layers, call, hidden, enter=enter, first=first, stop=stop,
                        substitutes=self._swapped, passing=self.absent)
        return replay.run(self.root), tuple(replay.outputs)

    def _call(self, state: State) -> Call:
        call: Call = state.shared
        if state.layer > len(call.outputs):
            raise BadOption(f"a state moved to layer {state.layer} of which {len(call.outputs)} layers ran",
                            expected="layers that ran, or were left out by a slice",
                            do=f"leave layers out with run(state, slice({state.layer}, {state.layer}))")
        return call

    # layers ------------------------------------------------------------------------------------

    def block(self, layer: int) -> nn.Module:
        return self._swapped[layer] if layer in self._swapped else self.layers[self.index(layer)][1]

    @contextmanager
    def swap(self, layer: int, block: nn.Module) -> Iterator[None]:
        """Run `block` in the place of `layer`, called as it is; it must return what the layer returns."""
        before = self._swapped.get(self.index(layer))
        self._swapped[layer] = block
        try:
            yield
        finally:
            del self._swapped[layer]
            if before is not None:
                self._swapped[layer] = before

    def absent(self, layer: int) -> nn.Module:
        """What hands on what enters it, in the layer's form. Running it raises BadOption where the shape changes."""
        block = self.block(layer)
        return Passing(block, self.layers[layer][0], self._forms.setdefault(block, {}))

    def module(self, layer: int, site: Site) -> nn.Module:
        """The layer for "input" and "output"; for a half, the child whose output the layer adds to its input.

        Raises BadOption for a half where the layer's traced forward pass is no such sum (post-norm layers).
        """
        block = self.block(layer)
        if site in ("input", "output"):
            return block
        if block not in self._halves:
            self._halves[block] = halves(block)
        child = self._halves[block].get(site)
        if child is None:
            raise BadOption(f"site {site!r} of layer {layer} ({type(block).__name__})",
                            expected="a layer that computes input + attention + feed-forward",
                            do="use the sites 'input' and 'output' for this network")
        return block.get_submodule(child)

    def _watch(self, seen: Seen, layer: int, site: Site) -> RemovableHandle:
        """Keeps the tensor itself and lets the pass go on with a copy, which glue may change in place."""
        def keep(x: Tensor) -> Tensor:
            seen[layer, site] = x
            return x.clone()
        return self._hook(layer, site, keep)


def table(module: nn.Module, layers: Mapping[str, nn.Module]) -> StackSpec:
    """The layer table of a module: an opaque row per layer, the rest outside. Shared tensors count once."""
    seen: set[Tensor] = set()
    rows = tuple(LayerSpec(_opaque(path, block, seen), None) for path, block in layers.items())
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = "float32" if first is None else str(first.dtype).removeprefix("torch.")
    return StackSpec(family="module", hidden=0, vocabulary=0, rows=rows, outside=_opaque("", module, seen),
                     dtype=dtype if dtype in DTYPE_BYTES else "float32")  # type: ignore[arg-type]


def _opaque(path: str, module: nn.Module, seen: set[Tensor]) -> Opaque:
    """Counts the tensors of `module` that are not in `seen`, and adds them to it."""
    parameters = _unseen(module.parameters(), seen)
    stored = parameters + _unseen(_stored_buffers(module), seen)
    return Opaque(path, type(module).__name__, sum(p.numel() for p in parameters),
                  sum(t.numel() * t.element_size() for t in stored))


def _unseen(tensors: Iterable[Tensor], seen: set[Tensor]) -> list[Tensor]:
    fresh = [tensor for tensor in tensors if tensor not in seen]
    seen.update(fresh)
    return fresh


def _stored_buffers(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield buffer
