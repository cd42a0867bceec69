"""A decoder language model as a `Stack`: resident, memory-mapped, or streamed from disk layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadModel, BadOption
from layerwise.io.weights import Weights, is_finite
from layerwise.nets.decoder import Block, Decoder
from layerwise.nets.flow import AnyCache, Flow
from layerwise.spec import Attention, LayerSpec, StackSpec
from layerwise.stack.base import Site, Stack, State

if TYPE_CHECKING:
    from layerwise.io.tokenizer import Tokenizer

Caches = dict[int, AnyCache]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
         "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


class DecoderStack(Stack):
    """A `Decoder` opened to its layers.

    With `weights` the blocks are not resident: `block(i)` reads layer i from disk, runs, and lets it go,
    so the memory needed is the largest layer plus activations. Tokens are int64 [B, T].
    """

    def __init__(self, decoder: Decoder, *, name: str = "decoder", tokenizer: Tokenizer | None = None,
                 folder: Path | None = None, weights: Weights | None = None) -> None:
        self.decoder, self.spec = decoder, decoder.spec
        self.name, self.tokenizer, self.folder = name, tokenizer, folder
        self._weights = weights
        self.origin: tuple[Stack, Any] | None = None
        self._swapped: dict[int, nn.Module] = {}
        self._streamed: tuple[int, Block] | None = None

    @property
    def streamed(self) -> bool:
        """Whether layers are read from disk each time they run."""
        return self._weights is not None

    @property
    def device(self) -> torch.device:
        return next(self.decoder.norm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return next(self.decoder.norm.parameters()).dtype

    # running -----------------------------------------------------------------------------------

    def start(self, tokens_BT: Tensor, mask_BT: Tensor | None = None, *, positions_BT: Tensor | None = None,
              caches: Caches | None = None) -> State:
        """Embed `tokens_BT`. `mask_BT` is True at real tokens and covers cached tokens too, [B, S].

        Positions default to the count of real tokens before each token. Pass the same `caches` dict to
        continue a sequence. Raises BadOption on no tokens, tokens outside the vocabulary, or a mask that does
        not fit.
        """
        past = max(cache.length for cache in caches.values()) if caches else 0
        tokens_BT = tokens_BT.to(self.device)
        self._check(tokens_BT, mask_BT, past)
        valid_BS = None if mask_BT is None or bool(mask_BT.all()) else mask_BT.to(self.device, torch.bool)
        if positions_BT is None:
            positions_BT = _positions(tokens_BT, valid_BS, past)
        flow = Flow(positions_BT.to(self.device), valid_BS, caches, past, self.dtype)
        return State(self.decoder.embed(tokens_BT, flow), 0, flow)

    def _check(self, tokens_BT: Tensor, mask_BT: Tensor | None, past: int) -> None:
        if tokens_BT.dim() != 2 or not tokens_BT.numel():
            raise BadOption(f"tokens of shape {tuple(tokens_BT.shape)}",
                            expected="[batch, tokens], at least one token", do="encode some text")
        wanted = (tokens_BT.shape[0], past + tokens_BT.shape[1])
        if mask_BT is not None and mask_BT.shape != wanted:
            raise BadOption(f"a mask of shape {tuple(mask_BT.shape)}",
                            expected=f"{wanted}, cached tokens included",
                            do="give the mask of the whole sequence")
        if past:  # decoding, where the check would make an accelerator wait
            return
        for token in (int(tokens_BT.min()), int(tokens_BT.max())):
            if not 0 <= token < self.spec.vocabulary:
                raise BadOption(f"token {token}", expected=f"ids in 0..{self.spec.vocabulary - 1}",
                                do="use this model's own tokenizer")

    def run(self, state: State, layers: slice = slice(None)) -> State:
        first, last = self.bounds(state, layers)
        hidden, flow = state.hidden, state.shared.forked()
        for layer in range(first, last):
            hidden = self.block(layer)(hidden, flow, layer)
        return State(hidden, last, flow)

    def finish(self, state: State) -> Tensor:
        return self.decoder.logits(state.hidden)

    # layers ------------------------------------------------------------------------------------

    def block(self, layer: int) -> nn.Module:
        if layer in self._swapped:
            return self._swapped[layer]
        if self._weights is None:
            return self.decoder.layers._modules[str(layer)]  # a third of the time of an index
        if self._streamed is None or self._streamed[0] != layer:
            self._streamed = None  # let the layer before go first
            self._streamed = layer, self.read(layer)
        return self._streamed[1]

    def read(self, layer: int, device: torch.device | None = None) -> Block:
        """A layer of a streamed stack, read from disk anew, on `device` or the stack's."""
        assert self._weights is not None, "a resident stack reads nothing"
        with torch.device("meta"):
            block = Block(self.spec.rows[layer], self.spec.hidden)
        _assign(block, self._weights.layer(layer), device or self.device, self.dtype)
        _share_hooks(self.decoder.layers[layer], block)
        return block.requires_grad_(False).eval()

    @contextmanager
    def swap(self, layer: int, block: nn.Module) -> Iterator[None]:
        before = self._swapped.get(self.index(layer))
        self._swapped[layer] = block
        try:
            yield
        finally:
            del self._swapped[layer]
            if before is not None:
                self._swapped[layer] = before

    def module(self, layer: int, site: Site) -> nn.Module:
        block = self._swapped.get(self.index(layer), self.decoder.layers[layer])
        if site in ("input", "output"):
            return block
        branch = getattr(block, "feed_forward" if site == "neurons" else site, None)
        if branch is not None and site == "neurons":
            branch = None if hasattr(branch.body, "router") else branch.body.down
        if branch is None:
            raise BadOption(f"site {site!r} of layer {layer}",
                            expected="a half that the layer has; neurons of one network, not of routed experts",
                            do="look at the table: print(stack.spec)")
        return branch  # type: ignore[no-any-return]

    # making new stacks -------------------------------------------------------------------------

    def rebuilt(self, spec: StackSpec, blocks: Iterable[nn.Module], *, embedding: nn.Module | None = None,
                head: nn.Module | None = None) -> DecoderStack:
        """A stack for `spec` made of `blocks`; what is not given is shared with this one.

        A block that shares keys is told the place of their layer in `spec`.
        """
        with torch.device("meta"):
            decoder = Decoder.__new__(Decoder)
            nn.Module.__init__(decoder)
        decoder.spec = spec
        decoder.embedding = embedding or self.decoder.embedding  # type: ignore[assignment]
        decoder.positions = self.decoder.positions
        decoder.layers = nn.ModuleList(map(_placed, blocks, spec.rows))
        decoder.norm = self.decoder.norm
        decoder.head = head or self.decoder.head  # type: ignore[assignment]
        return DecoderStack(decoder.eval(), name=self.name, tokenizer=self.tokenizer)

    def with_tables(self, spec: StackSpec, **tables: nn.Module) -> DecoderStack:
        """The same layers, resident or streamed, between another `embedding` or `head`; `spec` has this one's rows."""
        twin = self.rebuilt(spec, self.decoder.layers, **tables)
        twin._weights, twin._swapped = self._weights, self._swapped
        return twin

    def copied(self, dtype: torch.dtype | None = None) -> DecoderStack:
        """A resident copy, nothing shared, dense weights in `dtype`: for training or another device."""
        blocks = [copy.deepcopy(self.block(layer)).to(dtype=dtype) for layer in range(len(self))]
        rest = copy.deepcopy(self.decoder, {id(self.decoder.layers): nn.ModuleList()}).to(dtype=dtype)
        rest.layers = nn.ModuleList(blocks)
        if dtype is not None:
            name: Any = str(dtype).removeprefix("torch.")
            rest.spec = replace(self.spec, dtype=name)
        return DecoderStack(rest, name=self.name, tokenizer=self.tokenizer)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor by its name, layer by layer; streamed stacks read as they go."""
        for name, tensor in self.decoder.state_dict().items():
            if not name.startswith("layers."):
                yield name, tensor
        for layer in range(len(self)):
            for name, tensor in self.block(layer).state_dict().items():
                yield f"layers.{layer}.{name}", tensor

    def finite(self) -> None:
        """Read every weight once. Raises BadModel naming the first tensor that holds NaN or infinity."""
        for name, tensor in self.tensors():
            if not is_finite(tensor):
                raise BadModel(f"the tensor {name} of {self.name} holds NaN or infinite values",
                               expected="finite weights", do="fetch or convert the checkpoint again")

    def save(self, folder: str | Path) -> Path:
        """Write the model beside `folder`, re-open it, compare logits, and only then put it in place.

        A uniform dense table is written as its family's standard folder, any other in the layer-table
        format. Raises BadFile where the disk is full or the re-opened model does not agree.
        """
        from layerwise.stack.save import save_stack

        return save_stack(self, Path(folder))


def load(decoder_spec: StackSpec, weights: Weights, *, stream: bool, device: torch.device | None = None,
         dtype: torch.dtype | None = None) -> Decoder:
    """A decoder whose tensors are those of `weights`; with `stream`, only those outside layers."""
    with torch.device("meta"):
        decoder = Decoder(decoder_spec)
    _assign(decoder, weights.outside(), device, dtype)
    if not stream:
        for layer in range(len(decoder_spec.rows)):
            _assign(decoder.layers[layer], weights.layer(layer), device, dtype)
    return decoder.requires_grad_(False).eval()


def _placed(block: nn.Module, row: LayerSpec) -> nn.Module:
    shares = isinstance(row.mixer, Attention) and row.mixer.shares is not None
    return block.with_mixer(row.mixer) if shares and isinstance(block, Block) else block  # type: ignore[arg-type]


def _share_hooks(kept: nn.Module, block: nn.Module) -> None:
    """Let `block`, just read from disk, run the hooks of `kept`, which stays; also those registered later."""
    for ours, theirs in zip(kept.modules(), block.modules(), strict=True):
        for hooks in HOOKS:
            theirs.__dict__[hooks] = ours.__dict__[hooks]


def _assign(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | None,
            dtype: torch.dtype | None) -> None:
    """Make `tensors` the weights of `module`; `dtype` is for dense weights, packed ones keep their own."""
    dense = {name for name, _ in module.named_parameters()}
    module.load_state_dict({name: tensor.to(device=device, dtype=dtype if name in dense else None)
                            for name, tensor in tensors.items()}, assign=True, strict=False)


def _positions(tokens_BT: Tensor, valid_BS: Tensor | None, past: int) -> Tensor:
    batch, new = tokens_BT.shape
    if valid_BS is None:
        return torch.arange(past, past + new, device=tokens_BT.device).expand(batch, new)
    counted_BS: Any = valid_BS.long().cumsum(-1) - 1
    return counted_BS.clamp(min=0)[:, past:]  # type: ignore[no-any-return]
