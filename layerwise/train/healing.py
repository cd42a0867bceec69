"""What a healing took and gave, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Healing:
    """`before` and `after` are the divergence from the original on blocks that training did not read, nats per token.

    Where `helped` is False the model was left as it was, and `after` is what it would have become. `parameters`
    counts what was trained, `solved` the matrices that were set by least squares before (see `bridge`).
    """

    steps: int
    tokens: int
    seconds: float
    before: float
    after: float
    helped: bool
    parameters: int
    solved: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Healing:
        return Healing(**value)

    def __str__(self) -> str:
        change = f"divergence from the original {self.before:.4f} -> {self.after:.4f} nats/token on held-out blocks"
        end = "" if self.helped else "; that is no gain, so the model was left as it was"
        first = f"least squares in {self.solved} layer{'s' * (self.solved > 1)}, then " if self.solved else ""
        took = f"{self.steps:,} steps on {self.tokens:,} tokens in {self.seconds / 60:.1f} minutes"
        return f"{first}{took}: {change}{end}"
