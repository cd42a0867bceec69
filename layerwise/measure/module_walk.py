"""The walk of a sweep through a module that layerwise did not build: its whole output is compared, row by row.

What comes before a changed layer is given back as it was recorded; what comes after runs to the module's own end.

Shapes: P rows of the output (items, or tokens of items), K classes or width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.ending import Ending
from layerwise.measure.inputs import Input, Inputs
from layerwise.stack.base import Stack, first_tensor


class ModuleWalk:
    """The states of all batches at one layer, and the original's output.

    Raises BadModel where the original's output is NaN or infinite.
    """

    def __init__(self, stack: Stack, inputs: Inputs) -> None:
        self.stack, self.items = stack, list(inputs)
        self.states = [item.start(stack) for item in self.items]
        labels = [item.labels_B for item in self.items if item.labels_B is not None]
        self.labels_P = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)
        self.original = self._ending()
        if not bool(torch.isfinite(self.original.hidden_PC.sum())):
            raise BadModel(f"the output of {stack.name} is NaN or infinite", expected="finite outputs",
                           do="check its weights, or compute in float32")

    def advance(self) -> None:
        """Move all states past the layer they stand at."""
        layer = self.states[0].layer
        self.states = [self.stack.run(state, slice(layer, layer + 1)) for state in self.states]

    def ending(self, block: nn.Module) -> Ending | None:
        """The output with `block` in place of the layer the states stand at; None where its shape does not fit."""
        with self.stack.swap(self.states[0].layer, block):
            try:
                return self._ending()
            except BadOption:
                return None

    def _ending(self) -> Ending:
        rows_PK = torch.cat([output_rows(self.stack.finish(self.stack.run(state)), item)
                             for state, item in zip(self.states, self.items, strict=True)])
        return Ending(rows_PK, self.labels_P.to(rows_PK.device), lambda rows_PK: rows_PK, rows_PK.shape[-1])


def output_rows(output: object, item: Input) -> Tensor:
    """The first tensor of a module's output as rows [P, K], float32, without those of filling."""
    found = first_tensor(output)
    if item.mask_BT is not None and found.dim() > 2 and found.shape[:2] == item.mask_BT.shape:
        return found[item.mask_BT.to(found.device)].flatten(0, -2).float()
    return found.flatten(0, -2).float() if found.dim() > 1 else found[:, None].float()


def check_labels(inputs: Iterable[Input], what: str) -> None:
    """Raise BadData where `what` needs a class for every row and the data has none, or one class only."""
    labels = [item.labels_B for item in inputs]
    if not labels or any(label_B is None for label_B in labels):
        raise BadData(f"data without labels for {what}", expected="batches of (inputs, labels), int64 [rows]",
                      do="give labels, or measure without them: 'skip-effect' needs none")
    classes = torch.cat([label_B for label_B in labels if label_B is not None]).unique()
    if len(classes) < 2:
        raise BadData(f"labels of a single class, {classes.tolist()}, for {what}", expected="two classes or more",
                      do="give data of several classes: without them a layer that always says one class looks best")


def check_classes(logits: Tensor, labels_B: Tensor, what: str) -> None:
    """Raise BadModel where an output is not a row of logits, for two classes or more, for each label, and BadData for
    labels of other classes."""
    rows = len(labels_B)
    if logits.dim() != 2 or len(logits) != rows or logits.shape[1] < 2:
        raise BadModel(f"outputs {list(logits.shape)} for {rows} labels, for {what}",
                       expected="logits [rows, classes] of two classes or more",
                       do="wrap the model so that its first output is the logits, or measure 'skip-effect'")
    low, high = int(labels_B.min()), int(labels_B.max())
    if low < 0 or high >= logits.shape[1]:
        raise BadData(f"labels from {low} to {high} for the {logits.shape[1]} classes of the output, for {what}",
                      expected=f"labels from 0 to {logits.shape[1] - 1}",
                      do="number the classes from zero, in the order of the model's outputs")
