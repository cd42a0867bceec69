"""Trials and gradients in modules that are no decoder: equal to starting over, labels where they are needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data.module import Call, labelled
from layerwise.errors import BadData, BadModel
from layerwise.measure.criticality import Criticality
from layerwise.measure.engine import lacking, measure, supported
from layerwise.measure.skip_effect import relative_change
from layerwise.nets.initial import redrawn
from layerwise.stack.module import ModuleStack

Data = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Four residual blocks; `classes` outputs, or the states themselves for 0."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.Sequential(*[Block(8) for _ in range(4)])
        self.head = nn.Linear(8, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.blocks(self.stem(x)))


@pytest.fixture(scope="module")
def net() -> ModuleStack:
    torch.manual_seed(0)
    return ModuleStack(Net().eval().requires_grad_(False))


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 5, generator=generator), torch.arange(6) % 3) for _ in range(2)]


def joined(data: Data) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def loss(stack: ModuleStack, data: Data) -> float:
    x_NI, y_N = joined(data)
    return float(F.cross_entropy(stack(x_NI).double(), y_N))


# trials ---------------------------------------------------------------------------------------------


def test_leave_one_out_equals_starting_over(net: ModuleStack, data: Data) -> None:
    expected = []
    for layer in range(len(net)):
        with net.skip(layer):
            expected.append(loss(net, data))
    found = measure(net, data, "leave-one-out", progress=False)["leave-one-out"].values
    assert found == pytest.approx([value - loss(net, data) for value in expected], abs=2e-6)


def test_skip_effect_equals_starting_over_and_needs_no_labels(net: ModuleStack, data: Data) -> None:
    x_NI, _ = joined(data)
    expected = []
    for layer in range(len(net)):
        with net.skip(layer):
            expected.append(net(x_NI))
    whole = net(x_NI)
    found = measure(net, [x for x, _ in data], "skip-effect", progress=False)["skip-effect"].values
    assert found == pytest.approx([relative_change(whole, changed) for changed in expected], rel=1e-5)


def test_relative_change_by_hand() -> None:
    y_PC = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_change(y_PC, torch.tensor([[3.0, 9.0], [7.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)


def test_drawing_layers_anew_changes_decisions_and_no_weights(data: Data) -> None:

    net = ModuleStack(Net().eval().requires_grad_(False))
    before = copy.deepcopy(net.root.state_dict())
    found = measure(net, data, Criticality(draws=2), progress=False)["criticality"].values
    assert all(0 < value < 1 for value in found)
    assert all(torch.equal(value, before[name]) for name, value in net.root.state_dict().items())


def test_redrawing_follows_the_seed_and_leaves_the_block_and_the_global_generator_alone() -> None:
    block = Block(4)
    kept = block.linear.weight.clone()
    state = torch.get_rng_state()
    one, two, three = (redrawn(block, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(block.linear.weight, kept)
    assert torch.equal(one.linear.weight, two.linear.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(one.linear.weight, three.linear.weight)  # type: ignore[union-attr, arg-type]


def test_a_layer_that_changes_the_shape_has_no_value(data: Data) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*[nn.Linear(a, b) for a, b in ((5, 8), (8, 8), (8, 3))])

        def forward(self, x: Tensor) -> Any:
            return self.blocks(x)

    stack = ModuleStack(Wide(), blocks=["blocks.0", "blocks.1", "blocks.2"])
    first, second, third = measure(stack, data, "leave-one-out", progress=False)["leave-one-out"].values
    assert first != first and third != third and second == second


def test_a_killed_sweep_of_other_data_is_not_taken_up(net: ModuleStack, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    measure(net, data, "leave-one-out", progress=False, resume=path)
    lines = path.read_bytes().count(b"\n")
    measure(net, data, "leave-one-out", progress=False, resume=path)
    assert path.read_bytes().count(b"\n") == lines
    measure(net, data[:1], "leave-one-out", progress=False, resume=path)
    assert path.read_bytes().count(b"\n") == 2 * lines


# gradients ------------------------------------------------------------------------------------------


def test_taylor_equals_plain_autograd_whatever_the_batches(net: ModuleStack, data: Data) -> None:
    twin = copy.deepcopy(net.root).double().requires_grad_(True)
    x_NI, y_N = joined(data)
    F.cross_entropy(twin(x_NI.double()), y_N).backward()
    expected = [sum(float((p.detach() * p.grad).abs().sum()) for p in block.parameters() if p.grad is not None)
                for block in twin.blocks]  # type: ignore[union-attr]
    for batches in (data, [joined(data)]):
        assert measure(net, batches, "taylor", progress=False)["taylor"].values == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for p in net.root.parameters())


# labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taylor", "leave-one-out", "criticality"])
def test_labels_are_asked_for_where_they_are_needed(net: ModuleStack, data: Data, name: str) -> None:
    bare = [x for x, _ in data]
    with pytest.raises(BadData, match="without labels"):
        measure(net, bare, name, progress=False)
    with pytest.raises(BadData, match="single class"):
        measure(net, [(x, torch.ones_like(y)) for x, y in data], name, progress=False)
    assert supported(net, [name, "skip-effect"], bare) == ["skip-effect"]
    assert "labels" in str(lacking(net, name, bare)) and lacking(net, name, data) is None


@pytest.mark.parametrize("name", ["taylor", "leave-one-out"])
def test_outputs_of_a_single_class_are_refused(data: Data, name: str) -> None:
    with pytest.raises(BadModel, match="two classes"):
        measure(ModuleStack(Net(1)), data, name, progress=False)
    assert supported(ModuleStack(Net(1)), [name, "skip-effect"], data) == ["skip-effect"]


@pytest.mark.parametrize("name", ["taylor", "leave-one-out"])
@pytest.mark.parametrize("batch", [0, 1])
def test_labels_of_classes_that_the_model_does_not_have(net: ModuleStack, data: Data, name: str, batch: int) -> None:
    wrong = [(x, y + 3 * (place == batch)) for place, (x, y) in enumerate(data)]
    with pytest.raises(BadData, match=r"labels from \d to 5 for the 3 classes"):
        measure(net, wrong, name, progress=False)


def test_what_counts_as_labels() -> None:
    class Timed(nn.Module):
        def forward(self, x: Tensor, step_B: Tensor) -> Tensor:
            return x

    x, y = torch.randn(4, 5), torch.arange(4)
    assert labelled(Call((x, y)), Net()).args == (x,) and labelled(Call((x, y)), Net()).labels_B is y
    assert labelled(Call((x, y)), Timed()) == Call((x, y))
    assert labelled(Call(kwargs={"x": x, "labels": y}), Net()).kwargs == {"x": x}
    assert labelled(Call((x, y[:3])), Net()).labels_B is None
