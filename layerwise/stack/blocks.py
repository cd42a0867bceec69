"""Which modules of a network are its layers.

Without a hint, in this order: blocks in a list (`ModuleList`, `Sequential`) of which at least two have
the same structure; blocks in any list; plain layers in a list; the children that the traced forward
pass calls one after another. Lists of all stages and towers are chained, and nothing inside a layer is
a layer.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from torch import nn

from layerwise.errors import BadModel, BadOption
from layerwise.stack.graph import called

Layers = dict[str, nn.Module]
Test = Callable[[nn.Module], bool]


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


# in lists ---------------------------------------------------------------------------------------


def repeated(module: nn.Module) -> Layers:
    """The layers by the lists that hold them; empty if no list holds two."""
    found = _alike(module)
    if len(found) < 2:
        found = _unique((path, _blocks(parent)) for path, parent in _outer_lists("", module))
    if len(found) < 2:
        found = _unique((path, _plain(parent)) for path, parent in module.named_modules())
    return found if len(found) > 1 else {}


def _alike(module: nn.Module) -> Layers:
    """Blocks of every kind that repeats a structure; blocks of other kinds (stages) are looked into."""
    found: Layers = {}
    inside: Layers = {"": module}
    while inside:
        lists = [item for path, part in inside.items() for item in _outer_lists(path, part)]
        blocks = _unique((path, _blocks(parent)) for path, parent in lists)
        counts = Counter(map(_structure, blocks.values()))
        kinds = {kind for (kind, _), count in counts.items() if count > 1}
        chosen = _unique((path, _of_kinds(parent, kinds)) for path, parent in lists)
        found |= chosen
        inside = {path: block for path, block in blocks.items() if path not in chosen}
    order = {part: place for place, part in enumerate(module.modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[1]]))


def _outer_lists(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The lists of blocks in `module` that are not inside a block of such a list."""
    blocks = _blocks(module)
    if blocks:
        yield path, module
    for name, child in module.named_children():
        if name not in blocks:
            yield from _outer_lists(_join(path, name), child)


def _members(parent: nn.Module) -> Layers:
    """The children of a list that hold parameters."""
    if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
        return {}
    return {name: child for name, child in parent.named_children() if any(True for _ in child.parameters())}


def _blocks(parent: nn.Module) -> Layers:
    """The members of a list that are made of other modules and can be called."""
    return {name: child for name, child in _members(parent).items()
            if list(child.children()) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))}


def _of_kinds(parent: nn.Module, kinds: set[type]) -> Layers:
    """A ModuleList with layers holds only layers; a Sequential may begin and end with other things."""
    blocks = _blocks(parent)
    wanted = {name: child for name, child in blocks.items() if type(child) in kinds}
    return blocks if wanted and isinstance(parent, nn.ModuleList) else wanted


def _plain(parent: nn.Module) -> Layers:
    """Of a list's plain layers, the class that holds most parameters."""
    members = {name: child for name, child in _members(parent).items() if not list(child.children())}
    weight: Counter[type] = Counter()
    for child in members.values():
        weight[type(child)] += sum(p.numel() for p in child.parameters())
    main = weight.most_common(1)[0][0] if weight else None
    return {name: child for name, child in members.items() if type(child) is main}


def _structure(module: nn.Module) -> tuple[type, Hashable]:
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())


def _unique(lists: Iterable[tuple[str, Layers]]) -> Layers:
    """The chosen members of all lists by full path, each module once."""
    found: Layers = {}
    seen: set[nn.Module] = set()
    for path, members in lists:
        for name, child in members.items():
            if child not in seen:
                seen.add(child)
                found[_join(path, name)] = child
    return found


# by tracing -------------------------------------------------------------------------------------


def traced(module: nn.Module, prefix: str = "") -> Layers:
    """The children with parameters in call order; a lone child is looked into. Empty if not known."""
    order = called(module)
    if len(order) == 1:
        return traced(module.get_submodule(order[0]), _join(prefix, order[0]))
    if len(order) < 2 or len(set(order)) != len(order):
        return {}
    return {_join(prefix, path): module.get_submodule(path) for path in order}


# as given ---------------------------------------------------------------------------------------


def _outermost(path: str, module: nn.Module, test: Test) -> Iterator[tuple[str, nn.Module]]:
    if path and test(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(_join(path, name), child, test)


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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
