"""The tensors of a decoder by our own names, wherever and however a checkpoint stores them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from layerwise.errors import BadFile, BadModel
from layerwise.io.checkpoint import Checkpoint, missing
from layerwise.io.safetensors import ALIGNMENT
from layerwise.nets.decoder import Decoder
from layerwise.nets.families.base import Link
from layerwise.spec import StackSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


LAYER = re.compile(r".*?\d+\.")
HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
"""Endings of stored tensors that older writers kept though they are constants."""


class Weights:
    """Reads tensors named as in `Decoder(spec).state_dict()`; dense ones come in the spec's dtype.

    `links` say where each is found; without links the checkpoint itself uses our names. Tensors stored as
    they are needed are views of the mapped file; others (fused, transposed, per expert) are copied.
    """

    def __init__(self, checkpoint: Checkpoint, spec: StackSpec, links: Iterable[Link] | None = None) -> None:
        self.checkpoint, self.spec = checkpoint, spec
        self.expected = expected_tensors(spec)
        if links is None:
            links = (Link(name, name) for name in self.expected)
        self._links: dict[str, list[Link]] = {}
        for link in links:
            self._links.setdefault(link.ours, []).append(link)

    def tensor(self, name: str) -> Tensor:
        """One tensor by our name. Raises BadFile where it is absent or has another shape."""
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors; what lies side by side in a file is mapped at once."""
        names = list(names)
        theirs = dict.fromkeys(link.theirs for name in names for link in self._links[name])
        found = self.checkpoint.tensors(theirs)
        return {name: self._assemble(name, found) for name in names}

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of layer `index`, named as in its block (`attention.body.q.weight`)."""
        prefix = f"layers.{index}."
        names = [name for name in self.expected if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors(names).items()}

    def outside(self) -> dict[str, Tensor]:
        """The tensors that belong to no layer: embedding, positions, final norm, head."""
        return self.tensors(name for name in self.expected if not name.startswith("layers."))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor), one layer in memory at a time."""
        yield from self.outside().items()
        for index in range(len(self.spec.rows)):
            for name, tensor in self.layer(index).items():
                yield f"layers.{index}.{name}", tensor

    def check(self) -> None:
        """Compare names and shapes with the table; reads no weights.

        Raises BadFile naming a tensor that is absent, misshapen, or in a layer without a place for it.
        """
        present = self.checkpoint.names()
        used: set[str] = set()
        for name, (shape, _) in self.expected.items():
            for link in self._links[name]:
                if link.theirs not in present:
                    raise missing(link.theirs, self.checkpoint)
                _check_shape(link, self.checkpoint, shape)
                used.add(link.theirs)
        layers = {match[0] for match in map(LAYER.match, used) if match}
        for name in sorted(present - used):
            match = LAYER.match(name)
            if match and match[0] in layers and not name.endswith(HARMLESS):
                raise BadFile(f"{self.checkpoint.place} has a tensor {name} for which its configuration has no use",
                              expected=f"the tensors of a {self.spec.family}",
                              do="correct config.json, or open the model as a module through transformers")

    def finite(self) -> None:
        """Read every weight once. Raises BadModel naming the first tensor that holds NaN or infinity."""
        for name, tensor in self.stream():
            if not is_finite(tensor):
                raise BadModel(f"the tensor {name} in {self.checkpoint.place} holds NaN or infinite values",
                               expected="finite weights", do="fetch or convert the checkpoint again")

    def _assemble(self, name: str, found: dict[str, Tensor]) -> Tensor:
        shape, dtype = self.expected[name]
        links = self._links[name]
        pieces = [_piece(found[link.theirs], link) for link in links]
        if len(pieces) == 1:
            tensor = pieces[0]
        else:
            order = sorted(range(len(links)), key=lambda i: links[i].ours_rows or (0, 0))
            tensor = torch.cat([pieces[i] for i in order])
        if tuple(tensor.shape) != shape:
            raise misshapen(links[0].theirs, self.checkpoint, tuple(tensor.shape), shape)
        if tensor.is_floating_point() and dtype.is_floating_point:
            tensor = tensor.to(dtype)
        elif tensor.data_ptr() % ALIGNMENT:  # packed integers, for kernels that load whole vectors
            tensor = tensor.clone()
        return tensor.contiguous()


def expected_tensors(spec: StackSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name to (shape, dtype) of every stored tensor of `Decoder(spec)`; packed ones keep their own dtype."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    dense = {name for name, _ in decoder.named_parameters()}
    dtype = DTYPES[spec.dtype]
    return {name: (tuple(tensor.shape), dtype if name in dense else tensor.dtype)
            for name, tensor in decoder.state_dict().items()}


def build(weights: Weights, dtype: torch.dtype | None = None) -> Decoder:
    """A decoder whose tensors are those of `weights`, dense ones in `dtype` where given."""
    with torch.device("meta"):
        decoder = Decoder(weights.spec)
    dense = {name for name, _ in decoder.named_parameters()}
    decoder.load_state_dict(
        {name: tensor.to(dtype) if dtype and name in dense else tensor for name, tensor in weights.stream()},
        assign=True)
    return decoder.requires_grad_(False).eval()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, at the speed of reading the tensor once."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN where one value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _piece(theirs: Tensor, link: Link) -> Tensor:
    tensor = theirs.T if link.transpose else theirs
    return tensor if link.theirs_rows is None else tensor[slice(*link.theirs_rows)]


def _check_shape(link: Link, checkpoint: Checkpoint, ours: tuple[int, ...]) -> None:
    given = checkpoint.shape(link.theirs)
    wanted = ours if link.ours_rows is None else (link.ours_rows[1] - link.ours_rows[0], *ours[1:])
    seen = given[::-1] if link.transpose else given
    if link.theirs_rows is not None and seen:
        seen = (max(0, min(seen[0], link.theirs_rows[1]) - link.theirs_rows[0]), *seen[1:])
    if seen != wanted:
        raise misshapen(link.theirs, checkpoint, seen, wanted)


def misshapen(name: str, checkpoint: Checkpoint, given: tuple[int, ...], wanted: tuple[int, ...]) -> BadFile:
    """The error for a tensor of the wrong shape."""
    return BadFile(f"the tensor {name} in {checkpoint.place} gives shape {given}",
                   expected=f"shape {wanted}, as the configuration says",
                   do="check that config.json and the weights belong to the same model")
