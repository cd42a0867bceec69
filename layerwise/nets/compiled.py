"""The functions in C, compiled for this processor on first use.

Few new tokens pass a layer in forty small calls of torch, whose int4 kernels for a CPU read at a third of the speed of
memory. These functions do what decoding needs instead, and what prompts need as well, in float32, or in bfloat16 on
processors that multiply pairs of it or have a matrix unit. They are compiled once, in about 20 seconds on two cores,
where there is a C compiler with OpenMP, and kept in the cache folder.
Nothing depends on them: without a compiler, or with LAYERWISE_NATIVE=0 in the environment, torch's kernels are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from threading import Lock

import torch

from layerwise.places import cache_folder

SOURCES = [Path(__file__).with_name(name) for name in (
    "native.h", "wide.h", "half.h", "packed.h", "outputs.h", "groups.h", "native.c", "codes.c", "codes_wide.c",
    "dense.c", "pairs.c", "panels.c", "unit.c", "attend.c", "unit_attend.c", "block.c")]
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
         "-ffp-contract=off",  # so that a row's numbers do not depend on how many rows are multiplied at once
         "-fopenmp", "-fPIC", "-shared")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What numbers come and go as, and how the functions are told."""


_ONE_AT_A_TIME = Lock()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler for them."""
    if os.environ.get("LAYERWISE_NATIVE") == "0":
        return None
    try:
        with _ONE_AT_A_TIME:  # threads that lay blocks out ask at the same moment
            found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None
    found.packed_product.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int, c_int]
    found.packed_rows.argtypes = [c_void_p, c_void_p, c_int64, c_void_p]
    found.packed_numbers.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int, c_int]
    found.dense_product.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int, c_int]
    found.rms_norm.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p, c_int, c_int]
    found.gate_times.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int, c_int, c_int]
    found.attend.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, *[c_void_p] * 6, c_int, c_int, c_int]
    found.block_steps.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int]
    found.unit_multiplies.argtypes = [c_int64, c_int64]
    found.rms_norm.restype = found.gate_times.restype = found.packed_numbers.restype = None
    return found


def matrix_unit() -> bool:
    """Whether the functions multiply in bfloat16 by a matrix unit (AMX): there is one, and the system allows it."""
    found = library()
    return found is not None and bool(found.unit_multiplies(16, 32))  # one tile


def _compiled() -> Path:
    """The shared library for this source, compiler and processor, made if it is not there yet."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("a C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    texts = [source.read_bytes() for source in SOURCES]
    key = hashlib.sha256(b"\0".join([*texts, version, _processor(), " ".join(FLAGS).encode()]))
    target = cache_folder() / "native" / f"{key.hexdigest()[:24]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            beside = Path(folder) / target.name
            sources = sorted((source for source in SOURCES if source.suffix == ".c"), key=os.path.getsize, reverse=True)
            objects = [str(beside.with_name(f"{source.stem}.o")) for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda source, to: _run(compiler, "-c", str(source), "-o", to), sources, objects))
            _run(compiler, *objects, "-o", str(beside), "-lm")
            beside.replace(target)
    return target


def _run(compiler: str, *arguments: str) -> None:
    subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, check=True, timeout=300)


def _processor() -> bytes:
    """What the processor can do: code compiled for one does not run on every other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
