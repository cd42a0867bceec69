"""The data flow of a module's own forward pass, traced symbolically: no example input is needed.

Children are leaves, required arguments are symbols, every other argument keeps its default. Passes
whose control flow depends on tensor values cannot be traced this way.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.fx import Graph, Node

SUMS = (operator.add, operator.iadd, torch.add)
METHOD_SUM = ("call_method", "add")
TRANSPARENT = re.compile(r"drop|identity", re.IGNORECASE)
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


def trace(module: nn.Module) -> Graph | None:
    """The graph of `module.forward` with its children as leaves; None if it cannot be traced."""
    from torch.fx import Tracer

    class Forward(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

        def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
            forward = inspect.unwrap(root_fn)
            symbols = [self.create_proxy("placeholder", name, (), {}) for name in _required(forward)]
            return forward, [self.root, *symbols]

    try:
        return Forward().trace(module)
    except Exception:  # whatever a forward pass raises when it meets a symbol instead of a tensor
        return None


def _required(forward: Any) -> list[str]:
    """Names of the arguments after `self` that have no default."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return [p.name for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def called(module: nn.Module) -> list[str]:
    """Paths of the children that hold parameters, in the order of their calls; empty if that is not known."""
    graph = trace(module)
    if graph is None:
        return []
    return [str(node.target) for node in graph.nodes if node.op == "call_module"
            and next(module.get_submodule(str(node.target)).parameters(), None) is not None]


def halves(block: nn.Module) -> dict[str, str]:
    """Where a block computes output = input + attention + feed-forward: the child that yields each summand.

    Keys are "attention" and "feed_forward", values are paths.

    Empty where the output is no such sum, as in layers that normalise after adding. Dropout is seen
    through: it adds nothing when a model is evaluated.
    """
    graph = trace(block)
    if graph is None:
        return {}
    nodes = list(graph.nodes)
    output = _first(nodes[-1].args[0])
    found: dict[str, str] = {}
    summands = list(_summands(output))
    if summands.count(nodes[0]) != 1:
        return {}
    for summand in summands:
        if summand is nodes[0]:
            continue
        child = _source(summand, block)
        half = "attention" if any(_attends(node, block) for node in _cone(summand)) else "feed_forward"
        if child is None or half in found:
            return {}
        found[half] = child
    return found if "attention" in found else {}


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, (tuple, list)) and value else value


def _is_sum(node: Any) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    return (node.op == "call_function" and node.target in SUMS) or (node.op, node.target) == METHOD_SUM


def _summands(node: Any) -> Iterator[Any]:
    if getattr(node, "op", None) and _is_sum(node):
        for arg in node.args:
            yield from _summands(arg)
    else:
        yield node


def _source(node: Any, block: nn.Module) -> str | None:
    """The child whose (first) output `node` is, or None."""
    while getattr(node, "op", None):
        if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
            node = node.args[0]
        elif node.op == "call_module":
            if not TRANSPARENT.search(type(block.get_submodule(str(node.target))).__name__):
                return str(node.target)
            node = node.args[0]
        else:
            return None
    return None


def _cone(node: Any) -> Iterator[Node]:
    """`node` and what it is computed from, back to the residual stream."""
    if getattr(node, "op", None) and not _is_sum(node):
        yield node
        for before in node.all_input_nodes:
            yield from _cone(before)


def _attends(node: Node, block: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    kind = type(block.get_submodule(str(node.target))).__name__
    return bool(ATTENTION.search(kind)) and "norm" not in kind.lower()
