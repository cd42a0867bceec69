"""On a real model: what instruments see is what transformers computes."""

from __future__ import annotations

import pytest
import torch

from layerwise.measure.engine import measure
from layerwise.stack.open import open


@pytest.mark.real
def test_influence_and_lens_of_smollm2_equal_transformers() -> None:
    from transformers import AutoModelForCausalLM

    stack = open("smollm2", dtype="float32")
    tokens_NT = torch.randint(1000, 40000, (2, 24), generator=torch.Generator().manual_seed(0))
    found = measure(stack, tokens_NT, ["block-influence", "logit-lens-kl"], lens_tokens=24, progress=False)
    model = AutoModelForCausalLM.from_pretrained(stack.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(tokens_NT, output_hidden_states=True)
        final = output.logits.double().log_softmax(-1)
        entering = output.hidden_states[:-1]  # the last one has passed the final norm
        for layer in (0, 10, 20, 28):
            x, y = entering[layer].double(), entering[layer + 1].double()
            influence = float((1 - torch.cosine_similarity(x, y, -1)).mean())
            lens = model.lm_head(model.model.norm(entering[layer])).double().log_softmax(-1)
            kl = float((lens.exp() * (lens - final)).sum(-1).mean())
            assert found["block-influence"].values[layer] == pytest.approx(influence, abs=1e-5)
            assert found["logit-lens-kl"].values[layer] == pytest.approx(kl, rel=1e-3)
