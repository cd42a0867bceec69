"""General promises, once, over everything that is registered."""

import pytest

from layerwise import testing
from layerwise.allocate.solvers import SOLVERS
from layerwise.measure import INSTRUMENTS
from layerwise.transform.base import Transform
from layerwise.transform.drop import Drop
from layerwise.transform.low_rank import LowRank
from layerwise.transform.narrow import Narrow
from layerwise.transform.quantize import Quantize
from layerwise.transform.share_kv import ShareKV

SETTINGS: list[Transform] = [
    Drop("layer"),
    Drop("attention"),
    Drop("feed_forward"),
    *(Quantize(bits=bits) for bits in (8, 6, 5, 4, 3, 2)),
    Quantize(bits=4, method="search"),
    Quantize(bits=4, method="gptq"),
    Quantize(bits=4, group=0, symmetric=True, matrices=("q", "down")),
    LowRank(0.5),
    LowRank(8, "plain", ("gate", "o")),
    LowRank(0.25, "utilized"),
    Narrow(width=80),
    Narrow(kv_heads=1),
    Narrow(width=31, kv_heads=1, by="norm"),
    ShareKV(source=1),
]


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_instrument(name: str) -> None:
    testing.check_instrument(INSTRUMENTS[name]())


@pytest.mark.parametrize("transform", SETTINGS, ids=str)
def test_transform(transform: Transform) -> None:
    testing.check_transform(transform)


@pytest.mark.parametrize("name", SOLVERS)
def test_solver(name: str) -> None:
    testing.check_solver(SOLVERS[name]())
