"""The engine: requests in, events out, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerwise.serve.request import Completion, Event, Params, Request
from layerwise.stack.decoder import DecoderStack


class Engine:
    """Continues many requests at once. Not safe for threads: `AsyncEngine` owns one in a thread of its own."""

    def __init__(self, stack: DecoderStack, *, running: int = 64, waiting: int = 4096, step_tokens: int = 512,
                 cache_tokens: int | None = None, block: int = 16, prefix_cache: bool = True) -> None:
        raise NotImplementedError

    def add(self, request: Request) -> None:
        """Queue a request. Raises QueueFull, TooLong, or BadData for a prompt that is empty or has foreign tokens."""
        raise NotImplementedError

    def step(self) -> list[Event]:
        """Run one step; what is new. Empty where nothing is left to do."""
        raise NotImplementedError

    def cancel(self, id: str) -> None:
        """End a request at once; its last event, `cancelled`, comes with the next step. Unknown ids are ignored."""
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether any request waits, runs, or has an event that was not given yet."""
        raise NotImplementedError

    def generate(self, prompts: Sequence[str | Sequence[int]], params: Params | Sequence[Params] = Params()
                 ) -> list[Completion]:
        """Continue every prompt (text or token ids), in the order given."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Assert that every block is free or accounted for, and that nothing outlives its request."""
        raise NotImplementedError

    def metrics(self) -> Mapping[str, float]:
        """Counters and gauges by name (Prometheus style, without prefix)."""
        raise NotImplementedError
