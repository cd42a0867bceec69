"""Gradient times activation: what follows from the loss by hand, torch's own backward, and what must not matter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.engine import lacking, measure
from layerwise.measure.gradient_times_activation import GradientTimesActivation
from layerwise.measure.partial import Partial, merged, partial
from layerwise.measure.scores import Scores
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.testing.instruments import check_instrument
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize

NAME = "gradient-times-activation"
CHANGE = f"{NAME}:change"


class Net(nn.Module):
    """Two residual blocks between a stem and a head, so that what enters a block is no leaf."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def reference(stack: DecoderStack, tokens_NT: Tensor) -> tuple[list[float], list[float]]:
    """One autograd graph over all layers and rows, in float64: of states, and of what layers add."""
    twin = stack.copied(torch.float32)
    twin.decoder.double()
    state = twin.start(tokens_NT)
    states = [state.hidden.requires_grad_(True)]
    for layer in range(len(twin)):
        state = twin.run(state, slice(layer, layer + 1))
        states.append(state.hidden)
    logits_NTV = twin.finish(state)
    loss = F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), tokens_NT[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, states[1:])
    states = [state.detach() for state in states]
    pairs = list(zip(gradients, states[1:], states[:-1], strict=True))
    return ([float((g * h).sum(-1).abs().mean()) for g, h, _ in pairs],
            [float((g * (h - x)).sum(-1).abs().mean()) for g, h, x in pairs])


def test_it_is_the_loss_itself_where_the_loss_is_linear() -> None:
    """With logits (a, 0) and a far below 0, the loss of class 0 is -a, whose gradient times h is -a again.

    The loss of class 1 is nothing then. What leaves the last layer is made of ones.
    """
    net = Net(classes=2).requires_grad_(False)
    net.head.weight.copy_(torch.stack([-10 * torch.ones(4), torch.zeros(4)]))
    net.head.bias.zero_()
    for block in net.blocks:
        block[0].weight.zero_()  # type: ignore[index, union-attr, operator]
        block[0].bias.fill_(50.0)  # type: ignore[index, union-attr, operator]
    stack = ModuleStack(net.eval())
    found = measure(stack, [(torch.zeros(2, 5), torch.tensor([0, 1]))], NAME, progress=False)[NAME].values
    assert found[-1] == pytest.approx((40 + 0) / 2, rel=1e-6)
    assert found[0] == 0  # tanh is flat there: nothing before it matters


def test_the_last_states_of_a_decoder_have_none(stack: DecoderStack, tokens_NT: Tensor) -> None:
    """The final norm undoes their length, so moving along them changes nothing."""
    found = measure(stack, tokens_NT, NAME, progress=False)
    assert found[NAME].values[-1] == pytest.approx(0, abs=1e-3 * max(found[NAME].values))
    assert found[NAME].important is None and found[CHANGE].important == "high"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equals_plain_autograd(stack: DecoderStack, tokens_NT: Tensor, batch: int) -> None:
    found = measure(stack, tokens_NT, NAME, batch=batch, progress=False)
    states, changes = reference(stack, tokens_NT)
    assert found[NAME].values == pytest.approx(states, rel=2e-4, abs=1e-5)  # float32 against float64
    assert found[CHANGE].values == pytest.approx(changes, rel=2e-4)


def test_padding_does_not_matter(stack: DecoderStack, tokens_NT: Tensor) -> None:
    padded_NT = F.pad(tokens_NT, (0, 6), value=5)
    mask_NT = torch.arange(22).expand(5, 22) < 16
    found = measure(stack, [(padded_NT, mask_NT)], NAME, progress=False)[CHANGE].values
    assert found == pytest.approx(reference(stack, tokens_NT)[1], rel=2e-4)


def test_bfloat16_stays_near(tokens_NT: Tensor) -> None:
    stack = random_stack(dtype="bfloat16")
    found = measure(stack, tokens_NT, NAME, batch=1, progress=False)[CHANGE].values
    assert found == pytest.approx(reference(stack, tokens_NT)[1], rel=0.1)  # bfloat16 activations


def test_the_contract() -> None:
    check_instrument(GradientTimesActivation())


def test_parts_add_up_to_the_whole_through_files(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path) -> None:
    whole: Scores = measure(stack, tokens_NT, NAME, batch=1, progress=False)
    paths = [partial(stack, rows_NT, NAME, batch=1, progress=False).save(tmp_path / f"{place}")
             for place, rows_NT in enumerate((tokens_NT[:2], tokens_NT[2:]))]
    found = merged([Partial.load(path) for path in paths])
    for name in (NAME, CHANGE):
        assert found[name].values == pytest.approx(whole[name].values, rel=1e-12)


def test_it_shares_a_call_with_gradients_of_weights(stack: DecoderStack, tokens_NT: Tensor) -> None:
    both = measure(stack, tokens_NT, ["taylor", NAME], progress=False)
    for name in ("taylor", NAME, CHANGE):
        alone = measure(stack, tokens_NT, name.split(":")[0], progress=False)
        assert both[name].values == alone[name].values


def test_a_classifier_equals_plain_autograd_and_needs_labels() -> None:
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    x_NI, y_N = torch.randn(6, 5), torch.arange(6) % 3
    twin = copy.deepcopy(net).double()
    states = [twin.stem(x_NI.double()).requires_grad_(True)]
    for block in twin.blocks:
        states.append(block(states[-1]))
    gradients = torch.autograd.grad(F.cross_entropy(twin.head(states[-1]), y_N, reduction="sum"), states[1:])
    expected = [float((g * h.detach()).sum(-1).abs().mean()) for g, h in zip(gradients, states[1:], strict=True)]
    stack = ModuleStack(net)
    for data in ([(x_NI, y_N)], [(x_NI[:2], y_N[:2]), (x_NI[2:], y_N[2:])]):
        assert measure(stack, data, NAME, progress=False)[NAME].values == pytest.approx(expected, rel=1e-4)
    assert "labels" in str(lacking(stack, NAME, [x_NI]))


def test_every_place_of_a_picture_counts_as_a_token() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1),
                        nn.Flatten(), nn.Linear(32, 3)).eval().requires_grad_(False)
    x_NI, y_N = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    h = net[:2](x_NI).requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(net[2:](h), y_N, reduction="sum"), h)
    stack = ModuleStack(net, blocks=["0", "1", "2"])
    found = measure(stack, [(x_NI, y_N)], NAME, progress=False)
    assert found[NAME].values[1] == pytest.approx(float((g * h.detach()).sum(1).abs().mean()), rel=1e-4)
    assert found[CHANGE].values[0] != found[CHANGE].values[0]  # other channels enter than leave


def test_what_it_cannot_have_is_refused(stack: DecoderStack, tokens_NT: Tensor) -> None:
    packed = Quantize(8).apply(stack.block(3), stack.spec.rows[3])
    with stack.swap(3, packed), pytest.raises(BadOption, match="layer 3"):
        measure(stack, tokens_NT, NAME, progress=False)
    with pytest.raises(BadData, match="one token"):
        measure(stack, tokens_NT[:, :1], NAME, progress=False)


def test_the_layer_that_breaks_a_gradient_is_named(stack: DecoderStack, tokens_NT: Tensor) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, *shared: object) -> Tensor:
            return x if not torch.is_grad_enabled() else (x - x).sqrt() + x

    with stack.swap(1, Broken()), pytest.raises(BadModel, match="below layer 1"):
        measure(stack, tokens_NT, NAME, progress=False)
