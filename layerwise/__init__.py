"""Open a neural network to its layers, measure them, fit them to a budget, and verify the result.

    import layerwise as lw
    stack = lw.open("smollm2")
    scores = lw.measure(stack, data, ["block-influence"])
    plan = lw.allocate(scores, budget=lw.Budget(bytes=0.55))
    slim = lw.apply(stack, plan)
    report = lw.verify(stack, slim, data)

Names are imported when they are first used, so `import layerwise` itself takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from layerwise.io.auto import register_when_imported as _register_when_imported

if TYPE_CHECKING:
    from layerwise import errors, testing
    from layerwise.allocate.apply import apply, undo
    from layerwise.allocate.budget import Budget
    from layerwise.allocate.choices import Choice
    from layerwise.allocate.plan import Plan
    from layerwise.allocate.solve import allocate
    from layerwise.errors import LayerwiseError
    from layerwise.measure.engine import measure
    from layerwise.measure.scores import Scores
    from layerwise.report.run import Run
    from layerwise.report.verify import Report, verify
    from layerwise.serve.background import AsyncEngine
    from layerwise.serve.engine import Engine
    from layerwise.serve.request import Params
    from layerwise.serve.table import layer_table
    from layerwise.spec import LayerSpec, StackSpec
    from layerwise.stack.base import Stack, State
    from layerwise.stack.open import open

__version__ = "0.1.0"

_PLACES = {
    "AsyncEngine": "layerwise.serve.background:AsyncEngine",
    "Budget": "layerwise.allocate.budget:Budget",
    "Choice": "layerwise.allocate.choices:Choice",
    "Engine": "layerwise.serve.engine:Engine",
    "LayerSpec": "layerwise.spec:LayerSpec",
    "LayerwiseError": "layerwise.errors:LayerwiseError",
    "Params": "layerwise.serve.request:Params",
    "Plan": "layerwise.allocate.plan:Plan",
    "Report": "layerwise.report.verify:Report",
    "Run": "layerwise.report.run:Run",
    "Scores": "layerwise.measure.scores:Scores",
    "Stack": "layerwise.stack.base:Stack",
    "StackSpec": "layerwise.spec:StackSpec",
    "State": "layerwise.stack.base:State",
    "allocate": "layerwise.allocate",
    "apply": "layerwise.allocate.apply:apply",
    "errors": "layerwise.errors",
    "layer_table": "layerwise.serve.table:layer_table",
    "measure": "layerwise.measure",
    "open": "layerwise.stack.open:open",
    "testing": "layerwise.testing",
    "undo": "layerwise.allocate.apply:undo",
    "verify": "layerwise.report.verify:verify",
}

__all__ = [
    "AsyncEngine",
    "Budget",
    "Choice",
    "Engine",
    "LayerSpec",
    "LayerwiseError",
    "Params",
    "Plan",
    "Report",
    "Run",
    "Scores",
    "Stack",
    "StackSpec",
    "State",
    "__version__",
    "allocate",
    "apply",
    "errors",
    "layer_table",
    "measure",
    "open",
    "testing",
    "undo",
    "verify",
]


if not TYPE_CHECKING:  # a type checker would take any name for good

    def __getattr__(name: str) -> object:
        if name not in _PLACES:
            raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
        module, _, attribute = _PLACES[name].partition(":")
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__


_register_when_imported()  # lets transformers open saved folders once layerwise is imported
