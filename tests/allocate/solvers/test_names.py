"""Solvers carry the name they are registered by, and the contract kit notices a careless one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers import SOLVERS
from layerwise.allocate.solvers.base import Solver
from layerwise.testing.solvers import check_solver


@pytest.mark.parametrize("name", SOLVERS)
def test_name(name: str) -> None:
    assert SOLVERS[name]().name == name


@dataclass(frozen=True)
class Careless(Solver):
    """Always keeps everything."""

    name: ClassVar[str] = "careless"

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        return [group[0] for group in groups]


def test_the_kit_notices_a_passed_limit() -> None:
    with pytest.raises(AssertionError, match="careless passes the limits"):
        check_solver(Careless())
