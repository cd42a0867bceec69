"""The engine: requests in, events out, one step at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Map

import psutil
import torch
from torch import Tensor

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.generate.sample import prompt_ids
from layerwise.nets.compiled import DTYPES
from layerwise.serve.budgets import compact
from layerwise.serve.caches import Caches
from layerwise.serve.drafts import Drafter, accepted
from layerwise.serve.metrics import Counts
from layerwise.serve.outcome import Outcome
from layerwise.serve.plan import Action, in_order, plan
from layerwise.serve.prefix import Eviction, recency
from layerwise.serve.request import Completion, Event, Params, QueueFull, Request, TooLong
from layerwise.serve.residency import Staged
from layerwise.serve.runner import Runner
from layerwise.serve.sampler import Position, logprobs, sample
from layerwise.serve.scheduler import Limits, Scheduler
from layerwise.serve.sequence import Row
from layerwise.serve.sequence import Sequence as Running
from layerwise.serve.table import LayerTable, layer_table
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.prepared import prepared

MOST_CACHED = 1 << 17
"""Tokens that the cache holds where memory allows and nothing else is said."""


def whole(tokens: int) -> int:
    """Every prompt passes all layers in one step."""
    return 1


def layered(tokens_a_step: int = 512) -> Callable[[int], int]:
    """A prompt passes the layers in ceil(tokens / `tokens_a_step`) steps, each token each layer once (2510.08055)."""
    return lambda tokens: max(1, -(-tokens // tokens_a_step))


class Engine:
    """Continues many requests at once. Not safe for threads: `AsyncEngine` owns one in a thread of its own.

    `running` sequences and `step_tokens` tokens at most share a step; up to `waiting` requests queue. `cache_tokens`
    tokens in blocks of `block` are kept (by default up to 131072, in at most a quarter of the free memory). `table`
    says what each layer keeps and who runs it. `groups` splits prompts by layers instead of by tokens, `drafter`
    guesses tokens ahead, `action` runs a span of layers, `eviction` orders what the prefix cache lets go. With
    `prepare` the engine runs a copy of the blocks laid out for speed, without hooks.
    """

    def __init__(self, stack: Stack, *, running: int = 64, waiting: int = 4096, step_tokens: int = 512,
                 cache_tokens: int | None = None, block: int = 16, prefix_cache: bool = True,
                 table: LayerTable | None = None, groups: Callable[[int], int] = whole,
                 drafter: Drafter | None = None, action: Action = in_order, eviction: Eviction = recency,
                 prepare: bool = True) -> None:
        if not isinstance(stack, DecoderStack):
            raise BadModel(f"{type(stack).__name__} {stack.name}",
                           expected="a decoder language model of a known family",
                           do="open its Hugging Face folder instead of the module")
        for name, value in (("running", running), ("waiting", waiting), ("step_tokens", step_tokens), ("block", block)):
            if value < 1:
                raise BadOption(f"{name}={value}", expected="1 or more", do="change it or leave it out")
        self.stack, self.waiting = prepared(stack) if prepare else stack, waiting
        kept = stack if stack.dtype in DTYPES else self.stack  # keys stay in bfloat16 where float32 is only computed in
        self.table = table or layer_table(kept.spec)
        tokens = cache_tokens or _cache_tokens(stack, self.table)
        blocks = max(2, -(-tokens // block))
        states = _states(stack, self.table, running)
        self.caches = Caches(self.table, blocks, block, share=prefix_cache, eviction=eviction, states=states)
        self.scheduler = Scheduler(self.caches, len(stack), Limits(running, max(step_tokens, running), groups=groups))
        self.runner = Runner(self.stack, self.table, blocks, block, states, kept.dtype)
        self.drafter, self.action = drafter, action
        if self.table.elsewhere and action is in_order:
            self.action = Staged(self.stack, self.table.elsewhere)
        if drafter is not None:
            if self.table.is_recurrent:
                raise BadOption(f"guesses for {stack.name}, some of whose layers keep a state",
                                expected="layers that can take a refused guess back", do="leave the drafter out")
            drafter.begin(self.runner)
        self.counts = Counts()
        self._live: dict[str, Outcome] = {}
        self._news: list[Event] = []

    # requests ------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have."""
        return min(self.stack.spec.context, self.caches.capacity)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises QueueFull, TooLong, BadData for a prompt that is empty or has tokens outside the vocabulary, and
        BadOption for an id that is in use.
        """
        self._check(request)
        params = request.params
        limit = min(params.max_tokens, self.longest - len(request.prompt) + 1)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        sequence = Running(request, self.counts.requests, limit, seed, self.caches.tables())
        eos = self.stack.tokenizer.eos if self.stack.tokenizer else None
        stops = params.stop_ids if params.stop_ids is not None else (() if eos is None else (eos,))
        self._live[request.id] = Outcome(sequence, frozenset(stops), self.stack.tokenizer)
        self.scheduler.add(sequence)
        self.counts.requests += 1

    def _check(self, request: Request) -> None:
        if len(self.scheduler.waiting) >= self.waiting:
            raise QueueFull(f"{len(self.scheduler.waiting)} requests waiting", expected=f"fewer than {self.waiting}",
                            do="try again later")
        if request.id in self._live:
            raise BadOption(f"the id {request.id!r}, which is in use", expected="an id of its own",
                            do="leave it out to get one")
        if not request.prompt:
            raise BadData("an empty prompt", expected="at least one token", do="write something to continue")
        if len(request.prompt) > self.longest:
            raise TooLong(len(request.prompt), self.longest, f"what {self.stack.name} is served with")
        vocabulary = self.stack.spec.vocabulary
        for token in (min(request.prompt), max(request.prompt), *request.params.logit_bias):
            if not 0 <= token < vocabulary:
                raise BadData(f"token {token}", expected=f"ids in 0..{vocabulary - 1}",
                              do="use this model's own tokenizer")

    def cancel(self, id: str) -> None:
        """End a request at once; its last event, `cancelled`, comes with the next step. Unknown ids are ignored."""
        live = self._live.get(id)
        if live is not None:
            self._end(live)
            self._news.append(live.ended("cancelled"))
            self.counts.cancelled += 1

    def fail(self, why: str) -> None:
        """End all requests with an error, which comes with the next step."""
        for live in list(self._live.values()):
            self._end(live)
            self._news.append(live.ended("error", why))

    @property
    def busy(self) -> bool:
        """Whether any request waits, runs, or has an event that was not given yet."""
        return bool(self._live or self._news)

    def generate(self, prompts: Sequence[str | Sequence[int]], params: Params | Sequence[Params] | None = None
                 ) -> list[Completion]:
        """Continue every prompt (text or token ids), in the order given. Where `add` raises, all of them end."""
        each = [params or Params()] * len(prompts) if isinstance(params, Params | None) else list(params)
        requests = [Request(tuple(prompt_ids(self.stack, prompt)), own)
                    for prompt, own in zip(prompts, each, strict=True)]
        events: dict[str, list[Event]] = {request.id: [] for request in requests}
        left = iter(requests)
        following = next(left, None)
        try:
            while following or self.busy:
                while following and len(self.scheduler.waiting) < self.waiting:
                    self.add(following)
                    following = next(left, None)
                for event in self.step():
                    events.setdefault(event.id, []).append(event)
        except BaseException:  # Ctrl-C too
            for request in requests:
                self.cancel(request.id)
            raise
        return [Completion.of(request, events[request.id]) for request in requests]

    # one step ------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Run one step; what is new. Empty where nothing is left to do, or nothing came of it yet."""
        step = self.scheduler.step(self.drafter.most if self.drafter else 0)
        self._forget(*step.evicted)
        rows = sorted(step.rows, key=lambda row: row.size)
        if rows:
            if self.drafter is not None:
                self._draft(rows)
                rows.sort(key=lambda row: row.size)
            logits_PV = self.runner.run(rows, plan(rows, self.table.skipped, self.action))
            self.counts.steps += 1
            self.counts.tokens += step.tokens
            self._conclude(rows, logits_PV)
        news, self._news = self._news, []
        return news

    def _draft(self, rows: list[Row]) -> None:
        assert self.drafter is not None
        for row in rows:
            if row.sequence.request.params.grammar is not None:
                row.room = 0
        self.drafter.draft(rows)

    def _conclude(self, rows: list[Row], logits_PV: Tensor) -> None:
        """Draw tokens for rows at their end, take note of all rows, and tell the news."""
        place = 0
        ends: list[tuple[Row, int]] = []
        for row in rows:
            end = place + row.wanted + len(row.drafts)
            if row.layers.stop == len(self.stack) and row.start + row.count == len(row.sequence.tokens):
                ends.append((row, end - len(row.drafts) - 1))
            if row.sequence.request.params.prompt_logprobs and row.wanted and row.start < row.sequence.prompt:
                self._score(row, logits_PV[place:end])
            place = end
        drawn = self._drawn(ends, logits_PV)
        found = {id(row): (first, tokens) for (row, first), tokens in zip(ends, drawn, strict=True)}
        for row in rows:
            first, tokens = found.get(id(row), (0, []))
            self._advance(row, tokens, logits_PV[first : first + len(tokens or ())])

    def _drawn(self, ends: list[tuple[Row, int]], logits_PV: Tensor) -> list[list[int] | None]:
        """A token for every position of each row; None for a row whose grammar failed."""
        positions, places = [], []
        for row, first in ends:
            sequence = row.sequence
            for count in range(len(row.drafts) + 1):
                context = sequence.tokens + row.drafts[:count] if count else sequence.tokens
                positions.append(Position(sequence.request.params, sequence.seed, context, sequence.prompt))
                places.append(first + count)
        if not places:
            return []
        wanted_PV = logits_PV if len(places) == len(logits_PV) else logits_PV[places]
        tokens: list[int] | None
        try:
            tokens = sample(wanted_PV, positions)
        except Exception:
            if not any(position.params.grammar for position in positions):
                raise
            tokens = None
        found: list[list[int] | None] = []
        start = 0
        for row, _ in ends:
            stop = start + len(row.drafts) + 1
            found.append(self._alone(wanted_PV[start:stop], positions[start:stop]) if tokens is None
                         else tokens[start:stop])
            start = stop
        return found

    @staticmethod
    def _alone(logits_PV: Tensor, positions: list[Position]) -> list[int] | None:
        try:
            return sample(logits_PV, positions)
        except Exception:
            return None

    def _advance(self, row: Row, drawn: list[int] | None, logits_PV: Tensor) -> None:
        """Commit what a row has reached; `drawn` is empty where it is not at its end."""
        live = self._live[row.sequence.id]
        if drawn is None:
            self._end(live)
            self._news.append(live.ended("error", "the grammar failed"))
            return
        right = accepted(row.drafts, drawn) if drawn else 0
        tokens = live.take(drawn[: right + 1]) if drawn else []
        self.scheduler.commit(row, tokens)
        row.sequence.drafted += len(row.drafts)
        row.sequence.accepted += max(0, len(tokens) - 1)
        self.counts.generated += len(tokens)
        if tokens and row.sequence.request.params.logprobs is not None:
            count = row.sequence.request.params.logprobs
            live.logprobs += logprobs(logits_PV[: len(tokens)], tokens, [count] * len(tokens))
        if drawn or live.finish:
            if live.finish:
                self._end(live)
                self.counts.finish(row.sequence)
            self._news.append(live.event())
        if self.table.has_budgets and not live.finish and row.layers.stop == len(self.stack):
            compact(self.runner, self.caches, row)

    def _score(self, row: Row, logits_PV: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the row's."""
        sequence = row.sequence
        following = sequence.tokens[row.start + 1 : min(row.start + row.count + 1, sequence.prompt)]
        if following:
            count = sequence.request.params.logprobs or 0
            scores = logprobs(logits_PV[: len(following)], following, [count] * len(following))
            self._live[sequence.id].score(row.start, scores)

    def _end(self, live: Outcome) -> None:
        self.scheduler.remove(live.sequence)
        self._forget(live.sequence)
        del self._live[live.sequence.id]

    def _forget(self, *sequences: Running) -> None:
        self.runner.forget(sequences)
        if self.drafter is not None:
            for sequence in sequences:
                self.drafter.forget(sequence)

    # looking -------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that every block is free or accounted for, and that nothing outlives its request."""
        self.scheduler.check()
        known = {live.sequence for live in self._live.values()}
        scheduled = {*self.scheduler.waiting, *self.scheduler.running}
        assert known == scheduled, "requests and sequences differ"
        frontiers = {sequence for sequence in scheduled if sequence.frontier}
        assert set(self.runner.frontiers) == frontiers, "a frontier outlives its sequence"

    def metrics(self) -> Map[str, float]:
        """Counters and gauges by name (Prometheus style, without prefix)."""
        pools = self.caches.pools
        used = max((1 - pool.free / pool.count for pool in pools), default=0.0)
        return self.counts.values() | {
            "requests_running": len(self.scheduler.running), "requests_waiting": len(self.scheduler.waiting),
            "preemptions_total": self.scheduler.preemptions, "cache_used_ratio": used,
            "prefix_blocks": self.caches.tree.size if self.caches.tree else 0}


def _cache_tokens(stack: DecoderStack, table: LayerTable) -> int:
    size = sum(group.token_bytes for group in table.groups)
    room = int(_free(stack) / 4 / size) if size else MOST_CACHED
    return max(min(room, MOST_CACHED), 256)


def _states(stack: DecoderStack, table: LayerTable, running: int) -> int:
    """States of recurrent layers: one for each sequence that may run, in at most a quarter of the free memory."""
    size = sum(group.state_bytes for group in table.groups)
    return max(min(running, int(_free(stack) / 4 / size)), 1) if size else running


def _free(stack: DecoderStack) -> int:
    """Bytes that are free where the stack lies."""
    if stack.device.type == "cuda":
        return int(torch.cuda.mem_get_info(stack.device)[0])
    return psutil.virtual_memory().available  # type: ignore[no-any-return]
