"""What a family is: a configuration read into a table and back, and where each tensor is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from layerwise.errors import BadModel
from layerwise.spec import Attention, LayerSpec, Rope, StackSpec

Config = Mapping[str, Any]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "relu": "relu"}
TO_CONFIG = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
AS_MODULE = "open the model as a module: layerwise.open(AutoModelForCausalLM.from_pretrained(...))"


@dataclass(frozen=True)
class Link:
    """One tensor of ours, or rows of it, as rows of one of theirs.

    ours[ours_rows] == (theirs.T if transpose else theirs)[theirs_rows]; None means all rows.
    """

    ours: str
    theirs: str
    ours_rows: tuple[int, int] | None = None
    theirs_rows: tuple[int, int] | None = None
    transpose: bool = False


class Family(ABC):
    """One model family of transformers; subclasses are stateless."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    @abstractmethod
    def spec(self, config: Config) -> StackSpec:
        """The table for a `config.json`. Raises BadModel where it asks for what we do not run."""

    @abstractmethod
    def config(self, spec: StackSpec) -> dict[str, Any]:
        """The inverse of `spec`. Raises BadModel where the family's configuration cannot say the rows."""

    @abstractmethod
    def links(self, spec: StackSpec) -> Iterator[Link]:
        """Where every tensor of the dense decoder is found in a checkpoint of this family."""


def read_activation(config: Config, key: str, default: str) -> Activation:
    """The activation that a configuration names. Raises BadModel where we do not have it."""
    name = config.get(key) or default
    if name not in ACTIVATIONS:
        raise BadModel(f"{key} {name!r}", expected=f"one of {', '.join(ACTIVATIONS)}", do=AS_MODULE)
    return ACTIVATIONS[name]


def read_rope(config: Config, theta: float = 10_000.0) -> Rope:
    """The rotary embedding of a configuration, in the old (`rope_theta`, `rope_scaling`) or new spelling."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta") or config.get("rope_theta") or theta
    part = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise BadModel(f"rotary embedding on {part:.0%} of each head", expected="on all of it", do=AS_MODULE)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=given["factor"])
    if kind == "llama3":
        return Rope(theta=theta, kind="llama3", factor=given["factor"],
                    low_frequency_factor=given["low_freq_factor"],
                    high_frequency_factor=given["high_freq_factor"],
                    original_context=given["original_max_position_embeddings"])
    raise BadModel(f"rotary scaling {kind!r}", expected="default, linear or llama3",
                   do=AS_MODULE)


def write_rope(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` entry for `rope`."""
    entry: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        entry["factor"] = rope.factor
    if rope.kind == "llama3":
        entry |= {"low_freq_factor": rope.low_frequency_factor,
                  "high_freq_factor": rope.high_frequency_factor,
                  "original_max_position_embeddings": rope.original_context}
    return entry


def read_dtype(config: Config) -> Any:
    """The stored dtype's name; float32 where the configuration names none."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadModel(f"weights of dtype {dtype!r}", expected=f"one of {DTYPES}",
                       do="convert the checkpoint first")
    return dtype


def uniform_row(spec: StackSpec) -> LayerSpec:
    """The first row; raises BadModel unless all rows are equal to it and dense."""
    return uniform(spec, lambda row: row)


def uniform(spec: StackSpec, key: Any) -> LayerSpec:
    """The first row; raises BadModel unless `key(row)` is equal for all rows, which are whole and dense."""
    if not spec.rows:
        raise not_uniform(spec, "it has no layers")
    first = spec.rows[0]
    for index, row in enumerate(spec.rows):
        if not isinstance(row.mixer, Attention) or row.feed_forward is None:
            raise not_uniform(spec, f"layer {index} has lost a half")
        if key(row) != key(first):
            raise not_uniform(spec, f"layer {index} differs from layer 0")
    if spec.packed():
        raise not_uniform(spec, "some matrices are packed")
    return first


def not_uniform(spec: StackSpec, why: str) -> BadModel:
    return BadModel(f"a {spec.family} table that its standard configuration cannot say: {why}",
                    expected="equal dense rows", do="save it in the layer-table format")
