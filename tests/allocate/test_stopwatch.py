"""The measuring clock: every distinct row once, and only for models that layerwise built."""

from pathlib import Path

import pytest

from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import dropped, keep
from layerwise.allocate.solve import allocate
from layerwise.allocate.stopwatch import Stopwatch
from layerwise.errors import BadBudget
from layerwise.spec import Format, LayerSpec, Opaque, StackSpec
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
