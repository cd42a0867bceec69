"""What predictions feel of an error in a channel: the divergence that such an error causes."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.measure.sensitivity import stream_sensitivity
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize

TOKENS = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(3)


def moved(stack: DecoderStack, layer: int, error_C: torch.Tensor) -> float:
    """KL from the original's predictions, nats per prediction, of random errors of this size behind a layer."""
    generator, found = torch.Generator().manual_seed(1), 0.0
    state = stack.run(stack.start(TOKENS), slice(0, layer + 1))
    end = slice(layer + 1, len(stack))
    was = stack.finish(stack.run(state, end))[:, :-1].log_softmax(-1)
    for _ in range(16):
        noise_BTC = torch.randn(state.hidden.shape, generator=generator) * error_C
        now = stack.finish(stack.run(state.moved(state.hidden + noise_BTC, layer + 1), end))[:, :-1].log_softmax(-1)
        found += float((was.exp() * (was - now)).sum(-1).mean()) / 16
    return found


def test_errors_of_channels_diverge_as_predicted(stack: DecoderStack) -> None:
    """Of all channels alike, of those felt least, and of those felt most."""
    felt = stream_sensitivity(stack, TOKENS, draws=64)
    assert len(felt) == 3 and felt[0].shape == (stack.spec.hidden,)
    for layer, felt_C in enumerate(felt):
        order_C = felt_C.argsort()
        for some_C in (order_C, order_C[:8], order_C[-8:]):
            error_C = torch.zeros_like(felt_C)
            error_C[some_C] = 0.02
            predicted = float((felt_C * error_C.square()).sum()) / 2
            assert moved(stack, layer, error_C) == pytest.approx(predicted, rel=0.25)


def test_draws_are_seeded_and_agree(stack: DecoderStack) -> None:
    one, same, other = (stream_sensitivity(stack, TOKENS, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0]) and torch.corrcoef(torch.stack([one[0], other[0]]))[0, 1] > 0.5


def test_padding_moves_nothing(stack: DecoderStack) -> None:
    """Padding behind the text adds no prediction and no gradient."""
    mask_BT = torch.ones(4, 40, dtype=torch.bool)
    mask_BT[:, 32:] = False
    padded = torch.nn.functional.pad(TOKENS, (0, 8))
    plain = stream_sensitivity(stack, TOKENS)
    with_padding = stream_sensitivity(stack, [{"input_ids": padded, "attention_mask": mask_BT}])
    for a, b in zip(plain, with_padding, strict=True):
        assert torch.allclose(a, b, rtol=1e-3)


def test_packed_layers_have_no_gradient(stack: DecoderStack) -> None:
    block = Quantize(8, 16).apply(stack.block(1), stack.spec.rows[1])
    with stack.swap(1, block), pytest.raises(BadOption, match="packed"):
        stream_sensitivity(stack, TOKENS)
