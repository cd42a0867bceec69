"""Rotations that cost nothing when the model runs, because they are folded into the weights on both sides.

Values: head by head v is rotated and `o` rotated back, y = W_o x = (W_o R') (R x); attention mixes tokens, not
channels, so it does not notice. Residual stream: what writes into it is rotated and what reads it rotated back,
which the norms let pass once their gains are folded into what reads them, since |R x| = |x|.
Rotations are R = diag(random signs) * Hadamard / sqrt(width), spreading outliers over all channels; an odd
factor of the width takes a random orthogonal matrix.
Source: Ashkboos et al., QuaRot, 2024 (arXiv 2404.00456); residual streams after SliceGPT (arXiv 2401.15024).

Shapes: O outputs, I inputs, C hidden width, H query heads, K value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block, shallow
from layerwise.nets.dense import Dense
from layerwise.nets.feed_forward import Experts
from layerwise.spec import Attention, LayerSpec, Opaque, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.base import Stats, Transform

READS = ("q", "k", "v", "in_proj", "gate", "up")
WRITES = ("o", "down")


@dataclass(frozen=True)
class RotateValues(Transform):
    """Rotate what v writes within each head, and `o` back; drawn from `seed`, every value head by its own rotation.

    The row does not change, nor what the block computes. Not for a layer whose values another layer shares.
    """

    name: ClassVar[str] = "rotate-values"
    seed: int = 0

    def turns_values(self) -> bool:
        return True

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The row itself. Raises BadOption where there are no values of its own, or matrices that are not dense."""
        if not isinstance(row.mixer, Attention) or row.mixer.shares is not None:
            raise BadOption("rotating the values of a layer that makes none",
                            expected="attention with values of its own", do="leave the layer out")
        _check_dense(row, ("v", "o"))
        return row

    @torch.no_grad()
    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """A block with rotated v and o. Raises BadOption as `edit` does."""
        mixer = self.edit(row, hidden=1).mixer
        assert isinstance(mixer, Attention)
        generator = torch.Generator().manual_seed(self.seed)
        turn_KDD = torch.stack([rotation(mixer.head_dim, generator) for _ in range(mixer.kv_heads)])
        return fold_rotation(cast(Block, block), mixer, turn_KDD)


@torch.no_grad()
def fold_rotation(block: Block, mixer: Attention, turn_KDD: Tensor) -> Block:
    """A block whose value heads are rotated and whose `o` rotates back; v and o must be dense."""
    v, o = cast(nn.Linear, block.matrix("v")), cast(nn.Linear, block.matrix("o"))
    groups = mixer.heads // mixer.kv_heads
    v_KDI = _wide(v.weight).view(mixer.kv_heads, mixer.head_dim, -1)
    new_v = (turn_KDD.to(v_KDI) @ v_KDI).flatten(0, 1)
    o_OHD = _wide(o.weight).view(len(o.weight), mixer.heads, mixer.head_dim)
    turn_HDD = turn_KDD.repeat_interleave(groups, 0).to(o_OHD)
    new_o = torch.einsum("ohd,hed->ohe", o_OHD, turn_HDD).flatten(1)
    bias: Tensor | None = None
    if v.bias is not None:
        bias_KD1 = _wide(v.bias).view(mixer.kv_heads, mixer.head_dim, 1)
        bias = (turn_KDD.to(bias_KD1) @ bias_KD1).flatten().to(v.bias.dtype)
    return block.with_matrices({"v": Dense.of(new_v.to(v.weight.dtype), bias),
                                "o": Dense.of(new_o.to(o.weight.dtype), o.bias)})


