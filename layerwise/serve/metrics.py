"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.serve.sequence import Sequence


@dataclass
class Counts:
    """Totals since the engine began; prompt, cached, drafted and accepted tokens of requests that have ended well."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    steps: int = 0
    tokens: int = 0
    generated: int = 0
    prompt: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0

    def finish(self, sequence: Sequence) -> None:
        """Add what a sequence used."""
        self.finished += 1
        self.prompt += sequence.prompt
        self.cached += sequence.cached
        self.drafted += sequence.drafted
        self.accepted += sequence.accepted

    def values(self) -> dict[str, float]:
        """By name."""
        return {
            "requests_total": self.requests, "requests_finished_total": self.finished,
            "requests_cancelled_total": self.cancelled, "steps_total": self.steps, "step_tokens_total": self.tokens,
            "generated_tokens_total": self.generated, "prompt_tokens_total": self.prompt,
            "cached_tokens_total": self.cached, "drafted_tokens_total": self.drafted,
            "accepted_tokens_total": self.accepted}
