"""Speed and peak memory of a model in a fresh process, so that nothing else is counted.

    python -m layerwise.report.probe MODEL [--json] [--threads N]

The process opens the model, reads a prompt and writes; its peak resident memory is measured by the kernel,
Python and PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from layerwise.errors import BadFile, LayerwiseError
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack


@dataclass(frozen=True)
class Probe:
    """What the fresh process found; None where it could not be measured, and `why`."""

    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    peak_memory_bytes: int | None
    why: str | None = None


def probe(stack: Stack) -> Probe:
    """Measure `stack` in a fresh process with as many threads as this one.

    A stack without a folder is saved to a temporary one first. A module that layerwise did not build cannot
    be opened by another process, so nothing is measured for it.
    """
    if not isinstance(stack, DecoderStack):
        return Probe(None, None, None, f"{stack.name} is a module of this process only")
    with stored(stack) as folder:
        return probe_folder(folder)


def probe_folder(source: str | Path) -> Probe:
    """Measure the model at `source` in a fresh process. Raises BadFile where that process fails."""
    import torch

    command = [sys.executable, "-m", "layerwise.report.probe", str(source), "--json"]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BadFile(
            f"{source} could not be run in a fresh process: {last[0]}",
            expected="a model that opens and fits into memory",
            do=f"see what `layerwise generate {source} hello` says",
        )
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    """This process's environment, with this very package in reach."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


@contextmanager
def stored(stack: DecoderStack) -> Iterator[Path]:
    """A folder that holds the stack: its own, or a temporary one while the context lasts."""
    if stack.folder is not None:
        yield stack.folder
        return
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        folder = Path(scratch) / "model"
        try:
            yield stack.save(folder)
        finally:
            stack.folder = None


def measure_here(source: str) -> Probe:
    """Open `source` in this process and measure; meant for a process that does nothing else."""
    from layerwise.generate.speed import decode_speed, prefill_speed
    from layerwise.stack.open import open

    stack = open(source)
    decode = decode_speed(stack)
    prefill = prefill_speed(stack)
    return Probe(round(decode, 2), round(prefill, 1), peak_memory())


def peak_memory() -> int:
    """The largest resident size this process has had, in bytes.

    On Linux VmHWM: getrusage would carry over the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m layerwise.report.probe", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of words")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads; 0 leaves the default")
    given = parser.parse_args()
    if given.threads:
        import torch

        torch.set_num_threads(given.threads)
    try:
        found = measure_here(given.model)
    except LayerwiseError as error:
        print(f"{type(error).__name__}: {error.given}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(asdict(found)))
    else:
        print(
            f"decode {found.decode_tokens_per_s} tokens/s, prefill {found.prefill_tokens_per_s} tokens/s, "
            f"peak memory {peak_memory() / 1e6:.0f} MB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
