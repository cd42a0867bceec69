"""From Tokens to Layers: Stall-Free Scheduling for LLM Serving with Layered Prefill (arXiv 2510.08055)

Claims: a prompt that passes a mixture of experts layer group by layer group, once, loads fewer experts than one that
passes all layers chunk by chunk (39 % fewer bytes with long prompts, 12 % with short ones); its first token comes
sooner and all of it too; and no stream stalls, as streams do where whole prompts join a step.

From the official code: contiguous groups of layers, as many as the prompt has chunks, one prompt on its way at a time,
a token for every stream in each step. Ours: a mixture trained on bytes (16 experts, 2 a token: the share that runs in
GPT-OSS), chunks and prompts an eighth of the paper's, one prompt instead of a cohort, and a clock that moves by the
roofline: FLOP per byte are a sixteenth of an H100's, since an expert sees an eighth of the tokens and weights take four
bytes instead of two. Bytes and tokens are counted while the engine runs; times are those of the clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, quantiles

from torch import Tensor

from layerwise.generate.sample import generate
from layerwise.measure.hardware import Machine
from layerwise.serve.engine import Engine, layered, whole
from layerwise.serve.meter import Meter, Work, expert_bytes, layer_bytes, seconds
from layerwise.serve.replay import Served, replay
from layerwise.serve.request import Params, Request
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.mixture import mixture, routed
from layerwise.systems.sizes import byte_blocks

H100 = Machine(989e12 / 16, 3.35e12)
LOAD, ENOUGH, RUNNING = 0.7, 4096, 16
"""Share that arrives of what chunked prefill could serve; tokens of a step that takes whole prompts; most streams."""


@dataclass(frozen=True)
class Scale:
    """The mixture and its steps of training; requests of a trace; tokens of a chunk; prompts and outputs by trace."""

    layers: int
    experts: int
    chosen: int
    steps: int
    requests: int
    chunk: int
    prompts: Mapping[str, tuple[int, int]]
    outputs: Mapping[str, tuple[int, int]]


SCALES: dict[Size, Scale] = {
    "quick": Scale(6, 8, 1, 0, 5, 16, {"long": (64, 128), "short": (4, 40)}, {"long": (4, 8), "short": (4, 12)}),
    "full": Scale(12, 16, 2, 100, 16, 64, {"long": (512, 1024), "short": (8, 128)},
                  {"long": (16, 32), "short": (16, 48)}),
}
Schedule = tuple[int, Callable[[int], int]]


@dataclass
class Run:
    """What a schedule did with a trace: requests as served, and the work of every step."""

    served: list[Served]
    steps: list[list[Work]]

    def loaded(self, stack: DecoderStack) -> float:
        """Bytes of experts that a request loads on average."""
        return sum(expert_bytes(stack.spec, step) for step in self.steps) / len(self.served)


def run(size: Size, seed: int) -> list[Check]:
    """Both traces under every schedule: tokens, bytes of experts, and times on the clock; and a dense network."""
    scale = SCALES[size]
    training, held = byte_blocks(seed)
    stack = mixture(training, layers=scale.layers, experts=scale.experts, chosen=scale.chosen, steps=scale.steps,
                    seed=seed)
    dense = mixture(training, layers=scale.layers, experts=0, chosen=scale.chosen, steps=0, seed=seed)
    schedules = {"layered": (scale.chunk, layered(scale.chunk)), "chunked": (scale.chunk, whole),
                 "chunks of four times the size": (4 * scale.chunk, whole), "whole prompts": (ENOUGH, whole)}
    traces = {name: _requests(scale, name, held, seed) for name in scale.prompts}
    runs = {trace: {name: _run(stack, requests, schedule, pace) for name, schedule in schedules.items()}
            for trace, requests in traces.items()
            for pace in [_pace(stack, requests, schedules["chunked"])]}
    busy = _beside_a_stream(traces["long"][:4], scale)
    plain, mixed = ({name: sum(layer_bytes(model.spec, step) for step in _run(model, busy, schedules[name], 0.0).steps)
                     for name in ("layered", "chunked")} for model in (dense, stack))
    return [_tokens(stack, traces, runs, scale), *_bytes(stack, runs, size), _dense(plain, mixed, size),
            *_times(runs["long"], size), _formula(runs["long"]["chunked"], scale, size)]


def _requests(scale: Scale, trace: str, held: Tensor, seed: int) -> list[Request]:
    draw, text = random.Random(f"{trace} {seed}"), held.flatten().tolist()
    found = []
    for _ in range(scale.requests):
        count = draw.randint(*scale.prompts[trace])
        start = draw.randrange(len(text) - count)
        found.append(Request(tuple(text[start : start + count]),
                             Params(max_tokens=draw.randint(*scale.outputs[trace]), stop_ids=())))
    return found


def _run(stack: DecoderStack, requests: Sequence[Request], schedule: Schedule, pace: float, seed: int = 0) -> Run:
    """Serve with `pace` seconds between requests on average, drawn as in a Poisson stream; 0: all at once."""
    draw, meter, now = random.Random(seed), Meter(), 0.0
    arrivals = [now := now + (draw.expovariate(1 / pace) if pace else 0.0) for _ in requests]
    step_tokens, groups = schedule
    engine = Engine(stack, action=meter, running=RUNNING, step_tokens=step_tokens, groups=groups, prefix_cache=False,
                    cache_tokens=sum(len(request.prompt) + request.params.max_tokens for request in requests) + 4096)
    steps: list[list[Work]] = []

    def passed() -> float:
        steps.append(meter.take())
        return seconds(stack.spec, steps[-1], H100)

    return Run(replay(engine, requests, arrivals, passed), steps)


def _pace(stack: DecoderStack, requests: Sequence[Request], schedule: Schedule) -> float:
    """Seconds between requests at which chunked prefill is busy for the share `LOAD` of the time."""
    once = _run(stack, requests, schedule, 0.0)
    return sum(seconds(stack.spec, step, H100) for step in once.steps) / len(requests) / LOAD


Runs = Mapping[str, Mapping[str, Run]]


def _tokens(stack: DecoderStack, traces: Mapping[str, Sequence[Request]], runs: Runs, scale: Scale) -> Check:
    asked = [(trace, place) for trace in traces for place in range(min(3, scale.requests))]
    other_routes = routed(stack, scale.chosen % scale.experts + 1)

    def alone(model: DecoderStack) -> list[list[int]]:
        return [list(generate(model, traces[trace][place].prompt, stop=(),
                              max_tokens=traces[trace][place].params.max_tokens)) for trace, place in asked]

    expected, other = alone(stack), alone(other_routes)
    found = {name: [runs[trace][name].served[place].tokens for trace, place in asked] for name in runs["long"]}
    same = {trace: [one.tokens for one in each["layered"].served] == [one.tokens for one in each["chunked"].served]
            for trace, each in runs.items()}
    return Check(
        name="tokens are the same",
        claim="every schedule gives the tokens of plain passes through the model",
        measured={"share of tokens as in plain passes": {name: _same(tokens, expected) for name, tokens in
                                                         found.items()},
                  "all requests layered as chunked": same},
        control={"plain passes with one more expert a token": _same(other, expected)},
        holds=all(tokens == expected for tokens in found.values()) and all(same.values()),
        why=f"greedy, float32; plain passes for {len(asked)} requests, schedules against each other for all")


def _bytes(stack: DecoderStack, runs: Runs, size: Size) -> list[Check]:
    less = {trace: {name: round(1 - run.loaded(stack) / each["chunked"].loaded(stack), 3)
                    for name, run in each.items()} for trace, each in runs.items()}
    layered_less = {trace: each.pop("layered") for trace, each in less.items()}
    measured = {"fewer bytes of experts than chunked": layered_less,
                "megabytes a request, layered": {trace: round(each["layered"].loaded(stack) / 1e6, 3)
                                                 for trace, each in runs.items()}}
    control = {"fewer bytes of experts than chunked": less,
               "megabytes a request, chunked": {trace: round(each["chunked"].loaded(stack) / 1e6, 3)
                                                for trace, each in runs.items()}}
    told = size == "full"
    return [
        Check(name="fewer experts are loaded",
              claim="layered prefill loads fewer bytes of experts than chunked prefill, the more so the longer prompts",
              measured=measured, control=control,
              holds=0 < layered_less["short"] < layered_less["long"] if told else None,
              why="counted in every step: an expert's three matrices are read once where any token goes to it"),
        Check(name="as many fewer as in the paper",
              claim="39 % fewer bytes of experts with long prompts, 12 % with short ones",
              measured=measured, control=control,
              holds=layered_less["long"] >= 0.39 and layered_less["short"] >= 0.12 if told else None,
              why="holds where both are reached; how much depends on how many streams decode beside a prompt, and "
                  "whole prompts are the bound of what a schedule can save")]


def _beside_a_stream(requests: Sequence[Request], scale: Scale) -> list[Request]:
    """The requests, and before them one that writes until all others are through their prompts."""
    steps = sum(-(-len(request.prompt) // (scale.chunk - len(requests) - 1)) + request.params.max_tokens
                for request in requests)
    return [Request((0,) * 4, Params(max_tokens=steps, stop_ids=())), *requests]


def _dense(dense: Mapping[str, float], mixed: Mapping[str, float], size: Size) -> Check:
    saved, saved_experts = (1 - each["layered"] / each["chunked"] for each in (dense, mixed))
    return Check(
        name="the gain is the experts'",
        claim="while a stream decodes, a dense network gains nothing, since every step reads its weights whole",
        measured={"fewer bytes of weights than chunked, dense": round(saved, 3)},
        control={"fewer bytes of weights than chunked, mixture": round(saved_experts, 3)},
        holds=saved < 0.1 * saved_experts if size == "full" else None,
        why="long prompts at once beside one long stream; the network is as wide as the chosen experts together, and "
            "not trained, since its bytes do not depend on its weights; holds below a tenth of the mixture's gain")


def _times(runs: Mapping[str, Run], size: Size) -> list[Check]:
    told = size == "full"
    first = {name: [one.first for one in run.served] for name, run in runs.items()}
    end = {name: [one.whole for one in run.served] for name, run in runs.items()}
    gaps = {name: [gap for one in run.served for gap in one.gaps] for name, run in runs.items()}
    tables = [{name: {"mean": _micro(mean(values)), "p99": _micro(_p99(values)), "worst": _micro(max(values))}
               for name, values in each.items()} for each in (first, end, gaps)]
    ours = [table.pop("layered") for table in tables]
    return [
        Check(name="first tokens come sooner",
              claim="time to the first token falls against chunked prefill (2.80 to 1.24 s on average, 8.65 to 4.10 s "
                    "at the 99th percentile)",
              measured={"microseconds": ours[0]}, control={"microseconds": tables[0]},
              holds=all(ours[0][key] < tables[0]["chunked"][key] for key in ("mean", "p99")) if told else None,
              why=f"long prompts at {LOAD:.0%} of what chunked prefill can serve; the clock is a roofline"),
        Check(name="requests end sooner",
              claim="time to the last token falls against chunked prefill (9.4 to 5.5 s)",
              measured={"microseconds": ours[1]}, control={"microseconds": tables[1]},
              holds=ours[1]["mean"] < tables[1]["chunked"]["mean"] if told else None,
              why="as above; holds where the mean is lower"),
        Check(name="no stream stalls",
              claim="gaps between tokens stay near those of chunked prefill, while larger chunks and whole prompts "
                    "stretch them (48 to 129 ms with four times the chunk)",
              measured={"microseconds": ours[2]}, control={"microseconds": tables[2]},
              holds=(ours[2]["p99"] <= 1.1 * tables[2]["chunked"]["p99"] < tables[2]["whole prompts"]["p99"])
              if told else None,
              why="as above; holds where the 99th percentile is at most a tenth above that of chunked prefill, and "
                  "that of whole prompts is higher")]


def _formula(run: Run, scale: Scale, size: Size) -> Check:
    found: dict[str, list[tuple[int, float]]] = {"up to 8 tokens": [], "more": []}
    for step in run.steps:
        for work in step:
            expected = scale.experts * (1 - (1 - scale.chosen / scale.experts) ** work.tokens)
            found["up to 8 tokens" if work.tokens <= 8 else "more"].append((work.experts, expected))
    means = {name: [round(mean(column), 2) for column in zip(*pairs, strict=True)] for name, pairs in found.items()
             if pairs}
    return Check(
        name="how many experts are touched",
        claim="n tokens that choose k of E experts touch E (1 - (1 - k/E)^n) of them, as if they chose evenly",
        measured={name: each[0] for name, each in means.items()},
        control={name: each[1] for name, each in means.items()},
        holds=all(abs(each[0] / each[1] - 1) <= 0.1 for each in means.values()) if size == "full" else None,
        why="layers and steps of the long trace with chunks, by tokens in the step; the control is the formula; holds "
            "where both means are within a tenth of it")


def _same(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    pairs = [(left, right) for one, other in zip(a, b, strict=True) for left, right in zip(one, other, strict=True)]
    return round(sum(left == right for left, right in pairs) / len(pairs), 3)


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def _micro(value: float) -> float:
    return round(value * 1e6, 1)
