"""Taylor: against torch's own backward through the whole model, and what it must leave alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadModel, BadOption
from layerwise.measure.engine import measure
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize


def reference(stack: DecoderStack, tokens_NT: Tensor) -> list[float]:
    """One autograd graph over all layers and rows, in float64."""
    twin = stack.copied(torch.float32)
    twin.decoder.double().requires_grad_(True)
    logits_NTV = twin(tokens_NT)
    F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), tokens_NT[:, 1:].flatten()).backward()
    return [sum(float((p.detach() * p.grad).abs().sum()) for p in layer.parameters() if p.grad is not None)
            for layer in twin.decoder.layers]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equals_plain_autograd(stack: DecoderStack, tokens_NT: Tensor, batch: int) -> None:
    found = measure(stack, tokens_NT, "taylor", batch=batch, progress=False)["taylor"].values
    assert found == pytest.approx(reference(stack, tokens_NT), rel=2e-4)  # float32 against float64


def test_padding_does_not_matter(stack: DecoderStack, tokens_NT: Tensor) -> None:
    padded_NT = F.pad(tokens_NT, (0, 6), value=5)
    mask_NT = torch.arange(22).expand(5, 22) < 16
    found = measure(stack, [(padded_NT, mask_NT)], "taylor", progress=False)["taylor"].values
    assert found == pytest.approx(reference(stack, tokens_NT), rel=2e-4)


def test_bfloat16_sums_gradients_in_float32(tokens_NT: Tensor) -> None:
    stack = random_stack(dtype="bfloat16")
    found = measure(stack, tokens_NT, "taylor", batch=1, progress=False)["taylor"].values
    assert found == pytest.approx(reference(stack, tokens_NT), rel=0.05)  # bfloat16 activations


def test_mapped_weights_stay_as_they_are(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path) -> None:
    stack.save(tmp_path / "model")
    mapped = open(tmp_path / "model", stream=False)
    before = copy.deepcopy(mapped.decoder.state_dict())  # type: ignore[attr-defined]
    with torch.inference_mode():
        found = measure(mapped, tokens_NT, "taylor", batch=2, progress=False)["taylor"].values
    assert found == measure(stack, tokens_NT, "taylor", batch=2, progress=False)["taylor"].values
    parameters = mapped.decoder.named_parameters()  # type: ignore[attr-defined]
    assert not any(p.requires_grad or p.grad is not None for _, p in parameters)
    assert all(torch.equal(before[name], p) for name, p in mapped.decoder.named_parameters())  # type: ignore[attr-defined]


def test_flags_come_back_after_a_failure(stack: DecoderStack, tokens_NT: Tensor) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)

        def forward(self, x: Tensor, *shared: object) -> Tensor:
            return x * self.scale if not torch.is_grad_enabled() else (x - x).sqrt() * self.scale + x

    broken = Broken()
    with stack.swap(1, broken), pytest.raises(BadModel, match="below layer 1"):
        measure(stack, tokens_NT, "taylor", progress=False)
    assert not broken.scale.requires_grad


def test_packed_layers_have_no_gradient(stack: DecoderStack, tokens_NT: Tensor) -> None:
    packed = Quantize(8).apply(stack.block(3), stack.spec.rows[3])
    with stack.swap(3, packed), pytest.raises(BadOption, match="layer 3"):
        measure(stack, tokens_NT, "taylor", progress=False)
