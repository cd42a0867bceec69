"""GGUF files: the header parsed with every length checked, tensors de-quantised when they are asked for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Dimensions are stored innermost first
and reversed here. De-quantising is done by the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadFile
from layerwise.io.safetensors import map_bytes

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
CHUNK = 1 << 22
"""Values de-quantised at a time, so that the float32 intermediate stays small."""


@dataclass(frozen=True)
class Stored:
    """One tensor in the file: its GGML type, its shape (outermost first), and its bytes [start, stop)."""

    type: int
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """The metadata and tensors of one file.

    Raises BadFile where it is not GGUF, truncated, or damaged in its header.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: Mapping[str, Any]
        self.tensors: Mapping[str, Stored]
        size = self.path.stat().st_size
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _Parser(data).header()
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
            raise BadFile(f"{self.path} ({size:,} bytes) is not a readable GGUF file: {error}",
                          expected="a whole GGUF file, version 2 or 3", do="fetch the file again") from error
        end = max((tensor.stop for tensor in self.tensors.values()), default=0)
        if end > size:
            raise BadFile(f"{self.path} has {size:,} bytes", expected=f"{end:,} bytes, as its header says",
                          do="it is truncated: fetch the file again")

    def type_name(self, name: str) -> str:
        """The GGML name of a tensor's type, such as Q4_K."""
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(self.tensors[name].type).name)

    def read(self, name: str, dtype: torch.dtype, part: tuple[int, int] | None = None) -> Tensor:
        """A tensor as numbers; `part` (i, n) is the i-th of n equal slices of its outermost axis.

        Tensors stored as floats come in their stored dtype, views of the mapped file; others in `dtype`.
        """
        stored = self.tensors[name]
        shape, start, stop = stored.shape, stored.start, stored.stop
        if part is not None:
            index, parts = part
            step = (stop - start) // parts
            start, stop = start + index * step, start + (index + 1) * step
            shape = shape[1:] if shape[0] == parts else (shape[0] // parts, *shape[1:])
        raw = map_bytes(self.path, start, stop)
        if stored.type in PLAIN:
            return raw.view(PLAIN[stored.type]).view(shape)
        rows = math.prod(shape[:-1])
        return _dequantise(raw.view(rows, -1), stored.type, dtype).view(shape)


def _dequantise(raw_RB: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """Rows of quantised blocks, uint8 [R, bytes], as numbers [R, columns]."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    type_ = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[type_]
    rows, columns = raw_RB.shape[0], raw_RB.shape[1] // size * block
    out = torch.empty(rows, columns, dtype=dtype)
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        values = dequantize(raw_RB[first : first + step].numpy(), type_)
        out[first : first + step] = torch.from_numpy(values)
    return out


class _Parser:
    """Reads the header from the front; every read past the end of the data raises struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {bytes(self.data[:4])!r}")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        tensors, pairs = self.scalar("Q"), self.scalar("Q")
        metadata = {self.string(): self.value(self.scalar("I")) for _ in range(pairs)}
        places = [self.tensor() for _ in range(tensors)]
        align = metadata.get("general.alignment", 32)
        origin = self.at + -self.at % align
        return metadata, {name: _stored(kind, shape, origin + offset) for name, kind, shape, offset in places}

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a text of {length:,} bytes at byte {self.at:,}")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data) - self.at:
            raise ValueError(f"a list of {count:,} entries at byte {self.at:,}")
        if kind in (STRING, ARRAY):
            return [self.value(kind) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{SCALARS[kind]}")
        return list(values)

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, axes = self.string(), self.scalar("I")
        if axes > 4:
            raise ValueError(f"the tensor {name!r} has {axes} axes")
        shape = tuple(self.scalar("Q") for _ in range(axes))[::-1]
        return name, self.scalar("I"), shape, self.scalar("Q")


def _stored(kind: int, shape: tuple[int, ...], start: int) -> Stored:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape and shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} values in blocks of {block}")
    return Stored(kind, shape, start, start + math.prod(shape) // block * size)
