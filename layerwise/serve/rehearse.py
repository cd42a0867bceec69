"""What the steps of an offline run would be, without a model: the scheduler and the caches run, nothing is computed.

Every request writes exactly as many tokens as it may. A run of the engine in which every request does so takes the
same steps with the same tokens; only requests with the same prompt may differ, since theirs are taken to go on alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layerwise.errors import BadOption
from layerwise.serve.caches import Caches
from layerwise.serve.prefix import Eviction, recency
from layerwise.serve.request import Request
from layerwise.serve.scheduler import Limits, Scheduler
from layerwise.serve.sequence import Sequence as Running
from layerwise.serve.table import LayerTable


@dataclass(frozen=True)
class Step:
    """Tokens of one step, how many of them belong to prompts, how many of its rows write a token, and the keys that
    its rows look at.
    """

    tokens: int
    prompt: int
    writing: int
    keys: int


@dataclass
class Rehearsal:
    """All steps; the tokens of all prompts; how often a sequence was sent away for lack of room."""

    steps: list[Step] = field(default_factory=list)
    prompt: int = 0
    preemptions: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that were computed."""
        return sum(step.tokens for step in self.steps)

    @property
    def saved(self) -> float:
        """Share of the prompt tokens that were not computed; what was computed twice counts twice."""
        return 1 - sum(step.prompt for step in self.steps) / self.prompt


def rehearse(table: LayerTable, requests: Sequence[Request], limits: Limits, *, cache_tokens: int, block: int = 16,
             share: bool = True, eviction: Eviction = recency, done: Callable[[int], None] | None = None) -> Rehearsal:
    """The steps of `requests`, queued in the order given; `done` hears the place of each that ends.

    Raises BadOption for a request that does not fit into the cache.
    """
    caches = Caches(table, max(2, -(-cache_tokens // block)), block, share=share, eviction=eviction,
                    states=limits.running)
    depth, found = len(table.layers), Rehearsal()
    scheduler = Scheduler(caches, depth, limits)
    places: dict[Running, int] = {}
    for place, request in enumerate(requests):
        if len(request.prompt) + request.params.max_tokens - 1 > caches.capacity:
            raise BadOption(f"{len(request.prompt)} tokens of prompt and {request.params.max_tokens} to write",
                            expected=f"at most {caches.capacity + 1} together", do="give a larger cache")
        sequence = Running(request, place, request.params.max_tokens, 0, caches.tables())
        places[sequence] = place
        scheduler.add(sequence)
    while places:
        step = scheduler.step()
        writing = prompt = 0
        for row in step.rows:
            sequence = row.sequence
            prompt += max(0, min(row.start + row.count, sequence.prompt) - row.start)
            whole = row.layers.stop == depth and row.start + row.count == len(sequence.tokens)
            writing += whole
            scheduler.commit(row, [0] * whole)
            if sequence.left == 0:
                scheduler.remove(sequence)
                found.prompt += sequence.prompt
                if done is not None:
                    done(places[sequence])
                del places[sequence]
        found.steps.append(Step(step.tokens, prompt, writing, sum(row.start + row.count for row in step.rows)))
    found.preemptions = scheduler.preemptions
    return found
