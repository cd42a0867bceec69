"""The loss is that of decoding through the kept layers, and the system runs from end to end."""

from __future__ import annotations

import pytest
import torch

from layerwise.generate.sample import next_logits
from layerwise.stack.decoder import Caches
from layerwise.systems.generate.unified_layer_skipping import CLAIMED, LENGTH, PROMPT, RULES, response_losses
from layerwise.testing import check_system
from layerwise.testing.stacks import random_stack


def test_the_loss_is_that_of_decoding_through_the_kept_layers() -> None:
    stack, layers = random_stack(4), (0, 3)
    tokens_BT = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    caches: Caches = {}
    logits = [next_logits(stack, tokens_BT[:, :PROMPT], caches)]
    for place in range(PROMPT, LENGTH - 1):
        logits.append(next_logits(stack, tokens_BT[:, place : place + 1], caches, layers))
    chances_BTV = torch.stack(logits, 1).log_softmax(-1)
    expected_BT = -chances_BTV.gather(-1, tokens_BT[:, PROMPT:, None])[..., 0]
    torch.testing.assert_close(response_losses(stack, tokens_BT, layers), expected_BT, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small")
def test_it_runs() -> None:
    quality, served, speed = check_system("unified-layer-skipping")
    assert quality.measured["layers"] == [*range(0, 27, 2), 29]
    assert set(quality.control) == {*RULES, "all layers"} - {"unified"}
    assert set(speed.measured) == {"2x", "3x"} == set(speed.control["predicted speed-up"])
    assert quality.holds is speed.holds is None
    assert served.holds is True and served.measured["tokens as in plain passes"] == 1.0


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_full_heals_the_rules_alike() -> None:
    two, three, _, speed = check_system("unified-layer-skipping", "full")
    for check in (two, three):
        assert {"before healing", "after"} <= set(check.measured)
        assert all(set(check.control[rule]) == {"before healing", "after"} for rule in CLAIMED[1:])
    assert set(two.control["random"]) == {"before healing", "after"} != set(three.control["random"])
    assert speed.holds is not None


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("unified-layer-skipping")
