"""What a part of the data has shown, as a file: several processes or machines measure parts, and the sum is exact.

    partial(stack, my_share, ["block-influence", "manifold"]).save("part-0.safetensors")      # in every process
    scores = merged([Partial.load(path) for path in paths])                                   # in one of them

Only forward instruments and gradients of states have such a state, a tally: numbers, arrays and tensors in lists,
mappings and the classes named here. In the file tensors lie under their path in the tally, everything else in the
header as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import BadFile, BadOption, LayerwiseError
from layerwise.io import atomic
from layerwise.measure import INSTRUMENTS
from layerwise.measure.backward import state_pass
from layerwise.measure.base import Forward, Instrument, StateGradient
from layerwise.measure.engine import check, resolve
from layerwise.measure.forward import Pass, forward_pass
from layerwise.measure.identity import identity
from layerwise.measure.inputs import Inputs, fingerprint
from layerwise.measure.manifold import Cloud
from layerwise.measure.progress import Progress
from layerwise.measure.scores import Scores
from layerwise.measure.tally import Means
from layerwise.spec import StackSpec
from layerwise.stack.base import Stack
from layerwise.transform.moments import Moments

FORMAT = "layerwise-partial-1"
CLASSES = {kind.__name__: kind for kind in (Means, Cloud, Moments)}
"""The classes a tally in a file may be made of."""


Mergeable = Forward[Any] | StateGradient


@dataclass(frozen=True)
class Partial:
    """The tallies of instruments over some data. `samples` are the fingerprints of the data in it."""

    spec: StackSpec
    model: str
    instruments: tuple[Mergeable, ...]
    tallies: tuple[Any, ...]
    samples: tuple[str, ...]
    tokens: int

    def __add__(self, other: Partial) -> Partial:
        """Of both. Raises BadOption for another model, other instruments, or data that is in both."""
        if (self.spec, self.model, self.instruments) != (other.spec, other.model, other.instruments):
            raise BadOption("partial results of other models or instruments", expected="the same in every part",
                            do="measure every part with the same call")
        if set(self.samples) & set(other.samples):
            raise BadOption("the same data in two partial results", expected="every part of the data once",
                            do="merge each file once")
        tallies = tuple(instrument.merge(mine, theirs) for instrument, mine, theirs
                        in zip(self.instruments, self.tallies, other.tallies, strict=True))
        return dataclasses.replace(self, tallies=tallies, samples=(*self.samples, *other.samples),
                                   tokens=self.tokens + other.tokens)

    def save(self, path: str | Path) -> Path:
        """Write to `path`, all at once. Raises BadOption for a tally of other classes than `CLASSES`."""
        tensors: dict[str, Tensor] = {}
        about = {"format": FORMAT, "spec": self.spec.to_json(), "model": self.model, "samples": self.samples,
                 "tokens": self.tokens, "instruments": [instrument.to_json() for instrument in self.instruments],
                 "tallies": _flat(list(self.tallies), "", tensors)}
        return atomic.write_bytes(Path(path), save(tensors, {"layerwise": json.dumps(about)}))

    @staticmethod
    def load(path: str | Path) -> Partial:
        """Raises BadFile where the file is missing, damaged or something else."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("layerwise", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != FORMAT:
                raise ValueError(f"the format {about.get('format')!r} instead of {FORMAT!r}")
            return Partial(StackSpec.from_json(about["spec"]), about["model"],
                           tuple(_instrument(value) for value in about["instruments"]),
                           tuple(_built(about["tallies"], tensors)), tuple(about["samples"]), about["tokens"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, LayerwiseError) as error:
            raise BadFile(f"partial results in {path}: {error}", expected="a file written by Partial.save",
                          do="measure that part again") from error


@torch.inference_mode(False)
@torch.no_grad()
def partial(stack: Stack, data: Any, instruments: str | Instrument | Iterable[str | Instrument], *, seed: int = 0,
            batch: int | None = None, lens_tokens: int | None = None, progress: bool = True) -> Partial:
    """The tallies of mergeable instruments over a part of the data; arguments and errors as `measure`.

    Raises BadOption for instruments of other kinds, which need no data or cannot be merged.
    """
    chosen = resolve(instruments)
    forward = [instrument for instrument in chosen if isinstance(instrument, Forward)]
    states = [instrument for instrument in chosen if isinstance(instrument, StateGradient)]
    for other in chosen:
        if not isinstance(other, (Forward, StateGradient)):
            raise BadOption(f"a partial result of {other.name!r}",
                            expected="instruments that share the forward pass, or read the gradients of states",
                            do=f"measure {other.name!r} in one process")
    inputs = Inputs(stack, data, batch)
    check(stack, inputs, chosen)
    tallies = [instrument.start(stack.spec) for instrument in forward]
    runs = bool(forward) + 3 * bool(states)
    with Progress("measuring", len(stack) * len(inputs) * runs, progress) as bar:
        if forward:
            forward_pass(inputs, Pass(stack, forward, tallies, bar, seed, lens_tokens))
        if states:
            tallies += state_pass(stack, inputs, states, bar)
    sample, tokens = fingerprint(inputs)
    return Partial(stack.spec, identity(stack), (*forward, *states), tuple(tallies), (sample,), tokens)


def merged(parts: Sequence[Partial]) -> Scores:
    """The scores of all parts together. Raises BadOption for none, or parts that do not belong together."""
    if not parts:
        raise BadOption("no partial results", expected="at least one", do="measure a part first")
    whole = reduce(Partial.__add__, parts)
    columns = [column for instrument, tally in zip(whole.instruments, whole.tallies, strict=True)
               for column in instrument.finish(tally)]
    return Scores(whole.spec, {column.name: column for column in columns}, whole.model, {
        "samples": list(whole.samples), "tokens": whole.tokens,
        "instruments": [instrument.to_json() for instrument in whole.instruments]})


def _instrument(value: Mapping[str, Any]) -> Mergeable:
    found: Mergeable = INSTRUMENTS[value["name"]](**{key: item for key, item in value.items() if key != "name"})
    return found


def _flat(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, in which tensors and arrays are replaced by the path under which they join `tensors`."""
    if isinstance(value, (Tensor, np.ndarray)):
        tensors[path] = (value if isinstance(value, Tensor) else torch.from_numpy(value)).contiguous().clone()
        return {"tensor" if isinstance(value, Tensor) else "array": path}
    if isinstance(value, list):
        return [_flat(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {"mapping": {str(key): _flat(item, f"{path}/{key}", tensors) for key, item in value.items()}}
    if type(value).__name__ in CLASSES:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **_flat(fields, path, tensors)}
    if isinstance(value, (int, float, str)):
        return value
    raise BadOption(f"a tally that holds a {type(value).__name__}", expected=f"numbers, arrays, {', '.join(CLASSES)}",
                    do="build the instrument's tally of these, or merge within one process")


def _built(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_built(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return tensors[value["array"]].numpy()
    if "tensor" in value:
        return tensors[value["tensor"]]
    built = {key: _built(item, tensors) for key, item in value["mapping"].items()}
    return CLASSES[value["class"]](**built) if "class" in value else built
