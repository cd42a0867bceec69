"""A budget for the cache: what sharing is predicted to lose is what it loses, and the plan is served as it was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.cost import totals
from layerwise.allocate.plan import Edit, Plan
from layerwise.data.text import Source, TextData
from layerwise.errors import BadOption
from layerwise.export import EXPORTS
from layerwise.export.source import Source as Exported
from layerwise.measure.engine import measure
from layerwise.measure.response import CACHES, Response
from layerwise.report.alternatives import defaults_for, parse_alternatives, reading, trying
from layerwise.report.decide import Decide, asked
from layerwise.report.layers import kept_layers, layer_changes
from layerwise.report.refine import refine
from layerwise.report.tried import try_plans
from layerwise.report.verify import verify
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.serve.table import layer_table
from layerwise.spec import Attention, FeedForward, LayerSpec, StateSpace
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.testing.stacks import random_stack
from tests.serve.plain import greedy, prompts, serve

ROW = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), FeedForward(width=128))
SHARES = ("share 1", "share 2")


def text(rows: int = 2, seed: int = 1) -> TextData:
    tokens_NT = torch.randint(97, (rows, 24), generator=torch.Generator().manual_seed(seed))
    return TextData(tokens_NT, "random", Source("random", "calibration", "", 24 * rows, tuple(range(rows))))


def by_hand(stack: DecoderStack, *edits: Edit) -> Plan:
    return Plan(stack.spec.fingerprint(), len(stack), edits)


def planned(stack: DecoderStack, cache: str, only: str) -> DecoderStack:
    """The stack with that much of its cache, by one currency."""
    decide = asked(Budget(cache=cache), stack.spec, [only])
    scores = measure(stack, text(), trying(decide.alternatives), progress=False)
    return apply(stack, decide(scores, "milp"))


def lost(stack: DecoderStack, edit: Edit) -> float:
    """KL(original || edited), nats per token, from all predictions."""
    edited = apply(stack, by_hand(stack, edit))
    was_BTV, is_BTV = (one(text().tokens_NT)[:, :-1].log_softmax(-1) for one in (stack, edited))
    return float((was_BTV.exp() * (was_BTV - is_BTV)).sum(-1).mean())


def refusal(stack: DecoderStack, slim: DecoderStack, target: str, folder: Path) -> str:
    """What an export says of a plan that it cannot express."""
    assert slim.origin is not None
    model, plan = stack.save(folder / "model"), slim.origin[1].save(folder / "plan.json")
    with pytest.raises(BadOption, match="cannot express") as error:
        EXPORTS[target]().write(Exported.open(model, plan), folder / "out")
    return error.value.given


def check_served(engine: Engine, stack: DecoderStack) -> None:
    """The engine gives the tokens that the stack gives by itself."""
    asked = prompts(4)
    for done, prompt in zip(serve(engine, asked, Params(max_tokens=10, temperature=0)), asked, strict=True):
        assert list(done.tokens) == greedy(stack, prompt, 10)


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(6)


@pytest.fixture(scope="module")
def slim(stack: DecoderStack) -> DecoderStack:
    """Half the cache, by sharing only."""
    return planned(stack, "50%", "share")


@pytest.mark.parametrize(("layer", "part", "source"), [(1, "share 1", 0), (4, "share 1", 3), (4, "share 2", 2)])
def test_a_trial_loses_what_the_plan_loses(stack: DecoderStack, layer: int, part: str, source: int) -> None:
    found = measure(stack, text(), [Response(False, (), (), None, SHARES)], progress=False)
    kl = lost(stack, Edit(layer, "share-kv", {"source": source}))
    assert found[f"response:{part}"].values[layer] == pytest.approx(kl, rel=1e-4)


def test_finished_trials_are_not_tried_again(stack: DecoderStack, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, tuple[float, ...]]:
        scores = measure(stack, text(), [Response(False, (), (), None, SHARES)], progress=False,
                         resume=tmp_path / "journal")
        return {name: column.values[2:] for name, column in scores.columns.items()}

    first = run()
    monkeypatch.setattr(Response, "alternative", lambda *_: pytest.fail("tried again"))
    assert run() == first and set(first) == {"response:share 1", "response:share 2"}


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(BadOption, match="share 3"):
        Response(shares=("share 3",))


def test_the_currency_is_what_the_engine_keeps() -> None:
    """Windows count what they hold of a context of 256 tokens, a state as much as its share of that."""
    assert isinstance(ROW.mixer, Attention)
    space = StateSpace(heads=8, head_dim=16, state=8, groups=2)
    rows = (ROW, replace(ROW, mixer=replace(ROW.mixer, window=64)), replace(ROW, mixer=replace(ROW.mixer, shares=0)),
            replace(ROW, mixer=space), replace(ROW, mixer=None))
    spec = random_stack(rows=rows, dtype="bfloat16").spec
    groups = {group.kind: group for group in layer_table(spec).groups}
    assert groups["full"].token_bytes == 2 * 2 * 16 * 2 == spec.rows[0].cache_bytes(256, "bfloat16")
    assert groups["window"].token_bytes / 4 == spec.rows[1].cache_bytes(256, "bfloat16")
    assert groups["recurrent"].state_bytes / 256 == spec.rows[3].cache_bytes(256, "bfloat16")
    assert totals(spec)["cache"] == spec.cache_bytes() == 128 + 32 + groups["recurrent"].state_bytes / 256


def test_half_the_cache_is_kept_and_reported(stack: DecoderStack, slim: DecoderStack) -> None:
    (group,) = layer_table(slim.spec).groups
    assert group.token_bytes == slim.spec.cache_bytes() == stack.spec.cache_bytes() / 2
    report = verify(stack, slim, text(4), tasks=(), texts=(), speeds=False)
    assert "cache per token" in str(report) and "50.0 %" in str(report)
    assert any("keys of layer" in change.got for change in report.layers)


def test_saved_plans_and_models_are_the_same(stack: DecoderStack, slim: DecoderStack, tmp_path: Path) -> None:
    assert slim.origin is not None
    plan = Plan.load(slim.origin[1].save(tmp_path / "plan.json"))
    tokens_BT = text().tokens_NT
    assert plan.edits == slim.origin[1].edits
    assert torch.equal(apply(stack, plan)(tokens_BT), slim(tokens_BT))
    again = open(slim.save(tmp_path / "model"))
    assert again.spec == slim.spec and torch.equal(again(tokens_BT), slim(tokens_BT))


@pytest.mark.parametrize("target", [target for target in EXPORTS if target != "peft-ranks"])
def test_exports_say_that_they_cannot(stack: DecoderStack, slim: DecoderStack, target: str, tmp_path: Path) -> None:
    """PEFT's file says ranks only, of which there are none."""
    assert "share" in refusal(stack, slim, target, tmp_path)


