"""Deciding what each layer should be: `layerwise.allocate(scores, budget)` and the parts it is made of."""

from layerwise._callable import make_callable

make_callable(__name__, "layerwise.allocate.solve:allocate")
