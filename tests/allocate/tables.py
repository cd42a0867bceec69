"""Small models and scores for planning."""

from collections.abc import Mapping, Sequence

from layerwise.measure.scores import Column, Scores
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec

ROW = LayerSpec(Attention(2, 1, 32), FeedForward(128))


def spec(layers: int = 4, tied: bool = True) -> StackSpec:
    return StackSpec("llama", 64, 96, (ROW,) * layers, tied=tied)


def scores(columns: Mapping[str, Sequence[float]], outside: Mapping[str, float] | None = None,
           tied: bool = True) -> Scores:
    """Columns in which high means important; `outside` holds in all of them."""
    layers = len(next(iter(columns.values())))
    made = {name: Column(name, tuple(values), "", "high", "", outside or {})
            for name, values in columns.items()}
    return Scores(spec(layers, tied), made, "weights")