def rotated_gram(gram_II: Tensor, mixer: Attention, turn_KDD: Tensor) -> Tensor:
    """The Gram matrix of what `o` reads once its value heads are rotated."""
    turn_HDD = turn_KDD.repeat_interleave(mixer.heads // mixer.kv_heads, 0).to(gram_II)
    half_HDI = turn_HDD @ gram_II.view(mixer.heads, mixer.head_dim, -1)
    return (turn_HDD @ half_HDI.flatten(0, 1).T.reshape(half_HDI.shape)).flatten(0, 1)


@torch.no_grad()
def rotate_residual(stack: DecoderStack, seed: int = 0) -> DecoderStack:
    """A stack that computes the same with its residual stream rotated and its norms without gains.

    Raises BadOption where that cannot be folded: an embedding that is also the head, norms that subtract the
    mean or stand behind a half, and matrices or tables that are not dense.
    """
    _check_stack(stack.spec)
    turn_CC = rotation(stack.spec.hidden, torch.Generator().manual_seed(seed))
    blocks = [_rotated(cast(Block, stack.block(layer)), turn_CC) for layer in range(len(stack))]
    decoder = stack.decoder
    assert isinstance(decoder.head, nn.Embedding) and isinstance(decoder.embedding, nn.Embedding)
    new = stack.rebuilt(stack.spec, blocks, embedding=_table(decoder.embedding, turn_CC),
                        head=_table(decoder.head, turn_CC, gain(decoder.norm)))
    new.decoder.norm = _without_gain(decoder.norm)
    if decoder.positions is not None:
        new.decoder.positions = _table(decoder.positions, turn_CC)
    return new


def rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random rotation [width, width], float64: Hadamard with random signs, an orthogonal one for an odd factor."""
    power = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    odd = torch.linalg.qr(torch.randn(width // power, width // power, generator=generator, dtype=torch.float64))[0]
    sign_I = torch.randint(2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    return torch.kron(odd.contiguous(), hadamard / power**0.5) * sign_I


def gain(norm: nn.Module) -> Tensor:
    """What an RMS norm multiplies each channel by, float64 [C]."""
    return cast(Tensor, norm.weight).double() + float(cast(Any, norm).offset)


def _rotated(block: Block, turn_CC: Tensor) -> Block:
    new: dict[str, nn.Module] = {}
    for name, matrix in block.matrices().items():
        assert isinstance(matrix, nn.Linear)
        weight_OI, bias_O = matrix.weight.double(), matrix.bias
        if name in READS:
            weight_OI = weight_OI * gain(block.branch(name).norm) @ turn_CC.T
        else:
            weight_OI = (turn_CC @ weight_OI.view(-1, len(turn_CC), weight_OI.shape[1])).flatten(0, 1)
            bias_O = None if bias_O is None else nn.Parameter((turn_CC @ bias_O.double()).to(bias_O.dtype))
        new[name] = Dense.of(weight_OI.to(matrix.weight.dtype), bias_O)
    block = block.with_matrices(new)
    for branch in (block.attention, block.feed_forward):
        if branch is None:
            continue
        if isinstance(branch.body, Experts):
            router = branch.body.router.weight
            turned = (router.double() * gain(branch.norm) @ turn_CC.T).to(router.dtype)
            branch.body.router = Dense.of(turned, branch.body.router.bias)
        branch.norm = _without_gain(branch.norm)
    return block


def _without_gain(norm: nn.Module) -> nn.Module:
    plain, weight = shallow(norm), cast(Tensor, norm.weight)
    plain.weight = nn.Parameter(torch.full_like(weight, 1 - float(cast(Any, norm).offset)), requires_grad=False)
    return plain


def _table(table: nn.Embedding, turn_CC: Tensor, gain_C: Tensor | None = None) -> nn.Embedding:
    """Every row of a table, times the gain where it is read, rotated."""
    parts = []
    for part_RC in table.weight.split(1 << 14):
        wide_RC = part_RC.double() if gain_C is None else part_RC.double() * gain_C
        parts.append((wide_RC @ turn_CC.T).to(table.weight.dtype))
    rows, width = table.weight.shape
    return nn.Embedding(rows, width, _weight=torch.cat(parts)).requires_grad_(False)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _check_dense(row: LayerSpec, names: tuple[str, ...]) -> None:
    stored = sorted({*row.formats, *row.ranks} & set(names))
    if stored:
        raise BadOption(f"rotating matrices {stored}, which are packed or factored", expected="dense matrices",
                        do="rotate before packing")


def _check_stack(spec: StackSpec) -> None:
    if spec.tied:
        raise BadOption("rotating the residual stream of a model whose head is its embedding",
                        expected="a head of its own: the final norm's gain is folded into the head, and the "
                        "embedding, which is the same tensor, must not have it",
                        do="rotate values only (the transform 'rotate-values')")
    if spec.outside or any(isinstance(row.mixer, Opaque) for row in spec.rows):
        raise BadOption("rotating a model which layerwise did not build", expected="a decoder language model",
                        do="open a model of a known family")
    norms = [spec.final_norm, *(row.norm for row in spec.rows)]
    if any(norm.kind == "layer" for norm in norms) or any(row.post_norm for row in spec.rows):
        raise BadOption("rotating a residual stream with norms that subtract the mean or stand behind a half",
                        expected="root-mean-square norms, before each half only: the others do not let a rotation pass",
                        do="rotate values only (the transform 'rotate-values')")
    if spec.packed() or any(row.ranks for row in spec.rows):
        raise BadOption("rotating a model with packed or factored matrices", expected="dense matrices",
                        do="rotate before packing")
