"""Products of few rows with a packed matrix, and the norm beside them, in C that is compiled here for this processor.

torch's own int4 kernels for a CPU read few rows at a third of the speed of memory and round to bfloat16. `native.c`
holds what decoding needs instead. It is compiled once, in two seconds, where a C compiler with OpenMP is found, and
kept in the cache folder; nothing depends on it: without a compiler, or with LAYERWISE_NATIVE=0 in the environment,
torch's kernels are used.

Shapes: O outputs, I inputs padded to whole groups, G groups of a scale, M rows of x.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.nets.bits import pack, unpack
from layerwise.places import cache_folder
from layerwise.spec import Format

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
         "-ffp-contract=off",  # so that a row's numbers do not depend on how many rows are multiplied at once
         "-fopenmp", "-fPIC", "-shared")
GROUPS = (256, 128, 64, 32)
NIBBLES, BYTES, SIGNED_BYTES = 4, 8, -8
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Matrix(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("codes", "scale", "zero")] + [
        (name, c_int64) for name in ("outputs", "inputs", "group", "kind")]


@dataclass(frozen=True)
class NativeMatrix:
    """Codes as nibbles, uint8 [O, I / 2], or as bytes, [O, I]; scale and (unless symmetric) zero, bfloat16 [O, G].

    Formats of 4 and 8 bits lie as they are stored, so that their tensors are shared; 2 and 3 bits become nibbles,
    5 and 6 bits become bytes.
    """

    store: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format
    inputs: int
    group: int

    @staticmethod
    def fits(format: Format, inputs: int) -> bool:
        """Whether the library is there and can hold a matrix of this format with `inputs` (padded) inputs."""
        return _group(format, inputs) is not None and library() is not None

    @staticmethod
    def build(stored: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, format: Format, inputs: int) -> NativeMatrix:
        """From the codes as a `PackedMatrix` stores them."""
        if format.bits not in (4, 8):
            wide = _stored_bits(format.bits)
            codes_OI = unpack(stored, format.bits, inputs) + _offset(format.bits)
            stored = pack(codes_OI, wide)
        group = _group(format, inputs)
        assert group is not None
        repeat = inputs // group // scale_OG.shape[1]
        if repeat > 1:
            scale_OG = scale_OG.repeat_interleave(repeat, 1)
            zero_OG = None if zero_OG is None else zero_OG.repeat_interleave(repeat, 1)
        zero_OG = None if zero_OG is None else zero_OG.contiguous()
        return NativeMatrix(stored.contiguous(), scale_OG.contiguous(), zero_OG, format, inputs, group)

    @cached_property
    def _struct(self) -> _Matrix:
        kind = SIGNED_BYTES if self.store.dtype == torch.int8 else _stored_bits(self.format.bits)
        zero = None if self.zero is None else self.zero.data_ptr()
        codes, scale = self.store.data_ptr(), self.scale.data_ptr()
        return _Matrix(codes, scale, zero, len(self.store), self.inputs, self.group, kind)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes over: addresses are its own."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _call(self) -> tuple[Any, int, int]:
        found = library()
        assert found is not None
        return found.packed_product, ctypes.addressof(self._struct), len(self.store)

    def product(self, x_MI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x w' + bias, [M, O] in the dtype of `x_MI`, float32 or bfloat16; `x_MI` may lack the padded inputs."""
        rows, inputs = x_MI.shape
        if inputs < self.inputs:
            x_MI = torch.nn.functional.pad(x_MI, (0, self.inputs - inputs))
        x_MI = x_MI.contiguous()
        multiply, matrix, outputs = self._call
        y_MO = x_MI.new_empty(rows, outputs)
        if multiply(matrix, x_MI.data_ptr(), rows, None if bias_O is None else bias_O.data_ptr(), y_MO.data_ptr(),
                    DTYPES[x_MI.dtype], torch.get_num_threads()):
            raise MemoryError(f"no memory for {rows} rows of {inputs} inputs")
        return y_MO

    def codes(self, start: int, stop: int) -> Tensor:
        """The codes of rows `start` to `stop`, uint8 [stop - start, I]."""
        return self._read(self.store[start:stop])

    def gather(self, rows_M: Tensor) -> Tensor:
        """The codes of the given rows, uint8 [M, I]."""
        return self._read(self.store[rows_M])

    def _read(self, store: Tensor) -> Tensor:
        return unpack(store, _stored_bits(self.format.bits), self.inputs) - _offset(self.format.bits)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x float32 or bfloat16, weight float32."""
    found = library()
    assert found is not None
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    found.rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, y.data_ptr(), DTYPES[x.dtype])
    return y


def silu_times(x: Tensor) -> Tensor:
    """silu(gate) * up; gate and up are the halves of the last dimension of x, float32 or bfloat16."""
    found = library()
    assert found is not None
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    found.silu_times(x.data_ptr(), y.numel() // width, width, y.data_ptr(), DTYPES[x.dtype])
    return y


def _stored_bits(bits: int) -> int:
    return NIBBLES if bits <= NIBBLES else BYTES


def _offset(bits: int) -> int:
    """What moves the middle of a code to that of its nibble or byte."""
    return (1 << _stored_bits(bits) - 1) - (1 << bits - 1)


def _group(format: Format, inputs: int) -> int | None:
    """The largest group of the library that divides the format's; None where there is none."""
    return next((group for group in GROUPS if (format.group or inputs) % group == 0), None)


# the library ---------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler, or what it makes is not right on this machine."""
    if os.environ.get("LAYERWISE_NATIVE") == "0":
        return None
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None
    found.packed_product.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int]
    found.rms_norm.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p, c_int]
    found.silu_times.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int]
    found.rms_norm.restype = found.silu_times.restype = None
    return found if _right(found) else None


def _right(found: ctypes.CDLL) -> bool:
    """Whether a small product is exact."""
    codes = torch.arange(64, dtype=torch.uint8).view(2, 32) * 5
    scale, x, y = torch.tensor([[2.0], [0.5]]).bfloat16(), torch.zeros(1, 32), torch.zeros(1, 2)
    x[0, 3], x[0, 20] = 1.0, -1.0
    matrix = _Matrix(codes.data_ptr(), scale.data_ptr(), None, 2, 32, 32, BYTES)
    found.packed_product(ctypes.addressof(matrix), x.data_ptr(), 1, None, y.data_ptr(), 0, 1)
    wanted = (codes.double() - 128) * scale.double()
    return bool(((y.double() - x.double() @ wanted.T).abs() < 1e-3).all())


def _compiled() -> Path:
    """The shared library for this source, compiler and processor, made if it is not there yet."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("a C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, _processor(), " ".join(FLAGS).encode()]))
    target = cache_folder() / "native" / f"{key.hexdigest()[:24]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            beside = Path(folder) / target.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(beside), "-lm"], capture_output=True, check=True,
                           timeout=120)
            beside.replace(target)
    return target


def _processor() -> bytes:
    """What the processor can do: code compiled for one does not run on every other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
