"""`Report`: what verification found, before and after, as plain values that print, save and draw."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.data.bootstrap import Interval
from layerwise.data.sequential import Verdict, verdict
from layerwise.errors import BadFile
from layerwise.io import atomic
from layerwise.report.layers import LayerChange
from layerwise.train.healing import Healing

if TYPE_CHECKING:
    from layerwise.measure.scores import Scores

FORMAT = "layerwise-report-1"


@dataclass(frozen=True)
class Measurement:
    """One model as it is stored and as it runs here.

    Speeds are of one stream; peak memory is that of a fresh process that opened the model, read a prompt and
    wrote. `cache_bytes` is what a token takes in the cache (see `StackSpec.cache_bytes`). What could not be
    measured is None, and `notes` say why. `perplexity_interval` is (low, high).
    """

    bytes: int
    parameters: int
    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    peak_memory_bytes: int | None
    perplexity: float
    perplexity_interval: tuple[float, float]
    notes: tuple[str, ...] = ()
    cache_bytes: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Measurement:
        return Measurement(
            **{
                **value,
                "perplexity_interval": tuple(value["perplexity_interval"]),
                "notes": tuple(value["notes"]),
            }
        )


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task before and after, and the difference on the same items."""

    before: float
    after: float
    change: Interval
    chance: float

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TaskResult:
        return TaskResult(**{**value, "change": Interval(**value["change"])})


@dataclass(frozen=True)
class TextResult:
    """Both models on one more text: perplexities, and as in `Report` the change, divergence and agreement."""

    before: float
    after: float
    log_perplexity_change: Interval
    kl: Interval
    agreement: Interval
    tokens: int

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TextResult:
        intervals = {name: Interval(**value[name]) for name in ("log_perplexity_change", "kl", "agreement")}
        return TextResult(**{**value, **intervals})


@dataclass(frozen=True)
class Paired:
    """Is the difference of two models on the same items within `tolerance` of none?

    `change` holds at its level although the comparison may have stopped before all `available` items were tried:
    `items` of them were. It is in nats per token for perplexity and a share of items for accuracy.
    """

    change: Interval
    tolerance: float
    verdict: Verdict
    items: int
    available: int

    @staticmethod
    def of(change: Interval, tolerance: float, items: int, available: int) -> Paired:
        return Paired(change, tolerance, verdict(change, tolerance), items, available)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Paired:
        return Paired(**{**value, "change": Interval(**value["change"])})


@dataclass(frozen=True)
class Report:
    """Before and after on the same text.

    `log_perplexity_change` is after minus before in nats per token, `kl` the divergence of the new
    predictions from the old in nats per token, `agreement` the share of positions with the same first
    choice; all three are intervals over blocks of text. `layers` say what each layer got. `notes` are what
    a reader must know to judge the numbers; `healing` says what training there was.
    `texts` are further texts by name, and `tests` say of each text and task whether the difference is negligible.
    """

    model: str
    before: Measurement
    after: Measurement
    log_perplexity_change: Interval
    kl: Interval
    agreement: Interval
    layers: tuple[LayerChange, ...]
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    healing: Healing | None = None
    texts: Mapping[str, TextResult] = field(default_factory=dict)
    tests: Mapping[str, Paired] = field(default_factory=dict)

    @property
    def perplexity_ratio(self) -> Interval:
        """Perplexity after divided by before, with its paired interval."""
        return self.log_perplexity_change.map(math.exp)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`."""
        return Report(
            model=value["model"],
            before=Measurement.from_json(value["before"]),
            after=Measurement.from_json(value["after"]),
            log_perplexity_change=Interval(**value["log_perplexity_change"]),
            kl=Interval(**value["kl"]),
            agreement=Interval(**value["agreement"]),
            layers=tuple(LayerChange(**change) for change in value["layers"]),
            tasks={name: TaskResult.from_json(result) for name, result in value["tasks"].items()},
            notes=tuple(value["notes"]),
            provenance=value["provenance"],
            healing=Healing.from_json(value["healing"]) if value.get("healing") else None,
            texts={name: TextResult.from_json(found) for name, found in value.get("texts", {}).items()},
            tests={name: Paired.from_json(found) for name, found in value.get("tests", {}).items()},
        )

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON."""
        return atomic.write_text(path, json.dumps({"format": FORMAT, **self.to_json()}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Report:
        """Read what `save` wrote. Raises BadFile where it is missing, damaged or something else."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if value.pop("format") != FORMAT:
                raise ValueError(f"not in the format {FORMAT}")
            return Report.from_json(value)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadFile(
                f"the report in {path}: {error}", expected="a file written by Report.save", do="verify again"
            ) from error

    def html(
        self,
        path: str | Path,
        *,
        scores: Scores | None = None,
        plan: Mapping[str, Any] | None = None,
        tried: Sequence[Mapping[str, Any]] = (),
    ) -> Path:
        """Write one self-contained page; `scores` adds the per-layer chart, `tried` the plans compared.

        Each entry of `tried` has `name`, `kind` (plan, candidate or control), `bytes` and `kl`.
        """
        from layerwise.report.html import page

        return atomic.write_text(path, page(self, scores=scores, plan=plan, tried=tried))

    def __str__(self) -> str:
        from layerwise.report.table import text

        return text(self)

    def _repr_html_(self) -> str:
        from layerwise.report.html import fragment

        return fragment(self)
