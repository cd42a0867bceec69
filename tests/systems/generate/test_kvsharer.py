"""Distances against loops, the search against its rules, and the system from end to end."""

from __future__ import annotations

import pytest
import torch

from layerwise.stack.decoder import Caches
from layerwise.systems.generate.kvsharer import distances, flattened, search, sharing
from layerwise.testing import check_system
from layerwise.testing.stacks import random_stack

TOKENS_BT = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(0))


def test_distances_are_mean_norms_between_mean_caches() -> None:
    stack = random_stack(3)
    caches: Caches = {}
    stack.run(stack.start(TOKENS_BT, caches=caches))
    total = 0.0
    for name in ("k", "v"):
        late, early = (getattr(caches[layer], name)[:, :, :7].double().mean(0) for layer in (2, 0))
        norms = [(late[head, place] - early[head, place]).square().sum().sqrt().item()
                 for head in range(2) for place in range(7)]
        total += sum(norms) / len(norms) / 2
    found = distances(stack, TOKENS_BT)
    assert set(found) == {(1, 0), (2, 0), (2, 1)}
    assert found[2, 0] == pytest.approx(total, rel=1e-5)


def test_chains_end_at_layers_with_keys_of_their_own() -> None:
    assert flattened({5: 3, 3: 1, 7: 5}) == {3: 1, 5: 1, 7: 1}
    assert flattened({4: 2, 6: 2}) == {4: 2, 6: 2}


def test_the_search_takes_what_keeps_the_last_states(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, pairs = random_stack(4), [(3, 2), (3, 1), (2, 0), (1, 0)]
    monkeypatch.setattr("layerwise.systems.generate.kvsharer.THRESHOLD", -2.0)
    assert search(stack, TOKENS_BT, pairs, 2) == [{3: 2}, {2: 0, 3: 0}]
    assert len(search(stack, TOKENS_BT, pairs, 9)) == 3
    monkeypatch.setattr("layerwise.systems.generate.kvsharer.THRESHOLD", 1.0)
    assert search(stack, TOKENS_BT, pairs, 2) == []


def test_sharing_leaves_only_the_other_caches() -> None:
    caches: Caches = {}
    shared = sharing(random_stack(4), {2: 0, 3: 0})
    shared.run(shared.start(TOKENS_BT, caches=caches))
    assert set(caches) == {0, 1}


@pytest.mark.usefixtures("small")
def test_it_runs() -> None:
    order, little, served = check_system("kvsharer")
    assert set(order.control) == {"alike first", "random", "none share"}
    assert order.holds is little.holds is None
    assert served.holds is True
    assert served.measured["cache bytes a token"] * 30 == served.control["cache bytes a token, none share"] * 27


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("kvsharer")
