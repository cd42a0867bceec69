"""A decoder language model read from a layer table: one forward pass for every family.

Shapes: B batch, T tokens, C hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from layerwise.nets.attention import Attention
from layerwise.nets.dense import linear
from layerwise.nets.factored import Matrix, build_linear
from layerwise.nets.feed_forward import build_feed_forward
from layerwise.nets.flow import Flow
from layerwise.nets.mixers import build_mixer
from layerwise.nets.norms import build_norm
from layerwise.nets.packed import PackedEmbedding
from layerwise.nets.tiered import PackedTable, TieredEmbedding
from layerwise.spec import Attention as AttentionSpec
from layerwise.spec import LayerSpec, Mixer, StackSpec, TableFormat, Tiers

M = TypeVar("M", bound=nn.Module)
Part = Literal["attention", "feed_forward"]
MATRICES: dict[str, Part] = {
    "q": "attention", "k": "attention", "v": "attention", "o": "attention",
    "in_proj": "attention", "out_proj": "attention",
    "gate": "feed_forward", "up": "feed_forward", "down": "feed_forward",
}


class Branch(nn.Module):
    """Norm, mixer or feed-forward, optional post-norm: what one half of a block adds to the residual stream."""

    def __init__(self, body: nn.Module, row: LayerSpec, hidden: int) -> None:
        super().__init__()
        self.norm = build_norm(row.norm, hidden)
        self.body = body
        self.post_norm = build_norm(row.norm, hidden) if row.post_norm else None

    def forward(self, x_BTC: Tensor, *shared: object) -> Tensor:
        y_BTC = self.body(self.norm(x_BTC), *shared)
        return y_BTC if self.post_norm is None else self.post_norm(y_BTC)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One row: x + attention(x), then x + feed_forward(x); either half may be absent.

    `attention` is the half that mixes tokens, whatever the row's mixer is.
    """

    def __init__(self, row: LayerSpec, hidden: int) -> None:
        super().__init__()
        self.attention: Branch | None = None
        self.feed_forward: Branch | None = None
        if isinstance(row.mixer, Mixer):
            self.attention = Branch(build_mixer(row.mixer, hidden, row.norm), row, hidden)
        if row.feed_forward is not None:
            self.feed_forward = Branch(build_feed_forward(row.feed_forward, hidden), row, hidden)
        for name in {**row.formats, **row.ranks}:
            dense, body = self.matrix(name), self.branch(name).body
            setattr(body, name, build_linear(dense.out_features, dense.in_features, dense.bias is not None,
                                             row.formats.get(name), row.ranks.get(name)))

    def forward(self, x_BTC: Tensor, flow: Flow, layer: int) -> Tensor:
        if self.attention is not None:
            x_BTC = x_BTC + self.attention(x_BTC, flow, layer)
        if self.feed_forward is not None:
            x_BTC = x_BTC + self.feed_forward(x_BTC)
        return x_BTC

    def matrix(self, name: str) -> Matrix:
        """The linear layer called `name` (q, k, v, o, in_proj, out_proj, gate, up, down)."""
        return getattr(self.branch(name).body, name)  # type: ignore[no-any-return]

    def matrices(self) -> dict[str, Matrix]:
        """Every linear layer of the block that can be packed, by name."""
        present = {part for part in ("attention", "feed_forward") if getattr(self, part) is not None}
        return {name: self.matrix(name) for name, part in MATRICES.items()
                if part in present and hasattr(self.branch(name).body, name)}

    def with_matrices(self, new: Mapping[str, nn.Module]) -> Block:
        """A copy that shares everything but the given linear layers."""
        block = shallow(self)
        for part in {MATRICES[name] for name in new}:
            branch = shallow(getattr(self, part))
            branch.body = shallow(branch.body)
            setattr(block, part, branch)
        for name, module in new.items():
            setattr(block.branch(name).body, name, module)
        return block

    def with_mixer(self, mixer: AttentionSpec) -> Block:
        """A copy that shares everything, its attention described by `mixer`."""
        block = self.with_matrices({"q": self.matrix("q")})
        body = block.branch("q").body
        assert isinstance(body, Attention)
        body.spec = mixer
        return block

    def without(self, part: Part) -> Block:
        """A copy without its attention or without its feed-forward half."""
        block = shallow(self)
        setattr(block, part, None)
        return block

    def branch(self, name: str) -> Branch:
        """The half of the block that holds the matrix `name`."""
        branch = getattr(self, MATRICES[name])
        if branch is None:
            raise KeyError(f"this block has no {MATRICES[name]}, so no matrix {name!r}")
        return branch  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head. A tied head reads the embedding's own storage."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = _table(spec.embedding_format, spec)
        self.positions = _embedding(spec.learned_positions, spec.hidden) if spec.learned_positions else None
        self.layers = nn.ModuleList(Block(row, spec.hidden) for row in spec.rows)
        self.norm = build_norm(spec.final_norm, spec.hidden)
        self.head: nn.Embedding | PackedTable | None = None if spec.tied else _table(spec.head_format, spec)

    def embed(self, tokens_BT: Tensor, flow: Flow) -> Tensor:
        """Token (and learned position) embeddings, [B, T, C]; every pass begins here."""
        flow.sources = self.spec.sources
        x_BTC: Tensor = self.embedding(tokens_BT)
        if self.spec.embedding_scale != 1.0:
            x_BTC = x_BTC * torch.tensor(self.spec.embedding_scale, dtype=x_BTC.dtype)
        if self.positions is not None:
            x_BTC = x_BTC + self.positions(flow.positions_BT)
        return x_BTC

    def logits(self, x_BTC: Tensor) -> Tensor:
        """Final norm and head, [B, T, V]."""
        x_BTC = self.norm(x_BTC)
        table = self.embedding if self.head is None else self.head
        logits = linear(x_BTC, table.weight) if isinstance(table, nn.Embedding) else table.logits(x_BTC)
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens_BT: Tensor, flow: Flow) -> Tensor:
        x_BTC = self.embed(tokens_BT, flow)
        for layer, block in enumerate(self.layers):
            x_BTC = block(x_BTC, flow, layer)
        return self.logits(x_BTC)


def _table(packed: TableFormat | None, spec: StackSpec) -> nn.Embedding | PackedTable:
    if packed is None:
        return _embedding(spec.vocabulary, spec.hidden)
    if isinstance(packed, Tiers):
        return TieredEmbedding.empty(spec.vocabulary, spec.hidden, packed, getattr(torch, spec.dtype))
    return PackedEmbedding.empty(spec.vocabulary, spec.hidden, packed, getattr(torch, spec.dtype))


def _embedding(rows: int, width: int) -> nn.Embedding:
    weight_RW = torch.empty(rows, width)
    if not weight_RW.is_meta:  # drawing numbers on the meta device would import torch's compiler, over a second
        weight_RW.normal_()
    return nn.Embedding(rows, width, _weight=weight_RW)


def shallow(module: M) -> M:
    """A new module object that shares parameters, buffers and children with `module`, without its hooks."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = dict(module._modules)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[hooks] = type(twin.__dict__[hooks])()
    return twin
