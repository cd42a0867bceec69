"""What steps read and compute, layer by layer, while an engine runs: tokens, keys, and the experts that were loaded.

A meter is the engine's `action`: it runs layers in order and takes note. An expert's weights are read once in a step
however many tokens go to it, so that its bytes depend on which tokens share the step.

Shapes: N packed tokens, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from layerwise.measure.cost import flops
from layerwise.measure.hardware import Machine
from layerwise.nets.decoder import Block
from layerwise.nets.feed_forward import Experts
from layerwise.nets.flow import Flow
from layerwise.serve.paged import PagedFlow
from layerwise.spec import DTYPE_BYTES, Attention, LayerSpec, StackSpec
from layerwise.stack.decoder import DecoderStack


@dataclass(frozen=True)
class Work:
    """One layer in one step: tokens, keys that any of them sees, pairs of a token and a key, distinct experts that ran.
    """

    layer: int
    tokens: int
    keys: int
    pairs: int
    experts: int


@dataclass
class Meter:
    """Notes on every layer that ran since `take`. Give it to one engine as its `action`."""

    noted: list[Work] = field(default_factory=list)

    def __call__(self, stack: DecoderStack, x_1NC: Tensor, flow: Flow, layers: range) -> Tensor:
        assert isinstance(flow, PagedFlow)
        for layer in layers:
            block, mixer = stack.block(layer), stack.spec.rows[layer].mixer
            seen = [(0, 0)]
            if isinstance(mixer, Attention):
                seen = [looked_at(row.start, row.size, mixer.window) for row in flow.rows]
            with loaded(block) as experts:
                x_1NC = block(x_1NC, flow, layer)
            keys, pairs = (sum(column) for column in zip(*seen, strict=True))
            self.noted.append(Work(layer, x_1NC.shape[1], keys, pairs, len(experts)))
        return x_1NC

    def take(self) -> list[Work]:
        """The notes since the last call: after a step of the engine, those of the step."""
        taken, self.noted = self.noted, []
        return taken


def looked_at(start: int, size: int, window: int | None) -> tuple[int, int]:
    """Keys that `size` tokens from position `start` see, and pairs of a token and a key, themselves included."""
    end = start + size
    window = window or end
    ramp = range(start + 1, min(end, window) + 1)
    pairs = sum(ramp) + (size - len(ramp)) * window
    return min(end, window + size - 1), pairs


@contextmanager
def loaded(block: nn.Module) -> Iterator[set[int]]:
    """The experts that the block's tokens are sent to while the context lasts; none where it is not a mixture."""
    found: set[int] = set()
    branch = cast(Block, block).feed_forward
    if branch is None or not isinstance(branch.body, Experts):
        yield found
        return
    body = branch.body

    def note(module: nn.Module, inputs: tuple[Tensor], logits_NE: Tensor) -> None:
        found.update(body.chosen(logits_NE)[1].unique().tolist())

    hook = body.router.register_forward_hook(note)
    try:
        yield found
    finally:
        hook.remove()


def expert_bytes(spec: StackSpec, work: Iterable[Work]) -> float:
    """Bytes of the experts' matrices that were read."""
    one = [_expert_bytes(row, spec) for row in spec.rows]
    return sum(each.experts * one[each.layer] for each in work)


def layer_bytes(spec: StackSpec, work: Iterable[Work]) -> float:
    """Bytes of weights that were read: all of a layer but the experts that nobody was sent to."""
    whole = [row.bytes(spec.hidden, spec.dtype) for row in spec.rows]
    one = [_expert_bytes(row, spec) for row in spec.rows]
    counts = [row.feed_forward.experts if row.feed_forward else 0 for row in spec.rows]
    return sum(whole[each.layer] - (counts[each.layer] - each.experts) * one[each.layer] for each in work)


def seconds(spec: StackSpec, work: Iterable[Work], machine: Machine) -> float:
    """The least time on a machine, one layer after another: each at the limit of its operations or of its bytes.

    Bytes are weights, and keys and values once for each row. Embedding and head are left out.
    """
    total = 0.0
    for each in work:
        row = spec.rows[each.layer]
        operations, moved = flops(row, spec.hidden, 1) * each.tokens, layer_bytes(spec, [each])
        if isinstance(row.mixer, Attention):
            size = 2 * row.mixer.kv_heads * row.mixer.head_dim * DTYPE_BYTES[spec.dtype]
            operations += 4 * row.mixer.heads * row.mixer.head_dim * (each.pairs - each.tokens)
            moved += size * (each.keys + each.tokens)
        total += machine.seconds(operations, moved)
    return total


def _expert_bytes(row: LayerSpec, spec: StackSpec) -> float:
    if row.feed_forward is None or not row.feed_forward.experts:
        return 0.0
    sizes = row.matrix_bytes(spec.hidden, spec.dtype)
    return sum(sizes[name] for name in row.feed_forward.matrices(1)) / row.feed_forward.experts
