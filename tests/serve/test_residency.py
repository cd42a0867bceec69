"""Layers that wait on disk or on the host: the same tokens, and never more than two of them at once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.serve.engine import Engine, layered
from layerwise.serve.request import Params
from layerwise.serve.residency import Place, Staged
from layerwise.serve.table import layer_table
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.testing.stacks import random_stack
from tests.serve.plain import prompts, serve

CASES: dict[str, Mapping[int, Place]] = {
    "one": {2: "disk"}, "some": {0: "disk", 3: "disk", 4: "disk"}, "all": dict.fromkeys(range(5), "disk"), "none": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_stack(5).save(tmp_path_factory.mktemp("residency") / "model")


def opened(folder: Path, stream: bool = True, device: str | None = None) -> DecoderStack:
    stack = open(folder, stream=stream, device=device)
    assert isinstance(stack, DecoderStack)
    return stack


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_a_stack_in_memory(folder: Path, case: str) -> None:
    stack, asked = opened(folder), prompts(6)
    params = [Params(max_tokens=9, temperature=index % 2, seed=index) for index in range(6)]
    expected = [one.tokens for one in Engine(opened(folder, stream=False), cache_tokens=512).generate(asked, params)]
    for options in ({}, {"groups": layered(9)}, {"step_tokens": 20}):
        engine = Engine(stack, table=layer_table(stack.spec, residency=CASES[case]), cache_tokens=512, **options)
        assert [one.tokens for one in serve(engine, asked, params)] == expected


def test_skipped_layers_are_not_waited_for(folder: Path) -> None:
    stack, asked, params = opened(folder), prompts(4), Params(max_tokens=9)
    resident = opened(folder, stream=False)
    waiting = layer_table(stack.spec, skip=[1, 2], residency=dict.fromkeys(range(5), "disk"))
    staged = Engine(stack, table=waiting, cache_tokens=512)
    expected = Engine(resident, table=layer_table(stack.spec, skip=[1, 2]), cache_tokens=512).generate(asked, params)
    assert [one.tokens for one in serve(staged, asked, params)] == [one.tokens for one in expected]


def test_two_waiting_layers_are_in_memory_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = opened(folder)
    staged, most = Staged(stack, dict.fromkeys(range(5), "disk")), 0
    alive: weakref.WeakSet[Block] = weakref.WeakSet()
    bring = staged._bring  # of this one alone: what another sent for last may still be on its way

    def watched(layer: int) -> Block:
        nonlocal most
        new = bring(layer)
        alive.add(new)
        most = max(most, len(alive))
        return new

    monkeypatch.setattr(staged, "_bring", watched)
    Engine(stack, action=staged, cache_tokens=64).generate([[1, 2, 3]], Params(max_tokens=4))
    assert 1 <= most <= 2  # one alone where a layer ran before the next had come
    assert staged._coming is not None and staged._coming[0] == 0  # after the last layer, the first is sent for


def test_what_cannot_wait_is_refused(folder: Path) -> None:
    with pytest.raises(BadOption, match="stream=True"):
        Staged(opened(folder, stream=False), {0: "disk"})
    stack = opened(folder)
    with pytest.raises(BadOption, match="on the host"):
        Staged(stack, {1: "host"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("place", ["host", "disk"])
def test_layers_come_to_a_gpu(folder: Path, place: Place) -> None:
    stack, asked, params = opened(folder, device="cuda"), prompts(6), Params(max_tokens=20)
    expected = Engine(opened(folder, stream=False, device="cuda"), cache_tokens=512).generate(asked, params)
    engine = Engine(stack, action=Staged(stack, dict.fromkeys((0, 2, 3, 4), place)), cache_tokens=512)
    assert [one.tokens for one in engine.generate(asked, params)] == [one.tokens for one in expected]
