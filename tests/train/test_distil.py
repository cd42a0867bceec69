"""Healing by distillation: every kind of stack, no byte more, never worse, and on from where it was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.data.metrics import kl_divergence
from layerwise.errors import BadData, BadOption
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.train.checkpoint import Checkpoint
from layerwise.train.duration import Duration
from layerwise.train.heal import FAST_RATE, SCALE_RATE, Healed, defaults, distil
from layerwise.train.loop import Recipe
from layerwise.train.methods import Layers, Lora, Method, Partial, Scales, beside

RECIPE = Recipe(steps=12, batch=4, learning_rate=3e-3, warmup=2)
PACK = {"bits": 3, "group": 16}
PLANS = {
    "dropped": (Edit(1, "drop"),),
    "packed": tuple(Edit(layer, "quantize", PACK) for layer in range(4)),
    "low rank": tuple(Edit(layer, "low-rank", {"rank": 4, "method": "plain"}) for layer in (1, 2)),
    "packed and dropped": (Edit(0, "quantize", PACK), Edit(1, "drop"), Edit(2, "drop", {"part": "attention"}),
                           Edit(3, "quantize", PACK)),
}


@pytest.fixture(scope="module")
def original() -> DecoderStack:
    return random_stack(4, hidden=32)


@pytest.fixture(scope="module")
def tokens_NT() -> Tensor:
    return torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(0))


def cut(original: DecoderStack, name: str) -> tuple[DecoderStack, list[int]]:
    plan = lw.Plan(original.spec.fingerprint(), 4, PLANS[name])
    kept = [layer for layer in range(4) if Edit(layer, "drop") not in PLANS[name]]
    return lw.apply(original, plan), kept


def healed(original: DecoderStack, tokens_NT: Tensor, name: str, method: Method | None = None,
           recipe: Recipe = RECIPE, **options: object) -> tuple[DecoderStack, Healed]:
    slim, kept = cut(original, name)
    return slim, distil(slim, original, tokens_NT[:12], tokens_NT[12:], kept, method, recipe, **options)


@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_stack_comes_nearer_and_takes_no_byte_more(
    original: DecoderStack, tokens_NT: Tensor, name: str
) -> None:
    slim, found = healed(original, tokens_NT, name)
    assert found.healing.helped and found.healing.after < found.healing.before
    assert found.stack.spec == slim.spec and found.stack.spec.bytes() == slim.spec.bytes()
    sizes = [{key: (tensor.shape, tensor.dtype) for key, tensor in one.tensors()} for one in (slim, found.stack)]
    assert sizes[0] == sizes[1]
    codes = [{key: tensor for key, tensor in one.tensors() if key.endswith("codes")} for one in (slim, found.stack)]
    assert all(torch.equal(tensor, codes[1][key]) for key, tensor in codes[0].items())


def test_before_and_after_are_divergences_on_the_held_out_blocks(original: DecoderStack, tokens_NT: Tensor) -> None:
    slim, found = healed(original, tokens_NT, "dropped")
    expected = [kl_divergence(original(tokens_NT[12:]), stack(tokens_NT[12:])) for stack in (slim, found.stack)]
    assert [found.healing.before, found.healing.after] == pytest.approx(expected, rel=1e-4)
    assert (found.healing.steps, found.healing.tokens) == (12, 12 * 4 * 12)


@pytest.mark.parametrize("method", [Layers((0,)), Partial(1), Scales(), Lora(4, 8, 0.0)])
def test_every_method_heals_a_dropped_layer(original: DecoderStack, tokens_NT: Tensor, method: Method) -> None:
    _, found = healed(original, tokens_NT, "dropped", method)
    assert found.healing.helped and len(found.losses) == 12


def test_chosen_layers_change_and_no_others(original: DecoderStack, tokens_NT: Tensor) -> None:
    slim, found = healed(original, tokens_NT, "dropped", Layers((1,)))
    before = dict(slim.tensors())
    changed = {name for name, tensor in found.stack.tensors() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("layers.1.")} | {"norm.weight"}


def test_scales_leave_every_dense_matrix(original: DecoderStack, tokens_NT: Tensor) -> None:
    slim, found = healed(original, tokens_NT, "packed and dropped", Scales())
    before = dict(slim.tensors())
    changed = {name for name, tensor in found.stack.tensors() if not torch.equal(tensor, before[name])}
    assert changed and not any(before[name].dim() > 1 and name.endswith(".weight") for name in changed)
    assert any(name.endswith(".scale") for name in changed)


def test_a_packed_table_comes_back_as_it_was(original: DecoderStack, tokens_NT: Tensor) -> None:
    plan = lw.Plan(original.spec.fingerprint(), 4, (Edit(1, "drop"), Edit("embedding", "quantize", {"bits": 8})))
    slim = lw.apply(original, plan)
    found = distil(slim, original, tokens_NT[:12], tokens_NT[12:], [0, 2, 3], None, RECIPE)
    assert found.healing.helped and found.stack.spec == slim.spec
    tables = [dict(stack.tensors()) for stack in (slim, found.stack)]
    assert torch.equal(tables[0]["embedding.codes"], tables[1]["embedding.codes"])


def test_half_precision_is_trained_in_float32_and_stored_as_it_was(tokens_NT: Tensor) -> None:
    original = random_stack(4, hidden=32, dtype="bfloat16")
    slim, found = healed(original, tokens_NT, "packed and dropped")
    assert found.healing.helped
    assert {name: tensor.dtype for name, tensor in slim.tensors()} == {
        name: tensor.dtype for name, tensor in found.stack.tensors()}


def test_it_never_makes_the_model_worse(original: DecoderStack, tokens_NT: Tensor) -> None:
    slim, found = healed(original, tokens_NT, "dropped", recipe=replace(RECIPE, learning_rate=3.0, steps=3, warmup=0),
                         bridge=False)
    assert found.stack is slim and not found.healing.helped and found.healing.after >= found.healing.before
    assert "left as it was" in str(found.healing)


def test_the_original_and_the_given_stack_stay_as_they_were(original: DecoderStack, tokens_NT: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in original.tensors()}
    healed(original, tokens_NT, "dropped")
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.tensors())
    assert not any(parameter.requires_grad for parameter in original.decoder.parameters())


def same(a: Healed, b: Healed) -> bool:
    pairs = zip(a.stack.tensors(), b.stack.tensors(), strict=True)
    return a.losses == b.losses and all(torch.equal(x, y) for (_, x), (_, y) in pairs)


class Killed(BaseException):
    """What a kill is to a test."""


@pytest.mark.parametrize("method", [Layers(), Lora(4, 8, 0.5)])
def test_killed_and_resumed_the_result_is_the_same_to_the_bit(
    original: DecoderStack, tokens_NT: Tensor, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda self, ended=False: True)
    name = "packed and dropped" if method == Layers() else "dropped"
    _, whole = healed(original, tokens_NT, name, method)

    def kill(at: int) -> object:
        def watch(step: int) -> None:
            if step == at:
                raise Killed
        return watch

    for step in (3, 9):
        with pytest.raises(Killed):
            healed(original, tokens_NT, name, method, folder=tmp_path / "state", after=[kill(step)])
    steps: list[int] = []
    _, resumed = healed(original, tokens_NT, name, method, folder=tmp_path / "state", after=[steps.append])
    assert steps[0] == 9 and same(whole, resumed)


def test_the_state_of_another_healing_is_refused(
    original: DecoderStack, tokens_NT: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda self, ended=False: True)
    healed(original, tokens_NT, "dropped", folder=tmp_path)
    with pytest.raises(BadOption, match="another training"):
        healed(original, tokens_NT, "dropped", recipe=replace(RECIPE, seed=1), folder=tmp_path)


def test_a_time_is_kept_and_counted_over_kills(original: DecoderStack, tokens_NT: Tensor, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only steps move, 0.25 s each: the kill at the fifth loses that one, and 16 fill 4 seconds."""
    now = [0.0]
    for module in ("loop", "heal"):
        monkeypatch.setattr(f"layerwise.train.{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoint, "due", lambda self, ended=False: True)
    recipe = replace(RECIPE, seconds=4.0)

    def step(number: int) -> None:
        now[0] += 0.25

    def killed(number: int) -> None:
        if number == 5:
            raise Killed

    with pytest.raises(Killed):
        healed(original, tokens_NT, "dropped", recipe=recipe, folder=tmp_path, after=[step, killed])
    now[0] += 1000.0
    _, found = healed(original, tokens_NT, "dropped", recipe=recipe, folder=tmp_path, after=[step])
    assert (found.healing.steps, found.healing.seconds) == (16, 4.0)


def test_the_seed_decides(original: DecoderStack, tokens_NT: Tensor) -> None:
    recipes = [replace(RECIPE, steps=3, seed=seed) for seed in (1, 1, 2)]
    found = [healed(original, tokens_NT, "dropped", recipe=recipe)[1] for recipe in recipes]
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_layers_beside_a_gap() -> None:
    assert beside([0, 1, 2, 5, 6, 7, 8], reach=1) == (2, 3)
    assert beside([0, 1, 2, 5, 6, 7, 8], reach=2) == (1, 2, 3, 4)
    assert beside([0, 1, 2]) == ()


def test_rates_follow_what_is_trained(original: DecoderStack) -> None:
    assert defaults(cut(original, "packed")[0], Layers()).learning_rate == SCALE_RATE
    assert defaults(cut(original, "packed and dropped")[0], Layers()).learning_rate == FAST_RATE
    recipe = defaults(original, Layers(), Duration.parse("10m"))
    assert (recipe.seconds, recipe.steps) == (600, 0)


def test_no_text_and_layers_that_are_not_there_are_refused(original: DecoderStack, tokens_NT: Tensor) -> None:
    with pytest.raises(BadData, match="12 blocks to heal on and 0 to judge"):
        distil(original, original, tokens_NT[:12], tokens_NT[:0], range(4))
    with pytest.raises(BadOption, match=r"0\.\.3"):
        healed(original, tokens_NT, "packed", Layers((4,)))