@pytest.mark.parametrize("edits", [
    (), (Edit(0, "drop"), Edit(3, "share-kv", {"source": 1}), Edit(5, "share-kv", {"source": 4})),
    (Edit(2, "share-kv", {"source": 1}), Edit(2, "quantize", {"bits": 8, "group": 0, "symmetric": True}))])
def test_the_engine_gives_the_tokens_of_the_stack(stack: DecoderStack, slim: DecoderStack,
                                                  edits: tuple[Edit, ...]) -> None:
    shared = apply(stack, by_hand(stack, *edits)) if edits else slim
    check_served(Engine(shared, cache_tokens=2048, block=3, step_tokens=7), shared)


def test_layers_are_named_as_before_where_others_are_gone(stack: DecoderStack) -> None:
    plan = by_hand(stack, Edit(0, "drop"), Edit(3, "share-kv", {"source": 1}))
    edited = plan.edited(stack.spec)
    assert isinstance(edited.rows[2].mixer, Attention) and edited.rows[2].mixer.shares == 0
    assert layer_changes(stack.spec, edited, kept_layers(stack.spec, plan))[3].got == "keys of layer 1"


def test_sharing_is_offered_where_the_cache_or_hard_budgets_ask_for_it(stack: DecoderStack) -> None:
    def labels(budget: Budget) -> set[str]:
        return {item.label for item in defaults_for(budget, stack.spec)}

    assert labels(Budget(cache="50%")) == {
        "keep", *CACHES, "kv_heads 1", *(f"kv_heads 1, {code}" for code in CACHES), *SHARES, "drop attention"}
    assert labels(Budget(cache="50%", bytes="60%")) >= {"8/row=", *SHARES} and "drop" not in labels(
        Budget(cache="50%", bytes="60%"))
    assert labels(Budget(bytes="10%")) >= {"drop", *SHARES}
    assert not labels(Budget(bytes="60%")) & set(SHARES)
    assert [item.label for item in parse_alternatives(["share"], stack.spec)] == ["keep", *SHARES]


@pytest.mark.slow
def test_a_joint_plan_meets_both_limits_and_is_corrected() -> None:
    stack = random_stack(4, dtype="bfloat16")
    decide = Decide(Budget(cache="60%", bytes="45%"), parse_alternatives(["8", "4/16", "share"], stack.spec))
    scores = measure(stack, text(), trying(decide.alternatives), progress=False)
    scores = scores.merge(measure(stack, text(6, 2), reading(decide.alternatives), progress=False))
    rounds = refine(stack, scores, lambda found: decide(found, "milp"), text(6, 2), text(), rounds=2)
    for one in rounds:
        edited = one.plan.edited(stack.spec)
        assert edited.cache_bytes() <= 0.6 * stack.spec.cache_bytes() and edited.bytes() <= 0.45 * stack.spec.bytes()
        assert {edit.transform for edit in one.plan.edits} == {"quantize", "share-kv"}


def test_controls_stand_beside_a_plan_that_shares(stack: DecoderStack) -> None:
    decide = asked(Budget(cache="50%"), stack.spec, ["share"])
    scores = measure(stack, text(), trying(decide.alternatives), progress=False)
    found = {point.name: point for point in try_plans(stack, scores, decide, text(), text())}
    assert set(found) >= {"milp", "uniform", "random", "shuffled", "reversed"}
    assert all(point.plan.edited(stack.spec).cache_bytes() <= stack.spec.cache_bytes() / 2 for point in found.values())
    every_second = [(edit.target, edit.arguments["source"]) for edit in found["uniform"].plan.edits]
    assert every_second == [(1, 0), (3, 2), (5, 4)]
