"""What is exported: a run folder that `optimize` made, or a saved model with or without its plan."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from layerwise.allocate.edits import edited_row
from layerwise.allocate.plan import Plan
from layerwise.errors import BadFile, BadOption
from layerwise.spec import LayerSpec, StackSpec
from layerwise.stack.decoder import DecoderStack


class Source:
    """A model and, where known, the plan that made it and the model it was made from.

    `layers` names for every layer of the result the layer of the original it comes from.
    """

    def __init__(self, stack: DecoderStack | None = None, *, plan: Plan | None = None,
                 original: StackSpec | None = None, origin: str | None = None, name: str = "",
                 folder: Path | None = None) -> None:
        self.plan, self.origin, self.folder = plan, origin, folder
        self.name = name or (stack.name if stack else "model")
        self._stack, self._original = stack, original

    @classmethod
    def open(cls, place: str | Path, plan: str | Path | None = None) -> Source:
        """A run folder (run.json, plan.json, model/), or anything `layerwise.open` takes with an optional plan.

        With a plan beside it, a model that is not a run folder is the original that the plan was made for.
        Raises BadFile where the run folder holds no finished model.
        """
        run = Path(place)
        if not (run / "run.json").exists():
            loaded = Plan.load(plan) if plan is not None else None
            return cls(plan=loaded, origin=str(place), name=Path(place).stem or str(place), folder=Path(place))
        if plan is not None:
            raise BadOption(f"the run folder {run} and a plan", expected="one of them: a run folder has its plan",
                            do="leave out --plan, or give the model instead of the run")
        for part in ("plan.json", "model"):
            if not (run / part).exists():
                raise BadFile(f"{run} holds a run without {part}", expected="a finished run of layerwise optimize",
                              do="run the same optimize command again: it goes on where it stopped")
        origin = _origin(run / "run.json")
        return cls(plan=Plan.load(run / "plan.json"), origin=origin, name=Path(origin).name or "model",
                   folder=run / "model")

    @property
    def is_run(self) -> bool:
        """Whether `folder` holds the result, not the original."""
        return self.folder is not None and (self.folder.parent / "run.json").exists()

    @cached_property
    def stack(self) -> DecoderStack:
        """The model to write. Raises BadOption where it is no decoder, or is yet to be made by `apply`."""
        from layerwise.stack.open import open

        if self._stack is not None:
            return self._stack
        if self.plan is not None and not self.is_run:
            raise BadOption(f"weights of {self.origin} under a plan that has not been carried out",
                            expected="a run folder, or the model that `layerwise apply` saved",
                            do="run `layerwise apply` first and export the folder it writes")
        stack = open(str(self.folder))
        if not isinstance(stack, DecoderStack):
            raise BadOption(f"{self.folder}, a {type(stack).__name__}", expected="a decoder language model",
                            do="export a language model")
        return stack

    @cached_property
    def original(self) -> StackSpec:
        """The table the plan was made for. Raises BadOption where there is no plan."""
        if self._original is not None:
            return self._original
        if self.plan is None or self.origin is None:
            raise BadOption("a model without its plan", expected="the plan that it was made by",
                            do="give the run folder, or the original model with --plan")
        from layerwise.io.source import read

        return read(self.origin).spec

    @cached_property
    def spec(self) -> StackSpec:
        """The table of the result; by the plan, so that rules need no weights."""
        if self._stack is not None:
            return self._stack.spec
        if self.plan is not None and not self.is_run:
            return self.plan.edited(self.original)
        from layerwise.io.source import read

        return read(str(self.folder)).spec

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The original's number of every layer of the result."""
        if self.plan is None:
            return tuple(range(len(self.spec.rows)))
        return kept(self.plan, self.original)


def kept(plan: Plan, original: StackSpec) -> tuple[int, ...]:
    """The layers of `original` that are there after the plan."""
    return tuple(layer for layer, row in enumerate(original.rows) if _after(plan, layer, row, original.hidden))


def _after(plan: Plan, layer: int, row: LayerSpec, hidden: int) -> LayerSpec | None:
    after: LayerSpec | None = row
    for edit in plan.of(layer):
        if after is not None:
            after = edited_row(after, hidden, edit.transform, edit.arguments)
    return after


def _origin(record: Path) -> str:
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["arguments"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{record} cannot be read: {error}", expected="the record of a run of layerwise optimize",
                      do="export the run's model/ folder instead") from error
