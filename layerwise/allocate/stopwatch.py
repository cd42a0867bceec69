"""A clock that measures: milliseconds of one pass over a few tokens, part by part, on this machine.

A layer's time is that of its matrices and of the rest (norms, attention over the past, activations), each
measured once per shape and format with arbitrary weights, since time does not depend on their values. Several
copies run one after the other, so that weights come from memory, as they do in a whole model, and not from a
cache that a single matrix would fit into. What was measured is kept for this machine and these versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from layerwise.allocate.budget import Budget
from layerwise.allocate.cost import Clock, Clocks
from layerwise.errors import BadBudget
from layerwise.io import atomic
from layerwise.measure.timing import median_seconds
from layerwise.nets.decoder import Block, Decoder
from layerwise.nets.factored import build_linear
from layerwise.nets.flow import AnyCache, Flow, LayerCache, StateCache
from layerwise.places import cache_folder
from layerwise.spec import Attention, Format, LayerSpec, Opaque, StackSpec, StateSpace

MOST_COPIES = 24

PROMPT = 256
"""Tokens of the prompt whose reading a limit on prefill is about; half the context where that is less."""

PROMPT_BYTES = 4e6
"""Copies of a part for such a prompt: each weight is used so often there that where it comes from hardly counts."""

M = TypeVar("M", bound=nn.Module)


class Stopwatch:
    """Times parts of `spec` for one stream of `tokens` new tokens after `past` others: 1 decodes, more prefill.

    Of the tokens of a prompt only the last is read by the head.
    The median of `repeats` after a warm-up. Copies of a part add up to `cold_bytes`, or are 24. Times are kept
    in `folder` (the cache folder by default, None for nowhere). Raises BadBudget for a model whose layers
    layerwise did not build.
    """

    def __init__(self, spec: StackSpec, tokens: int = 1, past: int = 128, repeats: int = 9, cold_bytes: float = 48e6,
                 folder: Path | str | None = "default") -> None:
        if spec.outside or any(isinstance(row.mixer, Opaque) for row in spec.rows):
            raise BadBudget("a limit on milliseconds for a module that layerwise did not build",
                            expected="a decoder language model", do="limit bytes, parameters or layers")
        self.spec, self.tokens, self.repeats, self.cold_bytes = spec, tokens, repeats, cold_bytes
        self.past = max(0 if tokens > 1 else 1, min(past, spec.context - tokens * (repeats + 1)))
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        place = cache_folder() / "clock" if folder == "default" else folder
        self._file = None if place is None else Path(place) / f"{self._fingerprint()}.json"
        self._known: dict[str, float] = _read(self._file)

    def row(self, row: LayerSpec) -> float:
        """Milliseconds of one layer."""
        shapes = replace(row, formats={}, ranks={}).matrices(self.spec.hidden)
        times = [self._matrix(*shape, row.formats.get(name), row.ranks.get(name)) for name, shape in shapes.items()]
        return sum(times) + self._rest(replace(row, formats={}, ranks={}))

    def outside(self, spec: StackSpec) -> float:
        """Milliseconds of embedding, final norm and head, stored as in `spec`."""
        bare = replace(spec, rows=())
        formats = [packed.label if packed else "dense" for packed in (spec.embedding_format, spec.head_format)]
        key = f"outside {spec.vocabulary}x{spec.hidden} {spec.tied} {' '.join(formats)}"
        return self._once(key, lambda: self._time_outside(bare))

    def _matrix(self, outputs: int, inputs: int, format: Format | None, rank: int | None) -> float:
        key = f"matrix {outputs}x{inputs} {format.label if format else 'dense'} {rank or ''}".strip()
        size = outputs * inputs * (format.bits / 8 if format else self.dtype.itemsize)

        def time() -> float:
            modules = self._copies(size, lambda: build_linear(outputs, inputs, False, format, rank))
            x_TI = torch.ones(self.tokens, inputs, dtype=self.dtype, device=self.device)
            return self._median(lambda: _each(modules, x_TI)) / len(modules)

        return self._once(key, time)

    def _rest(self, row: LayerSpec) -> float:
        return self._once(f"rest {self.spec.hidden} {row!r}", lambda: self._time_rest(row))

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = measure()
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_text(self._file, json.dumps(self._known, indent=1))
        return self._known[key]

    def _time_rest(self, row: LayerSpec) -> float:
        blocks = self._copies(1, lambda: _without_matrices(Block(row, self.spec.hidden)))
        growing: dict[int, AnyCache] = {layer: self._cache(row) for layer in range(len(blocks))}
        starts = iter(range(self.past, self.spec.context + self.tokens, self.tokens))

        def run() -> None:
            past = next(starts) if self.past else 0  # a prompt without a past starts anew every time
            caches = growing if self.past else {layer: self._cache(row) for layer in range(len(blocks))}
            positions_1T = torch.arange(past, past + self.tokens, device=self.device)[None]
            flow = Flow(positions_1T, caches=caches, past=past, dtype=self.dtype)
            if isinstance(row.mixer, Attention) and row.mixer.shares is not None:
                flow.provide(row.mixer.shares, *self._ones(row.mixer, past + self.tokens))
            x_1TC = torch.ones(1, self.tokens, self.spec.hidden, dtype=self.dtype, device=self.device)
            for layer, block in enumerate(blocks):
                x_1TC = block(x_1TC, flow, layer)

        return self._median(run) / len(blocks)

    def _cache(self, row: LayerSpec) -> AnyCache:
        if isinstance(row.mixer, StateSpace):
            return StateCache(length=self.past)
        cache = LayerCache()
        if isinstance(row.mixer, Attention) and row.mixer.shares is None and self.past:
            cache.append(*self._ones(row.mixer, self.past))
        return cache

    def _ones(self, mixer: Attention, tokens: int) -> tuple[Tensor, Tensor]:
        ones = torch.ones(1, mixer.kv_heads, tokens, mixer.head_dim, dtype=self.dtype, device=self.device)
        return ones, ones

    def _time_outside(self, bare: StackSpec) -> float:
        decoder = self._filled(lambda: Decoder(bare))
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        flow = Flow(torch.zeros(1, 1, dtype=torch.long, device=self.device), dtype=self.dtype)
        return self._median(lambda: decoder(token_11, flow))

    def _copies(self, size: float, build: Callable[[], M]) -> list[M]:
        count = int(min(MOST_COPIES, 1 + self.cold_bytes // max(size, 1)))
        return [self._filled(build) for _ in range(count)]

    def _filled(self, build: Callable[[], M]) -> M:
        """A module with small constant weights, built without its costly random start."""
        with torch.device("meta"):
            module = build().to(self.dtype)
        module = module.to_empty(device=self.device).eval()
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.detach().fill_(0.01 if tensor.is_floating_point() else 0)
        return module

    def _median(self, call: Callable[[], object]) -> float:
        return 1e3 * median_seconds(call, self.repeats, self.device)

    def _fingerprint(self) -> str:
        from layerwise.measure.hardware import processor

        accelerator = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        where = processor(), accelerator, torch.get_num_threads(), torch.__version__, self.spec.dtype
        return hashlib.sha256(repr((*where, self.tokens, self.past, self.cold_bytes)).encode()).hexdigest()[:16]


def clock_for(budget: Budget, spec: StackSpec, folder: Path | str | None = "default") -> Clock | None:
    """The clock that the budget's limits on time need, None where it has none."""
    if budget.milliseconds is None and budget.prefill is None:
        return None
    decode = Stopwatch(spec, folder=folder)
    if budget.prefill is None:
        return decode
    tokens = max(2, min(PROMPT, spec.context // 2))
    return Clocks(decode, Stopwatch(spec, tokens, past=0, repeats=5, cold_bytes=PROMPT_BYTES, folder=folder))


class _Nothing(nn.Module):
    """Stands for a matrix whose time is counted elsewhere: an output of the right shape, at no cost."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        zero: Tensor = self.zero  # type: ignore[assignment]
        return zero.repeat(*x.shape[:-1], 1)


def _without_matrices(block: Block) -> Block:
    return block.with_matrices({name: _Nothing(matrix.out_features) for name, matrix in block.matrices().items()})


def _each(modules: Sequence[nn.Module], x: Tensor) -> None:
    for module in modules:
        module(x)


def _read(file: Path | None) -> dict[str, float]:
    """Times measured before; none where there is no file or it is damaged, since they can be measured again."""
    try:
        found = json.loads(file.read_text()) if file else {}
        return {str(key): float(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
