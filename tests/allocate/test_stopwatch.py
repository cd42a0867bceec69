"""The measuring clock: every distinct row once, and only for models that layerwise built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import dropped, keep
from layerwise.allocate.cost import Clocks
from layerwise.allocate.solve import allocate
from layerwise.allocate.stopwatch import Stopwatch, clock_for
from layerwise.errors import BadBudget
from layerwise.spec import Attention, Format, LayerSpec, Opaque, StackSpec
from layerwise.transform.quantize import Quantize
from tests.allocate.tables import ROW, scores, spec


def test_times_are_positive_and_measured_once() -> None:
    clock = Stopwatch(spec(), past=8, repeats=1, cold_bytes=0, folder=None)
    assert clock.row(ROW) > 0
    assert clock.row(ROW) == clock.row(ROW)
    assert clock.outside(spec()) > 0
    assert len(clock._known) == 6  # four shapes, the rest, outside


def test_a_row_takes_as_long_as_its_parts() -> None:
    clock = Stopwatch(spec(), past=8, repeats=1, cold_bytes=0, folder=None)
    packed = Quantize(4, matrices=("down",)).edit(ROW, 64)
    saved = clock._matrix(64, 128, None, None) - clock._matrix(64, 128, Format(4, 32), None)
    assert clock.row(ROW) - clock.row(packed) == pytest.approx(saved)


def test_times_are_kept_for_this_machine(tmp_path: Path) -> None:
    first = Stopwatch(spec(), past=8, repeats=1, cold_bytes=0, folder=tmp_path).row(ROW)
    again = Stopwatch(spec(), past=8, repeats=1, cold_bytes=0, folder=tmp_path)
    assert again.row(ROW) == first
    next(tmp_path.glob("*.json")).write_text("{")
    assert Stopwatch(spec(), past=8, repeats=1, cold_bytes=0, folder=tmp_path).row(ROW) > 0


def test_a_module_cannot_be_timed() -> None:
    with pytest.raises(BadBudget, match="did not build"):
        Stopwatch(StackSpec("module", 8, 0, (LayerSpec(Opaque("a.0", "B", 10, 40), None),)))


def test_a_limit_on_time_is_met_by_measured_times() -> None:
    table = scores({"block-influence": [0.3, 0.1, 0.4, 0.2]})
    clock = Stopwatch(table.spec, past=8, repeats=1, cold_bytes=0, folder=None)
    limit = clock.outside(table.spec) + 2.5 * clock.row(ROW)
    budget = Budget(milliseconds=f"{limit:.6f}ms")
    plan = allocate(table, budget, alternatives=[keep(), dropped()], clock=clock)
    assert [edit.target for edit in plan.edits] == [1, 3]


def test_a_prompt_takes_longer_than_a_token() -> None:
    clock = clock_for(Budget(prefill="2x"), spec(), folder=None)
    assert isinstance(clock, Clocks)
    assert isinstance(clock.prefill, Stopwatch) and isinstance(clock.decode, Stopwatch)
    assert (clock.decode.tokens, clock.prefill.tokens, clock.prefill.past) == (1, 256, 0)
    assert clock.prefill.row(ROW) > clock.row(ROW)


def test_only_what_is_limited_is_timed() -> None:
    assert clock_for(Budget(bytes=0.5), spec()) is None
    assert isinstance(clock_for(Budget(milliseconds=0.5, bytes=0.5), spec(), folder=None), Stopwatch)


def test_a_prompt_starts_anew_every_time() -> None:
    """Its length is bounded by the context, however often it is repeated."""
    short = replace(spec(), context=8)
    clock = clock_for(Budget(prefill=0.5), short, folder=None)
    assert isinstance(clock, Clocks)
    assert isinstance(clock.prefill, Stopwatch) and clock.prefill.tokens == 4
    assert clock.prefill.row(ROW) > 0


class Counting:
    """A layer takes as many milliseconds as its attention has heads, or as its feed-forward half is wide."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide

    def row(self, row: LayerSpec) -> float:
        if self.wide:
            return float(row.feed_forward.width) if row.feed_forward else 0.0
        return float(row.mixer.heads) if isinstance(row.mixer, Attention) else 0.0

    def outside(self, spec: StackSpec) -> float:
        return 0.0


def test_limits_on_decoding_and_prefill_hold_together() -> None:
    table = scores({"leave-one-out:attention": [0.1, 0.2, 0.3, 0.4],
                    "leave-one-out:feed_forward": [0.4, 0.3, 0.2, 0.1]})
    clock = Clocks(Counting(wide=False), Counting(wide=True))
    offered = [keep(), dropped("attention"), dropped("feed_forward")]
    plan = allocate(table, Budget(milliseconds=0.75, prefill="2x"), alternatives=offered, clock=clock)
    assert [(edit.target, edit.arguments["part"]) for edit in plan.edits] == [
        (0, "attention"), (2, "feed_forward"), (3, "feed_forward")]
    assert (plan.predicted["milliseconds"], plan.predicted["prefill"]) == (6, 256)
    assert "256 ms of prefill" in plan.describe()


def test_a_clock_without_prefill_cannot_limit_it() -> None:
    with pytest.raises(BadBudget, match="prefill"):
        allocate(scores({"leave-one-out": [0.1, 0.2]}), Budget(prefill=0.5), alternatives=[keep(), dropped()],
                 clock=Counting(wide=False))
