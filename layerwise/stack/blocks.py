"""Which modules of a network are its layers.

Without a hint, in this order: blocks in a list (`ModuleList`, `Sequential`) of which at least two have
the same structure; blocks in any list; plain layers in a list; the children that the traced forward
pass calls one after another. Lists of all stages and towers are chained, and nothing inside a layer is
a layer.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence

from torch import nn

from layerwise.errors import BadModel, BadOption
from layerwise.stack.graph import called

Layers = dict[str, nn.Module]
Test = Callable[[nn.Module], bool]
Chooser = Callable[[nn.Module], set[str]]


def find(module: nn.Module, blocks: Test | Sequence[str] | None = None) -> Layers:
    """The layers of `module` by path, in the order in which they are expected to run.

    `blocks` is a test for layers, or their paths in call order. Raises BadModel where nothing is found,
    BadOption for an unknown or a nested path.
    """
    if blocks is None:
        found = repeated(module) or traced(module)
    elif callable(blocks):
        found = dict(_outermost("", module, blocks))
    else:
        found = _by_path(module, blocks)
    if not found:
        kind = type(module).__name__
        raise BadModel(f"{kind}, in which {'no layers are found' if blocks is None else 'blocks finds none'}",
                       expected="a list of repeated blocks, or children called one after another",
                       do="name the layers in call order, blocks=['stem', 'body.0', 'body.1'], "
                          "or give a test for them, blocks=lambda m: isinstance(m, Block)")
    return found


def repeated(module: nn.Module) -> Layers:
    """The layers by the lists that hold them; empty if no list holds two."""
    composite = [child for parent in module.modules() for child in _blocks(parent).values()]
    counts = Counter(map(_structure, composite))
    alike = {kind for (kind, _), count in counts.items() if count > 1}
    for choose in (_blocks_of(alike), _blocks_of(set(map(type, composite))), _plain_layers):
        found = _collect("", module, choose, set())
        if len(found) > 1:
            return found
    return {}


def traced(module: nn.Module, prefix: str = "") -> Layers:
    """The children with parameters in call order; a lone child is looked into. Empty if not known."""
    order = called(module)
    if len(order) == 1:
        return traced(module.get_submodule(order[0]), f"{prefix}{order[0]}.")
    if len(order) < 2 or len(set(order)) != len(order):
        return {}
    return {f"{prefix}{path}": module.get_submodule(path) for path in order}


def _members(parent: nn.Module) -> Layers:
    """The children of a list that hold parameters."""
    if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
        return {}
    return {name: child for name, child in parent.named_children() if any(True for _ in child.parameters())}


def _blocks(parent: nn.Module) -> Layers:
    """The members of a list that are made of other modules and can be called."""
    return {name: child for name, child in _members(parent).items()
            if list(child.children()) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))}


def _structure(module: nn.Module) -> tuple[type, Hashable]:
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())


def _blocks_of(kinds: set[type]) -> Chooser:
    def choose(parent: nn.Module) -> set[str]:
        """A ModuleList with layers holds only layers; a Sequential may begin and end with other things."""
        blocks = _blocks(parent)
        wanted = {name for name, child in blocks.items() if type(child) in kinds}
        return set(blocks) if wanted and isinstance(parent, nn.ModuleList) else wanted
    return choose


def _plain_layers(parent: nn.Module) -> set[str]:
    """Of a list's plain layers, the class that holds most parameters."""
    members = {name: child for name, child in _members(parent).items() if not list(child.children())}
    weight: Counter[type] = Counter()
    for child in members.values():
        weight[type(child)] += sum(p.numel() for p in child.parameters())
    main = weight.most_common(1)[0][0] if weight else None
    return {name for name, child in members.items() if type(child) is main}


def _collect(prefix: str, parent: nn.Module, choose: Chooser, seen: set[nn.Module]) -> Layers:
    found: Layers = {}
    chosen = choose(parent)
    for name, child in parent.named_children():
        if child in seen:
            continue
        seen.add(child)
        if name in chosen:
            found[f"{prefix}{name}"] = child
        else:
            found |= _collect(f"{prefix}{name}.", child, choose, seen)
    return found


def _outermost(path: str, module: nn.Module, test: Test) -> Iterator[tuple[str, nn.Module]]:
    if path and test(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(f"{path}.{name}" if path else name, child, test)


def _by_path(module: nn.Module, paths: Sequence[str]) -> Layers:
    known = dict(module.named_modules(remove_duplicate=False))
    found: Layers = {}
    for path in paths:
        if not path or path not in known:
            near = " or ".join(map(repr, difflib.get_close_matches(path, known, n=3)))
            raise BadOption(f"blocks with {path!r}", expected=f"paths inside {type(module).__name__}",
                            do=f"did you mean {near}?" if near else "see module.named_modules()")
        found[path] = known[path]
    held = Counter(part for block in set(found.values()) for part in block.modules())
    if len(set(found.values())) != len(paths) or any(held[block] > 1 for block in found.values()):
        raise BadOption("blocks that hold one another, or the same one twice", expected="separate modules",
                        do="name each layer once, and nothing inside a layer")
    return found
