"""What an instrument is: parameters in a frozen dataclass, one formula, and what the engine must show it.

    Forward        reduces activations as they stream by; all of them share one pass
    PerLayer       reads one layer's row and weights; needs no data
    Reading        reads one layer's weights beside the states that enter it; all of them share one walk
    Gradient       reads weights, or states, beside the gradient of the loss; all of a kind share one backward
    Walk           walks the data by itself, for what no shared pass can show
    Intervention   tries alternatives for a layer and compares the model's output

Parameters (the instrument), running state (a tally) and results (columns) are three objects: nothing that is
learned is stored on the instrument. Hooks, devices and progress belong to the engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor, nn

from layerwise.measure.ending import Ending
from layerwise.measure.inputs import Inputs
from layerwise.measure.progress import Progress
from layerwise.measure.scores import Column, Direction
from layerwise.measure.seen import Seen
from layerwise.measure.tally import Means
from layerwise.spec import StackSpec
from layerwise.stack.base import Stack, State

Site = Literal["input", "output", "attention", "feed_forward", "lens"]
Needs = Literal["tokens", "labels", "output"]
"""What must follow from the data: next tokens (decoders only), for other modules labels, or nothing but the output."""
T = TypeVar("T")


def digest(tensors: Iterable[Tensor]) -> str | None:
    """What stands for parameters that are tensors where plain values are wanted; None for none."""
    found, tensors = hashlib.sha256(), list(tensors)
    for tensor in tensors:
        found.update(tensor.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16] if tensors else None


class Instrument(ABC):
    """Base of every instrument; subclasses are frozen dataclasses whose fields are plain parameters."""

    name: ClassVar[str]
    unit: ClassVar[str]
    important: ClassVar[Direction | None]
    about: ClassVar[str]
    slow: ClassVar[bool] = False
    """Whether it takes longer than the pass it shares, and is left out unless asked for."""
    for_plans: ClassVar[bool] = False
    """Whether its columns predict what alternatives cost, for a plan to read: left out unless named."""

    @property
    def label(self) -> str:
        """The first part of this instrument's column names."""
        return self.name

    @property
    def parts(self) -> Mapping[str, str]:
        """Column suffix to unit, one entry per column; the suffix "" is the label alone."""
        return {"": self.unit}

    def column(self, part: str, values: Iterable[float],
               outside: Mapping[str, float] | None = None) -> Column:
        """The column of one part."""
        name = f"{self.label}:{part}" if part else self.label
        return Column(name, tuple(values), self.parts[part], self.important, self.about, dict(outside or {}))

    def columns(self) -> list[str]:
        """The names of the columns this instrument makes."""
        return [f"{self.label}:{part}" if part else self.label for part in self.parts]

    def to_json(self) -> dict[str, Any]:
        """Name and parameters as plain values."""
        parameters: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"name": self.name, **json.loads(json.dumps(parameters))}


class Forward(Instrument, Generic[T]):
    """Reduces what streams by at its `sites`; the tally of type T is its running state.

    "lens" shows the model's prediction read off the residual stream at each layer's input, on a sample of
    positions; it is not combined with other sites. `reach` says how many layers back an input is needed.
    """

    sites: ClassVar[frozenset[Site]]

    @property
    def reach(self) -> int:
        return 0

    @abstractmethod
    def start(self, spec: StackSpec) -> T:
        """An empty tally. Raises BadOption where the parameters do not fit the model."""

    @abstractmethod
    def update(self, tally: T, layer: int, seen: Seen) -> None:
        """Add what one batch showed at one layer."""

    @abstractmethod
    def merge(self, a: T, b: T) -> T:
        """The tally of both, leaving its inputs alone."""

    @abstractmethod
    def finish(self, tally: T) -> tuple[Column, ...]:
        """The columns."""


class Averaged(Instrument):
    """The mean of values per token, taken over real tokens in float64; its tally is a sum and a count."""

    @property
    def reach(self) -> int:
        return 0

    @abstractmethod
    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        """Part to values [B, T]; nan where a token says nothing."""

    def start(self, spec: StackSpec) -> Means:
        return Means.empty(self.parts, len(spec.rows))

    def update(self, tally: Means, layer: int, seen: Seen) -> None:
        if layer >= self.reach:
            for part, values_BT in self.values(seen).items():
                tally.add(part, layer - self.reach, values_BT, seen.mask_BT)

    def merge(self, a: Means, b: Means) -> Means:
        return a + b

    def finish(self, tally: Means) -> tuple[Column, ...]:
        return tuple(self.column(part, tally.mean(part)) for part in self.parts)


class TokenMean(Averaged, Forward[Means]):
    """A forward instrument that is a mean over tokens."""


