"""Looking and editing: what each edit does, and that nothing of it stays, on decoders and on modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.stack import DecoderStack, ModuleStack, Stack
from layerwise.stack.base import first_tensor, replace_first
from layerwise.stack.decoder import HOOKS

Run = Callable[[], Tensor]


@pytest.fixture(params=["decoder", "vit", "bert", "t5", "stages", "skip_connections"])
def opened(request: pytest.FixtureRequest, make: Callable[[str], Any], main: Callable[[Any], Tensor],
           tiny_stack: DecoderStack) -> tuple[Stack, Run]:
    """A stack, and a function that runs it and returns its output."""
    if request.param == "decoder":
        tokens_BT = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(0))
        return tiny_stack, lambda: tiny_stack(tokens_BT)
    network = make(request.param)
    stack = ModuleStack(network.module)
    return stack, lambda: main(network.call(stack))


def modules(stack: Stack) -> list[nn.Module]:
    root: nn.Module = stack.decoder if isinstance(stack, DecoderStack) else stack.root  # type: ignore[attr-defined]
    return list(root.modules())


def traces(stack: Stack) -> list[Any]:
    """What an edit could leave behind: hooks, another class, instance attributes."""
    return [(id(m), type(m), sorted(m.__dict__), *(dict(getattr(m, name)) for name in HOOKS))
            for m in modules(stack)]


EDITS: dict[str, Callable[[Stack], AbstractContextManager[Any]]] = {
    "skip": lambda stack: stack.skip(1),
    "zero": lambda stack: stack.zero(1, "output"),
    "noise": lambda stack: stack.noise(1, "input", 0.5),
    "patch": lambda stack: stack.patch(1, "output", torch.tensor(2.0), slice(0, 2)),
    "swap": lambda stack: stack.swap(0, stack.block(1)),
    "edit": lambda stack: stack.edit(1, "output", torch.neg),
    "capture": lambda stack: stack.capture("input", "output"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_ends_with_its_context(opened: tuple[Stack, Run], name: str) -> None:
    stack, run = opened
    before, kept = run(), traces(stack)
    with EDITS[name](stack):
        assert torch.equal(run(), before) == (name == "capture")
    assert traces(stack) == kept
    assert torch.equal(run(), before)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_ends_with_an_exception(opened: tuple[Stack, Run], name: str) -> None:
    stack, run = opened
    before, kept = run(), traces(stack)

    def fail(_: Tensor) -> Tensor:
        raise KeyError("inside the forward pass")

    with pytest.raises(KeyError, match="inside"), EDITS[name](stack), stack.edit(0, "output", fail):
        run()
    assert traces(stack) == kept
    assert torch.equal(run(), before)


def test_nested_edits_end_in_turn(opened: tuple[Stack, Run]) -> None:
    stack, run = opened
    whole = run()
    with stack.skip(1):
        once = run()
        with stack.skip(1), stack.zero(2, "output"):
            run()
        assert torch.equal(run(), once)
    assert torch.equal(run(), whole)


# what each edit does ----------------------------------------------------------------------------


def test_an_output_is_the_next_input(tiny_stack: DecoderStack) -> None:
    with tiny_stack.capture("input", "output") as seen:
        tiny_stack(torch.tensor([[1, 2, 3]]))
    for layer in range(3):
        assert torch.equal(seen[layer, "output"], seen[layer + 1, "input"])


def test_what_was_seen_stays_when_glue_changes_it_in_place(make: Callable[[str], Any]) -> None:
    network = make("children")
    stack = ModuleStack(network.module)
    with stack.capture("output", layers=range(1)) as seen:
        network.call(stack)
    assert torch.equal(seen[0, "output"], network.module.conv1(*network.args))
    assert bool((seen[0, "output"] < 0).any()), "the in-place ReLU behind the layer would have removed these"


def test_gradients_reach_what_was_seen(opened: tuple[Stack, Run]) -> None:
    stack, run = opened
    for parameter in (p for module in modules(stack) for p in module.parameters()):
        parameter.requires_grad_(True)
    with stack.capture("input", "output") as seen:
        loss = run().square().mean()
    gradients = torch.autograd.grad(loss, [seen[layer, "output"] for layer in range(len(stack))])
    assert all(bool(gradient.any()) for gradient in gradients)


def test_a_zeroed_output_enters_the_next_layer(opened: tuple[Stack, Run]) -> None:
    stack, run = opened
    with stack.zero(0, "output"), stack.capture("output", layers=range(1)) as seen:
        run()
    assert not bool(seen[0, "output"].any())


def test_noise_is_the_same_for_the_same_seed(opened: tuple[Stack, Run]) -> None:
    stack, run = opened
    outputs = []
    for seed in (3, 3, 4):
        with stack.noise(1, "input", 0.1, seed=seed):
            outputs.append(run())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_noise_has_the_given_size(tiny_stack: DecoderStack) -> None:
    tokens_BT = torch.randint(97, (4, 64), generator=torch.Generator().manual_seed(0))
    with tiny_stack.capture("input", layers=range(1)) as clean:
        tiny_stack(tokens_BT)
    with tiny_stack.noise(0, "input", 0.25), tiny_stack.capture("input", layers=range(1)) as noisy:
        tiny_stack(tokens_BT)
    assert float((noisy[0, "input"] - clean[0, "input"]).std()) == pytest.approx(0.25, rel=0.05)


def test_patching_everything_carries_the_run_over(opened: tuple[Stack, Run]) -> None:
    stack, run = opened
    with stack.capture("output") as clean:
        expected = run()
    last = len(stack) - 1
    with stack.noise(0, "output", 1.0):
        noisy = run()
        with stack.patch(last, "output", clean[last, "output"]):
            patched = run()
    assert not torch.equal(noisy, expected)
    if stack.name != "T5ForConditionalGeneration":  # there the encoder's output reaches every decoder layer
        assert torch.equal(patched, expected)


def test_patching_some_positions_leaves_the_others(tiny_stack: DecoderStack) -> None:
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    value_BTC = torch.ones(1, 2, 32)
    with tiny_stack.capture("output", layers=range(1, 2)) as clean:
        tiny_stack(tokens_BT)
    with tiny_stack.patch(1, "output", value_BTC, slice(1, 3)), \
            tiny_stack.capture("output", layers=range(1, 2)) as seen:
        tiny_stack(tokens_BT)
    assert torch.equal(seen[1, "output"][:, 1:3], value_BTC)
    assert torch.equal(seen[1, "output"][:, [0, 3]], clean[1, "output"][:, [0, 3]])


def test_an_edit_acts_once_where_a_run_is_cut(make: Callable[[str], Any],
                                              main: Callable[[Any], Tensor]) -> None:
    """At every cut, the edited site is neither seen twice nor missed."""
    network = make("vit")
    stack = ModuleStack(network.module)
    with stack.edit(2, "input", lambda x: x + 1), stack.edit(1, "output", lambda x: x * 2):
        expected = main(network.call(stack))
        for cut in range(5):
            state = stack.run(network.call(stack.start), slice(0, cut))
            assert torch.equal(main(stack.finish(stack.run(state))), expected)


# values -----------------------------------------------------------------------------------------


def test_the_first_tensor_of_any_output() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert first_tensor((None, x, y)) is x and first_tensor({"a": 1, "b": y}) is y
    assert replace_first((None, x, y), y) == (None, y, y)
    assert replace_first({"a": 1, "b": x}, y) == {"a": 1, "b": y}
    pair = torch.return_types.max  # type: ignore[attr-defined]
    assert isinstance(replace_first(torch.max(torch.ones(2, 2), 0), y), pair)
    for value in (None, (), (1, "a"), 3):
        with pytest.raises(BadOption, match="without a tensor"):
            first_tensor(value)
