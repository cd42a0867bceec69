"""Calls of layers are intercepted without a trace, and passes that do not fit the table are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadModel, BadOption
from layerwise.stack import ModuleStack
from layerwise.stack.replay import Passing, intercepted


class Order(nn.Module):
    """Three linear layers, called in any order."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.blocks[index](x)
        return x


# intercepting -----------------------------------------------------------------------------------


def test_an_intercepted_module_keeps_its_identity() -> None:
    layer = nn.Linear(2, 3)
    seen: list[Any] = []

    def handler(x: Tensor) -> Tensor:
        seen.append(type(layer))
        result: Tensor = layer(x) + 1
        return result

    x = torch.randn(1, 2)
    expected = layer(x) + 1
    with intercepted({layer: handler}):
        assert isinstance(layer, nn.Linear) and layer.out_features == 3 and type(layer).__name__ == "Linear"
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert seen == [nn.Linear] * 2, "inside its handler a module is itself"
    assert type(layer) is nn.Linear and "_layerwise_handler" not in layer.__dict__


def test_interception_ends_with_an_exception() -> None:
    layers = [nn.Linear(2, 2), nn.ReLU()]

    def fail(x: Tensor) -> Tensor:
        raise KeyError("stop")

    with pytest.raises(KeyError), intercepted(dict.fromkeys(layers, fail)):
        layers[0](torch.zeros(1, 2))
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU]


def test_running_slices_leaves_nothing_behind(make: Callable[[str], Any]) -> None:
    network = make("vit")
    stack = ModuleStack(network.module)
    kept = [(type(m), sorted(m.__dict__)) for m in network.module.modules()]
    state = stack.run(network.call(stack.start), slice(1, 3))
    stack.finish(state)
    with pytest.raises(RuntimeError):
        stack.run(state.moved(torch.zeros(1, 1, 3), 3))
    assert [(type(m), sorted(m.__dict__)) for m in network.module.modules()] == kept


def test_layers_outside_the_slice_do_not_compute(make: Callable[[str], Any]) -> None:
    network = make("stages")
    stack = ModuleStack(network.module)
    ran: list[int] = []
    for layer in range(len(stack)):
        conv: Any = stack.block(layer).conv1
        conv.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    state = stack.run(network.call(stack.start), slice(0, 3))
    assert ran == [0, 1, 2]
    state = stack.run(state)
    assert ran == [0, 1, 2, 3, 4, 5]
    stack.finish(state)
    assert ran == [0, 1, 2, 3, 4, 5]


def test_a_forward_pass_that_catches_errors_is_still_cut_off() -> None:
    class Careful(Order):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return x

    stack = ModuleStack(Careful((0, 1, 2)))
    x = torch.randn(1, 4)
    assert torch.equal(stack.run(stack.start(x), slice(0, 2)).hidden, stack.block(1)(stack.block(0)(x)))


def test_glue_may_change_outputs_in_place_and_use_them_later(make: Callable[[str], Any]) -> None:
    network = make("skip_connections")
    stack = ModuleStack(network.module)
    state = stack.run(network.call(stack.start), slice(0, 4))
    kept = [output[0].clone() for output in state.shared.outputs]
    stack.finish(stack.run(state))
    assert all(torch.equal(a, b[0]) for a, b in zip(kept, state.shared.outputs, strict=True))


def test_a_block_may_change_its_input_in_place() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(3)))
    stack = ModuleStack(module)
    x = torch.randn(2, 4)
    expected = module(x.clone())
    state = stack.run(stack.start(x.clone()), slice(0, 1))
    kept = state.hidden.clone()
    assert torch.equal(stack.finish(stack.run(state)), expected)
    assert torch.equal(state.hidden, kept)


def test_what_a_state_holds_at_the_end_is_what_the_tail_gets(make: Callable[[str], Any]) -> None:
    network = make("sequential")
    stack = ModuleStack(network.module)
    state = stack.run(network.call(stack.start))
    assert torch.equal(stack.finish(state.moved(-state.hidden, 4)), network.module[4](-state.hidden))


# passes that do not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "message"), [
    ((0, 2, 1), r"layer 2 \(blocks\.2\) came, not layer 1 \(blocks\.1\)"),
    ((0, 1, 0, 2), r"layer 0 \(blocks\.0\) came, not layer 2"),
    ((0, 1, 2, 2), r"layer 2 \(blocks\.2\) came, not its end"),
    ((0, 1), r"its end came, not layer 2"),
])
def test_another_order_is_refused(order: tuple[int, ...], message: str) -> None:
    stack = ModuleStack(Order(order))
    x = torch.randn(1, 4)
    assert torch.equal(stack(x), stack.root(x)), "the whole can still run, be captured and edited"
    with pytest.raises(BadModel, match=message):
        stack.finish(stack.run(stack.start(x)))


def test_the_order_can_be_given() -> None:
    module = Order((0, 2, 1))
    stack = ModuleStack(module, blocks=["blocks.0", "blocks.2", "blocks.1"])
    x = torch.randn(1, 4)
    assert torch.equal(stack.finish(stack.run(stack.start(x))), module(x))


# leaving out ------------------------------------------------------------------------------------


class Several(nn.Module):
    """Returns what a later layer needs beside its hidden tensor."""

    calls = 0

    def forward(self, x: Tensor, wide: bool = False) -> Any:
        self.calls += 1
        return (x * 2, x.mean()) if wide else (x * 2, None)


def test_a_layer_that_returns_more_runs_for_the_rest() -> None:
    block = Several()
    passing = Passing(block, "block", {})
    x = torch.randn(2, 3)
    for _ in range(3):
        hidden, none = passing(x)
        assert torch.equal(hidden, x) and none is None
    assert block.calls == 1
    for _ in range(3):
        hidden, mean = passing(x, wide=True)
        assert torch.equal(hidden, x) and torch.equal(mean, x.mean())
    assert block.calls == 4


def test_passing_hands_on_a_copy() -> None:
    passing = Passing(nn.ReLU(inplace=True), "relu", {})
    x = torch.tensor([-1.0, 1.0])
    passing(x.clone())
    y = passing(x)
    assert torch.equal(x, torch.tensor([-1.0, 1.0])) and torch.equal(y, x) and y is not x


def test_a_layer_that_changes_the_shape_is_named() -> None:
    with pytest.raises(BadOption, match=r"body\.3, which changes the shape from \(1, 4\) to \(1, 2\)"):
        Passing(nn.Linear(4, 2), "body.3", {})(torch.zeros(1, 4))