@dataclass(frozen=True)
class Call:
    """How a module calls one of its layers: `run` does it again, `hidden` is the tensor that enters."""

    run: Callable[[], object]
    hidden: Tensor


class PerLayer(Instrument):
    """Reads one layer at a time: its row, its weights, or the time it takes."""

    @abstractmethod
    def of(self, stack: Stack, layer: int, call: Call | None) -> Mapping[str, float]:
        """Part to value. `call` runs a module's layer on the first batch, None for a decoder."""


class Reading(Instrument):
    """Reads one layer at a time together with the states of all data that enter it."""

    @abstractmethod
    def of_layer(self, stack: Stack, layer: int, states: Sequence[State]) -> Mapping[str, float]:
        """Part to value; a part that this layer cannot have is left out."""

    def of_tables(self, stack: Stack, states: Sequence[State]) -> Mapping[str, Mapping[str, float]]:
        """"embedding" and "head" to part and value, from the states of all data that leave the last layer."""
        return {}

    def finish(self, found: Sequence[Mapping[str, float]],
               tables: Mapping[str, Mapping[str, float]]) -> tuple[Column, ...]:
        """The columns, from the values of every layer and table; a part that nothing has makes none."""
        return tuple(
            self.column(part, (values.get(part, math.nan) for values in found),
                        {place: values[part] for place, values in tables.items() if part in values})
            for part in self.parts if any(part in values for values in (*found, *tables.values())))


class Gradient(Instrument):
    """Looks at the gradient of the loss: of next tokens, or for a module of labels."""

    needs: ClassVar[Needs] = "labels"


class StateGradient(Averaged, Gradient):
    """The mean over tokens of what is read off a layer's states beside the gradient of the loss summed over the batch.

    Sites are "input", "output" and "gradient", that of the output. No row changes another's gradient, so tallies merge.
    """


class WeightGradient(Gradient):
    """Compares weights with the gradient of the mean loss over all data."""

    @abstractmethod
    def of(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
        """The value of one layer; `gradients` are float32, summed over batches with their signs."""


class Walk(Instrument):
    """Walks all data through a decoder by itself, where later layers must be known before earlier ones are judged."""

    @abstractmethod
    def check(self, inputs: Inputs) -> None:
        """Before anything runs: raise BadData for data that does not do, BadOption for parameters."""

    @abstractmethod
    def walk(self, stack: Stack, inputs: Inputs, seed: int, progress: Progress) -> tuple[Column, ...]:
        """The columns; `seed` draws positions, `progress` counts two runs of every layer a batch.

        Raises BadModel where the output is NaN or infinite.
        """


@dataclass(frozen=True)
class Trial:
    """One alternative: where (a layer, "embedding" or "head") and which (the part of the column it fills)."""

    place: int | str
    part: str

    @property
    def key(self) -> str:
        return f"{self.place}/{self.part}"


class Intervention(Instrument):
    """Tries alternatives and compares the output with the original's at `tokens` positions of every row.

    Layers after the change run on all tokens; the head runs only at the sampled positions. `needs` says whether a
    module that is no decoder can have it, and whether its data must then have labels.
    """

    needs: ClassVar[Needs] = "tokens"

    tokens: int | None

    @abstractmethod
    def trials(self, stack: Stack) -> list[Trial]:
        """Everything to try. Raises BadOption where the model has nothing of the kind."""

    @abstractmethod
    def alternative(self, stack: Stack, trial: Trial) -> nn.Module | Stack:
        """The block to run in the layer's place; for a place outside the layers, the changed stack."""

    def sources(self, stack: Stack) -> frozenset[int]:
        """Layers whose keys and values a trial reads, though no layer of the model does."""
        return frozenset()

    @abstractmethod
    def score(self, original: Ending, changed: Ending) -> float:
        """How far the changed output is from the original."""

    def finish(self, layers: int, values: Mapping[Trial, float]) -> tuple[Column, ...]:
        """The columns, from the score of every trial."""
        places = sorted({trial.place for trial in values if isinstance(trial.place, str)})
        return tuple(self.column(
            part, (values.get(Trial(layer, part), math.nan) for layer in range(layers)),
            {place: values[Trial(place, part)] for place in places if Trial(place, part) in values},
        ) for part in self.parts if any(trial.part == part for trial in values))


class Skipping(Intervention):
    """Tries every layer skipped; what is left to say is the score."""

    def trials(self, stack: Stack) -> list[Trial]:
        return [Trial(layer, "") for layer in range(len(stack))]

    def alternative(self, stack: Stack, trial: Trial) -> nn.Module:
        assert isinstance(trial.place, int)
        return stack.absent(trial.place)
