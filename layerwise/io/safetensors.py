"""Safetensors folders, single or sharded, mapped into memory tensor by tensor.

Tensors that lie side by side in a file and are asked for together share one mapping, which lives as long
as the last of them: a layer that is let go gives its memory back. Mappings are copy-on-write, so writing
to a tensor never changes the file.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadFile
from layerwise.io.checkpoint import Checkpoint, missing

NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
ALIGNMENT = 64
LARGEST_HEADER = 100_000_000
AGAIN = "fetch or copy the file again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, stop) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsCheckpoint(Checkpoint):
    """A folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards.

    Raises BadFile where a file is truncated, its header damaged, or a shard absent.
    """

    def __init__(self, folder: str | Path) -> None:
        self.place = Path(folder)
        self._entries: dict[str, Entry] = {}
        for file in shards(self.place):
            self._entries |= read_header(file)

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = {name: self._entry(name) for name in names}
        found: dict[str, Tensor] = {}
        for run in _runs(wanted):
            first, last = wanted[run[0]], wanted[run[-1]]
            raw = map_bytes(first.file, first.start, last.stop)
            found |= {name: _view(raw, wanted[name], first.start) for name in run}
        return {name: found[name] for name in wanted}

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise missing(name, self)
        return self._entries[name]


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises BadFile where one that the index names is absent."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadFile(f"{index} cannot be read: {error}", expected="JSON with a weight_map",
                          do=AGAIN) from error
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise BadFile(f"{folder} lacks the shard {', '.join(absent)}",
                          expected=f"all {len(names)} shards that {index.name} names",
                          do="fetch the missing file into the folder")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadFile(f"{folder} holds no .safetensors file", expected="model.safetensors or a sharded index",
                      do="convert other formats first; pickled .bin files are not read")
    return [folder / "model.safetensors"] if folder / "model.safetensors" in files else files


def read_header(file: Path) -> dict[str, Entry]:
    """Name to place of every tensor in a file. Raises BadFile where header and size do not agree."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise BadFile(f"{file} has {size:,} bytes and announces a header of {length:,}",
                          expected="a header that fits the file", do=f"it is truncated or damaged: {AGAIN}")
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(file, value, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{file} has a damaged header: {error}", expected="the safetensors format",
                      do=AGAIN) from error
    end = max((entry.stop for entry in entries.values()), default=8 + length)
    if end != size:
        raise BadFile(f"{file} has {size:,} bytes", expected=f"{end:,} bytes, as its header says",
                      do=f"it is {'truncated' if size < end else 'damaged'}: {AGAIN}")
    return entries


def _entry(file: Path, value: dict[str, Any], data: int) -> Entry:
    dtype, shape = NAMES[value["dtype"]], tuple(value["shape"])
    start, stop = value["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize or start < 0 or any(size < 0 for size in shape):
        raise ValueError(f"{stop - start} bytes for shape {shape} in {value['dtype']}")
    return Entry(file, dtype, shape, data + start, data + stop)


def _runs(entries: dict[str, Entry]) -> Iterator[list[str]]:
    """The names, grouped so that the tensors of a group lie side by side in one file."""
    ordered = sorted(entries, key=lambda name: (entries[name].file, entries[name].start))
    run: list[str] = []
    for name in ordered:
        here, before = entries[name], entries[run[-1]] if run else None
        if before and (before.file, before.stop) != (here.file, here.start):
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def map_bytes(file: Path, start: int, stop: int) -> Tensor:
    """Bytes [start, stop) of a file as uint8, mapped copy-on-write."""
    if start == stop:
        return torch.empty(0, dtype=torch.uint8)
    base = start - start % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as stream:
        view = mmap.mmap(stream.fileno(), stop - base, access=mmap.ACCESS_COPY, offset=base)
    return torch.frombuffer(view, dtype=torch.uint8, count=stop - start, offset=start - base)


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, tensors in the order given and the first of them 64-byte aligned.

    The usual writer sorts tensors and aligns to 8 bytes; here a layer stays in one piece, and views of its
    tensors suit vector loads. Raises OSError where the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in NAMES.items()}
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _view(raw: Tensor, entry: Entry, origin: int) -> Tensor:
    part = raw[entry.start - origin : entry.stop - origin]
    if part.data_ptr() % entry.dtype.itemsize or part.storage_offset() % entry.dtype.itemsize:
        part = part.clone()
    return part.view(entry.dtype).view(entry.shape)
